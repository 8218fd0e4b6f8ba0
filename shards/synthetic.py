"""Slides painted by a stain model, for the demo, tests and benchmarks: arrangement tells the tissue, colour does not.

The tissue is two fields of concentration, haematoxylin h and eosin e; light passes by Beer and Lambert:
RGB = white * exp(-(h*H + e*E)). Shapes are (rows, columns), positions x, y in pixels, sizes in tissues micrometres.
"""

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from shards import tiff

Array = np.ndarray
Progress = Callable[[int, int], None]  # (done, total)

CLASSES: tuple[str, ...] = ("tumour", "lymphoid", "stroma", "gland", "fat", "necrosis")

LEVEL = 0.01  # optical density (natural logarithm) of one grey level of a concentration field, so 255 is 2.55
COARSE = 8.0  # micrometres per cell of the map of regions: the size of a nucleus, finer than any hand annotates
QUALITY = 87  # of the JPEG tiles; Aperio scanners write 70 to 91
SMALLEST = 256, 128.0  # pixels, micrometres: one tile of the TIFF, a few dozen nuclei
ISLAND = 120.0, 280.0  # micrometres, radius of a metastasis: some per cent of a slide of two millimetres
TRIES = 4  # places for a metastasis, of which the one with most tissue around is taken
PIECE = 1024  # tiles cut from one canvas of 1024 squared: its area nine times over at 96 px


# --- stains and scanners


@dataclass(frozen=True)
class Stain:
    """Two stain vectors (rows H, E; optical density per concentration), the white of the glass, the optics' blur."""

    scanner: str
    vectors: Array  # (2, 3)
    white: Array  # (3,) of 255
    blur: float  # sigma, micrometres


# Vectors around those of Ruifrok & Johnston 2001, H (.65 .70 .29) E (.07 .99 .11), and Macenko 2009,
# H (.56 .72 .41) E (.22 .80 .56): scanners and laboratories differ about as much as the two papers do.
SCANNERS: tuple[Stain, ...] = (
    Stain("aspen", np.array([(0.64, 0.70, 0.30), (0.15, 0.85, 0.42)]), np.array([247, 246, 247]), 0.25),
    Stain("birch", np.array([(0.80, 0.78, 0.29), (0.11, 1.10, 0.34)]), np.array([250, 246, 240]), 0.40),
    Stain("cedar", np.array([(0.43, 0.62, 0.27), (0.18, 0.61, 0.45)]), np.array([239, 243, 249]), 0.30),
    Stain("dogwood", np.array([(0.50, 0.59, 0.22), (0.16, 1.07, 0.62)]), np.array([251, 250, 251]), 0.50),
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
        # the dye bath: one factor for both, one for each. With the scanners, palest to darkest is 1 to 2.5
        vectors = vectors * np.exp(far * (rng.normal(0, 0.18) + rng.normal(0, 0.18, (2, 1))))
        white = white + far * rng.normal(0, 2, 3)
    return replace(scanner, vectors=vectors.clip(0.02, None), white=white.clip(225, 255))


def _table(stain: Stain) -> Array:
    """RGBA of every pair of grey levels (h, e) as one 32-bit word: the exponentials of a slide are 2 x 256 x 3."""
    h, e = (np.exp(-LEVEL * np.outer(np.arange(256), vector)) for vector in stain.vectors)
    rgba = np.full((256, 256, 4), 255, np.uint8)
    rgba[..., :3] = np.rint(stain.white * h[:, None] * e[None, :])
    return rgba.reshape(-1, 4).view(np.uint32).ravel()


def _develop(both: Array, table: Array) -> Array:
    """Pairs of concentrations 256 h + e (rows, columns) -> RGB (rows, columns, 3), by strips: memory stays flat."""
    pixels = np.empty((*both.shape, 3), np.uint8)
    for top in range(0, len(both), 256):
        words = table[both[top : top + 256]]
        pixels[top : top + 256] = words.view(np.uint8).reshape(*words.shape, 4)[..., :3]
    return pixels


def _expose(rng: np.random.Generator, h: Array, e: Array, blur: float) -> Array:
    """The optics' blur (pixels) and the sensor's grain, on concentrations so that Beer-Lambert holds: 256 h + e."""
    h, e = (np.asarray(Image.fromarray(field).filter(ImageFilter.GaussianBlur(blur))).clip(0, 250)
            + rng.integers(0, 5, field.shape, np.uint8) for field in (h, e))
    return h.astype(np.uint16) << 8 | e


# --- the brush: noise, mosaics, nuclei


class Stamps(NamedTuple):
    """Prerendered nuclei (count, side, side) in grey levels: haematoxylin is raised to `h`, eosin lowered to `e`."""

    h: Array
    e: Array


class Nuclei(NamedTuple):
    """Which stamp goes where (pixels, of its centre)."""

    stamps: Stamps
    x: Array
    y: Array
    which: Array


class Patch(NamedTuple):
    """A piece of one tissue: the ground (float32 concentrations) and the nuclei on it."""

    h: Array
    e: Array
    nuclei: list[Nuclei]


class Mosaic(NamedTuple):
    """Voronoi cells at every `step` pixels: distances (pixels) to first and second centre, whose, and the centres."""

    first: Array
    second: Array
    owner: Array
    x: Array
    y: Array


def _stretch(field: Array, shape: tuple[int, int], box: tuple[float, float, float, float] | None = None) -> Array:
    """A small field drawn large; box (left, top, right, bottom, in its own cells) is the part to draw."""
    return np.asarray(Image.fromarray(field).resize(shape[::-1], Image.Resampling.BILINEAR, box=box))


def _at(field: Array, x: Array, y: Array) -> Array:
    return field[y.astype(int).clip(0, field.shape[0] - 1), x.astype(int).clip(0, field.shape[1] - 1)]


@dataclass(frozen=True)
class Brush:
    """What a tissue is painted with: a random stream, the shape of the piece, and `um`, pixels per micrometre."""

    rng: np.random.Generator
    shape: tuple[int, int]
    um: float

    def noise(self, grain: float, wide: float | None = None) -> Array:
        """Noise of about unit deviation, its lumps `grain` micrometres tall and `wide` (as tall, if not given)."""
        grain, wide = grain * self.um, (wide or grain) * self.um
        if max(grain, wide) < 6:  # interpolation would show its lattice: blurred white noise instead
            sigma = max(0.5, grain / 2.4)
            white = Image.fromarray(self.rng.integers(0, 256, self.shape, np.uint8))
            # a byte deviates by 74, and a Gaussian leaves 1 / (2 sqrt(pi) sigma) of it
            gain = 2 * math.sqrt(math.pi) * sigma / 74
            return (np.asarray(white.filter(ImageFilter.GaussianBlur(sigma)), np.float32) - 127.5) * gain
        small = (128 + 48 * self._lattice(grain, wide)).clip(0, 255).astype(np.uint8)
        return (self._drawn(small, grain, wide).astype(np.float32) - 128) / 32  # a third is lost between the knots

    def swell(self, grain: float) -> Array:
        """Noise as smooth as float32: what bends coordinates must not have the 256 steps of `noise`."""
        grain *= self.um
        return self._drawn(self._lattice(grain, grain).astype(np.float32), grain, grain)

    def _lattice(self, grain: float, wide: float) -> Array:
        return self.rng.standard_normal((math.ceil(self.shape[0] / grain) + 4, math.ceil(self.shape[1] / wide) + 4))

    def _drawn(self, small: Array, grain: float, wide: float) -> Array:
        rows, columns = self.shape
        box = (1.5, 1.5, 1.5 + columns / wide, 1.5 + rows / grain)
        return np.asarray(Image.fromarray(small).resize((columns, rows), Image.Resampling.BICUBIC, box=box))

    def mosaic(self, pitch: float, step: int, jitter: float, warp: float) -> Mosaic:
        """One centre to each brick of a wall: a point's nearest is in its own course, the one above or one below."""
        low = Brush(self.rng, (math.ceil(self.shape[0] / step), math.ceil(self.shape[1] / step)), self.um / step)
        bend_x, bend_y = (warp * pitch * self.um * low.noise(0.8 * pitch) for _ in range(2))
        pitch *= self.um
        course = 0.866 * pitch  # six neighbours at equal distances
        rows, columns = math.ceil(self.shape[0] / course) + 4, math.ceil(self.shape[1] / pitch) + 5
        row, column = np.mgrid[:rows, :columns].astype(np.float32)
        shake = self.rng.uniform(-jitter, jitter, (2, rows, columns)).astype(np.float32)
        centre_x = ((column - 1.5 + 0.5 * (row % 2) + shake[0]) * pitch).ravel()
        centre_y = ((row - 1.5 + shake[1]) * course).ravel()
        y, x = ((np.arange(side, dtype=np.float32) + 0.5) * step for side in low.shape)
        x, y = x + bend_x, y[:, None] + bend_y
        first = np.full(low.shape, np.inf, np.float32)
        second, owner = first, np.zeros(low.shape, np.int32)
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

    def places(self, pitch: float, jitter: float = 0.36) -> tuple[Array, Array]:
        """Positions one `pitch` apart on a shaken hexagonal grid: crowded without lying on each other, as cells do."""
        pitch *= self.um
        rows, columns = math.ceil(self.shape[0] / (0.866 * pitch)) + 2, math.ceil(self.shape[1] / pitch) + 2
        row, column = np.mgrid[:rows, :columns]
        x = (column + 0.5 * (row % 2) - 0.5 + self.rng.uniform(-jitter, jitter, row.shape)) * pitch
        y = (row - 0.5 + self.rng.uniform(-jitter, jitter, row.shape)) * pitch * 0.866
        inside = (x >= 0) & (x < self.shape[1]) & (y >= 0) & (y < self.shape[0])
        return x[inside], y[inside]

    def stamps(self, long: float, wide: float, dark: float, *, spread: float = 0.1, bumps: float = 0.04,
               rim: float = 0.3, clumps: float = 0.2, nucleoli: int = 0, clear: float = 0.35) -> Stamps:
        """64 nuclei: ellipses with harmonics for an outline, a rim, clumped chromatin, nucleoli.

        They come four by four at sixteen orientations: stamps 4k to 4k+3 lie k*pi/16 from the x axis.
        """
        rng, um, count = self.rng, self.um, 64
        turn = np.repeat(np.arange(16, dtype=np.float32) * (np.pi / 16), 4)[:, None, None]
        scale = np.exp(rng.normal(0, spread, (2, count, 1, 1))).astype(np.float32)
        a, b = long / 2 * um * scale[0], wide / 2 * um * scale[0] * np.sqrt(scale[1])
        half = math.ceil(1.25 * max(a.max(), b.max())) + 2
        y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32)
        along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
        phi, edge = np.arctan2(across, along), np.hypot(along / a, across / b)
        outline = np.ones_like(edge)
        for k in (2, 3, 4, 5):
            size, phase = rng.normal(0, bumps * 1.5 / k, (count, 1, 1)), rng.uniform(0, 2 * np.pi, (count, 1, 1))
            outline += size * np.cos(k * phi + phase)
        depth = (1 - edge / outline) * np.sqrt(a * b)  # pixels beneath the nuclear membrane
        inside = (depth / 1.2 + 0.5).clip(0, 1)
        grain = rng.standard_normal(edge.shape, dtype=np.float32)
        for reach in range(1, 1 + max(1, round(0.4 * um))):  # clumps of chromatin are about a micrometre
            grain = grain + np.roll(grain, reach, 1)
            grain = grain + np.roll(grain, reach, 2)
        chromatin = 1 + clumps * grain / grain.std() + rim * (np.exp(-((depth / (0.7 * um)) ** 2)) - 0.5)
        for _ in range(nucleoli):
            u, v = rng.uniform(-0.45, 0.45, (2, count, 1, 1)) * np.stack([a, b])
            radius = rng.uniform(0.6, 1.2, (count, 1, 1)) * um
            chromatin += 1.1 * np.exp(-((along - u) ** 2 + (across - v) ** 2) / radius**2)
        strength = dark * np.exp(rng.normal(0, 0.12, (count, 1, 1)))
        h = (strength * chromatin.clip(0.6, None) * inside / LEVEL).clip(0, 250)
        return Stamps(h.astype(np.uint8), (255 - (255 - clear / LEVEL) * inside).astype(np.uint8))

    def strew(self, stamps: Stamps, x: Array, y: Array, angle: Array | None = None) -> Nuclei:
        """Stamps for these places (pixels), lying along `angle` (radians from the x axis) or anyhow."""
        if angle is None:
            return Nuclei(stamps, x, y, self.rng.integers(0, 64, len(x)))
        return Nuclei(stamps, x, y, np.rint(angle * 16 / np.pi).astype(int) % 16 * 4 + self.rng.integers(0, 4, len(x)))


def _stick(h: Array, e: Array, nuclei: Nuclei) -> None:
    """Press stamps onto the canvases: the one loop over nuclei, four microseconds each."""
    (stamps_h, stamps_e), (rows, columns) = nuclei.stamps, h.shape
    side = stamps_h.shape[1]
    left, top = (np.rint(centre).astype(int) - side // 2 for centre in (nuclei.x, nuclei.y))
    for x, y, k in zip(left.tolist(), top.tolist(), nuclei.which.tolist(), strict=True):
        if x < 0 or y < 0 or x + side > columns or y + side > rows:
            continue  # a nucleus cut by the border of the picture is left out
        part_h, part_e = h[y : y + side, x : x + side], e[y : y + side, x : x + side]
        np.maximum(part_h, stamps_h[k], out=part_h)
        np.minimum(part_e, stamps_e[k], out=part_e)


# --- one function per tissue


class Traits(NamedTuple):
    """How one patient's tissue of one class differs from the textbook: factors around 1."""

    size: float
    pitch: float
    dark: float
    blue: float
    pink: float


def _tumour(b: Brush, t: Traits) -> Patch:
    """Crowded, large, pleomorphic nuclei with nucleoli and some mitoses, in nests parted by thin septa."""
    cells = b.mosaic(12.5 * t.pitch * t.size, 2, jitter=0.33, warp=0.1)
    wall = np.exp(-((_stretch(cells.second - cells.first, b.shape) / (1.6 * b.um)) ** 2))
    septum, fine = (1.3 - np.abs(b.noise(90)) * 9).clip(0, 1), b.noise(1.5)
    e = 0.36 + 0.07 * b.noise(14) + 0.05 * fine + 0.13 * wall + septum * (0.18 + 0.1 * fine)
    h = (0.26 + 0.06 * b.noise(10)) * (1 - 0.8 * septum)
    inside = _at(septum, cells.x, cells.y) < 0.3
    x, y = cells.x[inside], cells.y[inside]
    large = b.stamps(11 * t.size, 8.5 * t.size, 1.2 * t.dark, spread=0.17, bumps=0.1, rim=0.55, clumps=0.22, nucleoli=2)
    mitosis = b.stamps(10, 3.5, 2.1, spread=0.15, bumps=0.25, rim=0, clumps=0.1)
    divides = b.rng.random(len(x)) < 0.012
    sx, sy = b.places(14)
    fibrous = _at(septum, sx, sy) > 0.6
    return Patch(h, e, [b.strew(b.stamps(11, 3, 1.3), sx[fibrous], sy[fibrous]),
                        b.strew(large, x[~divides], y[~divides]), b.strew(mitosis, x[divides], y[divides])])


def _lymphoid(b: Brush, t: Traits) -> Patch:
    """Dense sheets of small, round, dark nuclei with hardly any cytoplasm."""
    e = 0.24 + 0.08 * b.noise(5) + 0.05 * b.noise(1.2)
    h = 0.16 + 0.04 * b.noise(8)
    x, y = b.places(7.8 * t.pitch * t.size, jitter=0.33)
    keep = b.rng.random(len(x)) < 0.93 - 0.16 * _at(b.noise(60), x, y).clip(-0.4, 2)
    small = b.stamps(6.4 * t.size, 6.0 * t.size, 1.4 * t.dark, spread=0.08, rim=0.2, clumps=0.16)
    return Patch(h, e, [b.strew(small, x[keep], y[keep])])


def _stroma(b: Brush, t: Traits) -> Patch:
    """Wavy collagen: noise drawn out along a bent direction, clefts between bundles, spindle nuclei lying with it."""
    lean = b.rng.uniform(0, np.pi)
    y, x = (axis / b.um for axis in np.ogrid[: b.shape[0], : b.shape[1]])
    across = (y * math.cos(lean) - x * math.sin(lean)).astype(np.float32) + 26 * b.swell(110) + 3.5 * b.swell(26)
    along = (x * math.cos(lean) + y * math.sin(lean)).astype(np.float32)
    # two sheets of noise looked up along the bent coordinates: fibres 2 x 30 micrometres, bundles 9 x 65
    sheet = Brush(b.rng, (2048, 1024), 1)
    row, column = (across * 2.8).astype(np.int32) & 2047, (along * 1.6).astype(np.int32) & 1023
    fibre, cleft = sheet.noise(6, 48)[row, column], sheet.noise(25, 104)[row, column]
    e = (0.48 + 0.13 * fibre + 0.04 * b.noise(1.5)) * (1.9 - cleft).clip(0.05, 1)
    px, py = b.places(19 * t.pitch, jitter=0.5)
    down, right = _at(across, px, py + 2) - _at(across, px, py - 2), _at(across, px + 2, py) - _at(across, px - 2, py)
    spindle = b.stamps(14 * t.size, 3.4 * t.size, 1.3 * t.dark, spread=0.15)
    return Patch(0.07 + 0.02 * fibre, e, [b.strew(spindle, px, py, np.arctan2(-right, down))])


def _gland(b: Brush, t: Traits) -> Patch:
    """Crypts of normal mucosa: a lumen, tall mucinous cells, a ring of nuclei at their base; lamina propria between."""
    crypts = b.mosaic(90 * t.pitch, 4, jitter=0.15, warp=0.06)
    radius = (37 * b.um * t.pitch * np.exp(b.rng.normal(0, 0.12, len(crypts.x)))).astype(np.float32)
    depth = _stretch(crypts.first / radius[crypts.owner], b.shape)  # 0 in the middle of a crypt, 1 at its base
    lumen, inner, fine = ((0.3 - depth) * 12).clip(0, 1), ((1.0 - depth) * 12).clip(0, 1), b.noise(1.5)
    propria = 0.34 + 0.1 * b.noise(6) + 0.06 * fine
    cell = 0.30 + 0.05 * fine + 0.12 * np.exp(-(((depth - 0.32) / 0.04) ** 2))  # a brush border round the lumen
    e = (propria * (1 - inner) + cell * inner) * (1 - 0.97 * lumen)
    h = (0.1 + 0.12 * inner + 0.03 * fine) * (1 - lumen)

    def ring(at: float, thick: float, apart: float) -> tuple[Array, Array, Array]:
        """x, y and angle of cells `apart` micrometres along circles at `at` of each crypt's radius."""
        counts = np.rint(2 * np.pi * at * radius / (apart * b.um)).astype(int)
        crypt = np.repeat(np.arange(len(radius)), counts)
        nth = np.arange(len(crypt)) - np.repeat(np.cumsum(counts) - counts, counts)
        angle = (nth + b.rng.uniform(-0.25, 0.25, len(crypt))) * 2 * np.pi / counts[crypt]
        reach = radius[crypt] * b.rng.normal(at, thick, len(crypt))
        x, y = crypts.x[crypt] + reach * np.cos(angle), crypts.y[crypt] + reach * np.sin(angle)
        own = _at(depth, x, y) > at - 0.16  # where two crypts touch, no cell of one lies inside the other
        return x[own], y[own], angle[own]

    tall = b.stamps(8.5 * t.size, 4.6 * t.size, 1.15 * t.dark, spread=0.12)
    mucin = b.stamps(10, 7, 0.16, rim=0, clumps=0.1, clear=0.06)
    plasma = b.stamps(6.5, 5.5, 1.35 * t.dark, spread=0.15)
    x, y = b.places(11, jitter=0.45)
    between = (_at(depth, x, y) > 1.12) & (b.rng.random(len(x)) < 0.5 + 0.3 * _at(b.noise(50), x, y))
    return Patch(h, e, [b.strew(mucin, *ring(0.58, 0.06, 8)), b.strew(plasma, x[between], y[between]),
                        b.strew(tall, *ring(0.88, 0.035, 5 * t.size))])


def _fat(b: Brush, t: Traits) -> Patch:
    """Large empty adipocytes with thin walls, and here and there a nucleus flattened against one."""
    cells = b.mosaic(62 * t.pitch, 2, jitter=0.3, warp=0.08)
    gap = _stretch(cells.second - cells.first, b.shape)
    wall = (1.6 - gap / ((2.0 + 0.5 * b.noise(50)).clip(1.2, 4) * b.um)).clip(0, 1)
    x, y = b.places(7, jitter=0.5)
    keep = (_at(wall, x, y) > 0.9) & (b.rng.random(len(x)) < 0.3)
    x, y = x[keep], y[keep]
    down, right = _at(gap, x, y + 3) - _at(gap, x, y - 3), _at(gap, x + 3, y) - _at(gap, x - 3, y)
    flat = b.stamps(9 * t.size, 3 * t.size, 1.4 * t.dark)
    e = wall * (0.42 + 0.08 * b.noise(2))
    return Patch(0.08 * wall, e, [b.strew(flat, x, y, np.arctan2(-right, down))])


def _necrosis(b: Brush, t: Traits) -> Patch:
    """Granular pink debris, ghosts of nuclei that no longer stain, dust of broken ones."""
    lumps = b.noise(22)
    e = 0.48 + 0.09 * lumps + 0.1 * b.noise(5) + 0.12 * b.noise(1.4)
    e *= (2.4 - 1.2 * b.noise(14)).clip(0.1, 1)
    ghost = b.stamps(9 * t.size, 7.5 * t.size, 0.42 * t.dark, spread=0.2, bumps=0.12, rim=0.5)
    dust = b.stamps(2.2, 1.8, 1.2 * t.dark, spread=0.4, bumps=0.15, rim=0, clear=0.5)
    x, y = b.places(6, jitter=0.5)
    dusty = b.rng.random(len(x)) < 0.3 + 0.25 * _at(lumps, x, y)
    return Patch(0.12 + 0.05 * b.noise(6), e, [b.strew(ghost, *b.places(17 * t.pitch, jitter=0.5)),
                                               b.strew(dust, x[dusty], y[dusty])])


TISSUES = dict(zip(CLASSES, (_tumour, _lymphoid, _stroma, _gland, _fat, _necrosis), strict=True))


def _tissue(name: str, seed: int, patient: int, brush: Brush) -> Patch:
    """A piece of this patient's tissue, in grey levels."""
    factors = np.exp(_rng(seed, patient, 0, 1 + CLASSES.index(name)).normal(0, [0.08, 0.08, 0.15, 0.2, 0.2]))
    traits = Traits(*factors.tolist())
    patch = TISSUES[name](brush, traits)
    return Patch(patch.h * (traits.blue / LEVEL), patch.e * (traits.pink / LEVEL), patch.nuclei)


# --- a slide


@dataclass
class Painting:
    """A slide in memory: RGB pixels (rows, columns, 3), microns per pixel, (class, outline in pixels) of regions."""

    pixels: Array
    mpp: float
    regions: list[tuple[str, Array]]


def _layout(b: Brush, first: int) -> tuple[Array, list[str]]:
    """An irregular piece of tissue in bent Voronoi regions: region of each cell (-1: glass), class of each region."""
    y, x = np.mgrid[-1 : 1 : b.shape[0] * 1j, -1 : 1 : b.shape[1] * 1j].astype(np.float32)
    extent = max(b.shape) / b.um
    blob = 1 - np.hypot(x, y) + 0.15 * b.noise(extent / 4) + 0.012 * b.noise(56)
    margin = 0.84 + 0.06 * b.noise(extent / 6)
    blob += 4 * (margin - np.maximum(np.abs(x), np.abs(y))).clip(None, 0)  # glass all round
    tissue = blob > np.quantile(blob, b.rng.uniform(0.36, 0.50))  # so 50 to 64 % of every slide is tissue
    owner = b.mosaic(min(500.0, min(b.shape) / b.um / 2), 1, jitter=0.36, warp=0.15).owner
    # tissues reach into each other by some 20 micrometres
    y, x = (cell + 2.5 * b.noise(64) for cell in np.indices(b.shape))
    owner = np.where(tissue, _at(owner, x, y), -1)
    numbers, sizes = np.unique(owner[tissue], return_counts=True)
    renumber = np.full(owner.max() + 2, -1)
    renumber[numbers[np.argsort(-sizes, kind="stable")]] = np.arange(len(numbers))
    # classes are dealt like cards, to the largest regions first; the first card goes round with patient and slide,
    # so that even a cohort of slides with two regions each shows every class
    first %= len(CLASSES)
    deck = [card for _ in range(len(numbers) // 6 + 1) for card in b.rng.permutation(len(CLASSES)).tolist()]
    deck.insert(0, deck.pop(deck.index(first)))
    return renumber[owner], [CLASSES[card] for card in deck[: len(numbers)]]


def _node(b: Brush, metastasis: bool) -> tuple[Array, list[str]]:
    """A lymph node: sheets of lymphocytes, some stroma and fat, and in one with a metastasis an island of tumour of
    some tenths of a millimetre, anywhere in it."""
    owner, names = _layout(b, 0)
    deck = "lymphoid", "lymphoid", "lymphoid", "stroma", "fat"
    names = [deck[int(card)] for card in b.rng.integers(0, len(deck), len(names))]
    # Drawn for every node, so that one with a metastasis is else the same as without.
    radius, rough = b.rng.uniform(*ISLAND) * b.um, b.noise(60)
    down, right = np.indices(b.shape)
    places = b.rng.permutation(np.argwhere(owner >= 0))[:TRIES]
    islands = [(np.hypot(down - y, right - x) + 0.3 * radius * rough < radius) & (owner >= 0) for y, x in places]
    if metastasis:
        owner = np.where(max(islands, key=np.count_nonzero), len(names), owner)     # not on the very rim
        names = [*names, "tumour"]
    return owner, names


def _outlines(mask: Array) -> Iterator[Array]:
    """Outer borders of a mask, (points, 2) in cells: its cracks walked with the mask on the right, corners cut."""
    padded = np.pad(mask, 1)
    ends: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for down, right, start, end in ((-1, 0, (-1, -1), (0, -1)), (0, 1, (0, -1), (0, 0)),
                                    (1, 0, (0, 0), (-1, 0)), (0, -1, (-1, 0), (-1, -1))):
        for y, x in np.argwhere(padded & ~np.roll(padded, (-down, -right), (0, 1))).tolist():
            ends.setdefault((x + start[0], y + start[1]), []).append((x + end[0], y + end[1]))
    while ends:
        walk = [next(iter(ends))]
        while len(walk) == 1 or walk[-1] != walk[0]:
            crack = ends[walk[-1]]
            following = crack.pop()
            if not crack:
                del ends[walk[-1]]
            walk.append(following)
        a, b = np.array(walk[:-1], float), np.array(walk[1:], float)
        # holes come out negative; and specks under 40 by 40 micrometres nobody annotates
        if (a[:, 0] * b[:, 1] - b[:, 0] * a[:, 1]).sum() / 2 >= 25:
            yield (a + b) / 2


def paint(seed: int, patient: int, slide: int, *, size: int | tuple[int, int] = 4096, mpp: float = 0.5,
          metastasis: bool | None = None) -> Painting:
    """Paint one slide of `size` pixels (or width, height) at `mpp` microns per pixel, by its patient's scanner: of all
    tissues, or a lymph node with or without a metastasis."""
    width, height = (size, size) if isinstance(size, int) else size
    if not 0.2 <= mpp <= 2:
        raise ValueError(f"mpp={mpp} does not show nuclei well; give 0.2 to 2 micrometres per pixel")
    if min(width, height) < max(SMALLEST[0], SMALLEST[1] / mpp):
        raise ValueError(f"size={size} is too small for a slide at mpp={mpp}; "
                         f"give at least {max(SMALLEST[0], math.ceil(SMALLEST[1] / mpp))} pixels a side")
    if min(seed, patient, slide) < 0:
        raise ValueError(f"seed={seed}, patient={patient}, slide={slide}: give numbers from 0 up")
    um, rng, cell = 1 / mpp, _rng(seed, patient, slide + 1, 1), COARSE / mpp
    h, e = np.zeros((height, width), np.uint8), np.zeros((height, width), np.uint8)
    map_brush = Brush(rng, (math.ceil(height / cell), math.ceil(width / cell)), 1 / COARSE)
    owner, names = _layout(map_brush, patient + slide) if metastasis is None else _node(map_brush, metastasis)
    thickness = 1 + 0.1 * map_brush.noise(480)
    brush = Brush(rng, (height, width), um)
    dust = brush.stamps(9, 4, 0.12, spread=0.5, bumps=0.3, rim=0, clear=2.5)  # on the glass; it takes no eosin away
    nuclei = [brush.strew(dust, *brush.places(600, jitter=1))]
    regions: list[tuple[str, Array]] = []
    for number, name in enumerate(names):
        mask = owner == number
        if not mask.any():  # a metastasis has taken all of it
            continue
        regions += [(name, (line * cell).clip(0, (width, height))) for line in _outlines(mask)]
        ys, xs = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        top, left = max(0, int((ys[0] - 2) * cell)), max(0, int((xs[0] - 2) * cell))
        bottom, right = min(height, int((ys[-1] + 3) * cell)), min(width, int((xs[-1] + 3) * cell))
        brush = Brush(_rng(seed, patient, slide + 1, 100 + number), (bottom - top, right - left), um)
        patch = _tissue(name, seed, patient, brush)
        box = (left / cell, top / cell, right / cell, bottom / cell)
        soft = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(0.8)))
        ground = _stretch(soft.astype(np.float32) / 255, brush.shape, box)
        # shares of neighbours add up to one, and melt into each other over some 5 micrometres
        share = (3 * ground - 1).clip(0, 1) * _stretch(thickness, brush.shape, box)
        for canvas, field in ((h, patch.h), (e, patch.e)):
            part = canvas[top:bottom, left:right]
            part += (field * share).clip(0, 250 - part).astype(np.uint8)
        for stamps, x, y, which in patch.nuclei:
            keep = _at(ground, x, y) > 0.5  # whole nuclei only: a border never cuts one
            nuclei.append(Nuclei(stamps, x[keep] + left, y[keep] + top, which[keep]))
    for some in nuclei:
        _stick(h, e, some)
    stain = stain_of(seed, patient, slide)
    return Painting(_develop(_expose(rng, h, e, stain.blur * um), _table(stain)), mpp, regions)


# --- files


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write under a name of our own, then rename: a killed job leaves nothing half done under the final name."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_slide(path: Path, painting: Painting) -> None:
    """Write an Aperio-like pyramid (levels 1, 1/4, 1/16) and, beside it, the regions as a QuPath `<slide>.geojson`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    features = [{"type": "Feature",
                 "geometry": {"type": "Polygon", "coordinates": [np.round([*line, line[0]], 1).tolist()]},
                 "properties": {"objectType": "annotation", "classification": {"name": name}}}
                for name, line in painting.regions]
    text = json.dumps({"type": "FeatureCollection", "features": features})
    _replace(path.with_suffix(".geojson"), lambda part: part.write_text(text))
    # Last: a slide that is there has its regions.
    _replace(path, lambda part: tiff.write_pyramid(part, painting.pixels, painting.mpp, QUALITY))


def _each(job: Callable[..., object], jobs: list, workers: int, progress: Progress | None) -> None:
    """Do the jobs, here or over processes (fork or spawn: the jobs are plain values), telling how many are done."""
    if workers < 1:
        raise ValueError(f"workers={workers} cannot work; give 1 or more")
    with ExitStack() as stack:
        here = workers == 1 or len(jobs) < 2
        run = map if here else stack.enter_context(ProcessPoolExecutor(min(workers, len(jobs)))).map
        for done, _ in enumerate(run(job, jobs), 1):
            if progress is not None:
                progress(done, len(jobs))


def _paint_and_write(job: tuple[Path, int, int], seed: int, size: int | tuple[int, int], mpp: float) -> None:
    path, patient, slide = job
    write_slide(path, paint(seed, patient, slide, size=size, mpp=mpp))


def write_cohort(folder: Path, *, patients: int, slides_per_patient: int = 1, size: int | tuple[int, int] = 4096,
                 mpp: float = 0.5, seed: int = 0, test_patients: int = 2, workers: int = 1,
                 progress: Progress | None = None) -> list[Path]:
    """Write `P00-S0.svs`, its `.geojson`, ... and slides.csv; the last `test_patients` patients are its test split.

    A slide that is there is kept as it is; `progress(done, total)` counts those painted. 0 test patients: all train.
    """
    if patients < 1 or slides_per_patient < 1:
        raise ValueError(f"patients={patients}, slides_per_patient={slides_per_patient}: give 1 or more of both")
    if test_patients and not 2 <= test_patients <= patients - 2:
        raise ValueError(f"test_patients={test_patients} of {patients} patients leaves a split without two scanners; "
                         "keep at least 2 patients on either side, or test_patients=0 for no test split")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    slides = [(folder / f"P{p:02d}-S{s}.svs", p, s) for p in range(patients) for s in range(slides_per_patient)]
    table = io.StringIO()
    lines = csv.writer(table, lineterminator="\n")
    lines.writerow(["slide", "patient", "scanner", "split"])
    for path, p, _ in slides:
        split = "train" if p < patients - test_patients else "test"
        lines.writerow([path.stem, f"P{p:02d}", scanner_of(p).scanner, split])
    _replace(folder / "slides.csv", lambda part: part.write_text(table.getvalue()))
    missing = [slide for slide in slides if not slide[0].exists()]
    _each(partial(_paint_and_write, seed=seed, size=size, mpp=mpp), missing, workers, progress)
    return [path for path, _, _ in slides]


def write_nodes(folder: Path, *, train: int, test: int, size: int = 4096, mpp: float = 0.5, seed: int = 0,
                workers: int = 1, progress: Progress | None = None) -> Path:
    """Write lymph nodes as CAMELYON16 lies on a disk, half of them with a metastasis: `training/normal/normal_001.tif`,
    `training/tumor/tumor_001.tif`, `testing/images/test_001.tif`; and labels.csv, whose path is returned.

    A slide that is there is kept as it is.
    """
    both = 2 * len(SCANNERS)
    if train < both or test < both or train % both or test % both:
        raise ValueError(f"train={train}, test={test}: give multiples of {both}, so that every scanner has as many "
                         "slides with a metastasis as without")
    folder = Path(folder)
    jobs: list[tuple[Path, int, bool]] = []
    rows: list[list[str]] = []
    for number in range(train + test):
        # Scanners take turns; so must this, a round at a time, or the scanner would tell.
        metastasis = bool(number // len(SCANNERS) % 2)
        kind = "tumor" if metastasis else "normal"
        place = sum(row[1] == kind for row in rows) if number < train else number - train
        name = f"{kind if number < train else 'test'}_{place + 1:03d}"
        home = folder / (f"training/{kind}" if number < train else "testing/images")
        rows.append([name, kind, "training" if number < train else "testing"])
        jobs.append((home / f"{name}.tif", number, metastasis))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["slide", "label", "split"], *rows])
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "labels.csv", lambda part: part.write_text(text.getvalue()))
    missing = [job for job in jobs if not job[0].exists()]
    _each(partial(_paint_node, seed=seed, size=size, mpp=mpp), missing, workers, progress)
    return folder / "labels.csv"


def _paint_node(job: tuple[Path, int, bool], seed: int, size: int, mpp: float) -> None:
    path, patient, metastasis = job
    write_slide(path, paint(seed, patient, 0, size=size, mpp=mpp, metastasis=metastasis))


def write_tiles(folder: Path, *, count: int, size: int = 96, seed: int = 0, workers: int = 1,
                progress: Progress | None = None) -> None:
    """Write `count` distinct JPEG tiles of `size` pixels at 0.5 mpp as `<class>/<patient>_<nnnnnn>.jpg`, for scale.

    The same whatever `workers`; `progress(done, total)` counts pieces of up to PIECE tiles.
    """
    if count < 1:
        raise ValueError(f"count={count} tiles is nothing to write; give 1 or more")
    if not 16 <= size <= 1024:
        raise ValueError(f"size={size} pixels is no tile; give 16 to 1024")
    for name in CLASSES:
        (Path(folder) / name).mkdir(parents=True, exist_ok=True)
    piece = min(PIECE, math.ceil(count / (2 * len(CLASSES))))  # even few tiles show every class of two patients
    jobs = [(number, start, min(start + piece, count)) for number, start in enumerate(range(0, count, piece))]
    _each(partial(_cut_tiles, folder=Path(folder), size=size, seed=seed), jobs, workers, progress)


def _cut_tiles(job: tuple[int, int, int], folder: Path, size: int, seed: int) -> None:
    """Tiles start to stop, of one class and patient, from distinct corners of one canvas, each with its own stain."""
    number, start, stop = job
    patient, name = number // len(CLASSES), CLASSES[number % len(CLASSES)]
    rng, um = _rng(seed, patient, 0, 1000 + number), 2.0
    side = max(2 * size, 1024 if stop - start > 100 else 384)  # pixels; a handful of tiles needs no large canvas
    patch = _tissue(name, seed, patient, Brush(rng, (side, side), um))
    h, e = (field.clip(0, 250).astype(np.uint8) for field in (patch.h, patch.e))
    for nuclei in patch.nuclei:
        _stick(h, e, nuclei)
    stain = stain_of(seed, patient, 0)
    both = _expose(rng, h, e, stain.blur * um)
    jitters = np.exp(rng.normal(0, 0.06, (8, 2, 1)))
    canvases = [_develop(both, _table(replace(stain, vectors=stain.vectors * jitter))) for jitter in jitters]
    corners = rng.choice((side - size) ** 2, stop - start, replace=False)
    turns, colours = rng.integers(0, 8, len(corners)), rng.integers(0, len(canvases), len(corners))
    for index, corner, turn, colour in zip(range(start, stop), corners, turns, colours, strict=True):
        y, x = divmod(int(corner), side - size)
        cut = np.rot90(canvases[colour][y : y + size, x : x + size], turn)[:, :: 1 if turn < 4 else -1]
        tile = Image.fromarray(np.ascontiguousarray(cut))
        tile.save(folder / name / f"P{patient:02d}_{index:06d}.jpg", quality=QUALITY)
