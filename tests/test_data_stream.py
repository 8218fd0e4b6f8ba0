"""The order of samples: every epoch whole, the same on any number of ranks, and a function of numbers alone."""

import numpy as np
import pytest

from shards.index import ShardError
from ssl_dist.data.order import SAMPLES, TARS, permutation
from ssl_dist.data.stream import Stream

COUNTS = np.array([50, 51, 49, 50, 3, 50, 52, 0, 47, 50, 50, 48])       # 500 samples in 12 tars, one of them empty
BATCH = 12
M64 = 2**64 - 1


def stream(**changes: object) -> Stream:
    return Stream(**{"counts": COUNTS, "seed": 7, "window": 4, "batch": BATCH, **changes})       # type: ignore[arg-type]


def samples(of: Stream, step: int, rank: int = 0, world: int = 1) -> list[tuple[int, int]]:
    tars, members = of.locate(of.epoch(step), of.positions(step, rank, world))
    return list(zip(tars.tolist(), members.tolist(), strict=True))


def epoch(of: Stream, number: int) -> list[tuple[int, int]]:
    tars, members = of.locate(number, np.arange(of.samples))
    return list(zip(tars.tolist(), members.tolist(), strict=True))


def everything(counts: np.ndarray) -> set[tuple[int, int]]:
    return {(tar, member) for tar, count in enumerate(counts.tolist()) for member in range(count)}


def philox(key: tuple[int, int], counter: list[int], words: int) -> list[int]:
    """Philox 4x64-10 (Salmon et al. 2011), from the paper's definition; the counter is raised before every block."""
    number, found = sum(word << 64 * place for place, word in enumerate(counter)), []
    while len(found) < words:
        number += 1
        a, b, c, d = (number >> 64 * place & M64 for place in range(4))
        left, right = key
        for _ in range(10):
            first, second = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
            a, b, c, d = (second >> 64) ^ b ^ left, second & M64, (first >> 64) ^ d ^ right, first & M64
            left, right = (left + 0x9E3779B97F4A7C15) & M64, (right + 0xBB67AE8584CAA73B) & M64
        found += [a, b, c, d]
    return found[:words]


@pytest.mark.parametrize(("seed", "number", "purpose", "part", "length"),
                         [(0, 0, TARS, 0, 12), (7, 3, SAMPLES, 5, 101), (2**63 - 1, 10**6, SAMPLES, 2**40, 7)])
def test_a_permutation_is_the_rank_of_philox_words(seed: int, number: int, purpose: int, part: int,
                                                   length: int) -> None:
    words = philox((seed, number), [0, part, 0, purpose], length)
    expected = sorted(range(length), key=lambda place: words[place])
    assert permutation(seed, number, purpose, part, length).tolist() == expected


def test_the_order_has_not_been_renumbered() -> None:
    """Golden numbers: a run begun under an older version must find its order again."""
    assert permutation(7, 0, TARS, 0, 12).tolist() == [2, 10, 5, 7, 8, 1, 11, 9, 3, 4, 0, 6]
    assert samples(stream(), 0)[:4] == [(5, 26), (2, 7), (10, 21), (10, 33)]


@pytest.mark.parametrize("changes", [
    {}, {"window": 1}, {"window": 5}, {"window": 12}, {"window": 10**6}, {"batch": 1}, {"batch": 500},
    {"counts": np.array([37])}, {"counts": np.array([37]), "window": 9}, {"counts": np.array([0, 0, 20, 0])},
], ids=str)
def test_an_epoch_visits_every_sample_once(changes: dict) -> None:
    of = stream(**changes)
    for number in (0, 1, 5):
        order = epoch(of, number)
        assert len(order) == len(set(order))
        assert set(order) == everything(changes.get("counts", COUNTS))


def test_the_steps_of_an_epoch_are_its_order_without_the_tail() -> None:
    of = stream()
    steps = of.steps_an_epoch
    assert steps == 500 // BATCH
    for number in (0, 1, 2):
        walked = [sample for step in range(number * steps, (number + 1) * steps) for sample in samples(of, step)]
        assert walked == epoch(of, number)[:steps * BATCH]
        assert {of.epoch(step) for step in range(number * steps, (number + 1) * steps)} == {number}


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_global_batch_is_the_same_list_on_any_number_of_ranks(world: int) -> None:
    alone, ranks = stream(), [stream() for _ in range(world)]
    for step in (0, 1, 4, 40, 41, 42, 100):
        together = [sample for rank, each in enumerate(ranks) for sample in samples(each, step, rank, world)]
        assert together == samples(alone, step)


def test_steps_asked_for_in_any_order_and_twice_are_the_same() -> None:
    forward, jumping = stream(), stream()
    steps = list(range(130))
    expected = {step: samples(forward, step) for step in steps}
    for step in np.random.default_rng(0).permutation(steps * 2).tolist():
        assert samples(jumping, step) == expected[step]
    assert samples(stream(), 99) == expected[99]


def test_a_batch_that_crosses_the_edge_of_a_window_is_the_end_of_one_and_the_start_of_the_next() -> None:
    of = stream(window=2)
    order = permutation(of.seed, 0, TARS, 0, len(COUNTS))
    edge = int(COUNTS[order[:2]].sum())
    tars, _ = of.locate(0, np.arange(edge - 6, edge + 6))
    assert set(tars[:6].tolist()) <= set(order[:2].tolist())
    assert set(tars[6:].tolist()) <= set(order[2:4].tolist())
    assert list(zip(*(each.tolist() for each in of.locate(0, np.arange(edge - 6, edge + 6))), strict=True)) == \
        epoch(of, 0)[edge - 6:edge + 6]


def test_a_position_may_be_located_alone_or_among_any_others() -> None:
    of = stream()
    order, places = epoch(of, 2), np.random.default_rng(1).permutation(500)
    found = list(zip(*(each.tolist() for each in of.locate(2, places)), strict=True))
    assert found == [order[place] for place in places]


def test_epochs_differ_and_seeds_differ() -> None:
    orders = [epoch(stream(seed=seed), number) for seed in (7, 8) for number in (0, 1, 2)]
    for place, one in enumerate(orders):
        for other in orders[place + 1:]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 20        # 1 expected, 500 if they were equal


def test_a_window_mixes_its_tars() -> None:
    """Of a window of 4 tars of 50, the first 40 samples hold about ten of each: it is not read tar by tar."""
    of = stream(counts=np.full(16, 50))
    for number in range(5):
        tars, _ = of.locate(number, np.arange(40))
        assert len(set(tars.tolist())) == 4
        assert np.bincount(tars).max() <= 22         # hypergeometric: 4.9 standard deviations


def test_two_windows_of_an_epoch_are_permuted_differently() -> None:
    of = stream(counts=np.full(8, 25), window=4)
    place = np.argsort(permutation(of.seed, 0, TARS, 0, 8))
    tars, members = of.locate(0, np.arange(200))
    inside = place[tars] % 4 * 25 + members
    assert sorted(inside[:100].tolist()) == sorted(inside[100:].tolist()) == list(range(100))
    assert (inside[:100] == inside[100:]).sum() < 10


def test_the_order_is_near_uniform() -> None:
    """Where does one sample land? Chi-square over 4,000 orders of 40 places, four samples of different tars."""
    counts, orders = np.array([10, 10, 10, 10]), 4000
    of = Stream(counts, seed=3, window=2, batch=8)
    landed = np.zeros((4, 40))
    for number in range(orders):
        tars, members = of.locate(number, np.arange(40))
        for tar in range(4):
            landed[tar, np.flatnonzero((tars == tar) & (members == 3 * tar))[0]] += 1
    expected = orders / 40
    chi_square = ((landed - expected) ** 2 / expected).sum(axis=1)
    assert (chi_square < 85).all(), chi_square          # 39 degrees of freedom: 85 is one in fifty thousand
    assert (chi_square > 12).all(), chi_square          # and too even would be no chance either


def test_fewer_samples_than_a_batch_are_refused() -> None:
    with pytest.raises(ShardError, match=r"hold 500 samples.*data\.batch=501"):
        stream(batch=501)
    with pytest.raises(ShardError) as refused:
        stream(counts=np.array([0, 0]))
    assert refused.value.exit_code == 3
