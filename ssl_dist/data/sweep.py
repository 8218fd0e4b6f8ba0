"""Where tiles are decoded for a GPU: on the CPU's cores or by the GPU, whichever this machine does faster. Asked once.

Small tiles are no clear case: the GPU's engine takes baseline JPEG only and costs a call each, a core decodes thousands
a second. So both are tried on the tiles at hand, and what was found is kept in a file of the user's, by machine and
tiles.
"""

import contextlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from ssl_dist.data import dali

ROUNDS, SECONDS = 3, 0.3        # of each way, taken in turns; the first round only warms up


def fastest(ways: Iterable[str], machine: str, encoded: list[np.ndarray], rate: Callable[[str], float],
            kept: Path | None = None) -> str:
    """The way of the highest `rate`, from the file of earlier answers where this machine and such tiles are in it."""
    kept = kept or home()
    key = f"{machine}, {len(encoded)} tiles of {kilobytes(encoded)} kB"
    rates: dict[str, list[float]] = {way: [] for way in ways}
    if (known := read(kept).get(key, "")) in rates:
        return known
    for _ in range(ROUNDS):
        for way, each in rates.items():
            try:
                each.append(rate(way))
            except RuntimeError:        # this machine, or this kind of picture, cannot be decoded so
                each.append(0.0)
    found = max(rates, key=lambda way: statistics.median(rates[way][1:]))
    write(kept, {**read(kept), key: found})
    return found


def on_gpu(encoded: list[np.ndarray], threads: int, device_id: int) -> str:
    """The fastest way for tiles like these on this GPU, with so many threads."""
    def rate(way: str) -> float:
        decode = dali.Drawer((), len(encoded), threads, device_id, way)
        decode(encoded, [])
        batches, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < SECONDS:
            decode(encoded, [])
            batches += 1
        return batches * len(encoded) / elapsed

    return fastest(dali.WAYS, f"{dali.machine(device_id)}, {threads} threads", encoded, rate)


def kilobytes(encoded: list[np.ndarray]) -> int:
    """The size of a tile to the nearest power of two: what differs by less decodes alike."""
    mean = sum(len(each) for each in encoded) / len(encoded) / 1000
    return 2 ** round(math.log2(max(mean, 1)))


def home() -> Path:
    """The file of answers, where the XDG rules put what can be found out again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssl_dist" / "decode.json"


def read(path: Path) -> dict[str, str]:
    """Earlier answers; none where there is no file, or one that is not ours."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write(path: Path, answers: dict[str, str]) -> None:
    """Keeps the answers, if they can be kept: a home that cannot be written costs a second a run."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(answers, indent=2) + "\n")
        draft.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()
