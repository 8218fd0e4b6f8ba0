"""Readers of outlined nuclei, on small files written as each dataset is published, and on MoNuSeg's own."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from shards import regions
from shards.index import ShardError

# Three nuclei, two of them touching; numbers as a program leaves them, with gaps.
NUMBERS = np.zeros((40, 50), np.int32)
NUMBERS[5:15, 5:15], NUMBERS[5:15, 15:22], NUMBERS[25:35, 30:45] = 7, 3, 90
WHOLE = np.zeros_like(NUMBERS)
for _rank, _number in enumerate((3, 7, 90), start=1):
    WHOLE[_number == NUMBERS] = _rank
TYPES = np.where(NUMBERS == 90, 2, (NUMBERS > 0) * 1).astype(np.uint8)


def picture(path: Path, seed: int = 0, shape: tuple[int, ...] = (40, 50, 3)) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def same(found: np.ndarray, truth: np.ndarray) -> bool:
    """Whether two maps part the pixels alike, whatever the numbers."""
    pairs = {*zip(found.ravel().tolist(), truth.ravel().tolist(), strict=True)}
    return len(pairs) == len({one for one, _ in pairs}) == len({other for _, other in pairs}) and (0, 0) in pairs


def test_consep_has_an_image_a_mat_and_seven_types(tmp_path: Path) -> None:
    pixels = picture(tmp_path / "CoNSeP" / "Train" / "Images" / "train_1.png")
    picture(tmp_path / "CoNSeP" / "Train" / "Overlay" / "train_1.png", 1)
    labels = tmp_path / "CoNSeP" / "Train" / "Labels"
    labels.mkdir()
    scipy.io.savemat(labels / "train_1.mat", {"inst_map": NUMBERS.astype(np.float64), "type_map": TYPES.astype(float),
                                              "inst_type": np.array([[1.0], [1.0], [2.0]])})
    known = regions.found(tmp_path)
    read = known.regions[0].read()
    assert (known.form, known.classes[0], len(known.classes)) == ("mat", "other", 7)
    assert (known.regions[0].name, known.regions[0].split) == ("CoNSeP/Train/Images/train_1", "train")
    assert (read.image_HW3 == pixels).all() and (read.instances_HW == WHOLE).all() and (read.types_HW == TYPES).all()


def test_kumar_as_a_mat_has_no_types_and_its_patient_in_the_name(tmp_path: Path) -> None:
    picture(tmp_path / "kumar" / "test_diff" / "Images" / "TCGA-RD-A8N9-01A-01-TS1.tif")
    labels = tmp_path / "kumar" / "test_diff" / "Labels"
    labels.mkdir()
    scipy.io.savemat(labels / "TCGA-RD-A8N9-01A-01-TS1.mat", {"inst_map": NUMBERS})
    known = regions.found(tmp_path)
    assert known.classes == [] and known.regions[0].read().types_HW is None
    assert (known.regions[0].patient, known.regions[0].split) == ("TCGA-RD-A8N9", "test_diff")


def test_pannuke_has_a_channel_a_type_and_numbers_that_repeat_between_them(tmp_path: Path) -> None:
    images, masks = tmp_path / "Fold 1" / "images" / "fold1", tmp_path / "Fold 1" / "masks" / "fold1"
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3)).astype(np.float64)
    planes = np.zeros((2, 40, 50, 6))
    planes[1, 5:15, 5:15, 0], planes[1, 5:15, 15:22, 0] = 1, 4
    planes[1, 25:35, 30:45, 4] = 1
    planes[..., 5] = planes[..., :5].sum(axis=-1) == 0
    np.save(images / "images.npy", pixels)
    np.save(images / "types.npy", np.array(["Breast", "Colon"]))
    np.save(masks / "masks.npy", planes)
    known = regions.found(tmp_path)
    assert (known.form, known.classes[4], len(known.regions)) == ("pannuke", "epithelial", 2)
    assert {each.split for each in known.regions} == {"fold1"}
    assert [each.tissue for each in known.regions] == ["Breast", "Colon"]
    empty, read = (each.read() for each in known.regions)
    assert empty.count == 0 and (empty.image_HW3 == pixels[0]).all()
    assert same(read.instances_HW, NUMBERS) and (read.types_HW == np.where(TYPES == 2, 5, TYPES)).all()


def test_an_array_of_python_objects_is_refused_and_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "sprung",))

    np.save(tmp_path / "images.npy", np.zeros((1, 8, 8, 3)))
    np.save(tmp_path / "masks.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(ShardError, match=r"masks\.npy is not an array of numbers"):
        regions.found(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_dsb_has_a_folder_an_image_and_a_file_a_nucleus(tmp_path: Path) -> None:
    home = tmp_path / "stage1_train" / "0a1b"
    picture(home / "images" / "0a1b.png", shape=(40, 50, 4))
    (home / "masks").mkdir()
    for number in (3, 7, 90):
        Image.fromarray(((number == NUMBERS) * 255).astype(np.uint8)).save(home / "masks" / f"{number}f.png")
    known = regions.found(tmp_path)
    assert (known.form, known.regions[0].name) == ("pieces", "stage1_train/0a1b")
    assert same(known.regions[0].read().instances_HW, NUMBERS)


@pytest.mark.parametrize("form", ["png16", "tif", "npy", "colour", "binary"])
def test_any_folder_of_images_and_maps(tmp_path: Path, form: str) -> None:
    picture(tmp_path / "images" / "a.jpg")
    labels, truth = tmp_path / "labels", NUMBERS
    labels.mkdir()
    if form == "png16":
        Image.fromarray(NUMBERS.astype(np.uint16)).save(labels / "a.png")
    elif form == "tif":
        Image.fromarray(NUMBERS).save(labels / "a.tif")
    elif form == "npy":
        np.save(labels / "a.npy", NUMBERS.astype(np.uint16))
    elif form == "colour":
        colours = np.stack([NUMBERS, NUMBERS // 2, NUMBERS * 2], axis=-1).astype(np.uint8)
        colours[0, 0] = 9       # a crumb, which is no nucleus
        Image.fromarray(colours).save(labels / "a.png")
    else:       # of nuclei that touch nobody can tell
        Image.fromarray(((NUMBERS > 0) * 255).astype(np.uint8)).save(labels / "a.png")
        truth = np.where(NUMBERS == 90, 2, (NUMBERS > 0) * 1)
    read = regions.found(tmp_path).regions[0].read()
    assert same(read.instances_HW, truth)
    assert sorted(np.unique(read.instances_HW)) == list(range(read.count + 1))


def test_maps_of_types_are_named_by_a_file_beside_them(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png")
    for name, values in (("labels", NUMBERS), ("types", TYPES)):
        (tmp_path / name).mkdir()
        Image.fromarray(values.astype(np.uint8)).save(tmp_path / name / "a.png")
    with pytest.raises(ShardError, match=r"has types and no classes\.txt"):
        regions.found(tmp_path)
    (tmp_path / "classes.txt").write_text("round\noblong\n")
    known = regions.found(tmp_path)
    assert known.classes == ["round", "oblong"] and (known.regions[0].read().types_HW == TYPES).all()


def test_polygons_of_imagescope_are_drawn_where_they_are_packed_too(tmp_path: Path) -> None:
    corners = {7: [(5, 5), (15, 5), (15, 15), (5, 15)], 3: [(15, 5), (22, 5), (22, 15), (15, 15)],
               90: [(30, 25), (45, 25), (45, 35), (30, 35)]}
    rings = "".join(f"<Region Id='{number}'><Vertices>" + "".join(f"<Vertex X='{x}' Y='{y}'/>" for x, y in ring)
                    + "</Vertices></Region>" for number, ring in corners.items())
    text = f"<Annotations><Annotation Id='1'><Regions>{rings}</Regions></Annotation></Annotations>"
    picture(tmp_path / "Tissue Images" / "TCGA-A7-A13E-01Z-00-DX1.tif")
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "TCGA-A7-A13E-01Z-00-DX1.xml.gz").write_bytes(gzip.compress(text.encode()))
    known = regions.found(tmp_path)
    assert (known.form, known.regions[0].patient) == ("polygons", "TCGA-A7-A13E")
    assert same(known.regions[0].read().instances_HW, NUMBERS)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no labelled regions below"):
        regions.found(tmp_path)
    (tmp_path / "labels").mkdir()
    np.save(tmp_path / "labels" / "a.npy", NUMBERS)
    with pytest.raises(ShardError, match=r"a\.npy has no image"):
        regions.found(tmp_path)
    picture(tmp_path / "images" / "a.png")
    picture(tmp_path / "images" / "b.png")
    assert regions.found(tmp_path).remarks == [
        "1 of 2 images have no labels of this form and are left out, first b.png"]
    picture(tmp_path / "images" / "a.png", shape=(20, 20, 3))
    with pytest.raises(ShardError, match="they belong to different pictures"):
        regions.found(tmp_path)
    np.save(tmp_path / "labels" / "a.npy", NUMBERS[:20, :20] + 0.5)
    with pytest.raises(ShardError, match="numbers that are no counts"):
        regions.found(tmp_path).regions[0].read()


def test_monuseg_polygons_and_colour_masks_agree(data: Path) -> None:
    """The masks in colour were drawn by somebody else: a pixel wider all around, and overlaps fall into pieces."""
    folder = data / "monuseg2018" / "train"
    drawn, coloured = (regions.found(folder, form).regions for form in ("polygons", "maps"))
    assert (len(drawn), len(coloured), len({each.patient for each in coloured})) == (13, 30, 30)
    other = next(each for each in coloured if each.name == drawn[0].name).read().instances_HW
    one = drawn[0].read().instances_HW
    best = [max((np.sum((one == number) & (other == each)) / np.sum((one == number) | (other == each))
                 for each in np.unique(other[one == number]) if each), default=0) for number in range(1, one.max() + 1)]
    assert np.mean(np.array(best) > 0.5) > 0.98 and np.median(best) > 0.88


@pytest.mark.parametrize(("name", "split"), [
    ("latest/images/a", ""), ("untrained/a", ""), ("Train/a", "train"), ("x/test_same/a", "test_same"),
    ("Fold 1/a", "fold1"), ("MoNuSegTestData/a", "test"), ("MoNuSegTrainingData/a", "train"), ("validation/a", "valid"),
    ("contest/a", "")])
def test_a_split_is_a_word_of_a_folder_and_no_part_of_one(name: str, split: str) -> None:
    found = regions.SPLIT.search(name.rpartition("/")[0])
    assert (found[0].lower().replace(" ", "") if found else "") == split
