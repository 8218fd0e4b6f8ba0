"""Multiple-instance learning: what a slide is, learnt from the vectors of its tiles and one word for all of them.

Patients are dealt into folds. Each fold is guessed by what was learnt from the others alone: rate, weight decay and
epoch are chosen there by folds within (nested cross-validation), and then it is learnt from all of them.

T tiles   D width   S slides   C classes   G slides that are guessed
"""

import csv
import io
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from shards import folder
from shards.index import ShardError
from ssl_dist.data.bags import Bags
from ssl_dist.eval import cox, embed, heat, intervals, leakage, linear, metrics, protocol, slides
from ssl_dist.eval.protocol import Progress
from ssl_dist.eval.settings import Mil
from ssl_dist.eval.slides import Slides
from ssl_dist.models import encoder as encoders
from ssl_dist.models import mil as models

LOOKS = 10              # at the slides held out, over the epochs of a training
TOGETHER = 20_000       # tiles that are guessed at once, where slides have fewer
SMALL = 10**6           # numbers in a step, below which threads wait for each other longer than they work
ALL = "all"             # instead of the names of slides to draw


class Vectors:
    """The vectors of all slides in one file on disk that goes when it is closed: as much of it is in memory as there
    is memory for."""

    def __init__(self, known: Slides, where: Path, progress: Callable[[int, int], None]):
        counts = known.bags.counts[known.rows]
        self.ends_S = np.cumsum(counts)
        self.starts_S = self.ends_S - counts
        self.sum_SD, self.square_SD = (np.zeros((len(counts), known.bags.width)) for _ in range(2))
        with folder.storage(where):
            self._file = tempfile.TemporaryFile(dir=where)      # noqa: SIM115
            for slide, row in enumerate(known.rows):
                own_ND = known.bags[row].features_ND
                self._file.write(own_ND.tobytes())
                self.sum_SD[slide] = own_ND.sum(axis=0, dtype=np.float64)
                self.square_SD[slide] = np.square(own_ND, dtype=np.float64).sum(axis=0)
                progress(slide + 1, len(counts))
            self._file.flush()
        self.tiles_TD = np.memmap(self._file, np.float32, "r", shape=(int(self.ends_S[-1]), known.bags.width))

    def close(self) -> None:
        """The file goes."""
        del self.tiles_TD
        self._file.close()

    @property
    def mean_SD(self) -> np.ndarray:
        """The mean vector of each slide."""
        return self.sum_SD / (self.ends_S - self.starts_S)[:, None]

    def spread(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation (D) of all tiles of some slides; of what does not vary the deviation is 1."""
        count = (self.ends_S - self.starts_S)[rows].sum()
        mean_D = self.sum_SD[rows].sum(axis=0) / count
        square_D = self.square_SD[rows].sum(axis=0) / count
        varies_D = square_D - mean_D ** 2 > 1e-10 * square_D       # less than that is rounding
        return mean_D, np.where(varies_D, np.sqrt(np.maximum(square_D - mean_D ** 2, 0)), 1.0)

    def batch(self, rows: np.ndarray, most: int, rng: np.random.Generator | None) -> tuple[Tensor, list[int]]:
        """Tiles of slides one after the other, and how many of each; of those that have more than `most`, a draw."""
        places = []
        for row in rows:
            own = np.arange(self.starts_S[row], self.ends_S[row])
            places.append(np.sort(rng.choice(own, most, replace=False)) if rng and most and len(own) > most else own)
        return torch.from_numpy(self.tiles_TD[np.concatenate(places)]), [len(each) for each in places]


@dataclass
class Guess:
    """What was learnt makes of slides that it was not learnt from."""

    scores_GC: np.ndarray               # how likely each class is; of survival the risk
    facts: dict[str, Any]               # what was chosen
    shown: list[np.ndarray]             # of each slide that is drawn, a number for each tile


Contender = Callable[[np.ndarray, np.ndarray, int, set[int]], Guess]        # learnt from, asked about, seed, drawn


def rehearse(settings: Mil) -> dict[str, Any]:
    """Everything that can fail before a model learns; what would be learnt from."""
    bags = Bags(settings.bags)
    known = slides.told(bags, settings.labels, settings.kind)
    for name in {settings.model, *settings.baselines} - {"linear"}:
        models.build(name, bags.width, 1, settings.args if name == settings.model else {})
    _drawn(settings, known)
    asked = int((_folds(settings, known, settings.seed) >= 0).sum())
    return {"protocol": "mil", "model": settings.model, "baselines": ", ".join(settings.baselines) or "none",
            "slides": len(known.rows), "patients": len(set(known.groups)), "slides asked about": asked,
            "tiles": int(bags.counts[known.rows].sum()), "out": str(settings.home), "warnings": known.remarks}


def run(settings: Mil, device: torch.device, threads: int, progress: Progress) -> dict[str, Any]:
    """The protocol: the model and every baseline on the same folds, figures, guesses, maps."""
    bags = Bags(settings.bags)
    known = slides.told(bags, settings.labels, settings.kind)
    for name in (settings.model, *settings.baselines):      # refused before the work
        if name != "linear":
            models.build(name, bags.width, 1, settings.args if name == settings.model else {})
    drawn = _drawn(settings, known)
    rounds = [_folds(settings, known, settings.seed + number) for number in range(settings.repeats)]
    asked = np.flatnonzero(rounds[0] >= 0)
    digest = _digest(settings, bags)
    out = folder.make(settings.home)
    vectors = Vectors(known, out, partial(progress, "vectors"))
    names = list(dict.fromkeys([settings.model, *settings.baselines]))
    found: dict[str, Found] = {}
    most = settings.max_tiles or int(bags.counts.max())
    step = settings.batch * min(most, int(bags.counts[known.rows].mean())) * bags.width
    before = torch.get_num_threads()
    torch.set_num_threads(threads if step > SMALL else 1)
    try:
        for name in names:
            contender = partial(_straight, settings, known, vectors) if name == "linear" else partial(
                _learnt, settings, known, vectors, name, device)
            found[name] = _rounds(contender, rounds, drawn if name == settings.model else set(),
                                  partial(progress, name))
    finally:
        vectors.close()
        torch.set_num_threads(before)
    own, truth = found[settings.model], known.part(asked)
    unit_S = np.unique(truth.groups, return_inverse=True)[1] if known.by == "patient" else np.arange(len(asked))
    measures = {name: _measure(truth, each.scores_SC[asked], unit_S) for name, each in found.items()}
    first_U = np.unique(unit_S, return_index=True)[1]
    drawings = intervals.drawings(truth.groups[first_U], settings.seed)
    figures = protocol.figures(measures[settings.model])
    seen = leakage.seen(str(settings.encoder), {"slides": truth.slides, "patients": truth.patients}) \
        if settings.encoder else None
    facts = bags.facts[int(known.rows[0])]
    result: dict[str, Any] = {
        "protocol": "mil", "model": settings.model, "args": settings.args, "kind": settings.kind,
        "encoder": {"path": str(settings.encoder or ""), "architecture": str(facts.get("encoder") or ""),
                    "sha256": digest},
        "shards": [], "bags": {"path": str(settings.bags), "fingerprint": bags.fingerprint},
        "metrics": figures, "intervals": intervals.intervals(measures[settings.model], drawings),
        "baselines": {name: protocol.figures(measures[name]) for name in names[1:]},
        "against": {name: intervals.compared(measures[settings.model], measures[name], drawings)
                    for name in names[1:]},
        "counts": {"slides": len(known.rows), "asked_about": len(asked), "patients": len(set(known.groups)),
                   "tiles": int(bags.counts[known.rows].sum()), "shared_patients": 0},
        "seen_in_pretraining": seen, "classes": known.classes,
        "confusion": [] if known.times_S is not None else metrics.confusion(
            *_judged(truth, own.scores_SC[asked], unit_S), len(known.classes)).astype(int).tolist(),
        "folds": settings.folds if not settings.split else 1, "repeats": settings.repeats, "chosen": {
            name: each.facts for name, each in found.items()},
        "by_fold": {name: _by_fold(known, each.scores_RSC, rounds) for name, each in found.items()},
        "warnings": [*known.remarks, *_doubts(settings, known, truth, seen)],
        "asked": {"bags": bags.fingerprint, "labels": known.digest, "kind": settings.kind, "model": settings.model,
                  "args": settings.args, "query": settings.split or "cross-validation"},
        "seed": settings.seed}
    path = protocol.place(out, "mil", result)
    told = path.with_name(f"{path.stem.replace('mil', 'predictions', 1)}.csv")
    _write(known, found, rounds, told)
    pictures, captions = _draw(known, own, out, path.stem, settings)
    result |= {"predictions": told.name, "pictures": pictures, "captions": captions, "written": str(path)}
    folder.write_json(path, result)
    return result


# --- folds

def _folds(settings: Mil, known: Slides, seed: int) -> np.ndarray:
    """Which fold each slide is guessed in, -1 where in none; refused where something could not be learnt or chosen."""
    try:
        if settings.split:
            fold_S = np.where([word == settings.split for word in known.splits], 0, -1)
            if not (fold_S == 0).any() or (fold_S == 0).all():
                words = ", ".join(sorted(set(known.splits) - {""})) or "no word"
                raise ShardError(f"split={settings.split} parts no slides from others: column split of "
                                 f"{settings.labels} has {words}")
            both = set(known.groups[fold_S == 0]) & set(known.groups[fold_S < 0])
            if both:
                raise ShardError(f"{len(both)} patients have slides in split {settings.split!r} and in others "
                                 f"({min(both)!r}, …): the score would be too good; part by patients")
            if known.times_S is None and len(set(known.labels_S[fold_S == 0])) < 2:
                raise ShardError(f"split {settings.split!r} holds one class only: every guess would be right")
        else:
            fold_S = slides.dealt(known.labels_S, known.groups, settings.folds, seed)
    except ShardError as error:
        raise ShardError(_named(str(error), known, "folds=")) from None
    try:
        for fold in range(int(fold_S.max()) + 1):
            learn = np.flatnonzero(fold_S != fold)
            slides.dealt(known.labels_S[learn], known.groups[learn], settings.inner, seed)
    except ShardError as error:
        raise ShardError("to choose by, of what is left to learn from: " + _named(str(error), known, "inner=")
                         ) from None
    return fold_S


def _named(words: str, known: Slides, key: str) -> str:
    """The refusal with the class's own name, and what to change."""
    for number, name in enumerate(known.classes or ["without the event", "with the event"]):
        words = words.replace(f"class {number} has", f"class {name!r} has")
    return f"{words}; lower {key}, or take more" if words.endswith("folds") else words


@dataclass
class Found:
    """Guesses of all rounds: R times S slides, C classes."""

    scores_RSC: np.ndarray              # no number where a slide was not asked about
    facts: list[dict[str, Any]]
    shown: dict[int, np.ndarray]        # of slides that are drawn, a number for each tile, the mean over rounds

    @property
    def scores_SC(self) -> np.ndarray:
        """The mean over rounds."""
        return self.scores_RSC.mean(axis=0)


def _rounds(contender: Contender, rounds: list[np.ndarray], drawn: set[int],
            progress: Callable[[int, int], None]) -> Found:
    """Every fold of every round, guessed by what was learnt from the others."""
    scores: list[list[np.ndarray | None]] = []
    facts: list[dict[str, Any]] = []
    shown: dict[int, np.ndarray] = {}
    done = 0
    total = sum(int(fold_S.max()) + 1 for fold_S in rounds)
    for number, fold_S in enumerate(rounds):
        scores.append([None] * len(fold_S))
        for fold in range(int(fold_S.max()) + 1):
            learn, held = np.flatnonzero(fold_S != fold), np.flatnonzero(fold_S == fold)
            guess = contender(learn, held, number, drawn)
            for slide, row in zip(held, guess.scores_GC, strict=True):
                assert scores[-1][slide] is None
                scores[-1][slide] = row
            for place, own in zip([each for each in held.tolist() if each in drawn], guess.shown, strict=True):
                shown[place] = shown.get(place, np.zeros(len(own))) + own / len(rounds)
            facts.append({"repeat": number, "fold": fold, **guess.facts})
            done += 1
            progress(done, total)
    width = next(len(row) for row in scores[0] if row is not None)
    return Found(np.array([[np.full(width, np.nan) if row is None else row for row in each] for each in scores]),
                 facts, shown)


# --- what learns

def _learnt(settings: Mil, known: Slides, vectors: Vectors, name: str, device: torch.device, learn: np.ndarray,
            held: np.ndarray, number: int, drawn: set[int]) -> Guess:
    """A network: rate, decay and epoch by folds within, and then from all."""
    seed = settings.seed + number
    fold_S = slides.dealt(known.labels_S[learn], known.groups[learn], settings.inner, seed)
    looks = sorted({max(1, round(settings.epochs * (each + 1) / LOOKS)) for each in range(LOOKS)})
    found: dict[tuple[float, float, int], list[tuple[float, float]]] = {}
    for rate in settings.rates:
        for decay in settings.decays:
            for fold in range(settings.inner):
                own, asked = learn[fold_S != fold], learn[fold_S == fold]
                for epoch, network in trained(settings, known, vectors, name, device, own, rate, decay, seed, looks):
                    outputs_GC = answers(network, vectors, asked)[0]
                    found.setdefault((rate, decay, epoch), []).append(_worth(known.part(asked), outputs_GC))
    best, figure = chosen(found)
    rate, decay, epoch = best
    *_, (_, network) = trained(settings, known, vectors, name, device, learn, rate, decay, seed, [epoch])
    outputs_GC, shown = answers(network, vectors, held, drawn)
    if known.times_S is None:
        scores_GC = likely(outputs_GC)
    else:       # risks of several folds are compared, so each is held against those of what its fold learnt from
        own_LC = answers(network, vectors, learn)[0].numpy()
        scores_GC = (outputs_GC.numpy() - own_LC.mean()) / max(float(own_LC.std()), 1e-12)
    return Guess(scores_GC, {"lr": rate, "weight_decay": decay, "epoch": epoch, "held_out": round(figure, 4)}, shown)


def trained(settings: Mil, known: Slides, vectors: Vectors, name: str, device: torch.device, rows: np.ndarray,
            rate: float, decay: float, seed: int, looks: list[int]) -> Iterator[tuple[int, nn.Module]]:
    """A network that learns from some slides, after each of some epochs. The same slides and seed give the same."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    outputs = 1 if len(known.classes) <= 2 else len(known.classes)
    network = Scaled(models.build(name, vectors.tiles_TD.shape[1], outputs,
                                  settings.args if name == settings.model else {}),
                     *(vectors.spread(rows) if settings.scale else (0.0, 1.0))).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate, weight_decay=decay)
    for epoch in range(1, looks[-1] + 1):
        network.train()
        order = rng.permutation(rows)
        for first in range(0, len(order), settings.batch):
            own = order[first:first + settings.batch]
            tiles_TD, counts = vectors.batch(own, settings.max_tiles, rng)
            truth = known.part(own)
            labels_B = torch.from_numpy(truth.labels_S).to(device)
            answer = network(tiles_TD.to(device), counts, labels_B if known.times_S is None else None)
            weight = network.weight if known.times_S is None else 1.0
            loss = weight * _loss(truth, answer.outputs_BC) + (1 - weight) * answer.extra
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if epoch in looks:
            network.eval()
            yield epoch, network


class Scaled(nn.Module):
    """A network that sees vectors less a mean, over a deviation."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, network: nn.Module, mean: np.ndarray | float, deviation: np.ndarray | float):
        super().__init__()
        self.network, self.weight = network, float(network.WEIGHT)      # type: ignore[arg-type]
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32))
        self.register_buffer("deviation", torch.as_tensor(deviation, dtype=torch.float32))

    def forward(self, tiles_TD: Tensor, counts: list[int], labels_B: Tensor | None = None) -> models.Answer:
        return self.network((tiles_TD - self.mean) / self.deviation, counts, labels_B)


@torch.inference_mode()
def answers(network: nn.Module, vectors: Vectors, rows: np.ndarray,
            drawn: set[int] = frozenset()) -> tuple[Tensor, list[np.ndarray]]:      # type: ignore[assignment]
    """Outputs (G, C) of slides by all their tiles; of those that are drawn a number for each tile."""
    outputs, shown = [], []
    device = next(network.parameters()).device
    # As many slides together as have so many tiles, or one.
    cell_G = np.cumsum((vectors.ends_S - vectors.starts_S)[rows]) // TOGETHER
    for own in np.split(rows, np.flatnonzero(np.diff(cell_G)) + 1):
        tiles_TD, counts = vectors.batch(own, 0, None)
        answer = network(tiles_TD.to(device), counts)
        outputs.append(answer.outputs_BC.cpu())
        shown += [each.double().cpu().numpy() for row, each in zip(own, answer.shown_T.split(counts), strict=True)
                  if row in drawn]
    return torch.cat(outputs), shown


def _loss(truth: Slides, outputs_BC: Tensor) -> Tensor:
    labels_B = torch.from_numpy(truth.labels_S).to(outputs_BC.device)
    if truth.times_S is not None:
        return cox.loss(outputs_BC[:, 0], torch.from_numpy(truth.times_S).to(outputs_BC.device), labels_B > 0)
    if outputs_BC.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(outputs_BC[:, 0], labels_B.to(outputs_BC.dtype))
    return F.cross_entropy(outputs_BC, labels_B)


def likely(outputs_GC: Tensor) -> np.ndarray:
    """How likely each class is: of two, one output says it of the second."""
    outputs_GC = outputs_GC.double()
    if outputs_GC.shape[1] == 1:
        outputs_GC = torch.cat([torch.zeros_like(outputs_GC), outputs_GC], dim=1)
    return outputs_GC.softmax(dim=1).numpy()


def _worth(truth: Slides, outputs_GC: Tensor) -> tuple[float, float]:
    """AUROC or concordance, no number where it cannot be said; and the loss."""
    loss = float(_loss(truth, outputs_GC))
    if truth.times_S is not None:
        measure = metrics.survival(truth.times_S, truth.labels_S > 0, outputs_GC[:, 0].double().numpy())
        return measure(None)["concordance"], loss
    if len(set(truth.labels_S)) < 2:
        return float("nan"), loss
    return metrics.classification(truth.labels_S, likely(outputs_GC))(None)["auroc"], loss


def chosen(found: dict[Any, list[tuple[float, float]]]) -> tuple[Any, float]:
    """What is best on the slides held out, by the mean figure over folds, and of equals by the mean loss; and it."""
    def worth(key: Any) -> tuple[float, float]:
        figures, losses = zip(*found[key], strict=True)
        said = [each for each in figures if np.isfinite(each)]
        loss = float(np.mean(losses))
        return round(float(np.mean(said)), 6) if said else 0.0, -loss if np.isfinite(loss) else -np.inf

    best = max(found, key=worth)
    return best, worth(best)[0]


def _straight(settings: Mil, known: Slides, vectors: Vectors, learn: np.ndarray, held: np.ndarray, number: int,
              drawn: set[int]) -> Guess:       # noqa: ARG001
    """Logistic regression on the mean vector, or Cox's: its strength by the same folds within."""
    fold_S = slides.dealt(known.labels_S[learn], known.groups[learn], settings.inner, settings.seed + number)
    mean_SD = vectors.mean_SD
    found: dict[float, list[tuple[float, float]]] = {}
    for fold in range(settings.inner):
        own, asked = learn[fold_S != fold], learn[fold_S == fold]
        for strength, outputs_GC in _probes(known, mean_SD, own, asked, list(linear.STRENGTHS)):
            found.setdefault(strength, []).append(_worth(known.part(asked), outputs_GC))
    strength, figure = chosen(found)
    (_, outputs_GC), = _probes(known, mean_SD, learn, held, [strength])
    scores_GC = likely(outputs_GC) if known.times_S is None else outputs_GC.numpy()     # scaled by what it learnt from
    return Guess(scores_GC, {"C": strength, "held_out": round(figure, 4)}, [])


def _probes(known: Slides, mean_SD: np.ndarray, learn: np.ndarray, asked: np.ndarray,
            strengths: list[float]) -> Iterator[tuple[float, Tensor]]:
    """Outputs (G, C) by regressions of several strengths."""
    if known.times_S is None:
        for strength, probe in linear.probes(mean_SD[learn], known.labels_S[learn], strengths):
            sure_GC = np.clip(linear.scores(probe, mean_SD[asked], len(known.classes)), 1e-12, None)
            yield strength, torch.from_numpy(np.log(sure_GC))
        return
    scaler = StandardScaler().fit(mean_SD[learn])
    own_SD = scaler.transform(mean_SD[learn])
    for strength in strengths:
        weights_D = cox.fitted(own_SD, known.times_S[learn], known.labels_S[learn] > 0, strength)
        spread = max(float((own_SD @ weights_D).std()), 1e-12)
        yield strength, torch.from_numpy(scaler.transform(mean_SD[asked]) @ weights_D / spread)[:, None]


# --- figures, guesses, maps

def _judged(truth: Slides, scores_SC: np.ndarray, unit_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The truth and the guess of every unit."""
    first_U, scores_UC = _units(scores_SC, unit_S)
    return truth.labels_S[first_U], scores_UC.argmax(axis=1)


def _units(scores_SC: np.ndarray, unit_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each unit (a slide, or a patient) is met first, and the mean score of its slides."""
    _, first_U, counts_U = np.unique(unit_S, return_index=True, return_counts=True)
    scores_UC = np.zeros((len(first_U), scores_SC.shape[1]))
    np.add.at(scores_UC, unit_S, scores_SC)
    return first_U, scores_UC / counts_U[:, None]


def _measure(truth: Slides, scores_SC: np.ndarray, unit_S: np.ndarray) -> metrics.Measure:
    first_U, scores_UC = _units(scores_SC, unit_S)
    if truth.times_S is not None:
        return metrics.survival(truth.times_S[first_U], truth.labels_S[first_U] > 0, scores_UC[:, 0])
    return metrics.classification(truth.labels_S[first_U], scores_UC)


def _by_fold(known: Slides, scores_RSC: np.ndarray, rounds: list[np.ndarray]) -> list[float | None]:
    """AUROC or concordance within each fold of each round, by slides; nothing where a fold holds one class."""
    found = []
    for fold_S, scores_SC in zip(rounds, scores_RSC, strict=True):
        for fold in range(int(fold_S.max()) + 1):
            held = np.flatnonzero(fold_S == fold)
            figures = protocol.figures(_measure(known.part(held), scores_SC[held], np.arange(len(held))))
            found.append(figures.get("auroc", figures.get("concordance")))
    return found


def _doubts(settings: Mil, known: Slides, truth: Slides, seen: dict[str, int] | None) -> list[str]:
    """Why the figures may be better or worse than they should."""
    found = []
    if seen and any(seen.values()):
        found.append("the encoder was pretrained, without labels, on " + " and ".join(
            f"{count} of the {name} asked about" for name, count in seen.items() if count)
            + "; this figure may be too good")
    elif not settings.encoder:
        found.append("whether the encoder was pretrained on these slides is not known; name it with encoder=FOLDER")
    if (groups := len(set(truth.groups))) < intervals.FEWEST:
        found.append(f"{groups} patients or slides are asked about, too few for intervals: figures may be chance")
    if not settings.split and len(words := sorted(set(known.splits) - {""})) > 1:
        found.append(f"the table's column split ({', '.join(words[:3])}) goes unused: patients were dealt out anew; "
                     f"split={words[0]} asks about those slides")
    return found


def _digest(settings: Mil, bags: Bags) -> str:
    """Of the encoder's weights, as the vectors' files say; refused where that is not the encoder that is named."""
    if not settings.encoder:
        return bags.encoder
    digest = encoders.digest(settings.encoder)
    if bags.encoder and bags.encoder != digest:
        raise ShardError(f"the vectors in {settings.bags} are of another encoder (sha256 {bags.encoder[:12]}…) than "
                         f"encoder={settings.encoder} ({digest[:12]}…); name that one, or none")
    return digest


def _drawn(settings: Mil, known: Slides) -> set[int]:
    """Places of the slides whose tiles are drawn."""
    if settings.maps == [ALL]:
        return {*range(len(known.rows))}
    if strange := [name for name in settings.maps if name not in known.slides]:
        raise ShardError(f"maps has {strange[0]!r}, which is no slide with a label in {settings.bags}; there is "
                         f"{known.slides[0]!r}, and maps=[{ALL}] draws every one")
    return {known.slides.index(name) for name in settings.maps}


def _write(known: Slides, found: dict[str, Found], rounds: list[np.ndarray], out: Path) -> None:
    """A row a slide that was asked about: who it is, what is true, and what every contender says."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    survival = known.times_S is not None
    columns = [f"{name}_{word}" for name in found for word in (["risk"] if survival else known.classes)]
    writer.writerow(["slide", "patient", *(["time", "event"] if survival else ["label"]),
                     *(f"fold_{number + 1}" for number in range(len(rounds))), *columns])
    for slide in np.flatnonzero(rounds[0] >= 0):
        truth = [known.times_S[slide], known.labels_S[slide]] if known.times_S is not None else \
            [known.classes[known.labels_S[slide]]]
        writer.writerow([known.slides[slide], known.patients[slide], *truth, *(each[slide] for each in rounds),
                         *(f"{value:.6f}" for each in found.values() for value in each.scores_SC[slide])])
    folder.write(out, text.getvalue().encode())


def _draw(known: Slides, own: Found, out: Path, stem: str, settings: Mil) -> tuple[list[str], dict[str, str]]:
    """A picture and a GeoJSON of every slide that was asked for and asked about; their names and captions."""
    pictures, captions = [], {}
    what = models.MODELS[settings.model].SHOWS
    for slide, shown_N in sorted(own.shown.items()):
        bag = known.bags[known.rows[slide]]
        # Of attention what counts is how far above the mean it is, whatever the number of tiles.
        shown_N = shown_N * len(shown_N) if what == "attention" else shown_N
        name = embed.file_name(str(known.bags.facts[known.rows[slide]].get("dataset") or ""), known.slides[slide])
        heat.geojson(bag, shown_N, what, out / f"{stem}_{name}.geojson")
        heat.picture(bag, shown_N, what, out / f"{stem}_{name}.png")
        says = f"risk {own.scores_SC[slide, 0]:+.2f}" if known.times_S is not None else (
            f"{known.classes[known.labels_S[slide]]}; found {known.classes[int(own.scores_SC[slide].argmax())]}, "
            f"{own.scores_SC[slide].max():.0%}")
        pictures.append(f"{stem}_{name}.png")
        captions[pictures[-1]] = (f"Slide {known.slides[slide]}: {says}. The {what} of its tiles by models that had "
                                  "not seen it" + (", 1 is the mean." if what == "attention" else "."))
    return pictures, captions
