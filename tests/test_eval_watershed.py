"""Nuclei from maps: planted ones come back, and neither strips nor what lies elsewhere change any."""

import itertools
import runpy
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from ssl_dist.eval import instances, watershed
from ssl_dist.eval.instances import Objects
from ssl_dist.eval.watershed import Rules, Strip, Whole
from ssl_dist.eval.windows import apart

ellipses = runpy.run_path(str(Path(__file__).with_name("planted.py")))["ellipses"]

RULES = Rules(edge=0.3, smallest=10)


def maps(numbers_HW: np.ndarray) -> Strip:
    return Strip((numbers_HW > 0).astype(np.float32), apart(numbers_HW), None)


def cut(whole: Strip, heights: list[int]) -> list[Strip]:
    """Strips of so many rows, the last one as high as is left."""
    edges = [0, *itertools.accumulate(heights), len(whole.nuclear_HW)]
    return [Strip(whole.nuclear_HW[low:high], whole.apart_2HW[:, low:high],
                  None if whole.types_CHW is None else whole.types_CHW[:, low:high])
            for low, high in itertools.pairwise(edges) if high > low]


def parted(strips: list[Strip], rules: Rules = RULES) -> Whole:
    size = sum(len(each.nuclear_HW) for each in strips), strips[0].nuclear_HW.shape[1]
    return watershed.whole(strips, size, rules)


def quality(truth_HW: np.ndarray, found_HW: np.ndarray) -> float:
    return instances.measured([instances.tally(Objects.of(truth_HW), Objects.of(found_HW), 0)], [], [""])(None)["pq"]


@pytest.mark.parametrize("side", [600, 450])
def test_five_hundred_planted_ellipses_come_back_though_half_of_the_picture_is_full_of_them(side: int) -> None:
    truth_HW = ellipses((side, side), 500, 0)
    assert ndimage.label(truth_HW, np.ones((3, 3)))[1] < 450        # many touch
    assert quality(truth_HW, parted([maps(truth_HW)]).numbers_HW) > 0.95


def noisy(seed: int) -> Strip:
    """Maps as a bad network gives them: clumps with holes, of all sizes, one of them from top to bottom."""
    rng = np.random.default_rng(seed)
    nuclear = ndimage.gaussian_filter(rng.normal(size=(150, 90)), 2.5)
    nuclear = 0.45 + nuclear / (4 * nuclear.std())
    nuclear[:, 40:43] = 0.8
    slopes = np.stack([ndimage.gaussian_filter(rng.normal(size=(150, 90)), 3) for _ in range(2)])
    slopes = np.clip(np.round(slopes / slopes.std()), -1, 1)     # plateaus, where slopes are equal
    return Strip(nuclear.astype(np.float16), slopes.astype(np.float16), rng.random((2, 150, 90)).astype(np.float16))


@pytest.mark.parametrize("seed", range(3))
def test_strips_of_any_height_give_the_same_nuclei_to_the_last_bit(seed: int) -> None:
    whole, rng = noisy(seed), np.random.default_rng(seed)
    truth = parted([whole])
    assert len(truth.size_N) > 20
    for heights in ([1] * 150, [7] * 22, [64, 64], rng.integers(1, 40, 12).tolist()):
        found = parted(cut(whole, heights))
        for name in ("numbers_HW", "middle_N2", "size_N", "nuclear_N", "types_NC"):
            assert (getattr(found, name) == getattr(truth, name)).all(), (name, heights)


def test_a_nucleus_does_not_depend_on_what_lies_beyond_its_clump() -> None:
    """Of a window of the maps, every clump that lies in it whole, with all that its slopes look at, is as before."""
    whole = noisy(5)
    whole.nuclear_HW[:, 40:43] = 0      # or all would hang together
    truth_HW = parted([whole]).numbers_HW
    top, left, high, wide = 11, 5, 130, 80
    window = Strip(*(each[..., top:top + high, left:left + wide] for each in whole))       # type: ignore[arg-type]
    found_HW = parted([window]).numbers_HW
    clumps_HW, _ = ndimage.label(whole.nuclear_HW >= watershed.NUCLEAR)
    rim = watershed.RADIUS
    seen = 0
    for number, (rows, columns) in enumerate(ndimage.find_objects(clumps_HW), start=1):
        if rows.start >= top + rim and rows.stop <= top + high - rim and columns.start >= left + rim \
                and columns.stop <= left + wide - rim:
            own = clumps_HW[top:top + high, left:left + wide] == number
            before = truth_HW[top:top + high, left:left + wide][own].tolist()
            pairs = {*zip(before, found_HW[own].tolist(), strict=True)}
            assert len(pairs) == len({one for one, _ in pairs}) == len({other for _, other in pairs})
            assert all((one > 0) == (other > 0) for one, other in pairs)
            seen += len(pairs)
    assert seen > 4


def test_numbers_count_first_pixels_and_facts_are_of_their_own_nucleus() -> None:
    truth_HW = ellipses((120, 150), 30, 1)
    found = parted(cut(maps(truth_HW), [50]))
    numbers_HW = found.numbers_HW
    firsts = [np.flatnonzero(numbers_HW == number)[0] for number in range(1, numbers_HW.max() + 1)]
    assert firsts == sorted(firsts)
    for number in (1, 7, numbers_HW.max()):
        y, x = np.nonzero(numbers_HW == number)
        assert found.size_N[number - 1] == len(y)
        assert found.middle_N2[number - 1] == pytest.approx((x.mean(), y.mean()))


def test_a_hole_in_a_marker_is_closed_and_a_small_clump_is_a_nucleus() -> None:
    numbers_HW = np.zeros((60, 60), np.int32)
    y, x = np.mgrid[:60, :60]
    numbers_HW[(y - 25) ** 2 + (x - 25) ** 2 < 15 ** 2] = 1
    whole = maps(numbers_HW)
    whole.apart_2HW[:, 23:28, 23:28] = 0            # a network that is unsure of the middle
    whole.apart_2HW[0, 23:28, 22] = 0.6             # and steep beside it
    whole.nuclear_HW[50:54, 50:54] = 1              # smaller than any disc that markers are opened by
    found = parted([whole])
    assert sorted(found.size_N.tolist()) == [16, int((numbers_HW > 0).sum())]


def test_a_clump_too_tall_to_wait_for_is_parted_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watershed, "TALLEST", 60)
    whole = noisy(0)
    found = parted(cut(whole, [10] * 14))
    assert found.cut > 0 and found.numbers_HW.max() > 0
    assert parted([noisy(0)]).cut == 0              # one strip waits for nothing


def test_nothing_is_found_where_nothing_is() -> None:
    empty = Strip(np.zeros((30, 40), np.float16), np.zeros((2, 30, 40), np.float16), None)
    found = parted(cut(empty, [10, 10]))
    assert not found.numbers_HW.any() and len(found.size_N) == 0 and found.middle_N2.shape == (0, 2)
