"""Which labels are known, and a curve of what they are worth, against scikit-learn on the same tiles."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from shards.index import ShardError
from ssl_dist.eval import features, linear, low
from ssl_dist.eval.settings import Labelled, Low
from ssl_dist.models.encoder import Encoder

RANDOM = np.random.default_rng(0)
PATIENTS = np.array([f"p{each}" for each in np.repeat(np.arange(12), RANDOM.integers(20, 200, 12))])
LABELS = RANDOM.choice(3, len(PATIENTS), p=[0.7, 0.25, 0.05])
LABELS[PATIENTS == "p3"] = 0


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_share_is_that_share_of_each_class_and_as_nearly_as_can_be_of_each_patient(share: float, seed: int) -> None:
    chosen = low.choice(LABELS, PATIENTS, "share", share, seed)
    assert len(set(chosen)) == len(chosen)
    for label in range(3):
        for patient in np.unique(PATIENTS):
            there = ((label == LABELS) & (patient == PATIENTS)).sum()
            taken = ((label == LABELS) & (patient == PATIENTS))[chosen].sum()
            # One of a class there must be, even where its share is less than a tile.
            assert abs(taken - share * there) < 1 or (share < 0.1 and taken <= 1 + share * there)
        assert (LABELS[chosen] == label).any()
    assert len(chosen) == pytest.approx(share * len(LABELS), abs=12)


def test_more_labels_are_the_few_and_others_and_another_choice_has_others() -> None:
    for how, values in (("share", [0.01, 0.05, 0.3, 1.0]), ("per_class", [1, 3, 10])):
        nested = [set(low.choice(LABELS, PATIENTS, how, value, 0)) for value in values]
        assert all(few < many for few, many in zip(nested, nested[1:], strict=False))
        assert set(low.choice(LABELS, PATIENTS, how, values[1], 1)) != nested[1]
    chosen = low.choice(LABELS, PATIENTS, "per_class", 7, 0)
    assert np.bincount(LABELS[chosen]).tolist() == [7, 7, 7]
    assert len(np.unique(PATIENTS[chosen])) > 4, "of many patients"


def test_over_many_choices_every_tile_of_a_class_is_as_likely_as_every_other() -> None:
    times = np.zeros(len(LABELS))
    for seed in range(400):
        times[low.choice(LABELS, PATIENTS, "share", 0.2, seed)] += 1
    assert times.mean() == pytest.approx(80, abs=4)
    assert times.min() > 40
    assert times.max() < 125


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("low") / "encoder"
    Encoder("test_resnet", {}, (0.5,) * 3, (0.5,) * 3).save(folder, 64, {})
    return folder


def evaluated(encoder: Path, shard: Path, out: Path, **changes: Any) -> dict[str, Any]:
    settings = Low(**{"encoder": str(encoder), "data": Labelled(shards=[shard]), "size": 64, "out": out,
                       "batch": 32, "baselines": ["colours"], "shares": [0.2, 0.5], "per_class": [1], "draws": 3,
                       **changes})
    return low.run(settings, torch.device("cpu"), 2, lambda *_: None)


def test_the_curve_is_what_a_probe_on_the_same_tiles_gives(exported: Path, shard: Path, tmp_path: Path) -> None:
    result = evaluated(exported, shard, tmp_path)
    assert set(result["curves"]) == {"encoder", "colours"}
    rows = result["curves"]["colours"]
    assert [(row.get("share"), row.get("per_class"), row["draws"]) for row in rows] == [
        (0.2, None, 3), (0.5, None, 3), (None, 1, 3), (1.0, None, 1)]
    assert (tmp_path / "low_labels.png").is_file()
    bank, query = (features.labelled([shard], split) for split in ("train", "test"))
    known, asked = (features.colours(each, batch=64, threads=1, progress=lambda *_: None).numpy()
                    for each in (bank, query))
    figures = []
    for draw in range(3):
        chosen = low.choice(bank.labels_S.numpy(), bank.groups, "share", 0.5, draw)
        try:
            strength = linear.choose(known[chosen], bank.labels_S.numpy()[chosen],
                                     *linear.drawn(bank.labels_S.numpy()[chosen], bank.groups[chosen], 0))[0]
        except ShardError:
            strength = low.BLIND
        guess = linear.fitted(known[chosen], bank.labels_S.numpy()[chosen], strength).predict(asked)
        figures.append(balanced_accuracy_score(query.labels_S.numpy(), guess))
    assert rows[1]["balanced_accuracy"]["mean"] == pytest.approx(np.mean(figures), abs=1e-4)
    assert rows[1]["balanced_accuracy"]["deviation"] == pytest.approx(np.std(figures, ddof=1), abs=1e-4)
    assert rows[3]["accuracy"]["mean"] == pytest.approx(result["baselines"]["colours"]["accuracy"], abs=1e-4)


def test_more_labels_of_a_class_than_there_are_are_refused(exported: Path, shard: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "extract", None)
    with pytest.raises(ShardError, match="per_class=5000 labels are more than the"):
        evaluated(exported, shard, tmp_path, per_class=[5000])
