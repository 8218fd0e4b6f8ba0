"""How much of each stain lies on a pixel, by Ruifrok and Johnston's colours (2001).

B pictures   H, W pixels
"""

import numpy as np
import torch
from torch import Tensor

# How much haematoxylin, eosin and what is left take of red, green and blue light; a row each.
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
UNMIX = np.linalg.inv(STAINS)
DARKEST = 1 / 255       # of light: of none there is no logarithm


def density(light_B3HW: Tensor) -> Tensor:
    """The natural optical density of light from 0 to 1."""
    return -light_B3HW.clamp_min(DARKEST).log()


def amounts(density_B3HW: Tensor) -> Tensor:
    """Of haematoxylin, eosin and what is left (B, 3, H, W): densities add up, so this is linear."""
    return torch.einsum("bchw,cs->bshw", density_B3HW, torch.from_numpy(UNMIX).to(density_B3HW))
