"""Losses as pure functions. Every rank passes its slice and receives the loss of the whole batch.

B samples of one rank   N of all ranks   M rows, both views of all   D width   K prototypes, queued keys or classes
The gradients of all ranks, averaged, are those of one process on the whole batch. All is reckoned in float32 at least:
e^(1/0.05) leaves nothing of half precision.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_dist import dist

PIECE = 1 << 24         # scores that are in memory at a time: 64 MB


def nt_xent(a_BD: Tensor, b_BD: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss (Chen et al. 2020): among all 2N - 1 other views, find the one of the same tile."""
    with _exact(a_BD):
        both = torch.cat([F.normalize(wide(a_BD), dim=1), F.normalize(wide(b_BD), dim=1)])
        return _NtXent.apply(both, temperature)


class _NtXent(torch.autograd.Function):
    """The loss a piece of rows at a time, each rank its own rows: memory for the vectors, never for all scores.

    Scores are symmetric, so what row j asks of vector i is known from i's row and j's normalisation alone:
    dL/dz_i = 1/(M T) (sum_j (P_ij + P_ji) z_j - 2 z_partner), with P_ji = exp(s_ij - log sum_k exp(s_jk)).
    """

    @staticmethod
    def forward(ctx: Any, own_RD: Tensor, temperature: float) -> Tensor:    # type: ignore[override]
        share = len(own_RD) // 2
        # Order: a of rank 0, b of rank 0, a of rank 1, ... The loss does not mind.
        all_MD = dist.gather_with_gradient(own_RD)
        first = dist.rank() * len(own_RD)
        sums_R = own_RD.new_empty(len(own_RD))
        for rows in _pieces(len(own_RD), len(all_MD)):
            scores = _scores(own_RD, all_MD, rows, first, temperature)
            torch.logsumexp(scores, dim=1, out=sums_R[rows])
        partners_RD = own_RD.roll(share, 0)
        wanted_R = (own_RD * partners_RD).sum(dim=1) / temperature
        ctx.save_for_backward(own_RD, all_MD, dist.gather_with_gradient(sums_R), partners_RD)
        ctx.temperature, ctx.first = temperature, first
        return dist.average((sums_R - wanted_R).mean())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:        # type: ignore[override]
        own_RD, all_MD, sums_M, partners_RD = ctx.saved_tensors
        moved_RD = torch.empty_like(own_RD)
        for rows in _pieces(len(own_RD), len(all_MD)):
            scores = _scores(own_RD, all_MD, rows, ctx.first, ctx.temperature)
            sums_R = sums_M[ctx.first + rows.start:ctx.first + rows.stop, None]
            shares = torch.exp(scores - sums_R).add_(scores.sub_(sums_M).exp_())
            torch.matmul(shares, all_MD, out=moved_RD[rows])
        moved_RD.sub_(partners_RD, alpha=2)
        # The averaging over ranks divides by their number what is whole already.
        return moved_RD.mul_(gradient * dist.world() / (len(all_MD) * ctx.temperature)), None


def _scores(own_RD: Tensor, all_MD: Tensor, rows: slice, first: int, temperature: float) -> Tensor:
    """Scores of some own rows against all; a view is not its own neighbour."""
    scores = (own_RD[rows] @ all_MD.T).div_(temperature)
    here = torch.arange(rows.start, rows.stop, device=scores.device)
    scores[here - rows.start, first + here] = float("-inf")
    return scores


def _pieces(rows: int, others: int) -> list[slice]:
    step = max(1, PIECE // others)
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def info_nce(query_BD: Tensor, key_BD: Tensor, queue_KD: Tensor, temperature: float) -> Tensor:
    """MoCo's loss (He et al. 2020): tell the key of the same tile from those in the queue; keys do not learn."""
    with _exact(query_BD):
        query, key = F.normalize(wide(query_BD), dim=1), F.normalize(wide(key_BD.detach()), dim=1)
        positive_B1 = (query * key).sum(dim=1, keepdim=True)
        scores = torch.cat([positive_B1, query @ wide(queue_KD.detach()).T], dim=1) / temperature
        return _everywhere((torch.logsumexp(scores, dim=1) - scores[:, 0]).mean())


def barlow(a_BD: Tensor, b_BD: Tensor, off_diagonal: float, scale: float) -> Tensor:
    """Barlow Twins' loss (Zbontar et al. 2021): the same feature agrees between views, different ones do not.

    The features are normalised over the whole batch of all ranks, and so is their correlation.
    """
    with _exact(a_BD):
        samples = len(a_BD) * dist.world()
        normal_a, normal_b = (_standardised(wide(each), samples) for each in (a_BD, b_BD))
        # What follows is the same on every rank, and so is its gradient: no rank has to ask the others for it.
        correlation_DD = dist.sum_with_gradient(normal_a.T @ normal_b, same=True) / samples
        diagonal_D = correlation_DD.diagonal()
        agree = (diagonal_D - 1).square().sum()
        others = correlation_DD.square().sum() - diagonal_D.square().sum()
        return scale * (agree + off_diagonal * others)


def _standardised(own_BD: Tensor, samples: int) -> Tensor:
    """Features of mean 0 and deviation 1 over all ranks."""
    centred = own_BD - dist.sum_with_gradient(own_BD.sum(dim=0)) / samples
    variance_D = dist.sum_with_gradient(centred.square().sum(dim=0)) / samples
    return centred * torch.rsqrt(variance_D + 1e-5)     # 1e-5: what the authors' BatchNorm adds


@torch.no_grad()
def sinkhorn(scores_BK: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Assignments (B, K) of all ranks' samples to prototypes, as even as can be (Cuturi 2013, as in SwAV).

    In logarithms, where no score is too large or too small; each row sums to one.
    """
    with _exact(scores_BK):
        logs = wide(scores_BK) / epsilon
        for _ in range(iterations):
            taken_K = torch.logsumexp(dist.gather_with_gradient(torch.logsumexp(logs, dim=0, keepdim=True)), dim=0)
            logs = logs - taken_K
            logs = logs - torch.logsumexp(logs, dim=1, keepdim=True)
        return logs.exp()


def swav(scores: Sequence[Tensor], assignments: Sequence[Tensor], temperature: float) -> Tensor:
    """SwAV's loss (Caron et al. 2020): from every other view, foresee the assignment of the first ones.

    `scores` (B, K) of every view, `assignments` (B, K) of the first few.
    """
    with _exact(scores[0]):
        logs = [F.log_softmax(wide(each) / temperature, dim=1) for each in scores]
        return _everywhere(_crossed(logs, [wide(each) for each in assignments]))


def dino(student: Sequence[Tensor], teacher: Sequence[Tensor], centre_K: Tensor, student_temperature: float,
         teacher_temperature: float) -> Tensor:
    """DINO's loss (Caron et al. 2021): every view of the student says what the teacher says of each large one.

    `student` (B, K) of every view, `teacher` (B, K) of the first few.
    """
    with _exact(student[0]):
        logs = [F.log_softmax(wide(each) / student_temperature, dim=1) for each in student]
        said = [F.softmax((wide(each.detach()) - wide(centre_K)) / teacher_temperature, dim=1) for each in teacher]
        return _everywhere(_crossed(logs, said))


def _crossed(logs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Mean cross-entropy over all pairs of a target and the prediction of another view."""
    pairs = [-(target * log).sum(dim=1).mean() for number, target in enumerate(targets)
             for view, log in enumerate(logs) if view != number]
    return torch.stack(pairs).mean()


def wide(values: Tensor) -> Tensor:
    """At least float32."""
    return values if values.dtype == torch.float64 else values.float()


def _exact(values: Tensor) -> torch.autocast:
    return torch.autocast(values.device.type, enabled=False)


def _everywhere(own: Tensor) -> Tensor:
    """The mean over ranks as a value; its gradient is the own part's, for gradients are averaged afterwards."""
    return own + (dist.average(own.detach()) - own.detach())
