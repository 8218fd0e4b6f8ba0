"""What a run is told: the tree of settings, the recipes that come along, and what is derived from them.

A number is written once. Whatever follows from it (a rank's batch, DeepSpeed's dictionary) is computed below.
"""

import difflib
import importlib
import math
import typing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ssl_dist import points, schedule, schema
from ssl_dist.eval.settings import PROTOCOLS, Judged, Knn, Protocol
from ssl_dist.schema import ConfigError

LR_TILES = 256          # what learning rates that scale are written for, as most papers do

# Of the stages of ZeRO: at 1 our buckets average the gradients, so it has none; at 2 it does. The norm is ours.
ZERO: dict[int, dict[str, Any]] = {
    0: {}, 1: {"contiguous_gradients": False, "overlap_comm": False, "compute_grad_norm": False},
    2: {"contiguous_gradients": True, "overlap_comm": False, "compute_grad_norm": False, "reduce_bucket_size": 2**23}}

LENGTHS = ("steps", "epochs", "samples")       # of a run: one of them is given

# What tiles can be chosen by.
COLUMNS = ("dataset", "slide", "patient", "label", "stain", "organ", "mpp")


@dataclass
class Data:
    shards: list[Path | str] = field(metadata={
        "exists": True, "some": True, "help": "shard folders; with a stage, also URLs such as s3://bucket/folder",
        "otherwise": "; write it with: ssl-dist shard CONFIG out=FOLDER"})
    split: str = field(default="", metadata={"help": "only tiles of this split; empty: all"})
    only: dict[str, Any] = field(default_factory=dict, metadata={
        "help": f"lists of words by column ({', '.join(COLUMNS)}): only tiles that have one of each"})
    block: Path | None = field(default=None, metadata={
        "exists": True, "help": "a file of keys, or of dataset/key, that are left out"})
    bad: str = field(default="quarantine", metadata={
        "choices": ("quarantine", "fail"), "help": "tiles that cannot be used: list them and take others, or stop"})
    max_bad: int = field(default=100, metadata={"range": (0, 10**9), "help": "so many are listed before the run stops"})
    mixture: str = field(default="natural", metadata={"choices": ("natural", "even", "temperature", "weights"),
                                                      "help": "how much of the run each dataset gets"})
    temperature: float = field(default=2.0, metadata={"range": (0.1, 1000), "help": "share: size ** (1 / temperature)"})
    weights: dict[str, Any] = field(default_factory=dict, metadata={"help": "shares of the run by dataset, any scale"})
    stain: Path | None = field(default=None, metadata={
        "exists": True, "help": "what stain-fit found, for views that move stains by it",
        "otherwise": "; write it with: ssl-dist stain-fit FOLDER"})
    batch: int = field(default=256, metadata={"range": (2, 10**6), "help": "tiles a step, over all ranks"})
    window: int = field(default=16, metadata={"range": (1, 10**6), "help": "tars whose tiles are permuted together"})
    threads: int = field(default=0, metadata={"range": (0, 1024), "help": "a rank; 0: its share of the cores"})
    decode: str = field(default="auto", metadata={"choices": ("auto", "cpu", "mixed"), "help": "for a GPU: on the "
                                                  "CPU's cores, by the GPU, or what this machine does faster"})
    readers: int = field(default=1, metadata={"range": (1, 256), "help": "threads that read at once; from memory, "
                                              "one was the fastest"})
    ahead: int = field(default=3, metadata={"range": (1, 64), "help": "batches kept ready before the step"})
    stage: Path | None = field(default=None, metadata={"help": "a folder on a local disk, made if missing, for copies "
                                                       "of the tars that are next; runs may share it"})
    stage_gb: float = field(default=200.0, metadata={"range": (0.001, 1e6), "help": "what the stage may hold"})

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        broken = []
        for name, words in self.only.items():
            if name not in COLUMNS:
                broken.append(f"only.{name} is not a column to choose by: {', '.join(COLUMNS)}")
            elif not isinstance(words, list) or not words or not all(
                    isinstance(word, int | float if name == "mpp" else str) for word in words):
                broken.append(f"only.{name}={words!r} is not a list of {'numbers' if name == 'mpp' else 'words'}")
        bad = {name: value for name, value in self.weights.items()
               if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1e12}
        broken += [f"weights.{name}={value!r} is not a share, a number from 0 to 1e12" for name, value in bad.items()]
        if self.stage is None:
            broken += [f"shards[{number}]={str(url)!r} is a URL, which is read through copies on a local disk: set "
                       "data.stage=FOLDER" for number, url in enumerate(self.shards) if isinstance(url, str)]
        if (self.mixture == "weights") != bool(self.weights):
            broken.append(f"mixture={self.mixture!r} and weights={self.weights!r} do not go together: mixture=weights "
                          "takes weights, and no other does")
        return broken


@dataclass
class Encoder:
    name: str = field(default="resnet18", metadata={"help": "a timm architecture"})
    args: dict[str, Any] = field(default_factory=dict, metadata={"help": "passed to timm.create_model"})
    mean: tuple[float, float, float] = field(default=(0.5, 0.5, 0.5), metadata={"range": (0, 1)})
    std: tuple[float, float, float] = field(default=(0.5, 0.5, 0.5), metadata={"range": (0.01, 1)})
    batchnorm: str = field(default="synchronised", metadata={"choices": ("synchronised", "local")})
    batchnorm_ranks: int = field(default=0, metadata={"range": (0, 10**6), "help": "so many ranks, one after "
                                                      "the other, share the statistics of a BatchNorm; 0: all"})
    checkpointing: bool = field(default=False, metadata={"help": "compute activations a second time instead of keeping "
                                                         "them: for large networks without BatchNorm"})

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        broken = [f"args holds {key!r}, which is no name of an argument; in a map a space follows each colon: "
                  "encoder.args={img_size: 64}" for key in self.args if not str(key).isidentifier()]
        if self.args.get("in_chans", 3) != 3:
            broken.append(f"args.in_chans={self.args['in_chans']}: tiles have 3 channels, red, green and blue; leave "
                          "it out")
        if self.batchnorm == "local" and self.batchnorm_ranks:
            broken.append("batchnorm=local leaves each rank its own statistics, so batchnorm_ranks="
                          f"{self.batchnorm_ranks} says nothing; leave one of them out")
        return broken


@dataclass
class Optim:
    name: str = field(default="adamw", metadata={"choices": ("adamw", "sgd", "lars")})
    lr: float = field(default=1e-3, metadata={"range": (0, 1000), "help": "at the top of the schedule"})
    scale: str = field(default="fixed", metadata={
        "choices": ("fixed", "linear", "root"),
        "help": f"the learning rates are for {LR_TILES} tiles a step, and grow with the batch or its root"})
    warmup: float = field(default=0.05, metadata={"range": (0, 1), "help": "fraction of the run"})
    final_lr: float = field(default=0.0, metadata={"range": (0, 1000)})
    lr_vectors: float | None = field(default=None, metadata={"range": (0, 1000), "help": "of biases and norms at the "
                                                             "top; null: the same"})
    weight_decay: float = field(default=1e-4, metadata={"range": (0, 10)})
    final_weight_decay: float | None = field(default=None, metadata={"range": (0, 10), "help": "reached by half a "
                                                                     "cosine; null: it stays"})
    decay_vectors: bool = field(default=False, metadata={"help": "biases and norms decay as well"})
    momentum: float = field(default=0.9, metadata={"range": (0, 1), "help": "sgd and lars"})
    nesterov: bool = field(default=True, metadata={"help": "sgd"})
    trust: float = field(default=1e-3, metadata={"range": (1e-6, 1), "help": "lars: a step's part of a layer's size"})
    clip: float = field(default=0.0, metadata={"range": (0, 1e6), "help": "gradient norm; 0: never"})

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        broken = []
        if self.final_lr > self.lr:
            broken.append(f"final_lr={self.final_lr} lies above optim.lr={self.lr}")
        if self.lr_vectors is not None and not self.lr:
            broken.append(f"lr_vectors={self.lr_vectors} follows the schedule of optim.lr, which is 0")
        if self.decay_vectors and self.name == "lars":
            broken.append("decay_vectors=true and optim.name=lars do not go together: LARS leaves biases and norms "
                          "without decay; use decay_vectors=false")
        return broken


@dataclass
class Checkpoint:
    every: int = field(default=500, metadata={"range": (1, 10**9), "help": "steps"})
    minutes: float = field(default=15.0, metadata={"range": (0, 10**5), "help": "or when so many have gone; 0: never"})
    keep: int = field(default=2, metadata={"range": (2, 10**6), "help": "the newest; one alone may be in the making"})
    keep_every: int = field(default=0, metadata={"range": (0, 10**9), "help": "steps: of those that it divides, all "
                                                 "stay; 0: none"})
    background: bool = field(default=True, metadata={"help": "written while training goes on, where memory allows"})
    failures: int = field(default=3, metadata={"range": (1, 1000), "help": "in a row, by a disk that refuses, end the "
                                               "run"})


@dataclass
class Log:
    every: int = field(default=10, metadata={"range": (1, 10**6), "help": "steps a line of metrics.jsonl stands for"})
    pictures: int = field(default=6, metadata={"range": (0, 64), "help": "tiles drawn with their views at the start"})


@dataclass
class Debug:
    ledger: bool = field(default=False, metadata={"help": "write down every sample every rank sees"})
    faults: list[str] = field(default_factory=list, metadata={
        "help": "what shall go wrong, to see what follows: kill@save.rename:rank=1,step=7 (see points.py)"})

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        broken = []
        for number, words in enumerate(self.faults):
            try:
                points.fault(words)
            except ValueError as error:
                broken.append(f"faults[{number}]: {error}")
        return broken


@dataclass
class Train:
    """`ssl-dist train`."""

    run: Path = field(metadata={"help": "run folder to write"})
    data: Data
    method: dict[str, Any] = field(metadata={"help": "name=simclr and the method's own keys"})
    steps: int = field(default=0, metadata={"range": (0, 10**9), "help": "optimizer steps of the whole run"})
    epochs: float = field(default=0.0, metadata={"range": (0, 10**6), "help": "or: passes over the tiles"})
    samples: int = field(default=0, metadata={"range": (0, 10**13), "help": "or: tiles seen, again and again"})
    stop: int | None = field(default=None, metadata={"range": (1, 10**9), "help": "end the attempt after this step"})
    seed: int = field(default=0, metadata={"range": (0, 2**63 - 1)})
    device: str = field(default="auto", metadata={"choices": ("auto", "cpu", "cuda")})
    precision: str = field(default="fp32", metadata={"choices": ("fp32", "bf16")})
    accumulate: int = field(default=1, metadata={"range": (1, 10**5), "help": "parts of a rank's tiles that go forward "
                                                 "and backward one after the other, before one step"})
    zero: int = field(default=0, metadata={"range": (0, 2), "help": "what ranks share out instead of each keeping all: "
                                           "1: the optimizer's state, 2: and the gradients"})
    compile: bool = field(default=False, metadata={"help": "the encoder by torch.compile, once for each size of view"})
    nonfinite: str = field(default="fail", metadata={
        "choices": ("fail", "skip", "rewind"), "help": "a loss or gradient that is no number: end; go on without that "
        "batch; or go back to the last checkpoint, and then on without it"})
    nonfinite_max: int = field(default=10, metadata={"range": (0, 10**6), "help": "so many batches may be left out"})
    hang: float = field(default=600.0, metadata={"range": (1, 86_400), "help": "seconds for a rank to come from one "
                                                 "point of a step to the next; three times that for the first step"})
    grace: float = field(default=25.0, metadata={"range": (1, 86_400), "help": "seconds from a signal to the kill: "
                                                 "torchrun's are 30"})
    encoder: Encoder = field(default_factory=Encoder)
    optim: Optim = field(default_factory=Optim)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
    debug: Debug = field(default_factory=Debug)

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        broken = []
        name = self.method.get("name")
        if name not in methods():
            close = difflib.get_close_matches(str(name), methods(), n=1)
            broken.append(f"method.name={name!r} is not one of {', '.join(methods())}"
                          + (f"; did you mean {close[0]!r}?" if close else ""))
        lengths = {name: getattr(self, name) for name in LENGTHS if getattr(self, name)}
        if len(lengths) > 1:
            broken.append(" and ".join(f"{name}={value:g}" for name, value in lengths.items()) + " each say how long "
                          "the run is; set all but one to 0")
        elif not lengths:
            broken.append("steps is not set, nor epochs, nor samples: say how long the run is")
        if self.zero and self.optim.name == "lars":
            broken.append(f"zero={self.zero} and optim.name=lars do not go together: ZeRO cuts the weights into flat "
                          "parts, and LARS needs the norm of every layer; use zero=0")
        return broken


def load(kind: type, name: str, overrides: list[str]) -> Any:
    """A config of one kind from a recipe, by path or by name, and key=value words."""
    file = recipe(name)
    values, places = _read(kind, file, overrides)
    return schema.build(kind, values, places, where=str(file))


def _read(kind: type, file: Path, overrides: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """What is written and where; of a run's length, what is typed stands in for what the recipe says."""
    values, places = schema.read(kind, file, overrides)
    typed = [name for name in LENGTHS if places.get(name) == schema.COMMAND_LINE]
    if kind is Train and any(values[name] for name in typed):
        values = {name: value for name, value in values.items() if name not in LENGTHS or name in typed}
    return values, places


def load_eval(name: str, overrides: list[str]) -> Protocol:
    """What one protocol is told. Where another protocol is typed than the recipe's, the recipe says which encoder and
    which tiles, and no more; to one that looks at slides and not at tiles, nothing."""
    file = recipe(name)
    values, places = schema.read(Judged, file, overrides)
    protocol = values.get("protocol", Knn.protocol)
    if protocol not in PROTOCOLS:
        close = difflib.get_close_matches(str(protocol), PROTOCOLS, n=1)
        raise ConfigError([f"protocol={protocol!r} is not one of {', '.join(PROTOCOLS)}"
                           + (f"; did you mean {close[0]!r}?" if close else "")
                           + f" [{places.get('protocol', str(file))}]"])
    kind = PROTOCOLS[protocol]
    values, places = schema.read(kind, file, overrides)
    if places.get("protocol") == schema.COMMAND_LINE and schema.read(kind, file, [])[0].get("protocol") != protocol:
        data_kind = typing.get_type_hints(kind).get("data")
        tiles = {each.name for each in fields(data_kind)} if data_kind else set()
        typed = {name for name, place in places.items() if place == schema.COMMAND_LINE}
        kept = ("encoder", "data") if data_kind else ()
        values = {key: value for key, value in values.items() if key in kept
                  or key in {name.partition(".")[0] for name in typed}}
        if isinstance(data := values.get("data"), dict):
            values["data"] = {key: value for key, value in data.items() if key in tiles or f"data.{key}" in typed}
    return schema.build(kind, {**values, "protocol": protocol}, places, where=str(file))


def load_train(name: str, overrides: list[str]) -> Train:
    """A training config with its method's own keys checked and filled in; imports the method, and so torch."""
    file = recipe(name)
    values, places = _read(Train, file, overrides)
    train = schema.build(Train, values, places, where=str(file))
    own = method_config(train, str(file), places)
    for number, view in enumerate(getattr(own, "views", ())):
        if view.fitted and not train.data.stain:
            raise ConfigError([f"method.views[{number}].{view.fitted}={getattr(view, view.fitted)!r} needs data.stain, "
                               "the file of stains and colours that `ssl-dist stain-fit FOLDER` writes"])
    whole = importlib.import_module(f"ssl_dist.methods.{train.method['name']}").Method.WHOLE
    if whole and train.accumulate > 1:
        raise ConfigError([f"accumulate={train.accumulate}: {train.method['name']} takes its {whole} from all tiles of "
                           "a step, so parts of it would be another loss; use accumulate=1, and for memory "
                           "precision=bf16, more ranks or, for a network without BatchNorm, "
                           "encoder.checkpointing=true"])
    return replace(train, method={"name": train.method["name"], **schema.plain(own)})


def method_config(train: Train, where: str = "config", places: dict[str, str] | None = None) -> Any:
    """The method's own `Config`, from the keys below `method:`."""
    module = importlib.import_module(f"ssl_dist.methods.{train.method['name']}")
    own = {key: value for key, value in train.method.items() if key != "name"}
    return schema.build(module.Config, own, places, where=where, prefix="method.")


def methods() -> list[str]:
    """The methods there are: the files of the folder `methods/`, but for what they share."""
    folder = Path(__file__).parent / "methods"
    shared = "__init__", "base", "losses", "patches"
    return sorted(path.stem for path in folder.glob("*.py") if path.stem not in shared)


def recipes() -> Path:
    """The folder of recipes: inside an installed wheel, or beside the package in a checkout."""
    here = Path(__file__).parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def recipe(name: str) -> Path:
    """The file of a recipe given by path (configs/demo.yaml) or by name (demo, pretrain/simclr)."""
    tried = [Path(name), Path(f"{name}.yaml"), recipes() / name, recipes() / f"{name}.yaml",
             recipes() / name.removeprefix("configs/")]
    for path in tried:
        if path.is_file():
            return path
    known = [path.relative_to(recipes()).with_suffix("").as_posix() for path in sorted(recipes().rglob("*.yaml"))]
    close = difflib.get_close_matches(name.removeprefix("configs/").removesuffix(".yaml"), known, n=1)
    raise ConfigError([f"no config {name} (looked in {Path.cwd()} and among the recipes)"
                       + (f"; did you mean {close[0]}?" if close else "; `ssl-dist recipes` lists them")])


def with_steps(train: Train, steps_an_epoch: int) -> Train:
    """The same run with its length in steps, once the catalogue is known."""
    steps = train.steps or math.ceil(train.samples / train.data.batch) or max(1, round(train.epochs * steps_an_epoch))
    return replace(train, steps=steps, epochs=0.0, samples=0)


def rates(train: Train, progress: float) -> tuple[float, float]:
    """Learning rate and weight decay of a step."""
    optim, scale = train.optim, lr_scale(train)
    lr = schedule.warmup_cosine(progress, scale * optim.lr, scale * optim.final_lr, optim.warmup)
    end = optim.weight_decay if optim.final_weight_decay is None else optim.final_weight_decay
    return lr, schedule.cosine(progress, optim.weight_decay, end)


def lr_scale(train: Train) -> float:
    """What the learning rates of a recipe are multiplied by, for its batch."""
    share = train.data.batch / LR_TILES
    return {"fixed": 1.0, "linear": share, "root": share**0.5}[train.optim.scale]


def rank_batch(train: Train, world: int) -> int:
    """The tiles of a step that one rank takes, all its parts together; refuses what so many ranks cannot share."""
    if world % (train.encoder.batchnorm_ranks or 1):
        fitting = ", ".join(str(count) for count in range(1, world + 1) if world % count == 0)
        raise ConfigError([f"encoder.batchnorm_ranks={train.encoder.batchnorm_ranks} does not divide {world} ranks "
                           f"into groups of one size; use {fitting} (0: all)"])
    parts = world * train.accumulate
    if train.data.batch % parts:
        near = [parts * (train.data.batch // parts + more) for more in (0, 1)]
        among = f"{world} ranks" + (f" in {train.accumulate} parts each (accumulate)" if train.accumulate > 1 else "")
        raise ConfigError([f"data.batch={train.data.batch} cannot be shared evenly by {among}; "
                           f"use data.batch={near[0] or near[1]} or {near[1]}, or another number of ranks"])
    return train.data.batch // world


def deepspeed(train: Train, world: int) -> dict[str, Any]:
    """DeepSpeed's own configuration. Every key that touches a number is named: a default of 1.0 clips in silence."""
    stage = train.zero if world > 1 else 0          # alone there is nobody to share with, and ZeRO only costs
    return {
        "train_batch_size": train.data.batch,
        "train_micro_batch_size_per_gpu": rank_batch(train, world) // train.accumulate,
        "gradient_accumulation_steps": train.accumulate,
        "gradient_clipping": train.optim.clip,
        "zero_optimization": {"stage": stage, **ZERO[stage]},
        "zero_allow_untested_optimizer": True,
        # bf16.enabled would cast parameters and leave BatchNorm's buffers behind; autocast keeps fp32 masters.
        "torch_autocast": {"enabled": train.precision == "bf16", "dtype": "bfloat16"},
        "timers": {"throughput": {"enabled": False}},       # it waits for the GPU twice a step
        "steps_per_print": 2**31 - 1,           # we log ourselves
        "wall_clock_breakdown": False,
    }
