"""Painted slides: same seed, same bytes; physics against plain loops; tissue measured on the picture itself."""

import csv
import json
import math
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import openslide
import pytest
from PIL import Image, ImageDraw, ImageFilter

from shards import synthetic, tiff
from shards.synthetic import CLASSES, SCANNERS, Painting, paint, stain_of, write_cohort, write_slide, write_tiles

SEED = 5


@pytest.fixture(scope="module")
def cohort() -> list[Painting]:
    """Six patients at 0.5 mpp: every scanner, two of them twice."""
    return [paint(SEED, patient, 0, size=2048) for patient in range(6)]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def drawn(painting: Painting) -> np.ndarray:
    """The annotation as a picture, drawn by Pillow: index into CLASSES, 255 where no polygon lies."""
    height, width, _ = painting.pixels.shape
    canvas = Image.new("L", (width, height), 255)
    for name, line in painting.regions:
        ImageDraw.Draw(canvas).polygon([tuple(point) for point in line], fill=CLASSES.index(name))
    return np.asarray(canvas)


def concentrations(pixels: np.ndarray, patient: int) -> tuple[np.ndarray, np.ndarray]:
    """Haematoxylin and eosin of every pixel, unmixed from the picture by least squares."""
    stain = stain_of(SEED, patient, 0)
    density = -np.log(np.maximum(pixels, 1) / stain.white.astype(np.float32))
    mixed = density @ np.linalg.pinv(stain.vectors).astype(np.float32)
    return mixed[..., 0], mixed[..., 1]


def direction(field: np.ndarray) -> complex:
    """Which way the edges of a field run: twice the angle as a phase, 0 (any way) to 1 (all one way) as a modulus."""
    down, right = np.gradient(field)
    return complex((right**2 - down**2).mean(), 2 * (right * down).mean()) / float((right**2 + down**2).mean() + 1e-9)


def tiles_of(painting: Painting, side: int = 192) -> list[tuple[str, slice, slice]]:
    """Tiles on a grid that lie in one class."""
    classes, found = drawn(painting), []
    for top in range(0, classes.shape[0] - side + 1, side):
        for left in range(0, classes.shape[1] - side + 1, side):
            rows, columns = slice(top, top + side), slice(left, left + side)
            middle = classes[top + side // 2, left + side // 2]
            if middle != 255 and (classes[rows, columns] == middle).mean() > 0.97:
                found.append((CLASSES[middle], rows, columns))
    return found


# --- the same seed


def test_the_same_numbers_give_the_same_bytes_and_other_numbers_others(tmp_path: Path) -> None:
    written = {}
    for run, numbers in enumerate([(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 2, 3)]):
        write_slide(tmp_path / f"{run}" / "a.svs", paint(*numbers, size=384))
        written[run] = files(tmp_path / f"{run}")
    assert sorted(written[0]) == ["a.geojson", "a.svs"]
    assert written[0] == written[4], "the order of painting, or the clock, got into the bytes"
    for other in (1, 2, 3):
        assert written[0]["a.svs"] != written[other]["a.svs"]
        assert written[0]["a.geojson"] != written[other]["a.geojson"]


def slides_and_tiles(folder: Path, workers: int) -> dict[str, bytes]:
    write_cohort(folder / "slides", patients=2, size=256, seed=3, test_patients=0, workers=workers)
    write_tiles(folder / "tiles", count=14, size=32, seed=3, workers=workers)
    return files(folder)


@pytest.fixture(scope="module")
def by_one_worker(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return slides_and_tiles(tmp_path_factory.mktemp("one"), workers=1)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_the_number_of_workers_and_how_they_start_do_not_change_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_one_worker: dict[str, bytes], start: str
) -> None:
    pools = []

    def pool(workers: int) -> ProcessPoolExecutor:
        pools.append(workers)
        return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context(start))

    monkeypatch.setattr(synthetic, "ProcessPoolExecutor", pool)
    assert len(by_one_worker) == 2 * 2 + 1 + 14
    assert slides_and_tiles(tmp_path, workers=2) == by_one_worker
    assert pools == [2, 2], "nothing ran in other processes"


# --- the physics


def test_the_table_is_beer_lambert_as_three_loops() -> None:
    stain = stain_of(SEED, 1, 0)
    rng = np.random.default_rng(0)
    both = rng.integers(0, 65536, (5, 7), np.uint16)
    got = synthetic._develop(both, synthetic._table(stain))
    for row in range(5):
        for column in range(7):
            h, e = divmod(int(both[row, column]), 256)
            for channel in range(3):
                density = 0.01 * (h * stain.vectors[0, channel] + e * stain.vectors[1, channel])
                assert got[row, column, channel] == round(stain.white[channel] * math.exp(-density))


def test_every_pixel_lies_in_the_plane_of_its_slides_two_stains(cohort: list[Painting]) -> None:
    def misfit(patient: int, stain: synthetic.Stain) -> np.ndarray:
        pixels = cohort[patient].pixels[::16, ::16].reshape(-1, 3).astype(float)
        density = -np.log(np.maximum(pixels, 1) / stain.white)
        explained = np.linalg.lstsq(stain.vectors.T, density.T, rcond=None)[0].T @ stain.vectors
        return np.abs(stain.white * np.exp(-explained) - pixels).max(axis=1)

    for patient in range(6):
        assert misfit(patient, stain_of(SEED, patient, 0)).max() < 1.5  # grey levels: rounding to whole ones
        assert misfit(patient, stain_of(SEED, (patient + 1) % 6, 0)).mean() > 1.5, "stains do not differ"


def test_patients_differ_more_than_slides_and_scanners_take_turns() -> None:
    assert [stain_of(0, patient, 0).scanner for patient in range(5)] == [
        *(scanner.scanner for scanner in SCANNERS),
        SCANNERS[0].scanner,
    ]

    def apart(a: tuple[int, int], b: tuple[int, int]) -> float:
        return float(np.abs(stain_of(0, *a).vectors - stain_of(0, *b).vectors).mean())

    patients = range(0, 80, 4)  # of one scanner
    between = np.mean([apart((patient, 0), (patient + 4, 0)) for patient in patients])
    within = np.mean([apart((patient, 0), (patient, 1)) for patient in patients])
    assert 0 < within < 0.6 * between
    for stain in (0, 1):  # one scanner, yet pale and dark patients
        strength = [stain_of(0, patient, 0).vectors[stain].sum() for patient in patients]
        assert max(strength) > 1.8 * min(strength)


# --- the picture


def test_a_quarter_or_more_is_glass_and_annotation_covers_the_tissue(cohort: list[Painting]) -> None:
    for patient, painting in enumerate(cohort):
        h, e = concentrations(painting.pixels[::4, ::4], patient)
        classes = drawn(painting)[::4, ::4]
        stained, annotated = h + e > 0.15, classes != 255
        assert 0.25 < (~annotated).mean() < 0.55
        assert stained[~annotated].mean() < 0.03, "tissue that nobody annotated"
        solid = annotated & (classes != CLASSES.index("fat"))
        assert stained[solid].mean() > 0.9, "annotation on glass"


def test_polygons_agree_with_the_map_the_slide_was_painted_from(cohort: list[Painting]) -> None:
    cells = 2048 * 0.5 / synthetic.COARSE
    for patient in (0, 3):
        brush = synthetic.Brush(synthetic._rng(SEED, patient, 1, 1), (int(cells), int(cells)), 1 / synthetic.COARSE)
        owner, names = synthetic._layout(brush, patient)
        truth = np.array([*map(CLASSES.index, names), 255])[owner]  # -1, glass, is the last
        middles = (np.arange(int(cells)) + 0.5) * 2048 / cells
        seen = drawn(cohort[patient])[np.ix_(middles.astype(int), middles.astype(int))]
        assert (seen == truth).mean() > 0.97


def test_every_class_is_in_a_cohort_even_of_small_slides(cohort: list[Painting]) -> None:
    assert {name for painting in cohort[:2] for name, _ in painting.regions} == set(CLASSES)
    small = [paint(0, patient, 0, size=256) for patient in range(6)]  # 128 micrometres: two or three regions each
    for patient, painting in enumerate(small):
        assert CLASSES[patient] in {name for name, _ in painting.regions}, "the first card goes round"


def test_arrangement_tells_the_class_across_patients_and_colour_does_not(cohort: list[Painting]) -> None:
    """Nearest class mean, each patient against the five others: by mean colour, and by what a pathologist looks at."""
    labels, patients, colours, arrangements = [], [], [], []
    together: list[float] = []
    for patient, painting in enumerate(cohort):
        h, e = concentrations(painting.pixels, patient)
        for name, rows, columns in tiles_of(painting):
            nuclei = h[rows, columns] > 0.65
            core = Image.fromarray(nuclei.astype(np.uint8)).filter(ImageFilter.MinFilter(9))  # 2 micrometres deep
            fibres = direction(e[rows, columns])
            together += [(fibres * direction(nuclei.astype(np.float32)).conjugate()).real] * (name == "stroma")
            labels.append(name)
            patients.append(patient)
            colours.append(painting.pixels[rows, columns].mean(axis=(0, 1)))
            arrangements.append((nuclei.mean(), np.asarray(core).sum() / max(1, nuclei.sum()), abs(fibres),
                                 (h[rows, columns] + e[rows, columns] < 0.15).mean()))
    label, whose = np.array(labels), np.array(patients)
    share, size, lean, empty = (
        {name: column[label == name].mean() for name in CLASSES} for column in np.array(arrangements).T
    )
    assert share["lymphoid"] > 2 * share["stroma"] > 4 * share["fat"]  # area of nuclei
    assert size["tumour"] > 2 * size["lymphoid"]  # of that area, what lies deep in a nucleus
    assert lean["stroma"] > 3 * max(lean[name] for name in CLASSES if name != "stroma")  # fibres lie one way
    assert np.mean(together) > 0.15  # and the nuclei of stroma lie with its fibres; were they strewn, this would be 0
    assert empty["fat"] > 0.7 > 0.2 > max(empty[name] for name in CLASSES if name != "fat")

    def right_answers(values: np.ndarray, held_out: bool) -> float:
        hits = 0
        for one in range(6):
            known = whose != one if held_out else whose == one
            means = {name: values[known & (label == name)].mean(axis=0) for name in set(label[known])}
            for value, truth in zip(values[whose == one], label[whose == one], strict=True):
                hits += min(means, key=lambda name: float(((value - means[name]) ** 2).sum())) == truth
        return hits / len(label)

    colour, arrangement = np.array(colours), np.array(arrangements)
    arrangement /= arrangement.std(axis=0)
    assert right_answers(colour, held_out=False) > 0.8  # on one slide colour nearly suffices
    assert right_answers(colour, held_out=True) < 0.65  # on another patient's it misleads
    assert right_answers(arrangement, held_out=True) > 0.75


# --- the files


@pytest.mark.parametrize(("size", "mpp"), [((1100, 777), 0.5), (512, 1.0)])
def test_openslide_sees_an_aperio_slide_with_our_pixels(
    tmp_path: Path, size: int | tuple[int, int], mpp: float
) -> None:
    painting = paint(0, 1, 0, size=size, mpp=mpp)
    write_slide(tmp_path / "a.svs", painting)
    height, width, _ = painting.pixels.shape
    assert (width, height) == (size if isinstance(size, tuple) else (size, size))
    with openslide.OpenSlide(tmp_path / "a.svs") as slide:
        assert slide.properties["openslide.vendor"] == "aperio"
        assert float(slide.properties["openslide.mpp-x"]) == float(slide.properties["openslide.mpp-y"]) == mpp
        assert float(slide.properties["openslide.objective-power"]) == 10 / mpp
        assert slide.level_dimensions == tuple((-(-width // k), -(-height // k)) for k in (1, 4, 16))
        assert "thumbnail" in slide.associated_images
        whole = np.asarray(slide.read_region((0, 0), 0, (width, height)).convert("RGB")).astype(float)
        small = np.asarray(slide.read_region((0, 0), 1, (width // 4, height // 4)).convert("RGB")).astype(float)
    # mean error of JPEG at quality 87 with halved chroma; 40 is what another painting would differ by
    assert np.abs(whole - painting.pixels).mean() < 5
    assert np.abs(whole.mean(axis=(0, 1)) - painting.pixels.mean(axis=(0, 1))).max() < 1
    grey = painting.pixels[: height // 4 * 4, : width // 4 * 4].mean(axis=2)
    boxes, small = grey.reshape(height // 4, 4, width // 4, 4).mean(axis=(1, 3)), small.mean(axis=2)
    shifted = np.abs(np.roll(small, 1, axis=1) - boxes).mean()  # what one pixel of the level amiss would cost
    assert np.abs(small - boxes).mean() < 0.4 * shifted


def test_geojson_is_what_qupath_reads(tmp_path: Path) -> None:
    painting = paint(0, 0, 0, size=(900, 700))
    write_slide(tmp_path / "a.svs", painting)
    collection = json.loads((tmp_path / "a.geojson").read_text())
    assert collection["type"] == "FeatureCollection"
    assert len(collection["features"]) == len(painting.regions) > 0
    for feature, (name, line) in zip(collection["features"], painting.regions, strict=True):
        (ring,) = feature["geometry"]["coordinates"]
        assert (feature["type"], feature["geometry"]["type"]) == ("Feature", "Polygon")
        assert feature["properties"] == {"objectType": "annotation", "classification": {"name": name}}
        assert ring[0] == ring[-1], "an open ring"
        assert np.allclose(ring[:-1], line, atol=0.06)
        assert (np.array(ring) >= 0).all() and (np.array(ring) <= (900, 700)).all()


def test_a_killed_write_leaves_nothing_under_the_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(path: Path, *_: object) -> None:
        path.write_bytes(b"half a slide")
        raise KeyboardInterrupt

    monkeypatch.setattr(tiff, "write_pyramid", half)
    with pytest.raises(KeyboardInterrupt):
        write_slide(tmp_path / "a.svs", paint(0, 0, 0, size=256))
    assert list(files(tmp_path)) == ["a.geojson"]


def test_a_cohort_is_split_by_patient_and_a_finished_slide_is_not_repainted(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    write = partial(write_cohort, tmp_path, patients=5, slides_per_patient=2, size=256, test_patients=2,
                    progress=lambda done, total: told.append((done, total)))
    paths = write()
    assert [path.name for path in paths[:3]] == ["P00-S0.svs", "P00-S1.svs", "P01-S0.svs"]
    assert told == [(done, 10) for done in range(1, 11)]
    assert set(files(tmp_path)) == {f"{p.stem}.{kind}" for p in paths for kind in ("svs", "geojson")} | {"slides.csv"}
    rows = list(csv.DictReader((tmp_path / "slides.csv").open()))
    assert list(rows[0]) == ["slide", "patient", "scanner", "split"]
    assert [row["slide"] for row in rows] == [path.stem for path in paths]
    assert [row["split"] for row in rows] == ["train"] * 6 + ["test"] * 4
    assert [row["patient"] for row in rows[5:8]] == ["P02", "P03", "P03"]
    for split in ("train", "test"):
        assert len({row["scanner"] for row in rows if row["split"] == split}) >= 2

    truth = files(tmp_path)
    paths[3].unlink()
    paths[4].write_bytes(b"kept")
    told.clear()
    write()
    assert told == [(1, 1)]
    assert paths[4].read_bytes() == b"kept"
    assert paths[3].read_bytes() == truth[paths[3].name]


def test_tiles_are_as_many_as_asked_all_different_and_of_every_class(tmp_path: Path) -> None:
    write_tiles(tmp_path, count=500, size=48, seed=1)
    tiles = files(tmp_path)
    assert len(tiles) == len(set(tiles.values())) == 500
    assert {Path(name).parent.name for name in tiles} == set(CLASSES)
    assert sorted(int(Path(name).stem.split("_")[1]) for name in tiles) == list(range(500))
    assert {Path(name).name[:4] for name in tiles} == {"P00_", "P01_"}
    decoded = {name: np.asarray(Image.open(tmp_path / name)) for name in tiles}
    assert {tile.shape for tile in decoded.values()} == {(48, 48, 3)}
    # fat is bright, a lymph node dark: the folders hold what they say (one patient, so colour may be trusted)
    mean = {name: np.mean([tile.mean() for at, tile in decoded.items() if at.startswith(f"{name}/P00")])
            for name in CLASSES}
    assert max(mean, key=lambda name: mean[name]) == "fat"
    assert mean["stroma"] > mean["lymphoid"] + 10
    write_tiles(tmp_path / "other", count=12, size=48, seed=2)
    assert not set(files(tmp_path / "other").values()) & set(tiles.values())


# --- refusals


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda _: paint(0, 0, 0, size=255), "size=255 .* at least 256 pixels"),
        (lambda _: paint(0, 0, 0, size=(4096, 300), mpp=0.25), r"size=\(4096, 300\) .* at least 512 pixels"),
        (lambda _: paint(0, 0, 0, size=512, mpp=8), "mpp=8 .* give 0.2 to 2"),
        (lambda _: paint(-1, 0, 0, size=512), "seed=-1"),
        (lambda folder: write_cohort(folder, patients=0), "patients=0"),
        (lambda folder: write_cohort(folder, patients=3, test_patients=2), "test_patients=2 of 3 patients"),
        (lambda folder: write_cohort(folder, patients=6, test_patients=1), "test_patients=1 of 6 patients"),
        (lambda folder: write_cohort(folder, patients=1, test_patients=0, size=256, workers=0), "workers=0"),
        (lambda folder: write_tiles(folder, count=0), "count=0"),
        (lambda folder: write_tiles(folder, count=9, size=8), "size=8 pixels"),
    ],
)
def test_refusals_say_the_value_and_what_to_do(tmp_path: Path, call, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=says):
        call(tmp_path)


def test_importing_brings_no_heavy_library_and_says_nothing() -> None:
    code = "import shards.synthetic, sys; print(sorted({'torch', 'openslide', 'scipy', 'cv2'} & set(sys.modules)))"
    root = Path(synthetic.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
