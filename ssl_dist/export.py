"""A trained encoder as a folder that timm loads with nothing of ours installed, with its card and its provenance."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from shards import folder
from ssl_dist import config as configs
from ssl_dist.data.reader import Reader
from ssl_dist.models.encoder import Encoder, salted

CARD = """---
library_name: timm
pipeline_tag: image-feature-extraction
license: other
tags: [histology, pathology, self-supervised, {method}]
---
# {architecture}, {method} on {samples:,} histology tiles

Research only; not for diagnosis. Pretrained by `ssl_dist` {version} without labels.

    import timm
    encoder = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True, num_classes=0)

| | |
|---|---|
| input | RGB in 0..1, mean {mean}, std {std}, {size} px in training |
| pretrained on | {samples:,} of {slides:,} slides of {patients:,} patients, {mpp} µm/px |
| seen | {seen:,} tiles in {steps:,} steps of {batch} |
| optimizer | {optimizer}, learning rate {lr} |

Data: {datasets}

`pretraining.json` holds salted digests of the slides, patients and tiles seen, so that an evaluation can tell whether
it tests on what was trained on, without naming anyone. The licence of the data binds the weights: see the table above.
"""


def export(encoder: Encoder, train: configs.Train, reader: Reader, step: int, out: Path,
           check: Callable[[], None] = lambda: None) -> Path:
    """Writes the folder whole under its name; `check` refuses where it may no longer be written."""
    from ssl_dist import __version__

    draft = folder.make(out.with_name(f".{out.name}.tmp"))
    facts = _facts(reader)
    size = max((view["size"] for view in train.method.get("views", [])), default=None)     # of the large crops
    encoder.save(draft, size, {"version": __version__, "method": train.method["name"], "mpp": facts["mpp"],
                                           "step": step})
    cards = [card for found in reader.indexes for card in found.datasets]
    folder.write(draft / "README.md", CARD.format(
        architecture=encoder.name, method=train.method["name"], version=__version__, mean=list(encoder.mean),
        std=list(encoder.std), size=size or "?", mpp=", ".join(map(str, facts["mpp"])) or "unknown",
        samples=facts["counts"]["tiles"], slides=facts["counts"]["slides"], patients=facts["counts"]["patients"],
        seen=step * train.data.batch, steps=step, batch=train.data.batch, optimizer=train.optim.name,
        lr=train.optim.lr, datasets="; ".join(f"{card['name']} ({card.get('organ')}, {card.get('stain')}, licence "
                                              f"{card.get('licence')})" for card in cards)))
    folder.write(draft / "pretraining.json", json.dumps({**facts, "method": train.method["name"], "step": step,
                                                         "seen": step * train.data.batch}) + "\n")
    check()
    shutil.rmtree(out, ignore_errors=True)
    folder.publish(draft, out)
    return out


def _facts(reader: Reader) -> dict[str, Any]:
    """Counts, and digests under a salt that is stated: they tell equal from different and nothing more."""
    rows = reader.all_rows()
    salt = hashlib.sha256("".join(found.fingerprint for found in reader.indexes).encode()).hexdigest()[:32]
    names = {"slides": reader.distinct("slide"), "patients": reader.distinct("patient") - {""}}
    tiles = sorted(digest.hex() for digest in reader.column("digest", rows))
    mpp = np.unique(np.round(np.array(reader.column("mpp", rows), dtype=np.float64), 4))
    return {"salt": salt, "counts": {"tiles": len(rows), **{name: len(words) for name, words in names.items()}},
            "mpp": [float(each) for each in mpp if np.isfinite(each)],
            **{name: _salted(salt, words) for name, words in names.items()}, "tiles": _salted(salt, tiles)}


def _salted(salt: str, words: Iterable[str]) -> list[str]:
    return sorted(salted(salt, word) for word in words)
