"""Machines without SLURM, in network namespaces of their own: torchrun's rendezvous, a cut cable, one machine less."""

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
drill = runpy.run_path(str(ROOT / "tests" / "drill.py"))
STEPS = 24
NAMES = ("ssl-dist-1", "ssl-dist-2", "ssl-dist-3")

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900),
              pytest.mark.skipif(os.geteuid() != 0, reason="only root can make networks")]


def command(*words: object) -> None:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{' '.join(map(str, words))}: {done.stderr.strip()}")


@pytest.fixture
def machines() -> Iterator[tuple[str, ...]]:
    """Three networks, each with a cable to one switch."""
    command("ip", "netns", "add", "ssl-dist-switch")
    try:
        command("ip", "-n", "ssl-dist-switch", "link", "add", "switch", "type", "bridge")
        command("ip", "-n", "ssl-dist-switch", "link", "set", "switch", "up")
        for number, name in enumerate(NAMES, 1):
            command("ip", "netns", "add", name)
            command("ip", "link", "add", "cable", "netns", name, "type", "veth", "peer", f"port{number}", "netns",
                    "ssl-dist-switch")
            command("ip", "-n", "ssl-dist-switch", "link", "set", f"port{number}", "master", "switch", "up")
            command("ip", "-n", name, "addr", "add", f"10.78.0.{number}/24", "dev", "cable")
            command("ip", "-n", name, "link", "set", "cable", "up")
            command("ip", "-n", name, "link", "set", "lo", "up")
        yield NAMES
    finally:
        for name in (*NAMES, "ssl-dist-switch"):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def start(name: str, run: Path, shard: Path, nodes: str, *more: str) -> subprocess.Popen[str]:
    """`ssl-dist launch local` on one machine of one core, whose name the others do not know."""
    core = sorted(os.sched_getaffinity(0))[NAMES.index(name) % len(os.sched_getaffinity(0))]
    words = drill["words"](run, shard, f"steps={STEPS}", *more)
    return subprocess.Popen(
        ["ip", "netns", "exec", name, "taskset", "-c", str(core), "unshare", "-u", "sh", "-c",
         f"hostname {name}; exec \"$@\"", "sh", sys.executable, "-m", "ssl_dist", "launch", "local", "--nodes", nodes,
         "--rendezvous", "10.78.0.1:29400", "ranks=1", "--", "train", *words],
        text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def rows(run: Path) -> int:
    """The last step that was logged."""
    path = run / "metrics.jsonl"
    return max((json.loads(line)["step"] for line in path.read_text().splitlines()), default=0) if path.exists() else 0


def until(run: Path, step: int, world: int, processes: list[subprocess.Popen[str]]) -> None:
    """Waits until an attempt of so many ranks has logged a step."""
    deadline = time.monotonic() + 300
    while True:
        with contextlib.suppress(OSError, ValueError):
            if json.loads((run / "run.json").read_text())["attempts"][-1]["world"] == world and rows(run) >= step:
                return
        assert time.monotonic() < deadline, f"no step {step} of {world} ranks in five minutes"
        ended = [process for process in processes if process.poll() not in (None, 0)]
        assert not ended, ended[0].communicate()[1]
        time.sleep(0.2)


def die(name: str) -> None:
    """As a machine goes: without a word."""
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True).stdout.split()
    for process in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)


def end(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=20)


def ledger(run: Path) -> dict[int, list[tuple[int, str]]]:
    """Samples by step; a step that was taken twice counts once, if both times it was the same samples."""
    return {step: sorted(set(samples)) for step, samples in drill["ledger"](run).items()}


def test_two_machines_meet_and_the_code_is_the_same_on_both(machines: tuple[str, ...], shard: Path, tmp_path: Path
                                                            ) -> None:
    run = tmp_path / "run"
    processes = [start(name, run, shard, "2") for name in machines[:2]]
    try:
        assert [process.wait(300) for process in processes] == [0, 0], [each.communicate()[1] for each in processes]
    finally:
        end(processes)
    (attempt,) = drill["account"](run)["attempts"]
    assert (attempt["world"], attempt["machines"], len(attempt["launches"])) == (2, 2, 2)
    drill["drills"](tmp_path, shard, [("whole", 2, [f"steps={STEPS}"])])
    assert drill["ledger"](run) == drill["ledger"](tmp_path / "whole")
    ours, theirs = drill["weights"](run), drill["weights"](tmp_path / "whole")
    assert not [key for key in theirs if not np.array_equal(ours[key], theirs[key])]


def test_a_cut_cable_ends_both_sides_with_a_hang(machines: tuple[str, ...], shard: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    slow = drill["fault"]("slow@step.forward:seconds=1")
    processes = [start(name, run, shard, "2", slow, "hang=12", "log.every=1") for name in machines[:2]]
    try:
        until(run, 2, 2, processes)
        command("ip", "-n", "ssl-dist-switch", "link", "set", "port2", "down")
        codes = [process.wait(180) for process in processes]
    finally:
        end(processes)
    assert codes[0] == 6, "where rank 0 is"
    assert codes[1] in (6, 7)


def test_one_machine_less_and_back_again_leave_no_trace(machines: tuple[str, ...], shard: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    slow = drill["fault"]("slow@step.forward:seconds=1.5")
    more = (slow, "log.every=1", "checkpoint.every=2", "hang=60")
    processes = [start(name, run, shard, "2:3", *more) for name in machines]
    try:
        until(run, 3, 3, processes)
        die(machines[2])
        processes.pop().wait()
        until(run, 8, 2, processes)
        processes.append(start(machines[2], run, shard, "2:3", *more))
        until(run, 12, 3, processes)
        assert [process.wait(400) for process in processes] == [0, 0, 0], [each.communicate()[1] for each in processes]
    finally:
        end(processes)
    worlds = [attempt["world"] for attempt in drill["account"](run)["attempts"]]
    assert worlds[0] == worlds[-1] == 3 and 2 in worlds
    drill["drills"](tmp_path, shard, [("whole", 3, [f"steps={STEPS}"])])
    assert ledger(run) == drill["ledger"](tmp_path / "whole")
