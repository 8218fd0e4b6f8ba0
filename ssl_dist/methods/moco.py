"""MoCo v2 (He et al. 2020, Chen et al. 2020), as Dehaene et al. (2020) used it on histology: a queue of old keys.

B tiles of one rank   D width of the projection   K keys in the queue
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_dist import dist
from ssl_dist.data import presets
from ssl_dist.data.batch import Batch, View, each
from ssl_dist.methods import base, losses
from ssl_dist.models.batchnorm import has_local
from ssl_dist.models.encoder import Encoder
from ssl_dist.models.heads import projector


@dataclass(frozen=True)
class Config:
    temperature: float = field(default=0.2, metadata={"range": (1e-3, 10)})
    queue: int = field(default=65_536, metadata={"range": (1, 10**7), "help": "keys of earlier steps"})
    momentum: float = field(default=0.999, metadata={"range": (0, 1), "help": "of the encoder of keys"})
    hidden: int | None = field(default=None, metadata={"range": (1, 10**5), "help": "null: as wide as the encoder"})
    width: int = field(default=128, metadata={"range": (2, 10**5), "help": "of the projection"})
    views: tuple[View, ...] = presets.asked("moco_v2")

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        return base.pair(self.views, "MoCo")


class Method(base.Method):
    """An encoder of queries that learns, and one of keys that follows it."""

    def __init__(self, config: Config, encoder: Encoder):
        super().__init__()
        self.encoder, self.config = encoder, config
        self.projector = projector([encoder.width, config.hidden or encoder.width, config.width], norm=False)
        self.keys = base.teacher(nn.Sequential(self.encoder, self.projector))
        self.queue = base.Queue(config.queue, config.width)
        self.views = each(config.views)

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:      # noqa: ARG002
        """The loss, and how close a query is to its key (1 is the same direction)."""
        query_BD = self.projector(self.encoder(batch.views[0]))
        with torch.no_grad():
            key_BD = F.normalize(losses.wide(self._keys(batch)), dim=1)
        queue_KD = self.queue.filled()
        self.chance = math.log(1 + len(queue_KD))
        loss = losses.info_nce(query_BD, key_BD, queue_KD, self.config.temperature)
        self.queue.take(key_BD)
        with torch.no_grad():
            closeness = F.cosine_similarity(losses.wide(query_BD), key_BD).mean()
        return {"loss": loss, "positive_similarity": closeness, **base.spread(query_BD)}

    def _keys(self, batch: Batch) -> Tensor:
        """Keys of the second views. Where every rank has a BatchNorm of its own, ranks exchange tiles first: else a
        query would know its key by the statistics they share (He et al. 2020, shuffling BN)."""
        if dist.world() == 1 or not has_local(self.keys):
            return self.keys(batch.views[1])
        share, rank = len(batch.views[1]), dist.rank()
        all_N = dist.gather_with_gradient(batch.views[1])
        # By the place of rank 0's tiles: the same on every rank, and when the step is done again after a restart.
        first = dist.gather_with_gradient(torch.as_tensor(batch.positions[:1], device=all_N.device))[0]
        order = torch.randperm(len(all_N), generator=torch.Generator().manual_seed(int(first))).to(all_N.device)
        shuffled = self.keys(all_N[order[rank * share:(rank + 1) * share]])
        back = order.argsort()[rank * share:(rank + 1) * share]
        return dist.gather_with_gradient(shuffled)[back]

    def after_step(self, progress: float) -> None:      # noqa: ARG002
        """The keys' encoder follows, and the new keys take the places of the oldest."""
        base.follow(self.keys, nn.Sequential(self.encoder, self.projector), self.config.momentum)
        self.queue.push()
