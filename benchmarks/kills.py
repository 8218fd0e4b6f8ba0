"""Signals at times that nobody chose, over five methods: what became of samples and weights, counted.

    python benchmarks/kills.py [--strikes 200] [--launched 20] [--seed 0]

A run of three ranks is struck several times, taken up again after each, and left to its end; then its ledger and its
weights are held against those of a run of its method that nothing happened to. Most runs are forked from one process
(tests/drill.py); `launched` strikes hit what `ssl-dist launch local` started: torchrun itself, or its whole group.
"""

import argparse
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import learn
import measure
import numpy as np

drill = runpy.run_path(str(Path(__file__).resolve().parent.parent / "tests" / "drill.py"))
METHODS, WORLD = tuple(drill["METHODS"]), drill["WORLD"]
STEPS = 40
LONG = [f"steps={STEPS}", "hang=10"]
SIGNALS = (*[signal.SIGKILL] * 9, *[signal.SIGTERM] * 5, *[signal.SIGUSR2] * 5, signal.SIGSTOP)
EACH = 4                # strikes a run
LATEST = 4.0            # seconds after the start of an attempt; what hits nothing any more does not count


def forked(home: Path, shard: Path, count: int, chance: random.Random) -> list[dict[str, Any]]:
    """Strikes at one rank or all."""
    jobs: list[tuple[Any, ...]] = [(f"whole {method}", WORLD, LONG, method) for method in METHODS]
    strikes: list[dict[str, Any] | None] = [None] * len(jobs)
    for number in range(count // EACH):
        method = METHODS[number % len(METHODS)]
        for _ in range(EACH):
            ranks, sent = chance.choice([[0], [1], [2], [0, 1, 2]]), chance.choice(SIGNALS)
            if sent == signal.SIGSTOP:
                ranks = ranks[:1]       # who is stopped ends nothing; the others do
            strike = {"after": chance.uniform(0.3, LATEST), "signal": int(sent), "ranks": ranks}
            strikes.append({"signal": sent.name, "target": "all ranks" if len(ranks) > 1 else "one rank"})
            jobs.append((f"struck {number} {method}", WORLD, LONG, method, strike))
        jobs.append((f"struck {number} {method}", WORLD, LONG, method))
        strikes.append(None)
    ended = drill["drills"](home, shard, jobs)
    places: Counter[str] = Counter()
    found = []
    for (name, *_), strike in zip(jobs, strikes, strict=True):
        end = ended[name][places[name]]
        places[name] += 1
        if strike and any(end.codes):
            found.append({**strike, "run": name, "codes": end.codes, "seconds": round(end.seconds, 1),
                          "outlived": end.outlived})
    for each in found:
        each |= judged(home, each["run"])
    return found


def judged(home: Path, name: str) -> dict[str, bool]:
    """Whether a run's samples and weights are those of its method's whole run."""
    run, whole = home / name, home / f"whole {name.split()[-1]}"
    try:
        ours, theirs = drill["weights"](run), drill["weights"](whole)
    except FileNotFoundError:
        return {"ledger": False, "weights": False}
    return {"ledger": drill["ledger"](run) == drill["ledger"](whole),
            "weights": ours.keys() == theirs.keys() and all(np.array_equal(ours[key], theirs[key]) for key in ours)}


def launched(home: Path, shard: Path, count: int, chance: random.Random) -> list[dict[str, Any]]:
    """Strikes at torchrun, or at the whole group, of `ssl-dist launch local`."""
    found = []
    for number in range(count):
        method, name = METHODS[number % len(METHODS)], f"launched {number} {METHODS[number % len(METHODS)]}"
        words = [sys.executable, "-m", "ssl_dist", "launch", "local", f"ranks={WORLD}", "--", "train",
                 *drill["words"](home / name, shard, *LONG, method=method)]
        target, sent = chance.choice(["torchrun", "the group"]), chance.choice(SIGNALS[:-1])
        said = (home / f"{name}.txt").open("a")
        process = subprocess.Popen(words, stderr=said, stdout=said, start_new_session=True,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        time.sleep(chance.uniform(4.0, 25.0))
        struck = time.monotonic()
        if process.poll() is None:
            agents = [child for child in measure.children() if child != process.pid and "torch.distributed" in command(
                child)] or [process.pid]
            for victim in agents[:1] if target == "torchrun" else [0]:
                os.kill(victim, sent) if victim else os.killpg(process.pid, sent)
        code = process.wait(120)
        deadline = time.monotonic() + 60
        while alive(home / name) and time.monotonic() < deadline:
            time.sleep(0.2)
        outlived = alive(home / name)
        seconds = time.monotonic() - struck
        again = subprocess.run(words, stderr=said, stdout=said, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
        found.append({"signal": sent.name, "target": target, "run": name, "codes": [code, again.returncode],
                      "seconds": round(seconds, 1), "outlived": outlived, **judged(home, name)})
        sys.stderr.write(f"{found[-1]}\n")
    return found


def command(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def alive(run: Path) -> list[int]:
    """Processes that train this run."""
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if f"run={run}\0" in command(int(path.name))]


def draw(found: dict[str, Any]) -> Any:
    """Seconds until all ranks had ended, by what struck whom."""
    figure, axis = measure.plt.subplots(figsize=(8, 3), layout="constrained")
    kinds = sorted({(row["target"], row["signal"]) for row in found["strikes"]})
    for height, kind in enumerate(kinds):
        own = [row["seconds"] for row in found["strikes"] if (row["target"], row["signal"]) == kind]
        axis.plot(own, [height] * len(own), ".", color="#7a4f8a", alpha=0.5)
    axis.set_yticks(range(len(kinds)), [f"{signal} to {target}" for target, signal in kinds], fontsize=8)
    axis.set(xlabel="seconds from the first bad end to the last")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Runs the strikes, appends the result and its plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--strikes", type=int, default=200, help="at forked ranks")
    parser.add_argument("--launched", type=int, default=20, help="at torchrun and its group")
    parser.add_argument("--seed", type=int, default=0)
    told = parser.parse_args()
    found: dict[str, Any] = {**measure.machine(), "seed": told.seed, "world": WORLD, "steps": STEPS}
    with tempfile.TemporaryDirectory() as scratch:
        shard = learn.shards(Path(scratch))
        chance, home = random.Random(told.seed), Path(scratch) / "runs"
        found["strikes"] = forked(home, shard, told.strikes, chance)
        found["strikes"] += launched(home, shard, told.launched, chance)
    bad = [row for row in found["strikes"] if not (row["ledger"] and row["weights"])]
    sys.stderr.write(f"{len(found['strikes'])} strikes, {len(bad)} left a trace\n")
    sys.stderr.write(f"{measure.keep(found, 'kills', draw, measure.RESULTS)}\n")


if __name__ == "__main__":
    main()
