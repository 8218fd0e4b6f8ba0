"""Every method on a network that trains in milliseconds, batches by hand, and a training step without DeepSpeed."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ssl_dist import dist, methods
from ssl_dist.data.batch import Batch, View
from ssl_dist.methods import base
from ssl_dist.models.batchnorm import synchronise
from ssl_dist.models.encoder import Encoder
from ssl_dist.models.heads import DinoHead

TILES, STEPS = 12, 3            # 12 are shared evenly by 2, 3 and 4 ranks
PAIR = (View(size=32), View(size=32))
CROPS = (View(size=32), View(size=32), View(size=16), View(size=16))

# method -> its settings, with everything that moves or waits in them at work within a few steps
SETTINGS: dict[str, dict[str, Any]] = {
    "simclr": {"width": 8, "norm": True, "views": PAIR},
    "moco": {"width": 8, "queue": 20, "momentum": 0.7, "views": PAIR},         # two steps fill it
    "swav": {"width": 8, "hidden": 16, "prototypes": 7, "queue": 17, "queue_from": 0.25, "frozen": 0.3, "views": CROPS},
    "barlow": {"width": 8, "hidden": 16, "views": PAIR},
    "dino": {"classes": 11, "hidden": 16, "narrow": 6, "momentum": (0.6, 1.0), "frozen": 0.3, "temperature_warmup": 0.6,
             "views": CROPS},
    "vicreg": {"width": 8, "hidden": 16, "views": PAIR},
}
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}),
    "vit": ("vit_tiny_patch16_224", TINY),
    # For crops of two sizes timm resamples learned positions, in float32, which is not exact enough for these tests.
    "vit of any size": ("vit_tiny_patch16_224", {**TINY, "dynamic_img_size": True, "pos_embed": "none"}),
}
WITHOUT_BATCHNORM = [("moco", "vit"), ("dino", "vit of any size")]
CASES = [*((name, "resnet") for name in SETTINGS), *WITHOUT_BATCHNORM]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For networks of this size, threads wait for each other longer than they reckon."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def encoder(network: str = "resnet", **more: Any) -> Encoder:
    name, args = NETWORKS[network]
    return Encoder(name, {**args, **more}, (0.5,) * 3, (0.5,) * 3)


def build(name: str, network: str = "resnet", *, kind: torch.dtype = torch.float64, local: bool = False,
          **changed: Any) -> base.Method:
    """The method, the same weights every time."""
    torch.manual_seed(0)
    module = methods.load(name)
    method = module.Method(module.Config(**{**SETTINGS[name], **changed}), encoder(network))
    for each in method.modules():
        # Its narrow layers would give vectors of 1e-5, whose direction is mostly rounding.
        if isinstance(each, DinoHead):
            for layer in each.layers:
                if isinstance(layer, nn.Linear):
                    layer.weight.data.mul_(10)
    return (method if local else synchronise(method)).to(kind)


def batch(method: base.Method, step: int = 0, *, tiles: int = TILES) -> Batch:
    """The whole batch of a step: uint8 views of one tile are the same noise, cut and moved."""
    generator = np.random.default_rng(step)
    noise = generator.integers(0, 256, (tiles, 8, 8, 3), dtype=np.uint8)
    views = []
    for view in method.views:
        large = noise.repeat(view.size // 8, axis=1).repeat(view.size // 8, axis=2)
        moved = generator.integers(-60, 60, (tiles, view.size, view.size, 3)) + large
        views.append(torch.from_numpy(moved.clip(0, 255).astype(np.uint8)))
    return Batch(views, [np.zeros((tiles, 4)) for _ in views], np.arange(tiles), np.arange(tiles) + step * tiles)


def cut(whole: Batch, shares: int, number: int) -> Batch:
    """One of several equal shares of a batch, all consecutive."""
    share = len(whole.rows) // shares
    own = slice(number * share, (number + 1) * share)
    return Batch([view[own] for view in whole.views], [boxes[own] for boxes in whole.boxes], whole.rows[own],
                 whole.positions[own])


def sgd(method: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([each for each in method.parameters() if each.requires_grad], lr=0.05, momentum=0.9,
                           weight_decay=0.01)


def train(method: base.Method, optimizer: torch.optim.Optimizer, *, first: int = 0, last: int = STEPS, parts: int = 1,
          prepare: Callable[[int], None] = lambda step: None) -> Iterator[dict[str, Tensor]]:
    """What every step gives: the loss, and the gradients, averaged over ranks as DeepSpeed does."""
    for step in range(first, last):
        prepare(step)
        own = cut(batch(method, step), dist.world(), dist.rank())
        optimizer.zero_grad()
        loss = 0.0
        for part in range(parts):
            said = method(cut(own, parts, part), step / STEPS)
            (said["loss"] / parts).backward()
            loss += said["loss"].detach() / parts
        gradients = {name: each for name, each in method.named_parameters() if each.grad is not None}
        averaged = dist.average(torch.cat([each.grad.flatten() for each in gradients.values()]))
        for each, mean in zip(gradients.values(), averaged.split([each.numel() for each in gradients.values()]),
                              strict=True):
            each.grad = mean.view_as(each).clone()
        optimizer.step()
        method.after_step(step / STEPS)
        yield {"loss": loss, **{name: each.grad.clone() for name, each in gradients.items()}}


def apart(found: Tensor, truth: Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    return float((found - truth).abs().max() / truth.abs().max().clamp_min(1e-3)) if truth.numel() else 0.0
