"""Datasets as files: what each is, how sure we are, how its files and patients are named; and jobs over many of them.

A record is one YAML file, named as the dataset is:

    title: BACH / ICIAR2018 (microscopy images)
    facts:                                              # what we know, how sure we are, and where it is from
      licence: [CC BY-NC-ND 4.0, quoted, eva]           # confirmed: seen in a primary place; quoted: by another;
      ...                                               # unverified: neither
    shard:                                              # what a shard job is told of it: keys of `settings.Settings`
      kind: regions
      names: 'Photos/(?P<label>Normal|Benign|InSitu|Invasive)/'
    example:                                            # files as they lie, and what is known of each from its name
      Photos/Benign/b001.tif: {label: Benign}           # other values: skipped; or, of a table, its text
"""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from shards.settings import CUT, WORDS, Settings

EVIDENCE = ("confirmed", "quoted", "unverified")
FACTS = ("organ", "stain", "mpp", "kind", "size", "task", "licence", "where", "layout", "labels", "patients",
         "membership")
KEYS = ("title", "folder", "facts", "shard", "example")
UNKNOWN = "unknown"
NAME = r"[a-z0-9_-]{1,40}"
# What a job says and not a record: where things are, and how this machine writes them.
NOT_OF_A_RECORD = ("source", "out", "dataset", "against", "part", "workers")
SETTINGS = {each.name: each for each in fields(Settings)}
# A sample is drawn to this part of a source's resolution before it counts as coarser; as where slides are cut.
COARSER = 0.95


class RecordError(ValueError):
    """One or more mistakes in a record, a line each."""

    exit_code = 2

    def __init__(self, problems: list[str]):
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


class Fact(NamedTuple):
    """Something said of a dataset."""

    value: str
    evidence: str               # one of EVIDENCE
    source: str                 # a mark that the README of the records explains


@dataclass(frozen=True)
class Record:
    """What one file says of one dataset."""

    name: str
    title: str
    folder: str                 # below the root of all datasets
    facts: dict[str, Fact]
    shard: dict[str, Any]
    example: dict[str, Any]
    path: Path                  # of the file

    @property
    def kind(self) -> str:
        """Of what the files are, as a shard job is told it."""
        return self.shard.get("kind", "slides")

    def fact(self, name: str) -> str:
        """What is said of it, or "unknown"."""
        return self.facts[name].value if name in self.facts else UNKNOWN

    def said(self, name: str) -> str:
        """The same, with a word of warning where nobody can be quoted."""
        doubt = self.fact(name) != UNKNOWN and self.facts[name].evidence == "unverified"
        return f"{self.fact(name)} (unverified)" if doubt else self.fact(name)


@dataclass
class Look:
    """`ssl-dist datasets`."""

    root: Path | None = field(default=None, metadata={"exists": True, "help": "folder of the datasets' folders"})
    records: Path | None = field(default=None, metadata={"exists": True, "help": "folder of records of your own"})


@dataclass
class Many:
    """One shard job a dataset that lies under the root, each into its own folder."""

    root: Path = field(metadata={"exists": True, "help": "folder of the datasets' folders"})
    out: Path = field(metadata={"help": "folder of the shard folders to write"})
    records: Path | None = field(default=None, metadata={
        "exists": True, "help": "folder of records of your own, on top of those that come along"})
    only: list[str] = field(default_factory=list, metadata={"help": "names of datasets; empty: all that are present"})
    # What is cut, slides and regions; what is not set stands in the record.
    size: int | None = field(default=None, metadata=SETTINGS["size"].metadata)
    mpp: list[float] | None = field(default=None, metadata=SETTINGS["mpp"].metadata)
    max_tiles: int | None = field(default=None, metadata=SETTINGS["max_tiles"].metadata)
    min_tissue: float | None = field(default=None, metadata=SETTINGS["min_tissue"].metadata)
    # How any of them is written.
    duplicates: str = field(default="drop", metadata={
        "choices": ("drop", "keep"), "help": "of tiles equal within or across datasets, keep the first or all"})
    quality: int | None = field(default=None, metadata=SETTINGS["quality"].metadata)
    subsampling: str | None = field(default=None, metadata=SETTINGS["subsampling"].metadata)
    tar_samples: int | None = field(default=None, metadata=SETTINGS["tar_samples"].metadata)
    seed: int | None = field(default=None, metadata=SETTINGS["seed"].metadata)
    workers: int | None = field(default=None, metadata=SETTINGS["workers"].metadata)
    max_failed: int | None = field(default=None, metadata=SETTINGS["max_failed"].metadata)


CUTTING = ("size", "max_tiles", "min_tissue")
WRITING = ("duplicates", "quality", "subsampling", "tar_samples", "seed", "workers", "max_failed")


def holds(path: Path) -> str:
    """What a config of a shard job holds: "record" (of a dataset), "many" (a job over records), or "job"."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return "job"            # whoever reads it next says what is wrong
    keys = content.keys() if isinstance(content, dict) else ()
    return "record" if "title" in keys else "many" if "records" in keys else "job"


def records(*folders: Path | None) -> dict[str, Record]:
    """The records in some folders by name, in the order of the names; of two with one name the later folder's."""
    found, problems = {}, []
    for folder in folders:
        paths = sorted(folder.glob("*.yaml")) if folder else []
        if folder and not paths:
            problems.append(f"{folder} holds no record: no file there ends in .yaml")
        for path in paths:
            try:
                found[path.stem] = read(path)
            except RecordError as error:
                problems += error.problems
    if problems:
        raise RecordError(problems)
    return dict(sorted(found.items()))


def read(path: Path) -> Record:
    """The record in a file, or a RecordError that lists all that is wrong with it."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecordError([f"{path} is not YAML: {' '.join(str(error).split())}"]) from None
    if not isinstance(content, dict):
        raise RecordError([f"{path} holds no keys and values; a record begins with title:"])
    if problems := [f"{problem} [{path}]" for problem in _problems(path.stem, content)]:
        raise RecordError(problems)
    return Record(path.stem, content["title"], content.get("folder", path.stem),
                  {name: Fact(*fact) for name, fact in (content.get("facts") or {}).items()},
                  content["shard"], content.get("example") or {}, path)


def _problems(name: str, content: dict[str, Any]) -> Iterator[str]:
    if not re.fullmatch(NAME, name):
        yield f"the name {name!r} of the file must match {NAME}: it becomes the name of the dataset"
    for key in content.keys() - set(KEYS):
        yield f"{key} is not a key{_nearest(key, KEYS)}"
    for key in ("title", "shard"):
        if key not in content:
            yield f"{key} is not set; a record needs it"
    for key in ("title", "folder"):
        if not isinstance(content.get(key, ""), str):
            yield f"{key}={content[key]!r} is not a word; put it in quotes"
    for key in ("facts", "shard", "example"):
        if not isinstance(content.get(key) or {}, dict):
            yield f"{key}={content[key]!r} is not a group of keys and values"
        else:
            yield from {"facts": _of_facts, "shard": _of_shard, "example": _of_example}[key](content.get(key) or {})


def _of_facts(facts: dict[str, Any]) -> Iterator[str]:
    for name, fact in facts.items():
        if name not in FACTS:
            yield f"facts.{name} is not a fact that we list{_nearest(name, FACTS)}"
        elif not (isinstance(fact, list) and len(fact) == 3 and all(isinstance(word, str) for word in fact)):
            yield f"facts.{name}={fact!r} is not [what, how sure, where from], three words"
        elif fact[1] not in EVIDENCE:
            yield f"facts.{name}: {fact[1]!r} is not one of {', '.join(EVIDENCE)}{_nearest(fact[1], EVIDENCE)}"


def _of_shard(shard: dict[str, Any]) -> Iterator[str]:
    for name, value in shard.items():
        if name in NOT_OF_A_RECORD:
            yield f"shard.{name} is not for a record to say; give it to the job: {name}=..."
        elif name not in SETTINGS:
            yield f"shard.{name} is not a key{_nearest(name, SETTINGS)}"
        elif (choices := SETTINGS[name].metadata.get("choices")) and value not in choices:
            yield f"shard.{name}={value!r} is not one of {', '.join(choices)}"
        elif SETTINGS[name].metadata.get("regex"):
            try:
                re.compile(value)
            except (re.error, TypeError) as error:
                yield f"shard.{name}={value!r} is not a regular expression: {error}"


def _of_example(example: dict[str, Any]) -> Iterator[str]:
    for path, value in example.items():
        if isinstance(value, str):
            continue            # "skipped", or the text of a table
        if not isinstance(value, dict) or (value.keys() - set(WORDS)):
            yield f"example.{path}={value!r} is neither skipped, nor a text, nor a group of {', '.join(WORDS)}"


def _nearest(word: Any, known: Any) -> str:
    close = difflib.get_close_matches(str(word).lower(), known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(known)}"


def present(record: Record, root: Path) -> int:
    """How many files of the dataset lie below `root`/its folder; 0 where the folder is missing too."""
    # It brings OpenSlide and HDF5 along, which a list without a root can do without.
    from shards import sources

    folder = root / record.folder
    return sum(1 for _ in sources.files(folder, sources.SUFFIXES[record.kind], record.shard.get("skip", ""))
               ) if folder.is_dir() else 0


def job(record: Record, source: Path | None) -> dict[str, Any]:
    """What a shard job of one dataset is told: the keys of Settings that the record decides."""
    values: dict[str, Any] = {
        "dataset": record.name, "organ": record.fact("organ"), "stain": record.fact("stain"),
        "licence": record.said("licence"), "about": f"{record.title}; {record.fact('where')}", **record.shard}
    if source:
        values["source"] = str(source)
    if "table" in values:       # published below the dataset's folder, at a depth that depends on who unpacked it
        name = values.pop("table")
        beside = record.path.with_name(name)        # or ours: a split that stands in no file of the dataset
        tables = [*(sorted(source.rglob(name)) if source else []), *([beside] if beside.is_file() else [])]
        if tables:
            values["table"] = str(tables[0])
        else:
            values.pop("columns", None)     # they are that table's, and not those of a slides.csv that may lie there
    return values


def chosen(many: Many, listed: dict[str, Record]) -> dict[str, Record]:
    """The records that the job names, or all."""
    if unknown := [name for name in many.only if name not in listed]:
        raise RecordError([f"only: {name!r} is no dataset that has a record{_nearest(name, listed)}"
                           for name in unknown])
    return {name: record for name, record in listed.items() if name in many.only or not many.only}


def jobs(many: Many, listed: dict[str, Record], names: list[str]) -> Iterator[dict[str, Any]]:
    """What the job of each of these datasets is told, each to be done before the next is asked for.

    The first that holds a tile keeps it: each is held against all of `listed` that are finished by then, and one that
    is finished itself against those that it was held against, so that a dataset more does not undo what is there.
    """
    for name in names:
        values = job(listed[name], many.root / listed[name].folder)
        cut = listed[name].kind in CUT
        values.update({key: value for key in (*WRITING, *(CUTTING if cut else ()))
                       if (value := getattr(many, key)) is not None})
        if cut and many.mpp:
            values["mpp"] = _resolutions(listed[name], many.mpp)
        values["out"] = str(many.out / name)
        if many.duplicates == "drop":
            values["against"] = [str(many.out / other) for other in _earlier(name, many.out, listed)]
        yield values


def _resolutions(record: Record, asked: list[float]) -> list[float]:
    """The asked ones; of regions those they hold, and where they hold or tell none, none: cut at their own pixels."""
    own = record.shard.get("slide_mpp")
    return asked if record.kind == "slides" else [mpp for mpp in asked if own and mpp >= COARSER * own]


def _earlier(name: str, out: Path, listed: dict[str, Record]) -> list[str]:
    """The datasets that this one is held against: those finished by now, or by the time it was."""
    from shards import index

    done = [other for other in listed if (out / other / "index.json").is_file()]
    if name not in done:
        return done
    return [other for other in done if other in index.read(out / name).settings.get("against", [])]

