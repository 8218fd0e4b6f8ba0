"""Vectors of whole slides a second, against reading them alone and the encoder alone: no time may be lost between.

    python benchmarks/embed.py [--rounds 3] [--model resnet18] [--side 4096]

In turns in one run, on painted slides and on a real one under several names: `read` is all tiles of the slides, read by
a process a core and thrown away; `encoder` looks at such tiles that are in memory; `embed` is the command. On a CPU
both share the cores, so at best embed takes as long as the two one after the other; on a GPU, as the longer of them.
`_cpu` is the same a CPU-second of all processes,
which says more where other jobs share the cores: embed has more processes than either alone, and so more of the cores.
And on one core: a slide's own JPEG tiles, decoded as they lie in the file, against OpenSlide's read_region.
"""

# Each slide is read in a process of its own, which imports this file again: what is heavy is imported below.
import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZE, BATCH = 224, 32
COPIES = 8              # of the real slide, which is small
PAINTED = 4


def sets(folder: Path, side: int) -> dict[str, dict[str, Any]]:
    """What is embedded, by name: slides, and how their own tiles lie."""
    import measure

    from shards import synthetic

    synthetic.write_cohort(folder / "painted", patients=PAINTED, size=side, test_patients=0)
    found: dict[str, dict[str, Any]] = {"painted": {"slides": [str(folder / "painted")], "size": 256, "mpp": 0.5}}
    real = measure.DATA / "wsi_svs" / "CMU-1-Small-Region.svs"
    if real.is_file():
        (folder / "real").mkdir()
        for number in range(COPIES):
            (folder / "real" / f"CMU-1-{number}.svs").symlink_to(real.resolve())
        found["real"] = {"slides": [str(folder / "real")], "size": 240, "mpp": 0.5}
    return found


def turns(told: argparse.Namespace, which: dict[str, Any], encoder: Path, device: Any, threads: int,
          folder: Path) -> list[dict[str, float]]:
    """Tiles a second of every contender, a row a round."""
    import measure
    import numpy as np
    import torch

    from shards import feed, sources
    from ssl_dist import embed
    from ssl_dist.eval import features
    from ssl_dist.models import encoder as encoders
    from ssl_dist.slides import Slides

    settings = Slides(encoder=str(encoder), out=folder, batch=BATCH, **which)
    found = sources.named(settings.slides, settings.reading())
    network = encoders.load(encoder)
    held = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8))

    def read() -> int:
        return sum(len(item.corner_N2) for item in feed.read(found, settings.reading()) if isinstance(item, feed.Tiles))

    def look(tiles: int) -> int:
        rounds = max(1, round(tiles / BATCH))
        return sum(len(vectors) for _, vectors in features.look(network, ((None, held) for _ in range(rounds)), device))

    rows = []
    for number in range(told.rounds + 1):       # the first warms up
        settings.out, spent = folder / str(number), measure.cpu_seconds()
        done = embed.run(settings, device, threads)
        row = {"embed": done.tiles / done.seconds, "slides_an_hour": 3600 * done.slides / done.seconds,
               "tiles": done.tiles, "embed_cpu": done.tiles / (measure.cpu_seconds() - spent)}
        for name, do in (("read", read), ("encoder", lambda tiles=done.tiles: look(tiles))):
            since, spent = time.perf_counter(), measure.cpu_seconds()
            tiles = do()
            row |= {name: tiles / (time.perf_counter() - since),
                    f"{name}_cpu": tiles / (measure.cpu_seconds() - spent)}
        rows.append(row)
        sys.stderr.write(f"round {number} of {told.rounds}: {rows[-1]}\n")
    return rows[1:]


def apart(which: dict[str, Any], rounds: int) -> dict[str, Any]:
    """On one core, tiles a second of a slide: its own JPEGs, and the same places by OpenSlide."""
    import numpy as np
    import openslide

    from shards import jpeg, sources
    from shards.slide import Slide
    from ssl_dist.slides import Slides

    settings = Slides(encoder="timm:resnet18", out=Path(), **which)
    file, side = sources.named(settings.slides, settings.reading())[0].path, settings.size
    rows = []
    with Slide(file) as slide, openslide.OpenSlide(str(file)) as handle:
        native = slide.native(settings.mpp)
        assert native is not None and native.side == side
        places = [(column, row) for row in range(slide.height // side) for column in range(slide.width // side)]
        pixels = np.empty((side, side, 3), np.uint8)
        for _ in range(rounds + 1):
            since = time.perf_counter()
            for place in places:
                jpeg.decode_into(native.tile(*place), pixels)
            between = time.perf_counter()
            for column, row in places:
                pixels[:] = np.asarray(handle.read_region((column * side, row * side), 0, (side, side)).convert("RGB"))
            rows.append((len(places) / (between - since), len(places) / (time.perf_counter() - between)))
    own, shown = zip(*rows[1:], strict=True)
    return {"own": round(statistics.median(own), 1), "read_region": round(statistics.median(shown), 1),
            "ratio": round(statistics.median(one / other for one, other in rows[1:]), 2)}


def draw(found: dict[str, Any]) -> Any:
    """Seconds for a thousand tiles: the two alone, one on the other, beside those of both together."""
    import measure

    sets_ = found["sets"]
    figure, axis = measure.plt.subplots(figsize=(7, 0.8 + 0.9 * len(sets_)), layout="constrained")
    for place, row in enumerate(sets_.values()):
        first = place == 0
        axis.barh(3 * place + 1, 1000 / row["read"], color="C0", label="reading" if first else None)
        axis.barh(3 * place + 1, 1000 / row["encoder"], left=1000 / row["read"], color="C1",
                  label="encoder" if first else None)
        axis.barh(3 * place, 1000 / row["embed"], color="C2", label="slides to vectors" if first else None)
    axis.set_yticks([3 * place + each for place in range(len(sets_)) for each in (0, 1)],
                    [f"{name}, {how}" for name in sets_ for how in ("together", "apart")])
    axis.set(xlabel="seconds for 1,000 tiles")
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Times them, appends the result and its plot."""
    import measure
    import torch

    from ssl_dist import dist
    from ssl_dist.models.encoder import Encoder

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--side", type=int, default=4096, help="of the painted slides, pixels")
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    told = parser.parse_args()
    device, threads = dist.device("auto"), dist.cores()
    torch.set_num_threads(threads)
    found = {**measure.machine("openslide-bin"), "device": device.type, "model": told.model, "size": SIZE,
             "batch": BATCH, "rounds": told.rounds, "sets": {}}
    with tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        Encoder(told.model, {}, (0.5,) * 3, (0.5,) * 3).save(Path(scratch) / "encoder", SIZE, {})
        for name, which in sets(Path(scratch), told.side).items():
            rows = turns(told, which, Path(scratch) / "encoder", device, threads, Path(scratch) / f"{name}-vectors")
            best = [1 / max(1 / row["read"], 1 / row["encoder"]) if device.type == "cuda" else
                    1 / (1 / row["read"] + 1 / row["encoder"]) for row in rows]
            cpu = [row["embed_cpu"] * (1 / row["read_cpu"] + 1 / row["encoder_cpu"]) for row in rows]
            ratios = [row["embed"] / each for row, each in zip(rows, best, strict=True)]
            found["sets"][name] = {
                **{key: round(statistics.median(row[key] for row in rows), 1) for key in rows[0]},
                "of_best": round(statistics.median(ratios), 3), "of_best_rounds": [round(each, 3) for each in ratios],
                "of_best_cpu": round(statistics.median(cpu), 3), "of_best_cpu_rounds": [round(each, 3) for each in cpu],
                "one_core": apart(which, told.rounds)}
    sys.stderr.write(f"{json.dumps(found['sets'])}\n")
    sys.stderr.write(f"{measure.keep(found, 'embed', draw, told.out)}\n")


if __name__ == "__main__":
    main()
