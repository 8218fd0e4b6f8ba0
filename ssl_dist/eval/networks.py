"""A HoVer-Net that has learnt, in a folder: config.json and model.safetensors, with all that whole slides need."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors import torch as tensors

from shards import folder
from ssl_dist.eval.settings import Nuclei
from ssl_dist.models.encoder import Encoder, EncoderError
from ssl_dist.models.hovernet import HoverNet

FORMAT = 1


@dataclass
class Network:
    """A network, and how it was made to look."""

    network: HoverNet
    classes: list[str]
    window: int
    margin: int
    mpp: float
    edge: float
    smallest: int
    fine: bool
    width: int
    kernel: int


def save(home: Path, network: HoverNet, classes: list[str], settings: Nuclei) -> None:
    """Writes both files; the config last, so that a folder that has one is whole."""
    folder.make(home)
    encoder = network.encoder
    weights = {name: each.detach().cpu().contiguous() for name, each in network.state_dict().items()}
    (home / "config.json").unlink(missing_ok=True)
    folder.write(home / "model.safetensors", tensors.save(weights))
    folder.write_json(home / "config.json", {
        "format": FORMAT, "network": "hovernet", "encoder": encoder.identity, "classes": classes,
        **{name: getattr(settings, name) for name in ("window", "margin", "mpp", "edge", "smallest", "fine", "width",
                                                      "kernel")}})


def digest(home: Path) -> str:
    """SHA-256 of both files."""
    found = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        found.update(hashlib.sha256((home / name).read_bytes()).digest())
    return found.hexdigest()


def load(home: Path) -> Network:
    """The network of a folder, every weight accounted for."""
    try:
        told: dict[str, Any] = json.loads((home / "config.json").read_text(encoding="utf-8"))
        if told["format"] != FORMAT:
            raise ValueError(f"its format is {told['format']}, and {FORMAT} is known")
        looks = told["encoder"]
        encoder = Encoder(looks["architecture"], looks["args"], looks["mean"], looks["std"])
        if told["fine"] and hasattr(encoder.network, "maxpool"):
            encoder.look_closely()
        encoder.fit_to(told["window"])
        network = HoverNet(encoder, len(told["classes"]), told["width"], told["kernel"])
        network.load_state_dict(tensors.load_file(home / "model.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise EncoderError(f"network={home} is no network that eval/nuclei has written, or is damaged "
                           f"({' '.join(str(error).split())[:300]})") from None
    return Network(network.eval(), **{name: told[name] for name in (
        "classes", "window", "margin", "mpp", "edge", "smallest", "fine", "width", "kernel")})
