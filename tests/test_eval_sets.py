"""The papers' evaluation sets: each as it is published but small, through the two commands that its preset says."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from shards import catalogue, check, index
from ssl_dist import cli, config
from ssl_dist.models.encoder import Encoder

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
PRESETS, RECORDS, REGISTRY = CONFIGS / "eval" / "sets", CONFIGS / "shards" / "sets", CONFIGS / "datasets"
NAMES = "bach", "breakhis", "crc", "gleason", "mhist", "pcam"
PROTOCOLS = {"knn": ["k=3"], "low": ["shares=[0.5]", "draws=2"], "sgd": ["steps=20"],
             "finetune": ["batch=16", "epochs=1"]}

# As kaiko-ai/eva writes them (bach.py, breakhis.py): places in the sorted list of 400 files; numbers of patients.
BACH_TRAIN = (0, 41), (59, 60), (90, 139), (169, 240), (258, 260), (273, 345), (368, 400)
BACH_VAL = (41, 59), (60, 90), (139, 169), (240, 258), (260, 273), (345, 368)
BREAKHIS_VAL = ("18842D 19979 15275 15792 16875 3909 5287 16716 2773 5695 16184CD 23060CD 21998CD "     # noqa: SIM905
                "21998EF").split()
# Classes in the order of their names, as shards number them.
COLOURS = [(200, 40, 60), (40, 180, 80), (60, 80, 220), (220, 200, 40), (180, 60, 200), (40, 200, 210), (235, 140, 30),
           (120, 120, 120), (30, 30, 40)]


class Tile(NamedTuple):
    """What a source says of a picture."""

    split: str
    label: str
    slide: str
    patient: str = ""


def pixels(kind: int, seed: int, size: int = 24) -> np.ndarray:
    """Noise in the colour of a class, which tells the label; eleven of each, for a published set keeps its copies."""
    noise = np.random.default_rng(seed % 11).integers(-24, 25, (size, size, 3))
    return np.clip(np.array(COLOURS[kind]) + noise, 0, 255).astype(np.uint8)


def put(path: Path, kind: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(kind, seed)).save(path)


# --- each set as it lies, and what its source says of every picture


def bach(folder: Path) -> list[Tile]:
    photos = folder / "ICIAR2018_BACH_Challenge" / "Photos"
    classes = {"Benign": "b", "InSitu": "is", "Invasive": "iv", "Normal": "n"}
    for (kind, (label, begin)), number in itertools.product(enumerate(classes.items()), range(1, 101)):
        put(photos / label / f"{begin}{number:03d}.tif", kind, 100 * kind + number)
    (photos / "microscopy_ground_truth.csv").write_text("b001.tif,Benign\n")
    put(photos.parent / "WSI" / "gt_thumbnails" / "A01.png", 0, 1)
    put(folder / "ICIAR2018_BACH_Challenge_TestDataset" / "Photos" / "test0.tif", 0, 1)
    ranges = {"train": BACH_TRAIN, "test": BACH_VAL}
    split = {place: name for name, found in ranges.items() for pair in found for place in range(*pair)}
    return [Tile(split[place], path.parent.name, path.stem) for place, path in enumerate(sorted(photos.rglob("*.tif")))]


def breakhis(folder: Path) -> list[Tile]:
    """Of each of 64 patients what it has at 40x, but at most three, and some of what eva leaves out."""
    breast, tiles = folder / "BreaKHis_v1" / "histology_slides" / "breast", []
    kinds = {"DC": "malignant/SOB/ductal_carcinoma", "F": "benign/SOB/fibroadenoma",
             "MC": "malignant/SOB/mucinous_carcinoma", "TA": "benign/SOB/tubular_adenoma/SOB_B_A_14-21978AB"}
    for slide, images in listed("breakhis", "images"):
        subtype, number = re.fullmatch(r"SOB_[BM]_(\w+)-14-(\w+)", slide).groups()
        home = breast / kinds[subtype] / slide.replace("-14", "_14")
        put(home / "100X" / f"{slide}-100-001.png", 0, 1)
        for image in range(1, min(int(images), 3) + 1):
            put(home / "40X" / f"{slide}-40-{image:03d}.png", list(kinds).index(subtype), len(tiles))
            tiles.append(Tile("test" if number in BREAKHIS_VAL else "train", subtype, slide, f"14-{number}"))
    put(breast / "benign/SOB/adenosis/SOB_B_A_14-22549AB/40X/SOB_B_A-14-22549AB-40-001.png", 0, 1)
    put(breast / "malignant/SOB/papillary_carcinoma/SOB_M_PC_15-190EF/40X/SOB_M_PC-15-190EF-40-001.png", 0, 1)
    return tiles


def crc(folder: Path) -> list[Tile]:
    classes = "ADI BACK DEB LYM MUC MUS NORM STR TUM".split()       # noqa: SIM905
    tiles = []
    for half, count in (("NCT-CRC-HE-100K", 12), ("CRC-VAL-HE-7K", 4)):
        for (kind, label), number in itertools.product(enumerate(classes), range(count)):
            name = f"{label}-{'TCGA-' * (half[0] == 'C')}{'AIKLQRSTVWYH'[number]}AAFLCL"
            put(folder / half / label / f"{name}.tif", kind, len(tiles))
            put(folder / "NCT-CRC-HE-100K-NONORM" / label / f"{name}.tif", 0, len(tiles))
            tiles.append(Tile(half, label, name))
    return tiles


def gleason(folder: Path) -> list[Tile]:
    """As the authors' script leaves it: of the test array a folder for each of two pathologists, who disagree."""
    arrays = {"ZT111_4_A": "train", "ZT199_1_B": "train", "ZT204_6_B": "train", "ZT76_39_A": "valid",
              "ZT80_38_C": "test"}
    tiles = []
    for (array, split), core, grade in itertools.product(arrays.items(), range(1, 6), range(4)):
        name = f"{array}_{core}_{core + 1}"
        home = folder / ("test_patches_750/patho_1" if split == "test" else "train_validation_patches_750") / name
        put(home / f"{name}_patch_{10 * core + grade}_class_{grade}.jpg", grade, len(tiles))
        put(folder / "TMA_images" / f"{name}.jpg", 0, 1)
        put(folder / "Gleason_masks_train" / f"mask_{name}.png", 0, 1)
        if split == "test":
            other = folder / "test_patches_750" / "patho_2" / name
            put(other / f"{name}_patch_{10 * core + grade}_class_{(grade + 1) % 4}.jpg", grade, len(tiles))
        tiles.append(Tile(split, str(grade), name))
    return tiles


def mhist(folder: Path) -> list[Tile]:
    lines, tiles = ["Image Name,Majority Vote Label,Number of Annotators who Selected SSA (Out of 7),Partition"], []
    for number, (first, second) in enumerate(itertools.product("abcdef", "abcdefg")):
        name, votes = f"MHIST_{first}a{second}", number % 8
        label, split = "SSA" if votes > 3 else "HP", "test" if number % 3 == 2 else "train"
        put(folder / "images" / f"{name}.png", ("HP", "SSA").index(label), number)
        lines.append(f"{name}.png,{label},{votes},{split}")
        tiles.append(Tile(split, label, name))
    (folder / "annotations.csv").write_text("\n".join(lines) + "\n")
    return tiles


def pcam(folder: Path) -> list[Tile]:
    folder.mkdir(parents=True)
    tiles = []
    for split, count in (("train", 40), ("valid", 12), ("test", 12)):
        begin, labels = folder / f"camelyonpatch_level_2_split_{split}", np.arange(count) % 2
        slides = [f"camelyon16_{split}_normal_{number // 4:03d}" for number in range(count)]
        with h5py.File(f"{begin}_x.h5", "w") as file:
            file["x"] = np.stack([pixels(label, number) for number, label in enumerate(labels)])
        with h5py.File(f"{begin}_y.h5", "w") as file:
            file["y"] = labels.astype(np.uint8).reshape(count, 1, 1, 1)
        Path(f"{begin}_meta.csv").write_text(",coord_y,coord_x,tumor_patch,center_tumor_patch,wsi\n" + "".join(
            f"{number},{96 * number},0,True,{labels[number] == 1},{slide}\n" for number, slide in enumerate(slides)))
        tiles += [Tile(split, str(label), slide) for label, slide in zip(labels, slides, strict=True)]
    return tiles


TREES: dict[str, Callable[[Path], list[Tile]]] = {each.__name__: each for each in (bach, breakhis, crc, gleason, mhist,
                                                                                  pcam)}


def listed(name: str, column: str) -> Iterator[tuple[str, str]]:
    """A column of a CSV of splits, by slide."""
    head, *rows = [line.split(",") for line in (RECORDS / f"{name}.csv").read_text().splitlines()]
    return ((row[0], row[head.index(column)]) for row in rows)


def commands(name: str) -> list[list[str]]:
    """The words of the two commands in a preset's first comment."""
    found = re.findall(r"^#   ssl-dist (.+)$", (PRESETS / f"{name}.yaml").read_text(), re.MULTILINE)
    assert [line.split()[0] for line in found] == ["shard", "eval"]
    return [line.split() for line in found]


def ssl_dist(*words: str) -> Result:
    done = CliRunner().invoke(cli.app, list(words))
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture
def encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An untrained one where the presets look for a run's, from the folder that we are in."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    folder = tmp_path / "runs" / "first" / "encoder"
    Encoder("test_resnet", {}, (0.5,) * 3, (0.5,) * 3).save(folder, 32, {})
    return folder


def told(name: str, *words: str) -> Any:
    return config.load_eval(f"eval/sets/{name}", list(words))


# --- through both commands


@pytest.mark.parametrize("name", NAMES)
def test_every_picture_is_in_the_split_that_the_source_says_and_the_preset_asks_about_it(
        name: str, encoder: Path, tmp_path: Path) -> None:
    """The commands are taken from the preset's comment as they stand, FOLDER and all."""
    truth = TREES[name](tmp_path / "FOLDER" / "where" / "it" / "was" / "unpacked")
    shard, evaluate = commands(name)
    done = ssl_dist(*shard)
    assert "no row in" not in done.output + (done.stderr or "")
    out = tmp_path / next(word.removeprefix("out=") for word in shard if word.startswith("out="))
    assert not check.check(out)
    rows = index.samples(out).to_pydict()
    classes = index.read(out).datasets[0]["classes"]
    found = [Tile(split, classes[label], slide, patient) for split, label, slide, patient in
             zip(*(rows[word] for word in ("split", "label", "slide", "patient")), strict=True)]
    assert Counter(found) == Counter(truth)
    assert classes == sorted({tile.label for tile in truth})

    settings = told(name)
    splits = {part: [tile for tile in found if tile.split == getattr(settings.data, part)]
              for part in ("bank", "valid", "query")}
    if not settings.data.valid:
        assert not splits.pop("valid")
    assert sum(map(len, splits.values())) == len(truth), "no picture is left over"
    for one, other in itertools.combinations(splits.values(), 2):
        assert not {tile.slide for tile in one} & {tile.slide for tile in other}
        assert not {tile.patient for tile in one} & {tile.patient for tile in other} - {""}
    assert {frozenset(tile.label for tile in part) for part in splits.values()} == {frozenset(classes)}

    ssl_dist(*evaluate, "device=cpu", "threads=2")
    result = json.loads((encoder.parent / "eval" / "linear.json").read_text())
    patients = {part: len({tile.patient for tile in tiles} - {""}) for part, tiles in splits.items()}
    assert result["classes"] == classes and result["protocol"] == "linear"
    counts = {"bank": len(splits["bank"]), "queries": len(splits["query"]), "bank_patients": patients["bank"],
              "query_patients": patients["query"], "shared_patients": 0,
              "unknown_patients": sum(not tile.patient for tile in splits["query"])}
    assert {word: result["counts"][word] for word in counts} == counts
    assert np.array(result["confusion"]).sum(axis=1).tolist() == [
        sum(tile.label == label for tile in splits["query"]) for label in classes]
    # The classes are colours here: whoever had a label wrong would be wrong.
    assert result["metrics"]["accuracy"] > 0.98
    assert ("quadratic_kappa" in result["metrics"]) == (name == "gleason")


def test_a_set_can_be_asked_about_by_every_protocol(encoder: Path, tmp_path: Path) -> None:
    pcam(tmp_path / "FOLDER")
    shard, evaluate = commands("pcam")
    ssl_dist(*shard)
    for protocol, words in PROTOCOLS.items():
        ssl_dist(*evaluate, "device=cpu", "threads=2", f"protocol={protocol}", *words)
        result = json.loads((encoder.parent / "eval" / f"{protocol}.json").read_text())
        assert (result["protocol"], result["counts"]["bank"], result["counts"]["queries"]) == (protocol, 40, 12)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", NAMES)
def test_no_preset_forbids_a_protocol(name: str, protocol: str, tmp_path: Path) -> None:
    settings = told(name, f"encoder={tmp_path}", f"data.shards=[{tmp_path}]", f"protocol={protocol}")
    assert settings.protocol == protocol and settings.baselines == ["random"]


# --- the lists


def test_the_photographs_of_bach_are_split_as_evas_ranges_say() -> None:
    splits = dict(listed("bach", "split"))
    assert len(splits) == 400 and Counter(splits.values()) == {"train": 268, "test": 132}
    assert sorted(place for pair in (*BACH_TRAIN, *BACH_VAL) for place in range(*pair)) == list(range(400))
    assert [splits[name] for name in ("b041", "b042", "b060", "is039", "is040", "iv059", "iv060", "n045", "n046")] == [
        "train", "test", "train", "train", "test", "train", "train", "train", "test"]


def test_the_patients_of_breakhis_are_evas_and_have_as_many_photographs_as_it_counts() -> None:
    splits, images = dict(listed("breakhis", "split")), dict(listed("breakhis", "images"))
    test = {slide for slide, split in splits.items() if split == "test"}
    assert {slide.rpartition("-")[2] for slide in test} == set(BREAKHIS_VAL) and len(test) == len(BREAKHIS_VAL)
    assert sum(int(images[slide]) for slide in test) == 339
    assert sum(int(images[slide]) for slide in splits.keys() - test) == 1132
    assert Counter(slide.split("-")[0] for slide in splits) == {"SOB_B_F": 10, "SOB_B_TA": 7, "SOB_M_DC": 38,
                                                                "SOB_M_MC": 9}


# --- what is said of them


def test_the_presets_are_those_of_six_sets_and_what_they_need_lies_in_one_place() -> None:
    assert {path.stem for path in PRESETS.iterdir()} == set(NAMES)
    assert {path.name for path in RECORDS.iterdir()} == {
        "bach.csv", "bach.yaml", "breakhis.csv", "breakhis.yaml", "gleason.yaml", "mhist.yaml"}
    for path in (*PRESETS.glob("*.yaml"), *RECORDS.glob("*.yaml")):
        lines = path.read_text().splitlines()
        assert len(lines) <= 40 and max(map(len, lines)) <= 120, path


@pytest.mark.parametrize(("name", "whose"), [
    ("bach", "No official split can be scored"), ("breakhis", "It is not the authors' own"),
    ("crc", "are the official split"), ("gleason", "The split is theirs"), ("mhist", "is the official split"),
    ("pcam", "are the official split")])
def test_a_preset_says_whose_split_it_is_and_how_sure_that_is(name: str, whose: str) -> None:
    comment = " ".join(line.lstrip("# ") for line in (PRESETS / f"{name}.yaml").read_text().splitlines()
                       if line.startswith("#"))
    assert whose in comment and re.search(r"\((quoted|confirmed): ", comment)
    shard, evaluate = commands(name)
    assert shard[1] in (f"shards/sets/{name}", "datasets/nct-crc-he", "datasets/pcam")
    assert evaluate[1] == f"eval/sets/{name}"
    assert told(name, "encoder=.", "data.shards=[.]").data.valid == ("valid" if name in ("pcam", "gleason") else "")


@pytest.mark.parametrize("name", ["bach", "breakhis", "gleason", "mhist"])
def test_every_fact_of_a_sets_record_has_a_source_that_the_readme_explains(name: str) -> None:
    record, readme = catalogue.read(RECORDS / f"{name}.yaml"), (REGISTRY / "README.md").read_text()
    assert list(record.facts) == [each for each in catalogue.FACTS if each in record.facts]
    assert {"organ", "stain", "licence", "where", "layout", "labels", "patients"} <= record.facts.keys()
    for mark in {mark for fact in record.facts.values() for mark in re.split(", ", fact.source.partition(":")[0])}:
        assert f"\n| {mark} |" in readme
    assert record.shard["duplicates"] == "keep", "the set as it is published"
    if name == "mhist":
        assert "none" in record.fact("membership")
    else:
        other = catalogue.read(REGISTRY / f"{ {'gleason': 'gleason-arvaniti'}.get(name, name)}.yaml")
        assert {record.fact(each) for each in ("licence", "organ", "where")} == {
            other.fact(each) for each in ("licence", "organ", "where")}


@pytest.mark.parametrize("name", ["bach", "breakhis"])
def test_slides_and_patients_are_called_as_where_an_encoder_is_pretrained_on_them(name: str) -> None:
    """Else an encoder that saw them would not be found out."""
    names = catalogue.read(REGISTRY / f"{name}.yaml").shard["names"]
    for path, known in catalogue.read(RECORDS / f"{name}.yaml").example.items():
        if isinstance(known, dict):
            found = {"slide": Path(path).stem, "patient": "", **re.search(names, path).groupdict()}
            assert known.get("slide", Path(path).stem) == found["slide"]
            assert known.get("patient", "") == found["patient"]
