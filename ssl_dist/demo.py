"""The whole line on painted slides: every stage is a command that a user could type, and is printed before it runs."""

import json
import os
import time
from pathlib import Path

from rich.console import Console

from shards import folder as folders
from shards import synthetic
from ssl_dist import chain

PATIENTS, TEST_PATIENTS = 16, 4
SLIDE = 4096            # pixels of half a micron: two millimetres
LOOKED_AT = 1000        # tiles, of which the encoder's picture is drawn
PAUSE = 100             # the step after which training is stopped once, to show that it goes on


class OtherSeed(ValueError):
    """The folder holds the demo of another seed."""

    exit_code = 2


def demo(folder: Path, seed: int) -> int:
    """Runs what is missing, and prints figures and places; a second call only prints them."""
    console, started = Console(), time.monotonic()
    slides, shards, run = folder / "slides", folder / "shards", folder / "run"
    _same_seed(folder, seed)
    _paint(slides, seed, console)
    training = ["launch", "local", "--", "train", "demo", f"run={run}", f"data.shards=[{shards}]", f"seed={seed}"]
    chain.step(console, "cut the slides into shards", ["shard", "shards/demo", f"source={slides}", f"out={shards}"])
    chain.step(console, "hold the shards against their index", ["check", str(shards)])
    if not (run / "checkpoints").exists():
        chain.step(console, f"train SimCLR, and stop after step {PAUSE}", [*training, f"stop={PAUSE}"])
    if not _trained(run):
        chain.step(console, "resume, and train to the end", training)
    if not _newer(run / "eval" / "knn.json", run):
        chain.step(console, "is the encoder worth more than a random one?",
               ["eval", "eval/knn", f"encoder={run / 'encoder'}", f"data.shards=[{shards}]", f"seed={seed}"])
    if not _newer(run / "eval" / "look.json", run):
        chain.step(console, "what does it see?", ["eval", "eval/look", f"encoder={run / 'encoder'}",
                                              f"data.shards=[{shards}]", f"seed={seed}", f"tiles={LOOKED_AT}"])
    chain.step(console, "write the report", ["report", str(run)])
    _summary(console, folder, run, time.monotonic() - started)
    return 0


def _same_seed(folder: Path, seed: int) -> None:
    """One folder, one seed: slides of one and a run of another would be a demo of neither."""
    note = folders.make(folder) / "seed"
    if note.exists() and note.read_text().strip() != str(seed):
        raise OtherSeed(f"{folder} was made with seed {note.read_text().strip()}, not {seed}; choose another folder")
    folders.write(note, f"{seed}\n")


def _paint(slides: Path, seed: int, console: Console) -> None:
    console.rule("[bold]paint slides", align="left")
    with chain.bar(console, "painting slides") as show:
        synthetic.write_cohort(slides, patients=PATIENTS, test_patients=TEST_PATIENTS, size=SLIDE, mpp=0.5, seed=seed,
                               workers=len(os.sched_getaffinity(0)), progress=show)
    console.print(f"{slides}: {PATIENTS} slides of {PATIENTS} patients, {TEST_PATIENTS} of them for testing")


def _trained(run: Path) -> bool:
    account = run / "run.json"
    return account.exists() and json.loads(account.read_text())["state"] == "done"


def _newer(result: Path, run: Path) -> bool:
    """Whether an evaluation is of the encoder that is there."""
    weights = run / "encoder" / "model.safetensors"
    return result.exists() and weights.exists() and result.stat().st_mtime >= weights.stat().st_mtime


def _summary(console: Console, folder: Path, run: Path, seconds: float) -> None:
    knn = json.loads((run / "eval" / "knn.json").read_text())
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    own = knn["metrics"]["accuracy"]
    others = {name: told["accuracy"] for name, told in knn["baselines"].items()}
    random, colours = others["random"], others.get("colours")
    console.rule("[bold]done", align="left")
    for name, value in {
        "kNN accuracy, new patients": f"{own:.1%} (random weights {random:.1%}; {100 * (own - random):+.1f} points"
                                      + ("" if colours is None else f"; colour histograms {colours:.1%}") + ")",
        "training": f"{last['samples']} tiles in {last['step']} steps, {last['images_per_second']:.0f} tiles a second",
        "this call took": f"{seconds:.0f} s",
        "slides": folder / "slides", "shards": folder / "shards", "run": run, "encoder": run / "encoder",
        "report": (run / "report.html").absolute(), "curves": f"tensorboard --logdir {run / 'tb'}",
    }.items():
        console.print(f"{name:28} {value}", highlight=False, soft_wrap=True)
