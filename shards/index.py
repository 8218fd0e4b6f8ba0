"""The contract between writer and reader of a shard folder: names, columns, and how to open them.

    index.json      what is in the folder: format, dataset cards, settings, fingerprint, and every tar's size and digest
    samples.arrow   one row a sample, mapped into memory and never parsed
    <tar>.idx       where the members of a tar lie, in the words of NVIDIA DALI's own reader
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shards import folder as folders

FORMAT = 1
NO_LABEL = -1

# Repeated words are dictionary-coded and nothing is ever null, so that a column maps into memory without a copy.
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("tar", pa.int32(), nullable=False),       # position in index.json's list
        pa.field("offset", pa.int64(), nullable=False),    # of the image's first byte in its tar
        pa.field("size", pa.int32(), nullable=False),      # of the image, bytes
        pa.field("crc32", pa.uint32(), nullable=False),    # of the image's bytes
        pa.field("dataset", pa.dictionary(pa.int16(), pa.string()), nullable=False),
        pa.field("slide", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("patient", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("x", pa.int32(), nullable=False),         # level-0 pixels, top left
        pa.field("y", pa.int32(), nullable=False),
        pa.field("mpp", pa.float32(), nullable=False),     # microns per pixel of the tile; NaN where unknown
        pa.field("label", pa.int32(), nullable=False),     # position in the dataset card's classes, or -1
        pa.field("split", pa.dictionary(pa.int8(), pa.string()), nullable=False),
        pa.field("stain", pa.dictionary(pa.int8(), pa.string()), nullable=False),
        pa.field("organ", pa.dictionary(pa.int8(), pa.string()), nullable=False),
        pa.field("encoding", pa.dictionary(pa.int8(), pa.string()), nullable=False),
        # Of the source's bytes where they are untouched, else of the pixels before encoding.
        pa.field("digest", pa.binary(16), nullable=False),
    ]
)


class ShardError(ValueError):
    """A shard folder that is missing, incomplete or not what its index says."""

    exit_code = 3


@dataclass(frozen=True)
class Tar:
    """One tar as the writer left it: bytes and SHA-256 of the whole file."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """The content of index.json."""

    datasets: list[dict[str, Any]]     # cards: name, organ, stain, licence, classes, ...
    settings: dict[str, Any]           # everything that decided which bytes were written
    fingerprint: str                   # of all of the above and below, and of samples.arrow
    tars: list[Tar]
    files: dict[str, str] = field(default_factory=dict)     # SHA-256 of rejected.jsonl and slides.jsonl
    format: int = FORMAT

    @property
    def samples(self) -> int:
        return sum(tar.samples for tar in self.tars)


def draws(index: Index) -> int:
    """How many draws there are of every slide (draws.py); 0: the folder holds tiles."""
    return int(index.datasets[0].get("draws") or 0)


def read(folder: Path) -> Index:
    """The index of a finished shard folder."""
    path = folder / "index.json"
    if not folder.is_dir():
        raise ShardError(f"no shard folder at {folder} (looked in {Path.cwd()}); write it with: ssl-dist shard CONFIG "
                         f"out={folder}")
    if not path.is_file():
        raise ShardError(f"{folder} has no index.json: it is not a shard folder, or its job has not finished; "
                         "run the same `ssl-dist shard` command again to complete it")
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or content["format"] != FORMAT:
            raise ShardError(f"{path} has format {content['format']}, this version reads {FORMAT}; "
                             "shard again, or use the version that wrote it")
        for card in content["datasets"]:
            if missing := {"name", "classes"} - card.keys():
                raise KeyError(f"a dataset card without {', '.join(sorted(missing))}")
        content["tars"] = [Tar(**tar) for tar in content["tars"]]
        found = Index(**content)
        for value, kind in ((found.settings, dict), (found.fingerprint, str), (found.files, dict),
                            *((card["name"], str) for card in found.datasets),
                            *((card["classes"], list) for card in found.datasets),
                            *((getattr(tar, name), kind) for tar in found.tars for name, kind in
                              (("name", str), ("samples", int), ("bytes", int), ("sha256", str)))):
            if not isinstance(value, kind):
                raise TypeError(f"{value!r} where a {kind.__name__} belongs")
        return found
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{path} is not a readable index ({error}); restore it, or shard again") from error


def write(folder: Path, index: Index) -> None:
    """Publishes the folder: until this file exists, readers see nothing."""
    folders.write_json(folder / "index.json", asdict(index))


def fingerprint(folder: Path, index: Index) -> str:
    """What the index must say of itself: a digest of everything else in it, and of samples.arrow as it lies there."""
    with (folder / "samples.arrow").open("rb") as handle:
        table = hashlib.file_digest(handle, "sha256").hexdigest()
    rest = {name: value for name, value in asdict(index).items() if name != "fingerprint"}
    if not index.files:         # folders of before there were any
        del rest["files"]
    return hashlib.sha256(json.dumps([rest, table], sort_keys=True).encode()).hexdigest()


def samples(folder: Path) -> pa.Table:
    """The sample table, mapped from disk: opening costs the same for a hundred rows and for a hundred million."""
    path = folder / "samples.arrow"
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowException) as error:
        raise ShardError(f"{path} cannot be read ({error}); restore it, or delete index.json and run the shard job "
                         "again") from error
    if not table.schema.equals(SCHEMA):
        raise ShardError(f"{path} has other columns than this version reads ({', '.join(table.schema.names)}); shard "
                         "again, or use the version that wrote it")
    return table


def column(table: pa.Table, name: str) -> pa.Array:
    """A column of the sample table as it lies in the map: `combine_chunks` would copy it into memory, 650 MB of four
    columns of 32 million rows, on every rank."""
    chunks = table[name].chunks
    return chunks[0] if len(chunks) == 1 else table[name].combine_chunks()


def write_samples(folder: Path, columns: dict[str, Iterable[Any]]) -> None:
    """Writes samples.arrow from plain columns, one uncompressed record batch."""
    _write(folder / "samples.arrow", [_column(field, columns[field.name]) for field in SCHEMA])


class Columns:
    """The sample table as it grows: a file a column, so that memory does not grow with it."""

    def __init__(self, folder: Path, rows: int):
        shutil.rmtree(folder, ignore_errors=True)       # of a call that was killed
        folder.mkdir()
        self._rows, self._end, self._letters = rows, 0, 0
        self._values = {field.name: np.memmap(folder / field.name, _plain(field.type), "w+", shape=(rows,))
                        for field in SCHEMA if field.name != "key"}
        self._ends = np.memmap(folder / "key", np.int32, "w+", shape=(rows + 1,))
        self._keys = folder / "keys"
        self._keys.touch()

    def add(self, columns: dict[str, np.ndarray]) -> None:
        """More rows: numbers as they are, words as codes, keys as fixed bytes."""
        rows = slice(self._end, self._end + len(columns["key"]))
        for name, values in self._values.items():
            values[rows] = columns[name]
        keys = columns["key"].tolist()
        letters = self._letters + np.cumsum([len(key) for key in keys], dtype=np.int64)
        if letters[-1] > np.iinfo(np.int32).max:
            raise ShardError(f"the keys of {rows.stop} tiles take more letters than samples.arrow can count (two "
                             "billion); shard the source in several folders")
        self._ends[rows.start + 1:rows.stop + 1] = letters
        with self._keys.open("ab") as file:
            file.writelines(keys)
        self._end, self._letters = rows.stop, int(letters[-1])

    def write(self, folder: Path, words: dict[str, list[str]]) -> None:
        """Writes samples.arrow; `words` are what the codes mean, sorted."""
        assert self._end == self._rows, f"{self._end} rows of {self._rows}"
        letters = np.memmap(self._keys, np.uint8, "r")
        arrays = []
        for column in SCHEMA:
            if column.name == "key":
                arrays.append(pa.StringArray.from_buffers(self._rows, pa.py_buffer(self._ends),
                                                          pa.py_buffer(letters)))
                continue
            plain = column.type.index_type if pa.types.is_dictionary(column.type) else column.type
            array = pa.Array.from_buffers(plain, self._rows, [None, pa.py_buffer(self._values[column.name])])
            if pa.types.is_dictionary(column.type):
                _limit(column, len(words[column.name]))
                array = pa.DictionaryArray.from_arrays(array, pa.array(words[column.name], pa.string()))
            arrays.append(array)
        _write(folder / "samples.arrow", arrays)


def _plain(kind: pa.DataType) -> Any:
    """How a column lies in memory, in numpy's words."""
    if pa.types.is_fixed_size_binary(kind):
        return f"V{kind.byte_width}"
    return (kind.index_type if pa.types.is_dictionary(kind) else kind).to_pandas_dtype()


def _write(path: Path, arrays: list[pa.Array]) -> None:
    """One record batch, whole under its name or not there; straight from where its columns lie."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with folders.storage(path):
        try:
            with pa.OSFile(str(draft), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
                writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))
            folders.sync(draft)
            folders.publish(draft, path)
        finally:
            draft.unlink(missing_ok=True)


def hold_words(words: dict[str, list[str]]) -> None:
    """Refuses more different words than a column of the sample table can code."""
    for column in SCHEMA:
        if pa.types.is_dictionary(column.type) and column.name in words:
            _limit(column, len(words[column.name]))


def _limit(field: pa.Field, words: int) -> None:
    if words > (limit := np.iinfo(field.type.index_type.to_pandas_dtype()).max + 1):
        raise ShardError(f"{words} different words for {field.name!r}, of {limit} at most; look at names= and "
                         "the table")


def _column(field: pa.Field, values: Iterable[Any]) -> pa.Array:
    if not pa.types.is_dictionary(field.type):
        return pa.array(values, type=field.type)
    coded = pa.array(values, type=pa.string()).dictionary_encode()
    # Sorted words, so that the file depends on the samples alone and not on which word came first.
    order = np.argsort(coded.dictionary.to_numpy(zero_copy_only=False).astype(str), kind="stable")
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    _limit(field, len(order))
    codes = pa.array(rank[coded.indices.to_numpy()], type=field.type.index_type)
    return pa.DictionaryArray.from_arrays(codes, coded.dictionary.take(pa.array(order)))


def idx(members: Iterable[list[tuple[str, int, int, str]]]) -> str:
    """DALI's index of one tar; a sample is a list of (extension, offset of the data, size, file name)."""
    lines = [" ".join(f"{ext} {offset} {size} {name}" for ext, offset, size, name in sample) for sample in members]
    return "\n".join([f"v1.2 {len(lines)}", *lines]) + "\n"
