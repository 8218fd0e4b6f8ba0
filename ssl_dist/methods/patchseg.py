"""Patch-contrastive segmentation (Boserup & Selvan 2022): a map of confidence, by patches that it holds to be alike.

A patch is seen as far as the map is confident of it: the picture times the map. Patches are drawn where the map is
sure, each by its mean confidence as one of the class or as one that is not. Those of the class are to be like each
other and unlike the others; and, of several classes, unlike each other's.

B tiles of one rank   N of all   H, W pixels   C classes   G places of patches in a tile   K patches drawn of a tile
P pixels of a patch's side   M patches of all tiles   A of them that all are held against
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ssl_dist import dist
from ssl_dist.data import presets
from ssl_dist.data.batch import Batch, View, each
from ssl_dist.methods import base, patches
from ssl_dist.methods.losses import wide
from ssl_dist.models.encoder import Encoder
from ssl_dist.models.fcnn import PATCH, Featuriser
from ssl_dist.models.patches import SHOWN, Grid, histograms, separation, shown

SEEDS = 2**62           # so many there are


@dataclass(frozen=True)
class Config:
    patch: int = field(default=50, metadata={"range": (2, 2048), "help": "pixels of a patch's side"})
    stride: int = field(default=20, metadata={"range": (1, 2048), "help": "pixels from a patch to the next"})
    sampler: str = field(default="entropy", metadata={"choices": patches.SAMPLERS, "help": "where patches are drawn, "
                                                      "and which of them are of the class"})
    drawn: int = field(default=10, metadata={"range": (1, 10**4), "help": "patches a tile and class; by samplers other "
                                             "than entropy so many of the class, and so many others"})
    alpha: float = field(default=1.0, metadata={"range": (0.01, 100), "help": "of samplers probabilistic and sentinel: "
                                                "the power of confidence"})
    top: int = field(default=50, metadata={"range": (1, 10**6), "help": "of sampler top: places of the class"})
    similarity: str = field(default="squares", metadata={"choices": tuple(patches.SIMILARITIES)})
    temperature: float = field(default=1.0, metadata={"range": (1e-4, 100), "help": "what similarities are divided by"})
    shown: str = field(default="light", metadata={"choices": SHOWN, "help": "of patches: their light; ink, what they "
                                                  "take of it, so that where the map is not confident there is glass, "
                                                  "and not black; or what their haematoxylin takes"})
    anchors: int = field(default=10, metadata={"range": (1, 10**4), "help": "patches of the class that all are held "
                                                                            "against"})
    apart: float = field(default=1.0, metadata={"range": (0, 1000), "help": "weight of several classes being unlike "
                                                                            "each other"})
    views: tuple[View, ...] = presets.asked("patchseg")

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        sizes = [view.size for view in each(self.views)]
        if len(sizes) != 1:
            return [f"views are {len(sizes)}, of {sizes} pixels; patchseg takes one"]
        if sizes[0] < self.patch:
            return [f"patch={self.patch} is larger than the view of {sizes[0]} pixels"]
        broken, places = [], self.grid.across(sizes[0]) ** 2
        if self.similarity == "features" and self.patch != PATCH:
            broken.append(f"patch={self.patch} and method.similarity=features do not go together: the network of "
                          f"features takes patches of {PATCH} pixels")
        if self.sampler == "top" and self.top >= places:
            broken.append(f"top={self.top} leaves none of the {places} places of a view for others; use less")
        return broken

    @property
    def grid(self) -> Grid:
        """Where patches may lie."""
        return Grid(self.patch, self.stride)


class Method(base.Method):
    """A network of confidence and, where patches are compared by features, one that makes them."""

    WHOLE = "patches"
    _seed: Tensor

    views: tuple[View, ...]

    def __init__(self, config: Config, encoder: Encoder):
        super().__init__()
        self.encoder, self.config, self.views, self.classes = encoder, config, each(config.views), encoder.classes()
        self.featuriser = Featuriser() if config.similarity == "features" else None
        # Of the run's seed, as the first weights are: with the step it decides what is drawn, on any number of ranks.
        self.register_buffer("_seed", torch.randint(SEEDS, ()), persistent=False)

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """The loss; and how different patches of a class are from others (`between`) and from each other (`within`)."""
        config, pixels_BHW3 = self.config, batch.views[0]
        maps_BCHW = self.encoder(pixels_BHW3)
        with torch.autocast(maps_BCHW.device.type, enabled=False):
            maps_BCHW = wide(maps_BCHW)
            chances_BCX, chances_CA = self._chances(progress, len(maps_BCHW), maps_BCHW)
            drawn = self._drawn(maps_BCHW.detach(), chances_BCX)
            shown_B3HW = shown(pixels_BHW3.permute(0, 3, 1, 2).to(maps_BCHW.dtype) / 255, config.shown)
            seen_BCK3PP = config.grid.seen(shown_B3HW, maps_BCHW, drawn.places_NCK)
            compared_BCKX = seen_BCK3PP if self.featuriser is None else torch.stack(
                [wide(self.featuriser(own.flatten(0, 1))).unflatten(0, own.shape[:2])
                 for own in seen_BCK3PP.unbind(1)], dim=1)
            levels_BCKL = histograms(seen_BCK3PP.detach().flatten(0, 2)).unflatten(0, seen_BCK3PP.shape[:3])
            return self._told(_of_all(compared_BCKX), _of_all(levels_BCKL), _of_all(drawn.positive_NCK),
                              _of_all(drawn.negative_NCK), chances_CA, len(maps_BCHW) * dist.world(), maps_BCHW)

    def _told(self, compared_CMX: Tensor, levels_CML: Tensor, positive_CM: Tensor, negative_CM: Tensor,
              chances_CA: Tensor, tiles: int, maps_BCHW: Tensor) -> dict[str, Tensor]:
        """What every rank says alike of the patches of all. A class that lacks patches of one kind teaches nothing for
        once, and all ranks know of it."""
        config, similar = self.config, patches.SIMILARITIES[self.config.similarity]
        loss, apart = maps_BCHW.sum() * 0, []
        for number, (own_MX, positive_M, negative_M) in enumerate(zip(compared_CMX, positive_CM, negative_CM,
                                                                      strict=True)):
            anchors_A = patches.anchors(positive_M, chances_CA[number])
            apart.append(separation(levels_CML[number], positive_M, negative_M, anchors_A))
            if not len(anchors_A) or not bool(negative_M.any()):
                continue
            own_AM = similar(own_MX[anchors_A], own_MX) / config.temperature
            share = config.anchors**2 * tiles
            loss = loss + patches.contrast(own_AM, positive_M, own_AM[:, negative_M]) / share
            others = [compared_CMX[other][positive_CM[other]] for other in range(self.classes) if other != number]
            if others and config.apart and len(others_MX := torch.cat(others)):
                other_AM = similar(own_MX[anchors_A], others_MX) / config.temperature
                loss = loss + config.apart * patches.contrast(own_AM, positive_M, other_AM) / share
        within_C, between_C = (torch.stack(each) for each in zip(*apart, strict=True))
        by_class = {f"separation_{number}": value for number, value in enumerate(between_C - within_C)} \
            if self.classes > 1 else {}
        return {"loss": loss, "separation": (between_C - within_C).mean(), "within": within_C.mean(),
                "between": between_C.mean(), **by_class,
                "positives": positive_CM.to(loss.dtype).mean(), "confidence": maps_BCHW.detach().mean()}

    def _chances(self, progress: float, share: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The random numbers of this rank's tiles, and of what all ranks do alike: a function of seed and step."""
        generator = torch.Generator().manual_seed(hash((int(self._seed), progress)))
        config = self.config
        count = patches.chances(config.sampler, config.grid.across(self.views[0].size) ** 2, config.drawn)
        all_NCX = torch.rand(share * dist.world(), self.classes, count, generator=generator, dtype=torch.float64)
        all_CA = torch.rand(self.classes, config.anchors, generator=generator, dtype=torch.float64)
        own_BCX = all_NCX[dist.rank() * share:(dist.rank() + 1) * share]
        return own_BCX.to(like.device, like.dtype), all_CA.to(like.device)

    def _drawn(self, maps_BCHW: Tensor, chances_BCX: Tensor) -> patches.Drawn:
        config = self.config
        given = maps_BCHW, config.grid, chances_BCX, config.drawn
        match config.sampler:
            case "entropy":
                return patches.by_entropy(*given)
            case "uniform":
                return patches.uniform(*given)
            case "probabilistic":
                return patches.probabilistic(*given, config.alpha)
            case "sentinel":
                return patches.sentinel(*given, config.alpha)
            case _:
                return patches.top(*given, config.top)


def _of_all(own_BCK: Tensor) -> Tensor:
    """What was drawn of all ranks' tiles, by class (C, M, ...)."""
    return dist.gather_with_gradient(own_BCK).transpose(0, 1).flatten(1, 2)
