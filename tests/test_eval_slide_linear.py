"""A linear probe of slides against scikit-learn by hand, on vectors of which the answer is known.

S slides   D width
"""

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from typer.testing import CliRunner

from shards import arrays
from shards.index import ShardError
from ssl_dist import cli, config
from ssl_dist.data import vectors
from ssl_dist.eval import intervals, slide_linear, summary
from ssl_dist.eval.settings import SlideLinear
from ssl_dist.schema import ConfigError

RANDOM = np.random.default_rng(0)
SLIDES = 160
PATIENT = np.array([f"p{number // 2}" for number in range(SLIDES)])         # two slides each
LABEL = np.repeat(RANDOM.choice(3, SLIDES // 2, p=[0.5, 0.3, 0.2]), 2)
CLASSES = np.array(["ductal", "lobular", "other"])
GOOD = RANDOM.normal(size=(SLIDES, 6)) + 1.2 * np.eye(6)[LABEL]
NAMES = [f"s{number:03d}" for number in range(SLIDES)]


def table(path: Path, features: np.ndarray, names: list[str] = NAMES, patients: np.ndarray | None = PATIENT) -> Path:
    columns = {"slide": names, "features": list(features.astype(np.float32))}
    pq.write_table(pa.table(columns if patients is None else {**columns, "patient": patients.tolist()}), path)
    return path


def written(path: Path, label: np.ndarray = LABEL, **more: Any) -> Path:
    rows = [{"slide": name, "label": CLASSES[each], **{key: values[row] for key, values in more.items()}}
            for row, (name, each) in enumerate(zip(NAMES, label, strict=True))]
    with path.open("w", newline="") as handle:
        lines = csv.DictWriter(handle, list(rows[0]))
        lines.writeheader()
        lines.writerows(rows)
    return path


@pytest.fixture(autouse=True)
def few_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough to tell good from chance, and a fifth of the time."""
    monkeypatch.setattr(intervals, "drawings", partial(intervals.drawings, count=200))


@pytest.fixture
def told(tmp_path: Path) -> dict[str, Any]:
    return {"vectors": table(tmp_path / "slides.parquet", GOOD), "labels": written(tmp_path / "labels.csv"),
            "sizes": [20, 60], "splits": 4, "out": tmp_path / "eval"}


def asked(told: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return slide_linear.run(SlideLinear(**{**told, **changes}), torch.device("cpu"), 1, lambda *_: None)


def parts(told: dict[str, Any], **changes: Any) -> list[slide_linear.Part]:
    settings = SlideLinear(**{**told, **changes})
    labels = slide_linear.labelled(settings.labels, vectors.read(settings.vectors))
    return slide_linear.parted(labels, settings.splits, settings.seed)


@pytest.mark.parametrize("two", [False, True])
def test_every_figure_is_what_scikit_learn_gives_on_the_same_slides(two: bool, told: dict[str, Any],
                                                                    tmp_path: Path) -> None:
    label = np.minimum(LABEL, 1) if two else LABEL
    result = asked(told, labels=written(tmp_path / "own.csv", label))
    assert result == json.loads((tmp_path / "eval" / "slide_linear.json").read_text())
    kept = GOOD.astype(np.float32).astype(np.float64)
    rows = result["curves"]["encoder"]
    assert [(row.get("slides"), row.get("share"), row["draws"]) for row in rows] == [
        (20, None, 4), (60, None, 4), (None, 1.0, 4)]
    for row in rows:
        areas, balanced = [], []
        for part in parts(told, labels=tmp_path / "own.csv"):
            learnt = part.learnt_P[:row.get("slides")]
            probe = LogisticRegression(C=10, class_weight="balanced", max_iter=1000).fit(kept[learnt], label[learnt])
            scores, truth = probe.predict_proba(kept[part.asked_Q]), label[part.asked_Q]
            areas.append(roc_auc_score(truth, scores[:, 1]) if two else roc_auc_score(truth, scores, multi_class="ovr"))
            balanced.append(balanced_accuracy_score(truth, scores.argmax(1)))
        for key, values in (("auroc", areas), ("balanced_accuracy", balanced)):
            assert row[key]["mean"] == pytest.approx(np.mean(values), abs=1e-4)
            assert row[key]["deviation"] == pytest.approx(np.std(values, ddof=1), abs=1e-4)
    assert result["metrics"]["auroc"] == pytest.approx(np.mean(areas), abs=1e-4), "of all slides, over splits"
    low, high = result["intervals"]["auroc"]
    assert low < result["metrics"]["auroc"] < high and high - low < 0.25
    assert np.sum(result["confusion"]) == SLIDES == result["counts"]["queries"]
    assert result["baselines"]["chance"]["auroc"] == 0.5
    assert result["baselines"]["chance"]["balanced_accuracy"] == pytest.approx(1 / (2 if two else 3), abs=1e-4)
    assert result["against"]["chance"]["auroc"]["p"] < 0.01
    assert (tmp_path / "eval" / result["pictures"][0]).read_bytes().startswith(b"\x89PNG")
    lines = list(summary.lines(result))
    assert any(line.startswith("encoder, AUROC learnt from few slides: 20 ") and ", all " in line for line in lines)


def test_no_patient_is_on_both_sides_and_classes_are_alike_in_every_part(told: dict[str, Any]) -> None:
    found = parts(told, splits=5)
    assert sorted(np.concatenate([part.asked_Q for part in found])) == list(range(SLIDES))
    for part in found:
        assert not set(PATIENT[part.asked_Q]) & set(PATIENT[part.learnt_P])
        assert sorted([*part.asked_Q, *part.learnt_P]) == list(range(SLIDES))
        for label in range(3):
            assert abs((LABEL[part.asked_Q] == label).mean() - (label == LABEL).mean()) < 0.1
    same, other = parts(told, splits=5), parts(told, splits=5, seed=1)
    assert all(np.array_equal(one.learnt_P, again.learnt_P) for one, again in zip(found, same, strict=True))
    assert any(set(one.asked_Q) != set(again.asked_Q) for one, again in zip(found, other, strict=True))


def test_few_slides_are_among_the_many_and_hold_classes_as_all_do() -> None:
    label = np.array([0] * 700 + [1] * 290 + [2] * 10)
    orders = [slide_linear.order(label, seed) for seed in range(50)]
    for order in orders:
        assert sorted(order) == list(range(1000))
        assert set(label[order[:3]]) == {0, 1, 2}
        for size in (50, 100, 250):
            counts = np.bincount(label[order[:size]], minlength=3)
            assert np.abs(counts - size * np.array([0.7, 0.29, 0.01])).max() < 2.5
    times = np.bincount(np.concatenate([order[:250] for order in orders]), minlength=1000)
    assert times[:700].mean() == pytest.approx(12.5, abs=0.5) and times.max() < 30, "whoever they are"


def test_splits_that_a_table_gives_are_taken(told: dict[str, Any], tmp_path: Path) -> None:
    number = np.arange(SLIDES) // 2
    folds = np.array([f"fold{each % 4}" for each in number])
    found = parts(told, labels=written(tmp_path / "folds.csv", split=folds), splits=10)
    assert [set(folds[part.asked_Q]) for part in found] == [{"fold0"}, {"fold1"}, {"fold2"}, {"fold3"}]
    sides = np.where(number % 4 == 0, "test", np.where(number % 4 == 1, "valid", "train"))
    result = asked(told, labels=written(tmp_path / "sides.csv", split=sides))
    assert result["counts"]["queries"] == (sides == "test").sum()
    assert f"{(sides == 'valid').sum()} slides are neither of split 'train' nor 'test' and are left out" \
        in result["warnings"]
    assert [row["draws"] for row in result["curves"]["encoder"]] == [4, 4, 1], "all can be drawn in one way alone"
    assert result["curves"]["encoder"][-1]["learnt"]["mean"] == (sides == "train").sum()
    with pytest.raises(ShardError, match=r"80 patients are on both sides of split 1 \('p0'"):
        asked(told, labels=written(tmp_path / "torn.csv", split=np.array(["test", "train"] * (SLIDES // 2))))


def test_other_vectors_are_compared_on_the_same_splits(told: dict[str, Any], tmp_path: Path) -> None:
    worse = table(tmp_path / "worse.parquet", RANDOM.normal(size=(SLIDES, 3)))
    order = RANDOM.permutation(SLIDES)
    same = table(tmp_path / "same.parquet", GOOD[order], [NAMES[row] for row in order], PATIENT[order])
    result = asked(told, baselines=["chance", str(worse), str(same)])
    assert set(result["curves"]) == {"encoder", "chance", str(worse), str(same)}
    assert result["curves"]["encoder"] == result["curves"][str(same)]
    assert result["against"][str(same)]["auroc"]["difference"] == 0
    apart = result["against"][str(worse)]["auroc"]
    assert apart["difference"] > 0.2 and apart["interval"][0] > 0 and apart["p"] < 0.01
    few = table(tmp_path / "few.parquet", GOOD[:100], NAMES[:100], PATIENT[:100])
    with pytest.raises(ShardError, match=r"few\.parquet has no vector of 60 of 160 slides \('s100'"):
        asked(told, baselines=[str(few)])


def test_tiles_are_pooled_from_a_table_and_from_bags_alike(told: dict[str, Any], tmp_path: Path) -> None:
    count = RANDOM.integers(2, 6, SLIDES)
    slide = np.repeat(np.arange(SLIDES), count)
    tiles = GOOD[slide] + RANDOM.normal(size=(len(slide), 6))
    mixed = RANDOM.permutation(len(slide))
    whole = table(tmp_path / "tiles.parquet", tiles[mixed], [NAMES[each] for each in slide[mixed]],
                  PATIENT[slide[mixed]])
    bags = tmp_path / "bags"
    bags.mkdir()
    for number, name in enumerate(NAMES):
        own = tiles[slide == number]
        arrays.write_bag(bags / f"{name}.h5", own, np.stack([np.arange(len(own))] * 2, axis=1),
                         {"slide": name, "patient": str(PATIENT[number]), "encoder": "resnet18",
                          "encoder_sha256": "abc"})
    for pooling, by_hand in (("mean", np.mean), ("max", np.max)):
        one, other = vectors.read(whole, pooling), vectors.read(bags, pooling)
        assert one.slides == other.slides == NAMES and one.patients == other.patients == PATIENT.tolist()
        expected = np.stack([by_hand(tiles[slide == number].astype(np.float32), axis=0) for number in range(SLIDES)])
        np.testing.assert_allclose(one.features_SD, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(other.features_SD, expected, rtol=1e-5, atol=1e-6)
    result = asked(told, vectors=bags, sizes=[20], splits=3)
    assert result["encoder"] == {"path": str(bags), "architecture": "resnet18", "vectors_of": "abc"}
    assert result["counts"]["tiles"] == len(slide) and result["counts"]["width"] == 6


def test_what_cannot_be_judged_is_refused_by_name(told: dict[str, Any], tmp_path: Path) -> None:
    rare = LABEL.copy()
    rare[rare == 2] = 1
    rare[:4] = 2
    with pytest.raises(ShardError, match="class 'other' is of 2 patients, and splits=4"):
        asked(told, labels=written(tmp_path / "rare.csv", rare))
    with pytest.raises(ShardError, match="one class only of these slides, 'ductal'"):
        asked(told, labels=written(tmp_path / "one.csv", LABEL * 0))
    with pytest.raises(ShardError, match="sizes has 2, and there are 3 classes"):
        asked(told, sizes=[2])
    (tmp_path / "odd.csv").write_text("id,label\ns000,ductal\n")
    with pytest.raises(ShardError, match=r"odd\.csv begins with id, label; it has no column slide"):
        asked(told, labels=tmp_path / "odd.csv")
    (tmp_path / "strangers.csv").write_text("slide,label\nx,ductal\ny,other\n")
    with pytest.raises(ShardError, match=r"no label of a slide .* it names 'x', and there is 's000'"):
        asked(told, labels=tmp_path / "strangers.csv")
    (tmp_path / "twice.csv").write_text("slide,label\ns000,ductal\ns000,other\n")
    with pytest.raises(ShardError, match=r"line 3: slide 's000' is told of before"):
        asked(told, labels=tmp_path / "twice.csv")
    broken = GOOD.copy()
    broken[7, 2] = np.nan
    with pytest.raises(ShardError, match="features of slide s007 that are no numbers"):
        asked(told, vectors=table(tmp_path / "broken.parquet", broken))
    with pytest.raises(ShardError, match="slide s000 of patients 'p0' and 'p1'"):
        asked(told, vectors=table(tmp_path / "torn.parquet", GOOD, ["s000"] * SLIDES))
    pq.write_table(pa.table({"slide": NAMES, "features": [[1.0] * (1 + row % 2) for row in range(SLIDES)]}),
                   tmp_path / "ragged.parquet")
    with pytest.raises(ShardError, match="not lists of so many numbers each"):
        asked(told, vectors=tmp_path / "ragged.parquet")
    (tmp_path / "text.parquet").write_text("no table")
    with pytest.raises(ShardError, match=r"text\.parquet is not a readable Parquet table"):
        asked(told, vectors=tmp_path / "text.parquet")


def test_what_may_mislead_is_said(told: dict[str, Any], tmp_path: Path) -> None:
    alone = table(tmp_path / "alone.parquet", GOOD[:120], NAMES[:120], None)
    found = asked(told, vectors=alone, sizes=[20, 60, 5000], iterations=1)["warnings"]
    assert any(words.startswith("40 of 160 labelled slides have no vector ('s120'") for words in found)
    assert any(words.startswith("the patients of 120 slides are unknown") for words in found)
    assert any(words.startswith("sizes 5000 left out: a split has 90 slides") for words in found)
    assert any("probes had not converged after iterations=1" in words for words in found)


def test_the_command_reads_the_recipe_and_writes_beside_the_vectors(told: dict[str, Any], tmp_path: Path) -> None:
    words = [f"vectors={told['vectors']}", f"labels={told['labels']}"]
    done = CliRunner().invoke(cli.app, ["eval", "eval/slide_linear", *words, "sizes=[20]", "splits=3"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "slide_linear.json").is_file()
    assert config.load_eval("eval/knn", [*words, "protocol=slide_linear"]) == SlideLinear(
        vectors=told["vectors"], labels=told["labels"])
    with pytest.raises(ConfigError, match="'nothing', which is neither chance nor vectors"):
        config.load_eval("eval/slide_linear", [*words, "baselines=[nothing]"])
    with pytest.raises(ConfigError, match="encoder"):
        config.load_eval("eval/slide_linear", [*words, "encoder=runs/first/encoder"])


def test_training_and_testing_are_train_and_test_and_other_words_are_told(told: dict[str, Any], tmp_path: Path) -> None:
    words = np.where(np.arange(SLIDES) < 120, "train", "test")
    plain = asked(told, labels=written(tmp_path / "one.csv", split=words), sizes=[40])
    longer = asked(told, labels=written(tmp_path / "two.csv", split=np.char.add(words, "ing")), sizes=[40])
    assert plain["metrics"] == longer["metrics"] and plain["counts"]["queries"] == longer["counts"]["queries"] == 40
    assert not any("in turn" in words for words in longer["warnings"])
    places = np.where(np.arange(SLIDES) < 80, "north", "south")
    other = asked(told, labels=written(tmp_path / "three.csv", split=places), sizes=[40])
    assert any("none is 'test': each was asked about in turn" in words for words in other["warnings"])
