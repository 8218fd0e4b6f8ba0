"""What the data path costs before a pixel is decoded: order, numbers, reading, memory, start; and what bad tiles cost.

    python benchmarks/stream.py [--millions 1 10 32.6 100] [--rounds N]

    order           which samples are next, of 32.6 million in 57 datasets: as they are, and evenly mixed
    up to decoding  order, random numbers of two views and reading with checksums, on real tiles: one thread
    catalogues      57 shard folders of very different sizes, opened by two ranks at once, in fresh processes. Their
                    tars are sparse files of zeros whose checksums are right: all that is read is checked, and no disk
                    is waited for
    faults          the loader with one tile in 10,000 bad, against the same tiles sound; every bad one must be listed
"""

import argparse
import faulthandler
import gc
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import zlib
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import measure
import numpy as np
import torch
from measure import CORES, Turn

from shards import index
from ssl_dist.config import Data
from ssl_dist.data import augment, mixture
from ssl_dist.data.batch import View, each
from ssl_dist.data.loader import Loader
from ssl_dist.data.quarantine import Quarantine
from ssl_dist.data.reader import Reader
from ssl_dist.data.stream import Stream

FOLDERS = 57
MILLIONS = (1, 10, 32.6, 100)
TAR_SAMPLES = 5000
BATCH, STEPS, WORLD = 1024, 200, 2
SIZES = np.arange(8, 40, 2) << 10               # bytes of the tiles of a catalogue
PITCH = 41 << 10                                # from one to the next in its tar
CRC = np.array([zlib.crc32(bytes(size)) for size in SIZES.tolist()], np.uint32)
ORGANS = ["bladder", "breast", "colon", "liver", "lung"]
ORDERS: dict[str, dict[str, list]] = {"natural": {}, "even": {}, "a fifth": {"organ": ["breast"]}}
VIEWS = each((View(count=2, stain=0.05),))
COPIES, BAD_IN, FAULT_BATCH = 6, 10_000, 250    # of PCam's 7,000 tiles; an epoch is whole batches
PATIENCE = 600                                  # seconds after which an epoch hangs


def sizes(samples: int) -> list[int]:
    """Samples of each dataset: the largest has a hundred thousand times as many as the smallest, as in the wild."""
    weights = np.exp(np.random.default_rng(0).normal(0, 2.5, FOLDERS))
    found = np.maximum((weights / weights.sum() * samples).astype(int), 100)
    found[found.argmax()] += samples - found.sum()
    return found.tolist()


def tars(samples: int) -> np.ndarray:
    """Samples of each tar of one dataset."""
    return np.diff(np.append(np.arange(0, samples, TAR_SAMPLES), samples))


# --- order, numbers, reading

def order(even: bool) -> measure.Batches:
    """Which samples are next: tars and members, a batch at a time."""
    counts = [tars(samples) for samples in sizes(32_600_000)]
    stream = Stream(np.concatenate(counts), seed=0, window=Data.window, batch=BATCH,
                    datasets=np.repeat(np.arange(FOLDERS), list(map(len, counts))),
                    shares=mixture.shares(np.array([each.sum() for each in counts]), None) if even else None)
    for step in itertools.count():
        stream.locate(stream.epoch(step), stream.positions(step))
        yield BATCH


def up_to_decoding(folders: list[Path], doing: str) -> measure.Batches:
    """Order, numbers and reading as the loader does them, or one of the three."""
    reader = Reader(folders)
    stream = Stream(reader.counts, seed=0, window=Data.window, batch=256)
    rows = reader.rows(*stream.locate(0, stream.positions(0)))
    try:
        for step in itertools.count():
            epoch, positions = stream.epoch(step), stream.positions(step)
            if doing in ("order", "all"):
                rows = reader.rows(*stream.locate(epoch, positions))
            if doing in ("reading", "all"):
                assert all(image is not None for image in reader.fetch(rows))
            if doing in ("numbers", "all"):
                for number, view in enumerate(VIEWS):
                    augment.numbers(view, augment.uniforms(0, epoch, number, int(positions[0]), len(positions)))
            yield len(positions)
    finally:
        reader.close()


def plain_loop(folders: list[Path]) -> measure.Batches:
    """The shortest loop that reads and checks the batch that `reading` reads."""
    reader = Reader(folders)
    stream = Stream(reader.counts, seed=0, window=Data.window, batch=256)
    rows = reader.rows(*stream.locate(0, stream.positions(0)))
    wanted, files = [], {}
    for row, size, crc32 in zip(rows.tolist(), *(reader.column(name, rows) for name in ("size", "crc32")), strict=True):
        _, path, offset = reader.place(row)
        files.setdefault(path, os.open(path, os.O_RDONLY) if path not in files else -1)
        wanted.append((files[path], size, offset, crc32))
    reader.close()
    try:
        while True:
            images = []
            for file, size, offset, crc32 in wanted:
                content = os.pread(file, size, offset)
                assert zlib.crc32(content) == crc32
                images.append(np.frombuffer(content, np.uint8))
            yield len(images)
    finally:
        for file in files.values():
            os.close(file)


# --- catalogues

def catalogue(folder: Path, samples: int) -> list[Path]:
    """57 shard folders of so many samples in all; their tars take no room on the disk."""
    folders = []
    for number, count in enumerate(sizes(samples)):
        folders.append(folder / f"d{number:02d}")
        folders[-1].mkdir()
        listed = []
        for tar, tiles in enumerate(tars(count).tolist()):
            listed.append(index.Tar(f"d{number:02d}-{tar:06d}.tar", tiles, (tiles + 1) * PITCH, ""))
            with (folders[-1] / listed[-1].name).open("wb") as file:
                file.truncate(listed[-1].bytes)
        _table(folders[-1], number, count)
        found = index.Index([{"name": f"d{number:02d}", "classes": []}], {}, "", listed)
        index.write(folders[-1], replace(found, fingerprint=index.fingerprint(folders[-1], found)))
    return folders


def _table(folder: Path, number: int, count: int) -> None:
    """samples.arrow, a million rows at a time."""
    rng, slides = np.random.default_rng(number), max(1, count // 1000)
    columns = index.Columns(folder / "columns", count)
    for start in range(0, count, 1_000_000):
        rows = np.arange(start, min(start + 1_000_000, count))
        kind, slide = rng.integers(0, len(SIZES), len(rows)), rng.integers(0, slides, len(rows))
        key = np.empty((len(rows), 12), np.uint8)
        key[:, :4] = np.frombuffer(f"d{number:02d}_".encode(), np.uint8)
        key[:, 4:] = rows[:, None] // 10 ** np.arange(7, -1, -1) % 10 + ord("0")
        columns.add({"key": key.view("S12")[:, 0], "tar": rows // TAR_SAMPLES,
                     "offset": rows % TAR_SAMPLES * PITCH + 512, "size": SIZES[kind], "crc32": CRC[kind],
                     "slide": slide, "patient": slide, "x": rows, "y": rows, "mpp": np.float32(0.5), "label": -1,
                     "organ": rng.integers(0, len(ORGANS), len(rows)), "digest": np.void(bytes(16)),
                     **dict.fromkeys(("dataset", "split", "stain", "encoding"), 0)})
    names = [f"S{slide:08d}" for slide in range(slides)]
    columns.write(folder, {"dataset": [f"d{number:02d}"], "slide": names, "patient": names, "split": [""],
                           "stain": ["H&E"], "organ": ORGANS, "encoding": ["source"]})
    del columns
    shutil.rmtree(folder / "columns")


def opened(folders: list[Path], wanted: str, steps: int) -> dict[str, Any]:
    """What two ranks of one machine need to begin, and hold after `steps` batches."""
    context = multiprocessing.get_context("spawn")
    pipes, ranks = [], []
    for rank in range(WORLD):
        ours, theirs = context.Pipe()
        pipes.append(ours)
        ranks.append(context.Process(target=_rank, args=(theirs, folders, wanted, steps, rank)))
        ranks[-1].start()
        theirs.close()
    found: list[dict[str, Any]] = [{} for _ in ranks]
    for _ in range(3):              # imported, walked, measured: each as soon as all are there
        for rank, pipe in enumerate(pipes):
            found[rank] |= pipe.recv()
        for pipe in pipes:
            pipe.send(None)
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    return {name: [rank[name] for rank in found] for name in found[0]}


def _rank(pipe: Connection, folders: list[Path], wanted: str, steps: int, rank: int) -> None:
    def together(**told: Any) -> None:
        pipe.send(told)
        pipe.recv()

    before = memory()
    together()
    started = time.perf_counter()
    reader = Reader(folders, only=ORDERS[wanted])
    shares = mixture.shares(reader.sizes, None) if wanted == "even" else None
    stream = Stream(reader.counts, seed=0, window=Data.window, batch=BATCH, datasets=reader.dataset_of, shares=shares)
    ready = time.perf_counter()
    for step in range(1 + steps):
        rows = reader.rows(*stream.locate(stream.epoch(step), stream.positions(step, rank, WORLD)))
        images = reader.fetch(rows)
        assert len(images) == BATCH // WORLD and all(image is not None for image in images)
        if not step:
            first = time.perf_counter()
    del images
    gc.collect()
    together(open_seconds=ready - started, first_seconds=first - started)
    after = memory()
    verified = time.perf_counter()
    if rank == 0 and steps:         # once for all ranks, as training does
        reader.verify()
    together(**{f"{name}_mb": (after[name] - before[name]) / 1e6 for name in after},
             verify_seconds=time.perf_counter() - verified)


def memory() -> dict[str, int]:
    """Bytes of this process: its own, of maps that nobody else has looked at, and of maps that others look at too."""
    kilobytes = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split()[:2]
        kilobytes[name.rstrip(":")] = int(value)
    # A clean private page is one of a file that only this rank touched: the kernel lets go of it when it needs room.
    return {"private": 1024 * kilobytes["Private_Dirty"], "mapped_alone": 1024 * kilobytes["Private_Clean"],
            "shared": 1024 * (kilobytes["Shared_Clean"] + kilobytes["Shared_Dirty"])}


def forget(folders: list[Path]) -> None:
    """Takes the catalogue out of the page cache."""
    for path in itertools.chain.from_iterable((folder / "index.json", folder / "samples.arrow") for folder in folders):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def measure_catalogue(folder: Path, samples: int) -> dict[str, Any]:
    """One catalogue in all orders; and begun from a cold page cache."""
    started = time.perf_counter()
    folders = catalogue(folder, samples)
    built = time.perf_counter() - started
    found: dict[str, Any] = {
        "samples": samples, "folders": FOLDERS, "tars": sum(len(tars(count)) for count in sizes(samples)),
        "largest": max(sizes(samples)), "smallest": min(sizes(samples)), "build_seconds": built,
        "table_bytes": sum((each / "samples.arrow").stat().st_size for each in folders),
        "orders": {wanted: opened(folders, wanted, STEPS) for wanted in ORDERS}}
    forget(folders)
    found["cold"] = opened(folders, "natural", 0)
    for wanted, one in found["orders"].items():
        sys.stderr.write(f"{samples:,} samples, {wanted}: first batch after {max(one['first_seconds']):.2f} s, "
                         f"{max(one['private_mb']):.0f} MB a rank\n")
    return found


# --- faults

def copies(folder: Path) -> list[Path]:
    """PCam's tiles several times over, as shard folders of different names."""
    first = measure.shard(source=measure.DATA / "pcam_subset_96px", out=folder / "pcam0", dataset="pcam0", kind="tiles",
                          mpp=1.0, tar_samples=500)
    made = [first]
    for number in range(1, COPIES):
        made.append(folder / f"pcam{number}")
        shutil.copytree(first, made[-1])
        found = index.read(first)
        found = replace(found, datasets=[{**found.datasets[0], "name": made[-1].name}])
        index.write(made[-1], replace(found, fingerprint=index.fingerprint(made[-1], found)))
    return made


def hurt(sound: list[Path], folder: Path) -> tuple[list[Path], set[str]]:
    """The same tiles, one in 10,000 of them bad, and the keys of those: by turns changed on disk, and no pictures."""
    folders, keys = [], set()
    per_folder = index.read(sound[0]).samples
    # Different members, for copies share their keys, and a key is listed once.
    members = np.random.default_rng(0).choice(per_folder, per_folder * len(sound) // BAD_IN, replace=False)
    bad = np.arange(len(members)) * len(sound) // len(members) * per_folder + members
    for number, source in enumerate(sound):
        folders.append(folder / source.name)
        shutil.copytree(source, folders[-1])
        columns = index.samples(source).to_pydict()
        for turn, row in enumerate(bad.tolist()):
            if row // per_folder != number:
                continue
            member = row % per_folder
            tar, offset, size = (columns[name][member] for name in ("tar", "offset", "size"))
            with (folders[-1] / index.read(source).tars[tar].name).open("r+b") as file:
                file.seek(offset)
                content = file.read(size)
                half = content[:size // 2]
                content = [half + bytes([content[size // 2] ^ 255]) + content[size // 2 + 1:],
                           (b"never a picture " * size)[:size], half][turn % 3]
                file.seek(offset)
                file.write(content)
            if turn % 3:            # the index knows no better: only the decoder finds it
                columns["size"][member], columns["crc32"][member] = len(content), zlib.crc32(content)
            keys.add(f"{columns['key'][member]} {source.name}")
        index.write_samples(folders[-1], columns)
    return folders, keys


def epoch(folders: list[Path], expected: set[str]) -> Turn:
    """Every tile once through the loader with its quarantine; all of the bad ones must be listed, and no other."""
    reader = Reader(folders, readers=Data.readers)
    stream = Stream(reader.counts, seed=0, window=Data.window, batch=FAULT_BATCH)
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quarantine.jsonl"
        loader = Loader(reader, stream, each((View(count=2, size=96),)), rank=0, world=1, device=torch.device("cpu"),
                        threads=CORES, ahead=Data.ahead, quarantine=Quarantine(path, 100))
        started, spent = time.perf_counter(), measure.cpu_seconds()
        tiles = sum(len(batch.rows) for batch in loader.batches(0, stream.steps_an_epoch))
        found = Turn(tiles, time.perf_counter() - started, measure.cpu_seconds() - spent)
        loader.close()
        listed = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    faulthandler.cancel_dump_traceback_later()
    assert {f"{line['key']} {Path(line['tar']).parent.name}" for line in listed} == expected, listed
    return found


def measure_faults(folder: Path, rounds: int) -> dict[str, Any]:
    """Epochs of sound and of damaged tiles by turns."""
    sound = copies(folder)
    damaged, keys = hurt(sound, folder / "damaged")
    turns: dict[str, list[Turn]] = {"sound": [], "damaged": [], "sound again": []}
    for number in range(rounds):
        for name, (folders, expected) in {"sound": (sound, set()), "damaged": (damaged, keys),
                                          "sound again": (sound, set())}.items():
            turns[name].append(epoch(folders, expected))
            sys.stderr.write(f"round {number + 1} of {rounds}: {name}: {turns[name][-1].rate:,.0f}/s\n")
    return {"tiles": turns["sound"][0].tiles, "bad": len(keys), "listed": len(keys),
            "contenders": measure.summary(turns, "sound")}


# --- the run

def plot(found: dict[str, Any]) -> Any:
    """Rates of one core, the start, memory of a rank, and what faults cost."""
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.2), layout="constrained", width_ratios=(1.4, 1, 1, 1))
    rows = [*found["order"], *found["up_to_decoding"]][::-1]
    axes[0].barh([row["name"] for row in rows], [row["images_per_cpu_second"] for row in rows], color="#7a4f8a")
    axes[0].set_xscale("log")
    axes[0].set_xlabel("samples a second of one core")
    samples = [one["samples"] for one in found["catalogues"]]
    for wanted, mark in zip(ORDERS, "osv", strict=True):
        for axis, name in ((axes[1], "first_seconds"), (axes[2], "private_mb")):
            axis.plot(samples, [max(one["orders"][wanted][name]) for one in found["catalogues"]], f"{mark}-",
                      label=wanted)
    axes[1].plot(samples, [max(one["cold"]["first_seconds"]) for one in found["catalogues"]], ":", color="grey",
                 label="natural, cold")
    axes[1].set_ylabel("seconds to the first batch")
    axes[2].set_ylabel("private MB a rank")
    for axis in axes[1:3]:
        axis.set_xscale("log")
        axis.set_xlabel("samples in the catalogue")
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False, fontsize=8)
    contenders = found["faults"]["contenders"]
    axes[3].bar([row["name"].replace(" ", "\n") for row in contenders],
                [row["images_per_second"] for row in contenders], color="#7a4f8a")
    axes[3].tick_params(axis="x", labelsize=8)
    axes[3].set_ylabel("tiles a second")
    axes[3].set_title(f"{found['faults']['bad']} of {found['faults']['tiles']:,} bad", fontsize=9)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Measures, appends the result and its plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--millions", type=float, nargs="+", default=MILLIONS, help="of samples in the catalogues")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, default=measure.RESULTS, help="folder to write to")
    told = parser.parse_args()
    found = measure.machine()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tiles = measure.shards("monuseg", folder / "tiles")
        ordering = {"order, natural": partial(order, False), "order, 57 datasets evenly": partial(order, True)}
        doing = {"order of these tiles": "order", "numbers of two views": "numbers", "reading": "reading",
                 "all three": "all"}
        before_decoding = {name: partial(up_to_decoding, tiles, what) for name, what in doing.items()}
        before_decoding["pread and crc32, plain loop"] = partial(plain_loop, tiles)
        _, encoded = measure.everything(tiles)
        found |= {"rounds": told.rounds, "tiles": len(encoded), "tile": measure.described("monuseg", encoded),
                  "order": measure.summary(measure.interleave(ordering, told.rounds, 1), "order, natural"),
                  "up_to_decoding": measure.summary(measure.interleave(before_decoding, told.rounds, 1),
                                                    "pread and crc32, plain loop")}
        (folder / "faults").mkdir()
        found["faults"] = measure_faults(folder / "faults", told.rounds)
        found["catalogues"] = []
        for millions in told.millions:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                found["catalogues"].append(measure_catalogue(Path(place), round(1e6 * millions)))
    sys.stderr.write(f"{measure.keep(found, 'stream', plot, told.results)}\n")


if __name__ == "__main__":
    main()
