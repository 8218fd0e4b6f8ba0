"""BatchNorm over all ranks or groups of them, on any device (torch's own refuses CPU tensors).

N samples of this rank   C channels   W ranks that share their statistics
"""

from typing import Any

import torch
import torch.distributed as c10d
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_dist import dist, points


class _Normalise(torch.autograd.Function):
    """torch's own fused kernels, given the statistics of all ranks instead of computing their own.

    As everywhere here, each rank holds the loss of the whole batch and gradients are averaged over ranks afterwards: so
    what an input changes through the shared statistics is the sum over the ranks that share them, and weight and bias
    keep their own part.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, mean_C: Tensor,
                variance_C: Tensor, count: Tensor, eps: float, ranks: int) -> Tensor:
        ctx.save_for_backward(input, weight_C, mean_C, variance_C, count)
        ctx.eps, ctx.ranks = eps, ranks
        return F.batch_norm(input, mean_C, variance_C, weight_C, bias_C, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:        # type: ignore[override]
        input, weight_C, mean_C, variance_C, count = ctx.saved_tensors
        scale_C = torch.rsqrt(variance_C + ctx.eps)
        # As if the statistics were constants: dx = w dy / σ, dw = Σ dy x̂, db = Σ dy, in one pass.
        constant, dw_C, db_C = torch.ops.aten.native_batch_norm_backward(
            gradient.contiguous(memory_format=_format(input)), input,
            torch.ones_like(mean_C) if weight_C is None else weight_C, mean_C, variance_C, mean_C, scale_C, False,
            ctx.eps, [True, True, True])
        dw_C, db_C = _wide(dw_C), _wide(db_C)
        total_2C = torch.stack([dw_C, db_C])
        c10d.all_reduce(total_2C, group=dist.neighbours(ctx.ranks))
        # Through the statistics: - w/σ (Σ dy + x̂ Σ dy x̂) / count, a straight line in x for each channel.
        factor_C = (scale_C if weight_C is None else _wide(weight_C) * scale_C) / count
        slope_C = factor_C * scale_C * total_2C[0]
        level_C = factor_C * total_2C[1] - slope_C * mean_C
        shape = [1, -1] + [1] * (input.ndim - 2)
        dx = constant.sub_(level_C.view(shape)).addcmul_(input, slope_C.view(shape).to(input.dtype), value=-1)
        return dx, None if weight_C is None else dw_C, None if weight_C is None else db_C, None, None, None, None, None


def _wide(values: Tensor) -> Tensor:
    """At least float32."""
    return values if values.dtype == torch.float64 else values.float()


def _format(tensor: Tensor) -> torch.memory_format:
    last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Normalises with the mean and variance of the global batch, or of what `ranks` neighbours have of it; alone it is
    torch's BatchNorm."""

    ranks = 0           # all

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"BatchNorm needs (N, C, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) -> the same shape."""
        ranks = self.ranks or dist.world()
        return self._together(input, ranks) if self.training and ranks > 1 else super().forward(input)

    @torch.compiler.disable     # it would have to trace through what ranks tell each other
    def _together(self, input: Tensor, ranks: int) -> Tensor:
        with torch.no_grad():
            # The kernel behind torch's own BatchNorm; var_mean was measured thirty times slower on channels_last.
            own_2C = _wide(torch.stack(torch.batch_norm_update_stats(input, None, None, 0.0)))
            own_3C = torch.cat([own_2C, own_2C.new_full(own_2C[:1].shape, input.numel() / input.shape[1])])
            parts_W3C = [torch.empty_like(own_3C) for _ in range(ranks)]
            points.alone.meets()
            c10d.all_gather(parts_W3C, own_3C, group=dist.neighbours(ranks))
            means_WC, variances_WC, counts_WC = torch.stack(parts_W3C).unbind(1)
            # Shares differ where samples are the tiles of slides. Variance within ranks, and between their means: no
            # squares that would cancel.
            count = counts_WC[:, 0].sum()
            shares_WC = counts_WC / count
            mean_C = (shares_WC * means_WC).sum(0)
            variance_C = (shares_WC * (variances_WC + (means_WC - mean_C).square())).sum(0)
            if self.track_running_stats:
                self._remember(mean_C, variance_C * (count / (count - 1)))
        return _Normalise.apply(input, self.weight, self.bias, mean_C, variance_C, count, self.eps, ranks)

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


def synchronise(module: nn.Module, ranks: int = 0) -> nn.Module:
    """The module with every BatchNorm inside synchronised over so many neighbours (0: all ranks); parameters, buffers
    and their names stay."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module if isinstance(module, SyncBatchNorm) else _synchronised(module, ranks)
    for name, child in module.named_children():
        setattr(module, name, synchronise(child, ranks))
    return module


def has_local(module: nn.Module) -> bool:
    """Whether any BatchNorm in it sees the samples of some ranks alone."""
    return any(isinstance(each, nn.modules.batchnorm._BatchNorm)
               and not (isinstance(each, SyncBatchNorm) and each.ranks in (0, dist.world()))
               for each in module.modules())


def has_any(module: nn.Module) -> bool:
    """Whether there is any BatchNorm in it."""
    return any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in module.modules())


def _synchronised(old: nn.modules.batchnorm._BatchNorm, ranks: int) -> SyncBatchNorm:
    activated = hasattr(old, "act") and hasattr(old, "drop")
    kind = SyncBatchNormAct if activated else SyncBatchNorm
    new = kind(old.num_features, eps=old.eps, momentum=old.momentum, affine=old.affine,
               track_running_stats=old.track_running_stats)
    new._parameters, new._buffers, new.ranks = old._parameters, old._buffers, ranks
    if activated:
        new.drop, new.act = old.drop, old.act
    return new.train(old.training)
