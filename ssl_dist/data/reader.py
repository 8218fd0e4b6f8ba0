"""Several shard folders as one catalogue of samples, and the bytes of any of them, held against the index."""

import os
import resource
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute

from shards import index
from shards.index import ShardError


class Reader:
    """The samples of one split (all, where it is empty), tar by tar. A row is a sample's number in the catalogue.

    `only` keeps to words of some columns ({"organ": ["breast"], "mpp": [0.5]}); `block` is a file of keys to leave out.
    """

    def __init__(self, folders: list[Path], split: str = "", only: dict[str, list] | None = None,
                 block: Path | None = None):
        self.folders, self.split = [Path(folder) for folder in folders], split
        self.only = {**({"split": [split]} if split else {}), **(only or {})}
        blocked = pa.array(block.read_text(encoding="utf-8").split(), pa.string()) if block else None
        self.indexes = [index.read(folder) for folder in self.folders]
        fingerprints = [found.fingerprint for found in self.indexes]
        if len(set(fingerprints)) < len(fingerprints):
            raise ShardError(f"{', '.join(map(str, self.folders))} hold the same shards more than once; name each once")
        self.tables = [index.samples(folder) for folder in self.folders]
        self.tars: list[Path] = []
        spans: list[tuple[int, int]] = []                   # a tar's folder, and its first row among those chosen there
        self._selected: list[np.ndarray | None] = []        # a folder's rows of the split; None: all
        counts: list[np.ndarray] = []
        self._base = np.cumsum([0, *(table.num_rows for table in self.tables)])
        for number, (folder, found, table) in enumerate(zip(self.folders, self.indexes, self.tables, strict=True)):
            self._hold(folder, found, table)
            edges = np.cumsum([0, *(tar.samples for tar in found.tars)])
            chosen = _rows_of(table, found, self.only, blocked)
            places = edges if chosen is None else np.searchsorted(chosen, edges)
            self.tars += [folder / tar.name for tar in found.tars]
            spans += [(number, first) for first in places[:-1].tolist()]
            self._selected.append(chosen)
            counts.append(np.diff(places))
        self.counts = np.concatenate(counts)                # samples a tar
        self._span_folder, self._span_first = np.array(spans, np.int64).reshape(-1, 2).T
        # Straight from the map: nothing is copied but what is asked for.
        self._places = [[table[name].combine_chunks().to_numpy() for name in ("tar", "offset", "size", "crc32")]
                        for table in self.tables]
        names = [found.datasets[0]["name"] for found in self.indexes]
        self.datasets = sorted(set(names))                  # a dataset may lie in several folders
        self.dataset_of = np.repeat([self.datasets.index(name) for name in names],
                                    [len(found.tars) for found in self.indexes])    # of each tar
        self._tar_base = np.cumsum([0, *(len(found.tars) for found in self.indexes)])
        self._open: OrderedDict[int, int] = OrderedDict()   # tar -> file descriptor, the longest unused first
        self._open_limit = max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        if not self.counts.sum():
            raise ShardError(self._nothing(blocked is not None))

    def _nothing(self, blocked: bool) -> str:
        """Why no sample is left: the column that no sample fits, or all of them together."""
        where = f" in {', '.join(map(str, self.folders))}"
        for name, words in self.only.items():
            if not any(_fits(table, found, name, words).any()
                       for table, found in zip(self.tables, self.indexes, strict=True)):
                there = sorted({str(word) for table, found in zip(self.tables, self.indexes, strict=True)
                                for word in _words(table, found, name)})
                told = ", ".join(map(repr, there[:20])) + (", ..." if len(there) > 20 else "")
                return f"no tile of {name} {', '.join(map(repr, words))}{where}; the {name}s there: {told}"
        return f"no tile{where} is of all of {self.only}" + (" and not in data.block" if blocked else "")

    @property
    def sizes(self) -> np.ndarray:
        """Samples of each dataset."""
        return np.bincount(self.dataset_of, self.counts, len(self.datasets)).astype(np.int64)

    @staticmethod
    def _hold(folder: Path, found: index.Index, table: pa.Table) -> None:
        """Sizes against the index, before the first step: a tar cut short must not look like a small one."""
        if table.num_rows != found.samples:
            raise ShardError(f"{folder}/samples.arrow has {table.num_rows} rows, index.json counts {found.samples}; "
                             f"run: ssl-dist check {folder}")
        for tar in found.tars:
            path = folder / tar.name
            size = path.stat().st_size if path.is_file() else None
            if size != tar.bytes:
                state = "is missing" if size is None else f"has {size} bytes, should have {tar.bytes}"
                raise ShardError(f"{path} {state}; restore it, then run: ssl-dist check {folder}")

    def verify(self) -> None:
        """Holds the sample tables against their fingerprints: a flipped bit there would mislead every rank."""
        for folder, found in zip(self.folders, self.indexes, strict=True):
            if index.fingerprint(folder, found) != found.fingerprint:
                raise ShardError(f"{folder}: index.json or samples.arrow changed since they were written; run: "
                                 f"ssl-dist check {folder}")

    def splits(self) -> list[str]:
        """The words that the split column holds."""
        return sorted({word for table in self.tables for word in _coded(table, "split")[1]})

    def distinct(self, name: str) -> set[str]:
        """The words of one column that the split's samples use."""
        used: set[str] = set()
        for table, chosen in zip(self.tables, self._selected, strict=True):
            codes, words = _coded(table, name)
            used.update(words[code] for code in np.unique(codes if chosen is None else codes[chosen]).tolist())
        return used

    def rows(self, tars: np.ndarray, members: np.ndarray) -> np.ndarray:
        """Catalogue rows of members (numbered within the split) of tars."""
        folder, places = self._span_folder[tars], self._span_first[tars] + members
        for number in np.unique(folder).tolist():
            if (chosen := self._selected[number]) is not None:
                here = folder == number
                places[here] = chosen[places[here]]
        return self._base[folder] + places

    def all_rows(self) -> np.ndarray:
        """Every row of the split, in the order of the catalogue."""
        return np.concatenate([base + (np.arange(table.num_rows) if chosen is None else chosen)
                               for base, table, chosen in zip(self._base, self.tables, self._selected, strict=False)])

    def column(self, name: str, rows: np.ndarray) -> list:
        """One column of the sample tables at the given rows, as plain values."""
        values: list = [None] * len(rows)
        folder = np.searchsorted(self._base, rows, side="right") - 1
        for number in np.unique(folder):
            here = np.flatnonzero(folder == number)
            taken = self.tables[number][name].take(pa.array(rows[here] - self._base[number])).to_pylist()
            for place, value in zip(here.tolist(), taken, strict=True):
                values[place] = value
        return values

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        """The encoded images of rows, each in fresh memory and with the checksum that the writer took."""
        images = self.fetch(rows)
        for row, image in zip(rows, images, strict=True):
            if image is None:
                key, tar, offset = self.place(row)
                raise ShardError(f"{tar} changed on disk: tile {key!r} at byte {offset} (row {row}) is not what was "
                                 f"written; run: ssl-dist check {tar.parent}")
        return images       # type: ignore[return-value]

    def place(self, row: int) -> tuple[str, Path, int]:
        """Key, tar and offset of one row."""
        key, tar, offset = (self.column(name, np.array([row]))[0] for name in ("key", "tar", "offset"))
        folder = int(np.searchsorted(self._base, row, side="right")) - 1
        return key, self.tars[int(self._tar_base[folder]) + tar], offset

    def fetch(self, rows: np.ndarray) -> list[np.ndarray | None]:
        """The encoded images of rows; None where the bytes are not those that the writer took the checksum of."""
        folder = np.searchsorted(self._base, rows, side="right") - 1
        where = np.empty((4, len(rows)), np.int64)
        for number in np.unique(folder).tolist():
            here = folder == number
            local = rows[here] - self._base[number]
            where[:, here] = [column[local] for column in self._places[number]]
        where[0] += self._tar_base[folder]
        images: list[np.ndarray | None] = []
        for tar, offset, size, crc32 in zip(*where.tolist(), strict=True):
            content = os.pread(self._descriptor(tar), size, offset)
            images.append(np.frombuffer(content, dtype=np.uint8) if zlib.crc32(content) == crc32 else None)
        return images

    def _descriptor(self, tar: int) -> int:
        if tar not in self._open:
            if len(self._open) >= self._open_limit:
                os.close(self._open.popitem(last=False)[1])
            try:
                self._open[tar] = os.open(self.tars[tar], os.O_RDONLY)
            except OSError as error:
                raise ShardError(f"{self.tars[tar]} cannot be opened any more ({error.strerror}); restore it, then run "
                                 f"the same command again to resume") from error
        self._open.move_to_end(tar)
        return self._open[tar]

    def close(self) -> None:
        """Closes the tars."""
        while self._open:
            os.close(self._open.popitem()[1])


def _rows_of(table: pa.Table, found: index.Index, only: dict[str, list], blocked: pa.Array | None) -> np.ndarray | None:
    """The rows that fit, or None where all do."""
    if not only and blocked is None:
        return None
    fits = np.ones(table.num_rows, bool)
    for name, words in only.items():
        fits &= _fits(table, found, name, words)
    if blocked is not None:
        fits &= ~compute.is_in(table["key"], blocked).to_numpy()
    return np.flatnonzero(fits)


def _fits(table: pa.Table, found: index.Index, name: str, words: list) -> np.ndarray:
    """Whether each row has one of the words in its column; a resolution fits within a hundredth."""
    if name == "mpp":
        values = table["mpp"].to_numpy()
        return np.any([np.abs(values - word) < 0.01 * word for word in words], axis=0)
    if name == "label":
        classes = found.datasets[0]["classes"]
        return np.isin(table["label"].to_numpy(), [classes.index(word) for word in words if word in classes])
    codes, known = _coded(table, name)
    return np.isin(codes, [number for number, word in enumerate(known) if word in words])


def _words(table: pa.Table, found: index.Index, name: str) -> list:
    if name == "mpp":
        return np.unique(table["mpp"].to_numpy()).tolist()
    return found.datasets[0]["classes"] if name == "label" else _coded(table, name)[1]


def _coded(table: pa.Table, name: str) -> tuple[np.ndarray, list[str]]:
    """A column of words as numbers, straight from the map, and what they stand for."""
    column = table[name].combine_chunks()
    return column.indices.to_numpy(), column.dictionary.to_pylist()
