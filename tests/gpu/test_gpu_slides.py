"""Slides on a GPU: the sparse encoder and its gradients are those of the CPU."""

import pytest
import torch

from ssl_dist.data.batch import Batch, SlideView
from ssl_dist.methods import gigassl

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]


@pytest.mark.parametrize("kind", ["sparse", "mlp"])
def test_loss_and_gradients_of_giga_ssl_are_those_of_the_cpu(kind: str) -> None:
    torch.manual_seed(0)
    config = gigassl.Config(view=SlideView(tiles=6), hidden=32, width=16)
    method = gigassl.Method(config, gigassl.Method.network(kind, {"tiles": 12, "width": 24}, (), ())).double()
    views = [each for _ in range(2) for each in (torch.randn(16, 6, 12, dtype=torch.float64),
                                                 torch.randint(-4, 5, (16, 6, 2)))]
    rows = torch.arange(16).numpy()
    found = []
    for place in ("cpu", "cuda"):
        method.zero_grad()
        own = method.to(place)
        loss = own(Batch(views, [], rows, rows).to(torch.device(place)), 0.0)["loss"]
        loss.backward()
        found.append([loss.detach().cpu(), *(each.grad.cpu().clone() for each in own.parameters())])
    assert all(torch.allclose(one, other, rtol=1e-8, atol=1e-10) for one, other in zip(*found, strict=True))
