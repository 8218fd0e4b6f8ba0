"""What is told of a run: rows of steps that count, and a disk that refuses them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shards.folder import FolderInUse
from ssl_dist import status
from ssl_dist.log import Log

ROOT = Path(__file__).resolve().parent.parent
ROW = {"loss": 1.0, "images_per_second": 2.0, "data_wait": 0.0}


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def logged(run: Path, start: int, *told: int) -> None:
    log = Log(run, 100, start)
    for step in told:
        log.write(step, ROW)
    log.close()


def test_who_goes_on_from_an_earlier_step_takes_back_what_was_told_of_later_ones(tmp_path: Path) -> None:
    logged(tmp_path, 0, 10, 20, 30)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    logged(tmp_path, 20)
    assert steps(tmp_path) == [10, 20], "before it has taken a step of its own"
    logged(tmp_path, 20, 25)
    assert steps(tmp_path) == [10, 20, 25]
    board = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [each.step for each in board.Scalars("loss")] == [10, 20, 25]
    logged(tmp_path, 0)
    assert steps(tmp_path) == []


def test_a_run_that_goes_back_within_itself_tells_each_step_once(tmp_path: Path) -> None:
    log = Log(tmp_path, 100, 0)
    for step in (1, 2, 3):
        log.write(step, ROW)
    log.goes_back(1)
    log.write(2, {**ROW, "loss": 7.0})
    log.close()
    assert steps(tmp_path) == [1, 2]
    board = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(each.step, each.value) for each in board.Scalars("loss")] == [(1, 1.0), (2, 7.0)]


def test_a_run_that_went_further_once_is_said_to_be_where_it_is(tmp_path: Path) -> None:
    logged(tmp_path, 0, 10, 20, 30)
    logged(tmp_path, 20)
    (tmp_path / "run.json").write_text(json.dumps({"state": "running", "exit_code": None, "error": None, "step": 20,
                                                   "steps": 100, "heartbeat": "", "attempts": []}))
    assert status.read(tmp_path).step == 20


def test_rows_that_are_in_order_are_not_written_again(tmp_path: Path) -> None:
    logged(tmp_path, 0, 10, 20)
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    logged(tmp_path, 20, 30)
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before
    assert steps(tmp_path) == [10, 20, 30]


def test_nothing_is_told_in_a_folder_that_is_another_s(tmp_path: Path) -> None:
    theirs: list[bool] = []

    def check() -> None:
        if theirs:
            raise FolderInUse("taken over")

    log = Log(tmp_path, 100, 0, check)
    log.write(1, ROW)
    theirs.append(True)
    with pytest.raises(FolderInUse):
        log.write(2, ROW)
    with pytest.raises(FolderInUse):
        Log(tmp_path, 100, 0, check)
    log.close()
    assert steps(tmp_path) == [1]


FULL = """
import resource, sys
from pathlib import Path
from ssl_dist.log import Log
log = Log(Path(sys.argv[1]), 100, 0)
log.write(1, ROW)
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))      # no file grows beyond this: the system refuses
for step in range(2, 400):
    log.write(step, ROW)
    log.warn("words", step)
log.write(400, ROW)
log.close()
print("to the end")
"""


def test_a_disk_that_takes_no_more_rows_ends_no_run(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", f"ROW = {ROW}\n{FULL}", str(tmp_path)], capture_output=True, text=True,
                          check=False, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout) == (0, "to the end\n"), done.stderr
    assert done.stderr.count("are not in metrics.jsonl (File too large); training goes on") == 1
    assert done.stderr.count("TensorBoard has nothing from step") == 1
    whole, _, torn = (tmp_path / "metrics.jsonl").read_text().rpartition("\n")
    assert [json.loads(line)["step"] for line in whole.splitlines()] == [1, 2], torn
