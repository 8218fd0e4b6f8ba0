"""Who is blamed for a hang, who is slow, what a signal and a stuck rank do; and named points with their faults."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ssl_dist import points, watch

ROOT = Path(__file__).resolve().parent.parent


def sign(beat: int, point: str = "step.backward", step: int = 7, frame: str = "/x/torch/autograd/graph.py:1",
         host: str = "n") -> dict[str, Any]:
    return {"beat": beat, "point": point, "step": step, "seconds": 30.0, "frame": frame, "host": host}


def blamed(*after: dict[str, Any] | None, silent: tuple[int, ...] = ()) -> str:
    now = {rank: told for rank, told in enumerate(after) if told}
    before = {rank: {**told, "beat": told["beat"] - (rank not in silent)} for rank, told in now.items()}
    return watch.blame(before, now, len(after))


def test_who_gives_no_sign_of_life_is_blamed_first() -> None:
    words = blamed(sign(5), sign(5, step=6, host="m"), sign(5, point="data.next"), silent=(1,))
    assert words.startswith("rank 1 on m gives no sign of life")
    assert blamed(sign(5), None).startswith("rank 1 gives no sign of life")


def test_who_is_behind_is_blamed_and_the_others_wait() -> None:
    assert blamed(sign(5), sign(5), sign(5, point="data.next", host="m")).startswith(
        "rank 2 on m hangs at data.next of step 7 for 30 s")
    assert blamed(sign(5, step=6, host="m"), sign(5, point="data.next")).startswith("rank 0 on m hangs at step.b")
    assert "and the others wait" in blamed(sign(5), sign(5, point="step.forward"))


def test_of_those_in_one_place_the_one_outside_of_a_collective_is_blamed() -> None:
    assert blamed(sign(5), sign(5, frame="/x/ours.py:3", host="m")).startswith("rank 1 on m hangs")
    assert blamed(sign(5), sign(5)).startswith("all 2 ranks hang at step.backward of step 7")
    assert blamed(sign(5)).startswith("rank 0 on n hangs at step.backward of step 7")


@pytest.mark.parametrize(("seconds", "slow"), [
    ([0.1, 0.1, 0.5], [2]), ([0.1, 0.5], [1]), ([0.1, 0.12, 0.14], []), ([0.001, 0.002], []), ([1.0], []),
    ([0.5, 0.1, 0.1, 0.6], [0, 3]), ([0.5, 0.5, 0.5, 0.1], [])])
def test_a_straggler_needs_half_as_long_again_as_most_do(seconds: list[float], slow: list[int]) -> None:
    words = watch.stragglers(seconds, [f"host{rank}" for rank in range(len(seconds))])
    assert [rank for rank in range(len(seconds)) if f"rank {rank} on host{rank} takes" in words] == slow


PROGRAM = """
import ctypes, signal, sys, time
from pathlib import Path
from ssl_dist import lock, points, watch
told = []
for number in watch.ASKING:
    signal.signal(number, lambda *_: told.append(_))
owner = lock.Owner(Path(sys.argv[1]), "ours")
owner.write()
one = watch.Watch(Path(sys.argv[1]), 0, 1, hang=float(sys.argv[2]), grace=float(sys.argv[3]), owner=owner,
                  account=lambda *words: Path(sys.argv[1], "account").write_text(repr(words)))
one.settled, one.saved = True, sys.argv[4] == "saved"
points.at("step.backward", 41)
print("ready", flush=True)
if sys.argv[4] in ("moves", "saved"):
    time.sleep(5)
    points.at("step.agree", 41)
    one.close()
    sys.exit(0)
while True:
    ctypes.CDLL(None).sleep(60)     # as in a collective: the main thread comes to nothing
"""


def started(folder: Path, hang: float, grace: float, how: str) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder), str(hang), str(grace), how], text=True,
                               stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_rank_that_hangs_alone_ends_itself_with_its_stacks(tmp_path: Path) -> None:
    assert started(tmp_path, 3, 100, "hangs").wait(60) == watch.HANG
    assert "hangs at step.backward of step 41" in (tmp_path / "account").read_text()
    stacks = (tmp_path / "stacks" / "rank-00000.txt").read_text()
    assert stacks.startswith("rank 0 on ")
    assert "Thread" in stacks
    assert '"<string>", line' in stacks


def test_a_signal_that_no_handler_hears_is_heard_and_its_grace_ends_the_rank(tmp_path: Path) -> None:
    process = started(tmp_path, 100, 5, "hangs")
    process.send_signal(signal.SIGUSR2)
    since = time.monotonic()
    assert process.wait(60) == watch.UNSAVED
    assert 2 < time.monotonic() - since < 20
    assert "grace=5 runs out" in (tmp_path / "account").read_text()


def test_the_grace_of_a_run_that_is_saved_ends_nothing(tmp_path: Path) -> None:
    process = started(tmp_path, 100, 3, "saved")
    process.send_signal(signal.SIGUSR2)
    assert process.wait(60) == 0
    assert not (tmp_path / "account").exists()


def test_a_rank_whose_folder_was_taken_over_ends_and_writes_nothing(tmp_path: Path) -> None:
    process = started(tmp_path, 100, 100, "hangs")
    deadline = time.monotonic() + 30
    while watch.alive(tmp_path).get(0, {"beat": 0})["beat"] < 2:        # just after a sign, and long before the next
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)
    owner = tmp_path / "alive" / "owner.json"
    owner.write_text(json.dumps({**json.loads(owner.read_text()), "token": "theirs", "host": "elsewhere"}))
    (tmp_path / "alive" / "rank-00000.json").write_text("theirs")
    (tmp_path / "alive" / "hang").write_text("ours")        # even this would be nobody's now
    process.send_signal(signal.SIGCONT)
    assert process.wait(30) == 10
    assert (tmp_path / "alive" / "rank-00000.json").read_text() == "theirs"
    assert not (tmp_path / "account").exists()
    assert not (tmp_path / "stacks").exists()


def test_a_hang_of_another_attempt_is_none_of_ours(tmp_path: Path) -> None:
    process = started(tmp_path, 60, 100, "moves")
    (tmp_path / "alive" / "hang").write_text("theirs")
    assert process.wait(60) == 0
    (tmp_path / "alive" / "rank-00001.json").write_text(json.dumps({"attempt": "theirs", "beat": 1}))
    assert {*watch.alive(tmp_path, "ours")} == {0}
    assert {*watch.alive(tmp_path)} == {0, 1}


def test_a_disk_that_refuses_everything_does_not_keep_a_hung_rank_alive(tmp_path: Path) -> None:
    for name in ("alive/rank-00000.tmp", "alive/hang", "account"):
        (tmp_path / name).mkdir(parents=True)       # no file can be written where a folder is
    (tmp_path / "stacks").touch()
    assert started(tmp_path, 3, 100, "hangs").wait(60) == watch.HANG
    assert watch.alive(tmp_path) == {}


def test_a_rank_that_comes_along_is_left_in_peace_and_its_sign_grows(tmp_path: Path) -> None:
    process = started(tmp_path, 60, 100, "moves")
    assert process.wait(60) == 0
    told = watch.alive(tmp_path)[0]
    assert told["beat"] >= 2
    assert told["pid"] == process.pid
    assert not (tmp_path / "account").exists()
    watch.forget(tmp_path)
    assert watch.alive(tmp_path) == {}


def test_a_rank_that_nobody_joins_ends_in_a_sentence(tmp_path: Path) -> None:
    """Of two ranks the first is stopped as soon as its store listens, and the second waits for its answer."""
    words = [sys.executable, "-m", "ssl_dist", "train", "demo", f"run={tmp_path / 'run'}", f"data.shards=[{tmp_path}]",
             "data.batch=8", "hang=5", "device=cpu"]
    with socket.socket() as silent:         # it takes the call, and says nothing
        silent.bind(("localhost", 0))
        silent.listen()
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120, env={
            **os.environ, "PYTHONPATH": str(ROOT), "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1",
            "MASTER_ADDR": "localhost", "MASTER_PORT": str(silent.getsockname()[1])})
    assert done.returncode == watch.HANG
    assert "rank 1 has waited 15 s for the other ranks to start" in done.stderr
    assert "Traceback" not in done.stderr


# ---- points

@pytest.fixture(autouse=True)
def _disarmed() -> Any:
    yield
    points.arm([])


def test_a_fault_happens_at_its_point_rank_and_step_and_so_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    points.arm(["raise@data.next:rank=1,step=3", "ioerror@save.file:times=2", "raise@step.agree:rank=0"])
    points.at("data.next", 2)
    points.at("step.agree", 3)
    with pytest.raises(points.Injected):
        points.at("data.next", 3)
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            points.at_side("save.file", 4, Path("file"))
    points.at_side("save.file", 4, Path("file"))
    assert (points.where().point, points.where().step) == ("data.next", 3), "a helping thread does not move the rank"


def test_a_number_becomes_none_only_where_it_was_asked_for() -> None:
    points.arm(["nan@step.forward:step=5"])
    assert points.value("step.forward", 4, 1.0) == 1.0
    assert points.value("step.forward", 5, 1.0) != points.value("step.forward", 5, 1.0)


def test_a_file_is_cut_in_half(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100))
    points.arm(["cut@save.keep"])
    points.at("save.keep", 0, tmp_path / "file")
    assert (tmp_path / "file").stat().st_size == 50


@pytest.mark.parametrize(("words", "needle"), [
    ("kill", "is not what@point"), ("kil@data.next", "'kil' is not one of kill, stop"),
    ("kill@data.nxt", "'data.nxt' is not one of"), ("nan@data.next", "there is one at step.forward alone"),
    ("kill@data.next:rnk=1", "'rnk=1' is not rank="), ("kill@data.next:rank=x", "'rank=x' is not rank=")])
def test_a_fault_that_cannot_be_is_refused(words: str, needle: str) -> None:
    from ssl_dist.config import Debug

    (broken,) = Debug(faults=[words]).rules()
    assert broken.startswith("faults[0]: ")
    assert needle in broken
    assert Debug(faults=["stop@save.rename:rank=1,step=3,times=1"]).rules() == []


def test_what_a_step_takes_alone_ends_where_the_others_are_needed_first() -> None:
    times = iter([0.0, 1.5, 10.0, 10.5])
    one = points.Stopwatch(clock=lambda: next(times))
    one.begins()
    one.meets()
    one.meets()         # of the same step
    one.begins()
    one.meets()
    assert one.read() == pytest.approx(1.0)
    assert one.read() == 0.0
