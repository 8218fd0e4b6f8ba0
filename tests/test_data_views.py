"""Every kernel that draws views against one twin in plain NumPy, on real tiles; and decoding against Pillow."""

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_dist.data import augment, dali, opencv
from ssl_dist.data.augment import Numbers
from ssl_dist.data.batch import View

PLAIN = View(size=64, scale=(0.2, 1.0), horizontal=0, vertical=0, jitter=0, grey=0, blur=0)
ALL = View(size=72, jitter=1, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grey=0.2, stain=0.2, blur=0.7,
           solarise=0.4)
STEPS = {
    "crop, smaller": PLAIN,
    "crop, larger": replace(PLAIN, size=131),
    "crop, thin": replace(PLAIN, size=80, scale=(0.01, 0.1), ratio=(0.2, 5.0)),
    "whole": replace(PLAIN, size=96, scale=(1.0, 1.0), ratio=(1.0, 1.0)),
    "left-right": replace(PLAIN, horizontal=1),
    "up-down": replace(PLAIN, vertical=1),
    "flips": replace(PLAIN, horizontal=0.5, vertical=0.5),
    "stain": replace(PLAIN, stain=0.3),
    "colour": replace(PLAIN, jitter=1, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    "strong colour": replace(PLAIN, jitter=1, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.5),
    "grey": replace(PLAIN, grey=1),
    "blur": replace(PLAIN, blur=1, sigma=(0.1, 3.0)),
    "blur or not": replace(PLAIN, blur=0.5),
    "blur wider than the view": replace(PLAIN, size=24, blur=1, sigma=(4.0, 9.0)),
    "solarise": replace(PLAIN, solarise=0.6),
    "all": ALL,
    "all, larger": replace(ALL, size=150),
}


# ---- the twin

def rounded(values: np.ndarray) -> np.ndarray:
    return np.floor(np.clip(values, 0, 255) + 0.5).astype(np.uint8)


def bilinear(image: np.ndarray, size: int) -> np.ndarray:
    """Half-pixel centres: the middle of a target pixel falls on the middle of what it covers."""
    def along(axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        length = image.shape[axis]
        place = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
        before = np.floor(place).astype(int)
        return before, np.minimum(before + 1, length - 1), place - before

    (top, bottom, down), (left, right, across) = along(0), along(1)
    across, down = across[None, :, None], down[:, None, None]
    pixels = image.astype(float)
    upper = pixels[top][:, left] * (1 - across) + pixels[top][:, right] * across
    lower = pixels[bottom][:, left] * (1 - across) + pixels[bottom][:, right] * across
    return rounded(upper * (1 - down) + lower * down)


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    radius = int(np.ceil(3 * sigma))
    weights = np.exp(-np.arange(-radius, radius + 1) ** 2 / (2 * sigma**2))
    weights /= weights.sum()
    padded = np.pad(image.astype(float), ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    size = len(image)
    rows = sum(weight * padded[shift:shift + size] for shift, weight in enumerate(weights))
    return rounded(sum(weight * rows[:, shift:shift + size] for shift, weight in enumerate(weights)))


def twin(image: np.ndarray, numbers: Numbers, row: int, size: int) -> np.ndarray:
    """One view, step by step, each rounded to whole grey levels as the kernels round."""
    height, width, _ = image.shape
    left, top, wide, tall = numbers.box_N4[row] * [width, height, width, height]
    wide, tall = max(int(np.floor(wide + 0.5)), 1), max(int(np.floor(tall + 0.5)), 1)
    left, top = min(int(np.floor(left + 0.5)), width - wide), min(int(np.floor(top + 0.5)), height - tall)
    picture = bilinear(image[top:top + tall, left:left + wide], size)
    if numbers.stain_N34.shape[1]:
        matrix, offset = numbers.stain_N34[row][:, :3], numbers.stain_N34[row][:, 3]
        density = -np.log(np.maximum(picture, 1) / 255) @ matrix.T + offset
        picture = rounded(255 * np.exp(-np.maximum(density, 0)))
    matrix, offset = numbers.colour_N34[row][:, :3], numbers.colour_N34[row][:, 3]
    picture = rounded(255 * (picture / 255 @ matrix.T + offset))
    if numbers.sigma_N[row] > 0:
        picture = blurred(picture, numbers.sigma_N[row])
    if numbers.solarise_N[row]:
        picture = np.where(picture >= 128, 255 - picture, picture)
    if numbers.flip_N2[row, 0]:
        picture = picture[:, ::-1]
    return picture[::-1] if numbers.flip_N2[row, 1] else picture


def compare(drawn: np.ndarray, images: list[np.ndarray], numbers: Numbers, view: View, average: float) -> None:
    """Holds a kernel's views against the twin's: rounding may differ, pictures may not."""
    assert drawn.dtype == np.uint8
    assert drawn.shape == (len(images), view.size, view.size, 3)
    for row, image in enumerate(images):
        expected = twin(image, numbers, row, view.size)
        apart = np.abs(drawn[row].astype(int) - expected)
        # A level lost to fixed point before the colour map comes out as large as the map makes it.
        gain = max(1.0, float(np.abs(numbers.colour_N34[row][:, :3]).sum(axis=1).max()))
        assert apart.mean() < average, f"tile {row}: {apart.mean():.2f} grey levels on average"
        assert apart.max() <= 2 + gain, f"tile {row}: {apart.max()} grey levels"


# ---- tiles

def png(image: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)


def real(data: Path) -> list[np.ndarray]:
    """Sixteen tiles of 96 pixels, as files."""
    files = sorted((data / "pcam_subset_96px/valid").rglob("*.jpg"))
    return [np.fromfile(path, dtype=np.uint8) for path in files[::63]]


def of_all_sizes(data: Path) -> list[np.ndarray]:
    """Twelve real tiles, lying and standing, of twelve sizes."""
    (large, *_) = sorted((data / "osteosarcoma_tcia_1024px/Viable").glob("*.jpg"))
    tissue = np.asarray(Image.open(large).convert("RGB"))[400:, 400:]
    sides = [(96, 96), (61, 200), (200, 61), (333, 250), (31, 31), (500, 499), (64, 65), (17, 90), (128, 256), (7, 9),
             (224, 224), (301, 77)]
    cut = [tissue[number:number + tall, 2 * number:2 * number + wide] for number, (tall, wide) in enumerate(sides)]
    assert min(each.std() for each in cut) > 10, "a tile is blank and proves nothing"
    return [png(np.ascontiguousarray(each)) for each in cut]


@pytest.fixture(scope="module")
def tiles(data: Path) -> list[np.ndarray]:
    return real(data)


@pytest.fixture(scope="module")
def uneven(data: Path) -> list[np.ndarray]:
    return of_all_sizes(data)


@pytest.fixture(scope="module")
def pool() -> ThreadPoolExecutor:
    opencv.one_thread()
    with ThreadPoolExecutor(2) as pool:
        yield pool


def decoded(encoded: list[np.ndarray]) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(each.tobytes())).convert("RGB")) for each in encoded]


def chosen(view: View, count: int, number: int = 0) -> Numbers:
    return augment.numbers(view, augment.uniforms(11, 2, number, 640, count))


# ---- the kernels

@pytest.mark.parametrize("step", STEPS)
def test_opencv_draws_what_the_twin_draws(step: str, tiles: list, uneven: list, pool: ThreadPoolExecutor) -> None:
    view = STEPS[step]
    for images in (decoded(tiles), decoded(uneven)):
        numbers = chosen(view, len(images))
        compare(opencv.views(images, numbers, view.size, pool), images, numbers, view, average=0.6)


@pytest.mark.parametrize("step", STEPS)
def test_dali_draws_what_the_twin_draws(step: str, tiles: list, uneven: list) -> None:
    view = STEPS[step]
    drawer = dali.Drawer((view,), 16, 2, None)
    decoder = dali.Decoder(16, 2)
    for encoded in (tiles, uneven):
        numbers = chosen(view, len(encoded))
        (drawn,) = drawer(encoded, [numbers])
        compare(np.array(drawn), decoder(encoded), numbers, view, average=0.05)    # it calculates in floats


def test_dali_draws_every_view_with_its_own_numbers(tiles: list) -> None:
    views = (ALL, replace(ALL, size=40, blur=0, stain=0), PLAIN)
    numbers = [chosen(view, len(tiles), number) for number, view in enumerate(views)]
    drawn = dali.Drawer(views, 16, 2, None)(tiles, numbers)
    images = dali.Decoder(16, 2)(tiles)
    for each, own, view in zip(drawn, numbers, views, strict=True):
        compare(np.array(each), images, own, view, average=0.05)


def test_dalis_views_are_not_overwritten_by_the_next_call(tiles: list) -> None:
    drawer = dali.Drawer((ALL,), 16, 2, None)
    (first,) = drawer(tiles, [chosen(ALL, 16)])
    before = np.array(first)
    for _ in range(4):
        drawer(tiles[::-1], [chosen(ALL, 16, 1)])
    assert np.array_equal(np.asarray(first), before)


def test_opencvs_views_are_not_overwritten_by_the_next_call(tiles: list, pool: ThreadPoolExecutor) -> None:
    images = decoded(tiles)
    first = opencv.views(images, chosen(ALL, 16), ALL.size, pool)
    before = first.copy()
    opencv.views(images[::-1], chosen(ALL, 16, 1), ALL.size, pool)
    assert np.array_equal(first, before)


def test_a_box_at_the_edge_stays_inside_and_is_never_empty() -> None:
    for width, height in ((7, 9), (96, 96), (1, 1), (1001, 3)):
        for box in ([0.999, 0.999, 0.001, 0.001], [0, 0, 1, 1], [0.5, 0.5, 0.5, 0.5], [1.0, 1.0, 0.0, 0.0]):
            x, y, w, h = opencv.pixel_box(np.array(box), width, height)
            assert 0 <= x < x + w <= width
            assert 0 <= y < y + h <= height


def test_evaluation_sees_the_whole_tile_averaged_when_it_shrinks(pool: ThreadPoolExecutor) -> None:
    image = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    (halved,) = opencv.resized([image], 48, pool)
    assert np.abs(halved - image.reshape(48, 2, 48, 2, 3).mean(axis=(1, 3))).max() <= 0.51
    (doubled,) = opencv.resized([image], 192, pool)
    assert np.abs(doubled.astype(int) - bilinear(image, 192)).max() <= 1


def test_work_is_spread_over_every_row_once_and_its_errors_come_back(pool: ThreadPoolExecutor) -> None:
    done: list[int] = []
    opencv.spread(pool, done.append, range(37))
    assert sorted(done) == list(range(37))
    with pytest.raises(ZeroDivisionError):
        opencv.spread(pool, lambda row: 1 // (row - 20), range(37))


# ---- decoding

def test_the_decoder_decodes_as_pillow_does(tiles: list, uneven: list, data: Path) -> None:
    grey = io.BytesIO()
    Image.fromarray(decoded(tiles)[0]).convert("L").save(grey, "JPEG", quality=95)
    (large, *_) = sorted((data / "osteosarcoma_tcia_1024px").rglob("*.jpg"))
    encoded = [*tiles[:8], *uneven[:6], np.frombuffer(grey.getvalue(), dtype=np.uint8),
               np.fromfile(large, dtype=np.uint8)]
    found = dali.Decoder(16, 2)(encoded)
    assert len(found) == len(encoded)
    for mine, theirs in zip(found, decoded(encoded), strict=True):
        assert mine.dtype == np.uint8
        assert mine.shape == theirs.shape
        apart = np.abs(mine.astype(int) - theirs)
        assert apart.max() <= 2
        assert apart.mean() < 0.1


def test_what_was_decoded_is_not_overwritten_by_the_next_call(tiles: list) -> None:
    decoder = dali.Decoder(16, 2)
    first = decoder(tiles)
    before = [image.copy() for image in first]
    for _ in range(3):
        decoder(tiles[::-1])
    assert all(np.array_equal(one, other) for one, other in zip(first, before, strict=True))


@pytest.mark.parametrize("broken", ["garbage", "header alone", "text"])
def test_a_broken_image_is_an_error_and_the_decoder_works_on(broken: str, tiles: list) -> None:
    content = {"garbage": np.random.default_rng(0).integers(0, 256, 3000, dtype=np.uint8),
               "header alone": tiles[0][:30], "text": np.frombuffer(b"no picture at all", dtype=np.uint8)}[broken]
    decoder = dali.Decoder(16, 2)
    good = decoder(tiles)
    for _ in range(3):
        with pytest.raises(RuntimeError):
            decoder([*tiles[:5], content, *tiles[6:]])
        again = decoder(tiles)
        assert all(np.array_equal(one, other) for one, other in zip(good, again, strict=True))


def test_a_broken_image_does_not_break_the_drawer(tiles: list) -> None:
    drawer = dali.Drawer((PLAIN,), 16, 2, None)
    numbers = chosen(PLAIN, 16)
    good = np.array(drawer(tiles, [numbers])[0])
    with pytest.raises(RuntimeError):
        drawer([*tiles[:15], tiles[0][:30]], [numbers])
    assert np.array_equal(np.array(drawer(tiles, [numbers])[0]), good)
