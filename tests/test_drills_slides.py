"""The promises on slides: what holds of runs on tiles holds of Giga-SSL on draws of slides, on three ranks."""

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.index import ShardError
from ssl_dist import config, train
from ssl_dist.models import encoder as encoders
from ssl_dist.models import own
from ssl_dist.models.encoder import Encoder, EncoderError
from ssl_dist.models.sparse import SlideEncoder

drill = runpy.run_path(str(Path(__file__).with_name("drill.py")))
bags = runpy.run_path(str(Path(__file__).with_name("bags.py")))
fault, ledger = drill["fault"], drill["ledger"]
WORLD, STEPS, BATCH = drill["WORLD"], drill["STEPS"], drill["BATCH"]
FAULTS = {"before the name": ("kill@save.rename:rank=0,step=4", -9, 7),
          "in the loss": ("kill@step.backward:rank=1,step=5", -9, 7),
          "asked to stop": ("term@step.forward:rank=2,step=3", 4, 4)}
CHAIN = ((2, 1, 0), (5, 3, 1), (7, 2, 2), (STEPS, 4, 0))         # until which step, on how many ranks, ZeRO stage


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drills")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bags["written"](tmp_path_factory.mktemp("draws") / "made", slides=31)


@pytest.fixture(scope="module")
def ended(home: Path, made: Path) -> dict[str, list[Any]]:
    """Every attempt of every run, one program for all."""
    jobs: list[tuple[Any, ...]] = [("whole", WORLD, [], "gigassl")]
    for name, (told, *_) in FAULTS.items():
        jobs += [(name, WORLD, [fault(told)], "gigassl"), (name, WORLD, [], "gigassl")]
    nan = fault("nan@step.forward:rank=1,step=5")
    jobs += [("skip", WORLD, [nan, "nonfinite=skip"], "gigassl")]
    jobs += [("hung", WORLD, [fault("hang@data.next:rank=2,step=3"), "hang=8"], "gigassl")]
    jobs += [("chain", world, [f"stop={stop}", f"zero={stage}"], "gigassl") for stop, world, stage in CHAIN]
    return drill["drills"](home, made, jobs)


@pytest.mark.parametrize("name", FAULTS)
def test_after_a_fault_samples_and_weights_are_those_of_a_run_without_it(name: str, home: Path,
                                                                         ended: dict[str, list[Any]]) -> None:
    drill["held"](name, *FAULTS[name], home, ended)


def test_any_number_of_ranks_and_any_stage_goes_on_with_the_same_slides(ended: dict[str, list[Any]],
                                                                        home: Path) -> None:
    assert [set(each.codes) for each in ended["chain"]] == [{0}] * len(CHAIN), ended["chain"][-1].said
    assert ledger(home / "chain") == ledger(home / "whole")
    chain, whole = ([json.loads(line) for line in (home / name / "metrics.jsonl").read_text().splitlines()]
                    for name in ("chain", "whole"))
    assert [row["loss"] for row in chain] == pytest.approx([row["loss"] for row in whole], rel=1e-4)


def test_the_ledger_names_the_first_view_s_draw_of_every_slide(home: Path, ended: dict[str, list[Any]]) -> None:
    assert not any(ended["whole"][0].codes)
    seen = ledger(home / "whole")
    assert [len(rows) for rows in seen.values()] == [BATCH] * STEPS
    slides = [[key.partition("-d")[0] for _, key in rows] for rows in seen.values()]
    assert all(len(set(each)) == BATCH for each in slides), "no slide twice in a batch of one epoch"
    assert len({key.rpartition("-d")[2] for rows in seen.values() for _, key in rows}) == bags["DRAWS"]


def test_a_hung_rank_is_named_and_a_batch_without_a_loss_leaves_no_trace(ended: dict[str, list[Any]],
                                                                         home: Path) -> None:
    hung = ended["hung"][0]
    assert set(hung.codes) == {6} and "hangs at data.next of step 3" in hung.said
    assert set(ended["skip"][0].codes) == {0}
    found = train.replay(home / "skip" / "replay" / "step-000005")
    assert found["world"] == WORLD and np.isfinite(found["loss"]) and not found["gradients"]


def test_the_run_leaves_an_encoder_of_slides_and_tells_what_it_learnt_of(home: Path,
                                                                         ended: dict[str, list[Any]]) -> None:
    assert not any(ended["whole"][0].codes)
    folder = home / "whole" / "encoder"
    network = own.load(folder)
    assert isinstance(network, SlideEncoder) and (network.tiles, network.width) == (16, 24)
    about = json.loads((folder / "config.json").read_text())["ssl_dist"]
    assert (about["method"], about["step"], about["tile_encoder_sha256"], about["tile_stage"]) == (
        "gigassl", STEPS, "0" * 64, 3)
    assert json.loads((folder / "pretraining.json").read_text())["counts"] == {
        "draws": 31 * bags["DRAWS"], "slides": 31, "patients": 16}
    card = (folder / "README.md").read_text()
    assert "gigassl on 31 slides of histology" in card and "| slides seen | 96 (8 steps of 12)" in card


def test_an_encoder_of_slides_is_refused_where_tiles_are_looked_at(home: Path, ended: dict[str, list[Any]]) -> None:
    assert not any(ended["whole"][0].codes)
    for what in (encoders.load, encoders.build, encoders.trained_size):
        with pytest.raises(EncoderError, match="is an encoder of slides"):
            what(home / "whole" / "encoder")


def test_what_does_not_go_together_is_refused_before_the_first_step(made: Path, shard: Path, tmp_path: Path) -> None:
    def rehearsed(*more: str, shards: tuple[Path, ...] = (made,)) -> dict[str, Any]:
        return train.rehearse(config.load_train("pretrain/gigassl", [
            f"run={tmp_path / 'run'}", f"data.shards=[{','.join(map(str, shards))}]", "encoder.args.tiles=16",
            "data.batch=6", *more]), 1)

    assert rehearsed()["steps an epoch"] == 5
    for more, said in ((("encoder.args.tiles=256",), "use encoder.args.tiles=16"),
                       (("encoder.name=resnet18",), "makes no encoder of slides"),
                       (("encoder.checkpointing=true",), "networks of timm"),
                       (("accumulate=2",), "takes its negatives from all"),
                       (("method.view.stretch=[2,1]",), "runs from high to low")):
        with pytest.raises((config.ConfigError, ValueError), match=said):
            rehearsed(*more)
    other = bags["written"](tmp_path / "other", slides=9, name="other")
    index_json = other / "index.json"
    index_json.write_text(index_json.read_text().replace("0" * 64, "1" * 64))
    with pytest.raises(config.ConfigError, match="different encoders of tiles"):
        rehearsed(shards=(made, other))
    index_json.write_text(index_json.read_text().replace("1" * 64, "0" * 64).replace('"stage": 3', '"stage": 4'))
    with pytest.raises(config.ConfigError, match="different stages of one"):
        rehearsed(shards=(made, other))
    Encoder("resnet18", {"layers": [1, 1, 1, 1]}, (0.5,) * 3, (0.5,) * 3).save(tmp_path, 64, {})
    with pytest.raises(config.ConfigError, match=r"method\.begin_as=timm:resnet18 is for encoder\.name=sparse"):
        rehearsed("method.begin_as=timm:resnet18", "encoder.name=mlp")
    with pytest.raises(config.ConfigError, match=r"method\.begin_as: .*begins as layer4"):
        rehearsed(f"method.begin_as={tmp_path}")
    with pytest.raises(ShardError, match="asked for are draws of slides"):
        rehearsed(shards=(shard,))
