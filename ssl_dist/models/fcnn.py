"""Networks of patch-contrastive segmentation (Boserup & Selvan): how sure of every pixel, and features of a patch.

B pictures   H, W pixels   C classes
"""

import torch
from torch import Tensor, nn

DILATIONS = 1, 2, 3, 5, 10, 20
LIFT = 0.05             # what black is lifted to: a pixel without confidence, which is 0, is no colour of tissue
GLASS = 0.9             # of light: what lets through more of every colour is no tissue
FLAT = 0.02             # of light: colours that spread less than this are taken to spread so much
PATCH = 50              # pixels, of which the featuriser's layers leave 9 x 9


class Confidence(nn.Module):
    """A map of every pixel for each class, as large as the picture; 7,345 weights for one class.

    Only `reach` pixels to each side decide a pixel, so a slide can be looked at in pieces. `own`: a picture's colours
    are taken by its own mean and deviation, for stains differ; of a piece they are told.
    """

    def __init__(self, classes: int = 1, width: int = 8, dilations: tuple[int, ...] = DILATIONS, own: bool = False):
        super().__init__()
        self.classes, self.reach, self.own = classes, 1 + 2 * sum(dilations), own
        self.stem = _layer(3, width, 1)
        self.blocks = nn.ModuleList(nn.Sequential(_layer(width, width, each), _layer(width, width, each))
                                    for each in dilations)
        self.last = nn.Conv2d(width, classes, 1)

    def forward(self, light_B3HW: Tensor, colours_B23: Tensor | None = None) -> Tensor:
        """Colours from 0 to 1 -> (B, C, H, W), from 0 to 1; `colours_B23`: of the whole that these are pieces of."""
        shown_B3HW = lifted(light_B3HW)
        if self.own:
            mean_B3, spread_B3 = (colours(light_B3HW) if colours_B23 is None else colours_B23).unbind(1)
            shown_B3HW = (light_B3HW - mean_B3[..., None, None]) / spread_B3[..., None, None]
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
    """The mean and the deviation of each colour (B, 2, 3) of what is no glass; of glass alone, its own."""
    return spread_of(sums(light_B3HW))


def sums(light_B3HW: Tensor) -> Tensor:
    """What can be added up over pieces (B, 2, 3, 3): count, sum and squares of pixels that are no glass, and of all."""
    wide = light_B3HW.double()
    found = []
    for there_B1HW in ((wide < GLASS).any(dim=1, keepdim=True).double(), torch.ones_like(wide[:, :1])):
        found.append(torch.stack([(there_B1HW * power).sum(dim=(2, 3)).expand(-1, 3)
                                  for power in (torch.ones_like(wide), wide, wide * wide)], dim=1))
    return torch.stack(found, dim=1)


def spread_of(sums_B233: Tensor) -> Tensor:
    """Mean and deviation (B, 2, 3) from sums."""
    tissue_B33, all_B33 = sums_B233.unbind(1)
    count_B3, sum_B3, square_B3 = torch.where(tissue_B33[:, :1] > 0, tissue_B33, all_B33).unbind(1)
    mean_B3 = sum_B3 / count_B3
    return torch.stack([mean_B3, (square_B3 / count_B3 - mean_B3.square()).clamp_min(FLAT**2).sqrt()], dim=1).float()


def lifted(colours: Tensor) -> Tensor:
    """Colours from 0 to 1 as the method sees them, none of them 0."""
    return colours * (1 - LIFT) + LIFT


def _layer(before: int, after: int, dilation: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=dilation, dilation=dilation, bias=False),
                         nn.BatchNorm2d(after), nn.ELU())


def _left(side: int) -> int:
    """Pixels that a layer of the featuriser leaves of a side: 3 wide, every other one, in steps of two."""
    return (side - 5) // 2 + 1
