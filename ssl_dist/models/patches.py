"""Patches of a map of confidence: where they lie, and how far those of a class are from the others.

N tiles   C classes   H, W pixels   G places of patches in a tile   K patches of a tile and class   P a patch's side
M patches   A patches that all are held against   L levels of grey
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_dist.models import stains
from ssl_dist.models.fcnn import lifted

SHOWN = "light", "ink", "haematoxylin"
LUMA = 0.299, 0.587, 0.114
LEVELS = 25             # of grey, in histograms
TINY = 2.0**-100        # of nothing there is no logarithm, and none of its slope: the authors' is -100 at least


class Grid(NamedTuple):
    """Where patches may lie: squares of `side` pixels, one every `stride` pixels."""

    side: int
    stride: int

    def across(self, size: int) -> int:
        """How many lie side by side in so many pixels."""
        return (size - self.side) // self.stride + 1

    def means(self, maps_NCHW: Tensor) -> Tensor:
        """The mean of every patch (N, C, G)."""
        return F.avg_pool2d(maps_NCHW, self.side, self.stride).flatten(2)

    def cut(self, maps_NCHW: Tensor, places_NCK: Tensor) -> Tensor:
        """The pixels (N, C, K, P, P) of patches; of one map every class has the same."""
        across = self.across(maps_NCHW.shape[3])
        top, left = places_NCK // across * self.stride, places_NCK % across * self.stride
        inside = torch.arange(self.side, device=maps_NCHW.device)
        pixels = (top[..., None, None] + inside[:, None]) * maps_NCHW.shape[3] + left[..., None, None] + inside
        flat_NCX = maps_NCHW.flatten(2).expand(-1, places_NCK.shape[1], -1)
        return flat_NCX.gather(2, pixels.flatten(2)).view(pixels.shape)

    def seen(self, colours_N3HW: Tensor, maps_NCHW: Tensor, places_NCK: Tensor) -> Tensor:
        """Patches (N, C, K, 3, P, P) of the picture, as far as the map of each class is confident."""
        sure_NCKPP = self.cut(maps_NCHW, places_NCK)
        return torch.stack([self.cut(colour[:, None], places_NCK) * sure_NCKPP for colour in colours_N3HW.unbind(1)],
                           dim=3)


def shown(light_N3HW: Tensor, how: str) -> Tensor:
    """What patches show of light from 0 to 1: the light itself, none of it 0; `ink`, what tissue takes of it; or what
    its haematoxylin alone would take, of every colour alike."""
    if how == "haematoxylin":
        amount_N1HW = stains.amounts(stains.density(light_N3HW))[:, :1].clamp_min(0)
        return (1 - torch.exp(-amount_N1HW)).expand(-1, 3, -1, -1)
    return 1 - lifted(light_N3HW) if how == "ink" else lifted(light_N3HW)


def entropy(chance: Tensor) -> Tensor:
    """In bits: 0 of who is sure, 1 of who knows nothing."""
    other = 1 - chance
    return -(chance * chance.clamp_min(TINY).log2() + other * other.clamp_min(TINY).log2())


def grey(patches_M3PP: Tensor) -> Tensor:
    """Levels of grey (M, P * P)."""
    luma = torch.tensor(LUMA, device=patches_M3PP.device, dtype=patches_M3PP.dtype)
    return torch.einsum("mcpq,c->mpq", patches_M3PP, luma).flatten(1)


def histograms(patches_M3PP: Tensor) -> Tensor:
    """How often each level of grey occurs (M, L)."""
    level_MD = (grey(patches_M3PP) * LEVELS).long().clamp(0, LEVELS - 1)
    counts_ML = torch.zeros(len(level_MD), LEVELS, device=level_MD.device, dtype=patches_M3PP.dtype)
    return counts_ML.scatter_add_(1, level_MD, torch.ones_like(level_MD, dtype=counts_ML.dtype)) / level_MD.shape[1]


def jensen_shannon(one_AL: Tensor, other_ML: Tensor) -> Tensor:
    """How different distributions are (A, M), in bits: 0 are equal, 1 have nothing in common."""
    def spread(shares: Tensor) -> Tensor:
        return torch.special.entr(shares).sum(dim=-1) / math.log(2)

    return spread((one_AL[:, None] + other_ML) / 2) - (spread(one_AL)[:, None] + spread(other_ML)) / 2


def separation(levels_ML: Tensor, positive_M: Tensor, negative_M: Tensor, anchors_A: Tensor) -> tuple[Tensor, Tensor]:
    """How different patches of a class are from each other, and from those that are not of it, by their histograms.

    The abstract has training end when "the information separation between the positive patches is small, and the
    positive-negative pairs is large", and the authors' code does not say how that is measured. Ours: the mean
    Jensen-Shannon divergence of the levels of grey that are seen in two patches. Without both kinds both are 0.
    """
    if not len(anchors_A) or not bool(negative_M.any()):
        return levels_ML.new_zeros(()), levels_ML.new_zeros(())
    apart_AM = jensen_shannon(levels_ML[anchors_A], levels_ML)
    return apart_AM[:, positive_M].mean(), apart_AM[:, negative_M].mean()
