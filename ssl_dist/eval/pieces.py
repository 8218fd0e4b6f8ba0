"""Maps of pictures of any size, in pieces: each is looked at with a rim as wide as the network sees, so that together
they are what it says of the whole at once.

C classes   H, W pixels
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from ssl_dist.models.encoder import Encoder

SIDE = 512              # pixels of a piece without its rim: some hundred megabytes of activations


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


@torch.inference_mode()
def looked_at(encoder: Encoder, pixels_HW3: np.ndarray) -> np.ndarray:
    """The maps (C, H, W) of what fits into memory at once."""
    device = next(encoder.parameters()).device
    return encoder(torch.tensor(pixels_HW3)[None].to(device))[0].float().cpu().numpy()


def whole(encoder: Encoder, picture_HW3: np.ndarray, side: int = SIDE) -> np.ndarray:
    """The maps (C, H, W) of a picture."""
    height, width = picture_HW3.shape[:2]
    maps_CHW = np.empty((encoder.classes, height, width), np.float32)
    for piece in pieces(height, width, encoder.reach, side):
        top, bottom, left, right = piece.seen
        maps_CHW[:, piece.top:piece.bottom, piece.left:piece.right] = piece.kept(
            looked_at(encoder, picture_HW3[top:bottom, left:right]))
    return maps_CHW
