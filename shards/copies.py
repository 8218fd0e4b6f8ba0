"""Equal tiles, found by their digests however many there are: which of them stay, and a line for each that goes."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from shards import index, spool
from shards.settings import Settings


def kept(opened: dict[int, spool.Unit], settings: Settings) -> tuple[dict[int, np.ndarray], dict[str, int], str]:
    """Which rows of each unit stay; how many went for which reason; and their lines of rejected.jsonl.

    A part of all digests at a time, so that memory does not grow with the number of tiles.
    """
    keep = {number: np.ones(len(unit.rows), bool) for number, unit in opened.items()}
    if settings.duplicates == "keep" and not settings.against:
        return keep, {}, ""
    total = sum(len(unit.rows) for unit in opened.values())
    parts = -(-total // (4 * spool.ROWS_AT_ONCE)) or 1
    # By their place and not by their name, which several may share.
    others = [(path.name, _digests(index.column(index.samples(path), "digest"))) for path in settings.against]
    dropped: list[Dropped] = []
    for part in range(parts):
        rows, places = spool.placed({number: np.flatnonzero(_part(unit.rows["digest"], parts) == part)
                                     for number, unit in opened.items()}, opened)
        group = Part(rows, places, opened, keep)
        for name, digests in others:
            dropped += group.held_elsewhere(name, digests[_part(digests, parts) == part])
        if settings.duplicates == "drop":
            dropped += group.settled(settings.conflicts)
    counts = Counter(line["reason"] for line in dropped)
    return keep, {reason: counts[reason] for reason in sorted(counts)}, "".join(_lines(dropped, opened))


Dropped = dict[str, Any]        # a line of rejected.jsonl, but for the words of its slide: "unit" and "who" tell them


class Part:
    """The tiles of one part of all digests; equal ones lie in one part."""

    def __init__(self, rows: np.ndarray, places: np.ndarray, opened: dict[int, spool.Unit],
                 keep: dict[int, np.ndarray]):
        self.rows, self.places, self.opened, self.keep = rows, places, opened, keep
        self.digests = rows["digest"].copy().view("S16") if len(rows) else np.empty(0, "S16")   # which NumPy can sort

    def held_elsewhere(self, name: str, digests: np.ndarray) -> Iterator[Dropped]:
        """Drops what another folder holds already."""
        known = np.sort(digests.copy().view("S16")) if len(digests) else np.empty(0, "S16")
        if len(known) and len(self.digests):
            at = np.minimum(np.searchsorted(known, self.digests), len(known) - 1)
            for row in np.flatnonzero(known[at] == self.digests).tolist():
                if self._stays(row):
                    yield self._drop(row, "duplicate", f"is in {name} already")

    def settled(self, conflicts: str) -> Iterator[Dropped]:
        """Of tiles with the same content, in the order of their places, keeps one; none where their labels differ."""
        order = np.lexsort((self.rows["order"], self.digests))
        alike = self.digests[order]
        starts = np.flatnonzero(np.r_[True, alike[1:] != alike[:-1]]) if len(order) else np.empty(0, int)
        sizes = np.diff(np.r_[starts, len(order)])
        for start, size in zip(starts[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
            group = [row for row in order[start:start + size].tolist() if self._stays(row)]
            labels = {row: self.opened[int(self.rows["unit"][row])].labels[int(self.rows["label"][row])]
                      for row in group}
            said = sorted(set(labels.values()) - {""})
            if len(said) > 1 and conflicts == "drop":
                yield from (self._drop(row, "conflict", f"the same picture is labelled {', '.join(said)}")
                            for row in group)
                continue
            # A copy that is labelled says more than one that is not.
            for first in ([row for row in group if labels[row]] or group)[:1]:
                name = self.rows["key"][[first]].tolist()[0].decode()
                yield from (self._drop(row, "duplicate", f"of {name}") for row in group if row != first)

    def _stays(self, row: int) -> bool:
        return bool(self.keep[int(self.rows["unit"][row])][self.places[row]])

    def _drop(self, row: int, reason: str, detail: str) -> Dropped:
        told = self.rows[row]
        self.keep[int(told["unit"])][self.places[row]] = False
        mpp = float(told["mpp"])
        return {"unit": int(told["unit"]), "who": int(told["who"]), "x": int(told["x"]), "y": int(told["y"]),
                "mpp": None if np.isnan(mpp) else round(mpp, 6), "reason": reason, "detail": detail}


def _digests(column: Any) -> np.ndarray:
    """A column of the sample table as it lies in the map."""
    return np.frombuffer(column.buffers()[1], "V16")[column.offset:column.offset + len(column)]


def _part(digests: np.ndarray, parts: int) -> np.ndarray:
    """Which part each digest is in: its first byte decides."""
    return np.ascontiguousarray(digests).view(np.uint8).reshape(-1, 16)[:, 0] % parts


def _lines(dropped: list[Dropped], opened: dict[int, spool.Unit]) -> Iterator[str]:
    """In the order of the units, so that the words of each are read once."""
    unit, whos = -1, []     # type: ignore[var-annotated]
    for line in sorted(dropped, key=lambda line: (line["unit"], line["who"], line["x"], line["y"], line["mpp"] or 0)):
        if line["unit"] != unit:
            unit, whos = line["unit"], opened[line["unit"]].whos()
        slide, *_, file = whos[line["who"]]
        rest = {name: value for name, value in line.items() if name not in ("unit", "who")}
        yield json.dumps({"slide": slide, "file": file, **rest}) + "\n"
