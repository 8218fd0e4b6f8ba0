"""Losses against plain loops, and on several ranks against one."""

import math
import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ssl_dist import dist
from ssl_dist.methods.losses import nt_xent

run = runpy.run_path(str(Path(__file__).with_name("ranks.py")))["run"]

SAMPLES, WIDTH, HIDDEN = 12, 6, 5


def loops(a: list[list[float]], b: list[list[float]], temperature: float) -> float:
    """SimCLR's loss as the paper writes it: for every view, against every other view, over every component."""
    views = []
    for vector in [*a, *b]:
        length = math.sqrt(sum(value * value for value in vector))
        views.append([value / length for value in vector])
    total = 0.0
    for one, anchor in enumerate(views):
        partner = (one + len(a)) % len(views)
        among = 0.0
        for other, view in enumerate(views):
            closeness = 0.0
            for left, right in zip(anchor, view, strict=True):
                closeness += left * right
            if other != one:
                among += math.exp(closeness / temperature)
            if other == partner:
                wanted = closeness / temperature
        total += math.log(among) - wanted
    return total / len(views)


def embeddings(samples: int = SAMPLES, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(samples, WIDTH, generator=generator, dtype=torch.float64)
    return a, a + 0.7 * torch.randn(samples, WIDTH, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.5, 1.0, 10.0])
@pytest.mark.parametrize("samples", [1, 2, 7, 12])
def test_nt_xent_agrees_with_three_loops(samples: int, temperature: float) -> None:
    a, b = embeddings(samples)
    expected = loops(a.tolist(), b.tolist(), temperature)
    assert float(nt_xent(a, b, temperature)) == pytest.approx(expected, rel=2e-5, abs=1e-5)


def test_nt_xents_gradient_agrees_with_differences_of_the_loops() -> None:
    a, b = (each.clone().requires_grad_() for each in embeddings(4))
    nt_xent(a, b, 0.3).backward()
    for mine, which in ((a, 0), (b, 1)):
        for row in range(4):
            for column in range(WIDTH):
                moved = []
                for step in (1e-5, -1e-5):
                    both = [each.detach().clone() for each in (a, b)]
                    both[which][row, column] += step
                    moved.append(loops(both[0].tolist(), both[1].tolist(), 0.3))
                assert float(mine.grad[row, column]) == pytest.approx((moved[0] - moved[1]) / 2e-5, abs=2e-5)


def test_nt_xent_is_the_same_for_swapped_views_and_longer_vectors() -> None:
    a, b = embeddings()
    expected = float(nt_xent(a, b, 0.2))
    assert float(nt_xent(b, a, 0.2)) == pytest.approx(expected, rel=1e-6)
    assert float(nt_xent(100 * a, 0.01 * b, 0.2)) == pytest.approx(expected, rel=1e-6)
    assert float(nt_xent(a, b.roll(1, 0), 0.2)) > expected + 0.1, "whose partner a view is plays no part"


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_equal_embeddings_give_the_logarithm_of_the_others(temperature: float) -> None:
    for samples in (1, 3, 12):
        same = torch.ones(samples, WIDTH)
        assert float(nt_xent(same, same, temperature)) == pytest.approx(math.log(2 * samples - 1), abs=1e-5)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("samples", [3, 64])
def test_half_precision_stays_finite_and_exact_at_a_low_temperature(kind: torch.dtype, autocast: bool,
                                                                    samples: int) -> None:
    a, b = (each.to(kind) for each in embeddings(samples))
    a, b = a.requires_grad_(), b.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = nt_xent(a, b, 0.05)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert all(torch.isfinite(each.grad).all() for each in (a, b))
    expected = loops(a.detach().double().tolist(), b.detach().double().tolist(), 0.05)
    assert float(loss.detach()) == pytest.approx(expected, abs=2e-4), "something was calculated in half precision"


# ---- on several ranks

def learn(own_a: Tensor, own_b: Tensor, temperature: float) -> dict[str, Tensor]:
    """One network for both views; gradients of its weights averaged over ranks, as DeepSpeed does."""
    weights = torch.linspace(-1, 1, WIDTH * HIDDEN).view(WIDTH, HIDDEN).sin().requires_grad_()
    loss = nt_xent(own_a.float() @ weights, (own_b.float() @ weights).tanh(), temperature)
    loss.backward()
    return {"loss": loss.detach(), "gradient": torch.stack(dist.gather(weights.grad)).mean(0)}


def on_ranks(_: Path) -> dict[str, Tensor]:
    a, b = (each.chunk(dist.world())[dist.rank()] for each in embeddings())
    found = {f"{name} {temperature}": value for temperature in (0.05, 0.5)
             for name, value in learn(a, b, temperature).items()}
    # Two gathers whose gradients are one and the same tensor: neither may write into it.
    left, right = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    factors = torch.arange(2 * 3 * dist.world(), dtype=torch.float32).view(-1, 3)
    ((dist.gather_with_gradient(left) + dist.gather_with_gradient(right)) * factors).sum().backward()
    return {**found, "left": left.grad, "right": right.grad,
            "order": dist.gather_with_gradient(torch.full((2,), dist.rank()))}


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list]:
    return run(on_ranks, (2, 3), tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_gets_the_loss_of_the_whole_batch_and_the_mean_gradient_is_its_gradient(world: int,
                                                                                           ranked: dict) -> None:
    for temperature in (0.05, 0.5):
        alone = learn(*embeddings(), temperature)
        for rank in ranked[world]:
            assert float(rank[f"loss {temperature}"]) == pytest.approx(float(alone["loss"]), abs=1e-6)
            torch.testing.assert_close(rank[f"gradient {temperature}"], alone["gradient"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world", [2, 3])
def test_what_is_gathered_sends_its_gradient_to_every_rank(world: int, ranked: dict) -> None:
    for number, rank in enumerate(ranked[world]):
        assert rank["order"].tolist() == [each for each in range(world) for _ in range(2)]
        expected = world * torch.arange(6 * world, dtype=torch.float32).view(world, 2, 3)[number]
        assert torch.equal(rank["left"], expected), "the gradient of a gather is not the sum over ranks"
        assert torch.equal(rank["right"], expected), "the gradient of a gather is not the sum over ranks"
