"""Figures of objects, held against plain loops over sets of pixels, and against cases known by hand."""

import itertools
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from ssl_dist.eval import instances
from ssl_dist.eval.instances import Objects

ellipses = runpy.run_path(str(Path(__file__).with_name("planted.py")))["ellipses"]


def squares(*boxes: tuple[int, int, int, int], size: int = 40) -> np.ndarray:
    """Numbered boxes: top, left, height, width."""
    found = np.zeros((size, size), np.int32)
    for number, (top, left, height, width) in enumerate(boxes, start=1):
        found[top:top + height, left:left + width] = number
    return found


def by_sets(truth_HW: np.ndarray, guess_HW: np.ndarray) -> dict[str, float]:
    """PQ, AJI and Dice as their papers write them, with sets of pixels."""
    def pixels(numbers_HW: np.ndarray) -> list[set[int]]:
        return [{*np.flatnonzero(numbers_HW == number).tolist()} for number in range(1, numbers_HW.max() + 1)]

    true, guessed = pixels(truth_HW), pixels(guess_HW)
    ratios = {(t, g): len(one & other) / len(one | other)
              for (t, one), (g, other) in itertools.product(enumerate(true), enumerate(guessed))}
    matched = {pair: ratio for pair, ratio in ratios.items() if ratio > 0.5}
    alone = (len(true) - len(matched)) + (len(guessed) - len(matched))
    shared = union = 0
    used = set()
    for t, one in enumerate(true):
        best = max(range(len(guessed)), key=lambda g: ratios[t, g], default=None)
        if best is None or ratios[t, best] == 0:
            union += len(one)
            continue
        shared, union = shared + len(one & guessed[best]), union + len(one | guessed[best])
        used.add(best)
    union += sum(len(other) for g, other in enumerate(guessed) if g not in used)
    all_true, all_guessed = set().union(*true), set().union(*guessed)
    return {"pq": sum(matched.values()) / (len(matched) + alone / 2), "dq": len(matched) / (len(matched) + alone / 2),
            "sq": sum(matched.values()) / max(len(matched), 1), "aji": shared / union,
            "dice": 2 * len(all_true & all_guessed) / (len(all_true) + len(all_guessed))}


TWO = squares((5, 5, 10, 10), (5, 15, 10, 10))
CASES = {
    "the same": (TWO, TWO),
    "touching, found as one": (TWO, squares((5, 5, 10, 20))),
    "one split in two": (squares((5, 5, 10, 20)), TWO),
    "one split in two unequally": (squares((5, 5, 10, 20)), squares((5, 5, 10, 14), (5, 19, 10, 6))),
    "one missed": (TWO, squares((5, 5, 10, 10))),
    "one that is none": (squares((5, 5, 10, 10)), TWO),
    "exactly half": (squares((5, 5, 10, 10)), squares((5, 5, 10, 20))),
    "shifted": (TWO, squares((7, 6, 10, 10), (4, 16, 10, 10))),
    "elsewhere": (squares((5, 5, 10, 10)), squares((25, 25, 10, 10))),
    "nothing found": (TWO, squares()),
}


@pytest.mark.parametrize("name", CASES)
def test_constructed_cases_are_what_the_papers_definitions_say(name: str) -> None:
    truth_HW, guess_HW = CASES[name]
    tally = instances.tally(Objects.of(truth_HW), Objects.of(guess_HW), 0)
    found = instances.measured([tally], [], [""])(None)
    truth = by_sets(truth_HW, guess_HW)
    for key in ("pq", "dq", "aji", "dice"):
        assert found[key] == pytest.approx(truth[key]), key
    if truth["dq"]:
        assert found["sq"] == pytest.approx(truth["sq"])
    else:       # of nothing that matched nobody can say how well
        assert np.isnan(found["sq"])
    assert found["pooled_pq"] == pytest.approx(truth["pq"])


def test_known_by_hand() -> None:
    def figures(name: str) -> dict[str, float]:
        return instances.measured([instances.tally(*map(Objects.of, CASES[name]), 0)], [], [""])(None)

    assert figures("the same")["pq"] == 1
    assert figures("one missed")["pq"] == pytest.approx(1 / 1.5)                   # one of two: 1 / (1 + 0.5)
    assert figures("exactly half")["pq"] == 0                                      # more than half, never half
    assert figures("one split in two unequally")["pq"] == pytest.approx(0.7 / 1.5)
    # AJI: the larger piece is shared, the smaller one is added to the union
    assert figures("one split in two unequally")["aji"] == pytest.approx(140 / 260)
    # Both true squares choose the one guess, which counts in both unions: the known over-penalty.
    assert figures("touching, found as one")["aji"] == pytest.approx(200 / 400)


@pytest.mark.parametrize("seed", range(4))
def test_crowds_are_what_sets_of_pixels_say(seed: int) -> None:
    truth_HW = ellipses((70, 70), 14, seed)
    guess_HW = np.roll(truth_HW, (seed, 1), axis=(0, 1)) * (np.random.default_rng(seed).random((70, 70)) > 0.1)
    guess_HW[guess_HW == 3] = 4         # merged
    guess_HW[guess_HW == 5] = 0         # missed
    guess_HW[60:66, 60:66] = 20         # none
    guess_HW = np.unique(guess_HW, return_inverse=True)[1].reshape(guess_HW.shape).astype(np.int32)
    found = instances.measured([instances.tally(Objects.of(truth_HW), Objects.of(guess_HW), 0)], [], [""])(None)
    assert {key: found[key] for key in ("pq", "dq", "sq", "aji", "dice")} == pytest.approx(by_sets(truth_HW, guess_HW))


def test_empty_regions_say_nothing_of_their_own_and_count_in_what_is_pooled() -> None:
    empty, one = squares(), squares((5, 5, 10, 10))
    vain = instances.tally(Objects.of(empty), Objects.of(one), 0)
    assert np.isnan(vain.pq_C[0]) and vain.counts_C3.tolist() == [[0, 1, 0]] and vain.dice == 0 and vain.aji == 0
    nothing = instances.tally(Objects.of(empty), Objects.of(empty), 0)
    assert np.isnan([nothing.pq_C[0], nothing.aji, nothing.dice]).all()
    right = instances.tally(Objects.of(one), Objects.of(one), 0)
    found = instances.measured([vain, nothing, right], [], [""] * 3)(None)
    assert found["pq"] == 1 and found["pooled_pq"] == pytest.approx(1 / 1.5)


def test_mpq_is_the_mean_over_types_of_a_region_then_regions_then_tissues() -> None:
    truth_HW = squares((0, 0, 8, 8), (0, 10, 8, 8), (0, 20, 8, 8))
    types_HW = np.choose(truth_HW, [0, 1, 1, 2]).astype(np.uint8)

    def region(guessed: list[int], present: int = 3) -> instances.Tally:
        """The same squares, called so; of the truth the first ones."""
        own = np.where(truth_HW <= present, truth_HW, 0)
        guess = Objects.of(own, np.choose(own, [0, *guessed]).astype(np.uint8))
        return instances.tally(Objects.of(own, np.where(own > 0, types_HW, 0).astype(np.uint8)), guess, 2)

    right, mistaken, without = region([1, 1, 2]), region([1, 2, 2]), region([1, 1, 2], present=2)
    # mistaken: type 1 has one of two (1 / 1.5), type 2 one and one in vain (1 / 1.5); without: type 1 alone
    assert mistaken.pq_C.tolist() == pytest.approx([1, 1 / 1.5, 1 / 1.5])
    assert np.isnan(without.pq_C[2])
    tissues = ["colon", "colon", "lung"]
    found = instances.measured([right, mistaken, without], ["a", "b"], tissues)(None)
    assert found["mpq"] == pytest.approx(((1 + 1 / 1.5) / 2 + 1) / 2)
    # Of all regions: type 1 has 2 + 1 + 2 right and one missed, type 2 has 1 + 1 right and one in vain.
    assert found["pooled_mpq"] == pytest.approx((5 / 5.5 + 2 / 2.5) / 2)
    # HoVer-Net's F1: 2 TP / (2 TP + 2 FP of type + 2 FN of type + FP + FN of detection)
    assert found["f1_a"] == pytest.approx(10 / 12) and found["f1_b"] == pytest.approx(4 / 6)
    assert found["f1_detection"] == 1
    assert mistaken.confusion_CC.tolist() == [[1, 1], [0, 1]]
    weighted = instances.measured([right, mistaken, without], ["a", "b"], tissues)(np.array([0.0, 2.0, 0.0]))
    assert weighted["mpq"] == pytest.approx(1 / 1.5)


def test_centres_are_paired_at_the_least_distance_in_all_and_none_beyond_the_limit() -> None:
    rng = np.random.default_rng(0)
    truth, guess = (Objects(np.zeros((1, 1), np.int32), rng.integers(1, 3, count), rng.uniform(0, 60, (count, 2)))
                    for count in (9, 11))
    near_C4 = instances._near(truth, guess, 2)
    rows, columns = linear_sum_assignment([[np.hypot(*(one - other)) for other in guess.middle_N2]
                                           for one in truth.middle_N2])
    pairs = [(t, g) for t, g in zip(rows, columns, strict=True)
             if np.hypot(*(truth.middle_N2[t] - guess.middle_N2[g])) <= instances.NEAR]
    assert 0 < len(pairs) < 9
    assert near_C4[0].tolist() == [len(pairs), 0, 0, (9 + 11 - 2 * len(pairs)) / 2]
    assert near_C4[1, 0] == sum(truth.types_N[t] == 1 == guess.types_N[g] for t, g in pairs)


def test_an_objects_type_is_that_of_most_of_its_pixels_and_nothing_is_no_type() -> None:
    numbers_HW = squares((0, 0, 4, 4), (10, 10, 4, 4))
    types_HW = np.zeros((40, 40), np.uint8)
    types_HW[0, 0:3], types_HW[1, 0:2] = 2, 1
    found = Objects.of(numbers_HW, types_HW)
    assert found.types_N.tolist() == [2, 0] and found.middle_N2.tolist() == [[1.5, 1.5], [11.5, 11.5]]


@pytest.mark.parametrize("seed", range(3))
def test_panoptic_quality_is_that_of_torchmetrics(seed: int) -> None:
    panoptic_quality = pytest.importorskip("torchmetrics.functional.detection").panoptic_quality
    truth_HW = ellipses((90, 90), 20, seed)
    guess_HW = np.roll(truth_HW, (seed, 2), axis=(0, 1))
    guess_HW[guess_HW == 3] = 4
    guess_HW[guess_HW == 5] = 0
    guess_HW = np.unique(guess_HW, return_inverse=True)[1].reshape(guess_HW.shape).astype(np.int32)
    pairs = [(each, ((each > 0) * (1 + each % 2)).astype(np.uint8)) for each in (guess_HW, truth_HW)]
    tally = instances.tally(*(Objects.of(*pair) for pair in reversed(pairs)), 2)
    for kinds, own_C in (((1, 2), tally.pq_C[1:]), ((1,), tally.pq_C[:1])):
        # Pairs of a class and a number; class 0 is what is no object.
        both = [torch.from_numpy(np.stack([types_HW if len(kinds) > 1 else types_HW > 0, numbers_HW], axis=-1))[None]
                for numbers_HW, types_HW in pairs]
        found = panoptic_quality(*(each.long() for each in both), things={*kinds}, stuffs={0}, return_per_class=True)
        assert own_C == pytest.approx(found[0, :len(kinds)].numpy(), abs=1e-6)
