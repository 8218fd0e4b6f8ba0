"""Maps of confidence against outlines: no label decides anything, and beside it what labels would have chosen.

A map is cut at 0.5, as the authors do, or where Otsu's threshold parts it, and cleaned; Dice is the mean over regions.
Of a run every checkpoint that is kept is looked at: training has done its work when separation has grown and is flat,
which needs no outlines; the authors' code takes the step and the class that are best on outlined regions. Those are
the `bank` here, and the `query`, whole patients, decides nothing.

C classes   H, W pixels   K patches of a region   R regions asked about
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shards import folder, regions
from shards.index import ShardError
from shards.regions import Region
from ssl_dist import checkpoint, config
from ssl_dist.eval import blobs, intervals, leakage, pieces, protocol
from ssl_dist.eval.metrics import Measure
from ssl_dist.eval.protocol import Progress
from ssl_dist.eval.settings import Segment
from ssl_dist.models import encoder as encoders
from ssl_dist.models import patches
from ssl_dist.models.encoder import Encoder
from ssl_dist.models.patches import Grid, entropy, histograms, separation

FLAT = 0.95             # of the largest separation: from there on it is held to be flat
SMOOTH = 0.2            # of a run's rows, whose mean is looked at: a row is of few patches
DRAWN = 32              # patches of a region and class, by which separation is found
WEIGHTS = "encoder.network."    # how a checkpoint's names of the network begin


Known = tuple[np.ndarray, np.ndarray]       # a picture (H, W, 3), and where something is (H, W)
Curve = tuple[np.ndarray, np.ndarray]       # steps, and what was logged at each, a row a class


@dataclass
class Look:
    """What one class of one checkpoint's maps is like."""

    step: int
    number: int                 # of the class
    separation: float           # of the bank's patches; no label is used
    stain: float                # how its map goes with haematoxylin, over the bank; no label is used
    bank: float                 # Dice of the bank

    def row(self) -> dict[str, Any]:
        """For a result."""
        return {"step": self.step, "class": self.number, "separation": round(self.separation, 4),
                "haematoxylin": round(self.stain, 4), "dice_bank": round(self.bank, 4)}


@dataclass
class Halves:
    """Outlined regions: by which labels may choose, and that are asked about."""

    bank: list[Region]
    query: list[Region]
    remarks: list[str]


def halves(settings: Segment) -> Halves:
    """Whole patients, every so manieth in the order of their names; a region without one is a patient of its own."""
    there = regions.found(settings.regions, settings.form, settings.names)
    found = there.regions
    patients = sorted({each.patient or each.name for each in found})
    asked = {*patients[settings.every - 1::settings.every]}
    known = Halves([each for each in found if (each.patient or each.name) not in asked],
                   [each for each in found if (each.patient or each.name) in asked], there.remarks)
    if not known.bank or not known.query:
        raise ShardError(f"{len(patients)} patients in {settings.regions} cannot be parted by every={settings.every}; "
                         "use a smaller number, of two or more patients")
    return known


def rehearse(settings: Segment) -> dict[str, Any]:
    """All that can fail before a picture is looked at."""
    known, steps = halves(settings), [step for step, _ in _checkpoints(settings)]
    classes = encoders.build(settings.encoder).classes()
    return {"protocol": settings.protocol, "encoder": f"{classes} classes", "checkpoints": ", ".join(map(str, steps)),
            "regions that labels choose by": len(known.bank), "regions asked about": len(known.query),
            "out": str(settings.home), "warnings": known.remarks}


def run(settings: Segment, device: torch.device, threads: int, progress: Progress) -> dict[str, Any]:
    """Looks at every checkpoint, chooses twice, and holds both against thresholds."""
    torch.set_num_threads(threads)
    known, out = halves(settings), folder.make(settings.home)
    grid, shown = _seen_as(settings)
    bank, query = [_read(each, settings.glance) for each in known.bank], [_read(each) for each in known.query]
    looks: list[Look] = []
    for step, weights in (checkpoints := dict(_checkpoints(settings))).items():
        looks += looked_at(_loaded(settings, weights).to(device), step, bank, grid, shown, settings.cut,
                           functools.partial(progress, f"step {step}"))
    torch.manual_seed(settings.seed)
    network = encoders.build(settings.encoder).eval().to(device)
    untrained = looked_at(network, 0, bank, grid, shown, settings.cut, functools.partial(progress, "untrained"))
    curve = _curve(settings, network.classes())
    own, best, chance = (without_labels(looks, settings.choose, curve), max(looks, key=lambda look: look.bank),
                         without_labels(untrained, settings.choose))
    dice_R2, best_R2 = (asked(_loaded(settings, checkpoints[look.step]).to(device), look.number, query, settings.cut)
                        for look in (own, best))
    found = {"by_labels": best_R2[:, 0], "random": asked(network, chance.number, query, settings.cut)[:, 0]}
    facts: dict[str, dict[str, Any]] = {
        "by_labels": {"step": best.step, "class": best.number}, "random": {"class": chance.number}}
    for kind in ("otsu", "grey"):
        threshold = blobs.Threshold(kind, bank)
        found[kind] = np.array([blobs.dice(threshold(picture), true) for picture, true in query])
        facts[kind] = {"cleaned": threshold.cleans, **({"level": threshold.level} if kind == "grey" else {})}
    seen = leakage.seen(settings.encoder, {"slides": [Path(each.name).name for each in known.query],
                                           "patients": [each.patient for each in known.query]})
    measures = {name: _mean(each) for name, each in found.items()}
    drawn = intervals.drawings(np.array([each.patient or each.name for each in known.query]), settings.seed)
    result: dict[str, Any] = {
        "protocol": settings.protocol, "size": 0, "step": own.step, "class": own.number,
        "chosen_by": settings.choose, "cut": settings.cut,
        "encoder": {"path": settings.encoder, "architecture": encoders.build(settings.encoder).name,
                    "sha256": encoders.digest(settings.encoder)},
        "shards": [], "metrics": {**protocol.figures(_mean(dice_R2[:, 0])),
                                  "dice_before_cleaning": round(float(dice_R2[:, 1].mean()), 4)},
        "intervals": intervals.intervals(_mean(dice_R2[:, 0]), drawn),
        "baselines": {name: {**protocol.figures(measure), **facts[name]} for name, measure in measures.items()},
        "against": {name: intervals.compared(_mean(dice_R2[:, 0]), measure, drawn)
                    for name, measure in measures.items()},
        "counts": {"of": "regions", "bank": len(bank), "queries": len(query), "shared_patients": 0,
                   "query_patients": len({each.patient for each in known.query} - {protocol.UNKNOWN})},
        "curves": {"encoder": [look.row() for look in looks], "random": [look.row() for look in untrained]},
        "by_region": {name: [round(float(value), 4) for value in each]
                      for name, each in {"encoder": dice_R2[:, 0], **found}.items()},
        "regions": [each.name for each in known.query], "classes": [], "warnings": _doubts(known, seen), "pictures": [],
        "seen_in_pretraining": seen, "seen_by_baselines": {},
        "asked": {"regions": str(settings.regions), "form": settings.form, "every": settings.every,
                  "bank": "others", "query": f"every={settings.every}",
                  "choose": settings.choose, "cut": settings.cut, "glance": settings.glance},
        "seed": settings.seed}
    path = protocol.place(out, settings.protocol, result)
    result["written"] = str(path)
    folder.write_json(path, result)
    return result


def _read(region: Region, glance: int = 0) -> Known:
    """A region and what is true of it, or its middle."""
    found = region.read()
    own = tuple(slice(max(0, (side - glance) // 2), max(0, (side - glance) // 2) + glance) if glance else slice(None)
                for side in found.instances_HW.shape)
    return found.image_HW3[own], found.instances_HW[own] > 0


def asked(encoder: Encoder, number: int, query: list[Known], cut: str) -> np.ndarray:
    """Dice (R, 2) of a class's maps, cleaned and as they are."""
    maps = [(blobs.there(pieces.whole(encoder, picture_HW3)[number], picture_HW3, cut), true_HW)
            for picture_HW3, true_HW in query]
    return np.array([(blobs.dice(blobs.cleaned(there_HW), true_HW), blobs.dice(there_HW, true_HW))
                     for there_HW, true_HW in maps])


def looked_at(encoder: Encoder, step: int, bank: list[Known], grid: Grid, shown: str, cut: str,
              progress: Callable[[int, int], None] = lambda *_: None) -> list[Look]:
    """A look at each class of a network's maps."""
    classes, rng = encoder.classes(), np.random.default_rng(0)
    seen, sure, stains, dices = [], [], [], []
    for number, (picture_HW3, true_HW) in enumerate(bank):
        maps_CHW = pieces.whole(encoder, picture_HW3)
        dices.append([blobs.dice(blobs.cleaned(blobs.there(each, picture_HW3, cut)), true_HW) for each in maps_CHW])
        stain_HW = blobs.haematoxylin(picture_HW3)
        stains.append([_goes_with(each, stain_HW) for each in maps_CHW])
        patches_CK3PP, sure_CK = _drawn(picture_HW3, maps_CHW, grid, shown, rng)
        seen.append(patches_CK3PP)
        sure.append(sure_CK)
        progress(number + 1, len(bank))
    return [Look(step, number, _apart(torch.cat([each[number] for each in seen]),
                                      torch.cat([each[number] for each in sure])),
                 float(np.mean([each[number] for each in stains])), float(np.mean([each[number] for each in dices])))
            for number in range(classes)]


def without_labels(looks: list[Look], choose: str, curve: Curve | None = None) -> Look:
    """The class that in the end is furthest from what is not of it, or goes best with haematoxylin; at the first
    checkpoint after its separation in training (`curve`: steps, and a row of values a class) has become flat."""
    last = max(look.step for look in looks)
    number = max((look for look in looks if look.step == last),
                 key=lambda look: look.separation if choose == "separation" else look.stain).number
    own = sorted((look for look in looks if look.number == number), key=lambda look: look.step)
    since = last if curve is None else flat_from(curve[0], curve[1][number])
    return next(look for look in own if look.step >= since or look is own[-1])


def flat_from(steps: np.ndarray, values: np.ndarray) -> int:
    """The first step at which the mean of the rows before it, so many as are a part of all, is nearly the largest."""
    rows = max(1, round(SMOOTH * len(values)))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    means = (sums[rows:] - sums[:-rows]) / rows
    if not np.isfinite(means).any():
        return int(steps[-1])
    largest = float(np.nanmax(means))
    return int(steps[rows - 1:][means >= largest - (1 - FLAT) * abs(largest)][0])


def _curve(settings: Segment, classes: int) -> Curve | None:
    """What the run has logged of separation; nothing of an encoder that lies in none."""
    home = run_of(settings.encoder)
    if home is None or not (home / "metrics.jsonl").is_file():
        return None
    rows = {}
    for line in (home / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):      # the last may be torn, by a kill
            row = json.loads(line)
            rows[row["step"]] = row
    names = [f"separation_{number}" for number in range(classes)] if classes > 1 else ["separation"]
    kept = [rows[step] for step in sorted(rows) if all(name in rows[step] for name in names)]
    return (np.array([row["step"] for row in kept]), np.array([[row[name] for row in kept] for name in names])) \
        if kept else None


def _drawn(picture_HW3: np.ndarray, maps_CHW: np.ndarray, grid: Grid, shown: str,
           rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches (C, K, 3, P, P) of a picture as training sees them, and how sure the map is of each: drawn where it is
    sure, always the same."""
    maps_1CHW = torch.from_numpy(maps_CHW)[None]
    light = patches.shown(pieces.light(picture_HW3), shown)
    sure_CG, known_CG = grid.means(maps_1CHW)[0], (1 - grid.means(entropy(maps_1CHW))[0]).clamp_min(1e-3)
    places_CK = torch.from_numpy(np.stack([rng.choice(len(own), DRAWN, p=own / own.sum())
                                           for own in known_CG.double().numpy()]))
    return grid.seen(light, maps_1CHW, places_CK[None])[0], sure_CG.gather(1, places_CK)


def _apart(patches_M3PP: torch.Tensor, sure_M: torch.Tensor) -> float:
    """The separation of patches that the map is sure of from those that it is sure are something else."""
    positive_M = sure_M > blobs.SURE
    within, between = separation(histograms(patches_M3PP), positive_M, ~positive_M, positive_M.nonzero()[:, 0])
    return float(between - within)


def _goes_with(map_HW: np.ndarray, stain_HW: np.ndarray) -> float:
    """Pearson's correlation; 0 of a map that is the same everywhere."""
    spread = float(map_HW.std()) * float(stain_HW.std())
    return float(((map_HW - map_HW.mean()) * (stain_HW - stain_HW.mean())).mean()) / spread if spread > 1e-12 else 0.0


def _doubts(known: Halves, seen: dict[str, int] | None) -> list[str]:
    """Why the figures may be better or worse than they should."""
    found = [*known.remarks]
    if seen and any(seen.values()):
        found.append("the network was trained, without labels, on " + " and ".join(
            f"{count} of the {name} asked about" for name, count in seen.items() if count)
            + "; this figure may be too good")
    if (groups := len({each.patient or each.name for each in known.query})) < intervals.FEWEST:
        found.append(f"{groups} patients are asked about, too few for intervals: figures may be chance")
    return found


def _mean(dice_R: np.ndarray) -> Measure:
    return lambda weights_R: {"dice": float(np.average(dice_R, weights=weights_R))}


def run_of(encoder: str) -> Path | None:
    """The run that an encoder is of, where it lies in one."""
    home = Path(encoder).parent
    return home if (home / "config.yaml").is_file() and (home / "checkpoints").is_dir() else None


def _checkpoints(settings: Segment) -> Iterator[tuple[int, Path | None]]:
    """Every step that can be looked at, and its folder; the exported network alone where there is nothing else."""
    home = run_of(settings.encoder)
    steps = sorted(checkpoint.steps(home / "checkpoints")) if home else []
    if not home or not steps:
        yield int((encoders.card(settings.encoder).get("ssl_dist") or {}).get("step", 0)), None
        return
    for step in steps:
        yield step, home / "checkpoints" / checkpoint.name(step)


def _loaded(settings: Segment, weights: Path | None) -> Encoder:
    return encoders.load(settings.encoder).eval() if weights is None else of_checkpoint(settings.encoder, weights)


def of_checkpoint(source: str, weights: Path) -> Encoder:
    """An encoder with the weights of one of its run's checkpoints."""
    encoder = encoders.build(source)
    encoder.network.load_state_dict({name.removeprefix(WEIGHTS): each for name, each in checkpoint.weights(
        weights).items() if name.startswith(WEIGHTS)})
    return encoder.eval()


def _seen_as(settings: Segment) -> tuple[Grid, str]:
    """Patches as the run saw them, where there is one."""
    if (home := run_of(settings.encoder)) is not None:
        method = config.load_train(str(home / "config.yaml"), []).method
        if {"patch", "stride", "shown"} <= method.keys():
            return Grid(method["patch"], method["stride"]), method["shown"]
    return Grid(settings.patch, settings.stride), "light"
