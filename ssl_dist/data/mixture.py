"""Which dataset each sample is of: counts that hold over any stretch of the run, places by lot within a window.

A dataset of share s is due at times 0.5/s, 1.5/s, 2.5/s, ..., counted in samples, and samples go to datasets in the
order in which they are due. So after n samples each has had s*n of them to within about one, and how many is a
function of n alone: nothing is counted along the way, and a run may begin anywhere.
"""

import numpy as np

from ssl_dist.data.order import permutation

WINDOW = 4096       # samples whose places are drawn together; their counts by dataset are exact
PLACES = 3          # the last word of the counter: order.py uses 1 and 2, augment.py 0
UNIT = 1 << 32      # shares are counted in these


def shares(sizes: np.ndarray, temperature: float | None, weights: np.ndarray | None = None) -> np.ndarray:
    """Whole-number shares of datasets of `sizes` samples: by explicit weights, or by size to the power 1/temperature.

    A temperature of 1 is the natural mixture, None an even one (Ciga et al. draw alike from each dataset).
    """
    if weights is None:
        weights = np.ones(len(sizes)) if temperature is None else np.asarray(sizes, float) ** (1 / temperature)
    wanted = np.where(np.asarray(sizes) > 0, weights, 0.0)
    if not wanted.any():
        return np.zeros(len(wanted), np.int64)
    return np.where(wanted > 0, np.maximum(np.round(wanted / wanted.sum() * UNIT), 1), 0).astype(np.int64)


class Mixture:
    """The datasets of all samples of a run, from any sample on."""

    def __init__(self, shares: np.ndarray, seed: int):
        self.shares, self.seed = [int(share) for share in shares], seed
        self.total = sum(self.shares)

    def before(self, samples: int) -> list[int]:
        """How many of the first `samples` are of each dataset."""
        counts = [(2 * share * samples + self.total) // (2 * self.total) for share in self.shares]
        while (over := sum(counts) - samples) > 0:      # due at the same time as others, or a moment before
            last = max((self._due(d, counts[d] - 1), d) for d in range(len(counts)) if counts[d])[1]
            counts[last] -= 1
        for _ in range(-over):
            counts[min((self._due(d, counts[d]), d) for d in range(len(counts)) if self.shares[d])[1]] += 1
        return counts

    def window(self, number: int) -> tuple[np.ndarray, list[int], list[int]]:
        """The dataset of each sample of a window, and how many each dataset has had before and after it.

        Each dataset goes on in its own order: its first place in the window is its next sample.
        """
        start, end = self.before(number * WINDOW), self.before((number + 1) * WINDOW)
        of = np.repeat(np.arange(len(start)), np.subtract(end, start))
        return of[permutation(self.seed, 0, PLACES, number, WINDOW)], start, end

    def _due(self, dataset: int, number: int) -> int:
        """When a sample is due, in so small a unit that different times stay different: shares have 33 bits at most."""
        return ((2 * number + 1) << 128) // self.shares[dataset]
