"""What is said of a run folder: of a healthy one, one that went silent, and one whose files are torn."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ssl_dist import status


def stamp(seconds: float = 0.0) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="seconds")


def folder(path: Path, state: str = "running", age: float = 0.0, **more: Any) -> Path:
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({
        "state": state, "exit_code": None, "error": None, "step": 40, "steps": 100, "heartbeat": stamp(age),
        "attempts": [{"started": stamp(500), "ended": stamp(400), "host": "a", "world": 2, "from_step": 0,
                      "to_step": 20, "outcome": "killed"},
                     {"started": stamp(300), "ended": None, "host": "b", "world": 4, "from_step": 20, "to_step": 40,
                      "outcome": None if state == "running" else state}], **more}))
    (path / "metrics.jsonl").write_text("".join(json.dumps({
        "step": step, "loss": 9.0 - step / 10, "images_per_second": 128.0, "time": 2.0 * step}) + "\n"
        for step in range(10, 60, 10)) + '{"step": 60, "lo')
    for step in (20, 40):
        (path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
        (path / "checkpoints" / f"step-{step:06d}" / "MANIFEST.json").touch()
    return path


def test_a_run_that_lives_says_how_far_it_is_and_how_long_it_will_take(tmp_path: Path) -> None:
    found = status.read(folder(tmp_path / "run"))
    assert (found.state, found.step, found.steps) == ("running", 50, 100)      # rows are newer than run.json
    assert found.rate == 128.0
    assert found.seconds_left == pytest.approx(50 * 2.0)
    assert found.checkpoints == [20, 40]
    text = "\n".join(status.lines(found))
    for words in ("running, step 50 of 100 (50%)", "128 images/s, loss 4, 0:01:40 left", "checkpoints: 20, 40",
                  "attempt 1:", "on a, 2 ranks, steps 0 to 20, killed", "on b, 4 ranks, steps 20 to 40, running",
                  "last trouble: 1 of 2 attempts were killed"):
        assert words in text


@pytest.mark.parametrize(("age", "sign", "state"), [(0, None, "running"), (600, None, "silent"), (600, 5, "running"),
                                                    (600, 600, "silent")])
def test_a_run_that_gives_no_sign_is_called_silent(age: float, sign: float | None, state: str, tmp_path: Path) -> None:
    import os

    path = folder(tmp_path / "run", age=age)
    if sign is not None:
        (path / "alive").mkdir()
        (path / "alive" / "rank-00000.json").touch()
        then = datetime.now(UTC).timestamp() - sign
        os.utime(path / "alive" / "rank-00000.json", (then, then))
    found = status.read(path)
    assert found.state == state
    assert ("run the same command again" in "\n".join(status.lines(found))) == (state == "silent")
    assert (found.seconds_left is None) == (state == "silent")


def test_what_went_wrong_last_is_what_the_run_said(tmp_path: Path) -> None:
    found = status.read(folder(tmp_path / "run", state="failed", error="NotFinite: the loss of step 40 is not finite"))
    assert (found.state, found.step, found.seconds_left) == ("failed", 40, None)
    assert "last trouble: NotFinite: the loss of step 40" in "\n".join(status.lines(found))


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"state": "running"}', '{"state": 1, "steps": "x"}'])
def test_a_folder_that_is_no_run_is_refused_in_one_line(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(status.NoRun) as refused:
        status.read(tmp_path)
    assert refused.value.exit_code == 2
    assert str(tmp_path) in str(refused.value)
    assert status.below(tmp_path) == []


def test_runs_below_a_folder_are_listed_the_last_sign_first(tmp_path: Path) -> None:
    folder(tmp_path / "old", state="done", age=5000)
    folder(tmp_path / "deep" / "er" / "new")
    (tmp_path / "no run").mkdir()
    assert [each.path.name for each in status.below(tmp_path)] == ["new", "old"]
    done = subprocess.run([sys.executable, "-m", "ssl_dist", "runs", str(tmp_path)], capture_output=True, text=True,
                          check=True)
    lines = done.stdout.splitlines()
    assert "new" in lines[1]
    assert "50/100" in lines[1]
    assert "done" in lines[2]
    listed = subprocess.run([sys.executable, "-m", "ssl_dist", "runs", str(tmp_path), "--json"], capture_output=True,
                            text=True, check=True)
    assert [each["step"] for each in json.loads(listed.stdout)] == [50, 40]
