"""Tiles per CPU-second from slides to shards, contenders interleaved in one run on the same tiles of the same slide.

    python benchmarks/shard.py [FOLDER_OF_SLIDES] [ROUNDS]

Cutting, in one process, CPU seconds (opening the slide, its mask and the judging of every tile are ours to pay):

    pass-through     our cutting where the slide's own JPEG tiles are what is asked for
    re-encoding      our cutting told to decode and encode (passthrough=false)
    OpenSlide        read_region, RGB, and an encoder (simplejpeg, the faster; Pillow too) on the tiles that we kept

The whole job, CPU seconds of all its processes and their start: `write` with tars, digests, idx and index, against
OpenSlide's cutting alone. Then the wall time of two workers against one, what a check reads a second, and how often
two tiles of one slide meet in a batch.
"""

import contextlib
import ctypes
import hashlib
import importlib.metadata
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import matplotlib
import numpy as np
import openslide
import simplejpeg
from PIL import Image

from shards import check, index, sources, synthetic, tiff, tiles, tissue, write
from shards.slide import Slide
from ssl_dist import run

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"
CORES = len(os.sched_getaffinity(0))
SIDE = 24576            # of the painted slides, pixels: 9216 tiles of 256, as a 20x scan has
PAINTED = 4             # slides, for the whole job
BATCH = 256


def slides(folder: Path) -> list[Path]:
    """Large slides, quickly: one painted canvas, shifted from block to block so that no two tiles are equal."""
    canvas = synthetic.paint(0, 0, 0, size=3072).pixels
    paths = []
    for number in range(PAINTED):
        blocks = [np.roll(canvas, ((16 * number + 4 * row + column) * 37, (16 * number + 4 * column + row) * 53),
                          axis=(0, 1)) for row in range(SIDE // 3072) for column in range(SIDE // 3072)]
        rows = [np.concatenate(blocks[first:first + SIDE // 3072], axis=1)
                for first in range(0, len(blocks), SIDE // 3072)]
        paths.append(folder / f"painted-{number}.svs")
        tiff.write_pyramid(paths[-1], np.concatenate(rows), 0.5, synthetic.QUALITY)
    return paths


def cutting(path: Path, size: int, mpp: float, passthrough: bool) -> Callable[[], list[tiles.Tile]]:
    """Our first phase on one slide, as a worker runs it."""
    settings = write.Settings(source=path.parent, out=path.parent, dataset="a", size=size, mpp=[mpp],
                              passthrough=passthrough)
    source = sources.Source(file=str(path), name=path.stem, slide=path.stem)

    def cut() -> list[tiles.Tile]:
        with Slide(path, None, mpp) as slide:
            found = tissue.mask(slide.thumbnail(tissue.MASK_MPP))
            return [item for item in tiles.of_slide(source, slide, found, settings, None)
                    if isinstance(item, tiles.Tile)]

    return cut


def plain(path: Path, corners: list[tuple[int, int]], size: int, encode: Callable[[Image.Image], bytes]
          ) -> Callable[[], list[bytes]]:
    """OpenSlide and an encoder, nothing else."""
    def cut() -> list[bytes]:
        with openslide.OpenSlide(str(path)) as slide:
            return [encode(slide.read_region(corner, 0, (size, size)).convert("RGB")) for corner in corners]

    return cut


def simple(picture: Image.Image) -> bytes:
    """libjpeg-turbo, called directly."""
    return simplejpeg.encode_jpeg(np.asarray(picture), 90, "RGB", "444", fastdct=False)


def pillow(picture: Image.Image) -> bytes:
    """Pillow's encoder."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90, subsampling="4:4:4")
    return buffer.getvalue()


def seconds(work: Callable[[], list]) -> tuple[float, int]:
    """CPU seconds of one call, and how many tiles it made."""
    start = time.process_time()
    made = len(work())
    return time.process_time() - start, made


def whole(source: Path, out: Path, workers: int) -> tuple[float, float, int]:
    """Wall and CPU seconds of a whole job in processes of its own, and its tiles."""
    shutil.rmtree(out, ignore_errors=True)
    program = ("import sys; from pathlib import Path; from shards import write\n"
               "write.write(write.Settings(source=Path(sys.argv[1]), out=Path(sys.argv[2]), dataset='a', size=256, "
               "mpp=[0.5], tar_samples=1000, workers=int(sys.argv[3])))")
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-c", program, str(source), str(out), str(workers)], check=True)
    wall = time.perf_counter() - start
    with contextlib.suppress(ChildProcessError):        # what it left behind is ours now, and its time counts too
        while os.wait():
            pass
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, index.read(out).samples


def measure_cutting(path: Path, size: int, mpp: float, rounds: int) -> dict:
    """The first phase on one slide: seconds a tile of every contender, round by round."""
    kept = cutting(path, size, mpp, True)()
    corners = [(tile.x, tile.y) for tile in kept]
    contenders = {"pass-through": cutting(path, size, mpp, True), "re-encoding": cutting(path, size, mpp, False),
                  "OpenSlide": plain(path, corners, size, simple),
                  "OpenSlide, Pillow": plain(path, corners, size, pillow)}
    repeat = max(1, round(400 / len(kept)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, work in contenders.items():
            spent = [seconds(work) for _ in range(repeat)]
            times[name].append(sum(cpu for cpu, _ in spent) / sum(made for _, made in spent))
    against = {name: statistics.median(base / own for base, own in zip(times["OpenSlide"], values, strict=True))
               for name, values in times.items()}
    return {"slide": path.name, "size": size, "tiles": len(kept),
            "untouched": sum(tile.encoding == tiles.SOURCE for tile in kept),
            "contenders": [{"name": name, "tiles_per_cpu_second": 1 / statistics.median(values), "ratio": against[name]}
                           for name, values in times.items()]}


def same_slide(shard: Path) -> float:
    """Pairs of one slide within batches in tar order, as a multiple of what chance gives."""
    codes = index.samples(shard)["slide"].combine_chunks().indices.to_numpy()
    batches = [codes[first:first + BATCH] for first in range(0, len(codes) - BATCH + 1, BATCH)]
    pairs = sum((count * (count - 1) / 2).sum() for count in (np.bincount(batch) for batch in batches))
    shares = np.bincount(codes) / len(codes)
    return float(pairs / (len(batches) * BATCH * (BATCH - 1) / 2 * (shares ** 2).sum()))


def checking(shard: Path) -> dict:
    """What `ssl-dist check` reads a second, against SHA-256 of the same bytes by as many threads' worth of one."""
    size = sum(path.stat().st_size for path in shard.glob("*.tar"))
    start = time.perf_counter()
    problems = check.check(shard)
    spent = time.perf_counter() - start
    assert not problems, problems
    start = time.perf_counter()
    for path in shard.glob("*.tar"):
        with path.open("rb") as handle:
            hashlib.file_digest(handle, "sha256")
    return {"megabytes": size / 1e6, "megabytes_per_second": size / 1e6 / spent,
            "sha256_of_one_core": size / 1e6 / (time.perf_counter() - start)}


def plot(found: dict, path: Path) -> None:
    """Bars of tiles per CPU-second, a group a slide."""
    figure, axes = plt.subplots(1, len(found["cutting"]), figsize=(5 * len(found["cutting"]), 3), squeeze=False)
    for axis, part in zip(axes[0], found["cutting"], strict=True):
        names = [row["name"] for row in part["contenders"]]
        axis.barh(names[::-1], [row["tiles_per_cpu_second"] for row in part["contenders"]][::-1], color="#2c6e9b")
        for place, row in enumerate(part["contenders"][::-1]):
            axis.annotate(f" x{row['ratio']:.1f}", (row["tiles_per_cpu_second"], place), va="center")
        axis.set_title(f"{part['slide']}, {part['size']} px", fontsize=9)
        axis.set_xlabel("tiles a CPU-second")
        axis.margins(x=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures, writes results/shard_*.json and its plot."""
    real = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("SSL_DIST_DATA", "../shared/data") + "/wsi_svs")
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    now, environment = datetime.now(UTC), run.environment()
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)     # PR_SET_CHILD_SUBREAPER: orphans of a job come to us, and are counted
    names = ("openslide-python", "openslide-bin", "simplejpeg", "pillow", "numpy")
    found: dict = {"date": f"{now:%Y-%m-%d}", "cpu": environment["cpu"], "cpus": environment["cpus"], "rounds": rounds,
                   "versions": {name: importlib.metadata.version(name) for name in names}}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as temporary:
        folder = Path(temporary) / "slides"
        folder.mkdir()
        painted = slides(folder)
        found["cutting"] = [measure_cutting(painted[0], 256, 0.5, rounds)]
        found["cutting"] += [measure_cutting(path, 240, 0.5, rounds) for path in sorted(real.glob("*.svs"))]
        jobs, walls = [], []
        for number in range(rounds):
            out = Path(temporary) / "out"
            wall_two, _, made = whole(folder, out, 2)
            wall_one, cpu, made = whole(folder, out, 1)
            walls.append(wall_one / wall_two)
            corners = [(tile.x, tile.y) for tile in cutting(painted[0], 256, 0.5, True)()]
            base, count = seconds(plain(painted[0], corners, 256, simple))
            jobs.append((base / count) / (cpu / made))
            sys.stderr.write(f"round {number}: whole job x{jobs[-1]:.1f}, two workers x{walls[-1]:.2f}\n")
        found["whole"] = {"tiles": made, "slides": PAINTED, "ratio": statistics.median(jobs),
                          "two_workers": statistics.median(walls)}
        found["same_slide_pairs"] = same_slide(out)
        found["check"] = checking(out)
    found["plot"] = f"shard_{now:%Y%m%dT%H%M%S}.png"
    plot(found, RESULTS / found["plot"])
    (RESULTS / found["plot"]).with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
