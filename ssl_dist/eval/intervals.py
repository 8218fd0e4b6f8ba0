"""How far a figure could have come out otherwise: patients drawn anew, with replacement. Tiles of one patient stay
together, for they resemble each other and are no evidence apart.

G groups   S tiles   R drawings
"""

from typing import Any

import numpy as np

from ssl_dist.eval.metrics import Measure, Numbers

DRAWINGS = 1000
FEWEST = 5      # groups, of which drawings say anything
LEVEL = 0.95


def drawings(groups_S: np.ndarray, seed: int, count: int = DRAWINGS) -> list[Numbers]:
    """Weights of the tiles (S,): how often its group was drawn, of as many draws as there are groups. Of few
    groups drawings are so few that they would look sure: none."""
    _, place_S = np.unique(groups_S, return_inverse=True)
    if (groups := int(place_S.max()) + 1) < FEWEST:
        return []
    drawn_RG = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=count)
    return [drawn_G[place_S].astype(np.float64) for drawn_G in drawn_RG]


def intervals(measure: Measure, drawn: list[Numbers]) -> dict[str, list[float]]:
    """The middle 95 % of every figure; a drawing that says nothing of it (of one class alone) is left out."""
    return {name: _middle(values) for name, values in (_collected(measure, drawn) if drawn else {}).items()
            if np.isfinite(values).sum() > len(drawn) / 2}


def compared(measure: Measure, other: Measure, drawn: list[Numbers]) -> dict[str, dict[str, Any]]:
    """Of every figure, how much better the first is on the same drawings: difference, its middle 95 %, and how likely
    no difference would look so different, both ways."""
    if not drawn:
        return {}
    mine, theirs = _collected(measure, drawn), _collected(other, drawn)
    own, their = measure(None), other(None)
    found = {}
    for name, values in mine.items():
        apart = (values - theirs[name])[np.isfinite(values - theirs[name])]
        if len(apart) > len(drawn) / 2:
            tail = min((apart <= 0).mean(), (apart >= 0).mean())
            found[name] = {"difference": round(own[name] - their[name], 4), "interval": _middle(apart),
                           "p": round(float(min(1.0, max(2 * tail, 1 / len(apart)))), 4)}
    return found


def _collected(measure: Measure, drawn: list[Numbers]) -> dict[str, Numbers]:
    rows = [measure(weights_S) for weights_S in drawn]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _middle(values: Numbers) -> list[float]:
    edges = (1 - LEVEL) / 2, (1 + LEVEL) / 2
    return [round(float(each), 4) for each in np.nanquantile(values, edges)]
