"""Hold a shard folder against its index: nothing missing, nothing cut short, nothing changed."""

import hashlib
import os
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from shards import index

Progress = Callable[[str, int, int], None]


def check(shard: Path, progress: Progress = lambda what, done, total: None) -> list[str]:
    """Everything that is wrong with the folder, a line each; an empty list is a sound folder."""
    found, table = index.read(shard), index.samples(shard)
    problems = []
    if table.num_rows != found.samples:
        problems.append(f"samples.arrow has {table.num_rows} rows, index.json counts {found.samples}")
    tars, offsets, sizes, sums = (table[name].to_numpy() for name in ("tar", "offset", "size", "crc32"))
    for number, tar in enumerate(found.tars):
        progress("checking tars", number, len(found.tars))
        rows = np.flatnonzero(tars == number)
        problems += [f"{tar.name}: {problem}" for problem in _tar(shard, tar, offsets[rows], sizes[rows], sums[rows])]
    progress("checking tars", len(found.tars), len(found.tars))
    return problems


def _tar(shard: Path, tar: index.Tar, offsets: np.ndarray, sizes: np.ndarray, sums: np.ndarray) -> list[str]:
    path = shard / tar.name
    if not path.is_file():
        return ["missing; restore it, or delete index.json and run the shard job again"]
    if (size := path.stat().st_size) != tar.bytes:
        return [f"{size} bytes, should be {tar.bytes}: it was cut short or replaced; restore it"]
    with path.open("rb") as handle:
        if hashlib.file_digest(handle, "sha256").hexdigest() == tar.sha256:
            return _members(path, tar)
        # The digest says that something changed; the checksums of the images say which.
        bad = [int(offset) for offset, size, crc32 in zip(offsets, sizes, sums, strict=True)
               if zlib.crc32(os.pread(handle.fileno(), size, offset)) != crc32]
    where = f"in {len(bad)} images, first at byte {bad[0]}" if bad else "outside the images"
    return [f"its bytes changed {where}; restore it"]


def _members(path: Path, tar: index.Tar) -> list[str]:
    samples: list[list[tuple[str, int, int, str]]] = []
    with tarfile.open(path) as archive:
        for member in archive:
            key, _, extension = member.name.partition(".")
            if not samples or samples[-1][0][3].partition(".")[0] != key:
                samples.append([])
            samples[-1].append((extension, member.offset_data, member.size, member.name))
    problems = []
    if len(samples) != tar.samples:
        problems.append(f"{len(samples)} samples, index.json counts {tar.samples}")
    listing = path.with_suffix(".idx")
    if not listing.is_file() or listing.read_text() != index.idx(samples):
        problems.append(f"{listing.name} is missing or does not belong to this tar; delete index.json and shard again")
    return problems
