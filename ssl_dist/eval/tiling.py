"""What a network says of a region of any size, in strips from the top down.

Windows lie on a fixed grid from the region's upper left corner, and of each its middle is kept: every pixel is said by
one window, whatever is in memory together. What lies outside the region is its mirror image, of a slide white.

B windows   H, W pixels of the region   S pixels a side of a window   K channels of what is said
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

# Pixels of a strip: some hundred megabytes of maps, beside which the rows kept from strip to strip are few.
STRIP = 8_000_000
BLANK = 235             # of every channel: a window that is nowhere darker is glass, and has nothing to say

Read = Callable[[int, int, int, int], np.ndarray]       # left, top, width, height -> RGB, also beyond the region


def of_picture(image_HW3: np.ndarray) -> Read:
    """Reads a picture that is in memory, mirrored beyond its rims."""
    height, width = image_HW3.shape[:2]

    def read(left: int, top: int, wide: int, high: int) -> np.ndarray:
        return image_HW3[np.ix_(mirrored(top, high, height), mirrored(left, wide, width))]

    return read


def mirrored(first: int, count: int, side: int) -> np.ndarray:
    """Places from `first` on, those outside 0 to `side` as in a mirror at the outermost pixel."""
    if side == 1:
        return np.zeros(count, int)
    place = np.arange(first, first + count) % (2 * side - 2)
    return np.where(place < side, place, 2 * side - 2 - place)


def strips(says: Callable[[Tensor], Tensor], channels: int, read: Read, size: tuple[int, int], window: int, margin: int,
           batch: int, progress: Callable[[int, int], None] = lambda *_: None) -> Iterator[np.ndarray]:
    """Maps (K, rows, W), float16, of all rows in order; `says` (B, S, S, 3) -> (B, K, S, S); `size`: rows, columns."""
    height, width = size
    step = window - 2 * margin
    across, down = -(-width // step), -(-height // step)
    together = max(1, STRIP // (across * step * step))
    for first in range(0, down, together):
        rows = range(first, min(first + together, down))
        strip_KHW = np.zeros((channels, len(rows) * step, across * step), np.float16)
        for row in rows:
            band_HW3 = read(-margin, row * step - margin, across * step + 2 * margin, window)
            kept = [column for column in range(across)
                    if band_HW3[:, column * step:column * step + window].min() < BLANK]
            for start in range(0, len(kept), batch):
                some = kept[start:start + batch]
                pixels_BSS3 = np.stack([band_HW3[:, column * step:column * step + window] for column in some])
                said_BKSS = says(torch.from_numpy(pixels_BSS3))[..., margin:window - margin, margin:window - margin]
                for column, said_KSS in zip(some, said_BKSS.cpu().numpy(), strict=True):
                    strip_KHW[:, (row - first) * step:(row - first + 1) * step,
                              column * step:(column + 1) * step] = said_KSS
            progress(row + 1, down)
        yield strip_KHW[:, :height - first * step, :width]
