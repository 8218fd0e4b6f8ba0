"""HoVer-Net (Graham et al. 2019): which pixels are of a nucleus, how far each is from its nucleus' middle, and what
kind the nucleus is; a decoder each, over the maps of any encoder, and the losses that they learn by.

Marked "code" is what vqdang/hover_net has. On a ResNet-50 that looks closely, with width 64 and kernel 5, the decoders
are its own; they pad where its shrink, so that sizes are the encoder's affair, and what lies within a margin of the
rim, which padding has touched, is neither learnt from nor kept.

B windows   C types and background   H, W pixels   K channels
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_dist.models.encoder import Encoder

BOTTOM = 16             # code: 1,024 channels of the coarsest map, and 64 of the finest
GROUPS = 4              # code
GRADIENT = 5            # code: pixels a side of the kernel by which maps of distances are compared
SMOOTH = 1e-3           # code: of Dice


class Maps(NamedTuple):
    """What a network says of every pixel."""

    nuclear_B2HW: Tensor            # logits: none, nucleus
    apart_B2HW: Tensor              # from the nucleus' middle, -1 at its left (top) end, 1 at its right (bottom) end
    types_BCHW: Tensor | None       # logits: background, and each type


class Dense(nn.Module):
    """Each unit sees what all before it have made."""

    def __init__(self, channels: int, units: int, growth: int, kernel: int):
        super().__init__()
        self.units = nn.ModuleList()
        for number in range(units):
            inner = channels + number * growth
            self.units.append(nn.Sequential(
                nn.BatchNorm2d(inner), nn.ReLU(), nn.Conv2d(inner, 4 * growth, 1, bias=False),
                nn.BatchNorm2d(4 * growth), nn.ReLU(),
                nn.Conv2d(4 * growth, growth, kernel, padding=kernel // 2, groups=GROUPS, bias=False)))
        self.after = nn.Sequential(nn.BatchNorm2d(channels + units * growth), nn.ReLU())

    def forward(self, x_BKHW: Tensor) -> Tensor:
        for unit in self.units:
            x_BKHW = torch.cat([x_BKHW, unit(x_BKHW)], dim=1)
        return self.after(x_BKHW)


class Stage(nn.Module):
    """Twice as fine, what the encoder saw there added."""

    def __init__(self, channels: int, skip: int, step: int, width: int, kernel: int):
        super().__init__()
        # code: 256 channels and 8 units where a column is four pixels, 128 and 4 where it is two, 64 and none at last
        units, inner = {1: (0, width), 2: (4, 2 * width)}.get(step, (8, 4 * width))
        growth = width // 2
        self.width = inner + units * growth
        self.skip: nn.Module | None = None
        if skip:        # a ResNet-50 that looks closely has as many channels already, as in the code
            self.skip = nn.Identity() if skip == channels else nn.Conv2d(skip, channels, 1, bias=False)
        layers: list[nn.Module] = [nn.Conv2d(channels, inner, kernel, padding=kernel // 2, bias=False)]
        if units:
            layers += [Dense(inner, units, growth, kernel), nn.Conv2d(self.width, self.width, 1, bias=False)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x_BKHW: Tensor, seen_BKHW: Tensor | None, size: tuple[int, int]) -> Tensor:
        x_BKHW = F.interpolate(x_BKHW, size=size, mode="nearest")
        if self.skip is not None:
            x_BKHW = x_BKHW + self.skip(seen_BKHW)
        return self.layers(x_BKHW)


class Branch(nn.Module):
    """From the coarsest map to one answer a pixel."""

    def __init__(self, levels: list[tuple[int, int]], out: int, width: int, kernel: int):
        super().__init__()
        *finer, _ = levels
        channels = BOTTOM * width
        self.stages = nn.ModuleList()
        for skip, step in [*reversed(finer), *([] if finer[0][1] == 1 else [(0, 1)])]:
            self.stages.append(stage := Stage(channels, skip, step, width, kernel))
            channels = stage.width
        self.answer = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, out, 1))

    def forward(self, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
        x_BKHW = maps[-1]
        seen = [*reversed(maps[:-1]), None][:len(self.stages)]
        for stage, each in zip(self.stages, seen, strict=True):
            x_BKHW = stage(x_BKHW, each, size if each is None else tuple(each.shape[-2:]))
        return self.answer(x_BKHW)


class HoverNet(nn.Module):
    """An encoder, and a decoder for each question; `types` counts kinds of nuclei, 0: nobody asks."""

    def __init__(self, encoder: Encoder, types: int, width: int, kernel: int):
        super().__init__()
        self.encoder, self.kinds = encoder, types
        levels = encoder.levels()
        self.bottom = nn.Conv2d(levels[-1][0], BOTTOM * width, 1, bias=False)
        self.nuclear, self.apart = (Branch(levels, 2, width, kernel) for _ in range(2))
        self.types = Branch(levels, types + 1, width, kernel) if types else None
        for part in (self.bottom, self.nuclear, self.apart, self.types):
            for layer in part.modules() if part is not None else []:
                if isinstance(layer, nn.Conv2d):        # code
                    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pixels_BHW3: Tensor) -> Maps:
        size = tuple(pixels_BHW3.shape[1:3])
        *finer, coarsest = self.encoder.pyramid(pixels_BHW3)
        maps = [*finer, self.bottom(coarsest)]
        return Maps(self.nuclear(maps, size), self.apart(maps, size),
                    None if self.types is None else self.types(maps, size))


# --- losses

def losses(maps: Maps, nuclear_BHW: Tensor, apart_B2HW: Tensor, types_BHW: Tensor | None) -> dict[str, Tensor]:
    """The sum under "loss", and its parts, all of weight 1 (code)."""
    parts = {"nuclear": F.cross_entropy(maps.nuclear_B2HW, nuclear_BHW),
             "nuclear_dice": dice(maps.nuclear_B2HW, nuclear_BHW),
             "apart": F.mse_loss(maps.apart_B2HW, apart_B2HW),
             "apart_gradient": gradient_error(maps.apart_B2HW, apart_B2HW, nuclear_BHW)}
    if maps.types_BCHW is not None and types_BHW is not None:
        parts |= {"types": F.cross_entropy(maps.types_BCHW, types_BHW), "types_dice": dice(maps.types_BCHW, types_BHW)}
    return {"loss": torch.stack([*parts.values()]).sum(), **parts}


def dice(logits_BCHW: Tensor, truth_BHW: Tensor) -> Tensor:
    """One less the overlap of likelihood and truth, summed over classes; of all windows together (code)."""
    likely_BCHW = logits_BCHW.softmax(dim=1)
    truth_BCHW = F.one_hot(truth_BHW, logits_BCHW.shape[1]).permute(0, 3, 1, 2).to(likely_BCHW.dtype)
    both_C, sum_C = ((each.sum(dim=(0, 2, 3))) for each in (likely_BCHW * truth_BCHW, likely_BCHW + truth_BCHW))
    return (1 - (2 * both_C + SMOOTH) / (sum_C + SMOOTH)).sum()


def gradient_error(apart_B2HW: Tensor, truth_B2HW: Tensor, nuclear_BHW: Tensor) -> Tensor:
    """How far the slopes are off, inside nuclei alone: of the horizontal map along rows, of the vertical along columns.

    The code's kernel is built by torch.meshgrid, whose rows come first, so it slopes the horizontal map vertically and
    the other horizontally, where a nucleus' map is flat; the paper's equation, and this, do it the other way round.
    """
    place = torch.arange(GRADIENT, dtype=apart_B2HW.dtype, device=apart_B2HW.device) - GRADIENT // 2
    down_KK, across_KK = torch.meshgrid(place, place, indexing="ij")
    square_KK = (down_KK ** 2 + across_KK ** 2).clamp_min(1e-15)
    kernel_21KK = torch.stack([across_KK / square_KK, down_KK / square_KK])[:, None]
    slope_B2HW = F.conv2d(apart_B2HW - truth_B2HW, kernel_21KK, padding=GRADIENT // 2, groups=2)
    inside_B1HW = nuclear_BHW[:, None].to(slope_B2HW.dtype)
    return (inside_B1HW * slope_B2HW ** 2).sum() / (2 * inside_B1HW.sum()).clamp_min(1)
