"""Patch-contrastive segmentation: its networks have the paper's size, any number of ranks is one process, none waits
for another, and every sampler goes with every likeness."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ssl_dist import config, dist, train
from ssl_dist.data.batch import Batch, View
from ssl_dist.methods import patches
from ssl_dist.methods.patchseg import Config, Method
from ssl_dist.models.batchnorm import synchronise
from ssl_dist.models.encoder import Encoder, EncoderError
from ssl_dist.models.fcnn import Confidence, Featuriser

run = runpy.run_path(str(Path(__file__).with_name("ranks.py")))["run"]
small = runpy.run_path(str(Path(__file__).with_name("small.py")))
apart, one_thread, TILES = small["apart"], small["one_thread"], small["TILES"]

WORLDS = (2, 3)
VIEW = (View(size=64),)
SAID = {"patch": 16, "stride": 8, "drawn": 6, "anchors": 4, "views": VIEW, "temperature": 0.1}
# How patches are drawn and compared, and of how many classes.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "one class": (SAID, 1),
    "three classes, as ink": ({**SAID, "shown": "ink", "sampler": "top", "top": 9}, 3),
    "features": ({**SAID, "similarity": "features", "patch": 50, "stride": 7}, 2),
}


def build(said: dict[str, Any], classes: int, kind: torch.dtype = torch.float64) -> Method:
    torch.manual_seed(0)
    encoder = Encoder("fcnn", {"classes": classes, "dilations": [1, 3]}, (0.0,) * 3, (1.0,) * 3)
    return synchronise(Method(Config(**said), encoder)).to(kind)


def batch(step: int, tiles: int = TILES) -> Batch:
    """Squares of ink on noise."""
    generator = np.random.default_rng(step)
    pixels = generator.integers(150, 256, (tiles, 64, 64, 3), dtype=np.uint8)
    for tile in pixels:
        for top, left in generator.integers(0, 52, (4, 2)):
            tile[top:top + 12, left:left + 12] //= 3
    return Batch([torch.from_numpy(pixels)], [np.zeros((tiles, 4))], np.arange(tiles), np.arange(tiles) + step * tiles)


def learn(said: dict[str, Any], classes: int, steps: int = 2) -> list[dict[str, Tensor]]:
    method = build(said, classes)
    optimizer, found = small["sgd"](method), []
    for step in range(steps):
        own = small["cut"](batch(step), dist.world(), dist.rank())
        optimizer.zero_grad()
        told = method(own, step / steps)
        told["loss"].backward()
        gradients = {name: torch.stack(dist.gather(each.grad)).mean(0) for name, each in method.named_parameters()}
        for name, each in method.named_parameters():
            each.grad = gradients[name].clone()
        optimizer.step()
        told["confidence"] = dist.average(told["confidence"])       # of own tiles alone; the log averages it
        found.append({**{name: each.detach() for name, each in told.items()},
                      **{f"gradient {name}": each for name, each in gradients.items()},
                      **{f"state {name}": each.clone() for name, each in method.state_dict().items()}})
    return found


def one_sided(_: Path) -> dict[str, Tensor]:
    """What ranks say where the maps of the first are sure of nothing, and of those of the others everything; and where
    no rank has a patch of the class."""
    found = {}
    for name, levels in (("some", (-20.0, 20.0)), ("none", (-20.0, -20.0))):
        method = build(SAID, 1)
        with torch.no_grad():
            network = method.encoder.network
            network.last.weight.zero_()
            network.last.bias.fill_(levels[min(dist.rank(), 1)])
        told = method(small["cut"](batch(0), dist.world(), dist.rank()), 0.0)
        told["loss"].backward()
        found[name] = told["loss"].detach()
        found[f"{name}, finite"] = torch.stack([each.grad.isfinite().all() for each in method.parameters()]).all()
        found[f"{name}, positives"] = told["positives"]
    return found


def on_ranks(folder: Path) -> dict[str, Any]:
    return {**{name: learn(*case) for name, case in CASES.items()}, "one-sided": one_sided(folder)}


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list]:
    return run(on_ranks, WORLDS, tmp_path_factory.mktemp("ranks"), "ssl_dist.methods.patchseg")


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", CASES)
def test_on_any_number_of_ranks_it_does_what_one_process_does(name: str, world: int, ranked: dict) -> None:
    alone = learn(*CASES[name])
    for rank in ranked[world]:
        for step, (mine, expected) in enumerate(zip(rank[name], alone, strict=True)):
            assert mine.keys() == expected.keys()
            for key, value in expected.items():
                # 1e-8: a bias before a BatchNorm has no gradient but what rounding makes.
                assert apart(mine[key], value) < 1e-8, f"step {step}: {key} is {apart(mine[key], value)} apart"
    moved = [float(value.abs().max()) for key, value in alone[-1].items() if key.startswith("gradient encoder")]
    assert max(moved) > 1e-6, "what was compared does not move"


@pytest.mark.parametrize("world", WORLDS)
def test_no_rank_waits_where_some_have_no_patch_of_a_kind(world: int, ranked: dict) -> None:
    for rank in ranked[world]:
        told = rank["one-sided"]
        assert float(told["some, positives"]) == pytest.approx((world - 1) / world)
        assert float(told["some"]) == pytest.approx(float(ranked[world][0]["one-sided"]["some"])) != 0
        assert float(told["none"]) == float(told["none, positives"]) == 0
        assert told["some, finite"] and told["none, finite"]


def test_networks_have_the_papers_size() -> None:
    sizes = [sum(each.numel() for each in network.parameters()) for network in (Confidence(), Featuriser())]
    assert sizes == [7_345, 3_530]
    assert sum(sizes) == 10_875


def test_a_pixel_is_decided_by_what_lies_within_reach_and_no_further() -> None:
    torch.manual_seed(0)
    network = Confidence(1, 4, (1, 2, 5)).double().eval()
    pixels = torch.rand(1, 3, 61, 61, dtype=torch.float64, requires_grad=True)
    network(pixels)[0, 0, 30, 30].backward()
    assert pixels.grad is not None
    there = pixels.grad[0].abs().sum(0).nonzero()
    assert [int(there.min()), int(there.max())] == [30 - network.reach, 30 + network.reach]


def test_what_is_drawn_follows_from_seed_and_step_alone() -> None:
    method, like = build(SAID, 1), torch.empty(0, dtype=torch.float64)
    torch.manual_seed(99)           # whatever else draws numbers
    first = method._chances(0.5, TILES, like)
    again = build(SAID, 1)._chances(0.5, TILES, like)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert not torch.equal(first[0], method._chances(0.25, TILES, like)[0])
    torch.manual_seed(1)
    other = Method(Config(**SAID), Encoder("fcnn", {"dilations": [1]}, (0.0,) * 3, (1.0,) * 3))
    assert not torch.equal(first[0], other._chances(0.5, TILES, like)[0])


@pytest.mark.parametrize("sampler", patches.SAMPLERS)
@pytest.mark.parametrize("similarity", patches.SIMILARITIES)
def test_every_sampler_goes_with_every_similarity(sampler: str, similarity: str) -> None:
    said = {**SAID, "sampler": sampler, "similarity": similarity, "top": 3, "patch": 50, "stride": 7, "drawn": 2}
    method = build(said, 2, torch.float32)
    told = method(small["cut"](batch(0), 4, 0), 0.0)
    told["loss"].backward()
    assert all(bool(each.isfinite()) for each in told.values())
    assert all(bool(each.grad.isfinite().all()) for each in method.parameters())


def test_squares_of_ink_become_what_is_sought() -> None:
    """A few steps on ink on noise: the map of one class is higher where ink is than anywhere else."""
    method = build({**SAID, "shown": "ink", "sampler": "top", "top": 6, "patch": 8, "stride": 4}, 3, torch.float32)
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
    for step in range(25):
        optimizer.zero_grad()
        method(batch(step, 4), step / 25)["loss"].backward()
        optimizer.step()
    shown = batch(100, 4).views[0]
    with torch.inference_mode():
        maps = method.eval().encoder(shown)
    ink = shown.float().mean(dim=3) < 90
    assert max(float(each[ink].mean() - each[~ink].mean()) for each in maps.unbind(1)) > 0.3


@pytest.mark.parametrize(("said", "words"), [
    ({"views": (View(size=64), View(size=64))}, "takes one"), ({"patch": 65}, "larger than the view"),
    ({"similarity": "features", "patch": 40}, "of 50 pixels"),
    ({"sampler": "top", "top": 49}, "leaves none of the 49")])
def test_what_cannot_be_is_refused(said: dict[str, Any], words: str) -> None:
    broken = Config(**{**SAID, **said}).rules()
    assert any(words in each for each in broken), broken
    assert not Config(**SAID).rules()


def test_networks_of_maps_and_of_vectors_are_not_taken_for_each_other(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="fcnn makes a map of a tile and no vector"):
        train.build(config.load_train("pretrain/simclr", [f"data.shards=[{tmp_path}]", "encoder.name=fcnn"]))
    network = Encoder("fcnn", {}, (0.0,) * 3, (1.0,) * 3)
    with pytest.raises(EncoderError, match="no vector"):        # what kNN and `ssl-dist embed` ask of it first
        _ = network.identity
    with pytest.raises(EncoderError, match=r"encoder\.name=fcnn"):
        train.build(config.load_train("pretrain/patchseg", [f"data.shards=[{tmp_path}]", "encoder.name=resnet18",
                                                            "encoder.args={classes: null}"]))


@pytest.mark.parametrize("args", [{"classes": 0}, {"dilations": [1, 0]}, {"dilations": [1.5]}, {"width": "8"},
                                  {"sees": "smell"}])
def test_a_network_of_maps_that_cannot_be_is_refused_in_words(args: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=r"classes=|is not one of light, colours, stains"):
        Encoder("fcnn", args, (0.0,) * 3, (1.0,) * 3)
