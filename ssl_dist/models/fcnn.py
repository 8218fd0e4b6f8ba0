"""Networks of patch-contrastive segmentation (Boserup & Selvan): how sure of every pixel, and features of a patch.

B pictures   H, W pixels   C classes
"""

from torch import Tensor, nn

DILATIONS = 1, 2, 3, 5, 10, 20
LIFT = 0.05             # what black is lifted to: a pixel without confidence, which is 0, is no colour of tissue
PATCH = 50              # pixels, of which the featuriser's layers leave 9 x 9


class Confidence(nn.Module):
    """A map of every pixel for each class, as large as the picture; 7,345 weights for one class.

    Only `reach` pixels to each side decide a pixel, so a slide can be looked at in pieces.
    """

    def __init__(self, classes: int = 1, width: int = 8, dilations: tuple[int, ...] = DILATIONS):
        super().__init__()
        self.classes, self.reach = classes, 1 + 2 * sum(dilations)
        self.stem = _layer(3, width, 1)
        self.blocks = nn.ModuleList(nn.Sequential(_layer(width, width, each), _layer(width, width, each))
                                    for each in dilations)
        self.last = nn.Conv2d(width, classes, 1)

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        """Colours from 0 to 1 -> (B, C, H, W), from 0 to 1."""
        found = self.stem(lifted(pixels_B3HW))
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


def lifted(colours: Tensor) -> Tensor:
    """Colours from 0 to 1 as the method sees them, none of them 0."""
    return colours * (1 - LIFT) + LIFT


def _layer(before: int, after: int, dilation: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=dilation, dilation=dilation, bias=False),
                         nn.BatchNorm2d(after), nn.ELU())


def _left(side: int) -> int:
    """Pixels that a layer of the featuriser leaves of a side: 3 wide, every other one, in steps of two."""
    return (side - 5) // 2 + 1
