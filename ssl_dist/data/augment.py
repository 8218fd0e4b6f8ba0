"""The random numbers of every view: a pure function of (seed, epoch, position, view).

Each sample and view owns 64 uniforms, so a rank draws its own slice without knowing the others, and a view that uses
one number more does not move its neighbour's.
"""

from dataclasses import dataclass

import numpy as np

from ssl_dist.data import stain
from ssl_dist.data.batch import View

UNIFORMS = 64       # a sample and view; a Philox counter yields four words, so 16 counters
ATTEMPTS = 10       # at a crop that fits, as in torchvision's RandomResizedCrop

# Which of the 64 is what. Never renumber: a run that resumes must find its numbers again.
CROP, PLACE, FLIP, JITTER, COLOUR, GREY, BLUR, SIGMA, SOLARISE, STAIN = 0, 20, 22, 24, 25, 29, 30, 31, 32, 33
STAINED, TURN, RANDSTAIN, COMPONENT, NORMALS = 39, 40, 42, 43, 44          # 50 to 63 are free

LUMA = np.array([0.299, 0.587, 0.114])
TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


@dataclass(frozen=True)
class Numbers:
    """What a kernel needs to draw one view of N tiles, in the order it is applied."""

    box_N4: np.ndarray          # x, y, width, height of the crop as fractions of the tile
    target_N6: np.ndarray       # LAB statistics to bring the tile to, three means and three deviations; NaN: leave it
    stain_N34: np.ndarray       # affine map in natural optical density; (N, 0, 4) where the view has none
    stained_N: np.ndarray       # False: leave the stains, and the map is the identity
    colour_N34: np.ndarray      # affine map of RGB in 0..1
    sigma_N: np.ndarray         # of the blur, pixels of the view; 0: none
    solarise_N: np.ndarray      # True: invert what is brighter than half
    turn_N: np.ndarray          # quarters, counter-clockwise
    flip_N2: np.ndarray         # left-right, up-down


def uniforms(seed: int, epoch: int, view: int, first: int, count: int) -> np.ndarray:
    """(count, 64) numbers in [0, 1) for `count` consecutive positions from `first`."""
    source = np.random.Philox(key=[seed, epoch], counter=[16 * first, 0, view, 0])
    words = source.random_raw(UNIFORMS * count).reshape(count, UNIFORMS)
    return (words >> 11) * 2.0**-53


def numbers(view: View, u_NU: np.ndarray, palette: stain.Palette | None = None) -> Numbers:
    """The numbers of one view from its uniforms; `palette`: what is known of the samples' colours."""
    count = len(u_NU)
    jittered = u_NU[:, JITTER] < view.jitter
    strength = np.array([view.brightness, view.contrast, view.saturation, view.hue])
    change = (2 * u_NU[:, COLOUR:COLOUR + 4] - 1) * strength * jittered[:, None]
    low, high = view.sigma
    return Numbers(
        box_N4=boxes(u_NU, view.scale, view.ratio),
        target_N6=_targets(view, u_NU, palette),
        stain_N34=_stain(view, u_NU, palette) if view.stains else np.empty((count, 0, 4)),
        stained_N=_stained(view, u_NU),
        colour_N34=colour(change, u_NU[:, GREY] < view.grey),
        sigma_N=np.where(u_NU[:, BLUR] < view.blur, low + (high - low) * u_NU[:, SIGMA], 0.0),
        solarise_N=u_NU[:, SOLARISE] < view.solarise,
        turn_N=np.where(u_NU[:, TURN] < view.turn, (4 * u_NU[:, TURN + 1]).astype(np.int64), 0),
        flip_N2=u_NU[:, FLIP:FLIP + 2] < [view.horizontal, view.vertical],
    )


def _stained(view: View, u_NU: np.ndarray) -> np.ndarray:
    return (u_NU[:, STAINED] < view.stained) & view.stains


def _stain(view: View, u_NU: np.ndarray, palette: stain.Palette | None) -> np.ndarray:
    """Scale and shift of each stain (Tellez et al.'s HED-light), in the view's basis, as maps (N, 3, 4) in density."""
    amounts = (2 * u_NU[:, STAIN:STAIN + 6] - 1) * view.stain
    scale, shift = 1 + amounts[:, :3], amounts[:, 3:]
    if view.basis == "fixed":
        matrix, offset = stain.affine(scale, shift)
    else:
        assert palette is not None, f"basis={view.basis} without a fit"
        unmix, mix, factors = palette.basis(view.basis)
        matrix, offset = stain.affine(scale * factors, shift, unmix, mix)
    maps = np.concatenate([matrix, offset[:, :, None]], axis=2)
    return np.where(_stained(view, u_NU)[:, None, None], maps, np.eye(3, 4))


def _targets(view: View, u_NU: np.ndarray, palette: stain.Palette | None) -> np.ndarray:
    if not view.randstain:
        return np.full((len(u_NU), 6), np.nan)
    assert palette is not None, "randstain without a fit"
    drawn = stain.targets(palette.fit, u_NU[:, COMPONENT], stain.normals(u_NU[:, NORMALS:NORMALS + 6]),
                          view.randstain_spread, view.randstain_mixture)
    return np.where(u_NU[:, RANDSTAIN, None] < view.randstain, drawn, np.nan)


def boxes(u_NU: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float]) -> np.ndarray:
    """Crops as fractions of a square tile: the first of ten random shapes that fits, or the whole tile."""
    tries = u_NU[:, CROP:CROP + 2 * ATTEMPTS].reshape(-1, ATTEMPTS, 2)
    area = scale[0] + (scale[1] - scale[0]) * tries[:, :, 0]
    shape = np.exp(np.log(ratio[0]) + (np.log(ratio[1]) - np.log(ratio[0])) * tries[:, :, 1])
    width, height = np.sqrt(area * shape), np.sqrt(area / shape)
    fits = (width <= 1) & (height <= 1)
    chosen = np.arange(len(tries)), fits.argmax(axis=1)
    found = fits.any(axis=1)
    size = np.stack([np.where(found, width[chosen], 1.0), np.where(found, height[chosen], 1.0)], axis=1)
    return np.concatenate([(1 - size) * u_NU[:, PLACE:PLACE + 2], size], axis=1)


def colour(change_N4: np.ndarray, grey_N: np.ndarray) -> np.ndarray:
    """Brightness, contrast, saturation and hue, in this order, and then perhaps grey, as one affine map (N, 3, 4)."""
    count = len(change_N4)
    bright, contrast, saturation = (1 + change_N4[:, number, None, None] for number in range(3))
    turn = 2 * np.pi * change_N4[:, 3]
    rotation = np.zeros((count, 3, 3))
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = np.cos(turn)
    rotation[:, 1, 2] = np.sin(turn)        # I and Q turn against HSV's circle, so that + is + as in torchvision
    rotation[:, 2, 1] = -rotation[:, 1, 2]
    luma = np.tile(LUMA, (3, 1))
    mixing = np.linalg.inv(TO_YIQ) @ rotation @ TO_YIQ @ (saturation * np.eye(3) + (1 - saturation) * luma)
    mixing = np.where(grey_N[:, None, None], luma @ mixing, mixing)
    lift = mixing @ np.full((3, 1), 0.5) * (1 - contrast)
    return np.concatenate([mixing * (bright * contrast), lift], axis=2)
