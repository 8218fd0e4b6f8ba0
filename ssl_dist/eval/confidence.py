"""Maps of slides and pictures of any size: a small picture, outlines that QuPath lays over a slide, and a pyramid.

A slide is read in pieces with a rim as wide as the network sees and cleaning reaches, so nothing depends on where they
lie. Where all is bright there is glass, and its confidence is 0.

H, W pixels of the map
"""

import contextlib
import functools
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from shards import folder, tiff
from shards.index import ShardError
from shards.sources import Source
from ssl_dist import checkpoint
from ssl_dist.eval import blobs, pieces, protocol, segment, wholes
from ssl_dist.eval.outlines import outlines
from ssl_dist.eval.protocol import Progress
from ssl_dist.eval.settings import CUTS, Confidence
from ssl_dist.eval.wholes import Whole
from ssl_dist.models import encoder as encoders
from ssl_dist.models.encoder import Encoder

OUTLINED = 2**28        # pixels of the largest map that is outlined: a gigabyte of numbers
LONGEST = 4096          # pixels of a side of the small picture
INK = [230, 30, 30]


def rehearse(settings: Confidence) -> dict[str, Any]:
    """All that can fail before a slide is looked at."""
    chosen = _chosen(settings)
    network, said = _network(settings, chosen)
    found, doubts = _ready(settings)
    return {"protocol": settings.protocol, "class": f"{_number(settings, network, chosen)} of {network.classes()}",
            "cut": settings.cut or chosen.get("cut", "half"), "chosen by": chosen.get("by", "nobody"),
            "step": chosen.get("step", "as exported"), "slides": len(found), "out": str(settings.home),
            "warnings": [*said, *doubts]}


def run(settings: Confidence, device: torch.device, threads: int, progress: Progress) -> dict[str, Any]:
    """Files a slide, and a result that says what was found."""
    torch.set_num_threads(threads)
    chosen = _chosen(settings)
    network, said = _network(settings, chosen)
    network = network.eval().to(device)
    number, (some, _) = _number(settings, network, chosen), _ready(settings)
    out, sha256 = folder.make(settings.home), encoders.digest(settings.encoder)
    step = chosen["step"] if chosen and not said else None
    cut = settings.cut or chosen.get("cut", "half")
    told = {"encoder": sha256, "step": step, "class": number, "cut": cut, "mpp": settings.mpp,
            "slide_mpp": settings.slide_mpp, "write": sorted(settings.write), "smallest": settings.smallest}
    rows = wholes.rows(some, out, told, lambda source: _mapped(source, settings, network, number, cut, out,
                                                               functools.partial(progress, source.slide)),
                       lambda source: [f"{source.slide}.{form}" for form in settings.write])
    done, failed = [row for row in rows if "error" not in row], wholes.failed(rows)
    result: dict[str, Any] = {
        "protocol": settings.protocol, "size": 0, "class": number, "shards": [], "metrics": {}, "intervals": {},
        "cut": cut, **({} if step is None else {"step": step}), **({"chosen_by": chosen["by"]} if chosen else {}),
        "encoder": {"path": settings.encoder, "architecture": network.name, "sha256": sha256},
        "baselines": {}, "against": {}, "seen_in_pretraining": None, "classes": [], "slides": done,
        "failed": failed["failed"], "warnings": [*said, *failed["warnings"]],
        "counts": {"slides": len(done), "shared_patients": 0}, "seed": settings.seed,
        "pictures": [f"{row['slide']}.png" for row in done if "png" in settings.write],
        "asked": {"slides": settings.slides, "class": number, "mpp": settings.mpp}}
    path = protocol.place(out, settings.protocol, result)
    result["written"] = str(path)
    folder.write_json(path, result)
    return result


def _chosen(settings: Confidence) -> dict[str, Any]:
    """What eval/segment chose of this very encoder's run, when it was asked last: step, class and cut; nothing where it
    was not asked."""
    sha256, found = encoders.digest(settings.encoder), []
    for path in (Path(settings.encoder).parent / "eval").glob("segment*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            told = json.loads(path.read_text())
            if told["encoder"]["sha256"] == sha256:
                found.append((path.stat().st_mtime_ns, {
                    "step": int(told["step"]), "class": int(told["class"]), "by": path.name,
                    "cut": told["cut"] if told.get("cut") in CUTS else "half"}))
    return max(found, key=lambda each: each[0])[1] if found else {}


def _number(settings: Confidence, network: Encoder, chosen: dict[str, Any]) -> int:
    """The class that is drawn."""
    number = settings.number if settings.number is not None else chosen.get("class")
    if number is None and network.classes() > 1:
        raise ShardError(f"which of {network.classes()} classes is to be drawn is not known: no segment.json beside "
                         f"{settings.encoder} is of it; run eval/segment, or say number=0 to "
                         f"number={network.classes() - 1}")
    if (number or 0) >= network.classes():
        raise ShardError(f"number={number} is none of {network.classes()} classes, 0 to {network.classes() - 1}")
    return number or 0


def _network(settings: Confidence, chosen: dict[str, Any]) -> tuple[Encoder, list[str]]:
    """The network of the step that eval/segment chose, while its checkpoint is kept; else the exported one. And what is
    to be said of that."""
    exported = int((encoders.card(settings.encoder).get("ssl_dist") or {}).get("step") or 0)
    if not chosen or chosen["step"] == exported:
        return encoders.load(settings.encoder), []
    home = segment.run_of(settings.encoder)
    if home is None or chosen["step"] not in checkpoint.steps(home / "checkpoints"):
        return encoders.load(settings.encoder), [
            f"{chosen['by']} chose step {chosen['step']}, whose checkpoint is not kept; maps are of the exported "
            f"network, step {exported}"]
    return segment.of_checkpoint(settings.encoder, home / "checkpoints" / checkpoint.name(chosen["step"])), []


def _ready(settings: Confidence) -> tuple[list[Source], list[str]]:
    """The slides and pictures, and what is wrong with some; refuses, before the first is read, what cannot be done."""
    def refuse(source: Source, whole: Whole) -> None:
        pixels = whole.size[0] * whole.size[1]
        if "geojson" in settings.write and pixels > OUTLINED:
            raise ShardError(f"{source.slide} would have {pixels:,} pixels to outline, and {OUTLINED:,} are the "
                             "most; use a coarser mpp=, or write=[png,tif]")

    found = wholes.found(settings.slides)
    return found, wholes.tried(found, _mpp(settings), settings.slide_mpp, refuse)


def _mpp(settings: Confidence) -> float:
    """Microns per pixel of the maps; NaN where nobody told."""
    trained = (encoders.card(settings.encoder).get("ssl_dist") or {}).get("mpp") or []
    return settings.mpp or (float(trained[0]) if len(trained) == 1 else math.nan)


def _mapped(source: Source, settings: Confidence, network: Encoder, number: int, cut: str, out: Path,
            progress: Callable[[int, int], None]) -> dict[str, Any]:
    with wholes.opened(source, _mpp(settings), settings.slide_mpp) as whole:
        size, scale, mpp = whole.size, whole.scale, whole.asked
        confidence_HW, there_HW = mapped(whole.read, network, number, size, cut, progress)
    name = source.slide
    if "png" in settings.write:
        _small(confidence_HW, out / f"{name}.png")
    if "tif" in settings.write:
        draft = out / f".{name}.tif.tmp"
        tiff.write_map(draft, confidence_HW, None if np.isnan(mpp) else mpp)
        folder.publish(draft, out / f"{name}.tif")
    objects = _outlined(there_HW, scale, settings, out / f"{name}.geojson") if "geojson" in settings.write else None
    return {"slide": name, "height": size[0], "width": size[1], "area": round(float(there_HW.mean()), 4),
            **({} if objects is None else {"objects": objects})}


def mapped(read: pieces.Read, network: Encoder, number: int, size: tuple[int, int], cut: str = "half",
           progress: Callable[[int, int], None] = lambda *_: None, side: int = pieces.SIDE
           ) -> tuple[np.ndarray, np.ndarray]:
    """The confidence (H, W), 0 to 255, and what it holds to be there."""
    # Pages of which nothing is written take no memory: glass.
    confidence_HW, there_HW = np.zeros(size, np.uint8), np.zeros(size, bool)
    colours_133 = pieces.colours(read, size)
    counts_L = np.zeros(blobs.LEVELS, np.int64)
    cut_up = [*pieces.pieces(*size, network.reach(), side)]
    for done, piece in enumerate(cut_up, start=1):
        top, bottom, left, right = piece.seen
        pixels_HW3 = read(left, top, right - left, bottom - top)
        own_HW3 = piece.kept(pixels_HW3.transpose(2, 0, 1)).transpose(1, 2, 0)
        if pieces.tissue(own_HW3).any():
            levels_HW = blobs.levels(piece.kept(pieces.looked_at(network, pixels_HW3, colours_133)[number]))
            confidence_HW[piece.top:piece.bottom, piece.left:piece.right] = levels_HW
            counts_L += blobs.counted(levels_HW, own_HW3)
        progress(done, len(cut_up))
    level = blobs.cut(counts_L, cut)
    for piece in pieces.pieces(*size, blobs.cleaning_reach(), side):
        top, bottom, left, right = piece.seen
        if (seen_HW := confidence_HW[top:bottom, left:right] > level).any():
            there_HW[piece.top:piece.bottom, piece.left:piece.right] = piece.kept(blobs.cleaned(seen_HW))
    return confidence_HW, there_HW


def _small(confidence_HW: np.ndarray, path: Path) -> None:
    image = Image.fromarray(confidence_HW)
    buffer = io.BytesIO()
    image.reduce(max(1, -(-max(image.size) // LONGEST))).save(buffer, "png")
    folder.write(path, buffer.getvalue())


def _outlined(there_HW: np.ndarray, scale: float, settings: Confidence, path: Path) -> int:
    """Writes every piece with its holes, in pixels of level 0; how many there are."""
    numbers_HW, count = ndimage.label(there_HW)
    large_N = np.bincount(numbers_HW.ravel(), minlength=count + 1) >= settings.smallest
    large_N[0] = False
    numbers_HW = np.where(large_N, np.cumsum(large_N), 0)[numbers_HW]
    found = [json.dumps({
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [
            np.round(np.concatenate([ring, ring[:1]]) * scale, 2).tolist() for ring in _outer_first(rings)]},
        "properties": {"objectType": "detection", "classification": {"name": settings.protocol, "color": INK}}})
        for rings in outlines(numbers_HW)]
    folder.write(path, '{"type":"FeatureCollection","features":[\n' + ",\n".join(found) + "\n]}\n")
    return len(found)


def _outer_first(rings: list[np.ndarray]) -> list[np.ndarray]:
    """A piece's rim is its longest ring in extent; the others are its holes."""
    return sorted(rings, key=lambda ring: -int(np.ptp(ring, axis=0).prod()))
