"""A slide's own JPEG tiles, untouched, and regions read from them: OpenSlide, Pillow and DALI see the same."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openslide
import pyarrow as pa
import pytest
import simplejpeg
import tifffile
from PIL import Image, ImageFilter

from shards import check, synthetic, tiff, tiles, tissue, write
from shards.slide import Slide
from shards.sources import Source

EVERYTHING = {"min_tissue": 0.0, "min_contrast": 0.0, "min_focus": 0.0, "max_pen": 1.0}


def rows(shard: Path) -> list[dict]:
    return pa.ipc.open_file(pa.OSFile(str(shard / "samples.arrow"))).read_all().to_pylist()


def rejected(shard: Path) -> list[dict]:
    return [json.loads(line) for line in (shard / "rejected.jsonl").read_text().splitlines()]


def stored(shard: Path) -> list[tuple[dict, bytes]]:
    """Every row with its image, cut from the tars with plain file reads."""
    tars = [tar["name"] for tar in json.loads((shard / "index.json").read_text())["tars"]]
    return [(row, (shard / tars[row["tar"]]).read_bytes()[row["offset"]:row["offset"] + row["size"]])
            for row in rows(shard)]


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def shown(handle: openslide.OpenSlide, x: int, y: int, size: tuple[int, int], level: int = 0) -> np.ndarray:
    """What OpenSlide shows, on white."""
    rgba = handle.read_region((x, y), level, size)
    flat = Image.new("RGB", size, (255, 255, 255))
    flat.paste(rgba, mask=rgba.getchannel("A"))
    return np.asarray(flat).astype(int)


def entropy_coded(jpeg: bytes) -> bytes:
    """From the start-of-scan marker to the end, found by walking the segments."""
    at = 2
    while jpeg[at + 1] != 0xDA:
        assert jpeg[at] == 0xFF, "not a marker"
        at += 2 + int.from_bytes(jpeg[at + 2:at + 4])
    return jpeg[at:]


def tiled(path: Path, pixels: np.ndarray, photometric: str = "ycbcr", mpp: tuple[float, float] = (0.5, 0.5),
          **options: object) -> Path:
    """A generic TIFF of 256-pixel JPEG tiles that says its microns, its colours held as `photometric` says."""
    tifffile.imwrite(path, pixels, **{
        "photometric": "rgb", "tile": (256, 256), "compression": "jpeg", "metadata": None,
        "resolutionunit": "CENTIMETER",
        "compressionargs": {"level": 85, "outcolorspace": photometric.upper()},
        "resolution": tuple(1e4 / each for each in mpp), **options})
    return path


def encoded(path: Path, pixels: np.ndarray, photometric: str, jpegs: Iterator[bytes]) -> Path:
    """The same, of tiles that were encoded elsewhere."""
    with tifffile.TiffWriter(path) as out:
        out.write(jpegs, shape=pixels.shape, dtype=np.uint8, photometric="rgb", tile=(256, 256), metadata=None,
                  compression="jpeg", compressionargs={"outcolorspace": photometric.upper()}, subsampling=(1, 1),
                  resolution=(20000, 20000), resolutionunit="CENTIMETER")
    return path


def blocks(pixels: np.ndarray) -> Iterator[np.ndarray]:
    for top in range(0, pixels.shape[0], 256):
        for left in range(0, pixels.shape[1], 256):
            yield np.ascontiguousarray(pixels[top:top + 256, left:left + 256])


def cut(path: Path, **told: object) -> dict[tuple[int, int], tiles.Tile | tiles.Rejected]:
    """All of a slide in this process, by place."""
    settings = write.Settings(**{"source": path.parent, "out": path.parent / "none", "dataset": "a", "size": 256,
                                 "mpp": 0.5, **EVERYTHING, **told})
    with Slide(path) as slide:
        found = tissue.mask(slide.thumbnail(tissue.MASK_MPP))
        items = tiles.of_slide(Source(str(path), path.stem, path.stem), slide, found, settings, None)
        return {(item.x, item.y): item for item in items}


def as_dali_sees(encoded: list[bytes]) -> list[np.ndarray]:
    """Decoded by DALI alone, as `ssl_dist/data/dali.py` has it on a CPU, without the torch behind that file."""
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali.pipeline import Pipeline

    pipeline = Pipeline(batch_size=len(encoded), num_threads=1, device_id=None)
    with pipeline:
        pipeline.set_outputs(fn.decoders.image(fn.external_source(name="encoded"), device="cpu"))
    pipeline.build()
    pipeline.feed_input("encoded", [np.frombuffer(each, np.uint8) for each in encoded])
    (pictures,) = pipeline.run()
    return [pictures.at(number).astype(int) for number in range(len(encoded))]


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return synthetic.paint(5, 1, 0, size=(1024, 768)).pixels


@pytest.fixture(scope="module")
def cmu(data: Path) -> Path:
    return data / "wsi_svs" / "CMU-1-Small-Region.svs"


@pytest.fixture(scope="module")
def own(cmu: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every tile of the CMU slide, in its own grid."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "in").mkdir()
    (folder / "in" / cmu.name).symlink_to(cmu)
    write.write(write.Settings(folder / "in", folder / "out", "cmu", size=240, mpp=0.5, tar_samples=40, workers=2,
                               **EVERYTHING))
    return folder / "out"


# --- the real slide


def test_every_tile_of_a_real_slide_decodes_to_what_openslide_shows(own: Path, cmu: Path) -> None:
    found = stored(own)
    assert len(found) == (2220 // 240) * (2967 // 240) == 9 * 12
    with openslide.OpenSlide(cmu) as handle:
        for row, data in found:
            assert np.abs(pixels_of(data) - shown(handle, row["x"], row["y"], (240, 240))).max() <= 1, row
    assert check.check(own) == []


def test_a_tile_that_passes_through_says_so_and_has_the_levels_own_resolution_and_grid(own: Path) -> None:
    table = rows(own)
    assert {row["encoding"] for row in table} == {"source"}
    assert {round(row["mpp"], 6) for row in table} == {0.499}
    assert {(row["x"] % 240, row["y"] % 240) for row in table} == {(0, 0)}
    assert {(row["x"], row["y"]) for row in table} == {(x, y) for x in range(0, 2160, 240) for y in range(0, 2880, 240)}


def test_the_entropy_coded_data_of_a_tile_is_the_files_own(own: Path, cmu: Path) -> None:
    content = cmu.read_bytes()
    with tifffile.TiffFile(cmu) as file:
        page = file.pages[0]
        offsets, sizes, columns = page.dataoffsets, page.databytecounts, -(-page.imagewidth // 240)
        tables = page.jpegtables
    for row, data in stored(own):
        number = row["y"] // 240 * columns + row["x"] // 240
        own_tile = content[offsets[number]:offsets[number] + sizes[number]]
        assert entropy_coded(data) == entropy_coded(own_tile)
        assert data.endswith(tables[2:-2] + own_tile[2:]), "tables and tile as they are, behind a marker of ours"
        assert len(data) == len(tables) - 4 + len(own_tile) + 16


def test_dalis_decoder_sees_the_right_colours_in_tiles_that_are_rgb_within(own: Path) -> None:
    found = [data for _, data in stored(own)][:24]
    decoded = as_dali_sees(found)
    for data, picture in zip(found, decoded, strict=True):
        assert np.abs(picture - pixels_of(data)).max() <= 1
    colours = np.mean([picture.mean(axis=(0, 1)) for picture in decoded], axis=0)
    assert colours[0] > colours[1] < colours[2], "stained tissue takes green most; as YCbCr it would not"


def test_without_passthrough_the_tiles_are_encoded_and_close(cmu: Path) -> None:
    found = cut(cmu, size=240, mpp=0.499, passthrough=False)
    with openslide.OpenSlide(cmu) as handle:
        for (x, y), tile in list(found.items())[::9]:
            assert tile.encoding == "jpeg-90-4:4:4"
            assert np.abs(pixels_of(tile.image) - shown(handle, x, y, (240, 240))).mean() < 2.5
    assert {round(tile.mpp, 6) for tile in found.values()} == {0.499}


@pytest.mark.parametrize("told", [{"size": 224, "mpp": 0.5}, {"size": 240, "mpp": 1.0}, {"size": 240, "mpp": 0.51},
                                  {"size": 480, "mpp": 0.5}, {"size": 120, "mpp": 0.5}])
def test_another_size_or_resolution_than_the_files_is_encoded_at_what_was_asked(cmu: Path, told: dict) -> None:
    found = cut(cmu, **told)
    assert {(tile.encoding, tile.mpp, tile.size) for tile in found.values()} == {
        ("jpeg-90-4:4:4", told["mpp"], (told["size"], told["size"]))}
    with openslide.OpenSlide(cmu) as handle:
        side = told["size"] * told["mpp"] / 0.499
        for (x, y), tile in list(found.items())[7::31]:
            whole = Image.fromarray(shown(handle, x, y, (round(side), round(side))).astype(np.uint8))
            truth = np.asarray(whole.resize(tile.size, Image.Resampling.BOX)).astype(int)
            assert np.abs(pixels_of(tile.image) - truth).mean() < 6


def test_jpeg_2000_is_no_jpeg_and_is_encoded(data: Path) -> None:
    path = data / "wsi_svs" / "TCGA-CR-7395-01A-01-TS1.svs"
    with Slide(path, 0.5) as slide:
        assert slide.native(0.5) is None and slide.native(1.0) is None
        got = slide.region(700, 900, (64, 64), 0.5).astype(int)
    with openslide.OpenSlide(path) as handle:
        assert (got == shown(handle, 700, 900, (64, 64))).all()


# --- painted slides, and TIFFs of all sorts


def test_painted_slides_pass_through_at_every_level_that_their_file_has(slides: Path) -> None:
    path = slides / "P00-S0.svs"
    for mpp, level, count in ((0.5, 0, 16), (2.0, 1, 1)):
        found = cut(path, mpp=mpp)
        assert len(found) == count
        with openslide.OpenSlide(path) as handle:
            for (x, y), tile in found.items():
                assert (tile.encoding, tile.mpp) == ("source", pytest.approx(mpp))
                assert np.abs(pixels_of(tile.image) - shown(handle, x, y, (256, 256), level)).max() <= 1


@pytest.mark.parametrize(("photometric", "options"), [
    ("rgb", {}), ("ycbcr", {}), ("ycbcr", {"subsampling": (1, 1)}), ("ycbcr", {"subsampling": (2, 1)}),
    ("ycbcr", {"compressionargs": {"level": 60}}),
])
def test_a_plain_tiled_tiff_passes_through_whatever_its_colours_are_stored_as(
    tmp_path: Path, pixels: np.ndarray, photometric: str, options: dict
) -> None:
    path = tiled(tmp_path / "a.tif", pixels, photometric, **options)
    found = cut(path)
    assert len(found) == 12 and {tile.encoding for tile in found.values()} == {"source"}
    with openslide.OpenSlide(path) as handle, tifffile.TiffFile(path) as file:
        assert handle.properties["openslide.vendor"] == "generic-tiff"
        page, content = file.pages[0], path.read_bytes()
        assert page.photometric.name == photometric.upper(), "this test would prove nothing"
        for (x, y), tile in found.items():
            assert np.abs(pixels_of(tile.image) - shown(handle, x, y, (256, 256))).max() <= 1
            assert np.abs(pixels_of(tile.image) - pixels[y:y + 256, x:x + 256]).mean() < 8, "and what was painted"
            start, size = page.dataoffsets[y // 256 * 4 + x // 256], page.databytecounts[y // 256 * 4 + x // 256]
            assert entropy_coded(tile.image) == entropy_coded(content[start:start + size])
    images = [tile.image for tile in found.values()]
    for data, picture in zip(images, as_dali_sees(images), strict=True):
        assert np.abs(picture - pixels_of(data)).max() <= 1


def test_tiles_whose_colours_are_not_what_openslide_shows_do_not_pass_through(tmp_path: Path,
                                                                             pixels: np.ndarray) -> None:
    """An Adobe marker says YCbCr, the TIFF says RGB: libtiff believes the TIFF, all other decoders the marker."""
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x01"
    lying, jfif = ([data[:2] + marker + data[20:] if marker else data for data in
                    (simplejpeg.encode_jpeg(block, 90, "RGB", "444") for block in blocks(pixels))]
                   for marker in (adobe, b""))
    assert all(data[6:10] == b"JFIF" for data in jfif), "simplejpeg writes JFIF, of 18 bytes"
    for name, jpegs in (("adobe", lying), ("jfif", jfif)):
        path = encoded(tmp_path / f"{name}.tif", pixels, "rgb", iter(jpegs))
        found = cut(path)
        assert {tile.encoding for tile in found.values()} == {"jpeg-90-4:4:4"}, name
        with openslide.OpenSlide(path) as handle:
            for (x, y), tile in found.items():
                truth = shown(handle, x, y, (256, 256))
                assert np.abs(pixels_of(tile.image) - truth).mean() < 4, "it is OpenSlide that is believed"
                assert np.abs(truth - pixels[y:y + 256, x:x + 256]).mean() > 20, "the colours do differ"
    honest = cut(encoded(tmp_path / "honest.tif", pixels, "ycbcr", iter(jfif)))
    assert {tile.encoding for tile in honest.values()} == {"source"}


def test_a_changed_photometric_tag_never_makes_tiles_that_openslide_does_not_show(tmp_path: Path,
                                                                                pixels: np.ndarray) -> None:
    for was, now in (("rgb", 6), ("ycbcr", 2)):
        path = tiled(tmp_path / f"{was}.tif", pixels, was)
        with tifffile.TiffFile(path, mode="r+b") as file:
            file.pages[0].tags["PhotometricInterpretation"].overwrite(now)
        try:
            found = cut(path, min_contrast=0.0)
        except ValueError as error:
            assert type(error).__name__ == "SlideError"     # refused is as good
            continue
        with openslide.OpenSlide(path) as handle:
            for (x, y), tile in found.items():
                assert isinstance(tile, tiles.Tile)
                assert np.abs(pixels_of(tile.image) - shown(handle, x, y, (256, 256))).mean() < 4, (was, now)


@pytest.mark.parametrize("options", [
    {"compression": "deflate", "compressionargs": {}}, {"tile": (256, 128)}, {"planarconfig": "separate"},
    {"tile": None, "rowsperstrip": 64}, {"tile": (128, 128)},
])
def test_a_tiff_that_is_stored_in_another_way_is_encoded(tmp_path: Path, pixels: np.ndarray, options: dict) -> None:
    plane = "planarconfig" in options
    path = tmp_path / "a.tif"
    try:
        tiled(path, np.moveaxis(pixels, 2, 0) if plane else pixels, "rgb", **options)
        found = cut(path)
    except ValueError as error:
        if type(error).__name__ != "SlideError":        # OpenSlide itself reads no separate planes, and no strips
            raise
        return
    assert {tile.encoding for tile in found.values()} == {"jpeg-90-4:4:4"}
    for (x, y), tile in found.items():
        assert np.abs(pixels_of(tile.image) - pixels[y:y + 256, x:x + 256]).mean() < 8


# --- damage


def test_a_damaged_tile_is_rejected_as_unreadable_and_the_rest_is_kept(slides: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    content = bytearray((slides / "P00-S0.svs").read_bytes())
    with tifffile.TiffFile(slides / "P00-S0.svs") as file:
        page = file.pages[0]
        offsets, sizes = page.dataoffsets, page.databytecounts
    ordinary = sorted(range(16), key=lambda number: sizes[number])[8:13]
    zeroed, half, noisy = ordinary[:3]
    content[offsets[zeroed]:offsets[zeroed] + sizes[zeroed]] = bytes(sizes[zeroed])
    middle = offsets[half] + sizes[half] // 2
    content[middle:offsets[half] + sizes[half]] = bytes(offsets[half] + sizes[half] - middle)
    content[offsets[noisy]:offsets[noisy] + 40] = np.random.default_rng(0).bytes(40)
    (tmp_path / "in" / "hurt.svs").write_bytes(content)
    settings = write.Settings(tmp_path / "in", tmp_path / "out", "hurt", size=256, mpp=0.5, workers=1, **EVERYTHING)
    done = write.write(settings)
    lost = {(number % 4 * 256, number // 4 * 256) for number in (zeroed, half, noisy)}
    lines = rejected(settings.out)
    assert {(line["x"], line["y"]) for line in lines} == lost and {line["reason"] for line in lines} == {"unreadable"}
    assert all(line["detail"] and line["mpp"] == 0.5 for line in lines)
    assert done.samples == 13 and done.rejected == {"unreadable": 3}
    whole = cut(slides / "P00-S0.svs")
    for row, data in stored(settings.out):
        assert data == whole[row["x"], row["y"]].image


def hurt(path: Path, whole: Path, number: int, level: int = 0) -> Path:
    """A copy of a slide in which one tile is zeros."""
    with tifffile.TiffFile(whole) as file:
        page = [page for page in file.pages if page.is_tiled][level]
        start, size = page.dataoffsets[number], page.databytecounts[number]
    content = bytearray(whole.read_bytes())
    content[start:start + size] = bytes(size)
    path.write_bytes(content)
    return path


def test_the_tile_with_most_bytes_is_a_tile_like_others_when_it_is_damaged(slides: Path, tmp_path: Path) -> None:
    """By it a level is held against OpenSlide; damaged, it must not cost the slide."""
    with tifffile.TiffFile(slides / "P00-S0.svs") as file:
        largest = int(np.argmax(file.pages[0].databytecounts))
    found = cut(hurt(tmp_path / "hurt.svs", slides / "P00-S0.svs", largest))
    lost = {place: item for place, item in found.items() if isinstance(item, tiles.Rejected)}
    assert {place: item.reason for place, item in lost.items()} == {(largest % 4 * 256, largest // 4 * 256):
                                                                    "unreadable"}
    assert {item.encoding for place, item in found.items() if place not in lost} == {"source"} and len(found) == 16


def test_a_damaged_tile_costs_the_tiles_that_are_made_of_it_at_other_sizes_too(slides: Path, tmp_path: Path) -> None:
    with tifffile.TiffFile(slides / "P00-S0.svs") as file:
        middle = int(np.argsort(file.pages[0].databytecounts)[8])
    column, row = middle % 4, middle // 4
    found = cut(hurt(tmp_path / "hurt.svs", slides / "P00-S0.svs", middle), size=96)
    whole = cut(slides / "P00-S0.svs", size=96)
    lost = {place for place, item in found.items() if isinstance(item, tiles.Rejected)}
    assert lost == {(x, y) for x, y in whole if x < column * 256 + 256 and x + 96 > column * 256
                    and y < row * 256 + 256 and y + 96 > row * 256}
    assert {found[place].reason for place in lost} == {"unreadable"}
    assert all(found[place].image == whole[place].image for place in whole.keys() - lost)


def test_a_slide_cut_short_keeps_the_tiles_that_are_whole(tmp_path: Path, pixels: np.ndarray) -> None:
    """Level 0 comes last in this file, so what is lost is the end of it."""
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as out:
        for step in (4, 1):
            out.write(pixels[::step, ::step], photometric="rgb", tile=(256, 256), compression="jpeg", metadata=None,
                      subfiletype=int(step == 1), resolution=(20000, 20000), resolutionunit="CENTIMETER")
    whole = cut(path)
    assert {item.encoding for item in whole.values()} == {"source"} and len(whole) == 12
    with tifffile.TiffFile(path) as file:
        sizes, offsets = file.pages[1].databytecounts, file.pages[1].dataoffsets
    path.write_bytes(path.read_bytes()[:offsets[9] + sizes[9] // 2])
    found = cut(path)
    unreadable = {place for place, item in found.items() if isinstance(item, tiles.Rejected)}
    assert unreadable == {(256, 512), (512, 512), (768, 512)}
    assert all("cut short" in found[place].detail for place in unreadable)
    assert all(found[place].image == whole[place].image for place in found.keys() - unreadable)


def test_a_file_that_tifffile_cannot_read_is_left_to_openslide(tmp_path: Path) -> None:
    for name, content in (("text.tif", b"no TIFF"), ("empty.tif", b""), ("half.tif", b"II*\0\xff\xff\xff\x7f")):
        (tmp_path / name).write_bytes(content)
        assert tiff.level(tmp_path / name, (10, 10)) is None
    assert tiff.level(tmp_path / "none.tif", (10, 10)) is None


# --- regions from the tiles


@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
def test_a_region_of_a_level_is_openslides_at_random_places(tmp_path: Path, pixels: np.ndarray,
                                                           photometric: str) -> None:
    path = tiled(tmp_path / "a.tif", pixels[:700, :1000], photometric)      # tiles at both borders are cut
    rng = np.random.default_rng(0)
    with openslide.OpenSlide(path) as handle:
        level = tiff.level(path, handle.dimensions)
        for _ in range(60):
            width, height = rng.integers(1, 400, 2).tolist()
            x, y = int(rng.integers(-100, 1000)), int(rng.integers(-100, 700))
            got = level.region(x, y, width, height)
            assert got.shape == (height, width, 3)
            assert np.abs(got - shown(handle, x, y, (width, height))).max() <= 2, (x, y, width, height)
            beyond = np.add.outer(np.arange(y, y + height) >= 700, np.arange(x, x + width) >= 1000)
            assert (got[beyond] == 255).all()
        level.close()


def test_a_region_wholly_beyond_a_slide_is_white(tmp_path: Path, pixels: np.ndarray) -> None:
    """Also where the tile at the border goes on, padded, beyond the slide."""
    path = tiled(tmp_path / "a.tif", pixels[:700, :1000])
    level = tiff.level(path, (1000, 700))
    for x, y in ((5000, 0), (0, 5000), (-50, -60), (0, -60), (1000, 0), (0, 700), (1010, 100), (100, 730), (1020, 760)):
        got = level.region(x, y, 30, 40)
        assert got.shape == (40, 30, 3) and (got == 255).all(), (x, y)
    level.close()


def test_a_region_of_the_real_slide_is_openslides_beyond_its_edges_too(cmu: Path) -> None:
    rng = np.random.default_rng(1)
    with openslide.OpenSlide(cmu) as handle, Slide(cmu) as slide:
        places = [(int(rng.integers(0, 2220)), int(rng.integers(0, 2967))) for _ in range(20)]
        for x, y in [*places, (2100, 2900), (2219, 2966), (3000, 100), (-30, -40)]:
            got = slide.region(x, y, (300, 260), slide.mpp)
            assert np.abs(got - shown(handle, x, y, (300, 260))).max() <= 1, (x, y)


def test_a_lower_levels_region_is_openslides_where_its_pixels_begin(slides: Path) -> None:
    path = slides / "P01-S0.svs"
    with openslide.OpenSlide(path) as handle, Slide(path) as slide:
        assert slide.native(2.0) is not None
        for x, y in ((0, 0), (400, 120), (640, 900)):
            got = slide.region(x, y, (100, 90), 2.0)
            assert np.abs(got - shown(handle, x, y, (100, 90), level=1)).max() <= 2


@pytest.mark.parametrize("mpp", [1.0, 2.0, 3.3, 4.0, 7.9])
def test_a_thumbnail_is_level_0_of_openslide_reduced(cmu: Path, slides: Path, mpp: float) -> None:
    """Both softened, for there are many ways to shrink; a pixel amiss would cost more than twice as much."""
    soft = ImageFilter.GaussianBlur(1.5)
    for path in (cmu, slides / "P02-S0.svs"):
        with openslide.OpenSlide(path) as handle, Slide(path) as slide:
            picture = Image.fromarray(slide.thumbnail(mpp))
            size = tuple(round(side * slide.mpp / mpp) for side in handle.dimensions)
            whole = Image.fromarray(shown(handle, 0, 0, handle.dimensions).astype(np.uint8))
            assert picture.size == size
            got, truth, theirs = (np.asarray(each.convert("RGB").resize(size, Image.Resampling.BOX).filter(soft), float)
                                  for each in (picture, whole, handle.get_thumbnail(size)))
        apart = np.abs(got - truth).mean()
        amiss = min(np.abs(np.roll(got, way, axis) - truth).mean() for axis in (0, 1) for way in (-1, 1))
        assert apart < 1.3 and apart < 0.6 * amiss, (path.name, apart, amiss)
        assert np.abs(got - theirs).mean() < 1.5
        assert np.abs(got.mean(axis=(0, 1)) - truth.mean(axis=(0, 1))).max() < 0.7


def test_a_damaged_tile_has_the_colour_of_tissue_in_a_thumbnail_so_that_it_is_asked_for(tmp_path: Path,
                                                                                    pixels: np.ndarray) -> None:
    path = tiled(tmp_path / "a.tif", pixels)
    with Slide(path) as slide:
        whole = slide.thumbnail(4.0)
    with tifffile.TiffFile(path) as file:
        small = int(np.argmin(file.pages[0].databytecounts))
    hurt(path, path, small)
    with Slide(path) as slide:
        got = slide.thumbnail(4.0)
    row, column = divmod(small, 4)
    assert (got[row * 32:row * 32 + 32, column * 32:column * 32 + 32] == (190, 120, 170)).all()
    got[row * 32:row * 32 + 32, column * 32:column * 32 + 32] = whole[
        row * 32:row * 32 + 32, column * 32:column * 32 + 32]
    assert (got == whole).all()


def test_tiles_read_in_any_order_and_again_are_the_same(slides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of decoded tiles is bounded, and forgets only what it can read again."""
    path = slides / "P03-S0.svs"
    with openslide.OpenSlide(path) as handle:
        level = tiff.level(path, handle.dimensions)
    places = [(x, y) for x in range(0, 1024, 100) for y in range(0, 1024, 100)]
    first = {place: level.region(*place, 130, 130) for place in places}
    level.close()
    monkeypatch.setattr(tiff, "CACHE", 1)
    level = tiff.level(path, (1024, 1024))
    for place in np.random.default_rng(0).permutation(places).tolist():
        assert (level.region(*place, 130, 130) == first[tuple(place)]).all()
        assert len(level._decoded) <= 4
    level.close()
