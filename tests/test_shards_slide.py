"""Slides: microns from the header, regions against plain averages of level 0, and refusals that say what to do."""

from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile

from shards import synthetic
from shards.slide import Slide, SlideError


def pyramid(path: Path, pixels: np.ndarray, mpp: tuple[float, float] = (0.5, 0.5),
            reduce: tuple[int, ...] = (4,)) -> Path:
    """A tiled TIFF without loss: level 0 and plain averages of it."""
    with tifffile.TiffWriter(path) as tiff:
        for level in (1, *reduce):
            high, wide = (side // level * level for side in pixels.shape[:2])
            boxes = pixels[:high, :wide].reshape(high // level, level, wide // level, level, 3).mean(axis=(1, 3))
            tiff.write(np.rint(boxes).astype(np.uint8), photometric="rgb", tile=(128, 128), compression="deflate",
                       subfiletype=int(level > 1), metadata=None, resolutionunit="CENTIMETER",
                       resolution=tuple(1e4 / (level * each) for each in mpp))
    return path


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return synthetic.paint(3, 1, 0, size=(768, 512)).pixels


def averaged(pixels: np.ndarray, x: int, y: int, size: tuple[int, int], step: int) -> np.ndarray:
    """Three plain loops."""
    out = np.empty((size[1], size[0], 3))
    for row in range(size[1]):
        for column in range(size[0]):
            top, left = y + row * step, x + column * step
            out[row, column] = pixels[top:top + step, left:left + step].reshape(-1, 3).mean(axis=0)
    return out


# --- microns per pixel


def test_the_header_tells_the_microns_and_an_override_goes_before_it(tmp_path: Path, pixels: np.ndarray) -> None:
    with Slide(pyramid(tmp_path / "a.tif", pixels, (0.25, 0.252))) as slide:
        assert slide.mpp == pytest.approx(0.251)
        assert (slide.width, slide.height) == (768, 512)
    for wrong in ((0.25, 0.26), (0.025, 0.025), (10, 10)):
        with Slide(pyramid(tmp_path / "b.tif", pixels, wrong), mpp=0.5) as slide:
            assert slide.mpp == 0.5


@pytest.mark.parametrize(("mpp", "says"), [
    ((0.25, 0.26), r"pixels of 0\.25\d* x 0\.26\d* microns, not square; give one value in the mpp column"),
    ((0.025, 0.025), r"claims 0\.025\d* x 0\.025\d* microns .* \(plausible: 0\.05 to 5\.0\); give the true value"),
    ((10.0, 10.0), r"claims 10\.0\d* x 10\.0\d* microns per pixel, which no scanner makes"),
])
def test_microns_that_cannot_be_are_refused_with_what_to_do(tmp_path: Path, pixels: np.ndarray,
                                                            mpp: tuple[float, float], says: str) -> None:
    with pytest.raises(SlideError, match=says) as caught:
        Slide(pyramid(tmp_path / "a.tif", pixels, mpp))
    assert str(tmp_path / "a.tif") in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_slide_that_does_not_say_its_microns_is_refused_with_where_to_give_them(tmp_path: Path,
                                                                                 pixels: np.ndarray) -> None:
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", tile=(128, 128))
    with pytest.raises(SlideError, match=r"does not say its microns per pixel.* mpp column of slides\.csv.*slide_mpp"):
        Slide(tmp_path / "a.tif")


def test_what_is_no_slide_is_refused_and_what_is_missing_is_said_to_be_missing(tmp_path: Path) -> None:
    (tmp_path / "text.svs").write_text("this is no slide")
    (tmp_path / "empty.svs").write_bytes(b"")
    for name in ("text.svs", "empty.svs"):
        with pytest.raises(SlideError, match=f"{name} cannot be opened as a slide .*max_failed=1") as caught:
            Slide(tmp_path / name)
        assert caught.value.exit_code == 3
    with pytest.raises(SlideError, match=r"no slide at .*none\.svs"):
        Slide(tmp_path / "none.svs")


def test_a_slide_cut_short_is_refused_when_it_is_opened_or_read(tmp_path: Path, slides: Path) -> None:
    whole = (slides / "P00-S0.svs").read_bytes()
    for keep in (0.02, 0.5, 0.9):
        (tmp_path / "cut.svs").write_bytes(whole[:int(len(whole) * keep)])
        with pytest.raises(SlideError, match=r"cut\.svs (cannot be opened|is damaged|does not say)"), \
                Slide(tmp_path / "cut.svs") as slide:
            slide.region(0, 0, (1024, 1024), 0.5)
    damaged = bytearray(whole)
    damaged[2000:len(whole) // 2] = bytes(len(whole) // 2 - 2000)
    (tmp_path / "holes.svs").write_bytes(damaged)
    with (pytest.raises(SlideError, match=r"holes\.svs is damaged near \(0, 0\)"),
          Slide(tmp_path / "holes.svs") as slide):
        slide.region(0, 0, (1024, 1024), 0.5)


# --- regions


def test_a_region_at_the_slides_own_resolution_is_the_pixels_themselves(tmp_path: Path, pixels: np.ndarray) -> None:
    with Slide(pyramid(tmp_path / "a.tif", pixels)) as slide:
        assert (slide.region(37, 101, (200, 150), 0.5) == pixels[101:251, 37:237]).all()


def test_a_region_at_the_resolution_of_a_level_is_the_average_of_level_0(tmp_path: Path, pixels: np.ndarray) -> None:
    with Slide(pyramid(tmp_path / "a.tif", pixels)) as slide:
        got = slide.region(64, 128, (90, 70), 2.0)
        assert np.abs(got - averaged(pixels, 64, 128, (90, 70), 4)).max() <= 0.5
        almost = slide.region(64, 128, (90, 70), 1.99)      # vendors round: 1 % finer is still that level, not level 0
        assert np.abs(almost.astype(int) - got).max() == 0


@pytest.mark.parametrize("step", [2, 3, 8])
def test_a_region_between_levels_is_close_to_the_average_of_level_0_and_lies_where_it_should(
    tmp_path: Path, pixels: np.ndarray, step: int
) -> None:
    """Pillow's triangle is wider than a box: near, not equal; a pixel amiss would cost several times as much."""
    with Slide(pyramid(tmp_path / "a.tif", pixels)) as slide:
        size = (480 // step, 360 // step)
        got = slide.region(96, 64, size, 0.5 * step).astype(float)
    truth = averaged(pixels, 96, 64, size, step)
    inner = (slice(2, -2), slice(2, -2))
    apart = np.abs(got - truth)[inner].mean()
    for axis in (0, 1):
        for way in (-1, 1):
            assert apart < 0.55 * np.abs(np.roll(got, way, axis) - truth)[inner].mean()
    assert np.abs(got.mean(axis=(0, 1)) - truth.mean(axis=(0, 1))).max() < 1.0


def test_outside_the_slide_it_is_white(tmp_path: Path, pixels: np.ndarray) -> None:
    with Slide(pyramid(tmp_path / "a.tif", pixels)) as slide:
        got = slide.region(700, 480, (100, 100), 0.5)
        assert (got[32:] == 255).all() and (got[:, 68:] == 255).all()
        assert (got[:32, :68] == pixels[480:, 700:]).all()
        before = slide.region(-20, -10, (60, 40), 0.5)
        assert (before[:10] == 255).all() and (before[:, :20] == 255).all()
        assert (before[10:, 20:] == pixels[:30, :40]).all()
        assert (slide.region(5000, 5000, (8, 8), 2.0) == 255).all()


def test_a_thumbnail_is_the_whole_slide(tmp_path: Path, pixels: np.ndarray) -> None:
    with Slide(pyramid(tmp_path / "a.tif", pixels, reduce=(4, 16))) as slide:
        assert slide.thumbnail(4.0).shape == (64, 96, 3)
        assert np.abs(slide.thumbnail(8.0) - averaged(pixels, 0, 0, (48, 32), 16)).max() <= 0.5
        assert slide.thumbnail(10_000.0).shape == (1, 1, 3)


# --- real slides


def test_the_cmu_slide_opens_with_its_own_microns(data: Path) -> None:
    path = data / "wsi_svs" / "CMU-1-Small-Region.svs"
    with Slide(path) as slide, openslide.OpenSlide(path) as plain:
        assert slide.mpp == pytest.approx(0.499, abs=1e-6)
        assert (slide.width, slide.height) == (2220, 2967)
        truth = np.asarray(plain.read_region((300, 500), 0, (400, 400)).convert("RGB"))
        assert (slide.region(300, 500, (400, 400), slide.mpp) == truth).all()
        half = slide.region(300, 500, (200, 200), 2 * slide.mpp)
    assert np.abs(half - averaged(truth, 0, 0, (200, 200), 2)).mean() < 3


def test_the_tcga_slide_is_refused_without_microns_and_read_with_them(data: Path) -> None:
    path = data / "wsi_svs" / "TCGA-CR-7395-01A-01-TS1.svs"
    with pytest.raises(SlideError, match=r"TS1\.svs does not say its microns per pixel; .*slide_mpp=0\.25"):
        Slide(path)
    with Slide(path, mpp=0.5) as slide:
        assert slide.thumbnail(4.0).shape == (round(3567 / 8), round(4443 / 8), 3)
