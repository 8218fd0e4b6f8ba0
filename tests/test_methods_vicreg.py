"""VICReg's terms against loops and at their anchors; and that its file alone made it a method."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ssl_dist import config, schema
from ssl_dist.methods.vicreg import Config, vicreg


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("samples", "width"), [(2, 3), (9, 5), (4, 8)])
@pytest.mark.parametrize("extent", [0.3, 3.0])
def test_its_terms_are_what_the_paper_writes_down(samples: int, width: int, extent: float) -> None:
    a, b = extent * drawn(samples, width), extent * drawn(samples, width, seed=1)
    apart = sum(float(a[n, d] - b[n, d]) ** 2 for n in range(samples) for d in range(width)) / (samples * width)
    spread, repeated = 0.0, 0.0
    for view in (a.numpy(), b.numpy()):
        for i in range(width):
            one = view[:, i] - view[:, i].mean()
            spread += max(0.0, 1 - math.sqrt(one @ one / (samples - 1) + 1e-4)) / width / 2
            for j in range(width):
                other = view[:, j] - view[:, j].mean()
                repeated += (i != j) * (one @ other / (samples - 1)) ** 2 / width
    found = vicreg(a, b)
    assert {name: float(term) for name, term in found.items()} == pytest.approx(
        {"invariance": apart, "variance": spread, "covariance": repeated}, rel=1e-10, abs=1e-14)


def test_every_way_to_collapse_costs_its_own_term() -> None:
    one_point = torch.ones(8, 4, dtype=torch.float64)
    assert {name: float(term) for name, term in vicreg(one_point, one_point).items()} == pytest.approx(
        {"invariance": 0, "variance": 1 - 0.01, "covariance": 0}, abs=1e-12)
    one_feature = drawn(64, 1).expand(64, 4)
    one_feature = (one_feature - one_feature.mean(0)) / one_feature.std(0)
    assert {name: float(term) for name, term in vicreg(one_feature, one_feature).items()} == pytest.approx(
        {"invariance": 0, "variance": 0, "covariance": 2 * 3}, abs=1e-9)
    white, _ = np.linalg.qr(np.column_stack([np.ones(64), drawn(64, 4).numpy()]))
    white = torch.from_numpy(white[:, 1:] * math.sqrt(63))
    assert {name: float(term) for name, term in vicreg(white, -white).items()} == pytest.approx(
        {"invariance": 4 * 63 / 64, "variance": 0, "covariance": 0}, abs=1e-9)


def test_its_gradient_is_that_of_differences() -> None:
    a, b = (0.5 * drawn(5, 3, seed=seed) for seed in (0, 1))
    assert torch.autograd.gradcheck(lambda *views: tuple(vicreg(*views).values()),
                                    (a.requires_grad_(), b.requires_grad_()))


def test_half_precision_is_reckoned_in_float32() -> None:
    a, b = drawn(16, 8).bfloat16(), drawn(16, 8, seed=1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = vicreg(a, b)
    for name, exact in vicreg(a.double(), b.double()).items():
        assert found[name].dtype == torch.float32
        assert float(found[name]) == pytest.approx(float(exact), rel=1e-5)


def test_its_file_alone_made_it_a_method() -> None:
    assert "vicreg" in config.methods()
    loaded = config.load_train("pretrain/vicreg", ["data.shards=[.]"])
    own = config.method_config(loaded)
    assert own == schema.build(Config, {key: value for key, value in loaded.method.items() if key != "name"},
                               where="", prefix="")
    assert (own.invariance, own.variance, own.covariance, own.width) == (25, 25, 1, 8192)
