"""The JPEG tiles of a slide as they lie in its file, and pyramids of our own. The only tifffile."""

import collections
import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from shards import jpeg
from shards.jpeg import JpegError

TISSUE = (190, 120, 170)
CACHE = 64 << 20        # bytes of decoded tiles: some rows of a slide
BIG = 2**31             # pixels, from which on a TIFF needs places of 64 bits
STRIP = 256             # rows of a map that are halved at a time


class Level:
    """One level of a slide whose tiles are JPEGs: square, side by side, each a file of its own but for its tables."""

    def __init__(self, path: Path, page: tifffile.TiffPage):
        self.width, self.height = page.imagewidth, page.imagelength
        self.side, self.columns = page.tilewidth, -(-page.imagewidth // page.tilewidth)
        self.rgb = page.photometric == tifffile.PHOTOMETRIC.RGB
        self.tables = page.jpegtables or b""
        self._offsets, self._sizes = page.dataoffsets, page.databytecounts
        self._file = path.open("rb")
        self._decoded: collections.OrderedDict[tuple[int, int], np.ndarray] = collections.OrderedDict()

    def close(self) -> None:
        """Frees the file."""
        self._file.close()

    def largest(self, count: int) -> list[tuple[int, int]]:
        """Columns and rows of the tiles with the most bytes."""
        numbers = np.argsort(self._sizes, kind="stable")[::-1][:count].tolist()
        return [divmod(number, self.columns)[::-1] for number in numbers]

    def mosaic(self, factor: int) -> np.ndarray:
        """The whole level at 1/factor of its size (1, 2, 4, 8); what was not scanned is white.

        A damaged tile has the colour of tissue: it is to be asked for, and said to be unreadable, and not to be glass.
        """
        step = -(-self.side // factor)
        rows = -(-self.height // self.side)
        whole = np.full((rows * step, self.columns * step, 3), 255, np.uint8)
        for row in range(rows):
            for column in range(self.columns):
                if not self._sizes[row * self.columns + column]:
                    continue
                try:
                    shown = jpeg.decode(self.tile(column, row), factor)
                except JpegError:
                    shown = np.full((step, step, 3), TISSUE, np.uint8)
                whole[row * step:(row + 1) * step, column * step:(column + 1) * step] = shown
        return whole[:-(-self.height // factor), :-(-self.width // factor)]

    def region(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Pixels of the level, RGB; what lies outside, and what was not scanned, is white."""
        whole = np.full((height, width, 3), 255, np.uint8)
        side = self.side
        for row in range(max(y, 0) // side, -(-min(y + height, self.height) // side)):
            for column in range(max(x, 0) // side, -(-min(x + width, self.width) // side)):
                if not self._sizes[row * self.columns + column]:
                    continue
                left, top = column * side, row * side
                right, bottom = min(left + side, x + width, self.width), min(top + side, y + height, self.height)
                first, upper = max(left, x), max(top, y)
                if first >= right or upper >= bottom:
                    continue
                whole[upper - y:bottom - y, first - x:right - x] = self._pixels(column, row)[
                    upper - top:bottom - top, first - left:right - left]
        return whole

    def _pixels(self, column: int, row: int) -> np.ndarray:
        """One tile decoded, and kept: its neighbours in a grid that is not the file's ask for it again."""
        if (found := self._decoded.get((column, row))) is None:
            found = self._decoded[column, row] = jpeg.decode(self.tile(column, row))
            if len(self._decoded) > max(4, CACHE // found.nbytes):
                self._decoded.popitem(last=False)
        else:
            self._decoded.move_to_end((column, row))
        return found

    def tile(self, column: int, row: int) -> bytes:
        """One tile as a JPEG file; raises JpegError where the slide has none there, or not one that stands alone."""
        number = row * self.columns + column
        size = self._sizes[number]
        content = os.pread(self._file.fileno(), size, self._offsets[number])
        if not size or len(content) < size:
            raise JpegError("no bytes" if not size else f"{len(content)} of {size} bytes: the file is cut short")
        spliced = jpeg.splice(content, self.tables, self.rgb)
        width, height, colours = jpeg.header(spliced)
        if (width, height) != (self.side, self.side) or colours not in ("RGB", "YCbCr"):
            raise JpegError(f"{width} x {height} pixels of {colours}")
        return spliced


def level(path: Path, size: tuple[int, int]) -> Level | None:
    """The level of `size` (width, height), or None where its tiles cannot be taken as they are."""
    try:
        with tifffile.TiffFile(path) as tiff:
            for page in tiff.pages:
                if not isinstance(page, tifffile.TiffPage):
                    continue
                if (page.imagewidth, page.imagelength) == size and page.is_tiled:
                    if (page.compression == tifffile.COMPRESSION.JPEG and page.samplesperpixel == 3
                            and page.bitspersample == 8 and page.planarconfig == tifffile.PLANARCONFIG.CONTIG
                            and page.tilewidth == page.tilelength
                            and page.photometric in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR)):
                        return Level(path, page)
                    return None
    except (tifffile.TiffFileError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None         # not a TIFF, or one that only OpenSlide understands: it is read by OpenSlide then
    return None


def write_pyramid(path: Path, pixels: np.ndarray, mpp: float, quality: int) -> None:
    """An Aperio-like slide of three levels (1, 1/4, 1/16) in JPEG tiles of 256 pixels."""
    level = Image.fromarray(pixels)
    extent = f"{level.width}x{level.height}"
    whole = f"Aperio Image Library v12.0.0 \r\n{extent} [0,0 {extent}] (256x256)"
    facts = f"JPEG/RGB Q={quality}|AppMag = {10 / mpp:g}|MPP = {mpp:.4f}"
    with tifffile.TiffWriter(path) as tiff:
        page = partial(tiff.write, photometric="rgb", metadata=None, software=False, maxworkers=1, compression="jpeg",
                       compressionargs={"level": quality})
        page(pixels, tile=(256, 256), description=f"{whole} {facts}")
        thumbnail = level.reduce(math.ceil(max(level.size) / 768))
        # Aperio puts the thumbnail second and in strips: by that readers tell it from a level
        page(np.asarray(thumbnail), rowsperstrip=16,
             description=f"{whole} -> {thumbnail.width}x{thumbnail.height} {facts}")
        for _ in range(2):
            level = level.reduce(4)
            page(np.asarray(level), tile=(256, 256), description=f"{whole} -> {level.width}x{level.height} {facts}")


def write_map(path: Path, values_HW: np.ndarray, mpp: float | None, side: int = 256) -> None:
    """A map of 8 bits as a pyramid of tiles, each level half of the one before, which OpenSlide opens as a slide; a
    piece of it is in memory at a time. `mpp`: microns per pixel, as centimetres, which TIFF knows."""
    facts: dict[str, Any] = {"photometric": "minisblack", "tile": (side, side), "compression": "deflate",
                             "metadata": None, "software": False, "dtype": np.uint8}
    if mpp:
        facts |= {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path, bigtiff=values_HW.size >= BIG) as tiff:
        level = values_HW
        while True:
            # OpenSlide takes for levels what says that it is a smaller copy.
            tiff.write(_tiles(level, side), shape=level.shape, subfiletype=int(level is not values_HW), **facts)
            if max(level.shape) <= side:
                return
            level = _halved(level)
            facts.pop("resolution", None)
            facts.pop("resolutionunit", None)


def _tiles(values_HW: np.ndarray, side: int) -> Iterator[np.ndarray]:
    for top in range(0, values_HW.shape[0], side):
        for left in range(0, values_HW.shape[1], side):
            own = values_HW[top:top + side, left:left + side]
            yield np.pad(own, [(0, side - own.shape[0]), (0, side - own.shape[1])])


def _halved(values_HW: np.ndarray) -> np.ndarray:
    """Means of two by two pixels, a strip at a time; an odd row or column counts twice."""
    found = np.empty([-(-length // 2) for length in values_HW.shape], np.uint8)
    for top in range(0, len(found), STRIP):
        own = values_HW[2 * top:2 * (top + STRIP)]
        own = np.pad(own, [(0, len(own) % 2), (0, own.shape[1] % 2)], mode="edge").astype(np.uint16)
        found[top:top + STRIP] = (own[::2, ::2] + own[1::2, ::2] + own[::2, 1::2] + own[1::2, 1::2] + 2) // 4
    return found
