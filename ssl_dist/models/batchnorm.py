"""BatchNorm over all ranks, on any device (torch's own refuses CPU tensors).

N samples of this rank   C channels
"""

import torch
from torch import Tensor, nn

from ssl_dist import dist


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Normalises with the mean and variance of the global batch; alone it is torch's BatchNorm."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"BatchNorm needs (N, C, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) -> the same shape."""
        if not self.training or dist.world() == 1:
            return super().forward(input)
        axes = [axis for axis in range(input.ndim) if axis != 1]
        shape = [1, -1] + [1] * (input.ndim - 2)
        values = input.float()
        count = values.numel() / values.shape[1] * dist.world()
        # Two passes: the square of a mean subtracted from a mean of squares would cancel badly in float32.
        mean_C = dist.sum_with_gradient(values.sum(axes)) / count
        centred = values - mean_C.view(shape)
        variance_C = dist.sum_with_gradient(centred.square().sum(axes)) / count
        if self.track_running_stats:
            self._remember(mean_C.detach(), variance_C.detach() * (count / (count - 1)))
        normal = centred * torch.rsqrt(variance_C + self.eps).view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(input.dtype)

    def _remember(self, mean_C: Tensor, unbiased_C: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None, "buffers go with track_running_stats"
        assert self.num_batches_tracked is not None, "buffers go with track_running_stats"
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean_C, share)
            self.running_var.lerp_(unbiased_C, share)


class SyncBatchNormAct(SyncBatchNorm):
    """timm's BatchNorm with its activation, synchronised; the same names in its state."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) -> the same shape, activated."""
        return self.act(self.drop(super().forward(input)))


def synchronise(module: nn.Module) -> nn.Module:
    """The module with every BatchNorm inside synchronised; parameters, buffers and their names stay."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module if isinstance(module, SyncBatchNorm) else _synchronised(module)
    for name, child in module.named_children():
        setattr(module, name, synchronise(child))
    return module


def _synchronised(old: nn.modules.batchnorm._BatchNorm) -> SyncBatchNorm:
    activated = hasattr(old, "act") and hasattr(old, "drop")
    kind = SyncBatchNormAct if activated else SyncBatchNorm
    new = kind(old.num_features, eps=old.eps, momentum=old.momentum, affine=old.affine,
               track_running_stats=old.track_running_stats)
    new._parameters, new._buffers = old._parameters, old._buffers
    if activated:
        new.drop, new.act = old.drop, old.act
    return new.train(old.training)
