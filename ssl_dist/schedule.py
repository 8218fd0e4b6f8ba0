"""Learning rates and their like as functions of progress: 0 at the first step, 1 after the last."""

import math


def cosine(progress: float, start: float, end: float) -> float:
    """Half a cosine from `start` to `end`."""
    return end + (start - end) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


def warmup_cosine(progress: float, peak: float, end: float, warmup: float) -> float:
    """A straight line from 0 to `peak` over the first `warmup` of the run, then half a cosine down to `end`."""
    if progress < warmup:
        return peak * progress / warmup
    return cosine((progress - warmup) / max(1 - warmup, 1e-12), peak, end)
