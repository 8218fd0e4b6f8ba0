"""A trained encoder as a folder that timm loads with nothing of ours installed, with its card and its provenance."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from shards import folder, index
from ssl_dist import card
from ssl_dist import config as configs
from ssl_dist.data.reader import Reader
from ssl_dist.models import encoder as encoders
from ssl_dist.models import own
from ssl_dist.models.encoder import Encoder, salted

FORMS = {"onnx": "model.onnx", "torchscript": "model.torchscript.pt"}


def export(encoder: nn.Module, train: configs.Train, reader: Reader, step: int, out: Path,
           check: Callable[[], None] = lambda: None, forms: Iterable[str] = ()) -> Path:
    """Writes the folder whole under its name, below its run's, and then other `forms` into it; `check` refuses where it
    may no longer be written."""
    from ssl_dist import __version__

    draft = folder.make(out.with_name(f".{out.name}.tmp"))
    facts = _facts(reader)
    size = max((view["size"] for view in train.method.get("views", [])), default=None)     # of the large crops
    about = {"version": __version__, "method": train.method["name"], "mpp": facts["mpp"], "step": step}
    if isinstance(encoder, Encoder):
        encoder.save(draft, size, about)
    else:
        own.save(encoder, draft, {**about, **_tile_encoder(reader)})
    folder.write(draft / "pretraining.json", json.dumps({**facts, "method": train.method["name"], "step": step,
                                                         "seen": step * train.data.batch}) + "\n")
    for other in FORMS.values():        # of the same weights, what was written besides is still true
        if (out / other).is_file() and encoders.digest(out) == encoders.digest(draft):
            shutil.copy2(out / other, draft / other)
    card.write(draft, out.parent, FORMS, encoder, train, reader, step)
    check()
    shutil.rmtree(out, ignore_errors=True)
    folder.publish(draft, out)
    for kind in forms:
        portable(out, kind)
        card.write(out, out.parent, FORMS, encoder, train, reader, step)        # it tells of what lies there
    return out


def _tile_encoder(reader: Reader) -> dict[str, Any]:
    """Of draws, which encoder saw the tiles."""
    found = reader.indexes[0]
    return {"tile_encoder_sha256": found.datasets[0]["encoder_sha256"],
            "tile_stage": found.settings.get("stage")} if index.draws(found) else {}


class NotPortable(RuntimeError):
    """An encoder that cannot be written in another form here."""

    exit_code = 2


def portable(home: Path, kind: str) -> Path:
    """The encoder of an exported folder as one file that needs neither timm nor us: `onnx` or `torchscript`. It takes
    uint8 (B, size, size, 3), as tiles come from a JPEG, and normalises them itself; any B."""
    encoder, size = encoders.load(home).eval().requires_grad_(False), encoders.trained_size(home)
    if encoder.maps:
        raise NotPortable(f"{home} makes maps, and {FORMS[kind]} is written of networks that make vectors; "
                          "`ssl-dist eval eval/confidence` maps pictures and slides")
    # Two tiles that differ: of equal ones, or of one, a trace may keep what is true of that example alone.
    example = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8)
    path = home / FORMS[kind]
    draft = path.with_name(f".{path.name}.tmp")
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            if kind == "onnx":
                import onnx
                import onnxscript  # noqa: F401  what torch writes it with, told of before it begins

                torch.onnx.export(encoder, (example,), str(draft), dynamo=True, input_names=["pixels"],
                                  output_names=["features"], external_data=False, verbose=False,
                                  dynamic_shapes=({0: torch.export.Dim("batch")},))
                _anonymous(onnx, draft)
            else:
                torch.jit.trace(encoder, example).save(str(draft))
        folder.sync(draft)
        folder.publish(draft, path)
    except ImportError as error:
        raise NotPortable(f"{error.name} is not installed, and {path.name} is written with it: pip install "
                          "'ssl_dist[onnx]'") from None
    finally:
        draft.unlink(missing_ok=True)
    return path


def _anonymous(onnx: Any, path: Path) -> None:
    """Takes out what torch notes of where each operation was traced: paths of this machine."""
    model = onnx.load(str(path))
    for nodes in (model.graph.node, *(each.node for each in model.functions)):
        for node in nodes:
            node.ClearField("metadata_props")
            node.ClearField("doc_string")
    onnx.save(model, str(path))


def _facts(reader: Reader) -> dict[str, Any]:
    """Counts, and digests under a salt that is stated: they tell equal from different and nothing more."""
    rows = reader.all_rows()
    salt = hashlib.sha256("".join(found.fingerprint for found in reader.indexes).encode()).hexdigest()[:32]
    names = {"slides": reader.distinct("slide"), "patients": reader.distinct("patient") - {""}}
    tiles = sorted(digest.hex() for digest in reader.column("digest", rows))
    mpp = np.unique(np.round(np.array(reader.column("mpp", rows), dtype=np.float64), 4))
    what = "draws" if index.draws(reader.indexes[0]) else "tiles"
    return {"salt": salt, "counts": {what: len(rows), **{name: len(words) for name, words in names.items()}},
            "mpp": [float(each) for each in mpp if np.isfinite(each)],
            **{name: _salted(salt, words) for name, words in names.items()}, "tiles": _salted(salt, tiles)}


def _salted(salt: str, words: Iterable[str]) -> list[str]:
    return sorted(salted(salt, word) for word in words)
