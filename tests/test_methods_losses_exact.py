"""Every loss against plain loops in NumPy or torch's own parts, at its anchors, and exactly the same on any ranks."""

import math
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_dist import dist
from ssl_dist.methods import losses

run = runpy.run_path(str(Path(__file__).with_name("ranks.py")))["run"]

SAMPLES, WIDTH, CLASSES, HIDDEN = 12, 6, 9, 7       # 12 are shared evenly by 2, 3 and 4 ranks


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(row: np.ndarray) -> np.ndarray:
    powers = np.exp(row - row.max())
    return powers / powers.sum()


# ---- against loops

@pytest.mark.parametrize("keys", [0, 1, 20])
@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_info_nce_is_the_cross_entropy_of_the_own_key_among_the_queue(keys: int, temperature: float) -> None:
    query, key = drawn(SAMPLES, WIDTH), drawn(SAMPLES, WIDTH, seed=1)
    queue = F.normalize(drawn(keys, WIDTH, seed=2), dim=1)
    total = 0.0
    for one, own in zip(query.numpy(), key.numpy(), strict=True):
        unit = one / np.linalg.norm(one)
        scores = np.array([unit @ own / np.linalg.norm(own), *(unit @ old for old in queue.numpy())]) / temperature
        total -= math.log(softmax(scores)[0])
    assert float(losses.info_nce(query, key, queue, temperature)) == pytest.approx(total / SAMPLES, rel=1e-10)


def test_keys_and_queue_of_info_nce_do_not_learn() -> None:
    query, key, queue = (each.requires_grad_() for each in (drawn(4, 3), drawn(4, 3, seed=1), drawn(5, 3, seed=2)))
    losses.info_nce(query, key, queue, 0.2).backward()
    assert query.grad is not None
    assert key.grad is None
    assert queue.grad is None


@pytest.mark.parametrize("off_diagonal", [0.0, 0.0051, 1.0])
def test_barlow_is_the_distance_of_the_correlation_from_the_identity(off_diagonal: float) -> None:
    a, b = drawn(SAMPLES, WIDTH), drawn(SAMPLES, WIDTH, seed=1)
    expected = 0.0
    for i in range(WIDTH):
        for j in range(WIDTH):
            one, other = a[:, i].numpy(), b[:, j].numpy()
            one = (one - one.mean()) / math.sqrt(one.var() + 1e-5)
            other = (other - other.mean()) / math.sqrt(other.var() + 1e-5)
            correlation = sum(x * y for x, y in zip(one, other, strict=True)) / SAMPLES
            expected += (correlation - 1) ** 2 if i == j else off_diagonal * correlation**2
    assert float(losses.barlow(a, b, off_diagonal, 0.024)) == pytest.approx(0.024 * expected, rel=1e-9)


def test_barlow_of_whitened_equals_is_nothing() -> None:
    whole, _ = torch.linalg.qr(drawn(64, WIDTH + 1))
    white = whole - whole.mean(dim=0)
    white, _ = torch.linalg.qr(white[:, :WIDTH])
    white = 1e3 * (white - white.mean(dim=0))       # large: the 1e-5 in the deviation plays no part
    assert float(losses.barlow(white, white, 0.5, 1.0)) == pytest.approx(0, abs=1e-8)
    assert float(losses.barlow(white, -white, 0.5, 1.0)) == pytest.approx(4 * WIDTH, rel=1e-6)


@pytest.mark.parametrize("epsilon", [0.03, 0.05, 0.5])
def test_sinkhorn_is_what_the_authors_plain_iterations_give(epsilon: float) -> None:
    scores = F.normalize(drawn(SAMPLES, WIDTH), dim=1) @ F.normalize(drawn(WIDTH, CLASSES, seed=1), dim=0)
    for iterations in (1, 3, 10):
        # As facebookresearch/swav writes them down, in double precision, without a logarithm.
        plan = np.exp(scores.numpy() / epsilon).T
        plan /= plan.sum()
        for _ in range(iterations):
            plan /= plan.sum(axis=1, keepdims=True)
            plan /= CLASSES
            plan /= plan.sum(axis=0, keepdims=True)
            plan /= SAMPLES
        found = losses.sinkhorn(scores, epsilon, iterations)
        assert np.abs(found.numpy() - (plan * SAMPLES).T).max() < 1e-12
        assert torch.allclose(found.sum(dim=1), torch.ones(SAMPLES, dtype=torch.float64))
    many = losses.sinkhorn(scores, epsilon, 2000)
    assert torch.allclose(many.sum(dim=0), torch.full((CLASSES,), SAMPLES / CLASSES, dtype=torch.float64), atol=1e-6)


def test_sinkhorn_survives_what_no_exponential_does() -> None:
    scores = drawn(SAMPLES, CLASSES).float() * 50
    found = losses.sinkhorn(scores, 0.01, 3)        # e^15,000
    assert torch.isfinite(found).all()
    assert torch.allclose(found.sum(dim=1), torch.ones(SAMPLES), atol=1e-5)
    half = losses.sinkhorn(scores.half(), 0.05, 3)
    assert half.dtype == torch.float32
    assert torch.isfinite(half).all()


def views(count: int, seed: int) -> list[Tensor]:
    return [drawn(SAMPLES, CLASSES, seed=seed + number) for number in range(count)]


def crossed(targets: list[np.ndarray], logits: list[np.ndarray], temperature: float) -> float:
    terms = []
    for number, target in enumerate(targets):
        for view, scores in enumerate(logits):
            if view == number:
                continue
            terms.append(np.mean([-sum(t * math.log(p) for t, p in zip(row, softmax(own / temperature), strict=True))
                                  for row, own in zip(target, scores, strict=True)]))
    return float(np.mean(terms))


def test_swav_foresees_every_assignment_from_every_other_view() -> None:
    scores = views(5, 0)
    assignments = [losses.sinkhorn(each, 0.5, 3) for each in scores[:2]]
    expected = crossed([each.numpy() for each in assignments], [each.numpy() for each in scores], 0.1)
    assert float(losses.swav(scores, assignments, 0.1)) == pytest.approx(expected, rel=1e-10)


def test_dino_says_of_every_view_what_the_teacher_says_of_the_large_ones() -> None:
    student, teacher, centre = views(5, 0), views(2, 20), drawn(CLASSES, seed=30)
    said = [np.stack([softmax((row - centre.numpy()) / 0.04) for row in each.numpy()]) for each in teacher]
    expected = crossed(said, [each.numpy() for each in student], 0.1)
    assert float(losses.dino(student, teacher, centre, 0.1, 0.04)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("classes", "kind"), [(65_536, "dino"), (3000, "swav")])
def test_without_an_opinion_the_loss_is_the_logarithm_of_the_classes(classes: int, kind: str) -> None:
    flat = [torch.zeros(4, classes) for _ in range(3)]
    loss = losses.dino(flat, flat[:2], torch.zeros(classes), 0.1, 0.04) if kind == "dino" else \
        losses.swav(flat, [losses.sinkhorn(each, 0.05, 3) for each in flat[:2]], 0.1)
    assert float(loss) == pytest.approx(math.log(classes), rel=1e-5)


# ---- on several ranks, in double precision

def features(own: Tensor, weights: Tensor) -> Tensor:
    return (own @ weights).tanh()


def by_name(own: list[Tensor], weights: Tensor) -> dict[str, Tensor]:
    """Every loss of this rank's slice, as a function of the weights that all ranks share."""
    a, b, c = (features(each, weights) for each in own)
    queue = F.normalize(drawn(11, HIDDEN, seed=9), dim=1)
    prototypes = F.normalize(drawn(CLASSES, HIDDEN, seed=8), dim=1)
    scores = [F.normalize(each, dim=1) @ prototypes.T for each in (a, b, c)]
    assignments = [losses.sinkhorn(each.detach(), 0.05, 3) for each in scores[:2]]
    teacher = [3 * each.detach() for each in scores[:2]]
    return {"nt_xent": losses.nt_xent(a, b, 0.1), "info_nce": losses.info_nce(a, b, queue, 0.2),
            "barlow": losses.barlow(a, b, 0.0051, 0.024), "swav": losses.swav(scores, assignments, 0.1),
            "dino": losses.dino(scores, teacher, drawn(CLASSES, seed=7) / 9, 0.1, 0.04)}


LOSSES = ("nt_xent", "info_nce", "barlow", "swav", "dino")


def learn(own: list[Tensor]) -> dict[str, Tensor]:
    found = {}
    for name in LOSSES:
        weights = drawn(WIDTH, HIDDEN, seed=5).requires_grad_()
        loss = by_name(own, weights)[name]
        loss.backward()
        found[f"{name} loss"] = loss.detach()
        found[f"{name} gradient"] = torch.stack(dist.gather(weights.grad)).mean(0)
    scores = features(own[0], drawn(WIDTH, CLASSES, seed=6))
    found["assigned"] = losses.sinkhorn(scores, 0.05, 3)
    return found


def batch() -> list[Tensor]:
    first = drawn(SAMPLES, WIDTH)
    return [first, first + 0.5 * drawn(SAMPLES, WIDTH, seed=1), first + 0.9 * drawn(SAMPLES, WIDTH, seed=2)]


def on_ranks(_: Path) -> dict[str, Tensor]:
    return learn([each.chunk(dist.world())[dist.rank()] for each in batch()])


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list]:
    return run(on_ranks, (2, 3, 4), tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_every_rank_gets_the_whole_loss_and_the_mean_gradient_is_that_of_one_process(name: str, world: int,
                                                                                     ranked: dict) -> None:
    alone = learn(batch())
    for rank in ranked[world]:
        assert float(rank[f"{name} loss"]) == pytest.approx(float(alone[f"{name} loss"]), rel=1e-10)
        torch.testing.assert_close(rank[f"{name} gradient"], alone[f"{name} gradient"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_assignments_are_those_of_one_process(world: int, ranked: dict) -> None:
    alone = losses.sinkhorn(features(batch()[0], drawn(WIDTH, CLASSES, seed=6)), 0.05, 3)
    torch.testing.assert_close(torch.cat([rank["assigned"] for rank in ranked[world]]), alone, rtol=1e-10, atol=1e-12)


# ---- memory

def plain(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    both = torch.cat([F.normalize(a, dim=1), F.normalize(b, dim=1)])
    scores = (both @ both.T / temperature).fill_diagonal_(float("-inf"))
    return F.cross_entropy(scores, torch.arange(len(both)).roll(len(a)))


@pytest.mark.parametrize("piece", [1, 100, 10**9])
def test_nt_xent_piece_by_piece_is_nt_xent_at_once(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "PIECE", piece)
    results = []
    loss: Callable
    for loss in (losses.nt_xent, plain):
        a, b = drawn(33, WIDTH).requires_grad_(), drawn(33, WIDTH, seed=1).requires_grad_()
        value = loss(a, b, 0.1)
        (3 * value).backward()
        results.append((value.detach(), a.grad, b.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)
