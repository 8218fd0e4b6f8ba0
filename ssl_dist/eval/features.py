"""A frozen encoder over a labelled split: one vector a tile.

S tiles of the split   D width of a vector
"""

import contextlib
import copy
import hashlib
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from shards.index import NO_LABEL, ShardError
from ssl_dist.data import opencv, table
from ssl_dist.data.bags import groups
from ssl_dist.data.decode import Decoder
from ssl_dist.data.loader import Undecodable
from ssl_dist.data.reader import Reader
from ssl_dist.models.encoder import Encoder

NAMED = "key", "slide", "patient"       # by which a table may name tiles
Of = TypeVar("Of")
TRIES = 50      # drawings of what is held out


@dataclass
class Split:
    """The labelled tiles of one split."""

    reader: Reader
    rows: np.ndarray                # of the catalogue
    labels_S: Tensor                # positions in `classes`
    classes: list[str]
    patients: list[str]             # one a tile
    slides: list[str]
    targets_SC: Tensor | None = None        # of a table: labels of which a tile may have several, or one number
    remarks: list[str] = field(default_factory=list)        # on what is not in it, for whoever reads the result
    valid_S: np.ndarray | None = None       # which of them nothing is learnt from: they are what is chosen by

    def part(self, chosen: np.ndarray) -> "Split":
        """Those of its tiles."""
        return Split(self.reader, self.rows[chosen], self.labels_S[torch.from_numpy(chosen)], self.classes,
                     [self.patients[each] for each in chosen], [self.slides[each] for each in chosen],
                     None if self.targets_SC is None else self.targets_SC[torch.from_numpy(chosen)], [*self.remarks],
                     None if self.valid_S is None else self.valid_S[chosen])

    @property
    def taught(self) -> np.ndarray:
        """The places of the tiles that may be learnt from."""
        return np.arange(len(self.rows)) if self.valid_S is None else np.flatnonzero(~self.valid_S)

    @property
    def kinds(self) -> np.ndarray:
        """The class of each tile; where there are none, the same of all."""
        return self.labels_S.numpy() if self.targets_SC is None else np.zeros(len(self.rows), np.int64)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its tiles and their order."""
        return {"shards": [found.fingerprint for found in self.reader.indexes],
                "rows": hashlib.sha256(self.rows.tobytes()).hexdigest()}

    def told(self, shards: list[Path]) -> list[dict[str, Any]]:
        """Of which shards it is, for a result: a path is of one machine, so what they are and hold as well."""
        return [{"path": str(path), "fingerprint": found.fingerprint, "datasets": [each["name"] for each in
                                                                                   found.datasets]}
                for path, found in zip(shards, self.reader.indexes, strict=True)]

    @property
    def groups(self) -> np.ndarray:
        """What must not be torn apart: the patient of each tile, or its slide where the patient is not known."""
        return groups(self.patients, self.slides)


def labelled(shards: list[Path], split: str, valid: str = "") -> Split:
    """The tiles of a split that carry a label; and of another, by which is chosen."""
    reader = _reader(shards, split, valid)
    rows = reader.all_rows()
    labels = np.array(reader.column("label", rows))
    classes = [tuple(found.datasets[0]["classes"]) for found in reader.indexes]
    if len(set(classes)) > 1:
        raise ShardError(f"the shard folders name different classes ({classes}); evaluate them apart")
    known = labels != NO_LABEL
    if not known.any():
        raise ShardError(f"no tile of split {split!r} in {', '.join(map(str, shards))} has a label; shard with labels")
    rows, without = rows[known], int((~known).sum())
    remarks = [f"{without} of {len(known)} tiles of split {split!r} have no label and are left out"] if without else []
    return Split(reader, rows, torch.from_numpy(labels[known]).long(), list(classes[0]), reader.column("patient", rows),
                 reader.column("slide", rows), remarks=remarks, valid_S=_valid(reader, rows, split, valid))


def _reader(shards: list[Path], split: str, valid: str) -> Reader:
    return Reader(shards, only={"split": [split, valid]}) if valid else Reader(shards, split)


def _valid(reader: Reader, rows: np.ndarray, split: str, valid: str) -> np.ndarray | None:
    """Which of the rows are only to choose by; there must be some, and others."""
    if not valid:
        return None
    found = np.array(reader.column("split", rows)) == valid
    for name, there in ((split, ~found), (valid, found)):
        if not there.any():
            raise ShardError(f"no tile of split {name!r} in {', '.join(map(str, reader.folders))} says what is guessed")
    return found


def told(shards: list[Path], split: str, path: Path, kind: str, valid: str = "") -> Split:
    """The tiles of a split of which a table tells what is to be guessed; where a cell is empty, it does not."""
    by, columns, rows = _table(path)
    if kind == "numbers" and len(columns) != 1:
        raise ShardError(f"{path} has {len(columns)} columns beside {by} ({', '.join(columns)}), and kind=numbers "
                         "guesses one; leave the others out")
    if kind == "several" and (strange := {value for row in rows.values() for value in row} - {0.0, 1.0}):
        raise ShardError(f"{path} holds {sorted(strange)[0]:g}, and kind=several knows 0 and 1 alone")
    found = every(shards, split, valid)
    names = found.reader.column(by, found.rows)
    chosen = np.flatnonzero([name in rows for name in names])
    if not len(chosen):
        raise ShardError(f"{path} names no {by} of split {split!r} in {', '.join(map(str, shards))}; it names "
                         f"{next(iter(rows), 'none')!r}, and there is {names[0]!r}")
    part = found.part(chosen)
    part.classes = columns
    with contextlib.closing(Reader(shards)) as whole:
        if foreign := sorted(rows.keys() - {*whole.column(by, whole.all_rows())}):
            part.remarks.append(f"{len(foreign)} rows of {path} name a {by} that is in none of the shards "
                                f"({', '.join(map(repr, foreign[:3]))})")
    if without := sorted(set(names) - rows.keys()):
        part.remarks.append(f"{len(without)} of {len(set(names))} {by}s of split {split!r} have no row in {path}, or "
                            f"an empty cell, and are left out ({without[0]!r}, …)")
    part.targets_SC = torch.tensor([rows[names[each]] for each in chosen])
    return part


def _table(path: Path) -> tuple[str, list[str], dict[str, list[float]]]:
    """By what a table names tiles, what it tells of them, and that by name."""
    head, lines = table.lines(path)
    by = [name for name in NAMED if name in head]
    if len(by) != 1 or len(head) < 2:
        raise ShardError(f"{path} begins with {', '.join(head) or 'nothing'}; it needs one of {', '.join(NAMED)} and a "
                         "column for each thing to guess")
    rows = dict[str, list[float]]()
    for number, line in lines:
        name, values = line[by[0]], [value for column, value in line.items() if column != by[0]]
        if "" in values:
            continue
        try:
            numbers = [float(value) for value in values]
        except ValueError:
            raise ShardError(f"{path}, line {number} holds {', '.join(values)}, which are not all numbers") from None
        if not np.isfinite(numbers).all() or rows.setdefault(name, numbers) != numbers:
            raise ShardError(f"{path}, line {number}: {name!r} has {', '.join(values)}, not one finite number a "
                             "column, or another line of other numbers")
    return by[0], [name for name in head if name != by[0]], rows


def held_out(split: Split, by: str, part: float, seed: int) -> tuple[Split, Split]:
    """A split in two, of whole patients, slides or sites: what is left, and as nearly as can be a part of the tiles."""
    if by == "patient" and (unknown := split.patients.count("")):
        raise ShardError(f"hold=patient, and the patients of {unknown} tiles are unknown; use hold=slide, or shard "
                         "anew with patients")
    names = _sites(split) if by == "site" else {"patient": split.groups, "slide": np.array(split.slides)}[by]
    found, place_S = np.unique(names, return_inverse=True)
    sizes, labels = np.bincount(place_S), split.kinds
    numbers = np.random.default_rng(seed)
    for _ in range(TRIES):
        order = numbers.permutation(len(found))
        # Up to that group with which the part is met most nearly, but never all.
        off = np.abs(np.cumsum(sizes[order])[:-1] - part * len(names))
        held = np.isin(place_S, order[:int(off.argmin()) + 1]) if len(off) else np.zeros(len(names), bool)
        if held.any() and len({*labels[held]}) == len({*labels[~held]}) == len({*labels}):
            return split.part(np.flatnonzero(~held)), split.part(np.flatnonzero(held))
    raise ShardError(f"of {len(found)} {by}s no part can be held out so that every class is on both sides; take more "
                     f"{by}s, another part=, or leave a class out")


def _sites(split: Split) -> np.ndarray:
    """Where each tile comes from, by the second word of TCGA's names: TCGA-A2-A0CM is of A2."""
    codes = [re.match(r"TCGA-(\w{2})-", patient, re.IGNORECASE) for patient in split.patients]
    if strange := [patient for patient, code in zip(split.patients, codes, strict=True) if code is None][:1]:
        raise ShardError(f"hold=site knows sites by TCGA's names alone, and {strange[0]!r} is none")
    return np.array([code.group(1).upper() for code in codes if code])


def every(shards: list[Path], split: str = "", valid: str = "") -> Split:
    """All tiles of a split, or of all, with labels or without."""
    reader = _reader(shards, split, valid)
    rows = reader.all_rows()
    return Split(reader, rows, torch.from_numpy(np.array(reader.column("label", rows))).long(), [],
                 reader.column("patient", rows), reader.column("slide", rows),
                 valid_S=_valid(reader, rows, split, valid))


def extract(encoder: Encoder, split: Split, *, size: int, batch: int, threads: int, device: torch.device,
            progress: Callable[[int, int], None], precision: str = "fp32") -> Tensor:
    """Features (S, D) of every tile of the split, in its order, on the CPU; of GPUs all that there are take turns."""
    features: list[Tensor] = []
    done = 0
    shown = tiles(split, np.arange(len(split.rows)), size=size, batch=batch, threads=threads)
    for _, vectors in look(encoder, shown, device, precision):
        features.append(vectors)
        done += len(vectors)
        progress(done, len(split.rows))
    return torch.cat(features)


def look(encoder: Encoder, batches: Iterable[tuple[Of, Tensor]], device: torch.device, precision: str = "fp32",
         ) -> Iterator[tuple[Of, Tensor]]:
    """The vectors (B, D) of every batch of pixels, in their order, on the CPU; of GPUs all there are take turns."""
    places = spread(device)
    networks = [(encoder if number == 0 else copy.deepcopy(encoder)).eval().to(place)
                for number, place in enumerate(places)]
    # While GPUs look at some tiles the next are decoded; of a CPU both are the same cores' work.
    ahead = 2 * len(places) if device.type == "cuda" else len(places) - 1
    waiting: deque[tuple[Of, Future[Tensor]]] = deque()
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(ThreadPoolExecutor(1)) for _ in places]
        for number, (whose, pixels) in enumerate(batches):
            turn = number % len(places)
            waiting.append((whose, workers[turn].submit(_looked_at, networks[turn], pixels, places[turn], precision)))
            if len(waiting) > ahead:
                whose, found = waiting.popleft()
                yield whose, found.result()
        for whose, found in waiting:
            yield whose, found.result()


def spread(device: torch.device) -> list[torch.device]:
    """Every GPU that this process may use, or the CPU."""
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())] if device.type == "cuda" else \
        [device]


@torch.inference_mode()
def _looked_at(network: Encoder, pixels: Tensor, place: torch.device, precision: str) -> Tensor:
    with torch.autocast(place.type, torch.bfloat16, enabled=precision == "bf16"):
        return network(pixels.to(place)).float().cpu()


def tiles(split: Split, places: np.ndarray, *, size: int, batch: int,
          threads: int) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Tiles by their places in a split, a batch at a time: those places, and pixels (B, size, size, 3) of the whole."""
    opencv.one_thread()
    decoder = Decoder(batch, threads)
    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, len(places), batch):
            own = places[first:first + batch]
            pictures = decoder.open(split.reader.read(split.rows[own]))
            pixels = torch.from_numpy(opencv.resized(pictures, len(own), size, pool))
            if pictures.bad:
                raise Undecodable(pictures.bad, split.rows[own], split.reader)
            yield own, pixels


def colours(split: Split, *, batch: int, threads: int, progress: Callable[[int, int], None]) -> Tensor:
    """How often each of 32 levels of red, green and blue occurs in a tile (S, 96): a baseline that knows no shape."""
    decoder, features = Decoder(batch, threads), []
    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, len(split.rows), batch):
            rows = split.rows[first:first + batch]
            pictures = decoder.open(split.reader.read(rows))
            features += list(pool.map(lambda place, pictures=pictures: _levels(pictures(place)), range(len(rows))))
            if pictures.bad:
                raise Undecodable(pictures.bad, rows, split.reader)
            progress(min(first + batch, len(split.rows)), len(split.rows))
    return torch.from_numpy(np.stack(features)).float()


def _levels(picture_HW3: np.ndarray) -> np.ndarray:
    counts = [np.bincount(picture_HW3[..., channel].ravel() // 8, minlength=32) for channel in range(3)]
    return np.concatenate(counts) / (picture_HW3.size / 3)
