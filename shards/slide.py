"""Open a slide, know its microns per pixel, read a region at the resolution that was asked for."""

import contextlib
import math
from pathlib import Path
from types import TracebackType

import numpy as np
import openslide
from PIL import Image

from shards import jpeg, tiff
from shards.jpeg import JpegError

# What a light microscope can mean: 0.05 is beyond 100x oil immersion, 5 is a survey picture. HEST found headers ten
# times off, so a value outside this band is a mistake in the file and not a resolution.
PLAUSIBLE_MPP = (0.05, 5.0)
# Vendors round the factor between levels, and 0.499 is what a scanner calls 0.5: within this, a level is as asked.
SLACK = 1.01
# Read at once, pixels a side: of a slide without levels a thumbnail would else hold all of it in memory.
BLOCK = 4096
# Grey levels by which a slide's own tile may differ, on average, from what OpenSlide shows: rounding, no more.
AGREE = 2.0
# Scanners whose levels are one grid of tiles side by side; others let tiles overlap, or paste several areas together.
GRIDS = ("aperio", "generic-tiff")
# Stands in for an unknown resolution where only its order of magnitude matters: the commonest.
ASSUMED_MPP = 0.5


class SlideError(ValueError):
    """A slide that cannot be used as it is."""

    exit_code = 3


class Slide:
    """An open slide. Coordinates are level-0 pixels everywhere, as in OpenSlide and in the pathologist's annotation."""

    def __init__(self, path: Path, mpp: float | None = None, missing_mpp: float | None = None, *, power: bool = False):
        """`mpp`, in microns per level-0 pixel, overrides the header.

        Where the header is silent, `power` allows 10 / objective power, and `missing_mpp` stands in last.
        """
        self.path = path
        if not path.exists():       # OpenSlide has one word for what is missing and what it does not know
            raise SlideError(f"no slide at {path} (looked in {Path.cwd()}); correct the name, or mount its disk")
        try:
            self._handle = openslide.OpenSlide(str(path))
        except openslide.OpenSlideError as error:
            reason = str(error) or "not a format OpenSlide knows"
            raise SlideError(f"{path} cannot be opened as a slide ({reason}): it is damaged or no slide; "
                             "move it out of the source folder, or allow for it with max_failed=1") from None
        self._levels: dict[int, tiff.Level | None] = {}
        self._downsamples = self._handle.level_downsamples
        self.width, self.height = self._handle.dimensions
        self.vendor = self._handle.properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown")
        self.mpp = mpp if mpp is not None else self._header_mpp(power, missing_mpp)

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        for level in self._levels.values():
            if level is not None:
                level.close()
        self._handle.close()

    def _header_mpp(self, power: bool, missing_mpp: float | None) -> float:
        properties = self._handle.properties
        try:
            x, y = (float(properties[name]) for name in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y))
        except (KeyError, ValueError):
            return self._missing_mpp(power, missing_mpp)
        low, high = PLAUSIBLE_MPP
        if not (low <= x <= high and low <= y <= high):
            raise SlideError(f"{self.path} claims {x} x {y} microns per pixel, which no scanner makes "
                             f"(plausible: {low} to {high}); give the true value in the mpp column of slides.csv")
        if abs(x - y) > 0.02 * x:
            raise SlideError(f"{self.path} has pixels of {x} x {y} microns, not square; give one value in the mpp "
                             "column of slides.csv if that is good enough")
        return (x + y) / 2

    def _missing_mpp(self, power: bool, missing_mpp: float | None) -> float:
        said = self._handle.properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER, "")
        guess = 0.0
        with contextlib.suppress(ValueError, ZeroDivisionError):
            guess = 10 / float(said)
        if PLAUSIBLE_MPP[0] <= guess <= PLAUSIBLE_MPP[1]:
            if power:
                return guess
            hint = f", or power=true to take {guess:g} from its objective's {said}x"
        else:
            hint = ""
        if missing_mpp is not None:
            return missing_mpp
        raise SlideError(f"{self.path} does not say its microns per pixel; if you know it, give it in the mpp column "
                         f"of slides.csv, or slide_mpp=0.25 for all slides that do not say theirs{hint}, or move "
                         "the slide out of the source folder")

    def level(self, mpp: float) -> tuple[int, float]:
        """The level to read for `mpp`, the next finer one, and its pixels' width in level-0 pixels."""
        # Sharper than asked is averaged down, coarser than asked could only be invented.
        fitting = [number for number, wide in enumerate(self._downsamples) if wide <= mpp / self.mpp * SLACK]
        number = max(fitting, key=self._downsamples.__getitem__, default=0)
        return number, self._downsamples[number]

    def native(self, mpp: float) -> tiff.Level | None:
        """The level of `mpp` if its JPEG tiles may be taken as they lie in the file."""
        number, downsample = self.level(mpp)
        return self._native(number) if 1 / SLACK <= mpp / (self.mpp * downsample) <= SLACK else None

    def _native(self, number: int) -> tiff.Level | None:
        """A level's own tiles, if they show what OpenSlide shows: it is the judge of what a slide looks like."""
        if number not in self._levels:
            found = tiff.level(self.path, self._handle.level_dimensions[number]) if self.vendor in GRIDS else None
            if found is not None and not self._agrees(number, found):
                found.close()
                found = None
            self._levels[number] = found
        return self._levels[number]

    def _agrees(self, number: int, found: tiff.Level) -> bool:
        """Asked of a tile that has much to show, as its size in the file tells; of the next where one is damaged."""
        scale = self._downsamples[number]
        for column, row in found.largest(8):
            try:
                own = jpeg.decode(found.tile(column, row))
            except JpegError:
                continue
            corner = round(column * found.side * scale), round(row * found.side * scale)
            shown = self._read(*corner, number, (found.side, found.side)).astype(np.int16)
            width, height = (min(found.side, side - place * found.side) for side, place in
                             zip(self._handle.level_dimensions[number], (column, row), strict=True))
            return bool(np.abs(own[:height, :width] - shown[:height, :width]).mean() <= AGREE)
        return False

    def region(self, x: int, y: int, size: tuple[int, int], mpp: float) -> np.ndarray:
        """`size` pixels (width, height) at `mpp`, top left at level-0 (x, y), as RGB. Outside the slide it is white."""
        level, downsample = self.level(mpp)
        scale = mpp / self.mpp / downsample
        cut = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
        if (own := self._native(level)) is not None:        # twice as quick as asking OpenSlide
            pixels = own.region(round(x / downsample), round(y / downsample), *cut)
        else:
            pixels = self._read(x, y, level, cut)
        if cut != size:     # Pillow's bilinear averages when it shrinks
            pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
        return pixels

    def _read(self, x: int, y: int, level: int, size: tuple[int, int]) -> np.ndarray:
        """OpenSlide's own pixels of a level."""
        try:
            rgba = self._handle.read_region((x, y), level, size)
        except openslide.OpenSlideError as error:
            raise SlideError(f"{self.path} is damaged near ({x}, {y}): {error}") from None
        if rgba.getchannel("A").getextrema()[0] == 255:     # opaque, as tissue is
            return np.asarray(rgba.convert("RGB"))
        flat = Image.new("RGB", rgba.size, (255, 255, 255))
        flat.paste(rgba, mask=rgba.getchannel("A"))
        return np.asarray(flat)

    def thumbnail(self, mpp: float) -> np.ndarray:
        """The whole slide at `mpp`, RGB."""
        scale = mpp / self.mpp
        width, height = max(1, round(self.width / scale)), max(1, round(self.height / scale))
        number, downsample = self.level(mpp)
        if (own := self._native(number)) is not None:       # much quicker than asking OpenSlide
            factor = next(factor for factor in (8, 4, 2, 1) if factor * downsample <= scale * SLACK or factor == 1)
            whole = own.mosaic(factor)
            if whole.shape[:2] != (height, width):
                whole = np.asarray(Image.fromarray(whole).resize((width, height), Image.Resampling.BILINEAR))
            return whole
        step = max(1, int(BLOCK * self.level(mpp)[1] / scale))
        if max(width, height) <= step:
            return self.region(0, 0, (width, height), mpp)
        whole = np.empty((height, width, 3), np.uint8)
        for top in range(0, height, step):
            for left in range(0, width, step):
                size = min(step, width - left), min(step, height - top)
                whole[top:top + size[1], left:left + size[0]] = self.region(round(left * scale), round(top * scale),
                                                                            size, mpp)
        return whole


class Picture:
    """An image file that is cut like a slide: one level, and perhaps no microns per pixel (NaN)."""

    vendor = "image"

    def __init__(self, path: Path, pixels: np.ndarray, mpp: float | None = None):
        self.path, self._pixels = path, pixels
        self.height, self.width = pixels.shape[:2]
        self.mpp = math.nan if mpp is None else mpp

    def __enter__(self) -> "Picture":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        pass

    def native(self, mpp: float) -> tiff.Level | None:      # noqa: ARG002
        """None: what is cut from an image is encoded again."""
        return None

    def region(self, x: int, y: int, size: tuple[int, int], mpp: float) -> np.ndarray:
        """`size` pixels (width, height) at `mpp`, top left at (x, y); all of it must lie inside."""
        scale = 1.0 if math.isnan(self.mpp) else mpp / self.mpp
        width, height = (max(1, round(side * scale)) for side in size)
        cut = self._pixels[y:y + height, x:x + width]
        if (cut.shape[1], cut.shape[0]) == size:
            return cut
        return np.asarray(Image.fromarray(cut).resize(size, Image.Resampling.BILINEAR))

    def thumbnail(self, mpp: float) -> np.ndarray:
        """The whole picture at `mpp`."""
        scale = mpp / (ASSUMED_MPP if math.isnan(self.mpp) else self.mpp)
        size = max(1, round(self.width / scale)), max(1, round(self.height / scale))
        return np.asarray(Image.fromarray(self._pixels).resize(size, Image.Resampling.BILINEAR))


def dicom_series(path: Path) -> str:
    """What the files of one DICOM slide have in common; a file that cannot be opened stands for itself."""
    try:
        with openslide.OpenSlide(str(path)) as handle:
            return handle.properties.get("dicom.SeriesInstanceUID", str(path))
    except openslide.OpenSlideError:
        return str(path)
