"""What a launched run does when it is asked to stop, and when a rank dies."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ssl_dist import checkpoint

ROOT = Path(__file__).resolve().parent.parent
LONG = ["data.batch=8", "steps=100000", "log.every=1", "checkpoint.every=100000", "method.views.size=32", "device=cpu",
        "encoder.args.layers=[1,1,1,1]", "encoder.args.channels=[8,8,16,16]", "debug.ledger=true"]


def start(run: Path, shard: Path) -> subprocess.Popen:
    """A run of two ranks that would take hours, once it trains."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ssl_dist", "launch", "local", "ranks=2", "--", "train", "demo", f"run={run}",
         f"data.shards=[{shard}]", *LONG], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 120
    while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") > 3):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline, "two minutes and not one step"
        time.sleep(0.1)
    return process


def ranks(run: Path) -> dict[int, int]:
    """The processes that train this run, by rank: found by their command line and their environment."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            variables = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        rank = [word for word in variables if word.startswith(b"RANK=")]
        if f"run={run}".encode() in words and rank:
            found[int(rank[0].removeprefix(b"RANK="))] = int(path.name)
    return found


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGUSR2, "cancel"])
def test_a_run_that_is_asked_to_stop_saves_and_says_so(shard: Path, tmp_path: Path, how: signal.Signals | str) -> None:
    run = tmp_path / "run"
    process = start(run, shard)
    if isinstance(how, str):
        said = subprocess.run([sys.executable, "-m", "ssl_dist", how, str(run)], capture_output=True, text=True,
                              check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}).stdout
        assert "its ranks are asked to save and end" in said
    else:
        process.send_signal(how)
    assert process.wait(timeout=60) == 4
    account = json.loads((run / "run.json").read_text())
    assert account["state"] == "preempted" and account["exit_code"] == 4 and account["error"] is None
    saved = checkpoint.newest(run / "checkpoints")
    assert saved is not None and saved.name == checkpoint.name(account["step"])
    seen = {json.loads(line)["step"] for line in (run / "ledger" / "rank-00000.jsonl").read_text().splitlines()}
    assert seen == set(range(account["step"])), "a step was trained and not saved, or saved and not trained"
    assert not ranks(run)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_job_and_the_survivor_speaks(shard: Path, tmp_path: Path, victim: int) -> None:
    run = tmp_path / "run"
    process = start(run, shard)
    os.kill(ranks(run)[victim], signal.SIGKILL)
    assert process.wait(timeout=60) == 7
    account = json.loads((run / "run.json").read_text())
    assert account["state"] == "failed" and account["exit_code"] == 7 and "another rank is gone" in account["error"]
    assert account["attempts"][-1]["outcome"] == "failed"
    assert not ranks(run)


def test_a_tar_that_was_cut_ends_a_launched_run_before_its_first_step(shard: Path, tmp_path: Path) -> None:
    cut = shutil.copytree(shard, tmp_path / "cut")
    tar = sorted(cut.glob("*.tar"))[0]
    with tar.open("r+b") as handle:
        handle.truncate(tar.stat().st_size // 2)
    done = subprocess.run(
        [sys.executable, "-m", "ssl_dist", "launch", "local", "ranks=2", "--", "train", "demo",
         f"run={tmp_path / 'run'}", f"data.shards=[{cut}]", *LONG], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)
    assert done.returncode == 3
    lines = [line for line in done.stderr.splitlines() if line.startswith("ssl-dist: error: ")]
    assert len(lines) == 1 and str(tar) in lines[0] and "ssl-dist check" in lines[0]
    assert "Traceback" not in done.stderr


def test_ranks_do_not_outlive_a_launcher_that_is_killed(shard: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, shard)
    process.kill()
    deadline = time.monotonic() + 60
    while ranks(run):
        assert time.monotonic() < deadline, "the ranks train on, with nobody to end them"
        time.sleep(0.2)
    assert json.loads((run / "run.json").read_text())["state"] == "preempted"
