"""What every method is, and what several of them share: teachers, pairs of views, and eyes for collapse.

B tiles of one rank   N of all ranks   D width
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_dist import dist
from ssl_dist.data.batch import Batch, SlideView, View, each
from ssl_dist.models.encoder import Encoder

FEW = 8     # tiles, of which the spread says nothing


class Method(nn.Module, ABC):
    """An encoder and what teaches it. The training loop knows nothing else."""

    encoder: nn.Module              # what evaluation loads
    views: tuple[View, ...] | tuple[SlideView, ...]         # what the data path must cut
    INPUT = "tiles"                 # or "bags": draws of slides, and its views are SlideView
    WHOLE = ""                      # what the loss takes from all tiles of a step, so that parts would change the loss
    chance = math.inf               # the loss of one who knows nothing, where there is such a number

    @staticmethod
    def network(name: str, args: dict[str, Any], mean: tuple[float, ...], std: tuple[float, ...]) -> nn.Module:
        """The encoder that the settings ask for: timm's, unless the method has networks of its own."""
        return Encoder(name, args, mean, std)

    def objections(self, shards: Mapping[str, Mapping[str, Any]]) -> list[str]:     # noqa: ARG002
        """What speaks against learning like this from what folders say of their first dataset and how it was cut;
        asked before the first step, of a method without weights."""
        return []

    def begin(self) -> None:
        """Before the first step of a run: weights that it does not begin with at random."""

    @abstractmethod
    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """"loss", which is minimised, and other scalars worth a curve; progress runs from 0 to 1."""

    def after_step(self, progress: float) -> None:
        """What moves without a gradient, once an optimizer step: a teacher, a queue, a centre."""

    def forget(self) -> None:
        """Drops what `forward` kept for `after_step`, of a step that is left out."""
        for module in self.modules():
            if isinstance(module, Queue):
                module.drop()

    def resting(self) -> list[nn.Parameter]:
        """Weights that learn, but not all the time (`freeze`): the optimizer counts their steps apart."""
        return []


def pair(views: Sequence[View], who: str) -> list[str]:
    """What is wrong with views that must be two of one size."""
    sizes = [view.size for view in each(views)]
    return [] if len(sizes) == 2 and sizes[0] == sizes[1] else \
        [f"views are of {sizes} pixels; {who} takes two of one size"]


def large(views: Sequence[View]) -> int:
    """How many views there are of the largest size; they come first."""
    sizes = [view.size for view in views]
    return sizes.count(max(sizes))


def large_first(views: Sequence[View], who: str) -> list[str]:
    """What is wrong with views of which two or more large ones must come first."""
    sizes = [view.size for view in each(views)]
    return [] if large(each(views)) > 1 and sizes == sorted(sizes, reverse=True) else \
        [f"views are of {sizes} pixels; {who} takes two or more large ones, and then smaller ones"]


def teacher(student: nn.Module) -> nn.Module:
    """A copy that does not learn by gradients, and drops nothing."""
    copied = copy.deepcopy(student).requires_grad_(False)
    for module in copied.modules():
        # torch's dropout, timm's stochastic depth and DropBlock, its dropped patches, and networks that call F.dropout.
        # All else of training stays: a teacher's BatchNorm has statistics of its own.
        for name in ("p", "drop_prob", "prob", "drop_rate", "attn_drop_p", "attn_drop_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return copied


def freeze(weight: nn.Parameter, frozen: bool) -> None:
    """Whether a weight stays as it is for a while, for the optimizer too.

    A missing gradient is not enough: what averages gradients may put zeros in its place, as DeepSpeed does, and then
    weight decay, momentum and Adam's count of steps go on.
    """
    weight.requires_grad_(not frozen)


@torch.no_grad()
def follow(behind: nn.Module, ahead: nn.Module, momentum: float) -> None:
    """Moves every weight of a teacher a little towards its student's; running statistics are its own."""
    own: list[Tensor] = [parameter.detach() for parameter in behind.parameters()]
    goal: list[Tensor] = [parameter.detach() for parameter in ahead.parameters()]
    torch._foreach_mul_(own, momentum)
    torch._foreach_add_(own, goal, alpha=1 - momentum)


def by_size(network: nn.Module, views: Sequence[Tensor]) -> Tensor:
    """The network on every view, in order; views of one size that follow each other go through together."""
    first, done = 0, []
    for last in range(1, len(views) + 1):
        if last == len(views) or views[last].shape != views[first].shape:
            done.append(network(torch.cat(list(views[first:last]))))
            first = last
    return torch.cat(done)


@torch.no_grad()
def spread(features_BD: Tensor) -> dict[str, Tensor]:
    """How far features are from all being one: 1 is as far as can be for the deviation, min(B, D) for the rank.

    The rank is the participation ratio of the spectrum, (sum of eigenvalues)² / sum of their squares: it takes one
    small matrix product, and falls when features follow each other. Where a rank has few tiles, those of all ranks.
    """
    if len(features_BD) < FEW:      # of so few nothing can be said; and BatchNorm has made two of them opposites
        features_BD = dist.gather_with_gradient(features_BD)
    if len(features_BD) < FEW:
        return {}
    unit = F.normalize(features_BD.float(), dim=1)
    centred = unit - unit.mean(dim=0)
    gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    total = centred.square().sum()
    return {"deviation": (total / len(centred)).sqrt(), "rank": total.square() / gram.square().sum().clamp_min(1e-12)}


class Queue(nn.Module):
    """The newest vectors of all ranks, the same on every rank, so that it may be resumed on any number of them.

    What was never written is not given out: a queue of random vectors teaches nothing.
    """

    rows_KD: Tensor
    _written: Tensor

    def __init__(self, length: int, width: int):
        super().__init__()
        self.register_buffer("rows_KD", torch.zeros(length, width))
        self.register_buffer("_written", torch.zeros((), dtype=torch.long))     # in all its life
        self._taken: list[Tensor] = []

    def filled(self) -> Tensor:
        """The vectors that are there, in no order that means anything."""
        return self.rows_KD[:min(int(self._written), len(self.rows_KD))]

    def take(self, own_BD: Tensor) -> None:
        """Keeps this rank's new vectors until `push`; once for every part of its batch."""
        self._taken.append(own_BD.detach().to(self.rows_KD.dtype))

    def drop(self) -> None:
        """Forgets what was taken and not pushed."""
        self._taken.clear()

    @torch.no_grad()
    def push(self) -> None:
        """Writes what all ranks took over the oldest vectors; once an optimizer step."""
        if not self._taken:
            return
        # A rank's parts first, then the ranks: the order of the whole batch, however it was shared out.
        new_ND = dist.gather_with_gradient(torch.cat(self._taken))[-len(self.rows_KD):]
        self._taken.clear()
        places = (int(self._written) + torch.arange(len(new_ND), device=new_ND.device)) % len(self.rows_KD)
        self.rows_KD[places] = new_ND
        self._written += len(new_ND)
