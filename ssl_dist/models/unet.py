"""A U-Net's decoder (Ronneberger et al. 2015) over the maps of any encoder: one answer a pixel.

B windows   C classes   H, W pixels   K channels
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_dist.models.encoder import Encoder

WIDEST = 8              # times the finest map's width, at most


class Stage(nn.Module):
    """Twice as fine, beside what the encoder saw there, and two convolutions over both."""

    def __init__(self, channels: int, skip: int, out: int):
        super().__init__()
        layers: list[nn.Module] = []
        for inner in (channels + skip, out):
            layers += [nn.Conv2d(inner, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x_BKHW: Tensor, seen_BKHW: Tensor | None, size: tuple[int, int]) -> Tensor:
        x_BKHW = F.interpolate(x_BKHW, size=size, mode="bilinear")
        return self.layers(x_BKHW if seen_BKHW is None else torch.cat([x_BKHW, seen_BKHW], dim=1))


class UNet(nn.Module):
    """An encoder, and a decoder that answers which class each pixel is of: logits (B, C, H, W)."""

    def __init__(self, encoder: Encoder, classes: int, width: int):
        super().__init__()
        self.encoder = encoder
        *finer, (channels, _) = encoder.levels()
        self.stages = nn.ModuleList()
        for skip, step in [*reversed(finer), *([] if finer[0][1] == 1 else [(0, 1)])]:
            out = width * min(step, WIDEST)
            self.stages.append(Stage(channels, skip, out))
            channels = out
        self.answer = nn.Conv2d(channels, classes, 1)

    def forward(self, pixels_BHW3: Tensor) -> Tensor:
        *finer, x_BKHW = self.encoder.pyramid(pixels_BHW3)
        seen = [*reversed(finer), None][:len(self.stages)]
        for stage, each in zip(self.stages, seen, strict=True):
            size = tuple(pixels_BHW3.shape[1:3]) if each is None else tuple(each.shape[-2:])
            x_BKHW = stage(x_BKHW, each, size)
        return self.answer(x_BKHW)
