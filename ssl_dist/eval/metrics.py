"""Figures of merit of guesses, each under weights of the tiles: a resampling is nothing but other weights.

C classes   S tiles, or slides   E events   B bins of confidence
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Whole = NDArray[np.int64]
Measure = Callable[[Numbers | None], dict[str, float]]      # figures under weights (S,); None: every tile counts once

BINS = 15       # of confidence, for the calibration error (Guo et al. 2017)


def classification(truth_S: Whole, scores_SC: Numbers, *, ordered: bool = False) -> Measure:
    """Figures of guesses among classes; `scores_SC` say how likely each is, and the likeliest is the guess.

    Of a class that does not occur nothing can be said: means over classes leave it out. AUROC is that of the second of
    two classes, of more the mean over each against the rest. The calibration error needs scores that sum to one, and
    kappa classes that have an order.
    """
    classes = scores_SC.shape[1]
    guess_S = scores_SC.argmax(axis=1)
    confident_S = scores_SC.max(axis=1)
    bin_S = np.minimum((confident_S * BINS).astype(np.int64), BINS - 1)
    ranked = [Ranked(scores_SC[:, each], truth_S == each) for each in (range(classes) if classes > 2 else (1,))]

    def measure(weights_S: Numbers | None = None) -> dict[str, float]:
        weights_S = np.ones(len(truth_S)) if weights_S is None else weights_S
        counts_CC = confusion(truth_S, guess_S, classes, weights_S)
        areas = [each.area(weights_S) for each in ranked]
        return {"accuracy": accuracy(counts_CC), "balanced_accuracy": balanced_accuracy(counts_CC),
                "macro_f1": macro_f1(counts_CC), "weighted_f1": weighted_f1(counts_CC),
                "auroc": mean([each for each in areas if np.isfinite(each)]),
                **({"quadratic_kappa": quadratic_kappa(counts_CC)} if ordered else {}),
                "calibration_error": _gap(bin_S, confident_S, guess_S == truth_S, weights_S)}

    return measure


def several(truth_SC: NDArray[np.bool_], scores_SC: Numbers) -> Measure:
    """Figures of labels of which a tile may have several, or none: means over those that occur and do not always."""
    ranked = [Ranked(scores_SC[:, each], truth_SC[:, each]) for each in range(truth_SC.shape[1])]
    guess_SC = scores_SC > 0.5

    def measure(weights_S: Numbers | None = None) -> dict[str, float]:
        weights_S = np.ones(len(truth_SC)) if weights_S is None else weights_S
        right_C = weights_S @ (guess_SC == truth_SC) / weights_S.sum()
        hit_C = weights_S @ (guess_SC & truth_SC)
        both_C = weights_S @ guess_SC + weights_S @ truth_SC
        areas, precisions = ([each for each in found if np.isfinite(each)] for found in (
            [each.area(weights_S) for each in ranked], [each.precision(weights_S) for each in ranked]))
        return {"accuracy": float(right_C.mean()), "macro_f1": mean(2 * hit_C[both_C > 0] / both_C[both_C > 0]),
                "auroc": mean(areas), "average_precision": mean(precisions)}

    return measure


def regression(truth_S: Numbers, guess_S: Numbers) -> Measure:
    """Figures of guessed numbers."""
    rank_S, guessed_S = _ranks(truth_S), _ranks(guess_S)

    def measure(weights_S: Numbers | None = None) -> dict[str, float]:
        weights_S = np.ones(len(truth_S)) if weights_S is None else weights_S
        error_S = guess_S - truth_S
        spread = _covariance(truth_S, truth_S, weights_S)
        squares = np.average(error_S ** 2, weights=weights_S)
        return {"r2": float(1 - squares / spread) if spread else float("nan"),
                "mean_absolute_error": float(np.average(np.abs(error_S), weights=weights_S)),
                "pearson": _correlation(truth_S, guess_S, weights_S),
                "spearman": _correlation(rank_S, guessed_S, weights_S)}

    return measure


def survival(time_S: Numbers, event_S: NDArray[np.bool_], risk_S: Numbers) -> Measure:
    """Harrell's concordance index: of two of whom it is known who came to the event first, how often that one has the
    higher risk; equal risks count half. Known it is where the earlier time is an event's, and where of equal times one
    is and the other is not."""
    first_E = np.flatnonzero(event_S)
    after_ES = (time_S[first_E, None] < time_S) | ((time_S[first_E, None] == time_S) & ~event_S)
    right_ES = after_ES * ((risk_S[first_E, None] > risk_S) + 0.5 * (risk_S[first_E, None] == risk_S))

    def measure(weights_S: Numbers | None = None) -> dict[str, float]:
        weights_S = np.ones(len(time_S)) if weights_S is None else weights_S
        pairs = weights_S[first_E] @ after_ES @ weights_S
        return {"concordance": float(weights_S[first_E] @ right_ES @ weights_S / pairs) if pairs else float("nan")}

    return measure


def confusion(truth_S: Whole, guess_S: Whole, classes: int, weights_S: Numbers | None = None) -> Numbers:
    """(C, C): how often, or by what weight, each class (row) was taken for each (column)."""
    counts = np.bincount(truth_S * classes + guess_S, weights_S, minlength=classes * classes).astype(np.float64)
    return counts.reshape(classes, classes)


def accuracy(counts_CC: Numbers) -> float:
    """The fraction that was right."""
    return float(np.trace(counts_CC) / counts_CC.sum())


def balanced_accuracy(counts_CC: Numbers) -> float:
    """The mean over classes of the fraction that was right; classes that do not occur are left out."""
    present = counts_CC.sum(axis=1) > 0
    return mean(np.diag(counts_CC)[present] / counts_CC.sum(axis=1)[present])


def macro_f1(counts_CC: Numbers) -> float:
    """The mean over classes of F1; a class that neither occurs nor is guessed is left out."""
    both_C = counts_CC.sum(axis=0) + counts_CC.sum(axis=1)
    return mean(2 * np.diag(counts_CC)[both_C > 0] / both_C[both_C > 0])


def weighted_f1(counts_CC: Numbers) -> float:
    """The same, each class counting as often as it occurs."""
    occurs_C, both_C = counts_CC.sum(axis=1), counts_CC.sum(axis=0) + counts_CC.sum(axis=1)
    f1_C = 2 * np.diag(counts_CC) / np.maximum(both_C, np.finfo(np.float64).tiny)
    return float((occurs_C * f1_C).sum() / occurs_C.sum())


def quadratic_kappa(counts_CC: Numbers) -> float:
    """Cohen's kappa of classes that have an order, a mistake counting by the square of its distance."""
    classes = len(counts_CC)
    distance_CC = np.subtract.outer(np.arange(classes), np.arange(classes)) ** 2
    by_chance = np.outer(counts_CC.sum(axis=1), counts_CC.sum(axis=0)) / counts_CC.sum()
    expected = float((distance_CC * by_chance).sum())
    return float(1 - (distance_CC * counts_CC).sum() / expected) if expected else float("nan")


class Ranked:
    """One score and a truth of yes and no, sorted once; equal scores are one place."""

    def __init__(self, scores_S: Numbers, yes_S: NDArray[np.bool_]):
        _, self._place_S = np.unique(scores_S, return_inverse=True)
        self._yes_S = yes_S

    def _counted(self, weights_S: Numbers) -> tuple[Any, Any]:
        places = int(self._place_S.max()) + 1
        return (np.bincount(self._place_S, weights_S * self._yes_S, minlength=places),
                np.bincount(self._place_S, weights_S * ~self._yes_S, minlength=places))

    def area(self, weights_S: Numbers) -> float:
        """The area under the ROC curve: how often a yes is scored above a no; no number where one of the two lacks."""
        yes, no = self._counted(weights_S)
        if not (pairs := yes.sum() * no.sum()):
            return float("nan")
        return float((yes * (np.cumsum(no) - no / 2)).sum() / pairs)

    def precision(self, weights_S: Numbers) -> float:
        """Average precision: the precision at every score, weighted by the recall that it adds."""
        yes, no = (each[::-1] for each in self._counted(weights_S))
        if not yes.sum():
            return float("nan")
        found = np.cumsum(yes)
        taken = found + np.cumsum(no)
        return float((np.divide(found, taken, out=np.zeros_like(found), where=taken > 0) * yes).sum() / yes.sum())


def mean(values: Numbers | list[float]) -> float:
    """Of none, no number."""
    return float(np.mean(values)) if len(values) else float("nan")


def _gap(bin_S: Whole, confident_S: Numbers, right_S: NDArray[np.bool_], weights_S: Numbers) -> float:
    """By how much confidence and accuracy differ, on average over bins of confidence."""
    sure_B, right_B = (np.bincount(bin_S, weights_S * each, minlength=BINS) for each in (confident_S, right_S))
    return float(np.abs(sure_B - right_B).sum() / weights_S.sum())


def _ranks(values_S: Numbers) -> Numbers:
    """Places in order, of equals their mean."""
    _, place_S, count = np.unique(values_S, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place_S]


def _covariance(one_S: Numbers, other_S: Numbers, weights_S: Numbers) -> float:
    mean_one, mean_other = (np.average(each, weights=weights_S) for each in (one_S, other_S))
    return float(np.average((one_S - mean_one) * (other_S - mean_other), weights=weights_S))


def _correlation(one_S: Numbers, other_S: Numbers, weights_S: Numbers) -> float:
    spread = _covariance(one_S, one_S, weights_S) * _covariance(other_S, other_S, weights_S)
    return float(_covariance(one_S, other_S, weights_S) / np.sqrt(spread)) if spread > 0 else float("nan")
