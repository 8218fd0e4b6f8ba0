"""Where an encoder comes from and what it was found to be worth, as plain data: what its card tells.

Counted over the rows that the run read, and read in the run folder's own files, each of which may be absent, torn or
odd. Slides and patients are counted, and their names never kept.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from shards import index
from ssl_dist import config as configs
from ssl_dist.data.reader import Reader
from ssl_dist.models import encoder as encoders
from ssl_dist.models.encoder import Encoder

LONGEST = 120           # letters of anybody's word: a card is to be read
PROTOCOLS = {"knn": "kNN", "linear": "linear probe", "sgd": "linear layer, SGD", "finetune": "fine-tuned",
             "low": "linear probe", "nuclei": "nuclei, HoVer-Net", "semantic": "pixels, U-Net",
             "segment": "maps against outlines"}
# Of each kind of result what compares best; accuracy alone would flatter whoever guesses the commonest class.
FIGURES = {"balanced_accuracy": "balanced accuracy", "auroc": "AUROC", "quadratic_kappa": "quadratic kappa",
           "average_precision": "average precision", "r2": "R²", "spearman": "Spearman", "pq": "PQ", "aji": "AJI",
           "dice": "Dice", "iou": "intersection over union"}
HELD = {"patient": "patients held out", "slide": "slides held out", "site": "sites held out"}


@dataclass
class Dataset:
    """What the run read of one dataset."""

    name: str
    tiles: int
    slides: int
    patients: int
    strangers: bool                 # there are tiles of which nobody knows the patient
    organs: list[str]
    stains: list[str]
    mpp: list[float]
    licences: list[str]


@dataclass
class Score:
    """One figure of the encoder, or of a baseline."""

    value: float
    interval: tuple[float, float] | None = None         # 95 %; of a baseline, that of the difference
    difference: float | None = None                     # of a baseline: the encoder's less its own
    deviation: float | None = None
    seeds: tuple[int, float, float] | None = None       # how many, their mean and deviation


@dataclass
class Evaluation:
    """One result of this very encoder."""

    protocol: str
    regions: bool                                       # outlined ones, which come from a folder of any name
    datasets: list[str]
    counts: tuple[int, int, int]                        # tiles or regions of bank and query; patients of the query
    splits: tuple[str, str]
    seen: dict[str, int] | None                         # of the query, in pretraining, by kind; None: nobody knows
    table: bool                                         # what was to be guessed is of a table of its owner's
    scores: list[tuple[str, str, Score, dict[str, Score]]]      # figure, of which labels, the encoder's, the baselines'

    @property
    def listed(self) -> bool:
        """Whether it may stand in a list of results: all labels known, of tiles' classes, and nothing seen in
        pretraining."""
        return not self.regions and self.seen == {} and not any(
            labels or figure == "r2" for figure, labels, *_ in self.scores)


@dataclass
class Effort:
    """What it took, as run.json has it."""

    attempts: int
    hours: float
    more: bool                      # an attempt was killed, and nobody knows when
    ranks: list[int]
    machines: list[int]
    devices: list[str]


@dataclass
class Facts:
    """All that the card tells."""

    architecture: str
    tiles: bool                     # an Encoder, of tiles; or a network of slides
    samples: str                    # what it learnt of: tiles or slides
    width: int                      # of the vector of a tile; 0: it makes maps
    classes: int                    # of maps
    parameters: int
    size: int                       # of a network of timm's
    mean: list[float]
    std: list[float]
    sha256: str
    forms: dict[str, str]           # onnx, torchscript: the file beside
    train: configs.Train
    method: Any                     # its settings
    step: int
    datasets: list[Dataset]
    there: int                      # tiles in the shards, read or not
    namesakes: int                  # patients that another dataset has one of the same name of
    effort: Effort
    environment: dict[str, Any]
    evaluations: list[Evaluation]


def gathered(home: Path, run: Path, forms: dict[str, str], encoder: Any, train: configs.Train, reader: Reader,
             step: int) -> Facts:
    """The facts of the encoder in `home`, of a run folder; `forms`: by kind, the files that may lie beside it."""
    sha256 = encoders.digest(home)
    known = {found.fingerprint: [card["name"] for card in found.datasets] for found in reader.indexes}
    counted = datasets(reader)
    timm = isinstance(encoder, Encoder)
    return Facts(
        encoder.name, timm, "slides" if index.draws(reader.indexes[0]) else "tiles",
        0 if timm and encoder.maps else encoder.width, encoder.classes() if timm and encoder.maps else 0,
        sum(each.numel() for each in encoder.parameters()), encoders.trained_size(home) if timm else 0,
        list(encoder.mean) if timm else [], list(encoder.std) if timm else [], sha256,
        {kind: name for kind, name in forms.items() if (home / name).is_file()}, train, configs.method_config(train),
        step, counted, sum(found.samples for found in reader.indexes),
        sum(each.patients for each in counted) - len(reader.distinct("patient") - {""}),
        effort(_json(run / "run.json")), a_dict(_json(run / "env.json")), evaluations(run / "eval", sha256, known))


def datasets(reader: Reader) -> list[Dataset]:
    """What was read of every dataset, the largest first. Slides of two datasets are two, whatever they are called."""
    rows = reader.all_rows()
    place = {name: number for number, name in enumerate(reader.datasets)}
    own = np.array([place[name] for name, _ in reader.words("dataset")])[reader.codes("dataset", rows)]
    mpp = np.round(np.array(reader.column("mpp", rows), np.float64), 4)
    words = {column: _words(reader, column, rows) for column in ("slide", "patient", "organ", "stain")}
    found = []
    for name, tiles in zip(reader.datasets, reader.sizes.tolist(), strict=True):
        cards = [card for each in reader.indexes for card in each.datasets if card["name"] == name]
        patients = words["patient"][name]
        found.append(Dataset(
            printable(name), tiles, len(words["slide"][name]), len(patients - {""}), "" in patients,
            _sorted(words["organ"][name]), _sorted(words["stain"][name]),
            [float(each) for each in np.unique(mpp[own == place[name]]) if np.isfinite(each)],
            _sorted(card.get("licence") or "" for card in cards)))
    return sorted((each for each in found if each.tiles), key=lambda each: -each.tiles)


def _words(reader: Reader, column: str, rows: np.ndarray) -> dict[str, set[str]]:
    """The words of a column that rows of each dataset use."""
    known, found = reader.words(column), {name: set[str]() for name in reader.datasets}
    for code in np.unique(reader.codes(column, rows)).tolist():
        dataset, word = known[code]
        found[dataset].add(word)
    return found


def _sorted(words: Iterable[Any]) -> list[str]:
    return sorted({printable(each) or "unknown" for each in words})


def effort(account: Any) -> Effort:
    """What run.json tells of all attempts; the one that goes on ends, so far, with its last sign of life."""
    attempts = [each for each in a_list(under(account, "attempts")) if isinstance(each, dict)]
    seconds, more = 0.0, False
    for each in attempts:
        begun = _moment(each.get("started"))
        ended = _moment(each.get("ended")) or (_moment(under(account, "heartbeat")) if each is attempts[-1] else None)
        if begun is None or ended is None:
            more = True
        else:
            seconds += max(0.0, (ended - begun).total_seconds())
    numbers = {name: sorted({int(value) for each in attempts if (value := _number(each.get(name)))})
               for name in ("world", "machines")}
    return Effort(len(attempts), seconds / 3600, more, numbers["world"], numbers["machines"],
                  sorted({printable(each["device"]) for each in attempts if each.get("device")}))


def evaluations(home: Path, sha256: str, known: dict[str, list[str]]) -> list[Evaluation]:
    """The results on tiles and on outlined regions in a folder that are of these weights; `known`: names of datasets by
    the fingerprint of shards. What was asked about slides (mil) is of a model on top as well, and the report tells of
    it."""
    found = []
    for path in sorted(home.glob("*.json"), key=lambda each: each.stem):
        told = _json(path)
        if under(told, "encoder", "sha256") == sha256 and under(told, "protocol") != "mil" and (
                scores := _scores(told)):
            shards = [each for each in a_list(under(told, "shards")) if isinstance(each, dict)]
            seen = {printable(kind): _number(count)
                    for kind, count in a_dict(under(told, "seen_in_pretraining")).items()}
            query = printable(under(told, "asked", "query") or "all")
            counts = [int(_number(under(told, "counts", name)) or 0) for name in ("bank", "queries", "query_patients")]
            found.append(Evaluation(
                _protocol(told), under(told, "counts", "of") == "regions",
                [name for each in shards for name in _names(each, known)],
                (counts[0], counts[1], counts[2]),
                (printable(under(told, "asked", "bank") or "all"), HELD.get(query, query)),
                {kind: int(count) for kind, count in seen.items() if count} if seen and None not in seen.values()
                else None,
                bool(under(told, "asked", "targets")), scores))
    return found


def _names(shards: dict[str, Any], known: dict[str, list[str]]) -> list[str]:
    """What a result's shards are called: as it says, as the run's own are, or else by their digest alone: a path may
    hold any name."""
    digest = str(shards.get("fingerprint") or "unknown")
    return [printable(name) for name in a_list(shards.get("datasets")) or known.get(digest, [f"shards {digest[:12]}"])]


def _protocol(told: Any) -> str:
    name = printable(under(told, "protocol") or "unknown")
    k = _number(under(told, "k"))
    if name == "segment":
        step, number = (printable(under(told, key)) for key in ("step", "class"))
        return f"{PROTOCOLS[name]}, class {number} of step {step}, cut at {printable(under(told, 'cut') or 'half')}"
    return PROTOCOLS.get(name, name) + (f", k = {k:g}" if name == "knn" and k else "")


def _scores(told: Any) -> list[tuple[str, str, Score, dict[str, Score]]]:
    """The main figures of a result; where few labels were tried, those of every number of labels."""
    names, found = list(a_dict(under(told, "baselines"))), []
    if under(told, "protocol") == "low":
        curves = {name: {_labels(row): score for row in a_list(under(told, "curves", name)) if (score := _spread(row))}
                  for name in ("encoder", *names)}
        return [("balanced_accuracy", labels, own, {name: curves[name][labels] for name in names
                                                    if labels in curves[name]})
                for labels, own in curves["encoder"].items()]
    for figure in FIGURES:
        if (value := _number(under(told, "metrics", figure))) is None:
            continue
        others = {name: Score(its, _pair(under(told, "against", name, figure, "interval")),
                              _number(under(told, "against", name, figure, "difference")),
                              seeds=_seeds(told, name, figure))
                  for name in names if (its := _number(under(told, "baselines", name, figure))) is not None}
        found.append((figure, "", Score(value, _pair(under(told, "intervals", figure)),
                                        seeds=_seeds(told, "encoder", figure)), others))
    return found


def _labels(row: Any) -> str:
    share, each = _number(under(row, "share")), _number(under(row, "per_class"))
    return f"{100 * share:g} % of the labels" if share is not None else f"{each or 0:g} labels a class"


def _spread(row: Any) -> Score | None:
    mean, deviation = (_number(under(row, "balanced_accuracy", name)) for name in ("mean", "deviation"))
    several = (_number(under(row, "draws")) or 0) > 1
    return None if mean is None else Score(mean, deviation=deviation if several else None)


def _seeds(told: Any, who: str, figure: str) -> tuple[int, float, float] | None:
    summed = under(told, "seeds", who, figure)
    mean, deviation = (_number(under(summed, name)) for name in ("mean", "deviation"))
    return None if mean is None or deviation is None else (len(a_list(under(summed, "values"))), mean, deviation)


# What files may hold instead of what they should.


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def under(told: Any, *keys: str) -> Any:
    """What lies under keys, where there is such a thing."""
    for key in keys:
        told = told.get(key) if isinstance(told, dict) else None
    return told


def a_list(told: Any) -> list[Any]:
    """It, if it is one, or an empty one."""
    return told if isinstance(told, list) else []


def a_dict(told: Any) -> dict[str, Any]:
    """It, if it is one, or an empty one."""
    return told if isinstance(told, dict) else {}


def _number(told: Any) -> float | None:
    try:
        found = float(told) if isinstance(told, int | float) and not isinstance(told, bool) else math.nan
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _pair(told: Any) -> tuple[float, float] | None:
    low, high = (_number(each) for each in told) if isinstance(told, list) and len(told) == 2 else (None, None)
    return None if low is None or high is None else (low, high)


def _moment(told: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(str(told)).astimezone()
    except (ValueError, OverflowError, OSError):
        return None


def printable(told: Any) -> str:
    """Anybody's text as one line of what can be printed."""
    return " ".join("".join(each if each.isprintable() else " " for each in str(told)).split())[:LONGEST]
