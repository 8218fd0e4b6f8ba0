"""What the benchmarks share: real tiles to measure on, contenders in turns, and what a result says of its machine."""

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import simplejpeg

from shards import synthetic
from ssl_dist import run
from ssl_dist.data.reader import Reader

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"
DATA = Path(os.environ.get("SSL_DIST_DATA", "../shared/data"))
CORES = len(os.sched_getaffinity(0))
PAINTED = 6             # slides of 4096 pixels: some 900 tiles
WARM = 10               # batches of a turn that do not count: the first wait for threads and processes to start, and
                        # while they are looked at, others are made ahead (as many as worker processes keep: 6)
LOOK = 2                # of them
LEAST, LIMIT = 3.0, 20.0        # seconds that a turn lasts, whatever it was asked for

# Tiles by name: what `ssl-dist shard` is told of each folder. Regions and slides are cut to 256 pixels, at the
# resolution that they have.
TILES: dict[str, list[dict[str, Any]]] = {
    "monuseg": [{"dataset": "monuseg", "source": "monuseg2018", "kind": "regions", "slide_mpp": 0.25, "mpp": 0.25,
                 "skip": "mask"},
                {"dataset": "osteosarcoma", "source": "osteosarcoma_tcia_1024px", "kind": "regions", "slide_mpp": 1.0,
                 "mpp": 1.0}],
    "pcam": [{"dataset": "pcam", "source": "pcam_subset_96px", "kind": "tiles", "mpp": 1.0}],
    "slides": [{"dataset": "slides", "source": "wsi_svs", "kind": "slides", "slide_mpp": 0.5, "mpp": 0.5}],
    "painted": [{"dataset": "painted", "source": "painted", "kind": "slides", "mpp": 0.5}],
}


# Processes of its own: each slide is cut in one, and would import all that a benchmark does.
SHARD = """
import json, sys
from pathlib import Path
from shards import write
told = json.loads(sys.argv[1])
write.write(write.Settings(**{**told, "source": Path(told["source"]), "out": Path(told["out"])}))
"""


def shard(**told: Any) -> Path:
    """Writes one shard folder, its tars in the page cache."""
    told = {"workers": CORES, **told}
    subprocess.run([sys.executable, "-c", SHARD, json.dumps(told, default=str)], check=True)
    for path in Path(told["out"]).glob("*.tar"):
        path.read_bytes()
    return Path(told["out"])


def shards(kind: str, folder: Path) -> list[Path]:
    """The shard folders of one kind of tiles, written below `folder`."""
    source = DATA
    if kind == "painted":
        source = folder / "source"
        synthetic.write_cohort(source / "painted", patients=PAINTED, size=4096, test_patients=0)
    # Small tars: every worker process of every contender gets some.
    return [shard(**{**told, "source": source / told["source"], "out": folder / told["dataset"], "tar_samples": 64})
            for told in TILES[kind]]


def everything(folders: list[Path]) -> tuple[np.ndarray, list[np.ndarray]]:
    """All tiles of shard folders in random order: rows of the catalogue, and bytes."""
    reader = Reader(folders)
    rows = np.random.default_rng(0).permutation(reader.all_rows())
    encoded = reader.read(rows)
    reader.close()
    return rows, encoded


def described(kind: str, encoded: list[np.ndarray]) -> dict[str, Any]:
    """What a result says of its tiles."""
    headers = [simplejpeg.decode_jpeg_header(each) for each in encoded]     # height, width, colour space, subsampling
    sizes = Counter(f"{width} x {height}" for height, width, _, _ in headers)
    return {"kind": kind, "real": kind != "painted", "pixels": sizes.most_common(1)[0][0],
            "bytes": round(statistics.mean(len(each) for each in encoded)),
            "subsampling": dict(Counter(str(header[3]) for header in headers))}


def machine(*packages: str) -> dict[str, Any]:
    """Date, processor, versions and load: what a figure means nothing without."""
    environment = run.environment()
    versions = environment["packages"] | {package: importlib.metadata.version(package) for package in packages}
    return {"date": f"{datetime.now(UTC):%Y-%m-%d}", "cpu": environment["cpu"], "cpus": environment["cpus"],
            "gpus": environment["gpus"], "python": environment["python"], "versions": versions,
            "load_before": os.getloadavg()}


def keep(found: dict[str, Any], prefix: str, draw: Callable[[dict[str, Any]], Any], folder: Path) -> Path:
    """Writes a result and its plot; returns the result's path. Results are only ever added."""
    stem = f"{prefix}_{datetime.now(UTC):%Y%m%dT%H%M%S}"
    found |= {"load_after": os.getloadavg(), "plot": f"{stem}.png"}
    draw(found).savefig(folder / found["plot"], dpi=110)
    plt.close("all")
    path = folder / f"{stem}.json"
    path.write_text(json.dumps(found, indent=2) + "\n")
    return path


# --- turns

Batches = Iterator[int]         # an endless supply, begun anew for each turn; each item is how many tiles were made


@dataclass(frozen=True)
class Turn:
    """One turn of one contender: tiles, and the seconds that they took by the clock and of all its processes' cores."""

    tiles: int
    wall: float
    cpu: float

    @property
    def rate(self) -> float:
        return self.tiles / self.wall

    @property
    def rate_cpu(self) -> float:
        return self.tiles / self.cpu


def interleave(contenders: dict[str, Callable[[], Batches]], rounds: int, steps: int,
               finish: Callable[[], None] = lambda: None) -> dict[str, list[Turn]]:
    """Turns of all contenders, A B C A B C: what else the machine does meanwhile hits all of them alike."""
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, start in contenders.items():
            turns[name].append(turn(start(), steps, finish))
            sys.stderr.write(f"round {number + 1} of {rounds}: {name}: {turns[name][-1].rate:,.0f}/s, "
                             f"{turns[name][-1].rate_cpu:,.0f} a CPU-second\n")
    return turns


def turn(batches: Batches, steps: int, finish: Callable[[], None] = lambda: None) -> Turn:
    """`steps` batches or more, from when all is running to before it ends; `finish` waits for what is under way.

    A turn ends its threads and processes: what one contender prepares ahead would otherwise be made in another's time.
    """
    threads, before = threading.active_count(), set(children())
    for _ in range(WARM):
        next(batches)
    finish()
    tiles, made, passed, started, spent = 0, 0, 0.0, time.perf_counter(), cpu_seconds()
    while (made < steps or passed < LEAST) and passed < LIMIT:
        tiles += next(batches)
        made, passed = made + 1, time.perf_counter() - started
    finish()
    found = Turn(tiles, time.perf_counter() - started, cpu_seconds() - spent)
    batches.close()         # type: ignore[attr-defined]
    waited = time.perf_counter()
    while (left := set(children()) - before) or threading.active_count() > threads:
        assert time.perf_counter() - waited < 30, f"left behind: {threading.enumerate()}, processes {left}"
        time.sleep(0.01)
    return found


def children() -> list[int]:
    """All processes that this one started, and that they started, and so on."""
    found, todo = [], [os.getpid()]
    while todo:
        for path in Path(f"/proc/{todo.pop()}/task").glob("*/children"):
            try:
                found += (new := [int(word) for word in path.read_text().split()])
            except OSError:         # it ended meanwhile
                continue
            todo += new
    return found


def cpu_seconds() -> float:
    """Of this process and of those that it started, as they run: rusage would know of them only once they ended."""
    ticks = 0
    for process in children():
        try:
            after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += sum(int(word) for word in after_name[11:15])       # utime, stime, and those of children waited for
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def summary(turns: dict[str, list[Turn]], against: str) -> list[dict[str, Any]]:
    """A row a contender: medians and quartiles of its rates, and of its ratios to another's turn in the same round."""
    rows = []
    for name, own in turns.items():
        row: dict[str, Any] = {"name": name}
        for key, rate in (("", Turn.rate.fget), ("cpu_", Turn.rate_cpu.fget)):      # type: ignore[attr-defined]
            rates = [rate(each) for each in own]
            ratios = [rate(each) / rate(base) for each, base in zip(own, turns[against], strict=True)]
            row |= {"images_per_cpu_second" if key else "images_per_second": round(statistics.median(rates), 1),
                    f"{key}ratio": round(statistics.median(ratios), 3),
                    f"{key}ratio_quartiles": [round(value, 3) for value in quartiles(ratios)],
                    f"{key}rounds": [round(value, 1) for value in rates]}
        rows.append(row)
    return rows


def quartiles(values: list[float]) -> list[float]:
    """The lower and the upper quartile; of few rounds, what lies between them."""
    return [float(value) for value in np.percentile(values, [25, 75])]
