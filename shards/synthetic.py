"""Slides painted by a stain model, for the demo, tests and benchmarks: the arrangement tells the tissue, not the colour.

The tissue is two fields of concentration, haematoxylin h and eosin e; light passes by Beer and Lambert:
RGB = white * exp(-(h*H + e*E)). Shapes are (rows, columns); positions are x, y; `um` is pixels per micrometre.
"""

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, ImageFilter

Array = np.ndarray
Shape = tuple[int, int]

CLASSES: tuple[str, ...] = ("tumour", "lymphoid", "stroma", "gland", "fat", "necrosis")

LEVEL = 0.01  # optical density (natural logarithm) of one grey level of a concentration field, so 255 is 2.55
COARSE = 8.0  # micrometres per cell of the map of regions: the size of a nucleus, finer than any hand annotates
QUALITY = 87  # of the JPEG tiles; Aperio scanners write 70 to 91
SMALLEST = 256  # pixels: less than one tile of the TIFF is no slide
PIECE = 512  # tiles cut from one canvas of 1024 squared: its area 4.5 times over at 96 px


# ------------------------------------------------------------------------------------------- stains and scanners


@dataclass(frozen=True)
class Stain:
    """The two stain vectors (rows H, E; optical density per unit of concentration), the white of the glass, the blur."""

    scanner: str
    vectors: Array  # (2, 3)
    white: Array  # (3,) of 255
    blur: float  # sigma, micrometres


# Unit vectors around those of Macenko 2009, H (.56 .72 .41) E (.22 .80 .56), and Ruifrok & Johnston 2001,
# H (.65 .70 .29) E (.07 .99 .11): laboratories differ about as much as the two papers do.
SCANNERS: tuple[Stain, ...] = (
    Stain("aspen", np.array([(0.64, 0.70, 0.30), (0.15, 0.85, 0.42)]), np.array([247, 246, 247]), 0.25),
    Stain("birch", np.array([(0.70, 0.62, 0.22), (0.09, 0.92, 0.28)]) * 1.2, np.array([250, 246, 240]), 0.40),
    Stain("cedar", np.array([(0.54, 0.78, 0.34), (0.22, 0.76, 0.56)]) * 0.8, np.array([239, 243, 249]), 0.30),
    Stain("dogwood", np.array([(0.62, 0.74, 0.27), (0.13, 0.86, 0.50)]) * [[0.8], [1.25]], np.array([251, 250, 251]), 0.5),
)


def _rng(seed: int, patient: int, slide: int, part: int) -> np.random.Generator:
    """Philox is a function of its key and counter: no stream depends on what was drawn before it, or by whom."""
    key, counter = [seed, (patient << 32) + slide], [0, 0, 0, part]
    return np.random.Generator(np.random.Philox(key=np.array(key, np.uint64), counter=np.array(counter, np.uint64)))


def scanner_of(patient: int) -> Stain:
    """A patient is scanned where patients are: patient index modulo the number of scanners."""
    return SCANNERS[patient % len(SCANNERS)]


def stain_of(seed: int, patient: int, slide: int) -> Stain:
    """The stain of one slide: its scanner's, moved once by the patient and a third as far again by the slide."""
    scanner = scanner_of(patient)
    vectors, white = scanner.vectors, scanner.white
    for rng, far in ((_rng(seed, patient, 0, 0), 1.0), (_rng(seed, patient, slide + 1, 0), 0.33)):
        vectors = vectors + far * rng.normal(0, 0.04, (2, 3))
        # the dye bath: one factor for both, one for each. Pale to dark is about 1 to 2.5 over a cohort
        vectors = vectors * np.exp(far * (rng.normal(0, 0.18) + rng.normal(0, 0.18, (2, 1))))
        white = white + far * rng.normal(0, 2, 3)
    return Stain(scanner.scanner, vectors.clip(0.02, None), white.clip(225, 255), scanner.blur)


def _table(stain: Stain) -> Array:
    """RGBA of every pair of grey levels (h, e) as one 32-bit word: the exponentials of a slide are 2 x 256 x 3."""
    h, e = (np.exp(-LEVEL * np.outer(np.arange(256), vector)) for vector in stain.vectors)
    rgba = np.full((256, 256, 4), 255, np.uint8)
    rgba[..., :3] = np.rint(stain.white * h[:, None] * e[None, :])
    return rgba.reshape(-1, 4).view(np.uint32).ravel()


def _develop(h: Array, e: Array, table: Array) -> Array:
    """Concentrations (rows, columns, uint8) -> RGB (rows, columns, 3), a strip at a time so that memory stays flat."""
    pixels = np.empty((*h.shape, 3), np.uint8)
    for top in range(0, len(h), 256):
        rows = slice(top, top + 256)
        words = table[h[rows].astype(np.uint16) << 8 | e[rows]]
        pixels[rows] = words.view(np.uint8).reshape(*words.shape, 4)[..., :3]
    return pixels


# ------------------------------------------------------------------------------------------- noise, mosaics, nuclei


def _stretch(field: Array, shape: Shape, box: tuple[float, float, float, float] | None = None) -> Array:
    """A small field drawn large; box (left, top, right, bottom, in its own cells) is the part to draw."""
    image = Image.fromarray(field).resize(shape[::-1], Image.Resampling.BILINEAR, box=box)
    return np.asarray(image)


def _noise(rng: np.random.Generator, shape: Shape, grain: float, wide: float | None = None) -> Array:
    """Smooth noise of about unit deviation whose lumps are `grain` pixels tall and `wide` (if not given, grain) wide."""
    if grain < 6 and wide is None:  # interpolation would show its lattice: blurred white noise instead
        sigma = max(0.5, grain / 2.4)
        white = Image.fromarray(rng.integers(0, 256, shape, np.uint8)).filter(ImageFilter.GaussianBlur(sigma))
        # a byte deviates by 74, and a Gaussian leaves 1 / (2 sqrt(pi) sigma) of it
        return (np.asarray(white, np.float32) - 127.5) * (2 * math.sqrt(math.pi) * sigma / 74)
    wide = wide or grain
    rows, columns = math.ceil(shape[0] / grain) + 4, math.ceil(shape[1] / wide) + 4
    small = Image.fromarray((128 + 48 * rng.standard_normal((rows, columns))).clip(0, 255).astype(np.uint8))
    box = (1.5, 1.5, 1.5 + shape[1] / wide, 1.5 + shape[0] / grain)
    large = np.asarray(small.resize(shape[::-1], Image.Resampling.BICUBIC, box=box))
    return (large.astype(np.float32) - 128) * (1 / 32)  # /32, not /48: interpolation takes a third of the deviation


def _at(field: Array, x: Array, y: Array) -> Array:
    return field[y.astype(int).clip(0, field.shape[0] - 1), x.astype(int).clip(0, field.shape[1] - 1)]


@dataclass
class Mosaic:
    """Jittered Voronoi cells at every `step` pixels: distances (pixels) to the first and second centre, and whose."""

    first: Array
    second: Array
    owner: Array
    x: Array  # where the centres lie, pixels
    y: Array


def _mosaic(rng: np.random.Generator, shape: Shape, pitch: float, step: float, jitter: float, warp: float) -> Mosaic:
    """One centre in each brick of a wall: the nearest of a point lies in its own course or the one above or below."""
    course = 0.866 * pitch  # six neighbours at equal distances
    rows, columns = math.ceil(shape[0] / course) + 4, math.ceil(shape[1] / pitch) + 5
    row, column = np.mgrid[:rows, :columns].astype(np.float32)
    centre_x = (column - 1.5 + 0.5 * (row % 2) + rng.uniform(-jitter, jitter, row.shape).astype(np.float32)) * pitch
    centre_y = (row - 1.5 + rng.uniform(-jitter, jitter, row.shape).astype(np.float32)) * course
    centre_x, centre_y = centre_x.ravel(), centre_y.ravel()
    low = (math.ceil(shape[0] / step), math.ceil(shape[1] / step))
    y, x = ((np.arange(side, dtype=np.float32) + 0.5) * step for side in low)
    bend_x, bend_y = (warp * pitch * _noise(rng, low, 0.8 * pitch / step) for _ in range(2))
    x, y = x + bend_x, y[:, None] + bend_y
    first = np.full(low, np.inf, np.float32)
    second, owner = first.copy(), np.zeros(low, np.int32)
    own = (y / course + 2).astype(np.int32).clip(1, rows - 2)
    for near in (own - 1, own, own + 1):
        brick = (x / pitch + 2 - 0.5 * (near % 2)).astype(np.int32).clip(1, columns - 2) + near * columns
        for index in (brick - 1, brick, brick + 1):
            distance = np.hypot(x - centre_x[index], y - centre_y[index])
            owner = np.where(distance < first, index, owner)
            second = np.minimum(second, np.maximum(first, distance))
            first = np.minimum(first, distance)
    # a centre is drawn where the bent coordinates equal it; the bend is smooth, so one step back is close enough
    where = centre_x / step, centre_y / step
    return Mosaic(first, second, owner, centre_x - _at(bend_x, *where), centre_y - _at(bend_y, *where))


def _swell(rng: np.random.Generator, shape: Shape, grain: float) -> Array:
    """Noise as smooth as float32: what bends coordinates must not have the 256 steps of `_noise`."""
    small = rng.standard_normal([math.ceil(side / grain) + 4 for side in shape], dtype=np.float32)
    box = (1.5, 1.5, 1.5 + shape[1] / grain, 1.5 + shape[0] / grain)
    return np.asarray(Image.fromarray(small).resize(shape[::-1], Image.Resampling.BICUBIC, box=box))


@dataclass
class Stamps:
    """Prerendered nuclei in grey levels: haematoxylin is raised to `h`, eosin lowered to `e`."""

    h: Array  # (count, side, side) uint8
    e: Array


@dataclass
class Scatter:
    """Which stamp goes where (pixels, of its centre)."""

    stamps: Stamps
    x: Array
    y: Array
    which: Array


@dataclass
class Patch:
    """A piece of one tissue: the ground (float32 concentrations) and the nuclei on it."""

    h: Array
    e: Array
    nuclei: list[Scatter]


def _stamps(
    rng: np.random.Generator,
    um: float,
    *,
    long: float,
    wide: float,
    dark: float,
    spread: float = 0.1,
    bumps: float = 0.04,
    rim: float = 0.3,
    clumps: float = 0.2,
    nucleoli: int = 0,
    clear: float = 0.35,
    angles: Array | None = None,
    count: int = 64,
) -> Stamps:
    """Nuclei `long` x `wide` micrometres: an ellipse with harmonics for an outline, a rim, clumped chromatin, nucleoli."""
    angles = rng.uniform(0, np.pi, count) if angles is None else angles
    count = len(angles)
    scale = np.exp(rng.normal(0, spread, (2, count)))
    a, b = long / 2 * um * scale[0], wide / 2 * um * scale[0] * np.exp(0.5 * np.log(scale[1]))
    half = math.ceil(1.25 * float(max(a.max(), b.max()))) + 2
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32)
    a, b, turn = (v.astype(np.float32)[:, None, None] for v in (a, b, angles))
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    phi, edge = np.arctan2(across, along), np.hypot(along / a, across / b)
    outline = np.ones_like(edge)
    for k in (2, 3, 4, 5):
        size, phase = rng.normal(0, bumps * 1.5 / k, count), rng.uniform(0, 2 * np.pi, count)
        outline += size[:, None, None] * np.cos(k * phi + phase[:, None, None])
    depth = (1 - edge / outline) * np.sqrt(a * b)  # pixels beneath the nuclear membrane
    inside = (depth / 1.2 + 0.5).clip(0, 1)
    grain = rng.standard_normal(edge.shape, dtype=np.float32)
    for axis in (1, 2):  # chromatin clumps are about a micrometre
        for reach in range(1, 1 + max(1, round(0.4 * um))):
            grain = grain + np.roll(grain, reach, axis)
    chromatin = 1 + clumps * grain / grain.std() + rim * np.exp(-((depth / (0.7 * um)) ** 2)) - 0.5 * rim
    for _ in range(nucleoli):
        where = rng.uniform(-0.45, 0.45, (2, count, 1, 1)) * np.stack([a, b])
        radius = rng.uniform(0.6, 1.2, (count, 1, 1)) * um
        chromatin += 1.1 * np.exp(-((along - where[0]) ** 2 + (across - where[1]) ** 2) / radius**2)
    strength = dark * np.exp(rng.normal(0, 0.12, (count, 1, 1)))
    h = (strength * chromatin.clip(0.6, None) * inside / LEVEL).clip(0, 250)
    e = 255 - (255 - clear / LEVEL) * inside
    return Stamps(h.astype(np.uint8), e.astype(np.uint8))


def _places(rng: np.random.Generator, shape: Shape, pitch: float, jitter: float = 0.36) -> tuple[Array, Array]:
    """Positions one `pitch` apart on a jittered hexagonal grid: crowded without lying on each other, as cells do."""
    rows, columns = math.ceil(shape[0] / (0.866 * pitch)) + 2, math.ceil(shape[1] / pitch) + 2
    row, column = np.mgrid[:rows, :columns].astype(np.float32)
    x = (column + 0.5 * (row % 2) - 0.5 + rng.uniform(-jitter, jitter, row.shape)) * pitch
    y = (row - 0.5 + rng.uniform(-jitter, jitter, row.shape)) * pitch * 0.866
    inside = (x >= 0) & (x < shape[1]) & (y >= 0) & (y < shape[0])
    return x[inside], y[inside]


def _strew(rng: np.random.Generator, stamps: Stamps, x: Array, y: Array, which: Array | None = None) -> Scatter:
    return Scatter(stamps, x, y, rng.integers(0, len(stamps.h), len(x)) if which is None else which)


def _stick(h: Array, e: Array, scatter: Scatter) -> None:
    """Press the stamps onto the canvases: the one loop over nuclei, four microseconds each."""
    stamps_h, stamps_e = scatter.stamps.h, scatter.stamps.e
    side, (rows, columns) = stamps_h.shape[1], h.shape
    left, top = (np.rint(v).astype(int) - side // 2 for v in (scatter.x, scatter.y))
    for x, y, k in zip(left.tolist(), top.tolist(), scatter.which.tolist(), strict=True):
        if x < 0 or y < 0 or x + side > columns or y + side > rows:
            continue  # a nucleus cut by the border of the picture is left out
        part_h, part_e = h[y : y + side, x : x + side], e[y : y + side, x : x + side]
        np.maximum(part_h, stamps_h[k], out=part_h)
        np.minimum(part_e, stamps_e[k], out=part_e)


# ------------------------------------------------------------------------------------------- one function per tissue


@dataclass(frozen=True)
class Traits:
    """How one patient's tissue of one class differs from the textbook: factors around 1."""

    size: float
    pitch: float
    dark: float
    blue: float
    pink: float


def _traits(seed: int, patient: int, name: str) -> Traits:
    factors = np.exp(_rng(seed, patient, 0, 1 + CLASSES.index(name)).normal(0, [0.08, 0.08, 0.15, 0.2, 0.2]))
    return Traits(*factors.tolist())


def _tumour(rng: np.random.Generator, shape: Shape, um: float, t: Traits) -> Patch:
    """Crowded, large, pleomorphic nuclei with nucleoli and some mitoses, in nests parted by thin septa."""
    pitch = 12.5 * t.pitch * t.size * um
    cells = _mosaic(rng, shape, pitch, 2, jitter=0.33, warp=0.1)
    wall = np.exp(-((_stretch(cells.second - cells.first, shape) / (1.6 * um)) ** 2))
    septum = (1.3 - np.abs(_noise(rng, shape, 90 * um)) * 9).clip(0, 1)
    fine = _noise(rng, shape, 1.5 * um)
    e = 0.36 + 0.07 * _noise(rng, shape, 14 * um) + 0.05 * fine + 0.13 * wall
    e += septum * (0.18 + 0.1 * fine)
    h = (0.26 + 0.06 * _noise(rng, shape, 10 * um)) * (1 - 0.8 * septum)
    keep = _at(septum, cells.x, cells.y) < 0.3
    x, y = cells.x[keep], cells.y[keep]
    nuclei = _stamps(rng, um, long=11 * t.size, wide=8.5 * t.size, dark=1.2 * t.dark, spread=0.17, bumps=0.1,
                     rim=0.55, clumps=0.22, nucleoli=2)
    mitoses = _stamps(rng, um, long=10, wide=3.5, dark=2.1, spread=0.15, bumps=0.25, rim=0, clumps=0.1, count=16)
    divides = rng.random(len(x)) < 0.012
    sx, sy = _places(rng, shape, 14 * um)
    fibrous = _at(septum, sx, sy) > 0.6
    spindle = _stamps(rng, um, long=11, wide=3, dark=1.3)
    return Patch(h * t.blue, e * t.pink, [_strew(rng, spindle, sx[fibrous], sy[fibrous]),
                                          _strew(rng, nuclei, x[~divides], y[~divides]),
                                          _strew(rng, mitoses, x[divides], y[divides])])


def _lymphoid(rng: np.random.Generator, shape: Shape, um: float, t: Traits) -> Patch:
    """Dense sheets of small, round, dark nuclei with hardly any cytoplasm."""
    e = 0.24 + 0.08 * _noise(rng, shape, 5 * um) + 0.05 * _noise(rng, shape, 1.2 * um)
    h = 0.16 + 0.04 * _noise(rng, shape, 8 * um)
    x, y = _places(rng, shape, 7.8 * t.pitch * t.size * um, jitter=0.33)
    keep = rng.random(len(x)) < 0.93 - 0.16 * _at(_noise(rng, shape, 60 * um), x, y).clip(-0.4, 2)
    nuclei = _stamps(rng, um, long=6.4 * t.size, wide=6.0 * t.size, dark=1.4 * t.dark, spread=0.08, bumps=0.04,
                     rim=0.2, clumps=0.16)
    return Patch(h * t.blue, e * t.pink, [_strew(rng, nuclei, x[keep], y[keep])])


def _oriented(rng: np.random.Generator, um: float, long: float, wide: float, dark: float) -> Stamps:
    """Four spindle nuclei at each of sixteen orientations, stamp 4k+i pointing at k*pi/16 from the x axis."""
    angles = np.repeat(np.arange(16) * np.pi / 16, 4)
    return _stamps(rng, um, long=long, wide=wide, dark=dark, spread=0.15, bumps=0.05, rim=0.2, angles=angles)


def _along(rng: np.random.Generator, stamps: Stamps, x: Array, y: Array, angle: Array) -> Scatter:
    which = np.rint(angle * 16 / np.pi).astype(int) % 16 * 4 + rng.integers(0, 4, len(x))
    return Scatter(stamps, x, y, which)


def _stroma(rng: np.random.Generator, shape: Shape, um: float, t: Traits) -> Patch:
    """Wavy collagen: noise drawn out along a bent direction, clefts between bundles, spindle nuclei lying with it."""
    lean = rng.uniform(0, np.pi)
    y, x = np.ogrid[: shape[0], : shape[1]]
    bend, wave = (_swell(rng, shape, grain * um) for grain in (110, 26))
    across = (y * math.cos(lean) - x * math.sin(lean)).astype(np.float32) + 26 * um * bend + 3.5 * um * wave
    along = (x * math.cos(lean) + y * math.sin(lean)).astype(np.float32)
    # two sheets of noise looked up along the bent coordinates: fibres 2 x 30 micrometres, bundles 9 x 65
    row, column = (across * (2.8 / um)).astype(np.int32), (along * (1.6 / um)).astype(np.int32) & 1023
    fibre = _noise(rng, (2048, 1024), 6, 48)[row & 2047, column]
    cleft = _noise(rng, (2048, 1024), 25, 104)[row & 2047, column]
    e = (0.48 + 0.13 * fibre + 0.04 * _noise(rng, shape, 1.5 * um)) * (1.9 - cleft).clip(0.05, 1)
    h = 0.07 + 0.02 * fibre
    px, py = _places(rng, shape, 19 * t.pitch * um, jitter=0.5)
    down = _at(across, px, py + 2) - _at(across, px, py - 2)
    right = _at(across, px + 2, py) - _at(across, px - 2, py)
    spindle = _oriented(rng, um, 14 * t.size, 3.4 * t.size, 1.3 * t.dark)
    return Patch(h * t.blue, e * t.pink, [_along(rng, spindle, px, py, np.arctan2(-right, down))])


def _gland(rng: np.random.Generator, shape: Shape, um: float, t: Traits) -> Patch:
    """Crypts of normal mucosa: a lumen, tall mucinous cells, a ring of nuclei at their base; lamina propria between."""
    pitch = 90 * t.pitch * um
    crypts = _mosaic(rng, shape, pitch, 4, jitter=0.15, warp=0.06)
    radius = (0.41 * pitch * np.exp(rng.normal(0, 0.12, len(crypts.x)))).astype(np.float32)
    depth = _stretch(crypts.first / radius[crypts.owner], shape)  # 0 in the middle of a crypt, 1 at its base
    lumen, inner = ((0.3 - depth) * 12).clip(0, 1), ((1.0 - depth) * 12).clip(0, 1)
    fine = _noise(rng, shape, 1.5 * um)
    propria = 0.34 + 0.1 * _noise(rng, shape, 6 * um) + 0.06 * fine
    cell = 0.30 + 0.05 * fine + 0.12 * np.exp(-(((depth - 0.32) / 0.04) ** 2))
    e = (propria * (1 - inner) + cell * inner) * (1 - 0.97 * lumen)
    h = (0.1 + 0.12 * inner + 0.03 * fine) * (1 - lumen)
    ring: list[Array] = []
    goblet: list[Array] = []
    for cx, cy, r in zip(crypts.x, crypts.y, radius, strict=True):
        count = round(2 * np.pi * r / (5.6 * um * t.size))
        theta = (np.arange(count) + rng.uniform(-0.25, 0.25, count)) * 2 * np.pi / count
        reach = r * rng.normal(0.88, 0.035, count)
        ring.append(np.stack([cx + reach * np.cos(theta), cy + reach * np.sin(theta), theta]))
        some = theta[rng.random(count) < 0.5]
        reach = r * rng.normal(0.58, 0.06, len(some))
        goblet.append(np.stack([cx + reach * np.cos(some), cy + reach * np.sin(some), some]))
    basal, mucin = np.concatenate(ring, 1), np.concatenate(goblet, 1)
    basal = basal[:, _at(depth, basal[0], basal[1]) > 0.72]  # where two crypts touch, no nuclei of one inside the other
    tall = _oriented(rng, um, 8.5 * t.size, 4.6 * t.size, 1.15 * t.dark)
    vacuole = _stamps(rng, um, long=10, wide=7, dark=0.16, rim=0, clumps=0.1, clear=0.06)
    sx, sy = _places(rng, shape, 11 * um, jitter=0.45)
    outside = (_at(depth, sx, sy) > 1.12) & (rng.random(len(sx)) < 0.5 + 0.3 * _at(_noise(rng, shape, 50 * um), sx, sy))
    plasma = _stamps(rng, um, long=6.5, wide=5.5, dark=1.35 * t.dark, spread=0.15)
    return Patch(h * t.blue, e * t.pink, [_strew(rng, vacuole, mucin[0], mucin[1]),
                                          _strew(rng, plasma, sx[outside], sy[outside]),
                                          _along(rng, tall, basal[0], basal[1], basal[2])])


def _fat(rng: np.random.Generator, shape: Shape, um: float, t: Traits) -> Patch:
    """Large empty adipocytes with thin walls, and here and there a nucleus flattened against one."""
    cells = _mosaic(rng, shape, 62 * t.pitch * um, 2, jitter=0.3, warp=0.08)
    gap = _stretch(cells.second - cells.first, shape)
    thick = (2.0 + 0.5 * _noise(rng, shape, 50 * um)).clip(1.2, 4) * um
    wall = (1.6 - gap / thick).clip(0, 1)
    e = wall * (0.42 + 0.08 * _noise(rng, shape, 2 * um))
    h = 0.08 * wall
    spots = rng.choice(np.flatnonzero(wall > 0.9), max(1, round(wall.size / (38 * um) ** 2)))
    y, x = np.divmod(spots, shape[1])
    down, right = _at(gap, x, y + 3) - _at(gap, x, y - 3), _at(gap, x + 3, y) - _at(gap, x - 3, y)
    flat = _oriented(rng, um, 9 * t.size, 3 * t.size, 1.4 * t.dark)
    return Patch(h * t.blue, e * t.pink, [_along(rng, flat, x, y, np.arctan2(-right, down))])


def _necrosis(rng: np.random.Generator, shape: Shape, um: float, t: Traits) -> Patch:
    """Granular pink debris, ghosts of nuclei that no longer stain, dust of broken ones."""
    lumps = _noise(rng, shape, 22 * um)
    e = 0.48 + 0.09 * lumps + 0.1 * _noise(rng, shape, 5 * um) + 0.12 * _noise(rng, shape, 1.4 * um)
    e *= (2.4 - 1.2 * _noise(rng, shape, 14 * um)).clip(0.1, 1)
    h = 0.12 + 0.05 * _noise(rng, shape, 6 * um)
    gx, gy = _places(rng, shape, 17 * um * t.pitch, jitter=0.5)
    ghost = _stamps(rng, um, long=9 * t.size, wide=7.5 * t.size, dark=0.42 * t.dark, spread=0.2, bumps=0.12, rim=0.5,
                    clear=0.35)
    dx, dy = _places(rng, shape, 6 * um, jitter=0.5)
    dusty = rng.random(len(dx)) < 0.3 + 0.25 * _at(lumps, dx, dy)
    dust = _stamps(rng, um, long=2.2, wide=1.8, dark=1.2 * t.dark, spread=0.4, bumps=0.15, rim=0, clear=0.5)
    return Patch(h * t.blue, e * t.pink, [_strew(rng, ghost, gx, gy), _strew(rng, dust, dx[dusty], dy[dusty])])


TISSUES = dict(zip(CLASSES, (_tumour, _lymphoid, _stroma, _gland, _fat, _necrosis), strict=True))


# ------------------------------------------------------------------------------------------- a slide


@dataclass
class Painting:
    """A slide in memory: RGB pixels (rows, columns, 3), microns per pixel, and the outline (x, y pixels) of each region."""

    pixels: Array
    mpp: float
    regions: list[tuple[str, Array]]


@dataclass
class Layout:
    """The map of a slide in cells of COARSE micrometres: region numbers from 0 (-1 is glass), and the class of each."""

    owner: Array
    names: list[str]


def _layout(rng: np.random.Generator, shape: Shape, um: float, first: int) -> Layout:
    """An irregular outline of tissue, cut into warped Voronoi regions of about 500 micrometres."""
    low = (math.ceil(shape[0] / (COARSE * um)), math.ceil(shape[1] / (COARSE * um)))
    y, x = np.mgrid[-1 : 1 : low[0] * 1j, -1 : 1 : low[1] * 1j].astype(np.float32)
    border = 1 - np.maximum(np.abs(x), np.abs(y))
    blob = 1 - np.hypot(x, y) + 0.15 * _noise(rng, low, max(low) / 4) + 0.012 * _noise(rng, low, 7)
    blob += 4 * (border - 0.14).clip(None, 0)  # glass all round
    tissue = blob > np.quantile(blob, rng.uniform(0.30, 0.45))  # so 55 to 70 % of every slide is tissue
    pitch = min(500.0, COARSE * min(low) / 2) / COARSE
    owner = _mosaic(rng, low, pitch, 1, jitter=0.36, warp=0.15).owner
    # tissues reach into each other by some 20 micrometres
    reach = [np.arange(n).reshape(s) + 2.5 * _noise(rng, low, 8) for n, s in zip(low, ((-1, 1), (1, -1)), strict=True)]
    owner = _at(owner, reach[1], reach[0])
    owner = np.where(tissue, owner, -1)
    numbers, sizes = np.unique(owner[tissue], return_counts=True)
    numbers = numbers[np.argsort(-sizes, kind="stable")]
    # classes are dealt like cards, largest regions first; the first card goes round with patient and slide,
    # so that even a cohort of slides with two regions each shows every class
    deck = np.concatenate([rng.permutation(len(CLASSES)) for _ in range(len(numbers) // len(CLASSES) + 2)])
    deck = np.concatenate([[first % len(CLASSES)], deck[deck != first % len(CLASSES)]])
    renumber = np.full(int(owner.max()) + 2, -1)
    renumber[numbers] = np.arange(len(numbers))
    return Layout(renumber[owner], [CLASSES[k] for k in deck[: len(numbers)]])


def _outlines(mask: Array) -> Iterator[Array]:
    """Outer borders of a mask, (points, 2) in cells: walks its cracks with the mask on the right, cutting the corners."""
    m = np.pad(mask, 1)
    ends: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for (dy, dx), (x0, y0), (x1, y1) in (
        ((-1, 0), (0, 0), (1, 0)),
        ((0, 1), (1, 0), (1, 1)),
        ((1, 0), (1, 1), (0, 1)),
        ((0, -1), (0, 1), (0, 0)),
    ):
        for y, x in np.argwhere(m & ~np.roll(m, (-dy, -dx), (0, 1))).tolist():
            ends.setdefault((x + x0 - 1, y + y0 - 1), []).append((x + x1 - 1, y + y1 - 1))
    while ends:
        point = start = next(iter(ends))
        walk = []
        while True:
            walk.append(point)
            nexts = ends[point]
            point = nexts.pop()
            if not nexts:
                del ends[walk[-1]]
            if point == start:
                break
        corners = np.array(walk, float)
        following = np.roll(corners, -1, 0)
        area = (corners[:, 0] * following[:, 1] - following[:, 0] * corners[:, 1]).sum() / 2
        if area >= 25:  # holes come out negative; specks under 40 micrometres squared nobody annotates
            yield (corners + following) / 2


def paint(seed: int, patient: int, slide: int, *, size: int | tuple[int, int] = 4096, mpp: float = 0.5) -> Painting:
    """Paint one slide of `size` pixels (or width, height) at `mpp` microns per pixel; the scanner follows the patient."""
    width, height = (size, size) if isinstance(size, int) else size
    if min(width, height) < SMALLEST:
        raise ValueError(f"size={size} is too small for a slide; give at least {SMALLEST} pixels a side")
    if not 0.1 <= mpp <= 4:
        raise ValueError(f"mpp={mpp} is no magnification of nuclei; give 0.1 to 4 micrometres per pixel")
    if min(seed, patient, slide) < 0:
        raise ValueError(f"seed={seed}, patient={patient}, slide={slide}: all three must be 0 or more")
    um, shape = 1 / mpp, (height, width)
    rng = _rng(seed, patient, slide + 1, 1)
    layout = _layout(rng, shape, um, patient + slide)
    cell = COARSE * um
    thickness = 1 + 0.1 * _noise(rng, layout.owner.shape, 60)
    h, e = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    dust = _stamps(rng, um, long=9, wide=4, dark=0.12, spread=0.5, bumps=0.3, rim=0, clear=2.5)
    scatters = [_strew(rng, dust, *_places(rng, shape, 600 * um, jitter=1))]
    regions: list[tuple[str, Array]] = []
    for number, name in enumerate(layout.names):
        mask = layout.owner == number
        ys, xs = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        top, left = max(0, int((ys[0] - 2) * cell)), max(0, int((xs[0] - 2) * cell))
        bottom, right = min(height, int((ys[-1] + 3) * cell)), min(width, int((xs[-1] + 3) * cell))
        patch = TISSUES[name](_rng(seed, patient, slide + 1, 100 + number), (bottom - top, right - left), um,
                              _traits(seed, patient, name))
        soft = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(0.8))
        ground = _stretch(np.asarray(soft, np.float32), patch.h.shape,
                          (left / cell, top / cell, right / cell, bottom / cell))
        thick = _stretch(thickness, patch.h.shape, (left / cell, top / cell, right / cell, bottom / cell))
        # neighbours melt into each other over about 5 micrometres
        share = (ground * (3 / 255) - 1).clip(0, 1) * thick / LEVEL
        for canvas, field in ((h, patch.h), (e, patch.e)):
            part = canvas[top:bottom, left:right]
            part += (field * share).clip(0, 250 - part).astype(np.uint8)
        for scatter in patch.nuclei:
            keep = _at(ground, scatter.x, scatter.y) > 127  # whole nuclei only: a border never cuts one
            scatters.append(Scatter(scatter.stamps, scatter.x[keep] + left, scatter.y[keep] + top, scatter.which[keep]))
        regions += [(name, (line * cell).clip(0, (width, height))) for line in _outlines(mask)]
    for scatter in scatters:
        _stick(h, e, scatter)
    stain = stain_of(seed, patient, slide)
    h, e = _expose(rng, h, stain.blur * um), _expose(rng, e, stain.blur * um)
    return Painting(_develop(h, e, _table(stain)), mpp, regions)


def _expose(rng: np.random.Generator, field: Array, blur: float) -> Array:
    """The optics' blur (pixels) and the sensor's grain, put on concentrations so that Beer-Lambert holds to the last bit."""
    blurred = np.asarray(Image.fromarray(field).filter(ImageFilter.GaussianBlur(blur)))
    return blurred.clip(0, 250) + rng.integers(0, 5, field.shape, np.uint8)


# ------------------------------------------------------------------------------------------- files


def write_slide(path: Path, painting: Painting) -> None:
    """Write an Aperio-like pyramid (levels 1, 1/4, 1/16) and, beside it, the regions as `<slide>.geojson` for QuPath."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [np.round([*line, line[0]], 1).tolist()]},
            "properties": {"objectType": "annotation", "classification": {"name": name}},
        }
        for name, line in painting.regions
    ]
    collection = json.dumps({"type": "FeatureCollection", "features": features})
    _replace(path.with_suffix(".geojson"), lambda part: part.write_text(collection))
    _replace(path, lambda part: _write_pyramid(part, painting))  # last: a slide that is there is whole


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _write_pyramid(path: Path, painting: Painting) -> None:
    height, width, _ = painting.pixels.shape
    whole = f"Aperio Image Library v12.0.0 \r\n{width}x{height} [0,0 {width}x{height}] (256x256)"
    facts = f"AppMag = {10 / painting.mpp:g}|MPP = {painting.mpp:.4f}"
    with tifffile.TiffWriter(path) as tiff:

        def page(pixels: Array, says: str, **layout: object) -> None:
            tiff.write(pixels, description=f"{says} JPEG/RGB Q={QUALITY}|{facts}", photometric="rgb", metadata=None,
                       compression="jpeg", compressionargs={"level": QUALITY}, software=False, maxworkers=1,
                       **layout)  # type: ignore[arg-type]

        page(painting.pixels, whole, tile=(256, 256))
        level = Image.fromarray(painting.pixels)
        thumbnail = level.reduce(math.ceil(max(level.size) / 768))
        # Aperio puts the thumbnail second, in strips: readers tell it from a level by that
        page(np.asarray(thumbnail), f"{whole} -> {thumbnail.width}x{thumbnail.height}", rowsperstrip=16)
        for _ in range(2):
            level = level.reduce(4)
            page(np.asarray(level), f"{whole} -> {level.width}x{level.height}", tile=(256, 256))


def _do(function: Callable[..., object], jobs: list, workers: int, progress: Callable[[int, int], None] | None) -> None:
    """Run the jobs here or over processes, telling how many of all are done."""
    if workers < 1:
        raise ValueError(f"workers={workers} cannot work; give 1 or more")
    if workers == 1 or len(jobs) < 2:
        _count(map(function, jobs), len(jobs), progress)
    else:
        with ProcessPoolExecutor(min(workers, len(jobs))) as pool:
            _count(pool.map(function, jobs), len(jobs), progress)


def _count(results: Iterable[object], total: int, progress: Callable[[int, int], None] | None) -> None:
    for done, _ in enumerate(results, 1):
        if progress is not None:
            progress(done, total)


def _paint_and_write(job: tuple[Path, int, int, int], size: int | tuple[int, int], mpp: float) -> None:
    path, seed, patient, slide = job
    write_slide(path, paint(seed, patient, slide, size=size, mpp=mpp))


def write_cohort(
    folder: Path,
    *,
    patients: int,
    slides_per_patient: int = 1,
    size: int | tuple[int, int] = 4096,
    mpp: float = 0.5,
    seed: int = 0,
    test_patients: int = 2,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write `P00-S0.svs`, its `.geojson`, ... and slides.csv; the last `test_patients` are the test split; 0 is none.

    A slide already there is kept as it is. `progress(done, total)` is called after every slide that was painted.
    """
    if patients < 1 or slides_per_patient < 1:
        raise ValueError(f"patients={patients}, slides_per_patient={slides_per_patient}: both must be 1 or more")
    if test_patients and not 2 <= test_patients <= patients - 2:
        raise ValueError(f"test_patients={test_patients} of {patients} patients leaves a split with fewer than two scanners; "
                         "keep at least 2 patients on each side, or test_patients=0 for no test split")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = [(p, s, f"P{p:02d}-S{s}") for p in range(patients) for s in range(slides_per_patient)]
    rows = [(name, f"P{p:02d}", scanner_of(p).scanner, "train" if p < patients - test_patients else "test")
            for p, _, name in names]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("slide", "patient", "scanner", "split"), *rows])
    _replace(folder / "slides.csv", lambda part: part.write_text(text.getvalue()))
    jobs = [(path, seed, p, s) for p, s, name in names if not (path := folder / f"{name}.svs").exists()]
    _do(partial(_paint_and_write, size=size, mpp=mpp), jobs, workers, progress)
    return [folder / f"{name}.svs" for _, _, name in names]


def write_tiles(
    folder: Path,
    *,
    count: int,
    size: int = 96,
    seed: int = 0,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `count` distinct JPEG tiles of `size` pixels at 0.5 mpp as `<class>/<patient>_<nnnnnn>.jpg`, for scale tests.

    Seeded, and the same whatever `workers`; `progress(done, total)` counts batches of tiles.
    """
    if count < 1:
        raise ValueError(f"count={count} tiles is nothing to write; give 1 or more")
    if not 16 <= size <= 1024:
        raise ValueError(f"size={size} pixels is no tile; give 16 to 1024")
    folder = Path(folder)
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    piece = min(PIECE, math.ceil(count / (2 * len(CLASSES))))  # even few tiles show every class of two patients
    jobs = [(start, min(start + piece, count), number) for number, start in enumerate(range(0, count, piece))]
    _do(partial(_cut_tiles, folder=folder, size=size, seed=seed), jobs, workers, progress)


def _cut_tiles(job: tuple[int, int, int], folder: Path, size: int, seed: int) -> None:
    """Tiles start to stop, all of one class of one patient, at distinct corners of one canvas."""
    start, stop, number = job
    patient, name = number // len(CLASSES), CLASSES[number % len(CLASSES)]
    rng = _rng(seed, patient, 0, 1000 + number)
    side = max(1024, 2 * size)
    patch = TISSUES[name](rng, (side, side), 2.0, _traits(seed, patient, name))
    h, e = ((field / LEVEL).clip(0, 250).astype(np.uint8) for field in (patch.h, patch.e))
    for scatter in patch.nuclei:
        _stick(h, e, scatter)
    stain = stain_of(seed, patient, 0)
    h, e = _expose(rng, h, stain.blur * 2), _expose(rng, e, stain.blur * 2)
    both = h.astype(np.uint16) << 8 | e
    tables = [_table(Stain(stain.scanner, stain.vectors * np.exp(rng.normal(0, 0.06, (2, 1))), stain.white, 0))
              for _ in range(16)]
    corners = rng.choice((side - size) ** 2, stop - start, replace=False)
    turns, colours = rng.integers(0, 8, len(corners)), rng.integers(0, len(tables), len(corners))
    for index, corner, turn, colour in zip(range(start, stop), corners, turns, colours, strict=True):
        y, x = divmod(int(corner), side - size)
        cut = np.rot90(both[y : y + size, x : x + size], turn % 4)
        rgba = tables[colour][cut if turn < 4 else cut[:, ::-1]].view(np.uint8).reshape(size, size, 4)
        Image.fromarray(rgba[..., :3]).save(folder / name / f"P{patient:02d}_{index:06d}.jpg", quality=QUALITY)
