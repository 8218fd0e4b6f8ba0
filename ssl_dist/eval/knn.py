"""k nearest neighbours: does what looks alike to the encoder carry the same name? Nothing is trained.

Q queries   B bank   K neighbours   D width   C classes
"""

import contextlib
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from shards import folder
from shards.index import ShardError
from ssl_dist.config import Eval
from ssl_dist.eval import features, leakage, metrics
from ssl_dist.eval.features import Split
from ssl_dist.models import encoder as encoders

UNKNOWN = ""            # the patient of a tile whose source does not say

Progress = Callable[[str, int, int], None]


def neighbours(query_QD: Tensor, bank_BD: Tensor, k: int, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Cosine similarity (Q, K) and place in the bank (Q, K) of the k nearest, the nearest first."""
    bank_BD = F.normalize(bank_BD, dim=1)
    found = [(F.normalize(part, dim=1) @ bank_BD.T).topk(k, dim=1) for part in query_QD.split(chunk)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def vote(similarity_QK: Tensor, labels_QK: Tensor, classes: int, temperature: float) -> Tensor:
    """The class (Q,) with the most votes; a neighbour's vote weighs exp(similarity / temperature) (Wu et al. 2018)."""
    # Less its largest: only the proportions count, and e^(1/0.01) would not fit.
    weight_QK = ((similarity_QK - similarity_QK[:, :1]) / temperature).exp()
    votes_QC = torch.zeros(len(labels_QK), classes).scatter_add_(1, labels_QK, weight_QK)
    return votes_QC.argmax(dim=1)


def run(settings: Eval, device: torch.device, threads: int, progress: Progress) -> dict[str, Any]:
    """The protocol: features of both splits, a vote for every query, and the same for each baseline."""
    bank = features.labelled(settings.data.shards, settings.data.bank)
    query = features.labelled(settings.data.shards, settings.data.query)
    with contextlib.closing(bank.reader), contextlib.closing(query.reader):
        return _run(settings, bank, query, device, threads, progress)


def _run(settings: Eval, bank: Split, query: Split, device: torch.device, threads: int,
         progress: Progress) -> dict[str, Any]:
    if len(bank.rows) < settings.k:
        raise ShardError(f"k={settings.k} neighbours are more than the {len(bank.rows)} tiles of the bank; lower k")
    for name, split in ((settings.data.bank, bank), (settings.data.query, query)):
        if len(split.labels_S.unique()) < 2:
            raise ShardError(f"split {name!r} holds one class only: every guess would be right; label more classes")
    shared = sorted(set(bank.patients) & set(query.patients) - {UNKNOWN})
    if shared:
        raise ShardError(f"{len(shared)} patients are in both {settings.data.bank!r} and {settings.data.query!r} ("
                         f"{shared[0]!r}, …): tiles of one patient resemble each other, so the score would be too "
                         "good; split by patient and shard again")

    size = settings.size or encoders.trained_size(settings.encoder)

    def guess(encoder: encoders.Encoder, what: str) -> tuple[Tensor, Tensor]:
        vectors = [features.extract(encoder, split, size=size, batch=settings.batch, threads=threads,
                                    device=device, progress=functools.partial(progress, f"{what}, {name}"))
                   for name, split in (("bank", bank), ("query", query))]
        if not all(bool(each.isfinite().all()) for each in vectors):
            raise encoders.EncoderError(f"{what} gives features that are no numbers; its weights are damaged")
        similarity_QK, places_QK = neighbours(vectors[1], vectors[0], settings.k)
        return vote(similarity_QK, bank.labels_S[places_QK], len(bank.classes), settings.temperature), places_QK

    answer_Q, places_QK = guess(encoders.load(settings.encoder), "encoder")
    counts_CC = metrics.confusion(query.labels_S.numpy(), answer_Q.numpy(), len(bank.classes))
    baselines = {}
    for name in settings.baselines:
        torch.manual_seed(settings.seed)
        random_Q, _ = guess(encoders.build(settings.encoder), name)
        baselines[name] = _figures(metrics.confusion(query.labels_S.numpy(), random_Q.numpy(), len(bank.classes)))
    out = folder.make(settings.out or settings.encoder.parent / "eval")
    _sheet(bank, query, places_QK, answer_Q, out / "knn_neighbours.png")
    result = {
        "protocol": "knn", "size": size, "k": settings.k, "temperature": settings.temperature,
        "encoder": {"path": str(settings.encoder), "architecture": encoders.build(settings.encoder).name,
                    "sha256": encoders.digest(settings.encoder)},
        "shards": [{"path": str(path), "fingerprint": found.fingerprint}
                   for path, found in zip(settings.data.shards, bank.reader.indexes, strict=True)],
        "metrics": _figures(counts_CC), "baselines": baselines,
        "counts": {"bank": len(bank.rows), "queries": len(query.rows),
                   "bank_patients": len(set(bank.patients) - {UNKNOWN}),
                   "query_patients": len(set(query.patients) - {UNKNOWN}), "shared_patients": len(shared),
                   "unknown_patients": query.patients.count(UNKNOWN)},
        "seen_in_pretraining": leakage.overlap(settings.encoder, query),
        "classes": bank.classes, "confusion": counts_CC.tolist(), "pictures": ["knn_neighbours.png"],
        "seed": settings.seed,
    }
    folder.write_json(out / "knn.json", result)
    return result


def _figures(counts_CC: np.ndarray) -> dict[str, float]:
    return {"accuracy": round(metrics.accuracy(counts_CC), 4),
            "balanced_accuracy": round(metrics.balanced_accuracy(counts_CC), 4)}


def _sheet(bank: Split, query: Split, places_QK: Tensor, answer_Q: Tensor, out: Path, rows: int = 8) -> None:
    """Queries on the left, their nearest tiles of other patients to the right; framed green where the class agrees."""
    side, gap, columns = 96, 8, min(7, places_QK.shape[1])
    # Evenly through the classes, so that the sheet does not show what the tars happened to begin with.
    order = torch.argsort(query.labels_S, stable=True)
    chosen = order[torch.linspace(0, len(order) - 1, min(rows, len(order))).long()]
    extent = (columns + 1) * (side + gap) + 2 * gap, len(chosen) * (side + gap + 14) + gap
    sheet = Image.new("RGB", extent, (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for line, number in enumerate(chosen.tolist()):
        top = gap + line * (side + gap + 14)
        truth, guess = (bank.classes[int(labels[number])] for labels in (query.labels_S, answer_Q))
        draw.text((gap, top - 2), f"{truth}" + ("" if truth == guess else f", taken for {guess}"), fill=(0, 0, 0))
        tiles = [(query, number)] + [(bank, place) for place in places_QK[number, :columns].tolist()]
        for column, (split, place) in enumerate(tiles):
            left = gap + column * (side + gap) + (gap if column else 0)
            encoded = split.reader.read(split.rows[[place]])[0].tobytes()
            sheet.paste(Image.open(io.BytesIO(encoded)).convert("RGB").resize((side, side)), (left, top + 12))
            agrees = bool(split.labels_S[place] == query.labels_S[number])
            frame = (60, 60, 60) if column == 0 else ((22, 130, 80) if agrees else (200, 60, 50))
            draw.rectangle((left - 2, top + 10, left + side + 1, top + 13 + side), outline=frame, width=2)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    folder.write(out, buffer.getvalue())
