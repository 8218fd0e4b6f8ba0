"""Small networks on top of an encoder.

B samples   D width   K classes or prototypes
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def projector(widths: list[int], *, norm: bool, bias: bool | None = None) -> nn.Sequential:
    """Linear layers of the given widths with ReLU (and BatchNorm, where `norm`) between them.

    A bias before a BatchNorm is lost in it; `bias` says whether any layer has one, where a paper does otherwise.
    """
    inner, last = (not norm, True) if bias is None else (bias, bias)
    layers: list[nn.Module] = []
    for before, after in zip(widths[:-2], widths[1:-1], strict=True):
        layers += [nn.Linear(before, after, bias=inner)]
        layers += [nn.BatchNorm1d(after)] if norm else []
        layers += [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias=last))


class Prototypes(nn.Module):
    """Directions of unit length; the scores of a sample of unit length are its cosines with them."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(count, width), dim=1))

    def forward(self, samples_BD: Tensor) -> Tensor:
        """Scores (B, K)."""
        return F.linear(samples_BD, self.weight)

    @torch.no_grad()
    def normalise(self) -> None:
        """Back to unit length, after a step that moved them."""
        self.weight.copy_(F.normalize(self.weight, dim=1))


class DinoHead(nn.Module):
    """DINO's head: three layers with GELU, a narrow unit vector, and classes that are directions themselves."""

    def __init__(self, width: int, hidden: int, narrow: int, classes: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                                    nn.Linear(hidden, narrow))
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last = nn.Parameter(torch.empty(classes, narrow))
        nn.init.kaiming_uniform_(self.last, a=5**0.5)       # as nn.Linear begins

    def forward(self, features_BD: Tensor) -> Tensor:
        """Scores (B, K): cosines."""
        return F.linear(F.normalize(self.layers(features_BD), dim=1), F.normalize(self.last, dim=1))
