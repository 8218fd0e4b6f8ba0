"""What a tile looks like: against plain loops, against real tissue, blur and ink; alike however the tile was read."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import openslide
import pytest
from PIL import Image, ImageDraw, ImageFilter

from shards import jpeg, judge, tissue
from shards.settings import Settings
from shards.slide import Slide

DEFAULTS = Settings(Path("in"), Path("out"), "a")
LIMITS = judge.Limits(DEFAULTS.min_contrast, DEFAULTS.min_focus, DEFAULTS.max_pen, DEFAULTS.max_blood)


def reasons(tiles: list[np.ndarray], limits: judge.Limits = LIMITS) -> list[str]:
    looks = judge.look(np.stack([judge.reduced(tile) for tile in tiles]))
    return [looks.reason(number, limits) for number in range(len(tiles))]


def opened(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def blurred(tile: np.ndarray, sigma: float) -> np.ndarray:
    return np.asarray(Image.fromarray(tile).filter(ImageFilter.GaussianBlur(sigma)))


@pytest.fixture(scope="module")
def pcam(data: Path) -> list[Path]:
    return sorted((data / "pcam_subset_96px").rglob("*.jpg"))


@pytest.fixture(scope="module")
def crops(data: Path) -> list[np.ndarray]:
    """Tiles of 256 pixels of real bone tumours and of seven organs, from 90 images."""
    bone = [opened(path)[y:y + 256, x:x + 256] for path in sorted((data / "osteosarcoma_tcia_1024px").rglob("*.jpg"))
            for x, y in ((0, 0), (400, 500), (768, 768))]
    organs = [opened(path)[y:y + 256, x:x + 256] for path in sorted((data / "monuseg2018/train/images").iterdir())
              for x, y in ((0, 700), (600, 100))]
    return bone + organs


# --- the numbers, by plain loops


def density(value: int) -> float:
    return -math.log10(max(int(value), 1) / 255)


def rough(grey: list[list[float]]) -> float:
    differences = [4 * grey[y][x] - grey[y - 1][x] - grey[y + 1][x] - grey[y][x - 1] - grey[y][x + 1]
                   for y in range(1, len(grey) - 1) for x in range(1, len(grey[0]) - 1)]
    mean = sum(differences) / len(differences)
    return math.sqrt(sum((each - mean) ** 2 for each in differences) / len(differences))


def looks_of(small: np.ndarray) -> dict[str, float]:
    """All that is said of one tile at an eighth, a pixel at a time."""
    grey = [[sum(int(value) for value in pixel) / 3 for pixel in line] for line in small]
    high, wide = len(grey) // 2, len(grey[0]) // 2
    half = [[sum(grey[2 * y + down][2 * x + right] for down in (0, 1) for right in (0, 1)) / 4 for x in range(wide)]
            for y in range(high)]
    flat = [value for line in grey for value in line]
    mean = sum(flat) / len(flat)
    pen = blood = 0
    total = apart = 0.0
    for pixel in small.reshape(-1, 3):
        red, green, blue = (density(value) for value in pixel)
        each = (red + green + blue) / 3
        inked = red > 1.3 * green and each > 0.2
        black = each > 0.6 and max(red, green, blue) - min(red, green, blue) < 0.2 * each
        pen += inked or black
        blood += green > 0.45 and blue > 0.6 * green and red < 0.35 * green
        total, apart = total + each, apart + red - blue
    return {"contrast": math.sqrt(sum((value - mean) ** 2 for value in flat) / len(flat)),
            "focus": rough(grey) / max(rough(half), 0.5), "pen": pen / len(flat), "blood": blood / len(flat),
            "density": total / len(flat), "hue": apart / max(3 * total, 1e-12)}


@pytest.mark.parametrize(("high", "wide"), [(12, 12), (13, 17), (23, 12), (23, 23)])
def test_every_number_is_that_of_plain_loops(high: int, wide: int) -> None:
    rng = np.random.default_rng(high * wide)
    stains = np.array([(90, 40, 120), (200, 90, 150), (240, 235, 240), (20, 120, 80), (15, 14, 18), (190, 30, 40)])
    tiles = stains[rng.integers(0, 6, (9, high, wide))] + rng.integers(-14, 15, (9, high, wide, 3))
    small = np.concatenate([tiles.clip(0, 255), rng.integers(0, 256, (6, high, wide, 3))]).astype(np.uint8)
    looks = judge.look(small)
    for number, tile in enumerate(small):
        for name, truth in looks_of(tile).items():
            assert getattr(looks, name)[number] == pytest.approx(truth, rel=2e-4, abs=2e-5), name
    assert looks.pen[:9].min() > 0.1 < looks.blood[:9].max(), "this test would prove nothing of them"


def test_colours_of_a_large_tile_are_told_by_a_pixel_of_four_about_as_well(crops: list[np.ndarray]) -> None:
    small = np.stack([judge.reduced(tile) for tile in crops[::6]])
    looks = judge.look(small)
    for number, tile in enumerate(small):
        truth = looks_of(tile)
        assert looks.contrast[number] == pytest.approx(truth["contrast"], rel=2e-4)
        assert looks.focus[number] == pytest.approx(truth["focus"], rel=1e-3)
        assert looks.density[number] == pytest.approx(truth["density"], rel=0.1, abs=0.01)
        assert abs(looks.hue[number] - truth["hue"]) < 0.02
        assert abs(looks.pen[number] - truth["pen"]) < 0.02


def test_a_tile_is_judged_alone_whoever_is_looked_at_beside_it(crops: list[np.ndarray]) -> None:
    small = np.stack([judge.reduced(tile) for tile in crops[:20]])
    together = judge.look(small)
    for number in range(20):
        alone = judge.look(small[[number]])
        for name in ("contrast", "focus", "pen", "blood", "density", "hue"):
            assert getattr(alone, name)[0] == pytest.approx(getattr(together, name)[number], rel=1e-5), name


def test_in_a_small_tile_sharpness_cannot_be_told_and_nothing_is_called_blurred() -> None:
    flat = np.asarray(Image.linear_gradient("L").resize((88, 88)).convert("RGB"))
    assert np.isnan(judge.look(judge.reduced(flat)[None]).focus[0])
    assert reasons([flat], LIMITS._replace(min_focus=100, max_pen=1)) == [""]
    for side in (8, 16, 24):        # an eighth of it is a pixel, two, three
        assert reasons([np.full((side, side, 3), 128, np.uint8)]) == ["blank"]


# --- real tissue


def test_real_tissue_that_is_sharp_is_never_called_blurred_and_what_is_blurred_nearly_always_is(
    crops: list[np.ndarray]
) -> None:
    """240 crops, a tenth of them empty: none of the sharp, 99 of 100 at a sigma of 8 pixels."""
    sharp = reasons(crops)
    tissue_only = [tile for tile, reason in zip(crops, sharp, strict=True) if reason == ""]
    assert sharp.count("blurred") == 0 and len(tissue_only) > 200
    soft = reasons([blurred(tile, 8) for tile in tissue_only])
    assert soft.count("blurred") >= 0.95 * len(soft), soft.count("blurred")
    slight = reasons([blurred(tile, 2) for tile in tissue_only])
    assert slight.count("blurred") <= 0.01 * len(slight), "two pixels of 0.25 to 1 micron are no blur that harms"


def test_the_tiles_of_96_pixels_are_told_sharp_from_blurred_too(pcam: list[Path]) -> None:
    tiles = [opened(path) for path in pcam[::35]]
    sharp = reasons(tiles)
    assert len(tiles) == 200 and sharp.count("blurred") == 0 and sharp.count("") > 195
    soft = reasons([blurred(tile, 8) for tile in tiles])
    assert soft.count("blurred") >= 0.8 * len(tiles), soft.count("blurred")


def test_sharpness_falls_as_blur_grows(crops: list[np.ndarray]) -> None:
    some = [tile for tile, reason in zip(crops, reasons(crops), strict=True) if reason == ""][::10]
    focus = [judge.look(np.stack([judge.reduced(blurred(tile, sigma)) for tile in some])).focus
             for sigma in (0, 2, 4, 8)]
    for sharper, softer in zip(focus[:-1], focus[1:], strict=True):
        assert (sharper > softer).mean() > 0.95
        assert np.median(sharper) > 1.1 * np.median(softer)


def test_real_tissue_is_never_pen(data: Path, crops: list[np.ndarray], pcam: list[Path]) -> None:
    whole = [opened(path)[:1000, :1000] for place in ("osteosarcoma_tcia_1024px", "monuseg2018/train/images")
             for path in sorted((data / place).rglob("*.[jt]*"))]
    assert len(whole) == 90
    looks = judge.look(np.stack([judge.reduced(tile) for tile in whole]))
    assert looks.pen.max() < 0.01
    for tiles in (crops, [opened(path) for path in pcam[::35]]):
        assert judge.look(np.stack([judge.reduced(tile) for tile in tiles])).pen.max() < 0.1 * LIMITS.max_pen


def test_of_the_real_tiles_those_called_pen_are_those_that_show_ink(pcam: list[Path]) -> None:
    """Of all 7,000 it is two, looked at by eye: black ink between fat cells, and blue ink on the cut surface."""
    black, blue = (next(path for path in pcam if path.stem == name) for name in ("patch0002087", "patch0000115"))
    some = [black, blue, *(path for path in pcam[::5] if path not in (black, blue))]
    looks = judge.look(np.stack([jpeg.decode(path.read_bytes(), 8) for path in some]))
    found = [looks.reason(number, LIMITS) for number in range(len(some))]
    assert [path.stem for path, reason in zip(some, found, strict=True) if reason == "pen"] == [black.stem, blue.stem]
    assert (opened(black).max(axis=2) < 40).mean() > 0.2
    assert (opened(blue)[..., 2].astype(int) - opened(blue)[..., 0] > 60).mean() > 0.1
    assert found.count("blurred") <= 3 and found.count("") > 0.99 * len(found)


@pytest.mark.parametrize(("ink", "covers"), [
    ((50, 110, 180), 0.85), ((20, 60, 150), 1.0), ((20, 120, 80), 0.85), ((60, 160, 130), 0.85), ((15, 15, 18), 1.0),
    ((22, 20, 22), 1.0),
], ids=["blue", "dark blue", "green", "light green", "black", "faded black"])
def test_strokes_of_a_marker_over_real_tissue_are_pen(crops: list[np.ndarray], ink: tuple[int, int, int],
                                                      covers: float) -> None:
    """A stroke over a quarter of the tile, at any angle; colours as in the filters of deep-histopath."""
    rng = np.random.default_rng(0)
    drawn = []
    for tile in [tile for tile, reason in zip(crops, reasons(crops), strict=True) if reason == ""][::3]:
        stencil, angle = Image.new("L", (256, 256)), rng.uniform(0, np.pi)
        x, y = 300 * math.cos(angle), 300 * math.sin(angle)
        ImageDraw.Draw(stencil).line((128 - x, 128 - y, 128 + x, 128 + y), fill=255, width=70)
        share = np.asarray(stencil)[..., None] / 255 * covers
        drawn.append(np.rint(tile * (1 - share) + np.array(ink) * share).astype(np.uint8))
    found = reasons(drawn)
    assert len(found) > 60 and found.count("pen") == len(found)
    assert "pen" not in reasons(drawn, LIMITS._replace(max_pen=1.0))


def test_the_first_reason_that_holds_is_given_and_each_limit_can_be_switched_off() -> None:
    rng = np.random.default_rng(0)
    red = (np.array([190, 30, 40]) + rng.integers(-20, 20, (256, 256, 1))).clip(0, 255).astype(np.uint8)
    red[::16] = 250
    assert reasons([red], LIMITS._replace(max_blood=0.3)) == ["blood"]
    assert reasons([red]) == [""], "blood is kept by default: bone looks the same"
    flat = np.full((256, 256, 3), (20, 120, 80), np.uint8)
    assert reasons([flat]) == ["blank"], "before pen"
    assert reasons([flat], LIMITS._replace(min_contrast=0)) == ["pen"]
    assert reasons([flat], judge.Limits(0, 0, 1, 1)) == [""]


# --- alike, however it was read


def test_an_eighth_from_the_jpeg_is_an_eighth_of_its_pixels(crops: list[np.ndarray], pcam: list[Path]) -> None:
    """Within two grey levels but for hard edges, which ring beyond black or white, where pixels are clipped."""
    contents = [path.read_bytes() for path in pcam[::50]]
    contents += [jpeg.encode(tile, 80, way) for tile in crops[::5] for way in ("4:4:4", "4:2:0")]
    apart = []
    for content in contents:
        small, whole = jpeg.decode(content, 8).astype(int), judge.reduced(jpeg.decode(content)).astype(int)
        assert small.shape == whole.shape
        apart.append(np.abs(small - whole).ravel())
    assert np.concatenate(apart).max() <= 8 and (np.concatenate(apart) <= 2).mean() > 0.98


def test_what_passes_through_and_what_is_encoded_is_judged_alike(data: Path, crops: list[np.ndarray]) -> None:
    """The slide's own tiles, with colours at half resolution too, and some of them blurred or inked."""
    limits = LIMITS._replace(max_blood=0.3)
    rng = np.random.default_rng(0)
    tiles = [*crops[::4], *(blurred(tile, 8) for tile in crops[1::12])]
    for tile in crops[2::12]:
        tiles.append(np.where((rng.random((16, 16)) < 0.4).repeat(16, 0).repeat(16, 1)[..., None], (20, 120, 80),
                              tile).astype(np.uint8))
    contents = [jpeg.encode(tile, 85, way) for tile in tiles for way in ("4:4:4", "4:2:0")]
    path = data / "wsi_svs" / "CMU-1-Small-Region.svs"
    shown = []
    with Slide(path) as slide, openslide.OpenSlide(path) as handle:
        native = slide.native(slide.mpp)
        for column, row in [(column, row) for column in range(9) for row in range(12)]:
            contents.append(native.tile(column, row))
            shown.append(np.asarray(handle.read_region((column * 240, row * 240), 0, (240, 240)).convert("RGB")))
    through, pixels = ([reason for group in groups for reason in group] for groups in (
        [judged(limits, [jpeg.decode(content, 8) for content in part]) for part in (contents[:-108], contents[-108:])],
        [judged(limits, [judge.reduced(jpeg.decode(content)) for content in contents[:-108]]),
         judged(limits, [judge.reduced(tile) for tile in shown])]))
    assert through == pixels
    assert {"", "blank", "blurred", "pen"} <= set(through)


def judged(limits: judge.Limits, small: list[np.ndarray]) -> list[str]:
    looks = judge.look(np.stack(small))
    return [looks.reason(number, limits) for number in range(len(small))]


def test_the_mean_of_a_block_is_the_mean_whatever_the_size() -> None:
    rng = np.random.default_rng(0)
    for high, wide in ((64, 64), (60, 70), (8, 8), (97, 33)):
        tile = rng.integers(0, 256, (high, wide, 3), np.uint8)
        got = judge.reduced(tile)
        assert got.shape == (-(-high // 8), -(-wide // 8), 3)
        for y in range(got.shape[0]):
            for x in range(got.shape[1]):
                truth = tile[8 * y:8 * y + 8, 8 * x:8 * x + 8].reshape(-1, 3).mean(axis=0)
                assert np.abs(got[y, x] - truth).max() <= 0.51


# --- where the tissue is


@pytest.fixture(scope="module")
def thumbnails(slides: Path) -> list[np.ndarray]:
    """Four painted slides on wide glass, as a scanner shows it."""
    found = []
    for path in sorted(slides.glob("*.svs")):
        with Slide(path) as slide:
            small = slide.thumbnail(tissue.MASK_MPP)
        white = np.full((240, 240, 3), np.median(small[:6].reshape(-1, 3), axis=0).astype(np.uint8))
        white[56:184, 56:184] = small
        found.append(white)
    return found


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


def test_a_black_frame_around_the_slide_is_no_tissue_and_hides_none(thumbnails: list[np.ndarray]) -> None:
    for small in thumbnails:
        truth = tissue.mask(small)
        framed = small.copy()
        framed[:20], framed[-20:], framed[:, :20], framed[:, -20:] = 0, 2, 1, 3
        got = tissue.mask(framed)
        assert overlap(got, truth) > 0.98
        assert not got[:18].any() and not got[:, -18:].any()


@pytest.mark.parametrize("ink", [(40, 100, 190), (20, 130, 80), (12, 12, 14)], ids=["blue", "green", "black"])
def test_strokes_of_a_marker_on_the_glass_are_no_tissue_and_hide_none(thumbnails: list[np.ndarray],
                                                                     ink: tuple[int, int, int]) -> None:
    for small in thumbnails:
        truth = tissue.mask(small)
        image = Image.fromarray(small)
        stroke = partial(ImageDraw.Draw(image).line, fill=ink, width=9)
        stroke([(10, 20), (230, 12)])
        stroke([(12, 25), (18, 200), (60, 230), (225, 225)], joint="curve")
        got = tissue.mask(np.asarray(image))
        assert overlap(got, truth) > 0.97
        assert not got[:40].any() and not got[:, :25].any()


def test_dark_folds_do_not_hide_pale_tissue(thumbnails: list[np.ndarray]) -> None:
    """A threshold between the dark and the pale would; it may not wander so far."""
    for small in thumbnails:
        rng = np.random.default_rng(0)
        pale = np.full((240, 240, 3), 245, np.uint8)
        pale[60:180, 60:180] = (225, 205, 222)      # a density of 0.07
        pale += rng.integers(0, 3, pale.shape, np.uint8)
        folded, truth = pale.copy(), tissue.mask(pale)
        assert truth[70:170, 70:170].all()
        folded[100:112, 60:180] = folded[60:180, 140:150] = (60, 20, 90)
        assert overlap(tissue.mask(folded), truth) > 0.99
        cut = small.copy()
        cut[100:112, 56:184] = (cut[100:112, 56:184] * 0.3).astype(np.uint8) + np.array([20, 0, 30], np.uint8)
        outside = np.r_[0:95, 118:240]
        assert overlap(tissue.mask(cut)[outside], tissue.mask(small)[outside]) > 0.97
