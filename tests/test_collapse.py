"""Collapse is told, once, when it stays; a healthy run and a young one are left in peace."""

import math
from typing import Any

import pytest
import torch

from ssl_dist.collapse import PATIENCE, Watch
from ssl_dist.methods import base

HEALTHY = {"loss": 3.0, "deviation": 0.8, "rank": 20.0, "teacher_entropy": 0.4, "batch_entropy": 0.9,
           "prototypes_used": 0.7}


def heard(rows: list[dict[str, Any]], chance: float = math.inf, progress: float = 0.5) -> list[list[str]]:
    watch = Watch()
    return [watch(row, chance, progress) for row in rows]


@pytest.mark.parametrize(("name", "value", "advice"), [
    ("deviation", 0.001, "batch"), ("rank", 1.01, "views"), ("teacher_entropy", 1.0, "teacher_temperature"),
    ("batch_entropy", 0.0, "teacher_temperature"), ("prototypes_used", 0.01, "epsilon")])
def test_a_symptom_that_stays_is_told_once_with_what_to_try(name: str, value: float, advice: str) -> None:
    told = heard([{**HEALTHY, name: value}] * (PATIENCE + 5))
    assert [bool(each) for each in told] == [number == PATIENCE - 1 for number in range(PATIENCE + 5)]
    (words,) = told[PATIENCE - 1]
    assert name in words
    assert advice in words.partition("try")[2]


def test_a_healthy_run_a_passing_weakness_and_a_young_run_are_left_in_peace() -> None:
    sick = {**HEALTHY, "rank": 1.0}
    assert not any(heard([HEALTHY] * 50))
    assert not any(heard([sick, sick, HEALTHY] * 20))
    assert not any(heard([sick] * 50, progress=0.01))


def test_a_loss_at_chance_is_told_and_one_below_is_not() -> None:
    stuck, moving = {"loss": math.log(3000) * 1.0001}, {"loss": math.log(3000) * 0.99}
    assert "8.0" in heard([stuck] * PATIENCE, math.log(3000))[-1][0]
    assert not any(heard([moving] * 20, math.log(3000)))
    assert not any(heard([stuck] * 20))


def test_what_methods_log_of_collapsed_features_is_a_symptom_and_of_healthy_ones_is_not() -> None:
    """The scalars of base.spread itself: constant features, features on a line, and random ones."""
    noise = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    line = noise[:, :1] * torch.ones(1, 64) + 1e-3 * noise
    for features, name in ((torch.ones(256, 64) + 1e-4 * noise, "deviation"), (line, "rank"), (noise, None)):
        row = {"loss": 1.0, **{key: float(value) for key, value in base.spread(features).items()}}
        told = heard([row] * PATIENCE)[-1]
        assert [words.split()[1].partition("=")[0] for words in told] == ([name] if name else [])


def test_of_a_few_tiles_nothing_is_said() -> None:
    """Through a BatchNorm two tiles are opposites, whatever the network: a rank of one, and no collapse."""
    assert base.spread(torch.randn(base.FEW - 1, 16)) == {}
    assert set(base.spread(torch.randn(base.FEW, 16))) == {"deviation", "rank"}
    assert not any(heard([{"loss": 1.0}] * 20))


def test_a_loss_that_leaps_is_told_once_a_leap_and_noise_is_not() -> None:
    noise = [3.0 + 0.1 * math.sin(7 * number) for number in range(60)]
    assert not any(heard([{"loss": loss} for loss in noise]))
    told = heard([{"loss": loss} for loss in [*noise, 9.0, 9.0, *noise, 9.0]])
    assert [place for place, words in enumerate(told) if words] == [60, 122]
    assert "leaps to 9, from 3" in told[60][0]
    assert "optim.clip=1" in told[60][0]
    assert not any(heard([{"loss": loss} for loss in [3.0] * 10 + [9.0]])), "too few rows to say anything"
