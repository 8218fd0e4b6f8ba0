"""Nuclei: what encoders are worth to a HoVer-Net on MoNuSeg's training images, patients apart; and how nuclei are
parted, of 500 planted ellipses and of a region of 10,000 x 10,000 pixels.

    python benchmarks/nuclei.py --encoder RUN/encoder [--seeds 3] [--side 10000]

The encoder is one that a small recipe has trained (benchmarks/worth.py --keep FOLDER leaves some); beside it the same
network untrained learns from the same windows. Decoders are narrow and windows small, for two cores and minutes: this
compares encoders, and is far from what a HoVer-Net reaches.
"""

import argparse
import json
import resource
import runpy
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch

from ssl_dist import config
from ssl_dist.eval import instances, nuclei, watershed
from ssl_dist.eval.instances import Objects
from ssl_dist.eval.watershed import Rules, Strip
from ssl_dist.eval.windows import apart

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ["data.form=maps", "data.query=", "data.part=0.2", "window=128", "margin=16", "fine=false", "width=16",
            "kernel=3", "batches=[8,8]", "windows=4", "lr=2e-3", "baselines=[random]", "pictures=0", "write=[geojson]"]
EPOCHS = 4, 40          # with the encoder frozen, and free
DROP = 16               # of them, and the learning rate is a tenth
RULES = Rules(edge=0.3, smallest=10)
ROWS = 512              # of a strip of the large region
PATCH, PLANTED = 1000, 900          # pixels a side, and nuclei, of what it is made of


def tissue(encoder: Path, seed: int, settings: list[str], threads: int, home: Path) -> dict[str, Any]:
    """The figures of one seed: which patients are asked about, and all that is drawn, are of it."""
    words = [f"encoder={encoder}", f"data.regions={measure.DATA / 'monuseg2018' / 'train'}", f"seed={seed}",
             f"out={home}", *settings]
    began, times = time.monotonic(), {}

    def progress(what: str, done: int, total: int) -> None:
        if done == total:
            times[what] = round(time.monotonic() - began, 1)

    result = nuclei.run(config.load_eval("eval/nuclei", words), torch.device("cpu"), threads, progress)
    kept = ("metrics", "baselines", "against", "intervals", "counts", "curves", "regions", "warnings")
    sys.stderr.write(f"seed {seed}: {json.dumps({name: result[name] for name in ('metrics', 'baselines')})}\n")
    return {"seed": seed, "seconds": round(time.monotonic() - began, 1), "trained_after": times,
            **{name: result[name] for name in kept}}


def planted(ellipses: Any, seeds: int) -> list[dict[str, Any]]:
    """PQ of 500 ellipses that are told by their own maps, sparse and crowded."""
    rows = []
    for side in (600, 450):
        for seed in range(seeds):
            truth_HW = ellipses((side, side), 500, seed)
            found = watershed.whole([Strip((truth_HW > 0).astype(np.float32), apart(truth_HW), None)], truth_HW.shape,
                                    RULES)
            tally = instances.tally(Objects.of(truth_HW), Objects.of(found.numbers_HW), 0)
            rows.append({"side": side, "seed": seed, "pq": round(float(tally.pq_C[0]), 4),
                         "found": len(found.size_N)})
    return rows


def large(ellipses: Any, side: int) -> dict[str, Any]:
    """Seconds and memory of parting a region that is PATCH over and over, in strips as they come from a network."""
    truth_HW = ellipses((PATCH, PATCH), PLANTED, 0)
    nuclear, slopes = (truth_HW > 0).astype(np.float16), apart(truth_HW).astype(np.float16)
    times = -(-side // PATCH)

    def strips() -> Iterator[Strip]:
        for top in range(0, side, ROWS):
            rows = np.arange(top, min(top + ROWS, side)) % PATCH
            yield Strip(np.tile(nuclear[rows], (1, times))[:, :side],
                        np.tile(slopes[:, rows], (1, 1, times))[..., :side], None)

    before, began, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic(), time.process_time()
    found = watershed.whole(strips(), (side, side), RULES)
    return {"side": side, "rows": ROWS, "nuclei": len(found.size_N), "seconds": round(time.monotonic() - began, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 3),
            "peak_gb_before": round(before / 1e6, 3)}


def draw(found: dict[str, Any]) -> Any:
    """PQ, AJI and Dice of every seed, pretrained and untrained."""
    figure, axes = measure.plt.subplots(1, 3, figsize=(8, 3), layout="constrained")
    for axis, name in zip(axes, ("pq", "aji", "dice"), strict=True):
        for row in found["tissue"]:
            pair = [row["baselines"]["random"].get(name, 0), row["metrics"].get(name, 0)]
            axis.plot([0, 1], pair, "o-", color="C0", lw=1, ms=4)
        axis.set(xticks=[0, 1], xticklabels=["untrained", "pretrained"], title={"pq": "PQ", "aji": "AJI"}.get(
            name, "Dice"), xlim=(-0.3, 1.3), ylim=(0, 1))
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Ellipses, the large region, then tissue."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--encoder", type=Path, help="folder of an exported encoder; none: no tissue is looked at")
    parser.add_argument("--method", default="", help="what trained it, for the table")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--side", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, nargs=2, default=EPOCHS, help="with the encoder frozen, and free")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: where a CPU has it")
    parser.add_argument("--threads", type=int, default=measure.CORES)
    told = parser.parse_args()
    settings = [*SETTINGS, f"epochs={[*told.epochs]}", f"drop={DROP}", f"precision={told.precision}"]
    ellipses = runpy.run_path(str(ROOT / "tests" / "planted.py"))["ellipses"]
    found = measure.machine("scikit-image", "scipy", "timm") | {
        "method": told.method, "threads": told.threads, "settings": settings}
    found["large"] = large(ellipses, told.side)         # first: memory's peak is of the process
    found["planted"] = planted(ellipses, told.seeds)
    sys.stderr.write(f"{json.dumps(found['large'])}\n{json.dumps(found['planted'])}\n")
    found["tissue"] = []
    for seed in range(told.seeds if told.encoder else 0):
        with tempfile.TemporaryDirectory() as home:
            found["tissue"].append(tissue(told.encoder, seed, settings, told.threads, Path(home)))
    print(measure.keep(found, "nuclei", draw, measure.RESULTS))        # noqa: T201


if __name__ == "__main__":
    main()
