"""Losses as pure functions. Every rank passes its slice and receives the loss of the whole batch.

B samples of one rank   N of all ranks   D width
The gradients of all ranks, averaged, are those of one process on the whole batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_dist import dist


def nt_xent(a_BD: Tensor, b_BD: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss (Chen et al. 2020): among all 2N - 1 other views, find the one of the same tile."""
    with torch.autocast(a_BD.device.type, enabled=False):       # e^(1/0.05) leaves nothing of half precision
        a_ND = dist.gather_with_gradient(F.normalize(a_BD.float(), dim=1))
        b_ND = dist.gather_with_gradient(F.normalize(b_BD.float(), dim=1))
        both = torch.cat([a_ND, b_ND])
        scores = both @ both.T / temperature
        scores.fill_diagonal_(float("-inf"))                    # a view is not its own neighbour
        samples = len(a_ND)
        partner = torch.arange(2 * samples, device=both.device).roll(samples)
        return F.cross_entropy(scores, partner)
