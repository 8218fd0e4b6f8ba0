"""A linear probe of slides: what does one vector a slide tell, and of how few slides can it be learnt?

The protocol of Giga-SSL (trislaz/gigassl, linear_evaluation.py): logistic regression with C = 10 and balanced classes
on vectors as they are, learnt from 50, 100, 250 and all slides, on ten splits. Here no patient is on both sides of a
split, and the slides of a smaller size are among those of a larger.

S slides   P slides to learn from   Q slides that are asked about   D width   C classes
"""

import io
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from shards import folder
from shards.index import ShardError
from ssl_dist.data import table as tables
from ssl_dist.data import vectors
from ssl_dist.data.vectors import Vectors
from ssl_dist.eval import intervals, metrics, protocol
from ssl_dist.eval.protocol import Progress
from ssl_dist.eval.settings import CHANCE, SlideLinear

TEST, TRAIN = "test", "train"
ALSO = {"testing": TEST, "training": TRAIN}     # as CAMELYON16's folders are called
WHOLE = 1.0             # of the slides there are: what the main figures are of


@dataclass(frozen=True)
class Labels:
    """The slides that have both a vector and a label."""

    rows_S: np.ndarray              # of the vectors
    label_S: np.ndarray             # number of the class
    classes: list[str]
    groups_S: np.ndarray            # patients, or slides where those are not known
    split_S: np.ndarray             # the word of the table's column split, or ""
    warnings: list[str]


@dataclass(frozen=True)
class Part:
    """One split: whom it asks about, and in which order slides to learn from are added."""

    asked_Q: np.ndarray
    learnt_P: np.ndarray


def rehearse(settings: SlideLinear) -> dict[str, Any]:
    """Everything that can fail before a probe learns; what would be learnt from."""
    own = vectors.read(settings.vectors, settings.pooling)
    labels = labelled(settings.labels, own)
    for name in settings.baselines:
        if name != CHANCE:
            _beside(vectors.read(Path(name), settings.pooling), own, labels)
    parts, sizes, said = _planned(settings, labels)
    return {"protocol": settings.protocol, "slides": len(labels.label_S), "patients": len(set(labels.groups_S)),
            "classes": ", ".join(labels.classes), "splits": len(parts), "sizes": ", ".join([*map(str, sizes), "all"]),
            "out": str(settings.home), "warnings": [*labels.warnings, *said]}


def run(settings: SlideLinear, device: torch.device, threads: int, progress: Progress) -> dict[str, Any]:      # noqa: ARG001
    """The protocol: a probe for every size and split, for the vectors and each baseline; writes and returns the
    result."""
    own = vectors.read(settings.vectors, settings.pooling)
    labels = labelled(settings.labels, own)
    others = {name: None if name == CHANCE else _beside(vectors.read(Path(name), settings.pooling), own, labels)
              for name in settings.baselines}
    parts, sizes, said = _planned(settings, labels)
    out = folder.make(settings.home)        # refused before the work, and not after it
    features = {"encoder": own.features_SD[labels.rows_S], **others}
    asked_S = np.unique(np.concatenate([part.asked_Q for part in parts]))
    drawn = intervals.drawings(labels.groups_S[asked_S], settings.seed)
    curves: dict[str, list[dict[str, Any]]] = {}
    measures: dict[str, metrics.Measure] = {}
    counts_CC = np.zeros((len(labels.classes),) * 2)
    unfinished = 0
    for number, (name, vectors_SD) in enumerate(features.items()):
        rows: list[dict[str, Any]] = []
        for size in (*sizes, None):
            # Where the slides asked about are given, all others are learnt from in one way alone.
            turns = parts[:1] if size is None and _given(labels) else parts
            judged = []
            for place, part in enumerate(turns):
                learnt_P = part.learnt_P[:size]
                scores_QC, ended = guessed(vectors_SD, labels, learnt_P, part.asked_Q, settings)
                unfinished += not ended
                judged.append((part.asked_Q, scores_QC, len(learnt_P)))
                progress(f"{name}, {size or 'all'} slides", place + 1, len(turns))
            found = [metrics.classification(labels.label_S[asked_Q], scores_QC)(None)
                     for asked_Q, scores_QC, _ in judged]
            rows.append({**({"share": WHOLE} if size is None else {"slides": size}), "draws": len(found),
                         "learnt": spread([float(learnt) for *_, learnt in judged]),
                         **{key: spread([each[key] for each in found]) for key in found[0]}})
        curves[name] = rows
        # Of the last size, which is of all slides.
        measures[name] = over(judged, labels, asked_S)
        if not number:
            for asked_Q, scores_QC, _ in judged:
                counts_CC += metrics.confusion(labels.label_S[asked_Q], scores_QC.argmax(axis=1), len(labels.classes))
    figures = {name: protocol.figures(measure) for name, measure in measures.items()}
    _plot(curves, len(labels.label_S), out / "slide_linear.png")
    result: dict[str, Any] = {
        "protocol": settings.protocol,
        "encoder": {"path": str(settings.vectors), "architecture": own.architecture, "vectors_of": own.encoder},
        "shards": [{"path": str(settings.vectors), "fingerprint": own.fingerprint, "datasets": []}],
        "metrics": figures.pop("encoder"),
        "intervals": intervals.intervals(measures["encoder"], drawn),
        "baselines": figures,
        "against": {name: intervals.compared(measures["encoder"], measures[name], drawn) for name in others},
        "counts": {"slides": len(labels.label_S), "patients": len(set(labels.groups_S)), "queries": len(asked_S),
                   "splits": len(parts), "width": own.features_SD.shape[1],
                   **({"tiles": own.tiles} if own.tiles > len(own.slides) else {})},
        "curves": curves, "seen_in_pretraining": None, "classes": labels.classes,
        "confusion": counts_CC.astype(int).tolist(), "pictures": ["slide_linear.png"],
        "warnings": [*labels.warnings, *said, *([f"{unfinished} probes had not converged after iterations="
                                                 f"{settings.iterations}"] if unfinished else [])],
        "asked": {"labels": settings.labels.name, "pooling": settings.pooling, "C": settings.strength,
                  "balanced": settings.balanced, "scale": settings.scale},
        "seed": settings.seed,
    }
    result["written"] = str(protocol.place(out, settings.protocol, result))
    folder.write_json(Path(result["written"]), result)
    return result


def labelled(table: Path, own: Vectors) -> Labels:
    """What a table says of the slides that there are vectors of: columns slide and label, perhaps split and patient."""
    head, lines = tables.lines(table, ("slide", "label"))
    told: dict[str, dict[str, str]] = {}
    for number, cells in lines:
        line = {name: cells[name] for name in head if name in ("slide", "label", "split", "patient")}
        if line["label"] and told.setdefault(line["slide"], line) != line:
            raise ShardError(f"{table}, line {number}: slide {line['slide']!r} is told of before, and otherwise; leave "
                             "one of the lines out")
    rows_S = np.array([row for row, slide in enumerate(own.slides) if slide in told], dtype=np.int64)
    if not len(rows_S):
        raise ShardError(f"{table} has no label of a slide of {own.source}: it names {next(iter(told), 'none')!r}, and "
                         f"there is {own.slides[0]!r}")
    known = [told[own.slides[row]] for row in rows_S]
    classes = sorted({line["label"] for line in known})
    if len(classes) < 2:
        raise ShardError(f"{table} knows one class only of these slides, {classes[0]!r}: every guess would be right; "
                         "label more classes")
    split_S = np.array([ALSO.get(line.get("split", ""), line.get("split", "")) for line in known])
    patients = [line.get("patient") or own.patients[row] for row, line in zip(rows_S, known, strict=True)]
    groups_S = np.array([patient or f"slide {own.slides[row]}" for row, patient in zip(rows_S, patients, strict=True)])
    said = []
    if gone := len(told) - len(rows_S):
        first = next(slide for slide in told if slide not in set(own.slides))
        said.append(f"{gone} of {len(told)} labelled slides have no vector ({first!r}, …) and are left out")
    if bare := len(own.slides) - len(rows_S):
        said.append(f"{bare} of {len(own.slides)} slides have no label and are left out")
    if unknown := sum(not patient for patient in patients):
        said.append(f"the patients of {unknown} slides are unknown; some may be on both sides of a split")
    return Labels(rows_S, np.searchsorted(classes, [line["label"] for line in known]), classes, groups_S, split_S, said)


def parted(labels: Labels, count: int, seed: int) -> list[Part]:
    """The splits. Where the table has a column split: with the word test, those slides are asked about, and what is
    learnt from train is drawn `count` times; of other words, each names the slides of one split. Else patients are
    dealt out into `count` parts, classes alike in each, and each part is asked about in turn."""
    words = sorted({*labels.split_S} - {""})
    if _given(labels):
        asked, pool = (np.flatnonzero(labels.split_S == word) for word in (TEST, TRAIN))
        sides = [(asked, pool)] * count
    elif words:
        sides = [(np.flatnonzero(labels.split_S == word),
                  np.flatnonzero((labels.split_S != word) & (labels.split_S != ""))) for word in words]
    else:
        for label, name in enumerate(labels.classes):
            if (patients := len(set(labels.groups_S[labels.label_S == label]))) < count:
                raise ShardError(f"class {name!r} is of {patients} patients, and splits={count} parts need one each; "
                                 "lower splits, or leave the class out")
        deal = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
        sides = [(asked, pool) for pool, asked in deal.split(labels.label_S, labels.label_S, labels.groups_S)]
    for number, (asked, pool) in enumerate(sides, 1):
        if shared := sorted({*labels.groups_S[asked]} & {*labels.groups_S[pool]}):
            raise ShardError(f"{len(shared)} patients are on both sides of split {number} ({str(shared[0])!r}, …): "
                             "slides of one patient resemble each other, so the score would be too good; split by "
                             "patient")
        for side, what in ((asked, "asked about"), (pool, "to learn from")):
            lacking = [name for label, name in enumerate(labels.classes) if label not in labels.label_S[side]]
            if lacking and (what == "to learn from" or len(lacking) > len(labels.classes) - 2):
                raise ShardError(f"split {number} has no slide {what} of class {lacking[0]!r}; lower splits, or leave "
                                 "the class out")
    return [Part(asked, pool[order(labels.label_S[pool], seed + number)]) for number, (asked, pool) in enumerate(sides)]


def order(label_P: np.ndarray, seed: int) -> np.ndarray:
    """Slides in an order of which every beginning holds classes as the whole does, and each once at least."""
    rng, place_P = np.random.default_rng(seed), np.empty(len(label_P))
    for label in np.unique(label_P):
        own = rng.permutation(np.flatnonzero(label_P == label))
        place_P[own] = (np.arange(len(own)) + rng.uniform()) / len(own)
        place_P[own[0]] = -1
    return np.argsort(place_P, kind="stable")


def guessed(vectors_SD: np.ndarray | None, labels: Labels, learnt_P: np.ndarray, asked_Q: np.ndarray,
            settings: SlideLinear) -> tuple[np.ndarray, bool]:
    """How likely each class is of the slides asked about (Q, C), and whether the probe had done learning; without
    vectors as often as it was seen."""
    classes = len(labels.classes)
    if vectors_SD is None:
        share_C = np.bincount(labels.label_S[learnt_P], minlength=classes) / len(learnt_P)
        return np.tile(share_C, (len(asked_Q), 1)), True
    probe = LogisticRegression(C=settings.strength, max_iter=settings.iterations,
                               class_weight="balanced" if settings.balanced else None)
    whole = make_pipeline(StandardScaler(), probe) if settings.scale else make_pipeline(probe)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        whole.fit(vectors_SD[learnt_P].astype(np.float64), labels.label_S[learnt_P])
    scores_QC = np.zeros((len(asked_Q), classes))
    scores_QC[:, probe.classes_] = whole.predict_proba(vectors_SD[asked_Q].astype(np.float64))
    return scores_QC, not any(issubclass(each.category, ConvergenceWarning) for each in caught)


def over(judged: list[tuple[np.ndarray, np.ndarray, int]], labels: Labels, asked_S: np.ndarray) -> metrics.Measure:
    """Figures as means over splits, under weights of all slides that any asks about; a split of which a figure cannot
    be said is left out of its mean."""
    each = [(np.searchsorted(asked_S, asked_Q), metrics.classification(labels.label_S[asked_Q], scores_QC))
            for asked_Q, scores_QC, _ in judged]

    def measure(weights_S: metrics.Numbers | None = None) -> dict[str, float]:
        weights_S = np.ones(len(asked_S)) if weights_S is None else weights_S
        found = [one(weights_S[place_Q]) for place_Q, one in each if weights_S[place_Q].any()]
        return {name: metrics.mean([row[name] for row in found if np.isfinite(row[name])]) for name in found[0]}

    return measure


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation over splits, of those of which the figure can be said."""
    known = [value for value in values if np.isfinite(value)]
    return {"mean": round(metrics.mean(known), 5),
            "deviation": round(float(np.std(known, ddof=1)), 5) if len(known) > 1 else 0.0}


def _given(labels: Labels) -> bool:
    return TEST in labels.split_S


def _beside(other: Vectors, own: Vectors, labels: Labels) -> np.ndarray:
    """The vectors of another table for the same slides."""
    place = {slide: row for row, slide in enumerate(other.slides)}
    names = [own.slides[row] for row in labels.rows_S]
    if missing := [slide for slide in names if slide not in place]:
        raise ShardError(f"baseline {other.source} has no vector of {len(missing)} of {len(names)} slides "
                         f"({missing[0]!r}, …), so it cannot be judged on the same; embed them, or leave it out")
    return other.features_SD[[place[slide] for slide in names]]


def _planned(settings: SlideLinear, labels: Labels) -> tuple[list[Part], list[int], list[str]]:
    """The splits, the sizes that there are slides enough for, and what is to be said of both."""
    said = []
    if _given(labels) and (left := int((~np.isin(labels.split_S, (TRAIN, TEST))).sum())):
        said.append(f"{left} slides are neither of split {TRAIN!r} nor {TEST!r} and are left out")
        keep = np.isin(labels.split_S, (TRAIN, TEST))
        known = replace(labels, split_S=np.where(keep, labels.split_S, ""))
    else:
        known = labels
        if not _given(labels) and (words := sorted({*labels.split_S} - {""})):
            said.append(f"the table's splits are {', '.join(words)} and none is {TEST!r}: each was asked about in "
                        "turn, and the others learnt from")
    parts = parted(known, settings.splits, settings.seed)
    least = min(len(part.learnt_P) for part in parts)
    if small := [size for size in settings.sizes if size < len(labels.classes)]:
        raise ShardError(f"sizes has {small[0]}, and there are {len(labels.classes)} classes; take one slide of each "
                         "at least")
    if large := sorted(size for size in settings.sizes if size >= least):
        said.append(f"sizes {', '.join(map(str, large))} left out: a split has {least} slides to learn from")
    asked = np.unique(np.concatenate([part.asked_Q for part in parts]))
    if (groups := len(set(labels.groups_S[asked]))) < intervals.FEWEST:
        said.append(f"{groups} patients or slides are asked about, too few for intervals: figures may be chance")
    return parts, sorted({size for size in settings.sizes if size < least}), said


def _plot(curves: dict[str, list[dict[str, Any]]], slides: int, out: Path) -> None:
    """AUROC and balanced accuracy over the number of slides learnt from, a line for each table of vectors, as wide as
    its splits differ."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    shown = {"auroc": "AUROC", "balanced_accuracy": "balanced accuracy"}
    for axis, (key, name) in zip(figure.subplots(1, 2), shown.items(), strict=True):
        for number, (who, rows) in enumerate(curves.items()):
            learnt = [row["learnt"]["mean"] for row in rows]
            mean, deviation = (np.array([row[key][part] for row in rows]) for part in ("mean", "deviation"))
            axis.plot(learnt, mean, marker="o", ms=3, color=f"C{number}", label=Path(who).name)
            axis.fill_between(learnt, mean - deviation, mean + deviation, color=f"C{number}", alpha=0.15, lw=0)
        axis.set(xscale="log", xlabel=f"slides learnt from, of {slides}", ylabel=name)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    folder.write(out, buffer.getvalue())
