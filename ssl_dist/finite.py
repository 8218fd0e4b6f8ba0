"""Values that are no numbers: seen by all ranks alike before anything learns from them, and kept to be looked at.

B tiles of one rank
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from shards import folder
from ssl_dist import dist
from ssl_dist.data.batch import Batch


class NotFinite(ArithmeticError):
    """A loss, a gradient or a weight that is not a number."""

    exit_code = 8


class Statistics:
    """What a forward pass changes by itself: running statistics. They can be put back."""

    def __init__(self, method: nn.Module):
        self._now = [buffer for each in method.modules() if isinstance(each, _NormBase)
                     for buffer in each.buffers(recurse=False)]
        self._before = [torch.empty_like(buffer) for buffer in self._now]

    @torch.no_grad()
    def keep(self) -> None:
        """Remembers them as they are."""
        for before, now in zip(self._before, self._now, strict=True):
            before.copy_(now)

    @torch.no_grad()
    def put_back(self) -> None:
        """Makes them what they were."""
        for before, now in zip(self._before, self._now, strict=True):
            now.copy_(before)


def offenders(tensors: dict[str, Tensor]) -> list[str]:
    """The names of tensors that hold a value which is no number."""
    return [name for name, tensor in tensors.items() if _bad(tensor)]


def bundle(path: Path, step: int, batch: Batch, method: nn.Module, facts: dict[str, Any]) -> Path:
    """Writes all that the step needs to be done again: every rank its tiles, rank 0 the method as it was."""
    home = folder.make(path / "replay" / f"step-{step:06d}")
    tensors = {**{f"view{number}": view for number, view in enumerate(batch.views)},
               **{f"box{number}": torch.from_numpy(box) for number, box in enumerate(batch.boxes)},
               "rows": torch.from_numpy(batch.rows), "positions": torch.from_numpy(batch.positions)}
    folder.write(home / f"tiles-{dist.rank():05d}.safetensors", packed(tensors))
    if dist.rank() == 0:
        folder.write(home / "method.safetensors", packed(method.state_dict()))
        folder.write_json(home / "step.json", {"step": step, "world": dist.world(), **facts})
    return home


def unbundled(home: Path) -> tuple[dict[str, Any], dict[str, Tensor], Batch]:
    """What `bundle` wrote: the facts, the method's state, and the batch of all ranks."""
    told = json.loads((home / "step.json").read_text())
    ranks = [load_file(home / f"tiles-{rank:05d}.safetensors") for rank in range(told["world"])]
    whole = {name: torch.cat([each[name] for each in ranks]) for name in ranks[0]}
    views, boxes = ([whole[name] for name in sorted((each for each in whole if each.startswith(kind)),
                                                    key=lambda each: int(each.removeprefix(kind)))]
                    for kind in ("view", "box"))
    return told, load_file(home / "method.safetensors"), Batch(
        views, [each.numpy() for each in boxes], whole["rows"].numpy(), whole["positions"].numpy())


def examine(method: nn.Module, batch: Batch, progress: float) -> dict[str, Any]:
    """Forward and backward of one step: the loss, the gradient's length, and where the first bad value arose."""
    found: list[str] = []
    hooks = [module.register_forward_hook(lambda _, __, out, name=name: found.append(name) if _bad(out) else None)
             for name, module in method.named_modules() if name]
    loss = method(batch, progress)["loss"]
    for hook in hooks:
        hook.remove()
    loss.backward()
    gradients = {name: weight.grad for name, weight in method.named_parameters() if weight.grad is not None}
    return {"loss": float(loss.detach()), "gradient_norm": float(torch.nn.utils.get_total_norm(gradients.values())),
            "weights": offenders(dict(method.named_parameters())), "outputs": found, "gradients": offenders(gradients)}


def packed(tensors: dict[str, Tensor]) -> bytes:
    """Tensors as the content of a safetensors file."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _bad(out: Any) -> bool:
    return isinstance(out, Tensor) and out.is_floating_point() and not bool(out.isfinite().all())
