"""One tar and its idx: from the spool whole or absent, and not written twice."""

import contextlib
import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np

from shards import folder, index, spool
from shards.index import ShardError

BYTES_AT_ONCE = 128 << 20       # tiles that a process holds while it writes
Member = tuple[str, int, int, str]      # extension, offset of the data, size, name: as index.idx wants them
END = bytes(2 * tarfile.BLOCKSIZE)


def write(path: Path, work: Path, rows: np.ndarray) -> tuple[index.Tar, np.ndarray]:
    """One tar and its idx, whole or absent; returns what index.json says of it and where its images start."""
    note, told = work / f"{path.stem}.done", hashlib.sha256(rows.tobytes()).hexdigest()
    if (old := _written(path, note, told)) is not None:
        return old
    with folder.storage(path):
        draft = path.with_name(f".{path.name}.tmp")
        with draft.open("wb") as out:
            digest, members = store(out, "jpg", ((row["key"].decode(), image, about)
                                                 for row, image, about in _images(work, rows)))
            out.flush()
            os.fsync(out.fileno())
            size = out.tell()
        offsets = np.array([sample[0][1] for sample in members], np.int64)
        folder.publish(draft, path)
        folder.write(path.with_suffix(".idx"), index.idx(members))
        tar = index.Tar(path.name, len(rows), size, digest)
        folder.write(note, json.dumps({"told": told, "tar": asdict(tar), "offsets": offsets.tolist()}))
    return tar, offsets


def store(out: BinaryIO, kind: str, samples: Iterable[tuple[str, bytes, bytes]]) -> tuple[str, list[list[Member]]]:
    """Writes a tar of samples (key, content, JSON), whose contents are of one kind: its SHA-256, and where each member
    lies."""
    digest, members, end = hashlib.sha256(), [], 0
    for name, content, about in samples:
        # JSON after the content: webdataset and DALI group neighbours of one name into one sample.
        first, second = _member(f"{name}.{kind}", content), _member(f"{name}.json", about)
        for part in (first, second):
            out.write(part)
            digest.update(part)
        members.append([(kind, end + tarfile.BLOCKSIZE, len(content), f"{name}.{kind}"),
                        ("json", end + len(first) + tarfile.BLOCKSIZE, len(about), f"{name}.json")])
        end += len(first) + len(second)
    out.write(END)
    digest.update(END)
    return digest.hexdigest(), members


def _written(path: Path, note: Path, told: str) -> tuple[index.Tar, np.ndarray] | None:
    """What an earlier call wrote, if it was told the same and it is still there."""
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(note.read_text())
        if (known["told"] == told and path.stat().st_size == known["tar"]["bytes"]
                and path.with_suffix(".idx").is_file()):
            return index.Tar(**known["tar"]), np.array(known["offsets"], np.int64)
    return None


def _images(work: Path, rows: np.ndarray) -> Iterator[tuple[np.void, bytes, bytes]]:
    """Rows with their images and JSON, read in pieces that are contiguous in the spool of each unit."""
    ends = np.cumsum(rows["size"], dtype=np.int64)
    first = 0
    while first < len(rows):
        base = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, base + BYTES_AT_ONCE)))
        for row, (image, about) in zip(rows[first:last], _read(work, rows[first:last]), strict=True):
            if row["label"] != index.NO_LABEL:
                about = about.removesuffix(b"null}") + b"%d}" % row["label"]
            yield row, image, about
        first = last


def _read(work: Path, rows: np.ndarray) -> list[tuple[bytes, bytes]]:
    found: list[tuple[bytes, bytes]] = [(b"", b"")] * len(rows)
    places = np.lexsort((rows["start"], rows["unit"]))
    starts, units, sizes = rows["start"][places], rows["unit"][places], rows["size"][places].astype(np.int64)
    ends = starts + sizes + rows["about"][places]
    breaks = np.flatnonzero((units[1:] != units[:-1]) | (starts[1:] != ends[:-1])) + 1
    bounds = [0, *breaks.tolist(), len(rows)]
    with contextlib.ExitStack() as last:
        for low, high in zip(bounds[:-1], bounds[1:], strict=True):
            if low == 0 or units[low] != units[low - 1]:
                last.close()
                spooled = last.enter_context(spool.path(work, int(units[low]), "tiles").open("rb", buffering=0))
            begin = int(starts[low])
            content = os.pread(spooled.fileno(), int(ends[high - 1]) - begin, begin)
            for at in range(low, high):
                start, row = int(starts[at]) - begin, int(places[at])
                image = content[start:start + int(sizes[at])]
                about = content[start + int(sizes[at]):int(ends[at]) - begin]
                if zlib.crc32(image) != rows["crc32"][row] or zlib.crc32(about) != rows["about_crc32"][row]:
                    raise ShardError(f"{spool.path(work, int(units[at]), 'tiles')} changed on disk; delete "
                                     f"{spool.path(work, int(units[at]), 'json')} and call again to cut it anew")
                found[row] = image, about
    return found


# A USTAR header of which name, size and checksum are still to be said; owner, group and time stay 0.
_HEADER = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
_SUM = sum(_HEADER[:148]) + sum(_HEADER[156:])


def _member(name: str, data: bytes) -> bytes:
    """Header, content and padding: what tarfile writes, without its checks."""
    said, size = name.encode(), b"%011o" % len(data)
    total = _SUM + 256 + sum(said) + sum(size) - 11 * ord("0")
    return b"".join((said, _HEADER[len(said):124], size, _HEADER[135:148], b"%06o\0 " % total, _HEADER[156:], data,
                     bytes(-len(data) % tarfile.BLOCKSIZE)))
