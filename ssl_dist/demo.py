"""The whole line on painted slides: every stage is a command that a user could type, and is printed before it runs."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from shards import folder as folders
from shards import synthetic

PATIENTS, TEST_PATIENTS = 16, 4
SLIDE = 4096            # pixels of half a micron: two millimetres
LOOKED_AT = 1000        # tiles, of which the encoder's picture is drawn
PAUSE = 100             # the step after which training is stopped once, to show that it goes on


class DemoFailed(RuntimeError):
    """A stage of the demo that ended with an error; its own line stands above."""

    def __init__(self, stage: str, exit_code: int):
        super().__init__(f"the demo ended at: {stage}; mend what the line above says, call it again, it goes on there")
        self.exit_code = exit_code


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
    _stage(console, "cut the slides into shards", ["shard", "shards/demo", f"source={slides}", f"out={shards}"])
    _stage(console, "hold the shards against their index", ["check", str(shards)])
    if not (run / "checkpoints").exists():
        _stage(console, f"train SimCLR, and stop after step {PAUSE}", [*training, f"stop={PAUSE}"])
    if not _trained(run):
        _stage(console, "resume, and train to the end", training)
    if not _newer(run / "eval" / "knn.json", run):
        _stage(console, "is the encoder worth more than a random one?",
               ["eval", "eval/knn", f"encoder={run / 'encoder'}", f"data.shards=[{shards}]", f"seed={seed}"])
    if not _newer(run / "eval" / "look.json", run):
        _stage(console, "what does it see?", ["eval", "eval/look", f"encoder={run / 'encoder'}",
                                              f"data.shards=[{shards}]", f"seed={seed}", f"tiles={LOOKED_AT}"])
    _stage(console, "write the report", ["report", str(run)])
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
    bar = Progress(TextColumn("painting slides"), BarColumn(), MofNCompleteColumn(), console=console,
                   disable=not console.is_terminal)
    with bar:
        task = bar.add_task("painting slides", total=PATIENTS)
        synthetic.write_cohort(slides, patients=PATIENTS, test_patients=TEST_PATIENTS, size=SLIDE, mpp=0.5, seed=seed,
                               workers=len(os.sched_getaffinity(0)),
                               progress=lambda done, total: bar.update(task, completed=done, total=total))
    console.print(f"{slides}: {PATIENTS} slides of {PATIENTS} patients, {TEST_PATIENTS} of them for testing")


def _stage(console: Console, title: str, words: list[str]) -> None:
    console.rule(f"[bold]{title}", align="left")
    console.print(f"$ ssl-dist {shlex.join(words)}", style="dim", markup=False, highlight=False, soft_wrap=True)
    stage = subprocess.Popen([sys.executable, "-m", "ssl_dist", *words])
    try:
        code = stage.wait()
    except KeyboardInterrupt:
        code = stage.wait()         # it heard the same Ctrl-C, and may be saving
    if code:
        raise DemoFailed(title, code)


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
