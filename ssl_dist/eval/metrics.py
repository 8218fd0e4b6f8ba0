"""Figures of merit from counts alone.

C classes   S tiles
"""

import numpy as np


def confusion(truth_S: np.ndarray, guess_S: np.ndarray, classes: int) -> np.ndarray:
    """(C, C): how often each class (row) was taken for each (column)."""
    return np.bincount(truth_S * classes + guess_S, minlength=classes * classes).reshape(classes, classes)


def accuracy(counts_CC: np.ndarray) -> float:
    """The fraction that was right."""
    return float(np.trace(counts_CC) / counts_CC.sum())


def balanced_accuracy(counts_CC: np.ndarray) -> float:
    """The mean over classes of the fraction that was right; classes that do not occur are left out."""
    present = counts_CC.sum(axis=1) > 0
    return float((np.diag(counts_CC)[present] / counts_CC.sum(axis=1)[present]).mean())
