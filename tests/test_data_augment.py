"""The numbers of every view: where they come from, how they are spread, and what the affine maps do to a pixel."""

import cmath
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from ssl_dist.data import augment, stain
from ssl_dist.data.batch import View

MANY = 20_000
STILL = View(jitter=0, grey=0, blur=0, horizontal=0, vertical=0)
RANDOM = np.random.default_rng(0)


def likely(count: int, chance: float) -> bool:
    """Whether `count` of MANY lies within 4.5 standard deviations of what the chance says."""
    return abs(count - MANY * chance) <= 4.5 * math.sqrt(MANY * chance * (1 - chance))


def farthest(one: np.ndarray, other: np.ndarray) -> float:
    """Kolmogorov and Smirnov's distance between two samples."""
    places = np.sort(np.concatenate([one, other]))
    shares = [np.searchsorted(np.sort(each), places, side="right") / len(each) for each in (one, other)]
    return float(np.abs(shares[0] - shares[1]).max())


# ---- where they come from

@pytest.mark.parametrize(("seed", "epoch", "view", "position"),
                         [(0, 0, 0, 0), (7, 3, 1, 12_345), (2**63 - 1, 9, 5, 2**40)])
def test_the_uniforms_of_a_position_come_from_the_documented_key_and_counter(seed: int, epoch: int, view: int,
                                                                             position: int) -> None:
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[16 * position, 0, view, 0]))
    assert augment.uniforms(seed, epoch, view, position, 1)[0].tolist() == generator.random(64).tolist()


def test_the_uniforms_have_not_been_renumbered() -> None:
    """Golden numbers: a run begun under an older version must find its crops again."""
    found = augment.uniforms(7, 3, 1, 1000, 2)
    assert found[0, :3].tolist() == [0.9786030175186533, 0.9501253342155412, 0.2807778298131136]
    assert found[1, -2:].tolist() == [0.9502267740761314, 0.7471914392257091]
    assert augment.boxes(found, (0.2, 1.0), (0.75, 4 / 3))[0] == \
        pytest.approx([0.13537447805143113, 0.015564320397638136, 0.6395440348931474, 0.6639453121026063], abs=1e-12)


def test_a_slice_of_the_uniforms_is_the_uniforms_of_the_slice() -> None:
    whole = augment.uniforms(7, 3, 1, 100, 60)
    for first, count in ((0, 60), (0, 1), (13, 20), (59, 1), (40, 20)):
        assert np.array_equal(augment.uniforms(7, 3, 1, 100 + first, count), whole[first:first + count])


def test_uniforms_differ_by_seed_epoch_view_and_position_and_lie_in_0_to_1() -> None:
    drawn = [augment.uniforms(seed, epoch, view, first, 50) for seed in (0, 1) for epoch in (0, 1) for view in (0, 1)
             for first in (0, 50)]
    together = np.concatenate([each.ravel() for each in drawn])
    assert len(np.unique(together)) == len(together) == 16 * 50 * 64
    assert together.min() >= 0
    assert together.max() < 1
    assert farthest(together, np.linspace(0, 1, 100_001)) < 0.01


def palette(count: int) -> stain.Palette:
    """Two kinds of tissue, as likely as each other, whose statistics move together; every slide has its own stains."""
    mean, deviation = np.array([158.0, 151, 117, 37, 8, 6]), np.array([30.0, 8, 6, 9, 2, 1.5])
    root = np.tril(np.full((6, 6), 0.4)) + 0.6 * np.eye(6)
    fit = stain.Fit(lab_mean_6=mean, lab_std_6=deviation, weights_K=np.array([0.5, 0.5]),
                    means_K6=np.stack([mean - deviation / 2, mean + deviation / 2]),
                    covariances_K66=np.stack([deviation[:, None] * (root @ root.T) * deviation / 2] * 2),
                    reference_23=np.array([[0.6, 0.75, 0.28], [0.2, 0.95, 0.24]]),
                    reference_strength_2=np.array([1.2, 0.9]), slides={}, shards=[], tiles=1, settings={})
    pairs = np.array([stain.HAEMATOXYLIN, stain.EOSIN]) + np.random.default_rng(3).uniform(0, 0.1, (count, 2, 3))
    return stain.Palette(fit, stain.complete(pairs), np.linspace([0.8, 0.7], [1.6, 1.1], count))


FIELD_OF = {"box_N4": range(0, 22), "flip_N2": (22, 23), "colour_N34": range(24, 30), "sigma_N": (30, 31),
            "solarise_N": (32,), "stain_N34": range(33, 40), "stained_N": (39,), "turn_N": (40, 41),
            "target_N6": range(42, 50)}


def test_each_uniform_moves_its_own_number_and_no_other() -> None:
    view = View(stain=0.3, solarise=0.5, scale=(0.9, 1.0), ratio=(0.5, 2.0), stained=0.5, turn=0.5, randstain=0.5,
                randstain_mixture=True)
    base = np.full((1, 64), 0.45)
    base[0, 0:20:2] = 0.99                # the shapes are so large that none of the ten tries fits a square ...
    base[0, 1:20:2] = 0.98
    for place in range(64):
        start = base.copy()
        if place < 20:                      # ... but the one under test
            start[0, place // 2 * 2:place // 2 * 2 + 2] = 0.1, 0.5
        elif place in (20, 21):
            start[0, :2] = 0.1, 0.5
        moved = start.copy()
        # Chances of 0.2 (grey) and 0.5 (others) are crossed; jitter of 0.8 is left.
        moved[0, place] = 0.95 if place == augment.JITTER else 0.11 if place == augment.GREY else 0.55
        one, other = (augment.numbers(view, u, palette(1)) for u in (start, moved))
        changed = {field.name for field in fields(one)
                   if not np.array_equal(getattr(one, field.name), getattr(other, field.name), equal_nan=True)}
        assert changed == {name for name, places in FIELD_OF.items() if place in places}, place


# ---- boxes

@pytest.mark.parametrize(("scale", "ratio"), [((0.2, 1.0), (0.75, 4 / 3)), ((0.05, 0.4), (0.5, 2.0)),
                                             ((1.0, 1.0), (1.0, 1.0)), ((0.8, 1.0), (0.2, 5.0))])
def test_boxes_keep_their_area_and_ratio_and_lie_inside_the_tile(scale: tuple, ratio: tuple) -> None:
    x, y, width, height = augment.boxes(augment.uniforms(1, 0, 0, 0, MANY), scale, ratio).T
    whole = (width == 1) & (height == 1)
    area, shape = (width * height)[~whole], (width / height)[~whole]
    assert np.all((area >= scale[0] - 1e-12) & (area <= scale[1] + 1e-12))
    assert np.all((shape >= ratio[0] - 1e-12) & (shape <= ratio[1] + 1e-12))
    assert np.all((x >= 0) & (y >= 0) & (x + width <= 1 + 1e-12) & (y + height <= 1 + 1e-12))


@pytest.mark.parametrize(("scale", "ratio"), [((0.2, 1.0), (0.75, 4 / 3)), ((0.6, 1.0), (0.3, 3.0))])
def test_boxes_are_spread_as_torchvision_spreads_them(scale: tuple, ratio: tuple) -> None:
    draws, side = 4000, 2000
    torch.manual_seed(0)
    image = torch.empty(1, side, side)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(draws)]) / side
    top, left, tall, wide = theirs.T
    x, y, width, height = augment.boxes(augment.uniforms(2, 0, 0, 0, draws), scale, ratio).T
    for mine, their in ((width * height, wide * tall), (width, wide), (height, tall), (x, left), (y, top),
                        (np.log(width / height), np.log(wide / tall))):
        # One in a hundred thousand for equal distributions; a pixel's rounding more.
        assert farthest(np.round(mine, 3), np.round(their, 3)) < 2.47 * math.sqrt(2 / draws) + 0.01


def test_the_first_shape_that_fits_is_taken_and_the_whole_tile_if_none_does() -> None:
    u = np.zeros((2, 64))
    u[:, 0:20:2], u[:, 1:20:2] = 1.0, 1.0               # area 1 at ratio 4: twice as wide as the tile
    u[0, 12:14] = 0.5, 0.5                              # the seventh try: half the area, square
    u[0, 16:18] = 0.2, 0.5                              # the ninth would fit as well
    u[:, 20:22] = 0.25, 0.75
    boxes = augment.boxes(u, (0.0, 1.0), (0.25, 4.0))
    side = math.sqrt(0.5)
    assert boxes[0] == pytest.approx([0.25 * (1 - side), 0.75 * (1 - side), side, side])
    assert boxes[1].tolist() == [0, 0, 1, 1]


# ---- chances and strengths

def test_flips_grey_blur_and_solarise_come_as_often_as_asked() -> None:
    view = View(horizontal=0.3, vertical=0.7, grey=0.2, blur=0.6, sigma=(0.5, 1.5), solarise=0.1, jitter=0)
    drawn = augment.numbers(view, augment.uniforms(3, 0, 0, 0, MANY))
    assert likely(int(drawn.flip_N2[:, 0].sum()), 0.3)
    assert likely(int(drawn.flip_N2[:, 1].sum()), 0.7)
    assert likely(int(drawn.flip_N2.all(axis=1).sum()), 0.21), "the two flips hang together"
    assert likely(int(np.isclose(drawn.colour_N34[:, 0], drawn.colour_N34[:, 1]).all(axis=1).sum()), 0.2)
    assert likely(int(drawn.solarise_N.sum()), 0.1)
    blurred = drawn.sigma_N[drawn.sigma_N > 0]
    assert likely(len(blurred), 0.6)
    assert farthest(blurred, np.linspace(0.5, 1.5, 10_001)) < 0.03


def test_jitter_comes_as_often_as_asked_and_its_strengths_fill_their_interval() -> None:
    view = replace(STILL, jitter=0.8, brightness=0.4, contrast=0, saturation=0, hue=0)
    gain = augment.numbers(view, augment.uniforms(4, 0, 0, 0, MANY)).colour_N34[:, 0, 0]
    changed = gain[np.abs(gain - 1) > 1e-9]
    assert likely(len(changed), 0.8)
    assert farthest(changed, np.linspace(0.6, 1.4, 10_001)) < 0.03


def test_zero_strength_and_zero_chance_leave_every_pixel_where_it_is() -> None:
    u = augment.uniforms(5, 0, 0, 0, 200)
    identity = np.eye(3, 4)
    for view in (STILL, replace(STILL, jitter=1, brightness=0, contrast=0, saturation=0, hue=0)):
        drawn = augment.numbers(view, u)
        assert drawn.colour_N34 == pytest.approx(np.broadcast_to(identity, (200, 3, 4)), abs=1e-12)
        assert drawn.stain_N34.shape == (200, 0, 4)
        assert not drawn.sigma_N.any()
        assert not drawn.solarise_N.any()
        assert not drawn.flip_N2.any()
    matrix, offset = stain.affine(np.ones((2, 3)), np.zeros((2, 3)))
    assert matrix == pytest.approx(np.broadcast_to(np.eye(3), (2, 3, 3)), abs=1e-12)
    assert not offset.any()


# ---- what the maps do to a pixel

def plainly(pixel: np.ndarray, bright: float, contrast: float, saturation: float, turn: float,
            grey: bool) -> list[float]:
    """Brightness, contrast about mid grey, saturation, hue, grey: one pixel, one step after the other."""
    red, green, blue = ((value * (1 + bright) - 0.5) * (1 + contrast) + 0.5 for value in pixel)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    red, green, blue = (luma + (value - luma) * (1 + saturation) for value in (red, green, blue))
    chroma = complex(0.596 * red - 0.274 * green - 0.322 * blue, 0.211 * red - 0.523 * green + 0.312 * blue)
    chroma *= cmath.exp(-2j * math.pi * turn)
    i, q = chroma.real, chroma.imag
    result = [luma + 0.956 * i + 0.621 * q, luma - 0.272 * i - 0.647 * q, luma - 1.106 * i + 1.703 * q]
    return [0.299 * result[0] + 0.587 * result[1] + 0.114 * result[2]] * 3 if grey else result


def test_the_colour_map_is_brightness_contrast_saturation_hue_and_grey_one_after_the_other() -> None:
    changes = RANDOM.uniform(-1, 1, (40, 4)) * [0.8, 0.8, 0.8, 0.5]
    changes[:4] = np.eye(4) * [0.5, 0.5, 0.5, 0.2]                      # each alone
    grey = RANDOM.uniform(size=40) < 0.3
    maps = augment.colour(changes, grey)
    for pixel in RANDOM.uniform(0, 1, (20, 3)):
        for one, change, loses in zip(maps, changes, grey, strict=True):
            # YIQ's inverse is written to three digits in `plainly`.
            assert one[:, :3] @ pixel + one[:, 3] == pytest.approx(plainly(pixel, *change, bool(loses)), abs=0.01)


def test_the_strengths_of_a_view_reach_their_own_step() -> None:
    strengths = {"brightness": 0.1, "contrast": 0.2, "saturation": 0.3, "hue": 0.04}
    u = augment.uniforms(6, 0, 0, 0, 30)
    maps = augment.numbers(replace(STILL, jitter=1, **strengths), u).colour_N34
    for row in range(30):
        change = [(2 * u[row, 25 + place] - 1) * each for place, each in enumerate(strengths.values())]
        assert maps[row, :, :3] @ [0.8, 0.3, 0.6] + maps[row, :, 3] == \
            pytest.approx(plainly(np.array([0.8, 0.3, 0.6]), *change, False), abs=0.005)


def test_a_hue_of_half_a_turn_makes_the_complement_and_keeps_the_luma() -> None:
    (one,) = augment.colour(np.array([[0, 0, 0, 0.5]]), np.array([False]))
    pixel = np.array([0.7, 0.4, 0.5])
    luma = augment.LUMA @ pixel
    assert one[:, :3] @ pixel == pytest.approx(2 * luma - pixel, abs=0.005)


def beer_lambert(pixel: list[int], scale: list[float], shift: list[float]) -> list[float]:
    """One pixel: its density, unmixed into haematoxylin, eosin and residual (Cramer), moved, and mixed again."""
    h, e = ([value / math.sqrt(sum(each**2 for each in vector)) for value in vector]
            for vector in ((0.650, 0.704, 0.286), (0.072, 0.990, 0.105)))
    r = [h[1] * e[2] - h[2] * e[1], h[2] * e[0] - h[0] * e[2], h[0] * e[1] - h[1] * e[0]]
    length = math.sqrt(sum(value**2 for value in r))
    r = [value / length for value in r]
    density = [-math.log(max(value, 1) / 255) for value in pixel]

    def volume(a: list[float], b: list[float], c: list[float]) -> float:
        return (a[0] * (b[1] * c[2] - b[2] * c[1]) - a[1] * (b[0] * c[2] - b[2] * c[0])
                + a[2] * (b[0] * c[1] - b[1] * c[0]))

    whole = volume(h, e, r)
    amounts = [volume(density, e, r) / whole, volume(h, density, r) / whole, volume(h, e, density) / whole]
    amounts = [amount * much + more for amount, much, more in zip(amounts, scale, shift, strict=True)]
    return [sum(amount * vector[band] for amount, vector in zip(amounts, (h, e, r), strict=True)) for band in range(3)]


def test_the_stain_map_is_beer_and_lambert_on_every_pixel() -> None:
    scales, shifts = RANDOM.uniform(0.5, 1.5, (20, 3)), RANDOM.uniform(-0.3, 0.3, (20, 3))
    scales[:4], shifts[:4] = 1, 0
    scales[0, 0], scales[1, 1], scales[2, 2], shifts[3, 0] = 1.4, 1.4, 1.4, 0.2        # each stain alone
    matrix, offset = stain.affine(scales, shifts)
    for pixel in RANDOM.integers(0, 256, (30, 3)):
        density = -np.log(np.maximum(pixel, 1) / 255)
        for row in range(20):
            expected = beer_lambert(pixel.tolist(), scales[row].tolist(), shifts[row].tolist())
            assert matrix[row] @ density + offset[row] == pytest.approx(expected, abs=1e-9)


def test_a_views_stain_scales_by_one_plus_or_minus_and_shifts_by_plus_or_minus() -> None:
    u = augment.uniforms(8, 0, 0, 0, 50)
    maps = augment.numbers(replace(STILL, stain=0.25), u).stain_N34
    assert maps.shape == (50, 3, 4)
    for row in range(50):
        scale = [1 + 0.25 * (2 * u[row, 33 + place] - 1) for place in range(3)]
        shift = [0.25 * (2 * u[row, 36 + place] - 1) for place in range(3)]
        pixel = [200, 90, 160]
        density = -np.log(np.array(pixel) / 255)
        assert maps[row, :, :3] @ density + maps[row, :, 3] == \
            pytest.approx(beer_lambert(pixel, scale, shift), abs=1e-9)


def test_an_interval_that_runs_backwards_is_named() -> None:
    assert View().rules() == []
    (said,) = View(sigma=(2.0, 0.1)).rules()
    assert "sigma=[2.0, 0.1]" in said
