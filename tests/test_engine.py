"""The engine at every stage of ZeRO and number of ranks, against a plain loop of torch over the whole batch."""

import contextlib
import runpy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_dist import checkpoint, config, dist, optim
from ssl_dist.config import Optim, Train
from ssl_dist.data.batch import Batch
from ssl_dist.engine import Engine
from ssl_dist.methods import base
from ssl_dist.models.batchnorm import synchronise

run = runpy.run_path(str(Path(__file__).with_name("ranks.py")))["run"]

CPU = torch.device("cpu")
BATCH, SIDE, STEPS, STOP = 12, 8, 6, 3
WORLDS, STAGES = (3, 2, 1), (0, 1, 2)
OPTIMIZERS = {"adamw": Optim(name="adamw", lr=0.01, weight_decay=0.1),
              "sgd": Optim(name="sgd", lr=0.05, weight_decay=0.1, clip=0.2)}


class Net(base.Method):
    """Convolutions with BatchNorm or none; one weight that learns first and rests then, and one the other way round."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU(), nn.Conv2d(8, 7, 1),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 5))
        self.early, self.late = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(5, 5))
        self.views = ()

    def resting(self) -> list[nn.Parameter]:
        return [self.early, self.late]

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """As prototypes return to unit length."""
        moved = self.early if progress < 0.5 else self.late
        moved.copy_(F.normalize(moved, dim=1))

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        for weight, rests in ((self.early, progress >= 0.5), (self.late, progress < 0.5)):
            base.freeze(weight, rests)
        pixels = batch.views[0].permute(0, 3, 1, 2).to(self.early.dtype) / 255
        # What a resting weight does not even touch has no gradient either.
        out = self.encoder(pixels) @ (self.early if progress < 0.5 else self.late)
        return {"loss": F.mse_loss(out, pixels.mean((2, 3)).repeat(1, 2)[:, :5])}


def whole(step: int) -> np.ndarray:
    return np.random.default_rng(step).integers(0, 256, (BATCH, SIDE, SIDE, 3), dtype=np.uint8)


def batch(pixels: np.ndarray) -> Batch:
    return Batch([torch.from_numpy(pixels)], [np.zeros((len(pixels), 4))], np.arange(len(pixels)),
                 np.arange(len(pixels)))


def net(norm: bool) -> Net:
    torch.manual_seed(4)
    return Net(norm)


def built(told: Optim, stage: int, parts: int = 1, norm: bool = True) -> Engine:
    settings = Train(run=Path("nowhere"), data=config.Data(shards=[], batch=BATCH), method={}, steps=STEPS, optim=told,
                     zero=stage, accumulate=parts)
    method = synchronise(net(norm))
    assert isinstance(method, Net)
    return Engine(method, optim.build(method, told, method.resting()), config.deepspeed(settings, dist.world()), CPU)


def trained(engine: Engine, first: int, last: int, parts: int = 1) -> list[float]:
    """The norm of every step's gradient."""
    norms = []
    for step in range(first, last):
        own = batch(np.array_split(whole(step), dist.world())[dist.rank()])
        for number, part in enumerate(own.split(parts)):
            with engine.part(number, parts) if parts > 1 else contextlib.nullcontext():
                engine.backward(engine(part, step / STEPS)["loss"])
        norms.append(engine.gradient_norm())
        engine.step()
        engine.method.after_step(step / STEPS)     # type: ignore[operator]
    return norms


def plainly(told: Optim, norm: bool = True) -> dict[str, Any]:
    """Torch alone, one process, in double precision: all that the engine must come to."""
    method = net(norm).double()
    optimizer, found = optim.build(method, told), {"norms": [], "at stop": {}}
    for step in range(STEPS):
        optimizer.zero_grad()
        method(batch(whole(step)), step / STEPS)["loss"].backward()
        norms = torch.nn.utils.clip_grad_norm_(method.parameters(), told.clip or float("inf"))
        found["norms"].append(float(norms))
        optimizer.step()
        method.after_step(step / STEPS)
        if step == STOP - 1:
            found["at stop"] = {name: weight.detach().clone() for name, weight in method.named_parameters()}
    return {**found, "weights": {name: weight.detach() for name, weight in method.named_parameters()}}


def everything(engine: Engine) -> dict[str, Tensor]:
    return {kind + name: tensor.detach().clone().contiguous() for kind, tensors in (
        ("weights ", engine.weights()), ("buffers ", engine.buffers()), ("moments ", engine.moments()))
        for name, tensor in tensors.items()}


def on_ranks(folder: Path) -> dict[str, Any]:
    """Every stage: trained, stopped, saved, resumed; and what others saved, taken up. Largest world first."""
    found: dict[str, Any] = {}
    for name, told in OPTIMIZERS.items():
        for stage in STAGES:
            root = folder / name / f"{stage}-of-{dist.world()}"
            engine = built(told, stage)
            norms = trained(engine, 0, STOP)
            at_stop = everything(engine)
            checkpoint.save(root, STOP, engine, {}, keep=2)
            norms += trained(engine, STOP, STEPS)
            again = built(told, stage)
            checkpoint.load(checkpoint.newest(root), again)
            loaded = everything(again)
            found[f"{name} {stage}"] = {"norms": norms, "at stop": at_stop, "loaded": loaded,
                                        "whole": everything(engine), "resumed": trained(again, STOP, STEPS),
                                        "again": everything(again)}
            for other in sorted((folder / name).iterdir()):
                if not other.name.endswith(f"of-{dist.world()}"):
                    taken = built(told, stage)
                    checkpoint.load(checkpoint.newest(other), taken)
                    found[f"{name} {stage} from {other.name}"] = {
                        "loaded": everything(taken), "norms": trained(taken, STOP, STEPS), "then": everything(taken)}
    for stage in STAGES:
        engine = built(OPTIMIZERS["adamw"], stage, parts=2, norm=False)
        norms = trained(engine, 0, STEPS, parts=2)
        found[f"parts {stage}"] = {"norms": norms, "whole": everything(engine)}
        engine = built(OPTIMIZERS["adamw"], stage, norm=False)
        loss = engine(batch(whole(0)[:2]), 0.0)["loss"]
        engine.backward(loss * (float("inf") if dist.rank() == dist.world() - 1 else 1.0))
        found[f"bad {stage}"] = engine.gradient_norm()
        untouched, engine = (built(OPTIMIZERS["adamw"], stage, norm=False) for _ in range(2))
        norms = trained(untouched, 0, STEPS)
        again = trained(engine, 0, STOP)
        engine.backward(engine(batch(whole(0)[:2]), STOP / STEPS)["loss"] * float("nan"))
        engine.gradient_norm()
        engine.discard()
        found[f"discard {stage}"] = {"norms": norms, "again": again + trained(engine, STOP, STEPS),
                                     "untouched": everything(untouched), "whole": everything(engine)}
    return found


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    return run(on_ranks, WORLDS, tmp_path_factory.mktemp("ranks"), "deepspeed")


def weights(found: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, value in found.items():
        if name.startswith("weights "):
            yield name.removeprefix("weights "), value


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of all weights."""
    return max(float((one[f"weights {name}"] - value).abs().max()) for name, value in weights(other))


@pytest.mark.parametrize("stage", STAGES)
def test_a_process_trains_again_in_another_group(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a notebook does: DeepSpeed must keep nothing of the first."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    found = []
    for _ in range(2):
        dist.start(CPU)
        try:
            found.append(trained(built(OPTIMIZERS["adamw"], stage), 0, STEPS))
        finally:
            dist.stop()
    assert found[0] == found[1]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("world", WORLDS)
def test_it_steps_as_a_plain_loop_over_the_whole_batch(world: int, name: str, stage: int, ranked: dict) -> None:
    expected = plainly(OPTIMIZERS[name])
    for rank in ranked[world]:
        found = rank[f"{name} {stage}"]
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        for moment, told in (("at stop", expected["at stop"]), ("whole", expected["weights"])):
            for weight, value in weights(found[moment]):
                # Adam makes a step of 0.01 of the smallest gradient, rounding and all.
                bound = 1e-5 if name == "sgd" else 1e-4
                torch.testing.assert_close(value.double(), told[weight], rtol=10 * bound, atol=bound, msg=weight)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("world", WORLDS)
def test_what_rests_does_not_move_by_a_bit_and_all_else_does(world: int, name: str, stage: int, ranked: dict) -> None:
    start = dict(net(True).named_parameters())
    for rank in ranked[world]:
        found = rank[f"{name} {stage}"]
        at_stop, end = dict(weights(found["at stop"])), dict(weights(found["whole"]))
        assert torch.equal(at_stop["late"], start["late"]) and not torch.equal(at_stop["early"], start["early"])
        assert torch.equal(end["early"], at_stop["early"]) and not torch.equal(end["late"], at_stop["late"])
        others = start.keys() - {"early", "late"}
        assert not [other for other in others if torch.equal(end[other], at_stop[other])]
        for moment in [key for key in found["whole"] if "early|" in key and not key.endswith("step")]:
            assert torch.equal(found["whole"][moment], found["at stop"][moment]), moment
        for moment in [key for key in found["at stop"] if "late|" in key and not key.endswith("step")]:
            assert not found["at stop"][moment].any(), moment


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("world", WORLDS)
def test_a_resumed_run_is_the_same_to_the_last_bit(world: int, name: str, stage: int, ranked: dict) -> None:
    for rank in ranked[world]:
        found = rank[f"{name} {stage}"]
        assert same(found["at stop"], found["loaded"]) == []
        assert same(found["whole"], found["again"]) == []
        assert found["resumed"] == found["norms"][STOP:]
        assert same(dict(weights(found["whole"])), dict(weights(ranked[world][0][f"{name} {stage}"]["whole"]))) == []


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_goes_on_at_another_stage_and_number_of_ranks(name: str, stage: int, ranked: dict) -> None:
    seen = 0
    for world in WORLDS[1:]:
        for rank in ranked[world]:
            for before in STAGES:
                for others in (each for each in WORLDS if each > world):
                    saved = ranked[others][0][f"{name} {before}"]
                    taken = rank[f"{name} {stage} from {before}-of-{others}"]
                    kept = {key: value for key, value in saved["at stop"].items() if not key.startswith("buffers")}
                    assert not [key for key, value in kept.items() if key in taken["loaded"]
                                and not torch.equal(value, taken["loaded"][key])]
                    assert kept.keys() - taken["loaded"].keys() <= {key for key in kept if "late|" in key}
                    assert taken["norms"][0] == pytest.approx(saved["norms"][STOP], rel=1e-6)
                    # Three of Adam's steps make more of a rounding.
                    assert apart(saved["whole"], taken["then"]) < (1e-6 if name == "sgd" else 5e-5)
                    seen += 1
    assert seen == 3 * 2 + 6


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", WORLDS)
def test_parts_of_a_batch_add_up_to_the_whole(world: int, stage: int, ranked: dict) -> None:
    expected = plainly(OPTIMIZERS["adamw"], norm=False)
    for rank in ranked[world]:
        found = rank[f"parts {stage}"]
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        for weight, value in weights(found["whole"]):
            torch.testing.assert_close(value.double(), expected["weights"][weight], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", WORLDS)
def test_every_rank_hears_of_a_gradient_that_is_no_number(world: int, stage: int, ranked: dict) -> None:
    assert not [rank[f"bad {stage}"] for rank in ranked[world] if np.isfinite(rank[f"bad {stage}"])]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", WORLDS)
def test_gradients_that_are_discarded_leave_no_trace(world: int, stage: int, ranked: dict) -> None:
    for rank in ranked[world]:
        found = rank[f"discard {stage}"]
        assert found["norms"] == found["again"]
        assert same(found["untouched"], found["whole"]) == []


def test_lars_does_not_go_with_zero() -> None:
    told = Train(run=Path("nowhere"), data=config.Data(shards=[], batch=BATCH), method={"name": "simclr"}, steps=1,
                 optim=Optim(name="lars"))
    assert told.rules() == []
    for stage in (1, 2):
        (broken,) = replace(told, zero=stage).rules()
        assert f"zero={stage}" in broken and "optim.name=lars" in broken and "use zero=0" in broken
