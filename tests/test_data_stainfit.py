"""The stains of slides and the colours of tiles, against painted slides, pathologists' nuclei and plain loops."""

import copy
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from shards import folder, index, synthetic, write
from shards.index import ShardError
from ssl_dist.data import stain, stainfit
from ssl_dist.data.dali import Decoder
from ssl_dist.data.reader import Reader

ROOT = Path(__file__).resolve().parent.parent
RUIFROK = np.array([(0.650, 0.704, 0.286), (0.072, 0.990, 0.105)])
MACENKO = np.array([(0.5626, 0.7201, 0.4062), (0.2159, 0.8012, 0.5581)])     # the paper's own


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (one * other).sum(axis=-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)


def degrees(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.degrees(np.arccos(np.minimum(cosines(one, other), 1)))


# ---- stains

def mixed(vectors: np.ndarray, count: int = 40_000, noise: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of two stains in any proportion, a tenth of them nearly of one alone; and the amounts."""
    rng = np.random.default_rng(seed)
    share = rng.beta(0.3, 0.3, count)
    amounts = np.stack([share, 1 - share], axis=1) * rng.uniform(0.4, 1.4, (count, 1))
    light = 255 * np.exp(-amounts @ (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)))
    return (light + rng.normal(0, noise, light.shape)).round().clip(0, 255).astype(np.uint8), amounts


@pytest.mark.parametrize("vectors", [RUIFROK, MACENKO, *(each.vectors for each in synthetic.SCANNERS)],
                         ids=["Ruifrok", "Macenko", *(each.scanner for each in synthetic.SCANNERS)])
@pytest.mark.parametrize(("noise", "bound"), [(0.0, 0.7), (2.0, 2.0)])
def test_the_stains_of_a_pure_mixture_are_found_again(vectors: np.ndarray, noise: float, bound: float) -> None:
    pixels, amounts = mixed(vectors, noise=noise)
    found = stainfit.macenko(pixels)
    assert found is not None
    stains_23, strength_2 = found
    assert degrees(stains_23, vectors).max() < bound
    assert np.linalg.norm(stains_23, axis=1) == pytest.approx([1, 1], abs=1e-12) and stains_23.min() >= 0
    expected = [sorted(column)[int(0.99 * len(column))] for column in amounts.T.tolist()]
    assert strength_2 == pytest.approx(expected, rel=0.03 if not noise else 0.08)


def test_neither_glass_nor_the_order_of_pixels_moves_the_stains() -> None:
    pixels, _ = mixed(RUIFROK, noise=2)
    stains_23, strength_2 = stainfit.macenko(pixels)        # type: ignore[misc]
    rng = np.random.default_rng(1)
    glass = rng.integers(225, 256, (30_000, 3), dtype=np.uint8)
    for other in (np.concatenate([glass, pixels]), pixels[rng.permutation(len(pixels))]):
        again, strength = stainfit.macenko(other)       # type: ignore[misc]
        assert again == pytest.approx(stains_23, abs=1e-9)
        assert strength == pytest.approx(strength_2, abs=1e-9)


def test_haematoxylin_is_the_stain_that_absorbs_red_whichever_there_is_more_of() -> None:
    pixels, amounts = mixed(RUIFROK)
    for much in (amounts[:, 0] > 0.2 * amounts[:, 1], amounts[:, 1] > 0.2 * amounts[:, 0]):
        stains_23, _ = stainfit.macenko(pixels[much])       # type: ignore[misc]
        assert stains_23[0, 0] > 2 * stains_23[1, 0]
    # A green and a violet that no stain is, and whose share of blue says the contrary.
    odd = np.array([(0.60, 0.55, 0.58), (0.30, 0.95, 0.05)])
    stains_23, _ = stainfit.macenko(mixed(odd)[0])      # type: ignore[misc]
    assert degrees(stains_23, odd).max() < 1


def noisy(middle: np.ndarray, deviation: float) -> np.ndarray:
    return (middle + np.random.default_rng(0).normal(0, deviation, middle.shape)).round().clip(0, 255).astype(np.uint8)


GREY = np.random.default_rng(1).uniform(40, 210, (20_000, 1)) * np.ones(3)
ONE_STAIN = 255 * np.exp(-np.random.default_rng(2).uniform(0.3, 1.5, (20_000, 1)) * RUIFROK[:1])


@pytest.mark.parametrize("pixels", [
    np.empty((0, 3), np.uint8), np.full((50_000, 3), 255, np.uint8), np.full((50_000, 3), 120, np.uint8),
    np.zeros((50_000, 3), np.uint8), noisy(np.full((50_000, 3), 243.0), 3), noisy(GREY, 0), noisy(GREY, 2),
    noisy(ONE_STAIN, 0), noisy(ONE_STAIN, 1),
    np.concatenate([np.full((50_000, 3), 250, np.uint8), mixed(RUIFROK, 999)[0]])],
    ids=["nothing", "white", "one grey", "black", "glass", "greys", "greys with noise", "one stain",
         "one stain with noise", "999 pixels of tissue"])
def test_without_tissue_or_without_two_stains_there_is_no_answer(pixels: np.ndarray) -> None:
    assert stainfit.macenko(pixels) is None


def test_a_thousand_pixels_of_tissue_are_enough() -> None:
    found = stainfit.macenko(mixed(RUIFROK, 1000)[0])
    assert found is not None and degrees(found[0], RUIFROK).max() < 2


@pytest.fixture(scope="module")
def fitted(shard: Path) -> stain.Fit:
    return stainfit.fit([shard], tiles=400, threads=2)


def test_painted_slides_have_the_stains_they_were_painted_with(fitted: stain.Fit) -> None:
    """Within 8 degrees: their glass is tinted, nearly all eosin lies over some haematoxylin, and JPEG blurs colour."""
    assert sorted(fitted.slides) == [("painted", f"P{number:02d}-S0") for number in range(4)]
    truth = np.stack([synthetic.stain_of(0, number, 0).vectors for number in range(4)])
    found = np.stack([fitted.slides["painted", f"P{number:02d}-S0"][0] for number in range(4)])
    assert degrees(found, truth).max() < 8
    assert degrees(found, truth).mean() < 4.5
    # Each is nearer to its own slide's truth than the truths of slides are to each other.
    for number in range(4):
        away = [degrees(found[number], other).sum() for other in truth]
        assert int(np.argmin(away)) == number


def test_the_reference_is_the_median_of_the_slides(fitted: stain.Fit) -> None:
    for row, column in itertools.product(range(2), range(3)):
        middle = [[statistics.median(float(vectors[one, two]) for vectors, _ in fitted.slides.values())
                   for two in range(3)] for one in range(2)]
        length = math.sqrt(sum(value**2 for value in middle[row]))
        assert fitted.reference_23[row, column] == pytest.approx(middle[row][column] / length)
    assert fitted.reference_strength_2 == pytest.approx(
        [statistics.median(float(strength[one]) for _, strength in fitted.slides.values()) for one in range(2)])


def regions(data: Path) -> list[Path]:
    return sorted((data / "monuseg2018" / "train" / "images").iterdir())


def test_on_real_tissue_haematoxylin_is_bluish_eosin_is_pink_and_both_are_near_the_papers(data: Path) -> None:
    found = []
    for path in regions(data):
        pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)[::10]
        stains_23, _ = stainfit.macenko(pixels)     # type: ignore[misc]
        (red, green, blue), (pink_red, pink_green, pink_blue) = np.exp(-stains_23).tolist()
        assert blue > green and blue > 0.99 * red, path.name
        assert pink_red > pink_blue > pink_green and pink_red > 1.05 * pink_blue, path.name
        found.append(stains_23)
    assert len(found) == 30
    stains_S23 = np.stack(found)
    assert np.median(np.exp(-stains_S23[:, 0, 2]) / np.exp(-stains_S23[:, 0, 0])) > 1.1
    assert cosines(stains_S23, MACENKO).min() > 0.97
    assert cosines(stains_S23, RUIFROK)[:, 0].min() > 0.96
    # Ruifrok and Johnston measured eosin alone; with tissue under it, it is nearer to Macenko's everywhere.
    assert cosines(stains_S23, RUIFROK)[:, 1].min() > 0.82


def test_haematoxylin_tells_the_nuclei_that_pathologists_outlined_and_eosin_does_not(data: Path) -> None:
    chances = []
    for path in regions(data)[::3]:
        pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
        mask = np.asarray(Image.open(data / "monuseg2018" / "train" / "masks_binary" / f"{path.stem}.png").convert("L"))
        stains_23, _ = stainfit.macenko(pixels[::10])       # type: ignore[misc]
        amounts = np.linalg.lstsq(stains_23.T, -np.log(np.maximum(pixels, 1) / 255).T, rcond=None)[0]
        inside = mask.ravel() > 0
        rng = np.random.default_rng(0)
        one, other = (rng.choice(np.flatnonzero(where), 5000) for where in (inside, ~inside))
        chances.append((amounts[:, one] > amounts[:, other]).mean(axis=1))     # that the nucleus has more of it
    assert np.min(chances, axis=0)[0] > 0.75
    assert np.median(chances, axis=0)[0] > 0.9
    assert 0.3 < np.median(chances, axis=0)[1] < 0.7


# ---- colours

def plain_lab(red: int, green: int, blue: int) -> list[float]:
    """One pixel, as the CIE has it and as OpenCV counts it."""
    light = [value / 255 / 12.92 if value / 255 <= 0.04045 else ((value / 255 + 0.055) / 1.055) ** 2.4
             for value in (red, green, blue)]
    x = (0.412453 * light[0] + 0.357580 * light[1] + 0.180423 * light[2]) / 0.950456
    y = 0.212671 * light[0] + 0.715160 * light[1] + 0.072169 * light[2]
    z = (0.019334 * light[0] + 0.119193 * light[1] + 0.950227 * light[2]) / 1.088754
    a, b, c = (value ** (1 / 3) if value > (6 / 29) ** 3 else value / (3 * (6 / 29) ** 2) + 4 / 29
               for value in (x, y, z))
    return [(116 * b - 16) * 2.55, 500 * (a - b) + 128, 200 * (b - c) + 128]


PIXELS = [[0, 0, 0], [255, 255, 255], [1, 2, 3], [10, 10, 11], [255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 90, 160],
          [60, 40, 120], [243, 241, 246]]


def test_lab_is_what_a_plain_loop_makes_of_each_pixel() -> None:
    assert stain.lab(np.array(PIXELS, np.uint8)) == pytest.approx(np.array([plain_lab(*pixel) for pixel in PIXELS]),
                                                                  abs=1e-9)


def opencv_lab(image: np.ndarray) -> np.ndarray:
    """From light, for OpenCV's own curve of sRGB is a coarse table where the picture is in floats."""
    light = np.array([value / 255 / 12.92 if value / 255 <= 0.04045 else ((value / 255 + 0.055) / 1.055) ** 2.4
                      for value in range(256)], np.float32)
    return cv2.cvtColor(light[image], cv2.COLOR_LRGB2LAB) * [2.55, 1, 1] + [0, 128, 128]


def test_lab_is_opencvs_but_for_its_tables_and_its_rounding() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image[:8] //= 16        # where the curves are straight
    found = stain.lab(image)
    assert np.abs(found - opencv_lab(image)).max() < 0.05
    table = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB) * [2.55, 1, 1] + [0, 128, 128]
    assert np.abs(found - table).max() < 0.6
    assert np.abs(found - cv2.cvtColor(image, cv2.COLOR_RGB2LAB)).max() < 2.5


def test_the_statistics_of_a_tile_are_those_of_its_pixels_one_by_one() -> None:
    image = np.random.default_rng(3).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    channels = list(zip(*(plain_lab(*pixel) for pixel in image.reshape(-1, 3).tolist()), strict=True))
    assert stainfit.lab_statistics(image) == pytest.approx([*map(statistics.fmean, channels),
                                                            *map(statistics.pstdev, channels)], abs=1e-9)


def test_the_statistics_of_a_folder_are_those_of_all_its_tiles(fitted: stain.Fit, shard: Path) -> None:
    reader = Reader([shard])
    rows = reader.all_rows()
    assert fitted.tiles == len(rows) and not fitted.left_out
    images = Decoder(len(rows), 2)(reader.read(rows))
    reader.close()
    each = []
    for image in images:
        lab = opencv_lab(image).reshape(-1, 3)
        each.append([*lab.mean(axis=0), *lab.std(axis=0)])
    assert fitted.lab_mean_6 == pytest.approx(np.mean(each, axis=0), abs=0.02)
    assert fitted.lab_std_6 == pytest.approx(np.std(each, axis=0), abs=0.02)


def normal(point: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    away = point - mean
    return math.exp(-0.5 * away @ np.linalg.inv(covariance) @ away) / math.sqrt(
        (2 * math.pi) ** 6 * np.linalg.det(covariance))


def likelihood(points: np.ndarray, weights: np.ndarray, means: np.ndarray, covariances: np.ndarray) -> float:
    """Mean logarithm of the density, point by point."""
    return statistics.fmean(math.log(math.fsum(
        weight * normal(point, mean, covariance) for weight, mean, covariance in zip(weights, means, covariances,
                                                                                    strict=True))) for point in points)


def known(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Points of three kinds of tile, and the mixture they are of, the heaviest first."""
    rng = np.random.default_rng(5)
    weights, means = np.array([0.5, 0.3, 0.2]), np.array([[150, 150, 115, 40, 9, 8], [200, 140, 120, 20, 5, 4],
                                                          [110, 165, 105, 45, 7, 6.0]])
    turns = rng.normal(0, [[8], [2], [2], [3], [1], [1]], (3, 6, 6))
    covariances = turns @ turns.swapaxes(1, 2) + 0.2 * np.eye(6)
    kind = rng.choice(3, count, p=weights)
    points = np.stack([rng.multivariate_normal(means[each], covariances[each]) for each in kind])
    return points, weights, means, covariances


@pytest.mark.parametrize("components", [0, 3])
def test_a_known_mixture_is_found_again_and_the_criterion_finds_its_number(components: int) -> None:
    points, *truth = known(3000)
    found = stainfit.mixture(points, components, 0)
    assert [len(each) for each in found] == [3, 3, 3]
    deviation_K6 = np.sqrt(np.diagonal(truth[2], axis1=1, axis2=2))
    assert found[0] == pytest.approx(truth[0], abs=0.03)
    assert np.abs((found[1] - truth[1]) / deviation_K6).max() < 0.15
    assert np.abs((found[2] - truth[2]) / (deviation_K6[:, :, None] * deviation_K6[:, None])).max() < 0.2
    assert np.linalg.eigvalsh(found[2]).min() > 0 and np.array_equal(found[2], found[2].swapaxes(1, 2))
    assert likelihood(points[:500], *found) == pytest.approx(likelihood(points[:500], *truth), abs=0.06)
    (one,) = zip(*stainfit.mixture(points, 1, 0), strict=True)
    assert likelihood(points[:500], *([part] for part in one)) < likelihood(points[:500], *truth) - 0.5


def test_one_component_is_the_mean_and_the_covariance() -> None:
    points, *_ = known(200)
    weights, means, covariances = stainfit.mixture(points, 1, 0)
    assert weights == pytest.approx([1])
    assert means[0] == pytest.approx(points.mean(axis=0))
    # The floor under a component is a thousandth of each variance.
    assert covariances[0] == pytest.approx(np.cov(points, rowvar=False, bias=True) + np.diag(points.var(axis=0)) / 1000)


def test_tiles_without_any_colour_still_make_a_mixture_that_can_be_drawn_from() -> None:
    points, *_ = known(100)
    points[:, [1, 2]], points[:, [4, 5]] = 128, 0
    for values in (points, points[:1].repeat(100, axis=0)):
        for components in (0, 4):
            weights, _, covariances = stainfit.mixture(values, components, 0)
            assert np.linalg.cholesky(covariances).shape == (len(weights), 6, 6)


def test_more_components_than_tiles_are_refused() -> None:
    for tiles, components in ((1, 0), (5, 5)):
        with pytest.raises(ShardError, match=f"{tiles} tiles are too few for a mixture of {components or 1} "):
            stainfit.mixture(known(tiles)[0], components, 0)


def test_a_folder_is_named_once_and_its_splits_by_their_names(shard: Path) -> None:
    with pytest.raises(ShardError, match="more than once"):
        stainfit.fit([shard, shard])
    with pytest.raises(ShardError, match="trian"):
        stainfit.fit([shard], split="trian")


# ---- the sample

def pack(where: Path, dataset: str, slides: list[str], splits: list[str] | None = None, tars: int = 3) -> Path:
    """A shard folder of rows alone, for what looks at no tile."""
    where.mkdir()
    count = len(slides)
    tar = np.sort(np.random.default_rng(count).integers(0, tars, count))
    listed = []
    for number in range(tars):
        (where / f"{dataset}-{number:06d}.tar").write_bytes(b"")
        listed.append(index.Tar(f"{dataset}-{number:06d}.tar", int((tar == number).sum()), 0, ""))
    index.write_samples(where, {
        "key": [f"{dataset}_{number}" for number in range(count)], "tar": tar, "dataset": [dataset] * count,
        "slide": slides, "split": splits or [""] * count, "digest": [bytes(16)] * count,
        **{name: ["x"] * count for name in ("patient", "stain", "organ", "encoding")},
        **{name: [0] * count for name in ("offset", "size", "crc32", "x", "y", "mpp", "label")}})
    index.write(where, index.Index([{"name": dataset, "classes": []}], {}, str(where), listed))
    return where


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[tuple[str, str, str]]]:
    """Three folders, two of them of one dataset, and (dataset, slide, split) of every row."""
    root = tmp_path_factory.mktemp("catalogue")
    rng = np.random.default_rng(0)
    paths, rows = [], []
    for number, (dataset, count) in enumerate((("one", 700), ("two", 300), ("one", 200))):
        slides = [f"S{each}" for each in rng.geometric(0.2, count)]
        splits = [("train", "test")[each] for each in rng.integers(0, 2, count)]
        paths.append(pack(root / str(number), dataset, slides, splits))
        rows += [(dataset, *both) for both in zip(slides, splits, strict=True)]
    return paths, rows


@pytest.mark.parametrize("split", ["", "test"])
def test_every_slide_gives_as_many_tiles_as_any_other_that_has_them(catalogue: tuple, split: str) -> None:
    paths, rows = catalogue
    reader = Reader(paths, split)
    slides, chosen, of, left = stainfit.sample(reader, 6, 0)
    reader.close()
    assert left == 0 and len(set(chosen.tolist())) == len(chosen)
    taken: dict[tuple[str, str], list[int]] = {}
    for row, number in zip(chosen.tolist(), of.tolist(), strict=True):
        assert slides[number] == rows[row][:2]
        assert rows[row][2] == split or not split
        taken.setdefault(slides[number], []).append(row)
    there: dict[tuple[str, str], int] = {}
    for dataset, slide, word in rows:
        if word == split or not split:
            there[dataset, slide] = there.get((dataset, slide), 0) + 1
    assert {name: len(some) for name, some in taken.items()} == {name: min(6, many) for name, many in there.items()}
    assert list(taken) == sorted(taken) and all(some == sorted(some) for some in taken.values())


def test_the_sample_is_no_matter_of_pieces_and_another_seed_makes_another(catalogue: tuple,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(catalogue[0])
    whole = stainfit.sample(reader, 3, 0)
    monkeypatch.setattr(stainfit, "AT_ONCE", 64)
    pieces = stainfit.sample(reader, 3, 0)
    assert all(map(np.array_equal, whole[1:3], pieces[1:3]))
    assert not np.array_equal(whole[1], stainfit.sample(reader, 3, 1)[1])
    reader.close()


def test_a_tile_of_a_slide_is_as_likely_as_any_other(tmp_path: Path) -> None:
    reader = Reader([pack(tmp_path / "even", "even", ["S"] * 40 + ["T"] * 10)])
    times = np.zeros(50)
    for seed in range(400):
        times[stainfit.sample(reader, 10, seed)[1]] += 1
    reader.close()
    assert (times[40:] == 400).all()
    assert np.abs(times[:40] - 100).max() < 5 * math.sqrt(400 * 0.25 * 0.75)


def test_the_sample_is_bounded_by_fewer_tiles_a_slide_and_then_by_fewer_slides(
        catalogue: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, rows = catalogue
    many = len({row[:2] for row in rows})
    reader = Reader(paths)
    monkeypatch.setattr(stainfit, "LIMIT", 2 * many + 1)
    _, chosen, of, left = stainfit.sample(reader, 6, 0)
    assert left == 0 and np.bincount(of).max() == 2 and len(chosen) <= 2 * many + 1
    monkeypatch.setattr(stainfit, "LIMIT", 7)
    _, chosen, of, left = stainfit.sample(reader, 6, 0)
    reader.close()
    assert len(chosen) == len(set(of.tolist())) == 7 and left == many - 7


# ---- the whole

def text(fit: stain.Fit) -> str:
    return json.dumps(stain.as_json(fit))


def test_the_same_folder_gives_the_same_file_whatever_the_threads(fitted: stain.Fit, shard: Path) -> None:
    assert text(stainfit.fit([shard], tiles=400, threads=1)) == text(fitted)
    few = [text(stainfit.fit([shard], tiles=5, components=2, seed=seed, threads=threads))
           for seed, threads in ((0, 1), (0, 5), (1, 2))]
    assert few[0] == few[1] != few[2].replace('"seed": 1', '"seed": 0')
    assert json.loads(few[0])["tiles"] == 20


def test_the_fit_says_what_it_is_of(fitted: stain.Fit, shard: Path) -> None:
    assert fitted.shards == [index.read(shard).fingerprint]
    assert {**fitted.settings, "tiles": 400, "seed": 0, "split": "", "components": 0} == fitted.settings
    only = stainfit.fit([shard], tiles=3, components=1, split="test")
    assert {slide for _, slide in only.slides} == {"P02-S0", "P03-S0"} and only.tiles == 6


def broken(shard: Path, where: Path, content: Callable[[int], bytes], wrong: Callable[[str, int], bool],
           told: bool = True) -> Path:
    """A copy of a shard folder with other images in the rows (slide, number) that are `wrong`."""
    shutil.copytree(shard, where)
    columns = index.samples(where).to_pydict()
    for row, (slide, size) in enumerate(zip(columns["slide"], columns["size"], strict=True)):
        if wrong(slide, row):
            with (where / index.read(where).tars[columns["tar"][row]].name).open("r+b") as handle:
                handle.seek(columns["offset"][row])
                handle.write(content(size))
            columns["crc32"][row] = zlib.crc32(content(size)) if told else columns["crc32"][row]
    index.write_samples(where, columns)
    found = index.read(where)
    index.write(where, replace(found, fingerprint=index.fingerprint(where, found)))
    return where


def garbage(size: int) -> bytes:
    return (b"this was never a picture " * size)[:size]


def test_tiles_that_are_no_pictures_are_counted_and_the_others_are_looked_at(shard: Path, tmp_path: Path) -> None:
    count = index.read(shard).samples
    for told, reason in ((True, "tiles that cannot be decoded"), (False, "tiles changed on disk")):
        folder = broken(shard, tmp_path / str(told), garbage, lambda slide, row: row % 20 == 3, told)
        found = stainfit.fit([folder], tiles=400, components=1, threads=2)
        assert found.left_out == {reason: len(range(3, count, 20))}
        assert found.tiles == count - found.left_out[reason] and len(found.slides) == 4


def test_a_slide_without_tissue_or_without_colour_has_no_stains_and_is_counted(shard: Path, tmp_path: Path) -> None:
    def picture(values: np.ndarray) -> Callable[[int], bytes]:
        draft = tmp_path / "tile.jpg"
        Image.fromarray(values.astype(np.uint8)).save(draft, quality=60)
        return lambda size: draft.read_bytes()[:size].ljust(size, b"\0")

    rng = np.random.default_rng(0)
    white = broken(shard, tmp_path / "white", picture(np.full((64, 64, 3), 250)), lambda slide, row: slide == "P01-S0")
    greys = rng.integers(60, 200, (8, 8, 1)).repeat(8, 0).repeat(8, 1).repeat(3, 2)
    both = broken(white, tmp_path / "both", picture(greys), lambda slide, row: slide == "P02-S0")
    found = stainfit.fit([both], components=1, threads=2)
    assert found.left_out == {"slides with too little tissue": 1, "slides of a single stain": 1}
    assert {slide for _, slide in found.slides} == {"P00-S0", "P03-S0"}
    grey = broken(shard, tmp_path / "grey", picture(np.full((64, 64, 3), 120)), lambda slide, row: True)
    with pytest.raises(ShardError, match=r"no slide of .*grey shows two stains \(4 slides of a single stain\)"):
        stainfit.fit([grey])


def test_where_nothing_can_be_read_there_is_no_fit(shard: Path, tmp_path: Path) -> None:
    folder = broken(shard, tmp_path / "gone", garbage, lambda slide, row: True)
    with pytest.raises(ShardError, match=r"no tile of .*gone could be read .*ssl-dist check"):
        stainfit.fit([folder], tiles=3)


def test_a_table_that_changed_is_refused(shard: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(shard, tmp_path / "copy")
    columns = index.samples(copied).to_pydict()
    columns["slide"][0] = "another"
    index.write_samples(copied, columns)
    with pytest.raises(ShardError, match="ssl-dist check"):
        stainfit.fit([copied])


# ---- the file

@pytest.fixture(scope="module")
def content(fitted: stain.Fit) -> dict[str, Any]:
    return json.loads(text(fitted))


def test_a_file_reads_back_as_what_was_found(fitted: stain.Fit, tmp_path: Path) -> None:
    folder.write_json(tmp_path / "stain.json", stain.as_json(fitted))
    found = stain.read(tmp_path / "stain.json")
    assert text(found) == text(fitted)
    assert [found.shards, found.tiles, found.settings, found.left_out] == [fitted.shards, fitted.tiles, fitted.settings,
                                                                           fitted.left_out]
    for name in ("lab_mean_6", "lab_std_6", "weights_K", "means_K6", "covariances_K66", "reference_23",
                 "reference_strength_2"):
        assert np.array_equal(getattr(found, name), getattr(fitted, name)), name
    for slide, (vectors, strength) in fitted.slides.items():
        assert np.array_equal(found.slides[slide][0], vectors) and np.array_equal(found.slides[slide][1], strength)


def test_the_file_is_laid_out_as_it_was_promised(content: dict[str, Any]) -> None:
    assert set(content) == {"format", "shards", "settings", "tiles", "left_out", "lab", "mixture", "reference",
                            "slides"}
    assert content["format"] == 1
    assert [*map(len, content["slides"]["painted"]["P01-S0"])] == [3, 3, 2]
    assert set(content["lab"]) == {"mean", "std"} and set(content["reference"]) == {"stains", "strength"}
    assert set(content["mixture"]) == {"weights", "means", "covariances"}


def put(*path: Any) -> Callable[[dict], None]:
    """A change of the file: what lies at the path becomes the last word."""
    *names, last, value = path

    def change(content: Any) -> None:
        for name in names:
            content = content[name]
        content[last] = value(content[last]) if callable(value) else value

    return change


NAN, SLIDE = float("nan"), ("slides", "painted", "P01-S0")
DAMAGE = {
    "another format": (put("format", 2), "format is 2, this version reads 1"),
    "no shards": (put("shards", []), "of no shards"),
    "shards that are no words": (put("shards", [1]), "of no shards"),
    "shards that are no list": (put("shards", "abc"), "shards is 'abc'"),
    "no tiles": (put("tiles", 0), "of no tiles"),
    "half a tile": (put("tiles", 1.5), "tiles is 1.5"),
    "settings": (put("settings", None), "settings is None"),
    "what was left out": (put("left_out", [1]), "left_out is [1]"),
    "five means": (put("lab", "mean", lambda old: old[:5]), "mean has the shape (5,), not (6,)"),
    "a mean that is none": (put("lab", "mean", 2, NAN), "mean holds what is no finite number"),
    "a word for a mean": (put("lab", "mean", 2, "150"), "mean holds what is no finite number"),
    "null for a mean": (put("lab", "mean", 2, None), "mean holds what is no finite number"),
    "a deviation below zero": (put("lab", "std", 2, -1.0), "a deviation in lab is below zero"),
    "a mean deviation below zero": (put("lab", "mean", 4, -1.0), "a deviation in lab is below zero"),
    "no mixture": (lambda content: content.pop("mixture"), "it has no 'mixture'"),
    "a mixture of nothing": (put("mixture", "weights", []), "weights"),
    "one weight too many": (put("mixture", "weights", lambda old: [*old, 0.0]), "means has the shape"),
    "weights of more than one": (put("mixture", "weights", lambda old: [1.1 * each for each in old]),
                                 "not parts of one"),
    "a weight below zero": (put("mixture", "weights", lambda old: [*old[:-2], old[-2] + 2 * old[-1], -old[-1]]),
                            "not parts of one"),
    "a flat mean": (put("mixture", "means", 0, 0.5), "means are lists of different lengths"),
    "an infinite covariance": (put("mixture", "covariances", 0, 0, 0, math.inf), "covariances holds what is no finite"),
    "a lopsided covariance": (put("mixture", "covariances", 0, 0, 1, lambda old: old + 1), "covariances[0] is not"),
    "a covariance that is none": (put("mixture", "covariances", 0, 3, 3, -1.0), "symmetric and positive definite"),
    "a long reference": (put("reference", "stains", 0, [1.0, 1.0, 0.0]), "reference: a stain is not of length one"),
    "a reference that gives light": (put("reference", "stains", 0, [-0.6, 0.8, 0.0]), "reference: a stain absorbs"),
    "one stain twice": (put("reference", "stains", [[0.6, 0.8, 0.0]] * 2), "reference: both stains are the same"),
    "a reference without strength": (put("reference", "strength", [1.0, 0.0]), "reference: a strength is not above"),
    "a slide's long stain": (put(*SLIDE, 1, [0.5, 0.5, 0.5]), "slide painted/P01-S0: a stain is not of length one"),
    "a slide's stain of four bands": (put(*SLIDE, [[1, 0, 0, 0], [0, 1], [1, 1]]), "slide painted/P01-S0 is not"),
    "a slide of words": (put(*SLIDE, "abc"), "slide painted/P01-S0 is not haematoxylin"),
    "a slide's weak stain": (put(*SLIDE, 2, [1.0, -1.0]), "slide painted/P01-S0: a strength is not above zero"),
    "a slide's stain that is none": (put(*SLIDE, 0, 0, NAN), "slides holds what is no finite number"),
    "a dataset that is no table": (put("slides", "painted", [1]), "has no attribute"),
    "slides that are no table": (put("slides", []), "slides is []"),
}


@pytest.mark.parametrize(("change", "needle"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_refused_with_what_is_wrong_and_what_to_do(content: dict[str, Any], tmp_path: Path,
                                                                     change: Callable[[dict], None],
                                                                     needle: str) -> None:
    damaged = copy.deepcopy(content)
    change(damaged)
    path = tmp_path / "stain.json"
    path.write_text(json.dumps(damaged))
    with pytest.raises(ShardError) as refusal:
        stain.read(path)
    assert needle in str(refusal.value), str(refusal.value)
    assert str(path) in str(refusal.value) and "ssl-dist stain-fit" in str(refusal.value)
    assert refusal.value.exit_code == 3


@pytest.mark.parametrize("words", ["", "{", "[]", "3", "null", "\x00", "{}", '{"format": [[[[]]]]}', "[" * 100_000])
def test_a_file_that_is_no_fit_at_all_is_refused(tmp_path: Path, words: str) -> None:
    (tmp_path / "stain.json").write_text(words)
    with pytest.raises(ShardError, match=r"stain\.json is no stain fit .* ssl-dist stain-fit"):
        stain.read(tmp_path / "stain.json")


def test_a_fit_that_is_not_there_is_refused_with_the_command_that_writes_it(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"no stain fit at .*none\.json.*ssl-dist stain-fit FOLDER"):
        stain.read(tmp_path / "none.json")


def test_a_fit_without_slides_of_its_own_and_one_that_a_person_rounded_are_read(content: dict[str, Any],
                                                                                tmp_path: Path) -> None:
    content = {**copy.deepcopy(content), "slides": {}}
    content["mixture"]["weights"] = [round(each, 4) for each in content["mixture"]["weights"]]
    content["reference"]["stains"] = [[round(each, 4) for each in row] for row in content["reference"]["stains"]]
    del content["left_out"]
    (tmp_path / "stain.json").write_text(json.dumps(content))
    assert stain.read(tmp_path / "stain.json").slides == {}


# ---- the command

def ssl_dist(*words: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run([sys.executable, "-m", "ssl_dist", *map(str, words)], cwd=cwd, env=environment,
                          capture_output=True, text=True, check=False, timeout=120)


def test_from_a_folder_to_its_file_and_the_folder_is_as_sound_as_before(shard: Path, settings: write.Settings,
                                                                         tmp_path: Path) -> None:
    copied = shutil.copytree(shard, tmp_path / "painted")
    done = ssl_dist("stain-fit", copied, "--tiles", 10, "--components", 2, "--workers", 2)
    assert done.returncode == 0, done.stderr
    told, left_out, lab = done.stdout.splitlines()
    assert told == f"{copied / 'stain.json'}: stains of 4 slides, 2 components of 40 tiles"
    assert left_out == "left out: none"
    found = stain.read(copied / "stain.json")
    assert lab == "LAB: " + ", ".join(f"{name} {mean:.1f} ± {spread:.1f}" for name, mean, spread in zip(
        "Lab", found.lab_mean_6, found.lab_std_6, strict=False))
    assert text(found) == text(stainfit.fit([shard], tiles=10, components=2))
    assert ssl_dist("check", copied).stdout == f"{copied}: sound\n"
    again = write.write(replace(settings, out=copied))
    assert again is not None and again.untouched
    assert (copied / "stain.json").is_file()


def test_several_folders_make_one_file_where_it_is_said_to_go(shard: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(shard, other)
    found = index.read(other)
    index.write(other, replace(found, settings={}))
    found = index.read(other)
    index.write(other, replace(found, fingerprint=index.fingerprint(other, found)))
    out = tmp_path / "new" / "both.json"
    done = ssl_dist("stain-fit", shard, other, "--out", out, "--tiles", 4, "--components", 1, "--split", "train")
    assert done.returncode == 0, done.stderr
    # Slides of the same name and dataset are one slide, wherever their tiles lie.
    fit = stain.read(out)
    assert fit.tiles == 8 and len(fit.slides) == 2
    assert fit.shards == [index.read(each).fingerprint for each in (shard, other)]


@pytest.mark.parametrize(("words", "code", "needle"), [
    (["nothing"], 3, "no shard folder at nothing"),
    (["SHARD", "nothing", "--out", "x.json"], 3, "no shard folder at nothing"),
    (["SHARD", "SHARD"], 2, "no --out"),
    (["SHARD", "--out", "."], 2, "is a folder; name a file in it"),
])
def test_what_cannot_be_is_refused_in_one_line_and_writes_nothing(shard: Path, tmp_path: Path, words: list[str],
                                                                  code: int, needle: str) -> None:
    done = ssl_dist("stain-fit", *(str(shard) if word == "SHARD" else word for word in words), cwd=tmp_path)
    assert done.returncode == code, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ssl-dist: error: ")]
    assert needle in line and "Traceback" not in done.stderr
    assert not [*tmp_path.iterdir()] and not (shard / "stain.json").exists()
