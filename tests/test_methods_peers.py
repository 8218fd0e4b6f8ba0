"""Every loss, value and gradient, against an independent implementation: the library lightly, of the extra `peers`."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_dist.methods import base, losses
from ssl_dist.methods.vicreg import vicreg

lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed: pip install --no-deps -c "
                              "constraints.txt lightly")

SAMPLES, WIDTH, CLASSES = 12, 16, 20


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair() -> list[Tensor]:
    first = drawn(SAMPLES, WIDTH)
    return [first, first + 0.8 * drawn(SAMPLES, WIDTH, seed=1)]


def agree(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], given: list[Tensor], learns: int = 99) -> None:
    """The same value, and the same gradient of the first so many."""
    found = []
    for loss in (ours, theirs):
        own = [each.clone().requires_grad_(number < learns) for number, each in enumerate(given)]
        value = loss(*own)
        value.sum().backward()
        found.append([value.detach().reshape(()), *(each.grad for each in own[:learns])])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.5, 2.0])
def test_simclrs_loss_is_theirs(temperature: float) -> None:
    agree(lambda a, b: losses.nt_xent(a, b, temperature), lightly.NTXentLoss(temperature), pair())


@pytest.mark.parametrize("temperature", [0.07, 0.2])
def test_mocos_loss_and_queue_are_theirs_over_several_steps(temperature: float) -> None:
    """Theirs begins full of random vectors, which ours never gives out, so ours is given theirs to begin with. Theirs
    takes no part of a batch that reaches beyond its end to its beginning; a length that batches divide hides that."""
    theirs = lightly.NTXentLoss(temperature, memory_bank_size=(24, WIDTH)).double()
    queue = base.Queue(24, WIDTH).double()
    queue.take(theirs.memory_bank.bank)
    queue.push()
    for step in range(5):
        query, key = drawn(SAMPLES, WIDTH, seed=step), F.normalize(drawn(SAMPLES, WIDTH, seed=50 + step), dim=1)
        agree(lambda query, key: losses.info_nce(query, key, queue.filled(), temperature),
              lambda query, key: theirs(query, key.detach()), [query, key], learns=1)
        queue.take(key)
        queue.push()
        torch.testing.assert_close(queue.filled(), theirs.memory_bank.bank, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("off_diagonal", [0.0051, 0.5])
def test_barlows_loss_is_theirs_but_for_the_scale(off_diagonal: float) -> None:
    """Theirs knows no scale; ours multiplies by it."""
    agree(lambda a, b: losses.barlow(a, b, off_diagonal, 0.024) / 0.024, lightly.BarlowTwinsLoss(off_diagonal), pair())


@pytest.mark.parametrize("earlier", [0, 7])
def test_swavs_loss_is_theirs_with_and_without_a_queue(earlier: int) -> None:
    """Theirs is the mean over assignments of the mean over views, which with two large views is ours over all pairs."""
    scores = [0.2 * drawn(SAMPLES, CLASSES, seed=number).tanh() for number in range(5)]
    queue = [0.2 * drawn(earlier, CLASSES, seed=30 + number) for number in range(2)]

    def ours(*views: Tensor) -> Tensor:
        assigned = [losses.sinkhorn(torch.cat([old, own.detach()]), 0.05, 3)[earlier:]
                    for old, own in zip(queue, views, strict=False)]
        return losses.swav(views, assigned, 0.1)

    agree(ours, lambda *views: lightly.SwaVLoss()(list(views[:2]), list(views[2:]), queue if earlier else None), scores)


def test_dinos_loss_and_centre_are_theirs_over_several_steps() -> None:
    theirs = lightly.DINOLoss(CLASSES, teacher_temp=0.04, student_temp=0.1, center_momentum=0.9).double()
    centre = torch.zeros(CLASSES, dtype=torch.float64)
    for step in range(4):
        student = [0.3 * drawn(SAMPLES, CLASSES, seed=10 * step + number) for number in range(4)]
        teacher = [0.3 * drawn(SAMPLES, CLASSES, seed=10 * step + number) for number in (5, 6)]
        torch.testing.assert_close(theirs.center.flatten(), centre, rtol=1e-6, atol=1e-9)
        agree(lambda *views, said=teacher, centre=centre: losses.dino(views, said, centre, 0.1, 0.05),
              lambda *views, said=teacher: theirs(said, list(views), teacher_temp=0.05), student)
        centre = 0.9 * centre + 0.1 * torch.cat(teacher).mean(dim=0)        # as DINO's method does after the step


def test_vicregs_loss_is_theirs() -> None:
    def ours(a: Tensor, b: Tensor) -> Tensor:
        terms = vicreg(a, b)
        return 25 * terms["invariance"] + 25 * terms["variance"] + terms["covariance"]

    agree(ours, lightly.VICRegLoss(), [0.6 * each for each in pair()])
    assert math.isfinite(float(ours(*pair())))
