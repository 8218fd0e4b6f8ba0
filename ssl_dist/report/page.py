"""Plain data -> one HTML page that needs nothing else: no network, no script, pictures and curves inside."""

import base64
import io
import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass, field, replace
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
SHEETS, OVERLAYS, PICTURES, TOLD = 4, 4, 8, 24  # embedded at most: of a shard folder, of a run, with a caption
COLUMNS = 8  # of a dataset card
MATRIX = 30  # classes of a confusion matrix that a reader can still see
FIRST = ("loss", "lr", "images_per_second", "data_wait", "grad_norm")
TITLES = {
    "lr": "learning rate",
    "images_per_second": "images / s",
    "data_wait": "time spent waiting for data",
    "grad_norm": "gradient norm",
}
METRICS = {"auroc": "AUROC", "macro_f1": "macro F1", "weighted_f1": "weighted F1", "r2": "R²",
           "pq": "PQ", "dq": "DQ", "sq": "SQ", "aji": "AJI", "dice": "Dice", "mpq": "mPQ", "iou": "IoU",
           "pooled_pq": "PQ of all nuclei", "pooled_mpq": "mPQ of all nuclei", "f1_detection": "F1 of detection"}
PROTOCOLS = {
    "knn": "k nearest neighbours",
    "linear": "linear probe",
    "sgd": "a linear layer, trained step by step",
    "low": "linear probe with few labels; the figures here are of all of them",
    "finetune": "fine-tuning of the whole encoder",
    "slide_linear": "linear probe of one vector a slide",
    "embed": "vectors for other programs, not judged",
    "slide_embed": "one vector a slide, not judged",
    "look": "to be looked at, not judged",
    "mil": "multiple-instance learning: slides, by the vectors of their tiles",
    "nuclei": "nuclei, each apart, by a HoVer-Net over the encoder",
    "semantic": "what every pixel is, by a U-Net over the encoder",
    "outline": "nuclei of slides, not judged",
}
CAPTIONS = {
    "knn_neighbours.png": "Left, tiles that were asked about, with their class; right of each, the tiles of other "
    "patients that the encoder finds most like it, framed green where the class is the same and red where not.",
    "views.png": "A tile a row: first whole, then the views that were cut from it.",
    "classes.png": "Tiles by class.",
    "slides.png": "Tiles by slide.",
    "sites.png": "Tiles by site.",
    "slide_linear.png": "What more slides add: mean and standard deviation over splits.",
    "low_labels.png": "What more labels add: mean and standard deviation over the choices of labels.",
}
CARD = {"input": "input_size", "less the mean": "mean", "over the deviation": "std"}  # of timm's, by our words
LEVEL = 0.05  # of p, below which a difference is called better
FRACTIONS = {"data_wait", "balanced_accuracy_held_out"}
FROM_ZERO = {"lr", "images_per_second", "data_wait"}


@dataclass
class Figure:
    """A picture inside the page, or the reason why it is not."""

    name: str
    source: str
    width: int
    problem: str
    caption: str = ""
    wide: bool = False  # as wide as the column: an evaluation that writes captions means its pictures to be read


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
    seeds: dict[str, collect.Spread] = field(default_factory=dict)  # of the encoder, and by baseline
    seen: dict[str, int] = field(default_factory=dict)  # of what was asked about, in pretraining
    leaked: set[str] = field(default_factory=set)  # baselines that have seen some of it

    def better(self, baseline: str) -> bool:
        """Whether the encoder is the better one, and not by chance: of errors the smaller is."""
        by_chance = self.chances.get(baseline, 0.0) > LEVEL
        return not by_chance and (self.points(baseline) < 0) == ("error" in self.metric) and self.points(baseline) != 0

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
        plain=plain, shown=shown, between=between, spread=spread, short=short, parts=parts, metric=metric,
        counted=counted, tally=tally, leaks=leaks, leaves=leaves,
    )  # fmt: skip
    folders = {shards.folder.resolve(): shards for run in reversed(runs) for shards in run.shards}
    used = uses(runs)
    return environment.get_template("page.html.j2").render(
        runs=runs,
        single=runs[0] if len(runs) == 1 else None,
        curves={run.name: run_curves(run) for run in runs},
        overlaid=overlaid(runs),
        scores={run.name: scores(run) for run in runs},
        lead={run.name: lead(run) for run in runs},
        compared=compared(runs),
        unlike=unlike(runs),
        differing=differing(runs),
        spans={run.name: spans(run) for run in runs},
        pictures={run.name: figures(run.pictures, PICTURES) for run in runs},
        drawn={(run.name, e.name): album(e) for run in runs for e in run.evaluations},
        passes={(run.name, e.name): passes(e) for run in runs for e in run.evaluations},
        protocols=PROTOCOLS,
        facts={run.name: facts(run) for run in runs},
        bucket=max((one.bucket for run in runs for one in run_curves(run)), default=1),
        data=[(shards, used[folder]) for folder, shards in sorted(folders.items())],
        licences=licences(folders, used, len(runs)),
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
            seeds = {who: told[metric] for who, told in evaluation.seeds.items() if metric in told}
            found.append(
                Score(
                    evaluation.name,
                    metric,
                    value,
                    others,
                    fraction,
                    evaluation.intervals.get(metric),
                    chances,
                    seeds,
                    evaluation.seen,
                    evaluation.leaked,
                )
            )
    return found


def lead(run: collect.Run) -> Score | None:
    """The number that says what the encoder is worth: an accuracy beside the random network's, where there is one.

    One of tiles that were not seen in pretraining goes before all others, then one for which nothing is fine-tuned.
    """
    frozen = {one.name for one in run.evaluations if one.protocol != "finetune"}
    return max(
        scores(run),
        key=lambda s: (
            not s.seen,
            s.metric == "accuracy",
            "random" in s.baselines,
            bool(s.baselines),
            s.evaluation in frozen,
        ),
        default=None,
    )


def compared(runs: list[collect.Run]) -> list[tuple[str, str]]:
    """The (evaluation, metric) columns of the comparison: every evaluation's accuracy, or else its first metric."""
    columns: dict[str, str] = {}
    for score in (score for run in runs for score in scores(run)):
        if score.evaluation not in columns or score.metric == "accuracy":
            columns[score.evaluation] = score.metric
    return list(columns.items())


def unlike(runs: list[collect.Run]) -> dict[str, dict[str, list[str]]]:
    """Of evaluations of one name that are not of the same tiles: of which they are, and of which runs."""
    found: dict[str, dict[str, list[str]]] = {}
    for run in runs:
        for one in run.evaluations:
            if one.metrics:
                found.setdefault(one.name, {}).setdefault(one.asked or "not told", []).append(run.name)
    return {name: told for name, told in found.items() if len(told) > 1}


def passes(evaluation: collect.Evaluation) -> list[chart.Chart]:
    """What was learnt with every pass over the labels: one chart a figure, a line for the encoder and each baseline."""
    names = dict.fromkeys(name for rows in evaluation.passes.values() for row in rows for name in row)
    charts = []
    for name in [one for one in names if one != "epoch"][:CURVES]:
        curves = {
            who: [(row["epoch"], row[name]) for row in rows if name in row] for who, rows in evaluation.passes.items()
        }
        drawn = draw(curves, name, "pass over the labels", [])
        charts += [drawn] if drawn else []
    return charts


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


def facts(run: collect.Run) -> dict[str, str]:
    """What a reader wants to know of the encoder; the whole of its card is beneath."""
    card, about = ((run.encoder.get(name) or {}) for name in ("pretrained_cfg", "ssl_dist"))
    counts = collect.numbers_of(run.pretraining.get("counts"))
    sizes = {name: found for name in collect.SEEN if (found := collect.whole(counts.get(name)))}
    told = {
        "architecture": run.encoder.get("architecture"),
        "numbers a tile": run.encoder.get("num_features"),
        "pretrained on": counted(sizes) + (", patients not known" if sizes and "patients" not in sizes else ""),
        **({"µm/px": about.get("mpp"), "step": about.get("step")} if isinstance(about, dict) else {}),
        **({name: card.get(key) for name, key in CARD.items()} if isinstance(card, dict) else {}),
    }
    return {name: plain(value) for name, value in told.items() if value not in (None, "", [], {})}


def uses(runs: list[collect.Run]) -> dict[Path, dict[str, list[str]]]:
    """Of every shard folder what it was used for, pretraining first, and by which runs."""
    found: dict[Path, dict[str, list[str]]] = {}
    for run in runs:
        for shards in run.shards:
            for use in shards.uses:
                found.setdefault(shards.folder.resolve(), {}).setdefault(use, []).append(run.name)
    return {f: dict(sorted(told.items(), key=lambda one: one[0] != "pretraining")) for f, told in found.items()}


def licences(
    folders: dict[Path, collect.Shards], used: dict[Path, dict[str, list[str]]], runs: int
) -> list[list[str]]:
    """All data under the page in one table: name, licence, tiles, what it was used for, where it lies.

    What was pretrained on comes first: its licences go with the encoder.
    """
    rows = []
    for folder, shards in sorted(folders.items(), key=lambda one: ("pretraining" not in used[one[0]], one[0])):
        alike: dict[tuple[str, ...], list[str]] = {}  # uses, by the runs whose they are
        for use, users in used[folder].items():
            alike.setdefault(tuple(users), []).append(use)
        said = "; ".join(
            ", ".join(names) + ("" if len(users) == runs else f" ({len(users)} of {runs} runs)")
            for users, names in alike.items()
        )
        for card in shards.datasets:
            name = collect.text(card.get("name"))
            tiles = count(shards.samples.get(name))
            rows.append([name, plain(card.get("licence")) or "not stated", tiles, said, str(shards.folder)])
        if not shards.datasets:
            why = "it names no dataset" if shards.found else "its folder is not to be seen from here"
            rows.append([shards.folder.name, f"not known: {why}", "—", said, str(shards.folder)])
    return rows


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
    said = [CAPTIONS.get(re.sub(r"-\d+_", "_", file.name), "") for file in chosen]     # knn-2_…: of a second result
    return [replace(figure(file), caption=words) for file, words in zip(chosen, said, strict=True)], len(files)


def album(evaluation: collect.Evaluation) -> tuple[list[Figure], int]:
    """The pictures of an evaluation, those with a caption first."""
    captions = evaluation.captions
    told = [file for file in evaluation.pictures if captions.get(file.name)]
    others, rest = figures([file for file in evaluation.pictures if file not in told], PICTURES)
    shown = [replace(figure(file), caption=captions[file.name], wide=True) for file in told[:TOLD]]
    return shown + others, len(told) + rest


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


def spread(told: collect.Spread, fraction: bool) -> str:
    """Mean ± deviation, in the unit of its score; of one choice alone the mean."""
    mean, deviation = ((100 * told.mean, 100 * told.deviation) if fraction else (told.mean, told.deviation))
    shown = f"{mean:.1f}" if fraction else number(mean)
    spread = (f"{deviation:.1f}" if fraction else number(deviation)) if told.times != 1 else ""
    return shown + (f" ± {spread}" if spread else "") + (" %" if fraction else "")


def parts(word: str) -> list[str]:
    """A long name in parts between which a line may end."""
    return re.findall(r"[^_/.,=-]*[_/.,=-]+|[^_/.,=-]+", word)


def metric(name: str) -> str:
    """A metric as it is read."""
    return METRICS.get(name, name.replace("_", " "))


def leaks(evaluations: list[collect.Evaluation]) -> list[tuple[str, list[str]]]:
    """What was seen in pretraining of what was asked about, and by which evaluations: as much of each in one line."""
    found: dict[str, list[str]] = {}
    for one in evaluations:
        if one.seen and one.metrics:
            found.setdefault(counted(one.seen), []).append(one.name)
    return list(found.items())


def short(value: float | None) -> str:
    """A count that has little room: millions from ten of them on."""
    for size, letter in ((1e9, "G"), (1e6, "M")):
        if value is not None and math.isfinite(value) and abs(value) >= max(size, 1e7):
            return f"{value / size:.3g} {letter}"
    return number(value)


def tally(counts: dict[str, Any]) -> list[str]:
    """What was learnt from and asked about, in words; whatever else was counted as it was found."""
    left, said = dict(counts), []
    what = collect.text(left.pop("of", None)) or "tiles"
    for name, patients, verb in (
        ("bank", "bank_patients", "to learn from"),
        ("queries", "query_patients", "asked about"),
    ):
        if collect.whole(left.get(name)):
            known = collect.whole(left.pop(patients, None))
            of = "" if known is None else f" of {known:,} patient{'s' * (known > 1)}" if known else ", patients unknown"
            said.append(f"{count(left.pop(name))} {what} {verb}{of}")
    nothing = ("shared_patients",) if not left.get("shared_patients") else ()
    known_by_warning = ("unknown_patients",) if said else ()
    rest = {name: value for name, value in left.items() if name not in (*nothing, *known_by_warning)}
    return said + [f"{name.replace('_', ' ')} {count(value)}" for name, value in rest.items()]


def counted(seen: dict[str, int]) -> str:
    """So many tiles, slides, patients, in words."""
    return ", ".join(f"{count:,} {name if count > 1 else name.removesuffix('s')}" for name, count in seen.items())


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
