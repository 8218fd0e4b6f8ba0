"""How the numbers of views are spread: held against torchvision's draws, SciPy, scikit-learn and the papers' formulas.

Every comparison ends in one p. Draws are fixed by their seeds; a right implementation under other seeds would stay
above LEAST in all of them but once in a hundred thousand runs. What the comparisons are worth is shown at the end:
numbers made with a plausible mistake fall below SURE in the very same ones. N samples, C columns of numbers.
"""

import colorsys
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy import special, stats
from sklearn.mixture import GaussianMixture
from torchvision import transforms
from torchvision.transforms import functional, v2

from ssl_dist.data import augment, opencv, stain
from ssl_dist.data.augment import Numbers
from ssl_dist.data.batch import View
from ssl_dist.data.presets import PRESETS

MANY = 20_000
THEIRS = 5_000      # of torchvision, one at a time
LEAST = 1e-9        # of some two thousand comparisons
SURE = 1e-15
SQUARE = (0.75, 4 / 3)
POOL = ThreadPoolExecutor(1)        # starts no thread before it has work


def drawn(view: View, *, first: int = 0, count: int = MANY, palette: stain.Palette | None = None) -> Numbers:
    return augment.numbers(view, augment.uniforms(41, 2, 1, first, count), palette)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Pictures are small, and threads that wait for each other slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def alike(one: np.ndarray, other: np.ndarray) -> float:
    return float(stats.ks_2samp(one, other, method="asymp").pvalue)


def spread(sample: np.ndarray, low: float, high: float) -> float:
    """Whether a sample is uniform, and nothing of it lies outside."""
    return float(stats.kstest(sample, stats.uniform(low, high - low).cdf).pvalue) * bool(
        sample.min() >= low - 1e-12 and sample.max() <= high + 1e-12)


def often(hits: np.ndarray, chance: float) -> float:
    return float(stats.binomtest(int(hits.sum()), len(hits), chance).pvalue)


def as_often(hits: np.ndarray, others: np.ndarray) -> float:
    return float(stats.fisher_exact([[each.sum(), len(each) - each.sum()] for each in (hits, others)]).pvalue)


# ---- crops

@cache
def cut_by_torchvision(scale: tuple[float, float], ratio: tuple[float, float], version: int) -> np.ndarray:
    """Crops of a tile so large that a pixel is a millionth: x, y, width, height."""
    torch.manual_seed(version)
    tile = torch.empty(1, 10**6, 10**6, device="meta")
    if version == 1:
        found = [transforms.RandomResizedCrop.get_params(tile, list(scale), list(ratio)) for _ in range(THEIRS)]
    else:
        maker = v2.RandomResizedCrop(8, scale, ratio)
        made = [maker.make_params([tile]) for _ in range(THEIRS)]
        found = [[each[name] for name in ("top", "left", "height", "width")] for each in made]
    top, left, height, width = np.array(found).T / 1e6
    return np.stack([left, top, width, height], axis=1)


def cut(boxes_N4: np.ndarray) -> dict[str, np.ndarray]:
    x, y, width, height = boxes_N4.T
    return {"x": x, "y": y, "width": width, "height": height, "area": width * height, "shape": np.log(width / height),
            "left of what is left": x[width < 0.999] / (1 - width[width < 0.999])}


def same_cuts(one_N4: np.ndarray, other_N4: np.ndarray) -> float:
    """The smallest p of all that a crop is described by. A millionth is rounded away: whole tiles are whole."""
    return min(alike(np.round(mine, 5), np.round(other, 5))
               for mine, other in zip(cut(one_N4).values(), cut(other_N4).values(), strict=True))


SCALES = sorted({view.scale for preset in PRESETS.values() for view in preset.views})


@pytest.mark.parametrize(("scale", "ratio", "version"), [
    *((scale, SQUARE, 1) for scale in SCALES), ((0.6, 1.0), (0.3, 3.0), 1), ((0.9, 1.0), (0.2, 5.0), 1),
    ((0.08, 1.0), SQUARE, 2), ((0.6, 1.0), (0.3, 3.0), 2)], ids=str)
def test_crops_are_spread_as_torchvisions(scale: tuple, ratio: tuple, version: int) -> None:
    mine, theirs = drawn(View(scale=scale, ratio=ratio)).box_N4, cut_by_torchvision(scale, ratio, version)
    assert same_cuts(mine, theirs) > LEAST
    assert as_often(mine[:, 2] == 1, theirs[:, 2] == 1) > LEAST, "whole tiles"


def test_crops_that_always_fit_have_areas_uniform_shapes_log_uniform_and_places_uniform() -> None:
    found = cut(drawn(View(scale=(0.2, 0.5))).box_N4)
    assert spread(found["area"], 0.2, 0.5) > LEAST
    assert spread(found["shape"], math.log(0.75), math.log(4 / 3)) > LEAST
    assert spread(found["left of what is left"], 0, 1) > LEAST


# ---- colour

COLOURS = ("brightness", "contrast", "saturation", "hue")
YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])     # NTSC


def factors(colour_N34: np.ndarray) -> dict[str, np.ndarray]:
    """What a colour map does: grey stays grey, so its gain is brightness times contrast and its lift is of contrast
    alone; chroma is turned and scaled."""
    gain = colour_N34[:, :, :3].sum(axis=2)
    assert np.ptp(gain, axis=1).max() < 1e-9, "grey takes on colour"
    contrast = 1 - 2 * colour_N34[:, 0, 3]
    chroma = (YIQ @ colour_N34[:, :, :3] @ np.linalg.inv(YIQ))[:, 1:, 1:] / gain[:, :1, None]
    saturation = np.sqrt(np.maximum(np.linalg.det(chroma), 0))
    turn = np.arctan2(chroma[:, 1, 0], chroma[:, 0, 0]) / (2 * np.pi)
    return dict(zip(COLOURS, (gain[:, 0] / contrast, contrast, saturation, turn), strict=True))


@cache
def jittered_by_torchvision(strengths: tuple[float, ...], version: int) -> dict[str, np.ndarray]:
    torch.manual_seed(version)
    maker = (transforms if version == 1 else v2).ColorJitter(*strengths)
    if version == 1:
        found = [maker.get_params(maker.brightness, maker.contrast, maker.saturation, maker.hue)[1:]
                 for _ in range(THEIRS)]
    else:
        made = [maker.make_params([]) for _ in range(THEIRS)]
        found = [[each[f"{name}_factor"] for name in COLOURS] for each in made]
    return dict(zip(COLOURS, np.array(found).T, strict=True))


STRENGTHS = sorted({(view.brightness, view.contrast, view.saturation, view.hue) for preset in PRESETS.values()
                    for view in preset.views})


@pytest.mark.parametrize(("strengths", "version"), [*((each, 1) for each in STRENGTHS), ((0.8, 0.8, 0.8, 0.2), 2),
                                                   ((1.0, 0.9, 1.0, 0.5), 2)], ids=str)
def test_factors_of_colour_are_spread_as_torchvisions(strengths: tuple[float, ...], version: int) -> None:
    view = View(jitter=1, grey=0, **dict(zip(COLOURS, strengths, strict=True)))
    mine, theirs = factors(drawn(view).colour_N34), jittered_by_torchvision(strengths, version)
    for name, strength in zip(COLOURS, strengths, strict=True):
        centre = float(name != "hue")
        assert alike(mine[name], theirs[name]) > LEAST, name
        assert spread(mine[name], centre - strength, centre + strength) > LEAST, name
        assert name == "hue" or mine[name].min() >= 0, name


@pytest.mark.parametrize("sigma", [(0.1, 2.0), (0.5, 0.6)])
def test_sigmas_are_spread_as_torchvisions(sigma: tuple[float, float]) -> None:
    torch.manual_seed(0)
    mine = drawn(View(blur=1, sigma=sigma)).sigma_N
    maker = v2.GaussianBlur(9, sigma)
    for theirs in ([transforms.GaussianBlur.get_params(*sigma) for _ in range(THEIRS)],
                   [maker.make_params([])["sigma"][0] for _ in range(THEIRS)]):
        assert alike(mine, np.array(theirs)) > LEAST
    assert spread(mine, *sigma) > LEAST


# ---- chances

def hits(view: View, palette: stain.Palette | None = None) -> dict[str, np.ndarray]:
    """Which samples each step touches."""
    found = drawn(view, palette=palette)
    matrix = found.colour_N34[:, :, :3]
    return {"jitter": np.abs(found.colour_N34[:, 0, 3]) > 1e-9, "grey": np.ptp(matrix, axis=1).max(axis=1) < 1e-9,
            "blur": found.sigma_N > 0, "solarise": found.solarise_N, "horizontal": found.flip_N2[:, 0],
            "vertical": found.flip_N2[:, 1], "stained": found.stained_N, "randstain": ~np.isnan(found.target_N6[:, 0])}


def touched_by_torchvision(name: str, chance: float, version: int) -> np.ndarray:
    """How often torchvision's own step changes a picture that it must change."""
    torch.manual_seed(version)
    of = transforms if version == 1 else v2
    step = {"grey": lambda: of.RandomGrayscale(chance), "horizontal": lambda: of.RandomHorizontalFlip(chance),
            "vertical": lambda: of.RandomVerticalFlip(chance), "solarise": lambda: of.RandomSolarize(128, chance)}.get(
                name, lambda: of.RandomApply([lambda picture: picture + 1], chance))()
    picture = torch.tensor([[[0, 10], [20, 30]], [[90, 40], [50, 60]], [[200, 210], [220, 230]]], dtype=torch.uint8)
    return np.array([not torch.equal(step(picture), picture) for _ in range(THEIRS // 2)])


@pytest.mark.parametrize("chance", [0.1, 0.2, 0.5, 0.8])
def test_every_step_comes_as_often_as_asked_and_as_torchvisions_does(chance: float) -> None:
    names = ("jitter", "grey", "blur", "solarise", "horizontal", "vertical", "stained", "randstain")
    view = View(stain=0.1, contrast=0.5, **dict.fromkeys(names, chance))
    for name, found in hits(view, palette(MANY)).items():
        assert often(found, chance) > LEAST, name
        if name not in ("stained", "randstain"):
            for version in (1, 2):
                assert as_often(found, touched_by_torchvision(name, chance, version)) > LEAST, name


@pytest.mark.parametrize("name", ["jitter", "grey", "blur", "solarise", "horizontal", "vertical", "stained",
                                  "randstain"])
def test_a_chance_of_nought_never_comes_and_one_of_one_always(name: str) -> None:
    for chance in (0.0, 1.0):
        assert (hits(View(stain=0.1, contrast=0.5, **{name: chance}), palette(MANY))[name] == chance).all()


def test_turns_are_the_four_quarters_alike_where_they_are_on() -> None:
    def counts(chance: float) -> np.ndarray:
        return np.bincount(drawn(View(turn=chance)).turn_N, minlength=4)

    assert stats.chisquare(counts(1.0)).pvalue > LEAST
    assert stats.chisquare(counts(0.6), MANY * np.array([0.55, 0.15, 0.15, 0.15])).pvalue > LEAST
    assert counts(0.0).tolist() == [MANY, 0, 0, 0] and len(counts(1.0)) == 4


def symmetries(view: View, draws: int = 8000) -> np.ndarray:
    """How often each of the eight symmetries of the square comes, seen in pictures."""
    tile = np.arange(0, 192, 12, dtype=np.uint8).reshape(4, 4, 1).repeat(3, axis=2)
    known = {np.rot90(side, turn).tobytes(): number for number, (side, turn) in enumerate(
        (side, turn) for side in (tile, tile[:, ::-1]) for turn in range(4))}
    assert len(known) == 8
    still = replace(view, size=4, scale=(1.0, 1.0), ratio=(1.0, 1.0), jitter=0, grey=0, blur=0, solarise=0)
    (found,) = opencv.views(lambda row: tile, [drawn(still, count=draws)], [4], POOL)
    return np.bincount([known[picture.tobytes()] for picture in found], minlength=8)


def test_dehaenes_turns_and_flips_make_the_eight_symmetries_of_the_square_alike() -> None:
    (view,) = PRESETS["dehaene"].views
    assert stats.chisquare(symmetries(view)).pvalue > LEAST


# ---- stains

def palette(count: int, far: float = 1.0) -> stain.Palette:
    """A fit whose deviations fall to their floor now and then. `far`: two of its three components so much apart."""
    rng = np.random.default_rng(8)
    mean, deviation = np.array([158.0, 151, 117, 37, 8, 6]), np.array([30.0, 8, 6, 16, 3, 2])
    roots = rng.normal(0, 0.25, (3, 6, 6)) + np.eye(6) * [[[0.3]], [[0.5]], [[0.4]]]
    covariances = deviation[:, None] * (roots @ roots.swapaxes(1, 2)) * deviation / far**4
    means = mean + far * deviation * np.array([[-0.9] * 6, [0.7, 0.5, -0.4, 0.6, 0.2, 0.9], [0.1, 0.2, 1, 0, 0.4, 0.1]])
    fit = stain.Fit(lab_mean_6=mean, lab_std_6=deviation, weights_K=np.array([0.2, 0.5, 0.3]), means_K6=means,
                    covariances_K66=covariances, reference_23=np.array([[0.6, 0.75, 0.28], [0.2, 0.95, 0.24]]),
                    reference_strength_2=np.array([1.2, 0.9]), slides={}, shards=[], tiles=1, settings={})
    return stain.Palette(fit, np.broadcast_to(hed(), (count, 3, 3)), np.ones((count, 2)))


def hed() -> np.ndarray:
    """Ruifrok and Johnston's haematoxylin and eosin, normalised, and a residual orthogonal to both."""
    rows = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]])
    rows /= np.sqrt((rows**2).sum(axis=1, keepdims=True))
    residual = np.cross(*rows)
    return np.stack([*rows, residual / math.sqrt(residual @ residual)])


def amounts(stain_N34: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factor and shift of each stain. Densities as rows: OD' = OD S⁻¹ diag(a) S + b S, so that S Aᵀ S⁻¹ = diag(a)."""
    stains = hed()
    inner = stains @ stain_N34[:, :, :3].swapaxes(1, 2) @ np.linalg.inv(stains)
    assert np.abs(inner * (1 - np.eye(3))).max() < 1e-9, "a stain turns into another"
    return np.einsum("nii->ni", inner), stain_N34[:, :, 3] @ np.linalg.inv(stains)


@pytest.mark.parametrize("strength", [0.05, 1.0])
def test_stains_are_scaled_by_one_plus_or_minus_and_shifted_by_plus_or_minus_evenly_each_alone(strength: float) -> None:
    scale, shift = amounts(drawn(View(stain=strength)).stain_N34)
    for number in range(3):
        assert spread(scale[:, number], 1 - strength, 1 + strength) > LEAST
        assert spread(shift[:, number], -strength, strength) > LEAST
    assert independent(np.column_stack([scale, shift])[:MANY // 2]) > LEAST


def normal(targets_N6: np.ndarray, fit: stain.Fit, spread: float) -> float:
    """RandStainNA: each of the six normal about the mean of means, and nothing below a tenth of the mean deviation."""
    worst = 1.0
    for number in range(6):
        of = stats.norm(fit.lab_mean_6[number], spread * fit.lab_std_6[number])
        seen = targets_N6[:, number]
        if number >= 3:
            floor = 0.1 * fit.lab_mean_6[number]
            if seen.min() < floor:
                return 0.0
            worst = min(worst, often(seen == floor, of.cdf(floor)))
            seen = seen[seen > floor]
            low = of.cdf(floor)
            worst = min(worst, spread_of(seen, lambda value, low=low, of=of: (of.cdf(value) - low) / (1 - low)))
        else:
            worst = min(worst, spread_of(seen, of.cdf))
    return worst


def spread_of(sample: np.ndarray, distribution: Callable) -> float:
    return float(stats.kstest(sample, distribution).pvalue)


@pytest.mark.parametrize("width", [0.7, 1.0, 1.4])
def test_randstainna_draws_six_normals_with_a_floor_under_the_deviations(width: float) -> None:
    known = palette(MANY)
    view = View(randstain=1, randstain_spread=width)
    found = drawn(view, palette=known).target_N6
    assert normal(found, known.fit, width) > LEAST
    assert independent(found[:MANY // 2]) > LEAST
    floors = 0.1 * known.fit.lab_mean_6[3:]
    assert (found[:, 3:] == floors).any(axis=0).all(), "the floor was never reached, and not tried"
    assert (found[:, 3:].min(axis=0) == floors).all()


@cache
def mixed_by_scikit(width: float) -> np.ndarray:
    """Samples of scikit-learn's own mixture, moved about the mean of all as the spread says."""
    fit = palette(1).fit
    of = GaussianMixture(3, covariance_type="full", random_state=3)
    of.weights_, of.means_, of.covariances_ = fit.weights_K, fit.means_K6, fit.covariances_K66
    of.precisions_cholesky_ = np.linalg.cholesky(np.linalg.inv(fit.covariances_K66))
    found = fit.lab_mean_6 + width * (of.sample(MANY)[0] - fit.lab_mean_6)
    found[:, 3:] = found[:, 3:].clip(0.1 * fit.lab_mean_6[3:])
    return found


def same_clouds(one_N6: np.ndarray, other_N6: np.ndarray) -> float:
    """Coordinates, projections, and products of two coordinates, which tell correlations."""
    centre, scale = other_N6.mean(axis=0), other_N6.std(axis=0)
    one, other = (one_N6 - centre) / scale, (other_N6 - centre) / scale
    directions = np.random.default_rng(4).normal(size=(6, 8))
    pairs = [(a, b) for a in range(6) for b in range(a)]
    return min(*(alike(one_N6[:, number], other_N6[:, number]) for number in range(6)),
               *(alike(one @ along, other @ along) for along in directions.T),
               *(alike(one[:, a] * one[:, b], other[:, a] * other[:, b]) for a, b in pairs))


@pytest.mark.parametrize("width", [0.7, 1.0])
def test_the_mixture_is_scikit_learns(width: float) -> None:
    view = View(randstain=1, randstain_spread=width, randstain_mixture=True)
    mine, theirs = drawn(view, palette=palette(MANY)).target_N6, mixed_by_scikit(width)
    assert same_clouds(mine, theirs) > LEAST
    assert np.corrcoef(mine.T) == pytest.approx(np.corrcoef(theirs.T), abs=0.05)
    assert np.abs(np.corrcoef(theirs.T) - np.eye(6)).max() > 0.4, "a cloud without correlations proves nothing"


# ---- normal numbers

def test_normals_are_normal() -> None:
    assert spread_of(stain.normals(augment.uniforms(5, 0, 0, 0, 400).ravel()), stats.norm.cdf) > LEAST


def test_normals_are_scipys_inverse_and_finite_to_the_ends() -> None:
    ends = np.array([0.0, 2.0**-53, 2.0**-52, 1e-10, 0.5, 1 - 1e-10, 1 - 2.0**-52, 1 - 2.0**-53])
    u = np.concatenate([ends, augment.uniforms(5, 0, 0, 0, 200).ravel()])
    found = stain.normals(u)
    np.testing.assert_allclose(found, special.ndtri(np.maximum(u, 2.0**-53)), rtol=1e-12, atol=1e-15)
    assert np.isfinite(found).all() and found.shape == u.shape and found.dtype == np.float64
    assert found[0] == found[1] == -found[7] == found.min() == pytest.approx(-8.2095, abs=1e-3)
    assert found[4] == 0 and (np.diff(found[1:8]) > 0).all()


# ---- independence

ALWAYS = View(scale=(0.2, 0.5), jitter=1, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grey=0, blur=1,
              stain=0.3, randstain=1, turn=1, solarise=0.5)
SOMETIMES = replace(ALWAYS, jitter=0.5, grey=0.5, blur=0.5, stained=0.5, randstain=0.5)


def columns(u_NU: np.ndarray) -> np.ndarray:
    """Every number that a view draws, a column each, made so that none follows from another."""
    always = augment.numbers(ALWAYS, u_NU, palette(len(u_NU)))
    x, y, width, height = always.box_N4.T
    apart = palette(len(u_NU), far=6.0)
    first = augment.numbers(replace(ALWAYS, randstain_mixture=True), u_NU, apart).target_N6[:, :1]
    kind = np.abs(first - apart.fit.means_K6[:, 0]).argmin(axis=1)      # they do not touch
    sometimes = augment.numbers(SOMETIMES, u_NU, palette(len(u_NU)))
    scale, shift = amounts(always.stain_N34)
    return np.column_stack([
        x / (1 - width), y / (1 - height), width * height, width / height, always.flip_N2,
        np.abs(sometimes.colour_N34[:, 0, 3]) > 1e-9, *factors(always.colour_N34).values(),
        np.ptp(sometimes.colour_N34[:, :, :3], axis=1).max(axis=1) < 1e-9, sometimes.sigma_N > 0, always.sigma_N,
        always.solarise_N, scale, shift, sometimes.stained_N, always.turn_N, np.isnan(sometimes.target_N6[:, 0]),
        kind, always.target_N6])


def independent(one: "np.ndarray | Sorted", other: "np.ndarray | Sorted | None" = None) -> float:
    """The smallest p that any number of one hangs together with any of the other, by rank and by a table of 4 x 4 bins,
    times how many pairs there are. Without `other`: pairs of different numbers of one."""
    first = one if isinstance(one, Sorted) else Sorted.of(one)
    second = first if other is None else other if isinstance(other, Sorted) else Sorted.of(other)
    pairs = np.ones((first.ranks_NC.shape[1], second.ranks_NC.shape[1]), bool)
    pairs = np.tril(pairs, -1) if other is None else pairs
    count = len(first.ranks_NC)
    by_rank = 2 * stats.norm.sf(np.abs(first.ranks_NC.T @ second.ranks_NC) / math.sqrt(count))
    seen = np.einsum("nci,ndj->cdij", first.bins_NC4, second.bins_NC4, optimize=True)
    expected = np.einsum("ci,dj->cdij", first.bins_NC4.sum(axis=0), second.bins_NC4.sum(axis=0)) / count
    chi = np.where(expected > 0, (seen - expected) ** 2 / np.maximum(expected, 1e-9), 0).sum(axis=(2, 3))
    freedom = np.multiply.outer(*(each.bins_NC4.any(axis=0).sum(axis=1) - 1 for each in (first, second)))
    return float(min(by_rank[pairs].min(), stats.chi2.sf(chi, freedom)[pairs].min()) * 2 * pairs.sum())


@dataclass(frozen=True)
class Sorted:
    """Columns of numbers as ranks of mean 0 and deviation 1, and as ones and noughts: each value, where there are four
    at most, else each quarter."""

    ranks_NC: np.ndarray
    bins_NC4: np.ndarray

    @staticmethod
    def of(values_NC: np.ndarray) -> "Sorted":
        ranks = stats.rankdata(values_NC, axis=0)
        bins = np.zeros((*values_NC.shape, 4))
        for number, column in enumerate(values_NC.T):
            different = np.unique(column)
            codes = np.searchsorted(different, column) if len(different) <= 4 else \
                (4 * (ranks[:, number] - 0.5)).astype(int) // len(column)
            bins[np.arange(len(column)), number, codes] = 1
        return Sorted(stats.zscore(ranks, axis=0), bins)

    def __getitem__(self, rows: slice) -> "Sorted":
        return Sorted(self.ranks_NC[rows], self.bins_NC4[rows])


@cache
def numbers_of(seed: int = 1, epoch: int = 0, view: int = 0) -> Sorted:
    """Drawn 32 samples at a time, as a rank draws its share of a batch."""
    batches = [augment.uniforms(seed, epoch, view, first, 32) for first in range(0, MANY // 2, 32)]
    return Sorted.of(columns(np.concatenate(batches)))


def test_the_numbers_of_a_view_do_not_hang_together() -> None:
    assert numbers_of().ranks_NC.shape[1] == 31
    assert independent(numbers_of()) > LEAST


@pytest.mark.parametrize("other", [{"view": 1}, {"view": 9}, {"epoch": 1}, {"seed": 2}], ids=str)
def test_numbers_of_other_views_epochs_and_seeds_do_not_hang_together(other: dict) -> None:
    assert independent(numbers_of(), numbers_of(**other)) > LEAST


@pytest.mark.parametrize("lag", [1, 2, 16])
def test_numbers_of_neighbours_do_not_hang_together(lag: int) -> None:
    assert independent(numbers_of()[:-lag], numbers_of()[lag:]) > LEAST


# ---- what the numbers do to pictures, as torchvision does it

def still(**changes: object) -> Numbers:
    """The numbers of one sample that leave a tile as it is, but for the changes."""
    numbers = Numbers(box_N4=np.array([[0.0, 0, 1, 1]]), target_N6=np.full((1, 6), np.nan),
                      stain_N34=np.empty((1, 0, 4)), stained_N=np.zeros(1, bool), colour_N34=np.eye(3, 4)[None],
                      sigma_N=np.zeros(1), solarise_N=np.zeros(1, bool), turn_N=np.zeros(1, int),
                      flip_N2=np.zeros((1, 2), bool))
    return replace(numbers, **{name: np.array([value]) for name, value in changes.items()})     # type: ignore[arg-type]


def ours(tile: np.ndarray, size: int | None = None, **changes: object) -> np.ndarray:
    """A tile drawn by the kernel, as signed numbers."""
    (found,) = opencv.views(lambda row: tile, [still(**changes)], [size or len(tile)], POOL)
    return found[0].astype(int)


def colour(bright: float = 1, contrast: float = 1, saturation: float = 1, hue: float = 0,
           grey: bool = False) -> np.ndarray:
    return augment.colour(np.array([[bright - 1, contrast - 1, saturation - 1, hue]]), np.array([grey]))[0]


def theirs(step: Callable, tile: np.ndarray, *words: object, **more: object) -> np.ndarray:
    """What a function of torchvision makes of a tile."""
    return step(torch.from_numpy(tile.transpose(2, 0, 1).copy()), *words, **more).numpy().transpose(1, 2, 0).astype(int)


@pytest.fixture(scope="module")
def tiles(data: Path) -> list[np.ndarray]:
    """Sixteen real tiles of 96 pixels."""
    files = sorted((data / "pcam_subset_96px/valid").rglob("*.jpg"))[::63]
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


@pytest.fixture(scope="module")
def large(data: Path) -> list[np.ndarray]:
    """Three real tiles of 1024 pixels."""
    files = sorted((data / "osteosarcoma_tcia_1024px").rglob("*.jpg"))[::20]
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


@pytest.mark.parametrize("factor", [0.0, 0.2, 0.6, 1.0, 1.4, 1.8])
def test_brightness_saturation_and_grey_are_torchvisions(factor: float, tiles: list[np.ndarray]) -> None:
    for tile in tiles:
        for mine, other in ((colour(bright=factor), theirs(functional.adjust_brightness, tile, factor)),
                            (colour(saturation=factor), theirs(functional.adjust_saturation, tile, factor)),
                            (colour(grey=True), theirs(functional.rgb_to_grayscale, tile, 3))):
            assert np.abs(ours(tile, colour_N34=mine) - other).max() <= 2


@pytest.mark.parametrize("factor", [0.2, 0.6, 1.4, 1.8])
def test_contrast_is_torchvisions_about_mid_grey_in_place_of_the_pictures_mean(factor: float,
                                                                              tiles: list[np.ndarray]) -> None:
    for tile in tiles:
        mean = functional.rgb_to_grayscale(torch.from_numpy(tile.transpose(2, 0, 1).copy())).float().mean().item()
        mine = ours(tile, colour_N34=colour(contrast=factor))
        other = theirs(functional.adjust_contrast, tile, factor)
        inside = (mine > 0) & (mine < 255) & (other > 0) & (other < 255)
        assert inside.mean() > 0.01
        assert np.abs(mine - other - (1 - factor) * (127.5 - mean))[inside].max() <= 2
        # ... and so the same, where the mean is mid grey.
        balanced = np.clip(tile.astype(float) * 0.5 + 127.5 - mean / 2, 0, 255).round().astype(np.uint8)
        assert np.abs(ours(balanced, colour_N34=colour(contrast=factor))
                      - theirs(functional.adjust_contrast, balanced, factor)).max() <= 2


@pytest.mark.parametrize("grey", [False, True])
def test_the_steps_of_colour_together_are_torchvisions_one_after_the_other(grey: bool, tiles: list[np.ndarray]) -> None:
    for tile in tiles:
        picture = functional.adjust_brightness(torch.from_numpy(tile.transpose(2, 0, 1).copy()) / 255, 0.9)
        mean = functional.rgb_to_grayscale(picture).mean().item()
        picture = functional.adjust_contrast(picture, 0.7) + 0.3 * (0.5 - mean)
        picture = functional.adjust_saturation(picture, 1.3)
        picture = functional.rgb_to_grayscale(picture, 3) if grey else picture
        mine = ours(tile, colour_N34=colour(0.9, 0.7, 1.3, 0, grey))
        assert np.abs(mine - 255 * picture.clamp(0, 1).numpy().transpose(1, 2, 0)).max() <= 2


def hue_of(pixel: np.ndarray) -> float:
    return colorsys.rgb_to_hsv(*np.clip(pixel, 0, 1).tolist())[0]


def turned(turn: float) -> tuple[np.ndarray, np.ndarray]:
    """How far the hues of 60 saturated colours move with us and with torchvision, in turns."""
    matrix, mine, other = colour(hue=turn), [], []
    for number in range(60):
        pixel = np.array(colorsys.hsv_to_rgb(number / 60, 0.5, 0.7))
        before = hue_of(pixel)
        after = functional.adjust_hue(torch.tensor(pixel, dtype=torch.float32).view(3, 1, 1), turn).flatten().numpy()
        for found, moved in ((mine, matrix[:, :3] @ pixel + matrix[:, 3]), (other, after)):
            found.append((hue_of(moved) - before + 0.5) % 1 - 0.5)
    return np.array(mine), np.array(other)


@pytest.mark.parametrize("turn", [-0.2, -0.1, -0.05, 0.05, 0.1, 0.2])
def test_hue_moves_as_far_as_torchvisions(turn: float) -> None:
    """The circle of YIQ is not that of HSV: a stretch of one is up to half as long again as the other's, or half of it
    shorter; all around, they are equal."""
    mine, other = map(np.abs, turned(turn))
    assert other == pytest.approx(abs(turn), abs=1e-3)
    assert ((mine > 0.5 * other) & (mine < 1.6 * other)).all()
    assert mine.mean() == pytest.approx(abs(turn), rel=0.08)


@pytest.mark.parametrize("turn", [-0.05, 0.2])
def test_hue_moves_the_way_that_torchvisions_does(turn: float) -> None:
    mine, other = turned(turn)
    assert (np.sign(mine) == np.sign(other)).all(), f"{mine.mean():+.3f} turns, torchvision's {other.mean():+.3f}"


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.37, 2.0, 4.0])
def test_blur_is_torchvisions(sigma: float, tiles: list[np.ndarray]) -> None:
    window = 2 * math.ceil(3 * sigma) + 1
    for tile in tiles:
        assert np.abs(ours(tile, sigma_N=sigma) - theirs(functional.gaussian_blur, tile, window, sigma)).max() <= 2


def test_solarise_is_torchvisions_and_pillows_to_the_bit(tiles: list[np.ndarray]) -> None:
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    for tile in [*tiles, every]:
        mine = ours(tile, solarise_N=True)
        assert np.array_equal(mine, theirs(functional.solarize, tile, 128))
        assert np.array_equal(mine, ImageOps.solarize(Image.fromarray(tile), 128))


def test_flips_and_turns_are_torchvisions_to_the_bit(tiles: list[np.ndarray]) -> None:
    for tile in tiles:
        assert np.array_equal(ours(tile, flip_N2=[True, False]), theirs(functional.hflip, tile))
        assert np.array_equal(ours(tile, flip_N2=[False, True]), theirs(functional.vflip, tile))
        for quarters in range(4):
            assert np.array_equal(ours(tile, turn_N=quarters), theirs(functional.rotate, tile, 90.0 * quarters))


def pixels(box: np.ndarray, side: int) -> tuple[int, int, int, int]:
    """Top, left, height, width of a box in whole pixels."""
    left, top, width, height = (math.floor(each * side + 0.5) for each in box)
    return min(top, side - height), min(left, side - width), height, width


@pytest.mark.parametrize("size", [64, 96, 131, 224])
def test_crop_and_resize_are_torchvisions_without_antialias_where_nothing_is_halved(size: int,
                                                                                 tiles: list[np.ndarray]) -> None:
    boxes = drawn(View(scale=(0.1, 1.0)), count=64).box_N4
    for number, box in enumerate(boxes):
        tile = tiles[number % 16]
        other = theirs(functional.resized_crop, tile, *pixels(box, 96), [size, size], antialias=False)
        assert np.abs(ours(tile, size, box_N4=box) - other).max() <= 2, box


@pytest.mark.parametrize("size", [48, 96, 224])
def test_a_large_tile_in_a_small_view_is_nearer_to_pillows_antialias_than_bilinear_is(size: int,
                                                                                   large: list[np.ndarray]) -> None:
    halved = 0
    for number, box in enumerate(drawn(View(scale=(0.25, 1.0)), count=60).box_N4):
        tile = large[number % 3]
        top, left, height, width = pixels(box, 1024)
        if min(height, width) < 2 * size:
            continue
        part = tile[top:top + height, left:left + width]
        smooth = np.asarray(Image.fromarray(part).resize((size, size), Image.Resampling.BILINEAR)).astype(int)
        plain = cv2.resize(part, (size, size), interpolation=cv2.INTER_LINEAR).astype(int)
        mine = ours(tile, size, box_N4=box)
        assert np.abs(mine - smooth).mean() < 0.7 * np.abs(plain - smooth).mean(), box
        halved += 1
    assert halved > 20


# ---- what the comparisons are worth

def hand(count: int = MANY) -> np.random.Generator:
    return np.random.default_rng(count)


def crops_with(mistake: str) -> tuple[float, float]:
    """p of crops that always fit, drawn as torchvision draws them, and with a mistake."""
    low, high = 0.05, 0.4

    def made(mistake: str) -> float:
        rng = hand()
        area, shape, u = rng.uniform(low, high, MANY), np.exp(rng.uniform(*np.log(SQUARE), MANY)), rng.random((MANY, 2))
        if mistake == "shape linear":
            shape = rng.uniform(*SQUARE, MANY)
        elif mistake == "shape above one only":
            shape = np.maximum(shape, 1 / shape)
        elif mistake == "side drawn in place of area":
            area = rng.uniform(math.sqrt(low), math.sqrt(high), MANY) ** 2
        size = np.stack([np.sqrt(area * shape), np.sqrt(area / shape)], axis=1)
        place = (1 - size) * u
        if mistake == "place pushed inside":
            place = np.minimum(u, 1 - size)
        elif mistake == "place about the middle":
            place = (1 - size) * (u + rng.random((MANY, 2))) / 2
        return same_cuts(np.concatenate([place, size], axis=1), cut_by_torchvision((low, high), SQUARE, 1))

    return made(""), made(mistake)


def retries_with(mistake: str) -> tuple[float, float]:
    """p of crops that often do not fit at the first try."""
    def made(mistake: str) -> float:
        rng, found = hand(), np.empty((MANY // 2, 4))
        for row in range(len(found)):
            wide = tall = 1.0
            area = rng.uniform(0.6, 1)
            for attempt in range(1 if mistake in ("one try", "cut off at the edge") else 10):
                if attempt and mistake != "area drawn once":
                    area = rng.uniform(0.6, 1)
                shape = math.exp(rng.uniform(math.log(0.3), math.log(3.0)))
                width, height = math.sqrt(area * shape), math.sqrt(area / shape)
                if max(width, height) <= 1 or mistake == "cut off at the edge":
                    wide, tall = min(width, 1.0), min(height, 1.0)
                    break
            found[row] = rng.random() * (1 - wide), rng.random() * (1 - tall), wide, tall
        return same_cuts(found, cut_by_torchvision((0.6, 1.0), (0.3, 3.0), 1))

    return made(""), made(mistake)


def factor_with(name: str, strength: float, wrong: Callable[[np.random.Generator], np.ndarray]) -> tuple[float, float]:
    """p of the factors of one step of colour, against torchvision's."""
    other = jittered_by_torchvision(tuple(strength if each == name else 0.1 for each in COLOURS), 1)[name]
    centre = float(name != "hue")
    return (alike(hand().uniform(max(centre - strength, 0.0 if centre else -1.0), centre + strength, MANY), other),
            alike(wrong(hand()), other))


def sigma_with(wrong: Callable[[np.random.Generator], np.ndarray]) -> tuple[float, float]:
    torch.manual_seed(0)
    other = np.array([transforms.GaussianBlur.get_params(0.1, 2.0) for _ in range(THEIRS)])
    return alike(hand().uniform(0.1, 2.0, MANY), other), alike(wrong(hand()), other)


def chance_with(chance: float, wrong: float) -> tuple[float, float]:
    return often(hand().random(MANY) < chance, chance), often(hand().random(MANY) < wrong, chance)


def amounts_with(wrong: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
    """p of six amounts of stain, three scales and three shifts, each in its interval and alone."""
    def held(amounts_N6: np.ndarray) -> float:
        return min(independent(amounts_N6), *(spread(amounts_N6[:, number], float(number < 3) - 0.2,
                                                     float(number < 3) + 0.2) for number in range(6)))

    right = np.array([1, 1, 1, 0, 0, 0]) + hand().uniform(-0.2, 0.2, (MANY // 2, 6))
    return held(right), held(wrong(right.copy()))


def residual_hardly_moved(amounts_N6: np.ndarray) -> np.ndarray:
    return (amounts_N6 - [1, 1, 1, 0, 0, 0]) * [1, 1, 0.1, 1, 1, 0.1] + [1, 1, 1, 0, 0, 0]


def normals_with(width: float,
                 wrong: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> tuple[float, float]:
    """p of RandStainNA's statistics; `wrong` makes them of means, deviations and normal numbers."""
    fit = palette(1).fit
    mean, deviation = fit.lab_mean_6, fit.lab_std_6
    floor = np.concatenate([np.full(3, -np.inf), 0.1 * mean[3:]])
    z = hand().normal(size=(MANY, 6))
    return (normal(np.maximum(mean + width * deviation * z, floor), fit, width),
            normal(np.maximum(wrong(mean, deviation, z), floor), fit, width))


def floored_with(wrong_of: Callable[[float], float]) -> tuple[float, float]:
    """p of statistics with another floor: the wrong one makes a deviation of one, both in parts of the mean."""
    fit = palette(1).fit
    found = fit.lab_mean_6 + 1.4 * fit.lab_std_6 * hand().normal(size=(MANY, 6))
    right, wrong = found.copy(), found.copy()
    right[:, 3:] = np.maximum(found[:, 3:], 0.1 * fit.lab_mean_6[3:])
    wrong[:, 3:] = np.vectorize(wrong_of)(found[:, 3:] / fit.lab_mean_6[3:]) * fit.lab_mean_6[3:]
    return normal(right, fit, 1.4), normal(wrong, fit, 1.4)


def mixture_with(mistake: str) -> tuple[float, float]:
    """p of the mixture, sample by sample in a plain loop."""
    fit, width = palette(1).fit, 0.7
    def made(mistake: str) -> float:
        rng, found = hand(), np.empty((MANY // 2, 6))
        roots = [np.linalg.cholesky(each) for each in fit.covariances_K66]
        for row in range(len(found)):
            kind = rng.choice(3, p=None if mistake == "components alike" else fit.weights_K)
            root, z = roots[kind], rng.normal(size=6)
            if mistake == "root transposed":
                root = root.T
            elif mistake == "each number alone":
                root = np.diag(np.sqrt(np.diag(fit.covariances_K66[kind])))
            away = fit.means_K6[kind] - fit.lab_mean_6
            found[row] = fit.lab_mean_6 + (away + width * root @ z if mistake == "spread within a component only"
                                           else width * (away + root @ z))
        found[:, 3:] = found[:, 3:].clip(0.1 * fit.lab_mean_6[3:])
        return same_clouds(found, mixed_by_scikit(width))

    return made(""), made(mistake)


def turns_with(wrong: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
    def held(turns: np.ndarray) -> float:
        return float(stats.chisquare(np.bincount(turns, minlength=4)).pvalue)

    u = hand().random(MANY)
    return held((4 * u).astype(int)), held(wrong(u))


def uniforms_with(mistake: str) -> tuple[float, float]:
    """p that numbers do not hang together, made of uniforms as they should not be: of one sample and the next, or of
    one view and another."""
    def made(mistake: str) -> float:
        count = 4000
        if mistake == "counters of neighbours overlap by half":
            words = augment.uniforms(1, 0, 0, 0, count).reshape(-1)
            u = np.lib.stride_tricks.sliding_window_view(words, 64)[::32]
            return independent(columns(u[:-1]), columns(u[1:]))
        u, other = augment.uniforms(1, 0, 0, 0, count), augment.uniforms(1, 0, 1, 0, count)
        if mistake == "the view is not in the counter":
            other = u
        elif mistake == "views are each other's mirror":
            other = 1 - 2.0**-53 - u
        elif mistake == "a view is another, folded in the middle":
            other = np.abs(2 * u - 1)
        elif mistake == "one uniform serves both flips":
            other[:, 23] = other[:, 22]
            return independent(columns(other))
        elif mistake == "one uniform serves two strengths of colour":
            other[:, 26] = other[:, 25]
            return independent(columns(other))
        elif mistake == "samples come in pairs":
            u = u.repeat(2, axis=0)[:count]
            return independent(columns(u)[:-1], columns(u)[1:])
        return independent(columns(u), columns(other))

    return made(""), made(mistake)


def symmetries_with(**changes: float) -> tuple[float, float]:
    (view,) = PRESETS["dehaene"].views
    return (float(stats.chisquare(symmetries(view)).pvalue),
            float(stats.chisquare(symmetries(replace(view, **changes))).pvalue))


MISTAKES: dict[str, Callable[[], tuple[float, float]]] = {
    **{f"crop: {each}": lambda each=each: crops_with(each) for each in (
        "shape linear", "shape above one only", "side drawn in place of area", "place pushed inside",
        "place about the middle")},
    **{f"crop: {each}": lambda each=each: retries_with(each) for each in (
        "one try", "area drawn once", "cut off at the edge")},
    "brightness: below nought": lambda: factor_with("brightness", 1.2, lambda rng: rng.uniform(-0.2, 2.2, MANY)),
    "contrast: exponential": lambda: factor_with("contrast", 0.4, lambda rng: np.exp(
        rng.uniform(-math.log(1.4), math.log(1.4), MANY))),
    "saturation: that of brightness": lambda: factor_with("saturation", 0.2, lambda rng: rng.uniform(0.6, 1.4, MANY)),
    "hue: half its range": lambda: factor_with("hue", 0.1, lambda rng: rng.uniform(-0.05, 0.05, MANY)),
    "hue: upwards only": lambda: factor_with("hue", 0.1, lambda rng: rng.uniform(0, 0.1, MANY)),
    "sigma: drawn as a variance": lambda: sigma_with(lambda rng: np.sqrt(rng.uniform(0.01, 4.0, MANY))),
    "sigma: log-uniform": lambda: sigma_with(lambda rng: np.exp(rng.uniform(np.log(0.1), np.log(2.0), MANY))),
    "flip: 0.45 of 0.5": lambda: chance_with(0.5, 0.45),
    "grey: only where colour is jittered": lambda: chance_with(0.2, 0.2 * 0.8),
    "solarise: not at all": lambda: chance_with(0.2, 0.0),
    "turn: three of four": lambda: turns_with(lambda u: (3 * u).astype(int)),
    "turn: rounded, not cut": lambda: turns_with(lambda u: np.round(3 * u).astype(int)),
    "symmetries: turned now and then": lambda: symmetries_with(turn=0.5),
    "symmetries: one flip rare": lambda: symmetries_with(horizontal=0.4, vertical=0.0, turn=1.0),
    "stain: factors exponential": lambda: amounts_with(lambda each: np.concatenate(
        [np.exp((each[:, :3] - 1) * 1.2), each[:, 3:]], axis=1)),
    "stain: shifts upwards only": lambda: amounts_with(lambda each: np.concatenate(
        [each[:, :3], np.abs(each[:, 3:])], axis=1)),
    "stain: one factor for all": lambda: amounts_with(lambda each: each[:, [0, 0, 0, 3, 4, 5]]),
    "stain: the shift is the factor's": lambda: amounts_with(lambda each: each[:, [0, 1, 2, 0, 1, 2]] - [
        0, 0, 0, 1, 1, 1]),
    "stain: the residual hardly moved": lambda: amounts_with(residual_hardly_moved),
    "randstain: std_hyper read as the spread": lambda: normals_with(0.7, lambda mean, std, z: mean + 0.3 * std * z),
    "randstain: the spread on the mean too": lambda: normals_with(0.7, lambda mean, std, z: 0.7 * (mean + std * z)),
    "randstain: variances for deviations": lambda: normals_with(1.0, lambda mean, std, z: mean + std**2 * z),
    "randstain: uniform": lambda: normals_with(1.0, lambda mean, std, z: mean + std * math.sqrt(12) * (
        stats.norm.cdf(z) - 0.5)),
    "randstain: no floor": lambda: floored_with(lambda ratio: ratio),
    "randstain: folded at nought": lambda: floored_with(lambda ratio: max(abs(ratio), 0.1)),
    "randstain: a floor of a fifth": lambda: floored_with(lambda ratio: max(ratio, 0.2)),
    **{f"mixture: {each}": lambda each=each: mixture_with(each) for each in (
        "components alike", "root transposed", "each number alone", "spread within a component only")},
    **{f"uniforms: {each}": lambda each=each: uniforms_with(each) for each in (
        "the view is not in the counter", "views are each other's mirror", "a view is another, folded in the middle",
        "counters of neighbours overlap by half", "samples come in pairs", "one uniform serves both flips",
        "one uniform serves two strengths of colour")},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake: str) -> None:
    right, wrong = MISTAKES[mistake]()
    assert right > LEAST
    assert wrong < SURE, f"p of {wrong:.1e}"
