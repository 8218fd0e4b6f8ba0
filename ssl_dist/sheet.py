"""A picture of what an encoder will see: a tile a row, first whole, then its views. Look at it before training."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from ssl_dist.data import augment, opencv, presets, stain
from ssl_dist.data.batch import View, each
from ssl_dist.data.decode import Decoder
from ssl_dist.data.loader import Palettes, Undecodable
from ssl_dist.data.reader import Reader

SIDE, GAP, LINE = 112, 6, 16        # pixels: the widest picture, between two, of a line of words
WIDTH, WHITE = 1200, (255, 255, 255)


@dataclass(frozen=True)
class Strip:
    """One way to draw a tile's views, and the words that stand above them."""

    title: str
    views: tuple[View, ...]


def strips(name: str, fit: stain.Fit | None) -> list[Strip]:
    """A preset without and with each stain step; those that need a fit, where there is one."""
    base = presets.PRESETS[name].views
    plain = each(replace(view, stain=0.0, randstain=0.0, basis="fixed") for view in base)
    amount = max(view.stain for view in base) or 0.05

    def changed(**changes: float | str | bool) -> tuple[View, ...]:
        return tuple(replace(view, **changes) for view in plain)       # type: ignore[arg-type]

    found = [Strip(f"{name}, no stain step", plain), Strip(f"{name}, stain {amount:g}", changed(stain=amount))]
    if fit:
        found += [Strip(f"{name}, stain {amount:g} in the slide's own basis", changed(stain=amount, basis="slide")),
                  Strip(f"{name}, normalised to the reference", changed(basis="reference")),
                  Strip(f"{name}, randstain", changed(randstain=1.0, randstain_spread=0.7)),
                  Strip(f"{name}, randstain from the mixture", changed(randstain=1.0, randstain_mixture=True))]
    return found


def of(reader: Reader, rows: np.ndarray, drawn: Sequence[Strip], fit: stain.Fit | None, seed: int) -> Image.Image:
    """Every strip of the tiles at `rows`, one below the other."""
    pictures = Decoder(len(rows), 1).open(reader.read(rows))
    images = [pictures(place) for place in range(len(rows))]
    if pictures.bad:
        raise Undecodable(pictures.bad, rows, reader)
    palette = Palettes(reader, fit)(rows) if fit else None
    blocks = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for strip in drawn:
            numbers = [augment.numbers(view, augment.uniforms(seed, 0, place, 0, len(rows)), palette)
                       for place, view in enumerate(strip.views)]
            views = opencv.views(images.__getitem__, numbers, [view.size for view in strip.views], pool)
            blocks.append((strip.title, [views[place] for place in range(len(views))]))
    return paste(images, blocks)


def paste(images: list[np.ndarray], blocks: list[tuple[str, list[np.ndarray]]]) -> Image.Image:
    """Tiles and, block by block, their views in one picture; small views are small, one above the other."""
    largest = max(view.shape[1] for _, views in blocks for view in views)
    drawn = [_block(images, title, views, largest) for title, views in blocks]
    left = top = down = 0
    corners = []
    for block in drawn:         # side by side while there is room
        if left and left + block.width > WIDTH:
            left, top = 0, down
        corners.append((left, top))
        left, down = left + block.width + 2 * GAP, max(down, top + block.height)
    sheet = Image.new("RGB", (max(x + block.width for (x, _), block in zip(corners, drawn, strict=True)), down), WHITE)
    for corner, block in zip(corners, drawn, strict=True):
        sheet.paste(block, corner)
    return sheet


def _block(images: list[np.ndarray], title: str, views: list[np.ndarray], largest: int) -> Image.Image:
    """A tile a row, its views beside it, below a line of words."""
    places = _places([max(SIDE * view.shape[1] // largest, 16) for view in views])
    head = LINE if title else 0
    width = max(max(left + side for left, _, side in places) + GAP, 6 * len(title) + 2 * GAP)
    block = Image.new("RGB", (width, head + len(images) * (SIDE + GAP) + 2 * GAP), WHITE)
    ImageDraw.Draw(block).text((GAP, 3), title, fill=(0, 0, 0))
    for number, image in enumerate(images):
        top = head + GAP + number * (SIDE + GAP)
        for picture, (left, down, side) in zip([image, *(view[number] for view in views)],
                                               [(GAP, 0, SIDE), *places], strict=True):
            block.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS), (left, top + down))
    return block


def _places(sides: list[int]) -> list[tuple[int, int, int]]:
    """Left, top and side of each view beside its tile, column by column."""
    found: list[tuple[int, int, int]] = []
    left, down, column = SIDE + 4 * GAP, 0, 0
    for side in sides:
        if down and (side != column or down + side > SIDE):
            left, down = left + column + GAP, 0
        found.append((left, down, side))
        column, down = side, down + side + GAP
    return found
