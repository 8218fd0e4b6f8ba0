"""What crosses from data to methods: the views a method declares, and the batch it receives.

B tiles, or slides, of one rank   H, W pixels of a view   T tiles of a slide's view   D width of their vectors
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ssl_dist.data.view import SlideView, View, each

__all__ = ["Batch", "SlideView", "View", "each"]


@dataclass
class Batch:
    """One rank's share of a step."""

    views: list[Tensor]             # uint8 BHW3, one tensor a declared view; the encoder normalises. Of slides two a
    #                                 view: vectors BTD of its tiles, and their columns and rows BT2
    boxes: list[np.ndarray]         # B4: x, y, width, height of each view's crop, as fractions of its tile; of tiles
    rows: np.ndarray                # B: rows of the catalogue; of slides those of the first view's draws
    positions: np.ndarray           # B: places in the epoch's order

    def to(self, device: torch.device) -> "Batch":
        """The batch with its pixels on `device`."""
        return Batch([view.to(device, non_blocking=True) for view in self.views], self.boxes, self.rows, self.positions)

    def split(self, parts: int) -> "list[Batch]":
        """Parts of one size, in order."""
        share, left = divmod(len(self.rows), parts)
        assert not left, f"{len(self.rows)} tiles in {parts} parts: config.rank_batch should have refused"
        return [Batch([view[own] for view in self.views], [box[own] for box in self.boxes], self.rows[own],
                      self.positions[own])
                for own in (slice(first, first + share) for first in range(0, len(self.rows), share))]
