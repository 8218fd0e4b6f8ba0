"""Maps of slides and pictures of any size: a small picture, outlines that QuPath lays over a slide, and a pyramid.

A slide is read in pieces with a rim as wide as the network sees and cleaning reaches, so nothing depends on where they
lie. Where all is bright there is glass, and its confidence is 0.

H, W pixels of the map
"""

import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from shards import folder, sources, tiff, tiles
from shards.index import ShardError
from shards.settings import Settings
from shards.slide import Picture, Slide, SlideError
from shards.sources import Source
from ssl_dist.eval import blobs, pieces, protocol
from ssl_dist.eval.outlines import outlines
from ssl_dist.eval.protocol import Progress
from ssl_dist.eval.settings import Confidence
from ssl_dist.models import encoder as encoders
from ssl_dist.models.encoder import Encoder

BLANK = 235             # of every channel: a piece that is nowhere darker is glass
OUTLINED = 2**28        # pixels of the largest map that is outlined: a gigabyte of numbers
LONGEST = 4096          # pixels of a side of the small picture
SLACK = 1.05            # by which a slide may be coarser than what is asked for
INK = [230, 30, 30]


def rehearse(settings: Confidence) -> dict[str, Any]:
    """All that can fail before a slide is looked at."""
    network = encoders.build(settings.encoder)
    found = _sources(settings)
    for source in found:
        with _opened(source, settings):
            pass
    return {"protocol": settings.protocol, "class": f"{_number(settings, network)} of {network.classes()}",
            "slides": len(found), "out": str(settings.home)}


def run(settings: Confidence, device: torch.device, threads: int, progress: Progress) -> dict[str, Any]:
    """Files a slide, and a result that says what was found."""
    torch.set_num_threads(threads)
    network = encoders.load(settings.encoder).eval().to(device)
    number, out, rows = _number(settings, network), folder.make(settings.home), []
    for source in _sources(settings):
        rows.append(_mapped(source, settings, network, number, out, functools.partial(progress, source.slide)))
    result: dict[str, Any] = {
        "protocol": settings.protocol, "size": 0, "class": number, "shards": [], "metrics": {}, "intervals": {},
        "encoder": {"path": settings.encoder, "architecture": network.name,
                    "sha256": encoders.digest(settings.encoder)},
        "baselines": {}, "against": {}, "seen_in_pretraining": {}, "classes": [], "warnings": [], "slides": rows,
        "counts": {"slides": len(rows), "shared_patients": 0}, "seed": settings.seed,
        "pictures": [f"{row['slide']}.png" for row in rows if "png" in settings.write],
        "asked": {"slides": settings.slides, "class": number, "mpp": settings.mpp}}
    path = protocol.place(out, settings.protocol, result)
    result["written"] = str(path)
    folder.write_json(path, result)
    return result


def _number(settings: Confidence, network: Encoder) -> int:
    """The class that is drawn."""
    chosen = settings.number
    if chosen is None and network.classes() > 1:
        found = Path(settings.encoder).parent / "eval" / "segment.json"
        try:
            chosen = int(json.loads(found.read_text())["class"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ShardError(f"which of {network.classes()} classes is to be drawn is not known: there is no {found}; "
                             f"run eval/segment, or say number=0 to number={network.classes() - 1}") from None
    if (chosen or 0) >= network.classes():
        raise ShardError(f"number={chosen} is none of {network.classes()} classes, 0 to {network.classes() - 1}")
    return chosen or 0


def _sources(settings: Confidence) -> list[Source]:
    reading = Settings(source=Path(), out=Path(), dataset="slides", kind="slides")
    found: list[Source] = []
    for place in map(Path, settings.slides):
        found += [Source(file=str(place), name=place.stem, slide=place.stem)] if place.is_file() else \
            sources.named([str(place)], reading)
    return found


def _opened(source: Source, settings: Confidence) -> Slide | Picture:
    """A slide, or a picture, whose pixels are taken as they are."""
    try:
        return Slide(source.path, source.mpp, settings.slide_mpp)
    except SlideError:
        if not source.file.lower().endswith(sources.SUFFIXES["regions"]):
            raise
        return tiles.picture(source, Settings(source=Path(), out=Path(), dataset="slides", kind="regions"))


def _mpp(settings: Confidence) -> float:
    trained = (encoders.card(settings.encoder).get("ssl_dist") or {}).get("mpp") or []
    if settings.mpp is None and len(trained) != 1:
        raise ShardError(f"{settings.encoder} was trained at {trained or 'microns per pixel that nobody told'}; say "
                         "mpp=0.25 or whatever maps shall have")
    return settings.mpp or float(trained[0])


def _mapped(source: Source, settings: Confidence, network: Encoder, number: int, out: Path,
            progress: Callable[[int, int], None]) -> dict[str, Any]:
    with _opened(source, settings) as slide:
        flat = isinstance(slide, Picture)
        mpp = slide.mpp if flat else _mpp(settings)
        scale = 1.0 if flat else mpp / slide.mpp
        if scale < 1 / SLACK:
            raise SlideError(f"{slide.path} has {slide.mpp:g} µm/px, and maps are asked for at {mpp:g}: what is not in "
                             f"the slide cannot be read; mpp={slide.mpp:g} takes it as it is")
        size = max(1, round(slide.height / scale)), max(1, round(slide.width / scale))
        confidence_HW, there_HW = mapped(
            lambda left, top, wide, high: slide.region(round(left * scale), round(top * scale), (wide, high), mpp),
            network, number, size, progress)
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


def mapped(read: pieces.Read, network: Encoder, number: int, size: tuple[int, int],
           progress: Callable[[int, int], None] = lambda *_: None, side: int = pieces.SIDE
           ) -> tuple[np.ndarray, np.ndarray]:
    """The confidence (H, W), 0 to 255, and what it holds to be there."""
    # Pages of which nothing is written take no memory: glass.
    confidence_HW, there_HW = np.zeros(size, np.uint8), np.zeros(size, bool)
    colours_123 = pieces.colours(read, size)
    cut = [*pieces.pieces(*size, network.reach() + blobs.cleaning_reach(), side)]
    for done, piece in enumerate(cut, start=1):
        top, bottom, left, right = piece.seen
        pixels_HW3 = read(left, top, right - left, bottom - top)
        if piece.kept(pixels_HW3.transpose(2, 0, 1)).min() < BLANK:
            map_HW = pieces.looked_at(network, pixels_HW3, colours_123)[number]
            own = slice(piece.top, piece.bottom), slice(piece.left, piece.right)
            confidence_HW[own] = np.rint(255 * piece.kept(map_HW))
            there_HW[own] = piece.kept(blobs.cleaned(map_HW > blobs.SURE))
        progress(done, len(cut))
    return confidence_HW, there_HW


def _small(confidence_HW: np.ndarray, path: Path) -> None:
    image = Image.fromarray(confidence_HW)
    buffer = io.BytesIO()
    image.reduce(max(1, -(-max(image.size) // LONGEST))).save(buffer, "png")
    folder.write(path, buffer.getvalue())


def _outlined(there_HW: np.ndarray, scale: float, settings: Confidence, path: Path) -> int:
    """Writes every piece with its holes, in pixels of level 0; how many there are."""
    if there_HW.size > OUTLINED:
        raise ShardError(f"{path.stem} would have {there_HW.size:,} pixels to outline, and {OUTLINED:,} are the most; "
                         "use a coarser mpp=, or write=[png,tif]")
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
