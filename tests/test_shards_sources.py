"""What is known of a file before it is opened: names, tables, barcodes, and arrays with their labels beside them."""

import csv
import io
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from shards import check, index, sources, write


def rows(shard: Path) -> list[dict]:
    return pa.ipc.open_file(pa.OSFile(str(shard / "samples.arrow"))).read_all().to_pylist()


def stored(shard: Path) -> dict[str, np.ndarray]:
    tars = [tar["name"] for tar in json.loads((shard / "index.json").read_text())["tars"]]
    return {row["key"]: np.asarray(Image.open(io.BytesIO((shard / tars[row["tar"]]).read_bytes()[
        row["offset"]:row["offset"] + row["size"]])).convert("RGB")).astype(int) for row in rows(shard)}


def touched(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def table(path: Path, *lines: tuple[str, ...]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows(lines)
    return path


def found(folder: Path, **told: object) -> dict[str, sources.Source]:
    settings = write.Settings(**{"source": folder, "out": folder.parent / "out", "dataset": "a", "kind": "tiles",
                                 **told})
    return {Path(each.file).relative_to(folder).as_posix(): each for each in sources.sources(settings)}


def about(source: sources.Source) -> tuple:
    return source.slide, source.patient, source.site, source.split, source.label, source.mpp


# --- which files


@pytest.mark.parametrize(("kind", "taken"), [
    ("slides", {"a.svs", "b.TIFF", "c.ndpi", "d.mrxs", "e.dcm", "deep/er/f.tif"}),
    ("regions", {"b.TIFF", "g.jpg", "h.PNG", "i.bmp", "deep/er/f.tif"}),
    ("tiles", {"b.TIFF", "g.jpg", "h.PNG", "i.bmp", "deep/er/f.tif"}),
])
def test_the_suffix_says_whether_a_file_is_meant_and_what_a_mac_leaves_is_not(tmp_path: Path, kind: str,
                                                                             taken: set[str]) -> None:
    touched(tmp_path, "a.svs", "b.TIFF", "c.ndpi", "d.mrxs", "e.dcm", "deep/er/f.tif", "g.jpg", "h.PNG", "i.bmp",
            "._a.svs", "deep/._g.jpg", "notes.txt", "svs", "a.svs.part", "j.jpg.md5")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "folder.svs").mkdir()
    (tmp_path / "gone.csv").symlink_to(tmp_path / "nowhere.csv")
    assert set(found(tmp_path, kind=kind, mpp=0.5)) == taken


def test_links_are_followed_and_one_that_leads_nowhere_or_in_a_ring_is_named(tmp_path: Path) -> None:
    touched(tmp_path / "in", "a/1.png")
    touched(tmp_path / "elsewhere", "b/2.png")
    (tmp_path / "in" / "patient9").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "3.png").symlink_to(tmp_path / "elsewhere" / "b" / "2.png")
    assert set(found(tmp_path / "in")) == {"3.png", "a/1.png", "patient9/b/2.png"}
    (tmp_path / "in" / "4.png").symlink_to(tmp_path / "unmounted.png")
    with pytest.raises(index.ShardError, match=r"4\.png is a link to .*unmounted\.png, which is not there; mount"):
        found(tmp_path / "in")
    (tmp_path / "in" / "4.png").unlink()
    (tmp_path / "in" / "ring").symlink_to(tmp_path / "in")
    with pytest.raises(index.ShardError, match=r"ring is a link to a folder that it lies in"):
        found(tmp_path / "in")


def test_what_is_odd_about_a_source_is_remarked(tmp_path: Path) -> None:
    touched(tmp_path, "a.png", "b.png", "c.czi", "d.czi", "e.gif", "notes.txt")
    (tmp_path / "slides.csv").write_text("slide,patient\na ,p\nz,q\n")
    said: list[str] = []
    settings = write.Settings(tmp_path, tmp_path / "out", "a", kind="tiles")
    assert [(one.slide, one.patient) for one in sources.sources(settings, said.append)] == [("a", "p"), ("b", "")]
    assert [line.split("first")[-1].strip() for line in said[:2]] == ["'z'", "'b.png'"]
    assert "1 rows of" in said[0] and "1 files have no row" in said[1] and said[2].endswith("not taken: 2 .czi, 1 .gif")


@pytest.mark.parametrize("kind", ["slides", "tiles"])
def test_two_files_whose_tiles_would_be_one_are_refused_before_anything_is_cut(tmp_path: Path, kind: str) -> None:
    touched(tmp_path, *(["a/s.svs", "b/s.svs"] if kind == "slides" else ["s.png", "s.jpg"]))
    with pytest.raises(index.ShardError, match=r"s\..* and .*s\..* would be one .*rename one"):
        found(tmp_path, kind=kind, mpp=0.5)


def test_what_skip_matches_is_no_image_of_the_set(tmp_path: Path) -> None:
    touched(tmp_path, "a.png", "a_mask.png", "masks/a.png", "b.png", "unmasked.png")
    assert set(found(tmp_path, skip=r"_mask\.|^masks/")) == {"a.png", "b.png", "unmasked.png"}
    assert set(found(tmp_path, skip=r"_mask\.|^masks/|un", names=r"^(?P<slide>[ab])\.png")) == {"a.png", "b.png"}
    with pytest.raises(index.ShardError, match=r"nothing to shard.*or skip='png' leaves none"):
        found(tmp_path, skip="png")


def test_the_order_is_that_of_the_paths_whatever_the_file_system_says(tmp_path: Path) -> None:
    names = ["b/2.png", "b/10.png", "a/z.png", "a.png", "B/1.png", "b.png", "a-1.png", "é.png", "z.png"]
    touched(tmp_path, *names)
    assert list(found(tmp_path)) == sorted(names, key=lambda name: Path(name).parts)


def test_a_name_that_is_not_utf8_is_refused_by_name_for_slides_too(tmp_path: Path) -> None:
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff.svs")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    with pytest.raises(index.ShardError, match=r"b'a\\xff\.svs' is not a name in UTF-8; rename it, or move it"):
        found(tmp_path, kind="slides", mpp=0.5)


def test_many_files_are_cut_into_units_that_hold_each_once_in_order(tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    touched(tmp_path, *(f"{number:03d}.png" for number in range(25)))
    monkeypatch.setattr(sources, "FILES_A_UNIT", 10)
    settings = write.Settings(tmp_path, tmp_path.parent / "out", "a", kind="tiles")
    every = sources.sources(settings)
    assert [len(unit) for unit in sources.units(settings, every)] == [10, 10, 5]
    assert [each for unit in sources.units(settings, every) for each in unit] == every
    assert [len(unit) for unit in sources.units(replace(settings, kind="regions"), every)] == [1] * 25


# --- names and tables


def test_every_word_may_come_from_the_name_and_from_a_table_with_columns_of_other_names(tmp_path: Path) -> None:
    touched(tmp_path, "siteA/p1_s1_train_tumour_0.25.png", "siteA/p1_s2_test_benign_0.5.png")
    names = (r"(?P<site>site.)/(?P<patient>p\d)_(?P<slide>s\d)_(?P<split>[a-z]+)_(?P<label>[a-z]+)_"
             r"(?P<mpp>[0-9.]+)\.png")
    one, two = found(tmp_path, names=names).values()
    assert about(one) == ("s1", "p1", "siteA", "train", "tumour", 0.25)
    assert about(two) == ("s2", "p1", "siteA", "test", "benign", 0.5)
    table(tmp_path / "clinical.csv", ("image_id", "case", "centre", "fold", "grade", "res", "slide"),
          ("s1", "anna", "north", "0", "4", "1.0", "x"), ("s9", "bo", "south", "1", "5", "", ""))
    columns = {"slide": "image_id", "patient": "case", "site": "centre", "split": "fold", "label": "grade",
               "mpp": "res"}
    one, two = found(tmp_path, names=names, table=tmp_path / "clinical.csv", columns=columns).values()
    assert about(one) == ("s1", "anna", "north", "0", "4", 1.0), "the table goes before the name"
    assert about(two) == ("s2", "p1", "siteA", "test", "benign", 0.5), "it has no row"


def test_a_file_column_finds_files_by_path_name_or_stem_and_may_rename_the_slide(tmp_path: Path) -> None:
    touched(tmp_path, "x/one.png", "x/two.png", "y/one.png")
    table(tmp_path / "t.csv", ("file", "slide", "label"), ("x/one.png", "S1", "a"), ("two", "S2", "b"),
          ("y/one.png", "S3", "c"))
    assert [about(each)[::4] for each in found(tmp_path, table=tmp_path / "t.csv").values()] == [
        ("S1", "a"), ("S2", "b"), ("S3", "c")]
    table(tmp_path / "t.csv", ("path", "slide", "label"), ("two.png", "S2", "b"))
    got = found(tmp_path, table=tmp_path / "t.csv", columns={"file": "path"})
    assert [about(each)[::4] for each in got.values()] == [("one", ""), ("S2", "b"), ("one", "")]


def test_the_row_of_the_file_itself_goes_before_that_of_its_slide(tmp_path: Path) -> None:
    """Whatever the alphabet says: `a_1` stands before `z`, and `z_1` behind `a`."""
    touched(tmp_path, "a_1_z.png", "z_1_a.png")
    table(tmp_path / "slides.csv", ("slide", "label"), ("z", "slide"), ("a", "slide"), ("a_1_z.png", "file"),
          ("z_1_a.png", "file"))
    got = found(tmp_path, names=r"_(?P<slide>[az])\.png")
    assert {name: each.label for name, each in got.items()} == {"a_1_z.png": "file", "z_1_a.png": "file"}


@pytest.mark.parametrize(("lines", "columns", "says"), [
    ((("slide", "grade"), ("a", "1")), {"label": "stage"}, "has no column 'stage' .it has slide, grade.; correct col"),
    ((("id", "grade"), ("a", "1")), {"label": "grade"}, "has no column 'slide' or 'file' .it has id, grade"),
    ((("slide", "label"), ("other", "1")), {}, "no row of .* belongs to a file: it says 'other', the first file is 'a"),
    ((("slide", "label"), ("a", "1"), ("a", "2")), {}, "has more than one row for slide 'a'"),
])
def test_a_table_that_does_not_fit_is_refused_with_what_it_has(tmp_path: Path, lines: tuple, columns: dict,
                                                               says: str) -> None:
    touched(tmp_path, "a.png")
    table(tmp_path / "t.csv", *lines)
    with pytest.raises(index.ShardError, match=says) as caught:
        found(tmp_path, table=tmp_path / "t.csv", columns=columns)
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)


# --- barcodes


@pytest.mark.parametrize(("name", "patient", "site"), [
    ("TCGA-CR-7395-01A-01-TS1.svs", "TCGA-CR-7395", "CR"),
    ("TCGA-A2-A0CL-01Z-00-DX1.7a1b2c3d-1234-5678-9abc-def012345678.svs", "TCGA-A2-A0CL", "A2"),
    ("deep/TCGA-18-5592.svs", "TCGA-18-5592", "18"), ("my_TCGA-18-5592-01Z_x.svs", "TCGA-18-5592", "18"),
    ("tcga-cr-7395-01a.svs", "tcga-cr-7395-01a", ""), ("TCGA-CR-73951-01A.svs", "TCGA-CR-73951-01A", ""),
    ("TCGA-CRX-7395.svs", "TCGA-CRX-7395", ""), ("TCGA-CR-739.svs", "TCGA-CR-739", ""),
    ("TCGA-CR-7395-01A/plain.svs", "plain", ""), ("GTEX-1117F.svs", "GTEX-1117F", ""),
])
def test_a_barcode_of_tcga_tells_patient_and_site(tmp_path: Path, name: str, patient: str, site: str) -> None:
    touched(tmp_path, name)
    (one,) = found(tmp_path, kind="slides", mpp=0.5).values()
    assert (one.slide, one.patient, one.site) == (Path(name).stem, patient, site)
    (tile,) = found(touched(tmp_path / "tiles", Path(name).with_suffix(".png").name)).values()
    assert (tile.patient, tile.site) == ((patient, site) if site else ("", "")), "of a tile no slide is its patient"


def test_what_names_or_the_table_say_goes_before_the_barcode_and_a_slides_barcode_counts_too(tmp_path: Path) -> None:
    touched(tmp_path, "p7_TCGA-CR-7395-01A.svs")
    (one,) = found(tmp_path, kind="slides", mpp=0.5, names=r"(?P<patient>p\d)_").values()
    assert (one.patient, one.site) == ("p7", "CR")
    table(tmp_path / "slides.csv", ("slide", "site"), ("p7_TCGA-CR-7395-01A", "Berlin"))
    (one,) = found(tmp_path, kind="slides", mpp=0.5).values()
    assert (one.patient, one.site) == ("TCGA-CR-7395", "Berlin")
    touched(tmp_path / "tiles", "0001.png")
    table(tmp_path / "tiles" / "slides.csv", ("file", "slide"), ("0001", "TCGA-A2-A0CL-01Z"))
    (one,) = found(tmp_path / "tiles").values()
    assert (one.slide, one.patient, one.site) == ("TCGA-A2-A0CL-01Z", "TCGA-A2-A0CL", "A2")


# --- arrays


@pytest.fixture
def pcam(tmp_path: Path) -> write.Settings:
    """The layout of PatchCamelyon: x (N, 32, 32, 3), y (N, 1, 1, 1), and a table a row an image, in order."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 23), ("valid", 7)):
        stem = f"camelyonpatch_level_2_split_{split}"
        small = rng.integers(0, 256, (count, 4, 4, 3), np.uint8)
        images = np.stack([np.asarray(Image.fromarray(each).resize((32, 32), Image.Resampling.BICUBIC))
                           for each in small])
        (tmp_path / "in").mkdir(exist_ok=True)
        with h5py.File(tmp_path / "in" / f"{stem}_x.h5", "w") as file:
            file.create_dataset("x", data=images, chunks=(4, 32, 32, 3), compression="gzip")
        with h5py.File(tmp_path / "in" / f"{stem}_y.h5", "w") as file:
            file["y"] = (np.arange(count) % 3 == 0).astype(np.uint8).reshape(-1, 1, 1, 1)
        table(tmp_path / "in" / f"{stem}_meta.csv", ("", "tumor_patch", "center_tumor_patch", "wsi"),
              *((str(number), "True", "False", f"camelyon16_{split}_{number // 5:03d}") for number in range(count)))
    return write.Settings(tmp_path / "in", tmp_path / "out", "pcam", kind="arrays", mpp=1.0, workers=2, tar_samples=11,
                          names="split_(?P<split>train|valid|test)", columns={"slide": "wsi"})


def images_of(settings: write.Settings, split: str) -> np.ndarray:
    with h5py.File(settings.source / f"camelyonpatch_level_2_split_{split}_x.h5") as file:
        return file["x"][:].astype(int)


def test_pcam_as_it_is_published_has_its_images_labels_slides_and_splits(pcam: write.Settings,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "ROWS_A_UNIT", 8)         # 23 are three pieces, which must join without a seam
    done = write.write(pcam)
    assert done.samples == 30 and done.rejected == {}
    pictures, table_of = stored(pcam.out), {row["key"]: row for row in rows(pcam.out)}
    classes = json.loads((pcam.out / "index.json").read_text())["datasets"][0]["classes"]
    assert classes == ["0", "1"]
    for split, count in (("train", 23), ("valid", 7)):
        images = images_of(pcam, split)
        for number in range(count):
            key = f"camelyonpatch_level_2_split_{split}_x-{number:07d}"
            row = table_of.pop(key)
            assert np.abs(pictures[key] - images[number]).mean() < 6, key
            assert np.abs(pictures[key] - images[number]).mean() < 0.3 * min(
                np.abs(pictures[key] - other).mean() for at, other in enumerate(images) if at != number)
            assert (classes[row["label"]], row["slide"]) == (str(int(number % 3 == 0)),
                                                             f"camelyon16_{split}_{number // 5:03d}")
            assert (row["split"], row["mpp"], row["encoding"]) == (split, 1.0, "jpeg-90-4:4:4")
    assert not table_of
    assert check.check(pcam.out) == []
    monkeypatch.undo()
    write.write(replace(pcam, out=pcam.out.with_name("whole"), workers=1))
    assert str(rows(pcam.out)) == str(rows(pcam.out.with_name("whole"))), "the same tiles however they are pieced"


def test_images_without_labels_are_unlabelled_and_labels_may_lie_in_the_same_file(pcam: write.Settings) -> None:
    for path in pcam.source.glob("*_y.h5"):
        path.unlink()
    write.write(pcam)
    assert {row["label"] for row in rows(pcam.out)} == {-1}
    with h5py.File(pcam.source / "camelyonpatch_level_2_split_valid_x.h5", "a") as file:
        file["y"] = np.arange(7)
    write.write(replace(pcam, out=pcam.out.with_name("some")))
    classes = json.loads((pcam.out.with_name("some") / "index.json").read_text())["datasets"][0]["classes"]
    assert classes == list("0123456")
    assert Counter((row["split"], row["label"] >= 0) for row in rows(pcam.out.with_name("some"))) == {
        ("train", False): 23, ("valid", True): 7}


def test_without_columns_every_image_stands_for_itself_and_names_may_tell_its_label(pcam: write.Settings) -> None:
    write.write(replace(pcam, columns={}, names=r"split_(?P<label>\w+)_[xy]\."))
    table_of = rows(pcam.out)
    assert len({row["slide"] for row in table_of}) == 30
    classes = json.loads((pcam.out / "index.json").read_text())["datasets"][0]["classes"]
    assert Counter(classes[row["label"]] for row in table_of) == {"train": 23, "valid": 7}


def test_the_slide_that_names_find_for_an_array_is_the_slide_of_its_images(pcam: write.Settings) -> None:
    """An HDF5 file a slide is how CLAM and others keep their tiles."""
    write.write(replace(pcam, columns={}, names=r"split_(?P<slide>\w+)_[xy]\."))
    assert Counter(row["slide"] for row in rows(pcam.out)) == {"train": 23, "valid": 7}


@pytest.mark.parametrize(("damage", "says"), [
    ("short y", r"valid_y\.h5: array 'y' is .* not one whole number or word for each of 7 images"),
    ("no y in it", r"valid_y\.h5: array 'y' is not there, not one"),
    ("floats", r"valid_x\.h5: array 'x' is float32 of shape \(7, 32, 32, 3\), not images .* of 8 bits; it has x"),
    ("channels first", r"array 'x' is uint8 of shape \(7, 3, 32, 32\), not images"),
    ("flat", r"array 'x' is uint8 of shape \(7, 3072\), not images"),
    ("another name", r"array 'x' is not there, not images.*it has data, more; name the right one with array="),
    ("a group", r"array 'x' is not there"),
    ("truncated", r"valid_x\.h5 is not a readable HDF5 file .*get it again, or unpack it first"),
    ("gzipped", r"valid_x\.h5 is not a readable HDF5 file"),
    ("short table", r"valid_meta\.csv has not one row for each of 7 images, with columns wsi"),
    ("other columns", r"valid_meta\.csv has not one row for each of 7 images, with columns wsi"),
    ("broken chunk", r"valid_x\.h5 is damaged"),
])
def test_an_array_that_is_not_what_it_should_be_is_refused_in_a_line(pcam: write.Settings, damage: str,
                                                                     says: str) -> None:
    stem = pcam.source / "camelyonpatch_level_2_split_valid"
    x, y = (stem.with_name(f"{stem.name}_{word}.h5") for word in "xy")
    images = images_of(pcam, "valid").astype(np.uint8)
    if damage in ("floats", "channels first", "flat", "another name", "a group"):
        x.unlink()
        with h5py.File(x, "w") as file:
            if damage == "another name":
                file["data"], file["more"] = images, images
            elif damage == "a group":
                file.create_group("x")
            else:
                file["x"] = {"floats": images.astype(np.float32), "channels first": np.moveaxis(images, 3, 1),
                             "flat": images.reshape(7, -1)}[damage]
    elif damage in ("short y", "no y in it"):
        y.unlink()
        with h5py.File(y, "w") as file:
            file["y" if damage == "short y" else "labels"] = np.zeros(6 if damage == "short y" else 7, np.uint8)
    elif damage in ("truncated", "gzipped"):
        content = x.read_bytes()
        x.write_bytes(content[:len(content) // 2] if damage == "truncated" else b"\x1f\x8b" + content)
    elif damage == "broken chunk":
        with h5py.File(x) as file:
            chunk = file["x"].id.get_chunk_info(0)
        content = bytearray(x.read_bytes())
        content[chunk.byte_offset:chunk.byte_offset + chunk.size] = bytes(chunk.size)
        x.write_bytes(content)
    else:
        lines = stem.with_name(f"{stem.name}_meta.csv").read_text().splitlines(keepends=True)
        stem.with_name(f"{stem.name}_meta.csv").write_text(
            "".join(lines[:-1]) if damage == "short table" else "".join(lines).replace("wsi", "slide"))
    with pytest.raises(index.ShardError, match=says) as caught:
        write.write(pcam)
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)
    assert not (pcam.out / "index.json").exists()


def test_a_damaged_array_may_be_allowed_for_and_is_recorded(pcam: write.Settings) -> None:
    x = pcam.source / "camelyonpatch_level_2_split_valid_x.h5"
    with h5py.File(x) as file:
        chunk = file["x"].id.get_chunk_info(0)
    content = bytearray(x.read_bytes())
    content[chunk.byte_offset:chunk.byte_offset + chunk.size] = bytes(chunk.size)
    x.write_bytes(content)
    done = write.write(replace(pcam, max_failed=1))
    assert done.samples == 23 and done.rejected == {"failed": 1}
    (line,) = [json.loads(line) for line in (pcam.out / "rejected.jsonl").read_text().splitlines()]
    assert line["file"] == x.name and "is damaged" in line["detail"]
