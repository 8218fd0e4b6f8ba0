"""Barlow Twins (Zbontar et al. 2021): two views of a tile give the same features, and no feature repeats another.

B tiles of one rank   D width of the projection
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ssl_dist.data import presets
from ssl_dist.data.batch import Batch, View, each
from ssl_dist.methods import base, losses
from ssl_dist.models.encoder import Encoder
from ssl_dist.models.heads import projector


@dataclass(frozen=True)
class Config:
    hidden: int = field(default=8192, metadata={"range": (1, 10**5), "help": "of the projection's two inner layers"})
    width: int = field(default=8192, metadata={"range": (2, 10**5), "help": "of the projection"})
    off_diagonal: float = field(default=0.0051, metadata={"range": (0, 1), "help": "weight of what must not agree"})
    scale: float = field(default=0.024, metadata={"range": (1e-6, 1e3), "help": "of the loss"})
    views: tuple[View, ...] = presets.asked("barlow")

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        return base.pair(self.views, "Barlow Twins")


class Method(base.Method):
    """Encoder, three-layer projection with BatchNorm, cross-correlation over all ranks."""

    WHOLE = "correlations"

    def __init__(self, config: Config, encoder: Encoder):
        super().__init__()
        self.encoder, self.config = encoder, config
        self.projector = projector([encoder.width, config.hidden, config.hidden, config.width], norm=True, bias=False)
        self.views = each(config.views)

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:      # noqa: ARG002
        """The loss, and how much the features of the two views agree (1: each is the same in both)."""
        # One view at a time, as the authors do: BatchNorm then sees each kind of view by itself.
        a_BD, b_BD = (self.projector(self.encoder(view)) for view in batch.views)
        loss = losses.barlow(a_BD, b_BD, self.config.off_diagonal, self.config.scale)
        return {"loss": loss, **base.spread(torch.cat([a_BD, b_BD]))}
