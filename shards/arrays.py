"""HDF5: images in, as PatchCamelyon is published, labels in a neighbour; a slide's vectors out. The only h5py."""

import csv
import io
from pathlib import Path

import h5py
import numpy as np

from shards import folder
from shards.index import ShardError


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


def write_bag(path: Path, features_ND: np.ndarray, coords_N2: np.ndarray, facts: dict[str, str | float]) -> None:
    """A slide's vectors and where its tiles lie, whole under its name."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_dataset("features", data=features_ND.astype(np.float32))
        file.create_dataset("coords", data=coords_N2.astype(np.int64))
        file.attrs.update(facts)
    folder.write(path, buffer.getvalue())


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
