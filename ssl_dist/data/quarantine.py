"""Tiles that cannot be used: each is listed once and counted against a budget, and another takes its place.

Which one follows from the place alone (`instead`): every rank, and every attempt at the run, puts the same tile there.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from shards.index import ShardError

INSTEAD = 4         # the last word of Philox's counter; order.py, mixture.py and augment.py use 0 to 3


class Quarantine:
    """The list of a run, shared by its ranks: quarantine.jsonl, a line a tile."""

    def __init__(self, path: Path, budget: int):
        self.path, self.budget = path, budget
        self.listed: set[str] = set(self._keys())

    def add(self, key: str, tar: str, offset: int, reason: str) -> None:
        """Lists a tile, unless it is; over the budget, the run ends: so much damage is no accident of a few tiles."""
        if key in self.listed:
            return
        self.listed.add(key)
        line = json.dumps({"key": key, "tar": tar, "offset": offset, "reason": reason}) + "\n"
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            torn = size and os.pread(descriptor, 1, size - 1) != b"\n"      # by a kill: it must not tear ours as well
            os.write(descriptor, ("\n" * bool(torn) + line).encode())       # one write: lines of ranks do not mix
        finally:
            os.close(descriptor)
        if (count := len(set(self._keys()))) > self.budget:
            raise ShardError(f"{count} tiles cannot be used, data.max_bad={self.budget}; {self.path} lists them, the "
                             f"last is {key} ({reason}). Run: ssl-dist check {Path(tar).parent} --decode")

    def _keys(self) -> list[str]:
        """The keys that any rank listed; a line cut short by a kill is no line."""
        keys: list[Any] = []
        if self.path.is_file():
            for line in self.path.read_text().splitlines():
                try:
                    keys.append(json.loads(line)["key"])
                except (ValueError, KeyError, TypeError):
                    continue
        return keys


def instead(seed: int, epoch: int, position: int, turn: int, samples: int) -> int:
    """Which of the `samples` of its tar takes the place of a tile at `position`, at the `turn`-th try."""
    return int(np.random.Philox(key=[seed, epoch], counter=[turn, position, 0, INSTEAD]).random_raw(1)[0] % samples)
