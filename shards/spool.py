"""The tiles of one unit of work between the two phases: bytes and fixed rows on disk, sorted by their place.

A unit is whole or absent: its .json comes last. Rows are sorted in runs of bounded size, so that any range of places (a
tar) is one contiguous piece of each run, however large the slide.
"""

import contextlib
import hashlib
import json
import os
import socket
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from shards import folder, judge
from shards.index import ShardError
from shards.tiles import Rejected, Tile

ROWS_AT_ONCE = 1 << 20      # rows sorted in memory at a time: some hundred megabytes
RUN_BYTES = 256 << 20       # tiles held in memory before they are written as one sorted run

ROW = np.dtype([
    ("order", "<u8"), ("key", "S80"), ("start", "<i8"), ("size", "<i4"), ("about", "<i4"), ("crc32", "<u4"),
    ("about_crc32", "<u4"),
    ("x", "<i4"), ("y", "<i4"), ("mpp", "<f4"), ("who", "<i4"), ("label", "<i4"), ("encoding", "<i4"),
    ("digest", "V16"),
])
PLACED = np.dtype([*ROW.descr, ("unit", "<i4")])
LOOKS = (("focus", judge.FOCUS_EDGES), ("density", judge.DENSITY_EDGES), ("hue", judge.HUE_EDGES))


def path(work: Path, number: int, suffix: str) -> Path:
    """A file of a unit."""
    return work / f"unit-{number:06d}.{suffix}"


def done(work: Path, number: int) -> bool:
    """Whether a unit is whole."""
    return path(work, number, "json").exists()


class Numbers:
    """Words that repeat, numbered in the order of their first use."""

    def __init__(self) -> None:
        self.numbers: dict[Any, int] = {}

    def __call__(self, word: Any) -> int:
        return self.numbers.setdefault(word, len(self.numbers))


class Writer:
    """Writes one unit."""

    def __init__(self, work: Path, number: int, *, cut: bool, memory_gb: float = 8.0):
        """`cut`: one slide, of which the tiles are cut; else many files. A quarter of the memory is for tiles."""
        self.work, self.number, self.cut = work, number, cut
        self.run_bytes = min(RUN_BYTES, int(memory_gb * (1 << 30) / 4))
        self.draft = path(work, number, f"{socket.gethostname()}-{os.getpid()}.draft")
        self.handle = self.draft.open("wb")
        self.rows: list[tuple] = []
        self.images: list[bytes] = []
        self.held = self.written = 0
        self.runs: list[np.ndarray] = []
        self.whos, self.labels, self.encodings = Numbers(), Numbers(), Numbers()
        self.slides: dict[tuple, dict[str, Any]] = {}
        self.rejected: list[Rejected] = []

    def add(self, tile: Tile, order: int, about: bytes) -> None:
        """One accepted tile, and the JSON that goes with it."""
        source = tile.source
        who = (source.slide, source.patient, source.site, source.split, source.filename)
        self.rows.append((order, tile.key.encode(), 0, len(tile.image), len(about), zlib.crc32(tile.image),
                          zlib.crc32(about), tile.x, tile.y, round(tile.mpp, 6), self.whos(who),
                          self.labels(tile.label), self.encodings(tile.encoding), tile.digest))
        self.images.append(tile.image + about)
        self._slide(source)["looks"].append(tile.looks)
        self.held += len(tile.image) + len(about)
        if self.held > self.run_bytes:
            self._flush()

    def reject(self, item: Rejected) -> None:
        """One tile or slide left out."""
        self.rejected.append(item)
        counts = self._slide(item.source)["rejected"]
        counts[item.reason] = counts.get(item.reason, 0) + 1

    def _slide(self, source: Any) -> dict[str, Any]:
        # Tiles that are files of their own are summed up by their slide.
        who = (source.slide, source.patient, source.site, source.split, source.filename if self.cut else "")
        return self.slides.setdefault(who, {"rejected": {}, "looks": []})

    def _flush(self) -> None:
        run = np.array(self.rows, dtype=ROW)
        places = np.argsort(run["order"], kind="stable")
        run = run[places]
        sizes = run["size"].astype(np.int64) + run["about"]
        run["start"] = self.written + np.cumsum(sizes) - sizes
        self.handle.writelines(self.images[place] for place in places.tolist())
        self.written += self.held
        self.runs.append(run)
        self.rows, self.images, self.held = [], [], 0

    def close(self, mpp: float | None = None) -> None:
        """Publishes the unit; `mpp` is that of its slide's level 0."""
        self._flush()
        self.handle.flush()
        os.fsync(self.handle.fileno())
        self.handle.close()
        folder.publish(self.draft, path(self.work, self.number, "tiles"))
        rows = np.concatenate(self.runs).tobytes()
        folder.write(path(self.work, self.number, "rows"), rows)
        folder.write(path(self.work, self.number, "rejected"), lines(self.rejected))
        folder.write(path(self.work, self.number, "slides"), "".join(self._about(mpp)))
        counts: dict[str, int] = {}
        for item in self.rejected:
            counts[item.reason] = counts.get(item.reason, 0) + 1
        folder.write(path(self.work, self.number, "json"), json.dumps({
            "whos": list(self.whos.numbers), "labels": list(self.labels.numbers),
            "encodings": list(self.encodings.numbers), "runs": [len(run) for run in self.runs], "bytes": self.written,
            "rejected": counts, "sha256": hashlib.sha256(rows).hexdigest()}))

    def _about(self, mpp: float | None) -> Iterable[str]:
        looks = [known["looks"] for known in self.slides.values()]
        whose = np.repeat(np.arange(len(looks)), [len(some) for some in looks])
        values = np.array([each for some in looks for each in some]).reshape(-1, len(LOOKS))
        counts = [judge.histograms(values[:, column], whose, len(looks), edges)
                  for column, (_, edges) in enumerate(LOOKS)]
        for place, ((slide, patient, site, split, file), known) in enumerate(self.slides.items()):
            yield json.dumps({
                "slide": slide, "patient": patient, "site": site, "split": split, "file": file,
                "mpp": None if mpp is None or np.isnan(mpp) else round(mpp, 6), "kept": len(known["looks"]),
                "rejected": known["rejected"],
                **{name: count[place].tolist() for (name, _), count in zip(LOOKS, counts, strict=True)},
            }) + "\n"

    def discard(self) -> None:
        """Leaves nothing."""
        with contextlib.suppress(OSError):      # what a full disk did not take; why is known already
            self.handle.close()
        self.draft.unlink(missing_ok=True)


def lines(rejected: Iterable[Rejected]) -> str:
    """Lines of rejected.jsonl."""
    heads: dict[tuple[str, str], str] = {}
    written = []
    for item in rejected:       # written by hand where it repeats: a slide has tens of thousands of empty tiles
        who = (item.source.slide, item.source.filename)
        if who not in heads:
            heads[who] = f'{{"slide": {json.dumps(who[0])}, "file": {json.dumps(who[1])}, '
        mpp = "null" if item.mpp is None or np.isnan(item.mpp) else f"{item.mpp:.6g}"
        written.append(f'{heads[who]}"x": {json.dumps(item.x)}, "y": {json.dumps(item.y)}, "mpp": {mpp}, '
                       f'"reason": {json.dumps(item.reason)}, "detail": {json.dumps(item.detail)}}}\n')
    return "".join(written)


class Unit:
    """A whole unit, opened: its rows are mapped, not read."""

    def __init__(self, work: Path, number: int):
        self.work, self.number = work, number
        known = json.loads(path(work, number, "json").read_text())
        self.labels: list[str] = known["labels"]
        self.encodings: list[str] = known["encodings"]
        self.rejected: dict[str, int] = known["rejected"]
        self.bytes: int = known["bytes"]
        self.bounds = np.cumsum([0, *known["runs"]])
        file = path(work, number, "rows")
        with file.open("rb") as handle:
            if hashlib.file_digest(handle, "sha256").hexdigest() != known["sha256"]:
                raise ShardError(f"{file} changed on disk; delete {work}/unit-{number:06d}.json and call again to cut "
                                 "it anew")
        self.rows: np.ndarray = np.memmap(file, ROW, "r") if file.stat().st_size else np.empty(0, ROW)

    def whos(self) -> list[tuple[str, str, str, str, str]]:
        """Slide, patient, site, split and file of its rows; read when asked for: of a million files they are many."""
        return [tuple(who) for who in json.loads(path(self.work, self.number, "json").read_text())["whos"]]

    def between(self, low: int, high: int) -> np.ndarray:
        """Numbers of the rows whose place is in [low, high)."""
        pieces = []
        for first, last in zip(self.bounds[:-1].tolist(), self.bounds[1:].tolist(), strict=True):
            places = self.rows["order"][first:last]
            start, stop = (first + int(np.searchsorted(places, np.uint64(edge))) if edge < 2**64 else last
                           for edge in (low, high))
            pieces.append(np.arange(start, stop))
        return np.concatenate(pieces)


def placed(chosen: dict[int, np.ndarray], opened: dict[int, Unit]) -> tuple[np.ndarray, np.ndarray]:
    """The chosen rows of all units with the number of their unit, and where in it each stands."""
    rows = np.empty(sum(map(len, chosen.values())), PLACED)
    places = np.concatenate([np.empty(0, np.int64), *chosen.values()])
    end = 0
    for number, picked in chosen.items():
        piece = rows[end:end + len(picked)]
        for name in ROW.names or ():
            piece[name] = opened[number].rows[name][picked]
        piece["unit"] = number
        end += len(picked)
    return rows, places
