"""Forward, backward, step and gradient norm on DeepSpeed, at ZeRO stages 0, 1 and 2. The only deepspeed.

Stages 0 and 1 keep all gradients on every rank, so these are averaged by torch's DistributedDataParallel around
DeepSpeed's engine: in buckets, while the backward pass still runs. DeepSpeed's own reduction, which comes after it, is
off. Stage 2 keeps a rank's part of the gradients alone, and DeepSpeed reduces them. What a checkpoint holds is the same
at every stage: tensors by the name of their parameter.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssl_dist import dist
from ssl_dist.data.batch import Batch

BUCKET = 25     # MB of gradients that are averaged at a time


class Engine:
    """A method and its optimizer, run by DeepSpeed."""

    def __init__(self, method: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any],
                 device: torch.device):
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        import deepspeed  # looks for an accelerator when imported, so not before the device is known

        deepspeed.utils.logging.logger.setLevel(logging.ERROR)
        # The shared-memory all-reduce would be compiled at first use, and a plain machine has no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.method, self.optimizer = method, optimizer
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in method.named_parameters()}
        self._learning: list[nn.Parameter] = [each for group in optimizer.param_groups for each in group["params"]]
        self._clip = config["gradient_clipping"]
        self._norm: float | None = None
        self._used: set[nn.Parameter] = set()
        self._stage = config["zero_optimization"]["stage"]
        if self._stage:     # it cannot cut a group of nothing into parts
            optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        dist.at_stop(_forget_groups)
        # We clip: the norm is known by then, and DeepSpeed would find it a second time.
        self._deepspeed, self._zero, *_ = deepspeed.initialize(
            model=method, optimizer=optimizer, config={**config, "gradient_clipping": 0.0}, dist_init_required=False)
        self._call: nn.Module = self._deepspeed
        if not self._stage:
            # Not before: DeepSpeed's broadcast wants contiguous weights. Not later: buckets are laid out as they are.
            # The flat weights of the other stages stay as they are; convolutions take them so.
            method.to(memory_format=torch.channels_last)
        else:
            for parameter in self._learning:
                parameter.register_post_accumulate_grad_hook(self._used.add)
        if self._stage < 2:
            self._deepspeed.enable_backward_allreduce = False
            if dist.world() > 1:
                self._call = self._averaged = self._wrapped()

    def _wrapped(self) -> DistributedDataParallel:
        # 1x1 kernels have one layout in memory and two ways to say so; torch warns of the difference.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)      # broadcast_buffers has another name from torch 2.15 on
            return DistributedDataParallel(
                self._deepspeed, process_group=dist.new_group(), init_sync=False, broadcast_buffers=False,
                bucket_cap_mb=BUCKET, gradient_as_bucket_view=True,
                # Parts of a method may rest for a while. And so the buckets stay as they are at the start: a run that
                # was resumed must add up in the same order.
                find_unused_parameters=True)

    def __call__(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """The method's scalars."""
        return self._call(batch, progress)

    @contextlib.contextmanager
    def part(self, number: int, parts: int) -> Iterator[None]:
        """Forward and backward of one of several parts of a batch; all but the last only add to the gradients."""
        last = number == parts - 1
        self._deepspeed.set_gradient_accumulation_boundary(last)
        with contextlib.nullcontext() if last or self._call is self._deepspeed else self._averaged.no_sync():
            yield

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss, averaged over the ranks."""
        self._deepspeed.backward(loss)
        self._norm = None
        if self._stage == 1 and self._deepspeed.is_gradient_accumulation_boundary():
            # What ZeRO does once gradients are averaged: this rank's part of them goes to its optimizer.
            self._zero.overlapping_partition_gradients_reduce_epilogue()

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """The length of the averaged gradient; no finite number if one of its values is none."""
        if self._norm is None:
            norm = torch.nn.utils.get_total_norm(self._gradients()).double()
            if self._stage:         # of this rank's part
                norm = (dist.average(norm.square()) * dist.world()).sqrt()
            self._norm = float(norm)
        return self._norm

    @torch.no_grad()
    def step(self) -> None:
        """One update of the weights; gradients are gone afterwards."""
        if self._clip and (excess := self.gradient_norm() / self._clip) > 1:
            torch._foreach_mul_(self._gradients(), 1 / excess)
        if self._stage:     # a method may have moved weights itself, and ZeRO steps with copies of its own
            self._zero.refresh_fp32_params()
        resting = [each for each in self._learning if each not in self._used] if self._stage else []
        first = not self.optimizer.state
        kept = [(each, each.clone()) for each in (*self._own(resting), *self._counts(resting))]
        self._deepspeed.step()
        # ZeRO takes no gradient for one of zeros, and weight decay and momentum would move what rests.
        for tensor, value in kept:
            tensor.copy_(value)
        if first:       # the state was made by this very step
            for tensor in (*self._moments(resting), *self._counts(resting)):
                tensor.zero_()
        self._used.clear()

    def discard(self) -> None:
        """Takes the gradients away instead of a step: nothing learns from them."""
        self.method.zero_grad(set_to_none=True)
        if self._stage:
            self._zero.zero_grad(set_to_none=True)
            self._zero.averaged_gradients = dict.fromkeys(self._zero.averaged_gradients)
        self._used.clear()
        self._norm = None

    def _gradients(self) -> list[Tensor]:
        """What this rank's optimizer is about to step with."""
        if self._stage:
            return [each for group in self._zero.averaged_gradients.values() for each in group]
        return [each.grad for each in self._learning if each.grad is not None]

    def weights(self) -> dict[str, Tensor]:
        """Parameters by name."""
        return {name: parameter.detach() for name, parameter in self.method.named_parameters()}

    def buffers(self) -> dict[str, Tensor]:
        """What every rank keeps for itself: running statistics, queues."""
        kept = self.method.state_dict()
        return {name: buffer for name, buffer in self.method.named_buffers() if name in kept}

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's state as `<parameter>|<name>`; all ranks ask for it together, for each may have a part."""
        if not self._stage:
            return {f"{self._names[parameter]}|{key}": torch.as_tensor(value)
                    for parameter, state in self.optimizer.state.items() for key, value in state.items()}
        import deepspeed

        self._link()
        found = {}
        for group, parameters in zip(self.optimizer.param_groups, self._zero.bit16_groups, strict=True):
            for key, value in self.optimizer.state.get(group["params"][0], {}).items():
                for parameter in parameters:
                    found[f"{self._names[parameter]}|{key}"] = value.detach().clone() if not value.ndim else \
                        deepspeed.utils.safe_get_full_optimizer_state(parameter, key)
        return found

    @torch.no_grad()
    def restore(self, weights: dict[str, Tensor], buffers: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Takes back what `weights`, `buffers` and `moments` gave, at whatever stage and number of ranks."""
        own, kept = dict(self.method.named_parameters()), self.buffers()
        for mine, given in ((own, weights), (kept, buffers)):
            if mine.keys() != given.keys():
                raise ValueError(f"checkpoint and method name different tensors: {sorted(mine.keys() ^ given)[:3]}")
            for name, tensor in given.items():
                mine[name].copy_(tensor)
        if self._stage:
            self._zero.refresh_fp32_params()
            self._restore_parts(moments)
            return
        self.optimizer.state.clear()        # of weights that rest in the checkpoint, and had been awake since
        for name, tensor in moments.items():
            parameter, _, key = name.rpartition("|")
            state = self.optimizer.state[own[parameter]]
            # Laid out as its parameter is, for fused kernels go through both in one pass.
            state[key] = tensor.to(self._counts_on(own[parameter])) if not tensor.ndim else \
                torch.empty_like(own[parameter]).copy_(tensor)

    def _restore_parts(self, moments: dict[str, Tensor]) -> None:
        """This rank's part of the optimizer's state, which must be there before it can be written to."""
        import deepspeed

        if not moments:
            return
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
            for part in group["params"]:
                part.grad = torch.zeros_like(part)
        self.optimizer.step()
        self._link()
        for group, rate, parameters in zip(self.optimizer.param_groups, rates, self._zero.bit16_groups, strict=True):
            (part,) = group["params"]
            group["lr"], part.grad = rate, None
            for key, value in self.optimizer.state[part].items():
                given = {each: moments[name] for each in parameters
                         if (name := f"{self._names[each]}|{key}") in moments}
                if not value.ndim:      # one count of steps a group: whoever rests for a while is one of its own
                    value.fill_(max(map(float, given.values()), default=0.0))
                    continue
                value.zero_()
                for parameter, tensor in given.items():
                    deepspeed.utils.safe_set_full_optimizer_state(parameter, tensor.to(value.device), key)

    def _counts_on(self, parameter: Tensor) -> torch.device:
        """Where an optimizer counts the steps of a parameter: the CPU, or beside it where its kernel is fused."""
        fused = any(group.get("fused") or group.get("capturable") for group in self.optimizer.param_groups)
        return parameter.device if fused else torch.device("cpu")

    def _link(self) -> None:
        """Tells DeepSpeed where moments are: it looks itself, but before any group but the first has some."""
        for group, parameters in zip(self.optimizer.param_groups, self._zero.bit16_groups, strict=True):
            (part,) = group["params"]
            for parameter in parameters:
                if parameter._hp_mapping:
                    parameter._hp_mapping.set_optim_state_fragment(part, self.optimizer.state[part])

    def _own(self, parameters: Iterable[Any]) -> list[Tensor]:
        """Weights and, of their master copies and moments, what is in this rank's part."""
        masters = [part.detach().narrow(0, place.start, place.numel) for part, place in self._fragments(parameters)]
        return [*(each.detach() for each in parameters), *masters, *self._moments(parameters)]

    def _moments(self, parameters: Iterable[Any]) -> list[Tensor]:
        """Of these weights' moments, what is in this rank's part."""
        return [each.narrow(0, place.start, place.numel) for part, place in self._fragments(parameters)
                for each in self.optimizer.state.get(part, {}).values() if each.ndim]

    def _fragments(self, parameters: Iterable[Any]) -> Iterator[tuple[Tensor, Any]]:
        """The flat group that holds a part of a weight on this rank, and where in it."""
        for parameter in parameters:
            if parameter._hp_mapping:
                (part,) = self.optimizer.param_groups[parameter._hp_mapping.param_group_index]["params"]
                yield part, parameter._hp_mapping.hp_fragment_address

    def _counts(self, parameters: list[Any]) -> list[Tensor]:
        """The optimizer's counts of steps of the groups of which every weight is among these."""
        if not parameters:
            return []
        among = {id(each) for each in parameters}
        return [value for group, held in zip(self.optimizer.param_groups, self._zero.bit16_groups, strict=True)
                if all(id(each) in among for each in held)
                for value in self.optimizer.state.get(group["params"][0], {}).values() if not value.ndim]


def _forget_groups() -> None:
    """DeepSpeed keeps a copy of the group of all ranks, and would ask the next run of this process over it."""
    from deepspeed import comm

    if comm.is_initialized():
        comm.destroy_process_group()
