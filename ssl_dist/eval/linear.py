"""A linear probe: is what the classes differ in laid out so plainly that a straight cut finds it?

Logistic regression on all features at once. How strongly it is held back is chosen on a part of the bank whose
patients (where they are known, else slides) are in no other part; then it learns from the whole bank. Where a split
is given to choose by (`data.valid`), it is chosen there, and learns from the bank alone.

Q queries   B bank   D width
"""

import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupShuffleSplit
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from shards.index import ShardError
from ssl_dist.eval import protocol
from ssl_dist.eval.features import Split
from ssl_dist.eval.protocol import Progress, Verdict
from ssl_dist.eval.settings import Judged, Linear

STRENGTHS = tuple(float(value) for value in np.logspace(-5, 0, 11))        # scikit-learn's C, on scaled features
HELD_OUT = 0.2          # of the bank's patients, to choose by
ITERATIONS = 300        # of L-BFGS; weak regularisation need not converge to guess as it would


def run(settings: Linear, device: torch.device, threads: int, progress: Progress) -> dict[str, Any]:
    """The protocol: features of both splits, a probe on the bank, and the same for each baseline."""
    def judge(bank_BD: Tensor, bank: Split, query_QD: Tensor, query: Split) -> Verdict:      # noqa: ARG001
        if bank.targets_SC is not None:
            return several(bank_BD.numpy(), bank, query_QD.numpy(), settings)
        labels_B = bank.labels_S.numpy()
        strength, chosen_by = choose(bank_BD.numpy(), labels_B, *parted(bank, settings.seed))
        probe = fitted(bank_BD.numpy()[bank.taught], labels_B[bank.taught], strength)
        return Verdict(scores(probe, query_QD.numpy(), len(bank.classes)),
                       {"C": strength, "accuracy_held_out": round(chosen_by, 4)})

    return protocol.run(settings, judge, device, threads, progress, functools.partial(allow, settings))


def allow(settings: Judged, bank: Split) -> None:
    """Refuses a bank of which no part can be held out to choose by."""
    parted(bank, settings.seed)


def choose(bank_BD: np.ndarray, labels_B: np.ndarray, learn: np.ndarray, held: np.ndarray) -> tuple[float, float]:
    """The strength that is best on the held-out tiles, and how good it is there; of equals the most held back."""
    found = [(float(probe.score(bank_BD[held], labels_B[held])), strength)
             for strength, probe in probes(bank_BD[learn], labels_B[learn], STRENGTHS)]
    best = max(accuracy for accuracy, _ in found)
    return next(strength for accuracy, strength in found if accuracy == best), best


def parted(bank: Split, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The tiles to learn from and those to choose by: of a split of their own, or drawn."""
    if bank.valid_S is None:
        return drawn(bank.kinds, bank.groups, seed)
    if len({*bank.kinds[bank.taught]}) < len({*bank.kinds}):
        raise ShardError("some class of data.valid is not in data.bank: nothing could be learnt of it; leave it out")
    return bank.taught, np.flatnonzero(bank.valid_S)


def drawn(labels_B: np.ndarray, groups_B: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The tiles to learn from and those held out, no group in both: of several drawings the first whose learning part
    knows every class."""
    if len(np.unique(groups_B)) < 2:
        raise ShardError("the bank is of one patient: no part of it can be held out to choose the probe by; take more, "
                         "or name a split to choose by: data.valid=")
    for learn, held in GroupShuffleSplit(8, test_size=HELD_OUT, random_state=seed).split(labels_B, labels_B, groups_B):
        if len(np.unique(labels_B[learn])) == len(np.unique(labels_B)):
            return learn, held
    raise ShardError("some class of the bank is of one patient only, so that the probe cannot be chosen without it; "
                     "add patients of that class, leave the class out, or name a split to choose by: data.valid=")


def probes(bank_BD: np.ndarray, labels_B: np.ndarray, strengths: Sequence[float]) -> Iterator[tuple[float, Pipeline]]:
    """The probe at several strengths, weak ones last: each begins where the one before ended, and changes it."""
    scaler, regression = StandardScaler().fit(bank_BD), LogisticRegression(max_iter=ITERATIONS, warm_start=True)
    scaled_BD = scaler.transform(bank_BD)
    for strength in strengths:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            regression.set_params(C=strength).fit(scaled_BD, labels_B)
        yield strength, make_pipeline(scaler, regression)


def several(bank_BD: np.ndarray, bank: Split, query_QD: np.ndarray, settings: Judged) -> Verdict:
    """Guesses (Q, C) of a table's columns: a logistic regression for each label of which a tile may have several, ridge
    regression for a number; how strongly they are held back, what is best on the patients held out says for all."""
    assert bank.targets_SC is not None
    targets_BC, numbers = bank.targets_SC.numpy().astype(np.float64), settings.data.kind == "numbers"
    learn, held = parted(bank, settings.seed)

    def guessed(rows: np.ndarray, strength: float, asked_QD: np.ndarray) -> np.ndarray:
        scaler = StandardScaler().fit(bank_BD[rows])
        known, found = scaler.transform(bank_BD[rows]), []
        for column in targets_BC[rows].T:
            if numbers:
                found.append(Ridge(alpha=1 / strength).fit(known, column).predict(scaler.transform(asked_QD)))
            elif len(np.unique(column)) < 2:        # nothing can be learnt of what these tiles all have, or none
                found.append(np.full(len(asked_QD), column[0]))
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ConvergenceWarning)
                    probe = LogisticRegression(C=strength, max_iter=ITERATIONS).fit(known, column)
                found.append(probe.predict_proba(scaler.transform(asked_QD))[:, 1])
        return np.stack(found, axis=1)

    def loss(strength: float) -> float:
        guess = guessed(learn, strength, bank_BD[held])
        if numbers:
            return float(np.square(guess - targets_BC[held]).mean())
        likely = np.clip(np.where(targets_BC[held] > 0, guess, 1 - guess), 1e-6, None)
        return float(-np.log(likely).mean())

    losses = {strength: loss(strength) for strength in STRENGTHS}
    strength = min(losses, key=losses.__getitem__)
    return Verdict(guessed(bank.taught, strength, query_QD),
                   {"C": strength, "loss_held_out": round(losses[strength], 5)})


def scores(probe: Pipeline, query_QD: np.ndarray, classes: int) -> np.ndarray:
    """(Q, C): how likely the probe holds each class; one that it never saw, not at all."""
    found_QC = np.zeros((len(query_QD), classes))
    found_QC[:, probe.classes_] = probe.predict_proba(query_QD)
    return found_QC


def fitted(bank_BD: np.ndarray, labels_B: np.ndarray, strength: float) -> Pipeline:
    """The probe of one strength."""
    return next(probes(bank_BD, labels_B, [strength]))[1]
