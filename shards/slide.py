"""Open a slide, know its microns per pixel, read a region at the resolution that was asked for."""

from pathlib import Path
from types import TracebackType

import numpy as np
import openslide
from PIL import Image

# What a light microscope can mean: 0.05 is beyond 100x oil immersion, 5 is a survey picture. HEST found headers ten
# times off, so a value outside this band is a mistake in the file and not a resolution.
PLAUSIBLE_MPP = (0.05, 5.0)


class SlideError(ValueError):
    """A slide that cannot be used as it is."""

    exit_code = 3


class Slide:
    """An open slide. Coordinates are level-0 pixels everywhere, as in OpenSlide and in the pathologist's annotation."""

    def __init__(self, path: Path, mpp: float | None = None, missing_mpp: float | None = None):
        """`mpp`, in microns per level-0 pixel, overrides the header; `missing_mpp` stands in where that is silent."""
        self.path = path
        if not path.exists():       # OpenSlide has one word for what is missing and what it does not know
            raise SlideError(f"no slide at {path} (looked in {Path.cwd()}); correct the name, or mount its disk")
        try:
            self._handle = openslide.OpenSlide(str(path))
        except openslide.OpenSlideError as error:
            reason = str(error) or "not a format OpenSlide knows"
            raise SlideError(f"{path} cannot be opened as a slide ({reason}): it is damaged or no slide; "
                             "move it out of the source folder, or allow for it with max_failed=1") from None
        self.width, self.height = self._handle.dimensions
        self.mpp = mpp if mpp is not None else self._header_mpp(missing_mpp)

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._handle.close()

    def _header_mpp(self, missing_mpp: float | None) -> float:
        properties = self._handle.properties
        try:
            x, y = (float(properties[name]) for name in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y))
        except (KeyError, ValueError):
            if missing_mpp is not None:
                return missing_mpp
            raise SlideError(f"{self.path} does not say its microns per pixel; if you know it, give it in the mpp "
                             "column of slides.csv, or slide_mpp=0.25 for all slides that do not say theirs, or leave "
                             "the slide out with max_failed=1") from None
        low, high = PLAUSIBLE_MPP
        if not (low <= x <= high and low <= y <= high):
            raise SlideError(f"{self.path} claims {x} x {y} microns per pixel, which no scanner makes "
                             f"(plausible: {low} to {high}); give the true value in the mpp column of slides.csv")
        if abs(x - y) > 0.02 * x:
            raise SlideError(f"{self.path} has pixels of {x} x {y} microns, not square; give one value in the mpp "
                             "column of slides.csv if that is good enough")
        return (x + y) / 2

    def region(self, x: int, y: int, size: tuple[int, int], mpp: float) -> np.ndarray:
        """`size` pixels (width, height) at `mpp`, top left at level-0 (x, y), as RGB. Outside the slide it is white."""
        scale = mpp / self.mpp
        # The next finer level: sharper than asked is averaged down, coarser than asked could only be invented.
        # 1 % of slack, because vendors round the factor between levels.
        level = self._handle.get_best_level_for_downsample(scale * 1.01)
        downsample = self._handle.level_downsamples[level]
        width, height = (max(1, round(side * scale / downsample)) for side in size)
        try:
            rgba = self._handle.read_region((x, y), level, (width, height))
        except openslide.OpenSlideError as error:
            raise SlideError(f"{self.path} is damaged near ({x}, {y}): {error}") from None
        flat = Image.new("RGB", rgba.size, (255, 255, 255))
        flat.paste(rgba, mask=rgba.getchannel("A"))
        if flat.size != size:
            flat = flat.resize(size, Image.Resampling.BILINEAR)     # Pillow's bilinear averages when it shrinks
        return np.asarray(flat)

    def thumbnail(self, mpp: float) -> np.ndarray:
        """The whole slide at `mpp`, RGB."""
        scale = mpp / self.mpp
        return self.region(0, 0, (max(1, round(self.width / scale)), max(1, round(self.height / scale))), mpp)
