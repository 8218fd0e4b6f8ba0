"""Images per second of training: DeepSpeed's stages against plain DDP, and real tiles against the same in memory.

    python benchmarks/train.py [--rounds N] [--seconds S] [--batches 32,128] [--model resnet18] [--size 64] [--ranks N]

Ranks (as many as there are GPUs; two processes on a CPU), SimCLR on the same random tiles, AdamW, contenders in turns:

    DDP                         torch's DistributedDataParallel and a plain loop: forward, backward, gradient norm, step
    DDP, no norm                the same without the norm, which our loop looks at before it steps
    DDP, buffers apart          the same with what our engine sets: buffers not broadcast, gradients as views of buckets
    stage 0, 1, 2               our engine
    DeepSpeed alone, stage ...  deepspeed.initialize with nothing set but the stage
    stage 0, ...                our engine with synchronised BatchNorm, bf16 (and DDP with it), a compiled encoder

One rank, the whole loop but for logging: tiles of PatchCamelyon through reader, decoder and views (real), and batches
of the same kind that stay in memory (cached). Ratios are of turns in one round; what differs within one round is noise.
Memory is of processes of their own, one a contender: the most that a rank held beyond what its imports take (GPU: the
most that torch allocated).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import measure
import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from ssl_dist import config, dist, optim
from ssl_dist.config import Optim, Train
from ssl_dist.data.batch import Batch, View
from ssl_dist.data.loader import Loader
from ssl_dist.data.quarantine import Quarantine
from ssl_dist.data.reader import Reader
from ssl_dist.data.stream import Stream
from ssl_dist.engine import Engine
from ssl_dist.methods import simclr
from ssl_dist.models.batchnorm import synchronise
from ssl_dist.models.encoder import Encoder

WARM = 3                # steps of every turn that do not count
KEPT = 8                # batches in memory
OPTIM = Optim(name="adamw")
# Matrix products of bf16 a second, dense, by NVIDIA's data sheets.
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12}
GOALS = {"stage 0": 0.97, "real": 0.95}

Step = Callable[[Batch], Any]


def method(told: argparse.Namespace, *, together: bool = False, compiled: bool = False) -> simclr.Method:
    """SimCLR with the same weights every time."""
    torch.manual_seed(0)
    encoder = Encoder(told.model, {}, (0.5,) * 3, (0.5,) * 3)
    found = simclr.Method(simclr.Config(views=(View(count=2, size=told.size),)), encoder).to(told.device)
    if together:
        synchronise(found)
    if compiled:
        encoder.compile(dynamic=False)
    return found


def settings(batch: int, stage: int, precision: str) -> Train:
    return Train(run=Path("nowhere"), data=config.Data(shards=[], batch=batch * dist.world()), method={}, steps=1,
                 optim=OPTIM, zero=stage, precision=precision)


def ours(told: argparse.Namespace, batch: int, stage: int = 0, precision: str = "fp32", **how: Any) -> Step:
    """Our engine, as the loop uses it."""
    own = method(told, **how)
    engine = Engine(own, optim.build(own, OPTIM), config.deepspeed(settings(batch, stage, precision), dist.world()),
                    told.device)

    def step(tiles: Batch) -> None:
        engine.backward(engine(tiles, 0.5)["loss"])
        engine.gradient_norm()
        engine.step()
    return step


def ddp(told: argparse.Namespace, batch: int, precision: str = "fp32", *, norm: bool = True,       # noqa: ARG001
        **options: bool) -> Step:
    """What one writes without DeepSpeed."""
    own = method(told).to(memory_format=torch.channels_last)
    network: nn.Module = DistributedDataParallel(own, **options) if dist.world() > 1 else own
    optimizer = optim.build(own, OPTIM)

    def step(tiles: Batch) -> None:
        with torch.autocast(told.device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = network(tiles, 0.5)["loss"]
        loss.backward()
        if norm:
            float(torch.nn.utils.get_total_norm([each.grad for each in own.parameters() if each.grad is not None]))
        optimizer.step()
        optimizer.zero_grad()
    return step


def alone(told: argparse.Namespace, batch: int, stage: int) -> Step:
    """DeepSpeed with what it sets itself; its stages 1 and 2 find the norm when they step."""
    import deepspeed

    own = method(told)
    engine, *_ = deepspeed.initialize(model=own, optimizer=optim.build(own, OPTIM), dist_init_required=False, config={
        "train_micro_batch_size_per_gpu": batch, "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True, "steps_per_print": 2**31 - 1})
    if not stage:       # its flat gradients are of contiguous weights
        own.to(memory_format=torch.channels_last)

    def step(tiles: Batch) -> None:
        engine.backward(engine(tiles, 0.5)["loss"])
        if not stage:
            float(torch.nn.utils.get_total_norm([each.grad for each in own.parameters() if each.grad is not None]))
        engine.step()
    return step


def contenders(told: argparse.Namespace, batch: int, world: int) -> dict[str, Callable[[], Step]]:
    """By name, what makes a step; alone there are no stages."""
    found: dict[str, Callable[[], Step]] = {
        "DDP": partial(ddp, told, batch), "DDP, no norm": partial(ddp, told, batch, norm=False),
        "stage 0": partial(ours, told, batch)}
    if world > 1:
        found["DDP, buffers apart"] = partial(ddp, told, batch, broadcast_buffers=False, gradient_as_bucket_view=True)
        found |= {f"stage {stage}": partial(ours, told, batch, stage) for stage in (1, 2)}
        found["stage 0, synchronised BatchNorm"] = partial(ours, told, batch, together=True)
    found |= {f"DeepSpeed alone, stage {stage}": partial(alone, told, batch, stage)
              for stage in ((0, 1, 2) if world > 1 else (0,))}
    found |= {"DDP, bf16": partial(ddp, told, batch, "bf16"),
              "stage 0, bf16": partial(ours, told, batch, precision="bf16"),
              "stage 0, compiled": partial(ours, told, batch, compiled=True),
              "stage 0, bf16, compiled": partial(ours, told, batch, precision="bf16", compiled=True)}
    return found | {"DDP again": found["DDP"]}


# --- what a rank does

def rank(told: argparse.Namespace) -> None:
    """Measures with the other ranks what it is told to; rank 0 writes what came out."""
    dist.start(told.device)
    threads = max(1, measure.CORES // dist.world())
    torch.set_num_threads(threads)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    everyone = contenders(told, told.batch, dist.world())
    tiles = batches(told)
    if told.only:
        step = everyone[told.only]()
        for number in range(WARM):
            step(tiles[number % KEPT])
        own = torch.cuda.max_memory_allocated() if told.device.type == "cuda" else \
            1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held)
        found: dict[str, Any] = {"memory": max(dist.gather(own))}
    else:
        steps = {name: make() for name, make in everyone.items()}
        found = {"turns": turns(told, steps, tiles), "flops": flops(told, tiles[0]), "peaks": peaks(told)}
    if dist.rank() == 0:
        told.out.write_text(json.dumps(found))
    dist.stop()


def batches(told: argparse.Namespace) -> list[Batch]:
    numbers = np.random.default_rng(dist.rank())
    return [Batch([torch.from_numpy(numbers.integers(0, 256, (told.batch, told.size, told.size, 3), dtype=np.uint8))
                   for _ in range(2)], [], np.arange(told.batch), np.arange(told.batch)).to(told.device)
            for _ in range(KEPT)]


def turns(told: argparse.Namespace, steps: dict[str, Step], tiles: list[Batch]) -> dict[str, list[tuple]]:
    """Rounds of turns, each of as many steps as fill its seconds; all ranks' processor time."""
    found: dict[str, list[tuple]] = {name: [] for name in steps}
    counts = {}
    for name, step in steps.items():
        finish(told)                        # compiled ones compile here
        for _ in range(WARM):
            step(tiles[0])
        finish(told)
        started = time.perf_counter()
        for number in range(WARM):
            step(tiles[number % KEPT])
        finish(told)
        counts[name] = dist.first(max(WARM, round(told.seconds * WARM / (time.perf_counter() - started))))
    for number in range(told.rounds):
        for name, step in steps.items():
            for count in range(WARM):
                step(tiles[count % KEPT])
            finish(told)
            started, spent = time.perf_counter(), time.process_time()
            for count in range(counts[name]):
                step(tiles[count % KEPT])
            own = time.process_time() - spent
            finish(told)
            wall = time.perf_counter() - started
            found[name].append((counts[name] * told.batch * dist.world(), wall, sum(dist.gather(own))))
            if dist.rank() == 0:
                sys.stderr.write(f"round {number + 1} of {told.rounds}: {name}: {found[name][-1][0] / wall:,.0f}/s\n")
    return found


def finish(told: argparse.Namespace) -> None:
    if told.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def flops(told: argparse.Namespace, tiles: Batch) -> float:
    """Multiplications and additions of forward and backward, a tile."""
    own = method(told)
    with FlopCounterMode(display=False) as counter:
        own(tiles, 0.5)["loss"].backward()
    return counter.get_total_flops() / told.batch


def peaks(told: argparse.Namespace) -> dict[str, float]:
    """What all ranks could do a second: by the data sheet of a known GPU, else by matrix products at the same time."""
    if told.device.type == "cuda":
        name = torch.cuda.get_device_name()
        known = next((peak for part, peak in PEAKS.items() if part in name), None)
        return {"bf16": known * dist.world()} if known else {}
    found = {}
    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        matrix = torch.randn(2048, 2048).to(kind)
        matrix @ matrix
        seconds = []
        for _ in range(5):
            dist.barrier()
            started = time.perf_counter()
            matrix @ matrix
            seconds.append(time.perf_counter() - started)
        found[name] = sum(dist.gather(2 * 2048**3 / min(seconds)))
    return found


# --- one rank, with and without the data path

def loaded(told: argparse.Namespace, shards: list[Path], waits: list[float]) -> Iterator[Batch]:
    """Batches as the loop gets them; the seconds that each was waited for."""
    reader = Reader(shards)
    stream = Stream(reader.counts, seed=0, window=config.Data.window, batch=told.batch)
    with tempfile.TemporaryDirectory() as folder:
        loader = Loader(reader, stream, (View(size=told.size),) * 2, rank=0, world=1, device=told.device,
                        threads=measure.CORES, ahead=config.Data.ahead,
                        quarantine=Quarantine(Path(folder) / "quarantine.jsonl", 0))
        made, waited = loader.batches(0, 10**9), []
        try:
            while True:
                started = time.perf_counter()
                batch = next(made)
                waited.append(time.perf_counter() - started)
                yield batch
        finally:
            loader.close()
            waits += waited[measure.WARM:]


def one_rank(told: argparse.Namespace, shards: list[Path]) -> dict[str, Any]:
    """Real tiles against tiles in memory, with the same engine."""
    step = ours(told, told.batch, precision=told.precision)
    waits: list[float] = []
    few = loaded(told, shards, [])
    kept = [next(few) for _ in range(KEPT)]
    few.close()         # type: ignore[attr-defined]

    def cached() -> Iterator[Batch]:
        while True:
            yield from kept

    def trained(make: Callable[[], Iterator[Batch]]) -> measure.Batches:
        source = make()
        try:
            for tiles in source:
                step(tiles.to(told.device))
                yield told.batch
        finally:
            source.close()          # type: ignore[attr-defined]

    found = measure.interleave(
        {"cached": lambda: trained(cached), "real": lambda: trained(lambda: loaded(told, shards, waits)),
         "cached again": lambda: trained(cached)}, told.rounds, 1,
        torch.cuda.synchronize if told.device.type == "cuda" else lambda: None)
    rows = measure.summary(found, "cached")
    return {"batch": told.batch, "precision": told.precision, "contenders": rows, "goal": GOALS["real"],
            "data_wait": round(sum(waits) / sum(turn.wall for turn in found["real"]), 4)}


# --- the run

def together(told: argparse.Namespace, batch: int, folder: Path, only: str = "") -> dict[str, Any]:
    """What all ranks found, each a process of its own."""
    out = folder / "found.json"
    words = [sys.executable, __file__, "--batch", batch, "--model", told.model, "--size", told.size, "--rounds",
             told.rounds, "--seconds", told.seconds, "--out", out, "--only", only]
    free = str(29500 + os.getpid() % 1000)
    ranks = [subprocess.Popen([*map(str, words), "--rank", str(number)], env={
        **os.environ, "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(told.ranks),
        "LOCAL_WORLD_SIZE": str(told.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free,
        "OMP_NUM_THREADS": str(max(1, measure.CORES // told.ranks))}) for number in range(told.ranks)]
    codes = [process.wait() for process in ranks]
    if any(codes):
        raise RuntimeError(f"ranks ended with {codes}")
    return json.loads(out.read_text())


def of_ranks(told: argparse.Namespace, batch: int, folder: Path) -> dict[str, Any]:
    """One size of batch: rates, ratios, memory and share of the peak."""
    found = together(told, batch, folder)
    everyone = {name: [measure.Turn(*turn) for turn in own] for name, own in found["turns"].items()}
    rows = measure.summary(everyone, "DDP")
    for row in rows:
        precision = "bf16" if "bf16" in row["name"] or told.device.type == "cuda" else "fp32"
        if peak := found["peaks"].get(precision):
            row["peak_share"] = round(row["images_per_second"] * found["flops"] / peak, 3)
        if told.memory and row["name"] != "DDP again":
            row["memory_mb"] = round(together(told, batch, folder, row["name"])["memory"] / 2**20)
    return {"batch": batch, "flops_a_tile": found["flops"], "peaks": found["peaks"], "contenders": rows,
            "goal": GOALS["stage 0"]}


def plot(found: dict[str, Any]) -> Any:
    """Ratios of every contender, a dot a round; a panel for each size of batch, and one for the data path."""
    panels = [(f"{part['batch']} tiles a rank, {found['ranks']} ranks", part, "DDP") for part in found["of_ranks"]] + \
        [(f"{part['batch']} tiles, one rank, {part['precision']}", part, "cached") for part in found["one_rank"]]
    figure, axes = plt.subplots(len(panels), 1, layout="constrained", squeeze=False, figsize=(
        8, 0.6 + sum(0.5 + 0.26 * len(part["contenders"]) for _, part, _ in panels)), gridspec_kw={
            "height_ratios": [1 + len(part["contenders"]) for _, part, _ in panels]})
    for axis, (title, part, against) in zip(axes[:, 0], panels, strict=True):
        rows = part["contenders"][::-1]
        base = next(row["rounds"] for row in rows if row["name"] == against)
        for height, row in enumerate(rows):
            axis.barh(height, row["ratio"], color="#7a4f8a" if row["name"] in GOALS else "#b9b3bd")
            axis.plot([own / other for own, other in zip(row["rounds"], base, strict=True)], [height] * len(base), ".",
                      color="black", markersize=3)
        axis.axvline(part["goal"], color="black", linewidth=0.6, linestyle=":")
        axis.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
        axis.set_title(f"{title}: images a second against {against}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Runs the rounds, appends the result and its plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=6.0, help="of a turn")
    parser.add_argument("--batches", default="32,128", help="tiles a rank")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=64, help="pixels of a view")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="memory as well")
    parser.add_argument("--results", type=Path, default=measure.RESULTS, help="folder to write to")
    for hidden, kind in (("--rank", int), ("--batch", int), ("--out", Path), ("--only", str)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    told = parser.parse_args()
    told.device = dist.device(told.device)
    if told.rank is not None:
        rank(told)
        return
    found: dict[str, Any] = measure.machine("deepspeed", "timm")
    with tempfile.TemporaryDirectory() as folder:
        sizes = [int(word) for word in told.batches.split(",")]
        found |= {"model": told.model, "size": told.size, "ranks": told.ranks, "rounds": told.rounds,
                  "seconds": told.seconds, "device": told.device.type,
                  "of_ranks": [of_ranks(told, size, Path(folder)) for size in sizes], "one_rank": []}
        dist.start(told.device)
        torch.set_num_threads(measure.CORES)
        shards = measure.shards("pcam", Path(folder))
        found["tile"] = measure.described("pcam", measure.everything(shards)[1])
        for told.batch, told.precision in ((size, kind) for size in sizes for kind in ("fp32", "bf16")):
            found["one_rank"].append(one_rank(told, shards))
        dist.stop()
    sys.stderr.write(f"{measure.keep(found, 'train', plot, told.results)}\n")


if __name__ == "__main__":
    main()
