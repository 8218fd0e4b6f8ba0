"""Slides of which a table tells something, and how their patients are parted.

S slides
"""

import hashlib
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from shards.index import ShardError
from ssl_dist.data import table
from ssl_dist.data.bags import Bags, groups

NAMED = "slide", "patient"                  # by which a table may name what it tells of
NOTHING = "nan", "na", "n/a", "null"       # how programs write an empty cell: no class is meant
TRIES = 50                                  # ways to deal patients out, until every class can be learnt


@dataclass
class Slides:
    """The slides that can be learnt from and asked about."""

    bags: Bags
    rows: np.ndarray                # of the bags
    labels_S: np.ndarray            # places in `classes`; of survival 1 where the event came
    classes: list[str]              # of survival none
    times_S: np.ndarray | None      # of survival
    slides: list[str]
    patients: list[str]             # "" where nobody says
    splits: list[str]               # words of the table
    by: str                         # what the table names: slide or patient
    digest: str                     # of the table
    remarks: list[str] = field(default_factory=list)

    @property
    def groups(self) -> np.ndarray:
        """What must not be torn apart: the patient of each slide, or the slide where the patient is not known."""
        return groups(self.patients, self.slides)

    def part(self, chosen: np.ndarray) -> "Slides":
        """Those of its slides."""
        return replace(self, rows=self.rows[chosen], labels_S=self.labels_S[chosen],
                       times_S=None if self.times_S is None else self.times_S[chosen],
                       slides=[self.slides[each] for each in chosen], patients=[self.patients[each] for each in chosen],
                       splits=[self.splits[each] for each in chosen])


def told(bags: Bags, path: Path, kind: str) -> Slides:
    """The slides that a table tells of: a class of each, or of survival a time and whether the event came."""
    by, lines = _table(path, ["time", "event"] if kind == "survival" else ["label"])
    names = bags.slides if by == "slide" else bags.patients
    if by == "slide" and len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ShardError(f"two files in {bags.home} are of slide {twice!r}; keep one")
    chosen = np.array([row for row, name in enumerate(names) if name in lines], np.int64)
    if not len(chosen):
        raise ShardError(f"{path} names no {by} in {bags.home}; it names {next(iter(lines), 'none')!r}, and there is "
                         f"{names[0] or 'none with a name'!r}")
    own = [lines[names[row]] for row in chosen]
    remarks = []
    if foreign := sorted(lines.keys() - set(names)):
        remarks.append(f"{len(foreign)} rows of {path} name a {by} of which there is no vector in {bags.home} "
                       f"({', '.join(map(repr, foreign[:3]))}{', …' if len(foreign) > 3 else ''})")
    if without := sorted({bags.slides[row] for row, name in enumerate(names) if name not in lines}):
        remarks.append(f"{len(without)} of {len(bags)} slides have no row in {path}, or an empty cell, and are left "
                       f"out ({without[0]!r}{', …' if len(without) > 1 else ''})")
    patients = [_patient(bags.patients[row], line.get("patient", ""), bags.slides[row], path)
                for row, line in zip(chosen, own, strict=True)]
    if unknown := patients.count(""):
        remarks.append(f"the patients of {unknown} slides are unknown: some may be learnt from and asked about; add a "
                       f"column patient to {path}")
    times_S, classes = None, list[str]()
    if kind == "survival":
        times_S = np.array([float(line["time"]) for line in own])
        labels_S = np.array([int(float(line["event"])) for line in own])
        if not labels_S.any():
            raise ShardError(f"{path} knows of no event among {len(own)} slides: there is nothing to learn")
    else:
        classes = sorted({line["label"] for line in own}, key=_in_order)
        if len(classes) < 2:
            raise ShardError(f"all {len(own)} slides that {path} tells of are {classes[0]!r}: every guess would be "
                             "right; label more classes")
        labels_S = np.array([classes.index(line["label"]) for line in own])
    return Slides(bags, chosen, labels_S, classes, times_S, [bags.slides[row] for row in chosen], patients,
                  [line.get("split", "") for line in own], by, hashlib.sha256(path.read_bytes()).hexdigest(), remarks)


def _table(path: Path, wanted: list[str]) -> tuple[str, dict[str, dict[str, str]]]:
    """By what a table names, and the cells of each; rows with an empty cell of what is wanted are left out."""
    head, lines = table.lines(path)
    by = next((name for name in NAMED if name in head), "")
    if lacking := [name for name in ([] if by else ["slide or patient"]) + wanted if name not in head]:
        raise ShardError(f"{path} begins with {', '.join(head) or 'nothing'}; it has no column {lacking[0]}")
    found: dict[str, dict[str, str]] = {}
    for number, line in lines:
        for name in wanted:
            if line[name].lower() in NOTHING or (name != "label" and line[name] and not _fits(name, line[name])):
                raise ShardError(f"{path}, line {number}: {name} is {line[name]!r}, not "
                                 + {"label": "a class", "time": "a number from 0 on", "event": "1 or 0"}[name]
                                 + "; where it is not known leave the cell empty")
        if not line[by] or "" in [line[name] for name in wanted]:
            continue
        if (before := found.setdefault(line[by], line)) != line:
            differs = next(name for name in head if before[name] != line[name])
            raise ShardError(f"{path}, line {number}: {line[by]!r} has another {differs} ({line[differs]!r}) than in a "
                             f"line before ({before[differs]!r}); keep one")
    return by, found


def _fits(name: str, cell: str) -> bool:
    try:
        value = float(cell)
    except ValueError:
        return False
    return value in (0, 1) if name == "event" else math.isfinite(value) and value >= 0


def _patient(ours: str, theirs: str, slide: str, path: Path) -> str:
    if ours and theirs and ours != theirs:
        raise ShardError(f"{path} says that slide {slide!r} is of patient {theirs!r}, and its file that it is of "
                         f"{ours!r}; correct one")
    return theirs or ours


def _in_order(label: str) -> tuple[bool, float, str]:
    """Numbers by their size, and words after them."""
    try:
        return False, float(label), label
    except ValueError:
        return True, 0.0, label


def dealt(labels_S: np.ndarray, groups_S: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Which fold each slide is of, from 0: whole patients, those of each class as evenly as whole patients allow. A
    patient of several classes goes with the rarest. Without one fold every class is left, or it is refused."""
    patients, place_S = np.unique(groups_S, return_inverse=True)
    classes, counts = np.unique(labels_S, return_counts=True)
    for label in classes:
        if (holders := len(np.unique(place_S[labels_S == label]))) < folds:
            raise ShardError(f"class {label} has {holders} patients or slides, too few for {folds} folds")
    kind_P = np.full(len(patients), -1)
    for label in classes[np.argsort(counts, kind="stable")]:        # the rarest has the first word
        own = np.unique(place_S[labels_S == label])
        kind_P[own] = np.where(kind_P[own] < 0, label, kind_P[own])
    rng = np.random.default_rng(seed)
    for _ in range(TRIES):
        # One after the other, class by class: no fold has more than one patient of a class more than another has.
        order_P = np.concatenate([rng.permutation(np.flatnonzero(kind_P == label)) for label in classes])
        fold_P = np.empty(len(patients), np.int64)
        fold_P[order_P] = rng.permutation(folds)[np.arange(len(patients)) % folds]
        fold_S = fold_P[place_S]
        if all(len(np.unique(labels_S[fold_S != each])) == len(classes) for each in range(folds)):
            return fold_S
    raise ShardError(f"patients cannot be dealt into {folds} folds so that every class is left without each; take more "
                     "patients, or fewer folds")
