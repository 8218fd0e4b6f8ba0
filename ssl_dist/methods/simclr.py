"""SimCLR (Chen et al. 2020), as Ciga et al. (2022) used it on histology: two views of a tile attract each other.

B tiles of one rank   D width of the projection
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_dist import dist
from ssl_dist.data import presets
from ssl_dist.data.batch import Batch, View, each
from ssl_dist.methods import base
from ssl_dist.methods.losses import nt_xent
from ssl_dist.models.encoder import Encoder
from ssl_dist.models.heads import projector


@dataclass(frozen=True)
class Config:
    temperature: float = field(default=0.1, metadata={"range": (1e-3, 10)})
    hidden: int | None = field(default=None, metadata={"range": (1, 10**5), "help": "null: as wide as the encoder"})
    width: int = field(default=128, metadata={"range": (1, 10**5), "help": "of the projection"})
    norm: bool = field(default=False, metadata={"help": "BatchNorm inside the projection"})
    views: tuple[View, ...] = presets.asked("histology")

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        return base.pair(self.views, "SimCLR")


class Method(base.Method):
    """Encoder, two-layer projection, NT-Xent over all ranks."""

    WHOLE = "negatives"

    def __init__(self, config: Config, encoder: Encoder):
        super().__init__()
        self.encoder, self.temperature = encoder, config.temperature
        self.projector = projector([encoder.width, config.hidden or encoder.width, config.width], norm=config.norm)
        self.views = each(config.views)

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:      # noqa: ARG002
        """The loss, and how close the two views of a tile are (1 is the same direction)."""
        # One pass over both views: BatchNorm then sees them as one batch, and the GPU one large one.
        a_BD, b_BD = self.projector(self.encoder(torch.cat(batch.views))).chunk(2)
        self.chance = math.log(2 * len(a_BD) * dist.world() - 1)
        with torch.no_grad():
            closeness = F.cosine_similarity(a_BD.float(), b_BD.float()).mean()
        return {"loss": nt_xent(a_BD, b_BD, self.temperature), "positive_similarity": closeness, **base.spread(a_BD)}
