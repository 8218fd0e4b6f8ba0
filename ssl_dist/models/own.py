"""Networks that timm does not know, in the files that it would write: model.safetensors, and config.json, in which
`architecture` is a name of ours and `args` what the network is made with."""

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ssl_dist.models.encoder import SLIDES, EncoderError

# Name in config.json -> module and class. A network has `name`, `args` and `width`.
NETWORKS = {SLIDES: ("sparse", "SlideEncoder")}


def save(network: Any, folder: Path, about: dict[str, Any]) -> None:
    """Writes config.json and model.safetensors; `about` goes into the former under `ssl_dist`."""
    config = {"architecture": network.name, "args": network.args, "num_features": network.width, "ssl_dist": about}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()},
              str(folder / "model.safetensors"), metadata={"format": "pt"})


def holds(folder: Path) -> bool:
    """Whether a folder is of a network of ours."""
    return _config(folder).get("architecture") in NETWORKS


def build(folder: Path) -> nn.Module:
    """The network of a folder with fresh random weights."""
    config = _config(folder)
    if (name := config.get("architecture")) not in NETWORKS:
        raise EncoderError(f"{folder} is of {name!r}, and what is asked for is one of {', '.join(NETWORKS)}; name the "
                           "encoder folder of such a run")
    module, kind = NETWORKS[name]
    try:
        return getattr(importlib.import_module(f"ssl_dist.models.{module}"), kind)(**config["args"])
    except (KeyError, TypeError, ValueError) as error:
        raise EncoderError(f"{folder}/config.json does not describe a network ({error}); export it again") from None


def load(folder: Path) -> nn.Module:
    """A trained network, every weight accounted for."""
    network = build(folder)
    try:
        network.load_state_dict(load_file(folder / "model.safetensors"))
    except (RuntimeError, OSError, SafetensorError) as error:
        raise EncoderError(f"{folder} does not hold the weights of its network ({str(error).splitlines()[0]}); export "
                           "it again with: ssl-dist export RUN") from None
    if bad := [name for name, tensor in network.state_dict().items() if not bool(torch.isfinite(tensor).all())]:
        raise EncoderError(f"{folder} holds weights that are no numbers ({bad[0]}); export it again")
    return network


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError:
        raise EncoderError(f"encoder={folder} has no config.json: it is not an exported encoder; a run writes "
                           "RUN/encoder when it ends, `ssl-dist export RUN` writes it from a checkpoint") from None
    except ValueError as error:
        raise EncoderError(f"{folder}/config.json is not readable ({error}); export it again") from None
    return found if isinstance(found, dict) else {}
