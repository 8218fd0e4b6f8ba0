"""From maps of pixels to nuclei: parted where the maps of distances fall, whatever the pieces that the maps come in.

The way is HoVer-Net's (vqdang/hover_net, post_proc.py: "code"): nuclear pixels, markers where no border runs, a
watershed from the markers. Two of its steps look at the whole picture, so that a nucleus would depend on others far
away: slopes are scaled by the steepest of the picture, and the flood breaks ties by the order of a queue. Here a slope
is measured against that of two nuclei that touch (a step from 1 to -1), and pixels flood in an order without ties.

Maps come in strips, from the top down. A clump of pixels that hang together is parted once its last row is known, and
rows are kept until then: what a nucleus becomes does not depend on the strips. The only skimage.

H, W pixels of a strip   C types and background   N nuclei
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from skimage.segmentation import watershed

NUCLEAR = 0.5           # code: likely enough to be of a nucleus
SIGMA = 2.2             # pixels: as smooth as a Sobel kernel of 21 (code), whose binomial weights have this deviation
RADIUS = 9              # pixels of that kernel that count, 4 deviations
DISC = np.array([[0, 0, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0]], bool)    # code
# How steeply a smoothed step from 1 down to -1 falls, by which slopes are measured.
STEEP = 2 / (SIGMA * np.sqrt(2 * np.pi))
TALLEST = 8192          # rows: a clump of more is parted as far as it is known, or memory would have no end


class Strip(NamedTuple):
    """Maps of some rows of a region, over its whole width."""

    nuclear_HW: np.ndarray              # how likely a pixel is of a nucleus
    apart_2HW: np.ndarray               # from the nucleus' middle: horizontally, vertically
    types_CHW: np.ndarray | None        # how likely each type is


class Rules(NamedTuple):
    """What is a border, and what is a nucleus."""

    edge: float         # of STEEP, from which a slope is a border
    smallest: int       # pixels of a nucleus, and of a marker


@dataclass
class Nuclei:
    """Some nuclei, and the pixels around them: numbers from 1 on, in the order of their first pixels."""

    top: int                            # row of the region at which `numbers_HW` begins
    numbers_HW: np.ndarray              # int32
    first_N2: np.ndarray                # row and column of the region
    middle_N2: np.ndarray               # x, y of the centre of mass, in pixels of the region
    size_N: np.ndarray                  # pixels
    nuclear_N: np.ndarray               # the mean likelihood of being of a nucleus
    types_NC: np.ndarray | None         # the mean likelihood of each type

    @property
    def count(self) -> int:
        """How many."""
        return len(self.size_N)


@dataclass
class Parting:
    """What is kept between strips: rows of maps from `top` on, and which of their pixels are not parted yet."""

    rules: Rules
    top: int = 0
    kept: Strip | None = None
    open_HW: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), bool))
    cut: int = 0                        # clumps that were too tall

    def of(self, strips: Iterable[Strip]) -> Iterator[Nuclei]:
        """All nuclei of a region, in portions."""
        before = None
        for strip in strips:
            if before is not None and (found := self._add(before, last=False)) is not None:
                yield found
            before = strip
        if before is not None and (found := self._add(before, last=True)) is not None:
            yield found

    def _add(self, strip: Strip, last: bool) -> Nuclei | None:
        """The nuclei that are known now; `last`: nothing lies below."""
        maps = strip if self.kept is None else _stacked(self.kept, strip)
        fresh_HW = strip.nuclear_HW >= NUCLEAR
        open_HW = fresh_HW if self.kept is None else np.concatenate([self.open_HW, fresh_HW])
        clumps_HW, count = ndimage.label(open_HW)
        boxes = ndimage.find_objects(clumps_HW)
        height = len(open_HW)
        # Complete with all rows that its slopes look at, or else too tall to wait for.
        known_C = np.zeros(count + 1, bool)
        first = height
        for number, (rows, _) in enumerate(boxes, start=1):
            tall = height - rows.start > TALLEST
            known_C[number] = last or rows.stop + RADIUS <= height or tall
            self.cut += tall and not last and rows.stop == height
            if not known_C[number]:
                first = min(first, rows.start)
        now_HW = known_C[clumps_HW]
        found = _parted(self.top, maps, now_HW, self.rules) if now_HW.any() else None
        keep = max(0, min(first, height) - RADIUS)
        self.open_HW = (open_HW & ~now_HW)[keep:]
        self.kept = _rows(maps, keep)
        self.top += keep
        return found


def _stacked(upper: Strip, lower: Strip) -> Strip:
    return Strip(np.concatenate([upper.nuclear_HW, lower.nuclear_HW]),
                 np.concatenate([upper.apart_2HW, lower.apart_2HW], axis=1),
                 None if lower.types_CHW is None or upper.types_CHW is None
                 else np.concatenate([upper.types_CHW, lower.types_CHW], axis=1))


def _rows(maps: Strip, first: int) -> Strip:
    # Copies: a view would keep all rows in memory.
    return Strip(maps.nuclear_HW[first:].copy(), maps.apart_2HW[:, first:].copy(),
                 None if maps.types_CHW is None else maps.types_CHW[:, first:].copy())


def _parted(top: int, maps: Strip, now_HW: np.ndarray, rules: Rules) -> Nuclei | None:
    """The nuclei among some clumps; every step but the slopes stays inside a clump."""
    rows = np.flatnonzero(now_HW.any(axis=1))
    low, high = max(0, rows[0] - RADIUS), min(len(now_HW), rows[-1] + 1 + RADIUS)
    falls_HW = falls(maps.apart_2HW[:, low:high])[rows[0] - low:rows[-1] + 1 - low]
    own = slice(int(rows[0]), int(rows[-1]) + 1)
    now_HW = now_HW[own]
    markers_HW = _markers(now_HW, falls_HW, rules)
    order = np.argsort(falls_HW[now_HW], kind="stable")
    ranks = np.empty(len(order))
    ranks[order] = np.arange(len(order))        # of equal slopes the upper left first: no two alike
    levels_HW = np.zeros(now_HW.shape)
    levels_HW[now_HW] = ranks
    flooded_HW = watershed(levels_HW, markers_HW, mask=now_HW)
    return _described(top + own.start, flooded_HW, Strip(
        maps.nuclear_HW[own], maps.apart_2HW[:, own], None if maps.types_CHW is None else maps.types_CHW[:, own]),
        rules)


def falls(apart_2HW: np.ndarray) -> np.ndarray:
    """How steeply a map falls, the horizontal one to the right or the vertical one downwards; 1: two nuclei touch."""
    found = []
    for values_HW, axis in zip(apart_2HW, (1, 0), strict=True):
        values_HW = values_HW.astype(np.float32)
        for along in (0, 1):
            values_HW = ndimage.gaussian_filter1d(values_HW, SIGMA, axis=along, order=int(along == axis),
                                                  mode="nearest", radius=RADIUS)
        found.append(values_HW)
    return np.maximum(-np.minimum(*found) / STEEP, 0)


def _markers(now_HW: np.ndarray, falls_HW: np.ndarray, rules: Rules) -> np.ndarray:
    """Numbers of the places that floods start from: where no border runs, without threads that hang on to it."""
    inside_HW = now_HW & (falls_HW < rules.edge)
    # A hole is what no path inside the clump leads out of.
    gaps_HW, count = ndimage.label(now_HW & ~inside_HW)
    outer_HW = ndimage.binary_dilation(~now_HW, border_value=1)
    closed_G = np.ones(count + 1, bool)
    closed_G[gaps_HW[outer_HW]] = False
    closed_G[0] = False
    inside_HW = ndimage.binary_opening(inside_HW | closed_G[gaps_HW], DISC)
    markers_HW = _large(ndimage.label(inside_HW)[0], rules.smallest)
    # A clump too small for any is a nucleus as it is, and the code loses it.
    clumps_HW, count = ndimage.label(now_HW)
    bare_C = np.ones(count + 1, bool)
    bare_C[clumps_HW[markers_HW > 0]] = False
    bare_C[0] = False
    return markers_HW + np.where(bare_C[clumps_HW], clumps_HW + markers_HW.max(initial=0), 0)


def _large(numbers_HW: np.ndarray, smallest: int) -> np.ndarray:
    """What has fewer pixels goes."""
    keep = np.bincount(numbers_HW.ravel()) >= smallest
    return np.where(keep[numbers_HW], numbers_HW, 0)


def _described(top: int, numbers_HW: np.ndarray, maps: Strip, rules: Rules) -> Nuclei | None:
    """Numbered by their first pixels, and what is known of each."""
    numbers_HW = _large(numbers_HW, rules.smallest)
    place_P = np.flatnonzero(numbers_HW)
    if not len(place_P):
        return None
    names, first_N, whose_P = np.unique(numbers_HW.ravel()[place_P], return_index=True, return_inverse=True)
    order = np.argsort(first_N, kind="stable")
    rank_N = np.empty(len(names), np.int64)
    rank_N[order] = np.arange(len(names))
    whose_P = rank_N[whose_P]
    numbered_HW = np.zeros(numbers_HW.shape, np.int32)
    numbered_HW.ravel()[place_P] = whose_P + 1
    y_P, x_P = np.divmod(place_P, numbers_HW.shape[1])
    size_N = np.bincount(whose_P)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(whose_P, weights=values) / size_N

    start_N = place_P[first_N[order]]
    return Nuclei(
        top=top, numbers_HW=numbered_HW,
        first_N2=np.stack([start_N // numbers_HW.shape[1] + top, start_N % numbers_HW.shape[1]], axis=1),
        # Counted from the nucleus' own first row, so that rounding does not depend on where it lies in a strip.
        middle_N2=np.stack([mean(x_P), mean(y_P - y_P[first_N[order]][whose_P]) + (y_P[first_N[order]] + top)], axis=1),
        size_N=size_N, nuclear_N=mean(maps.nuclear_HW.ravel()[place_P].astype(np.float64)),
        types_NC=None if maps.types_CHW is None else np.stack(
            [mean(each.ravel()[place_P].astype(np.float64)) for each in maps.types_CHW], axis=1))


@dataclass
class Whole:
    """All nuclei of a region, numbered by their first pixels, and a map of them."""

    numbers_HW: np.ndarray              # int32
    middle_N2: np.ndarray
    size_N: np.ndarray
    nuclear_N: np.ndarray
    types_NC: np.ndarray | None
    cut: int


def whole(strips: Iterable[Strip], size: tuple[int, int], rules: Rules) -> Whole:
    """A region that fits into memory as one map; `size`: its rows and columns."""
    numbers_HW = np.zeros(size, np.int32)
    portions, last = [], 0
    parting = Parting(rules)
    for found in parting.of(strips):
        window_HW = numbers_HW[found.top:found.top + len(found.numbers_HW)]
        np.copyto(window_HW, found.numbers_HW + last, where=found.numbers_HW > 0)
        last += found.count
        portions.append(found)
    if not portions:
        none = np.zeros(0)
        return Whole(numbers_HW, np.zeros((0, 2)), none, none, None, parting.cut)
    first_N2 = np.concatenate([each.first_N2 for each in portions])
    order = np.lexsort((first_N2[:, 1], first_N2[:, 0]))
    rank_N = np.zeros(last + 1, np.int32)
    rank_N[order + 1] = np.arange(1, last + 1, dtype=np.int32)
    for row in range(0, len(numbers_HW), 1024):     # not another map of the whole region
        numbers_HW[row:row + 1024] = rank_N[numbers_HW[row:row + 1024]]
    middle_N2, size_N, nuclear_N = (np.concatenate([getattr(each, name) for each in portions])[order]
                                    for name in ("middle_N2", "size_N", "nuclear_N"))
    types = [each.types_NC for each in portions]
    return Whole(numbers_HW, middle_N2, size_N, nuclear_N,
                 None if types[0] is None else np.concatenate([each for each in types if each is not None])[order],
                 parting.cut)
