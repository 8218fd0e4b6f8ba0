"""A number for each tile of a slide: a picture of its grid, and GeoJSON that QuPath lays over the slide.

N tiles
"""

import io
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from shards import folder
from ssl_dist.data.bags import Bag

INCHES = 6.0        # the longer side of a picture


def picture(bag: Bag, shown_N: np.ndarray, name: str, out: Path) -> None:
    """Writes the grid, white where there is no tile; tiles that share a cell show their mean."""
    across, down = bag.cell_N2.max(axis=0) + 1
    total, count = np.zeros((down, across)), np.zeros((down, across))
    np.add.at(total, (bag.cell_N2[:, 1], bag.cell_N2[:, 0]), shown_N)
    np.add.at(count, (bag.cell_N2[:, 1], bag.cell_N2[:, 0]), 1)
    grid = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    longer = max(across, down)
    figure = Figure(figsize=(INCHES * across / longer + 1.5, max(INCHES * down / longer, 1.5)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(grid, cmap="magma", interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axis, label=name, shrink=0.8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    folder.write(out, buffer.getvalue())


def geojson(bag: Bag, shown_N: np.ndarray, name: str, out: Path) -> None:
    """Writes a square a tile, in pixels of level 0."""
    squares = []
    for (left, top), value in zip(bag.corner_N2.tolist(), shown_N.tolist(), strict=True):
        right, low = left + bag.wide, top + bag.wide
        squares.append({
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[[left, top], [right, top], [right, low], [left, low],
                                                             [left, top]]]},
            "properties": {"objectType": "tile", "measurements": {name: value}}})
    folder.write(out, json.dumps({"type": "FeatureCollection", "features": squares}).encode())
