"""A paper's whole chain as a user types it: painted lymph nodes, shards, MoCo v2, a vector a tile, DeepMIL, report.

    python benchmarks/chain.py [--seeds 0 2] [--keep FOLDER]

Seed 1 is not among them: the recipe was chosen by its nodes. What it shows is that the way is whole, how long each line
takes, and that what lies in few tiles is found by a model that can look for it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure

RECIPE = "eval/camelyon16"


def chain(seed: int, out: Path) -> dict[str, Any]:
    """One chain: seconds of each line, and what slides were told apart by."""
    began, load = time.monotonic(), os.getloadavg()
    subprocess.run([sys.executable, "-m", "ssl_dist", "chain", RECIPE, f"out={out}", f"paint.seed={seed}"], check=True)
    seconds = time.monotonic() - began
    lines = json.loads((out / "chain.json").read_text())["lines"]
    result = json.loads((out / "run" / "eval" / "mil.json").read_text())
    row = {"seed": seed, "seconds": round(seconds, 1), "load_before": load,
           "lines": {each["words"][0] if each["words"][0] != "launch" else "train": each["seconds"] for each in lines},
           **{name: result[name] for name in ("metrics", "intervals", "baselines", "counts")}}
    row["lines"] = {"paint": round(seconds - sum(row["lines"].values()), 1), **row["lines"]}
    sys.stderr.write(f"seed {seed}: {row['lines']}, {row['metrics']}\n")
    return row


def draw(found: dict[str, Any]) -> Any:
    """Seconds of every line, and AUROC of every model."""
    figure, (left, right) = measure.plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    names = list(found["rows"][0]["lines"])
    left.barh(names, [statistics.mean(row["lines"][name] for row in found["rows"]) for name in names], color="C0")
    left.invert_yaxis()
    left.set(xlabel="seconds")
    models = ["deepmil", *found["rows"][0]["baselines"]]
    for row in found["rows"]:
        values = [row["metrics"]["auroc"], *(each["auroc"] for each in row["baselines"].values())]
        right.plot(models, values, "o-", color="C0", lw=1, ms=4)
    right.axhline(0.5, color="0.7", lw=1, ls=":")
    right.set(ylabel="AUROC", ylim=(0.4, 1.02))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Chain after chain; one result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 2], help="of the painting")
    parser.add_argument("--keep", type=Path, help="where chains are left, and found again")
    told = parser.parse_args()
    found = measure.machine("timm", "scikit-learn") | {"recipe": RECIPE, "rows": []}
    for seed in told.seeds:
        with tempfile.TemporaryDirectory() as home:
            found["rows"].append(chain(seed, (told.keep or Path(home)) / f"nodes-{seed}"))
    print(measure.keep(found, "chain", draw, measure.RESULTS))        # noqa: T201


if __name__ == "__main__":
    main()
