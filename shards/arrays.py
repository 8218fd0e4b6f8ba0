"""HDF5: images in, as PatchCamelyon is published, labels in a neighbour; a slide's vectors out. The only h5py."""

import csv
import io
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from shards import folder
from shards.index import ShardError

WIDE = "patch_size_level0"          # as TRIDENT calls it


def length(path: Path, array: str) -> int:
    """How many images a file holds."""
    with _open(path) as file:
        return len(_images(file, path, array))


def read(path: Path, array: str, first: int, last: int) -> tuple[np.ndarray, list[str]]:
    """Images first to last (NHWC, uint8) and their labels, "" where there are none."""
    with _open(path) as file:
        try:
            pixels = _images(file, path, array)[first:last]
        except OSError as error:
            raise ShardError(f"{path} is damaged ({error}); get it again") from None
        images = len(_images(file, path, array))
        if "y" in file:
            return pixels, _labels(file, path, images, first, last)
    neighbour = _labels_of(path)
    if neighbour == path or not neighbour.is_file():
        return pixels, [""] * len(pixels)
    with _open(neighbour) as file:
        return pixels, _labels(file, neighbour, images, first, last)


def write_bag(path: Path, features_ND: np.ndarray, coords_N2: np.ndarray, facts: dict[str, str | float],
              wide: float | None = None) -> None:
    """A slide's vectors and where its tiles lie, whole under its name; `wide`: a tile, in pixels of level 0."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_dataset("features", data=features_ND.astype(np.float32, copy=False))
        coords = file.create_dataset("coords", data=coords_N2.astype(np.int64, copy=False))
        if wide:
            coords.attrs[WIDE] = wide
        file.attrs.update(facts)
    folder.write(path, buffer.getbuffer())        # a gigabyte of a large slide: not once more


def bag_facts(path: Path) -> tuple[tuple[int, int], dict[str, Any]]:
    """How many vectors of which width a slide has, and what its file says of it; with WIDE, where it tells."""
    with _open(path) as file:
        features, coords = _bag(file, path)
        facts = {name: value.item() if isinstance(value, np.generic) else value for name, value in file.attrs.items()}
        if WIDE in coords.attrs:
            facts[WIDE] = float(coords.attrs[WIDE])
        return features.shape[-2:], facts


def read_bag(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A slide's vectors (N, D) in float32, and its tiles' corners (N, 2): ours, CLAM's and TRIDENT's files."""
    with _open(path) as file:
        features, coords = _bag(file, path)
        try:
            return np.asarray(features[()], np.float32).reshape(features.shape[-2:]), np.asarray(coords[()], np.int64)
        except OSError as error:
            raise ShardError(f"{path} is damaged ({error}); write it again") from None


def _bag(file: h5py.File, path: Path) -> tuple[h5py.Dataset, h5py.Dataset]:
    features, coords = file.get("features"), file.get("coords")
    if (not isinstance(features, h5py.Dataset) or not isinstance(coords, h5py.Dataset) or features.dtype.kind != "f"
            or features.ndim not in (2, 3) or features.shape[:-2] not in ((), (1,)) or not features.size
            or coords.shape != (features.shape[-2], 2)):
        told = {name: f"{each.dtype}{list(each.shape)}" for name, each in file.items()
                if isinstance(each, h5py.Dataset)}
        raise ShardError(f"{path} holds {told or 'nothing'}, not features (tiles, width) and coords (tiles, 2)")
    return features, coords


def neighbours(path: Path) -> list[Path]:
    """The files beside an array that say something of its images: labels, table."""
    return [found for found in (_labels_of(path), _table_of(path)) if found != path and found.is_file()]


def _labels_of(path: Path) -> Path:
    return path.with_name(f"{path.stem.removesuffix('_x')}_y{path.suffix}")


def _table_of(path: Path) -> Path:
    return path.with_name(f"{path.stem.removesuffix('_x')}_meta.csv")


def words(path: Path, array: str, columns: dict[str, str], first: int, last: int) -> list[dict[str, str]]:
    """What a table *_meta.csv beside the file says of images first to last: a row an image, in their order."""
    table = _table_of(path)
    if not columns or not table.is_file():
        return [{}] * (last - first)
    images = length(path, array)
    with table.open(newline="", encoding="utf-8-sig") as handle:
        rows = list(csv.DictReader(handle))
    if len(rows) != images or any(row.get(name) is None for row in rows for name in columns.values()):
        raise ShardError(f"{table} has not one row for each of {images} images, with columns "
                         f"{', '.join(columns.values())}; get it again, or set columns={{}}")
    return [{word: row[name] for word, name in columns.items()} for row in rows[first:last]]


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ShardError(f"{path} is not a readable HDF5 file ({error}); get it again, or unpack it first") from None


def _images(file: h5py.File, path: Path, array: str) -> h5py.Dataset:
    found = file.get(array)
    if (not isinstance(found, h5py.Dataset) or found.ndim != 4 or found.shape[3] != 3 or found.dtype != np.uint8
            or 0 in found.shape):
        what = f"{found.dtype} of shape {found.shape}" if isinstance(found, h5py.Dataset) else "not there"
        raise ShardError(f"{path}: array {array!r} is {what}, not images (N, height, width, 3) of 8 bits; it has "
                         f"{', '.join(file)}; name the right one with array=")
    return found


def _labels(file: h5py.File, path: Path, images: int, first: int, last: int) -> list[str]:
    found = file.get("y")
    if (not isinstance(found, h5py.Dataset) or not found.ndim or len(found) != images or found.size != images
            or found.dtype.kind not in "iubOS"):
        what = f"{found.dtype} of shape {found.shape}" if isinstance(found, h5py.Dataset) else "not there"
        raise ShardError(f"{path}: array 'y' is {what}, not one whole number or word for each of {images} images; get "
                         "it again, or move it away to do without labels")
    values = np.asarray(found[first:last]).reshape(-1).tolist()
    return [value.decode(errors="replace") if isinstance(value, bytes) else str(value) for value in values]
