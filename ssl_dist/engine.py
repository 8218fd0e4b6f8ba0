"""Call, backward, step, set_lr: the training step on DeepSpeed. The only deepspeed."""

import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

from ssl_dist.data.batch import Batch


class Engine:
    """A method and its optimizer, run by DeepSpeed (stage 0: every rank holds all weights, gradients are averaged)."""

    def __init__(self, method: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any],
                 device: torch.device):
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        import deepspeed  # looks for an accelerator when imported, so not before the device is known

        deepspeed.utils.logging.logger.setLevel(logging.ERROR)
        # The shared-memory all-reduce would be compiled at first use, and a plain machine has no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.method, self.optimizer = method, optimizer
        self._deepspeed, *_ = deepspeed.initialize(model=method, optimizer=optimizer, config=config,
                                                   dist_init_required=False)

    def __call__(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """The method's scalars, through DeepSpeed's wrapper, where its hooks are."""
        return self._deepspeed(batch, progress)

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss, averaged over the ranks."""
        self._deepspeed.backward(loss)

    def gradient_norm(self) -> float:
        """The length of the averaged gradient."""
        gradients = [parameter.grad for parameter in self.method.parameters() if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def step(self) -> None:
        """One update of the weights; gradients are gone afterwards."""
        self._deepspeed.step()

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def weights(self) -> dict[str, Tensor]:
        """Parameters by name."""
        return {name: parameter.detach() for name, parameter in self.method.named_parameters()}

    def buffers(self) -> dict[str, Tensor]:
        """What every rank keeps for itself: running statistics, queues."""
        kept = self.method.state_dict()
        return {name: buffer for name, buffer in self.method.named_buffers() if name in kept}

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's state as `<parameter>|<name>`."""
        names: dict[Any, str] = {parameter: name for name, parameter in self.method.named_parameters()}
        return {f"{names[parameter]}|{key}": torch.as_tensor(value)
                for parameter, state in self.optimizer.state.items() for key, value in state.items()}

    @torch.no_grad()
    def restore(self, weights: dict[str, Tensor], buffers: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Takes back what `weights`, `buffers` and `moments` gave."""
        own, kept = dict(self.method.named_parameters()), self.buffers()
        for mine, given in ((own, weights), (kept, buffers)):
            if mine.keys() != given.keys():
                raise ValueError(f"checkpoint and method name different tensors: {sorted(mine.keys() ^ given)[:3]}")
            for name, tensor in given.items():
                mine[name].copy_(tensor)
        for name, tensor in moments.items():
            parameter, _, key = name.rpartition("|")
            where = "cpu" if tensor.ndim == 0 else own[parameter].device        # AdamW counts its steps on the CPU
            self.optimizer.state[own[parameter]][key] = tensor.to(where)
