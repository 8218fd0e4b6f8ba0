"""Corners of a slide, image files, or rows of an array -> encoded tiles and what is known of each."""

import dataclasses
import hashlib
import io
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from shards import arrays, jpeg, judge, tissue
from shards.annotation import Annotation
from shards.jpeg import JpegError
from shards.settings import Settings
from shards.slide import Picture, Slide, SlideError
from shards.sources import Source, key
from shards.tiff import Level

# Pixels judged at once: 64 tiles of 256 squared, a dozen megabytes.
BATCH = 64 * 256 * 256
FILES_AT_ONCE = 64
FORMATS = ("JPEG", "PNG", "TIFF", "BMP")         # whatever a file calls itself
PIXELS = 89_478_485     # a picture of more is taken for a decompression bomb, by Pillow too
SOURCE = "source"       # the encoding of bytes that we did not make
UNSEEN = (math.nan, math.nan, math.nan)


class Tile(NamedTuple):
    """One accepted tile: x, y in level-0 pixels, size in pixels, mpp in microns per pixel (NaN: unknown)."""

    key: str
    source: Source
    x: int
    y: int
    mpp: float
    size: tuple[int, int]
    label: str                      # "" where unlabelled
    image: bytes
    encoding: str                   # how the bytes came about: "jpeg-90-4:4:4", or "source" where untouched
    digest: bytes                   # 128 bits of the source's bytes where untouched, else of the pixels before encoding
    looks: tuple[float, float, float]   # focus, density, hue (judge.py)
    side: float = 0.0               # width in level-0 pixels, of what was cut


@dataclass(frozen=True)
class Rejected:
    """One tile or slide left out, and why: a word to count by, and a sentence where there is more to say."""

    source: Source
    reason: str
    detail: str = ""
    x: int | None = None
    y: int | None = None
    mpp: float | None = None
    side: float = 0.0


class Cut(NamedTuple):
    """An open slide at one resolution: what is cut from it, and how."""

    source: Source
    slide: Slide | Picture
    settings: Settings
    mpp: float                      # of the tiles, as they are and not as they were asked for
    side: float                     # of a tile, in level-0 pixels
    drawn: Annotation | None
    native: Level | None            # the level whose own JPEGs are the tiles

    def key(self, x: int, y: int) -> str:
        """Regions of one slide may lie in several files, so they are named by their file."""
        named = (self.source.slide,) if isinstance(self.slide, Slide) else tuple(self.source.name.split("/"))
        several = (f"m{round(self.mpp * 1000)}",) if len(self.settings.mpp) > 1 else ()
        return key(*named, f"x{x}", f"y{y}", *several)

    def rejected(self, reason: str, x: int, y: int, detail: str = "") -> Rejected:
        """A tile left out."""
        return Rejected(self.source, reason, detail, x, y, self.mpp, self.side)


class Seen(NamedTuple):
    """One accepted tile as it was read: a slide's own JPEG where that is what is asked for, else pixels."""

    x: int
    y: int
    content: bytes | np.ndarray
    looks: tuple[float, float, float]


def of_slide(source: Source, slide: Slide | Picture, found: np.ndarray, settings: Settings,
             drawn: Annotation | None) -> Iterator[Tile | Rejected]:
    """Every tile of a grid over one slide's tissue at every resolution asked for, accepted or with a reason."""
    for cut in cuts(source, slide, settings, drawn):
        if isinstance(cut, Rejected):
            yield cut
            continue
        for item in seen(cut, found):
            yield item if isinstance(item, Rejected) else _made(cut, item)


def cuts(source: Source, slide: Slide | Picture, settings: Settings, drawn: Annotation | None
         ) -> Iterator[Cut | Rejected]:
    """What is to be cut from a slide, a resolution after the other; or why one has no tile there."""
    for mpp in settings.mpp or [slide.mpp]:
        if mpp < 0.95 * slide.mpp:
            yield Rejected(source, "coarse", f"{slide.mpp:g} microns per pixel hold no tile of {mpp:g}", mpp=mpp)
            continue
        side = settings.size if math.isnan(mpp) else settings.size * mpp / slide.mpp
        if side > min(slide.width, slide.height):
            yield Rejected(source, "small", f"{slide.width} x {slide.height} pixels of {slide.mpp:g} microns hold no "
                                            f"tile of {settings.size} pixels of {mpp:g}", mpp=mpp)
            continue
        cut = Cut(source, slide, settings, mpp, side, drawn, None)
        native = slide.native(mpp) if settings.passthrough else None
        if native is not None and native.side == settings.size and isinstance(slide, Slide):
            # What the scanner calls 0.5 may be 0.499: its own grid and its own resolution are taken.
            own = slide.level(mpp)[1]
            cut = cut._replace(native=native, mpp=slide.mpp * own, side=settings.size * own)
        yield cut


def seen(cut: Cut, found: np.ndarray) -> Iterator[Seen | Rejected]:
    """Every tile of the grid over the tissue, read and looked at: accepted, or with a reason."""
    settings, slide = cut.settings, cut.slide
    grid, fractions = tissue.corners(found, (slide.width, slide.height), cut.side)
    wanted = fractions >= settings.min_tissue
    if not settings.max_tiles:
        for x, y in grid[~wanted].tolist():
            yield cut.rejected("background", x, y)
    corners: list[tuple[int, int]] = [(x, y) for x, y in grid[wanted].tolist()]
    if settings.inside and cut.drawn is not None:
        outside = [corner for corner in corners if not cut.drawn.covers(*corner, cut.side, settings.min_label)]
        for x, y in outside:
            yield cut.rejected("outside annotations", x, y)
        gone = set(outside)
        corners = [corner for corner in corners if corner not in gone]
    if settings.max_tiles:
        corners.sort(key=lambda corner: order(settings, cut.key(*corner)))
    step, accepted = max(1, BATCH // settings.size ** 2), 0
    for first in range(0, len(corners), step):
        for item in _judged(cut, corners[first:first + step]):
            accepted += isinstance(item, Seen)
            yield item
            if accepted == settings.max_tiles:
                return


def _judged(cut: Cut, corners: list[tuple[int, int]]) -> Iterator[Seen | Rejected]:
    """Some tiles read, and looked at together."""
    settings = cut.settings
    size = (settings.size, settings.size)
    limits = judge.Limits(settings.min_contrast, settings.min_focus, settings.max_pen, settings.max_blood)
    read: list[tuple[int, int, bytes | np.ndarray]] = []
    small: list[np.ndarray] = []
    for x, y in corners:
        try:
            if cut.native is None:
                content: bytes | np.ndarray = cut.slide.region(x, y, size, cut.mpp)
                small.append(judge.reduced(content))        # type: ignore[arg-type]
            else:
                content = cut.native.tile(round(x / cut.side), round(y / cut.side))
                small.append(jpeg.decode(content, judge.SCALE))
        except JpegError as error:
            yield cut.rejected("unreadable", x, y, str(error))
            continue
        read.append((x, y, content))
    if not read:
        return
    looks = judge.look(np.stack(small))
    kept = _looks(looks)
    for number, (x, y, content) in enumerate(read):
        if reason := looks.reason(number, limits):
            yield cut.rejected(reason, x, y)
            continue
        yield Seen(x, y, content, kept[number])


def _made(cut: Cut, tile: Seen) -> Tile:
    """A tile with its label, encoded where it needs to be."""
    settings, label = cut.settings, cut.source.label
    if settings.labels == "annotations" and cut.drawn is not None:
        label = cut.drawn.of(tile.x, tile.y, cut.side, settings.min_label)
    image, encoding, digest = _encoded(tile.content, settings)
    return Tile(cut.key(tile.x, tile.y), cut.source, tile.x, tile.y, cut.mpp, (settings.size, settings.size), label,
                image, encoding, digest, tile.looks, cut.side)


def order(settings: Settings, name: str) -> int:
    """Where a tile stands among all: a keyed hash of what it is, so that tiles of one slide are scattered by chance.

    The name says slide, x, y and mpp; equal names have equal places, so that they meet and are found out.
    """
    text = f"{settings.seed}|{settings.dataset}|{name}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())


def of_files(sources: Iterable[Source], settings: Settings) -> Iterator[Tile | Rejected]:
    """Image files, each a tile; looked at some at a time, those of one size together."""
    waiting = iter(sources)
    while some := [(source, of_file(source, settings)) for source in itertools.islice(waiting, FILES_AT_ONCE)]:
        small: dict[tuple[int, ...], list[np.ndarray]] = {}
        for _, made in some:
            if not isinstance(made, Rejected):
                small.setdefault(made[1].shape, []).append(made[1])
        looks = {shape: iter(_looks(judge.look(np.stack(those)))) for shape, those in small.items()}
        for _, made in some:
            yield made if isinstance(made, Rejected) else made[0]._replace(looks=next(looks[made[1].shape]))


def of_file(source: Source, settings: Settings) -> tuple[Tile, np.ndarray] | Rejected:
    """One image file as one tile: a sound JPEG passes untouched, everything else is decoded and encoded.

    With it, an eighth of the picture, by which it will be judged.
    """
    try:
        content = source.path.read_bytes()
    except OSError as error:            # the disk's fault and not the picture's: to be counted, and perhaps to stop at
        raise SlideError(f"{source.file} cannot be read: {error.strerror}") from None
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _refuse_odd(image)
            untouched = image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(0x0112, 1) == 1
            # Decoded, at an eighth at least: what cannot be decoded must not reach a tar.
            shown: bytes | np.ndarray = content if untouched else pixels(image)
            size = image.size if untouched else (shown.shape[1], shown.shape[0])    # type: ignore[union-attr]
        small = jpeg.decode(content, judge.SCALE) if isinstance(shown, bytes) else judge.reduced(shown)
        encoded, encoding, digest = _encoded(shown, settings)
    except MemoryError:
        raise
    except Exception as error:          # whatever a reader of pictures stumbles over is the picture's fault
        return Rejected(source, "unreadable", _sentence(error, source))
    mpp = source.mpp or next(iter(settings.mpp), math.nan)
    return Tile(key(*source.name.split("/")), source, 0, 0, mpp, size, source.label, encoded, encoding, digest,
                UNSEEN), small


def of_array(source: Source, settings: Settings) -> Iterator[Tile]:
    """The images of one piece of an array, each a tile."""
    first, last = source.rows
    images, labels = arrays.read(source.path, settings.array, first, last)
    words = arrays.words(source.path, settings.array, settings.columns, first, last)
    mpp = source.mpp or next(iter(settings.mpp), math.nan)
    looks = _looks(judge.look(np.stack([judge.reduced(image) for image in images])))
    for number, (image, label, known) in enumerate(zip(images, labels, words, strict=True), start=first):
        name = f"{source.name}-{number:07d}"
        # Where nobody told of a slide, each image stands for its own.
        slide = source.slide if source.slide != source.path.stem else name.rpartition("/")[2]
        row = dataclasses.replace(source, slide=known.get("slide", slide),
                                  patient=known.get("patient", source.patient), site=known.get("site", source.site),
                                  split=known.get("split", source.split))
        encoded, encoding, digest = _encoded(image, settings)
        yield Tile(key(*name.split("/")), row, 0, 0, mpp, (image.shape[1], image.shape[0]),
                   known.get("label", source.label or label), encoded, encoding, digest, looks[number - first])


def picture(source: Source, settings: Settings) -> Picture:
    """An image file to be cut."""
    mpp = source.mpp or settings.slide_mpp
    if mpp is None and settings.mpp:
        raise SlideError(f"{source.path} does not say its microns per pixel; give them in the mpp column of slides.csv"
                         ", or slide_mpp=0.25 for all, or leave mpp= out to cut it as it is")
    try:
        with Image.open(source.path, formats=FORMATS) as image:
            _refuse_odd(image)
            return Picture(source.path, pixels(image), mpp)
    except MemoryError:
        raise
    except Exception as error:
        raise SlideError(f"{source.path} is not a readable image: {_sentence(error, source)}") from None


def _refuse_odd(image: Image.Image) -> None:
    if getattr(image, "n_frames", 1) > 1:
        raise ValueError(f"it holds {image.n_frames} pictures, and only one could be taken")     # type: ignore
    if image.width * image.height > PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are more than are decoded at once ({PIXELS}); make it "
                         "a tiled TIFF and take it as a slide")


def pixels(image: Image.Image) -> np.ndarray:
    """RGB of 8 bits, upright, and white where it is transparent: what lies beneath was never meant to be seen."""
    if image.mode.startswith("I;16"):       # grey of 16 bits: the upper eight
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"neither 8 nor 16 bits a channel: its mode is {image.mode}")
    image = ImageOps.exif_transpose(image)
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    shown = image.convert("RGBA")
    flat = Image.new("RGB", shown.size, (255, 255, 255))
    flat.paste(shown, mask=shown.getchannel("A"))
    return np.asarray(flat)


def _encoded(content: bytes | np.ndarray, settings: Settings) -> tuple[bytes, str, bytes]:
    """A tile's bytes, how they came about, and the digest that finds its copies."""
    if isinstance(content, bytes):
        return content, SOURCE, hashlib.sha256(content).digest()[:16]
    content = np.ascontiguousarray(content)
    return (jpeg.encode(content, settings.quality, settings.subsampling),
            f"jpeg-{settings.quality}-{settings.subsampling}", hashlib.sha256(content.data).digest()[:16])


def _looks(looks: judge.Looks) -> list[tuple[float, float, float]]:
    """What is kept of them, a tile each."""
    return list(zip(looks.focus.tolist(), looks.density.tolist(), looks.hue.tolist(), strict=True))


def _sentence(error: Exception, source: Source) -> str:
    """An error's words, the same in every run and wherever the file lies."""
    if isinstance(error, UnidentifiedImageError):
        return "no picture that we know" if source.path.stat().st_size else "it is empty"
    return (str(error) or type(error).__name__).replace(source.file, source.filename)
