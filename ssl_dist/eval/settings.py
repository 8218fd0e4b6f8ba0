"""What an evaluation is told: a dataclass a protocol, of what they share and what is its own. Imports no torch."""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssl_dist.models import ELSEWHERE, absent

BASELINES = "random", "colours"
CHANCE = "chance"       # the baseline of what has no encoder
CUTS = "half", "otsu"    # where a map of confidence says that something is there: ssl_dist/eval/blobs.py
MODELS = "mean", "weldon", "chowder", "deepmil", "clam", "transmil"      # of slides: ssl_dist/models/mil.py


@dataclass(kw_only=True)
class Tiles:
    """All tiles there are, labelled or not."""

    shards: list[Path] = field(metadata={"exists": True, "some": True, "help": "shard folders"})
    split: str = field(default="", metadata={"help": "only tiles of this split; empty: all"})


@dataclass(kw_only=True)
class Labelled:
    """Tiles of which something is known and tiles of which it is guessed."""

    shards: list[Path] = field(metadata={"exists": True, "some": True, "help": "labelled shard folders"})
    bank: str = field(default="train", metadata={"help": "split whose labels are known"})
    query: str = field(default="test", metadata={"help": "split whose labels are guessed"})
    valid: str = field(default="", metadata={"help": "split on which a probe is chosen that learns from the bank; "
                                                     "empty: a fifth of the bank's patients"})
    targets: Path | None = field(default=None, metadata={
        "exists": True, "help": "a CSV table of what to guess instead of labels: a column key, slide or patient, and "
                                "one for each thing to guess"})
    kind: str = field(default="classes", metadata={
        "choices": ("classes", "several", "numbers"), "help": "classes: one label a tile; of targets=: several (0 or 1 "
                                                              "in each column), or numbers (one column)"})
    ordered: bool = field(default=False, metadata={"help": "classes are grades: adds the quadratic kappa"})
    hold: str = field(default="", metadata={
        "choices": ("", "patient", "slide", "site"),
        "help": "hold out whole patients, slides, or sites (TCGA) of split bank as the query; empty: split query"})
    part: float = field(default=0.25, metadata={"range": (0.01, 0.9), "help": "of the tiles, that hold= holds out"})

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        broken = []
        if self.hold and self.query not in ("", "test"):
            broken.append(f"query={self.query} goes unused with data.hold={self.hold}, which holds out a part of "
                          "data.bank; leave one of them out")
        if self.bank == self.query and not self.hold:
            broken.append(f"bank and data.query are both {self.bank!r}: every tile would find itself")
        if self.valid and (self.hold or not self.bank or self.valid in (self.bank, self.query)):
            broken.append(f"valid={self.valid} is no split apart from data.bank={self.bank!r} and "
                          + (f"data.hold={self.hold}" if self.hold else f"data.query={self.query!r}")
                          + "; name another, or none")
        if (self.kind == "classes") != (self.targets is None):
            broken.append(f"kind={self.kind} and data.targets={self.targets}: "
                          + ("say what the table holds with data.kind=several (0 or 1 in each column) or "
                             "data.kind=numbers (one column)" if self.targets else "several and numbers are of a "
                             "table, named by data.targets; classes are the shards' labels"))
        return broken


@dataclass(kw_only=True)
class Protocol(ABC):
    """`ssl-dist eval`: what every protocol is told."""

    protocol: str
    out: Path | None = field(default=None, metadata={"help": "folder of results; null: beside the encoder or the "
                                                             "vectors"})
    threads: int = field(default=0, metadata={"range": (0, 1024), "help": "0: all cores"})
    device: str = field(default="auto", metadata={"choices": ("auto", "cpu", "cuda"), "help": "cuda: every GPU there is"
                                                  })
    seed: int = field(default=0, metadata={"range": (0, 2**32 - 1), "help": "of the random baseline, and of all that "
                                                                            "is drawn"})

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        return []

    @property
    @abstractmethod
    def beside(self) -> Path:
        """Where results go if nobody says: next to what is judged."""

    @property
    def home(self) -> Path:
        """Where results go."""
        return self.out or self.beside


def beside(encoder: str) -> Path:
    """Where results on an encoder go if nobody says."""
    if encoder.startswith(ELSEWHERE):
        return Path("eval") / re.sub(r"[^\w.-]+", "_", encoder)
    return Path(encoder).parent / "eval"


@dataclass(kw_only=True)
class Eval(Protocol):
    """What looks at tiles with an encoder."""

    encoder: str = field(metadata={"help": "an encoder folder, or timm:NAME or hf-hub:OWNER/NAME"})
    cache: bool = field(default=True, metadata={"help": "keep features in OUT/features, and compute them once"})
    precision: str = field(default="fp32", metadata={"choices": ("fp32", "bf16"), "help": "of the encoder"})
    size: int | None = field(default=None, metadata={"range": (16, 4096), "help": "pixels a tile is resized to; null: "
                                                     "as wide as what the encoder was trained on"})
    batch: int = field(default=256, metadata={"range": (1, 10**6), "help": "tiles looked at together"})

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        return super().rules() + absent(self.encoder)

    @property
    def beside(self) -> Path:
        """eval/ beside the encoder; of one that is no folder, below eval/ here."""
        return beside(self.encoder)


@dataclass(kw_only=True)
class Judged(Eval):
    """Figures of merit, beside those of baselines."""

    data: Labelled
    baselines: list[str] = field(default_factory=lambda: ["random"], metadata={
        "help": "random: the same network untrained; colours: histograms; or another encoder, as encoder= takes it"})
    seeds: int = field(default=1, metadata={"range": (1, 1000), "help": "so many times over, with seed, seed + 1, …"})

    TABLES = False          # whether it guesses what a table tells, beside classes
    CHOOSES = True          # whether it chooses something by tiles that it does not learn from

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        broken = super().rules()
        if self.data.kind != "classes" and not self.TABLES:
            able = ", ".join(name for name, kind in PROTOCOLS.items() if getattr(kind, "TABLES", False))
            broken.append(f"protocol={self.protocol} knows classes alone; data.kind={self.data.kind} goes with {able}")
        for source in self.baselines:
            if not (source.startswith(ELSEWHERE) or source in BASELINES or Path(source).exists()):
                broken.append(f"baselines has {source!r}, which is neither {' nor '.join(BASELINES)}, nor an encoder's "
                              f"folder (looked in {Path.cwd()}), nor timm:NAME or hf-hub:OWNER/NAME")
        return broken


@dataclass(kw_only=True)
class Knn(Judged):
    """k nearest neighbours vote."""

    protocol: str = "knn"
    k: int = field(default=20, metadata={"range": (1, 10**6), "help": "neighbours that vote"})
    temperature: float = field(default=0.07, metadata={"range": (1e-3, 100), "help": "of the votes"})

    TABLES = True
    CHOOSES = False


@dataclass(kw_only=True)
class Linear(Judged):
    """Logistic regression on all features at once."""

    protocol: str = "linear"

    TABLES = True


@dataclass(kw_only=True)
class Sgd(Judged):
    """A linear layer, trained step by step."""

    protocol: str = "sgd"
    optimizer: str = field(default="sgd", metadata={"choices": ("sgd", "adamw")})
    rates: list[float] = field(default_factory=lambda: [1e-3, 1e-2, 1e-1, 1.0, 10.0], metadata={
        "some": True, "help": "learning rates, of which the best is taken"})
    steps: int = field(default=5000, metadata={"range": (1, 10**7)})
    patience: float = field(default=1.0, metadata={"range": (0.01, 1), "help": "part of the steps without gain, after "
                                                                               "which it ends"})
    weight_decay: float = field(default=0.0, metadata={"range": (0, 10)})

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        return super().rules() + [f"rates has {each:g}; a learning rate is more than 0" for each in self.rates
                                  if not each > 0]


@dataclass(kw_only=True)
class Low(Judged):
    """Few labels."""

    protocol: str = "low"
    shares: list[float] = field(default_factory=lambda: [0.01, 0.05, 0.1, 0.25, 0.5], metadata={
        "help": "parts of the bank's labels that are known"})
    per_class: list[int] = field(default_factory=list, metadata={"help": "labels of each class that are known"})
    draws: int = field(default=5, metadata={"range": (1, 1000), "help": "choices of those labels"})

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        return [*super().rules(), *(f"shares has {each:g}, which is no part of the labels; write 0.1 for a tenth"
                                    for each in self.shares if not 0 < each < 1),
                *(f"per_class has {each}; one label of a class is the least" for each in self.per_class if each < 1)]


@dataclass(kw_only=True)
class Finetune(Judged):
    """The encoder learns as well."""

    protocol: str = "finetune"
    epochs: int = field(default=10, metadata={"range": (1, 10**4), "help": "passes over the bank"})
    lr: float = field(default=5e-4, metadata={"range": (1e-9, 100), "help": "of the head, at the top"})
    layer_decay: float = field(default=0.75, metadata={"range": (0.01, 1), "help": "of lr, from a layer to the one "
                                                                                   "before it"})
    weight_decay: float = field(default=0.05, metadata={"range": (0, 10)})
    batch: int = field(default=64, metadata={"range": (2, 10**6), "help": "tiles a step"})

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        return super().rules() + (["baselines=colours has no weights to fine-tune; leave it out"]
                                  if "colours" in self.baselines else [])


@dataclass(kw_only=True)
class Every(Eval):
    """Something of all tiles, and no figure of merit."""

    data: Tiles


@dataclass(kw_only=True)
class Embed(Every):
    """Vectors for other programs."""

    protocol: str = "embed"
    write: list[str] = field(default_factory=lambda: ["parquet", "h5"], metadata={
        "choices": ("parquet", "h5"), "some": True, "help": "a table, and a file a slide"})


@dataclass(kw_only=True)
class Look(Every):
    """Pictures of what an encoder sees."""

    protocol: str = "look"
    tiles: int = field(default=5000, metadata={"range": (10, 10**6), "help": "at most, evenly from all there are"})
    queries: int = field(default=8, metadata={"range": (1, 64), "help": "tiles shown with their neighbours"})
    maps: list[str] = field(default_factory=lambda: ["pca", "umap"], metadata={
        "choices": ("pca", "umap"), "help": "umap needs umap-learn: pip install 'ssl_dist[maps]'"})
    by: list[str] = field(default_factory=lambda: ["label", "slide", "site", "stain", "colour"], metadata={
        "choices": ("label", "slide", "site", "stain", "dataset", "organ", "split", "colour"),
        "help": "what tiles are coloured by on the maps, where they differ in it; site: TCGA's; colour: their own"})
    projector: bool = field(default=True, metadata={"help": "also for TensorBoard's projector, in OUT/projector"})


@dataclass(kw_only=True)
class SlideEmbed(Protocol):
    """One vector a slide."""

    protocol: str = "slide_embed"
    encoder: Path = field(metadata={"exists": True, "help": "folder of a slide encoder, as a run of method gigassl "
                                                            "writes it"})
    bags: Path = field(metadata={"exists": True, "help": "a folder of slides, an HDF5 file each: their tiles by the "
                                                         "encoder and stage that the slide encoder learnt on"})
    views: int = field(default=100, metadata={"range": (1, 10**6), "help": "of each slide, of which the mean is taken"})
    tiles: int = field(default=5, metadata={"range": (1, 10**6), "help": "of a view"})
    batch: int = field(default=256, metadata={"range": (1, 10**6), "help": "views looked at together, of "
                                              "several slides where one has fewer"})

    @property
    def beside(self) -> Path:
        """The folder of the encoder's folder."""
        return self.encoder.absolute().parent / "eval"


@dataclass(kw_only=True)
class SlideLinear(Protocol):
    """Logistic regression on one vector a slide."""

    protocol: str = "slide_linear"
    vectors: Path = field(metadata={"exists": True, "help": "a Parquet table with columns slide, features and perhaps "
                                                            "patient, or a folder of slides, an HDF5 file each"})
    labels: Path = field(metadata={"exists": True, "help": "a CSV table: columns slide and label, perhaps split (train "
                                                           "and test, or a word a split) and patient"})
    pooling: str = field(default="mean", metadata={"choices": ("mean", "max"), "help": "of what has several vectors a "
                                                                                       "slide"})
    baselines: list[str] = field(default_factory=lambda: [CHANCE], metadata={
        "help": "chance: classes as often as they were seen; or other vectors of the same slides, as vectors= takes "
                "them"})
    sizes: list[int] = field(default_factory=lambda: [50, 100, 250], metadata={
        "range": (2, 10**6), "help": "slides learnt from, beside all"})
    splits: int = field(default=10, metadata={"range": (2, 1000), "help": "parts of the patients, each asked about in "
                                                                          "turn; of a table's test, choices of slides"})
    strength: float = field(default=10.0, metadata={"range": (1e-9, 1e9), "help": "scikit-learn's C"})
    balanced: bool = field(default=True, metadata={"help": "classes weigh alike, however many slides they have"})
    iterations: int = field(default=1000, metadata={"range": (1, 10**6), "help": "of L-BFGS, at most"})
    scale: bool = field(default=False, metadata={"help": "every number of a vector by its mean and deviation"})

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        return [*super().rules(), *(
            f"baselines has {source!r}, which is neither {CHANCE} nor vectors of slides (looked in {Path.cwd()})"
            for source in self.baselines if source != CHANCE and not Path(source).exists())]

    @property
    def beside(self) -> Path:
        """The folder of the vectors."""
        return self.vectors.parent


@dataclass(kw_only=True)
class Mil(Protocol):
    """Slides, by the vectors of their tiles."""

    protocol: str = "mil"
    bags: Path = field(metadata={"exists": True, "help": "a folder of slides, an HDF5 file each, as eval/embed, CLAM "
                                                         "and TRIDENT write them"})
    labels: Path = field(metadata={"exists": True, "help": "a CSV table: a column slide or patient (or both), and "
                                   "label, or time and event; perhaps split"})
    kind: str = field(default="classes", metadata={"choices": ("classes", "survival"), "help": "classes: the column "
                                                   "label; survival: time, and event (1: it came, 0: not so far)"})
    model: str = field(default="deepmil", metadata={"choices": MODELS})
    args: dict[str, Any] = field(default_factory=dict, metadata={"help": "what the model takes beside, in "
                                                                         "ssl_dist/models/mil.py"})
    baselines: list[str] = field(default_factory=lambda: ["mean", "linear"], metadata={
        "choices": (*MODELS, "linear"), "help": "models judged on the same folds; linear: of the mean vector"})
    split: str = field(default="", metadata={"help": "a word of the table's column split: these slides are guessed, "
                                             "and all others learnt from; empty: cross-validation"})
    folds: int = field(default=5, metadata={"range": (2, 100), "help": "parts of the patients, each guessed in turn"})
    repeats: int = field(default=1, metadata={"range": (1, 100), "help": "times that patients are dealt out anew"})
    inner: int = field(default=5, metadata={"range": (2, 100), "help": "parts of what is learnt from, by which rate, "
                                            "decay and epoch are chosen"})
    rates: list[float] = field(default_factory=lambda: [1e-3, 1e-4], metadata={"some": True, "help": "of Adam"})
    decays: list[float] = field(default_factory=lambda: [0.0, 1e-4], metadata={"some": True, "range": (0, 10),
                                                                               "help": "weight decays"})
    epochs: int = field(default=50, metadata={"range": (1, 10**5), "help": "passes over the slides, at most"})
    batch: int = field(default=16, metadata={"range": (1, 10**5), "help": "slides a step"})
    max_tiles: int = field(default=1000, metadata={"range": (0, 10**7), "help": "tiles of a slide, drawn at every "
                                                   "step; 0: all. Guesses see all"})
    scale: bool = field(default=True, metadata={"help": "every number of a vector by its mean and deviation"})
    maps: list[str] = field(default_factory=list, metadata={"help": "slides whose tiles are drawn, or all"})
    encoder: Path | None = field(default=None, metadata={
        "exists": True, "help": "folder of the encoder that made the vectors: tells whether it has seen the slides"})

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        return [*super().rules(), *(f"rates has {each:g}; a learning rate is more than 0" for each in self.rates
                                    if not each > 0)]

    @property
    def beside(self) -> Path:
        """The folder of the bags' folder."""
        return self.bags.parent


@dataclass(kw_only=True)
class Outlined:
    """Regions in which every object is outlined: those learnt from, and those asked about."""

    regions: Path = field(metadata={"exists": True, "help": "a folder as MoNuSeg, Kumar, CoNSeP, PanNuke or DSB 2018 "
                                    "publish it, or images/ with labels/ of the same names"})
    form: str = field(default="", metadata={"choices": ("", "polygons", "mat", "pannuke", "pieces", "maps"),
                                            "help": "how labels are written; empty: as its files look"})
    names: str = field(default="", metadata={"help": "regular expression searched in a region's path, with groups "
                                                     "patient and split"})
    types: dict[str, list[str]] = field(default_factory=dict, metadata={
        "help": "types that are taken together: {epithelial: [healthy epithelial, malignant epithelial]}"})
    bank: str = field(default="", metadata={"help": "split that is learnt from; empty: all that is not asked about"})
    query: str = field(default="", metadata={"help": "split that is asked about; empty: part of the patients"})
    part: float = field(default=0.2, metadata={"range": (0.01, 0.9), "help": "of the regions, by whole patients, where "
                                                                             "no split is asked about"})


@dataclass(kw_only=True)
class PixelWise(Protocol):
    """A decoder learns, with the encoder beneath it, what every pixel is."""

    encoder: str = field(metadata={"help": "an encoder folder, or timm:NAME or hf-hub:OWNER/NAME"})
    data: Outlined
    baselines: list[str] = field(default_factory=lambda: ["random"], metadata={
        "help": "random: the same network untrained; or another encoder, as encoder= takes it"})
    seeds: int = field(default=1, metadata={"range": (1, 1000), "help": "so many times over, with seed, seed + 1, …"})
    shares: list[float] = field(default_factory=lambda: [1.0], metadata={
        "some": True, "range": (0.001, 1), "help": "parts of the regions learnt from; figures are of the largest"})
    window: int = field(default=256, metadata={"range": (32, 4096), "help": "pixels a side of what the network sees"})
    margin: int = field(default=46, metadata={"range": (0, 1024), "help": "pixels of its rim that are neither learnt "
                                                                          "from nor kept"})
    fine: bool = field(default=True, metadata={"help": "ResNets: the first block at full size, as HoVer-Net's"})
    width: int = field(default=64, metadata={"range": (8, 512), "help": "channels of a decoder's finest map; times 4"})
    epochs: list[int] = field(default_factory=lambda: [50, 50], metadata={
        "range": (0, 10**5), "help": "passes with the encoder frozen, and then free"})
    batches: list[int] = field(default_factory=lambda: [32, 16], metadata={
        "range": (2, 10**5), "help": "windows a step, likewise"})
    windows: int = field(default=0, metadata={"range": (0, 10**5), "help": "windows a pass and region; 0: as many as "
                                                                           "cover it"})
    lr: float = field(default=1e-4, metadata={"range": (1e-9, 100), "help": "of Adam"})
    drop: int = field(default=25, metadata={"range": (1, 10**5), "help": "passes after which lr becomes a tenth"})
    zoom: float = field(default=1.25, metadata={"range": (1, 4), "help": "times larger or smaller, at most"})
    stain: float = field(default=0.05, metadata={"range": (0, 1), "help": "by which stains are scaled and shifted"})
    jitter: float = field(default=0.8, metadata={"range": (0, 1), "help": "chance of colour jitter"})
    blur: float = field(default=0.2, metadata={"range": (0, 1), "help": "chance of blur"})
    precision: str = field(default="fp32", metadata={"choices": ("fp32", "bf16")})
    mpp: float = field(default=0.25, metadata={"range": (0.05, 100), "help": "microns per pixel of the regions, for "
                                                                             "whoever outlines slides by this network"})
    pictures: int = field(default=4, metadata={"range": (0, 1000), "help": "regions asked about that are drawn"})

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        broken = super().rules() + absent(self.encoder)
        if self.window <= 2 * self.margin:
            broken.append(f"margin={self.margin} leaves nothing of window={self.window}")
        if self.width % 4:
            broken.append(f"width={self.width} is no multiple of 4")
        broken += [f"{name} has {len(values)} values, not two: with the encoder frozen, and then free"
                   for name, values in (("epochs", self.epochs), ("batches", self.batches)) if len(values) != 2]
        if not sum(self.epochs):
            broken.append("epochs are none: nothing would be learnt")
        for source in self.baselines:
            if source != "random" and not source.startswith(ELSEWHERE) and not Path(source).exists():
                broken.append(f"baselines has {source!r}, which is neither random, nor an encoder's folder (looked in "
                              f"{Path.cwd()}), nor timm:NAME or hf-hub:OWNER/NAME")
        return broken

    @property
    def beside(self) -> Path:
        """eval/ beside the encoder; of one that is no folder, below eval/ here."""
        return beside(self.encoder)


@dataclass(kw_only=True)
class Nuclei(PixelWise):
    """Nuclei as HoVer-Net finds them, each apart and of a type."""

    protocol: str = "nuclei"
    kernel: int = field(default=5, metadata={"choices": (3, 5), "help": "of the decoders' convolutions"})
    edge: float = field(default=0.3, metadata={"range": (0.01, 1), "help": "slope that is a border between nuclei, of "
                                                                           "the steepest there can be"})
    smallest: int = field(default=10, metadata={"range": (1, 10**6), "help": "pixels of a nucleus"})
    write: list[str] = field(default_factory=lambda: ["png", "geojson"], metadata={
        "choices": ("png", "tif", "npy", "geojson"), "help": "of regions asked about: maps of numbers, and outlines"})


@dataclass(kw_only=True)
class Semantic(PixelWise):
    """What every pixel is, by a U-Net."""

    protocol: str = "semantic"
    width: int = field(default=32, metadata={"range": (8, 512), "help": "channels of the decoder's finest map"})
    fine: bool = field(default=False, metadata={"help": "ResNets: the first block at full size"})


@dataclass(kw_only=True)
class Outline(Protocol):
    """Nuclei of whole slides, by a network that eval/nuclei has written."""

    protocol: str = "outline"
    network: Path = field(metadata={"exists": True, "help": "a folder that eval/nuclei has written: OUT/nuclei-network"
                                    })
    slides: list[str] = field(metadata={"some": True, "one": True, "help": "folders, files, or patterns such as "
                                                                           "'/data/*.svs', one or several"})
    mpp: float | None = field(default=None, metadata={"range": (0.05, 100), "help": "null: as the network learnt"})
    slide_mpp: float | None = field(default=None, metadata={"range": (0.05, 5), "help": "of slides that do not say"})
    write: list[str] = field(default_factory=lambda: ["geojson"], metadata={
        "choices": ("png", "tif", "npy", "geojson"), "some": True, "help": "outlines, and of what fits into memory "
                                                                           "maps of numbers"})
    batch: int = field(default=16, metadata={"range": (1, 10**5), "help": "windows looked at together"})
    precision: str = field(default="fp32", metadata={"choices": ("fp32", "bf16")})

    @property
    def beside(self) -> Path:
        """outlines/ beside the network."""
        return self.network.parent / "outlines"


@dataclass(kw_only=True)
class Segment(Protocol):
    """Maps of confidence, against outlines."""

    protocol: str = "segment"
    encoder: str = field(metadata={"help": "a folder RUN/encoder of a network of maps; of its run every checkpoint is "
                                           "looked at"})
    regions: Path = field(metadata={"exists": True, "help": "a folder of outlined regions, as MoNuSeg, Kumar, CoNSeP, "
                                    "PanNuke or DSB 2018 publish it, or images/ with labels/ of the same names"})
    form: str = field(default="", metadata={"choices": ("", "polygons", "mat", "pannuke", "pieces", "maps"),
                                            "help": "how outlines are written; empty: as its files look"})
    names: str = field(default="", metadata={"help": "regular expression searched in a region's path, with a group "
                                                     "patient"})
    every: int = field(default=5, metadata={"range": (2, 10**6), "help": "which patients are asked about: every so "
                                            "manieth by name; the outlines of others choose thresholds, and what "
                                            "stands beside the choice without labels"})
    glance: int = field(default=400, metadata={"range": (64, 10**6), "help": "pixels of the middle of a region, by "
                                               "which is chosen; those asked about are looked at whole"})
    choose: str = field(default="separation", metadata={
        "choices": ("separation", "haematoxylin"), "help": "which of several classes, without labels: the one that is "
        "furthest from all else, or that goes best with haematoxylin"})
    cut: str = field(default="half", metadata={"choices": CUTS, "help": "what counts as there: more than half of "
                                               "confidence, or more than where Otsu's threshold parts its logits, of "
                                               "each picture for itself"})
    patch: int = field(default=50, metadata={"range": (2, 2048), "help": "pixels of patches by which separation is "
                                             "found, where an encoder lies in no run that says so"})
    stride: int = field(default=20, metadata={"range": (1, 2048), "help": "likewise, from a patch to the next"})

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        return super().rules() + absent(self.encoder)

    @property
    def beside(self) -> Path:
        """eval/ beside the encoder."""
        return Path(self.encoder).parent / "eval"


@dataclass(kw_only=True)
class Confidence(Protocol):
    """Maps of slides and pictures of any size."""

    protocol: str = "confidence"
    encoder: str = field(metadata={"help": "a folder RUN/encoder of a network of maps"})
    slides: list[str] = field(metadata={"some": True, "one": True, "help": "slides or pictures: folders, files, or "
                                        "patterns such as '/data/*.svs', one or several"})
    number: int | None = field(default=None, metadata={"range": (0, 10**6), "help": "of the class that is drawn; null: "
                                                       "the one that eval/segment has chosen for this network"})
    cut: str = field(default="", metadata={"choices": ("", *CUTS), "help": "what is outlined, as eval/segment has it; "
                                           "empty: as eval/segment has judged this network, or half"})
    mpp: float | None = field(default=None, metadata={"range": (0.05, 100), "help": "microns per pixel of maps of "
                                                      "slides; null: as in training"})
    slide_mpp: float | None = field(default=None, metadata={"range": (0.05, 5), "help": "of slides that do not say"})
    write: list[str] = field(default_factory=lambda: ["png", "geojson", "tif"], metadata={
        "choices": ("png", "geojson", "tif"), "some": True, "help": "a small picture; outlines for QuPath; a pyramid"})
    smallest: int = field(default=20, metadata={"range": (1, 10**6), "help": "pixels of what is outlined"})

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        return super().rules() + absent(self.encoder)

    @property
    def beside(self) -> Path:
        """maps/ beside the encoder."""
        return Path(self.encoder).parent / "maps"


PROTOCOLS: dict[str, type[Protocol]] = {
    "knn": Knn, "linear": Linear, "sgd": Sgd, "low": Low, "finetune": Finetune, "embed": Embed, "look": Look,
    "slide_embed": SlideEmbed, "slide_linear": SlideLinear, "mil": Mil, "nuclei": Nuclei, "semantic": Semantic,
    "outline": Outline, "segment": Segment, "confidence": Confidence}
