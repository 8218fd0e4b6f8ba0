"""Where the tissue is: held against the painter's own regions, and the arithmetic against plain loops."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from shards import judge, tissue
from shards.slide import Slide


def regions(path: Path, mpp: float, only: str = "") -> np.ndarray:
    """The annotated part of a slide at `mpp`, drawn on level 0 by Pillow and shrunk."""
    with Slide(path) as slide:
        canvas, step = Image.new("L", (slide.width, slide.height)), round(mpp / slide.mpp)
    for feature in json.loads(path.with_suffix(".geojson").read_text())["features"]:
        for ring in feature["geometry"]["coordinates"]:
            wanted = only in ("", feature["properties"]["classification"]["name"])
            ImageDraw.Draw(canvas).polygon([tuple(point) for point in ring], fill=255 if wanted else 0)
    return np.asarray(canvas.reduce(step)) > 127


def masked(path: Path) -> np.ndarray:
    with Slide(path) as slide:
        return tissue.mask(slide.thumbnail(tissue.MASK_MPP))


def test_the_mask_of_a_painted_slide_is_the_tissue_that_was_painted(slides: Path) -> None:
    """Half a millimetre of slide is mostly border: on slides of a whole millimetre the overlap is 0.94 to 0.98."""
    overlaps = {}
    for path in sorted(slides.glob("*.svs")):
        found, truth = masked(path), regions(path, tissue.MASK_MPP)
        overlaps[path.name] = (found & truth).sum() / (found | truth).sum()
    assert min(overlaps.values()) > 0.9 and np.mean(list(overlaps.values())) > 0.92, overlaps


def test_painted_fat_is_mostly_tissue_although_most_of_its_pixels_are_as_pale_as_glass(slides: Path) -> None:
    found, stained, pixels = 0, 0, 0
    for path in sorted(slides.glob("*.svs")):
        fat = regions(path, tissue.MASK_MPP, "fat")
        with Slide(path) as slide:
            density = judge.densities(slide.thumbnail(tissue.MASK_MPP))[3]
        found, pixels = found + int(masked(path)[fat].sum()), pixels + int(fat.sum())
        stained += int((density[fat] > 0.1).sum())
    assert pixels > 1000, "no fat in the cohort: this test proves nothing"
    assert stained / pixels < 0.3 and found / pixels > 0.8, (stained / pixels, found / pixels)


@pytest.mark.parametrize("cell", [50, 70, 90])
def test_fat_cells_with_thin_walls_are_one_piece_of_tissue(cell: int) -> None:
    picture = np.full((200, 200, 3), 245, np.uint8)
    step = round(cell / tissue.MASK_MPP)
    for wall in range(40, 160, step):       # walls of one mask pixel, half as dense as tissue
        picture[40:40 + (119 // step) * step + 1, wall] = 190
        picture[wall, 40:40 + (119 // step) * step + 1] = 190
    found, end = tissue.mask(picture), 41 + (119 // step) * step
    truth = np.zeros((200, 200), bool)
    truth[40:end, 40:end] = True
    assert (found == truth).mean() > 0.999


@pytest.mark.parametrize("grey", [255, 243, 230])
def test_empty_glass_has_no_tissue_however_grey_it_is(grey: int) -> None:
    glass = np.full((120, 90, 3), grey, np.uint8)
    assert not tissue.mask(glass).any()
    grain = np.random.default_rng(0).integers(-2, 3, glass.shape)
    assert not tissue.mask((glass + grain).clip(0, 255).astype(np.uint8)).any()


def test_a_slide_full_of_tissue_is_all_tissue() -> None:
    rng = np.random.default_rng(0)
    stain = rng.integers(60, 140, (120, 90, 1)) + np.array([60, 0, 70])     # purple, light and dark
    assert tissue.mask(stain.astype(np.uint8)).all()
    assert tissue.mask(np.full((30, 40, 3), 120, np.uint8)).all()
    assert tissue.mask(np.full((30, 12, 3), (40, 0, 60), np.uint8)).all()
    assert not tissue.mask(np.zeros((30, 12, 3), np.uint8)).any(), "black is a scanner's frame, or ink"
    assert tissue.mask(np.full((1, 1, 3), 120, np.uint8)).shape == (1, 1)


def test_dust_is_not_tissue_and_holes_the_size_of_fat_cells_are() -> None:
    picture = np.full((200, 200, 3), 245, np.uint8)
    picture[20:28, 20:28] = 90                      # 32 micrometres
    picture[60:160, 60:160] = 120                   # 400 micrometres, with a hole of 60
    picture[100:115, 100:115] = 245
    found = tissue.mask(picture)
    assert not found[:55, :55].any()
    truth = np.zeros((200, 200), bool)
    truth[60:160, 60:160] = True
    assert (found == truth).mean() > 0.999


def test_optical_density_is_the_mean_of_three_logarithms() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 7, 3), np.uint8)
    got = judge.densities(pixels)[3]
    for row in range(6):
        for column in range(7):
            truth = sum(-math.log10(max(int(value), 1) / 255) for value in pixels[row, column]) / 3
            assert got[row, column] == pytest.approx(truth, abs=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_otsus_threshold_parts_as_well_as_the_best_of_a_plain_loop_over_thresholds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    share = rng.uniform(0.05, 0.95)
    dark = rng.normal(rng.uniform(0.3, 0.8), 0.1, 1500)
    values = np.where(rng.random(1500) < share, rng.normal(0.1, 0.03, 1500), dark)

    def spread(threshold: float) -> float:
        low, high = values[values <= threshold], values[values > threshold]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2 if len(low) and len(high) else 0.0

    best = max(spread(threshold) for threshold in values)
    assert spread(tissue.otsu(values, -1.0, 2.0)) > 0.995 * best
    assert tissue.otsu(values, 0.9, 1.0) == 0.9 and tissue.otsu(values, 0.0, 0.01) == 0.01
    assert tissue.otsu(np.full(10, 0.3), 0.0, 1.0) <= 1.0, "one value: any threshold, but a number"


@pytest.mark.parametrize("reach", [1, 2, 5])
def test_grown_is_a_square_around_every_pixel(reach: int) -> None:
    region = np.random.default_rng(reach).random((17, 23)) < 0.04
    truth = np.zeros_like(region)
    for row, column in np.argwhere(region):
        for down in range(-reach, reach + 1):
            for right in range(-reach, reach + 1):
                if 0 <= row + down < 17 and 0 <= column + right < 23:
                    truth[row + down, column + right] = True
    assert (tissue._grown(region, reach) == truth).all()


# --- the grid


@pytest.mark.parametrize(("slide", "side", "shape"), [
    ((1000, 700), 128.0, (88, 125)), ((1000, 700), 131.7, (88, 125)), ((513, 300), 64.25, (38, 64)),
    ((100, 100), 100.0, (13, 13)), ((100, 50), 60.0, (7, 13)), ((4000, 3000), 12.0, (300, 400)),
])
def test_corners_and_fractions_are_those_of_plain_loops(slide: tuple[int, int], side: float,
                                                        shape: tuple[int, int]) -> None:
    region = np.random.default_rng(1).random(shape) < np.linspace(0, 1, shape[1])
    grid, fractions = tissue.corners(region, slide, side)
    expected = []
    for row in range(slide[1]):
        if (row + 1) * side > slide[1]:
            break
        for column in range(slide[0]):
            if (column + 1) * side > slide[0]:
                break
            # Every mask pixel that the square touches counts as one.
            touched = [region[y, x]
                       for y in range(shape[0]) if (y + 1) * slide[1] / shape[0] > row * side
                       and y * slide[1] / shape[0] < (row + 1) * side
                       for x in range(math.floor(column * side * shape[1] / slide[0]),
                                      math.ceil(round((column + 1) * side * shape[1] / slide[0], 6)))]
            expected.append((round(column * side), round(row * side), sum(touched) / len(touched)))
            if len(expected) >= 600:        # enough of the largest grid
                break
        if len(expected) >= 600:
            break
    assert len(grid) >= len(expected) and (len(grid) == len(expected) or len(expected) == 600)
    for (x, y), fraction, truth in zip(grid.tolist(), fractions.tolist(), expected, strict=False):
        assert (x, y) == truth[:2]
        assert fraction == pytest.approx(truth[2], abs=1e-9), (x, y)


def test_a_slide_that_holds_its_tiles_exactly_loses_none_to_rounding() -> None:
    for size, mpp, slide_mpp in ((100, 1.1, 0.5), (224, 0.3, 0.35), (96, 1.1, 0.22), (64, 1.0, 0.5), (256, 0.5, 0.25)):
        side = size * mpp / slide_mpp
        width, height = 10 * round(side), 7 * round(side)
        grid, _ = tissue.corners(np.ones((70, 100), bool), (width, height), side)
        assert len(grid) == 70, f"{size} pixels of {mpp} are {side} of {slide_mpp}"
    grid, _ = tissue.corners(np.ones((10, 10), bool), (999, 999), 100.0)
    assert len(grid) == 81, "what does not lie wholly inside is not offered"


def test_a_slide_all_of_glass_offers_no_tissue_and_one_all_of_tissue_only_that() -> None:
    for fill in (0.0, 1.0):
        _, fractions = tissue.corners(np.full((50, 60), bool(fill)), (960, 800), 128.0)
        assert len(fractions) == 7 * 6 and (fractions == fill).all()


def test_what_was_not_scanned_is_not_taken_for_the_glass() -> None:
    """Scanners fill what they skip with pure white; beside it even bare glass is dense."""
    picture = np.full((300, 300, 3), 255, np.uint8)
    picture[50:250, 50:250] = 235                       # glass
    picture[100:200, 100:200] = (200, 120, 170)         # tissue
    found = tissue.mask(picture)
    assert found[110:190, 110:190].all() and not found[:80].any() and not found[:, 220:].any()
