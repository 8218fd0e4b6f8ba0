"""Few labels: how good is a linear probe that knows one in a hundred, one in ten, half of them?

The labels are chosen several times over. In each choice more labels are those few and others, so that a curve shows
what labels add, and not which were drawn.

Q queries   B bank   D width
"""

import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from shards import folder
from shards.index import ShardError
from ssl_dist.eval import linear, metrics, protocol
from ssl_dist.eval.features import Split
from ssl_dist.eval.protocol import Progress, Verdict
from ssl_dist.eval.settings import Low

BLIND = 0.01            # strength of a probe for which no patients can be held out to choose it by


def run(settings: Low, device: torch.device, threads: int, progress: Progress) -> dict[str, Any]:
    """The protocol: a probe for every number of labels and every choice of them, and one that knows all."""
    shown: list[tuple[str, list[dict[str, Any]]]] = []

    def judge(bank_BD: Tensor, bank: Split, query_QD: Tensor, query: Split) -> Verdict:
        labels_B, groups_B, own, truth = bank.labels_S.numpy(), bank.groups, bank.taught, query.labels_S.numpy()
        rows: list[dict[str, Any]] = []
        for name, value in (*(("share", each) for each in sorted(settings.shares)),
                            *(("per_class", each) for each in sorted(settings.per_class)), ("share", 1.0)):
            found = []
            for draw in range(1 if (name, value) == ("share", 1.0) else settings.draws):
                chosen = own[choice(labels_B[own], groups_B[own], name, value, settings.seed + draw)]
                strength = _strength(bank_BD.numpy(), bank, chosen, settings.seed)
                probe = linear.fitted(bank_BD.numpy()[chosen], labels_B[chosen], strength)
                scores_QC = linear.scores(probe, query_QD.numpy(), len(bank.classes))
                found.append({**metrics.classification(truth, scores_QC)(None), "tiles": len(chosen), "C": strength,
                              "patients": len(np.unique(groups_B[chosen]))})
            rows.append({name: value, "draws": len(found), **{
                key: _spread([each[key] for each in found]) for key in found[0]}})
        shown.append((("encoder", *settings.baselines)[len(shown)], rows))
        return Verdict(scores_QC, {}, rows)     # of the last, which knows every label

    def draw(bank: Split, query: Split, result: Path) -> list[str]:       # noqa: ARG001
        _plot(shown, result.with_name(f"{result.stem}_labels.png"))
        return [f"{result.stem}_labels.png"]

    return protocol.run(settings, judge, device, threads, progress, functools.partial(allow, settings), draw)


def allow(settings: Low, bank: Split) -> None:
    """Refuses more labels than there are, and a bank of which no part can be held out."""
    linear.parted(bank, settings.seed)
    fewest = int(np.unique(bank.labels_S.numpy()[bank.taught], return_counts=True)[1].min())
    if settings.per_class and max(settings.per_class) > fewest:
        raise ShardError(f"per_class={max(settings.per_class)} labels are more than the {fewest} tiles of the bank's "
                         "rarest class; lower it")


def order(labels_B: np.ndarray, groups_B: np.ndarray, seed: int) -> np.ndarray:
    """A number from 0 to 1 for every tile: those below a share are that share of each class of each patient, as nearly
    as whole tiles allow."""
    rng, place_B = np.random.default_rng(seed), np.empty(len(labels_B))
    _, patient_B = np.unique(groups_B, return_inverse=True)
    cell_B = patient_B * (int(labels_B.max()) + 1) + labels_B
    sorted_B = np.argsort(cell_B, kind="stable")
    for cell in np.split(sorted_B, np.flatnonzero(np.diff(cell_B[sorted_B])) + 1):
        tiles = rng.permutation(cell)
        place_B[tiles] = (np.arange(len(tiles)) + rng.uniform()) / len(tiles)
    return place_B


def choice(labels_B: np.ndarray, groups_B: np.ndarray, how: str, value: float, seed: int) -> np.ndarray:
    """The tiles whose labels are known: a share of all, but one of every class at least; or so many of every class."""
    place_B = order(labels_B, groups_B, seed)
    classes = [np.flatnonzero(labels_B == each) for each in np.unique(labels_B)]
    ranked = [tiles[np.argsort(place_B[tiles], kind="stable")] for tiles in classes]
    chosen = [tiles[:int(value) if how == "per_class" else max(1, int((place_B[tiles] < value).sum()))]
              for tiles in ranked]
    return np.sort(np.concatenate(chosen))


def _strength(bank_BD: np.ndarray, bank: Split, chosen: np.ndarray, seed: int) -> float:
    """How strongly the probe of some tiles is held back: chosen by the split there is for it, or by patients held out
    where there are enough of them."""
    labels_B = bank.labels_S.numpy()
    if bank.valid_S is not None:
        return linear.choose(bank_BD, labels_B, chosen, np.flatnonzero(bank.valid_S))[0]
    try:
        learn, held = linear.drawn(labels_B[chosen], bank.groups[chosen], seed)
    except ShardError:
        return BLIND
    return linear.choose(bank_BD, labels_B, chosen[learn], chosen[held])[0]


def _spread(values: list[float]) -> dict[str, float]:
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": round(float(np.mean(values)), 5), "deviation": round(deviation, 5)}


def _plot(curves: list[tuple[str, list[dict[str, Any]]]], out: Path) -> None:
    """Balanced accuracy over the number of labels, a line for each encoder, as wide as its draws differ."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for number, (name, rows) in enumerate(curves):
        rows = sorted(rows, key=lambda row: row["tiles"]["mean"])
        labels = [row["tiles"]["mean"] for row in rows]
        mean, deviation = (np.array([row["balanced_accuracy"][key] for row in rows]) for key in ("mean", "deviation"))
        axis.plot(labels, mean, marker="o", ms=3, color=f"C{number}", label=name)
        axis.fill_between(labels, mean - deviation, mean + deviation, color=f"C{number}", alpha=0.15, lw=0)
    axis.set(xscale="log", xlabel="labels known", ylabel="balanced accuracy of a linear probe")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    folder.write(out, buffer.getvalue())
