"""Slides and pictures that are mapped whole: found by folder, file or pattern, opened, and read at one resolution; each
once, whatever becomes of the others.

    OUT/.done/SLIDE.json    of a slide that is done: its row, its files, and all that these were made by
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards import folder, sources, tiles
from shards.index import ShardError
from shards.jpeg import JpegError
from shards.settings import Settings
from shards.slide import Picture, Slide, SlideError
from shards.sources import NoSlides, Source

SLACK = 1.05            # by which a slide may be coarser than what is asked for
DONE = ".done"


@dataclass
class Whole:
    """A slide or picture as it is mapped."""

    slide: Slide | Picture
    asked: float                # microns per pixel of the map; NaN: a picture's pixels as they are
    scale: float                # pixels of level 0 for each of the map
    size: tuple[int, int]       # of the map, rows and columns

    def read(self, left: int, top: int, wide: int, high: int) -> np.ndarray:
        """Pixels (high, wide, 3) of the map's own grid."""
        with _readable(self.slide.path):
            return self.slide.region(round(left * self.scale), round(top * self.scale), (wide, high), self.asked)


def found(places: list[str]) -> list[Source]:
    """The slides that are named; of a folder or pattern without one, its pictures. Two of one name are refused, for
    their files would be one."""
    reading = Settings(source=Path(), out=Path(), dataset="slides", kind="slides")
    some = []
    for place in places:
        try:
            some += sources.named([place], reading)
        except NoSlides as error:
            try:
                some += sources.named([place], reading, sources.SUFFIXES["regions"])
            except NoSlides:
                raise NoSlides(f"{error}; or of pictures, {', '.join(sources.SUFFIXES['regions'])}") from None
    names: dict[str, str] = {}
    for each in some:
        if names.setdefault(each.slide, each.file) != each.file:
            raise ShardError(f"{names[each.slide]} and {each.file} are both called {each.slide!r}, and what is written "
                             "of one would be written over the other's; rename one, or call for each with another out=")
    return list({each.file: each for each in some}.values())


@contextmanager
def opened(source: Source, asked: float, slide_mpp: float | None) -> Iterator[Whole]:
    """A slide at `asked` microns per pixel; a picture too, where it is known of which it is, and else as it is."""
    with _opened(source, slide_mpp) as slide:
        if np.isfinite(slide.mpp) and not np.isfinite(asked):
            raise ShardError(f"at how many microns per pixel {slide.path} is to be mapped is not known; say mpp=0.25, "
                             "or what the network was taught at")
        scale = asked / slide.mpp if np.isfinite(slide.mpp) else 1.0
        if scale < 1 / SLACK:
            raise SlideError(f"{slide.path} has {slide.mpp:g} µm/px, and maps are asked for at {asked:g}: what is not "
                             f"in it cannot be read; mpp={slide.mpp:g} takes it as it is")
        yield Whole(slide, asked if np.isfinite(slide.mpp) else slide.mpp, scale,
                    (max(1, round(slide.height / scale)), max(1, round(slide.width / scale))))


def _opened(source: Source, slide_mpp: float | None) -> Slide | Picture:
    with _readable(source.path):
        try:
            return Slide(source.path, source.mpp, slide_mpp)
        except SlideError:
            if not source.file.lower().endswith(sources.SUFFIXES["regions"]):
                raise
            return tiles.picture(source, Settings(source=Path(), out=Path(), dataset="slides", kind="regions",
                                                  slide_mpp=slide_mpp))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What cannot be read or decoded is the slide's failure; what cannot be written is the call's."""
    try:
        yield
    except (OSError, JpegError) as error:
        raise SlideError(f"{path} cannot be read ({error})") from error


def tried(some: list[Source], asked: float, slide_mpp: float | None,
          refuse: Callable[[Source, Whole], None] = lambda *_: None) -> list[str]:
    """Opens each before the first is mapped; what is wrong with those that cannot be read. `refuse` raises what nothing
    can be done with."""
    doubts: list[str] = []
    for source in some:
        try:
            with opened(source, asked, slide_mpp) as whole:
                refuse(source, whole)
        except SlideError as error:
            doubts.append(f"{source.slide}: {error}")
    return doubts


def rows(some: list[Source], out: Path, told: dict[str, Any], do: Callable[[Source], dict[str, Any]],
         files: Callable[[Source], list[str]]) -> list[dict[str, Any]]:
    """A row a slide. What a call before has done of the same file and by all the same (`told`) is not done again; the
    row of one that cannot be read is its error, and the next call tries it again."""
    own_places = {source.path.resolve() for source in some}
    if over := [out / name for source in some for name in files(source) if (out / name).resolve() in own_places]:
        raise ShardError(f"{over[0]} is to be mapped, and its map would be written over it; choose another out=")
    found = []
    for source in some:
        note = folder.make(out / DONE) / f"{source.slide}.json"
        own, names = {**told, "file": _stamp(source)}, files(source)
        if (row := _noted(note, own, names, out)) is None:
            for name in _written(note):     # made otherwise, or of another file
                (out / name).unlink(missing_ok=True)
            note.unlink(missing_ok=True)
            try:
                row = do(source)
            except SlideError as error:
                row = {"slide": source.slide, "error": str(error)}
            else:
                folder.write_json(note, {"told": own, "files": names, "row": row})
        found.append(row)
    return found


def _stamp(source: Source) -> list[Any]:
    """Where a file lies, what changes when it does (of a folder nothing), and what a table says of it."""
    told = [str(source.path.absolute()), source.mpp]
    with suppress(OSError):
        known = source.path.stat()
        told += [known.st_size, known.st_mtime_ns] if source.path.is_file() else []
    return told


def _noted(note: Path, told: dict[str, Any], names: list[str], out: Path) -> dict[str, Any] | None:
    """The row of a slide that is done, and whose files are there."""
    try:
        known = json.loads(note.read_text())
        if known["told"] == json.loads(json.dumps(told)) and known["files"] == names and all(
                (out / name).is_file() for name in names):
            return dict(known["row"])
    except (OSError, ValueError, TypeError, KeyError):
        pass
    return None


def _written(note: Path) -> list[str]:
    """The files that an earlier call wrote of a slide."""
    try:
        return [name for name in json.loads(note.read_text())["files"] if Path(name).name == name]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def failed(told: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a result: the slides that could not be read, and a warning of each."""
    broken = [row for row in told if "error" in row]
    return {"failed": [row["slide"] for row in broken],
            "warnings": [f"{row['slide']} cannot be read, and has no files: {row['error']}" for row in broken]}
