"""`ssl-dist bench`: tiles a second along the data path on your own shards and machine, part by part."""

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ssl_dist import run
from ssl_dist.config import Data
from ssl_dist.data import augment, opencv, sweep
from ssl_dist.data.batch import View, each
from ssl_dist.data.decode import Decoder, Pictures
from ssl_dist.data.loader import Loader
from ssl_dist.data.presets import PRESETS
from ssl_dist.data.reader import Reader
from ssl_dist.data.stream import Stream
from ssl_dist.schema import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

COLD = 0.7                  # the first reading of a file that is in memory is hardly slower than the second

Batches = Iterator[int]     # endless; each item is how many tiles were done


@dataclass(frozen=True)
class Part:
    """Tiles a second of one part of the path, twice from the same tile on, and of one core in the second turn."""

    name: str
    threads: int
    first: float
    second: float
    core: float


@dataclass(frozen=True)
class Figures:
    """What was measured, and on what."""

    folders: list[str]
    tiles: int
    bytes_a_tile: int
    preset: str
    views: list[int]        # pixels of each view of a tile
    batch: int
    device: str
    machine: dict[str, Any]
    parts: list[Part]

    @property
    def cached(self) -> bool:
        """Whether the files were in memory from the start."""
        reading = self.part("reading")
        return reading.first > COLD * reading.second

    @property
    def step_seconds(self) -> float:
        """What a step may take and never wait for its tiles, once the files are in memory."""
        return self.batch / self.parts[-1].second

    def part(self, name: str) -> Part:
        """One part by its name."""
        return next(part for part in self.parts if part.name == name)

    def sentences(self) -> list[str]:
        """What the table means."""
        reading = self.part("reading")
        megabytes = reading.first * self.bytes_a_tile / 1e6
        return [
            "The files were in memory: nothing here waited for a disk." if self.cached else
            f"The files were not in memory: the disk gave {reading.first:,.0f} tiles a second ({megabytes:,.0f} MB/s). "
            "Where that is below the whole path, tiles that do not fit into memory wait for the disk.",
            f"A step of {self.batch} tiles ({self.batch * len(self.views)} views) on one GPU may take "
            f"{self.step_seconds:.3g} s: if the GPU is faster, this data path is what it waits for."]


def measure(folders: Sequence[Path], preset: str, *, batch: int, seconds: float, threads: int, device: torch.device,
            progress: Callable[[str, int, int], None] = lambda what, done, total: None) -> Figures:
    """All parts, one after the other, each twice for so many `seconds`; views as one of the presets has them."""
    views = each(PRESETS[preset].views)
    reader = Reader(folders, readers=Data.readers)
    if (tiles := int(reader.counts.sum())) < batch:
        raise ConfigError([f"--batch {batch} is more than the {tiles} tiles of {', '.join(map(str, folders))}"])
    stream = Stream(reader.counts, seed=0, window=Data.window, batch=batch)
    way, parts = "cpu", list[Part]()

    def part(name: str, used: int, batches: Callable[[], Batches]) -> None:
        progress("parts", len(parts), 5)
        parts.append(_twice(name, used, batches, seconds))

    try:
        part("order", 1, lambda: _order(stream))
        part("reading", Data.readers, lambda: _reading(reader, stream))     # before all else that reads these tiles
        encoded = reader.read(reader.rows(*stream.locate(0, stream.positions(0))))
        opencv.one_thread()
        part("decoding", threads, lambda: _decoding(encoded, batch, threads))
        part("views", threads, lambda: _views(encoded, views, batch, threads))
        if device.type == "cuda":
            way = sweep.on_gpu(encoded, threads, device.index or 0)
        name = "whole path" if device.type == "cpu" else f"whole path, GPU, decode {way}"
        part(name, threads, lambda: _whole(folders, stream, views, threads, device, way))
    finally:
        reader.close()
    progress("parts", 5, 5)
    seen = run.environment()
    return Figures([str(folder) for folder in folders], tiles, round(sum(map(len, encoded)) / batch), preset,
                   [view.size for view in views], batch, str(device),
                   {name: seen[name] for name in ("cpu", "cpus", "gpus", "packages")}, parts)


def _twice(name: str, threads: int, batches: Callable[[], Batches], seconds: float) -> Part:
    (first, _), (second, core) = _turn(batches(), seconds), _turn(batches(), seconds)
    return Part(name, threads, first, second, core)


def _turn(batches: Batches, seconds: float) -> tuple[float, float]:
    """Tiles a second, and a CPU-second, after a first batch that waits for threads to start."""
    next(batches)
    tiles, start, spent = 0, time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - start) < seconds or not tiles:
        tiles += next(batches)
    spent = time.process_time() - spent
    batches.close()         # type: ignore[attr-defined]
    # A clock of the processor's time may stand still over a batch of microseconds.
    return tiles / elapsed, tiles / max(spent, 1e-6)


def _order(stream: Stream) -> Batches:
    """Which tiles are next."""
    for step in itertools.count():
        stream.locate(stream.epoch(step), stream.positions(step))
        yield stream.batch


def _reading(reader: Reader, stream: Stream) -> Batches:
    """Their bytes, held against the index."""
    for step in itertools.count():
        reader.read(reader.rows(*stream.locate(stream.epoch(step), stream.positions(step))))
        yield stream.batch


def _decoding(encoded: list[np.ndarray], batch: int, threads: int) -> Batches:
    """Bytes in memory to pixels."""
    decoder = Decoder(batch, threads)

    def decode(pictures: Pictures, place: int) -> None:
        pictures(place)

    with ThreadPoolExecutor(threads) as pool:
        while True:
            opencv.spread(pool, partial(decode, decoder.open(encoded)), range(batch))
            yield batch


def _views(encoded: list[np.ndarray], views: tuple[View, ...], batch: int, threads: int) -> Batches:
    """Pixels and numbers in memory to views."""
    pictures = Decoder(batch, threads).open(encoded)
    images = [pictures(place) for place in range(batch)]
    numbers = [augment.numbers(view, augment.uniforms(0, 0, number, 0, batch)) for number, view in enumerate(views)]
    with ThreadPoolExecutor(threads) as pool:
        while True:
            opencv.views(images.__getitem__, numbers, [view.size for view in views], pool)
            yield batch


def _whole(folders: Sequence[Path], stream: Stream, views: tuple[View, ...], threads: int, device: torch.device,
           way: str) -> Batches:
    """The loader, as training uses it."""
    loader = Loader(Reader(folders, readers=Data.readers), stream, views, rank=0, world=1, device=device,
                    threads=threads, ahead=Data.ahead, way=way)
    try:
        for made in loader.batches(0, 10**9):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            yield len(made.rows)
    finally:
        loader.close()


def as_json(figures: Figures) -> str:
    """The figures for a program."""
    return json.dumps({**asdict(figures), "cached": figures.cached, "step_seconds": figures.step_seconds}, indent=2)


def table(figures: Figures) -> "Table":
    """The figures for a terminal, as a rich renderable."""
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("tiles a second", "threads", "first time", "again", "of one core"):
        drawn.add_column(column, header_style="dim", justify="left" if column == "tiles a second" else "right")
    for part in figures.parts:
        drawn.add_row(part.name, str(part.threads), *(f"{rate:,.0f}" for rate in (part.first, part.second, part.core)))
    return drawn
