"""Slides as one vector each: a Parquet table, or the tiles of each slide pooled.

S slides   T tiles   D width
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.index import ShardError
from ssl_dist.data.bags import Bags, groups

POOLED: dict[str, Any] = {"mean": np.mean, "max": np.max}


@dataclass(frozen=True)
class Vectors:
    """A row a slide, in the order of their names."""

    source: Path
    features_SD: np.ndarray         # float32
    slides: list[str]
    patients: list[str]             # "" where it is not known
    encoder: str                    # digest of the weights that they are of, where it is told
    architecture: str
    fingerprint: str                # of every number in them
    tiles: int                      # that they were pooled of; as many as slides: they came as they are

    @property
    def groups(self) -> np.ndarray:
        """What must not be torn apart: the patient of each slide, or the slide where the patient is not known."""
        return groups(self.patients, self.slides)


def read(source: Path, pooling: str = "mean") -> Vectors:
    """A Parquet table with columns slide, features and perhaps patient, or a folder of bags. Of a slide that has
    several rows, as in a table of tiles, the features are pooled."""
    if source.is_dir() or source.suffix == ".h5":
        bags = Bags(source)
        found = [bags[row].features_ND for row in range(len(bags))]
        slides, patients = bags.slides, bags.patients
        facts = (bags.encoder, str(bags.facts[0].get("encoder") or ""))
        whole_TD = np.concatenate(found)
        slide_T = np.repeat(np.array(slides), bags.counts)
        patient_T = np.repeat(np.array(patients), bags.counts)
    else:
        whole_TD, slide_T, patient_T, facts = _table(source)
    if not np.isfinite(whole_TD).all():
        bad = slide_T[~np.isfinite(whole_TD).all(axis=1)][0]
        raise ShardError(f"{source} holds features of slide {bad} that are no numbers; embed it again")
    names, first_S, place_T = np.unique(slide_T, return_index=True, return_inverse=True)
    patient_S = patient_T[first_S]
    if len(torn := np.flatnonzero(patient_S[place_T] != patient_T)):
        one, other = str(patient_S[place_T[torn[0]]]), str(patient_T[torn[0]])
        raise ShardError(f"{source} has slide {slide_T[torn[0]]} of patients {one!r} and {other!r}; give slides of "
                         "different patients different names")
    ordered_T = np.argsort(place_T, kind="stable")
    parts = np.split(whole_TD[ordered_T], np.flatnonzero(np.diff(place_T[ordered_T])) + 1)
    features_SD = np.stack([POOLED[pooling](part, axis=0) for part in parts]).astype(np.float32)
    digest = hashlib.sha256(features_SD.tobytes() + "\0".join(names).encode())
    return Vectors(source, features_SD, names.tolist(), patient_S.tolist(), *facts, digest.hexdigest(),
                   len(whole_TD))


def _table(source: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[str, str]]:
    """Features, slide and patient of every row, and of which encoder they are, as far as it is told."""
    try:
        table = pq.read_table(source)
    except (OSError, pa.ArrowInvalid) as error:
        raise ShardError(f"{source} is not a readable Parquet table ({str(error).splitlines()[0]}), nor a folder of "
                         "bags; write one with ssl-dist eval eval/embed") from None
    missing = [name for name in ("slide", "features") if name not in table.column_names]
    if missing or not len(table):
        raise ShardError(f"{source} has {len(table)} rows and columns {', '.join(table.column_names)}; it needs "
                         "slide and features, and may have patient")
    features = table["features"].combine_chunks()
    lengths = {len(row) if row is not None else 0 for row in features} if pa.types.is_list(features.type) \
        else {getattr(features.type, "list_size", 0)}
    if len(lengths) > 1 or not (width := lengths.pop()) or not pa.types.is_floating(features.type.value_type):
        raise ShardError(f"{source} has features of type {features.type}, not lists of so many numbers each; write "
                         "them as lists of float32 of one length")
    whole_TD = features.flatten().to_numpy(zero_copy_only=False).reshape(len(table), width).astype(np.float32)
    slide_T, patient_T = (np.array([str(each or "") for each in table[name].to_pylist()], dtype=object)
                          if name in table.column_names else np.full(len(table), "", dtype=object)
                          for name in ("slide", "patient"))
    facts = {key.decode(): value.decode(errors="replace") for key, value in (table.schema.metadata or {}).items()}
    return whole_TD, slide_T.astype(str), patient_T.astype(str), (facts.get("sha256", ""), facts.get("encoder", ""))
