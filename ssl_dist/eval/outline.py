"""Nuclei of whole slides and large pictures, by a network that eval/nuclei has written.

A slide is read once, a row of windows after the other; what is in memory together decides nothing (tiling.py,
watershed.py), so that no nucleus is split at a seam or found twice.
"""

import csv
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shards import folder
from shards.index import ShardError
from shards.slide import Picture
from shards.sources import Source
from ssl_dist.eval import dense, networks, nuclei, protocol, qupath, tiling, wholes
from ssl_dist.eval.networks import Network
from ssl_dist.eval.protocol import Progress
from ssl_dist.eval.settings import Outline
from ssl_dist.eval.watershed import Parting, Rules
from ssl_dist.eval.wholes import Whole

MAP = 2**31             # pixels of the largest map of numbers that is written


def rehearse(settings: Outline) -> dict[str, Any]:
    """Everything that can fail before a slide is read; what would be done."""
    network = networks.load(settings.network)
    found, doubts = _ready(settings, network)
    return {"protocol": settings.protocol, "network": network.network.encoder.name, "slides": len(found),
            "types": ", ".join(network.classes) or "none", "out": str(settings.home), "warnings": doubts}


def run(settings: Outline, device: torch.device, threads: int, progress: Progress) -> dict[str, Any]:      # noqa: ARG001
    """The protocol: files a slide, and a result that counts what was found."""
    network = networks.load(settings.network)
    network.network.to(device)
    some, _ = _ready(settings, network)
    out = folder.make(settings.home)
    told = {"network": networks.digest(settings.network), "mpp": settings.mpp, "slide_mpp": settings.slide_mpp,
            "write": sorted(settings.write), "precision": settings.precision}
    rows = wholes.rows(some, out, told, lambda source: _slide(source, settings, network, device, out,
                                                              partial(progress, source.slide)),
                       lambda source: [f"{source.slide}.{form}" for form in (*settings.write, "csv")])
    done, failed = [row for row in rows if "error" not in row], wholes.failed(rows)
    result = {
        "protocol": settings.protocol, "size": network.window, "network": str(settings.network), "shards": [],
        "encoder": {"path": str(settings.network), "architecture": network.network.encoder.name, "sha256": ""},
        "metrics": {}, "intervals": {}, "baselines": {}, "against": {}, "seen_in_pretraining": None, "classes":
        network.classes, "confusion": [], "pictures": [], "slides": done, "failed": failed["failed"], "warnings": [
            *failed["warnings"],
            *(f"{row['slide']}: {row['cut']} clumps of nuclei were too tall to wait for, and are parted where rows "
              "ended" for row in done if row["cut"])],
        "counts": {"slides": len(done), "nuclei": sum(row["nuclei"] for row in done), "shared_patients": 0},
        "asked": {"slides": settings.slides, "network": str(settings.network)}, "seed": settings.seed}
    path = protocol.place(out, settings.protocol, result)
    return dense.written(result, path)


def _ready(settings: Outline, network: Network) -> tuple[list[Source], list[str]]:
    """The slides and pictures, and what is wrong with some; refuses, before the first is read, what cannot be done."""
    maps = [form for form in settings.write if form != "geojson"]

    def refuse(source: Source, whole: Whole) -> None:
        if maps and whole.size[0] * whole.size[1] > MAP:
            raise ShardError(f"a map of {source.slide} would have {whole.size[0] * whole.size[1]:,} pixels, and "
                             f"{MAP:,} are the most; use write=[geojson]")

    found = wholes.found(settings.slides)
    return found, wholes.tried(found, settings.mpp or network.mpp, settings.slide_mpp, refuse)


def _slide(source: Source, settings: Outline, network: Network, device: torch.device, out: Path,
           progress: Callable[[int, int], None]) -> dict[str, Any]:
    with wholes.opened(source, settings.mpp or network.mpp, settings.slide_mpp) as whole:
        height, width = whole.size
        reads = tiling.of_picture(whole.read(0, 0, width, height)) if isinstance(whole.slide, Picture) else whole.read
        answers = partial(nuclei.answers, network.network)
        maps = tiling.strips(partial(dense.said, answers, device, settings.precision),
                             nuclei.MAPS + network.network.kinds, reads, whole.size, network.window,
                             network.margin, settings.batch, progress)
        return _found(source.slide, nuclei.as_strips(maps), whole.size, whole.scale, settings, network, out)


def _found(name: str, strips: Any, size: tuple[int, int], scale: float, settings: Outline, network: Network, out: Path
           ) -> dict[str, Any]:
    parting = Parting(Rules(network.edge, network.smallest))
    maps = [form for form in settings.write if form != "geojson"]
    numbers_HW = np.zeros(size if maps else (0, 0), np.int32)
    texts: list[str] = []
    first: list[np.ndarray] = [np.zeros((0, 2), np.int64)]
    rows: list[tuple[Any, ...]] = []
    for portion in parting.of(strips):
        kinds_N, sure_N = nuclei.kinds(portion.types_NC, portion.count)
        texts += qupath.features(portion.numbers_HW, portion.top, 0, scale, kinds_N.tolist(), portion.nuclear_N, sure_N,
                                 network.classes) if "geojson" in settings.write else []
        for place in range(portion.count):
            rows.append((*np.round(portion.middle_N2[place] * scale, 1), int(portion.size_N[place]),
                         network.classes[kinds_N[place] - 1] if kinds_N[place] else qupath.NUCLEUS,
                         round(float(portion.nuclear_N[place]), 4),
                         "" if sure_N is None else round(float(sure_N[place]), 4)))
        if maps:
            window_HW = numbers_HW[portion.top:portion.top + len(portion.numbers_HW)]
            np.copyto(window_HW, portion.numbers_HW + len(rows) - portion.count, where=portion.numbers_HW > 0)
        first.append(portion.first_N2)
    first_N2 = np.concatenate(first)
    order = np.lexsort((first_N2[:, 1], first_N2[:, 0]))
    if maps:
        rank_N = np.zeros(len(order) + 1, np.int32)
        rank_N[order + 1] = np.arange(1, len(order) + 1)
        for form in maps:
            qupath.write_map(out / f"{name}.{form}", rank_N[numbers_HW])
    if "geojson" in settings.write:     # also where nothing was found, or an older one would stay
        qupath.write_geojson(out / f"{name}.geojson", [texts[place] for place in order])
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["number", "x", "y", "pixels", "type", "nucleus_probability", "type_probability"])
    writer.writerows((number, *rows[place]) for number, place in enumerate(order, start=1))
    folder.write(out / f"{name}.csv", table.getvalue())
    counts = {kind: sum(row[3] == kind for row in rows) for kind in network.classes}
    return {"slide": name, "nuclei": len(rows), "types": counts, "cut": parting.cut, "pixels": list(size)}
