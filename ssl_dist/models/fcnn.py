"""Networks of patch-contrastive segmentation (Boserup & Selvan): how sure of every pixel, and features of a patch.

B pictures   H, W pixels   C classes
"""

import torch
from torch import Tensor, nn

from ssl_dist.models import stains

DILATIONS = 1, 2, 3, 5, 10, 20
LIFT = 0.05             # what black is lifted to: a pixel without confidence, which is 0, is no colour of tissue
GLASS = 0.9             # of light: what lets through more of every colour is no tissue
FLAT = 0.02             # of light: colours that spread less than this are taken to spread so much
SPREAD = 0.4            # of stains' amounts, about: what they are divided by
SEES = "light", "colours", "stains"
PATCH = 50              # pixels, of which the featuriser's layers leave 9 x 9


class Confidence(nn.Module):
    """A map of every pixel for each class, as large as the picture; 7,345 weights for one class.

    Only `reach` pixels to each side decide a pixel, so a slide can be looked at in pieces. What it sees: the `light`;
    `colours`, by the picture's own mean and deviation, for stains differ; or the `stains`, how much more of each there
    is than on the whole picture. Of a piece, the picture's are told.
    """

    def __init__(self, classes: int = 1, width: int = 8, dilations: tuple[int, ...] = DILATIONS, sees: str = "light"):
        super().__init__()
        if sees not in SEES:
            raise ValueError(f"sees={sees!r} is not one of {', '.join(SEES)}")
        dilations = tuple(dilations) if isinstance(dilations, list | tuple) else (dilations,)
        if odd := [each for each in (classes, width, *dilations) if not isinstance(each, int) or each < 1]:
            raise ValueError(f"classes={classes}, width={width} and dilations={[*dilations]} are whole numbers from 1 "
                             f"on, and {odd[0]!r} is none")
        self.classes, self.reach, self.sees = classes, 1 + 2 * sum(dilations), sees
        self.stem = _layer(3, width, 1)
        self.blocks = nn.ModuleList(nn.Sequential(_layer(width, width, each), _layer(width, width, each))
                                    for each in dilations)
        self.last = nn.Conv2d(width, classes, 1)

    def forward(self, light_B3HW: Tensor, colours_B33: Tensor | None = None) -> Tensor:
        """Colours from 0 to 1 -> (B, C, H, W), from 0 to 1; `colours_B33`: of the whole that these are pieces of."""
        if self.sees == "light":
            shown_B3HW = lifted(light_B3HW)
        else:
            mean_B3, spread_B3, density_B3 = (each[..., None, None] for each in (
                colours(light_B3HW) if colours_B33 is None else colours_B33).unbind(1))
            shown_B3HW = (light_B3HW - mean_B3) / spread_B3 if self.sees == "colours" else \
                stains.amounts(stains.density(light_B3HW) - density_B3) / SPREAD
        found = self.stem(shown_B3HW)
        for block in self.blocks:
            found = found + block(found)
        return self.last(found).sigmoid()


class Featuriser(nn.Module):
    """A patch of 50 pixels as 32 numbers, for similarity by cosine; 3,530 weights."""

    def __init__(self, width: int = 8, features: int = 32):
        super().__init__()
        side = _left(_left(PATCH - 2))
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ELU(),
            nn.Conv2d(width, width, 3, stride=2, dilation=2, bias=False), nn.BatchNorm2d(width), nn.ELU(),
            nn.Conv2d(width, 1, 3, stride=2, dilation=2, bias=False), nn.BatchNorm2d(1), nn.ELU(),
            nn.Flatten(), nn.Linear(side**2, features))

    def forward(self, patches_B3PP: Tensor) -> Tensor:
        """(B, 3, 50, 50) -> (B, 32)."""
        return self.layers(patches_B3PP)


def colours(light_B3HW: Tensor) -> Tensor:
    """The mean and the deviation of each colour's light, and the mean of its density (B, 3, 3), of what is no glass; of
    glass alone, its own."""
    return told_by(sums(light_B3HW))


def sums(light_B3HW: Tensor) -> Tensor:
    """What can be added up over pieces (B, 2, 4, 3): count, light, its square and density of pixels that are no glass,
    and of all."""
    wide = light_B3HW.double()
    found = []
    for there_B1HW in ((wide < GLASS).any(dim=1, keepdim=True).double(), torch.ones_like(wide[:, :1])):
        found.append(torch.stack([(there_B1HW * each).sum(dim=(2, 3)).expand(-1, 3) for each in (
            torch.ones_like(wide), wide, wide * wide, stains.density(wide))], dim=1))
    return torch.stack(found, dim=1)


def told_by(sums_B243: Tensor) -> Tensor:
    """Means and deviations (B, 3, 3) from sums."""
    tissue_B43, all_B43 = sums_B243.unbind(1)
    count_B3, sum_B3, square_B3, density_B3 = torch.where(tissue_B43[:, :1] > 0, tissue_B43, all_B43).unbind(1)
    mean_B3 = sum_B3 / count_B3
    return torch.stack([mean_B3, (square_B3 / count_B3 - mean_B3.square()).clamp_min(FLAT**2).sqrt(),
                        density_B3 / count_B3], dim=1).float()


def lifted(colours: Tensor) -> Tensor:
    """Colours from 0 to 1 as the method sees them, none of them 0."""
    return colours * (1 - LIFT) + LIFT


def _layer(before: int, after: int, dilation: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=dilation, dilation=dilation, bias=False),
                         nn.BatchNorm2d(after), nn.ELU())


def _left(side: int) -> int:
    """Pixels that a layer of the featuriser leaves of a side: 3 wide, every other one, in steps of two."""
    return (side - 5) // 2 + 1
