"""What a run shows while it goes: metrics.jsonl, TensorBoard, a bar, and the clock behind their figures."""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from shards import folder
from ssl_dist import dist
from ssl_dist.data.batch import Batch
from ssl_dist.data.reader import Reader

logger = logging.getLogger(__name__)


class Clock:
    """How long a step waits for its data, and how long it takes."""

    def __init__(self) -> None:
        self.started = self._mark = time.perf_counter()
        self._waited = self._longest = 0.0
        self._steps = 0

    def waits(self, since: float) -> None:
        """The wait for a batch that began at `since` is over."""
        waited = time.perf_counter() - since
        self._waited, self._longest = self._waited + waited, max(self._longest, waited)
        self._steps += 1

    def read(self, batch: int) -> dict[str, float]:
        """Figures since the last reading; a new reading begins."""
        elapsed = max(time.perf_counter() - self._mark, 1e-9)
        figures = {"images_per_second": self._steps * batch / elapsed, "data_wait": self._waited / elapsed,
                   "data_wait_longest": self._longest, "time": time.perf_counter() - self.started}
        self._mark, self._waited, self._longest, self._steps = time.perf_counter(), 0.0, 0.0, 0
        return figures


class Log:
    """Rank 0's record of a run; on other ranks every call does nothing."""

    def __init__(self, run: Path, steps: int, start: int, check: Callable[[], None] = lambda: None,
                 samples: str = "images"):
        """`start`: steps that are done. `check` refuses to write where the folder is no longer ours. `samples`: what
        is counted, in words."""
        self._jsonl: IO[str] | None = None
        self._board: SummaryWriter | None = None
        self._bar: Progress | None = None
        self._told = self._blank = False
        self._check, self._samples = check, samples
        if dist.rank():
            return
        self._run = run
        self.goes_back(start)
        console = Console(file=sys.stderr)
        self._console, self._steps = console, steps
        self._bar = Progress(TextColumn("[bold]train"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                             TextColumn("{task.fields[figures]}"), console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("train", total=steps, completed=start, figures="")
        self._bar.start()

    def goes_back(self, step: int) -> None:
        """What was written of later steps, by a killed attempt or by this one, is told and drawn no more."""
        if dist.rank():
            return
        self._check()
        if self._jsonl is not None and self._board is not None:
            self._jsonl.close()
            with self._board_may_be_lost(step):
                self._board.close()
        _purge(self._run / "metrics.jsonl", step)
        self._jsonl = (self._run / "metrics.jsonl").open("a", buffering=1)
        self._board = SummaryWriter(str(self._run / "tb"), purge_step=step + 1)

    def advance(self, step: int) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def write(self, step: int, row: dict[str, Any]) -> None:
        """One line of metrics, with its step inside."""
        if self._jsonl is None or self._board is None or self._bar is None:
            return
        try:
            self._check()
            self._jsonl.write(json.dumps({"step": step, **{name: _short(value) for name, value in row.items()}}) + "\n")
        except OSError as error:        # a full disk costs rows, and not the run
            self._lost(error, step)
        with self._board_may_be_lost(step):
            for name, value in row.items():
                self._board.add_scalar(name, value, step)
        figures = (f"loss {row['loss']:.3f}  {row['images_per_second']:.0f} {self._samples}/s  "
                   f"waiting {row['data_wait']:.0%}")
        self._bar.update(self._task, figures=figures)
        if not self._console.is_terminal:       # a file or a SLURM log: one plain line now and then
            self._console.print(f"step {step}/{self._steps}  {figures}", highlight=False)

    @contextlib.contextmanager
    def _board_may_be_lost(self, step: int) -> Iterator[None]:
        """TensorBoard keeps what a full disk told its thread, and raises it at the next call; no run ends by that."""
        try:
            yield
        except OSError as error:
            if not self._blank:
                logger.warning("TensorBoard has nothing from step %d on (%s); training goes on", step, error.strerror)
            self._blank = True

    def _lost(self, error: OSError, step: int) -> None:
        if not self._told:
            logger.warning("rows from step %d on are not in metrics.jsonl (%s); training goes on", step, error.strerror)
        self._told = True

    def warn(self, words: str, step: int) -> None:
        """A warning for the person, the log file and TensorBoard."""
        if self._board is not None:
            logger.warning("step %d: %s", step, words)
            with self._board_may_be_lost(step):
                self._board.add_text("warnings", words, step)

    def text(self, name: str, words: str, step: int) -> None:
        """Words for TensorBoard, as they are laid out."""
        if self._board is not None:
            with self._board_may_be_lost(step):
                self._board.add_text(name, "".join(f"    {line}\n" for line in words.splitlines()), step)

    def picture(self, name: str, pixels_HW3: Any, step: int) -> None:
        """A picture for TensorBoard."""
        if self._board is not None:
            with self._board_may_be_lost(step):
                self._board.add_image(name, pixels_HW3, step, dataformats="HWC")

    def close(self) -> None:
        """Writes out what is buffered."""
        if self._jsonl is not None and self._board is not None and self._bar is not None:
            self._bar.stop()
            with self._board_may_be_lost(self._steps):
                self._board.close()
            with contextlib.suppress(OSError):
                self._jsonl.close()


class Ledger:
    """Every sample this rank saw, a line each: what proves that a resumed run missed nothing."""

    def __init__(self, path: Path, reader: Reader, check: Callable[[], None] = lambda: None):
        self._reader, self._check = reader, check
        self._file = folder.make(path / "ledger") / f"rank-{dist.rank():05d}.jsonl"

    def write(self, step: int, batch: Batch) -> None:
        """The samples of one step."""
        self._check()
        keys = self._reader.column("key", batch.rows)
        with self._file.open("a") as handle:
            handle.writelines(json.dumps({"step": step, "position": position, "key": key}) + "\n"
                              for position, key in zip(batch.positions.tolist(), keys, strict=True))


def _purge(path: Path, start: int) -> None:
    """Takes out the rows of steps after `start`, and what a full disk or a kill left torn."""
    with contextlib.suppress(FileNotFoundError):
        lines = path.read_text(errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if _step(line) <= start]
        if kept != lines:
            try:
                folder.write(path, "".join(kept))
            except OSError as error:        # a full disk costs order, and not the run
                logger.warning("%s still has rows of steps after %d: %s", path, start, error)


def _step(line: str) -> float:
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _short(value: Any) -> Any:
    return float(f"{value:.7g}") if isinstance(value, float) else value
