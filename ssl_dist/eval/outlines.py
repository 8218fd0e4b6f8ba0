"""The outline of every object of a map of numbers, along the edges of its pixels: filled, it is the object again.

Whoever joins the centres of outer pixels, as OpenCV does, loses half a pixel all around: a fifth of a small nucleus.

E edges of pixels   corners are x, y
"""

import numpy as np

# Walked with the object on the right: along a pixel's top to the right, down its right side, and so on.
STEPS = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])


def outlines(numbers_HW: np.ndarray) -> list[list[np.ndarray]]:
    """Of each object (1 to N) its rings: corners (K, 2), closed by whoever draws them, the outer ones clockwise as
    seen on a screen and holes the other way."""
    count = int(numbers_HW.max(initial=0))
    framed = np.pad(numbers_HW, 1)
    own = framed[1:-1, 1:-1]
    starts, whose, ways = [], [], []
    # The neighbour beyond each side, and the corner of the pixel where that side's walk begins.
    for way, (beyond, corner) in enumerate([(framed[:-2, 1:-1], (0, 0)), (framed[1:-1, 2:], (1, 0)),
                                            (framed[2:, 1:-1], (1, 1)), (framed[1:-1, :-2], (0, 1))]):
        y, x = np.nonzero((own > 0) & (own != beyond))
        starts.append(np.stack([x, y], axis=1) + corner)
        whose.append(own[y, x])
        ways.append(np.full(len(x), way))
    start_E2, whose_E, way_E = np.concatenate(starts), np.concatenate(whose).astype(np.int64), np.concatenate(ways)
    end_E2 = start_E2 + STEPS[way_E]
    stride = numbers_HW.shape[1] + 1
    place_E, goal_E = (np.int64(each[:, 1]) * stride + each[:, 0] for each in (start_E2, end_E2))
    # An edge begins at a corner for its object; two do where its pixels touch by a corner alone.
    key_E = (whose_E * stride * (numbers_HW.shape[0] + 1) + place_E) * len(STEPS) + way_E
    order = np.argsort(key_E)
    place_E, goal_E, whose_E, way_E = place_E[order], goal_E[order], whose_E[order], way_E[order]
    key_E = key_E[order]
    base_E = (whose_E * stride * (numbers_HW.shape[0] + 1) + goal_E) * len(STEPS)
    following_E = np.full(len(key_E), -1)
    for turn in (1, 0, 3):      # to the right where it can: pixels that touch by a corner are apart
        wanted_E = base_E + (way_E + turn) % len(STEPS)
        at_E = np.minimum(np.searchsorted(key_E, wanted_E), max(len(key_E) - 1, 0))
        there_E = (following_E < 0) & (key_E[at_E] == wanted_E) if len(key_E) else np.zeros(0, bool)
        following_E[there_E] = at_E[there_E]
    return _walked(count, following_E.tolist(), whose_E.tolist(), way_E.tolist(),
                   np.stack([place_E % stride, place_E // stride], axis=1))


def _walked(count: int, following: list[int], whose: list[int], way: list[int], corner_E2: np.ndarray
            ) -> list[list[np.ndarray]]:
    found: list[list[np.ndarray]] = [[] for _ in range(count)]
    seen = bytearray(len(following))
    for first in range(len(following)):
        if seen[first]:
            continue
        ring, edge, before = [], first, -1
        while not seen[edge]:
            seen[edge] = 1
            if way[edge] != before:     # straight on adds no corner
                ring.append(edge)
            before, edge = way[edge], following[edge]
        if way[ring[0]] == before:      # nor does the place where the walk began
            ring.pop(0)
        found[whose[first] - 1].append(corner_E2[ring])
    return found
