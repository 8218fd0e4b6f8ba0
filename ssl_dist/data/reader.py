"""Several shard folders as one catalogue of samples, and the bytes of any of them, held against the index."""

import contextlib
import itertools
import os
import resource
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute

from shards import index
from shards.index import ShardError
from ssl_dist.data import stage as stages
from ssl_dist.data.stage import Copy, Stage, Url
from ssl_dist.data.stream import Stream

LOOK = 16           # fetches until descriptors are looked through for copies that are no more
PIECE = 8           # tiles that one thread reads: a task a tile would cost as much as the tile


class Reader:
    """The samples of one split (all, where it is empty), tar by tar. A row is a sample's number in the catalogue.

    `only` keeps to words of some columns ({"organ": ["breast"], "mpp": [0.5]}); `block` is a file of keys, or of
    dataset/key, to leave out.
    With a `stage`, tars are read from copies on a local disk where there are any, and folders may be URLs.
    Of folders of draws (`slides`), what is counted and numbered within a tar are slides: a member's row is that of its
    first draw, and its others are the rows after it.
    """

    def __init__(self, folders: Sequence[Path | str], split: str = "", only: dict[str, list] | None = None,
                 block: Path | None = None, stage: Stage | None = None, readers: int = 1, *, slides: bool = False):
        self.folders, self.split, self.stage = [stages.place(folder) for folder in folders], split, stage
        self.only = {**({"split": [split]} if split else {}), **(only or {})}
        blocked = _keys(block) if block else None
        self._homes = [self._home(folder) for folder in self.folders]       # of index and table
        self.indexes = [index.read(home) for home in self._homes]
        fingerprints = [found.fingerprint for found in self.indexes]
        if len(set(fingerprints)) < len(fingerprints):
            raise ShardError(f"{', '.join(map(str, self.folders))} hold the same shards more than once; name each once")
        self.draws = self._draws(slides)                    # of each slide; 1 where rows are tiles
        self.tables = [index.samples(home) for home in self._homes]
        self.tars: list[Path | Url] = []
        self._copies: list[Copy] = []                       # of each tar, where there is a stage
        spans: list[tuple[int, int]] = []                   # a tar's folder, and its first row among those chosen there
        self._selected: list[np.ndarray | None] = []        # a folder's rows of the split; None: all
        counts: list[np.ndarray] = []
        self._base = np.cumsum([0, *(table.num_rows for table in self.tables)])
        for number, (folder, found, table) in enumerate(zip(self.folders, self.indexes, self.tables, strict=True)):
            self._hold(folder, found, table)
            edges = np.cumsum([0, *(tar.samples for tar in found.tars)])
            own = None if blocked is None else _own(blocked, found.datasets[0]["name"])
            chosen = _rows_of(table, found, self.only, own)
            places = edges if chosen is None else np.searchsorted(chosen, edges)
            if chosen is not None and self.draws > 1:
                self._whole(folder, chosen)
            self.tars += [folder / tar.name for tar in found.tars]
            self._copies += [stage.copy(folder, found.fingerprint, tar) for tar in found.tars] if stage else []
            spans += [(number, first) for first in places[:-1].tolist()]
            self._selected.append(chosen)
            counts.append(np.diff(places) // self.draws)
        self.counts = np.concatenate(counts)                # samples a tar, or slides
        self._span_folder, self._span_first = np.array(spans, np.int64).reshape(-1, 2).T
        # Straight from the map: nothing is copied but what is asked for.
        self._places = [[index.column(table, name).to_numpy() for name in ("tar", "offset", "size", "crc32")]
                        for table in self.tables]
        names = [found.datasets[0]["name"] for found in self.indexes]
        self.datasets = sorted(set(names))                  # a dataset may lie in several folders
        self.dataset_of = np.repeat([self.datasets.index(name) for name in names],
                                    [len(found.tars) for found in self.indexes])    # of each tar
        self._tar_base = np.cumsum([0, *(len(found.tars) for found in self.indexes)])
        self._open: OrderedDict[int, int] = OrderedDict()   # tar -> file descriptor, the longest unused first
        self._copied: set[int] = set()                      # those of them that are of copies
        self._fetches = 0
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="read") if readers > 1 else None
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
        """Samples of each dataset, or slides."""
        return np.bincount(self.dataset_of, self.counts, len(self.datasets)).astype(np.int64)

    def _draws(self, slides: bool) -> int:
        """How many draws there are of every slide in all folders; 1 of folders of tiles."""
        counts = [index.draws(found) for found in self.indexes]
        for folder, count in zip(self.folders, counts, strict=True):
            if bool(count) != slides:
                raise ShardError(f"{folder} holds draws of slides, and what is asked for are tiles; name the shards "
                                 "that they were made of" if count else f"{folder} holds tiles, and what is asked for "
                                 "are draws of slides; make them with: ssl-dist draw CONFIG out=FOLDER")
        if len(set(counts)) > 1:
            raise ShardError(f"{', '.join(map(str, self.folders))} hold {', '.join(map(str, counts))} draws of a "
                             "slide; make them all with the same draws=")
        return max(counts[0], 1)

    def _whole(self, folder: Path | Url, chosen: np.ndarray) -> None:
        """Refuses a choice of some draws of a slide and not of others."""
        groups = chosen[:len(chosen) // self.draws * self.draws].reshape(-1, self.draws) if len(chosen) else chosen
        if len(chosen) % self.draws or (groups // self.draws != groups[:, :1] // self.draws).any():
            raise ShardError(f"of {folder} some draws of a slide are chosen and others left out; data.only and "
                             "data.block choose whole slides there")

    def _home(self, folder: Path | Url) -> Path:
        if isinstance(folder, Path):
            return folder
        if self.stage is None:
            raise ShardError(f"{folder} is a URL, which is read through copies on a local disk: set data.stage=FOLDER")
        return self.stage.catalogue(folder)

    @staticmethod
    def _hold(folder: Path | Url, found: index.Index, table: pa.Table) -> None:
        """Sizes against the index, before the first step: a tar cut short must not look like a small one."""
        if table.num_rows != found.samples:
            raise ShardError(f"{folder}/samples.arrow has {table.num_rows} rows, index.json counts {found.samples}; "
                             f"run: ssl-dist check {folder}")
        listed = stages.sizes(folder) if isinstance(folder, Url) else {}
        if isinstance(folder, Url) and not listed:
            return              # every tar is held against its digest when it is copied
        for tar in found.tars:
            path = folder / tar.name
            if isinstance(path, Url):
                size = listed.get(tar.name)
            else:
                size = path.stat().st_size if path.is_file() else None
            if size != tar.bytes:
                state = "is missing" if size is None else f"has {size} bytes, should have {tar.bytes}"
                raise ShardError(f"{path} {state}; restore it"
                                 + (f", then run: ssl-dist check {folder}" if isinstance(folder, Path) else ""))

    def verify(self) -> None:
        """Holds the sample tables against their fingerprints: a flipped bit there would mislead every rank."""
        for folder, home, found in zip(self.folders, self._homes, self.indexes, strict=True):
            if index.fingerprint(home, found) != found.fingerprint:
                raise ShardError(f"{home}: index.json or samples.arrow changed since they were written; "
                                 + (f"run: ssl-dist check {folder}" if folder == home else
                                    f"remove it, and it is fetched anew from {folder}"))

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
        folder, places = self._span_folder[tars], self._span_first[tars] + members * self.draws
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

    def numbers(self, name: str, rows: np.ndarray) -> np.ndarray:
        """One column of numbers at the given rows, without a Python object for each."""
        columns = [index.column(table, name).to_numpy() for table in self.tables]
        folder = np.searchsorted(self._base, rows, side="right") - 1
        found = np.empty(len(rows), columns[0].dtype)
        for number in np.unique(folder).tolist():
            here = folder == number
            found[here] = columns[number][rows[here] - self._base[number]]
        return found

    def words(self, name: str) -> list[tuple[str, str]]:
        """Dataset and word of every number that `codes` gives."""
        return [(found.datasets[0]["name"], word) for found, table in zip(self.indexes, self.tables, strict=True)
                for word in _coded(table, name)[1]]

    def codes(self, name: str, rows: np.ndarray) -> np.ndarray:
        """A column of words at the given rows, as numbers; folders do not share any."""
        columns = [index.column(table, name) for table in self.tables]
        base = np.cumsum([0, *(len(column.dictionary) for column in columns)])
        folder = np.searchsorted(self._base, rows, side="right") - 1
        found = np.empty(len(rows), np.int64)
        for number in np.unique(folder).tolist():
            here = folder == number
            found[here] = base[number] + columns[number].indices.to_numpy()[rows[here] - self._base[number]]
        return found

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        """The encoded images of rows, each in fresh memory and with the checksum that the writer took."""
        images = self.fetch(rows)
        for row, image in zip(rows, images, strict=True):
            if image is None:
                key, tar, offset = self.place(row)
                raise ShardError(f"{tar} changed on disk: tile {key!r} at byte {offset} (row {row}) is not what was "
                                 f"written; run: ssl-dist check {tar.parent}")
        return images       # type: ignore[return-value]

    def place(self, row: int) -> tuple[str, Path | Url, int]:
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
        images: list[np.ndarray | None] = [None] * len(rows)
        for group in self._groups(where[0]):
            for place, image in zip(group.tolist(), self._some(where[:, group]), strict=True):
                images[place] = image
        self._fetches += 1
        if self._fetches % LOOK == 0:
            self._let_go()
        return images

    def _groups(self, tars: np.ndarray) -> list[np.ndarray]:
        """Places that are read together: of no more tars than may be open at once, and of copies, which may have to
        make room for each other, one tar at a time."""
        if not self.stage:
            return [np.arange(first, min(first + self._open_limit, len(tars)))
                    for first in range(0, len(tars), self._open_limit)]
        return [np.flatnonzero(tars == tar) for tar in dict.fromkeys(tars.tolist())]

    def _some(self, where: np.ndarray) -> list[np.ndarray | None]:
        """The images at tars, offsets and sizes, with checksums."""
        # Asked for once a tar: where a copy has come meanwhile, the source's descriptor is closed.
        descriptors = {tar: self._descriptor(tar) for tar in dict.fromkeys(where[0].tolist())}
        open_ = [(descriptors[tar], offset, size, crc32) for tar, offset, size, crc32 in where.T.tolist()]
        step = PIECE if self._readers else max(len(open_), 1)
        parts = [open_[first:first + step] for first in range(0, len(open_), step)]
        read = self._readers.map(_read, parts) if self._readers and len(parts) > 1 else map(_read, parts)
        images: list[np.ndarray | None] = []
        for image, (tar, offset, size, crc32) in zip(itertools.chain(*read), where.T.tolist(), strict=True):
            if not isinstance(image, np.ndarray) and tar in self._copied:   # what a copy lost is still at its source
                self._discard(tar)
            if not isinstance(image, np.ndarray) and self.stage:
                (image,) = _read([(self._descriptor(tar), offset, size, crc32)])
            if isinstance(image, OSError):
                raise image
            images.append(image)
        return images

    def _descriptor(self, tar: int) -> int:
        if tar not in self._open and isinstance(self.tars[tar], Url):
            self._let_go()              # its copy may have to be made, and need the room
        if self.stage and tar not in self._copied and (copy := self.stage.open(self._copies[tar])) is not None:
            self._forget(tar)           # its source was read until now
            self._keep(tar, copy)
            self._copied.add(tar)
        elif tar not in self._open:
            try:
                self._keep(tar, os.open(self.tars[tar], os.O_RDONLY))
            except OSError as error:
                raise ShardError(f"{self.tars[tar]} cannot be opened any more ({error.strerror}); restore it, then run "
                                 f"the same command again to resume") from error
        self._open.move_to_end(tar)
        return self._open[tar]

    def _keep(self, tar: int, descriptor: int) -> None:
        if len(self._open) >= self._open_limit:
            self._forget(next(iter(self._open)))
        self._open[tar] = descriptor

    def _forget(self, tar: int) -> None:
        if tar in self._open:
            os.close(self._open.pop(tar))
            self._copied.discard(tar)

    def _let_go(self) -> None:
        """Closes copies that were removed: while a descriptor is open, their bytes stay on the disk."""
        for tar in [tar for tar in self._copied if os.fstat(self._open[tar]).st_nlink == 0]:
            self._forget(tar)

    def _discard(self, tar: int) -> None:
        assert self.stage is not None
        self.stage.discard(self._copies[tar])
        self._forget(tar)

    def follow(self, stream: Stream, start: int, stop: int, *, copying: bool) -> None:
        """Lets the stage keep what steps start .. stop - 1 of the stream need next; one rank of a node is `copying`."""
        if self.stage:
            copies = {tar: self._copies[tar] for tar in np.flatnonzero(self.counts).tolist()}
            self.stage.follow(copies, stream, start, stop, copying=copying)

    def at(self, step: int) -> None:
        """Tells the stage that nothing before `step` is read any more, on any rank."""
        if self.stage:
            self.stage.at(step)

    def stop_staging(self) -> None:
        """Ends the copying, and every wait for a copy."""
        if self.stage:
            self.stage.close()

    def close(self) -> None:
        """Closes the tars."""
        self.stop_staging()
        if self._readers:
            self._readers.shutdown(wait=True)
        while self._open:
            self._forget(next(iter(self._open)))


def _read(places: list[tuple[int, int, int, int]]) -> list[np.ndarray | OSError | None]:
    """The bytes at (descriptor, offset, size), where their checksum is the one that the writer took.

    What is in memory is taken; then the system is told of all the rest before the first of it is waited for: a disk
    answers many questions as soon as one, and gave twice as many tiles.
    """
    found: list[np.ndarray | OSError | None] = [_at_once(*place[:3]) for place in places]
    rest = [place for place, content in enumerate(found) if content is None]
    for place in rest:
        descriptor, offset, size, _ = places[place]
        with contextlib.suppress(OSError):      # what is wrong, the reading below will tell
            os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)
    for place in rest:
        descriptor, offset, size, _ = places[place]
        try:
            found[place] = np.frombuffer(os.pread(descriptor, size, offset), np.uint8)
        except OSError as error:
            found[place] = error
    return [None if isinstance(content, np.ndarray) and zlib.crc32(content.data) != crc32 else content
            for content, (_, _, _, crc32) in zip(found, places, strict=True)]


def _at_once(descriptor: int, offset: int, size: int) -> np.ndarray | None:
    """Bytes that are in memory; None where there would be a wait, or the file system cannot tell."""
    content = np.empty(size, np.uint8)
    try:
        got = os.preadv(descriptor, [content], offset, os.RWF_NOWAIT)       # type: ignore[list-item]
    except OSError:
        return None
    return content if got == size else None


def _rows_of(table: pa.Table, found: index.Index, only: dict[str, list], blocked: pa.Array | None) -> np.ndarray | None:
    """The rows that fit, or None where all do."""
    if not only and blocked is None:
        return None
    fits = np.ones(table.num_rows, bool)
    for name, words in only.items():
        fits &= _fits(table, found, name, words)
    if blocked is not None:
        fits &= ~compute.is_in(table["key"], blocked).to_numpy()
    return np.flatnonzero(fits).astype(np.int32)        # half the memory; a folder has no two billion


def _keys(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ShardError(f"data.block={path} is no list of keys, one a line ({error})") from None


def _own(blocked: list[str], dataset: str) -> pa.Array:
    """The keys that are left out of one dataset: datasets may share some."""
    return pa.array([key for name, _, key in (word.rpartition("/") for word in blocked) if name in ("", dataset)],
                    pa.string())


def _fits(table: pa.Table, found: index.Index, name: str, words: list) -> np.ndarray:
    """Whether each row has one of the words in its column; a resolution fits within a hundredth."""
    if name == "mpp":
        values = index.column(table, "mpp").to_numpy()
        return np.any([np.abs(values - word) < 0.01 * word for word in words], axis=0)
    if name == "label":
        classes = found.datasets[0]["classes"]
        wanted = [classes.index(word) for word in words if word in classes]
        return np.isin(index.column(table, "label").to_numpy(), wanted)
    codes, known = _coded(table, name)
    return np.isin(codes, [number for number, word in enumerate(known) if word in words])


def _words(table: pa.Table, found: index.Index, name: str) -> list:
    if name == "mpp":
        return np.unique(index.column(table, "mpp").to_numpy()).tolist()
    return found.datasets[0]["classes"] if name == "label" else _coded(table, name)[1]


def _coded(table: pa.Table, name: str) -> tuple[np.ndarray, list[str]]:
    """A column of words as numbers, straight from the map, and what they stand for."""
    column = index.column(table, name)
    return column.indices.to_numpy(), column.dictionary.to_pylist()
