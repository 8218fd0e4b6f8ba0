"""How well objects that were found are those that are there: panoptic quality, AJI, Dice, and by type mPQ and F1.

Two objects match whose intersection is more than half of their union: none can match two. Figures are taken a region
and then averaged, as the papers do; what begins with `pooled_` counts the objects of all regions together, so that a
region without any is not passed over.

R regions   T true objects   G guessed ones   P pairs that overlap   C types
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from ssl_dist.eval.metrics import Measure, Numbers

MATCH = 0.5
NEAR = 12               # pixels between centres of mass, as HoVer-Net's F1 of types pairs nuclei: 3 µm at 0.25 µm/px


@dataclass
class Objects:
    """A map of numbers (1 to N), and the type of each, from 1 on; 0: nobody says."""

    numbers_HW: np.ndarray
    types_N: np.ndarray
    middle_N2: np.ndarray               # x, y

    @classmethod
    def of(cls, numbers_HW: np.ndarray, types_HW: np.ndarray | None = None) -> "Objects":
        """From maps: an object's type is what most of its pixels are, nothing not counted."""
        count = int(numbers_HW.max(initial=0))
        y_P, x_P = np.nonzero(numbers_HW)
        whose_P = numbers_HW[y_P, x_P] - 1
        size_N = np.maximum(np.bincount(whose_P, minlength=count), 1)
        middle_N2 = np.stack([np.bincount(whose_P, weights=each, minlength=count) / size_N for each in (x_P, y_P)],
                             axis=1)
        types_N = np.zeros(count, np.int64)
        if types_HW is not None and count:
            kinds = int(types_HW.max()) + 1
            votes_NK = np.bincount(whose_P * kinds + types_HW[y_P, x_P], minlength=count * kinds).reshape(count, kinds)
            votes_NK[:, 0] = 0
            types_N = votes_NK.argmax(axis=1)
        return cls(numbers_HW, types_N, middle_N2)


@dataclass
class Tally:
    """What one region comes to."""

    aji: float
    dice: float
    counts_C3: np.ndarray               # matched, guessed in vain, missed: of all, and of each type
    quality_C: np.ndarray               # the sum of intersection over union of what matched, likewise
    near_C4: np.ndarray                 # as F1 counts: both, guessed and not so, so and not guessed, alone (halved)
    confusion_CC: np.ndarray            # of what matched, by type

    @property
    def pq_C(self) -> np.ndarray:
        """Panoptic quality of all, and of each type; no number where none is there, whatever was guessed (PanNuke)."""
        return _over(self.quality_C, self.counts_C3 @ (1, 0.5, 0.5), there=self.counts_C3[:, 0] + self.counts_C3[:, 2])


def tally(truth: Objects, guess: Objects, types: int) -> Tally:
    """Holds one region's objects against those that are there."""
    pair_P2, both_P, size_T, size_G = overlaps(truth.numbers_HW, guess.numbers_HW)
    ratio_P = both_P / (size_T[pair_P2[:, 0]] + size_G[pair_P2[:, 1]] - both_P)
    match = ratio_P > MATCH
    matched_T, matched_G = pair_P2[match].T
    true_C, guess_C = truth.types_N[matched_T], guess.types_N[matched_G]
    counts, quality = [], []
    for kind in range(types + 1):
        same = np.ones(len(matched_T), bool) if not kind else (true_C == kind) & (guess_C == kind)
        there = len(size_T) if not kind else int((truth.types_N == kind).sum())
        guessed = len(size_G) if not kind else int((guess.types_N == kind).sum())
        counts.append((same.sum(), guessed - same.sum(), there - same.sum()))
        quality.append(ratio_P[match][same].sum())
    confusion_CC = np.zeros((types, types), np.int64)
    known = (true_C > 0) & (guess_C > 0)
    np.add.at(confusion_CC, (true_C[known] - 1, guess_C[known] - 1), 1)
    areas = size_T.sum(), size_G.sum()
    return Tally(aji=_aji(pair_P2, both_P, ratio_P, size_T, size_G),
                 dice=float(2 * both_P.sum() / sum(areas)) if sum(areas) else float("nan"),
                 counts_C3=np.array(counts, np.float64), quality_C=np.array(quality, np.float64),
                 near_C4=_near(truth, guess, types), confusion_CC=confusion_CC)


def overlaps(truth_HW: np.ndarray, guess_HW: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of objects (P, 2) that share pixels, by places from 0 on; how many they share; pixels of each."""
    width = int(guess_HW.max(initial=0)) + 1
    codes, count = np.unique(truth_HW.astype(np.int64) * width + guess_HW, return_counts=True)
    pair_P2 = np.stack(np.divmod(codes, width), axis=1)
    both = (pair_P2 > 0).all(axis=1)
    size_T, size_G = (np.bincount(each.ravel(), minlength=int(each.max(initial=0)) + 1)[1:]
                      for each in (truth_HW, guess_HW))
    return pair_P2[both] - 1, count[both], size_T, size_G


def _aji(pair_P2: np.ndarray, both_P: np.ndarray, ratio_P: np.ndarray, size_T: np.ndarray, size_G: np.ndarray) -> float:
    """The aggregated Jaccard index: each true object with the guess that it shares most with, which may serve twice."""
    union = float(size_T.sum() + size_G.sum())
    if not union:
        return float("nan")
    order = np.lexsort((pair_P2[:, 1], -ratio_P, pair_P2[:, 0]))        # of equals the first
    _, first = np.unique(pair_P2[order, 0], return_index=True)
    best = order[first]
    used, times = np.unique(pair_P2[best, 1], return_counts=True)
    shared = float(both_P[best].sum())
    return shared / (union - shared + float((size_G[used] * (times - 1)).sum()))


def _near(truth: Objects, guess: Objects, types: int) -> np.ndarray:
    """What HoVer-Net's F1 counts, of detection and of each type: pairs of the least distance in all, none beyond NEAR.
    """
    apart_TG = np.linalg.norm(truth.middle_N2[:, None] - guess.middle_N2[None], axis=-1)
    true, guessed = linear_sum_assignment(apart_TG)
    near = apart_TG[true, guessed] <= NEAR
    true, guessed = true[near], guessed[near]
    missed = np.delete(truth.types_N, true)
    vain = np.delete(guess.types_N, guessed)
    rows = [(len(true), 0, 0, (len(missed) + len(vain)) / 2)]
    for kind in range(1, types + 1):
        is_T, is_G = truth.types_N[true] == kind, guess.types_N[guessed] == kind
        rows.append(((is_T & is_G).sum(), (~is_T & is_G).sum(), (is_T & ~is_G).sum(),
                     ((missed == kind).sum() + (vain == kind).sum()) / 2))
    return np.array(rows, np.float64)


def measured(tallies: list[Tally], classes: list[str], tissues: list[str]) -> Measure:
    """Figures of all regions under weights of them. mPQ as PanNuke has it: the mean over the types that a region has,
    then over the regions of a tissue, then over tissues."""
    pq_RC = np.array([each.pq_C for each in tallies])
    counts_RC3 = np.array([each.counts_C3 for each in tallies])
    quality_RC, near_RC4 = (np.array([getattr(each, name) for each in tallies]) for name in ("quality_C", "near_C4"))
    found, matched = counts_RC3[:, 0] @ (1, 0.5, 0.5), counts_RC3[:, 0, 0]
    alone = {"pq": pq_RC[:, 0], "dq": _over(matched, found, there=matched + counts_RC3[:, 0, 2]),
             "sq": _over(quality_RC[:, 0], matched, there=matched), "aji": np.array([each.aji for each in tallies]),
             "dice": np.array([each.dice for each in tallies])}
    kinds = np.unique(tissues, return_inverse=True)[1]

    def measure(weights_R: Numbers | None = None) -> dict[str, float]:
        weights_R = np.ones(len(tallies)) if weights_R is None else weights_R
        told = {name: _mean(values_R, weights_R) for name, values_R in alone.items()}
        counts_C3, quality_C = np.einsum("r,rck->ck", weights_R, counts_RC3), weights_R @ quality_RC
        pooled_C = _over(quality_C, counts_C3 @ (1, 0.5, 0.5), there=counts_C3.sum(axis=1))
        told["pooled_pq"] = float(pooled_C[0])
        if classes:
            types_R = np.array([_mean(row, np.ones(len(row))) for row in pq_RC[:, 1:]])
            told["mpq"] = _mean(np.array([_mean(types_R[kinds == kind], weights_R[kinds == kind])
                                          for kind in range(kinds.max() + 1)]), np.ones(kinds.max() + 1))
            told["pooled_mpq"] = _mean(pooled_C[1:], np.ones(len(classes)))
        near_C4 = np.einsum("r,rck->ck", weights_R, near_RC4)
        # Of a pair whose types differ each side counts whole, and what has no partner half (HoVer-Net: 2, 2, 1, 1).
        f1_C = _over(near_C4[:, 0], near_C4.sum(axis=1), there=near_C4.sum(axis=1))
        return {**told, "f1_detection": float(f1_C[0]),
                **{f"f1_{name.replace(' ', '_')}": float(value) for name, value in zip(classes, f1_C[1:], strict=True)}}

    return measure


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    """Over those of which something can be said."""
    known = np.isfinite(values) & (weights > 0)
    return float(np.average(values[known], weights=weights[known])) if known.any() else float("nan")


def _over(part: np.ndarray, whole: np.ndarray, there: np.ndarray) -> np.ndarray:
    """A ratio, no number where nothing is there."""
    return np.where(there > 0, part / np.where(whole > 0, whole, 1), np.nan)


def told(tallies: list[Tally], names: list[str]) -> list[dict[str, Any]]:
    """A row a region."""
    return [{"region": name, "pq": _number(each.pq_C[0]), "aji": _number(each.aji), "dice": _number(each.dice),
             "there": int(each.counts_C3[0, 0] + each.counts_C3[0, 2]),
             "found": int(each.counts_C3[0, 0] + each.counts_C3[0, 1])}
            for name, each in zip(names, tallies, strict=True)]


def _number(value: float) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None
