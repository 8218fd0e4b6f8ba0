"""What protocols share: two splits that may be compared, features of an encoder and its baselines, a result's facts.

Q queries   B bank   D width   C classes   S tiles of a split
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards import folder
from shards.index import ShardError
from ssl_dist.config import Eval
from ssl_dist.eval import features, intervals, leakage, metrics
from ssl_dist.eval.features import Split
from ssl_dist.models import encoder as encoders

UNKNOWN = ""            # the patient of a tile whose source does not say

Progress = Callable[[str, int, int], None]


@dataclass
class Verdict:
    """What a protocol makes of one encoder's features."""

    scores_QC: np.ndarray                                           # of every query, how likely each class is
    facts: dict[str, Any] = field(default_factory=dict)             # what was chosen on the way, for the result


Judge = Callable[[Tensor, Split, Tensor, Split], Verdict]           # features of the bank (B, D), and of the queries


def run(settings: Eval, judge: Judge, device: torch.device, threads: int, progress: Progress,
        allow: Callable[[Split], None] = lambda _: None,
        draw: Callable[[Split, Split, Path], list[str]] = lambda *_: []) -> dict[str, Any]:
    """Judges the encoder and every baseline; writes and returns the result.

    `allow` refuses a bank that cannot be judged by, before anything is computed; `draw` may add pictures.
    """
    size = settings.size or encoders.trained_size(settings.encoder)
    with torch.device("meta"):
        encoders.build(settings.encoder).eval().tries(1, size)
    with _compared(settings) as (bank, query):
        allow(bank)
        verdicts = {}
        for what in ("encoder", *settings.baselines):
            measure = _measure(what, settings, size, device, threads)
            vectors = [measure(split, functools.partial(progress, f"{what}, {name}"))
                       for name, split in (("bank", bank), ("query", query))]
            if not all(bool(each.isfinite().all()) for each in vectors):
                raise encoders.EncoderError(f"{what} gives features that are no numbers; its weights are damaged")
            verdicts[what] = judge(vectors[0], bank, vectors[1], query)
        truth_Q = query.labels_S.numpy()
        measures = {what: metrics.classification(truth_Q, verdict.scores_QC) for what, verdict in verdicts.items()}
        drawn, own = intervals.drawings(query.groups, settings.seed), verdicts.pop("encoder")
        counts_CC = metrics.confusion(truth_Q, own.scores_QC.argmax(axis=1), len(bank.classes))
        out = folder.make(settings.out or settings.encoder.parent / "eval")
        result = {
            "protocol": settings.protocol, "size": size, **own.facts,
            "encoder": {"path": str(settings.encoder), "architecture": encoders.build(settings.encoder).name,
                        "sha256": encoders.digest(settings.encoder)},
            "shards": [{"path": str(path), "fingerprint": found.fingerprint}
                       for path, found in zip(settings.data.shards, bank.reader.indexes, strict=True)],
            "metrics": _figures(measures["encoder"]),
            "intervals": intervals.intervals(measures["encoder"], drawn),
            "baselines": {what: {**_figures(measures[what]), **verdict.facts} for what, verdict in verdicts.items()},
            "against": {what: intervals.compared(measures["encoder"], measures[what], drawn) for what in verdicts},
            "counts": {"bank": len(bank.rows), "queries": len(query.rows),
                       "bank_patients": len(set(bank.patients) - {UNKNOWN}),
                       "query_patients": len(set(query.patients) - {UNKNOWN}), "shared_patients": 0,
                       "unknown_patients": query.patients.count(UNKNOWN)},
            "seen_in_pretraining": leakage.overlap(settings.encoder, query),
            "classes": bank.classes, "confusion": counts_CC.astype(int).tolist(), "pictures": draw(bank, query, out),
            "seed": settings.seed,
        }
    folder.write_json(out / f"{settings.protocol}.json", result)
    return result


@contextlib.contextmanager
def _compared(settings: Eval) -> Iterator[tuple[Split, Split]]:
    """Both splits, if a figure of merit between them would mean something."""
    bank = features.labelled(settings.data.shards, settings.data.bank)
    query = features.labelled(settings.data.shards, settings.data.query)
    with contextlib.closing(bank.reader), contextlib.closing(query.reader):
        for name, split in ((settings.data.bank, bank), (settings.data.query, query)):
            if len(split.labels_S.unique()) < 2:
                raise ShardError(f"split {name!r} holds one class only: every guess would be right; label more classes")
        if shared := sorted(set(bank.patients) & set(query.patients) - {UNKNOWN}):
            raise ShardError(f"{len(shared)} patients are in both {settings.data.bank!r} and {settings.data.query!r} ("
                             f"{shared[0]!r}, …): tiles of one patient resemble each other, so the score would be too "
                             "good; split by patient and shard again")
        yield bank, query


def _measure(what: str, settings: Eval, size: int, device: torch.device,
             threads: int) -> Callable[[Split, Callable[[int, int], None]], Tensor]:
    """How the encoder, or a baseline by its name, turns a split into vectors."""
    if what == "colours":
        return lambda split, progress: features.colours(split, batch=settings.batch, threads=threads, progress=progress)
    if what == "encoder":
        network = encoders.load(settings.encoder)
    else:
        torch.manual_seed(settings.seed)
        network = encoders.build(settings.encoder)
    return lambda split, progress: features.extract(network, split, size=size, batch=settings.batch, threads=threads,
                                                    device=device, progress=progress)


def _figures(measure: metrics.Measure) -> dict[str, float]:
    return {name: round(value, 4) for name, value in measure(None).items() if np.isfinite(value)}
