"""Run folders -> plain data. Every file but run.json may be absent, torn or odd: what is missing becomes a note."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import yaml

STALE_SECONDS = 600  # a heartbeat is written every few seconds; ten minutes without one is a dead process
NOT_CURVES = {"step", "samples", "epoch", "time"}
SEEN = ("tiles", "slides", "patients")


class PlainLoader(yaml.SafeLoader):
    """YAML without aliases: a resolved config.yaml has none, and a dozen nested ones unfold to gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases (*name), which a resolved configuration has not")
        return super().compose_node(parent, index)


class ReportError(ValueError):
    """What was asked for cannot be reported on; the command ends with exit code 3, data invalid."""

    exit_code = 3


@dataclass
class Attempt:
    """One life of the job, from its start to its end or its last heartbeat."""

    started: datetime | None
    ended: datetime | None
    said_goodbye: bool
    host: str
    world: int | None
    device: str
    from_step: int | None
    to_step: int | None
    outcome: str

    @property
    def seconds(self) -> float | None:
        if self.started is None or self.ended is None:
            return None
        return max(0.0, (self.ended - self.started).total_seconds())


@dataclass
class Spread:
    """A figure that was had several times over."""

    mean: float
    deviation: float
    times: int  # 0: the file does not say


@dataclass
class Labels:
    """How good a probe is that knows so many labels: a row of the table of few labels."""

    known: str
    tiles: float | None
    choices: int
    figures: dict[str, Spread]  # by encoder and baselines


@dataclass
class Evaluation:
    """One eval/<name>.json: numbers in `metrics` and in every baseline, the rest as it was found."""

    name: str
    protocol: str
    encoder: dict[str, Any]
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    chances: dict[str, dict[str, float]]  # of a baseline, by metric: how likely no difference would look like this one
    baselines: dict[str, dict[str, float]]
    counts: dict[str, Any]
    classes: list[str]
    confusion: list[list[float]]
    pictures: list[Path]
    captions: dict[str, str]  # by the picture's name
    labels: list[Labels]
    passes: dict[str, list[dict[str, float]]]  # what was learnt with every pass over the labels, by who learnt
    seeds: dict[str, dict[str, Spread]]  # by encoder and baselines, by metric
    seen: dict[str, int]  # of the query's tiles, slides, patients: how many the encoder was pretrained on, if any
    leaked: set[str]  # baselines that were pretrained on some of the query
    silent: bool  # the encoder does not say what it was pretrained on
    warnings: list[str]
    shards: list[Path]
    asked: str  # of which tiles: their datasets, the splits, the pixels that the encoder saw


@dataclass
class Shards:
    """One shard folder: what is in it, what was left out and why."""

    folder: Path
    found: bool
    datasets: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    uses: list[str] = field(default_factory=list)  # pretraining, and the names of evaluations
    samples: dict[str, int] = field(default_factory=dict)  # by dataset
    tars: int = 0
    size: int = 0  # bytes
    rejected: Counter[str] = field(default_factory=Counter)  # by reason
    sheets: list[Path] = field(default_factory=list)
    overlays: list[Path] = field(default_factory=list)


@dataclass
class Run:
    """All that a run folder says about itself, and `notes` on what it does not."""

    folder: Path
    name: str
    state: str
    exit_code: int | None
    error: str
    step: int | None
    steps: int | None
    heartbeat: datetime | None
    attempts: list[Attempt]
    rows: list[dict[str, float]]  # one a step, in order of step; values may be infinite or NaN
    quarantined: Counter[str]
    evaluations: list[Evaluation]
    pictures: list[Path]
    config_text: str
    config: dict[str, Any]
    environment: dict[str, Any]
    encoder: dict[str, Any]
    encoder_readme: str
    pretraining: dict[str, Any]
    shards: list[Shards]
    notes: list[str]

    def curve(self, metric: str, axis: str = "step") -> list[tuple[float, float]]:
        """(position, value) of every row that has both."""
        return [(row[axis], row[metric]) for row in self.rows if metric in row and axis in row]

    def curves(self) -> list[str]:
        """The names of all curves, in the order in which they first appear."""
        return list(dict.fromkeys(name for row in self.rows for name in row if name not in NOT_CURVES))

    def last(self, metric: str) -> float | None:
        """The value at the highest step that has one."""
        return next((row[metric] for row in reversed(self.rows) if metric in row), None)

    def typical(self, metric: str) -> float | None:
        """The median over the logged steps of the last attempt: one slow step (a save, a warm-up) does not move it.

        Of the last only: a run may go on with more or fewer ranks, and a median across both is the speed of neither.
        """
        begin = next((one.from_step for one in reversed(self.attempts) if one.from_step is not None), -1)
        rows = [row for row in self.rows if row["step"] > begin] or self.rows
        values = [row[metric] for row in rows if math.isfinite(row.get(metric, math.nan))]
        return median(values) if values else None

    @property
    def architecture(self) -> str:
        asked = self.config.get("encoder")
        names = [self.encoder.get("architecture"), *(one.encoder.get("architecture") for one in self.evaluations)]
        names.append(asked.get("name") if isinstance(asked, dict) else None)
        return next((text(name) for name in names if name), "")

    @property
    def silent(self) -> bool:
        """Whether of any evaluation it is not known if its tiles were seen in pretraining."""
        return any(one.silent for one in self.evaluations)

    @property
    def method(self) -> str:
        method = self.config.get("method")
        return text(method.get("name")) if isinstance(method, dict) else text(method)


def run(folder: Path, now: datetime | None = None) -> Run:
    """Read one run folder; `now` decides whether a run that calls itself running still breathes."""
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        there = "has no run.json" if folder.is_dir() else "does not exist"
        raise ReportError(
            f"{folder} is not a run folder: it {there}; give the folder that `ssl-dist train … run=FOLDER` wrote, "
            "for example runs/first"
        )
    notes: list[str] = []
    card = json_object(folder / "run.json", notes)
    state = text(card.get("state")) or "unknown"
    heartbeat = moment(card.get("heartbeat"))
    config_text, config = configuration(folder / "config.yaml", notes)
    rows = metric_rows(folder / "metrics.jsonl", notes)
    if state == "running" and heartbeat is not None:
        silence = ((now or datetime.now(UTC)) - heartbeat).total_seconds()
        if silence > STALE_SECONDS:
            notes.append(
                f"run.json says running, but its last heartbeat is {silence / 60:,.0f} minutes old: the process is "
                "most likely gone; start the same command again to resume"
            )
    encoder = folder / "encoder"
    evaluations = [evaluation(file, notes) for file in sorted((folder / "eval").glob("*.json"))]
    doubts: dict[str, list[str]] = {}  # what several evaluations say is said once
    for one in sorted(evaluations, key=lambda one: not one.seen):
        for words in one.warnings:
            doubts.setdefault(words, []).append(one.name)
    notes += [f"{', '.join(names)}: {words}" for words, names in doubts.items()]
    pictures = sorted((folder / "pictures").glob("*.png"), key=lambda file: (file.name != "views.png", file.name))
    quarantined = reasons(folder / "quarantine.jsonl", notes)
    if quarantined:
        notes.append(f"{quarantined.total():,} samples could not be read and were skipped: see quarantine.jsonl")
    if not evaluations:
        notes.append("no evaluation: run `ssl-dist eval configs/eval/knn.yaml encoder=" + str(folder / "encoder") + "`")
    if not pictures:
        notes.append("no pictures of the augmented views (pictures/*.png)")
    if not encoder.is_dir():
        notes.append("no exported encoder (encoder/)")
    return Run(
        folder=folder,
        name=folder.resolve().name,
        state=state,
        exit_code=whole(card.get("exit_code")),
        error=text(card.get("error")),
        step=whole(card.get("step")),
        steps=whole(card.get("steps")),
        heartbeat=heartbeat,
        attempts=[attempt(one, heartbeat) for one in objects(card.get("attempts"))],
        rows=rows,
        quarantined=quarantined,
        evaluations=evaluations,
        pictures=pictures,
        config_text=config_text,
        config=config,
        environment=json_object(folder / "env.json", notes),
        encoder=json_object(encoder / "config.json", notes) if encoder.is_dir() else {},
        encoder_readme=plain_text(encoder / "README.md"),
        pretraining=json_object(encoder / "pretraining.json", notes) if encoder.is_dir() else {},
        shards=[shards(one, uses, notes) for one, uses in users(config, evaluations).items()],
        notes=notes,
    )


def runs(folders: list[Path], now: datetime | None = None) -> list[Run]:
    """Read several run folders and give each a name that tells it from the others."""
    if not folders:
        raise ReportError("no run folder was given; name at least one, for example `ssl-dist report runs/first`")
    distinct = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    given = {Path(folder).resolve(): Path(folder) for folder in reversed(folders)}
    found = [run(given[folder], now) for folder in distinct]
    for one, folder in zip(found, distinct, strict=True):
        for depth in range(1, len(folder.parts) + 1):
            one.name = "/".join(folder.parts[-depth:])
            if sum(other.parts[-depth:] == folder.parts[-depth:] for other in distinct) == 1:
                break
    return found


def metric_rows(file: Path, notes: list[str]) -> list[dict[str, float]]:
    """The numbers of metrics.jsonl by step. After a resume steps come twice: the last row of a step counts."""
    by_step: dict[float, dict[str, float]] = {}
    lines = repeated = 0
    latest = -math.inf
    for row in json_lines(file, notes, "no metrics yet (metrics.jsonl is missing)"):
        numbers = {name: float(value) for name, value in row.items() if is_number(value)}
        step = numbers.get("step", math.nan)
        if not math.isfinite(step):
            continue
        lines += 1
        repeated += step in by_step
        by_step[step] = numbers
        latest = step
    if file.is_file() and not lines:
        notes.append("no metrics yet (metrics.jsonl has no complete row)")
    if repeated:
        notes.append(f"{repeated:,} steps were done twice after a resume; the later row of each is shown")
    if by_step and latest < max(by_step):
        notes.append(
            f"the newest row is of step {latest:,.0f}; later steps are from an earlier attempt and not yet redone"
        )
    rows = [by_step[step] for step in sorted(by_step)]
    broken = [row["step"] for row in rows if not math.isfinite(row.get("loss", 0.0))]
    if broken:
        notes.append(f"the loss was not finite at {len(broken):,} logged steps, first at step {broken[0]:,.0f}")
    return rows


def evaluation(file: Path, notes: list[str]) -> Evaluation:
    found = json_object(file, notes)
    counts = found.get("counts") if isinstance(found.get("counts"), dict) else {}
    shared = whole((counts or {}).get("shared_patients"))
    if shared:
        notes.append(
            f"eval/{file.name}: {shared:,} patients are on both sides of the split; its numbers are too good to be true"
        )
    confusion = square(found.get("confusion"))
    if found.get("confusion") and not confusion:
        notes.append(f"eval/{file.name}: the confusion matrix is not a square of counts and is left out")
    names = found.get("classes")
    classes = [text(name) for name in names] if isinstance(names, list) else []
    if confusion and len(classes) != len(confusion):
        classes = [str(index) for index in range(len(confusion))]
    pictures = []
    listed = found.get("pictures")
    for name in listed if isinstance(listed, list) else []:
        picture = file.parent / Path(text(name)).name  # the last part only: a name from disk must not leave eval/
        if picture.is_file():
            pictures.append(picture)
        else:
            notes.append(f"eval/{file.name} names a picture that is not there: {picture.name}")
    baselines, captions, doubts = found.get("baselines"), found.get("captions"), found.get("warnings")
    overlap, theirs = found.get("seen_in_pretraining"), found.get("seen_by_baselines")
    curves = curves_of(found.get("curves"))
    return Evaluation(
        name=file.stem,
        protocol=text(found.get("protocol")) or file.stem,
        encoder=found["encoder"] if isinstance(found.get("encoder"), dict) else {},
        metrics=numbers_of(found.get("metrics")),
        intervals=intervals_of(found.get("intervals")),
        chances=chances_of(found.get("against")),
        baselines={text(n): numbers_of(v) for n, v in baselines.items()} if isinstance(baselines, dict) else {},
        counts=counts or {},
        classes=classes,
        confusion=confusion,
        pictures=pictures,
        captions={Path(text(n)).name: text(c) for n, c in captions.items()} if isinstance(captions, dict) else {},
        labels=labels_of(curves),
        passes=passes_of(curves),
        seeds=seeds_of(found.get("seeds")),
        seen={name: count for name in SEEN if (count := whole(overlap.get(name)) or 0) > 0}
        if isinstance(overlap, dict)
        else {},
        leaked={
            text(name)
            for name, told in (theirs.items() if isinstance(theirs, dict) else ())
            if isinstance(told, dict) and any((whole(count) or 0) > 0 for count in told.values())
        },
        silent="seen_in_pretraining" in found and overlap is None,
        warnings=[text(words) for words in doubts] if isinstance(doubts, list) else [],
        shards=paths([one.get("path") for one in objects(found.get("shards"))]),
        asked=asked_of(found),
    )


def asked_of(found: dict[str, Any]) -> str:
    """Of which tiles a result is, in words that differ where it may not be compared with another."""
    given = found.get("asked")
    asked = given if isinstance(given, dict) else {}
    names = [text(name) for one in objects(found.get("shards")) for name in one.get("datasets") or []
             if isinstance(one.get("datasets"), list)]
    tiles = "bank" in asked or "query" in asked  # of slides neither is said
    splits = " → ".join(text(asked.get(key)) or "all" for key in ("bank", "query")) if tiles else ""
    size, model = whole(found.get("size")), text(found.get("model"))
    return ", ".join(part for part in (model, " and ".join(names), splits, f"{size} px" if size else "") if part)


def intervals_of(value: Any) -> dict[str, tuple[float, float]]:
    """Of every metric where 95 % of resamplings lie, as far as that is two numbers."""
    return {
        text(name): (float(edges[0]), float(edges[1]))
        for name, edges in (value.items() if isinstance(value, dict) else ())
        if isinstance(edges, list) and len(edges) == 2 and all(is_number(edge) for edge in edges)
    }


def chances_of(value: Any) -> dict[str, dict[str, float]]:
    """Of every baseline the p of every metric, as far as they are numbers."""
    return {
        text(name): numbers_of({metric: told.get("p") for metric, told in metrics.items() if isinstance(told, dict)})
        for name, metrics in (value.items() if isinstance(value, dict) else ())
        if isinstance(metrics, dict)
    }


def curves_of(value: Any) -> dict[str, list[dict[str, Any]]]:
    """The rows of every curve, by whose it is."""
    return {text(who): objects(rows) for who, rows in value.items()} if isinstance(value, dict) else {}


def labels_of(curves: dict[str, list[dict[str, Any]]]) -> list[Labels]:
    """Of curves over how many labels are known, a row a number, the fewest first."""
    rows: dict[tuple[str, float], Labels] = {}
    for who, curve in curves.items():
        for row in curve:
            figure = spread(row.get("balanced_accuracy"), row.get("draws"))
            how = next((name for name in ("share", "per_class") if is_number(row.get(name))), None)
            if figure is None or how is None:
                continue
            known = f"{100 * row[how]:.4g} %" if how == "share" else f"{row[how]:.4g} of each class"
            tiles = spread(row.get("tiles"))
            new = Labels(known, tiles.mean if tiles else None, figure.times, {})
            rows.setdefault((how, float(row[how])), new).figures[who] = figure
    return sorted(rows.values(), key=lambda row: math.inf if row.tiles is None else row.tiles)


def passes_of(curves: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, float]]]:
    """Of curves over passes through the labelled tiles, the numbers of every pass."""
    found = {who: [numbers_of(row) for row in curve if is_number(row.get("epoch"))] for who, curve in curves.items()}
    return {who: rows for who, rows in found.items() if rows}


def seeds_of(value: Any) -> dict[str, dict[str, Spread]]:
    """Of encoder and baselines the spread of every metric over several seeds."""
    return {
        text(who): {
            text(metric): one
            for metric, told in metrics.items()
            if isinstance(told, dict)
            and (one := spread(told, len(told["values"]) if isinstance(told.get("values"), list) else 0))
        }
        for who, metrics in (value.items() if isinstance(value, dict) else ())
        if isinstance(metrics, dict)
    }


def spread(value: Any, times: Any = None) -> Spread | None:
    """A mean and its deviation, if they are two finite numbers."""
    told = {name: one for name, one in numbers_of(value).items() if math.isfinite(one)}
    return Spread(told["mean"], told["deviation"], whole(times) or 0) if {"mean", "deviation"} <= set(told) else None


def square(value: Any) -> list[list[float]]:
    """The matrix if it is a square of counts, else nothing."""
    rows = value if isinstance(value, list) else []
    if not all(isinstance(row, list) and len(row) == len(rows) for row in rows):
        return []
    fine = all(is_number(cell) and math.isfinite(cell) and cell >= 0 for row in rows for cell in row)
    return rows if fine else []


def attempt(card: dict[str, Any], heartbeat: datetime | None) -> Attempt:
    started, ended = moment(card.get("started")), moment(card.get("ended"))
    alive_until = heartbeat if started and heartbeat and heartbeat >= started else None
    return Attempt(
        started=started,
        ended=ended or alive_until,
        said_goodbye=ended is not None,
        host=text(card.get("host")),
        world=whole(card.get("world")),
        device=text(card.get("device")),
        from_step=whole(card.get("from_step")),
        to_step=whole(card.get("to_step")),
        outcome=text(card.get("outcome")),
    )


def shards(folder: Path, uses: list[str], notes: list[str]) -> Shards:
    if not (folder / "index.json").is_file():
        notes.append(f"the shard folder {folder} is not to be seen from here: no tiles, no licences of it")
        return Shards(folder=folder, found=False, uses=uses)
    index = json_object(folder / "index.json", notes)
    tars = objects(index.get("tars"))
    datasets = objects(index.get("datasets"))
    samples: Counter[str] = Counter()
    for tar in tars:  # <dataset>-000000.tar, as the format has it
        samples[text(tar.get("name")).rpartition("-")[0]] += whole(tar.get("samples")) or 0
    return Shards(
        folder=folder,
        found=True,
        uses=uses,
        datasets=datasets,
        settings=index["settings"] if isinstance(index.get("settings"), dict) else {},
        samples=dict(samples),
        tars=len(tars),
        size=sum(whole(tar.get("bytes")) or 0 for tar in tars),
        rejected=reasons(folder / "rejected.jsonl", notes),
        sheets=sorted((folder / "sheets").glob("*.png")),
        overlays=sorted((folder / "overlays").glob("*.png")),
    )


def users(config: dict[str, Any], evaluations: list[Evaluation]) -> dict[Path, list[str]]:
    """Every shard folder that pretraining or an evaluation has read, and which of them."""
    found: dict[Path, tuple[Path, list[str]]] = {}
    read = [("pretraining", shard_folders(config)), *((one.name, one.shards) for one in evaluations)]
    for use, folders in read:
        for folder in folders:
            uses = found.setdefault(folder.resolve(), (folder, []))[1]
            uses += [use] if use not in uses else []
    return dict(found.values())


def shard_folders(config: dict[str, Any]) -> list[Path]:
    data = config.get("data")
    listed = data.get("shards") if isinstance(data, dict) else None
    listed = [listed] if isinstance(listed, str) else listed
    return paths(listed) if isinstance(listed, list) else []


def paths(listed: list[Any]) -> list[Path]:
    """The words that may be a folder's path; no system takes a NUL in one."""
    return [Path(one) for one in listed if isinstance(one, str) and one and "\0" not in one]


def configuration(file: Path, notes: list[str]) -> tuple[str, dict[str, Any]]:
    written = plain_text(file)
    if not written:
        notes.append("no config.yaml: what this run was asked to do is not known")
        return "", {}
    try:
        parsed = yaml.load(written, Loader=PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        notes.append(f"config.yaml is not YAML ({' '.join(str(error).split())[:160]})")
        return written, {}
    return written, parsed if isinstance(parsed, dict) else {}


def reasons(file: Path, notes: list[str]) -> Counter[str]:
    """How many rows of a list of rejects name each reason."""
    return Counter(text(row.get("reason")) or "no reason given" for row in json_lines(file, notes))


def json_lines(file: Path, notes: list[str], missing: str = "") -> Iterator[dict[str, Any]]:
    """The objects of a file with one a line. A last line without its end is a write cut short, others are damage."""
    if not file.is_file():
        if missing:
            notes.append(missing)
        return
    bad, torn = 0, False
    with file.open("rb") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                torn = not line.endswith(b"\n")
                bad += not torn
                continue
            if isinstance(row, dict):
                yield row
            else:
                bad += 1
    if torn:
        notes.append(f"the last line of {file.name} is torn (a write was cut short) and is left out")
    if bad:
        notes.append(f"{bad:,} lines of {file.name} are not JSON objects and are left out")


def json_object(file: Path, notes: list[str]) -> dict[str, Any]:
    if not file.is_file():
        notes.append(f"no {file.parent.name}/{file.name}")
        return {}
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        notes.append(f"{file.parent.name}/{file.name} cannot be read ({type(error).__name__}: {error})")
        return {}
    if not isinstance(found, dict):
        notes.append(f"{file.parent.name}/{file.name} is not a JSON object")
        return {}
    return found


def plain_text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def objects(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def numbers_of(value: Any) -> dict[str, float]:
    return {text(k): float(v) for k, v in value.items() if is_number(v)} if isinstance(value, dict) else {}


def is_number(value: Any) -> bool:
    """Whether JSON meant a number; an integer too long for a float is not one we can draw."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 10**300)


def whole(value: Any) -> int | None:
    return int(value) if is_number(value) and math.isfinite(value) else None


def text(value: Any) -> str:
    return "" if value is None else str(value)


def moment(value: Any) -> datetime | None:
    """An ISO time, taken as UTC where it names no zone."""
    try:
        found = datetime.fromisoformat(text(value))
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)
