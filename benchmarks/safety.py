"""What safety costs: of the time of a training step, the part of the watch, the ledger, digests and checkpoints.

    python benchmarks/safety.py [--rounds N] [--steps N] [--batch N] [--model resnet18]

One process, SimCLR on tiles that stay in memory. A machine's steps differ by several per cent from one to the next, and
what is looked for is far less: so every piece is timed where it runs, and the watching thread by its processor time.

    watch           named points, statistics that can be put back, what ranks agree on, signs of life
    ledger          every sample written down
    digests         the checksum of every tile taken, as the reader does
    checkpoints     what turns with a checkpoint, written beside the steps and published, take more than turns without,
                    as a part of the default interval: 500 steps or 15 minutes, whichever is less
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch

from ssl_dist import checkpoint, config, dist, finite, lock, optim, points, watch
from ssl_dist.config import Optim, Train
from ssl_dist.data.batch import Batch, View
from ssl_dist.data.reader import Reader
from ssl_dist.engine import Engine
from ssl_dist.log import Ledger
from ssl_dist.methods import simclr
from ssl_dist.models.encoder import Encoder

SIZE = 64
PIECES = ("watch", "ledger", "digests")
GOALS = {"ledger, watch and digests": 0.01, "checkpoints": 0.02}
INTERVAL = 500, 15 * 60         # steps and seconds between two checkpoints, the defaults


class Loop:
    """One training loop, of which parts can be left out."""

    def __init__(self, told: argparse.Namespace, folder: Path, reader: Reader):
        self.cpu, self.folder, self.reader = torch.device("cpu"), folder, reader
        torch.manual_seed(0)
        encoder = Encoder(told.model, {}, (0.5,) * 3, (0.5,) * 3)
        self.method = simclr.Method(simclr.Config(views=(View(count=2, size=SIZE),)), encoder)
        settings = Train(run=folder, data=config.Data(shards=[], batch=told.batch), method={}, steps=1)
        self.engine = Engine(self.method, optim.build(self.method, Optim()), config.deepspeed(settings, 1), self.cpu)
        self.spent = dict.fromkeys(PIECES, 0.0)
        self.owner = lock.Owner(folder, "benchmark")
        self.owner.write()
        self.statistics, self.ledger = finite.Statistics(self.method), Ledger(folder, reader, self.owner.check)
        self.saver = checkpoint.Saver(folder / "checkpoints", self.engine, config.Checkpoint(), self.owner.check)
        numbers, rows = np.random.default_rng(0), reader.all_rows()
        self.rows = [np.sort(numbers.choice(rows, told.batch, replace=False)) for _ in range(4)]
        self.encoded = [reader.read(rows) for rows in self.rows]
        self.batches = [Batch([torch.from_numpy(numbers.integers(0, 256, (told.batch, SIZE, SIZE, 3), dtype=np.uint8))
                               for _ in range(2)], [], rows, np.arange(told.batch)) for rows in self.rows]

    def step(self, number: int) -> None:
        """As train.py goes through it."""
        batch = self.batches[number % 4]
        with self.piece("watch"):
            points.alone.begins()
            points.at("data.next", number)
            self.statistics.keep()
            points.at("step.forward", number)
        with self.piece("digests"):
            for image in self.encoded[number % 4]:
                zlib.crc32(image)
        loss = self.engine(batch, 0.5)["loss"]
        with self.piece("watch"):
            points.at("step.backward", number)
            points.alone.meets()
        self.engine.backward(loss)
        value = float(loss.detach())        # the loop without a watch would look at it, too
        with self.piece("watch"):
            points.at("step.agree", number)
            dist.largest([0.0, float(self.saver.due()), float(self.saver.writing), float(value < 0)], self.cpu)
        self.engine.gradient_norm()
        with self.piece("watch"):
            points.at("step.update", number)
        self.engine.step()
        with self.piece("watch"):
            points.at("step.after", number)
        with self.piece("ledger"):
            self.ledger.write(number, batch)

    @contextlib.contextmanager
    def piece(self, name: str) -> Iterator[None]:
        """Counts what is spent in the block."""
        since = time.perf_counter()
        yield
        self.spent[name] += time.perf_counter() - since

    def turn(self, steps: int, *, saved: bool) -> dict[str, float]:
        """Seconds of so many steps, and of the pieces in them."""
        one = watch.Watch(self.folder, 0, 1, hang=600, grace=25, owner=self.owner,
                          account=lambda *_: None)
        for number in range(2):
            self.step(number)
        self.spent = dict.fromkeys(PIECES, 0.0)
        clock = time.pthread_getcpuclockid(one._thread.ident or 0)
        started, before = time.perf_counter(), time.clock_gettime(clock)
        if saved:
            self.saver.begin(0, {})
        for number in range(steps):
            self.step(number)
            if self.saver.pending and not self.saver.writing:
                self.saver.publish()
        if self.saver.pending:
            self.saver.publish()
        self.spent["watch"] += time.clock_gettime(clock) - before
        found = {**self.spent, "seconds": time.perf_counter() - started}
        one.close()
        return found


def draw(found: dict[str, Any]) -> Any:
    """What each costs, a dot a round, against its bound."""
    figure, axis = measure.plt.subplots(figsize=(8, 2.4), layout="constrained")
    for height, row in enumerate(found["costs"][::-1]):
        axis.barh(height, 100 * row["share"], color="#7a4f8a")
        axis.plot([100 * each for each in row["rounds"]], [height] * len(row["rounds"]), ".", color="black",
                  markersize=3)
    axis.set_yticks(range(len(found["costs"])), [row["name"] for row in found["costs"]][::-1], fontsize=8)
    axis.axvline(0, color="black", linewidth=0.6)
    axis.set(xlabel="% of the time of training, less is better")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def costs(plain: list[dict[str, float]], saved: list[dict[str, float]], steps: int) -> list[dict[str, Any]]:
    """Shares of the time of training, a figure a round."""
    rounds = {name: [turn[name] / turn["seconds"] for turn in plain] for name in PIECES}
    step = statistics.median(turn["seconds"] for turn in plain) / steps
    interval = min(INTERVAL[0], INTERVAL[1] / step) * step
    rounds["checkpoints"] = [(own["seconds"] - other["seconds"]) / interval
                             for own, other in zip(saved, plain, strict=True)]
    return [{"name": name, "share": round(statistics.median(own), 5), "rounds": [round(each, 5) for each in own]}
            for name, own in rounds.items()] + [{"interval": round(interval, 1)}]


def main() -> None:
    """Runs the rounds, appends the result and its plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="of a turn")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--model", default="resnet18")
    told = parser.parse_args()
    found: dict[str, Any] = {**measure.machine("deepspeed", "timm"), "model": told.model, "batch": told.batch,
                             "size": SIZE, "steps": told.steps, "rounds": told.rounds, "goals": GOALS}
    with tempfile.TemporaryDirectory() as folder:
        dist.start(torch.device("cpu"))
        torch.set_num_threads(measure.CORES)
        reader = Reader(measure.shards("pcam", Path(folder)))
        loop = Loop(told, Path(folder), reader)
        plain, saved = [], []
        for number in range(told.rounds):
            plain.append(loop.turn(told.steps, saved=False))
            saved.append(loop.turn(told.steps, saved=True))
            sys.stderr.write(f"round {number + 1} of {told.rounds}: {plain[-1]}\n")
        dist.stop()
    *rows, last = costs(plain, saved, told.steps)
    found |= {"costs": rows, **last,
              "step": round(statistics.median(turn["seconds"] for turn in plain) / told.steps, 4),
              "bytes": sum(each.numel() * 4 for each in loop.method.parameters()) * 3}
    sys.stderr.write(f"{measure.keep(found, 'safety', draw, measure.RESULTS)}\n")


if __name__ == "__main__":
    main()
