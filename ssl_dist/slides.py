"""What `ssl-dist embed` is told: an encoder, whole slides, and where tiles lie on them, as `ssl-dist shard` is told.
And what `ssl-dist draw` is told: an encoder, shards, and how their tiles are drawn.

Imports no torch.
"""

import re
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from shards.settings import WORDS, Settings
from ssl_dist.data.view import View
from ssl_dist.models import absent

_SHARD = {each.name: each for each in fields(Settings)}
# What decides which tiles a slide has: what `ssl-dist shard` calls so, and means by it.
CUTTING = ("dataset", "size", "slide_mpp", "power", "passthrough", "max_tiles", "min_tissue", "min_contrast",
           "min_focus", "max_pen", "max_blood", "inside", "min_label", "seed")


def _same(name: str, **other: Any) -> Any:
    """The key of `ssl-dist shard` of that name: its default (or another), its limits, its words."""
    known = _SHARD[name]
    if not other:
        other = {name: getattr(known, name) for name in ("default", "default_factory")
                 if getattr(known, name) is not MISSING}
    return field(**other, metadata=known.metadata)


def _parted(part: str) -> list[str]:
    """What is wrong with i/n."""
    number, of = map(int, part.split("/")) if part else (1, 1)
    return [] if 1 <= number <= of else [f"part={part!r} is none of 1/{of} to {of}/{of}"]


def _stage() -> Any:
    return field(default=None, metadata={"range": (0, 100), "help": "of the encoder's stages, as timm counts them: of "
                                         "a ResNet 3 is layer3; null: what the whole encoder makes"})


@dataclass(kw_only=True)
class Slides:
    """Vectors of whole slides, a file a slide."""

    encoder: str = field(metadata={"help": "an encoder folder, or timm:NAME or hf-hub:OWNER/NAME"})
    slides: list[str] = field(metadata={"some": True, "one": True, "help": "folders, files, or patterns such as "
                                                                           "'/data/*.svs', one or several"})
    out: Path = field(metadata={"help": "folder to write: h5/SLIDE.h5, slides.jsonl, failed.jsonl"})
    write: list[str] = field(default_factory=lambda: ["h5"], metadata={
        "choices": ("h5", "parquet"), "some": True, "help": "HDF5 as CLAM and TRIDENT read it, a Parquet table, or "
                                                            "both; a file a slide"})
    dataset: str = _same("dataset", default="slides")
    skip: str = _same("skip")
    names: str = _same("names")
    table: Path | None = _same("table")
    columns: dict[str, str] = _same("columns")

    # where tiles lie
    size: int = _same("size")
    mpp: float = field(metadata={"range": (0.05, 100), "help": "microns per pixel of a tile"})
    slide_mpp: float | None = _same("slide_mpp")
    power: bool = _same("power")
    passthrough: bool = _same("passthrough")
    max_tiles: int | None = _same("max_tiles")
    min_tissue: float = _same("min_tissue")
    min_contrast: float = _same("min_contrast")
    min_focus: float = _same("min_focus")
    max_pen: float = _same("max_pen")
    max_blood: float = _same("max_blood")
    inside: bool = _same("inside")
    min_label: float = _same("min_label")
    annotations: Path | None = _same("annotations")
    seed: int = field(default=0, metadata={**_SHARD["seed"].metadata, "help": "of the lot by which max_tiles draws"})

    # how the encoder looks
    resize: int | None = field(default=None, metadata={"range": (16, 4096), "help":
                                                       "pixels a tile is resized to; null: as wide as what the encoder "
                                                       "was trained on"})
    stage: int | None = _stage()
    precision: str = field(default="fp32", metadata={"choices": ("fp32", "bf16"), "help": "of the encoder"})
    batch: int = field(default=0, metadata={"range": (0, 10**6), "help":
                                            "tiles looked at together, of any slides; 0: 32 on a CPU, 256 on a GPU"})
    device: str = field(default="auto", metadata={"choices": ("auto", "cpu", "cuda"), "help": "cuda: every GPU there is"
                                                  })
    threads: int = field(default=0, metadata={"range": (0, 1024), "help": "that resize tiles; 0: all cores"})

    # how it goes
    workers: int = field(default=0, metadata={"range": (0, 1024), "help":
                                              "slides read at a time, each by a process; 0: one a core"})
    part: str = field(default="", metadata={**_SHARD["part"].metadata,
                                            "help": "i/n: only this part of the slides, 1/8 to 8/8 of an array job"})
    max_failed: int = field(default=0, metadata={**_SHARD["max_failed"].metadata, "help":
                                                 "slides that may fail; the others are done in any case, and with more "
                                                 "the exit code is 3"})
    unit_seconds: float = field(default=600.0, metadata={"range": (0.1, 10**6), "help":
                                                         "a slide of which no tile comes for so long has failed"})
    unit_memory_gb: float = _same("unit_memory_gb")

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        broken = absent(self.encoder)
        broken += _parted(self.part)
        unknown = [*(re.compile(self.names).groupindex.keys() - {*WORDS}), *(self.columns.keys() - {*WORDS, "file"})]
        return [*broken, *(f"{name!r} is not a word that we know of a file: {', '.join(WORDS)}" for name in unknown)]

    def reading(self) -> Settings:
        """The same in the words of whoever reads slides; its own source and out are never looked at."""
        own = {name: getattr(self, name) for name in (*CUTTING, "skip", "names", "table", "columns", "annotations",
                                                      "workers", "unit_seconds", "unit_memory_gb")}
        return Settings(source=self.out, out=self.out, kind="slides", mpp=[self.mpp], duplicates="keep", **own)

    def deciding(self) -> dict[str, Any]:
        """What decides the tiles and what the encoder makes of them, but for the encoder itself."""
        return {**{name: getattr(self, name) for name in ("mpp", *CUTTING)}, "precision": self.precision}


@dataclass(kw_only=True)
class Draws:
    """Vectors of some tiles of every slide, again and again, each time through one augmentation of all of them."""

    encoder: str = field(metadata={"help": "an encoder folder, or timm:NAME or hf-hub:OWNER/NAME"})
    shards: list[Path] = field(metadata={"exists": True, "some": True, "help": "shard folders of one dataset",
                                         "otherwise": "; write it with: ssl-dist shard CONFIG out=FOLDER"})
    out: Path = field(metadata={"help": "folder to write: tars of draws, and their index"})
    split: str = field(default="", metadata={"help": "only tiles of this split; empty: all"})
    mpp: float | None = field(default=None, metadata={"range": (0.05, 100), "help": "only tiles of this many microns "
                                                      "per pixel; null: the shards hold one kind alone"})
    draws: int = field(default=50, metadata={"range": (1, 9999), "help": "of each slide"})
    tiles: int = field(default=256, metadata={"range": (1, 65_536), "help": "of a draw, none twice; of a slide that "
                                              "has fewer, all"})
    view: View = field(default_factory=View, metadata={"help": "how the tiles of a draw are seen: one draw of the lot "
                                                       "for all of them"})
    stain: Path | None = field(default=None, metadata={
        "exists": True, "help": "what stain-fit found, for a view that moves stains by it",
        "otherwise": "; write it with: ssl-dist stain-fit FOLDER"})
    stage: int | None = _stage()
    precision: str = field(default="fp32", metadata={"choices": ("fp32", "bf16"), "help": "of the encoder"})
    seed: int = field(default=0, metadata={"range": (0, 2**63 - 1), "help": "of the tiles, and of the views"})
    tar_slides: int = field(default=32, metadata={"range": (1, 10**6), "help": "slides whose draws lie in one tar"})
    max_bad: int = field(default=100, metadata={"range": (0, 10**9), "help": "so many tiles may be unreadable, in all"})
    part: str = field(default="", metadata={**_SHARD["part"].metadata, "help": "i/n: only this part of the tars, 1/8 "
                                            "to 8/8 of an array job; a call without it publishes them"})
    device: str = field(default="auto", metadata={"choices": ("auto", "cpu", "cuda"), "help": "cuda: every GPU there is"
                                                  })
    threads: int = field(default=0, metadata={"range": (0, 1024), "help": "that draw views; 0: all cores"})

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        broken = absent(self.encoder)
        if self.view.count != 1:
            broken.append(f"view.count={self.view.count}: a draw is one view of each of its tiles; use draws=")
        if self.view.fitted and not self.stain:
            broken.append(f"view.{self.view.fitted}={getattr(self.view, self.view.fitted)!r} needs stain, the file "
                          "that `ssl-dist stain-fit FOLDER` writes")
        return [*broken, *_parted(self.part)]
