"""What every method is."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from ssl_dist.data.batch import Batch, View


class Method(nn.Module, ABC):
    """An encoder and what teaches it. The training loop knows nothing else."""

    encoder: nn.Module              # what evaluation loads
    views: tuple[View, ...]         # what the data path must cut
    INPUT = "tiles"                 # or "bags"

    @abstractmethod
    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """"loss", which is minimised, and other scalars worth a curve; progress runs from 0 to 1."""

    def after_step(self, progress: float) -> None:
        """What moves without a gradient: a teacher, a queue."""
