"""LARS against plain loops, groups by what they hold, and schedules at their ends and in between."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ssl_dist import config, optim, schedule
from ssl_dist.config import Data, Optim, Train

LR, MOMENTUM, DECAY, TRUST = 0.7, 0.9, 0.01, 1e-3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5),
                         nn.Linear(5, 2, bias=False))


def gradients(step: int) -> list[np.ndarray]:
    rng = np.random.default_rng(step)
    return [rng.normal(size=parameter.shape).astype(np.float32) for parameter in network().parameters()]


def plain_lars(weights: list[np.ndarray], steps: int, lrs: list[float]) -> list[np.ndarray]:
    """You et al. 2017 in loops over layers and components; vectors take plain momentum."""
    weights = [weight.astype(np.float64) for weight in weights]
    velocities = [np.zeros_like(weight) for weight in weights]
    for step in range(steps):
        for weight, velocity, gradient in zip(weights, velocities, gradients(step), strict=True):
            change = gradient.astype(np.float64)
            if weight.ndim > 1:
                change = change + DECAY * weight
                size = math.sqrt(sum(value * value for value in weight.ravel()))
                slope = math.sqrt(sum(value * value for value in change.ravel()))
                change = change * (TRUST * size / slope)
            velocity *= MOMENTUM
            velocity += change
            weight -= lrs[step] * velocity
    return weights


def test_three_steps_of_lars_agree_with_plain_loops() -> None:
    model = network()
    optimizer = optim.build(model, Optim(name="lars", lr=LR, momentum=MOMENTUM, weight_decay=DECAY))
    start = [parameter.detach().numpy().copy() for parameter in model.parameters()]
    lrs = [LR, 0.5 * LR, 2 * LR]
    for step, lr in enumerate(lrs):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for parameter, gradient in zip(model.parameters(), gradients(step), strict=True):
            parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
    for mine, truth in zip(model.parameters(), plain_lars(start, 3, lrs), strict=True):
        assert mine.detach().numpy() == pytest.approx(truth, rel=1e-5, abs=1e-7)


def test_lars_takes_a_zero_weight_or_a_zero_gradient_as_it_comes() -> None:
    weight, still, alone = (nn.Parameter(torch.full((2, 3), value)) for value in (0.0, 1.0, 1.0))
    optimizer = optim.Lars([weight, still, alone], lr=0.5, momentum=0.0)
    weight.grad, still.grad = torch.full((2, 3), 2.0), torch.zeros(2, 3)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.full((2, 3), -1.0))       # nothing to scale to: the plain step
    assert torch.equal(still.detach(), torch.ones(2, 3))
    assert torch.equal(alone.detach(), torch.ones(2, 3))                # it has no gradient at all


def test_lars_leaves_the_gradient_as_it_was() -> None:
    weight = nn.Parameter(torch.ones(2, 3))
    weight.grad = torch.full((2, 3), 2.0)
    optim.Lars([weight], lr=0.5, weight_decay=0.1).step()
    assert torch.equal(weight.grad, torch.full((2, 3), 2.0))


def test_matrices_and_kernels_decay_and_vectors_do_not() -> None:
    model = network()
    model[4].weight.requires_grad = False
    names = {parameter: name for name, parameter in model.named_parameters()}
    matrices, vectors = optim.build(model, Optim(weight_decay=0.05)).param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.05, 0.0)
    assert [names[each] for each in matrices["params"]] == ["0.weight", "3.weight"]
    assert [names[each] for each in vectors["params"]] == ["0.bias", "1.weight", "1.bias", "3.bias"]
    both = optim.build(model, Optim(weight_decay=0.05, decay_vectors=True)).param_groups
    assert [group["weight_decay"] for group in both] == [0.05, 0.05]


def test_vectors_may_have_a_learning_rate_of_their_own_and_follow_the_same_schedule() -> None:
    """Barlow Twins: 0.2 for weights, 0.0048 for biases and norms, both for 256 tiles, on one schedule."""
    told = train(data_batch=1024, optim=Optim(name="lars", lr=0.2, lr_vectors=0.0048, scale="linear", warmup=0.1))
    optimizer = optim.build(network(), told.optim)
    for progress, part in ((0.05, 0.5), (0.1, 1.0), (0.55, 0.5), (1.0, 0.0)):
        optim.set_rates(optimizer, *config.rates(told, progress))
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.8 * part, 0.0192 * part])


def train(data_batch: int = 256, **changes: Any) -> Train:
    return Train(run=Path("run"), data=Data(shards=[Path()], batch=data_batch), method={"name": "simclr"},
                 **{"steps": 10, **changes})


@pytest.mark.parametrize(("scale", "factor"), [("fixed", 1), ("linear", 8), ("root", 8**0.5)])
def test_learning_rates_grow_with_the_batch_as_the_recipe_says(scale: str, factor: float) -> None:
    told = train(data_batch=2048, optim=Optim(lr=0.3, final_lr=0.03, scale=scale, warmup=0.0))
    assert config.rates(told, 0.0)[0] == pytest.approx(0.3 * factor)
    assert config.rates(told, 1.0)[0] == pytest.approx(0.03 * factor)
    # SimCLR's own words for the root: 0.075 times the root of the batch.
    assert factor != 8**0.5 or config.rates(told, 0.0)[0] == pytest.approx(0.075 * math.sqrt(2048) / 1.2 * 0.3)


def test_weight_decay_moves_by_half_a_cosine_or_stays() -> None:
    moving = train(optim=Optim(weight_decay=0.04, final_weight_decay=0.4))
    assert [config.rates(moving, progress)[1] for progress in (0, 0.5, 1)] == pytest.approx([0.04, 0.22, 0.4])
    assert {config.rates(train(), progress)[1] for progress in (0, 0.3, 1)} == {1e-4}
    optimizer = optim.build(network(), moving.optim)
    optim.set_rates(optimizer, *config.rates(moving, 1.0))
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([0.4, 0.0])


def test_a_run_is_as_long_as_steps_epochs_or_samples_say() -> None:
    for words, steps in ((dict(steps=7), 7), (dict(steps=0, epochs=2.5), 50), (dict(steps=0, samples=1000), 4),
                         (dict(steps=0, epochs=0.01), 1)):
        found = config.with_steps(train(**words), steps_an_epoch=20)
        assert (found.steps, found.epochs, found.samples) == (steps, 0, 0)
        assert found.rules() == []
        assert config.with_steps(found, steps_an_epoch=3) == found, "what is resolved no longer depends on the tiles"
    assert train(steps=3, epochs=2.0).rules() == ["steps=3 and epochs=2 each say how long the run is; set all but one "
                                                  "to 0"]
    assert "say how long" in train(steps=0).rules()[0]


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_every_optimizer_decays_by_what_the_config_says(name: str) -> None:
    """One step without a gradient to speak of: what shrinks, shrinks by lr times decay; vectors stay."""
    model = network()
    optimizer = optim.build(model, Optim(name=name, lr=0.1, momentum=0.0, weight_decay=0.5))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    shrunk = {"adamw": 1 - 0.1 * 0.5, "sgd": 1 - 0.1 * 0.5}
    for key, parameter in model.named_parameters():
        factor = 1.0
        if parameter.ndim > 1:
            factor = shrunk.get(name, 1 - 0.1 * TRUST)      # LARS: a layer's step is `trust` of its size
        torch.testing.assert_close(parameter.detach(), before[key] * factor)


def test_lars_never_decays_vectors_and_says_so() -> None:
    assert Optim(name="lars").rules() == [] and Optim(name="sgd", decay_vectors=True).rules() == []
    (broken,) = Optim(name="lars", decay_vectors=True).rules()
    assert "use decay_vectors=false" in broken


def test_a_weight_that_rests_is_a_group_of_its_own_and_no_weight_is_in_two() -> None:
    model = network()
    kernel, bias = model[0].weight, model[3].bias
    told = Optim(lr=1.0, lr_vectors=0.5)
    groups = optim.groups(model, told, [kernel, bias])
    assert [each for each in groups[2]["params"]] == [kernel] and [each for each in groups[3]["params"]] == [bias]
    assert [(group["share"], group["decay"]) for group in groups] == [(1, 1), (0.5, 0), (1, 1), (0.5, 0)]
    held = [id(each) for group in groups for each in group["params"]]
    assert sorted(held) == sorted(id(each) for each in model.parameters())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_with_nesterov_agrees_with_plain_loops(momentum: float) -> None:
    model = network()
    optimizer = optim.build(model, Optim(name="sgd", lr=0.1, momentum=momentum, weight_decay=0.0))
    weights = [parameter.detach().numpy().astype(np.float64) for parameter in model.parameters()]
    velocities = [np.zeros_like(weight) for weight in weights]
    for step in range(3):
        for parameter, gradient in zip(model.parameters(), gradients(step), strict=True):
            parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
        for weight, velocity, gradient in zip(weights, velocities, gradients(step), strict=True):
            velocity *= momentum
            velocity += gradient
            weight -= 0.1 * (gradient + momentum * velocity)
    for mine, truth in zip(model.parameters(), weights, strict=True):
        assert mine.detach().numpy() == pytest.approx(truth, rel=1e-5, abs=1e-6)


# ---- schedules

def test_a_cosine_starts_and_ends_where_it_is_told_and_is_halfway_in_the_middle() -> None:
    assert schedule.cosine(0.0, 3.0, 1.0) == pytest.approx(3.0)
    assert schedule.cosine(0.5, 3.0, 1.0) == pytest.approx(2.0)
    assert schedule.cosine(1.0, 3.0, 1.0) == pytest.approx(1.0)
    assert schedule.cosine(1 / 3, 3.0, 1.0) == pytest.approx(2.5)       # cos 60° = 1/2
    assert schedule.cosine(0.0, 0.996, 1.0) == pytest.approx(0.996)
    assert schedule.cosine(1.0, 0.996, 1.0) == pytest.approx(1.0)
    assert schedule.cosine(1.7, 3.0, 1.0) == pytest.approx(1.0)
    assert schedule.cosine(-0.2, 3.0, 1.0) == pytest.approx(3.0)


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 1.0])
def test_a_warmup_is_a_straight_line_to_the_peak_and_then_it_only_falls(warmup: float) -> None:
    peak, end = 0.8, 0.1
    places = np.linspace(0, 1, 1001)
    values = np.array([schedule.warmup_cosine(place, peak, end, warmup) for place in places])
    rising = places < warmup
    assert values[rising] == pytest.approx(peak * places[rising] / max(warmup, 1e-9))
    assert (np.diff(values[~rising]) <= 1e-12).all()
    assert values.max() == pytest.approx(peak)
    assert schedule.warmup_cosine(warmup, peak, end, warmup) == pytest.approx(peak)
    assert np.abs(np.diff(values)).max() < 0.02 if warmup in (0.0, 0.5, 1.0) else True, "the rate jumps"
    if warmup < 1:
        assert values[-1] == pytest.approx(end)
        middle = (1 + warmup) / 2
        assert schedule.warmup_cosine(middle, peak, end, warmup) == pytest.approx((peak + end) / 2)
