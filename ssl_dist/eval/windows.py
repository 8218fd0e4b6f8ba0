"""Windows that a network of pixels learns from: places, sizes, turns and colours drawn anew for every step.

Colours and cuts are those of pretraining's views (data/augment.py, data/opencv.py); labels are cut and turned alike. A
step's windows depend on its seed and number alone.

B windows   S pixels a side   H, W pixels of a region
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from shards.regions import Pixels, Region
from ssl_dist.data import augment, opencv
from ssl_dist.data.augment import Numbers
from ssl_dist.data.batch import View
from ssl_dist.eval.settings import PixelWise


@dataclass
class Drawn:
    """Windows of one step."""

    pixels_BSS3: np.ndarray             # uint8
    numbers_BSS: np.ndarray             # int32
    types_BSS: np.ndarray | None        # uint8


class Windows:
    """Regions that lie in memory, mirrored at their rims so far that every pixel can be in the middle of a window."""

    def __init__(self, regions: list[Region], settings: PixelWise, retype: Callable[[Pixels], Pixels]):
        self._settings = settings
        # The largest piece of a region that becomes a window, and the smallest.
        self._cut = round(settings.window * settings.zoom)
        self._view = View(
            size=settings.window, scale=(settings.zoom ** -4, 1.0), ratio=(1, 1), stain=settings.stain,
            jitter=settings.jitter, grey=0, blur=settings.blur, sigma=(0.1, 1.0), turn=1)
        self._regions = [self._framed(retype(region.read())) for region in regions]
        inner = settings.window - 2 * settings.margin
        areas = np.array([np.prod(each.size) for each in self._regions], np.float64)
        self._share_R = areas / areas.sum()
        self.a_pass = max(1, settings.windows * len(regions) if settings.windows else round(areas.sum() / inner**2))

    def _frame(self, size: tuple[int, int]) -> list[int]:
        """Pixels to be mirrored above and below, and left and right."""
        # What is kept of a window may reach the region's rim, and a window must fit.
        outer = self._cut // 2 - (self._settings.window - 2 * self._settings.margin) // 2
        return [max(outer, -(-(self._cut - side) // 2), 0) for side in size]

    def _framed(self, known: Pixels) -> "_Framed":
        rows, columns = self._frame(known.instances_HW.shape)
        pad = (rows, rows), (columns, columns)
        numbers_HW = np.pad(known.instances_HW, pad, mode="reflect")
        # A nucleus and its mirror image are two, or together they would be of a shape that there is not.
        count = known.count
        down_H, across_W = (_mirrors(side, each) for side, each in zip(known.instances_HW.shape, (rows, columns),
                                                                       strict=True))
        side_HW = down_H[:, None] * (across_W.max() + 1) + across_W
        numbers_HW = np.where(numbers_HW > 0, numbers_HW + side_HW * count, 0)
        return _Framed(known.instances_HW.shape, np.pad(known.image_HW3, (*pad, (0, 0)), mode="reflect"), numbers_HW,
                       None if known.types_HW is None else np.pad(known.types_HW, pad, mode="reflect"))

    def draw(self, step: int, count: int, pool: ThreadPoolExecutor) -> Drawn:
        """The windows of a step."""
        rng, size, cut = np.random.default_rng([self._settings.seed, step]), self._settings.window, self._cut
        numbers = augment.numbers(self._view, augment.uniforms(self._settings.seed, step, 0, 0, count))
        chosen = [self._regions[each] for each in rng.choice(len(self._regions), count, p=self._share_R)]
        corners = [[int(rng.integers(side - cut + 1)) for side in region.numbers_HW.shape] for region in chosen]
        pieces = [(region, (slice(top, top + cut), slice(left, left + cut)))
                  for region, (top, left) in zip(chosen, corners, strict=True)]
        pixels_BSS3, = opencv.views(lambda row: pieces[row][0].image_HW3[pieces[row][1]], [numbers], [size], pool)
        numbers_BSS = np.empty((count, size, size), np.int32)
        typed = all(region.types_HW is not None for region in chosen)
        types_BSS = np.empty((count, size, size), np.uint8) if typed else None
        for row, (region, place) in enumerate(pieces):
            numbers_BSS[row] = alike(region.numbers_HW[place], numbers, row, size)
            if types_BSS is not None and region.types_HW is not None:
                types_BSS[row] = alike(region.types_HW[place], numbers, row, size)
        return Drawn(pixels_BSS3, numbers_BSS, types_BSS)


def _mirrors(side: int, pad: int) -> np.ndarray:
    """Of each place along a padded side, which mirror image it lies in: 0 is the picture itself. Where the rim is wider
    than the picture, one is mirrored in another."""
    place = np.arange(-pad, side + pad)
    beyond = np.maximum(place - (side - 1), np.maximum(-place, 0))
    turn = -(-beyond // max(side - 1, 1))
    return np.where(place < 0, 2 * turn - 1, 2 * turn).astype(np.int32)


@dataclass
class _Framed:
    size: tuple[int, int]
    image_HW3: np.ndarray
    numbers_HW: np.ndarray
    types_HW: np.ndarray | None


def alike(labels_HW: np.ndarray, numbers: Numbers, row: int, size: int) -> np.ndarray:
    """Labels cut, turned and mirrored as the picture is, each pixel with the label at its middle."""
    left, top, width, height = opencv.pixel_box(numbers.box_N4[row].tolist(), labels_HW.shape[1], labels_HW.shape[0])
    middles = (np.arange(size) + 0.5) / size
    cut_SS = labels_HW[np.ix_((top + middles * height).astype(int), (left + middles * width).astype(int))]
    cut_SS = np.rot90(cut_SS, int(numbers.turn_N[row]))
    across, over = numbers.flip_N2[row]
    return cut_SS[::-1 if over else 1, ::-1 if across else 1]


def apart(numbers_HW: np.ndarray) -> np.ndarray:
    """How far each pixel lies from its nucleus' middle, (2, H, W): horizontally and vertically, -1 at the nucleus' left
    or upper end, 1 at its right or lower end, and 0 where no nucleus is."""
    found_2HW = np.zeros((2, *numbers_HW.shape), np.float32)
    y_P, x_P = np.nonzero(numbers_HW)
    if not len(y_P):
        return found_2HW
    _, whose_P = np.unique(numbers_HW[y_P, x_P], return_inverse=True)
    order = np.argsort(whose_P, kind="stable")
    first_N = np.flatnonzero(np.diff(whose_P[order], prepend=-1))
    size_N = np.bincount(whose_P)
    for map_HW, at_P in zip(found_2HW, (x_P, y_P), strict=True):
        away_P = at_P - (np.bincount(whose_P, weights=at_P) / size_N)[whose_P]
        low_N, high_N = (-np.minimum.reduceat(away_P[order], first_N), np.maximum.reduceat(away_P[order], first_N))
        reach_P = np.where(away_P < 0, low_N[whose_P], high_N[whose_P])
        map_HW[y_P, x_P] = away_P / np.maximum(reach_P, 1e-6)
    return found_2HW
