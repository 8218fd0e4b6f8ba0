"""What safety costs: the training step with the ledger, the watch, digests and checkpoints, and without.

    python benchmarks/safety.py [--rounds N] [--seconds S] [--batch N] [--model resnet18] [--every N]

One process, SimCLR on tiles of PatchCamelyon that stay in memory, contenders in turns:

    bare            forward, backward, gradient norm, step
    watched         with named points, statistics that can be put back, what ranks agree on, and the watching thread
    ledger          watched, and every sample written down
    digests         watched, and the checksum of every tile taken, as the reader does
    saved           watched, and a checkpoint begun at the start of the turn, written beside it and published

A turn of `saved` is told as what one checkpoint adds, in steps: the default writes one in 500 steps or 15 minutes,
whichever is less.
"""

import argparse
import statistics
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch

from ssl_dist import checkpoint, config, dist, finite, optim, points, watch
from ssl_dist.config import Optim, Train
from ssl_dist.data.batch import Batch, View
from ssl_dist.data.reader import Reader
from ssl_dist.engine import Engine
from ssl_dist.log import Ledger
from ssl_dist.methods import simclr
from ssl_dist.models.encoder import Encoder

SIZE = 64
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
        self.statistics, self.ledger = finite.Statistics(self.method), Ledger(folder, reader)
        self.saver = checkpoint.Saver(folder / "checkpoints", self.engine, config.Checkpoint())
        numbers, rows = np.random.default_rng(0), reader.all_rows()
        self.rows = [np.sort(numbers.choice(rows, told.batch, replace=False)) for _ in range(4)]
        self.encoded = [reader.read(rows) for rows in self.rows]
        self.batches = [Batch([torch.from_numpy(numbers.integers(0, 256, (told.batch, SIZE, SIZE, 3), dtype=np.uint8))
                               for _ in range(2)], [], rows, np.arange(told.batch)) for rows in self.rows]

    def step(self, number: int, *, watched: bool = True, ledger: bool = False, digests: bool = False) -> None:
        """As train.py goes through it."""
        batch = self.batches[number % 4]
        if watched:
            points.alone.begins()
            points.at("data.next", number)
            self.statistics.keep()
            points.at("step.forward", number)
        if digests:
            for image in self.encoded[number % 4]:
                zlib.crc32(image)
        loss = self.engine(batch, 0.5)["loss"]
        if watched:
            points.at("step.backward", number)
            points.alone.meets()
        self.engine.backward(loss)
        if watched:
            points.at("step.agree", number)
            dist.largest([0.0, float(self.saver.due()), float(self.saver.writing), float(loss.detach()) < 0], self.cpu)
        self.engine.gradient_norm()
        if watched:
            points.at("step.update", number)
        self.engine.step()
        if watched:
            points.at("step.after", number)
        if ledger:
            self.ledger.write(number, batch)

    def turn(self, name: str, steps: int) -> float:
        """Seconds of so many steps, and of all that belongs to them."""
        one = None if name == "bare" else watch.Watch(self.folder, 0, 1, hang=600, grace=25, account=lambda *_: None)
        for number in range(2):
            self.step(number)
        started = time.perf_counter()
        if name == "saved":
            self.saver.begin(0, {})
        for number in range(steps):
            self.step(number, watched=name != "bare", ledger=name == "ledger", digests=name == "digests")
            if self.saver.pending and not self.saver.writing:
                self.saver.publish()
        if self.saver.pending:
            self.saver.publish()
        seconds = time.perf_counter() - started
        if one:
            one.close()
        return seconds


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


def costs(turns: dict[str, list[float]], steps: int) -> list[dict[str, Any]]:
    """Shares of the time of training, each against the turn before it in the same round."""
    found = []
    for name, against in (("watched", "bare"), ("ledger", "watched"), ("digests", "watched")):
        rounds = [own / other - 1 for own, other in zip(turns[name], turns[against], strict=True)]
        found.append({"name": name, "share": round(statistics.median(rounds), 4), "rounds": [round(each, 4)
                                                                                             for each in rounds]})
    step = statistics.median(turns["watched"]) / steps
    interval = min(INTERVAL[0], INTERVAL[1] / step) * step
    rounds = [(own - other) / interval for own, other in zip(turns["saved"], turns["watched"], strict=True)]
    found.append({"name": "saved", "share": round(statistics.median(rounds), 4),
                  "rounds": [round(each, 4) for each in rounds], "interval": round(interval, 1),
                  "seconds_a_checkpoint": round(statistics.median(rounds) * interval, 3)})
    return found


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
        turns: dict[str, list[float]] = {name: [] for name in ("bare", "watched", "ledger", "digests", "saved")}
        for number in range(told.rounds):
            for name, own in turns.items():
                own.append(loop.turn(name, told.steps))
                sys.stderr.write(f"round {number + 1} of {told.rounds}: {name}: {own[-1]:.3f} s\n")
        dist.stop()
    found |= {"turns": turns, "costs": costs(turns, told.steps),
              "step": round(statistics.median(turns["watched"]) / told.steps, 4),
              "bytes": sum(each.numel() * 4 for each in loop.method.parameters()) * 3}
    sys.stderr.write(f"{measure.keep(found, 'safety', draw, measure.RESULTS)}\n")


if __name__ == "__main__":
    main()
