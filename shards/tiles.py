"""Corners of a slide, or image files -> encoded tiles and what is known of each."""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from shards import tissue
from shards.index import ShardError
from shards.slide import Slide

SLIDES = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".dcm")
IMAGES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp")
# Below this standard deviation of grey (of 255) a tile shows nothing: glass, a mounting line, a marker's ink.
BLANK = 3.0


@dataclass(frozen=True)
class Source:
    """One slide or one image file, and what is known of it before it is opened."""

    path: Path
    name: str                       # path below the source folder, without its suffix
    slide: str
    patient: str
    split: str = ""
    label: str = ""
    mpp: float | None = None        # microns per pixel at level 0, where the header should not be asked


@dataclass(frozen=True)
class Tile:
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


@dataclass(frozen=True)
class Rejected:
    """One tile or slide left out, and why."""

    source: Source
    reason: str
    x: int | None = None
    y: int | None = None


@dataclass(frozen=True)
class Jpeg:
    """How tiles are encoded. 4:4:4 keeps the colour at full resolution, because the stain lives in it."""

    quality: int
    subsampling: str                # 4:4:4 or 4:2:0

    def __call__(self, pixels: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=self.quality, subsampling=self.subsampling)
        return buffer.getvalue()

    def __str__(self) -> str:
        return f"jpeg-{self.quality}-{self.subsampling}"


def sources(folder: Path, suffixes: tuple[str, ...], names: str) -> list[Source]:
    """Every slide or image below `folder`, in the order of its path, with what slides.csv and file names tell.

    `names` is a regular expression searched in the path below `folder`; its groups slide, patient, split and label say
    what they say. A row of `folder`/slides.csv (columns slide, patient, split, mpp, ...) goes before it.
    """
    if not folder.is_dir():
        raise ShardError(f"no source folder at {folder} (looked in {Path.cwd()}); set source= to the folder that holds "
                         "the slides or the tile images")
    table = _table(folder / "slides.csv")
    found, described = [], False
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in suffixes or not path.is_file():
            continue
        relative = path.relative_to(folder).as_posix()
        if relative.encode(errors="ignore") != os.fsencode(relative):
            raise ShardError(f"{os.fsencode(relative)!r} is not a name in UTF-8; rename it, or move it out of {folder}")
        match = re.search(names, relative) if names else None
        if names and match is None:
            raise ShardError(f"names={names!r} does not match {relative!r}; correct the expression, or move the file "
                             "out of the source folder")
        known = {name: word for name, word in (match.groupdict() if match else {}).items() if word is not None}
        # By the file's name, or, where many files are tiles of one slide, by the slide that names= found.
        row = table.get(path.stem) or table.get(known.get("slide", ""), {})
        described |= bool(row)
        known.update(row)
        slide = known.get("slide", path.stem)
        mpp = _microns(known["mpp"], path) if known.get("mpp") else None
        found.append(Source(path=path, name=Path(relative).with_suffix("").as_posix(), slide=slide,
                            # A slide is of one patient; of a tile that says nothing, the patient is unknown.
                            patient=known.get("patient", slide if suffixes == SLIDES else ""),
                            split=known.get("split", ""), label=known.get("label", ""), mpp=mpp))
    if not found:
        raise ShardError(f"nothing to shard below {folder}: no file ends in {', '.join(suffixes)}")
    if table and not described:
        raise ShardError(f"no row of {folder / 'slides.csv'} belongs to a file: its column 'slide' says "
                         f"{next(iter(table))!r}, the first slide is {found[0].slide!r}; write names without suffixes")
    return found


def _microns(word: str, path: Path) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(word)) < math.inf:
            return value
    raise ShardError(f"mpp={word!r} of {path} is not a number of microns per pixel; correct it in slides.csv or names=")


def _table(path: Path) -> dict[str, dict[str, str]]:
    if not path.is_file():
        return {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:      # spreadsheets put a mark before the first word
            rows = list(csv.DictReader(handle))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ShardError(f"{path} is not a table in UTF-8 ({error}); export it again as CSV UTF-8") from None
    if rows and "slide" not in rows[0]:
        raise ShardError(f"{path} has no column 'slide' (it has {', '.join(rows[0])}); add one")
    names = [row["slide"] for row in rows]
    if twice := {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set():
        raise ShardError(f"{path} has more than one row for slide {min(twice)!r}; keep the one that is right")
    return {row["slide"]: {name: word for name, word in row.items() if word and name} for row in rows}


def key(*parts: str) -> str:
    """A name of [a-z0-9_-] and at most 80 letters; names that had to change carry a digest, so none fall together."""
    text = "-".join(parts)
    tame = re.sub(r"[^a-z0-9_-]+", "_", text.lower())
    if tame == text and len(tame) <= 80:
        return tame
    return f"{tame[:63]}-{hashlib.blake2b(text.encode(errors='surrogateescape'), digest_size=8).hexdigest()}"


def of_slide(source: Source, *, size: int, mpp: float, min_tissue: float, annotated: bool, min_label: float,
             encode: Jpeg, slide_mpp: float | None) -> Iterator[Tile | Rejected]:
    """Every tile of the grid over one slide's tissue, `size` pixels wide at `mpp`, accepted or with a reason."""
    with Slide(source.path, source.mpp, slide_mpp) as slide:
        if mpp < 0.95 * slide.mpp:
            yield Rejected(source, f"slide coarser than asked: {slide.mpp:g} microns per pixel hold no tile of {mpp:g}")
            return
        side = size * mpp / slide.mpp
        if side > min(slide.width, slide.height):
            yield Rejected(source, f"slide smaller than a tile: {slide.width} x {slide.height} pixels of {slide.mpp:g}"
                                   f" microns hold no tile of {size} pixels of {mpp:g} microns")
            return
        found = tissue.mask(slide.thumbnail(tissue.MASK_MPP))
        labels = Annotation.read(source.path.with_suffix(".geojson"), slide) if annotated else None
        grid, fractions = tissue.corners(found, (slide.width, slide.height), side)
        for (x, y), fraction in zip(grid.tolist(), fractions, strict=True):
            if fraction < min_tissue:
                yield Rejected(source, "background", x, y)
                continue
            pixels = slide.region(x, y, (size, size), mpp)
            if pixels.mean(axis=-1).std() < BLANK:
                yield Rejected(source, "blank", x, y)
                continue
            yield Tile(key=key(source.slide, f"x{x}", f"y{y}"), source=source, x=x, y=y, mpp=mpp, size=(size, size),
                       label=labels.of(x, y, side, min_label) if labels else source.label, image=encode(pixels),
                       encoding=str(encode), digest=hashlib.blake2b(pixels.tobytes(), digest_size=16).digest())


def of_file(source: Source, *, mpp: float, encode: Jpeg) -> Tile | Rejected:
    """One image file as one tile: a sound JPEG passes untouched, everything else is decoded and encoded."""
    try:
        content = source.path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            if image.mode.startswith(("I", "F")):
                return Rejected(source, f"not an image of 8 bits a channel: its mode is {image.mode}")
            untouched = image.format == "JPEG" and image.mode == "RGB"
            pixels = np.asarray(_opaque(image))             # decodes: what cannot be decoded must not reach a tar
        encoded = content if untouched else encode(pixels)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return Rejected(source, f"not a readable image: {error}")
    digest = hashlib.blake2b(content if untouched else pixels.tobytes(), digest_size=16).digest()
    return Tile(key=key(*source.name.split("/")), source=source, x=0, y=0, mpp=source.mpp or mpp,
                size=(pixels.shape[1], pixels.shape[0]), label=source.label,
                image=encoded, encoding="source" if untouched else str(encode), digest=digest)


def _opaque(image: Image.Image) -> Image.Image:
    """RGB, and white where the image is transparent: what lies beneath was never meant to be seen."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    shown = image.convert("RGBA")
    flat = Image.new("RGB", shown.size, (255, 255, 255))
    flat.paste(shown, mask=shown.getchannel("A"))
    return flat


class Annotation:
    """A pathologist's regions (QuPath's GeoJSON), drawn once as a coarse map of classes."""

    def __init__(self, classes: list[str], drawn: np.ndarray, scale: float):
        self.classes, self.drawn, self.scale = classes, drawn, scale        # scale: map pixels per level-0 pixel

    @classmethod
    def read(cls, path: Path, slide: Slide) -> "Annotation":
        """The regions of `path`, drawn at the resolution of the tissue mask; later regions lie over earlier ones."""
        scale = slide.mpp / tissue.MASK_MPP
        canvas = Image.new("L", (max(1, round(slide.width * scale)), max(1, round(slide.height * scale))))
        classes: list[str] = []
        try:
            for region in json.loads(path.read_text())["features"]:
                name = region["properties"]["classification"]["name"]
                if name not in classes:
                    classes.append(name)
                shape = region["geometry"]
                for polygon in [shape["coordinates"]] if shape["type"] == "Polygon" else shape["coordinates"]:
                    rings = [[(x * scale, y * scale) for x, y, *_ in ring] for ring in polygon]
                    xs, ys = zip(*rings[0], strict=True)
                    left, top = max(math.floor(min(xs)), 0), max(math.floor(min(ys)), 0)
                    right, bottom = (min(math.ceil(max(axis)) + 1, side) for axis, side in zip((xs, ys), canvas.size,
                                                                                               strict=True))
                    # Cut out before it is laid on: what an earlier region drew shows through the holes.
                    stencil = Image.new("1", (max(right - left, 0), max(bottom - top, 0)))
                    for ring, ink in zip(rings, [1] + [0] * len(rings), strict=False):
                        ImageDraw.Draw(stencil).polygon([(x - left, y - top) for x, y in ring], fill=ink)
                    canvas.paste(classes.index(name) + 1, (left, top), stencil)
        except FileNotFoundError:
            raise ShardError(f"no annotation at {path}; write one beside the slide, or set labels=names") from None
        except (KeyError, TypeError, ValueError) as error:
            raise ShardError(f"{path} is not a QuPath GeoJSON of polygons ({error!r}); export it again, or set "
                             "labels=names") from None
        return cls(classes, np.asarray(canvas), scale)

    def of(self, x: int, y: int, side: float, min_label: float) -> str:
        """The class that covers at least `min_label` of the square, or "" where none does."""
        left, top, right, bottom = (round(edge * self.scale) for edge in (x, y, x + side, y + side))
        window = self.drawn[top:max(bottom, top + 1), left:max(right, left + 1)]
        cover = np.bincount(window.ravel(), minlength=len(self.classes) + 1)[1:] / max(window.size, 1)
        return self.classes[int(cover.argmax())] if cover.size and cover.max() >= min_label else ""
