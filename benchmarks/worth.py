"""What encoders are worth, by every protocol: the five methods' small recipes, networks untrained, and colours.

    python benchmarks/worth.py [--methods simclr …] [--seed 0] [--keep FOLDER]

Trains each (benchmarks/learn.py does so for three seeds and two protocols), then asks kNN, a linear probe, a probe that
knows few labels and, of the first method, fine-tuning on PatchCamelyon tiles never trained on; and kNN on another
organ, tiles of osteosarcoma, with whole patients held out (of four: too few to choose a probe by). A result file a
method, as each ends.
"""

import argparse
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import learn
import measure
import readme
import yaml

SIZE = learn.SIZE
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "labels.png"
OTHER = {"size": 96, "mpp": "[1.0]", "tar_samples": 1000}       # of osteosarcoma, as PatchCamelyon's tiles are


def shards(folder: Path) -> tuple[Path, Path]:
    """PatchCamelyon, and tiles of osteosarcoma."""
    bone = folder / "osteosarcoma"
    learn.ssl_dist("shard", "datasets/osteosarcoma", f"source={measure.DATA / 'osteosarcoma_tcia_1024px'}",
                   f"out={bone}", *(f"{key}={value}" for key, value in OTHER.items()))
    return learn.shards(folder), bone


def asked(run: Path, protocol: str, tiles: Path, seed: int, *more: str) -> dict[str, Any]:
    """The result of one evaluation, as a user would type it."""
    learn.ssl_dist("eval", f"eval/{protocol}", f"encoder={run / 'encoder'}", f"data.shards=[{tiles}]", f"seed={seed}",
                   f"size={SIZE}", "device=cpu", *more)
    out = next((word.partition("=")[2] for word in more if word.startswith("out=")), run / "eval")
    return json.loads((Path(out) / f"{protocol}.json").read_text())


def worth(method: str, seed: int, tiles: tuple[Path, Path], folder: Path, *, tune: bool) -> dict[str, Any]:
    """Trains one method, where it is not trained yet, and asks what it is worth."""
    run, (pcam, bone) = folder / f"{method}-{seed}", tiles
    learn.ssl_dist("train", f"pretrain/{learn.RECIPES[method]}", f"run={run}", f"data.shards=[{pcam}]", f"seed={seed}",
                   "device=cpu", "log.pictures=0")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    both = "baselines=[random,colours]"
    found = {"knn": asked(run, "knn", pcam, seed, "data.query=valid", both),
             "linear": asked(run, "linear", pcam, seed, "data.query=valid", both),
             "low": asked(run, "low", pcam, seed, "data.query=valid", both),
             "bone": asked(run, "knn", bone, seed, "data.bank=", "data.query=", "data.hold=patient",
                           "data.part=0.4", both, f"out={run / 'bone'}")}
    if tune:
        found["finetune"] = asked(run, "finetune", pcam, seed, "data.query=valid", "epochs=2", "baselines=[random]")
    kept = ("metrics", "intervals", "baselines", "against", "counts", "curves", "warnings")
    return {"method": method, "recipe": learn.RECIPES[method], "seed": seed, "config": settings,
            "protocols": {name: {key: result[key] for key in kept if key in result} for name, result in found.items()}}


def draw(results: dict[str, dict[str, Any]]) -> Any:
    """Balanced accuracy over the number of labels known, a line a method."""
    figure, axis = measure.plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    lines = [(method, f"C{number}", result["protocols"]["low"]["curves"]["encoder"])
             for number, (method, result) in enumerate(results.items())]
    first = next(iter(results.values()))["protocols"]["low"]["curves"]
    lines += [(f"{name}", colour, first[name]) for name, colour in (("random", "0.6"), ("colours", "0.2"))]
    for name, colour, rows in lines:
        labels = [row["tiles"]["mean"] for row in rows]
        mean, deviation = ([100 * row["balanced_accuracy"][key] for row in rows] for key in ("mean", "deviation"))
        axis.errorbar(labels, mean, deviation, color=colour, marker="o", ms=3, lw=1, elinewidth=0.6, label={
            "random": "untrained ResNet-18", "colours": "colour histograms"}.get(name, name),
            ls="--" if name in ("random", "colours") else "-")
    axis.set(xscale="log", xlabel="labels known to a linear probe", ylabel="balanced accuracy, %")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, ncols=2)
    return figure


def main() -> None:
    """Every method that was asked for, one after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=learn.RECIPES, default=list(learn.RECIPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without-tuning", action="store_true", help="leave fine-tuning out")
    parser.add_argument("--keep", type=Path, help="a folder for the runs; without it they go when the benchmark ends")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = told.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        tiles = shards(folder)
        for method in told.methods:
            result = {**measure.machine("scikit-learn"),
                      **worth(method, told.seed, tiles, folder,
                              tune=method == next(iter(learn.RECIPES)) and not told.without_tuning)}
            path = measure.RESULTS / f"worth_{method}-{told.seed}_{datetime.now(UTC):%Y%m%dT%H%M%S}.json"
            path.write_text(json.dumps(result, indent=1) + "\n")
            draw(readme.valued()).savefig(PICTURE, dpi=110)
            measure.plt.close("all")


if __name__ == "__main__":
    main()
