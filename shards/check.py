"""Hold a shard folder against its index: nothing missing, cut short or changed; and mend what the tars can tell.

Tars are read by threads, a piece at a time: hashing and reading leave Python free, so the disk or SHA-256 sets the
speed. Memory holds the list of one tar's members a thread, and eight bytes a sample.
"""

import collections
import concurrent.futures
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from PIL import Image

from shards import draws, folder, index
from shards.index import ShardError
from shards.tar import Member

Progress = Callable[[str, int, int], None]
T = TypeVar("T")
Sample = list[Member]                   # its image first

BLOCK = 512                             # bytes: the unit of a tar
NAME = re.compile(rb"([a-z0-9_-]{1,80})\.([a-z0-9]+(?:\.[a-z0-9]+)*)")
EXTRAS = ("instances.png", "types.png")
# What the members of one sample may be, in their order.
KINDS = {(draws.KIND, "json"), *((image, "json", *extras) for image in ("jpg", "png")
                                 for extras in ((), *((extra,) for extra in EXTRAS), *itertools.permutations(EXTRAS)))}
HEADERS_AT_ONCE = 4096                  # headers whose checksums are taken together
TILES_AT_ONCE = 256                     # tiles that a process decodes before it reports
# Columns of words, of which the table holds codes.
CODED = [field.name for field in index.SCHEMA if pa.types.is_dictionary(field.type)]
DRAFTS = re.compile(r"\.work|\.mend|\..+\.tmp")        # what a job leaves that was killed
NAMED = 20                              # how many keys are named before the rest is counted

AGAIN = "delete index.json and run the shard job again"
# What can be mended, and by which of the functions below.
IDX, TABLE, DRAFT = "idx", "table", "draft"


@dataclass(frozen=True)
class Problem:
    """One line: what is wrong with which file and what to do; and whether `mend` can do it."""

    name: str               # of the file
    said: str
    mends: str = ""         # IDX, TABLE, DRAFT, or nothing
    damaged: bool = False   # a tar whose samples are not what was written

    def __str__(self) -> str:
        return f"{self.name}: {self.said}"


def check(shard: Path, progress: Progress = lambda what, done, total: None, decode: bool = False,
          workers: int = 0) -> list[str]:
    """Everything that is wrong with the folder, a line each; an empty list is a sound folder. Only reads.

    `decode` also decodes every tile, in processes. `workers` are threads and processes; 0: one a core.
    """
    return [str(problem) for problem in _examine(shard, index.read(shard), progress, decode, workers)]


def mend(shard: Path, progress: Progress = lambda what, done, total: None, decode: bool = False,
         workers: int = 0) -> tuple[list[str], list[str]]:
    """Checks the folder and mends what can be mended: a line for each thing done, and for each problem that is left.

    Rebuilds every .idx and samples.arrow from tars whose digest holds, and removes what killed jobs left.
    """
    found = index.read(shard)       # before the lock, which would make a folder of a mistyped name
    done: list[str] = []
    with folder.hold(shard, ".lock"), folder.storage(shard):
        problems = _examine(shard, found, progress, decode, workers)
        left = [problem for problem in problems if not problem.mends]
        for problem in problems:
            if problem.mends == DRAFT:
                _remove(shard / problem.name)
                done.append(f"{problem.name}: removed")
            elif problem.mends == IDX:
                with _opened(shard / problem.name) as handle:
                    samples, _ = _samples(handle.fileno(), os.fstat(handle.fileno()).st_size)
                folder.write((shard / problem.name).with_suffix(".idx"), index.idx(samples))
                done.append(f"{problem.name}: its idx is written anew")
        if any(problem.mends == TABLE for problem in problems):
            try:
                _mend_table(shard, found, any(problem.damaged for problem in problems), progress, workers)
                done.append("samples.arrow: rebuilt from the tars; it fits the fingerprint")
            except ShardError as error:
                left += [Problem("samples.arrow", str(error)), *(problem for problem in problems
                                                                 if problem.mends == TABLE)]
    return done, [str(problem) for problem in left]


def _examine(shard: Path, found: index.Index, progress: Progress, decode: bool, workers: int) -> list[Problem]:
    table, problems = _table(shard, found)
    problems += _others(shard, found)
    rows = _rows(table, len(found.tars))
    keys: list[np.ndarray] = []
    workers = workers or len(os.sched_getaffinity(0))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            jobs = [pool.submit(_tar, shard, tar, rows, number) for number, tar in enumerate(found.tars)]
            for number, job in enumerate(jobs):
                progress("checking tars", number, len(jobs))
                told, hashes = job.result()
                problems += told
                keys.append(hashes)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    progress("checking tars", len(jobs), len(jobs))
    problems += _twins(shard, found, keys)
    if decode:
        problems += _decode(shard, found, progress, workers)
    return problems


# --- the table and what lies beside the tars


def _table(shard: Path, found: index.Index) -> tuple[pa.Table | None, list[Problem]]:
    """The sample table, or None where it cannot be used."""
    rebuild = "; `ssl-dist check --mend` rebuilds it from the tars"
    try:
        table = index.samples(shard)
        table.validate(full=True)
    except ShardError as error:
        return None, [Problem("samples.arrow", f"{error}{rebuild}", TABLE)]
    except pa.ArrowException as error:
        return None, [Problem("samples.arrow", f"it is damaged ({error}){rebuild}", TABLE)]
    problems = []
    if index.fingerprint(shard, found) != found.fingerprint:
        problems.append(Problem("samples.arrow", "it and index.json do not fit the fingerprint: one of them changed "
                                f"since they were written; restore both, or {AGAIN}; `ssl-dist check --mend` rebuilds "
                                "samples.arrow from the tars, or says that it was index.json", TABLE))
    if table.num_rows != found.samples:
        problems.append(Problem("samples.arrow", f"it has {table.num_rows} rows, index.json counts {found.samples}"
                                                 f"{rebuild}", TABLE))
    return table, problems


def _rows(table: pa.Table | None, tars: int) -> Callable[[int], pa.Table | None]:
    """The rows of one tar; those of a sound table lie together."""
    if table is None:
        return lambda number: None
    columns = table.select(["key", "offset", "size", "crc32"])
    numbers = table["tar"].to_numpy()
    order = None if (numbers[1:] >= numbers[:-1]).all() else np.argsort(numbers, kind="stable")
    bounds = np.searchsorted(numbers if order is None else numbers[order], np.arange(tars + 1))

    def rows(number: int) -> pa.Table:
        first, last = int(bounds[number]), int(bounds[number + 1])
        return columns.slice(first, last - first) if order is None else columns.take(pa.array(order[first:last]))

    return rows


def _others(shard: Path, found: index.Index) -> list[Problem]:
    """What else the index promises, and what it does not know."""
    problems = []
    for name, digest in found.files.items():
        path = shard / name
        if path.parent != shard or not path.is_file():
            problems.append(Problem(name, f"missing; restore it, or {AGAIN}"))
            continue
        with path.open("rb") as handle:
            if hashlib.file_digest(handle, "sha256").hexdigest() != digest:
                problems.append(Problem(name, f"it changed since it was written; restore it, or {AGAIN}"))
    tars = {tar.name for tar in found.tars}
    for path in sorted(shard.iterdir()):
        if DRAFTS.fullmatch(path.name):
            problems.append(Problem(path.name, "left by a job that was killed, or still at work; `ssl-dist check "
                                               "--mend` removes it", DRAFT))
        elif path.suffix in (".tar", ".idx") and path.with_suffix(".tar").name not in tars:
            problems.append(Problem(path.name, f"not in index.json, but whoever reads *{path.suffix} reads it too; "
                                               "move it elsewhere, or delete it"))
    return problems


def _remove(draft: Path) -> None:
    if draft.is_dir() and not draft.is_symlink():
        (draft / "settings.json").unlink(missing_ok=True)       # first: what a kill leaves of the rest is nobody's
        shutil.rmtree(draft)
    else:
        draft.unlink(missing_ok=True)


# --- one tar


@contextmanager
def _opened(path: Path) -> Iterator[io.FileIO]:
    with path.open("rb", buffering=0) as handle:
        yield handle


def _tar(shard: Path, tar: index.Tar, rows: Callable[[int], pa.Table | None],
         number: int) -> tuple[list[Problem], np.ndarray]:
    """What is wrong with one tar; and a number for each of its keys, the same for the same key."""
    nothing = np.empty(0, np.int64)
    restore = f"restore it, or delete index.json and {tar.name} and run the shard job again"

    def damaged(said: str) -> tuple[list[Problem], np.ndarray]:
        return [Problem(tar.name, f"{said}; {restore}", damaged=True)], nothing

    path = shard / tar.name
    if path.parent != shard or path.suffix != ".tar" or not path.is_file():
        return damaged("missing")
    try:
        with _opened(path) as handle:
            size, told = os.fstat(handle.fileno()).st_size, rows(number)
            if size != tar.bytes:
                return damaged(f"{size} bytes, should be {tar.bytes}: it was cut short or replaced"
                               + _beyond(size, told))
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
            samples, wrong = _samples(handle.fileno(), size)
            if digest != tar.sha256:
                return damaged(f"its bytes changed {_where(handle.fileno(), size, told, wrong)}")
    except OSError as error:
        return damaged(f"it cannot be read ({error.strerror})")
    if wrong:
        return damaged(f"it is no tar of samples: {wrong}")
    problems = []
    if len(samples) != tar.samples:
        problems.append(Problem(tar.name, f"{len(samples)} samples, index.json counts {tar.samples}; {restore}",
                                damaged=True))
    keys = [sample[0][3].partition(".")[0] for sample in samples]
    if told is not None and not _same(told, keys, samples):
        problems.append(Problem(tar.name, f"samples.arrow has other samples, or has them elsewhere; {AGAIN}; `ssl-dist "
                                          "check --mend` rebuilds samples.arrow", TABLE))
    listing, expected = path.with_suffix(".idx"), index.idx(samples).encode()
    # Its size first, for whatever lies there may be larger than memory.
    if not listing.is_file() or listing.stat().st_size != len(expected) or listing.read_bytes() != expected:
        problems.append(Problem(tar.name, f"{listing.name} is missing or does not belong to this tar; `ssl-dist check "
                                          "--mend` writes it anew", IDX))
    return problems, np.fromiter(map(hash, keys), np.int64, len(keys))


def _same(rows: pa.Table, keys: list[str], samples: list[Sample]) -> bool:
    offsets, sizes = ([sample[0][place] for sample in samples] for place in (1, 2))
    return (rows["key"].to_pylist() == keys and rows["offset"].to_pylist() == offsets
            and rows["size"].to_pylist() == sizes)


def _beyond(size: int, rows: pa.Table | None) -> str:
    """How much of a tar that is too short is gone."""
    if rows is None:
        return ""
    gone = int((rows["offset"].to_numpy() + rows["size"].to_numpy() > size).sum())
    return f" ({gone} of {rows.num_rows} images lie beyond its end)" if gone else ""


def _where(descriptor: int, size: int, rows: pa.Table | None, wrong: str) -> str:
    """The digest says that something changed; the checksums of the images say which."""
    if rows is None:
        return f"({wrong})" if wrong else "since it was written"
    bad = [row["key"] for row in rows.to_pylist()
           if not 0 <= row["offset"] <= row["offset"] + row["size"] <= size
           or zlib.crc32(os.pread(descriptor, row["size"], row["offset"])) != row["crc32"]]
    return f"in {len(bad)} images, first {bad[0]}" if bad else "outside the images" + (f" ({wrong})" if wrong else "")


def _samples(descriptor: int, size: int) -> tuple[list[Sample], str]:
    """The samples of a tar by its headers, and what ended their list early, if anything did.

    Stricter than tarfile, and a sixth of its time: plain files of our names in plain USTAR, two empty blocks, the end.
    """
    samples: list[Sample] = []
    at, last = 0, b""
    while True:
        headers: list[bytes] = []
        starts: list[int] = []
        lengths: list[int] = []
        while len(headers) < HEADERS_AT_ONCE:
            header = os.pread(descriptor, BLOCK, at)
            digits = header[124:135]
            if not digits.isdigit():
                break       # the end, or damage
            try:
                length = int(digits, 8)
            except ValueError:
                break
            headers.append(header)
            starts.append(at + BLOCK)
            lengths.append(length)
            at += BLOCK + -(-length // BLOCK) * BLOCK
            if at > size:
                break
        sound = _plain(headers)
        for header, start, length in zip(headers[:sound], starts, lengths, strict=False):
            name = header[:100].rstrip(b"\0")
            match = NAME.fullmatch(name)
            if match is None:
                return samples, f"a member named {name!r} at byte {start - BLOCK}"
            if start + length > size:
                return samples, f"it ends within {name.decode()}"
            key, extension = match[1], match[2].decode()
            # A name that comes again begins another sample, which then has the key of this one.
            if key != last or any(extension == member[0] for member in samples[-1]):
                if wrong := _incomplete(samples):
                    return samples, wrong
                samples.append([])
                last = key
            samples[-1].append((extension, start, length, name.decode()))
        if sound < len(headers):
            return samples, f"no header that we write at byte {starts[sound] - BLOCK}"
        if len(headers) < HEADERS_AT_ONCE:
            break
    if os.pread(descriptor, 3 * BLOCK, at) != bytes(2 * BLOCK):     # asking for more than there should be
        return samples, f"no header that we write at byte {at}, and not the end of a tar"
    return samples, _incomplete(samples)


def _incomplete(samples: list[Sample]) -> str:
    if not samples or tuple(member[0] for member in samples[-1]) in KINDS:
        return ""
    extensions = ", ".join(member[0] for member in samples[-1])
    return f"{samples[-1][0][3].partition('.')[0]} has the members {extensions}, and not an image and its JSON"


def _plain(headers: list[bytes]) -> int:
    """How many of these headers, from the first, are of plain files in USTAR with a checksum that fits."""
    whole = b"".join(headers)
    if len(whole) < len(headers) * BLOCK:
        headers = headers[:-1]      # the last one was cut
    if not headers:
        return 0
    bytes_NB = np.frombuffer(whole, np.uint8, len(headers) * BLOCK).reshape(-1, BLOCK)
    total = bytes_NB.sum(axis=1, dtype=np.int64) - bytes_NB[:, 148:156].sum(axis=1, dtype=np.int64) + 8 * ord(" ")
    told = (bytes_NB[:, 148:154].astype(np.int64) - ord("0")) @ 8 ** np.arange(5, -1, -1)
    fits = ((total == told) & (bytes_NB[:, 257:265] == np.frombuffer(b"ustar\x0000", np.uint8)).all(axis=1)
            & (bytes_NB[:, 156] == ord("0")) & (bytes_NB[:, 157] == 0) & (bytes_NB[:, 345] == 0))
    return len(fits) if fits.all() else int(fits.argmin())


def _twins(shard: Path, found: index.Index, hashes: list[np.ndarray]) -> list[Problem]:
    """Keys that more than one sample has: readers name, count and forbid tiles by them."""
    every = np.sort(np.concatenate([np.empty(0, np.int64), *hashes]))
    repeated = np.unique(every[1:][every[1:] == every[:-1]])
    if not len(repeated):
        return []
    suspects: dict[str, list[str]] = collections.defaultdict(list)
    chosen = set(repeated.tolist())
    for tar, own in zip(found.tars, hashes, strict=True):
        if np.isin(own, repeated).any():
            with _opened(shard / tar.name) as handle:
                samples, _ = _samples(handle.fileno(), os.fstat(handle.fileno()).st_size)
            for key in (sample[0][3].partition(".")[0] for sample in samples):
                if hash(key) in chosen:
                    suspects[key].append(tar.name)
    twins = {key: tars for key, tars in suspects.items() if len(tars) > 1}      # equal keys, not only numbers
    lines = [Problem(tars[0], f"{len(tars)} samples have the key {key}, in {', '.join(dict.fromkeys(tars))}; {AGAIN}")
             for key, tars in itertools.islice(twins.items(), NAMED)]
    if len(twins) > NAMED:
        lines.append(Problem("index.json", f"{len(twins) - NAMED} more keys belong to more than one sample; {AGAIN}"))
    return lines


# --- decoding


def _decode(shard: Path, found: index.Index, progress: Progress, workers: int) -> list[Problem]:
    """Decodes every tile that the tars hold."""
    from shards import cut  # the reader of slides comes with it, and only decoding needs processes

    problems: list[Problem] = []
    waiting: collections.deque[tuple[str, concurrent.futures.Future]] = collections.deque()

    def settle(most: int) -> None:
        while len(waiting) > most:
            name, job = waiting[0]
            problems.extend(Problem(name, said) for said in job.result())
            waiting.popleft()

    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=cut.processes(), initializer=cut.end_with_parent)
    with pool:
        try:
            for number, tar in enumerate(found.tars):
                progress("decoding tiles", number, len(found.tars))
                path = shard / tar.name
                if path.parent != shard or not path.is_file():
                    continue        # said before
                with _opened(path) as handle:
                    samples, _ = _samples(handle.fileno(), os.fstat(handle.fileno()).st_size)
                for first in range(0, len(samples), TILES_AT_ONCE):
                    waiting.append((tar.name, pool.submit(undecodable, path, samples[first:first + TILES_AT_ONCE])))
                    settle(4 * workers)     # a few ahead, so that memory holds no more however many there are
            settle(0)
        except concurrent.futures.process.BrokenProcessPool:
            raise ShardError(f"a process died while it decoded tiles of {waiting[0][0] if waiting else tar.name} (out "
                             "of memory, or a tile that crashes its decoder)") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    progress("decoding tiles", len(found.tars), len(found.tars))
    return problems


def undecodable(path: Path, samples: list[Sample]) -> list[str]:
    """Which of these samples cannot be decoded, or are not as large as their JSON says."""
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    said = []
    with _opened(path) as handle:
        for sample in samples:
            parts = {extension: os.pread(handle.fileno(), size, offset) for extension, offset, size, _ in sample}
            key = sample[0][3].partition(".")[0]
            try:
                width, height = json.loads(parts.pop("json"))["size"]
            except (KeyError, TypeError, ValueError) as error:
                said.append(f"{key}.json cannot be read ({error!r}); {AGAIN}")
                continue
            for extension, content in parts.items():
                if extension == draws.KIND:
                    said += _flaw(key, content, [width, height])
                    continue
                try:
                    with Image.open(io.BytesIO(content), formats=("JPEG" if extension == "jpg" else "PNG",)) as image:
                        # Before it is decoded: a few bytes may claim to be gigabytes of pixels.
                        if image.size != (width, height):
                            said.append(f"{key}.{extension} has {image.width} x {image.height} pixels, its JSON says "
                                        f"{width} x {height}; {AGAIN}")
                            continue
                        image.load()
                except Exception as error:      # whatever a decoder raises, the tile is what it is about
                    said.append(f"{key}.{extension} cannot be decoded ({' '.join(str(error).split())}); {AGAIN}")
    return said


def _flaw(key: str, content: bytes, shape: list[int]) -> list[str]:
    """What is wrong with a draw, if anything is."""
    try:
        found = list(draws.unpacked(content).features_TD.shape)
    except ShardError as error:
        return [f"{key}.{draws.KIND} cannot be read ({error}); {AGAIN}"]
    return [] if found == shape else [f"{key}.{draws.KIND} holds {found[0]} tiles of {found[1]} numbers, its JSON says "
                                      f"{shape[0]} of {shape[1]}; {AGAIN}"]


# --- mending the table


def _mend_table(shard: Path, found: index.Index, damaged: bool, progress: Progress, workers: int) -> None:
    """Rebuilds samples.arrow from the tars, and puts it in place if it is the one that was written."""
    if damaged:
        raise ShardError("it can be rebuilt when the tars named here are restored")
    draft = folder.make(shard / ".mend")
    try:
        _rebuild(shard, found, draft, progress, workers)
        if index.fingerprint(draft, found) == found.fingerprint:
            folder.publish(draft / "samples.arrow", shard / "samples.arrow")
            return
        old = shard / "samples.arrow"
        if old.is_file() and old.read_bytes() == (draft / "samples.arrow").read_bytes():
            raise ShardError(f"it is what the tars say: it was index.json that changed; restore that, or {AGAIN}")
        raise ShardError("what the tars say does not fit the fingerprint either: index.json changed as well, or "
                         f"another version wrote this folder; nothing was changed; restore both, or {AGAIN}")
    finally:
        _remove(draft)


def _rebuild(shard: Path, found: index.Index, draft: Path, progress: Progress, workers: int) -> None:
    """Writes the table that the tars tell into `draft`. Twice through the tars: codes need all words, sorted."""
    words: dict[str, set[str]] = {name: set() for name in CODED}
    for told in _each(shard, found, _words, "reading the tars' JSON", progress, workers):
        for name, some in told.items():
            words[name] |= some
    codes = {name: {word: code for code, word in enumerate(sorted(known))} for name, known in words.items()}
    columns = index.Columns(draft / "columns", found.samples)
    for rows in _each(shard, found, partial(_told, codes), "rebuilding samples.arrow", progress, workers):
        columns.add(rows)
    columns.write(draft, {name: list(known) for name, known in codes.items()})


def _each(shard: Path, found: index.Index, what: Callable[[Path, int], T], doing: str, progress: Progress,
          workers: int) -> Iterator[T]:
    """What `what` says of every tar, in their order."""
    with concurrent.futures.ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        jobs = collections.deque(pool.submit(what, shard / tar.name, number) for number, tar in enumerate(found.tars))
        try:
            while jobs:
                progress(doing, len(found.tars) - len(jobs), len(found.tars))
                yield jobs.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    progress(doing, len(found.tars), len(found.tars))


def _known(path: Path) -> Iterator[tuple[Sample, bytes, dict[str, Any]]]:
    """Every sample of a tar, its image and its JSON."""
    with _opened(path) as handle:
        samples, _ = _samples(handle.fileno(), os.fstat(handle.fileno()).st_size)
        for sample in samples:
            (_, offset, size, _), (_, start, length, about), *_ = sample
            both = os.pread(handle.fileno(), start + length - offset, offset)
            try:
                known = json.loads(both[start - offset:])
                yield sample, both[:size], {**{name: known[name] for name in (*CODED, "x", "y")},
                                            "mpp": math.nan if known["mpp"] is None else known["mpp"],
                                            "label": index.NO_LABEL if known["class"] is None else known["class"],
                                            "digest": bytes.fromhex(known["digest"])}
            except (KeyError, TypeError, ValueError) as error:
                raise ShardError(f"it cannot be rebuilt: {about} in {path.name} does not say all that it needs "
                                 f"({error!r}), as an older version wrote it; restore samples.arrow, or {AGAIN}"
                                 ) from None


def _words(path: Path, number: int) -> dict[str, set[str]]:     # noqa: ARG001
    found: dict[str, set[str]] = {name: set() for name in CODED}
    for _, _, known in _known(path):
        for name, some in found.items():
            some.add(known[name])
    return found


def _told(codes: dict[str, dict[str, int]], path: Path, number: int) -> dict[str, np.ndarray]:
    """The rows of one tar, as index.Columns takes them."""
    rows: dict[str, list[Any]] = {name: [] for name in index.SCHEMA.names}
    for sample, image, known in _known(path):
        (_, offset, size, name), *_ = sample
        row = {**known, **{word: code[known[word]] for word, code in codes.items()}, "offset": offset, "size": size,
               "key": name.partition(".")[0].encode(), "tar": number, "crc32": zlib.crc32(image)}
        for word, values in rows.items():
            values.append(row[word])
    return {name: np.array(values, {"key": "S80", "digest": "V16"}.get(name)) for name, values in rows.items()}
