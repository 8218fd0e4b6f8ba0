"""SwAV (Caron et al. 2020): views of a tile foresee each other's place among prototypes that share all tiles evenly.

B tiles of one rank   D width of the projection   K prototypes   V views, the first L of them large
"""

import math
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_dist import dist
from ssl_dist.data import presets
from ssl_dist.data.batch import Batch, View, each
from ssl_dist.methods import base, losses
from ssl_dist.models.encoder import Encoder
from ssl_dist.models.heads import Prototypes, projector


@dataclass(frozen=True)
class Config:
    temperature: float = field(default=0.1, metadata={"range": (1e-3, 10)})
    epsilon: float = field(default=0.05, metadata={"range": (1e-4, 10), "help": "how soft the assignments are"})
    iterations: int = field(default=3, metadata={"range": (1, 100), "help": "of Sinkhorn and Knopp"})
    prototypes: int = field(default=3000, metadata={"range": (2, 10**6)})
    frozen: float = field(default=0.0, metadata={"range": (0, 1), "help": "part of the run in which they stay"})
    queue: int = field(default=0, metadata={"range": (0, 10**7), "help": "earlier tiles that are assigned as well, "
                                            "for batches with fewer tiles than prototypes"})
    queue_from: float = field(default=0.0, metadata={"range": (0, 1), "help": "part of the run before the queue"})
    hidden: int = field(default=2048, metadata={"range": (1, 10**5), "help": "of the projection"})
    width: int = field(default=128, metadata={"range": (2, 10**5), "help": "of the projection"})
    views: tuple[View, ...] = presets.asked("swav")

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        return base.large_first(self.views, "SwAV")


class Method(base.Method):
    """Encoder, projection with BatchNorm, prototypes; a queue of embeddings for each large view."""

    WHOLE = "assignments"

    def __init__(self, config: Config, encoder: Encoder):
        super().__init__()
        self.encoder, self.config = encoder, config
        self.projector = projector([encoder.width, config.hidden, config.width], norm=True, bias=True)
        self.prototypes = Prototypes(config.width, config.prototypes)
        self.views = each(config.views)
        self.large, self.chance = base.large(self.views), math.log(config.prototypes)
        self.queues = nn.ModuleList(base.Queue(config.queue, config.width) for _ in range(self.large)
                                    if config.queue)

    def resting(self) -> list[nn.Parameter]:
        """The prototypes, at the start."""
        return [self.prototypes.weight] if self.config.frozen else []

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """The loss, and of the prototypes that could be some tile's first choice, how many are."""
        base.freeze(self.prototypes.weight, progress < self.config.frozen)
        embedded = F.normalize(self.projector(base.by_size(self.encoder, batch.views)), dim=1)
        scores = self.prototypes(embedded).chunk(len(batch.views))
        embeddings = embedded.detach().chunk(len(batch.views))
        assignments = []
        for number in range(self.large):
            earlier_QD = self._earlier(number, progress)
            with torch.no_grad():
                both = torch.cat([self.prototypes(earlier_QD), scores[number]])
            assigned = losses.sinkhorn(both, self.config.epsilon, self.config.iterations)
            assignments.append(assigned[len(earlier_QD):])
            if self.config.queue:
                self._queues()[number].take(embeddings[number])
        chosen_N = dist.gather_with_gradient(assignments[0].argmax(dim=1))
        used = chosen_N.unique().numel() / min(len(chosen_N), self.config.prototypes)
        return {"loss": losses.swav(scores, assignments, self.config.temperature),
                "prototypes_used": torch.tensor(used, device=embedded.device),
                **base.spread(embeddings[0])}

    def _earlier(self, number: int, progress: float) -> Tensor:
        """This rank's share of the queue of one large view."""
        if not self.config.queue or progress < self.config.queue_from:
            return self.prototypes.weight.new_empty(0, self.config.width)
        return self._queues()[number].filled().tensor_split(dist.world())[dist.rank()]

    def _queues(self) -> list[base.Queue]:
        return cast(list[base.Queue], list(self.queues))

    def after_step(self, progress: float) -> None:
        """Prototypes return to unit length, and the new embeddings take the places of the oldest."""
        if progress >= self.config.frozen:      # to do it again would move them by a rounding
            self.prototypes.normalise()
        for queue in self._queues():
            queue.push()
