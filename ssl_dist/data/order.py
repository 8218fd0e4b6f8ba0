"""The order of one dataset's samples in any epoch: a pure function of (seed, epoch, position).

An epoch visits every sample once. Tars are put in a random order and taken `window` at a time; the samples of a window
are permuted together. Tars were shuffled across slides when they were written, so a window is as good as the whole, and
memory holds a few windows, never an epoch.
"""

from functools import lru_cache

import numpy as np

# The last word of the counter keeps the draws apart: augment.py uses 0, mixture.py 3.
TARS, SAMPLES = 1, 2


def permutation(seed: int, epoch: int, purpose: int, part: int, length: int, dataset: int = 0) -> np.ndarray:
    """A random order of `length` things.

    Sorting Philox's raw words, and not numpy's `permutation`: the words are fixed by the algorithm's definition, while
    what numpy makes of them may change with a release, and a run must resume under the next one.
    """
    words = np.random.Philox(key=[seed, epoch], counter=[0, part, dataset, purpose]).random_raw(length)
    return np.argsort(words, kind="stable")


class Order:
    """The order of every epoch over tars of `counts` samples each; datasets of one run are ordered independently."""

    def __init__(self, counts: np.ndarray, *, seed: int, window: int, dataset: int = 0):
        self.counts, self.seed, self.window, self.dataset = np.asarray(counts, np.int64), seed, window, dataset
        self.samples = int(self.counts.sum())
        self._windows = lru_cache(maxsize=4)(self._window_of)
        self._orders = lru_cache(maxsize=2)(self._order_of)

    def locate(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For places in the order of `epoch`: which tar, and which of its samples."""
        _, ends = self._orders(epoch)
        tars, members = np.empty((2, len(positions)), dtype=np.int64)
        window = np.searchsorted(ends, positions, side="right")
        for number in np.unique(window):
            here = window == number
            start = ends[number - 1] if number else 0
            window_tars, window_members = self._windows(epoch, int(number))
            tars[here] = window_tars[positions[here] - start]
            members[here] = window_members[positions[here] - start]
        return tars, members

    def _order_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = permutation(self.seed, epoch, TARS, 0, len(self.counts), self.dataset)
        ends = np.cumsum(self.counts[order])
        return order, ends[np.append(np.arange(self.window, len(order), self.window), len(order)) - 1]

    def _window_of(self, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        tars = self._orders(epoch)[0][number * self.window:(number + 1) * self.window]
        counts = self.counts[tars]
        shuffled = permutation(self.seed, epoch, SAMPLES, number, int(counts.sum()), self.dataset)
        starts = np.cumsum(counts) - counts
        place = np.searchsorted(np.cumsum(counts), shuffled, side="right")
        # 32 bits: 57 datasets have a few windows in memory each.
        return tars[place].astype(np.int32), (shuffled - starts[place]).astype(np.int32)
