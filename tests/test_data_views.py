"""Every kernel that draws views against one twin in plain NumPy, on real tiles; and decoding against Pillow."""

import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from ssl_dist.data import augment, dali, opencv, stain
from ssl_dist.data.augment import Numbers
from ssl_dist.data.batch import View

PLAIN = View(size=64, scale=(0.2, 1.0), horizontal=0, vertical=0, jitter=0, grey=0, blur=0)
ALL = View(size=72, jitter=1, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grey=0.2, stain=0.2, blur=0.7,
           solarise=0.4, turn=0.5, randstain=0.5, basis="slide")
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
    "crop, much smaller": replace(PLAIN, size=16, scale=(0.5, 1.0)),
    "stain, now and then": replace(PLAIN, stain=0.3, stained=0.5),
    "the slide's own stains": replace(PLAIN, stain=0.3, basis="slide"),
    "normalised": replace(PLAIN, basis="reference"),
    "other statistics": replace(PLAIN, randstain=1, randstain_spread=0.7),
    "other statistics, together": replace(PLAIN, randstain=0.6, randstain_mixture=True),
    "turned": replace(PLAIN, turn=1),
    "turned and flipped": replace(PLAIN, turn=0.7, horizontal=0.5, vertical=0.5),
    "all": ALL,
    "all, larger": replace(ALL, size=150),
}


# ---- the twin

def rounded(values: np.ndarray) -> np.ndarray:
    return np.floor(np.clip(values, 0, 255) + 0.5).astype(np.uint8)


def bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Half-pixel centres: the middle of a target pixel falls on the middle of what it covers."""
    def along(axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        length, size = image.shape[axis], (height, width)[axis]
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
    return sum(weight * rows[:, shift:shift + size] for shift, weight in enumerate(weights))


LUMINANCE = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
WHITE = np.array([0.950456, 1.0, 1.088754])


def in_lab(image: np.ndarray) -> np.ndarray:
    """CIE LAB of sRGB, in the units of OpenCV's 8-bit pictures."""
    values = image / 255
    light = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    x, y, z = np.moveaxis(light @ LUMINANCE.T / WHITE, -1, 0)
    fx, fy, fz = (np.where(v > 216 / 24389, np.cbrt(v), (24389 / 27 * v + 16) / 116) for v in (x, y, z))
    return np.stack([(116 * fy - 16) * 255 / 100, 500 * (fx - fy) + 128, 200 * (fy - fz) + 128], axis=-1)


def out_of_lab(values: np.ndarray) -> np.ndarray:
    fy = (values[..., 0] * 100 / 255 + 16) / 116
    f = np.stack([fy + (values[..., 1] - 128) / 500, fy, fy - (values[..., 2] - 128) / 200], axis=-1)
    light = np.where(f > 6 / 29, f**3, (116 * f - 16) * 27 / 24389) * WHITE @ np.linalg.inv(LUMINANCE).T
    return 255 * np.where(light <= 0.0031308, light * 12.92, 1.055 * np.maximum(light, 0) ** (1 / 2.4) - 0.055)


def wider(image: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A tile's mean in LAB, and how much wider its channels have to spread to reach a target."""
    seen = in_lab(image).reshape(-1, 3)
    return seen.mean(axis=0), np.minimum(target[3:] / np.maximum(seen.std(axis=0), 1e-6), 4)


def stained(pixels: np.ndarray, stain_34: np.ndarray) -> np.ndarray:
    density = -np.log(np.maximum(pixels, 1) / 255) @ stain_34[:, :3].T + stain_34[:, 3]
    return 255 * np.exp(-np.maximum(density, 0))


def coloured(pixels: np.ndarray, colour_34: np.ndarray) -> np.ndarray:
    return 255 * (pixels / 255 @ colour_34[:, :3].T + colour_34[:, 3])


def apply(step: Callable[[np.ndarray], np.ndarray], picture: np.ndarray, doubt: np.ndarray) -> tuple:
    """A step on every pixel, and how far a kernel may be off after it, pixel by pixel: what it was off before, as large
    as the step makes it, and one grey level and a half: a rounding may fall to the other side, and OpenCV's fixed point
    rounds the factors as well."""
    whole = step(picture.astype(float))         # unclipped: what is cut off alone may not be cut off together
    after = np.full(picture.shape, 1.5)
    for band in range(3):
        moved = []
        for sign in (-1, 1):
            other = picture.astype(float)
            other[:, :, band] = np.clip(other[:, :, band] + sign * doubt[:, :, band], 0, 255)
            moved.append(np.abs(step(other) - whole))
        after += np.maximum(*moved)
    return rounded(whole), after


def twin(image: np.ndarray, numbers: Numbers, row: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """One view, step by step, each rounded to whole grey levels as the kernels round; and how far they may be off."""
    height, width, _ = image.shape
    left, top, wide, tall = numbers.box_N4[row] * [width, height, width, height]
    wide, tall = max(int(np.floor(wide + 0.5)), 1), max(int(np.floor(tall + 0.5)), 1)
    left, top = min(int(np.floor(left + 0.5)), width - wide), min(int(np.floor(top + 0.5)), height - tall)
    picture, doubt = image[top:top + tall, left:left + wide], np.ones((size, size, 3))
    for _ in range(3):
        if min(wide, tall) >= 2 * size:
            wide, tall, doubt = wide // 2, tall // 2, doubt + 0.5
            picture = bilinear(picture, tall, wide)
    picture = bilinear(picture, size, size)
    if not np.isnan(numbers.target_N6[row, 0]):
        mean, gain = wider(image, numbers.target_N6[row])
        picture, doubt = apply(lambda pixels: out_of_lab((in_lab(pixels) - mean) * gain + numbers.target_N6[row, :3]),
                               picture, doubt)
    if numbers.stained_N[row]:
        picture, doubt = apply(lambda pixels: stained(pixels, numbers.stain_N34[row]), picture, doubt)
    picture, doubt = apply(lambda pixels: coloured(pixels, numbers.colour_N34[row]), picture, doubt)
    if numbers.sigma_N[row] > 0:
        picture, doubt = rounded(blurred(picture, numbers.sigma_N[row])), blurred(doubt, numbers.sigma_N[row]) + 1
    if numbers.solarise_N[row]:
        picture = np.where(picture >= 128, 255 - picture, picture)
    turned = [np.rot90(each, numbers.turn_N[row]) for each in (picture, doubt)]
    across, over = numbers.flip_N2[row]
    picture, doubt = (each[::-1 if over else 1, ::-1 if across else 1] for each in turned)
    return picture, doubt


def compare(drawn: np.ndarray, images: list[np.ndarray], numbers: Numbers, view: View, average: float) -> None:
    """Holds a kernel's views against the twin's: rounding may differ, pictures may not."""
    assert drawn.dtype == np.uint8
    assert drawn.shape == (len(images), view.size, view.size, 3)
    for row, image in enumerate(images):
        expected, doubt = twin(image, numbers, row, view.size)
        apart = np.abs(drawn[row].astype(int) - expected)
        assert apart.mean() < average, f"tile {row}: {apart.mean():.2f} grey levels on average"
        assert (apart <= np.maximum(doubt, 2)).all(), f"tile {row}: {(apart - doubt).max()} grey levels too far"


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


def palette(count: int) -> stain.Palette:
    """A fit as `stain-fit` writes it, and `count` samples of slides stained each in its own way."""
    random = np.random.default_rng(5)
    pairs = np.array([stain.HAEMATOXYLIN, stain.EOSIN]) + random.uniform(-0.06, 0.06, (count + 1, 2, 3))
    pairs = np.maximum(pairs, 0.02) / np.linalg.norm(np.maximum(pairs, 0.02), axis=2, keepdims=True)
    strength = random.uniform(0.7, 1.6, (count + 1, 2))
    mean, deviation = np.array([158.0, 151, 117, 37, 8, 6]), np.array([30.0, 8, 6, 9, 2, 1.5])
    fit = stain.Fit(lab_mean_6=mean, lab_std_6=deviation, weights_K=np.array([0.3, 0.7]),
                    means_K6=np.stack([mean - deviation, mean + deviation * 3 / 7]),
                    covariances_K66=np.stack([np.diag(deviation**2 / 4)] * 2), reference_23=pairs[0],
                    reference_strength_2=strength[0], slides={}, shards=[], tiles=1, settings={})
    return stain.Palette(fit, stain.complete(pairs[1:]), strength[1:])


def chosen(view: View, count: int, number: int = 0) -> Numbers:
    return augment.numbers(view, augment.uniforms(11, 2, number, 640, count), palette(count))


# ---- the kernels

@pytest.mark.parametrize("step", STEPS)
def test_opencv_draws_what_the_twin_draws(step: str, tiles: list, uneven: list, pool: ThreadPoolExecutor) -> None:
    view = STEPS[step]
    for images in (decoded(tiles), decoded(uneven)):
        numbers = chosen(view, len(images))
        (drawn,) = opencv.views(images.__getitem__, [numbers], [view.size], pool)
        compare(drawn, images, numbers, view, average=0.6)


@pytest.mark.parametrize("step", STEPS)
def test_dali_draws_what_the_twin_draws(step: str, tiles: list, uneven: list) -> None:
    view = STEPS[step]
    drawer = dali.Drawer((view,), 16, 2, None)
    decoder = dali.Decoder(16, 2)
    for encoded in (tiles, uneven):
        numbers = chosen(view, len(encoded))
        (drawn,) = drawer(encoded, [numbers])
        # It calculates in floats. A quarter of all means of four end on a half, and halves may go either way.
        halved = any(min(image.shape[:2]) >= 2 * view.size for image in decoder(encoded))
        compare(np.array(drawn), decoder(encoded), numbers, view, average=0.3 if halved else 0.05)


def test_dali_draws_every_view_with_its_own_numbers(tiles: list) -> None:
    views = (ALL, replace(ALL, size=40, blur=0, stain=0), PLAIN)
    numbers = [chosen(view, len(tiles), number) for number, view in enumerate(views)]
    drawn = dali.Drawer(views, 16, 2, None)(tiles, numbers)
    images = dali.Decoder(16, 2)(tiles)
    for each, own, view in zip(drawn, numbers, views, strict=True):
        compare(np.array(each), images, own, view, average=0.3 if 2 * view.size <= 96 else 0.05)


def test_dalis_views_are_not_overwritten_by_the_next_call(tiles: list) -> None:
    drawer = dali.Drawer((ALL,), 16, 2, None)
    (first,) = drawer(tiles, [chosen(ALL, 16)])
    before = np.array(first)
    for _ in range(4):
        drawer(tiles[::-1], [chosen(ALL, 16, 1)])
    assert np.array_equal(np.asarray(first), before)


def test_opencvs_views_are_not_overwritten_by_the_next_call(tiles: list, pool: ThreadPoolExecutor) -> None:
    images = decoded(tiles)
    (first,) = opencv.views(images.__getitem__, [chosen(ALL, 16)], [ALL.size], pool)
    before = first.copy()
    opencv.views(images[::-1].__getitem__, [chosen(ALL, 16, 1)], [ALL.size], pool)
    assert np.array_equal(first, before)


def test_a_box_at_the_edge_stays_inside_and_is_never_empty() -> None:
    for width, height in ((7, 9), (96, 96), (1, 1), (1001, 3)):
        for box in ([0.999, 0.999, 0.001, 0.001], [0, 0, 1, 1], [0.5, 0.5, 0.5, 0.5], [1.0, 1.0, 0.0, 0.0]):
            x, y, w, h = opencv.pixel_box(np.array(box), width, height)
            assert 0 <= x < x + w <= width
            assert 0 <= y < y + h <= height


def test_evaluation_sees_the_whole_tile_averaged_when_it_shrinks(pool: ThreadPoolExecutor) -> None:
    image = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    (halved,) = opencv.resized(lambda row: image, 1, 48, pool)
    assert np.abs(halved - image.reshape(48, 2, 48, 2, 3).mean(axis=(1, 3))).max() <= 0.51
    (doubled,) = opencv.resized(lambda row: image, 1, 192, pool)
    assert np.abs(doubled.astype(int) - bilinear(image, 192, 192)).max() <= 1


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


def odd(data: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pictures as scanners, viewers and strangers write them: the file, and what Pillow and NumPy see in it."""
    (large, *_) = sorted((data / "osteosarcoma_tcia_1024px/Viable").glob("*.jpg"))
    tissue = Image.open(large).convert("RGB").crop((300, 400, 571, 653))
    turned, found = Image.Exif(), {}
    turned[0x0112] = 6                                          # to be shown a quarter clockwise
    for name, (mode, kind, options) in {
            "4:4:4": ("RGB", "JPEG", {"subsampling": 0}), "4:2:2": ("RGB", "JPEG", {"subsampling": 1}),
            "4:2:0": ("RGB", "JPEG", {"subsampling": 2}), "progressive": ("RGB", "JPEG", {"progressive": True}),
            "RGB JPEG": ("RGB", "JPEG", {"keep_rgb": True, "subsampling": 0}), "grey JPEG": ("L", "JPEG", {}),
            "CMYK JPEG": ("CMYK", "JPEG", {}), "turned": ("RGB", "JPEG", {"exif": turned, "subsampling": 0}),
            "grey PNG": ("L", "PNG", {}), "palette": ("P", "PNG", {}), "with alpha": ("RGBA", "PNG", {})}.items():
        buffer = io.BytesIO()
        tissue.convert(mode).save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}), **options)
        found[name] = (np.frombuffer(buffer.getvalue(), np.uint8),
                       np.asarray(ImageOps.exif_transpose(Image.open(buffer)).convert("RGB")))
    deep = np.asarray(tissue).astype(np.uint16) * 257 + np.random.default_rng(0).integers(0, 128, (253, 271, 3))
    deep = np.minimum(deep, 65535).astype(">u2")
    found["16 bits"] = (png16(deep), np.floor(deep / 65535 * 255 + 0.5).astype(np.uint8))
    return found


def png16(image: np.ndarray) -> np.ndarray:
    """A PNG of 16 bits a channel, byte by byte: Pillow writes none in colour."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = image.shape
    lines = b"".join(b"\0" + line.tobytes() for line in image)
    file = (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))
    return np.frombuffer(file, np.uint8)


def test_what_others_write_is_decoded_as_they_meant_it_and_drawn_by_both_kernels_as_the_twin_draws_it(
        data: Path, pool: ThreadPoolExecutor) -> None:
    pictures = odd(data)
    encoded, shown = map(list, zip(*pictures.values(), strict=True))
    assert shown[0].std() > 20
    assert pictures["turned"][1].shape == (271, 253, 3) != shown[0].shape
    found = dali.Decoder(len(encoded), 2)(encoded)
    for name, mine, theirs in zip(pictures, found, shown, strict=True):
        assert mine.shape == theirs.shape, name
        assert np.abs(mine.astype(int) - theirs).max() <= 1, name
    for view in (replace(PLAIN, size=131), ALL):
        numbers = chosen(view, len(encoded))
        (one,) = opencv.views(found.__getitem__, [numbers], [view.size], pool)
        compare(one, shown, numbers, view, average=0.6)
        (other,) = dali.Drawer((view,), len(encoded), 2, None)(encoded, [numbers])
        compare(np.array(other), shown, numbers, view, average=0.3)


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


DAMAGE = """
import sys
import numpy as np
from ssl_dist.data import augment, dali
from ssl_dist.data.batch import View
from ssl_dist.data.decode import Decoder

random, view = np.random.default_rng(0), View(size=16)
tiles = [np.fromfile(path, np.uint8) for path in sys.argv[1:]]
good = tiles[0]

def damaged():
    cut, flipped, head = good[:random.integers(3, len(good))], good.copy(), good.copy()
    for each, last in ((flipped, len(good)), (head, 200)):
        places = random.integers(3, last, 8)
        each[places] ^= random.integers(1, 256, 8, dtype=np.uint8)
    noise = random.integers(0, 256, 3000, dtype=np.uint8)
    text, behind = np.frombuffer(b"no picture" * 50, np.uint8), np.concatenate([good[:20], noise])
    return {"cut": cut, "flipped": flipped, "head": head, "noise": noise, "behind a header": behind,
            "nothing": noise[:0], "text": text}

drawer, numbers = dali.Drawer((view,), 64, 2, None), augment.numbers(view, augment.uniforms(0, 0, 0, 0, 64))
decoder, plain = dali.Decoder(64, 2), Decoder(64, 2)
for turn in range(210):
    batch, place = list(tiles), int(random.integers(64))
    kind, batch[place] = list(damaged().items())[turn % 7]
    refused = []
    for draw in (lambda: decoder(batch), lambda: drawer(batch, [numbers])):
        try:
            draw()
            refused.append(False)
        except RuntimeError:
            refused.append(True)
    pictures = plain.open(batch)
    for row in range(64):
        pictures(row)
    assert set(pictures.bad) <= {place}
    assert refused[0] == refused[1] == bool(pictures.bad), (kind, refused, pictures.bad)
print("survived")
"""


def test_no_damage_to_one_tile_of_many_ends_the_process(data: Path) -> None:
    """In a process of its own: of 32 tiles or more, DALI 2.4 alone would end it with a segmentation fault."""
    files = [str(path) for path in sorted((data / "pcam_subset_96px/valid").rglob("*.jpg"))[:64]]
    done = subprocess.run([sys.executable, "-c", DAMAGE, *files], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)})
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert done.stdout.strip() == "survived"


def test_a_broken_image_does_not_break_the_drawer(tiles: list) -> None:
    drawer = dali.Drawer((PLAIN,), 16, 2, None)
    numbers = chosen(PLAIN, 16)
    good = np.array(drawer(tiles, [numbers])[0])
    with pytest.raises(RuntimeError):
        drawer([*tiles[:15], tiles[0][:30]], [numbers])
    assert np.array_equal(np.array(drawer(tiles, [numbers])[0]), good)
