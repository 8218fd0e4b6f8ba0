"""Views of slides: some tiles of one draw, with replacement, and where they lie, turned, flipped, stretched, shifted.

The numbers are a pure function of (seed, epoch, position, view), as a tile's are (augment.py): every view has 64
uniforms of its own, and 64 more for each 64 tiles it takes.

B slides of one rank   T tiles of a view   D width of a vector
"""

from dataclasses import dataclass

import numpy as np

from shards.draws import Draw
from ssl_dist.data import augment
from ssl_dist.data.batch import SlideView

# Which of a view's first 64 uniforms is what. Never renumber: a run that resumes must find its numbers again.
DRAW, TURN, FLIP, STRETCH, SHIFT = 0, 1, 2, 4, 6
VIEWS = 1 << 16         # views have numbers below; the uniforms of their tiles have numbers from there on


@dataclass(frozen=True)
class Numbers:
    """What is needed to draw one view of B slides."""

    draw_B: np.ndarray          # in [0, 1): which of the slide's draws
    tile_BT: np.ndarray         # in [0, 1): which of its tiles
    map_B22: np.ndarray         # linear, of (column, row) about the middle of the draw
    shift_B2: np.ndarray


def numbers(view: SlideView, seed: int, epoch: int, number: int, first: int, count: int) -> Numbers:
    """The numbers of view `number` of `count` consecutive positions from `first`."""
    u_BU = augment.uniforms(seed, epoch, number, first, count)
    blocks = -(-view.tiles // augment.UNIFORMS)
    tile_BT = np.concatenate([augment.uniforms(seed, epoch, VIEWS * (block + 1) + number, first, count)
                              for block in range(blocks)], axis=1)[:, :view.tiles]
    angle_B = np.deg2rad(view.turn) * (2 * u_BU[:, TURN] - 1)
    cos_B, sin_B = np.cos(angle_B), np.sin(angle_B)
    turn_B22 = np.stack([np.stack([cos_B, -sin_B], axis=1), np.stack([sin_B, cos_B], axis=1)], axis=1)
    low, high = view.stretch
    scale_B2 = np.where(u_BU[:, FLIP:FLIP + 2] < view.flip, -1, 1) * (low + (high - low) * u_BU[:, STRETCH:STRETCH + 2])
    return Numbers(u_BU[:, DRAW], tile_BT, turn_B22 * scale_B2[:, None, :],
                   view.shift * (2 * u_BU[:, SHIFT:SHIFT + 2] - 1))


def chosen(views: list[Numbers], draws: int) -> np.ndarray:
    """Which draw each view is of (views, B): of as many views as there are draws, no two are of the same."""
    order_VB = np.empty((len(views), len(views[0].draw_B)), np.int64)
    for number, view in enumerate(views):
        taken = np.sort(order_VB[max(number - draws + 1, 0):number], axis=0)
        left = draws - len(taken)
        pick_B = np.minimum((view.draw_B * left).astype(np.int64), left - 1)
        for other_B in taken:       # the lowest first: each that was taken before moves the rest up by one
            pick_B = pick_B + (pick_B >= other_B)
        order_VB[number] = pick_B
    return order_VB


def view(draws: list[Draw], drawn: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (B, T, D), in half precision as they are stored, and columns and rows (B, T, 2) of one view of slides."""
    count, tiles = drawn.tile_BT.shape
    features_BTD = np.empty((count, tiles, draws[0].features_TD.shape[1]), np.float16)
    cell_BT2 = np.empty((count, tiles, 2), np.float64)
    for row, draw in enumerate(draws):
        own_T = np.minimum((drawn.tile_BT[row] * len(draw.cell_T2)).astype(np.int64), len(draw.cell_T2) - 1)
        features_BTD[row] = draw.features_TD[own_T]
        cell_BT2[row] = draw.cell_T2[own_T] - draw.cell_T2.mean(axis=0)
    cell_BT2 = np.einsum("bij,btj->bti", drawn.map_B22, cell_BT2) + drawn.shift_B2[:, None]
    return features_BTD, np.rint(cell_BT2).astype(np.int64)
