"""A run in a notebook: its metrics as arrays, its curves as a figure, its encoder ready to look at tiles."""

import difflib
import html
import io
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ssl_dist import status
from ssl_dist.report import collect

if TYPE_CHECKING:       # torch and matplotlib are imported when they are asked for, and not before
    from matplotlib.figure import Figure

    from ssl_dist.models.encoder import Encoder

PLOTTED = ("loss", "lr", "images_per_second", "data_wait")
COLUMNS, WIDE, HIGH = 2, 5.0, 2.8       # of a figure; inches a curve
INK = "#55408f"                         # the report's


class RunError(ValueError):
    """What a run folder does not hold, or not yet."""

    exit_code = 2


class Run:
    """A run folder. Nothing is kept: whatever is asked for is read anew, so that a run may be watched while it goes."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder)
        if not self.path.is_dir():
            raise RunError(f"{self.path} is no folder (looked in {Path.cwd()}); give the one that `ssl-dist train … "
                           "run=FOLDER` wrote, for example runs/first")
        status.read(self.path)      # refuses what is no run's

    @property
    def metrics(self) -> dict[str, np.ndarray]:
        """The columns of metrics.jsonl, a value a step and NaN where a row has none; what was done twice as it was
        the second time. `pandas.DataFrame(run.metrics)` is a table of them."""
        rows = collect.metric_rows(self.path / "metrics.jsonl", [])
        if not rows:
            raise RunError(f"{self} has no metrics yet: nothing is logged before step log.every; look again later, or "
                           "start the same command again if it has ended")
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: np.array([row.get(name, math.nan) for row in rows]) for name in names}
        return {**columns, "step": columns["step"].astype(np.int64)}

    def plot(self, *names: str) -> "Figure":
        """Curves by step: loss, learning rate, images a second and the time spent waiting for data, or what is named.
        A dotted line is where an attempt took over from the one before it."""
        # Not pyplot's figure, which it would keep, and show a second time.
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter

        from ssl_dist.report import page

        metrics = self.metrics
        for name in names:
            if name not in metrics:
                close = difflib.get_close_matches(name, metrics, n=1)
                raise RunError(f"{self.path} has no metric {name!r}" + (f", but {close[0]}" if close else "")
                               + f"; it has {', '.join(metrics)}")
        shown = names or [name for name in PLOTTED if name in metrics] or list(metrics)
        wide = min(COLUMNS, len(shown))
        high = math.ceil(len(shown) / wide)
        figure = Figure(figsize=(WIDE * wide, HIGH * high), layout="constrained")
        places = list(figure.subplots(high, wide, squeeze=False).flat)
        begun = [each.get("from_step") for each in status.read(self.path).attempts[1:]]
        for unused in places[len(shown):]:
            unused.remove()
        marker = "." if len(metrics["step"]) < 12 else ""       # a lone point has no line to be seen by
        for name, place in zip(shown, places, strict=False):
            place.plot(metrics["step"], metrics[name], color=INK, lw=1.2, marker=marker)
            place.set_title(page.TITLES.get(name, name.replace("_", " ")), loc="left", fontsize="medium")
            place.spines[["top", "right"]].set_visible(False)
            place.grid(axis="y", alpha=0.3)
            if name in page.FRACTIONS:
                place.yaxis.set_major_formatter(PercentFormatter(1))
            for number, step in enumerate(begun, 2):
                if step is not None:
                    place.axvline(step, color="grey", lw=0.8, ls=":")
                    place.annotate(str(number), (step, 1), xycoords=("data", "axes fraction"), xytext=(2, -8),
                                   textcoords="offset points", fontsize="x-small", color="grey")
        figure.supxlabel("step", fontsize="small")
        # A notebook that has not imported pyplot would show the figure's name, and not the figure.
        figure._repr_png_ = lambda: _png(figure)        # type: ignore[attr-defined]
        return figure

    def encoder(self) -> "Encoder":
        """The exported encoder with its weights, in evaluation mode: uint8 tiles (B, H, W, 3) -> vectors (B, D)."""
        home = self.path / "encoder"
        if not home.is_dir():
            raise RunError(f"{self} has no encoder yet: it is written when a run ends; let it train, or write what it "
                           f"has learnt so far: ssl-dist export {self.path}")
        from ssl_dist.models import encoder as encoders

        return encoders.load(home).eval()

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """What evaluations wrote, by name; empty before `ssl-dist eval`. A file that cannot be read is warned of."""
        notes: list[str] = []
        found = {file.stem: collect.json_object(file, notes) for file in sorted((self.path / "eval").glob("*.json"))}
        for words in notes:
            warnings.warn(f"{self.path}: {words}", stacklevel=2)
        return {name: result for name, result in found.items() if result}

    def __repr__(self) -> str:
        one = status.read(self.path)
        loss = "" if one.loss is None else f", loss {one.loss:.4g}"
        return f"{self.path}: {one.state}, step {one.step:,} of {one.steps:,}{loss}"

    def _repr_html_(self) -> str:
        return f"<code>{html.escape(repr(self))}</code>"


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
