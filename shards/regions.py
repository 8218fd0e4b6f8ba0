"""Regions in which every nucleus (or cell, or gland) is outlined: an image, a number a pixel, perhaps a type.

Published in five ways, told apart by the files below a folder, and read without running anything that they hold:

    polygons   MoNuSeg, Kumar         an XML of ImageScope's an image (.xml, .xml.gz), anywhere beside the images
    mat        CoNSeP, HoVer-Net's    Labels/NAME.mat: inst_map, perhaps type_map
    pannuke    PanNuke                images.npy and masks.npy a fold: a channel a type, the last of them background
    pieces     DSB 2018               NAME/images/NAME.png, and a file an object in NAME/masks/
    maps       any other              labels/NAME.png, .tif or .npy: numbers, or a colour an object, or a binary mask

H, W pixels   N images
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from PIL import Image
from scipy import ndimage

from shards import annotation, sources, tiles
from shards.index import ShardError
from shards.slide import SlideError

PICTURES = sources.SUFFIXES["regions"]
MAPS = (".png", ".tif", ".tiff", ".bmp", ".npy")
# Folders of label maps, and of images that are no images of tissue; both in lower case.
LABELS = ("labels", "label", "masks", "mask", "instances", "masks_instance_colour", "masks_binary")
TYPES = "types"
NOT_TISSUE = (*LABELS, TYPES, "overlay", "overlays", "annotations", "annotations_xml")
# A split is a folder's name, or a part that begins like a word: Train, test_same, Fold 1, validation, MoNuSegTestData;
# not latest, nor untrained.
SPLIT = re.compile(r"(?<![A-Za-z])(?i:train|test_same|test_diff|test|valid|fold ?\d)|Train|Test|Valid|Fold ?\d")
# One colour an object still leaves crumbs where objects lie over each other: pieces smaller than this are none.
CRUMB = 20              # pixels, as the copies of MoNuSeg that have such masks need it
CLASSES = {
    # CoNSeP's own seven, as its README counts them from 1.
    "mat": ["other", "inflammatory", "healthy epithelial", "malignant epithelial", "fibroblast", "muscle",
            "endothelial"],
    "pannuke": ["neoplastic", "inflammatory", "connective", "dead", "epithelial"],
}


@dataclass
class Pixels:
    """What is known of a region: RGB, which object a pixel belongs to (0: none), and what it is (1 is classes[0])."""

    image_HW3: np.ndarray                       # uint8
    instances_HW: np.ndarray                    # int32, numbers from 1 on
    types_HW: np.ndarray | None = None          # uint8, 0 where nothing is, or nobody says

    @property
    def count(self) -> int:
        """How many objects there are."""
        return int(self.instances_HW.max(initial=0))


@dataclass(frozen=True)
class Region:
    """One region, before it is read."""

    name: str
    patient: str                        # "" where nobody says
    split: str                          # of the folder's name, in lower case; "" where it has none
    tissue: str                         # "" where nobody says
    _read: Callable[[], Pixels] = field(repr=False, compare=False)

    def read(self) -> Pixels:
        """Opens it; a file that is not what its form says is refused by its name."""
        try:
            found = self._read()
        except MemoryError:
            raise
        except (ShardError, SlideError):
            raise
        except Exception as error:      # of decoders each has exceptions of its own
            raise ShardError(f"region {self.name} cannot be read ({' '.join(str(error).split())}); get it again, or "
                             "move it away") from None
        if found.image_HW3.shape[:2] != found.instances_HW.shape or (
                found.types_HW is not None and found.types_HW.shape != found.instances_HW.shape):
            raise ShardError(f"region {self.name}: its image has {found.image_HW3.shape[:2]} pixels (rows, columns), "
                             f"its labels {found.instances_HW.shape}; they belong to different pictures")
        return found


@dataclass
class Set:
    """All regions below a folder, in the order of their names."""

    form: str
    regions: list[Region]
    classes: list[str]                  # of their types; none where there are none
    remarks: list[str] = field(default_factory=list)


def found(folder: Path, form: str = "", names: str = "") -> Set:
    """The regions below a folder, in the `form` that is named or that its files have.

    `names`: a regular expression searched in a region's path, whose groups patient and split say what they say.
    """
    if not folder.is_dir():
        raise ShardError(f"no folder of regions at {folder} (looked in {Path.cwd()})")
    if form and form not in FORMS:
        raise ShardError(f"form={form!r} of regions is not one of {', '.join(FORMS)}")
    for kind in [form] if form else FORMS:
        remarks: list[str] = []
        if pairs := FORMS[kind](folder, remarks):
            tissues = _tissues(folder) if kind == "pannuke" else {}
            regions = [_named(name, names, tissues.get(name, ""), read)
                       for name, read in sorted(pairs, key=lambda pair: pair[0])]
            if len({region.name for region in regions}) < len(regions):
                raise ShardError(f"two regions below {folder} have one name; rename one")
            typed = kind == "pannuke" or any(region.read().types_HW is not None for region in regions)
            return Set(kind, regions, _classes(folder, kind) if typed else [], remarks)
    raise ShardError(f"no labelled regions {'of form ' + form + ' ' if form else ''}below {folder}: images beside XML "
                     "of ImageScope, Labels/*.mat, images.npy with masks.npy, NAME/images with NAME/masks, or images/ "
                     "with labels/ of the same names")


def _named(name: str, names: str, tissue: str, read: Callable[[], Pixels]) -> Region:
    known: dict[str, str] = {}
    if names:
        match = re.search(names, name)
        if match is None:
            raise ShardError(f"names={names!r} does not match {name!r}; correct the expression")
        known = {key: word for key, word in match.groupdict().items() if word is not None}
    barcode = sources.TCGA.search(name)
    split = SPLIT.search(name.rpartition("/")[0])
    return Region(name, known.get("patient", barcode[0] if barcode else ""),
                  known.get("split", split[0].lower().replace(" ", "") if split else ""), tissue, read)


def _classes(folder: Path, kind: str) -> list[str]:
    """What types are called: of any other folder by a line each of classes.txt."""
    path = folder / "classes.txt"
    if path.is_file():
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if kind not in CLASSES:
        raise ShardError(f"{folder} has types and no classes.txt; write one, a line a class, the first for 1")
    return CLASSES[kind]


# --- the five forms: each gives names and what reads them, or nothing where it finds no file of its own

Pairs = list[tuple[str, Callable[[], Pixels]]]


def _below(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    return [Path(path) for path in sources.files(folder, suffixes)]


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _paired(folder: Path, labels: list[Path], remarks: list[str]) -> list[tuple[Path, Path]]:
    """The image of each file of labels: the same name up to its first suffix, and of several the nearest."""
    images: dict[str, list[Path]] = {}
    for path in _below(folder, PICTURES):
        if not {part.lower() for part in path.relative_to(folder).parts[:-1]} & {*NOT_TISSUE}:
            images.setdefault(path.stem, []).append(path)
    pairs, used = [], set()
    for label in labels:
        stem = label.name.removesuffix(".gz").rpartition(".")[0]
        near = sorted(images.get(stem, []), key=lambda path: -len(_common(path, label)))
        if not near:
            raise ShardError(f"{label} has no image: none below {folder} is called {stem} and ends in "
                             f"{', '.join(PICTURES)}")
        if len(near) > 1 and len(_common(near[0], label)) == len(_common(near[1], label)):
            raise ShardError(f"{label} may be of {near[0]} or of {near[1]}; move one away")
        pairs.append((near[0], label))
        used.add(near[0])
    if alone := [path for paths in images.values() for path in paths if path not in used]:
        remarks.append(f"{len(alone)} of {len(alone) + len(used)} images have no labels of this form and are left out, "
                       f"first {min(alone).name}")
    return pairs


def _common(one: Path, other: Path) -> list[str]:
    return [mine for mine, its in zip(one.parts, other.parts, strict=False) if mine == its]


def _polygons(folder: Path, remarks: list[str]) -> Pairs:
    labels = _below(folder, (".xml", ".xml.gz"))
    return [(_relative(image, folder), partial(_drawn, image, label))
            for image, label in _paired(folder, labels, remarks)] if labels else []


def _drawn(image: Path, label: Path) -> Pixels:
    pixels = picture(image)
    return Pixels(pixels, drawn(annotation.shapes_of(label), pixels.shape[1], pixels.shape[0]))


def drawn(shapes: list[annotation.Shape], width: int, height: int) -> np.ndarray:
    """A number a shape, in their order; what lies over another takes its pixels, and what is left without any goes."""
    numbers_HW = np.zeros((height, width), np.int32)
    for number, shape in enumerate(shapes, start=1):
        low, high = np.floor(shape.outline.min(axis=0)).astype(int), np.ceil(shape.outline.max(axis=0)).astype(int)
        left, top = np.clip(low, 0, (width, height))
        right, bottom = np.clip(high, 0, (width, height))
        if right > left and bottom > top:
            stencil = annotation.inside(shape.outline - (left, top), right - left, bottom - top)
            numbers_HW[top:bottom, left:right][stencil] = number
    return _counted(numbers_HW)


def _mat(folder: Path, remarks: list[str]) -> Pairs:
    labels = _below(folder, (".mat",))
    return [(_relative(image, folder), partial(_matlab, image, label))
            for image, label in _paired(folder, labels, remarks)] if labels else []


def _matlab(image: Path, label: Path) -> Pixels:
    told = scipy.io.loadmat(label)
    if "inst_map" not in told:
        raise ValueError(f"{label.name} has no inst_map: it holds {', '.join(key for key in told if key[0] != '_')}")
    types = told.get("type_map")
    return Pixels(picture(image), _counted(_whole(told["inst_map"], label)),
                  None if types is None else _whole(types, label).astype(np.uint8))


def _pannuke(folder: Path, remarks: list[str]) -> Pairs:      # noqa: ARG001
    pairs: Pairs = []
    images = [path for path in _below(folder, (".npy",)) if path.name == "images.npy"]
    masks = [path for path in _below(folder, (".npy",)) if path.name == "masks.npy"]
    for path in images:
        near = sorted(masks, key=lambda other: -len(_common(path, other)))
        if not near or (len(near) > 1 and len(_common(path, near[0])) == len(_common(path, near[1]))):
            raise ShardError(f"{path} has no masks.npy of its own beside it, or in its fold's folder")
        count = len(_array(path, 4))
        if _array(near[0], 4).shape[:3] != _array(path, 4).shape[:3]:
            raise ShardError(f"{path} and {near[0]} are of different folds: they have {_array(path, 4).shape} and "
                             f"{_array(near[0], 4).shape} numbers")
        base = _relative(path.parent, folder)
        pairs += [(f"{base}/{number:05}", partial(_patch, path, near[0], number)) for number in range(count)]
    return pairs


def _tissues(folder: Path) -> dict[str, str]:
    """What types.npy beside images.npy calls each image; nothing where it is saved as Python's objects."""
    found: dict[str, str] = {}
    for path in _below(folder, (".npy",)):
        if path.name == "types.npy":
            try:
                words = np.load(path, allow_pickle=False)
            except (ValueError, OSError, EOFError):
                continue
            base = _relative(path.parent, folder)
            found |= {f"{base}/{number:05}": str(word) for number, word in enumerate(words.reshape(-1).tolist())}
    return found


def _patch(images: Path, masks: Path, number: int) -> Pixels:
    image_HW3 = np.clip(np.rint(_array(images, 4)[number]), 0, 255).astype(np.uint8)
    masks_HWC = _array(masks, 4)[number]
    instances_HW, types_HW = np.zeros(image_HW3.shape[:2], np.int32), np.zeros(image_HW3.shape[:2], np.uint8)
    # Numbers may repeat from channel to channel; where two types claim a pixel the later channel has it.
    for kind in range(masks_HWC.shape[2] - 1):
        own_HW = _counted(_whole(masks_HWC[..., kind], masks))
        claimed = own_HW > 0
        instances_HW[claimed] = own_HW[claimed] + instances_HW.max()
        types_HW[claimed] = kind + 1
    return Pixels(image_HW3, _counted(instances_HW), types_HW)


def _pieces(folder: Path, remarks: list[str]) -> Pairs:      # noqa: ARG001
    pairs: Pairs = []
    for path in _below(folder, PICTURES):
        masks = path.parent.parent / "masks"
        if path.parent.name == "images" and path.parent.parent.name == path.stem and masks.is_dir():
            pairs.append((_relative(path.parent.parent, folder) if path.parent.parent != folder else path.stem,
                          partial(_pasted, path, masks)))
    return pairs


def _pasted(image: Path, masks: Path) -> Pixels:
    pixels = picture(image)
    numbers_HW = np.zeros(pixels.shape[:2], np.int32)
    for number, path in enumerate(_below(masks, PICTURES), start=1):
        with Image.open(path, formats=tiles.FORMATS) as own:
            numbers_HW[np.asarray(own.convert("L")) > 0] = number
    return Pixels(pixels, _counted(numbers_HW))


def _maps(folder: Path, remarks: list[str]) -> Pairs:
    """Of several folders of labels the one that is first in LABELS: a binary mask tells less than numbers do."""
    there = [path for path in _below(folder, MAPS)]
    for name in ("instances", "masks_instance_colour", *LABELS):
        labels = [path for path in there if path.parent.name.lower() == name]
        if labels:
            return [(_relative(image, folder), partial(_mapped, image, label))
                    for image, label in _paired(folder, labels, remarks)]
    return []


def _mapped(image: Path, label: Path) -> Pixels:
    types: Path | None = next((path for suffix in MAPS if (path := label.parent.parent / TYPES / (
        label.stem + suffix)).is_file()), None)
    return Pixels(picture(image), numbered(label), None if types is None else _map(types).astype(np.uint8))


FORMS: dict[str, Callable[[Path, list[str]], Pairs]] = {
    "pannuke": _pannuke, "mat": _mat, "polygons": _polygons, "pieces": _pieces, "maps": _maps}


# --- pictures and arrays

def picture(path: Path) -> np.ndarray:
    """An image file as RGB of 8 bits."""
    try:
        with Image.open(path, formats=tiles.FORMATS) as image:
            if image.width * image.height > tiles.PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many for a region; take it as a slide")
            return tiles.pixels(image)
    except MemoryError:
        raise
    except Exception as error:
        raise ShardError(f"{path} is not a readable image ({' '.join(str(error).split())}); get it again") from None


def numbered(path: Path) -> np.ndarray:
    """A map of labels as numbers from 1 on: numbers, a colour an object, or one value for all, of which every piece is
    an object."""
    values = _map(path)
    if values.ndim == 3:
        colours_HW = values[..., :3].astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
        return _counted(_apart(colours_HW))
    there = np.unique(values[values != 0])
    return ndimage.label(values, np.ones((3, 3)))[0].astype(np.int32) if len(there) < 2 else _counted(values)


def _apart(colours_HW: np.ndarray) -> np.ndarray:
    """Pieces of one colour, without crumbs: a colour may come twice."""
    numbers_HW, last = np.zeros(colours_HW.shape, np.int32), 0
    _, ranks = np.unique(colours_HW, return_inverse=True)
    for rank, box in enumerate(ndimage.find_objects(ranks.reshape(colours_HW.shape) + 1), start=1):
        if box is None or not colours_HW[box][mine := ranks.reshape(colours_HW.shape)[box] + 1 == rank].any():
            continue        # black is nothing
        pieces, count = ndimage.label(mine, np.ones((3, 3)))
        large = np.flatnonzero(np.bincount(pieces.ravel(), minlength=count + 1) >= CRUMB)
        for piece in large[large > 0]:
            last += 1
            numbers_HW[box][pieces == piece] = last
    return numbers_HW


def _map(path: Path) -> np.ndarray:
    """A picture of numbers (H, W), or of colours (H, W, 3)."""
    if path.suffix.lower() == ".npy":
        return _whole(_array(path, 2), path)
    with Image.open(path, formats=tiles.FORMATS) as image:
        if image.mode in ("RGB", "RGBA"):
            return np.asarray(image.convert("RGB"))
        return _whole(np.asarray(image.convert("L") if image.mode == "1" else image), path)     # P: numbers of colours


def _array(path: Path, dimensions: int) -> np.ndarray:
    """An array as NumPy saves it, mapped; one that holds Python objects could run code and is refused."""
    try:
        array: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ShardError(f"{path} is not an array of numbers ({error}); save it again as plain numbers") from None
    if array.ndim != dimensions or array.dtype.kind not in "iufb":
        raise ShardError(f"{path} is {array.dtype} of shape {array.shape}, not numbers of {dimensions} dimensions")
    return array


def _whole(values: np.ndarray, path: Path) -> np.ndarray:
    """Numbers of objects, which programs like to save as fractions."""
    if values.ndim != 2 or values.dtype.kind not in "iufb":
        raise ShardError(f"{path} is {values.dtype} of shape {values.shape}, not a number a pixel")
    whole = np.asarray(values).astype(np.int64)
    if (whole != values).any() or whole.min(initial=0) < 0:
        raise ShardError(f"{path} has numbers that are no counts, such as {np.asarray(values)[whole != values][:1]}")
    return whole


def _counted(values: np.ndarray) -> np.ndarray:
    """The same objects with numbers from 1 on, in their order."""
    there, ranks = np.unique(values, return_inverse=True)
    return (ranks.reshape(values.shape) + (0 if len(there) and there[0] == 0 else 1)).astype(np.int32)
