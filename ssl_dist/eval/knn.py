"""k nearest neighbours: does what looks alike to the encoder carry the same name? Nothing is trained.

Q queries   B bank   K neighbours   D width   C classes
"""

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shards.index import ShardError
from ssl_dist.eval import protocol, sheets
from ssl_dist.eval.features import Split
from ssl_dist.eval.protocol import Progress, Verdict
from ssl_dist.eval.settings import Knn

ROWS = 8            # queries on the picture


def allow(settings: Knn, bank: Split) -> None:
    """Refuses more neighbours than there are."""
    if len(bank.rows) < settings.k:
        raise ShardError(f"k={settings.k} neighbours are more than the {len(bank.rows)} tiles of the bank; lower k")


def neighbours(query_QD: Tensor, bank_BD: Tensor, k: int, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Cosine similarity (Q, K) and place in the bank (Q, K) of the k nearest, the nearest first."""
    bank_BD = F.normalize(bank_BD, dim=1)
    found = [(F.normalize(part, dim=1) @ bank_BD.T).topk(k, dim=1) for part in query_QD.split(chunk)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def votes(similarity_QK: Tensor, labels_QK: Tensor, classes: int, temperature: float) -> Tensor:
    """The share (Q, C) of each class in the votes; a neighbour's weighs exp(similarity / temperature) (Wu et al. 2018).
    """
    weight_QK = _weights(similarity_QK, temperature)
    votes_QC = torch.zeros(len(labels_QK), classes).scatter_add_(1, labels_QK, weight_QK)
    return votes_QC / votes_QC.sum(dim=1, keepdim=True)


def averaged(similarity_QK: Tensor, values_QKC: Tensor, temperature: float) -> Tensor:
    """What the neighbours have (Q, C), by the same weights."""
    weight_QK = _weights(similarity_QK, temperature)
    return (weight_QK[..., None] * values_QKC).sum(dim=1) / weight_QK.sum(dim=1, keepdim=True)


def _weights(similarity_QK: Tensor, temperature: float) -> Tensor:
    # Less its largest: only the proportions count, and e^(1/0.01) would not fit.
    return ((similarity_QK - similarity_QK[:, :1]) / temperature).exp()


def run(settings: Knn, device: torch.device, threads: int, progress: Progress) -> dict[str, Any]:
    """The protocol: features of both splits, a vote for every query, and the same for each baseline."""
    shown: list[tuple[Tensor, Tensor]] = []         # of the encoder, which is judged first

    def judge(bank_BD: Tensor, bank: Split, query_QD: Tensor, query: Split) -> Verdict:      # noqa: ARG001
        similarity_QK, places_QK = neighbours(query_QD, bank_BD, settings.k)
        if bank.targets_SC is not None:
            return Verdict(averaged(similarity_QK, bank.targets_SC[places_QK], settings.temperature).double().numpy(),
                           {"k": settings.k, "temperature": settings.temperature})
        votes_QC = votes(similarity_QK, bank.labels_S[places_QK], len(bank.classes), settings.temperature)
        shown.append((places_QK, votes_QC.argmax(dim=1)))
        return Verdict(votes_QC.double().numpy(), {"k": settings.k, "temperature": settings.temperature})

    def draw(bank: Split, query: Split, result: Path) -> list[str]:
        if not shown:       # of numbers, and of several labels, there is no one word to write beside a tile
            return []
        places_QK, answer_Q = shown[0]
        # Evenly through the classes, so that the sheet does not show what the tars happened to begin with.
        order = torch.argsort(query.labels_S, stable=True)
        rows = order[torch.linspace(0, len(order) - 1, min(ROWS, len(order))).long()].numpy()
        sheets.votes(bank, query, rows, places_QK[rows, :sheets.NEAREST].numpy(), answer_Q[rows].tolist(),
                     result.with_name(f"{result.stem}_neighbours.png"))
        return [f"{result.stem}_neighbours.png"]

    return protocol.run(settings, judge, device, threads, progress, functools.partial(allow, settings), draw)
