"""What protocols share: two splits that may be compared, features of an encoder and its baselines, a result's facts.

Q queries   B bank   D width   C classes   S tiles of a split
"""

import contextlib
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards import folder
from shards.index import ShardError
from ssl_dist.eval import features, intervals, leakage, metrics
from ssl_dist.eval.cache import Cache
from ssl_dist.eval.features import Split
from ssl_dist.eval.settings import BASELINES, Eval, Every, Judged, PixelWise, Protocol
from ssl_dist.models import encoder as encoders

UNKNOWN = ""            # the patient of a tile whose source does not say
APART = 0.3             # of a doubling of µm/px, from which on an encoder sees what it was not trained for

Progress = Callable[[str, int, int], None]


@dataclass
class Verdict:
    """What a protocol makes of one encoder's features."""

    scores_QC: np.ndarray                                           # of every query, how likely each class is
    facts: dict[str, Any] = field(default_factory=dict)             # what was chosen on the way, for the result
    curve: list[dict[str, Any]] = field(default_factory=list)       # figures that depend on something, a row a value


class Source:
    """Where features come from: the encoder, another one, or what neither was trained."""

    def __init__(self, name: str, settings: Eval):
        """`name`: encoder, random, colours, or another encoder's folder or name. Refuses a size that it does not take.
        """
        self.name, self.size, self.architecture, self.digest = name, 0, name, name
        self.looks: dict[str, Any] = {}         # what decides its vectors beside its weights
        if name == "colours":
            return
        self._path = settings.encoder if name in ("encoder", "random") else name
        self.size = settings.size or encoders.trained_size(self._path)
        with torch.device("meta"):
            plan = encoders.build(self._path).eval()
            plan.tries(1, self.size)
        self.architecture, self.looks = plan.name, plan.identity
        self.digest = f"{plan.name} {plan.args} {settings.seed}" if name == "random" else encoders.digest(self._path)

    def features(self, split: Split, cache: Cache, settings: Eval, device: torch.device, threads: int,
                 progress: Callable[[int, int], None]) -> Tensor:
        """The vectors (S, D) of a split."""
        def make() -> Tensor:
            if self.name == "colours":
                return features.colours(split, batch=settings.batch, threads=threads, progress=progress)
            return features.extract(self.network(settings.seed), split, size=self.size, batch=settings.batch,
                                    threads=threads, device=device, progress=progress, precision=settings.precision)

        found = cache.get({"of": self.digest, "looks": self.looks, "size": self.size, "precision": settings.precision,
                           "torch": torch.__version__, **split.identity}, make)
        if not bool(found.isfinite().all()):
            raise encoders.EncoderError(f"{self.name} gives features that are no numbers; its weights are damaged")
        return found

    def told(self, settings: Eval) -> dict[str, str]:
        """Which it is, for a result."""
        return {"path": settings.encoder, "architecture": self.architecture, "sha256": self.digest}

    def network(self, seed: int) -> encoders.Encoder:
        """The encoder with its weights."""
        if self.name != "random":
            return encoders.load(self._path)
        torch.manual_seed(seed)
        return encoders.build(self._path)


Judge = Callable[[Tensor, Split, Tensor, Split], Verdict]           # features of the bank (B, D), and of the queries


def run(settings: Judged, judge: Judge, device: torch.device, threads: int, progress: Progress,
        allow: Callable[[Split], None] = lambda _: None,
        draw: Callable[[Split, Split, Path], list[str]] = lambda *_: []) -> dict[str, Any]:
    """Judges the encoder and every baseline by their features; writes and returns the result.

    `allow` refuses a bank that cannot be judged by, before anything is computed; `draw` may add pictures, beside the
    file of the result and named as it is.
    """
    cache = Cache(settings.home / "features" if settings.cache else None)

    def judged(source: Source, bank: Split, query: Split) -> Verdict:
        vectors = [source.features(split, cache, settings, device, threads,
                                   functools.partial(progress, f"{source.name}, {name}"))
                   for name, split in (("bank", bank), ("query", query))]
        return judge(vectors[0], bank, vectors[1], query)

    return compare(settings, judged, allow, draw)


def rehearse(settings: Eval, allow: Callable[[Any, Split], None] = lambda *_: None) -> dict[str, Any]:
    """Everything that can fail before a tile is looked at; what would be compared."""
    named = settings.baselines if isinstance(settings, Judged) else []
    sources = [Source(what, settings) for what in ("encoder", *named)]
    tiles: dict[str, Any] = {}
    told = {"encoder": f"{sources[0].architecture}, at {sources[0].size} px", "baselines": ", ".join(named) or "none"}
    if isinstance(settings, Judged):
        with _compared(settings) as (bank, query):
            allow(settings, bank)
            tiles = {"tiles to learn from": len(bank.taught), "tiles asked about": len(query.rows),
                     **({} if bank.valid_S is None else {"tiles to choose by": int(bank.valid_S.sum())}),
                     "classes": ", ".join(bank.classes) or "none", "warnings": [*dict.fromkeys(
                         [*bank.remarks, *query.remarks, *_doubts(settings, query, _overlaps(
                             settings, query))])]}
    elif isinstance(settings, Every):
        split = features.every(settings.data.shards, settings.data.split)
        split.reader.close()
        tiles = {"tiles": len(split.rows), "slides": len(set(split.slides))}
    return {"protocol": settings.protocol, **told, **tiles, "out": str(settings.home)}


def repeated(once: Callable[[Any], dict[str, Any]], settings: Protocol) -> dict[str, Any]:
    """The result of the first seed, and beside it the figures of every: what is drawn (held out, untrained) varies,
    and the encoder does not."""
    # The first at last: pictures that are left are of it.
    seeds = settings.seeds if isinstance(settings, Judged | PixelWise) else 1
    results = [once(replace(settings, seed=settings.seed + number)) for number in reversed(range(seeds))][::-1]
    first = results[0]
    if seeds > 1:
        first["seeds"] = {what: {name: _summed([each[name] for each in found if name in each])
                                 for name in found[0] if name in first["metrics"]}
                          for what, found in {"encoder": [each["metrics"] for each in results], **{
                              what: [each["baselines"][what] for each in results] for what in first["baselines"]}
                              }.items()}
        folder.write_json(Path(first["written"]), first)
    return first


def _summed(values: list[float]) -> dict[str, Any]:
    return {"mean": round(float(np.mean(values)), 4), "deviation": round(float(np.std(values, ddof=1)), 4)
            if len(values) > 1 else 0.0, "values": values}


def compare(settings: Judged, judged: Callable[[Source, Split, Split], Verdict],
            allow: Callable[[Split], None] = lambda _: None,
            draw: Callable[[Split, Split, Path], list[str]] = lambda *_: []) -> dict[str, Any]:
    """What `judged` makes of the encoder and of every baseline, in figures; writes and returns the result."""
    sources, data = [Source(what, settings) for what in ("encoder", *settings.baselines)], settings.data
    with _compared(settings) as (bank, query):
        allow(bank)
        out = folder.make(settings.home)        # refused before the work, and not after it
        verdicts = {source.name: judged(source, bank, query) for source in sources}
        curves = {what: verdict.curve for what, verdict in verdicts.items() if verdict.curve}
        measures = {what: _measure(query, settings, verdict.scores_QC) for what, verdict in verdicts.items()}
        drawn, own = intervals.drawings(query.groups, settings.seed), verdicts.pop("encoder")
        confusion = [] if query.targets_SC is not None else metrics.confusion(
            query.labels_S.numpy(), own.scores_QC.argmax(axis=1), len(bank.classes)).astype(int).tolist()
        seen = _overlaps(settings, query)
        result = {
            "protocol": settings.protocol, "size": sources[0].size, **own.facts,
            "encoder": sources[0].told(settings), "shards": bank.told(settings.data.shards),
            "metrics": figures(measures["encoder"]),
            "intervals": intervals.intervals(measures["encoder"], drawn),
            "baselines": {what: {**figures(measures[what]), **verdict.facts} for what, verdict in verdicts.items()},
            "against": {what: intervals.compared(measures["encoder"], measures[what], drawn) for what in verdicts},
            "counts": {"bank": len(bank.taught), "queries": len(query.rows),
                       **({} if bank.valid_S is None else {"valid": int(bank.valid_S.sum())}),
                       "bank_patients": len(set(bank.patients) - {UNKNOWN}),
                       "query_patients": len(set(query.patients) - {UNKNOWN}), "shared_patients": 0,
                       "unknown_patients": query.patients.count(UNKNOWN)},
            **({"curves": curves} if curves else {}),
            "seen_in_pretraining": seen["encoder"],
            "seen_by_baselines": {name: told for name, told in seen.items() if name != "encoder"},
            "classes": bank.classes, "confusion": confusion, "pictures": [],
            "warnings": [*dict.fromkeys([*bank.remarks, *query.remarks]), *_doubts(settings, query, seen)],
            "asked": {"bank": data.bank, "query": data.hold or data.query, "targets": str(data.targets or ""),
                      **({"valid": data.valid} if data.valid else {}),
                      **({"part": data.part} if data.hold else {})},
            "seed": settings.seed,
        }
        path = place(out, settings.protocol, result)
        result |= {"pictures": draw(bank, query, path), "written": str(path)}
    folder.write_json(path, result)
    return result


def place(out: Path, protocol: str, result: dict[str, Any]) -> Path:
    """The file of a result; of other tiles than those that one there is of, or of an encoder elsewhere, another."""
    def tiles(told: dict[str, Any]) -> Any:
        return [each["fingerprint"] for each in told["shards"]], told.get("asked"), told.get("size"), \
            told["encoder"].get("path")

    number = 1
    while True:
        path = out / (f"{protocol}.json" if number == 1 else f"{protocol}-{number}.json")
        try:
            if tiles(json.loads(path.read_text())) == tiles(result):
                return path
        except (OSError, ValueError, KeyError, TypeError):
            return path         # none, or none that could be read
        number += 1


@contextlib.contextmanager
def _compared(settings: Judged) -> Iterator[tuple[Split, Split]]:
    """Both splits, if a figure of merit between them would mean something."""
    data = settings.data

    def labelled(split: str, valid: str = "") -> Split:
        return features.told(data.shards, split, data.targets, data.kind, valid) if data.targets else \
            features.labelled(data.shards, split, valid)

    bank = labelled(data.bank, data.valid if settings.CHOOSES else "")
    names = data.bank or "all", data.query
    if data.hold:
        bank, query = features.held_out(bank, data.hold, data.part, settings.seed)
        names = f"what is left of {data.bank or 'all'}", f"what data.hold={data.hold} holds out"
    else:
        query = labelled(data.query)
    with contextlib.closing(bank.reader), contextlib.closing(query.reader):
        for name, split in ((names[0], bank.part(bank.taught)), (names[1], query)):
            if split.targets_SC is None and len(split.labels_S.unique()) < 2:
                raise ShardError(f"split {name!r} holds one class only: every guess would be right; label more classes")
            if split.targets_SC is not None and bool((split.targets_SC == split.targets_SC[0]).all(dim=0).any()):
                raise ShardError(f"split {name!r} holds one value only of a column of {data.targets}: every guess "
                                 "would be right; leave that column out")
        sides = {names[0]: bank, names[1]: query} if bank.valid_S is None else {
            names[0]: bank.part(bank.taught), data.valid: bank.part(np.flatnonzero(bank.valid_S)), names[1]: query}
        for (name, one), (other_name, other) in itertools.combinations(sides.items(), 2):
            if shared := sorted(set(one.patients) & set(other.patients) - {UNKNOWN}):
                raise ShardError(f"{len(shared)} patients are in both {name!r} and {other_name!r} ({shared[0]!r}, …): "
                                 "tiles of one patient resemble each other, so the score would be too good; shard "
                                 "again with a split by patient, or use data.hold=patient")
        yield bank, query


def _measure(query: Split, settings: Judged, scores_QC: np.ndarray) -> metrics.Measure:
    """The figures that go with what was guessed."""
    if query.targets_SC is None:
        return metrics.classification(query.labels_S.numpy(), scores_QC, ordered=settings.data.ordered)
    truth_QC = query.targets_SC.numpy()
    return metrics.several(truth_QC > 0, scores_QC) if settings.data.kind == "several" else \
        metrics.regression(truth_QC[:, 0].astype(np.float64), scores_QC[:, 0].astype(np.float64))


def figures(measure: metrics.Measure) -> dict[str, float]:
    """Those that are numbers, for a result."""
    return {name: round(value, 4) for name, value in measure(None).items() if np.isfinite(value)}


def _overlaps(settings: Judged, query: Split) -> dict[str, dict[str, int] | None]:
    """What of the query the encoder was pretrained on, and every baseline that is an encoder."""
    others = [name for name in settings.baselines if name not in BASELINES]
    return {"encoder": leakage.overlap(settings.encoder, query),
            **{name: leakage.overlap(name, query) for name in others}}


def _doubts(settings: Judged, query: Split, seen: dict[str, dict[str, int] | None]) -> list[str]:
    """Why the figures may be better or worse than they should."""
    cards = {name: _card(settings.encoder if name == "encoder" else name) for name in seen}
    who = {name: "the encoder" if name == "encoder" else f"baseline {name}" for name in seen}
    found = [words for name, told in seen.items() if told for words in _seen(
        who[name], "this figure" if name == "encoder" else "its figure", told)]
    if seen["encoder"] is None and cards["encoder"]:
        found.append("whether the query was seen in pretraining is not known: pretraining.json is not beside the "
                     "encoder, or damaged; export it again with: ssl-dist export RUN")
    if unknown := query.patients.count(UNKNOWN):
        found.append(f"the patients of {unknown} query tiles are unknown; some may be in the bank as well")
    if (groups := len(set(query.groups))) < intervals.FEWEST:
        found.append(f"the query is of {groups} patients or slides, too few for intervals: figures may be chance")
    shown = sorted({round(float(each), 4) for each in query.reader.column("mpp", query.rows) if np.isfinite(each)})
    for name, told in cards.items():
        trained = [each for each in told.get("mpp") or [] if isinstance(each, int | float) and each > 0]
        strange = [each for each in shown if trained and min(abs(np.log2(each / other)) for other in trained) > APART]
        if strange:
            found.append(f"the query has tiles of {strange[0]:g} µm/px, and {who[name]} was trained at "
                         f"{', '.join(f'{each:g}' for each in trained[:3])}; shard anew with mpp=[{trained[0]:g}]")
    return found


def _seen(who: str, what: str, seen: dict[str, int]) -> list[str]:
    """A patient or slide is known by its name alone: another hospital's may be called the same."""
    kinds = {"tiles": "of the query's tiles", "slides": "slides that are named as the query's",
             "patients": "patients that are named as the query's"}
    words = [f"{count} {kinds[name]}" for name, count in seen.items() if count]
    return [f"{who} was pretrained on {', '.join(words)}; {what} is too good"] if words else []


def _card(encoder: str) -> dict[str, Any]:
    """What an encoder of ours says of itself."""
    about = encoders.card(encoder).get("ssl_dist")
    return about if isinstance(about, dict) else {}
