"""What each method learns in minutes on two CPU cores: kNN and a linear probe on PatchCamelyon tiles never trained on,
against the same network untrained and against colour histograms. A result file a run, as each run ends."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import measure
import readme
import yaml

RECIPES = {"simclr": "simclr_r18_small", "moco": "moco_r18_small", "swav": "swav_r18_small",
           "barlow": "barlow_r18_small", "dino": "dino_vitt_small"}
SIZE = 64               # pixels that tiles are looked at with in evaluation: as large as the crops
POINTS = 60             # of a curve
CURVES = ("loss", "deviation", "rank")
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "learning.png"


def ssl_dist(*words: object) -> None:
    """A command that a user could type, on the cores that this benchmark has."""
    subprocess.run([sys.executable, "-m", "ssl_dist", *map(str, words)], check=True)


def shards(folder: Path) -> Path:
    """PatchCamelyon's 6,000 tiles to learn from and 1,000 to be asked about."""
    ssl_dist("shard", "shards/pcam", f"source={measure.DATA / 'pcam_subset_96px'}", f"out={folder / 'pcam'}")
    return folder / "pcam"


def learn(method: str, seed: int, tiles: Path, folder: Path, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Trains one method with one seed, and asks what it is worth. `known`: baselines by network, seed and protocol,
    for methods on one network begin with the same weights."""
    run = folder / f"{method}-{seed}"
    before, load = time.monotonic(), os.getloadavg()
    ssl_dist("train", f"pretrain/{RECIPES[method]}", f"run={run}", f"data.shards=[{tiles}]", f"seed={seed}",
             "device=cpu", "log.pictures=0")
    seconds = time.monotonic() - before
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    settings = yaml.safe_load((run / "config.yaml").read_text())
    found = {}
    for protocol in ("knn", "linear"):
        network = json.dumps([settings["encoder"], seed, protocol])
        baselines = "[]" if network in known else "[random,colours]"
        ssl_dist("eval", f"eval/{protocol}", f"encoder={run / 'encoder'}", f"data.shards=[{tiles}]", "data.query=valid",
                 f"seed={seed}", f"size={SIZE}", f"baselines={baselines}", "device=cpu")
        found[protocol] = json.loads((run / "eval" / f"{protocol}.json").read_text())
        found[protocol]["baselines"] = known.setdefault(network, found[protocol]["baselines"])
    kept = rows[::max(1, len(rows) // POINTS)]
    return {"method": method, "recipe": RECIPES[method], "seed": seed, "seconds": round(seconds, 1),
            "load_while": [*load, *os.getloadavg()], "tiles_seen": rows[-1]["samples"], "config": settings,
            "counts": found["knn"]["counts"], "size": SIZE, "k": found["knn"]["k"],
            **{protocol: {"encoder": result["metrics"]["accuracy"],
                          **{name: each["accuracy"] for name, each in result["baselines"].items()}}
               for protocol, result in found.items()},
            "curves": {name: [row[name] for row in kept if name in row] for name in ("samples", *CURVES)}}


def draw(results: dict[str, dict[int, dict[str, Any]]]) -> Any:
    """Loss against tiles seen, and what encoders are worth beside their untrained selves and colours."""
    figure, (left, right) = measure.plt.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 4), layout="constrained")
    colours = {method: f"C{number}" for number, method in enumerate(RECIPES)}
    for method, by_seed in results.items():
        for seed, result in by_seed.items():
            loss = result["curves"]["loss"]
            left.plot([samples / 1000 for samples in result["curves"]["samples"]], [each / loss[0] for each in loss],
                      color=colours[method], lw=1, label=method if seed == min(by_seed) else None)
    left.set(xlabel="thousand tiles seen", ylabel="loss, as part of its first value", ylim=(0, None))
    left.legend(frameon=False)
    names = [method for method in RECIPES if method in results]
    for offset, protocol in ((-0.2, "knn"), (0.2, "linear")):
        for place, method in enumerate(names):
            runs = results[method].values()
            for what, marker, colour in (("random", "o", "0.6"), ("encoder", "o", colours[method])):
                values = [100 * run[protocol][what] for run in runs]
                right.plot([place + offset] * len(values), values, marker, color=colour, ms=4, alpha=0.6)
                right.plot([place + offset - 0.12, place + offset + 0.12], [statistics.mean(values)] * 2, color=colour)
        level = statistics.mean(100 * run[protocol]["colours"] for method in names for run in results[method].values())
        right.axhline(level, color="0.3", lw=1, ls=":" if protocol == "knn" else "--",
                      label=f"colour histograms, {protocol}")
    right.set(xticks=range(len(names)), xticklabels=[f"{name}\nkNN   linear" for name in names],
              ylabel="accuracy on tiles never trained on, %")
    right.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Trains what was asked for, a seed of every method before the next seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--keep", type=Path, help="a folder for the runs; without it they go when the benchmark ends")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        tiles, asked_before = shards(folder), folder / "baselines.json"
        known = json.loads(asked_before.read_text()) if asked_before.exists() else {}
        for seed in asked.seeds:
            for method in asked.methods:
                result = {**measure.machine("scikit-learn"), **learn(method, seed, tiles, folder, known)}
                stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%S}"
                path = measure.RESULTS / f"learn_{method}-{seed}_{stamp}.json"
                path.write_text(json.dumps(result, indent=1) + "\n")
                asked_before.write_text(json.dumps(known))
                draw(readme.learnt()).savefig(PICTURE, dpi=110)
                measure.plt.close("all")


if __name__ == "__main__":
    main()
