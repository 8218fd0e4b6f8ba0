"""Slides and pictures that are mapped whole: found by folder, file or pattern, opened, and read at one resolution."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards import sources, tiles
from shards.index import ShardError
from shards.settings import Settings
from shards.slide import Picture, Slide, SlideError
from shards.sources import Source

SLACK = 1.05            # by which a slide may be coarser than what is asked for


@dataclass
class Whole:
    """A slide or picture as it is mapped."""

    slide: Slide | Picture
    asked: float                # microns per pixel of the map; NaN: a picture's pixels as they are
    scale: float                # pixels of level 0 for each of the map
    size: tuple[int, int]       # of the map, rows and columns

    def read(self, left: int, top: int, wide: int, high: int) -> np.ndarray:
        """Pixels (high, wide, 3) of the map's own grid."""
        return self.slide.region(round(left * self.scale), round(top * self.scale), (wide, high), self.asked)


def found(places: list[str]) -> list[Source]:
    """The slides that are named; of a folder or pattern without one, its pictures. Two of one name are refused, for
    their files would be one."""
    reading = Settings(source=Path(), out=Path(), dataset="slides", kind="slides")
    some = []
    for place in places:
        try:
            some += sources.named([place], reading)
        except ShardError as error:
            try:
                some += sources.named([place], reading, sources.SUFFIXES["regions"])
            except ShardError:
                raise error from None
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
    try:
        return Slide(source.path, source.mpp, slide_mpp)
    except SlideError:
        if not source.file.lower().endswith(sources.SUFFIXES["regions"]):
            raise
        return tiles.picture(source, Settings(source=Path(), out=Path(), dataset="slides", kind="regions",
                                              slide_mpp=slide_mpp))
