"""Giga-SSL (Lazard et al. 2023): two views of a slide, a few tiles each, attract each other, and those of others repel.

Tiles are not seen here: a draw holds what an encoder made of them, through one augmentation (`ssl-dist draw`). Where
they lie is seen, by a sparse convolution, which begins as the last stage of a ResNet-18.

B slides of one rank   T tiles of a view   D width of a tile's vector
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_dist import dist
from ssl_dist.data.batch import Batch, SlideView
from ssl_dist.methods import base
from ssl_dist.methods.losses import nt_xent
from ssl_dist.models import encoder as encoders
from ssl_dist.models.heads import projector
from ssl_dist.models.sparse import SlideEncoder

VIEWS = 2


@dataclass(frozen=True)
class Config:
    view: SlideView = field(default_factory=SlideView, metadata={"help": "two of a slide are drawn like this"})
    temperature: float = field(default=0.05, metadata={"range": (1e-3, 10)})
    hidden: int = field(default=512, metadata={"range": (1, 10**5), "help": "of the projection's two inner layers"})
    width: int = field(default=256, metadata={"range": (1, 10**5), "help": "of the projection"})
    begin_as: str = field(default="", metadata={"help": "a ResNet-18 whose last stage the encoder begins as, a folder "
                                                "or timm:NAME; empty: at random"})


class Method(base.Method):
    """Slide encoder, three-layer projection, NT-Xent over all ranks."""

    INPUT = "bags"
    WHOLE = "negatives"
    encoder: SlideEncoder

    def __init__(self, config: Config, encoder: SlideEncoder):
        super().__init__()
        self.encoder, self.temperature, self._begin_as = encoder, config.temperature, config.begin_as
        # Theirs has ReLU before BatchNorm (read in their code); here it is the usual order.
        self.projector = projector([encoder.width, config.hidden, config.hidden, config.width], norm=True)
        self.views = (config.view,) * VIEWS

    @staticmethod
    def network(name: str, args: dict[str, Any], mean: tuple[float, ...], std: tuple[float, ...]) -> SlideEncoder:  # noqa: ARG004
        """`name`: a kind of slide encoder."""
        try:
            return SlideEncoder(kind=name, **args)
        except (TypeError, ValueError) as error:
            raise encoders.EncoderError(f"encoder.name={name!r} with encoder.args={args} makes no encoder of slides "
                                        f"({error}); use sparse or mlp, with args={{tiles: 256, width: 512}}") from None

    def objections(self, shards: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Draws that do not go together, that the encoder cannot take, or a beginning that does not fit."""
        found = []
        if len({(told.get("encoder_sha256"), told.get("stage")) for told in shards.values()}) > 1:
            found.append(f"{', '.join(shards)} are draws by different encoders of tiles, or of different stages of "
                         "one; draw them all alike")
        for home, told in shards.items():
            if (width := told.get("width")) != self.encoder.tiles:
                found.append(f"{home} holds vectors of {width} numbers, and the encoder takes {self.encoder.tiles}; "
                             f"use encoder.args.tiles={width}")
        if self._begin_as and self.encoder.kind != "sparse":
            found.append(f"method.begin_as={self._begin_as} is for encoder.name=sparse, which begins as layer4 of a "
                         f"ResNet-18; {self.encoder.kind} begins at random")
        elif self._begin_as:
            try:
                SlideEncoder(**self.encoder.args).begin_as(encoders.load(self._begin_as).network.state_dict())
            except ValueError as error:
                found.append(f"method.begin_as: {error}")
        return found

    def begin(self) -> None:
        """The encoder as the last stage of a ResNet-18, if one is named."""
        if self._begin_as:
            self.encoder.begin_as(encoders.load(self._begin_as).network.state_dict())

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:      # noqa: ARG002
        """The loss, and how close the two views of a slide are (1 is the same direction)."""
        # One pass over both views: BatchNorm then sees them as one batch.
        features_MTD, cell_MT2 = (torch.cat(batch.views[place::2]) for place in range(2))
        a_BD, b_BD = self.projector(self.encoder.of_views(features_MTD, cell_MT2)).chunk(2)
        self.chance = math.log(2 * len(a_BD) * dist.world() - 1)
        with torch.no_grad():
            closeness = F.cosine_similarity(a_BD.float(), b_BD.float()).mean()
        return {"loss": nt_xent(a_BD, b_BD, self.temperature), "positive_similarity": closeness, **base.spread(a_BD)}
