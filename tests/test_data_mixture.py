"""Which dataset a sample is of: held against a queue that hands samples out one by one, and against the shares."""

import heapq
from fractions import Fraction

import numpy as np
import pytest

from ssl_dist.data import mixture
from ssl_dist.data.mixture import Mixture
from ssl_dist.data.stream import Stream


def handed_out(shares: list[int], samples: int) -> list[int]:
    """The datasets of the first samples, from a queue of what is due next."""
    queue = [(Fraction(1, 2 * share), dataset, 0) for dataset, share in enumerate(shares) if share]
    heapq.heapify(queue)
    found = []
    for _ in range(samples):
        _, dataset, number = heapq.heappop(queue)
        found.append(dataset)
        heapq.heappush(queue, (Fraction(2 * number + 3, 2 * shares[dataset]), dataset, number + 1))
    return found


@pytest.mark.parametrize("shares", [[1], [1, 1], [1, 1, 1], [5, 3, 2], [1000, 1], [0, 7, 0, 3], [3, 3, 3, 1, 1, 2**32],
                                    list(range(1, 58))], ids=str)
def test_counts_after_any_number_of_samples_are_those_of_a_queue(shares: list[int]) -> None:
    of, truth = Mixture(np.array(shares), 0), handed_out(shares, 700)
    for samples in [*range(60), 99, 100, 333, 699, 700]:
        assert of.before(samples) == np.bincount(truth[:samples], minlength=len(shares)).tolist(), samples


def test_counts_never_go_back_and_stay_near_their_shares_however_far_the_run() -> None:
    rng = np.random.default_rng(0)
    shares = mixture.shares(rng.integers(100, 10**7, 57), 2.0)
    of = Mixture(shares, 0)
    last = np.zeros(57, np.int64)
    for samples in np.cumsum(rng.integers(1, 10**9, 300)).tolist():
        counts = np.array(of.before(samples))
        assert counts.sum() == samples and (counts >= last).all()
        assert np.abs(counts - shares / shares.sum() * samples).max() < 1.5
        last = counts


def test_every_window_holds_its_shares_and_its_places_are_drawn_by_lot() -> None:
    of = Mixture(np.array([5, 3, 2]), 7)
    for window in (0, 1, 10**6):
        datasets, start, end = of.window(window)
        assert np.abs(np.bincount(datasets) - np.array([0.5, 0.3, 0.2]) * mixture.WINDOW).max() < 2
        assert (start, end) == (of.before(window * mixture.WINDOW), of.before((window + 1) * mixture.WINDOW))
        assert np.bincount(datasets).tolist() == np.subtract(end, start).tolist()
        halves = [np.bincount(half, minlength=3) for half in np.split(datasets, 2)]
        assert np.abs(halves[0] - halves[1]).max() < 6 * np.sqrt(mixture.WINDOW) / 2
        assert (np.diff(datasets) != 0).mean() == pytest.approx(1 - 0.25 - 0.09 - 0.04, abs=0.05), "by chance"


def test_shares_are_even_natural_by_temperature_or_explicit() -> None:
    sizes = np.array([100, 10_000, 0, 900])
    assert mixture.shares(sizes, None).tolist() == pytest.approx([mixture.UNIT / 3] * 2 + [0, mixture.UNIT / 3], abs=1)
    natural = mixture.shares(sizes, 1.0)
    assert (natural / natural.sum()).tolist() == pytest.approx([100 / 11_000, 10_000 / 11_000, 0, 900 / 11_000])
    root = np.sqrt(sizes)
    half = mixture.shares(sizes, 2.0)
    assert (half / half.sum()).tolist() == pytest.approx((root / root.sum()).tolist())
    told = mixture.shares(sizes, None, np.array([3.0, 1.0, 5.0, 0.0]))
    assert told.tolist() == [mixture.UNIT * 3 // 4, mixture.UNIT // 4, 0, 0], "no samples or no weight, no share"
    assert (mixture.shares(np.array([1, 10**12]), 1.0) > 0).all(), "however small, it is not forgotten"


# --- in the stream


COUNTS = np.array([30, 31, 0, 500, 480, 7])
DATASETS = np.array([0, 0, 0, 1, 1, 2])


def mixed(**changes: object) -> Stream:
    return Stream(**{"counts": COUNTS, "seed": 7, "window": 2, "batch": 64, "datasets": DATASETS,       # type: ignore
                     "shares": np.array([1, 1, 1]), **changes})


def walked(of: Stream, steps: range) -> list[tuple[int, int]]:
    return [pair for step in steps
            for pair in zip(*(each.tolist() for each in of.locate(of.epoch(step), of.positions(step))), strict=True)]


def test_small_datasets_repeat_and_large_ones_give_none_twice_before_all_had_their_turn() -> None:
    of = mixed()
    seen = walked(of, range(2 * mixture.WINDOW // 64))
    for dataset, size in ((0, 61), (1, 980), (2, 7)):
        tars = [tar for tar, number in enumerate(DATASETS.tolist()) if number == dataset]
        mine = [pair for pair in seen if pair[0] in tars]
        assert abs(len(mine) - len(seen) / 3) < 2
        everything = {(tar, member) for tar in tars for member in range(COUNTS[tar])}
        for first in range(0, len(mine) - size + 1, size):
            assert set(mine[first:first + size]) == everything, (dataset, first)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_the_batch_is_the_same_on_any_number_of_ranks_and_at_any_step_asked_first(world: int) -> None:
    alone, ranks = mixed(), [mixed() for _ in range(world)]
    for step in (17, 3, 0, 200, 64, 65):
        located = [each.locate(each.epoch(step), each.positions(step, rank, world)) for rank, each in enumerate(ranks)]
        together = [pair for columns in located for pair in zip(*(each.tolist() for each in columns), strict=True)]
        assert together == walked(alone, range(step, step + 1))


def test_datasets_are_ordered_independently() -> None:
    counts, datasets = np.array([200, 200]), np.array([0, 1])
    of = Stream(counts, seed=3, window=4, batch=50, datasets=datasets, shares=np.array([1, 1]))
    seen = walked(of, range(8))
    first, second = ([member for tar, member in seen if tar == number] for number in (0, 1))
    assert sum(a == b for a, b in zip(first, second, strict=False)) < 12, "two of one size must not march in step"


def test_one_dataset_mixed_with_nothing_is_seen_once_an_epoch() -> None:
    of = Stream(np.array([64, 64]), seed=1, window=1, batch=32, datasets=np.array([0, 0]), shares=np.array([1]))
    seen = walked(of, range(4))
    assert len(set(seen)) == 128
