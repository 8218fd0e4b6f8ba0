"""A pathologist's regions (QuPath's GeoJSON, ASAP's XML, Aperio ImageScope's XML), drawn once as a map of classes."""

import gzip
import json
import math
import re
import xml.etree.ElementTree as ElementTree
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shards import tissue
from shards.index import ShardError

# In the order in which they are looked for. A .json beside a slide may be about anything, so it comes last.
SUFFIXES = (".geojson", ".xml", ".json")
# Of a slide whose microns per pixel nobody knows: what 4 microns are of a 20x scan.
UNKNOWN_SCALE = 1 / 8
# The largest map, in pixels: a slide of 200,000 x 200,000 pixels at 0.25 microns needs 156 million at 4 microns.
MAX_MAP = 250_000_000
# What a person draws has a few megabytes; ten times more is every nucleus that a program found.
MAX_BYTES = 128 * 2**20
# No slide is as wide; what lies beyond is a mistake in the file, or meant to be one.
MAX_COORDINATE = 1e9
# Edges of a polygon are followed in pieces of about so many rows, so that a hostile one takes time and no memory.
ROWS_AT_ONCE = 4_000_000

# What lies at a pixel: nothing, a region without a class, or classes[ink - NAMED]. A region without a class was drawn
# by somebody who meant "here" and did not say what: it counts as inside, and gives no label.
NOTHING, NAMELESS, NAMED = 0, 1, 2
# Regions that take away instead of adding, and say so in their class: ASAP's word in CAMELYON, and QuPath's own class
# for what is not to be measured. QuPath's "Region*" is a frame that holds the regions that mean something.
CUTS, FRAMES = ("exclusion", "ignore*"), ("region*", "none", "")


@dataclass
class Shape:
    """One region: its outline and holes in level-0 pixels, corners x, y. It closes itself."""

    name: str                       # "" where it has no class
    outline: np.ndarray
    holes: list[np.ndarray] = field(default_factory=list)


class Annotation:
    """Which class covers which part of a slide."""

    def __init__(self, classes: list[str], drawn: np.ndarray, scale: float):
        self.classes, self.drawn, self.scale = classes, drawn, scale        # scale: map pixels per level-0 pixel

    @classmethod
    def read(cls, path: Path, size: tuple[int, int], mpp: float) -> "Annotation":
        """The regions of `path` on a slide of `size` (width, height) pixels of `mpp` microns (NaN: unknown).

        Later regions lie over earlier ones and show them through their holes; but what has a class lies over what
        has none, and what is to be left out over all, whatever the order in which a program writes them.
        """
        shapes = shapes_of(path)
        classes = list(dict.fromkeys(shape.name for shape in shapes
                                     if shape.name.lower() not in CUTS + FRAMES))
        if len(classes) > (limit := np.iinfo(np.uint16).max - NAMED):
            raise ShardError(f"{path} names {len(classes)} classes, of {limit} at most; export classes, not names of "
                             "single regions")
        width, height = size
        scale = UNKNOWN_SCALE if math.isnan(mpp) else mpp / tissue.MASK_MPP
        scale = min(scale, 1.0, math.sqrt(MAX_MAP / (width * height)))
        drawn = np.zeros((max(1, math.ceil(height * scale)), max(1, math.ceil(width * scale))),
                         np.uint8 if len(classes) + NAMED <= 256 else np.uint16)
        inks = {name: ink for ink, name in enumerate(classes, start=NAMED)}
        for shape in sorted(shapes, key=_layer):
            word = shape.name.lower()
            _draw(drawn, shape, scale, NOTHING if word in CUTS else NAMELESS if word in FRAMES else inks[shape.name])
        if any(shape.name.lower() not in CUTS for shape in shapes) and not drawn.any():
            raise ShardError(f"{path}: none of its {len(shapes)} regions lies on the slide of {width} x {height} "
                             "pixels; it belongs to another slide, or counts the pixels of another level")
        return cls(classes, drawn, scale)

    def of(self, x: float, y: float, side: float, min_label: float) -> str:
        """The class that covers at least `min_label` of the square, or "" where none does."""
        cover = self._cover(x, y, side)[NAMED:]
        return self.classes[int(cover.argmax())] if cover.size and _enough(cover.max(), min_label) else ""

    def covers(self, x: float, y: float, side: float, min_label: float) -> bool:
        """Whether regions of any class, or of none, together cover at least `min_label` of the square."""
        return _enough(self._cover(x, y, side)[NAMELESS:].sum(), min_label)

    def _cover(self, x: float, y: float, side: float) -> np.ndarray:
        """The fraction of the square, as far as it lies on the slide, that each ink covers.

        Map pixels on its border count by the part that lies in it: a tile of 64 pixels of 0.25 microns is four of them.
        """
        rows, high = _span(y * self.scale, (y + side) * self.scale, self.drawn.shape[0])
        columns, wide = _span(x * self.scale, (x + side) * self.scale, self.drawn.shape[1])
        weights = np.outer(high, wide).ravel()
        cover = np.bincount(self.drawn[rows, columns].ravel(), weights=weights,
                            minlength=len(self.classes) + NAMED)
        return cover / max(weights.sum(), 1e-12)


def find(slide_path: Path, folder: Path | None) -> Path:
    """The annotation of a slide: a file of its name in `folder`, or beside the slide."""
    place = slide_path.parent if folder is None else folder
    for suffix in SUFFIXES:
        if (path := place / (slide_path.stem + suffix)).is_file():
            return path
    raise ShardError(f"no annotation of {slide_path}: none of {', '.join(slide_path.stem + each for each in SUFFIXES)} "
                     f"in {place}; name their folder with annotations=, or do without: labels=names inside=false")


def _enough(cover: float, wanted: float) -> bool:
    # A billionth of slack for the sums above; and what is not there at all is never enough.
    return bool(cover > 1e-9 and cover >= wanted - 1e-9)


def _span(start: float, stop: float, limit: int) -> tuple[slice, np.ndarray]:
    """The pixels that [start, stop] touches, and how much of each lies in it."""
    first, last = max(math.floor(start), 0), min(math.ceil(stop), limit)
    if last <= first:
        return slice(0, 0), np.empty(0)
    return slice(first, last), np.diff(np.arange(first, last + 1, dtype=np.float64).clip(start, stop))


# --- drawing


def _layer(shape: Shape) -> int:
    """What lies over what: frames at the bottom, what is left out on top."""
    word = shape.name.lower()
    # CAMELYON17 draws "normal" into its "metastases", and ASAP's own conversion of it lays it on last.
    return 0 if word in FRAMES else 3 if word in CUTS else 2 if word == "normal" else 1


def _draw(drawn: np.ndarray, shape: Shape, scale: float, ink: int) -> None:
    outline = shape.outline * scale
    height, width = drawn.shape
    left, top = (max(math.floor(low), 0) for low in outline.min(axis=0))
    right, bottom = (min(math.ceil(high), side) for high, side in
                     zip(outline.max(axis=0), (width, height), strict=True))
    if right <= left or bottom <= top:
        return      # beside the slide
    stencil = inside(outline - (left, top), right - left, bottom - top)
    for hole in shape.holes:
        stencil &= ~inside(hole * scale - (left, top), right - left, bottom - top)
    np.copyto(drawn[top:bottom, left:right], ink, where=stencil)


def inside(ring: np.ndarray, width: int, height: int) -> np.ndarray:
    """True where the centre of a pixel lies in the ring, by the even-odd rule: an odd number of edges to its left.

    Every edge flips the pixels to its right, in the rows whose centre line it crosses; so the cost is that of the
    rows crossed and of the picture, wherever the corners lie. Pillow rounds corners down and draws outlines as wide
    as a pixel, which makes a region of ten map pixels a fifth too large.
    """
    flips = np.zeros((height, width + 1), np.uint8)     # a last column for what lies to the right of the picture
    (x0, y0), (x1, y1) = ring.T, np.roll(ring, -1, axis=0).T
    first, stop = (np.ceil(edge(y0, y1) - 0.5).clip(0, height).astype(np.int64) for edge in (np.minimum, np.maximum))
    crossed = stop - first
    pieces = np.flatnonzero(np.diff(np.cumsum(crossed) // ROWS_AT_ONCE)) + 1
    for edges in np.split(np.arange(len(ring)), pieces):
        count = crossed[edges]
        edge = np.repeat(edges, count)
        row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]
        at = x0[edge] + (row + 0.5 - y0[edge]) / (y1[edge] - y0[edge]) * (x1[edge] - x0[edge])
        np.bitwise_xor.at(flips, (row, np.ceil(at - 0.5).clip(0, width).astype(np.int64)), 1)
    return np.bitwise_xor.accumulate(flips[:, :-1], axis=1).view(bool)


# --- reading


def shapes_of(path: Path) -> list[Shape]:
    """Every region of a file, as it was drawn; one that ends in .gz is unpacked on the way."""
    if not path.is_file():
        raise ShardError(f"no annotation at {path}; write one there, or do without: labels=names inside=false")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ShardError(f"{path} has {size / 2**20:.0f} MiB, which no person drew (at most {MAX_BYTES >> 20}): export "
                         "the annotations without the objects that a program detected")
    try:
        with _opened(path) as handle:
            start = handle.read(512).removeprefix(b"\xef\xbb\xbf").lstrip()      # some programs put a mark first
        if not start:
            raise ValueError("it is empty, as a copy that failed is")
        found = _geojson(path) if start[:1] in (b"{", b"[") else _xml(path)
        return [shape for shape in found if len(shape.outline) > 2]
    except (ElementTree.ParseError, AttributeError, KeyError, TypeError, ValueError, OverflowError,
            RecursionError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        what = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ShardError(f"{path} is not an annotation as QuPath (GeoJSON), ASAP or ImageScope (XML) write it ({what});"
                         " export it again, or do without: labels=names inside=false") from None


def _opened(path: Path) -> gzip.GzipFile | BinaryIO:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _ring(points: Any) -> np.ndarray:
    ring = np.array(points, dtype=np.float64).reshape(-1, 2)
    if not (np.abs(ring) < MAX_COORDINATE).all():       # NaN is not smaller than anything
        wrong = ring[~(np.abs(ring) < MAX_COORDINATE).all(axis=1)][0]
        raise ValueError(f"a corner at x={wrong[0]:g}, y={wrong[1]:g} is on no slide")
    return ring


def _whole(path: Path) -> bytes:
    with _opened(path) as handle:
        if len(content := handle.read(MAX_BYTES + 1)) > MAX_BYTES:
            raise ValueError(f"unpacked it has more than {MAX_BYTES >> 20} MiB, which no person drew")
    return content


def _geojson(path: Path) -> Iterator[Shape]:
    content = json.loads(_whole(path).decode("utf-8-sig"))
    # QuPath writes a collection, a list of features, or one feature, as the person who exports it chooses.
    features = content if isinstance(content, list) else content.get("features", [content])
    for feature in features:
        known = feature.get("properties") or {}
        # Cells and the like were found by a program, and would riddle the region that they lie in.
        if known.get("objectType", "annotation") == "annotation" and feature["geometry"] is not None:
            yield from _geometry(feature["geometry"], _classification(known))


def _classification(known: dict[str, Any]) -> str:
    """The class of a feature; `name` beside it is what the person calls this one region."""
    told = known.get("classification") or {}
    if isinstance(told, str):
        return told.strip()
    # A class of several words, "Tumor: Positive", is a list since QuPath 0.4.
    return str(told.get("name") or ": ".join(told.get("names") or [])).strip()


def _geometry(geometry: dict[str, Any], name: str) -> Iterator[Shape]:
    kind = geometry["type"]
    if kind == "GeometryCollection":
        for each in geometry["geometries"]:
            yield from _geometry(each, name)
    elif kind in ("Polygon", "MultiPolygon"):
        for polygon in [geometry["coordinates"]] if kind == "Polygon" else geometry["coordinates"]:
            outline, *holes = (_ring([point[:2] for point in ring]) for ring in polygon or [[]])
            yield Shape(name, outline, holes)
    elif kind not in ("Point", "MultiPoint", "LineString", "MultiLineString"):      # which have no area
        raise ValueError(f"a geometry of type {kind!r}")


def _xml(path: Path) -> list[Shape]:
    reader = _Xml()
    # Fed piece by piece to a target that keeps corners only: no tree of elements, however large the file.
    parser = ElementTree.XMLParser(target=reader)
    read = 0
    with _opened(path) as handle:
        while piece := handle.read(1 << 20):
            parser.feed(piece)
            if (read := read + len(piece)) > MAX_BYTES:
                raise ValueError(f"unpacked it has more than {MAX_BYTES >> 20} MiB, which no person drew")
    parser.close()
    # CAMELYON16 is older than its names for groups: in some of its files "_0" and "_1" are its "Tumor", and "_2" its
    # "Exclusion". Elsewhere "_2" is only the third layer of an ImageScope file that ASAP read, so its own files alone.
    if re.fullmatch(r"(tumor|test)_\d{3}", path.stem) and reader.asap:
        older = {"_0": "Tumor", "_1": "Tumor", "_2": "Exclusion"}
        for shape in reader.shapes:
            shape.name = older.get(shape.name, shape.name)
    return reader.shapes


class _Xml:
    """Takes the shapes out of a stream of elements, of ASAP or of ImageScope.

    ASAP: an Annotation is a region, its PartOfGroup the class, its corners are Coordinate.
    ImageScope: an Annotation is a layer of Regions, their corners are Vertex; NegativeROA="1" cuts a hole into them.
    """

    def __init__(self) -> None:
        self.shapes: list[Shape] = []
        self.asap = False
        self.root = ""
        self.layer: dict[str, str] = {}
        self.region: dict[str, str] | None = None
        self.regions: list[tuple[dict[str, str], list[np.ndarray]]] = []
        self.points = array("d")        # order, x, y of each corner

    def doctype(self, name: str, public: str | None, system: str | None) -> None:      # noqa: ARG002
        raise ValueError("it has a DOCTYPE, which can make a small file endless, and which no annotation needs")

    def start(self, tag: str, known: dict[str, str]) -> None:
        if not self.root:
            self.root, self.asap = tag, tag == "ASAP_Annotations"
            if tag not in ("ASAP_Annotations", "Annotations"):
                raise ValueError(f"its first element is <{tag}>")
        elif tag == "Annotation":
            self.layer, self.regions, self.points = known, [], array("d")
        elif tag == "Region":
            self.region, self.points = known, array("d")
        elif tag == "Attribute" and self.region is None and known.get("Name") == "Description":
            self.layer = {**self.layer, "Description": known.get("Value", "")}
        elif tag in ("Coordinate", "Vertex"):
            self.points.extend((float(known.get("Order", len(self.points))), float(known["X"]), float(known["Y"])))

    def end(self, tag: str) -> None:
        if tag == "Region" and self.region is not None:
            self.regions.append((self.region, self._rings(self.region.get("Type", "0"))))
            self.region = None
        elif tag == "Annotation" and self.asap:
            name = self.layer.get("PartOfGroup", "").strip()
            # A spline is what ASAP shows; its masks join the corners by straight lines, and so do we.
            self.shapes += [Shape(name, ring) for ring in self._rings(self.layer.get("Type", "Polygon"))]
        elif tag == "Annotation":
            self._layer_ends()

    def _rings(self, kind: str) -> list[np.ndarray]:
        """The ring of these corners, or none where they are points, a line, an arrow or a ruler."""
        corners = np.array(self.points).reshape(-1, 3)
        ring = _ring(corners[corners[:, 0].argsort(kind="stable"), 1:])
        if not len(ring) or kind not in ("Polygon", "Spline", "Rectangle", "0", "1", "2"):
            return []
        (left, top), (right, bottom) = ring.min(axis=0), ring.max(axis=0)
        if kind == "2":             # an ellipse, by the corners of the box around it
            turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
            return [np.stack([(left + right + (right - left) * np.cos(turn)) / 2,
                              (top + bottom + (bottom - top) * np.sin(turn)) / 2], axis=1)]
        if kind in ("Rectangle", "1") and len(ring) == 2:
            return [np.array([(left, top), (right, top), (right, bottom), (left, bottom)])]
        return [ring]

    def _layer_ends(self) -> None:
        """An ImageScope layer: its regions, and what it cuts out of them and of no other layer."""
        cuts = [ring for known, rings in self.regions if known.get("NegativeROA") == "1" for ring in rings]
        low, high = (np.array([edge(ring, axis=0) for ring in cuts]).reshape(-1, 2) for edge in (np.min, np.max))
        for known, rings in self.regions:
            # A layer is what a pathologist names; where it has no name, Text is what they wrote at the single region.
            words = (self.layer.get("Name"), self.layer.get("Description"), known.get("Text"))
            name = next((word.strip() for word in words if word and word.strip()), "")
            for ring in rings if known.get("NegativeROA") != "1" else []:
                near = np.flatnonzero(((low <= ring.max(axis=0)) & (high >= ring.min(axis=0))).all(axis=1))
                self.shapes.append(Shape(name, ring, [cuts[number] for number in near]))
