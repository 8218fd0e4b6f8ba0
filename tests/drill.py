"""Runs of several ranks that are forked from one process which has imported everything: a drill takes a second or two.

As a program: drill.py JOBS.json does the jobs one after the other and writes what became of each beside it. A job is
{"words": [...], "world": 3}: the words of `ssl-dist train`. Its ranks get what torchrun gives them; once one has ended
badly, the others have PATIENCE seconds to end by themselves, as under a launcher that only waits. A strike,
{"after": 1.5, "signal": 9, "ranks": [1]}, is a signal to some of them at a time that nobody chose by what they do;
{"rows": 1, "shell": "rm …"} does something to their world once so many rows are logged.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 20.0
WORLD, STEPS, BATCH = 3, 8, 12
SMALL = [f"data.batch={BATCH}", f"steps={STEPS}", "checkpoint.every=2", "log.every=1", "log.pictures=0", "device=cpu",
         "debug.ledger=true", "hang=120"]
RESNET = ["method.views.size=32", "encoder.args.layers=[1,1,1,1]", "encoder.args.channels=[8,8,16,16]"]
# Every method with all that moves or waits in it at work within these steps.
METHODS = {
    "simclr": ["demo", *RESNET],
    "moco": ["pretrain/moco_r18_small", *RESNET, "method.queue=30"],
    "swav": ["pretrain/swav_r18_small", *RESNET, "method.prototypes=7", "method.queue=30", "method.queue_from=0.3",
             "method.frozen=0.3", "method.hidden=16"],
    "barlow": ["pretrain/barlow_r18_small", *RESNET, "method.width=16", "method.hidden=16"],
    "dino": ["pretrain/dino_vitt_small", "method.classes=16", "method.hidden=16", "method.narrow=8",
             "method.frozen=0.3",
             "method.views.first.size=32", "method.views.second.size=32", "method.views.small.size=16",
             "encoder.args={img_size: 32, patch_size: 8, embed_dim: 24, depth: 2, num_heads: 3}"]}

OF_SLIDES = {"gigassl": ["pretrain/gigassl", "encoder.args={tiles: 16, width: 24}", "method.view.tiles=3",
                         "method.hidden=16", "method.width=8", "optim.lr=0.01", "epochs=0"]}     # of a folder of draws


@dataclass
class Ended:
    """What became of a job."""

    codes: list[int]                # exit codes; negative: the signal
    seconds: float                  # from the first bad end to the last
    took: float                     # seconds, all in all
    outlived: list[int]             # ranks that had to be killed
    begun: bool                     # the ranks had taken a step together
    said: str


def drill(folder: Path, jobs: list[dict[str, Any]]) -> list[Ended]:
    """Does the jobs in one process; `folder` is for what they write of themselves."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run([sys.executable, __file__, str(folder / "jobs.json")], capture_output=True, text=True,
                          timeout=290 * max(1, len(jobs) // 10), check=False, env={
                              **clean, "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
                              "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return [Ended(**each) for each in json.loads((folder / "jobs.done.json").read_text())]


def drills(home: Path, shard: Path, jobs: list[tuple[Any, ...]]) -> dict[str, list[Ended]]:
    """Attempts of runs below `home`: (name of the run, ranks, what is typed besides[, method[, strike]]), and what
    became of each."""
    done: dict[str, list[Ended]] = {}
    for (name, *_), end in zip(jobs, drill(home / "jobs", [
            {"words": words(home / name, shard, *more, method=(rest or ["simclr"])[0]), "world": world,
             "strike": rest[1] if rest[1:] else None} for name, world, more, *rest in jobs]), strict=True):
        done.setdefault(name, []).append(end)
    for name, (first, *_) in done.items():
        if name.startswith("whole"):
            assert not any(first.codes), first.said
    return done


def held(name: str, told: str, own: int, rest: int, home: Path, ended: dict[str, list[Ended]]) -> None:
    """Holds a run of a first attempt with a fault and a second one against the run that nothing happened to."""
    import numpy as np

    first, *others = ended[name]
    rank = int(told.partition("rank=")[2].partition(",")[0])
    assert first.codes == [own if place == rank else rest for place in range(WORLD)], first.said
    assert not first.outlived, "they hang when one is gone"
    assert first.seconds < 10, "a dead rank ends the job within ten seconds"
    assert [each.codes for each in others] == [[0] * WORLD] * len(others), others[-1].said
    assert ledger(home / name) == ledger(home / "whole")
    assert sum(map(len, ledger(home / name).values())) == STEPS * BATCH
    ours, theirs = weights(home / name), weights(home / "whole")
    assert not [key for key in theirs if not np.array_equal(ours[key], theirs[key])]
    assert account(home / name)["state"] == "done"
    assert "Traceback" not in first.said


def words(run: Path, shard: Path, *more: str, method: str = "simclr") -> list[str]:
    """What is typed for a run of a few steps on a tiny network, in less than a second a step."""
    return [*{**METHODS, **OF_SLIDES}[method], f"run={run}", f"data.shards=[{shard}]", *SMALL, *more]


def fault(*told: str) -> str:
    """The setting for faults by name."""
    return f"debug.faults=[{','.join(repr(each) for each in told)}]"


def ledger(run: Path) -> dict[int, list[tuple[int, str]]]:
    """By step, the samples of all ranks in order; of a step that was taken twice, the last time."""
    seen: dict[int, list[tuple[int, str]]] = {}
    for path in sorted((run / "ledger").glob("rank-*.jsonl")):
        own: dict[int, list[tuple[int, str]]] = {}
        last = -1
        for line in path.read_text().splitlines():
            row = json.loads(line)
            again = any(position == row["position"] for position, _ in own.get(row["step"], []))
            if row["step"] < last or again:         # an attempt that went on from an earlier checkpoint
                own = {step: rows for step, rows in own.items() if step < row["step"]}
            last = row["step"]
            own.setdefault(last, []).append((row["position"], row["key"]))
        for step, rows in own.items():
            seen.setdefault(step, []).extend(rows)
    return {step: sorted(rows) for step, rows in seen.items()}


def weights(run: Path) -> dict[str, Any]:
    """What the run exported."""
    from safetensors.numpy import load_file

    return load_file(run / "encoder" / "model.safetensors")


def account(run: Path) -> dict[str, Any]:
    """run.json."""
    return json.loads((run / "run.json").read_text())


def _be(rank: int, world: int, port: int, words: list[str], output: Path) -> int:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="localhost", MASTER_PORT=str(port))
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from ssl_dist import cli

    sys.argv = ["ssl-dist", "train", *words]
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _due(strike: dict[str, Any], seconds: float, words: list[str]) -> bool:
    if "after" in strike:
        return seconds > strike["after"]
    rows = _run(words) / "metrics.jsonl"
    return rows.exists() and rows.read_text().count("\n") >= strike["rows"]


def _run(words: list[str]) -> Path:
    return Path(next(word for word in words if word.startswith("run=")).partition("=")[2])


def _taken(words: list[str]) -> int:
    return sum(path.stat().st_size for path in _run(words).glob("ledger/*.jsonl"))


def _do(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    world, ranks, begun = job["world"], {}, time.monotonic()
    outputs = [folder / f"said-{rank}.txt" for rank in range(world)]
    for rank in range(world):
        if (child := os.fork()) == 0:
            code = 1
            try:
                code = _be(rank, world, port, job["words"], outputs[rank])
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        ranks[child] = rank
    codes, first, outlived, strike, before = [0] * world, 0.0, [], job.get("strike"), _taken(job["words"])
    while ranks:
        if strike and _due(strike, time.monotonic() - begun, job["words"]):
            if "shell" in strike:
                subprocess.run(strike["shell"], shell=True, check=True)
            for child in [child for child, rank in ranks.items() if rank in strike.get("ranks", [])]:
                os.kill(child, strike["signal"])
            strike = None
        child, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
        now = time.monotonic()
        if child and not os.WIFSTOPPED(status):
            rank = ranks.pop(child)
            codes[rank] = os.waitstatus_to_exitcode(status)
            first = first or (now if codes[rank] else 0.0)
        elif not child:
            time.sleep(0.02)
        if first and now - first > PATIENCE and ranks:
            outlived = sorted(ranks.values())
            for other in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(other, signal.SIGKILL)
            first = now
    now = time.monotonic()
    return {"codes": codes, "took": now - begun, "seconds": now - first if first else 0.0, "outlived": outlived,
            "begun": _taken(job["words"]) > before,
            "said": "".join(path.read_text() for path in outputs if path.exists())}


def main(path: Path) -> None:
    """Imports all that a run imports, and does the jobs."""
    import deepspeed  # noqa: F401

    from ssl_dist import train  # noqa: F401

    done = []
    for job in json.loads(path.read_text()):
        done.append(_do(job, path.parent))
        path.with_suffix(".done.json").write_text(json.dumps(done))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
