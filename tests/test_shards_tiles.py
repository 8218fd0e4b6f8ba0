"""Image files and slides to tiles: untouched where sound, listed where not, keys that any file system can hold."""

import csv
import hashlib
import io
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from shards import check, index, sources, tiles, tissue, write
from shards.slide import Slide, SlideError

PCAM = "(?P<split>train|valid)/(?P<label>[01])/"
OSTEOSARCOMA = r"^(?P<label>[^/]+)/.*___(?P<slide>(?P<patient>Case-\d+-P5|Case-\d+|P9)-[ABC]\d+)-"


def noise(seed: int, size: tuple[int, int] = (32, 40), channels: int = 3) -> np.ndarray:
    """Smooth enough for JPEG to keep, different for every seed."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, channels), np.uint8)
    return np.asarray(Image.fromarray(small.squeeze()).resize(size[::-1], Image.Resampling.BICUBIC))


def source(path: Path, **known: object) -> sources.Source:
    return sources.Source(file=str(path), name=path.stem, slide=path.stem, patient="p", **known)


def settings_of(folder: Path, **told: object) -> write.Settings:
    return write.Settings(**{"source": folder, "out": folder.parent / "out", "dataset": "a", "mpp": 1.0, **told})


def of_file(path: Path) -> tiles.Tile | tiles.Rejected:
    (made,) = tiles.of_files([source(path)], settings_of(path.parent, kind="tiles"))
    return made


def listed(folder: Path, names: str = "", **told: object) -> list[sources.Source]:
    return sources.sources(settings_of(folder, kind="tiles", names=names, **told))


def saved(path: Path, pixels: np.ndarray | Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **options)
    return path


def rows(shard: Path) -> list[dict]:
    return pa.ipc.open_file(pa.OSFile(str(shard / "samples.arrow"))).read_all().to_pylist()


def rejected(shard: Path) -> list[dict]:
    return [json.loads(line) for line in (shard / "rejected.jsonl").read_text().splitlines()]


def stored(shard: Path) -> dict[str, bytes]:
    """The image of every key, cut from the tars with plain file reads."""
    tars = [tar["name"] for tar in json.loads((shard / "index.json").read_text())["tars"]]
    return {row["key"]: (shard / tars[row["tar"]]).read_bytes()[row["offset"]:row["offset"] + row["size"]]
            for row in rows(shard)}


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


# --- one file


@pytest.mark.parametrize("options", [{"quality": 60}, {"quality": 95, "progressive": True}, {"comment": b"scanner 3"}])
def test_a_sound_jpeg_passes_untouched(tmp_path: Path, options: dict) -> None:
    path = saved(tmp_path / "a.jpg", noise(0), **options)
    tile = of_file(path)
    assert isinstance(tile, tiles.Tile)
    assert (tile.image, tile.encoding, tile.size) == (path.read_bytes(), "source", (40, 32))
    assert tile.digest == hashlib.sha256(path.read_bytes()).digest()[:16]


@pytest.mark.parametrize(("name", "channels", "options"), [
    ("a.png", 3, {}), ("a.tif", 3, {}), ("a.tiff", 3, {"compression": "tiff_lzw"}), ("a.bmp", 3, {}),
    ("a.png", 1, {}), ("grey.jpg", 1, {"quality": 95}),
])
def test_everything_else_is_encoded_once_with_its_colours(tmp_path: Path, name: str, channels: int,
                                                          options: dict) -> None:
    truth = noise(1, channels=channels)
    tile = of_file(saved(tmp_path / name, truth, **options))
    assert isinstance(tile, tiles.Tile)
    assert (tile.encoding, tile.size) == ("jpeg-90-4:4:4", (40, 32))
    with Image.open(io.BytesIO(tile.image)) as picture:
        assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (40, 32))
        assert {layer[1:3] for layer in picture.layer} == {(1, 1)}, "4:4:4 samples each colour everywhere"
    expected = np.repeat(truth[..., None], 3, axis=2) if channels == 1 else truth
    assert np.abs(pixels_of(tile.image) - expected).mean() < 2.5
    if "jpg" not in name:
        assert tile.digest == hashlib.sha256(expected.tobytes()).digest()[:16]


def test_a_palette_and_a_bitmap_keep_their_colours(tmp_path: Path) -> None:
    for mode in ("P", "1"):
        picture = Image.fromarray(noise(2)).convert(mode)
        tile = of_file(saved(tmp_path / f"{mode}.png", picture))
        assert np.abs(pixels_of(tile.image) - np.asarray(picture.convert("RGB")).astype(int)).mean() < 12, mode


def test_what_is_transparent_becomes_white_like_the_outside_of_a_slide(tmp_path: Path) -> None:
    rgba = np.dstack([noise(3), np.full((32, 40), 255, np.uint8)])
    rgba[:, 24:, :] = 0
    tile = of_file(saved(tmp_path / "a.png", rgba))
    got = pixels_of(tile.image)
    assert got[:, 26:].min() > 245
    assert np.abs(got[:, :22] - rgba[:, :22, :3]).mean() < 3


@pytest.mark.parametrize(("name", "kind"), [("a.tif", np.int32), ("a.tif", np.float32)])
def test_floats_and_long_numbers_are_rejected_and_not_clipped_to_white(tmp_path: Path, name: str, kind: type) -> None:
    values = np.linspace(0, 1 if kind is np.float32 else 60000, 64).astype(kind).reshape(8, 8)
    result = of_file(saved(tmp_path / name, values))
    assert isinstance(result, tiles.Rejected)
    assert result.reason == "unreadable" and "neither 8 nor 16 bits a channel" in result.detail


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_keep_their_upper_eight(tmp_path: Path, name: str, channels: int) -> None:
    import imagecodecs

    deep = noise(7, channels=channels).astype(np.uint16) * 256 + 77
    path = tmp_path / name
    if name == "a.png":
        path.write_bytes(imagecodecs.png_encode(deep))
    else:
        import tifffile

        tifffile.imwrite(path, deep, photometric="rgb" if channels == 3 else "minisblack", metadata=None)
    tile = of_file(path)
    assert isinstance(tile, tiles.Tile), tile
    truth = (deep >> 8).astype(int).reshape(32, 40, -1)
    assert np.abs(pixels_of(tile.image) - truth).mean() < 2.5


def test_a_picture_taken_sideways_is_turned_upright_and_one_that_says_nothing_is_not_touched(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6        # turn by a quarter to the right
    tile = of_file(saved(tmp_path / "a.jpg", noise(8), quality=95, exif=exif))
    assert isinstance(tile, tiles.Tile)
    assert (tile.size, tile.encoding) == ((32, 40), "jpeg-90-4:4:4")
    assert np.abs(pixels_of(tile.image) - np.rot90(noise(8), -1)).mean() < 3


def test_damaged_files_are_rejected_with_a_reason(tmp_path: Path) -> None:
    good = saved(tmp_path / "good.jpg", noise(4)).read_bytes()
    png = saved(tmp_path / "good.png", noise(4)).read_bytes()
    for name, data in {"empty.jpg": b"", "text.jpg": b"no picture", "cut.jpg": good[:len(good) // 2],
                       "half.png": png[:99], "wrong.png": png[:60] + bytes(40) + png[100:]}.items():
        (tmp_path / name).write_bytes(data)
        result = of_file(tmp_path / name)
        assert isinstance(result, tiles.Rejected), name
        assert result.reason == "unreadable" and len(result.detail) > 5, name
        assert str(tmp_path) not in result.detail, "the same list wherever the source lies"
    with pytest.raises(SlideError, match=r"gone\.jpg cannot be read: No such file"):     # the disk's fault: counted
        of_file(tmp_path / "gone.jpg")


def test_a_picture_too_large_for_jpeg_is_rejected_and_does_not_end_the_job(tmp_path: Path) -> None:
    result = of_file(saved(tmp_path / "long.png", np.zeros((1, 70_000, 3), np.uint8)))
    assert isinstance(result, tiles.Rejected)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_no_damage_to_a_file_raises_anything(tmp_path: Path) -> None:
    """Four hundred damaged files: a tile or a reason, never an exception that ends a job of a million."""
    rng = np.random.default_rng(0)
    for name, options in (("a.jpg", {}), ("a.png", {}), ("a.tif", {}), ("b.tif", {"compression": "tiff_adobe_deflate"}),
                          ("a.bmp", {})):
        good = saved(tmp_path / name, noise(5), **options).read_bytes()
        for _ in range(80):
            data = bytearray(good)
            for at in rng.integers(0, min(len(good), int(rng.choice([40, 200, 10**9]))), 4):
                data[at] = rng.integers(256)
            (tmp_path / name).write_bytes(data)
            assert isinstance(of_file(tmp_path / name), tiles.Tile | tiles.Rejected)


# --- keys


def test_keys_hold_only_tame_letters_and_never_fall_together() -> None:
    names = ["a", "a b", "a_b", "A", "Ä", "ä", "../../etc/passwd", "a\nb", "a\tb", "'; drop", '"', "a.b", "a..b", ".",
             "..", "x" * 80, "x" * 81, "x" * 300, "y" * 299 + "z", "y" * 300, "\U0001f9ec", "名", "\udcff", "%00", "\0",
             "", "a/b", "a\\b", "-", "_", "CON", "con", " a", "a "]
    keys = [sources.key(name, f"x{x}", "y0") for name in names for x in (0, 10)]
    for key in keys:
        assert re.fullmatch("[a-z0-9_-]{1,80}", key), key
    assert len(set(keys)) == len(keys)
    assert sources.key("slide-1", "x0", "y128") == "slide-1-x0-y128", "a tame name is kept as it is"


def test_hostile_file_names_become_tame_keys_in_the_tars(tmp_path: Path) -> None:
    names = ["a b", "a\nb", "A", "a", "quote'\"", "dots.in.name", "ünïcode", "-rf", "x" * 200, "..hidden", "*", "$(ls)"]
    for number, name in enumerate(names):
        saved(tmp_path / "in" / f"{name}.jpg", noise(number))
    done = write.write(write.Settings(tmp_path / "in", tmp_path / "out", "hostile", kind="tiles", workers=1))
    assert done.samples == len(names)
    found = stored(tmp_path / "out")
    assert all(re.fullmatch("[a-z0-9_-]{1,80}", key) for key in found)
    assert sorted(found.values()) == sorted((tmp_path / "in" / f"{name}.jpg").read_bytes() for name in names)
    assert {row["slide"] for row in rows(tmp_path / "out")} == set(names), "the slide's name itself is kept"
    assert check.check(tmp_path / "out") == []


# --- which files, and what is known of them


def test_what_cannot_be_a_source_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    saved(tmp_path / "some" / "train" / "a.jpg", noise(0))
    for folder, names, says in (
        (tmp_path / "none", "", "no source folder at .*none .looked in .*set source="),
        (tmp_path / "file", "", "no source folder at .*file"),
        (tmp_path / "empty", "", r"nothing to shard below .*empty: no file ends in \.jpg, \.jpeg"),
        (tmp_path / "some", "(?P<split>valid)/", r"names='.*valid.*' does not match 'train/a\.jpg'; correct the expr"),
    ):
        with pytest.raises(index.ShardError, match=says) as caught:
            listed(folder, names)
        assert "\n" not in str(caught.value) and caught.value.exit_code == 3
        with pytest.raises(index.ShardError, match=says):
            write.write(write.Settings(folder, tmp_path / "out", "a", kind="tiles", names=names))
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_not_utf8_is_refused_by_name(tmp_path: Path) -> None:
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff.jpg")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    with pytest.raises(index.ShardError, match=r"b'a\\xff\.jpg' is not a name in UTF-8; rename it"):
        listed(tmp_path)


def test_names_and_slides_csv_tell_of_a_file_and_the_table_goes_first(tmp_path: Path) -> None:
    for name in ("train/A_1_t.jpg", "test/B_1_n.JPG", "test/B_2_n.jpeg", "test/notes.txt", "test/C_9_x.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    with (tmp_path / "slides.csv").open("w", encoding="utf-8-sig", newline="") as handle:      # as a spreadsheet does
        csv.writer(handle).writerows([("slide", "patient", "split", "mpp", "label", "scanner"),
                                      ("A_1_t", "anna", "valid", "0.25", "", "x"), ("B", "bo", "", "", "", "")])
    names = r"^(?P<split>train|test)/(?P<slide>(?P<patient>[A-Z])(?!_\d_t))?.*_(?P<label>.)\."
    found = {source.path.name: source for source in listed(tmp_path, names)}
    told = {name: (one.slide, one.patient, one.split, one.label, one.mpp) for name, one in found.items()}
    assert told == {
        "A_1_t.jpg": ("A_1_t", "anna", "valid", "t", 0.25),     # the row of the file
        "B_1_n.JPG": ("B", "bo", "test", "n", None),            # the row of the slide it is a tile of
        "B_2_n.jpeg": ("B", "bo", "test", "n", None),
        "C_9_x.png": ("C", "C", "test", "x", None),             # no row: what the name says
    }
    (tmp_path / "slides.csv").unlink()
    plain = listed(tmp_path)
    assert [one.path for one in plain] == sorted(one.path for one in plain)
    assert {(one.slide, one.patient, one.split, one.label, one.mpp) for one in plain} == {
        (Path(name).stem, "", "", "", None) for name in told}, "of a tile that says nothing, the patient is unknown"


@pytest.mark.parametrize(("table", "says"), [
    (b"name,patient\na,b\n", "has no column 'slide' or 'file' .it has name, patient"),
    (b"slide,mpp\na,half\n", "mpp='half' of .*a.jpg is not a number of microns per pixel"),
    (b"slide,mpp\na,-0.5\n", "mpp='-0.5'"), (b"slide,mpp\na,0\n", "mpp='0'"), (b"slide,mpp\na,nan\n", "mpp='nan'"),
    (b"slide,patient\nz.jpg,p\n", "no row of .*slides.csv belongs to a file: it says 'z.jpg', the first .*'a.jpg'"),
    (b"slide,patient\na,J\xf6rg\n", "is not a table in UTF-8"),
])
def test_a_table_that_cannot_be_meant_is_refused_in_a_line(tmp_path: Path, table: bytes, says: str) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    (tmp_path / "slides.csv").write_bytes(table)
    with pytest.raises(index.ShardError, match=says) as caught:
        listed(tmp_path)
    assert "\n" not in str(caught.value)


# --- a job over files of all kinds


def test_a_folder_of_all_sorts_is_sharded_and_what_is_left_out_is_listed(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    first = saved(folder / "Tumour" / "One.jpg", noise(0))
    saved(folder / "tumour2" / "png.png", noise(1))
    saved(folder / "stroma" / "tif.tif", noise(2))
    saved(folder / "stroma" / "grey.jpg", noise(3, channels=1))
    saved(folder / "stroma" / "deep.tif", np.full((8, 8), 0.5, np.float32))
    (folder / "stroma" / "cut.jpg").write_bytes(first.read_bytes()[:200])
    shutil.copy(first, folder / "Tumour" / "Copy Of One.jpg")
    saved(folder / "stroma" / "again.png", noise(2))        # the pixels of tif.tif, in another file
    settings = write.Settings(folder, tmp_path / "out", "sorts", kind="tiles", workers=1, mpp=0.5,
                              names="(?P<label>.*)/")
    done = write.write(settings)
    table, left_out = rows(settings.out), rejected(settings.out)
    assert len(table) == done.samples == 4
    assert len(table) + len(left_out) == 8 == done.samples + sum(done.rejected.values())
    assert done.rejected["duplicate"] == 2
    assert Counter(line["reason"] for line in left_out) == {"duplicate": 2, "unreadable": 2}
    gone = {line["file"] for line in left_out}
    assert {"deep.tif", "cut.jpg"} < gone
    assert len(gone & {"One.jpg", "Copy Of One.jpg"}) == len(gone & {"tif.tif", "again.png"}) == 1
    kept = stored(settings.out)
    one = next(data for key, data in kept.items() if "one" in key)
    assert one == first.read_bytes()
    assert Counter(row["encoding"] for row in table) == {"source": 1, "jpeg-90-4:4:4": 3}
    assert {row["mpp"] for row in table} == {0.5}
    assert check.check(settings.out) == []


def test_two_files_that_would_share_a_key_are_refused_by_name(tmp_path: Path) -> None:
    saved(tmp_path / "in" / "a.jpg", noise(0))
    saved(tmp_path / "in" / "a.png", noise(1))
    with pytest.raises(index.ShardError, match=r"a\.jpg and .*a\.png would be one to whoever trains"):
        write.write(write.Settings(tmp_path / "in", tmp_path / "out", "a", kind="tiles", workers=1))
    assert not (tmp_path / "out" / "index.json").exists()


# --- one slide


def cut(path: Path, slide_mpp: float | None = None, **changed: object) -> list[tiles.Tile | tiles.Rejected]:
    settings = settings_of(path.parent, **{"size": 64, "min_focus": 0, "max_pen": 1, **changed})
    with Slide(path, None, slide_mpp) as slide:
        found = tissue.mask(slide.thumbnail(tissue.MASK_MPP))
        return list(tiles.of_slide(source(path, label="organ"), slide, found, settings, None))


def test_a_tile_of_a_slide_shows_what_lies_at_its_corner(slides: Path) -> None:
    path = slides / "P00-S0.svs"
    found = [item for item in cut(path) if isinstance(item, tiles.Tile)]
    apart, amiss = 0.0, 0.0
    with Slide(path) as slide:
        for tile in found[::7]:
            truth = slide.region(tile.x, tile.y, (128, 128), 0.5).astype(float)
            truth = truth.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
            apart += np.abs(pixels_of(tile.image) - truth).mean()
            amiss += min(np.abs(pixels_of(tile.image) - np.roll(truth, way, axis)).mean()
                         for axis in (0, 1) for way in (-1, 1))
    assert apart < 5 * len(found[::7]) and apart < 0.6 * amiss, (apart, amiss)
    assert {(tile.size, tile.mpp, tile.label, tile.encoding) for tile in found} == {
        ((64, 64), 1.0, "organ", "jpeg-90-4:4:4")}
    assert {tile.key for tile in found} == {sources.key("P00-S0", f"x{tile.x}", f"y{tile.y}") for tile in found}


def test_the_asked_tissue_decides_what_is_background(slides: Path) -> None:
    counts = [Counter(getattr(item, "reason", "kept") for item in cut(slides / "P01-S0.svs", min_tissue=asked, size=32))
              for asked in (0.0, 0.5, 1.0)]
    kept, background = ([count[word] for count in counts] for word in ("kept", "background"))
    assert kept[0] > kept[1] > kept[2] > 0
    assert background[0] == 0 < background[1] < background[2]
    assert {sum(count.values()) for count in counts} == {256}


def test_a_tile_that_shows_nothing_is_blank(tmp_path: Path) -> None:
    import tifffile

    pixels = np.full((256, 256, 3), 120, np.uint8)      # as dense as tissue, as even as a marker's ink
    pixels[:, 128:] = noise(6, (256, 128))
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", tile=(128, 128), resolution=(20000, 20000),
                     resolutionunit="CENTIMETER", metadata=None)
    items = cut(tmp_path / "a.tif", mpp=0.5, min_tissue=0)
    found = {(item.x, item.y): getattr(item, "reason", "kept") for item in items}
    assert found == {(x, y): "blank" if x < 128 else "kept" for x in range(0, 256, 64) for y in range(0, 256, 64)}


def test_a_slide_smaller_than_a_tile_is_left_out_with_its_size(slides: Path) -> None:
    (item,) = cut(slides / "P00-S0.svs", size=256, mpp=4.0)
    assert isinstance(item, tiles.Rejected)
    assert "1024 x 1024 pixels of 0.5 microns hold no tile of 256 pixels of 4" in item.detail
    assert item.reason == "small"


# --- real data


def test_real_pcam_tiles_are_sharded_untouched_with_split_and_label(data: Path, tmp_path: Path) -> None:
    for split, each in (("train", 80), ("valid", 40)):
        for label in "01":
            (tmp_path / "in" / split / label).mkdir(parents=True)
            for path in sorted((data / "pcam_subset_96px" / split / label).glob("*.jpg"))[:each]:
                (tmp_path / "in" / split / label / path.name).symlink_to(path)
    settings = write.Settings(tmp_path / "in", tmp_path / "out", "pcam", kind="tiles", names=PCAM, tar_samples=100,
                              mpp=1.0, workers=1)
    assert write.write(settings).rejected == {}
    table = rows(settings.out)
    classes = json.loads((settings.out / "index.json").read_text())["datasets"][0]["classes"]
    assert classes == ["0", "1"]
    assert Counter((row["split"], classes[row["label"]]) for row in table) == {
        ("train", "0"): 80, ("train", "1"): 80, ("valid", "0"): 40, ("valid", "1"): 40}
    kept = stored(settings.out)
    for row in table:
        name = f"{row['split']}/{classes[row['label']]}/{row['slide']}.jpg"
        assert kept[row["key"]] == (tmp_path / "in" / name).read_bytes(), name
    assert {row["encoding"] for row in table} == {"source"}
    assert check.check(settings.out) == []


def test_real_osteosarcoma_tiles_tell_patient_slide_and_class_by_their_names(data: Path, tmp_path: Path) -> None:
    folder = data / "osteosarcoma_tcia_1024px"
    settings = write.Settings(folder, tmp_path / "out", "osteosarcoma", kind="tiles", names=OSTEOSARCOMA,
                              tar_samples=30, workers=2)
    write.write(settings)
    table = rows(settings.out)
    truth = Counter()
    for path in folder.rglob("*.jpg"):
        words = path.stem.split("___")[1].split("_")[0].split("-")      # Case-48-P5-C20-x-y: by hand, no expression
        truth[path.parent.name, "-".join(words[:-3]), "-".join(words[:-2])] += 1
    classes = json.loads((settings.out / "index.json").read_text())["datasets"][0]["classes"]
    assert Counter((classes[row["label"]], row["patient"], row["slide"]) for row in table) == truth
    assert [len({row[name] for row in table}) for name in ("key", "patient", "slide")] == [60, 4, 26]
    assert np.isnan([row["mpp"] for row in table]).all()
    assert rejected(settings.out) == []
    assert check.check(settings.out) == []


def test_files_of_one_name_in_different_folders_are_different_tiles(tmp_path: Path) -> None:
    saved(tmp_path / "in" / "train" / "cat" / "1.png", noise(0))
    saved(tmp_path / "in" / "valid" / "cat" / "1.png", noise(1))
    found = listed(tmp_path / "in")
    made = list(tiles.of_files(found, settings_of(tmp_path / "in", kind="tiles")))
    assert [tile.key for tile in made] == ["train-cat-1", "valid-cat-1"]


def test_a_slide_coarser_than_asked_is_left_out_and_not_blown_up(slides: Path) -> None:
    path = sorted(slides.glob("*.svs"))[0]
    (only,) = cut(path, mpp=0.25)
    assert isinstance(only, tiles.Rejected) and only.reason == "coarse" and "0.5" in only.detail


def test_a_table_that_says_two_things_of_one_slide_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "a.png", noise(0))
    (tmp_path / "slides.csv").write_text("slide,patient,split\na,p,train\na,q,test\n")
    with pytest.raises(index.ShardError, match="more than one row for slide 'a'"):
        listed(tmp_path)
