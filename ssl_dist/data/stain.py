"""Stain augmentation as numbers: one affine map in optical density, or target statistics in LAB; whatever the kernel.

Light that passes stained tissue falls off exponentially (Beer and Lambert): optical density is linear in the amount of
each stain. To scale and shift the stains, to take them from one slide's vectors to another's, or both, is therefore one
3x3 matrix and one offset in density. What `ssl-dist stain-fit` finds in shard folders (stainfit.py) is a `Fit`.

N samples   S slides   K components   rows of a stain matrix: haematoxylin, eosin, residual
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shards.index import ShardError

# Optical density of haematoxylin, eosin and what neither explains, one row each (Ruifrok & Johnston 2001, normalised;
# the residual is orthogonal to both).
HAEMATOXYLIN = (0.650, 0.704, 0.286)
EOSIN = (0.072, 0.990, 0.105)

# CIE LAB of sRGB under D65, in the units of OpenCV's 8-bit pictures, as RandStainNA's published statistics are: L of
# 100 is 255, and a and b are lifted by 128. White as OpenCV has it.
GAMMA = np.where(np.arange(256) / 255 <= 0.04045, np.arange(256) / 255 / 12.92,
                 ((np.arange(256) / 255 + 0.055) / 1.055) ** 2.4)
RGB_TO_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169],
                       [0.019334, 0.119193, 0.950227]]) / [[0.950456], [1.0], [1.088754]]
CUBES_TO_LAB = np.array([[0, 116 * 2.55, 0], [500, -500, 0], [0, 200, -200]])
LAB_OFFSET = np.array([-16 * 2.55, 128, 128])
MOST_GAIN = 4.0     # of a channel's spread: what a blank tile varies by is noise, and noise is not tissue


def stains() -> np.ndarray:
    """The 3x3 matrix whose rows are unit vectors of haematoxylin, eosin and residual."""
    return complete(np.array([HAEMATOXYLIN, EOSIN]))


def complete(pairs: np.ndarray) -> np.ndarray:
    """Two stains (..., 2, 3) as unit vectors, and a third that neither explains."""
    pairs = pairs / np.linalg.norm(pairs, axis=-1, keepdims=True)
    residual = np.cross(pairs[..., 0, :], pairs[..., 1, :])
    return np.concatenate([pairs, (residual / np.linalg.norm(residual, axis=-1, keepdims=True))[..., None, :]], axis=-2)


def affine(scale_N3: np.ndarray, shift_N3: np.ndarray, unmix_33: np.ndarray | None = None,
           mix_33: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Matrices (N, 3, 3) and offsets (N, 3) that turn an RGB density OD into A OD + t, stains scaled and shifted.

    Unmixed with one set of stains and mixed with another (each one for all samples, or one a sample), the tile changes
    its slide; without them, both are Ruifrok and Johnston's.
    """
    unmix = stains() if unmix_33 is None else unmix_33
    mix = unmix if mix_33 is None else mix_33
    matrix = np.linalg.inv(unmix) @ (scale_N3[:, :, None] * mix)        # density as a row: OD S⁻¹ diag(a) S'
    return np.ascontiguousarray(matrix.swapaxes(1, 2)), (shift_N3[:, None, :] @ mix)[:, 0]


@dataclass(frozen=True)
class Palette:
    """What a fit says of N samples: their slides' stains, and the reference and the statistics of all."""

    fit: "Fit"
    stains_N33: np.ndarray
    strength_N2: np.ndarray         # 99th percentile of haematoxylin and of eosin

    def basis(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Stains to unmix with and to mix with, and the factors (N, 3) that bring one's strengths to the other's."""
        factors = np.ones((len(self.strength_N2), 3))
        if name == "slide":
            return self.stains_N33, self.stains_N33, factors
        factors[:, :2] = self.fit.reference_strength_2 / self.strength_N2
        return self.stains_N33, complete(self.fit.reference_23), factors


def targets(fit: "Fit", chosen_N: np.ndarray, normal_NU: np.ndarray, spread: float, mixture: bool) -> np.ndarray:
    """LAB statistics to bring N tiles to: three means and three deviations, from a uniform and six normals each.

    RandStainNA (Shen et al. 2022) draws the six independently; its `std_hyper` of -0.3 is a spread of 0.7. From a
    mixture they come together, as they do in tissue: a tile that is darker is also more saturated.
    """
    if mixture:
        last = len(fit.weights_K) - 1
        component = np.minimum(np.searchsorted(np.cumsum(fit.weights_K), chosen_N, side="right"), last)
        roots = np.linalg.cholesky(fit.covariances_K66)
        away = fit.means_K6[component] - fit.lab_mean_6 + (roots[component] @ normal_NU[:, :, None])[:, :, 0]
    else:
        away = fit.lab_std_6 * normal_NU
    drawn = fit.lab_mean_6 + spread * away
    # A normal distribution gives negative deviations now and then; a tile without any contrast is none either.
    drawn[:, 3:] = np.maximum(drawn[:, 3:], 0.1 * fit.lab_mean_6[3:])
    return drawn


def normals(uniforms: np.ndarray) -> np.ndarray:
    """Standard normal numbers by the inverse distribution function; 0, which has none, counts as the smallest step."""
    return torch.special.ndtri(torch.from_numpy(np.maximum(uniforms, 2.0**-53))).numpy()


def towards(target_6: np.ndarray, mean_3: np.ndarray, deviation_3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gain and offset of each channel that bring a tile's statistics to the target's (Reinhard et al. 2001)."""
    gain = np.minimum(target_6[3:] / np.maximum(deviation_3, 1e-6), MOST_GAIN)
    return gain, target_6[:3] - gain * mean_3


@dataclass(frozen=True)
class Fit:
    """What `ssl-dist stain-fit` found: LAB statistics of tiles (three means, three deviations), and stains by slide."""

    lab_mean_6: np.ndarray                  # over tiles
    lab_std_6: np.ndarray
    weights_K: np.ndarray                   # a Gaussian mixture of the same six numbers
    means_K6: np.ndarray
    covariances_K66: np.ndarray
    reference_23: np.ndarray                # haematoxylin and eosin, the median of slides
    reference_strength_2: np.ndarray        # 99th percentile of their amounts
    slides: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]    # (dataset, slide) -> stains (2, 3), strength (2)
    shards: list[str]                       # fingerprints
    tiles: int
    settings: dict
    left_out: dict[str, int] = field(default_factory=dict)          # reason -> how many slides, or tiles


def lab(rgb: np.ndarray) -> np.ndarray:
    """RGB (uint8, ..., 3) as LAB, by the formulas of the CIE, in the units above."""
    white = GAMMA[rgb] @ RGB_TO_XYZ.T
    cubes = np.where(white > (6 / 29) ** 3, np.cbrt(white), white * (29 / 6) ** 2 / 3 + 16 / 116)
    return cubes @ CUBES_TO_LAB.T + LAB_OFFSET


# --- the file of a fit

FORMAT = 1
TOLERANCE = 1e-3        # of lengths and sums: a person may have rounded them


def as_json(fit: Fit) -> dict[str, Any]:
    """The fit as plain values, for a file."""
    slides: dict[str, dict[str, list]] = {}
    for (dataset, slide), (stains_23, strength_2) in sorted(fit.slides.items()):
        slides.setdefault(dataset, {})[slide] = [*stains_23.tolist(), strength_2.tolist()]
    return {
        "format": FORMAT, "shards": fit.shards, "settings": fit.settings, "tiles": fit.tiles, "left_out": fit.left_out,
        "lab": {"mean": fit.lab_mean_6.tolist(), "std": fit.lab_std_6.tolist()},
        "mixture": {"weights": fit.weights_K.tolist(), "means": fit.means_K6.tolist(),
                    "covariances": fit.covariances_K66.tolist()},
        "reference": {"stains": fit.reference_23.tolist(), "strength": fit.reference_strength_2.tolist()},
        "slides": slides,
    }


def read(path: Path) -> Fit:
    """The fit in a file, every number of it held against what it must be."""
    if not path.is_file():
        raise ShardError(f"no stain fit at {path} (looked in {Path.cwd()}); write it with: ssl-dist stain-fit FOLDER "
                         f"--out {path}")
    try:
        return _fit(json.loads(path.read_text(encoding="utf-8")))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ShardError(f"{path} is no stain fit ({what}); write it again with: ssl-dist stain-fit FOLDER --out "
                         f"{path}") from error


def _fit(content: dict[str, Any]) -> Fit:
    if not isinstance(content, dict) or content["format"] != FORMAT:
        found = content["format"] if isinstance(content, dict) else content
        raise ValueError(f"its format is {found!r:.40}, this version reads {FORMAT}")
    content = {"left_out": {}, **content}
    for name, kind in (("shards", list), ("settings", dict), ("tiles", int), ("slides", dict), ("left_out", dict)):
        if not isinstance(content[name], kind):
            raise TypeError(f"{name} is {content[name]!r:.40}, where a {kind.__name__} belongs")
    if content["tiles"] < 1 or not content["shards"] or not all(isinstance(each, str) for each in content["shards"]):
        raise ValueError("it is of no tiles, or of no shards")
    weights_K = _numbers(content["mixture"], "weights", ())
    reference_23 = _numbers(content["reference"], "stains", (2, 3))
    strength_2 = _numbers(content["reference"], "strength", (2,))
    _hold_stains(reference_23[None], strength_2[None], ["reference"])
    fit = Fit(
        lab_mean_6=_numbers(content["lab"], "mean", (6,)), lab_std_6=_numbers(content["lab"], "std", (6,)),
        weights_K=weights_K, means_K6=_numbers(content["mixture"], "means", (len(weights_K), 6)),
        covariances_K66=_numbers(content["mixture"], "covariances", (len(weights_K), 6, 6)),
        reference_23=reference_23, reference_strength_2=strength_2, slides=_slides(content["slides"]),
        shards=content["shards"], tiles=content["tiles"], settings=content["settings"],
        left_out=content["left_out"])
    if min(fit.lab_mean_6[3:].min(), fit.lab_std_6.min()) < 0:
        raise ValueError("a deviation in lab is below zero")
    if not 0 < fit.lab_mean_6.min() <= fit.lab_mean_6.max() <= 255:
        raise ValueError(f"lab.mean is {fit.lab_mean_6.tolist()}, not of pictures")
    if weights_K.min() < 0 or abs(weights_K.sum() - 1) > TOLERANCE:
        raise ValueError(f"mixture.weights are {weights_K.tolist()}, not parts of one")
    for number, covariance_66 in enumerate(fit.covariances_K66):
        if not np.allclose(covariance_66, covariance_66.T) or np.linalg.eigvalsh(covariance_66).min() <= 0:
            raise ValueError(f"mixture.covariances[{number}] is not symmetric and positive definite")
    return fit


def _slides(content: dict[str, Any]) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """The slides' own stains; there may be a hundred thousand, so their numbers are looked at together."""
    names = [(dataset, slide) for dataset, slides in content.items() for slide in slides]
    entries = [entry for slides in content.values() for entry in slides.values()]
    for name, entry in zip(names, entries, strict=True):
        if not isinstance(entry, list) or [len(part) for part in entry] != [3, 3, 2]:
            raise ValueError(f"slide {'/'.join(name)} is not haematoxylin, eosin and their strength")
    if not names:
        return {}
    values_S8 = _numbers({"slides": [[*h, *e, *strength] for h, e, strength in entries]}, "slides", (len(names), 8))
    stains_S23, strength_S2 = values_S8[:, :6].reshape(-1, 2, 3), values_S8[:, 6:]
    _hold_stains(stains_S23, strength_S2, ["slide " + "/".join(name) for name in names])
    return dict(zip(names, zip(stains_S23, strength_S2, strict=True), strict=True))


def _hold_stains(stains_S23: np.ndarray, strength_S2: np.ndarray, names: list[str]) -> None:
    lengths_S2 = np.linalg.norm(stains_S23, axis=2)
    for wrong_S, what in (((stains_S23 < 0).any(axis=(1, 2)), "a stain absorbs less than nothing"),
                          ((np.abs(lengths_S2 - 1) > TOLERANCE).any(axis=1), "a stain is not of length one"),
                          ((stains_S23.prod(axis=1).sum(axis=1) > 1 - 1e-4), "both stains are the same"),
                          ((strength_S2 <= 0).any(axis=1), "a strength is not above zero")):
        if wrong_S.any():
            raise ValueError(f"{names[int(wrong_S.argmax())]}: {what}")


def _numbers(content: dict[str, Any], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One array of the file; of the shape () only that it is a list that is not empty is known."""
    try:
        found = np.array(content[name])
    except ValueError:
        raise ValueError(f"{name} are lists of different lengths") from None
    if found.dtype.kind not in "if" or not np.isfinite(found).all():
        raise ValueError(f"{name} holds what is no finite number")
    if found.shape != shape if shape else found.ndim != 1 or not len(found):
        raise ValueError(f"{name} has the shape {found.shape}, not {shape or 'of a list'}")
    return found.astype(np.float64)
