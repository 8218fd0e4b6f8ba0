"""Plain data -> one HTML page that needs nothing else: no network, no script, pictures and curves inside."""

import base64
import io
import json
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from ssl_dist.report import chart, collect

PICTURE_WIDTH = 1400  # pixels: two for every CSS pixel of the page's column, nearly
PICTURE_BYTES = 400_000  # a PNG above this is embedded as a JPEG
CURVES = 24
REASONS = 12
SHEETS, OVERLAYS, PICTURES = 4, 4, 8  # embedded at most: of a shard folder, of a run or an evaluation
COLUMNS = 8  # of a dataset card
MATRIX = 30  # classes of a confusion matrix that a reader can still see
FIRST = ("loss", "lr", "images_per_second", "data_wait", "grad_norm")
TITLES = {
    "lr": "learning rate",
    "images_per_second": "images / s",
    "data_wait": "time spent waiting for data",
    "grad_norm": "gradient norm",
}
FRACTIONS = {"data_wait"}
FROM_ZERO = {"lr", "images_per_second", "data_wait"}


@dataclass
class Figure:
    """A picture inside the page, or the reason why it is not."""

    name: str
    source: str
    width: int
    problem: str


@dataclass
class Score:
    """One metric of one evaluation beside its baselines, in the unit it is read in."""

    evaluation: str
    metric: str
    value: float
    baselines: dict[str, float]
    fraction: bool
    interval: tuple[float, float] | None = None
    chances: dict[str, float] = field(default_factory=dict)  # by baseline

    def better(self, baseline: str) -> bool:
        """Whether the encoder is the better one: of errors the smaller is."""
        return (self.points(baseline) < 0) if "error" in self.metric else (self.points(baseline) > 0)

    def points(self, baseline: str) -> float:
        """The difference: percentage points for fractions, the metric's own unit otherwise."""
        return (self.value - self.baselines[baseline]) * (100 if self.fraction else 1)


def write(runs: list[Path], out: Path) -> Path:
    """Read the run folders and write the page; `out` is the old page or the new one, never half of one."""
    out = Path(out)
    html = render(collect.runs([Path(folder) for folder in runs]))
    out.parent.mkdir(parents=True, exist_ok=True)
    half = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        half.write_text(html, encoding="utf-8")
        half.replace(out)
    finally:
        half.unlink(missing_ok=True)
    return out


def render(runs: list[collect.Run]) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # every string here comes from a disk; nothing is ever marked safe
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=number, count=count, percent=percent, signed=signed, moment=moment, duration=duration, size=size,
        plain=plain, shown=shown, between=between,
    )  # fmt: skip
    folders = {shards.folder.resolve(): shards for run in reversed(runs) for shards in run.shards}
    users = {f: [r.name for r in runs if f in {s.folder.resolve() for s in r.shards}] for f in folders}
    return environment.get_template("page.html.j2").render(
        runs=runs,
        single=runs[0] if len(runs) == 1 else None,
        curves={run.name: run_curves(run) for run in runs},
        overlaid=overlaid(runs),
        scores={run.name: scores(run) for run in runs},
        lead={run.name: lead(run) for run in runs},
        compared=compared(runs),
        differing=differing(runs),
        spans={run.name: spans(run) for run in runs},
        pictures={run.name: figures(run.pictures, PICTURES) for run in runs},
        neighbours={(run.name, e.name): figures(e.pictures, PICTURES) for run in runs for e in run.evaluations},
        data=[(shards, users[folder]) for folder, shards in sorted(folders.items())],
        sheets={shards.folder: figures(shards.sheets, SHEETS) for shards in folders.values()},
        overlays={shards.folder: figures(shards.overlays, OVERLAYS) for shards in folders.values()},
        rejected={shards.folder: ranked(shards.rejected) for shards in folders.values()},
        cards={shards.folder: cards(shards) for shards in folders.values()},
        matrix_limit=MATRIX,
        written=datetime.now(UTC),
        box=chart,
    )


def run_curves(run: collect.Run) -> list[chart.Chart]:
    """One chart a metric, the start of every later attempt marked."""
    marks = [
        (float(one.from_step), str(index))
        for index, one in enumerate(run.attempts, start=1)
        if index > 1 and one.from_step is not None
    ]
    return [
        drawn
        for metric in ordered([run])[:CURVES]
        if (drawn := draw({run.name: run.curve(metric)}, metric, "step", marks)) is not None
    ]


def overlaid(runs: list[collect.Run]) -> list[chart.Chart]:
    """The curves of all runs on top of each other, by images seen: runs differ in batch size, and a step is no unit."""
    axis = "samples" if all("samples" in row for run in runs for row in run.rows) else "step"
    label = "images seen" if axis == "samples" else "step"
    charts = []
    for metric in ordered(runs)[:CURVES] if len(runs) > 1 else []:
        drawn = draw({run.name: run.curve(metric, axis) for run in runs}, metric, label, [])
        if drawn is not None:
            charts.append(drawn)
    return charts


def draw(
    curves: dict[str, chart.Points], metric: str, x_label: str, marks: list[tuple[float, str]]
) -> chart.Chart | None:
    return chart.draw(
        curves,
        metric,
        TITLES.get(metric, metric.replace("_", " ")),
        x_label,
        marks,
        percent=metric in FRACTIONS,
        from_zero=metric in FROM_ZERO,
    )


def ordered(runs: list[collect.Run]) -> list[str]:
    """All metrics, those of every run first and always in the same order, a method's own after them."""
    found = list(dict.fromkeys(name for run in runs for name in run.curves()))
    return [name for name in FIRST if name in found] + [name for name in found if name not in FIRST]


def scores(run: collect.Run) -> list[Score]:
    found = []
    for evaluation in run.evaluations:
        for metric, value in evaluation.metrics.items():
            others = {name: numbers[metric] for name, numbers in evaluation.baselines.items() if metric in numbers}
            fraction = all(0 <= one <= 1 for one in (value, *others.values()))
            chances = {name: told[metric] for name, told in evaluation.chances.items() if metric in told}
            interval = evaluation.intervals.get(metric)
            found.append(Score(evaluation.name, metric, value, others, fraction, interval, chances))
    return found


def lead(run: collect.Run) -> Score | None:
    """The number that says what the encoder is worth: an accuracy beside the random network's, where there is one."""
    return max(
        scores(run),
        key=lambda s: (s.metric == "accuracy", "random" in s.baselines, bool(s.baselines)),
        default=None,
    )


def compared(runs: list[collect.Run]) -> list[tuple[str, str]]:
    """The (evaluation, metric) columns of the comparison: every evaluation's accuracy, or else its first metric."""
    columns: dict[str, str] = {}
    for score in (score for run in runs for score in scores(run)):
        if score.evaluation not in columns or score.metric == "accuracy":
            columns[score.evaluation] = score.metric
    return list(columns.items())


def differing(runs: list[collect.Run]) -> list[tuple[str, list[str]]]:
    """The configuration keys in which the runs that have a configuration differ, and the value of each run."""
    flat = [dict(leaves(run.config)) if run.config else {} for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    differ = [key for key in keys if len({one.get(key) for one in flat if one}) > 1]
    return [(key, [one.get(key, "—") for one in flat]) for key in differ]


def leaves(tree: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(tree, dict) and tree:
        return [leaf for key, value in tree.items() for leaf in leaves(value, f"{path}.{key}" if path else str(key))]
    return [(path, plain(tree))]


def spans(run: collect.Run) -> list[tuple[float, float]]:
    """Where on the run's whole time line every attempt lies: start and length, as percentages."""
    starts = [one.started for one in run.attempts if one.started]
    ends = [one.ended for one in run.attempts if one.ended]
    if not starts or not ends or max(ends) <= min(starts):
        return [(0.0, 0.0)] * len(run.attempts)
    begin, whole = min(starts), (max(ends) - min(starts)).total_seconds()
    return [
        (100 * (one.started - begin).total_seconds() / whole, 100 * (one.seconds or 0.0) / whole)
        if one.started
        else (0.0, 0.0)
        for one in run.attempts
    ]


def ranked(rejected: Counter[str]) -> list[tuple[str, int]]:
    """The commonest reasons; those beyond a dozen together in one row."""
    rows = rejected.most_common(REASONS)
    rest = rejected.total() - sum(times for _, times in rows)
    return [*rows, (f"{len(rejected) - REASONS:,} other reasons", rest)] if rest else rows


def cards(shards: collect.Shards) -> tuple[list[str], list[list[str]]]:
    """The dataset cards as a table: name, licence and tiles first, then whatever else most cards say."""
    known = Counter(key for card in shards.datasets for key in card if key not in ("name", "licence"))
    others = [key for key, _ in known.most_common(COLUMNS - 3)]
    rows = []
    for card in shards.datasets:
        tiles = shards.samples.get(collect.text(card.get("name")))
        licence = plain(card.get("licence")) or "not stated"
        rows.append([plain(card.get("name")), licence, count(tiles), *(plain(card.get(key)) for key in others)])
    return ["name", "licence", "tiles", *others], rows


def figures(files: list[Path], most: int) -> tuple[list[Figure], int]:
    """Up to so many pictures, spread evenly over the files, and how many files there are."""
    chosen = files if len(files) <= most else [files[i * len(files) // most] for i in range(most)]
    return [figure(file) for file in chosen], len(files)


def figure(file: Path) -> Figure:
    """A picture as a data URI: a PNG as it is while it is small, otherwise a JPEG no wider than the page shows."""
    try:
        raw = file.read_bytes()
        with Image.open(io.BytesIO(raw), formats=("PNG",)) as picture:
            width, height = picture.size
            if width * height > Image.MAX_IMAGE_PIXELS:  # type: ignore[operator]
                raise ValueError(f"{width} x {height} pixels is too large to open")
            picture.load()
            kind = "png"
            if len(raw) > PICTURE_BYTES:
                flat = Image.new("RGB", picture.size, "white")
                rich = picture.convert("RGBA")
                flat.paste(rich, mask=rich.getchannel("A"))
                flat.thumbnail((PICTURE_WIDTH, 4 * PICTURE_WIDTH))
                kind, width, packed = "jpeg", flat.width, io.BytesIO()
                flat.save(packed, "JPEG", quality=86)
                raw = packed.getvalue()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return Figure(file.name, "", 0, f"{file.name} cannot be shown: {error}")
    return Figure(file.name, f"data:image/{kind};base64,{base64.b64encode(raw).decode()}", width, "")


def number(value: float | None) -> str:
    """Four significant digits, thousands apart; a dash for what is not known."""
    if value is None:
        return "—"
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return chart.label(value)


def count(value: Any) -> str:
    return f"{value:,}" if type(value) is int else "—" if value is None else plain(value)


def percent(value: float | None) -> str:
    return "—" if value is None else f"{100 * value:.1f} %"


def signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")


def shown(score: Score, baseline: str = "") -> str:
    """A score, or one of its baselines, as it is read: fractions as percentages."""
    value = score.baselines.get(baseline) if baseline else score.value
    return percent(value) if score.fraction else number(value)


def between(edges: tuple[float, float], fraction: bool) -> str:
    """An interval, in the unit of its score."""
    low, high = (percent(edge) if fraction else number(edge) for edge in edges)
    return f"{low} to {high}"


def moment(value: datetime | None) -> str:
    return "—" if value is None else value.astimezone(UTC).strftime("%Y-%m-%d %H:%M")


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "—"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def size(value: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.4g} {unit}"
        value /= 1000
    return f"{value:.4g} TB"


def plain(value: Any) -> str:
    """Anything from a JSON or YAML file on one line."""
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(one, str | int | float) for one in value):
        return ", ".join(str(one) for one in value)
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
