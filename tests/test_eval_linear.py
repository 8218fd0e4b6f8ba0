"""The linear probe against plain gradient descent; what it is chosen by; colours against a plain count; refusals."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import nn

from shards.index import ShardError
from ssl_dist.eval import features, linear
from ssl_dist.eval.settings import Labelled, Linear
from ssl_dist.models.encoder import Encoder

CLASSES, WIDTH = 3, 5


def clouds(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three overlapping clouds, in features of very different size."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    centres = np.random.default_rng(7).normal(size=(CLASSES, WIDTH))
    return (centres[labels] + rng.normal(size=(count, WIDTH))) * [1e-3, 1, 1, 50, 1e4], labels


@pytest.mark.parametrize("strength", [1e-3, 0.1])
def test_the_probe_is_logistic_regression_on_scaled_features(strength: float) -> None:
    bank, known = clouds(200, 0)
    query, _ = clouds(500, 1)
    mean, deviation = bank.mean(axis=0), bank.std(axis=0)
    layer = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    scaled, target = torch.from_numpy((bank - mean) / deviation), torch.from_numpy(known)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(1500):
        loss = (strength * nn.functional.cross_entropy(layer(scaled), target, reduction="sum")
                + layer.weight.square().sum() / 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = layer(torch.from_numpy((query - mean) / deviation)).argmax(dim=1).numpy()
    found = linear.fitted(bank, known, strength).predict(query)
    assert (found == expected).mean() > 0.995       # what lies on the edge may fall either way


def test_a_probe_that_began_at_another_strength_guesses_as_one_that_did_not() -> None:
    bank, known = clouds(300, 0)
    query, _ = clouds(500, 1)
    for strength, probe in linear.probes(bank, known, linear.STRENGTHS):
        alone = linear.fitted(bank, known, strength)
        assert (probe.predict(query) == alone.predict(query)).mean() > 0.99, strength


def test_no_patient_is_on_both_sides_of_the_choice_and_no_tile_is_left_out() -> None:
    _, known = clouds(240, 0)
    groups = np.array([f"patient {number % 12}" for number in range(240)])
    for seed in range(5):
        learn, held = linear.drawn(known, groups, seed)
        assert sorted([*learn, *held]) == list(range(240))
        assert not set(groups[learn]) & set(groups[held])
        assert 2 <= len(set(groups[held])) <= 4


def test_the_strength_is_the_one_that_is_best_on_the_tiles_held_out() -> None:
    """Each strength anew, by scikit-learn alone; few tiles and many features, so that strengths differ."""
    rng = np.random.default_rng(3)
    known, groups = rng.integers(0, 3, 200), np.arange(200) % 20
    bank = rng.normal(size=(200, 60)) + 0.4 * (np.arange(60)[None] % 3 == known[:, None])
    learn, held = linear.drawn(known, groups, 0)
    mean, deviation = bank[learn].mean(axis=0), bank[learn].std(axis=0)
    right = {}
    for strength in linear.STRENGTHS:
        probe = LogisticRegression(C=strength, max_iter=5000).fit((bank[learn] - mean) / deviation, known[learn])
        right[strength] = float((probe.predict((bank[held] - mean) / deviation) == known[held]).mean())
    assert len(set(right.values())) > 3
    strength, accuracy = linear.choose(bank, known, *linear.drawn(known, groups, 0))
    assert accuracy == pytest.approx(max(right.values()), abs=1.01 / len(held))
    assert right[strength] == pytest.approx(max(right.values()), abs=1.01 / len(held))


def test_where_features_say_nothing_the_probe_is_held_back_and_where_they_say_all_it_is_right() -> None:
    rng = np.random.default_rng(0)
    groups = np.arange(400).astype(str)
    labels = np.repeat([0, 1], 200)
    strength, accuracy = linear.choose(rng.normal(size=(400, 200)), labels, *linear.drawn(labels, groups, 0))
    assert accuracy < 0.7
    told = rng.normal(size=(400, 200))
    told[:, 0] = 8.0 * labels
    strength, accuracy = linear.choose(told, labels, *linear.drawn(labels, groups, 0))
    assert accuracy == 1.0
    assert strength in linear.STRENGTHS


def test_a_bank_that_cannot_be_parted_is_refused() -> None:
    bank, known = clouds(60, 0)
    with pytest.raises(ShardError, match="one patient"):
        linear.drawn(known, np.zeros(60), 0)
    alone = np.where(known == 2, "a", np.where(np.arange(60) % 2, "b", "c"))      # class 2 is of patient a alone
    # a is held out in some drawings only
    chosen = [linear.choose(bank, known, *linear.drawn(known, alone, seed)) for seed in range(3)]
    assert all(strength in linear.STRENGTHS for strength, _ in chosen)


def test_colours_are_a_plain_count_of_levels(shard: Path) -> None:
    split = features.labelled([shard], "test")
    found = features.colours(split, batch=7, threads=2, progress=lambda *_: None).numpy()
    for row in (0, len(split.rows) - 1):
        picture = np.asarray(Image.open(io.BytesIO(split.reader.read(split.rows[[row]])[0].tobytes())).convert("RGB"))
        expected = np.zeros((3, 32))
        for line in picture:
            for pixel in line:
                for channel in range(3):
                    expected[channel, pixel[channel] // 8] += 1
        assert found[row] == pytest.approx(expected.ravel() / (picture.shape[0] * picture.shape[1]), abs=2e-3)
        assert found[row].sum() == pytest.approx(3, abs=1e-4)


def test_the_protocol_writes_what_it_chose_and_its_baselines(shard: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    Encoder("test_resnet", {}, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).save(tmp_path / "encoder", 64, {})
    settings = Linear(encoder=str(tmp_path / "encoder"), data=Labelled(shards=[shard]), out=tmp_path, size=64,
                      batch=32, baselines=["random", "colours"])
    result = linear.run(settings, torch.device("cpu"), 2, lambda *_: None)
    assert json.loads((tmp_path / "linear.json").read_text()) == result
    assert result["protocol"] == "linear"
    assert result["C"] in linear.STRENGTHS
    assert set(result["baselines"]) == {"random", "colours"}
    assert all(0 < figures["accuracy"] <= 1 for figures in result["baselines"].values())
    split, query = features.labelled([shard], "train"), features.labelled([shard], "test")
    bank, asked = (features.colours(each, batch=64, threads=1, progress=lambda *_: None).numpy()
                   for each in (split, query))
    strength, held_out = linear.choose(bank, split.labels_S.numpy(), *linear.parted(split, settings.seed))
    assert result["baselines"]["colours"]["C"] == strength
    assert result["baselines"]["colours"]["accuracy_held_out"] == pytest.approx(held_out, abs=1e-4)
    probe = linear.fitted(bank, split.labels_S.numpy(), strength)
    assert result["baselines"]["colours"]["accuracy"] == pytest.approx(
        float((probe.predict(asked) == query.labels_S.numpy()).mean()), abs=1e-4)
