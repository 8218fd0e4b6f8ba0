"""Nuclei without labels: patch-contrastive segmentation of MoNuSeg, patients parted, against thresholds.

    python benchmarks/patchseg.py [--seeds 0 1 2] [--recipe patchseg_small] [--keep FOLDER]

Trains on the regions of 24 patients without their outlines, and asks about those of 6 others: Dice of what separation
and haematoxylin choose, of what labels would have chosen, of the untrained network, of Otsu's threshold on haematoxylin
and of the level of grey that is best on the 24. A result file a run. No picture of MoNuSeg is kept: its licence is
non-commercial.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import learn
import measure
import readme
import yaml

from ssl_dist.eval import segment
from ssl_dist.eval.settings import CUTS, Segment

REGIONS = measure.DATA / "monuseg2018" / "train"
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "segmentation.png"
KEPT = ("metrics", "intervals", "baselines", "against", "counts", "curves", "by_region", "regions", "step", "class",
        "chosen_by", "cut", "warnings")


def spent() -> float:
    """Seconds of processors that our children have taken."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(*words: object) -> dict[str, float]:
    """A command that a user could type, by the clock and by its processors: other jobs may run beside it."""
    clock, before = time.monotonic(), spent()
    learn.ssl_dist(*words)
    return {"seconds": round(time.monotonic() - clock, 1), "cpu_seconds": round(spent() - before, 1)}


def trained(recipe: str, seed: int, cut: str, shards: Path, folder: Path) -> dict[str, Any]:
    """One training and what came of it."""
    run, load = folder / f"{recipe}-{seed}", os.getloadavg()
    told = Segment(encoder=str(run / "encoder"), regions=REGIONS, form="maps")
    known = json.dumps({"patient": sorted(each.patient for each in segment.halves(told).bank)})
    spent_on = timed("train", f"pretrain/{recipe}", f"run={run}", f"data.shards=[{shards}]", f"data.only={known}",
                     f"seed={seed}", "device=cpu", "log.pictures=0")
    learn.ssl_dist("eval", "eval/segment", f"encoder={run / 'encoder'}", f"regions={REGIONS}", "form=maps",
                   f"seed={seed}", f"cut={cut}", "device=cpu")
    result = json.loads((run / "eval" / "segment.json").read_text())
    config = yaml.safe_load((run / "config.yaml").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {"recipe": recipe, "seed": seed, **spent_on, "load_while": [*load, *os.getloadavg()],
            "config": {**config, "run": run.name, "data": {**config["data"], "shards": [shards.name]}},
            **{name: result[name] for name in KEPT},
            "training": {name: [row[name] for row in rows]
                         for name in ("step", "loss", "separation", "within", "between", "positives", "confidence")}}


def draw(results: dict[int, dict[str, Any]]) -> Any:
    """Separation over a run; Dice of its checkpoints on the training regions and, in a square, of the one that was
    chosen without labels on the regions asked about; a colour a seed."""
    figure, (left, right) = measure.plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    for number, (seed, result) in enumerate(results.items()):
        rows = [row for row in result["curves"]["encoder"] if row["class"] == result["class"]]
        steps = [row["step"] for row in rows]
        left.plot(result["training"]["step"], result["training"]["separation"], color=f"C{number}", lw=0.6, alpha=0.5)
        left.plot(steps, [row["separation"] for row in rows], color=f"C{number}", marker="o", ms=3,
                  label=f"seed {seed}")
        right.plot(steps, [100 * row["dice_bank"] for row in rows], color=f"C{number}", marker="o", ms=3)
        right.plot(result["step"], 100 * result["metrics"]["dice"], color=f"C{number}", marker="s", ms=8, mfc="none")
    first = next(iter(results.values()))["baselines"]
    for name, words, style in (("otsu", "Otsu, haematoxylin", "--"), ("grey", "best level of grey", ":")):
        right.axhline(100 * first[name]["dice"], color="0.3", lw=1, ls=style, label=words)
    left.set(xlabel="step", ylabel="separation, bits")
    right.set(xlabel="step", ylabel="Dice, %", ylim=(0, 100))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    """Every seed that was asked for, one after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--recipe", default="patchseg_small")
    parser.add_argument("--cut", choices=CUTS, default="otsu", help="what of a map counts as there")
    parser.add_argument("--keep", type=Path, help="a folder for the runs; without it they go when the benchmark ends")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = told.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        shards = folder / "monuseg"
        learn.ssl_dist("shard", "shards/regions", f"source={REGIONS / 'images'}", f"out={shards}", "dataset=monuseg")
        for seed in told.seeds:
            result = {**measure.machine("scikit-image"), **trained(told.recipe, seed, told.cut, shards, folder)}
            path = measure.RESULTS / f"patchseg_{told.recipe}-{seed}_{datetime.now(UTC):%Y%m%dT%H%M%S}.json"
            path.write_text(json.dumps(result, indent=1) + "\n")
            draw(readme.segmented()).savefig(PICTURE, dpi=110)
            measure.plt.close("all")


if __name__ == "__main__":
    main()
