"""Tiles that cannot be used: each is listed once and counted against a budget, and another takes its place.

Which one follows from the place alone (`instead`): every rank, and every attempt at the run, puts the same tile there.
"""

import fcntl
import json
import logging
import os
from pathlib import Path

import numpy as np

from shards.index import ShardError

logger = logging.getLogger(__name__)

INSTEAD = 4         # the last word of Philox's counter; order.py, mixture.py and augment.py use 0 to 3


class Quarantine:
    """The list of a run, shared by its ranks: quarantine.jsonl, a line a tile."""

    def __init__(self, path: Path, budget: int):
        self.path, self.budget = path, budget
        self.listed = self._tiles()

    def add(self, key: str, tar: str, offset: int, reason: str) -> None:
        """Lists a tile, unless it is; over the budget, the run ends: so much damage is no accident of a few tiles."""
        if (tile := name(key, tar)) in self.listed:
            return
        line = json.dumps({"key": key, "tar": tar, "offset": offset, "reason": reason}) + "\n"
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)          # ranks, which may meet the same tile
            self.listed |= self._tiles()
            if tile not in self.listed:
                size = os.fstat(descriptor).st_size
                torn = size and os.pread(descriptor, 1, size - 1) != b"\n"      # by a kill: not ours as well
                os.write(descriptor, ("\n" * bool(torn) + line).encode())
                self.listed.add(tile)
                if len(self.listed) == 1:
                    logger.warning("tile %s cannot be used (%s); it and any other are listed in %s, and sound ones "
                                   "take their places", key, reason, self.path)
        finally:
            os.close(descriptor)
        if (count := len(self.listed)) > self.budget:
            raise ShardError(f"{count} tile{'s' * (count > 1)} cannot be used, data.max_bad={self.budget}; "
                             f"{self.path} lists them, the last is {key} ({reason}). Run: ssl-dist check "
                             f"{Path(tar).parent} --decode")

    def _tiles(self) -> set[tuple[str, str]]:
        """The tiles that any rank listed; a line cut short by a kill is no line."""
        tiles = set()
        if self.path.is_file():
            for line in self.path.read_text().splitlines():
                try:
                    content = json.loads(line)
                    tiles.add(name(content["key"], content["tar"]))
                except (ValueError, KeyError, TypeError):
                    continue
        return tiles


def name(key: str, tar: str) -> tuple[str, str]:
    """One tile, wherever the shard folders lie: keys are unique within a dataset, and datasets may share some."""
    return key, "/".join(Path(tar).parts[-2:])


def instead(seed: int, epoch: int, position: int, turn: int, samples: int) -> int:
    """Which of the `samples` of its tar takes the place of a tile at `position`, at the `turn`-th try."""
    return int(np.random.Philox(key=[seed, epoch], counter=[turn, position, 0, INSTEAD]).random_raw(1)[0] % samples)
