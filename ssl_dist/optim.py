"""Parameter groups and optimizers."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ssl_dist.config import Optim


def groups(module: nn.Module, config: Optim, resting: Sequence[nn.Parameter] = ()) -> list[dict[str, Any]]:
    """Matrices and kernels; and the vectors: biases and the scales of norms, which have a way of their own.

    A weight that rests for a while is a group of its own: ZeRO keeps one count of steps a group, and Adam corrects its
    moments by it. `share` is a group's part of the learning rate, `decay` its part of the weight decay (`set_rates`).
    """
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    alone = {id(each) for each in resting}
    share = 1.0 if config.lr_vectors is None else config.lr_vectors / config.lr
    matrices = {"share": 1.0, "decay": 1.0}
    vectors = {"share": share, "decay": float(config.decay_vectors)}
    return [{"params": [each for each in learning if each.ndim > 1 and id(each) not in alone], **matrices},
            {"params": [each for each in learning if each.ndim <= 1 and id(each) not in alone], **vectors},
            *({"params": [each], **(matrices if each.ndim > 1 else vectors)} for each in resting)]


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Learning rate and weight decay of the next step."""
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = lr * group["share"], weight_decay * group["decay"]


def build(module: nn.Module, config: Optim, resting: Sequence[nn.Parameter] = ()) -> torch.optim.Optimizer:
    """The optimizer that `config` names, over the parameters that learn, some of which rest for a while."""
    parameters = groups(module, config, resting)
    optimizer: torch.optim.Optimizer
    # Fused: one pass over weights, gradients and moments; of 11 million weights on a CPU core 27 ms instead of 62.
    # torch's fused SGD cannot: it fails where one weight has its first gradient after the others.
    if config.name == "adamw":
        optimizer = torch.optim.AdamW(parameters, lr=config.lr, fused=True)
    elif config.name == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum,
                                    nesterov=config.nesterov and config.momentum > 0)
    else:
        optimizer = Lars(parameters, lr=config.lr, momentum=config.momentum, trust=config.trust)
    set_rates(optimizer, config.lr, config.weight_decay)
    return optimizer


class Lars(torch.optim.Optimizer):
    """SGD whose step is scaled, layer by layer, to the size of the weights (You et al. 2017).

    As in SimCLR and BYOL, weight decay joins the gradient before its norm is taken, and vectors (biases, norms) are
    neither decayed nor scaled. It needs true layers, so it does not go with ZeRO's flattened partitions.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.9, weight_decay: float = 0.0,
                 trust: float = 1e-3):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:     # type: ignore[override]
        """One update."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                change = weight.grad
                if weight.ndim > 1:
                    change = change + group["weight_decay"] * weight
                    size, slope = weight.norm(), change.norm()
                    change = change * torch.where((size > 0) & (slope > 0), group["trust"] * size / slope, 1.0)
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                state["momentum_buffer"].mul_(group["momentum"]).add_(change)
                weight.add_(state["momentum_buffer"], alpha=-group["lr"])
        return loss
