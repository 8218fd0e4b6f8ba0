"""The files of a dataset, and what their names and a table tell of each before it is opened."""

import contextlib
import csv
import dataclasses
import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shards import arrays
from shards.index import ShardError
from shards.settings import WORDS, Settings
from shards.slide import dicom_series

SUFFIXES = {
    "slides": (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".dcm"),
    "regions": (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp"),
    "tiles": (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp"),
    "arrays": (".h5", ".hdf5"),
}
# Files, or rows of an array, that one worker takes at a time: some seconds of work, or some megabytes of pixels.
FILES_A_UNIT, ROWS_A_UNIT = 2000, 500
# How other pictures end: of those, a person would want to know that they are not taken.
PICTURES = {".czi", ".gif", ".gz", ".jp2", ".j2k", ".jxl", ".lif", ".npy", ".npz", ".qptiff", ".vsi", ".webp", ".zip",
            *(suffix for known in SUFFIXES.values() for suffix in known)}
MICRONS = (0.05, 100.0)
# TCGA-<tissue source site>-<participant>: the first three parts of a barcode name the patient.
TCGA = re.compile(r"TCGA-([A-Z0-9]{2})-[A-Z0-9]{4}(?![A-Z0-9])")


class NoSlides(ShardError):
    """A place where no slide is."""


@dataclass(frozen=True, slots=True)
class Source:
    """One slide, image, or piece of an array, and what is known of it before it is opened."""

    file: str                       # its path, as text: a million Path objects are heavy
    name: str                       # path below the source folder, without its suffix
    slide: str
    patient: str = ""
    site: str = ""
    split: str = ""
    label: str = ""
    mpp: float | None = None        # microns per pixel at level 0, where the header should not be asked
    rows: tuple[int, int] = (0, 0)  # of an array: first image and the one after the last

    @property
    def path(self) -> Path:
        """Where it lies."""
        return Path(self.file)

    @property
    def filename(self) -> str:
        """The last part of its path."""
        return self.file.rpartition("/")[2]


def sources(settings: Settings, remark: Callable[[str], None] = lambda text: None) -> list[Source]:
    """Every slide, image or array below the source folder, in the order of its path; `remark` is told what is odd.

    `names` is a regular expression searched in the path below the folder; its groups say what they say. A row of the
    table (slides.csv) goes before it, found by the file's name or by the slide that `names` found. A barcode of TCGA
    tells patient and site where nothing else does.
    """
    folder, suffixes = settings.source, SUFFIXES[settings.kind]
    if not folder.is_dir():
        raise ShardError(f"no source folder at {folder} (looked in {Path.cwd()}); set source= to the folder that holds "
                         "the slides or the tile images")
    path = settings.table or folder / "slides.csv"
    table = _table(path, settings.columns) if settings.kind != "arrays" else {}
    found: list[Source] = []
    used: set[str] = set()
    alone: list[str] = []               # files that no row of the table tells of
    begins: set[int] = set()            # hashes of what the keys of each file's tiles begin with
    ignored: Counter[str] = Counter()
    for file in files(folder, suffixes, settings.skip, ignored):
        source, row = _described(file, file[len(str(folder)):].lstrip("/"), settings, table)
        used |= row
        if table and not row:
            alone.append(source.filename)
        if (begin := hash(_begins(source, settings))) in begins:
            for other in found:
                if _begins(other, settings) == _begins(source, settings):
                    raise ShardError(f"{other.file} and {file} would be one to whoever trains on them: the tiles of "
                                     "both would have the same names; rename one, tell slides apart with names=, or "
                                     "shard the folders apart")
        begins.add(begin)
        found.append(source)
    if not found:
        raise ShardError(f"nothing to shard below {folder}: no file ends in {', '.join(suffixes)}"
                         + (f", or skip={settings.skip!r} leaves none" if settings.skip else ""))
    if table and not used:
        raise ShardError(f"no row of {path} belongs to a file: it says {next(iter(table))!r}, the first file is "
                         f"{found[0].path.name!r}; write the names of files or slides, or tell with columns= which "
                         "column holds them")
    unused = [name for name in table if name not in used]
    for what, odd in ((f"rows of {path} belong to no file", unused), (f"files have no row in {path}", alone)):
        if odd:
            remark(f"{len(odd)} {what}, first {odd[0]!r}")
    if ignored:
        told = ", ".join(f"{count} {suffix}" for suffix, count in sorted(ignored.items()))
        remark(f"files below {folder} that may be pictures and are not taken: {told}")
    if settings.kind == "arrays":
        found = [piece for source in found for piece in _pieces(source, settings.array)]
    return found


def named(places: list[str], settings: Settings, suffixes: tuple[str, ...] = SUFFIXES["slides"]) -> list[Source]:
    """The slides that folders, files and patterns name, each once and in the order of their names.

    A table slides.csv lies in the folder that is named, or beside the files.
    """
    tables: dict[Path, dict[str, dict[str, str]]] = {}
    found: dict[str, Source] = {}
    for place in places:
        for root, file in _named(place, settings.skip, suffixes):
            if root not in tables:
                tables[root] = _table(settings.table or root / "slides.csv", settings.columns)
            source, _ = _described(file, file[len(str(root)):].lstrip("/"), settings, tables[root])
            other = found.setdefault(source.slide, source)
            if not Path(other.file).samefile(file):
                raise ShardError(f"{other.file} and {file} would both be slide {source.slide!r}; rename one, or tell "
                                 "them apart with names=")
    return [found[slide] for slide in sorted(found)]


def _named(place: str, skip: str, suffixes: tuple[str, ...]) -> Iterator[tuple[Path, str]]:
    """The slides of one folder, file or pattern, each with the folder that its table would lie in."""
    path = Path(place).expanduser()
    if path.is_dir():
        there = [(path, file) for file in files(path, suffixes, skip)]
    elif path.is_file():
        there = [(path.parent, str(path))]
    else:
        matched = sorted(Path(name) for name in glob.glob(str(path), recursive=True))       # noqa: PTH207 - absolute too
        there = [(each.parent, str(each)) for each in matched if each.is_file() and not (
            skip and re.search(skip, each.name)) and each.name.lower().endswith(suffixes)]
        there += [(each, file) for each in matched if each.is_dir() and not each.with_suffix(".mrxs").is_file()
                  for file in files(each, suffixes, skip)]
    if not there:
        raise NoSlides(f"slides={place} names no slide (looked in {Path.cwd()}); name a folder, a file, or a pattern "
                       f"such as '/data/*.svs', of files that end in {', '.join(SUFFIXES['slides'])}")
    yield from there


def _begins(source: Source, settings: Settings) -> str:
    return source.slide if settings.kind == "slides" else key(*source.name.split("/"))


def files(folder: Path, suffixes: tuple[str, ...], skip: str = "", ignored: Counter[str] | None = None
          ) -> Iterator[str]:
    """Paths below `folder` that end so and that `skip` does not match, in order; of a DICOM series its first file.

    `ignored` counts others that may be pictures, by how they end.
    """
    series = set()
    for path, there in _walk(str(folder), frozenset()):
        name = path.rpartition("/")[2]
        if not name.lower().endswith(suffixes) or name.startswith("._"):    # what a Mac leaves beside a file it copied
            suffix = os.path.splitext(name)[1].lower()      # noqa: PTH122 - as text, see _walk
            if ignored is not None and suffix in PICTURES and not name.startswith("._"):
                ignored[suffix] += 1
            continue
        relative = path[len(str(folder)):].lstrip("/")
        if relative.encode(errors="ignore") != os.fsencode(relative):
            raise ShardError(f"{os.fsencode(relative)!r} is not a name in UTF-8; rename it, or move it out of {folder}")
        if skip and re.search(skip, relative):
            continue
        if not there:
            raise ShardError(f"{path} is a link to {Path(path).readlink()}, which is not there; mount its disk, or "
                             "remove the link")
        if name.lower().endswith(".dcm"):       # the levels of one slide are files of one series
            uid = dicom_series(Path(path))
            if uid in series:
                continue
            series.add(uid)
        yield path


def _walk(folder: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, bool]]:
    """Every file below as text, for a million Path objects are heavy; and whether it is there.

    Links are followed, but never in a ring; a link may lead nowhere.
    """
    known = Path(folder).stat()
    here = above | {(known.st_dev, known.st_ino)}
    if len(here) == len(above):
        raise ShardError(f"{folder} is a link to a folder that it lies in; remove it")
    with os.scandir(folder) as entries:
        inside = sorted(entries, key=lambda entry: entry.name)
    for entry in inside:
        folders = files = False
        with contextlib.suppress(OSError):      # a ring of links is neither
            folders, files = entry.is_dir(), entry.is_file()
        if folders:
            yield from _walk(entry.path, here)
        elif files:
            yield entry.path, True
        elif entry.is_symlink():
            yield entry.path, False


def units(settings: Settings, found: list[Source]) -> list[list[Source]]:
    """The pieces of work: a slide each, or some hundred files, always the same ones."""
    step = FILES_A_UNIT if settings.kind == "tiles" else 1
    return [found[first:first + step] for first in range(0, len(found), step)]


def key(*parts: str) -> str:
    """A name of [a-z0-9_-] and at most 80 letters; names that had to change carry a digest, so none fall together."""
    text = "-".join(parts)
    tame = re.sub(r"[^a-z0-9_-]+", "_", text.lower())
    if tame == text and len(tame) <= 80:
        return tame
    return f"{tame[:63]}-{hashlib.blake2b(text.encode(errors='surrogateescape'), digest_size=8).hexdigest()}"


def _described(file: str, relative: str, settings: Settings,
               table: dict[str, dict[str, str]]) -> tuple[Source, set[str]]:
    match = re.search(settings.names, relative) if settings.names else None
    if settings.names and match is None:
        raise ShardError(f"names={settings.names!r} does not match {relative!r}; correct the expression, leave the "
                         "file out with skip=, or move it out of the source folder")
    filename = file.rpartition("/")[2]
    stem = os.path.splitext(filename)[0]        # noqa: PTH122 - as text, see _walk
    known = {name: word for name, word in (match.groupdict() if match else {}).items() if word is not None}
    # The row of the slide, and over it the row of the file itself, which may be found by its whole path.
    names = [name for name in (known.get("slide", stem), stem, filename, relative) if name in table]
    for name in names:
        known.update(table[name])
    slide = known.get("slide", stem)
    barcode = TCGA.search(filename) or TCGA.search(slide)
    if barcode:
        known = {"patient": barcode[0], "site": barcode[1], **known}
    elif settings.kind == "slides":
        known.setdefault("patient", slide)      # a slide is of one patient; of a tile that says nothing it is unknown
    mpp = _microns(known["mpp"], file) if known.get("mpp") else None
    return Source(file=file, name=os.path.splitext(relative)[0], slide=slide,       # noqa: PTH122
                  patient=known.get("patient", ""), site=known.get("site", ""), split=known.get("split", ""),
                  label=known.get("label", ""), mpp=mpp), set(names)


def _pieces(source: Source, array: str) -> list[Source]:
    """An array file in pieces; its neighbours *_y.h5 hold labels and no images, and are none."""
    if source.path.stem.endswith("_y"):
        return []
    rows = arrays.length(source.path, array)
    return [dataclasses.replace(source, rows=(first, min(first + ROWS_A_UNIT, rows)))
            for first in range(0, rows, ROWS_A_UNIT)]


def _microns(word: str, path: str) -> float:
    low, high = MICRONS
    with contextlib.suppress(ValueError):
        if low <= (value := float(word)) <= high:
            return value
    raise ShardError(f"mpp={word!r} of {path} is not a number of microns per pixel ({low} to {high}); correct it in "
                     "the table or names=")


def _table(path: Path, columns: dict[str, str]) -> dict[str, dict[str, str]]:
    """Rows by the name of their file or slide, in our words."""
    if not path.is_file():
        return {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:      # spreadsheets put a mark before the first word
            rows = list(csv.DictReader(handle, skipinitialspace=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ShardError(f"{path} is not a table in UTF-8 ({error}); export it again as CSV UTF-8") from None
    if not rows:
        return {}
    if overlong := [number for number, row in enumerate(rows, start=2) if None in row]:
        raise ShardError(f"{path} has more cells in line {overlong[0]} than in its first line; put words with "
                         "commas in quotes, and save it with commas")
    if missing := [name for name in columns.values() if name not in rows[0]]:
        raise ShardError(f"{path} has no column {missing[0]!r} (it has {', '.join(rows[0])}); correct columns=")
    ours = {**{word: word for word in (*WORDS, "file")}, **columns}
    name = next((ours[word] for word in ("file", "slide") if ours[word] in rows[0]), None)
    if name is None:
        raise ShardError(f"{path} has no column 'slide' or 'file' (it has {', '.join(rows[0])}); add one, or say which "
                         "it is: columns={slide: NAME}")
    table: dict[str, dict[str, str]] = {}
    for row in rows:
        row[name] = (row[name] or "").strip()
        if row[name] in table:
            raise ShardError(f"{path} has more than one row for slide {row[name]!r}; keep the one that is right")
        # The column that the rows are found by names files, perhaps with their suffix: it renames no slide.
        table[row[name]] = {word: row[ours[word]].strip() for word in WORDS
                            if (row.get(ours[word]) or "").strip() and ours[word] != name}
    return table
