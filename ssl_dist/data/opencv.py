"""The views on a CPU: one fused function a view, many tiles at a time in a thread pool. The only cv2.

DALI's own operators were measured more than ten times slower on a CPU; OpenCV releases the interpreter while it works.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import cv2
import numpy as np

from ssl_dist.data import stain
from ssl_dist.data.augment import Numbers

# The logarithm of the light that each of the 256 values lets through: minus its natural optical density. 0 counts as 1,
# for black has no logarithm.
LIGHT = np.log(np.maximum(np.arange(256), 1) / 255).astype(np.float32)
LINEAR = stain.GAMMA.astype(np.float32)
LAB_UNITS, LAB_ZERO = np.array([2.55, 1, 1]), np.array([0, 128, 128])
FLIPS = {(False, False): None, (True, False): 1, (False, True): 0, (True, True): -1}
TURNS = (-1, cv2.ROTATE_90_COUNTERCLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_CLOCKWISE)
SOLARISED = np.where(np.arange(256) < 128, np.arange(256), 255 - np.arange(256)).astype(np.uint8)


def one_thread() -> None:
    """Stops OpenCV from starting threads of its own: the pool below is the only one."""
    cv2.setNumThreads(1)


def crop(image_HW3: np.ndarray, box: Sequence[float], size: int) -> np.ndarray:
    """The box (fractions of the tile) at `size` x `size` pixels: halved while it is twice as large, then bilinear.

    Bilinear weights look at four pixels, whatever lies between: nuclei of a large box would turn into noise.
    """
    height, width = image_HW3.shape[:2]
    x, y, w, h = pixel_box(box, width, height)
    picture = image_HW3[y:y + h, x:x + w]
    for _ in range(halvings(w, h, size)):
        w, h = w // 2, h // 2
        picture = cv2.resize(picture, (w, h), interpolation=cv2.INTER_LINEAR)       # at a half: the mean of four
    return cv2.resize(picture, (size, size), interpolation=cv2.INTER_LINEAR)


def halvings(width: int, height: int, size: int) -> int:
    """How often a box is halved before it is brought to `size`, three times at most, as DALI's graph does."""
    return min(max((min(width, height) // size).bit_length() - 1, 0), 3)


def pixel_box(box: Sequence[float], width: int, height: int) -> tuple[int, int, int, int]:
    """Whole pixels of a box given as fractions: left, top, width, height, never empty, never outside."""
    x, y = int(box[0] * width + 0.5), int(box[1] * height + 0.5)
    w, h = max(int(box[2] * width + 0.5), 1), max(int(box[3] * height + 0.5), 1)
    return min(x, width - w), min(y, height - h), w, h


def lab(image_HW3: np.ndarray) -> np.ndarray:
    """RGB as LAB, float32: L in 0..100, a and b around 0."""
    return cv2.cvtColor(cv2.LUT(image_HW3, LINEAR), cv2.COLOR_LRGB2LAB)


def lab_statistics(image_HW3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of L, a and b, in the units of stain.py."""
    mean, deviation = cv2.meanStdDev(lab(image_HW3))
    return mean[:, 0] * LAB_UNITS + LAB_ZERO, deviation[:, 0] * LAB_UNITS


def restain(picture: np.ndarray, gain_3: np.ndarray, offset_3: np.ndarray) -> np.ndarray:
    """A picture whose LAB channels are scaled and shifted."""
    offset = (offset_3 + gain_3 * LAB_ZERO - LAB_ZERO) / LAB_UNITS
    moved = cv2.transform(lab(picture), np.column_stack([np.diag(gain_3), offset]))
    _, shown = cv2.threshold(cv2.cvtColor(moved, cv2.COLOR_LAB2RGB), 0, 0, cv2.THRESH_TOZERO)
    return cv2.convertScaleAbs(shown, alpha=255)


class Strokes(NamedTuple):
    """The numbers of one view of one tile, in OpenCV's words."""

    box: list[float]
    target_6: np.ndarray | None
    stain_34: np.ndarray | None
    colour_34: np.ndarray
    sigma: float
    solarise: bool
    turn: int
    flip: int | None        # cv2's code


def strokes(numbers: Numbers) -> list[Strokes]:
    """The numbers of one view of all tiles, tile by tile: what can be reckoned for all at once is not left to each."""
    targets = [None if np.isnan(target[0]) else target for target in numbers.target_N6]
    # In logarithms of light, and not in density, the offset changes its sign and nothing else does.
    maps = numbers.stain_N34 * (1, 1, 1, -1)
    stains = [maps[row] if on else None for row, on in enumerate(numbers.stained_N.tolist())]
    flips = [FLIPS[across, over] for across, over in numbers.flip_N2.tolist()]
    return list(map(Strokes, numbers.box_N4.tolist(), targets, stains, numbers.colour_N34 * (1, 1, 1, 255),
                    numbers.sigma_N.tolist(), numbers.solarise_N.tolist(), numbers.turn_N.tolist(), flips))


def draw(image_HW3: np.ndarray, stroke: Strokes, size: int, out_SS3: np.ndarray,
         statistics: tuple[np.ndarray, np.ndarray] | None = None) -> None:
    """One view of one tile, written into `out_SS3` (uint8); `statistics` of the whole tile, if the view needs any."""
    picture = crop(image_HW3, stroke.box, size)
    if stroke.target_6 is not None and statistics:
        picture = restain(picture, *stain.towards(stroke.target_6, *statistics))
    if stroke.stain_34 is not None:
        light = cv2.transform(cv2.LUT(picture, LIGHT), stroke.stain_34)
        picture = cv2.convertScaleAbs(cv2.exp(light, dst=light), alpha=255)     # brighter than glass is glass
    picture = cv2.transform(picture, stroke.colour_34)
    if stroke.sigma:
        # GaussianBlur took two thirds longer for bytes, and was off by a level where this is off by half of one.
        weights = cv2.getGaussianKernel(2 * math.ceil(3 * stroke.sigma) + 1, stroke.sigma, cv2.CV_32F)
        picture = cv2.sepFilter2D(picture, -1, weights, weights, borderType=cv2.BORDER_REFLECT_101)
    if stroke.solarise:
        picture = cv2.LUT(picture, SOLARISED)
    if stroke.turn:
        picture = cv2.rotate(picture, TURNS[stroke.turn])
    if stroke.flip is None:
        out_SS3[:] = picture
    else:       # forty times quicker than NumPy's reversed slices
        cv2.flip(picture, stroke.flip, out_SS3)


def views(picture: Callable[[int], np.ndarray], numbers: list[Numbers], sizes: list[int],
          pool: ThreadPoolExecutor) -> list[np.ndarray]:
    """Every view of every tile, uint8 (N, size, size, 3) each. A tile is asked for, and then drawn while it is near."""
    count = len(numbers[0].box_N4)
    # Fresh: what is handed over is never reused.
    out = [np.empty((count, size, size, 3), dtype=np.uint8) for size in sizes]
    drawn = list(zip(*map(strokes, numbers), strict=True))

    def one(row: int) -> None:
        image = picture(row)
        statistics = lab_statistics(image) if any(stroke.target_6 is not None for stroke in drawn[row]) else None
        for stroke, size, out_NSS3 in zip(drawn[row], sizes, out, strict=True):
            draw(image, stroke, size, out_NSS3[row], statistics)

    spread(pool, one, range(count))
    return out


def resized(picture: Callable[[int], np.ndarray], count: int, size: int, pool: ThreadPoolExecutor,
            out: np.ndarray | None = None) -> np.ndarray:
    """`count` tiles whole at `size` x `size`, uint8 (N, size, size, 3): what evaluation sees. `out`: where to."""
    out_NSS3 = np.empty((count, size, size, 3), dtype=np.uint8) if out is None else out

    def one(row: int) -> None:
        image = picture(row)
        if image.shape[:2] == (size, size):
            out_NSS3[row] = image
            return
        shrinks = max(image.shape[:2]) > size
        cv2.resize(image, (size, size), dst=out_NSS3[row],
                   interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)

    spread(pool, one, range(count))
    return out_NSS3


def spread(pool: ThreadPoolExecutor, work: Callable[[int], None], rows: Iterable[int]) -> None:
    """Calls `work` on every row, a few rows a task: a task a row would cost as much as a small tile."""
    chosen = list(rows)

    def some(part: list[int]) -> None:
        for row in part:
            work(row)

    for done in [pool.submit(some, chosen[first:first + 8]) for first in range(0, len(chosen), 8)]:
        done.result()


def smoothed(there_HW: np.ndarray, radii: Iterable[int]) -> np.ndarray:
    """What is there without specks and holes: opened and then closed by a disk of each radius, in pixels, in turn. What
    lies beyond the rim decides nothing."""
    found: np.ndarray = there_HW.astype(np.uint8)
    for radius in radii:
        down, across = np.mgrid[-radius:radius + 1, -radius:radius + 1]
        disk = (down**2 + across**2 <= radius**2).astype(np.uint8)
        for step in (cv2.MORPH_OPEN, cv2.MORPH_CLOSE):
            found = cv2.morphologyEx(found, step, disk)
    return found > 0
