"""More faults by name than `make test` has time for: `make test-faults`."""

import json
import random
import runpy
import signal
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ssl_dist import checkpoint, points, train

drill = runpy.run_path(str(Path(__file__).with_name("drill.py")))
fault, account = drill["fault"], drill["account"]
WORLD = drill["WORLD"]

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]

# Every point, and of those that all ranks come by, another rank each time.
POINTS = [point for point in points.POINTS if point not in ("resume.load", "export")]
ONLY_FIRST = ("save.manifest", "save.rename", "save.keep")
KILLS = {f"kill {point}": (f"kill@{point}:rank={0 if point in ONLY_FIRST else number % WORLD},step=4", -9, 7)
         for number, point in enumerate(POINTS)}
ASKS = {f"{signal} {point}": (f"{signal}@{point}:rank={number % WORLD},step=4", 4, 4) for signal in ("term", "usr2")
        for number, point in enumerate(("data.next", "step.forward", "step.backward", "step.agree", "step.after"))}
HANGS = {"hung": ("hang@data.next:rank=2,step=3", "rank 2 on {host} hangs at data.next of step 3"),
         "hung in backward": ("hang@step.backward:rank=1,step=3", "rank 1 on {host} hangs at step.backward of step 3"),
         "stopped": ("stop@step.forward:rank=1,step=3", "rank 1 on {host} gives no sign of life"),
         "stopped first": ("stop@step.forward:rank=0,step=3", "rank 0 on {host} gives no sign of life")}


METHODS = tuple(drill["METHODS"])
STAGES = (0, 1, 2)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drills")


@pytest.fixture(scope="module")
def ended(home: Path, shard: Path) -> dict[str, list[Any]]:
    """Every attempt of every run, one program for all."""
    jobs: list[tuple[str, int, list[str]]] = [("whole", WORLD, [])]
    for name, (told, _, _) in {**KILLS, **ASKS}.items():
        jobs += [(name, WORLD, [fault(told)]), (name, WORLD, [])]
    jobs += [(name, WORLD, [fault(told), "hang=8"]) for name, (told, _) in HANGS.items()]
    jobs += [("too many", WORLD, [fault("nan@step.forward:rank=0"), "nonfinite=skip", "nonfinite_max=2"]),
             ("full", WORLD, [fault("full@save.file:rank=2"), "checkpoint.failures=2"]),
             ("slow", WORLD, [fault("slow@data.next:rank=1,seconds=1,times=5")]),
             ("cut", WORLD, ["stop=6", fault("cut@save.keep:rank=0,step=6")]), ("cut", WORLD, []),
             ("no grace", WORLD, [fault("hang@step.forward:rank=1,step=3", "term@step.forward:rank=0,step=3"),
                                  "grace=6"])]
    return drill["drills"](home, shard, jobs)


@pytest.fixture(scope="module")
def resumed(home: Path, shard: Path) -> dict[str, list[Any]]:
    """Every method at every stage: without a stop, and stopped twice, the second time beyond the end of an epoch."""
    jobs: list[tuple[Any, ...]] = []
    for method in METHODS:
        for stage in STAGES:
            jobs += [(f"whole {method} {stage}", WORLD, [f"zero={stage}"], method),
                     *((f"broken {method} {stage}", WORLD, [f"zero={stage}", *more], method)
                       for more in (["stop=3"], ["stop=6"], []))]
    return drill["drills"](home / "methods", shard, jobs)


@pytest.fixture(scope="module")
def struck(home: Path, shard: Path) -> dict[str, list[Any]]:
    """Forty strikes at times that nobody chose, two a run; every run is then left to its end."""
    chance = random.Random(0)
    jobs: list[tuple[Any, ...]] = [(f"whole {method}", WORLD, [], method) for method in METHODS]
    for number in range(20):
        method = METHODS[number % len(METHODS)]
        for _ in range(2):
            ranks = chance.choice([[0], [1], [2], [0, 1, 2]])
            sent = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR2])
            jobs.append((f"struck {number} {method}", WORLD, [], method,
                         {"after": chance.uniform(0.3, 2.5), "signal": int(sent), "ranks": ranks}))
        jobs.append((f"struck {number} {method}", WORLD, [], method))
    return drill["drills"](home / "strikes", shard, jobs)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_stopped_twice_ends_with_the_same_bits(method: str, stage: int, home: Path,
                                                            resumed: dict[str, list[Any]]) -> None:
    whole, broken = (home / "methods" / f"{kind} {method} {stage}" for kind in ("whole", "broken"))
    assert [end.codes for end in resumed[broken.name]] == [[0] * WORLD] * 3
    assert drill["ledger"](broken) == drill["ledger"](whole)
    for kind in ("weights", "optimizer", "rank-00002"):
        mine, other = (load_file(run / "checkpoints" / checkpoint.name(drill["STEPS"]) / f"{kind}.safetensors")
                       for run in (broken, whole))
        assert mine.keys() == other.keys()
        assert not [key for key in mine if not np.array_equal(mine[key], other[key])]


@pytest.mark.parametrize("number", range(20))
def test_strikes_at_any_time_leave_no_trace(number: int, home: Path, struck: dict[str, list[Any]]) -> None:
    method = METHODS[number % len(METHODS)]
    run, whole = home / "strikes" / f"struck {number} {method}", home / "strikes" / f"whole {method}"
    *_, last = struck[run.name]
    assert last.codes == [0] * WORLD, last.said
    # Ranks that are still making their groups wait for one another; who started them ends them, and here nobody does.
    assert not [end for end in struck[run.name] if (end.outlived and end.begun) or "Traceback" in end.said]
    assert drill["ledger"](run) == drill["ledger"](whole)
    ours, theirs = drill["weights"](run), drill["weights"](whole)
    assert not [key for key in theirs if not np.array_equal(ours[key], theirs[key])]


@pytest.mark.parametrize("name", [*KILLS, *ASKS])
def test_after_every_fault_samples_and_weights_are_those_of_a_run_without_it(name: str, home: Path,
                                                                            ended: dict[str, list[Any]]) -> None:
    drill["held"](name, *{**KILLS, **ASKS}[name], home, ended)


@pytest.mark.parametrize("name", HANGS)
def test_a_hung_rank_ends_the_job_and_is_named_with_the_stacks_of_all(name: str, home: Path,
                                                                      ended: dict[str, list[Any]]) -> None:
    (end,) = ended[name]
    stopped = [int(name == "stopped")] if name.startswith("stopped") else []
    assert {code for code in end.codes if code != -9} == {6}
    assert end.outlived == stopped, "a stopped process can end nothing, not even itself"
    told = account(home / name)
    assert told["exit_code"] == 6
    assert HANGS[name][1].format(host=socket.gethostname()) in told["error"]
    for rank in set(range(WORLD)) - set(stopped):
        stack = (home / name / "stacks" / f"rank-{rank:05d}.txt").read_text()
        assert f"rank {rank} on" in stack
        assert "train.py" in stack


def test_where_the_grace_runs_out_it_is_said_that_nothing_is_saved(ended: dict[str, list[Any]], home: Path) -> None:
    assert ended["no grace"][0].codes[0] == 5
    told = account(home / "no grace")
    assert (told["state"], told["exit_code"]) == ("preempted", 5)
    assert "grace=6 runs out" in told["error"]
    assert "of step 3" in told["error"]


def test_too_many_batches_left_out_end_the_run_and_one_can_be_done_again(ended: dict[str, list[Any]],
                                                                         home: Path) -> None:
    (end,) = ended["too many"]
    assert end.codes == [8] * WORLD
    assert "2 batches were left out before it" in end.said
    found = train.replay(home / "too many" / "replay" / "step-000002")
    assert found["bad"] == "loss"
    assert found["rank"] == 0
    # The fault was not in the numbers, so here all is well, and the loss is that of the whole batch.
    assert not found["weights"] + found["outputs"] + found["gradients"]
    assert 1 < found["loss"] < 5


def test_a_disk_that_goes_on_refusing_ends_the_run(ended: dict[str, list[Any]], home: Path) -> None:
    (end,) = ended["full"]
    assert end.codes == [9] * WORLD
    assert "2 in a row" in end.said
    assert not list((home / "full" / "checkpoints").glob("*step*"))
    assert account(home / "full")["exit_code"] == 9


def test_a_newest_checkpoint_that_was_cut_is_passed_over_by_name(ended: dict[str, list[Any]], home: Path) -> None:
    first, second = ended["cut"]
    assert (first.codes, second.codes) == ([0] * WORLD, [0] * WORLD)
    assert f"{home / 'cut' / 'checkpoints' / 'step-000006'} is damaged and will not be used" in second.said
    assert account(home / "cut")["attempts"][1]["from_step"] == 4
    assert drill["ledger"](home / "cut") == drill["ledger"](home / "whole")


def test_a_slow_rank_is_named_with_its_machine(ended: dict[str, list[Any]], home: Path) -> None:
    assert f"rank 1 on {socket.gethostname()} takes 1." in ended["slow"][0].said
    rows = [json.loads(line) for line in (home / "slow" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == drill["STEPS"]
