"""What a map of confidence holds to be there, in pixels; how well that agrees with outlines; and what thresholds alone
would find.

H, W pixels   R regions
"""

import numpy as np

from ssl_dist.data import opencv
from ssl_dist.eval import pieces
from ssl_dist.models.stains import UNMIX

SURE = 0.5
DISKS = 3, 1            # radii of the authors' opening and closing, in this order
BINS = 256
LEVELS = 256            # of confidence
APART = 1.0             # of logits: what lies closer together was not told apart
HALF_A_LEVEL = 0.5 / (LEVELS - 1)       # of 0 and 1 there is no logit
LUMA = np.array([0.299, 0.587, 0.114])


def cleaned(found_HW: np.ndarray) -> np.ndarray:
    """Without specks and holes, as the authors do."""
    return opencv.smoothed(found_HW, DISKS)


def cleaning_reach() -> int:
    """How far away what is there may decide whether a pixel stays."""
    return 4 * sum(DISKS)       # an opening and a closing are two steps each


def dice(found_HW: np.ndarray, true_HW: np.ndarray) -> float:
    """Twice what is in both, of what is in either; two that are empty agree."""
    both, total = int((found_HW & true_HW).sum()), int(found_HW.sum()) + int(true_HW.sum())
    return 2 * both / total if total else 1.0


def haematoxylin(picture_HW3: np.ndarray) -> np.ndarray:
    """How much of it lies on each pixel, in natural optical density."""
    density_HW3 = -np.log(np.maximum(picture_HW3, 1) / 255.0)
    return density_HW3 @ UNMIX[:, 0]


def grey(picture_HW3: np.ndarray) -> np.ndarray:
    """Levels of grey, 0 to 255."""
    return picture_HW3 @ LUMA


def otsu(values_HW: np.ndarray) -> float:
    """The threshold that parts values best in two (Otsu 1979): their means lie furthest apart."""
    counts, edges = np.histogram(values_HW, BINS)
    return float(edges[1:][_parted(counts, (edges[:-1] + edges[1:]) / 2)])


def _parted(counts: np.ndarray, values: np.ndarray) -> int:
    """The last of the lower values, in order, so many of each."""
    below = np.cumsum(counts) / counts.sum()
    sums = np.cumsum(counts * values) / counts.sum()
    apart = (sums[-1] * below - sums) ** 2 / np.maximum(below * (1 - below), 1e-12)
    return int(apart.argmax())


def levels(map_HW: np.ndarray) -> np.ndarray:
    """Confidence from 0 to 1 in 256 steps, as it is written."""
    return np.rint(255 * map_HW).astype(np.uint8)


def counted(levels_HW: np.ndarray, picture_HW3: np.ndarray) -> np.ndarray:
    """How many pixels have each level, glass left out."""
    return np.bincount(levels_HW[pieces.tissue(picture_HW3)], minlength=LEVELS)


def cut(counts_L: np.ndarray, how: str) -> int:
    """The level that more than counts as there: half of all, or where Otsu's threshold parts the levels' logits, so
    that a network may be surer of one picture than of another. Where the two parts are nearly one, half."""
    half = round(SURE * LEVELS) - 1
    if how == "half" or not counts_L.any():
        return half
    chance = np.clip(np.arange(LEVELS) / (LEVELS - 1), HALF_A_LEVEL, 1 - HALF_A_LEVEL)
    logit_L = np.log(chance / (1 - chance))
    level = _parted(counts_L, logit_L)
    below, above = (counts_L[own] @ logit_L[own] / max(1, counts_L[own].sum()) for own in (
        slice(level + 1), slice(level + 1, None)))
    return level if counts_L[level + 1:].any() and above - below > APART else half


def there(map_HW: np.ndarray, picture_HW3: np.ndarray, how: str) -> np.ndarray:
    """What a map holds to be there, not yet cleaned (H, W)."""
    levels_HW = levels(map_HW)
    return levels_HW > cut(counted(levels_HW, picture_HW3), how)


class Threshold:
    """A baseline: whatever is darker than a level of grey, or by Otsu's threshold more stained with haematoxylin. Which
    level, and whether what it finds is cleaned, outlines decide that are learnt from."""

    def __init__(self, kind: str, bank: list[tuple[np.ndarray, np.ndarray]]):
        """`kind`: otsu or grey; `bank`: pictures (H, W, 3) and what is true of them (H, W)."""
        self.kind, self.level, self.cleans = kind, 0.0, False
        if kind == "grey":
            levels = np.arange(20.0, 250.0, 2.0)
            self.level = float(levels[_dice_below([(grey(picture), true) for picture, true in bank], levels).argmax()])
        raw, clean = ([dice(self(picture, cleans=cleans), true) for picture, true in bank] for cleans in (False, True))
        self.cleans = float(np.mean(clean)) > float(np.mean(raw))

    def __call__(self, picture_HW3: np.ndarray, *, cleans: bool | None = None) -> np.ndarray:
        """What it finds (H, W)."""
        if self.kind == "grey":
            found_HW = grey(picture_HW3) < self.level
        else:
            stain_HW = haematoxylin(picture_HW3)
            found_HW = stain_HW > otsu(stain_HW)
        return cleaned(found_HW) if (self.cleans if cleans is None else cleans) else found_HW


def _dice_below(bank: list[tuple[np.ndarray, np.ndarray]], levels: np.ndarray) -> np.ndarray:
    """The mean Dice of each level, of all at once: how much of a picture, and of what is true, lies below it."""
    found = []
    edges = np.concatenate([[-np.inf], levels, [np.inf]])
    for values_HW, true_HW in bank:
        all_L = np.histogram(values_HW, edges)[0].cumsum()[:-1]
        true_L = np.histogram(values_HW[true_HW], edges)[0].cumsum()[:-1]
        found.append(2 * true_L / np.maximum(all_L + true_HW.sum(), 1))
    return np.mean(found, axis=0)
