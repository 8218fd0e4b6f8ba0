"""From a launch that is typed to the first step, by phase: torchrun on this machine, and a SLURM of two nodes on it.

    python benchmarks/start.py [--rounds N]        as root, with Debian's SLURM (tests/slurm/cluster.py)

Both start two ranks. `typed` ends when the command has checked everything and handed over, `waiting` when rank 0's
process begins; then come imports, the meeting of the ranks, the network with all that a run has, the first tiles and
the first step. Beside them, what two processes take to import the libraries alone.
"""

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure

cluster = runpy.run_path(str(Path(__file__).resolve().parent.parent / "tests" / "slurm" / "cluster.py"))
RANKS = 2
PHASES = ("typed", "waiting", "imports", "ranks", "network", "tiles", "step")
LIBRARIES = "import torch, torch.distributed, deepspeed, timm, nvidia.dali, cv2, pyarrow, tensorboard, omegaconf"
RECIPE = {"slurm": f"nodes: {RANKS}\nranks: 1\ncpus: 1\nhours: 0.2\ngrace: 30\nnetwork: lo\n"}
WORDS = ["train", "demo", "steps=2", "data.batch=16", "data.split=", "log.pictures=0", "device=cpu"]


def launched(kind: str, run: Path, shards: Path, environment: dict[str, str]) -> dict[str, float]:
    """Launches a run and waits for its end; seconds of every phase."""
    recipe = run.parent / "cluster.yaml"
    recipe.write_text(RECIPE["slurm"])
    how = ["local", f"ranks={RANKS}"] if kind == "local" else ["slurm", str(recipe)]
    words = [sys.executable, "-m", "ssl_dist", "launch", *how, "--", *WORDS, f"run={run}", f"data.shards=[{shards}]"]
    begun = time.time()
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    typed = None
    while not _done(run):
        if typed is None and process.poll() is not None:
            typed = time.time()
            if process.returncode:
                raise RuntimeError(f"{kind}: exit code {process.returncode}")
        if time.time() - begun > 300:
            raise RuntimeError(f"{kind}: no end in five minutes")
        time.sleep(0.05)
    process.wait()
    attempt = json.loads((run / "run.json").read_text())["attempts"][-1]
    since, found = attempt["process"], {}
    if kind == "slurm" and typed:
        found["typed"] = min(typed, since) - begun      # a free cluster starts it before the command has ended
        found["waiting"] = max(0.0, since - typed)
    else:               # torchrun is what the command becomes
        found["typed"], found["waiting"] = since - begun, 0.0
    before = 0.0
    for phase in PHASES[2:]:
        found[phase], before = attempt["seconds_to"][phase] - before, attempt["seconds_to"][phase]
    return found


def _done(run: Path) -> bool:
    try:
        return json.loads((run / "run.json").read_text())["state"] == "done"
    except (OSError, ValueError):
        return False


def libraries() -> float:
    """Seconds that as many processes at once take to import what a rank needs of others."""
    before = time.time()
    for process in [subprocess.Popen([sys.executable, "-c", LIBRARIES], stdout=subprocess.DEVNULL,
                                     stderr=subprocess.DEVNULL) for _ in range(RANKS)]:
        if process.wait():
            raise RuntimeError("the libraries cannot be imported")
    return time.time() - before


def draw(found: dict[str, Any]) -> Any:
    """Phases one after the other."""
    figure, axis = measure.plt.subplots(figsize=(9, 2.4), layout="constrained")
    for height, row in enumerate(found["launches"]):
        left = 0.0
        for number, phase in enumerate(PHASES):
            axis.barh(height, row["seconds"][phase], left=left, color=f"C{number}",
                      label=phase if height == 0 else None)
            left += row["seconds"][phase]
    axis.axvline(found["libraries"], color="0.3", lw=1, ls="--", label="importing the libraries alone")
    axis.set_yticks(range(len(found["launches"])), [row["name"] for row in found["launches"]])
    axis.set(xlabel="seconds from the command to the first step")
    axis.legend(frameon=False, fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Launches in turns, appends the result and its plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    told = parser.parse_args()
    rounds: dict[str, list[dict[str, float]]] = {"local": [], "slurm": []}
    alone = []
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        (shards,) = measure.shards("pcam", home)
        slurm = cluster["up"](home / "slurm", accounting=False)
        environment = {**os.environ, **slurm.environment}
        try:
            for number in range(told.rounds):
                alone.append(libraries())
                for kind in rounds:
                    rounds[kind].append(launched(kind, home / f"{kind}-{number}", shards, environment))
        finally:
            cluster["down"](home / "slurm")
    found = {**measure.machine(), "rounds": told.rounds, "ranks": RANKS,
             "libraries": round(statistics.median(alone), 2),
             "launches": [{"name": kind, "seconds": {phase: round(statistics.median(each[phase] for each in every), 2)
                                                     for phase in PHASES}} for kind, every in rounds.items()]}
    sys.stderr.write(f"{json.dumps(found['launches'], indent=1)}\n{found['libraries']}\n")
    sys.stderr.write(f"{measure.keep(found, 'launch', draw, measure.RESULTS)}\n")


if __name__ == "__main__":
    main()
