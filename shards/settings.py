"""What a shard job is told: one dataclass, whose fields say what may stand in a config."""

import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

# What the groups of names=, or the columns of a table, may tell of a file.
WORDS = ("slide", "patient", "site", "split", "label", "mpp")
CUT = ("slides", "regions")     # kinds that are cut into tiles; the others are tiles already
OF_CUTTING = ("size", "slide_mpp", "power", "passthrough", "max_tiles", "min_tissue", "min_contrast", "min_focus",
              "max_pen", "max_blood", "labels", "inside", "min_label", "annotations")

# What may differ between two calls that must write the same bytes.
FREE = ("out", "workers", "part", "max_failed", "unit_seconds", "unit_memory_gb", "table")


def _key(default: Any, help: str, **limits: Any) -> Any:
    kind = {"default_factory": default} if callable(default) else {"default": default}
    return field(**kind, metadata={"help": help, **limits})


@dataclass
class Settings:
    """One dataset into one shard folder. All but FREE decides the bytes."""

    # what there is
    source: Path = field(metadata={"help": "folder of slides, images or arrays", "exists": True})
    out: Path = field(metadata={"help": "shard folder to write"})
    dataset: str = field(metadata={"help": "name of the dataset", "pattern": "[a-z0-9_-]{1,40}"})
    kind: str = _key("slides", "slides, or regions (images) to cut; tiles (images), or arrays (HDF5), as they are",
                     choices=("slides", "regions", "tiles", "arrays"))
    skip: str = _key("", "a regular expression: paths that are not images of the set, such as masks", regex=True)
    names: str = _key("", f"a regular expression with groups {', '.join(WORDS)}, searched in each path", regex=True)
    table: Path | None = _key(None, "CSV, a row a slide or file; default: slides.csv in the source", exists=True)
    columns: dict[str, str] = _key(dict, "what the table calls our words, or file: {slide: image_id, label: grade}")
    array: str = _key("x", "the images in an HDF5 file; labels: y, in the same file or in its neighbour *_y.h5")

    # where to cut
    size: int = _key(256, "tile width, pixels", range=(16, 4096))
    mpp: list[float] = _key(list, "microns per pixel of a tile, or several; of tiles: what they have",
                            range=(0.05, 100), one=True)
    slide_mpp: float | None = _key(None, "of slides and regions that do not say it", range=(0.05, 5))
    power: bool = _key(False, "where a slide says only its objective's power, take 10/power for its microns")
    passthrough: bool = _key(True, "take a slide's own JPEG tiles as they are where they are what is asked for")
    max_tiles: int | None = _key(None, "at most so many of a slide and mpp, as if drawn by lot", range=(1, 10**9))

    # what to leave out
    min_tissue: float = _key(0.5, "fraction of a tile that must lie on tissue", range=(0, 1))
    min_contrast: float = _key(3.0, "standard deviation of grey (of 255) below which a tile shows nothing",
                               range=(0, 255))
    min_focus: float = _key(0.5, "sharpness below which a tile of 96 px or more is blurred; 0 keeps all",
                            range=(0, 100))
    max_pen: float = _key(0.1, "fraction of a tile that may be a marker's ink", range=(0, 1))
    max_blood: float = _key(1.0, "fraction of a tile that may be saturated red: blood, and strongly stained bone or "
                                 "muscle, which are kept by default", range=(0, 1))
    duplicates: str = _key("drop", "of equal tiles, keep the first or all", choices=("drop", "keep"))
    conflicts: str = _key("drop", "of equal tiles with different labels, keep none, or the first",
                          choices=("drop", "first"))
    against: list[Path] = _key(list, "finished shard folders whose tiles are not to be written again", exists=True)

    # what it means
    labels: str = _key("names", "from names= and the table, or from a pathologist's annotations",
                       choices=("names", "annotations"))
    inside: bool = _key(False, "leave out what lies in no annotation")
    min_label: float = _key(0.75, "fraction of a tile that an annotation must cover", range=(0, 1))
    annotations: Path | None = _key(None, "folder of the annotations; default: beside each slide", exists=True)
    organ: str = _key("unknown", "organ, for the dataset card")
    stain: str = _key("H&E", "stain, for the dataset card")
    licence: str = _key("unknown", "licence, for the dataset card")
    about: str = _key("", "one line on where the data comes from")

    # how to write
    quality: int = _key(90, "JPEG quality of tiles we encode", range=(50, 100))
    subsampling: str = _key("4:4:4", "of the colour; the stain lives in it", choices=("4:4:4", "4:2:0"))
    tar_samples: int = _key(5000, "about this many tiles a tar", range=(1, 100_000))
    seed: int = _key(0, "of the shuffle", range=(0, 2**63 - 1))
    workers: int = _key(0, "processes; 0: one a core", range=(0, 1024))
    part: str = _key("", "i/n: cut only this part, 1/8 to 8/8 of an array job; a call without it publishes",
                     pattern=r"(\d+/\d+)?")
    max_failed: int = _key(0, "slides that may fail before we stop", range=(0, 10**9))
    unit_seconds: float = _key(3600.0, "a slide that takes longer has failed", range=(0.1, 10**6))
    unit_memory_gb: float = _key(8.0, "a slide that takes more memory has failed", range=(0.25, 4096))

    def __post_init__(self) -> None:
        if isinstance(self.mpp, int | float):       # one value stands for a list of one, as in a config
            self.mpp = [float(self.mpp)]

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        problems = []
        if self.kind == "slides" and not self.mpp:
            problems.append("mpp is not set: slides are cut at a resolution you name, in microns per pixel (0.5 is "
                            "20x)")
        if len({round(mpp * 1000) for mpp in self.mpp}) < len(self.mpp):
            problems.append(f"mpp={self.mpp} names one resolution twice, to a thousandth of a micron")
        if self.kind not in CUT:
            plain = {each.name: each.default for each in fields(self)}
            problems += [f"{name}={getattr(self, name)!r} belongs to slides and regions, not to kind={self.kind!r}"
                         for name in OF_CUTTING if getattr(self, name) != plain[name]]
            if len(self.mpp) > 1:
                problems.append(f"mpp={self.mpp}: tiles have one resolution, and are not cut to another; name one")
        out, source = Path(self.out).resolve(), Path(self.source).resolve()
        if out == source or source in out.parents:
            problems.append(f"out={self.out} lies inside source={self.source}: the next call would take our pictures "
                            "for tiles; choose an out elsewhere")
        if self.part:
            number, of = map(int, self.part.split("/"))
            if not 1 <= number <= of:
                problems.append(f"part={self.part!r} is none of 1/{of} to {of}/{of}")
        problems += [f"columns.{word}={name!r} is not the name of a column" for word, name in self.columns.items()
                     if not isinstance(name, str)]
        unknown = [*(re.compile(self.names).groupindex.keys() - {*WORDS}), *(self.columns.keys() - {*WORDS, "file"})]
        problems += [f"{name!r} is not a word that we know of a file: {', '.join(WORDS)}" for name in unknown]
        return problems

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the bytes, as JSON holds them; of paths only the name, for folders move."""
        values = {name: value for name, value in asdict(self).items() if name not in FREE}
        return {**values, "source": self.source.resolve().name, "against": [path.name for path in self.against],
                "annotations": self.annotations.name if self.annotations else None}
