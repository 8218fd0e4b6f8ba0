"""Pictures of what an encoder sees: which tiles it holds to be alike, how all of them lie on a map, where it looks.

Nothing is judged and no label is needed. How often a tile's neighbours are of its own slide, beside how often chance
would have it, says how much of what the encoder sees is the slide (its stain, its scanner) and not the tissue.

S tiles   K neighbours   D width of a vector
"""

import contextlib
import functools
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from shards import folder
from ssl_dist.eval import features, maps, sheets
from ssl_dist.eval.cache import Cache
from ssl_dist.eval.features import Split
from ssl_dist.eval.knn import neighbours
from ssl_dist.eval.protocol import Progress, Source
from ssl_dist.eval.settings import Look

SMALL = 48          # pixels of a tile on a map
ALIKE = ("Tiles, and the eight that are most alike to the encoder, the nearest first. Red: of the same slide, orange: "
         "of another slide of the same patient. Of all neighbours {neighbours:.0%} are of the tile's own slide, and by "
         "chance it would be {chance:.0%}.")


def run(settings: Look, device: torch.device, threads: int, progress: Progress) -> dict[str, Any]:
    """Draws, writes what was drawn from, and says where."""
    source = Source("encoder", settings)
    split = features.every(settings.data.shards, settings.data.split)
    with contextlib.closing(split.reader):
        whole = len(split.rows)
        split = split.part(np.unique(np.linspace(0, whole - 1, min(whole, settings.tiles)).astype(np.int64)))
        vectors_SD = source.features(split, Cache(settings.home / "features" if settings.cache else None), settings,
                                     device, threads, functools.partial(progress, "encoder"))
        out = folder.make(settings.home)
        words, small_SHW3 = _words(split), _small(split, threads, functools.partial(progress, "tiles"))
        _, places_SK = alike(vectors_SD, min(sheets.NEAREST, len(split.rows) - 1))
        shown = np.linspace(0, len(split.rows) - 1, min(settings.queries, len(split.rows))).astype(np.int64)
        found = {by: same(places_SK.numpy(), values) for by, values in {"slide": split.slides, **words}.items()}
        pictures = {"look_neighbours.png": ALIKE.format(**found["slide"])}
        sheets.neighbours(split, shown, places_SK[shown].numpy(), out / "look_neighbours.png")
        drawn, remarks = maps.drawn(vectors_SD.numpy(), settings.maps, settings.seed)
        colours_S3 = small_SHW3.reshape(len(small_SHW3), -1, 3).mean(axis=1) / 255
        for name, (place_S2, axes) in drawn.items():
            maps.draw(place_S2, axes, {by: words[by] for by in settings.by if by in words},
                      colours_S3 if "colour" in settings.by else None, out / f"look_{name}.png")
            pictures[f"look_{name}.png"] = maps.SAID[name]
        if (seen := sheets.attention(source, split, shown, out / "look_attention.png", threads, device)) is not None:
            pictures["look_attention.png"] = seen
        columns = {"key": split.reader.column("key", split.rows), **words}
        _table(columns, {name: place_S2 for name, (place_S2, _) in drawn.items()}, out / "look.parquet")
        if settings.projector:
            _project(vectors_SD, columns, small_SHW3, out / "projector")
        result = {
            "protocol": "look", "size": source.size, "encoder": source.told(settings),
            "shards": split.told(settings.data.shards),
            "counts": {"tiles": len(split.rows), "of": whole, "slides": len(set(split.slides)),
                       "width": vectors_SD.shape[1]},
            "same": found,
            "metrics": {}, "intervals": {}, "baselines": {}, "against": {}, "pictures": list(pictures),
            "captions": pictures, "warnings": remarks, "seed": settings.seed}
    result["written"] = str(out / "look.json")
    folder.write_json(out / "look.json", result)
    return result


def alike(vectors_SD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosine similarity and place (S, K) of each tile's nearest others."""
    # One more: the tile itself is among its nearest, unless more than k others are equal to it.
    similarity_SK, places_SK = neighbours(vectors_SD, vectors_SD, k + 1)
    own = places_SK == torch.arange(len(vectors_SD))[:, None]
    own[:, -1] |= ~own.any(dim=1)
    return similarity_SK[~own].view(-1, k), places_SK[~own].view(-1, k)


def same(places_SK: np.ndarray, words_S: list[str]) -> dict[str, float]:
    """How often a neighbour has the same word, and how often any other tile has."""
    _, word_S, counts = np.unique(np.array(words_S), return_inverse=True, return_counts=True)
    chance = (counts[word_S] - 1) / (len(word_S) - 1)
    return {"neighbours": round(float((word_S[places_SK] == word_S[:, None]).mean()), 4),
            "chance": round(float(chance.mean()), 4)}


def _words(split: Split) -> dict[str, list[str]]:
    """By what tiles may be coloured: of each column in which they differ, the word of every tile."""
    reader, rows = split.reader, split.rows
    found = {name: [str(word) for word in reader.column(name, rows)]
             for name in ("slide", "stain", "dataset", "organ", "split")}
    codes = [re.match(r"TCGA-(\w{2})-", patient, re.IGNORECASE) for patient in split.patients]
    found["site"] = [code.group(1).upper() if code else "" for code in codes]
    dataset = dict(zip([each.datasets[0]["name"] for each in reader.indexes], reader.indexes, strict=True))
    classes = {name: each.datasets[0].get("classes", []) for name, each in dataset.items()}
    found["label"] = [classes[name][label] if 0 <= label < len(classes[name]) else ""
                      for name, label in zip(found["dataset"], reader.column("label", rows), strict=True)]
    return {name: words for name, words in found.items() if len(set(words)) > 1}


def _small(split: Split, threads: int, progress: Any) -> np.ndarray:
    """Every tile, small (S, SMALL, SMALL, 3)."""
    found = []
    for places, pixels in features.tiles(split, np.arange(len(split.rows)), size=SMALL, batch=256, threads=threads):
        found.append(pixels.numpy())
        progress(int(places[-1]) + 1, len(split.rows))
    return np.concatenate(found)


def _table(columns: dict[str, list[str]], drawn: dict[str, np.ndarray], path: Path) -> None:
    """A row a tile, with its place on each map, for maps of one's own."""
    places = {f"{name}_{axis}": place_S2[:, number] for name, place_S2 in drawn.items()
              for number, axis in enumerate("xy")}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({**columns, **places}), sink)
    folder.write(path, sink.getvalue().to_pybytes())


def _project(vectors_SD: Tensor, columns: dict[str, list[str]], small_SHW3: np.ndarray, path: Path) -> None:
    """For TensorBoard's projector: all vectors, what is known of each tile, and its picture."""
    pictures = torch.from_numpy(small_SHW3).permute(0, 3, 1, 2).float() / 255
    clean = [[re.sub(r"\s+", " ", word) for word in row] for row in zip(*columns.values(), strict=True)]
    shutil.rmtree(path, ignore_errors=True)         # it would add to what is there, under the same name
    with contextlib.closing(SummaryWriter(str(path))) as board:
        board.add_embedding(F.normalize(vectors_SD), metadata=clean, metadata_header=list(columns),
                            label_img=pictures, tag="tiles")
