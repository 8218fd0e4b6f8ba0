"""Features that were computed once: kept under what decides them, and read only if they are what was written."""

import hashlib
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, from_numpy

from shards import folder

logger = logging.getLogger(__name__)

FORMAT = 1      # of the features: another one where the pixels that an encoder sees change


class Cache:
    """A folder of arrays; None keeps nothing."""

    def __init__(self, root: Path | None):
        self.root = root

    def get(self, facts: dict[str, Any], make: Callable[[], Tensor]) -> Tensor:
        """The array that `facts` decide, computed if it is not there or not whole."""
        if self.root is None:
            return make()
        key = hashlib.sha256(json.dumps({**facts, "format": FORMAT}, sort_keys=True).encode()).hexdigest()[:32]
        for path in self.root.glob(f"{key}-*.npy"):
            data = path.read_bytes()
            if path.stem.rpartition("-")[2] == hashlib.sha256(data).hexdigest()[:32]:
                return from_numpy(np.load(io.BytesIO(data), allow_pickle=False))
            logger.warning("%s is damaged and is computed anew", path)
            path.unlink()
        made, buffer = make(), io.BytesIO()
        np.save(buffer, made.numpy(), allow_pickle=False)
        data = buffer.getvalue()
        folder.write(folder.make(self.root) / f"{key}-{hashlib.sha256(data).hexdigest()[:32]}.npy", data)
        return made
