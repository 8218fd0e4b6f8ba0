"""A layer trained step by step: against scikit-learn's optimum, each rate for itself, the best look kept."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from ssl_dist.eval import sgd
from ssl_dist.eval.settings import Labelled, Sgd
from ssl_dist.models.encoder import Encoder


def settings(**changes: Any) -> Sgd:
    return Sgd(**{"encoder": "x", "data": Labelled(shards=[Path("y")]), "weight_decay": 0.0, "batch": 64,
                  **changes})


def clouds(count: int = 600, noise: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, count)
    centres = np.random.default_rng(7).normal(size=(3, 6)) * 1.5
    return (torch.from_numpy(centres[labels] + noise * rng.normal(size=(count, 6))).float(),
            torch.from_numpy(labels))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_it_comes_to_where_logistic_regression_is_best(optimizer: str) -> None:
    bank, labels = clouds()
    learn, held = np.arange(400), np.arange(400, 600)
    layer, facts = sgd.trained(bank, labels, learn, held, 3, settings(optimizer=optimizer, steps=3000, rates=[0.05]))
    best = LogisticRegression(C=1e6, max_iter=5000).fit(bank[:400].numpy(), labels[:400].numpy())
    guess = layer(bank[400:]).argmax(dim=1).numpy()
    assert (guess == best.predict(bank[400:].numpy())).mean() > 0.95
    assert facts["balanced_accuracy_held_out"] > 0.7


def test_each_rate_learns_as_if_it_were_alone() -> None:
    bank, labels = clouds(120)
    learn, held = np.arange(80), np.arange(80, 120)
    alone, facts = sgd.trained(bank, labels, learn, held, 3, settings(rates=[0.05], steps=40))
    # The first of several begins with the same weights; the other never learns and is never better.
    among, other = sgd.trained(bank, labels, learn, held, 3, settings(rates=[0.05, 1e-12], steps=40))
    assert facts == other
    assert torch.allclose(alone.weight, among.weight, atol=1e-6)


def test_a_rate_that_blows_up_is_not_chosen_and_the_best_look_is_kept() -> None:
    bank, labels = clouds(noise=3.0)
    layer, facts = sgd.trained(bank * 100, labels, np.arange(400), np.arange(400, 600), 3,
                               settings(rates=[1e-5, 1e4], steps=1000, optimizer="sgd"))
    assert facts["lr"] == 1e-5
    guess = layer(bank[400:] * 100).argmax(dim=1)
    right = [float((guess[labels[400:] == each] == each).float().mean()) for each in range(3)]
    assert np.mean(right) == pytest.approx(facts["balanced_accuracy_held_out"], abs=1e-3)


def test_it_ends_after_a_while_without_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(sgd.schedule, "cosine", lambda *_: steps.append(1) or 1e-9)
    bank, labels = clouds(120)
    sgd.trained(bank, labels, np.arange(80), np.arange(80, 120), 3, settings(rates=[1.0], steps=1000, patience=0.2))
    assert 200 <= len(steps) <= 240


def test_the_protocol_is_one_of_the_verbs(shard: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    Encoder("test_resnet", {}, (0.5,) * 3, (0.5,) * 3).save(tmp_path / "encoder", 64, {})
    result = sgd.run(settings(encoder=str(tmp_path / "encoder"), data=Labelled(shards=[shard]), size=64, steps=200,
                              rates=[0.01, 1.0], baselines=["colours"]), torch.device("cpu"), 2, lambda *_: None)
    assert result["lr"] in (0.01, 1.0)
    assert 0 < result["metrics"]["auroc"] <= 1
    assert (tmp_path / "eval" / "sgd.json").is_file()
