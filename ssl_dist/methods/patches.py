"""Which patches patch-contrastive segmentation draws, how alike two of them are, and what it costs where like are
unlike. Pure functions; every random number is given.

N tiles   C classes   H, W pixels   G places of patches in a tile   K patches drawn of a tile and class
P a patch's side   M patches   A of them that all are held against   L levels of grey
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_dist.models.patches import LEVELS, TINY, Grid, entropy, grey

FLOOR = 1e-3            # the weight of a place of which nothing is known: then all are drawn alike
BANDWIDTH = 0.9         # of mutual information: how far a pixel counts for other levels, of 0 to 1 (the authors' value)


# --- where

class Drawn(NamedTuple):
    """Patches of every tile and class. One that is neither of the class nor not of it was drawn in vain."""

    places_NCK: Tensor
    positive_NCK: Tensor
    negative_NCK: Tensor


def by_entropy(maps_NCHW: Tensor, grid: Grid, chances_NCX: Tensor, count: int) -> Drawn:
    """Where the map is sure, pixel by pixel; of the class with a chance that is its mean confidence."""
    confidence_NCG = grid.means(maps_NCHW)
    sure_NCG = (1 - grid.means(entropy(maps_NCHW))).clamp_min(FLOOR)
    places_NCK = _places(sure_NCG, chances_NCX[..., :count])
    # A place is of the class or is not, however often it is drawn.
    positive_NCG = chances_NCX[..., -confidence_NCG.shape[2]:] < confidence_NCG
    positive_NCK = positive_NCG.gather(2, places_NCK)
    return Drawn(places_NCK, positive_NCK, ~positive_NCK)


def uniform(maps_NCHW: Tensor, grid: Grid, chances_NCX: Tensor, count: int) -> Drawn:
    """Anywhere, the first half of the class and the other not."""
    return _halves(torch.ones_like(grid.means(maps_NCHW)), torch.ones_like(grid.means(maps_NCHW)), chances_NCX, count)


def probabilistic(maps_NCHW: Tensor, grid: Grid, chances_NCX: Tensor, count: int, alpha: float) -> Drawn:
    """Of the class as often as a place's share of all confidence; others as often as what that leaves."""
    powers_NCG = grid.means(maps_NCHW)
    powers_NCG = (powers_NCG / powers_NCG.amax(dim=2, keepdim=True).clamp_min(FLOOR)) ** alpha
    share_NCG = _shares(powers_NCG)
    return _halves(share_NCG, 1 - share_NCG, chances_NCX, count)


def sentinel(maps_NCHW: Tensor, grid: Grid, chances_NCX: Tensor, count: int, alpha: float) -> Drawn:
    """As by `probabilistic`, but for one place more of full confidence, where nothing lies: a tile of which the map is
    sure nowhere gives few patches of the class."""
    confidence_NCG = grid.means(maps_NCHW)
    share_NCG = _shares(F.pad(confidence_NCG, (0, 1), value=1.0) ** alpha)
    drawn = _halves(share_NCG, 1 - share_NCG, chances_NCX, count)
    there_NCK = drawn.places_NCK < confidence_NCG.shape[2]
    return Drawn(drawn.places_NCK.clamp_max(confidence_NCG.shape[2] - 1), drawn.positive_NCK & there_NCK,
                 drawn.negative_NCK & there_NCK)


def top(maps_NCHW: Tensor, grid: Grid, chances_NCX: Tensor, count: int, best: int) -> Drawn:
    """Of the class anywhere among the places of most confidence; others anywhere else."""
    confidence_NCG = grid.means(maps_NCHW)
    best_NCG = torch.zeros_like(confidence_NCG).scatter_(2, confidence_NCG.topk(best, dim=2).indices, 1.0)
    return _halves(best_NCG, 1 - best_NCG, chances_NCX, count)


SAMPLERS = "entropy", "uniform", "probabilistic", "sentinel", "top"


def chances(sampler: str, places: int, count: int) -> int:
    """How many random numbers a sampler takes of a tile and class."""
    return count + places if sampler == "entropy" else 2 * count


def _places(weights_NCG: Tensor, chance_NCK: Tensor) -> Tensor:
    """Places drawn with replacement, each as often as its weight says."""
    edges_NCG = weights_NCG.cumsum(dim=2)
    found_NCK = torch.searchsorted(edges_NCG, chance_NCK * edges_NCG[..., -1:], right=True)
    return found_NCK.clamp_max(weights_NCG.shape[2] - 1)


def _halves(of_class_NCG: Tensor, others_NCG: Tensor, chances_NCX: Tensor, count: int) -> Drawn:
    places_NCK = torch.cat([_places(of_class_NCG, chances_NCX[..., :count]),
                            _places(others_NCG, chances_NCX[..., count:2 * count])], dim=2)
    positive_NCK = (torch.arange(2 * count, device=places_NCK.device) < count).expand_as(places_NCK)
    return Drawn(places_NCK, positive_NCK, ~positive_NCK)


def _shares(weights_NCG: Tensor) -> Tensor:
    return weights_NCG / weights_NCG.sum(dim=2, keepdim=True).clamp_min(FLOOR)


# --- how alike: patches with colours (A, 3, P, P) and (M, 3, P, P) -> (A, M), more is more alike

def squares(anchors: Tensor, others: Tensor) -> Tensor:
    """Minus the mean squared difference of pixels."""
    one_AD, other_MD = anchors.flatten(1), others.flatten(1)
    return -torch.cdist(one_AD, other_MD, compute_mode="donot_use_mm_for_euclid_dist").square() / one_AD.shape[1]


def cross_entropy(anchors: Tensor, others: Tensor) -> Tensor:
    """Minus the mean cross-entropy of pixels, each value a chance, in bits."""
    one_AD, other_MD = anchors.flatten(1), others.flatten(1)
    logs_MD, others_MD = other_MD.clamp_min(TINY).log2(), (1 - other_MD).clamp_min(TINY).log2()
    return (one_AD @ logs_MD.T + (1 - one_AD) @ others_MD.T) / one_AD.shape[1]


def cosine(anchors_AD: Tensor, others_MD: Tensor) -> Tensor:
    """Of features."""
    return F.normalize(anchors_AD, dim=1) @ F.normalize(others_MD, dim=1).T


def information(anchors: Tensor, others: Tensor) -> Tensor:
    """Mutual information of grey levels, pixel by pixel, in bits; a pixel counts for all levels, near ones most."""
    levels_L = torch.linspace(0, 1, LEVELS, device=anchors.device, dtype=anchors.dtype)
    one_ADL, other_MDL = (torch.exp(-0.5 * ((grey(each)[..., None] - levels_L) / BANDWIDTH).square())
                          for each in (anchors, others))
    both_AMLL = torch.einsum("adl,mdk->amlk", one_ADL, other_MDL)
    both_AMLL = both_AMLL / both_AMLL.sum(dim=(2, 3), keepdim=True)
    apart_AMLL = both_AMLL.sum(dim=3, keepdim=True) * both_AMLL.sum(dim=2, keepdim=True)
    return (both_AMLL * (both_AMLL.log2() - apart_AMLL.log2())).sum(dim=(2, 3))


def divergence(anchors: Tensor, others: Tensor) -> Tensor:
    """Minus the Kullback-Leibler divergence of grey levels from an anchor's, pixel by pixel, on average; of numbers
    that do not sum to one: q ln(q/p) - q + p, which is nothing for equals alone."""
    one_AD, other_MD = grey(anchors), grey(others)
    own_M = (other_MD * other_MD.clamp_min(TINY).log() - other_MD).mean(dim=1)
    between_AM = one_AD.clamp_min(TINY).log() @ other_MD.T / one_AD.shape[1]
    return between_AM - own_M - one_AD.mean(dim=1, keepdim=True)


# By the name of each in a recipe; `features` are what a small network makes of patches.
SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squares": squares, "cross_entropy": cross_entropy, "features": cosine, "information": information,
    "divergence": divergence}


# --- what it costs, and how far apart

def anchors(positive_M: Tensor, chances_A: Tensor) -> Tensor:
    """Which patches all are held against: of the class, drawn with replacement; none where there are none."""
    there = positive_M.nonzero()[:, 0]
    return there[(chances_A * len(there)).long()] if len(there) else there


def contrast(own_AM: Tensor, positive_M: Tensor, other_AX: Tensor) -> Tensor:
    """Of every anchor and patch of its class the logarithm of how unlike they are, beside all others together:
    -log(exp(s_aj) / sum_k exp(s_ak)), summed. A patch's own likeness is not in the sum below, so this may be negative,
    and its level depends on how many patches there are: it is no measure of progress."""
    return (torch.logsumexp(other_AX, dim=1)[:, None] - own_AM[:, positive_M]).sum()
