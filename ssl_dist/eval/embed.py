"""Vectors of every tile, labelled or not, for other programs: a Parquet table, and a file a slide as CLAM and TRIDENT
read it (`features`, and `coords` in pixels of level 0).

S tiles   D width
"""

import contextlib
import functools
import io
import re
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from shards import arrays, folder
from shards.index import ShardError
from ssl_dist.eval import features
from ssl_dist.eval.cache import Cache
from ssl_dist.eval.protocol import Progress, Source
from ssl_dist.eval.settings import Embed

COLUMNS = ("key", "dataset", "slide", "patient", "x", "y", "mpp", "label", "split")


def run(settings: Embed, device: torch.device, threads: int, progress: Progress) -> dict[str, Any]:
    """Computes, writes, and says what was written."""
    source = Source("encoder", settings)
    split = features.every(settings.data.shards, settings.data.split)
    with contextlib.closing(split.reader):
        vectors_SD = source.features(split, Cache(settings.home / "features" if settings.cache else None), settings,
                                     device, threads, functools.partial(progress, "encoder")).numpy()
        out = folder.make(settings.home)
        table = {name: split.reader.column(name, split.rows) for name in COLUMNS}
        if "parquet" in settings.write:
            write_table(out / "embeddings.parquet", vectors_SD, table, source.architecture, source.digest)
        slides = _bags(vectors_SD, table, source, folder.make(out / "h5")) \
            if "h5" in settings.write else len(set(table["slide"]))
    result = {
        "protocol": "embed", "size": source.size, "encoder": source.told(settings),
        "shards": split.told(settings.data.shards),
        "counts": {"tiles": len(vectors_SD), "slides": slides, "width": vectors_SD.shape[1]}, "metrics": {},
        "intervals": {}, "baselines": {}, "warnings": [], "forms": settings.write,
        "written": str(out / "embed.json")}
    folder.write_json(out / "embed.json", result)
    return result


def write_table(path: Path, vectors_SD: np.ndarray, table: dict[str, list], architecture: str, sha256: str) -> None:
    """One row a tile, its vector a list of fixed length."""
    flat = pa.array(vectors_SD.ravel().astype(np.float32))
    columns = pa.table({**table, "features": pa.FixedSizeListArray.from_arrays(flat, vectors_SD.shape[1])})
    columns = columns.replace_schema_metadata({"encoder": architecture, "sha256": sha256})
    buffer = io.BytesIO()
    pq.write_table(columns, buffer)
    folder.write(path, buffer.getvalue())


def _bags(vectors_SD: np.ndarray, table: dict[str, list], source: Source, home: Path) -> int:
    """A file a slide, its tiles from the top left on; how many."""
    _, slide_S = np.unique(np.array([f"{dataset}/{slide}" for dataset, slide in zip(
        table["dataset"], table["slide"], strict=True)]), return_inverse=True)
    place_S2 = np.stack([table["x"], table["y"]], axis=1).astype(np.int64)
    count = int(slide_S.max()) + 1
    first = np.unique(slide_S, return_index=True)[1]
    names = file_names([(table["dataset"][each], table["slide"][each]) for each in first])
    if strangers := sorted({path.name for path in home.glob("*.h5")} - {f"{name}.h5" for name in names}):
        raise ShardError(f"{home} holds {len(strangers)} files of other slides ({strangers[0]}, …), which may be of "
                         "another encoder; choose another out=, or delete that folder")
    for number in range(count):
        own = np.flatnonzero(slide_S == number)
        own = own[np.lexsort((place_S2[own, 0], place_S2[own, 1]))]
        dataset, slide, patient = (table[name][own[0]] for name in ("dataset", "slide", "patient"))
        arrays.write_bag(home / f"{names[number]}.h5", vectors_SD[own], place_S2[own], {
            "slide": slide, "patient": patient, "dataset": dataset, "mpp": float(table["mpp"][own[0]]),
            "encoder": source.architecture, "encoder_sha256": source.digest, "size": source.size})
    return count


def file_names(slides: list[tuple[str, str]]) -> list[str]:
    """A name for each slide of some datasets; of two datasets' slides that are called the same each has its number."""
    plain = Counter(file_name(*each) for each in slides)
    return [name if plain[name := file_name(dataset, slide)] == 1 else f"{name}-{_number(dataset, slide)}"
            for dataset, slide in slides]


def file_name(dataset: str, slide: str) -> str:
    """A slide's name as a file's: what may not stand in one becomes _, and then names differ by a number."""
    plain = re.sub(r"[^\w.-]+", "_", slide)
    return plain if plain == slide else f"{plain}-{_number(dataset, slide)}"


def _number(dataset: str, slide: str) -> str:
    return f"{zlib.crc32(f'{dataset}/{slide}'.encode()):08x}"
