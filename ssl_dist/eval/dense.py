"""What protocols of pixels share: regions in two halves, a decoder that learns in two phases, a result's facts.

The phases are HoVer-Net's: first the decoders alone on the maps of a frozen encoder, then everything. Every source of
maps (the encoder, the same network untrained, others) learns from the same windows, by the same rules.

B windows   S pixels a side   R regions   K channels of what is said
"""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shards import folder, regions
from shards.index import ShardError
from shards.regions import Region
from ssl_dist.data import opencv
from ssl_dist.eval import intervals, leakage, protocol, tiling
from ssl_dist.eval.metrics import Measure
from ssl_dist.eval.protocol import Progress
from ssl_dist.eval.settings import PixelWise
from ssl_dist.eval.windows import Drawn, Windows
from ssl_dist.models import encoder as encoders
from ssl_dist.models.encoder import Encoder, EncoderError

TENTH = 0.1             # what becomes of the learning rate
LINES = 50              # of a training's curve, about


@dataclass
class Halves:
    """The regions that are learnt from, those asked about, and what their objects may be."""

    bank: list[Region]
    query: list[Region]
    classes: list[str]
    kinds: np.ndarray                   # of each type of the folder, ours, from 1 on; 0 first: nobody says
    remarks: list[str] = field(default_factory=list)

    def retyped(self, known: regions.Pixels) -> regions.Pixels:
        """What was read, its types taken together as it was asked for."""
        if known.types_HW is None or not self.classes:
            return regions.Pixels(known.image_HW3, known.instances_HW)
        if int(known.types_HW.max(initial=0)) >= len(self.kinds):
            raise ShardError(f"a map of types has {known.types_HW.max()}, and {len(self.kinds) - 1} types have names")
        return regions.Pixels(known.image_HW3, known.instances_HW, self.kinds[known.types_HW])


def halves(settings: PixelWise) -> Halves:
    """Finds the regions and parts them, no patient on both sides."""
    data = settings.data
    found = regions.found(data.regions, data.form, data.names)
    kinds, classes = np.arange(len(found.classes) + 1, dtype=np.uint8), found.classes
    if data.types:
        if strange := [name for names in data.types.values() for name in names if name not in found.classes]:
            raise ShardError(f"types has {strange[0]!r}; types of {data.regions} are "
                             f"{', '.join(found.classes) or 'not known'}")
        classes = [*data.types]
        ours = {name: place for place, names in enumerate(data.types.values(), start=1) for name in names}
        kinds = np.array([0, *(ours.get(name, 0) for name in found.classes)], np.uint8)
    if data.query:
        query = [each for each in found.regions if each.split == data.query]
        bank = [each for each in found.regions if each not in query and data.bank in ("", each.split)]
        for name, some in ((data.query, query), (data.bank or "others", bank)):
            if not some:
                there = ", ".join(sorted({each.split for each in found.regions})) or "none"
                raise ShardError(f"no region below {data.regions} is of split {name!r}; splits are {there}")
    else:
        bank, query = _held(found.regions, data.part, settings.seed)
    if both := sorted({each.patient for each in bank} & {each.patient for each in query} - {protocol.UNKNOWN}):
        raise ShardError(f"{len(both)} patients have regions on both sides ({both[0]!r}, …): figures would be too "
                         "good; part them by patient, with data.query= left empty")
    known = Halves(bank, query, classes, kinds, found.remarks)
    for region in (*bank, *query):      # all that cannot be read is said before anything learns, and not after
        if known.retyped(region.read()).types_HW is None and classes:
            raise ShardError(f"region {region.name} has no map of types, and others have; give it one, or take it away")
    return known


def _held(found: list[Region], part: float, seed: int) -> tuple[list[Region], list[Region]]:
    """Patients in a drawn order, until so many of the regions are theirs; of whom nobody knows stands for itself."""
    groups = [each.patient or each.name for each in found]
    wanted, query = max(1, round(part * len(found))), set[str]()
    for group in np.random.default_rng(seed).permutation(sorted(set(groups))).tolist():
        if sum(each in query for each in groups) < wanted and len({*groups} - query) > 1:
            query.add(group)
    if not query:
        raise ShardError("all regions are of one patient: none could be asked about that was not learnt from")
    return tuple([each for each, group in zip(found, groups, strict=True) if (group in query) == asked]     # type: ignore
                 for asked in (False, True))


def shared(bank: list[Region], share: float, seed: int) -> list[Region]:
    """A part of the regions that are learnt from; a smaller part of the same seed lies in a larger one."""
    order = np.random.default_rng(seed).permutation(len(bank))
    return [bank[place] for place in sorted(order[:max(1, round(share * len(bank)))])]


# --- learning

def encoder_of(source: str, settings: PixelWise, seed: int) -> Encoder:
    """The encoder that is named (encoder, random, or another one), ready for windows of this size."""
    path = settings.encoder if source in ("encoder", "random") else source
    torch.manual_seed(seed)
    encoder = encoders.build(path) if source == "random" else encoders.load(path)
    if settings.fine and hasattr(encoder.network, "maxpool"):
        encoder.look_closely()
    encoder.fit_to(settings.window)
    return encoder


Losses = Callable[[nn.Module, Drawn], dict[str, Tensor]]        # of windows: the whole under "loss", and its parts


def learn(network: nn.Module, windows: Windows, losses: Losses, settings: PixelWise, device: torch.device, threads: int,
          progress: Callable[[int, int], None]) -> list[dict[str, Any]]:
    """Teaches the network, in place; a row of figures every so many passes."""
    encoder: nn.Module = network.get_submodule("encoder")
    passes = [max(1, windows.a_pass // batch) for batch in settings.batches]
    total = sum(epochs * steps for epochs, steps in zip(settings.epochs, passes, strict=True))
    done, rows = 0, []
    opencv.one_thread()
    network.to(device)
    if device.type == "cuda":       # on a CPU it was measured slower: the decoders' grouped convolutions
        network.to(memory_format=torch.channels_last)       # type: ignore[call-overload]
    with ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(1) as ahead:
        for phase, (epochs, batch, steps) in enumerate(zip(settings.epochs, settings.batches, passes, strict=True)):
            encoder.requires_grad_(phase > 0)
            optimizer = torch.optim.Adam([each for each in network.parameters() if each.requires_grad], lr=settings.lr)
            coming = ahead.submit(windows.draw, done, batch, pool)
            for epoch in range(epochs):
                network.train()
                encoder.train(phase > 0)        # what a frozen encoder knows of its tiles' means stays as well
                for group in optimizer.param_groups:
                    group["lr"] = settings.lr * TENTH ** (epoch // settings.drop)
                sums: dict[str, Tensor] = {}
                for _ in range(steps):
                    drawn = coming.result()
                    done += 1
                    coming = ahead.submit(windows.draw, done, batch, pool)
                    with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                        parts = losses(network, drawn)
                    optimizer.zero_grad(set_to_none=True)
                    parts["loss"].backward()
                    optimizer.step()
                    sums = {name: sums.get(name, 0) + value.detach() for name, value in parts.items()}
                    progress(done, total)
                if not bool(sums["loss"].isfinite()):
                    raise EncoderError(f"the loss is no number after pass {epoch + 1}: lr={settings.lr:g} is too "
                                       "large, or the weights are damaged")
                if (epoch + 1) % max(1, sum(settings.epochs) // LINES) == 0 or epoch + 1 == epochs:
                    rows.append({"epoch": epoch + 1 + phase * settings.epochs[0],
                                 **{name: round(float(value) / steps, 5) for name, value in sums.items()}})
    return rows


@torch.inference_mode()
def said(answers: Callable[[Tensor], Tensor], device: torch.device, precision: str, pixels_BSS3: Tensor) -> Tensor:
    """What a network in evaluation says of windows, (B, K, S, S) in float32."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        found_BKSS = answers(pixels_BSS3.to(device)).float()
    if not bool(found_BKSS.isfinite().all()):
        raise EncoderError("the network says what is no number: its weights are damaged")
    return found_BKSS


def strips(network: nn.Module, answers: Callable[[Tensor], Tensor], channels: int, image_HW3: np.ndarray,
           settings: PixelWise, device: torch.device) -> Any:
    """Maps of a region in memory, in strips."""
    network.eval()
    return tiling.strips(partial(said, answers, device, settings.precision), channels, tiling.of_picture(image_HW3),
                         image_HW3.shape[:2], settings.window, settings.margin, settings.batches[1])


# --- comparing

@dataclass
class Judged:
    """What one source comes to at one share of the labels."""

    measure: Measure
    curve: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)


Judge = Callable[[str, list[Region], bool, Callable[[int, int], None]], Judged]
"""Of a source's name, the regions learnt from, whether this one is to be drawn and kept, and progress."""


def rehearse(settings: PixelWise, build: Callable[[Encoder, Halves], nn.Module]) -> dict[str, Any]:
    """Everything that can fail before a network learns; what would be compared."""
    known = halves(settings)
    for source in ("encoder", *settings.baselines):
        path = settings.encoder if source in ("encoder", "random") else source
        with torch.device("meta"):
            encoder = encoders.build(path)
            if settings.fine and hasattr(encoder.network, "maxpool"):
                encoder.look_closely()
        encoder.fit_to(settings.window)
        network = build(encoder, known)
    whole, beneath = (sum(each.numel() for each in part.parameters()) for part in (network, encoder))
    return {"protocol": settings.protocol, "encoder": encoder.name, "decoders": f"{whole - beneath:,} weights",
            "baselines": ", ".join(settings.baselines) or "none", "regions to learn from": len(known.bank),
            "regions asked about": len(known.query), "types": ", ".join(known.classes) or "none",
            "out": str(settings.home), "warnings": [*known.remarks, *_doubts(settings, known, None)]}


def compare(settings: PixelWise, known: Halves, judge: Judge, progress: Progress, device: torch.device, threads: int,
            asked: dict[str, Any]) -> dict[str, Any]:
    """The encoder and every baseline at every share of the labels; the result, not yet written, and its file."""
    names = list(dict.fromkeys(["encoder", *settings.baselines]))
    shares = sorted(set(settings.shares))
    found: dict[str, dict[float, Judged]] = {name: {} for name in names}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name, share in itertools.product(names, shares):
            what = name if len(shares) == 1 else f"{name}, {share:.0%}"
            found[name][share] = judge(name, shared(known.bank, share, settings.seed),
                                       name == "encoder" and share == shares[-1], partial(progress, what))
    finally:
        torch.set_num_threads(before)
    own = {name: each[shares[-1]] for name, each in found.items()}
    groups = np.array([each.patient or each.name for each in known.query])
    drawn = intervals.drawings(groups, settings.seed)
    seen = {name: leakage.seen(settings.encoder if name == "encoder" else name, {
        "slides": [Path(each.name).name for each in known.query], "patients": [each.patient for each in known.query]})
        for name in names if name != "random"}
    figures = {name: protocol.figures(each.measure) for name, each in own.items()}
    return {
        "protocol": settings.protocol, "size": settings.window, **own["encoder"].facts,
        "encoder": {"path": settings.encoder, "architecture": encoders.build(settings.encoder).name,
                    "sha256": encoders.digest(settings.encoder)},
        "shards": [], "metrics": figures["encoder"], "intervals": intervals.intervals(own["encoder"].measure, drawn),
        "baselines": {name: figures[name] for name in names[1:]},
        "against": {name: intervals.compared(own["encoder"].measure, own[name].measure, drawn) for name in names[1:]},
        "counts": {"of": "regions", "bank": len(known.bank), "queries": len(known.query), "shared_patients": 0,
                   "bank_patients": len({each.patient for each in known.bank} - {protocol.UNKNOWN}),
                   "query_patients": len({each.patient for each in known.query} - {protocol.UNKNOWN}),
                   "unknown_patients": sum(not each.patient for each in (*known.bank, *known.query))},
        "curves": {name: each.curve for name, each in own.items()},
        "labels": {name: [{"share": share, "regions": len(shared(known.bank, share, settings.seed)),
                           **protocol.figures(each.measure)} for share, each in rows.items()]
                   for name, rows in found.items()},
        "seen_in_pretraining": seen["encoder"],
        "seen_by_baselines": {name: told for name, told in seen.items() if name != "encoder"},
        "classes": known.classes, "warnings": [*known.remarks, *_doubts(settings, known, seen["encoder"])],
        "asked": {"regions": str(settings.data.regions), "bank": settings.data.bank or "others",
                  "query": settings.data.query or f"{settings.data.part:.0%} by patient", "form": settings.data.form,
                  **asked},
        "device": device.type, "seed": settings.seed}


def written(result: dict[str, Any], path: Path) -> dict[str, Any]:
    """The result, in its file."""
    result["written"] = str(path)
    folder.write_json(path, result)
    return result


def _doubts(settings: PixelWise, known: Halves, seen: dict[str, int] | None) -> list[str]:
    """Why the figures may be better or worse than they should."""
    found = []
    if seen and any(seen.values()):
        found.append("the encoder was pretrained, without labels, on " + " and ".join(
            f"{count} of the {name} asked about" for name, count in seen.items() if count)
            + "; this figure may be too good")
    if unknown := sum(not each.patient for each in (*known.bank, *known.query)):
        found.append(f"the patients of {unknown} regions are unknown; some may be on both sides")
    if (groups := len({each.patient or each.name for each in known.query})) < intervals.FEWEST:
        found.append(f"{groups} patients are asked about, too few for intervals: figures may be chance")
    trained = encoders.card(settings.encoder).get("ssl_dist") or {}
    mpp = [each for each in trained.get("mpp") or [] if isinstance(each, int | float) and each > 0]
    if mpp and min(abs(np.log2(settings.mpp / each)) for each in mpp) > protocol.APART:
        found.append(f"regions have {settings.mpp:g} µm/px, and the encoder was trained at "
                     f"{', '.join(f'{each:g}' for each in mpp[:3])}")
    return found
