"""VICReg (Bardes et al. 2022): two views of a tile are alike, every feature varies, and no feature repeats another.

Chosen for histology because it has no negatives (neighbouring tiles of a slide are the same tissue, and a contrastive
loss would push them apart), no teacher and no queue to tune, and because each way to collapse is a term of the loss
that is logged: `variance` rises when tiles become one point, `covariance` when features become one.

B tiles of one rank   N of all ranks   D width of the projection
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_dist import dist
from ssl_dist.data import presets
from ssl_dist.data.batch import Batch, View, each
from ssl_dist.methods import base
from ssl_dist.methods.losses import wide
from ssl_dist.models.encoder import Encoder
from ssl_dist.models.heads import projector


@dataclass(frozen=True)
class Config:
    hidden: int = field(default=8192, metadata={"range": (1, 10**5), "help": "of the projection's two inner layers"})
    width: int = field(default=8192, metadata={"range": (2, 10**5), "help": "of the projection"})
    invariance: float = field(default=25.0, metadata={"range": (0, 1e4), "help": "weight of views being alike"})
    variance: float = field(default=25.0, metadata={"range": (0, 1e4), "help": "weight of every feature varying"})
    covariance: float = field(default=1.0, metadata={"range": (0, 1e4), "help": "weight of features being different"})
    views: tuple[View, ...] = presets.asked("barlow")

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        return base.pair(self.views, "VICReg")


class Method(base.Method):
    """Encoder, three-layer projection with BatchNorm, and the statistics of its output over all ranks."""

    WHOLE = "variances and covariances"

    def __init__(self, config: Config, encoder: Encoder):
        super().__init__()
        self.encoder, self.config = encoder, config
        self.projector = projector([encoder.width, config.hidden, config.hidden, config.width], norm=True, bias=False)
        self.views = each(config.views)

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:      # noqa: ARG002
        """The loss and its three terms before they are weighted."""
        # One view at a time, as the authors do: BatchNorm then sees each kind of view by itself.
        a_BD, b_BD = (self.projector(self.encoder(view)) for view in batch.views)
        terms = vicreg(a_BD, b_BD)
        loss = sum(getattr(self.config, name) * term for name, term in terms.items())
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()},
                **base.spread(torch.cat([a_BD, b_BD]))}


def vicreg(a_BD: Tensor, b_BD: Tensor) -> dict[str, Tensor]:
    """The three terms of the whole batch, on every rank; their gradients averaged over ranks are those of one process.

    As in the authors' code, the variance is the mean of the two views', and the covariance their sum.
    """
    with torch.autocast(a_BD.device.type, enabled=False):
        views = [wide(a_BD), wide(b_BD)]
        samples, width = len(a_BD) * dist.world(), a_BD.shape[1]
        # What follows a sum is the same on every rank, and so is its gradient: no rank has to ask the others for it.
        apart = dist.sum_with_gradient((views[0] - views[1]).square().sum(), same=True)
        spreads, repeats = [], []
        for view_BD in views:
            # The mean needs no gradient: what is summed below does not change with it, for it is at its least there.
            centred_BD = view_BD - dist.average(view_BD.detach().mean(dim=0))
            covariance_DD = dist.sum_with_gradient(centred_BD.T @ centred_BD, same=True) / (samples - 1)
            variance_D = covariance_DD.diagonal()
            spreads.append(F.relu(1 - torch.sqrt(variance_D + 1e-4)).mean())
            repeats.append((covariance_DD.square().sum() - variance_D.square().sum()) / width)
        return {"invariance": apart / (samples * width), "variance": torch.stack(spreads).mean(),
                "covariance": torch.stack(repeats).sum()}
