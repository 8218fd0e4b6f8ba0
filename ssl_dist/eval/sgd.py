"""A linear layer trained step by step on frozen features, as the papers do it: several learning rates at once, and the
rate and the step that are best on patients held out.

Q queries   B bank   D width   C classes   R rates
"""

import copy
import functools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_dist import schedule
from ssl_dist.eval import linear, metrics, protocol
from ssl_dist.eval.features import Split
from ssl_dist.eval.protocol import Progress, Verdict
from ssl_dist.eval.settings import Sgd

LOOKS = 50          # at the patients held out, over the whole training


def run(settings: Sgd, device: torch.device, threads: int, progress: Progress) -> dict[str, Any]:
    """The protocol: features of both splits, a layer on the bank, and the same for each baseline."""
    def judge(bank_BD: Tensor, bank: Split, query_QD: Tensor, query: Split) -> Verdict:      # noqa: ARG001
        learn, held = linear.parted(bank, settings.seed)
        layer, facts = trained(bank_BD, bank.labels_S, learn, held, len(bank.classes), settings)
        with torch.inference_mode():
            return Verdict(layer(query_QD).softmax(dim=1).double().numpy(), facts)

    return protocol.run(settings, judge, device, threads, progress, functools.partial(allow, settings))


def allow(settings: Sgd, bank: Split) -> None:
    """Refuses a bank of which no part can be held out to choose by."""
    linear.parted(bank, settings.seed)


def trained(bank_BD: Tensor, labels_B: Tensor, learn: np.ndarray, held: np.ndarray, classes: int,
            settings: Sgd) -> tuple[nn.Linear, dict[str, Any]]:
    """The layer that is best on the tiles held out, of every rate and look; and which that is."""
    torch.manual_seed(settings.seed)
    layers = [nn.Linear(bank_BD.shape[1], classes) for _ in settings.rates]
    groups = [{"params": list(layer.parameters()), "lr": rate}
              for layer, rate in zip(layers, settings.rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay) if settings.optimizer == "adamw" else \
        torch.optim.SGD(groups, momentum=0.9, weight_decay=settings.weight_decay)
    numbers, own = np.random.default_rng(settings.seed), torch.from_numpy(learn)
    pause = max(1, settings.steps // LOOKS)
    best, chosen, since = -1.0, layers[0], 0
    facts: dict[str, Any] = {}
    for step in range(settings.steps):
        for group, rate in zip(optimizer.param_groups, settings.rates, strict=True):
            group["lr"] = schedule.cosine(step / settings.steps, rate, 0.0)
        rows = own[torch.from_numpy(numbers.integers(0, len(own), settings.batch))]
        # Each layer's loss has its own weights alone: the gradient of the sum is that of each.
        loss = torch.stack([F.cross_entropy(layer(bank_BD[rows]), labels_B[rows]) for layer in layers]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % pause and step + 1 < settings.steps:
            continue
        for layer, rate in zip(layers, settings.rates, strict=True):
            if (found := _right(layer, bank_BD[held], labels_B[held])) > best:
                best, chosen, since = found, copy.deepcopy(layer), step + 1
                facts = {"lr": rate, "step": step + 1, "balanced_accuracy_held_out": round(best, 4)}
        if step + 1 - since >= settings.patience * settings.steps:
            break
    return chosen, facts


@torch.inference_mode()
def _right(layer: nn.Linear, held_BD: Tensor, labels_B: Tensor) -> float:
    guess_B, truth_B = layer(held_BD).argmax(dim=1).numpy(), labels_B.numpy()
    return metrics.balanced_accuracy(metrics.confusion(truth_B, guess_B, layer.out_features))
