"""Where the tissue is: thumbnail -> mask -> corners of the tiles worth cutting."""

import numpy as np

from shards import judge

# Coarse enough to be quick, fine enough to see the wall of a fat cell, which is two microns thin.
MASK_MPP = 4.0
# Tissue is denser than the glass around it by at least FAINT (the wall of a fat cell, averaged over a mask pixel) and
# by DENSE at the most; Otsu's threshold decides between and may not wander further.
FAINT, DENSE = 0.015, 0.03
# Fat cells are empty holes of 50-100 microns: bridging so much makes fat one piece of tissue. What is then still
# narrower than a few cells is dust.
BRIDGE, DUST = 100.0, 40.0
STRIP = 64      # rows of a thumbnail at a time
THIN = 2        # for thresholds, a pixel of four tells as much


def otsu(values: np.ndarray, low: float, high: float) -> float:
    """The threshold within [low, high] that best parts `values` in two."""
    counts, edges = np.histogram(values, bins=256)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    moment = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = below * above * (moment / below - (moment[-1] - moment) / above) ** 2
    return float(np.clip(centres[np.nanargmax(np.where(np.isfinite(spread), spread, -1))], low, high))


def glass(density: np.ndarray) -> float:
    """The optical density of the empty slide, which is never quite white: the commonest among the pale pixels.

    Pure white is what was not scanned, and counts as glass only where nothing else looks like it: where no pale shade
    (two thousandths of density wide) covers a twentieth of the slide.
    """
    seen = density[::THIN, ::THIN]
    counts, edges = np.histogram(seen[seen > 0], bins=60, range=(0.0, 0.12))
    return float(edges[counts.argmax()]) if counts.max() > 0.05 * seen.size else 0.0


def mask(thumbnail: np.ndarray, mpp: float = MASK_MPP) -> np.ndarray:
    """True where there is tissue, at the thumbnail's resolution. Ink of a marker and black frames are none."""
    density, ink = np.empty(thumbnail.shape[:2], np.float32), np.empty(thumbnail.shape[:2], bool)
    for top in range(0, len(thumbnail), STRIP):     # what fits into a cache is quicker
        rows = slice(top, top + STRIP)
        red, green, blue, density[rows] = judge.densities(thumbnail[rows])
        ink[rows] = judge.pen(red, green, blue, density[rows])
    if ink[::THIN, ::THIN].all():
        return np.zeros_like(ink)
    empty = glass(density)
    found = (density > otsu(density[::THIN, ::THIN][~ink[::THIN, ::THIN]], empty + FAINT, empty + DENSE)) & ~ink
    bridge, dust = (max(1, round(width / 2 / mpp)) for width in (BRIDGE, DUST))
    margin = bridge + dust
    closed = ~_grown(~_grown(np.pad(found, margin), bridge), bridge)
    opened = _grown(~_grown(~closed, dust), dust)
    return opened[margin:-margin, margin:-margin]


def _grown(region: np.ndarray, reach: int) -> np.ndarray:
    """True within `reach` pixels (a square) of what is True; a wider reach costs little."""
    for axis in (0, 1):
        region = np.moveaxis(np.pad(region, [(reach, reach) if axis == each else (0, 0) for each in (0, 1)]), axis, 0)
        seen = 1                # so many neighbours each pixel knows of; every step doubles it
        while seen < 2 * reach + 1:
            step = min(seen, 2 * reach + 1 - seen)
            region, seen = region[:-step] | region[step:], seen + step
        region = np.moveaxis(region, 0, axis)
    return region


def corners(tissue: np.ndarray, slide: tuple[int, int], side: float) -> tuple[np.ndarray, np.ndarray]:
    """Top-left corners (N, 2) of a grid of squares of `side` level-0 pixels, and the tissue fraction (N,) of each.

    `slide` is the slide's (width, height) in level-0 pixels; squares that do not lie wholly inside are not offered.
    """
    width, height = slide
    # A billionth of slack: a product of floats may come out as 220.00000000000003, which should go ten times into 2200.
    columns, rows = int(width / side + 1e-9), int(height / side + 1e-9)
    grid = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 2)
    to_mask = np.array([tissue.shape[1] / width, tissue.shape[0] / height])
    start = np.floor(grid * side * to_mask).astype(int)
    stop = np.maximum(np.ceil((grid + 1) * side * to_mask).astype(int), start + 1)
    stop = np.minimum(stop, [tissue.shape[1], tissue.shape[0]])
    (left, top), (right, bottom) = start.T, stop.T
    if not len(grid):
        return np.empty((0, 2), np.int64), np.empty(0)
    # Sums over rectangles from running sums, along the rows first, of which only the edges of columns go on.
    along = np.zeros((tissue.shape[0], tissue.shape[1] + 1), np.int32)
    np.cumsum(tissue, axis=1, dtype=np.int32, out=along[:, 1:])
    total = np.zeros((tissue.shape[0] + 1, columns), np.int32)
    np.cumsum(along[:, right[:columns]] - along[:, left[:columns]], axis=0, out=total[1:])
    inside = total[bottom, grid[:, 0]] - total[top, grid[:, 0]]
    fraction = inside / np.maximum((right - left) * (bottom - top), 1)
    return np.round(grid * side).astype(np.int64), fraction
