"""Giga-SSL: its loss against plain loops, on several ranks that of one, and what it can tell apart.

B slides   T tiles of a view   D width
"""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from ssl_dist import dist
from ssl_dist.data.batch import Batch, SlideView
from ssl_dist.methods import gigassl
from ssl_dist.models import own
from ssl_dist.models.batchnorm import synchronise
from ssl_dist.models.encoder import Encoder, EncoderError
from ssl_dist.models.sparse import SlideEncoder

run = runpy.run_path(str(Path(__file__).with_name("ranks.py")))["run"]
small = runpy.run_path(str(Path(__file__).with_name("small.py")))
one_thread, apart = small["one_thread"], small["apart"]

SLIDES, TILES, WIDTH = 12, 4, 6
WORLDS = (1, 2, 3)


def build(kind: str = "sparse", width: int = 8) -> gigassl.Method:
    torch.manual_seed(0)
    config = gigassl.Config(view=SlideView(tiles=TILES), hidden=16, width=8, temperature=0.2)
    return synchronise(gigassl.Method(config, gigassl.Method.network(kind, {"tiles": WIDTH, "width": width}, (), ())
                                      )).double()


def batch(rank: int = 0, world: int = 1) -> Batch:
    """One rank's share of a batch of views."""
    numbers = np.random.default_rng(3)
    views = [torch.from_numpy(each) for _ in range(2) for each in (
        numbers.normal(size=(SLIDES, TILES, WIDTH)), numbers.integers(-2, 3, (SLIDES, TILES, 2)))]
    share = SLIDES // world
    own_B = slice(rank * share, (rank + 1) * share)
    return Batch([view[own_B] for view in views], [], np.arange(SLIDES)[own_B], np.arange(SLIDES)[own_B])


def on_ranks(_: Path) -> dict[str, Tensor]:
    """Loss, averaged gradients, and running statistics, after one pass."""
    method = build()
    loss = method(batch(dist.rank(), dist.world()), 0.0)["loss"]
    loss.backward()
    return {"loss": loss.detach(), **{name: dist.average(each.grad) for name, each in method.named_parameters()},
            **{name: each.clone() for name, each in method.named_buffers() if "running" in name}}


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Tensor]]]:
    return run(on_ranks, WORLDS, tmp_path_factory.mktemp("ranks"), "ssl_dist.methods.gigassl", "ssl_dist.dist")


@pytest.mark.parametrize("world", WORLDS[1:])
def test_several_ranks_have_the_loss_gradients_and_statistics_of_one(world: int, ranked: dict[int, list[Any]]) -> None:
    (truth,) = ranked[1]
    assert truth["loss"] > 0.5 and all(each.abs().max() > 0 for name, each in truth.items() if "weight" in name)
    for found in ranked[world]:
        assert found.keys() == truth.keys()
        assert all(apart(found[name], truth[name]) < 1e-9 for name in truth)


def test_the_loss_is_that_of_loops_over_slides(ranked: dict[int, list[Any]]) -> None:
    """Vectors of slides by the encoder's own parts, one view of one slide at a time; the loss in NumPy."""
    method, given = build(), batch()
    with torch.no_grad():
        features = torch.cat(given.views[::2])
        cells = torch.cat(given.views[1::2])
        owner = torch.tensor([slide for slide in range(2 * SLIDES) for _ in range(TILES)])
        vectors = method.encoder(features.reshape(-1, WIDTH), cells.reshape(-1, 2), owner, 2 * SLIDES)
        projected = method.projector(vectors).numpy()
    unit = projected / np.linalg.norm(projected, axis=1, keepdims=True)
    total = 0.0
    for row in range(2 * SLIDES):
        partner = (row + SLIDES) % (2 * SLIDES)
        scores = [float(unit[row] @ unit[other]) / 0.2 for other in range(2 * SLIDES) if other != row]
        total += -float(unit[row] @ unit[partner]) / 0.2 + np.log(np.sum(np.exp(scores)))
    assert float(ranked[1][0]["loss"]) == pytest.approx(total / (2 * SLIDES), rel=1e-12)


@pytest.mark.parametrize("kind", ["sparse", "mlp"])
def test_only_a_sparse_encoder_knows_where_tiles_lie(kind: str) -> None:
    method, given = build(kind).eval(), batch()
    features, cells = given.views[:2]
    with torch.no_grad():
        before = method.encoder.of_views(features, cells)
        moved = method.encoder.of_views(features, cells.roll(1, dims=1))
        together = method.encoder.of_views(features.roll(1, dims=1), cells.roll(1, dims=1))
    assert apart(together, before) < 1e-12, "the order of tiles says nothing"
    assert (apart(moved, before) < 1e-12) is (kind == "mlp")


def test_it_begins_as_the_last_stage_of_a_resnet_once_and_not_by_being_built(tmp_path: Path) -> None:
    torch.manual_seed(7)
    Encoder("resnet18", {}, (0.5,) * 3, (0.5,) * 3).save(tmp_path, 64, {})
    config = gigassl.Config(begin_as=str(tmp_path))
    method = gigassl.Method(config, gigassl.Method.network("sparse", {}, (), ()))
    dense: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    weight = method.encoder.blocks[1].conv2.weight
    assert not torch.equal(weight, dense.layer4[1].conv2.weight)
    method.begin()
    assert torch.equal(weight, dense.layer4[1].conv2.weight) and weight.is_contiguous()
    with torch.device("meta"):
        gigassl.Method(config, gigassl.Method.network("sparse", {}, (), ()))
    narrow = gigassl.Method(config, gigassl.Method.network("sparse", {"tiles": 6}, (), ()))
    with pytest.raises(ValueError, match="begins as layer4"):
        narrow.begin()


@pytest.mark.parametrize(("name", "args"), [("resnet18", {}), ("sparse", {"widht": 3}), ("sparse", {"kind": "mlp"})])
def test_an_encoder_that_is_none_of_slides_is_refused(name: str, args: dict[str, Any]) -> None:
    with pytest.raises(EncoderError, match="makes no encoder of slides"):
        gigassl.Method.network(name, args, (), ())


def test_a_network_of_ours_comes_back_from_its_folder_and_a_strange_folder_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = SlideEncoder(5, 7).eval()
    for each in network.modules():
        if isinstance(each, nn.BatchNorm1d):
            each.running_mean.normal_()
    own.save(network, tmp_path, {"step": 3})
    again = own.load(tmp_path).eval()
    assert own.holds(tmp_path) and again.args == {"tiles": 5, "width": 7, "kind": "sparse"}
    given = torch.randn(3, TILES, 5), torch.randint(0, 4, (3, TILES, 2))
    with torch.inference_mode():
        assert torch.equal(again.of_views(*given), network.of_views(*given))
    config = tmp_path / "config.json"
    for content, said in (("{", "not readable"), ('{"architecture": "resnet18"}', "'resnet18'"),
                          ('{"architecture": "slide"}', "does not describe"),
                          ('{"architecture": "slide", "args": {"tiles": 9}}', "does not hold the weights")):
        config.write_text(content)
        with pytest.raises(EncoderError, match=said):
            own.load(tmp_path)
    own.save(network, tmp_path, {})
    network.blocks[0].conv1.weight.data[0] = torch.nan
    own.save(network, tmp_path, {})
    with pytest.raises(EncoderError, match="no numbers"):
        own.load(tmp_path)
    with pytest.raises(EncoderError, match="not an exported encoder"):
        own.load(tmp_path / "nowhere")
