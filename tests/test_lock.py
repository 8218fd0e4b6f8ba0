"""One writer a run folder: by the kernel's lock, by signs of life from elsewhere, and by a token that is looked at."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from shards.folder import FolderInUse
from ssl_dist import lock

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "SILENCE", 1.0)


def of_another_machine(path: Path, beat: int = 3) -> None:
    """A folder as a rank on another machine leaves it when that machine loses its power."""
    (path / "alive").mkdir(parents=True, exist_ok=True)
    (path / "alive" / "owner.json").write_text(json.dumps({"token": "t", "host": "elsewhere", "boot": "b", "pid": 4711,
                                                           "job": "99"}))
    sign(path, beat)


def sign(path: Path, beat: int) -> None:
    (path / "alive" / "rank-00000.json").write_text(json.dumps({"beat": beat}))


def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    who = f"process {os.getpid()} on {socket.gethostname()}"
    with lock.hold(tmp_path), pytest.raises(FolderInUse, match=who) as refused, lock.hold(tmp_path):
        pass
    assert refused.value.exit_code == 10
    with lock.hold(tmp_path):
        lock_file = tmp_path / "alive" / "owner.json"
        assert json.loads(lock_file.read_text())["host"] == socket.gethostname()
    assert json.loads(lock_file.read_text())["left"], "nobody has to be proved dead"
    lock.free(tmp_path)


def test_a_folder_that_another_machine_has_left_needs_no_proof(tmp_path: Path) -> None:
    of_another_machine(tmp_path)
    left = tmp_path / "alive" / "owner.json"
    left.write_text(json.dumps({**json.loads(left.read_text()), "left": True}))
    since = time.monotonic()
    with lock.hold(tmp_path):
        assert time.monotonic() - since < lock.SILENCE / 2


def test_a_writer_that_was_killed_leaves_nothing_to_wait_for(tmp_path: Path) -> None:
    program = (f"import sys, time; from pathlib import Path; from ssl_dist import lock\n"
               f"with lock.hold(Path({str(tmp_path)!r})):\n print('held', flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(FolderInUse, match=f"process {process.pid} on"):
        lock.free(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    since = time.monotonic()
    with lock.hold(tmp_path) as owner:
        owner.check()
    assert time.monotonic() - since < 0.9, "it watched for what the kernel had told"


def test_a_folder_of_another_machine_is_taken_over_only_when_that_gives_no_sign_of_life(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    of_another_machine(tmp_path)
    since = time.monotonic()
    with lock.hold(tmp_path) as owner:
        assert time.monotonic() - since >= lock.SILENCE
        owner.check()
    assert "process 4711 on elsewhere, job 99 gives no sign of life" in caplog.text

    of_another_machine(tmp_path)
    threading.Timer(0.4, sign, (tmp_path, 4)).start()
    with pytest.raises(FolderInUse, match="is being written by process 4711 on elsewhere, job 99"), lock.hold(tmp_path):
        pass
    assert json.loads((tmp_path / "alive" / "owner.json").read_text())["token"] == "t"


def test_neither_an_old_file_nor_a_clock_an_hour_off_proves_anything(tmp_path: Path) -> None:
    for seconds in (-3600, 3600):
        of_another_machine(tmp_path)

        def alive(seconds: int = seconds) -> None:
            sign(tmp_path, 4)
            os.utime(tmp_path / "alive" / "rank-00000.json", (time.time() + seconds,) * 2)

        threading.Timer(0.4, alive).start()
        with pytest.raises(FolderInUse), lock.hold(tmp_path):
            pass


def test_who_was_taken_for_dead_and_wakes_up_writes_nothing_any_more(tmp_path: Path) -> None:
    with lock.hold(tmp_path) as owner:
        owner.check()
        of_another_machine(tmp_path)
        with pytest.raises(FolderInUse, match="was taken over by process 4711 on elsewhere"):
            owner.check()
    told = json.loads((tmp_path / "alive" / "owner.json").read_text())
    assert told["token"] == "t", "it is the other's now"
    assert "left" not in told


def test_where_the_token_is_taken_away_nothing_is_written_any_more(tmp_path: Path) -> None:
    with lock.hold(tmp_path) as owner:
        (tmp_path / "alive" / "owner.json").unlink()
        with pytest.raises(FolderInUse, match=r"owner\.json is gone"):
            owner.check()
    assert not (tmp_path / "alive" / "owner.json").exists()


def test_a_token_that_is_away_for_a_moment_is_looked_for_again(tmp_path: Path) -> None:
    """As where a disk replaces a file in two steps."""
    with lock.hold(tmp_path) as owner:
        content = owner.path.read_text()
        for between in ("", None):
            owner.path.unlink() if between is None else owner.path.write_text(between)
            threading.Timer(0.01, owner.path.write_text, (content,)).start()
            owner.check()


def test_a_disk_that_does_not_answer_proves_nothing(tmp_path: Path) -> None:
    with lock.hold(tmp_path) as owner:
        owner.path.unlink()
        owner.path.mkdir()          # to be read it is a refusal of the disk
        with pytest.raises(OSError, match="directory"):
            owner.check()
        owner.path.rmdir()


def test_a_rank_that_sees_the_token_late_is_patient_until_it_has_seen_it(tmp_path: Path) -> None:
    of_another_machine(tmp_path)
    rank = lock.Owner(tmp_path, "ours")
    rank.check()        # what its machine still shows is older
    rank._since -= lock.LATE + 1
    with pytest.raises(FolderInUse, match="process 4711"):
        rank.check()
    rank._since += lock.LATE
    rank.path.write_text(json.dumps({**json.loads(rank.path.read_text()), "token": "ours"}))
    rank.check()
    of_another_machine(tmp_path)
    with pytest.raises(FolderInUse, match="taken over by process 4711 on elsewhere"):
        rank.check()


def test_of_two_machines_that_start_at_once_where_locks_do_not_reach_one_stays(tmp_path: Path,
                                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_shared", lambda _: True)
    threading.Timer(0.1, of_another_machine, (tmp_path,)).start()
    with lock.hold(tmp_path) as owner, pytest.raises(FolderInUse, match="taken over by process 4711"):
        owner.alone()


def test_who_is_alone_waits_for_no_more_than_is_left_of_the_time(tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(lock, "_shared", lambda _: True)
    with lock.hold(tmp_path) as owner:
        time.sleep(0.15)
        monkeypatch.setattr(lock.time, "sleep", slept.append)
        owner.alone()
    assert 0 <= slept[0] < 0.06


@pytest.mark.parametrize("content", ["", "{", "[]", '{"token": 1}', "null"])
def test_a_torn_token_is_no_owner(content: str, tmp_path: Path) -> None:
    (tmp_path / "alive").mkdir()
    (tmp_path / "alive" / "owner.json").write_text(content)
    with lock.hold(tmp_path) as owner:
        owner.check()
