"""What a tile looks like, at an eighth of its size: empty, blurred, inked, bloody; how dark and how blue.

An eighth is what a JPEG gives away cheaply (the mean of each of its blocks), and is had from pixels by averaging: so
tiles that are passed through and tiles that are encoded by us are judged alike. Of N tiles at once: NHWC.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

SCALE = 8
# Edges of the histograms in slides.jsonl: 24 bins, the outer ones take what lies beyond.
SHARP_SIDE = 12     # pixels at an eighth: in smaller pictures sharpness cannot be told, and is NaN
FOCUS_EDGES = np.linspace(0, 2.4, 25)
DENSITY_EDGES = np.linspace(0, 0.8, 25)
HUE_EDGES = np.linspace(-0.4, 0.4, 25)
# Optical density of each grey level against white light.
DENSITY = -np.log10(np.maximum(np.arange(256), 1) / 255).astype(np.float32)
INKED = 0.2         # mean density from which a pixel has a colour to speak of


class Limits(NamedTuple):
    """Beyond these a tile is left out."""

    min_contrast: float
    min_focus: float
    max_pen: float
    max_blood: float


@dataclass(frozen=True)
class Looks:
    """One number a tile."""

    contrast: np.ndarray        # standard deviation of grey, of 255
    focus: np.ndarray           # how much of the contrast lies between neighbours
    pen: np.ndarray             # fraction in the colours of a marker's ink
    blood: np.ndarray           # fraction in saturated red
    density: np.ndarray         # mean optical density: how much stain
    hue: np.ndarray             # -1 red to 1 blue, of the stain: haematoxylin near 0.2, eosin below 0

    def reason(self, number: int, limits: Limits) -> str:
        """Why tile `number` is left out, in one word; "" where it is kept."""
        if self.contrast[number] < limits.min_contrast:
            return "blank"
        if self.pen[number] > limits.max_pen:
            return "pen"
        if self.blood[number] > limits.max_blood:
            return "blood"
        return "blurred" if self.focus[number] < limits.min_focus else ""


def look(small_NHWC: np.ndarray) -> Looks:
    """Looks of tiles that were reduced to an eighth."""
    planes_CNHW = np.ascontiguousarray(np.moveaxis(small_NHWC, -1, 0))
    grey = planes_CNHW[0].astype(np.float32)
    grey += planes_CNHW[1]
    grey += planes_CNHW[2]
    grey /= 3
    sharp = min(grey.shape[1:]) >= SHARP_SIDE
    focus = _rough(grey) / np.maximum(_rough(_halved(grey)), 0.5) if sharp else np.full(len(grey), np.nan)
    thin = 2 if min(grey.shape[1:]) >= 2 * SHARP_SIDE else 1       # colours: a pixel of four tells as much
    red, green, blue = DENSITY.take(planes_CNHW[:, :, ::thin, ::thin])
    mean = (red + green + blue) / 3
    pixels = mean[0].size
    stain = np.maximum(mean.mean(axis=(1, 2)), 1e-6)
    return Looks(grey.std(axis=(1, 2)), focus, np.count_nonzero(pen(red, green, blue, mean), axis=(1, 2)) / pixels,
                 np.count_nonzero(blood(red, green, blue), axis=(1, 2)) / pixels, stain,
                 (red - blue).mean(axis=(1, 2)) / (3 * stain))


def densities(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Optical density against white light: of red, green and blue, and their mean."""
    red, green, blue = DENSITY.take(np.ascontiguousarray(np.moveaxis(rgb, -1, 0)))
    return red, green, blue, (red + green + blue) / 3


def _rough(grey_NHW: np.ndarray) -> np.ndarray:
    """Standard deviation of the difference between a pixel and its four neighbours."""
    inner = grey_NHW[:, 1:-1, 1:-1]
    if not inner.size:
        return np.zeros(len(grey_NHW), np.float32)
    return (4 * inner - grey_NHW[:, :-2, 1:-1] - grey_NHW[:, 2:, 1:-1] - grey_NHW[:, 1:-1, :-2]
            - grey_NHW[:, 1:-1, 2:]).std(axis=(1, 2))


def _halved(grey_NHW: np.ndarray) -> np.ndarray:
    height, width = (side // 2 * 2 for side in grey_NHW.shape[1:])
    even = grey_NHW[:, :height, :width]
    return (even[:, ::2, ::2] + even[:, 1::2, ::2] + even[:, ::2, 1::2] + even[:, 1::2, 1::2]) / 4


def pen(red: np.ndarray, green: np.ndarray, blue: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """True where optical densities are those of a marker: haematoxylin, eosin and DAB all take more green than red.

    Blue and green ink take more red; black ink, or a frame that a scanner drew, takes all three alike.
    """
    ink = (red > 1.3 * green) & (mean > INKED)
    black = mean > 0.6          # faded ink too; hardly any real tissue is as dark and as grey
    if black.any():
        spread = np.maximum(red, np.maximum(green, blue)) - np.minimum(red, np.minimum(green, blue))
        ink |= black & (spread < 0.2 * mean)
    return ink


def blood(red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> np.ndarray:
    """True where red passes and green and blue do not: blood and red ink. Eosin lets blue pass."""
    return (green > 0.45) & (blue > 0.6 * green) & (red < 0.35 * green)


def histograms(values: np.ndarray, whose: np.ndarray, owners: int, edges: np.ndarray) -> np.ndarray:
    """Counts between `edges`, a row an owner; what lies beyond is in the outer bins, what is not known in none."""
    known = ~np.isnan(values)
    bins = np.clip(np.searchsorted(edges, values[known], side="right") - 1, 0, len(edges) - 2)
    counts = np.bincount(whose[known] * (len(edges) - 1) + bins, minlength=owners * (len(edges) - 1))
    return counts.reshape(owners, len(edges) - 1)


def reduced(pixels: np.ndarray) -> np.ndarray:
    """One tile at an eighth: the mean of each block of eight by eight."""
    return np.asarray(Image.fromarray(pixels).reduce(SCALE))
