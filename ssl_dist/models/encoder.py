"""A timm network from uint8 tiles to one vector each, or one of ours to a map of each. The only timm.

B tiles   H, W pixels   D width of the vector   C classes of a map
"""

import difflib
import hashlib
import json
import math
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from ssl_dist.models import ELSEWHERE
from ssl_dist.models.fcnn import Confidence

SLIDES = "slide"        # in place of an architecture: models/own.py

# By architecture, networks that timm does not know: they say something of every pixel.
MAPS = {"fcnn": Confidence}

# Of a ViT's patch, how many pixels lie between two columns of each map that decoders see: 4 to 32 of patches of 16.
SCALES = (0.25, 0.5, 1, 2)


class EncoderError(ValueError):
    """An architecture or an exported folder that cannot be built."""

    exit_code = 2


class Encoder(nn.Module):
    """A backbone that takes pixels as they come from the data path and normalises them itself: timm's, or one of
    MAPS."""

    _mean_C: Tensor
    _std_C: Tensor

    def __init__(self, name: str, args: dict[str, Any], mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        args = {key: value for key, value in args.items() if value is not None}     # null takes a recipe's away
        self.name, self.args, self.mean, self.std = name, args, tuple(mean), tuple(std)
        self._stage: int | None = None
        self._finer = 1
        try:
            self.network = _network(name, args)
            # Where the head has a layer of its own (MobileNetV3, VGG), num_features is the width before that layer.
            network = cast(Any, self.network)
            self._width = 0 if self.maps else int(getattr(network, "head_hidden_size", None) or network.num_features)
        except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError) as error:
            known = self.maps or timm.is_model(name)
            close = [] if known else difflib.get_close_matches(name.lower(), [*timm.list_models(), *MAPS], n=3)
            raise EncoderError(f"{'ssl_dist' if self.maps else 'timm'} cannot build encoder.name={name!r} with "
                               f"encoder.args={args} ({error})"
                               + (f"; near it: {', '.join(close)}" if close else "")) from None
        self.register_buffer("_mean_C", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("_std_C", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)

    def forward(self, pixels_BHW3: Tensor, *told: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> (B, D), or (B, C, H, W); `told`: what a network of maps may be told beside."""
        # A permuted view of HWC is channels_last already: no copy but the one that changes the type.
        pixels_B3HW = pixels_BHW3.permute(0, 3, 1, 2).to(self._mean_C.dtype)
        pixels_B3HW = (pixels_B3HW - self._mean_C) / self._std_C
        if self._stage is None:
            return self.network(pixels_B3HW, *told)
        (found_BDHW,) = cast(Any, self.network).forward_intermediates(
            pixels_B3HW, indices=[self._stage], stop_early=True, intermediates_only=True)
        return found_BDHW.flatten(2).mean(dim=2)

    def ends_at(self, stage: int | None) -> "Encoder":
        """From now on its vectors are the means of what one of its stages makes, as timm counts them (of a ResNet 3 is
        layer3); None: what the whole network makes."""
        names = [each["module"] for each in cast(Any, self.network).feature_info] \
            if hasattr(self.network, "forward_intermediates") else []
        if stage is not None and stage >= len(names):
            listed = ", ".join(f"{number} ({name})" for number, name in enumerate(names))
            raise EncoderError(f"stage={stage} is none of {self.name}" + (
                f", whose stages are {listed}" if names else ": timm does not show what is inside; leave stage out"))
        self._stage = stage
        return self

    def levels(self) -> list[tuple[int, int]]:
        """Channels, and how many pixels of a tile lie between two columns, of what `pyramid` gives: fine to coarse."""
        network = cast(Any, self.network)
        if self._plain:
            patch = int(network.patch_embed.patch_size[0])
            return [(int(network.embed_dim), max(1, round(patch * scale))) for scale in SCALES]
        told = getattr(network, "feature_info", [])
        found = [(int(each["num_chs"]), int(each["reduction"]) // self._finer) for each in told]
        steps = [step for _, step in found if step]
        if not hasattr(network, "forward_intermediates") or len(steps) < 2 or sorted({*steps}) != steps:
            raise EncoderError(f"{self.name} makes no maps that become coarser on its way (timm's "
                               "forward_intermediates): pixels are judged by ResNets, ViTs and others that do")
        return found[-len(steps):]

    @property
    def _plain(self) -> bool:
        """Whether it is a ViT, whose maps are all of one size."""
        return hasattr(self.network, "blocks") and hasattr(self.network, "patch_embed")

    def pyramid(self, pixels_BHW3: Tensor) -> list[Tensor]:
        """The maps (B, channels, h, w) that a network makes on its way, as many as `levels` says.

        A plain ViT has one size of map: four of its blocks, as far apart as can be, are blown up or shrunk.
        """
        levels, network = self.levels(), cast(Any, self.network)
        pixels_B3HW = pixels_BHW3.permute(0, 3, 1, 2).to(self._mean_C.dtype)
        pixels_B3HW = (pixels_B3HW - self._mean_C) / self._std_C
        if not self._plain:
            return network.forward_intermediates(pixels_B3HW, intermediates_only=True)[-len(levels):]
        depth = len(network.blocks)
        taken = [depth * (part + 1) // len(SCALES) - 1 for part in range(len(SCALES))]
        maps = network.forward_intermediates(pixels_B3HW, indices=taken, intermediates_only=True)
        return [F.interpolate(each, size=tuple(max(1, round(side / scale)) for side in each.shape[-2:]),
                              mode="bilinear", antialias=scale > 1) if scale != 1 else each
                for each, scale in zip(maps, SCALES, strict=True)]

    def look_closely(self) -> None:
        """From now on a ResNet does not shrink its tile by four before its first block: no weight changes by that."""
        network = cast(Any, self.network)
        stem = getattr(network, "conv1", None)
        stem = stem[0] if isinstance(stem, nn.Sequential) else stem
        if not isinstance(stem, nn.Conv2d) or not isinstance(getattr(network, "maxpool", None), nn.MaxPool2d):
            raise EncoderError(f"{self.name} has no first convolution and pooling as a ResNet has; use fine=false")
        stem.stride, network.maxpool, self._finer = (1, 1), nn.Identity(), 4

    def fit_to(self, size: int) -> None:
        """From now on a ViT takes tiles of `size` pixels, its learned positions resampled; others take any."""
        network = cast(Any, self.network)
        if hasattr(network, "set_input_size"):
            patch = int(network.patch_embed.patch_size[0])
            if size % patch:
                raise EncoderError(f"{self.name} takes no window of {size} pixels, which is no whole number of patches "
                                   f"of {patch}")
            network.set_input_size(img_size=(size, size))

    @property
    def maps(self) -> bool:
        """Whether it makes a map of a tile, and no vector."""
        return self.name in MAPS

    @property
    def width(self) -> int:
        """How many numbers it makes of a tile."""
        self._makes_vectors()
        return self._width

    def _makes_vectors(self) -> None:
        if self.maps:
            raise EncoderError(f"{self.name} makes a map of a tile and no vector; it goes with method.name=patchseg, "
                               "eval/segment and eval/confidence")

    def classes(self) -> int:
        """How many maps it makes of a tile."""
        if not self.maps:
            raise EncoderError(f"{self.name} makes a vector of a tile, and here a map is needed: encoder.name="
                               f"{' or '.join(MAPS)}")
        return cast(Confidence, self.network).classes

    def reach(self) -> int:
        """How many pixels to each side decide a pixel of a map."""
        return cast(Confidence, self.network).reach if self.classes() else 0

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the vectors beside the weights."""
        self._makes_vectors()
        return {"architecture": self.name, "args": self.args, "mean": list(self.mean), "std": list(self.std),
                **({} if self._stage is None else {"stage": self._stage})}

    @torch.no_grad()
    def tries(self, rows: int, size: int) -> None:
        """Refuses tiles that the network does not take; on the meta device, where nothing is computed, at once."""
        try:
            self(torch.empty(rows, size, size, 3, dtype=torch.uint8, device=self._mean_C.device))
        except (RuntimeError, ValueError, AssertionError, TypeError) as error:
            if "meta" in str(error):        # of an operation that the device does not know nothing can be said
                return
            raise EncoderError(f"{self.name} with encoder.args={self.args} takes no {rows} tiles of {size} pixels "
                               f"({error}); a ViT needs encoder.args.img_size={size}, or "
                               "encoder.args.dynamic_img_size=true for views of several sizes") from None

    def groups(self, lr: float, weight_decay: float, decay: float) -> list[dict[str, Any]]:
        """Parameter groups for fine-tuning: each layer learns `decay` times as fast as the one after it, and vectors
        are not decayed."""
        found = param_groups_layer_decay(self.network, weight_decay=weight_decay, layer_decay=decay)
        return [{"params": list(each["params"]), "weight_decay": each["weight_decay"], "lr": lr * each["lr_scale"]}
                for each in found]

    def attention(self, pixels_BHW3: Tensor) -> Tensor | None:
        """Where the class token of a ViT's last block looks (B, heads, h, w), or without one all others on average;
        None of a network of another kind."""
        network = cast(Any, self.network)
        last: Any = getattr(next(iter(reversed(getattr(network, "blocks", None) or [None]))), "attn", None)
        if not isinstance(getattr(last, "attn_drop", None), nn.Module) or not hasattr(last, "fused_attn"):
            return None
        found: list[Tensor] = []
        fused, last.fused_attn = last.fused_attn, False         # the fused kernel never holds the weights
        hook = last.attn_drop.register_forward_pre_hook(lambda _, given: found.append(given[0]))
        try:
            self(pixels_BHW3)
        finally:
            hook.remove()
            last.fused_attn = fused
        first = int(network.num_prefix_tokens)
        whole = getattr(network, "cls_token", None) is not None
        weights_BHN = found[0][:, :, 0, first:] if whole else found[0][:, :, first:, first:].mean(dim=2)
        side = math.isqrt(weights_BHN.shape[-1])
        return weights_BHN.unflatten(-1, (side, side)) if side**2 == weights_BHN.shape[-1] else None

    def checkpoint(self) -> None:
        """From now on activations are computed a second time for the backward pass instead of being kept."""
        if any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in self.modules()):
            raise EncoderError("encoder.checkpointing=true would show every batch twice to the BatchNorms of "
                               f"{self.name}; use encoder.checkpointing=false, and for memory precision=bf16")
        try:
            cast(Any, self.network).set_grad_checkpointing(True)
        except (AttributeError, AssertionError, RuntimeError):
            raise EncoderError(f"timm cannot compute activations of {self.name} twice; use "
                               "encoder.checkpointing=false") from None

    def save(self, folder: Path, size: int | None, about: dict[str, Any]) -> None:
        """Writes config.json and model.safetensors as timm loads them; `about` goes into it under `ssl_dist`. Of what
        timm does not know, the same files.

        `size` is the width in pixels that the network was trained on.
        """
        if self.maps:
            card = {"mean": self.mean, "std": self.std, **({"input_size": (3, size, size)} if size else {})}
            (folder / "config.json").write_text(json.dumps({
                "architecture": self.name, "model_args": self.args, "num_classes": self.classes(),
                "pretrained_cfg": card, "ssl_dist": about}, indent=2) + "\n")
            save_file({name: each.contiguous() for name, each in self.network.state_dict().items()},
                      folder / "model.safetensors")
            return
        # A plain twin: timm must find its own BatchNorm, and the weights' names are the same.
        plain: Any = timm.create_model(self.name, pretrained=False, num_classes=0, **_tuples(self.args))
        plain.load_state_dict(self.network.state_dict())
        # Of timm's card of the architecture, what belongs to somebody else's weights must go.
        plain.pretrained_cfg = {
            **plain.pretrained_cfg, "mean": self.mean, "std": self.std, "num_classes": 0, "tag": "ssl_dist",
            "custom_load": False, "crop_pct": 1.0, "license": "other", "interpolation": "bilinear",
            **({"input_size": (3, size, size), "pool_size": None} if size else {}),
            **dict.fromkeys(("hf_hub_id", "url", "origin_url", "paper_ids", "paper_name", "test_input_size",
                             "test_crop_pct", "description"))}
        save_for_hf(plain, str(folder), model_config={"num_classes": 0, "ssl_dist": about},
                    model_args=self.args or None, safe_serialization=True)
        # timm's is its writer's alone.
        (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode & 0o777)


def is_elsewhere(source: str | Path) -> bool:
    """Whether an encoder is a name (`timm:resnet18.a1_in1k`, `hf-hub:owner/name`) and not a folder."""
    return str(source).startswith(ELSEWHERE)


def load(source: str | Path) -> Encoder:
    """A trained encoder, every weight accounted for: of an exported folder, or of a name that timm knows."""
    if is_elsewhere(source):
        return _named(str(source), trained=True)
    folder = Path(source)
    config = _of_tiles(folder)
    encoder = build(folder)
    try:
        encoder.network.load_state_dict(
            load_file(folder / "model.safetensors") if encoder.maps else
            timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).state_dict())
    except (RuntimeError, OSError, TypeError, SafetensorError) as error:
        raise EncoderError(f"{folder} does not hold the weights of {config['architecture']} ({error}); export it again "
                           "with: ssl-dist export RUN") from None
    return encoder


def build(source: str | Path) -> Encoder:
    """The architecture of an encoder with fresh random weights: the baseline of an evaluation."""
    if is_elsewhere(source):
        return _named(str(source), trained=False)
    config = _of_tiles(Path(source))
    cfg, half = config.get("pretrained_cfg", {}), (0.5, 0.5, 0.5)
    # timm also writes down arguments that Encoder sets itself; the kind of pooling is not one: it makes the features.
    args = {name: value for name, value in (config.get("model_args") or {}).items()
            if name not in ("num_classes", "in_chans")}
    return Encoder(config["architecture"], args, cfg.get("mean", half), cfg.get("std", half))


def _named(source: str, *, trained: bool) -> Encoder:
    """What timm builds of a name, as the weights' card says that pixels are to be normalised."""
    name = source.removeprefix("timm:")
    try:
        found = timm.create_model(name, pretrained=trained, num_classes=0)
    except Exception as error:      # of networks, caches and hubs each has exceptions of its own
        close = [] if timm.is_model(name) else difflib.get_close_matches(name.lower(), timm.list_models(), n=3)
        raise EncoderError(f"encoder={source} cannot be had ({type(error).__name__}: {str(error).splitlines()[0]}); a "
                           "name of timm's or the hub's needs a network, or the weights in its cache (HF_HOME)"
                           + (f"; near it: {', '.join(close)}" if close else "")) from None
    card = cast(Any, found).pretrained_cfg
    encoder = Encoder(name, {}, card["mean"], card["std"])
    if trained:
        encoder.network.load_state_dict(found.state_dict())
    return encoder


def card(source: str | Path) -> dict[str, Any]:
    """What an encoder says of itself: of ours under `ssl_dist`, among it the µm/px that it was trained at."""
    if is_elsewhere(source):
        return {"pretrained_cfg": dict(cast(Any, _named(str(source), trained=False).network).pretrained_cfg)}
    return _config(Path(source))


def trained_size(source: str | Path) -> int:
    """The width in pixels of the views that an encoder was trained on."""
    told = card(source) if is_elsewhere(source) else _of_tiles(Path(source))
    try:
        return int(told["pretrained_cfg"]["input_size"][-1])
    except (KeyError, TypeError, IndexError, ValueError):
        raise EncoderError(f"{source}/config.json does not say the size of its input; set size=") from None


def salted(salt: str, word: str) -> str:
    """A name as it stands in pretraining.json: equal names can be told from different ones, and nothing more."""
    return hashlib.blake2b(f"{salt}{word}".encode(errors="surrogateescape"), digest_size=12).hexdigest()


def digest(source: str | Path) -> str:
    """SHA-256 of the weights: of an exported folder's file, else of every tensor in turn."""
    if is_elsewhere(source):
        found = hashlib.sha256()
        for name, tensor in load(source).network.state_dict().items():
            found.update(name.encode())
            found.update(tensor.contiguous().numpy().tobytes())
        return found.hexdigest()
    with (Path(source) / "model.safetensors").open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _of_tiles(folder: Path) -> dict[str, Any]:
    """What is written of an encoder of tiles; refuses one of slides."""
    config = _config(folder)
    if config["architecture"] == SLIDES:
        raise EncoderError(f"{folder} is an encoder of slides: it takes vectors of tiles, and no tile; it goes with "
                           "eval/slide_embed, and has no other forms")
    return config


def _config(folder: Path) -> dict[str, Any]:
    missing = [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise EncoderError(f"encoder={folder} has no {' and no '.join(missing)}: it is not an exported encoder; a run "
                           "writes RUN/encoder when it ends, `ssl-dist export RUN` writes it from a checkpoint")
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise EncoderError(f"{folder}/config.json is not readable ({error}); export it again") from None
    if not isinstance(config, dict) or "architecture" not in config:
        raise EncoderError(f"{folder}/config.json names no architecture of timm: it is not an exported encoder")
    return config


def _network(name: str, args: dict[str, Any]) -> nn.Module:
    return MAPS[name](**_tuples(args)) if name in MAPS else \
        timm.create_model(name, pretrained=False, num_classes=0, **_tuples(args))


def _tuples(args: dict[str, Any]) -> dict[str, Any]:
    """YAML knows lists; timm's networks expect tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in args.items()}
