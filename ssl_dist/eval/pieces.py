"""Maps of pictures of any size, in pieces: each is looked at with a rim as wide as the network sees, so that together
they are what it says of the whole at once.

C classes   H, W pixels
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssl_dist.models import fcnn
from ssl_dist.models.encoder import Encoder

SIDE = 512              # pixels of a piece without its rim: some hundred megabytes of activations
SOME = 256              # pieces by which the colours of a slide are known

Read = Callable[[int, int, int, int], np.ndarray]       # left, top, width, height -> RGB


class Piece(NamedTuple):
    """What is kept of a piece, and what has to be looked at for it: first and last row and column, of the picture."""

    top: int
    bottom: int
    left: int
    right: int
    seen: tuple[int, int, int, int]

    def kept(self, seen_XHW: np.ndarray) -> np.ndarray:
        """The piece out of what was looked at."""
        down, across = self.top - self.seen[0], self.left - self.seen[2]
        return seen_XHW[..., down:down + self.bottom - self.top, across:across + self.right - self.left]


def pieces(height: int, width: int, rim: int, side: int = SIDE) -> Iterator[Piece]:
    """All of a picture, a row of pieces after the other. Where the picture ends the rim does: there the network sees
    what it sees at the end of a picture."""
    for top in range(0, height, side):
        for left in range(0, width, side):
            bottom, right = min(top + side, height), min(left + side, width)
            yield Piece(top, bottom, left, right, (max(top - rim, 0), min(bottom + rim, height), max(left - rim, 0),
                                                   min(right + rim, width)))


def light(pixels_HW3: np.ndarray) -> Tensor:
    """Pixels as networks of maps take them (1, 3, H, W), from 0 to 1."""
    return torch.tensor(pixels_HW3).permute(2, 0, 1)[None].float() / 255


@torch.inference_mode()
def looked_at(encoder: Encoder, pixels_HW3: np.ndarray, colours_133: Tensor | None = None) -> np.ndarray:
    """The maps (C, H, W) of what fits into memory at once, 0 where there is glass; `colours_133`: of the whole that it
    is a piece of."""
    device = next(encoder.parameters()).device
    told = () if colours_133 is None else (colours_133.to(device),)
    maps_CHW = encoder(torch.tensor(pixels_HW3)[None].to(device), *told)[0].float().cpu().numpy()
    maps_CHW[:, ~tissue(pixels_HW3)] = 0
    return maps_CHW


def tissue(pixels_HW3: np.ndarray) -> np.ndarray:
    """Where a picture is no glass (H, W)."""
    return np.asarray((pixels_HW3 < 255 * fcnn.GLASS).any(axis=2))


def colours(read: Read, size: tuple[int, int], side: int = SIDE) -> Tensor:
    """The colours (1, 3, 3) of a picture, of all its pieces or of some that lie all over it."""
    cut = [*pieces(*size, 0, side)]
    total_1243 = torch.zeros(1, 2, 4, 3, dtype=torch.float64)
    # By lot, the same always: every so manieth could be of two columns alone.
    for number in np.random.default_rng(0).permutation(len(cut))[:SOME].tolist():
        own = cut[number]
        total_1243 += fcnn.sums(light(read(own.left, own.top, own.right - own.left, own.bottom - own.top)))
    return fcnn.told_by(total_1243)


def of_picture(picture_HW3: np.ndarray) -> Read:
    """Reads a picture that is in memory."""
    return lambda left, top, wide, high: picture_HW3[top:top + high, left:left + wide]


def whole(encoder: Encoder, picture_HW3: np.ndarray, side: int = SIDE) -> np.ndarray:
    """The maps (C, H, W) of a picture."""
    height, width = picture_HW3.shape[:2]
    maps_CHW = np.empty((encoder.classes(), height, width), np.float32)
    own = colours(of_picture(picture_HW3), (height, width))
    for piece in pieces(height, width, encoder.reach(), side):
        top, bottom, left, right = piece.seen
        maps_CHW[:, piece.top:piece.bottom, piece.left:piece.right] = piece.kept(
            looked_at(encoder, picture_HW3[top:bottom, left:right], own))
    return maps_CHW
