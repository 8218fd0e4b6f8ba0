"""The views on a CPU: one fused function a view, many tiles at a time in a thread pool. The only cv2.

DALI's own operators were measured more than ten times slower on a CPU; OpenCV releases the interpreter while it works.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np

from ssl_dist.data.augment import Numbers

# The logarithm of the light that each of the 256 values lets through: minus its natural optical density. 0 counts as 1,
# for black has no logarithm.
LIGHT = np.log(np.maximum(np.arange(256), 1) / 255).astype(np.float32)
SOLARISED = np.where(np.arange(256) < 128, np.arange(256), 255 - np.arange(256)).astype(np.uint8)


def one_thread() -> None:
    """Stops OpenCV from starting threads of its own: the pool below is the only one."""
    cv2.setNumThreads(1)


def crop(image_HW3: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    """The box (fractions of the tile) at `size` x `size` pixels, bilinear."""
    height, width = image_HW3.shape[:2]
    x, y, w, h = pixel_box(box, width, height)
    return cv2.resize(image_HW3[y:y + h, x:x + w], (size, size), interpolation=cv2.INTER_LINEAR)


def pixel_box(box: np.ndarray, width: int, height: int) -> tuple[int, int, int, int]:
    """Whole pixels of a box given as fractions: left, top, width, height, never empty, never outside."""
    x, y = int(box[0] * width + 0.5), int(box[1] * height + 0.5)
    w, h = max(int(box[2] * width + 0.5), 1), max(int(box[3] * height + 0.5), 1)
    return min(x, width - w), min(y, height - h), w, h


def draw(image_HW3: np.ndarray, numbers: Numbers, row: int, size: int, out_SS3: np.ndarray) -> None:
    """One view of one tile, written into `out_SS3` (uint8)."""
    picture = crop(image_HW3, numbers.box_N4[row], size)
    if numbers.stain_N34.shape[1]:
        # In logarithms of light, and not in density, the offset changes its sign and nothing else does. What would be
        # brighter than glass is cut off by the conversion.
        light = cv2.transform(cv2.LUT(picture, LIGHT), numbers.stain_N34[row] * (1, 1, 1, -1))
        picture = cv2.convertScaleAbs(cv2.exp(light), alpha=255)
    matrix = numbers.colour_N34[row] * (1, 1, 1, 255)
    picture = cv2.transform(picture, matrix)
    if sigma := numbers.sigma_N[row]:
        window = 2 * int(np.ceil(3 * sigma)) + 1
        picture = cv2.GaussianBlur(picture, (window, window), sigma, borderType=cv2.BORDER_REFLECT_101)
    if numbers.solarise_N[row]:
        picture = cv2.LUT(picture, SOLARISED)
    left_right, up_down = numbers.flip_N2[row]
    if left_right or up_down:       # forty times quicker than NumPy's reversed slices
        cv2.flip(picture, -1 if left_right and up_down else int(left_right), out_SS3)
    else:
        out_SS3[:] = picture


def views(images: list[np.ndarray], numbers: Numbers, size: int, pool: ThreadPoolExecutor) -> np.ndarray:
    """One view of every tile, uint8 (N, size, size, 3)."""
    out_NSS3 = np.empty((len(images), size, size, 3), dtype=np.uint8)     # fresh: what is handed over is never reused
    spread(pool, lambda row: draw(images[row], numbers, row, size, out_NSS3[row]), range(len(images)))
    return out_NSS3


def resized(images: list[np.ndarray], size: int, pool: ThreadPoolExecutor) -> np.ndarray:
    """Every tile whole at `size` x `size`, uint8 (N, size, size, 3): what evaluation sees."""
    out_NSS3 = np.empty((len(images), size, size, 3), dtype=np.uint8)

    def one(row: int) -> None:
        shrinks = max(images[row].shape[:2]) > size
        out_NSS3[row] = cv2.resize(images[row], (size, size),
                                   interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)

    spread(pool, one, range(len(images)))
    return out_NSS3


def spread(pool: ThreadPoolExecutor, work: Callable[[int], None], rows: Iterable[int]) -> None:
    """Calls `work` on every row, a few rows a task: a task a row would cost as much as a small tile."""
    chosen = list(rows)

    def some(part: list[int]) -> None:
        for row in part:
            work(row)

    for done in [pool.submit(some, chosen[first:first + 8]) for first in range(0, len(chosen), 8)]:
        done.result()
