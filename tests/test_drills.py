"""Faults by name on three ranks: after each the run is taken up again, and is in the end what it would have been.

A choice of them; the others are in test_drills_all.py, for `make test-faults`.
"""

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ssl_dist import checkpoint

drill = runpy.run_path(str(Path(__file__).with_name("drill.py")))
fault, ledger, weights, account = (drill[name] for name in ("fault", "ledger", "weights", "account"))
WORLD, STEPS = drill["WORLD"], drill["STEPS"]

# What goes wrong in the first attempt, and the exit codes of its rank (a signal's is negative) and of the others.
FAULTS = {
    "before the name": ("kill@save.rename:rank=0,step=4", -9, 7),
    "in a file": ("kill@save.file:rank=1,step=4", -9, 7),
    "asked while it saves": ("usr2@save.begin:rank=1,step=4", 4, 4),
    "one disk refuses once": ("full@save.file:rank=1,step=4", 0, 0),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drills")


@pytest.fixture(scope="module")
def ended(home: Path, shard: Path) -> dict[str, list[Any]]:
    """Every attempt of every run, one program for all."""
    nan = fault("nan@step.forward:rank=1,step=5")
    jobs: list[tuple[str, int, list[str]]] = [("whole", WORLD, [])]
    for name, (told, _, rest) in FAULTS.items():
        jobs += [(name, WORLD, [fault(told)]), *([(name, WORLD, [])] if rest else [])]
    jobs += [("skip", WORLD, [nan, "nonfinite=skip"]), ("fail", WORLD, [nan]),
             ("fail", WORLD, [nan, "nonfinite=rewind"])]
    jobs += [("chain", world, [f"stop={stop}", f"zero={stage}"])
             for stop, world, stage in ((2, 1, 0), (5, 3, 1), (7, 2, 2), (STEPS, 4, 0))]
    jobs += [("change", 1, more) for more in (["stop=4"], ["seed=3"], ["seed=3", "--allow-change", "seed"])]
    return drill["drills"](home, shard, jobs)


@pytest.mark.parametrize("name", FAULTS)
def test_after_a_fault_samples_and_weights_are_those_of_a_run_without_it(name: str, home: Path,
                                                                        ended: dict[str, list[Any]]) -> None:
    drill["held"](name, *FAULTS[name], home, ended)


def test_what_was_asked_to_stop_is_saved_at_that_very_step(ended: dict[str, list[Any]], home: Path) -> None:
    assert "is saved at step 5" in ended["asked while it saves"][0].said
    first, second = account(home / "asked while it saves")["attempts"]
    assert (first["outcome"], second["outcome"], second["from_step"]) == ("preempted", "done", 5)


def test_a_disk_that_refuses_once_is_told_and_the_next_checkpoint_is_there(ended: dict[str, list[Any]],
                                                                           home: Path) -> None:
    run = home / "one disk refuses once" / "checkpoints"
    said = ended["one disk refuses once"][0].said
    assert f"{run}: the checkpoint of step 4 was refused (" in said
    assert "GB are free; training goes on (1 of 3 in a row)" in said
    assert checkpoint.steps(run) == [STEPS, STEPS - 2]


def test_a_loss_that_is_no_number_ends_the_run_and_nothing_has_learnt_from_it(ended: dict[str, list[Any]],
                                                                             home: Path) -> None:
    end, again = ended["fail"]
    assert end.codes == [8] * WORLD
    assert "the loss of step 5 is not finite on rank 1" in end.said
    assert "nonfinite=skip" in end.said
    assert again.codes == [0] * WORLD
    for path in (home / "fail" / "checkpoints").glob("step-*/*.safetensors"):
        assert not [name for name, value in load_file(path).items() if not np.isfinite(value).all()]


def test_a_batch_that_is_left_out_leaves_no_trace_whether_skipped_or_gone_back_from(ended: dict[str, list[Any]],
                                                                                   home: Path) -> None:
    assert ended["skip"][0].codes == [0] * WORLD, ended["skip"][0].said
    assert "1 of 10 batches left out" in ended["skip"][0].said
    assert "goes back to step 4" in ended["fail"][1].said
    expected, first = {step: rows for step, rows in ledger(home / "whole").items() if step != 5}, weights(home / "skip")
    for run in ("skip", "fail"):
        assert ledger(home / run) == expected
        assert not [key for key in first if not np.array_equal(weights(home / run)[key], first[key])], run
        assert checkpoint.state(checkpoint.newest(home / run / "checkpoints"))["left_out"] == [5]
    assert [key for key in first if not np.array_equal(first[key], weights(home / "whole")[key])]


def test_any_number_of_ranks_and_any_stage_goes_on_with_the_same_samples(ended: dict[str, list[Any]],
                                                                         home: Path) -> None:
    assert [end.codes for end in ended["chain"]] == [[0], [0] * 3, [0] * 2, [0] * 4]
    assert ledger(home / "chain") == ledger(home / "whole")
    ours, theirs = ({row["step"]: row["loss"] for row in map(json.loads, (home / run / "metrics.jsonl").read_text(
        ).splitlines())} for run in ("chain", "whole"))
    assert ours.keys() == theirs.keys() == set(range(1, STEPS + 1))
    assert [ours[step] for step in ours] == pytest.approx([theirs[step] for step in ours], rel=1e-4)


def test_a_changed_seed_is_refused_unless_it_is_allowed(ended: dict[str, list[Any]]) -> None:
    first, refused, allowed = ended["change"]
    assert (first.codes, refused.codes, allowed.codes) == ([0], [2], [0])
    assert "seed was 0, now 3" in refused.said
    assert "--allow-change seed" in refused.said
    assert "goes on with other settings than before: seed was 0, now 3" in allowed.said
