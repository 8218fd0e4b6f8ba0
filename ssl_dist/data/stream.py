"""Which samples make batch t: a pure function of (seed, t). There is no reader to save and none to restore.

Of one mixture, the natural one, an epoch is every sample once, in the order that `order.py` gives to all tars together.
Of any other, mixture.py says which dataset each sample of the run is of; each dataset goes through its own epochs, so a
small one is repeated, and a large one gives no sample twice before all have had their turn.
"""

from functools import lru_cache

import numpy as np

from shards.index import ShardError
from ssl_dist.data import mixture
from ssl_dist.data.order import Order


class Stream:
    """The batches of a run over tars of `counts` samples each.

    `datasets` says of each tar which dataset it is of, and `shares` how much of the run each dataset gets; without them
    every sample is as likely as any other.
    """

    def __init__(self, counts: np.ndarray, *, seed: int, window: int, batch: int, datasets: np.ndarray | None = None,
                 shares: np.ndarray | None = None):
        self.seed, self.batch = seed, batch
        self.samples = int(np.sum(counts))
        self.steps_an_epoch = self.samples // batch     # who falls into the tail of one epoch, may lead the next
        if not self.steps_an_epoch:
            raise ShardError(f"the shards hold {self.samples} samples of the wanted kind, and one step takes "
                             f"data.batch={batch}; choose a smaller batch or shard more")
        if shares is None or datasets is None:
            self._mixture, self._tars = None, [np.arange(len(counts))]
        else:
            self._mixture = mixture.Mixture(shares, seed)
            self._tars = [np.flatnonzero(np.asarray(datasets) == number) for number in range(len(shares))]
        self._windows = lru_cache(maxsize=4)(self._window_of)
        self._orders = [Order(np.asarray(counts)[tars], seed=seed, window=window, dataset=number)
                        for number, tars in enumerate(self._tars)]

    def epoch(self, step: int) -> int:
        """The epoch that step (from 0) belongs to: as many samples as there are."""
        return step // self.steps_an_epoch

    def positions(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """Places in the epoch that make `rank`'s share of the global batch `step`."""
        share = self.batch // world
        first = (step % self.steps_an_epoch) * self.batch + rank * share
        return np.arange(first, first + share)

    def locate(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For places in `epoch`: which tar, and which of its samples."""
        if self._mixture is None:
            return self._orders[0].locate(epoch, positions)
        places = epoch * self.steps_an_epoch * self.batch + positions
        tars, members = np.empty((2, len(positions)), np.int64)
        window = places // mixture.WINDOW
        for number in np.unique(window).tolist():
            here = window == number
            tars[here], members[here] = self._windows(number)[:, places[here] - number * mixture.WINDOW]
        return tars, members

    def tars(self, start: int, stop: int) -> list[int]:
        """The tars that steps start .. stop - 1 take samples from, each once, in the order in which they are needed."""
        found: dict[int, None] = {}
        while start < stop:
            epoch, place = divmod(start, self.steps_an_epoch)
            steps = min(stop - start, self.steps_an_epoch - place)      # the rest lies in the next epoch
            tars, _ = self.locate(epoch, np.arange(place * self.batch, (place + steps) * self.batch))
            found |= dict.fromkeys(tars.tolist())
            start += steps
        return list(found)

    def _window_of(self, number: int) -> np.ndarray:
        """Tars and members of one window of a mixture: a dataset at a time, for it goes through its own epochs."""
        assert self._mixture is not None
        datasets, start, end = self._mixture.window(number)
        found = np.empty((2, len(datasets)), np.int64)
        places = np.argsort(datasets, kind="stable")        # each dataset's in a row, its first place first
        done = 0
        for order, tars, first, last in zip(self._orders, self._tars, start, end, strict=True):
            while first < last:
                turn, position = divmod(first, order.samples)
                count = min(last - first, order.samples - position)
                within, members = order.locate(turn, np.arange(position, position + count))
                found[:, places[done:done + count]] = tars[within], members
                first, done = first + count, done + count
        return found
