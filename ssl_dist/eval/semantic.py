"""What every pixel is: what an encoder is worth to a U-Net (Ciga et al. judge theirs so, among other ways).

Classes are the types of the regions' objects, or object and none where nobody says; background is one of them.

B windows   S pixels a side   C classes   R regions
"""

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from shards import folder, regions
from shards.regions import Region
from ssl_dist.eval import dense, metrics, protocol
from ssl_dist.eval.dense import Halves, Judged
from ssl_dist.eval.metrics import Measure, Numbers
from ssl_dist.eval.protocol import Progress
from ssl_dist.eval.qupath import INKS
from ssl_dist.eval.settings import Semantic
from ssl_dist.eval.windows import Drawn, Windows
from ssl_dist.models.encoder import Encoder
from ssl_dist.models.hovernet import dice
from ssl_dist.models.unet import UNet

BACKGROUND, OBJECT = "background", "object"


def rehearse(settings: Semantic) -> dict[str, Any]:
    """Everything that can fail before a network learns; what would be compared."""
    return dense.rehearse(settings, partial(_build, settings))


def run(settings: Semantic, device: torch.device, threads: int, progress: Progress) -> dict[str, Any]:
    """The protocol: the encoder and every baseline at every share of the labels, figures and pictures."""
    known = dense.halves(settings)
    out = folder.make(settings.home)
    classes = _classes(known)
    shown: list[tuple[Region, np.ndarray, np.ndarray, np.ndarray]] = []

    def judged(source: str, bank: list[Region], kept: bool, progress: Callable[[int, int], None]) -> Judged:
        network = _build(settings, dense.encoder_of(source, settings, settings.seed), known)
        curve = dense.learn(network, Windows(bank, settings, known.retyped), partial(losses, device), settings,
                            device, threads, progress)
        counts = []
        for region in known.query:
            pixels = known.retyped(region.read())
            truth_HW, guess_HW = truth(pixels), answered(network, pixels.image_HW3, settings, device)
            counts.append(metrics.confusion(truth_HW.ravel(), guess_HW.ravel(), len(classes)))
            if kept and len(shown) < settings.pictures:
                shown.append((region, pixels.image_HW3, truth_HW, guess_HW))
        return Judged(measured(np.array(counts), classes), curve, {
                "confusion": np.sum(counts, axis=0).astype(int).tolist()})

    rules = {"window": settings.window, "margin": settings.margin}
    result = dense.compare(settings, known, judged, progress, device, threads, rules)
    path = protocol.place(out, settings.protocol, result)
    pictures, captions = [], {}
    for region, image_HW3, truth_HW, guess_HW in shown:
        pictures.append(f"{path.stem}_{region.name.replace('/', '_')}.png")
        captions[pictures[-1]] = (f"Region {region.name}: as it is, what is there, and what a network says that had "
                                  "not seen it.")
        folder.write(path.with_name(pictures[-1]), _picture(image_HW3, truth_HW, guess_HW))
    return dense.written(result | {"classes": classes, "pictures": pictures, "captions": captions}, path)


def _classes(known: Halves) -> list[str]:
    return [BACKGROUND, *(known.classes or [OBJECT])]


def _build(settings: Semantic, encoder: Encoder, known: Halves) -> UNet:
    return UNet(encoder, len(_classes(known)), settings.width)


def truth(pixels: regions.Pixels) -> np.ndarray:
    """The class of each pixel."""
    return (pixels.instances_HW > 0).astype(np.int64) if pixels.types_HW is None else pixels.types_HW.astype(np.int64)


def losses(device: torch.device, network: nn.Module, drawn: Drawn) -> dict[str, Tensor]:
    """Cross-entropy and Dice; the rim of a window as well, for all of it is seen."""
    truth_BSS = torch.from_numpy((drawn.numbers_BSS > 0).astype(np.int64) if drawn.types_BSS is None
                                 else drawn.types_BSS.astype(np.int64)).to(device)
    logits_BCSS = network(torch.from_numpy(drawn.pixels_BSS3).to(device)).float()
    parts = {"entropy": F.cross_entropy(logits_BCSS, truth_BSS), "dice": dice(logits_BCSS, truth_BSS)}
    return {"loss": parts["entropy"] + parts["dice"], **parts}


def answered(network: UNet, image_HW3: np.ndarray, settings: Semantic, device: torch.device) -> np.ndarray:
    """The likeliest class of each pixel of a region."""
    classes = network.answer.out_channels
    maps = dense.strips(network, lambda pixels: network(pixels).softmax(dim=1), classes, image_HW3, settings, device)
    return np.concatenate([each.argmax(axis=0) for each in maps])


def measured(counts_RCC: np.ndarray, classes: list[str]) -> Measure:
    """Dice and intersection over union of each class but background, pixels of all regions together; and as papers
    have it, Dice of each region and then the mean."""
    def measure(weights_R: Numbers | None = None) -> dict[str, float]:
        weights_R = np.ones(len(counts_RCC)) if weights_R is None else weights_R
        dice_C, ratio_C = overlap(np.einsum("r,rij->ij", weights_R, counts_RCC))
        each_R = np.array([np.nanmean(overlap(counts_CC)[0][1:]) if counts_CC[1:, 1:].sum() + counts_CC[0, 1:].sum()
                           + counts_CC[1:, 0].sum() else np.nan for counts_CC in counts_RCC])
        there = np.isfinite(each_R) & (weights_R > 0)
        return {"dice": float(np.nanmean(dice_C[1:])), "iou": float(np.nanmean(ratio_C[1:])),
                "dice_by_region": float(np.average(each_R[there], weights=weights_R[there])) if there.any()
                else float("nan"),
                **({f"dice_{name.replace(' ', '_')}": float(dice_C[place]) for place, name in enumerate(classes)
                    if place} if len(classes) > 2 else {})}

    return measure


def overlap(counts_CC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Dice and intersection over union of each class (rows: truth); no number where it neither is nor is guessed."""
    both_C, sum_C = np.diag(counts_CC), counts_CC.sum(axis=0) + counts_CC.sum(axis=1)
    there_C = np.where(sum_C > 0, sum_C, np.nan)
    return 2 * both_C / there_C, both_C / (there_C - both_C)


def _picture(image_HW3: np.ndarray, truth_HW: np.ndarray, guess_HW: np.ndarray) -> bytes:
    inks = np.array([(255, 255, 255), *INKS], np.uint8)
    sides = [image_HW3, *(inks[np.where(each > 0, (each - 1) % len(INKS) + 1, 0)] for each in (truth_HW, guess_HW))]
    gap = np.full((len(image_HW3), 8, 3), 255, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate([sides[0], gap, sides[1], gap, sides[2]], axis=1)).save(buffer, "png")
    return buffer.getvalue()
