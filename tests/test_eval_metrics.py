"""Figures of merit against scikit-learn and SciPy, also under weights; intervals against a plain bootstrap."""

import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as theirs

from ssl_dist.eval import intervals, metrics

TILES = 400
RANDOM = np.random.default_rng(0)
WEIGHTS = {"one": None, "whole": RANDOM.integers(0, 4, TILES).astype(float), "any": RANDOM.uniform(0, 2, TILES)}


def guesses(classes: int, missing: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Truth, and scores that know something of it and are often equal."""
    truth = RANDOM.integers(0, classes - missing, TILES)
    scores = RANDOM.dirichlet(np.ones(classes), TILES) + 0.4 * np.eye(classes)[truth]
    return truth, np.round(scores / scores.sum(axis=1, keepdims=True), 2)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("classes", [2, 5])
def test_figures_of_classes_are_those_of_scikit_learn(classes: int, weights: str) -> None:
    (truth, scores), weight = guesses(classes), WEIGHTS[weights]
    found = metrics.classification(truth, scores, ordered=True)(weight)
    assert metrics.classification(truth, scores)(weight) == {
        name: value for name, value in found.items() if name != "quadratic_kappa"}, "of classes without an order"
    guess = scores.argmax(axis=1)
    areas = [theirs.roc_auc_score(truth == each, scores[:, each], sample_weight=weight) for each in range(classes)]
    expected = {
        "accuracy": theirs.accuracy_score(truth, guess, sample_weight=weight),
        "balanced_accuracy": theirs.balanced_accuracy_score(truth, guess, sample_weight=weight),
        "macro_f1": theirs.f1_score(truth, guess, average="macro", sample_weight=weight),
        "weighted_f1": theirs.f1_score(truth, guess, average="weighted", sample_weight=weight),
        "auroc": areas[1] if classes == 2 else np.mean(areas),
        "quadratic_kappa": theirs.cohen_kappa_score(truth, guess, weights="quadratic", sample_weight=weight)}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert metrics.confusion(truth, guess, classes, weight) == pytest.approx(theirs.confusion_matrix(
        truth, guess, labels=range(classes), sample_weight=weight))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_calibration_error_is_a_plain_sum_over_bins(weights: str) -> None:
    truth, scores = guesses(3)
    weight = np.ones(TILES) if WEIGHTS[weights] is None else WEIGHTS[weights]
    expected = 0.0
    for low in np.arange(metrics.BINS) / metrics.BINS:
        inside = [tile for tile in range(TILES) if low <= scores[tile].max() < low + 1 / metrics.BINS or
                  (scores[tile].max() == 1 and low == (metrics.BINS - 1) / metrics.BINS)]
        if mass := sum(weight[tile] for tile in inside):
            right = sum(weight[tile] * (scores[tile].argmax() == truth[tile]) for tile in inside) / mass
            sure = sum(weight[tile] * scores[tile].max() for tile in inside) / mass
            expected += mass / weight.sum() * abs(right - sure)
    assert metrics.classification(truth, scores)(WEIGHTS[weights])["calibration_error"] == pytest.approx(expected)


def test_guesses_that_know_how_sure_they_are_are_calibrated() -> None:
    sure = np.random.default_rng(1).uniform(0.5, 1, 200_000)
    right = np.random.default_rng(2).uniform(size=len(sure)) < sure
    scores = np.stack([sure, 1 - sure], axis=1)
    assert metrics.classification(1 - right.astype(int), scores)(None)["calibration_error"] < 0.01
    assert metrics.classification(1 - right.astype(int), np.eye(2)[np.zeros(len(sure), int)])(
        None)["calibration_error"] == pytest.approx(0.25, abs=0.01)


def test_of_a_class_that_does_not_occur_nothing_is_said() -> None:
    truth, scores = guesses(4, missing=True)
    guess = scores.argmax(axis=1)
    found = metrics.classification(truth, scores)(None)
    recalls = [float((guess[truth == each] == each).mean()) for each in range(3)]
    assert found["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    areas = [theirs.roc_auc_score(truth == each, scores[:, each]) for each in range(3)]
    assert found["auroc"] == pytest.approx(np.mean(areas))
    one = metrics.classification(np.zeros(5, int), np.eye(2)[[0, 0, 1, 0, 0]])(None)
    assert (one["accuracy"], np.isnan(one["auroc"])) == (0.8, True)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_figures_of_several_labels_are_those_of_scikit_learn(weights: str) -> None:
    weight = WEIGHTS[weights]
    truth = RANDOM.uniform(size=(TILES, 4)) < [0.5, 0.1, 0.8, 0.3]
    scores = np.round(np.clip(RANDOM.uniform(size=(TILES, 4)) * 0.7 + 0.3 * truth, 0, 1), 2)
    found = metrics.several(truth, scores)(weight)
    expected = {
        "macro_f1": theirs.f1_score(truth, scores > 0.5, average="macro", sample_weight=weight),
        "auroc": theirs.roc_auc_score(truth, scores, average="macro", sample_weight=weight),
        "average_precision": theirs.average_precision_score(truth, scores, average="macro", sample_weight=weight),
        "accuracy": np.mean([theirs.accuracy_score(truth[:, each], scores[:, each] > 0.5, sample_weight=weight)
                             for each in range(4)])}
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("weights", ["one", "whole"])
def test_figures_of_numbers_are_those_of_scikit_learn_and_scipy(weights: str) -> None:
    weight = WEIGHTS[weights]
    truth = np.round(RANDOM.normal(size=TILES), 1)
    guess = np.round(truth + RANDOM.normal(size=TILES), 1)
    found = metrics.regression(truth, guess)(weight)
    assert found["r2"] == pytest.approx(theirs.r2_score(truth, guess, sample_weight=weight))
    assert found["mean_absolute_error"] == pytest.approx(theirs.mean_absolute_error(truth, guess, sample_weight=weight))
    if weight is None:
        assert found["pearson"] == pytest.approx(stats.pearsonr(truth, guess).statistic)
        assert found["spearman"] == pytest.approx(stats.spearmanr(truth, guess).statistic)
    else:
        often = np.repeat(np.arange(TILES), weight.astype(int))
        assert found["pearson"] == pytest.approx(stats.pearsonr(truth[often], guess[often]).statistic)


# ---- intervals

def grouped(seed: int, shift: float = 0.0, groups: int = 30) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tiles of patients of which some are easy and some hard: groups, truth, scores."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(groups), rng.integers(1, 20, groups))
    truth = rng.integers(0, 2, len(group))
    ease = rng.normal(0.3 + shift, 0.5, groups)[group]
    sure = np.clip(0.5 + 0.5 * (ease + rng.normal(0, 0.3, len(group))), 0.01, 0.99)
    return group, truth, np.where(truth[:, None] == [0, 1], sure[:, None], 1 - sure[:, None])


def test_an_interval_is_that_of_a_plain_bootstrap_over_patients() -> None:
    group, truth, scores = grouped(0)
    drawn = intervals.drawings(group, seed=0)
    assert len(drawn) == intervals.DRAWINGS
    found = intervals.intervals(metrics.classification(truth, scores), drawn)
    rng = np.random.default_rng(99)
    plain = []
    for _ in range(3000):
        chosen = np.concatenate([np.flatnonzero(group == each) for each in rng.integers(0, 30, 30)])
        plain.append(((scores[chosen].argmax(axis=1) == truth[chosen]).mean(),
                      theirs.f1_score(truth[chosen], scores[chosen].argmax(axis=1), average="macro"),
                      theirs.roc_auc_score(truth[chosen], scores[chosen, 1])))
    for name, values in zip(("accuracy", "macro_f1", "auroc"), np.array(plain).T, strict=True):
        assert found[name] == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=0.02), name
    tiles = intervals.intervals(metrics.classification(truth, scores), intervals.drawings(np.arange(len(group)), 0))
    width = {name: found[name][1] - found[name][0] for name in found}
    assert width["accuracy"] > 1.3 * (tiles["accuracy"][1] - tiles["accuracy"][0])


def test_every_drawing_is_of_whole_patients_and_of_as_many_as_there_are() -> None:
    group, _, _ = grouped(1)
    for weights in intervals.drawings(group, seed=3, count=50):
        per_group = [set(weights[group == each]) for each in range(30)]
        assert all(len(each) == 1 for each in per_group)
        assert sum(each.pop() for each in per_group) == 30


def test_the_better_of_two_is_told_and_two_equal_ones_are_not() -> None:
    group, truth, scores = grouped(2)
    _, _, better = grouped(2, shift=0.4)
    drawn = intervals.drawings(group, seed=0)
    measure, other = metrics.classification(truth, better), metrics.classification(truth, scores)
    found = intervals.compared(measure, other, drawn)["accuracy"]
    assert found["difference"] == pytest.approx(measure(None)["accuracy"] - other(None)["accuracy"], abs=1e-4)
    assert found["interval"][0] > 0
    assert found["p"] < 0.01
    same = intervals.compared(other, other, drawn)["accuracy"]
    assert (same["difference"], same["p"]) == (0.0, 1.0)


def test_a_true_null_is_called_a_difference_in_few_of_many_studies() -> None:
    called = 0
    for study in range(200):
        group, truth, scores = grouped(1000 + study)
        rng = np.random.default_rng(study)
        sides = [np.clip(scores + rng.normal(0, 0.3, (len(group), 1)) * [1, -1], 0, 1) for _ in range(2)]
        one, other = (metrics.classification(truth, each) for each in sides)
        called += intervals.compared(one, other, intervals.drawings(group, study, 200))["accuracy"]["p"] < 0.05
    assert called <= 22, "five of a hundred, and three standard errors"


@pytest.mark.parametrize("patients", [1, 2, 4])
def test_of_few_patients_no_interval_is_given(patients: int) -> None:
    drawn = intervals.drawings(np.arange(10) % patients, seed=0)
    measure = metrics.classification(np.arange(10) % 2, np.eye(2)[np.arange(10) % 2])
    assert intervals.intervals(measure, drawn) == {}
    assert intervals.compared(measure, measure, drawn) == {}


def test_a_figure_that_most_drawings_do_not_have_gets_no_interval() -> None:
    """A class of one patient of a hundred: more than a third of drawings leave it out, which is allowed; of a figure
    that needs both of two such classes, none is given."""
    group = np.arange(100)
    truth = (group == 0).astype(int)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = intervals.intervals(metrics.classification(truth, np.eye(2)[truth]), intervals.drawings(group, 0))
    assert found["auroc"] == [1.0, 1.0]
    assert found["accuracy"] == [1.0, 1.0]
