"""Slides as bags: the vectors of a slide's tiles and where they lie, a file a slide (ours, CLAM's, TRIDENT's HDF5).

N tiles of a slide   D width of a vector
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from shards import arrays
from shards.index import ShardError


@dataclass(frozen=True)
class Bag:
    """One slide."""

    features_ND: np.ndarray         # float32
    corner_N2: np.ndarray           # of each tile, x and y in pixels of level 0
    wide: float                     # of a tile, in pixels of level 0

    @cached_property
    def cell_N2(self) -> np.ndarray:
        """Column and row of each tile in the grid of whole tiles, from 0."""
        return np.rint((self.corner_N2 - self.corner_N2.min(axis=0)) / self.wide).astype(np.int64)


class Bags:
    """The slides of a folder, in the order of their files' names."""

    def __init__(self, home: Path):
        self.home = home
        self.paths = sorted(home.rglob("*.h5")) if home.is_dir() else [home]
        if not self.paths:
            raise ShardError(f"{home} holds no *.h5: write them with ssl-dist embed, or ssl-dist eval eval/embed")
        told = [arrays.bag_facts(path) for path in self.paths]
        self.counts = np.array([shape[0] for shape, _ in told])
        widths = {shape[1]: path for (shape, _), path in zip(told, self.paths, strict=True)}
        if len(widths) > 1:
            (one, first), (other, second), *_ = widths.items()
            raise ShardError(f"{first} has vectors of {one} numbers and {second} of {other}: they are of two encoders; "
                             "name a folder of one")
        self.width = next(iter(widths))
        encoders = {str(facts["encoder_sha256"]): path for (_, facts), path in zip(told, self.paths, strict=True)
                    if "encoder_sha256" in facts}
        if len(encoders) > 1:
            first, second, *_ = encoders.values()
            raise ShardError(f"{first} and {second} are of two encoders, as they say; name a folder of one")
        self.encoder = next(iter(encoders), "")
        self.facts = [facts for _, facts in told]
        self.slides = [str(facts.get("slide") or path.stem) for path, facts in zip(self.paths, self.facts, strict=True)]
        self.patients = [str(facts.get("patient") or "") for facts in self.facts]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Bag:
        features_ND, corner_N2 = arrays.read_bag(self.paths[row])
        if not np.isfinite(features_ND).all():
            raise ShardError(f"{self.paths[row]} holds features that are no numbers; embed that slide again")
        return Bag(features_ND, corner_N2, self.facts[row].get(arrays.WIDE) or pitch(corner_N2))

    @property
    def groups(self) -> np.ndarray:
        """What must not be torn apart: the patient of each slide, or the slide where the patient is not known."""
        return groups(self.patients, self.slides)

    @cached_property
    def fingerprint(self) -> str:
        """What decides every number in the folder."""
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


def groups(patients: list[str], slides: list[str]) -> np.ndarray:
    """The patient of each, or its slide where the patient is not known: what must not be torn apart."""
    return np.array([patient or f"slide {slide}" for patient, slide in zip(patients, slides, strict=True)])


def pitch(corner_N2: np.ndarray) -> float:
    """From tile to tile: the least distance that occurs along an axis, or what all distances say of it more exactly,
    for corners are whole pixels; of one tile any."""
    gaps = np.concatenate([np.diff(np.unique(axis)) for axis in corner_N2.T])
    return float(gaps.sum() / np.rint(gaps / gaps.min()).sum()) if len(gaps) else 1.0
