"""Features a second, against the data path and the encoder alone: no time may be lost between the two.

    python benchmarks/features.py [--rounds 5] [--tiles 1000] [--model resnet18]

On real tiles of PatchCamelyon, in turns in one run: `data` reads, decodes and resizes tiles and throws them away;
`encoder` looks at such tiles that are in memory; `extract` is what an evaluation does. On a CPU both share the cores,
so at best extract takes as long as the two one after the other; on a GPU, as the longer of them. `kept` is the same
features read again.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch

from ssl_dist import dist
from ssl_dist.eval import features
from ssl_dist.eval.cache import Cache
from ssl_dist.eval.features import Split
from ssl_dist.models.encoder import Encoder

SIZE, BATCH = 96, 100


def turns(told: argparse.Namespace, split: Split, encoder: Encoder, threads: int, device: torch.device,
          folder: Path) -> list[dict[str, float]]:
    """Seconds of every contender, a row a round."""
    shown = dict(size=SIZE, batch=BATCH, threads=threads)
    held = [pixels for _, pixels in features.tiles(split, np.arange(len(split.rows)), **shown)]

    def data() -> None:
        for _ in features.tiles(split, np.arange(len(split.rows)), **shown):
            pass

    @torch.inference_mode()
    def network() -> None:
        for pixels in held:
            encoder(pixels.to(device)).float().cpu()

    def extract() -> torch.Tensor:
        return features.extract(encoder, split, device=device, progress=lambda *_: None, **shown)

    cache = Cache(folder)
    cache.get({"of": "benchmark"}, extract)
    contenders = {"data": data, "encoder": network, "extract": extract,
                  "kept": lambda: cache.get({"of": "benchmark"}, extract)}
    rows = []
    for number in range(told.rounds + 1):       # the first warms up
        row = {}
        for name, do in contenders.items():
            since = time.perf_counter()
            do()
            row[name] = time.perf_counter() - since
        sys.stderr.write(f"round {number} of {told.rounds}: {row}\n")
        rows.append(row)
    return rows[1:]


def draw(found: dict[str, Any]) -> Any:
    """Seconds of the two alone, one on the other, beside those of both together."""
    figure, axis = measure.plt.subplots(figsize=(7, 1.8), layout="constrained")
    seconds = found["seconds"]
    axis.barh(1, seconds["data"], color="C0", label="data path")
    axis.barh(1, seconds["encoder"], left=seconds["data"], color="C1", label="encoder")
    axis.barh(0, seconds["extract"], color="C2", label="features, as evaluated")
    axis.set_yticks([0, 1], ["together", "apart"])
    axis.set(xlabel=f"seconds for {found['tiles']} tiles")
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Times them, appends the result and its plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiles", type=int, default=1000)
    parser.add_argument("--model", default="resnet18")
    told = parser.parse_args()
    device, threads = dist.device("auto"), dist.cores()
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as scratch:
        (shards,) = measure.shards("pcam", Path(scratch))
        split = features.every([shards])
        split = split.part(np.arange(min(told.tiles, len(split.rows))))
        encoder = Encoder(told.model, {}, (0.5,) * 3, (0.5,) * 3).eval().to(device)
        rows = turns(told, split, encoder, threads, device, Path(scratch) / "kept")
        split.reader.close()
    best = [max(row["data"], row["encoder"]) if device.type == "cuda" else row["data"] + row["encoder"] for row in rows]
    found = {**measure.machine(), "device": device.type, "model": told.model, "size": SIZE, "tiles": told.tiles,
             "rounds": told.rounds,
             "seconds": {name: round(statistics.median(row[name] for row in rows), 4) for name in rows[0]},
             "of_best": round(statistics.median(each / row["extract"]
                                                for each, row in zip(best, rows, strict=True)), 3)}
    sys.stderr.write(f"{json.dumps(found['seconds'])}, {found['of_best']} of the best\n")
    sys.stderr.write(f"{measure.keep(found, 'features', draw, measure.RESULTS)}\n")


if __name__ == "__main__":
    main()
