"""What only root can do to a machine: a disk that is really full, and a network that is really cut."""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssl_dist import checkpoint

drill = runpy.run_path(str(Path(__file__).with_name("drill.py")))
WORLD, STEPS = drill["WORLD"], drill["STEPS"]

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900),
              pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a disk and cut a network")]


def command(*words: object) -> None:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{' '.join(map(str, words))}: {done.stderr.strip()}")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of three megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command("mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk)
    yield disk
    command("umount", "-l", disk)


def test_a_full_disk_leaves_the_checkpoints_that_are_there_and_the_run_goes_on_when_there_is_room(
        small: Path, shard: Path, tmp_path: Path) -> None:
    run, jobs = small / "run", tmp_path / "jobs"

    def attempt(*more: str) -> tuple[list[int], str]:
        (end,) = drill["drill"](jobs, [{"words": drill["words"](run, shard, *more), "world": WORLD}])
        return end.codes, end.said

    assert attempt("stop=4")[0] == [0] * WORLD
    kept = checkpoint.steps(run / "checkpoints")
    free = os.statvfs(small)
    (small / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize - 96_000))
    codes, said = attempt("checkpoint.failures=1")
    assert codes == [9] * WORLD, said
    assert f"{run / 'checkpoints'}: the checkpoint of step 6 was refused" in said
    assert "0.000 GB are free" in said
    assert checkpoint.steps(run / "checkpoints") == kept == [4, 2]
    assert not [problem for step in kept for problem in checkpoint.verify(run / "checkpoints" / checkpoint.name(step))]
    assert not list((run / "checkpoints").glob(".*"))
    (small / "filler").unlink()
    codes, said = attempt()
    assert codes == [0] * WORLD, said
    assert json.loads((run / "run.json").read_text())["state"] == "done"
    assert sorted(drill["ledger"](run)) == list(range(STEPS))


@pytest.fixture
def apart() -> Iterator[tuple[str, str]]:
    """Two networks with a cable between them."""
    names = ("ssl-dist-a", "ssl-dist-b")
    for name in names:
        command("ip", "netns", "add", name)
    try:
        command("ip", "link", "add", "cable-a", "netns", names[0], "type", "veth", "peer", "cable-b", "netns", names[1])
        for number, name in enumerate(names):
            end = f"cable-{name[-1]}"
            command("ip", "-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", end)
            command("ip", "-n", name, "link", "set", end, "up")
            command("ip", "-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def rows(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def until(run: Path, count: int, ranks: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 120
    while rows(run) < count:
        assert time.monotonic() < deadline, "no step in two minutes"
        assert not [rank for rank in ranks if rank.poll() is not None], "a rank ended"
        time.sleep(0.1)


def test_a_short_cut_of_the_network_heals_and_a_long_one_ends_both_sides(apart: tuple[str, str], shard: Path,
                                                                         tmp_path: Path) -> None:
    run, ranks = tmp_path / "run", []
    words = drill["words"](run, shard, "steps=100000", "hang=15", "checkpoint.every=100000")
    for number, name in enumerate(apart):
        ranks.append(subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-m", "ssl_dist", "train", *words], text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={
                **os.environ, "RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29555", "GLOO_SOCKET_IFNAME": f"cable-{name[-1]}",
                "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(drill["ROOT"])}))
    try:
        until(run, 3, ranks)
        command("ip", "-n", apart[1], "link", "set", "cable-b", "down")
        time.sleep(4)
        command("ip", "-n", apart[1], "link", "set", "cable-b", "up")
        command("ip", "-n", apart[1], "addr", "replace", "10.77.0.2/24", "dev", "cable-b")
        until(run, rows(run) + 3, ranks)
        command("ip", "-n", apart[1], "link", "set", "cable-b", "down")
        since = time.monotonic()
        assert [rank.wait(120) for rank in ranks] == [6, 6]
        assert time.monotonic() - since < 60
    finally:
        for rank in ranks:
            rank.send_signal(signal.SIGKILL)
    told = json.loads((run / "run.json").read_text())
    assert told["exit_code"] == 6
    assert "all 2 ranks hang" in told["error"] or f"on {socket.gethostname()} hangs" in told["error"]
    assert len(list((run / "stacks").glob("rank-*.txt"))) == 2
    assert not checkpoint.steps(run / "checkpoints"), "no side saves alone"
