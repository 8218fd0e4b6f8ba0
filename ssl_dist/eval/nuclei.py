"""Nuclei, each apart and of a type: what an encoder is worth to HoVer-Net.

Regions are parted by patient; a HoVer-Net over the encoder, and one over each baseline, learn from the first half and
are asked about the other. The encoder's network is kept: `ssl-dist eval eval/outline` takes it to whole slides.

B windows   S pixels a side   H, W pixels of a region   K maps: nuclear, horizontal, vertical, and each type
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shards import folder, regions
from shards.regions import Region
from ssl_dist.eval import dense, instances, networks, protocol, qupath, watershed
from ssl_dist.eval.dense import Halves, Judged
from ssl_dist.eval.instances import Objects
from ssl_dist.eval.protocol import Progress
from ssl_dist.eval.settings import Nuclei
from ssl_dist.eval.watershed import Rules, Strip, Whole
from ssl_dist.eval.windows import Drawn, Windows, apart
from ssl_dist.models import hovernet
from ssl_dist.models.encoder import Encoder
from ssl_dist.models.hovernet import HoverNet

MAPS = 3                # before those of types


def rehearse(settings: Nuclei) -> dict[str, Any]:
    """Everything that can fail before a network learns; what would be compared."""
    return dense.rehearse(settings, partial(_build, settings))


def run(settings: Nuclei, device: torch.device, threads: int, progress: Progress) -> dict[str, Any]:
    """The protocol: the encoder and every baseline at every share of the labels, figures, pictures, outlines."""
    known = dense.halves(settings)
    out = folder.make(settings.home)
    drawn: list[tuple[Region, regions.Pixels, Whole]] = []
    taught: list[HoverNet] = []

    def judged(source: str, bank: list[Region], kept: bool, progress: Callable[[int, int], None]) -> Judged:
        network = _build(settings, dense.encoder_of(source, settings, settings.seed), known)
        windows = Windows(bank, settings, known.retyped)
        curve = dense.learn(network, windows, partial(losses, settings, device), settings, device, threads, progress)
        tallies, classes = [], known.classes if network.types is not None else []
        for region in known.query:
            pixels = known.retyped(region.read())
            found = parted(network, pixels.image_HW3, settings, device)
            tallies.append(instances.tally(Objects.of(pixels.instances_HW, pixels.types_HW), objects(found),
                                           len(classes)))
            if kept:
                drawn.append((region, pixels, found))
        if kept:
            taught.append(network)
        matched = sum((each.confusion_CC for each in tallies), np.zeros((len(classes),) * 2, int))
        return Judged(instances.measured(tallies, classes, [each.tissue for each in known.query]), curve, {
            "regions": instances.told(tallies, [each.name for each in known.query]),
            "confusion": matched.tolist() if classes else []})

    rules = {"window": settings.window, "margin": settings.margin}
    result = dense.compare(settings, known, judged, progress, device, threads, rules)
    path = protocol.place(out, settings.protocol, result)
    network = path.with_name(f"{path.stem}-network")
    networks.save(network, taught[-1], known.classes, settings)
    pictures, captions = _draw(settings, known, drawn, result, path)
    return dense.written(result | {"pictures": pictures, "captions": captions, "network": network.name}, path)


def _build(settings: Nuclei, encoder: Encoder, known: Halves) -> HoverNet:
    return HoverNet(encoder, len(known.classes), settings.width, settings.kernel)


def losses(settings: Nuclei, device: torch.device, network: nn.Module, drawn: Drawn) -> dict[str, Tensor]:
    """HoVer-Net's, on what is not margin."""
    margin, size = settings.margin, settings.window
    inner = slice(margin, size - margin)
    away_B2SS = torch.from_numpy(np.stack([apart(each) for each in drawn.numbers_BSS])).to(device)
    maps = network(torch.from_numpy(drawn.pixels_BSS3).to(device))
    cut = hovernet.Maps(*(None if each is None else each[..., inner, inner].float() for each in maps))   # type: ignore
    numbers_BSS = torch.from_numpy(drawn.numbers_BSS).to(device)
    types_BSS = None if drawn.types_BSS is None else torch.from_numpy(drawn.types_BSS).to(device).long()
    return hovernet.losses(cut, (numbers_BSS > 0).long()[..., inner, inner], away_B2SS[..., inner, inner],
                           None if types_BSS is None else types_BSS[..., inner, inner])


# --- what a network finds

def answers(network: HoverNet, pixels_BSS3: Tensor) -> Tensor:
    """The maps (B, K, S, S) that nuclei are parted by."""
    maps = network(pixels_BSS3)
    found = [maps.nuclear_B2HW.softmax(dim=1)[:, 1:], maps.apart_B2HW]
    if maps.types_BCHW is not None:
        found.append(maps.types_BCHW.softmax(dim=1)[:, 1:])
    return torch.cat(found, dim=1)


def as_strips(maps: Iterable[np.ndarray]) -> Iterator[Strip]:
    """Maps (K, rows, W) in words."""
    for map_KHW in maps:
        yield Strip(map_KHW[0], map_KHW[1:MAPS], map_KHW[MAPS:] if len(map_KHW) > MAPS else None)


def parted(network: HoverNet, image_HW3: np.ndarray, settings: Nuclei, device: torch.device) -> Whole:
    """The nuclei of a region in memory."""
    maps = dense.strips(network, partial(answers, network), MAPS + network.kinds, image_HW3, settings, device)
    return watershed.whole(as_strips(maps), image_HW3.shape[:2], Rules(settings.edge, settings.smallest))


def kinds(types_NC: np.ndarray | None, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The likeliest type of each nucleus, from 1 on, and how likely it is; 0 where nobody asks."""
    if types_NC is None:
        return np.zeros(count, np.int64), None
    return types_NC.argmax(axis=1) + 1, types_NC.max(axis=1)


def objects(found: Whole) -> Objects:
    """Nuclei that were found, as they are judged."""
    return Objects(found.numbers_HW, kinds(found.types_NC, len(found.size_N))[0], found.middle_N2)


def _draw(settings: Nuclei, known: Halves, drawn: list[tuple[Region, regions.Pixels, Whole]], result: dict[str, Any],
          path: Path) -> tuple[list[str], dict[str, str]]:
    """Files of each region that was asked about, and pictures of some; names and captions of the pictures."""
    home = folder.make(path.with_name(f"{path.stem}-regions"))
    pictures: list[str] = []
    captions: dict[str, str] = {}
    for (region, pixels, found), told in zip(drawn, result["regions"], strict=True):
        name = region.name.replace("/", "_")
        for suffix in settings.write:
            if suffix == "geojson":
                kinds_N, sure_N = kinds(found.types_NC, len(found.size_N))
                qupath.write_geojson(home / f"{name}.geojson", qupath.features(
                    found.numbers_HW, 0, 0, 1, kinds_N.tolist(), found.nuclear_N, sure_N, known.classes))
            else:
                qupath.write_map(home / f"{name}.{suffix}", found.numbers_HW)
        if len(pictures) < settings.pictures:
            pictures.append(f"{path.stem}_{name}.png")
            qupath.write_picture(path.with_name(pictures[-1]), pixels.image_HW3, pixels.instances_HW, found.numbers_HW)
            figures = ", ".join(f"{what} {told[key]:.3f}" for key, what in (("pq", "PQ"), ("aji", "AJI"),
                                                                            ("dice", "Dice")) if told[key] is not None)
            captions[pictures[-1]] = (f"Region {region.name}: left the {told['there']} true outlines, right the "
                                      f"{told['found']} found by a network that had not seen it. {figures}.")
    return pictures, captions
