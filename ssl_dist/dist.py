"""Ranks: who am I, how many are we, and values that all of us agree on.

N all samples of a step   B one rank's   D width
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as c10d
from torch import Tensor

from launch.rank import MEETING
from ssl_dist import points


class NoDevice(RuntimeError):
    """A device that was asked for and is not there."""

    exit_code = 2
    alone = True            # other ranks may have theirs


class NoMeeting(RuntimeError):
    """Ranks that did not find each other."""

    exit_code = 7
    alone = True


# What gloo, NCCL and torch's store say where the other end is gone.
LOST = ("connection closed", "connection reset", "connection refused", "broken pipe", "remote process exited", "socket")
PATIENCE = timedelta(minutes=10)        # with a rank that does not answer
_patience = PATIENCE
TRIES = 16              # ports, where others may listen on some
MEET = 600.0            # seconds for all ranks to have started, where each is started by itself


def start(device: torch.device, patience: timedelta = PATIENCE) -> None:
    """Joins the ranks that torchrun or SLURM started, or makes a group of one that needs no port."""
    global _patience
    _patience = patience
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if MEETING in os.environ:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_one_gone())
            store = _meet(os.environ[MEETING], stack)
            c10d.init_process_group(backend, store=store, rank=int(os.environ["RANK"]),
                                    world_size=int(os.environ["WORLD_SIZE"]), timeout=_patience)
    elif "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        with _one_gone():
            c10d.init_process_group(backend, timeout=_patience)
    else:
        # DeepSpeed looks for these even in a group of one.
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        c10d.init_process_group(backend, store=c10d.HashStore(), rank=0, world_size=1, timeout=_patience)


@contextlib.contextmanager
def _one_gone() -> Iterator[None]:
    """What torch says of a rank that ended while the others were looking for it, in a sentence."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, c10d.DistError) or any(word in str(error).lower() for word in (*LOST, "timed out"))
        if isinstance(error, NoMeeting) or not lost:
            raise
        raise NoMeeting(f"the ranks have not come together, one may have ended ({str(error).splitlines()[0]}); run the "
                        "same command again") from error


def _meet(name: str, stack: contextlib.ExitStack) -> c10d.Store:
    """The store of the ranks of one attempt. Rank 0 says where it is, on the first port of some that it gets; who asks
    there and hears another name, or none, asks on. The store itself waits without end for strangers to answer."""
    host, first = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    name += f":{first}"         # of torchrun, each round has another
    ports = [first + number if first + number < 65_536 else first - number for number in range(TRIES)]
    if os.environ["RANK"] == "0":
        both: Any = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
        store = c10d.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=_patience)
        for port in ports:
            with contextlib.suppress(OSError):
                asked = stack.enter_context(socket.create_server(("", port), backlog=1024, **both))
                threading.Thread(target=_tell, args=(asked, f"{name} {store.port}\n".encode()), daemon=True).start()
                return store
        raise NoMeeting(f"ports {first} to {ports[-1]} of {host} are all taken; run the same command again")
    until = time.monotonic() + min(MEET, _patience.total_seconds())
    while time.monotonic() < until:
        for port in ports:
            with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=3) as question:
                said = question.makefile("rb").readline(500).split()        # a stranger says what he likes
                if said[:1] == [name.encode()]:
                    return c10d.TCPStore(host, int(said[1]), is_master=False, wait_for_workers=False,
                                         timeout=_patience)
        time.sleep(0.1)
    raise NoMeeting(f"rank {os.environ['RANK']} found rank 0 on none of the ports {first} to {ports[-1]} of {host} in "
                    f"{min(MEET, _patience.total_seconds()):.0f} s; is {host} the machine's name on the network of the "
                    "others?")


def _tell(asked: socket.socket, answer: bytes) -> None:
    """Answers all who ask, until the socket is closed."""
    with contextlib.suppress(OSError):
        while True:
            question, _ = asked.accept()
            with contextlib.suppress(OSError), question:
                question.sendall(answer)


def new_group(ranks: list[int] | None = None) -> Any:
    """Lines of their own between some ranks, or all: what goes over them waits for nothing else. All ranks ask."""
    return c10d.new_group(ranks, timeout=_patience)


def neighbours(count: int) -> c10d.ProcessGroup | None:
    """The group of `count` ranks, one after the other, that this rank is in; None is all. All ranks ask."""
    if count == world():
        return None
    if count not in _neighbours:
        groups = [new_group(list(range(first, first + count))) for first in range(0, world(), count)]
        _neighbours[count] = groups[rank() // count]
    return _neighbours[count]


_neighbours: dict[int, c10d.ProcessGroup] = {}
_endings: set[Callable[[], None]] = set()


def at_stop(ending: Callable[[], None]) -> None:
    """Has `ending` called before this process leaves the group: what a library keeps of it must not outlive it."""
    _endings.add(ending)


def stop() -> None:
    """Leaves the group; without it a gloo process may end in an abort."""
    while _endings:
        _endings.pop()()
    _neighbours.clear()
    if c10d.is_initialized():
        c10d.destroy_process_group()


def device(wanted: str) -> torch.device:
    """The device of this rank: its own GPU, or the CPU."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise NoDevice("device=cuda, but torch sees no GPU; `ssl-dist doctor` says why, device=auto takes the CPU")
    seen = torch.cuda.device_count()
    if local_rank() < seen:
        return torch.device("cuda", local_rank())
    if seen == 1:       # each process is shown its own alone
        return torch.device("cuda", 0)
    raise NoDevice(f"rank {rank()} is process {local_rank()} of its machine, which shows it {seen} GPUs; start as many "
                   "processes as there are GPUs")


def rank() -> int:
    """This process among all; 0 where nothing was started."""
    return c10d.get_rank() if c10d.is_initialized() else int(os.environ.get("RANK", 0))


def world() -> int:
    """How many processes there are; 1 where nothing was started."""
    return c10d.get_world_size() if c10d.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """This process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world() -> int:
    """How many processes share this machine's cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def cores() -> int:
    """Cores that this process may use: its own under SLURM, whether bound to them or not; else its share of all."""
    here = len(os.sched_getaffinity(0))
    by_srun = MEETING in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    if by_srun and (own := os.environ.get("SLURM_CPUS_PER_TASK", "")).isdigit():
        return max(1, min(here, int(own)))
    return max(1, here // local_world())


def barrier() -> None:
    """Waits until every rank is here."""
    if world() > 1:
        c10d.barrier()


def gather(value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    c10d.all_gather_object(values, value)
    return values


def first(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if world() == 1:
        return value
    box = [value]
    c10d.broadcast_object_list(box, src=0)
    return box[0]


def once(action: Callable[[], Any]) -> Any:
    """What rank 0's `action` returns, on every rank; if it raises, every rank raises the same."""
    outcome = None
    if rank() == 0:
        try:
            outcome = (True, action())
        except Exception as error:
            outcome = (False, error)
    done, value = first(outcome)
    if not done:
        raise value
    return value


def largest(values: list[float], device: torch.device) -> list[float]:
    """The largest of each value over the ranks; not-a-number counts as infinitely large."""
    tensor = torch.tensor(values, device=device, dtype=torch.float64).nan_to_num(nan=float("inf"))
    if world() > 1:
        c10d.all_reduce(tensor, op=c10d.ReduceOp.MAX)
    return tensor.tolist()


def mean(scalars: dict[str, float], device: torch.device) -> dict[str, float]:
    """The mean of each value over the ranks."""
    tensor = torch.tensor(list(scalars.values()), device=device, dtype=torch.float64)
    if world() > 1:
        c10d.all_reduce(tensor)
    return dict(zip(scalars, (tensor / world()).tolist(), strict=True))


class _Gather(torch.autograd.Function):
    """Concatenation over ranks whose gradient returns to every rank.

    Gradients are averaged over ranks afterwards. Every rank computes the same global loss from the gathered tensor, so
    each holds the full gradient of its own slice; summing over ranks and averaging over ranks cancel. The own slice
    is therefore taken from the sum.
    """

    @staticmethod
    def forward(ctx: Any, own_BD: Tensor) -> Tensor:
        points.alone.meets()
        parts = [torch.empty_like(own_BD) for _ in range(world())]
        c10d.all_gather(parts, own_BD.contiguous())
        ctx.share = len(own_BD)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient_ND: Tensor) -> Tensor:      # type: ignore[override]
        gradient_ND = gradient_ND.contiguous().clone()      # autograd may have handed the same tensor to others
        c10d.all_reduce(gradient_ND)
        return gradient_ND[rank() * ctx.share:(rank() + 1) * ctx.share]


def gather_with_gradient(own_BD: Tensor) -> Tensor:
    """All ranks' rows in the order of the ranks, differentiable."""
    return _Gather.apply(own_BD) if world() > 1 else own_BD


class _Sum(torch.autograd.Function):
    """A sum over ranks, and of gradients: what any rank makes of the sum comes from all ranks' parts."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, same: bool) -> Tensor:       # type: ignore[override]
        ctx.same = same
        points.alone.meets()
        total = own.contiguous().clone()
        c10d.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:        # type: ignore[override]
        if ctx.same:
            return gradient * world(), None
        gradient = gradient.contiguous().clone()
        c10d.all_reduce(gradient)
        return gradient, None


def sum_with_gradient(own: Tensor, *, same: bool = False) -> Tensor:
    """The sum over ranks, differentiable. `same`: all ranks do the same with it, so its gradient is known to each."""
    return _Sum.apply(own, same) if world() > 1 else own


def average(value: Tensor) -> Tensor:
    """The mean of a tensor over ranks, without a gradient."""
    if world() > 1:
        value = value.detach().clone()
        c10d.all_reduce(value)
        value /= world()
    return value
