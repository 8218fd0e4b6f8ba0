"""Slides by their tiles: no patient is on both sides, what is chosen is chosen without the slides that are asked about;
survival against plain loops; maps lie where tiles lie; slides made of real tiles through the command."""

import csv
import itertools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from shards import arrays, write
from shards.index import ShardError
from ssl_dist import config, provenance
from ssl_dist.data.bags import Bags
from ssl_dist.eval import cox, features, leakage, metrics, mil, slides, summary
from ssl_dist.eval.settings import Mil
from ssl_dist.models import encoder as encoders
from ssl_dist.schema import ConfigError

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Any:
    """Steps so small are slower on several threads, much so where others use them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def planted(home: Path, *, count: int = 60, tiles: int = 20, rare: int = 1, shift: float = 7.0, width: int = 4,
            seed: int = 0, each: int = 1, survival: bool = False) -> Path:
    """Slides of noise, `each` of a patient; in every other `rare` tiles lie off in one direction. Returns the table."""
    rng, lines = np.random.default_rng(seed), []
    for number in range(count):
        own = int(rng.integers(tiles * 3 // 4, tiles * 5 // 4))
        vectors = rng.normal(size=(own, width))
        positive, slide = number // each % 2, f"slide-{number:03}"
        if positive:
            vectors[rng.choice(own, rare, replace=False), 0] += shift
        place = np.stack([np.arange(own) % 5, np.arange(own) // 5], axis=1) * 512 + [1024, 2048]
        arrays.write_bag(home / "h5" / f"{slide}.h5", vectors, place, {
            "slide": slide, "patient": f"patient-{number // each:03}", "encoder_sha256": "e" * 64}, wide=512)
        time = rng.exponential(1 / (1 + 9 * positive))
        end = rng.exponential(2)
        lines.append(f"{slide},{min(time, end):.4f},{int(time < end)}" if survival else
                     f"{slide},{'tumour' if positive else 'normal'}")
    (home / "labels.csv").write_text("\n".join(["slide,time,event" if survival else "slide,label", *lines]) + "\n")
    return home / "labels.csv"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path) -> None:
    (tmp_path / "h5").mkdir()


def asked(home: Path, **changes: Any) -> Mil:
    return Mil(**{"bags": home / "h5", "labels": home / "labels.csv", "out": home / "out", "rates": [0.01],
                  "decays": [0.0], "inner": 2, "folds": 3, "epochs": 10, "max_tiles": 0, "baselines": [],
                  "args": {"narrow": 16, "attention": 16} if changes.get("model", "deepmil") == "deepmil" else {},
                  **changes})


def run(home: Path, **changes: Any) -> dict[str, Any]:
    return mil.run(asked(home, **changes), CPU, 1, lambda *_: None)


# --- what is learnt

def test_the_protocol_writes_figures_guesses_and_maps(tmp_path: Path) -> None:
    planted(tmp_path, each=2, count=72, tiles=12)
    result = run(tmp_path, baselines=["mean", "linear"], maps=["slide-003"], repeats=2)
    assert json.loads((tmp_path / "out" / "mil.json").read_text()) == result
    assert result["counts"] == {"slides": 72, "asked_about": 72, "patients": 36, "shared_patients": 0,
                                "tiles": int(Bags(tmp_path / "h5").counts.sum())}
    with (tmp_path / "out" / "predictions.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 72 and len({row["slide"] for row in rows}) == 72
    truth = [row["label"] == "tumour" for row in rows]
    for name, figures in {"deepmil": result["metrics"], **result["baselines"]}.items():
        assert roc_auc_score(truth, [float(row[f"{name}_tumour"]) for row in rows]) == pytest.approx(
            figures["auroc"], abs=1e-3)
        assert len(result["chosen"][name]) == len(result["by_fold"][name]) == 6
    assert result["metrics"]["auroc"] > 0.9
    assert set(result["against"]) == {"mean", "linear"} and result["intervals"]["auroc"][0] > 0.7
    for fold in ("fold_1", "fold_2"):
        sides = {row["patient"]: row[fold] for row in rows}
        assert all(sides[row["patient"]] == row[fold] for row in rows), "a patient is in one fold"
    assert not provenance.evaluations(tmp_path / "out", "e" * 64, {}), "the card's table is of tiles"
    told = "\n".join(summary.lines(result))
    assert told.startswith("mil, deepmil, 72 slides of 36 patients") and "deepmil has" in told
    # Another model, another file; the same again, the same file and the same figures.
    other = [run(tmp_path, model="weldon", epochs=2) for _ in range(2)]
    assert Path(other[0]["written"]).name == "mil-2.json" and (tmp_path / "out" / "predictions-2.csv").is_file()
    assert other[0] == other[1] and not (tmp_path / "out" / "mil-3.json").exists()


def test_every_slide_is_guessed_once_a_round_by_what_was_not_learnt_from_its_patient(tmp_path: Path) -> None:
    planted(tmp_path, each=2, count=48)
    known = slides.told(Bags(tmp_path / "h5"), tmp_path / "labels.csv", "classes")
    told = asked(tmp_path, folds=4, repeats=3)
    rounds = [mil._folds(told, known, number) for number in range(3)]
    seen = Counter()

    def spy(learn: np.ndarray, held: np.ndarray, number: int, drawn: set[int]) -> mil.Guess:     # noqa: ARG001
        assert not {*known.groups[learn]} & {*known.groups[held]}
        assert sorted([*learn, *held]) == list(range(48))
        seen.update((number, int(slide)) for slide in held)
        return mil.Guess(np.ones((len(held), 1)), {}, [])

    mil._rounds(spy, rounds, set(), lambda *_: None)
    assert seen == Counter({(number, slide): 1 for number in range(3) for slide in range(48)})
    assert any((one != other).any() for one, other in itertools.combinations(rounds, 2)), "dealt out anew"


def test_what_is_chosen_and_learnt_knows_nothing_of_the_slides_asked_about(tmp_path: Path) -> None:
    """A trap: whoever looks at the fold that is held out sees labels turned round, and vectors that are huge."""
    planted(tmp_path)
    known = slides.told(Bags(tmp_path / "h5"), tmp_path / "labels.csv", "classes")
    told = asked(tmp_path, rates=[0.01, 1e-5], epochs=20)
    learn, held = np.arange(40), np.arange(40, 60)
    found = []
    for trap in (False, True):
        if trap:
            known.labels_S[held] = 1 - known.labels_S[held]
        vectors = mil.Vectors(known, tmp_path, lambda *_: None)
        if trap:
            vectors.sum_SD[held] = 1e9      # what vectors are scaled by
        for guess in (mil._learnt(told, known, vectors, "deepmil", CPU, learn, held, 0, set()),
                      mil._straight(told, known, vectors, learn, held, 0, set())):
            found.append((guess.facts, guess.scores_GC))
        vectors.close()
    (one, ours), (straight, _), (other, theirs), (again, _) = found
    assert one == other and straight == again and np.array_equal(ours, theirs)
    assert one["lr"] == 0.01, "the rate that learns, and not the one that does not"


def test_of_several_the_best_on_the_slides_held_out_is_chosen_and_of_equals_the_surer() -> None:
    found = {"a": [(0.9, 5.0), (0.7, 5.0)], "b": [(0.8, 1.0), (0.8, 2.0)], "c": [(0.8, 0.5), (math.nan, 9.0)],
             "d": [(math.nan, 0.0)], "e": [(0.79, 0.1)]}
    assert mil.chosen(found) == ("b", 0.8)
    assert mil.chosen({**found, "f": [(0.8, math.nan)]}) == ("b", 0.8)


def test_the_straight_baseline_is_scikit_learns_on_the_mean_vector(tmp_path: Path) -> None:
    planted(tmp_path, count=80, shift=20.0)
    known = slides.told(Bags(tmp_path / "h5"), tmp_path / "labels.csv", "classes")
    vectors = mil.Vectors(known, tmp_path, lambda *_: None)
    means = np.stack([known.bags[row].features_ND.mean(axis=0) for row in range(80)])
    assert vectors.mean_SD == pytest.approx(means, abs=1e-5)
    learn, held = np.arange(60), np.arange(60, 80)
    guess = mil._straight(asked(tmp_path), known, vectors, learn, held, 0, set())
    middle, spread = means[learn].mean(axis=0), means[learn].std(axis=0)
    probe = LogisticRegression(C=guess.facts["C"], max_iter=3000).fit((means[learn] - middle) / spread,
                                                                      known.labels_S[learn])
    expected = probe.predict_proba((means[held] - middle) / spread)
    assert guess.scores_GC == pytest.approx(expected, abs=2e-3)
    tiles = np.concatenate([known.bags[row].features_ND for row in learn])
    mean, deviation = vectors.spread(learn)
    assert mean == pytest.approx(tiles.mean(axis=0), abs=1e-5)
    assert deviation == pytest.approx(tiles.std(axis=0), abs=1e-5)
    vectors.close()


def test_of_a_slide_with_more_tiles_so_many_are_drawn_and_none_twice(tmp_path: Path) -> None:
    planted(tmp_path, count=4, tiles=40)
    known = slides.told(Bags(tmp_path / "h5"), tmp_path / "labels.csv", "classes")
    vectors, rng = mil.Vectors(known, tmp_path, lambda *_: None), np.random.default_rng(0)
    met = set()
    for _ in range(40):
        tiles_TD, counts = vectors.batch(np.array([2, 0]), 7, rng)
        assert counts == [7, 7]
        for own, row in zip(tiles_TD.split(counts), (2, 0), strict=True):
            whole = {tuple(each) for each in known.bags[row].features_ND.tolist()}
            drawn = [tuple(each) for each in own.tolist()]
            assert len(set(drawn)) == 7 and set(drawn) <= whole
            met |= set(drawn)
    assert len(met) == known.bags.counts[[0, 2]].sum(), "every tile in its turn"
    assert vectors.batch(np.array([1]), 0, rng)[1] == [known.bags.counts[1]]
    vectors.close()


def test_more_than_two_classes(tmp_path: Path) -> None:
    table = planted(tmp_path, count=60)
    lines = [f"slide-{number:03},{'abc'[number % 3]}" for number in range(60)]
    table.write_text("\n".join(["slide,label", *lines]))
    for number in range(0, 60, 3):
        path = tmp_path / "h5" / f"slide-{number:03}.h5"
        vectors, place = arrays.read_bag(path)
        vectors[:, 1] += 2
        arrays.write_bag(path, vectors, place, {"slide": path.stem, "patient": path.stem})
    result = run(tmp_path, model="clam", args={"narrow": 16, "attention": 8}, baselines=["linear"], epochs=5)
    assert np.array(result["confusion"]).shape == (3, 3) and np.array(result["confusion"]).sum() == 60
    assert result["metrics"]["auroc"] > 0.6 and result["baselines"]["linear"]["auroc"] > 0.6


def test_a_split_of_the_table_is_asked_about_and_nothing_else(tmp_path: Path) -> None:
    table = planted(tmp_path, count=40)
    head, *lines = table.read_text().split()
    table.write_text("\n".join([f"{head},split", *(f"{line},{'test' if number >= 28 else 'train'}"
                                                    for number, line in enumerate(lines))]))
    result = run(tmp_path, split="test")
    assert result["counts"]["asked_about"] == 12 == sum(map(sum, result["confusion"]))
    assert len((tmp_path / "out" / "predictions.csv").read_text().split()) == 13
    with pytest.raises(ShardError, match=r"split=valid parts no slides .*test, train"):
        run(tmp_path, split="valid")
    assert any("split=test asks" in words for words in run(tmp_path, epochs=1)["warnings"])


def test_labels_of_patients_are_judged_by_patients(tmp_path: Path) -> None:
    planted(tmp_path, each=3, count=72, rare=2)
    (tmp_path / "labels.csv").write_text("\n".join(["patient,label", *(
        f"patient-{number:03},{number % 2}" for number in range(24))]))
    result = run(tmp_path)
    assert np.array(result["confusion"]).sum() == 24 and result["classes"] == ["0", "1"]
    with (tmp_path / "out" / "predictions.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    mean = [np.mean([float(row["deepmil_1"]) for row in rows if row["patient"] == f"patient-{number:03}"])
            for number in range(24)]
    truth = [number % 2 for number in range(24)]
    assert roc_auc_score(truth, mean) == pytest.approx(result["metrics"]["auroc"], abs=1e-3)


# --- survival

def efron(risk: np.ndarray, time: np.ndarray, event: np.ndarray) -> float:
    total, events = 0.0, 0
    for moment in sorted(set(time[event])):
        tied = [each for each in range(len(time)) if time[each] == moment and event[each]]
        at_risk = [each for each in range(len(time)) if time[each] >= moment]
        for number, each in enumerate(tied):
            below = sum(math.exp(risk[other]) for other in at_risk)
            below -= number / len(tied) * sum(math.exp(risk[other]) for other in tied)
            total += math.log(below) - risk[each]
            events += 1
    return total / events


def test_the_loss_of_survival_is_efrons_and_its_gradient_is_that_of_finite_differences() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        risk, time, event = rng.normal(size=14) * 2, rng.integers(1, 6, 14).astype(float), rng.random(14) < 0.6
        risks = torch.from_numpy(risk).requires_grad_()
        found = cox.loss(risks, torch.from_numpy(time), torch.from_numpy(event))
        found.backward()
        assert float(found.detach()) == pytest.approx(efron(risk, time, event), abs=1e-10)
        for each in range(14):
            step = np.eye(14)[each] * 1e-5
            slope = (efron(risk + step, time, event) - efron(risk - step, time, event)) / 2e-5
            assert float(risks.grad[each]) == pytest.approx(slope, abs=1e-7)
    huge = torch.tensor([1e4, -1e4, 0.0], dtype=torch.float64)
    assert cox.loss(huge, torch.tensor([1.0, 2, 3]), torch.tensor([True, True, True])).isfinite()
    assert float(cox.loss(huge, torch.tensor([1.0, 2, 3]), torch.tensor([False] * 3))) == 0


def test_concordance_is_a_count_of_pairs_whatever_their_weights() -> None:
    rng = np.random.default_rng(1)
    for _ in range(5):
        time, event, risk = rng.integers(1, 8, 25).astype(float), rng.random(25) < 0.5, rng.integers(0, 6, 25) * 1.0
        for weights in (None, rng.integers(0, 3, 25).astype(float)):
            right = pairs = 0.0
            for one, other in itertools.product(range(25), repeat=2):
                earlier = time[one] < time[other] or (time[one] == time[other] and not event[other])
                if event[one] and earlier:
                    weight = 1.0 if weights is None else weights[one] * weights[other]
                    pairs += weight
                    right += weight * (1.0 if risk[one] > risk[other] else 0.5 if risk[one] == risk[other] else 0.0)
            assert metrics.survival(time, event, risk)(weights)["concordance"] == pytest.approx(right / pairs)
    assert math.isnan(metrics.survival(time, np.zeros(25, bool), risk)(None)["concordance"])


def test_who_has_the_tiles_comes_to_the_event_first(tmp_path: Path) -> None:
    planted(tmp_path, count=90, survival=True, rare=3)
    result = run(tmp_path, kind="survival", baselines=["linear"], epochs=8)
    assert result["metrics"]["concordance"] > 0.6 and result["baselines"]["linear"]["concordance"] > 0.6
    assert result["confusion"] == [] and set(result["metrics"]) == {"concordance"}
    with (tmp_path / "out" / "predictions.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    time, event, risk = (np.array([float(row[name]) for row in rows]) for name in ("time", "event", "deepmil_risk"))
    assert metrics.survival(time, event > 0, risk)(None)["concordance"] == pytest.approx(
        result["metrics"]["concordance"], abs=1e-3)


def test_a_straight_model_of_survival_is_where_its_loss_is_least() -> None:
    rng = np.random.default_rng(0)
    known, time, event = rng.normal(size=(40, 3)), rng.exponential(size=40), rng.random(40) < 0.7
    weights = cox.fitted(known, time, event, 0.1)

    def worth(each: np.ndarray) -> float:
        return 0.1 * event.sum() * efron(known @ each, time, event) + each @ each / 2

    assert all(worth(weights) < worth(weights + step) for step in 0.01 * rng.normal(size=(50, 3)))


# --- folds and tables

@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("folds", [2, 5])
def test_patients_are_dealt_whole_and_each_class_evenly(folds: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    patient_S = np.sort(rng.integers(0, 40, 130))
    label_S = (patient_S % 10 >= 7).astype(int)
    fold_S = slides.dealt(label_S, patient_S.astype(str), folds, seed)
    assert set(fold_S) == set(range(folds))
    for patient in set(patient_S):
        assert len(set(fold_S[patient_S == patient])) == 1
    for label in (0, 1):
        counts = [len(set(patient_S[(fold_S == fold) & (label_S == label)])) for fold in range(folds)]
        assert max(counts) - min(counts) <= 1
    assert np.array_equal(fold_S, slides.dealt(label_S, patient_S.astype(str), folds, seed))
    assert not np.array_equal(fold_S, slides.dealt(label_S, patient_S.astype(str), folds, seed + 1))


def test_too_few_patients_are_refused_before_anything_is_learnt(tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    table = planted(tmp_path, count=20)
    monkeypatch.setattr(mil, "trained", None)
    monkeypatch.setattr(mil, "Vectors", None)
    lines = table.read_text().replace("tumour", "normal").split()
    table.write_text("\n".join([*lines[:-3], *(line.replace("normal", "tumour") for line in lines[-3:])]))
    with pytest.raises(ShardError, match=r"class 'tumour' has 3 patients or slides, too few for 5 folds; lower folds="):
        run(tmp_path, folds=5)
    with pytest.raises(ShardError, match=r"left to learn from: class 'tumour' has 2 .* for 3 folds; lower inner="):
        run(tmp_path, folds=3, inner=3)


def test_what_a_table_does_not_tell_is_said_and_what_cannot_be_is_refused(tmp_path: Path) -> None:
    table = planted(tmp_path, count=6)
    bags = Bags(tmp_path / "h5")
    text = table.read_text()

    def told(words: str, kind: str = "classes") -> slides.Slides:
        table.write_text(words)
        return slides.told(bags, table, kind)

    found = told(text.replace("slide-005,tumour", "slide-005,") + "slide-099,tumour\n\n")
    assert found.slides == [f"slide-00{each}" for each in range(5)] and found.classes == ["normal", "tumour"]
    assert any("1 rows of" in words and "'slide-099'" in words for words in found.remarks)
    assert any("1 of 6 slides have no row" in words and "'slide-005'" in words for words in found.remarks)
    assert told("slide,label\n" + "".join(f"slide-00{each},{each + 8}\n" for each in range(6))).classes == [
        str(each) for each in range(8, 14)], "numbers in their order"
    for words, kind, said in (
            (text.replace("tumour", "normal"), "classes", "are 'normal': every guess"),
            (text.replace("slide-003,tumour", "slide-003,nan"), "classes", r"line 5: label is 'nan', not a class"),
            (text + "slide-001,normal\n", "classes", r"'slide-001' has another label \('normal'\).*'tumour'"),
            (text.replace("slide,label", "name,label"), "classes", "has no column slide or patient"),
            (text, "survival", "has no column time"), (text + "slide-001\n", "classes", "has 1 cells and the first 2"),
            ("slide,label\nx,1\ny,2\n", "classes", "names no slide in .*; it names 'x', and there is 'slide-000'"),
            ("slide,time,event\nslide-001,inf,1\n", "survival", "time is 'inf', not a number"),
            ("slide,time,event\nslide-001,2,2\n", "survival", "event is '2', not 1 or 0"),
            ("slide,time,event\nslide-001,2,0\nslide-002,3,0\n", "survival", "knows of no event"),
            ("slide,patient,label\nslide-001,other,1\n", "classes", "patient 'other', and its file .*'patient-001'")):
        with pytest.raises(ShardError, match=said):
            told(words, kind)


def test_where_patients_are_unknown_the_table_may_say_them_or_slides_stand_in(tmp_path: Path) -> None:
    for number in range(4):
        arrays.write_bag(tmp_path / "h5" / f"s{number}.h5", np.ones((2, 2)), np.array([[0, 0], [1, 0]]), {})
    bags = Bags(tmp_path / "h5")
    (tmp_path / "labels.csv").write_text("slide,label\ns0,0\ns1,1\ns2,0\ns3,1\n")
    found = slides.told(bags, tmp_path / "labels.csv", "classes")
    assert found.groups.tolist() == [f"slide s{each}" for each in range(4)]
    assert any("patients of 4 slides are unknown" in words for words in found.remarks)
    (tmp_path / "labels.csv").write_text("slide,patient,label\ns0,a,0\ns1,a,1\ns2,b,0\ns3,b,1\n")
    found = slides.told(bags, tmp_path / "labels.csv", "classes")
    assert found.groups.tolist() == ["a", "a", "b", "b"] and not found.remarks


def test_vectors_that_are_no_numbers_and_of_another_encoder_are_refused(tmp_path: Path) -> None:
    planted(tmp_path)
    torch.manual_seed(0)
    encoders.Encoder("test_resnet", {}, (0.5,) * 3, (0.5,) * 3).save(tmp_path / "encoder", 64, {})
    with pytest.raises(ShardError, match=r"of another encoder \(sha256 eeeeeeeeeeee"):
        run(tmp_path, encoder=tmp_path / "encoder")
    path = tmp_path / "h5" / "slide-007.h5"
    vectors, place = arrays.read_bag(path)
    vectors[3, 1] = np.nan
    arrays.write_bag(path, vectors, place, {"slide": path.stem, "patient": "p"})
    with pytest.raises(ShardError, match=r"slide-007\.h5 holds features that are no numbers"):
        run(tmp_path)


def test_slides_seen_in_pretraining_are_counted(tmp_path: Path) -> None:
    (tmp_path / "pretraining.json").write_text(json.dumps({"salt": "s", "tiles": [], "patients": [], "slides": [
        encoders.salted("s", "one"), encoders.salted("s", "two")]}))
    assert leakage.seen(str(tmp_path), {"slides": ["one", "one", "three"], "patients": ["", "p"]}) == {
        "slides": 1, "patients": 0}
    assert leakage.seen(str(tmp_path / "none"), {"slides": ["one"]}) is None


def test_a_recipe_of_slides_and_one_of_tiles_have_nothing_in_common(tmp_path: Path) -> None:
    words = ["protocol=mil", f"bags={tmp_path}", f"labels={tmp_path}"]
    found = config.load_eval("eval/knn", words)
    assert isinstance(found, Mil) and found.home == tmp_path.parent and found.encoder is None
    with pytest.raises(ConfigError, match="bags is not set"):
        config.load_eval("eval/knn", ["protocol=mil"])
    with pytest.raises(ConfigError, match="encoder is not set"):
        config.load_eval("eval/mil", ["protocol=knn", f"data.shards=[{tmp_path}]"])
    with pytest.raises(ConfigError, match=r"'depmil' is not one of .*did you mean 'deepmil'"):
        config.load_eval("eval/mil", [*words[1:], "model=depmil"])


# --- maps

def test_maps_lie_where_tiles_lie_and_show_the_tile_that_counts(tmp_path: Path) -> None:
    planted(tmp_path, count=80)
    result = run(tmp_path, maps=["slide-041", "slide-000"], epochs=20)
    assert result["pictures"] == ["mil_slide-000.png", "mil_slide-041.png"]
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") for name in result["pictures"])
    told = json.loads((tmp_path / "out" / "mil_slide-041.geojson").read_text())
    bags = Bags(tmp_path / "h5")
    bag = bags[bags.slides.index("slide-041")]
    assert told["type"] == "FeatureCollection" and len(told["features"]) == len(bag.features_ND)
    shown = []
    for feature, (left, top) in zip(told["features"], bag.corner_N2.tolist(), strict=True):
        (ring,) = feature["geometry"]["coordinates"]
        assert ring[0] == ring[-1] == [left, top] and ring[2] == [left + 512, top + 512] and len(ring) == 5
        shown.append(feature["properties"]["measurements"]["attention"])
    assert np.mean(shown) == pytest.approx(1), "of attention 1 is the mean"
    assert int(np.argmax(shown)) == int(bag.features_ND[:, 0].argmax()), "the tile that was planted"
    with pytest.raises(ShardError, match="maps has 'slide-999'"):
        run(tmp_path, maps=["slide-999"])


# --- real tissue

def test_slides_made_of_real_tiles_through_the_command(data: Path, tmp_path: Path) -> None:
    """Thirty-two of eighteen PatchCamelyon tiles each, six of tumour in every other, as histograms of colours."""
    write.write(write.Settings(source=data / "pcam_subset_96px" / "valid", out=tmp_path / "pcam", dataset="pcam",
                               kind="tiles", mpp=1.0, workers=2, organ="lymph node", licence="CC0",
                               names=r"(?P<label>[01])/(?P<slide>[^/]+)\.jpg$"))
    split = features.labelled([tmp_path / "pcam"], "")
    vectors = features.colours(split, batch=256, threads=1, progress=lambda *_: None).numpy()
    rng = np.random.default_rng(0)
    normal, tumour = (list(rng.permutation(np.flatnonzero(split.labels_S.numpy() == each))) for each in (0, 1))
    place = np.stack([np.arange(18) % 6, np.arange(18) // 6], axis=1) * 96
    for number in range(32):
        own = [tumour.pop() for _ in range(6 * (number % 2))]
        own = [*own, *(normal.pop() for _ in range(18 - len(own)))]
        arrays.write_bag(tmp_path / "h5" / f"made-{number}.h5", vectors[own], place, {"slide": f"made-{number}"},
                         wide=96)
    (tmp_path / "labels.csv").write_text("slide,label\n" + "".join(f"made-{each},{each % 2}\n" for each in range(32)))
    done = subprocess.run(
        [sys.executable, "-m", "ssl_dist", "eval", "eval/mil", f"bags={tmp_path / 'h5'}", "folds=4", "inner=2",
         f"labels={tmp_path / 'labels.csv'}", f"out={tmp_path / 'out'}", "rates=[0.001]", "decays=[0.0]", "epochs=20",
         "device=cpu", "maps=[made-1]", "baselines=[linear]"], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "mil, deepmil, 32 slides of 32 patients, 576 tiles" in done.stdout
    result = json.loads((tmp_path / "out" / "mil.json").read_text())
    assert result["metrics"]["auroc"] > 0.6, result["metrics"]
    assert (tmp_path / "out" / "mil_made-1.geojson").is_file()
