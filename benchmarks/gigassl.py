"""Slides by Giga-SSL: what storing, training on, embedding and probing ten thousand costs, and whether what it learns
without labels tells slides apart that differ in where things lie, or in what is there.

    python benchmarks/gigassl.py [--slides 10000] [--seeds 3]

Scale: made-up vectors, DRAWS draws of TILES tiles of every slide as the recipe stores them, in half precision.
Arrangement: slides of some 115 tiles of which 24 are of another kind, in a heap or strewn; composition: as many,
strewn, of one kind or of another. The encoder learns with no label; its vectors and the mean of the tiles' are then
asked by the same probe.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
import numpy as np

from shards import arrays, drawing, draws, folder
from shards.drawing import Slide
from shards.draws import Draw

DRAWS, TILES, WIDTH, A_TAR = 2, 256, 256, 250
PAPER = 11_642          # slides of the public embeddings
LEARNS = ["data.batch=256", "epochs=0", "steps=20", "checkpoint.every=1000", "log.every=1", "optim.lr=1e-3"]
# Of arrangement and composition. Found by a few trials on other slides of the same making.
SLIDES, SIDE, SPECIAL, NARROW, SEEN = 192, 12, 24, 16, 32
ASKS = ["data.batch=64", "epochs=40", "optim.lr=2e-3", "optim.warmup=0.1", "checkpoint.every=1000", "log.every=20",
        f"encoder.args={{tiles: {NARROW}, width: 64}}", "method.hidden=64", "method.width=32",
        f"method.view.tiles={SEEN}", "method.temperature=0.1", "method.view.stretch=[0.9,1.1]"]


def called(*words: str) -> tuple[float, float, str]:
    """Seconds, the most memory in MB of a command of ours (or a process of its), and what it said."""
    since = time.monotonic()
    done = subprocess.run([sys.executable, "-c", "import resource, subprocess, sys\n"
                           "code = subprocess.call([sys.executable, '-m', 'ssl_dist', *sys.argv[1:]])\n"
                           "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\nsys.exit(code)", *words],
                          capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": ":".join(sys.path)})
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return time.monotonic() - since, int(done.stdout.split()[-1]) / 1000, done.stdout


def write(out: Path, slides: list[list[Draw]], width: int) -> Path:
    """A folder of draws as `ssl-dist draw` publishes it."""
    work = folder.make(out / ".work")
    notes = []
    for number, first in enumerate(range(0, len(slides), A_TAR)):
        path, note = out / f"made-{number:06d}.tar", work / f"{number}.json"
        drawing.write_tar(path, note, {"dataset": "made", "organ": "", "stain": ""}, (
            (Slide(f"s{first + place:06d}", "", "", 1.0), [draws.packed(each) for each in own])
            for place, own in enumerate(slides[first:first + A_TAR])))
        notes.append(drawing.noted(path, note))
    drawing.publish(out, {"name": "made", "licence": "", "classes": [], "draws": len(slides[0]), "tiles": TILES,
                          "width": width, "encoder": "made-up", "encoder_sha256": "0" * 64}, {"stage": 3}, notes, {})
    shutil.rmtree(work)
    return out


class Lazy(list):
    """Slides that are made when they are asked for."""

    def __init__(self, count: int, make: Any):
        super().__init__()
        self.count, self.make = count, make

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: Any) -> Any:
        return [self.make(each) for each in range(*place.indices(self.count))] if isinstance(place, slice) else \
            self.make(place)


def scale(count: int, scratch: Path) -> dict[str, Any]:
    """So many slides stored, indexed, trained on, embedded and probed."""
    base = np.random.default_rng(0).normal(size=(4096, WIDTH)).astype(np.float16)
    grid = np.stack(np.unravel_index(np.arange(1024), (32, 32)), axis=1)

    def made(slide: int) -> list[Draw]:
        rng = np.random.default_rng([1, slide])
        return [Draw(base[rng.integers(0, 4096, TILES)], grid[rng.permutation(1024)[:TILES]]) for _ in range(DRAWS)]

    since = time.monotonic()
    home = write(scratch / "draws", Lazy(count, made), WIDTH)
    found: dict[str, Any] = {"slides": count, "draws": DRAWS, "tiles": TILES, "width": WIDTH,
                             "write_seconds": time.monotonic() - since}
    size = sum(path.stat().st_size for path in home.glob("*.tar"))
    found |= {"tar_bytes": size, "bytes_a_draw": size / count / DRAWS, "numbers_bytes_a_draw": TILES * (2 * WIDTH + 8),
              "table_bytes": (home / "samples.arrow").stat().st_size}
    found["open_seconds"], found["open_mb"] = opened(home)
    learnt = scratch / "run"
    seconds, memory, _ = called("train", "pretrain/gigassl", f"run={learnt}", f"data.shards=[{home}]", *LEARNS)
    rows = [json.loads(line) for line in (learnt / "metrics.jsonl").read_text().splitlines()]
    found["train"] = {"seconds": seconds, "mb": memory, "steps": len(rows), "batch": 256,
                      "slides_per_second": float(np.median([row["images_per_second"] for row in rows[5:]])),
                      "data_wait": float(np.mean([row["data_wait"] for row in rows[5:]]))}
    bags = folder.make(scratch / "h5")
    for slide in range(count):
        one = made(slide)[0]
        arrays.write_bag(bags / f"s{slide:06d}.h5", one.features_TD, 256 * one.cell_T2,
                         {"slide": f"s{slide:06d}", "encoder_sha256": "0" * 64, "stage": 3}, wide=256)
    seconds, memory, _ = called("eval", "eval/slide_embed", f"encoder={learnt / 'encoder'}", f"bags={bags}", "views=20")
    table = learnt / "eval" / "slides.parquet"
    found["embed"] = {"seconds": seconds, "mb": memory, "views": 20, "table_bytes": table.stat().st_size,
                      "numbers_bytes": count * 512 * 4}
    labels = scratch / "labels.csv"
    folder.write(labels, "slide,label\n" + "".join(f"s{slide:06d},{'ab'[slide % 2]}\n" for slide in range(count)))
    seconds, memory, _ = called("eval", "eval/slide_linear", f"vectors={table}", f"labels={labels}")
    found["probe"] = {"seconds": seconds, "mb": memory}
    return found


def opened(home: Path) -> tuple[float, float]:
    """Seconds and memory, beyond the imports, until the first batch could be asked for."""
    said = subprocess.run([sys.executable, "-c", """
import resource, sys, time
from pathlib import Path
from ssl_dist.data.reader import Reader
from ssl_dist.data.stream import Stream
before, since = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
reader = Reader([Path(sys.argv[1])], slides=True)
stream = Stream(reader.counts, seed=0, window=16, batch=256)
reader.rows(*stream.locate(0, stream.positions(0)))
print(time.monotonic() - since, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000)
""", str(home)], capture_output=True, text=True, check=True).stdout.split()
    return float(said[0]), float(said[1])


def slides(kind: str, seed: int) -> tuple[list[list[Draw]], list[int]]:
    """Slides that differ in where their special tiles lie, or in what these are."""
    rng = np.random.default_rng([seed, len(kind)])
    grid = np.stack(np.unravel_index(np.arange(SIDE * SIDE), (SIDE, SIDE)), axis=1)
    found, labels = [], []
    for number in range(SLIDES):
        own = rng.permutation(len(grid))[:int(rng.integers(100, 130))]
        label = number % 2
        heap = kind == "where" and label
        middle = rng.uniform(3, SIDE - 3, 2)
        order = np.argsort(np.linalg.norm(grid[own] - middle, axis=1)) if heap else rng.permutation(len(own))
        shift = np.zeros((len(own), NARROW))
        shift[order[:SPECIAL], label if kind == "what" else 0] = 3.0
        found.append([Draw(rng.normal(size=shift.shape) + shift, grid[own]) for _ in range(4)])
        labels.append(label)
    return found, labels


def told_apart(kind: str, seed: int, scratch: Path) -> dict[str, Any]:
    """AUROC of the learnt vectors, and of the mean of the tiles', of slides that nothing was trained on otherwise."""
    made, labels = slides(kind, seed)
    home = write(scratch / "draws", made, NARROW)
    bags = folder.make(scratch / "h5")
    for number, own in enumerate(made):
        arrays.write_bag(bags / f"s{number:06d}.h5", own[0].features_TD, 256 * own[0].cell_T2,
                         {"slide": f"s{number:06d}", "encoder_sha256": "0" * 64, "stage": 3}, wide=256)
    table = scratch / "labels.csv"
    folder.write(table, "slide,label\n" + "".join(f"s{number:06d},{'ab'[each]}\n"
                                                  for number, each in enumerate(labels)))
    found: dict[str, Any] = {"kind": kind, "seed": seed}
    for network in ("sparse", "mlp"):
        run = scratch / network
        found[f"{network}_seconds"] = called(
            "train", "pretrain/gigassl", f"run={run}", f"data.shards=[{home}]", f"seed={seed}",
            f"encoder.name={network}", *ASKS)[0]
        called("eval", "eval/slide_embed", f"encoder={run / 'encoder'}", f"bags={bags}", "views=10", f"tiles={SEEN}")
        called("eval", "eval/slide_linear", f"vectors={run / 'eval' / 'slides.parquet'}", f"labels={table}",
               f"baselines=[{bags}]", "sizes=[50]", "scale=true", "strength=0.01")
        result = json.loads((run / "eval" / "slide_linear.json").read_text())
        found[network] = result["metrics"]["auroc"]
        found["mean"] = result["baselines"][str(bags)]["auroc"]
    sys.stderr.write(f"{found}\n")
    return found


def draw(found: dict[str, Any]) -> Any:
    """What tells slides apart, by what they differ in."""
    figure = measure.plt.figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for place, kind in enumerate(("where", "what")):
        for number, name in enumerate(("sparse", "mlp", "mean")):
            own = [row[name] for row in found["apart"] if row["kind"] == kind]
            axis.plot([place + 0.15 * number - 0.15] * len(own), own, "o", ms=5, alpha=0.7, color=f"C{number}",
                      label=None if place else {"sparse": "sparse convolution", "mlp": "each tile for itself",
                                                "mean": "mean of the tiles' vectors"}[name])
    axis.axhline(0.5, color="0.7", lw=0.8, ls=":")
    axis.set(xticks=[0, 1], xticklabels=["differ in where\nspecial tiles lie", "differ in what\nspecial tiles are"],
             ylabel="AUROC of a probe", ylim=(0.3, 1.03), xlim=(-0.5, 1.5))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def main() -> None:
    """Scale, then what is told apart."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--slides", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=3)
    told = parser.parse_args()
    since, found = time.monotonic(), measure.machine("scikit-learn", "deepspeed")
    found["settings"] = {"learns": LEARNS, "asks": ASKS, "slides": SLIDES, "side": SIDE, "special": SPECIAL,
                         "narrow": NARROW, "probe": {"strength": 0.01, "scale": True}}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if told.slides:
            found["scale"] = scale(told.slides, folder.make(scratch / "scale"))
        found["apart"] = [told_apart(kind, seed, folder.make(scratch / f"{kind}-{seed}"))
                          for seed in range(told.seeds) for kind in ("where", "what")]
    found["paper"] = {"slides": PAPER, "numbers": 512, "bytes": PAPER * 512 * 4}
    found["seconds"] = round(time.monotonic() - since)
    print(measure.keep(found, "gigassl", draw, measure.RESULTS))        # noqa: T201


if __name__ == "__main__":
    main()
