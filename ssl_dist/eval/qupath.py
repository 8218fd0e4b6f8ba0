"""Nuclei as files: GeoJSON that QuPath lays over a slide, maps of numbers, and outlines drawn on a picture.

H, W pixels   N nuclei
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from shards import folder
from shards.index import ShardError
from ssl_dist.eval.outlines import outlines

# Of types, in turn; told apart by those who see red and green alike (Okabe and Ito 2008).
INKS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
TRUTH, FOUND = (0, 200, 60), (230, 30, 30)
NUCLEUS = "Nucleus"     # where types are not asked for


def features(numbers_HW: np.ndarray, top: float, left: float, scale: float, kinds_N: Sequence[int],
             nuclear_N: np.ndarray, sure_N: np.ndarray | None, classes: list[str]) -> list[str]:
    """A GeoJSON feature a nucleus: its outline in pixels of level 0 (`scale` of them a pixel here), its type and how
    sure the network is of both."""
    found = []
    for place, rings in enumerate(outlines(numbers_HW)):
        # Holes may be holes of any piece; a nucleus in pieces is its largest one.
        areas = [_area(ring) for ring in rings]
        outer = max(range(len(rings)), key=lambda each: areas[each])
        holes = [ring for ring, area in zip(rings, areas, strict=True) if area < 0 and _within(ring, rings[outer])]
        kind = kinds_N[place]
        name, ink = (classes[kind - 1], INKS[(kind - 1) % len(INKS)]) if kind else (NUCLEUS, FOUND)
        measures = {"nucleus probability": round(float(nuclear_N[place]), 4)}
        if sure_N is not None and kind:
            measures["type probability"] = round(float(sure_N[place]), 4)
        found.append(json.dumps({
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [
                _closed(ring, top, left, scale) for ring in (rings[outer], *holes)]},
            "properties": {"objectType": "detection", "classification": {"name": name, "color": list(ink)},
                           "measurements": measures}}, separators=(",", ":")))
    return found


def _area(ring: np.ndarray) -> float:
    """Positive of outer rings, negative of holes."""
    x, y = ring[:, 0].astype(np.int64), ring[:, 1].astype(np.int64)
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


def _within(ring: np.ndarray, outer: np.ndarray) -> bool:
    return bool((ring.min(axis=0) >= outer.min(axis=0)).all() and (ring.max(axis=0) <= outer.max(axis=0)).all())


def _closed(ring: np.ndarray, top: float, left: float, scale: float) -> list[list[float]]:
    corners = (np.concatenate([ring, ring[:1]]) + (left, top)) * scale
    return np.round(corners, 2).tolist() if scale != 1 else corners.astype(int).tolist()


def write_geojson(path: Path, found: list[str]) -> None:
    """A collection of features."""
    folder.write(path, '{"type":"FeatureCollection","features":[\n' + ",\n".join(found) + "\n]}\n")


def write_map(path: Path, numbers_HW: np.ndarray) -> None:
    """A map of numbers as its suffix says: .png of 16 bits, .tif of 32, .npy."""
    count, buffer = int(numbers_HW.max(initial=0)), io.BytesIO()
    if path.suffix == ".png":
        if count >= 1 << 16:
            raise ShardError(f"{path.name}: {count} nuclei are more than a PNG of 16 bits can count; use write=[tif]")
        Image.fromarray(numbers_HW.astype(np.uint16)).save(buffer, "png")
    elif path.suffix == ".tif":
        Image.fromarray(numbers_HW.astype(np.int32)).save(buffer, "tiff", compression="tiff_adobe_deflate")
    else:
        np.save(buffer, numbers_HW.astype(np.int32 if count >= 1 << 16 else np.uint16))
    folder.write(path, buffer.getvalue())


def write_picture(path: Path, image_HW3: np.ndarray, truth_HW: np.ndarray, found_HW: np.ndarray) -> None:
    """The picture twice: left with the true outlines in green, right with those found in red."""
    sides = []
    for numbers_HW, ink in ((truth_HW, TRUTH), (found_HW, FOUND)):
        side = image_HW3.copy()
        side[rims(numbers_HW)] = ink
        sides.append(side)
    gap = np.full((len(image_HW3), 8, 3), 255, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate([sides[0], gap, sides[1]], axis=1)).save(buffer, "png")
    folder.write(path, buffer.getvalue())


def rims(numbers_HW: np.ndarray) -> np.ndarray:
    """Pixels of an object beside one of another, or of none; one pixel wide between objects that touch."""
    rim_HW = np.zeros(numbers_HW.shape, bool)
    for axis in (0, 1):
        first, second = (tuple(own if each == axis else slice(None) for each in (0, 1))
                         for own in (slice(None, -1), slice(1, None)))
        apart = numbers_HW[first] != numbers_HW[second]
        rim_HW[first] |= apart & (numbers_HW[first] > numbers_HW[second])
        rim_HW[second] |= apart & (numbers_HW[second] > numbers_HW[first])
    return rim_HW
