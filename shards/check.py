"""Hold a shard folder against its index: nothing missing, nothing cut short, nothing changed."""

import hashlib
import os
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from shards import index

Progress = Callable[[str, int, int], None]


def check(shard: Path, progress: Progress = lambda what, done, total: None) -> list[str]:
    """Everything that is wrong with the folder, a line each; an empty list is a sound folder."""
    found, table = index.read(shard), index.samples(shard)
    problems = []
    if index.fingerprint(shard, found) != found.fingerprint:
        problems.append("index.json and samples.arrow do not fit the fingerprint: one of them changed since they were "
                        "written; restore both, or delete index.json and run the shard job again")
    try:
        table.validate(full=True)
    except pa.ArrowInvalid as error:
        return [*problems, f"samples.arrow is damaged ({error})"]
    if table.num_rows != found.samples:
        problems.append(f"samples.arrow has {table.num_rows} rows, index.json counts {found.samples}")
    tars = table["tar"].to_numpy()
    for number, tar in enumerate(found.tars):
        progress("checking tars", number, len(found.tars))
        rows = table.filter(pa.array(tars == number)).select(["key", "offset", "size", "crc32"])
        problems += [f"{tar.name}: {problem}" for problem in _tar(shard, tar, rows)]
    progress("checking tars", len(found.tars), len(found.tars))
    return problems


def _tar(shard: Path, tar: index.Tar, rows: pa.Table) -> list[str]:
    path = shard / tar.name
    if not path.is_file():
        return ["missing; restore it, or delete index.json and run the shard job again"]
    if (size := path.stat().st_size) != tar.bytes:
        return [f"{size} bytes, should be {tar.bytes}: it was cut short or replaced; restore it"]
    with path.open("rb") as handle:
        if hashlib.file_digest(handle, "sha256").hexdigest() == tar.sha256:
            return _members(path, tar, rows)
        # The digest says that something changed; the checksums of the images say which.
        bad = [row["key"] for row in rows.to_pylist()
               if not 0 <= row["offset"] <= row["offset"] + row["size"] <= size
               or zlib.crc32(os.pread(handle.fileno(), row["size"], row["offset"])) != row["crc32"]]
    where = f"in {len(bad)} images, first {bad[0]}" if bad else "outside the images"
    return [f"its bytes changed {where}; restore it"]


def _members(path: Path, tar: index.Tar, rows: pa.Table) -> list[str]:
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
    images = [(name.partition(".")[0], offset, size) for (_, offset, size, name), *_ in samples]
    if images != list(zip(*(rows[name].to_pylist() for name in ("key", "offset", "size")), strict=True)):
        problems.append("samples.arrow has other samples, or has them elsewhere; delete index.json and shard again")
    listing = path.with_suffix(".idx")
    if not listing.is_file() or listing.read_bytes() != index.idx(samples).encode():
        problems.append(f"{listing.name} is missing or does not belong to this tar; delete index.json and shard again")
    return problems
