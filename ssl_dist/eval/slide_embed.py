"""One vector a slide, by a trained slide encoder: the mean over many views of a few tiles each, of length one.

As Giga-SSL's code does it (trislaz/Democratizing_WSI): the tiles of a slide in an order of lots, cut into views one
after the other; where they run out, in another order once more.

N tiles of a slide   V views of it   T tiles of a view   D width of a slide's vector
"""

import hashlib
import io
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from shards import folder
from shards.index import ShardError
from ssl_dist.data.bags import Bags
from ssl_dist.eval.protocol import Progress
from ssl_dist.eval.settings import SlideEmbed
from ssl_dist.models import encoder as encoders
from ssl_dist.models import own
from ssl_dist.models.sparse import SlideEncoder

NEAR = 0.1              # of the µm/px learnt at: slides' own resolutions differ by some per cent


def rehearse(settings: SlideEmbed) -> dict[str, Any]:
    """Everything that can fail before a slide is looked at; what would be looked at."""
    bags = _bags(settings)
    return {"protocol": settings.protocol, "slides": len(bags), "tiles": int(bags.counts.sum()),
            "width of a tile's vector": bags.width, "out": str(settings.home), "warnings": _doubts(bags)}


def run(settings: SlideEmbed, device: torch.device, threads: int, progress: Progress) -> dict[str, Any]:
    """Computes, writes slides.parquet, and says what was written."""
    bags = _bags(settings)
    network = cast(SlideEncoder, own.load(settings.encoder)).eval().to(device)
    out = folder.make(settings.home)
    found = []
    for vector_D in vectors(network, bags, settings, device, threads):
        found.append(vector_D)
        progress("slides", len(found), len(bags))
    vectors_SD, sha256 = np.stack(found), encoders.digest(settings.encoder)
    _write(out / "slides.parquet", bags, vectors_SD, sha256)
    result: dict[str, Any] = {
        "protocol": settings.protocol,
        "encoder": {"path": str(settings.encoder), "architecture": network.name, "sha256": sha256,
                    "vectors_of": bags.encoder},
        "shards": [{"path": str(settings.bags), "fingerprint": bags.fingerprint, "datasets": []}],
        "counts": {"tiles": int(bags.counts.sum()), "slides": len(bags), "width": vectors_SD.shape[1]},
        "views": settings.views, "tiles": settings.tiles, "metrics": {}, "intervals": {}, "baselines": {},
        "warnings": _doubts(bags), "seed": settings.seed, "written": str(out / "slide_embed.json")}
    folder.write_json(out / "slide_embed.json", result)
    return result


@dataclass(frozen=True)
class Group:
    """Views of several slides: so many of each, and of their tiles vectors, cells, and which view each is of."""

    many: list[int]
    features_TD: np.ndarray
    cell_T2: np.ndarray
    owner_T: np.ndarray


def vectors(network: SlideEncoder, bags: Bags, settings: SlideEmbed, device: torch.device,
            threads: int) -> Iterator[np.ndarray]:
    """The vector (D,) of each slide in turn.

    On a CPU each thread looks at views of its own, and torch starts none besides: products are small, and threads that
    share one wait for each other longer than they work.
    """
    before, workers = torch.get_num_threads(), threads if device.type == "cpu" else 1
    waiting: deque[Future[list[np.ndarray]]] = deque()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers) as pool:
            for group in groups(bags, settings):
                waiting.append(pool.submit(looked_at, network, group, device))
                if len(waiting) > workers:
                    yield from waiting.popleft().result()
            for found in waiting:
                yield from found.result()
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def looked_at(network: SlideEncoder, group: Group, device: torch.device) -> list[np.ndarray]:
    """The vector (D,) of each slide of a group: the mean of its views', at length one."""
    given = (torch.from_numpy(each).to(device) for each in (group.features_TD, group.cell_T2, group.owner_T))
    parts = network(*given, sum(group.many)).double().split(group.many)
    return [F.normalize(part_VD.mean(dim=0), dim=0).float().cpu().numpy() for part_VD in parts]


def groups(bags: Bags, settings: SlideEmbed) -> Iterator[Group]:
    """The slides in their order, as many together as have `batch` views."""
    many: list[int] = []
    parts: list[tuple[np.ndarray, ...]] = []
    for row, slide in enumerate(bags.slides):
        bag = bags[row]
        drawn = list(views(len(bag.features_ND), settings.tiles, settings.views, settings.seed, slide))
        place_T, view_T = np.concatenate(drawn), np.repeat(np.arange(len(drawn)), [len(each) for each in drawn])
        parts.append((bag.features_ND[place_T], bag.cell_N2[place_T], view_T + sum(many)))
        many.append(len(drawn))
        if sum(many) >= settings.batch or row == len(bags) - 1:
            yield Group(many, *(np.concatenate(each) for each in zip(*parts, strict=True)))
            many, parts = [], []


def views(count: int, tiles: int, many: int, seed: int, slide: str) -> Iterator[np.ndarray]:
    """Places of the tiles of each view of a slide; of a slide of fewer tiles than a view has, all of them."""
    lot = int.from_bytes(hashlib.blake2b(slide.encode(errors="surrogateescape"), digest_size=8).digest(), "big")
    numbers, wide = np.random.Generator(np.random.Philox(key=[seed, lot])), min(tiles, count)
    done = 0
    while True:
        order_N = numbers.permutation(count)
        for first in range(0, count - wide + 1, wide):
            yield order_N[first:first + wide]
            done += 1
            if done == many:
                return


def _bags(settings: SlideEmbed) -> Bags:
    """The slides, if their tiles' vectors are what the encoder learnt on."""
    with torch.device("meta"):
        network = own.build(settings.encoder)
    if not isinstance(network, SlideEncoder):
        raise encoders.EncoderError(f"{settings.encoder} is no encoder of slides; train one with: ssl-dist train "
                                    "pretrain/gigassl")
    bags, about = Bags(settings.bags), encoders.card(settings.encoder).get("ssl_dist", {})
    if bags.width != network.tiles:
        raise ShardError(f"{settings.bags} holds vectors of {bags.width} numbers, and {settings.encoder} takes "
                         f"{network.tiles}; embed the slides with the tile encoder and stage that it learnt on")
    for name, theirs, told in (("encoder", about.get("tile_encoder_sha256"), {bags.encoder} - {""}),
                               ("stage", about.get("tile_stage"), {facts.get("stage") for facts in bags.facts})):
        if bags.encoder and about.get("tile_encoder_sha256") and (other := told - {theirs}):
            raise ShardError(f"{settings.bags} is of {name} {other.pop()!s:.12}, and {settings.encoder} learnt on "
                             f"{theirs!s:.12}; embed the slides with the encoder and stage that it learnt on")
    for slide, facts in zip(bags.slides, bags.facts, strict=True):
        mpp, learnt = facts.get("mpp"), about.get("mpp") or []
        if mpp and learnt and not any(abs(mpp - each) < NEAR * each for each in learnt):
            raise ShardError(f"slide {slide!r} in {settings.bags} is of {mpp:g} µm/px, and {settings.encoder} learnt "
                             f"at {', '.join(f'{each:g}' for each in learnt)}; embed the slides with mpp={learnt[0]:g}")
    return bags


def _doubts(bags: Bags) -> list[str]:
    return [] if bags.encoder else [f"{bags.home} does not say which encoder its tiles were seen by: whether it is the "
                                    "one that the slide encoder learnt on is not known"]


def _write(path: Path, bags: Bags, vectors_SD: np.ndarray, sha256: str) -> None:
    """A row a slide."""
    features = pa.FixedSizeListArray.from_arrays(pa.array(vectors_SD.ravel()), vectors_SD.shape[1])
    table = pa.table({"slide": bags.slides, "patient": bags.patients, "features": features})
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"encoder": SlideEncoder.name, "sha256": sha256}), buffer)
    folder.write(path, buffer.getvalue())
