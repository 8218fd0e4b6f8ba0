"""The first phase: every slide in a process of its own, with limits; a slide that fails does not end the job.

What a process leaves is a unit in the spool, whole or absent. So a job that is called again, or in parts on many
machines, goes on with the units that are missing.
"""

import contextlib
import errno
import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from shards import annotation, folder, show, spool, tiles, tissue
from shards.folder import StorageError
from shards.index import ShardError
from shards.settings import CUT, Settings
from shards.slide import ASSUMED_MPP, Picture, Slide, SlideError
from shards.sources import Source, key
from shards.tiles import Rejected, Tile

Progress = Callable[[str, int, int], None]      # what is being done, how many are done, of how many

GIGA = 1 << 30


class Crashed(ShardError):
    """A process that ended without a word: perhaps because of its slide, perhaps because somebody ended it."""


class Running(NamedTuple):
    """A unit at work."""

    process: ForkServerProcess
    says: Connection
    until: float


def processes() -> ForkServerContext:
    """Processes that start quickly, from one that has imported everything and holds no thread or lock."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["shards.cut"])
    return context


def cores(settings: Settings) -> int:
    """How many processes the job may have."""
    return settings.workers or len(os.sched_getaffinity(0))


def all_units(units: list[list[Source]], settings: Settings, work: Path, progress: Progress) -> list[Rejected]:
    """Cuts what is missing of the units (of this part of them); returns the slides and files that failed."""
    number, of = map(int, settings.part.split("/")) if settings.part else (1, 1)
    mine = range(number - 1, len(units), of)
    waiting = [unit for unit in mine if not spool.done(work, unit)]
    what = "cutting slides" if settings.kind in CUT else "reading images"
    progress(what, len(mine) - len(waiting), len(mine))
    waiting.reverse()
    failed: list[Rejected] = []
    skipped: dict[int, dict[int, str]] = {}         # unit -> files in it that end their process, and how
    running: dict[int, Running] = {}
    crashed: set[int] = set()
    context = processes()
    try:
        while waiting or running:
            while waiting and len(running) < cores(settings):
                unit = waiting.pop()
                running[unit] = _start(context, units[unit], unit, settings, work, skipped.get(unit, {}))
            for unit, error in _ended(running, settings, work):
                if isinstance(error, StorageError):
                    raise _in_need(error, units, work)
                if error is None:
                    progress(what, len(mine) - len(waiting) - len(running), len(mine))
                    continue
                if isinstance(error, Crashed) and unit not in crashed:
                    crashed.add(unit)           # once is no proof against the slide
                    waiting.append(unit)
                    continue
                at = _at(work, unit) if settings.kind == "tiles" else 0
                if settings.kind == "tiles":        # once more, without the file that did it
                    if at in skipped.setdefault(unit, {}):
                        raise error
                    skipped[unit][at] = str(error)
                    waiting.append(unit)
                source = units[unit][at]
                text = str(error) if source.file in str(error) else f"{source.file}: {error}"
                if settings.kind == "arrays":
                    text += f" (its images {source.rows[0]} to {source.rows[1] - 1})"
                failed.append(Rejected(source, "failed", text.replace(source.file, source.filename)))
                if len(failed) > settings.max_failed:
                    raise ShardError(f"{text} [{len(failed)} failed, max_failed={settings.max_failed}]")
                progress(what, len(mine) - len(waiting) - len(running), len(mine))
    finally:        # whatever ended the job, no process of it goes on
        for left in running.values():
            left.process.kill()
            left.process.join()
    # A file that ended its process stands in its unit's own list already.
    return [] if settings.kind == "tiles" else failed


def _start(context: ForkServerContext, unit: list[Source], number: int, settings: Settings, work: Path,
           skip: dict[int, str]) -> Running:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(unit, number, settings, work, skip, theirs), daemon=True)
    process.start()
    theirs.close()
    return Running(process, ours, time.monotonic() + settings.unit_seconds)


def _ended(running: dict[int, Running], settings: Settings, work: Path) -> Iterator[tuple[int, Exception | None]]:
    """Waits until a unit ends or is ended; yields each such unit and its error."""
    wait = min(each.until for each in running.values()) - time.monotonic()
    multiprocessing.connection.wait([each.process.sentinel for each in running.values()], max(wait, 0))
    for unit, each in list(running.items()):
        late = time.monotonic() > each.until
        if each.process.is_alive() and not late:
            continue
        if late and each.process.is_alive():
            each.process.kill()
        each.process.join()
        del running[unit]
        error: Exception | None = None
        if not spool.done(work, unit):
            error = said(each.says)
            if error is None and late:
                error = ShardError(f"not done after {settings.unit_seconds:g} s: it was stopped; look at it, or "
                                   "give it longer with unit_seconds=")
            error = error or crash(each.process)
        each.says.close()
        yield unit, error


def said(says: Connection) -> Exception | None:
    """The last word of a process, if it had one."""
    with contextlib.suppress(EOFError, OSError):        # it died before, or while it spoke
        if says.poll():
            return says.recv()
    return None


def crash(process: ForkServerProcess) -> Exception:
    """Why a process ended that said nothing; raises where its slide is not to blame."""
    code = process.exitcode or 0
    if code == 255:         # what multiprocessing says where it cannot know
        raise ShardError("the process that starts the others has ended, killed from outside or for want of memory; "
                         "call again to go on")
    if code > 0:
        raise ShardError(f"a process ended before it began (exit code {code}); a script that calls write() itself lies "
                         "in a file and does so below `if __name__ == \"__main__\":`")
    return Crashed(f"its reader crashed twice, now with {signal.Signals(-code).name}: the file is damaged, or memory "
                   "ran out")


def _at(work: Path, unit: int) -> int:
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int(spool.path(work, unit, "at").read_text())
    return 0


def _in_need(error: StorageError, units: list[list[Source]], work: Path) -> StorageError:
    """The error, and where the disk is full, how much the whole job would take."""
    if error.errno != errno.ENOSPC:
        return error
    found = [spool.Unit(work, unit).bytes for unit in range(len(units)) if spool.done(work, unit)]
    if not found:
        return error
    needed = 2 * sum(found) / len(found) * len(units)       # the spool, and the tars made from it
    return StorageError(error.errno, f"{error}; the whole job takes about {needed / GIGA:.1f} GiB, half of it until "
                                     "its end. What is done is kept: call again to go on")


def refused(found: list[Source], settings: Settings, progress: Progress) -> Iterator[str]:
    """Why slides would fail that can be opened in a moment to find out: a line each."""
    for number, source in enumerate(found if settings.kind == "slides" else (), start=1):
        try:
            with opened(source, settings):
                if settings.labels == "annotations" or settings.inside:
                    annotation.find(source.path, settings.annotations)
        except (SlideError, ShardError) as error:
            yield str(error)
        progress("opening slides", number, len(found))


# --- in the process of a unit


def end_with_parent() -> None:
    """Ends this process with its job, for it would work on beside the next one."""
    def watch() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is for the job, which ends its processes itself
    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def answering(settings: Settings, says: Connection) -> Iterator[None]:
    """Sets the limits of a process, and turns what goes wrong in it below into its last word."""
    end_with_parent()
    warnings.filterwarnings("ignore", module="PIL")     # what is odd about a picture is in its line, with its name
    try:
        limit, hard = int(settings.unit_memory_gb * GIGA), resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))        # memory of our own, not files that are mapped
        yield
    except MemoryError:
        says.send(ShardError(f"took more than unit_memory_gb={settings.unit_memory_gb:g} of memory; give it more, or "
                             "look at it"))
    except StorageError as error:       # of what we write: the job's concern, and not the slide's
        says.send(error)
    except Exception as error:
        says.send(ShardError(str(error) if hasattr(error, "exit_code") else f"{type(error).__name__}: {error}"))


def _work(unit: list[Source], number: int, settings: Settings, work: Path, skip: dict[int, str],
          says: Connection) -> None:
    with answering(settings, says):
        cut(unit, number, settings, work, skip)


def cut(unit: list[Source], number: int, settings: Settings, work: Path, skip: dict[int, str]) -> None:
    """One unit of work into the spool."""
    with _writing(work):
        writer = spool.Writer(work, number, cut=settings.kind in CUT, memory_gb=settings.unit_memory_gb)
    try:
        if settings.kind in CUT:
            mpp = _slide(unit[0], writer, settings)
        else:
            mpp = None
            for item in _files(unit, number, settings, work, skip):
                _take(item, writer, settings)
        with _writing(work):
            writer.close(mpp)
    finally:
        writer.discard()


@contextlib.contextmanager
def _writing(work: Path) -> Iterator[None]:
    """Whatever the system refuses below is the job's storage, with advice where we have some."""
    try:
        with folder.storage(work):
            yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(error.errno or errno.EIO, f"{error.filename or work} cannot be written: {error.strerror}"
                           ) from None


def _take(item: Tile | Rejected, writer: spool.Writer, settings: Settings) -> None:
    if isinstance(item, Tile):
        with _writing(writer.work):
            writer.add(item, tiles.order(settings, item.key), _about(item, settings))
    else:
        writer.reject(item)


def _about(tile: Tile, settings: Settings) -> bytes:
    """The JSON of a tile; its class, a number among all classes, comes last: it is known when all slides are cut."""
    source = tile.source
    head = _repeated((("dataset", settings.dataset), ("slide", source.slide), ("patient", source.patient),
                      ("site", source.site), ("split", source.split), ("stain", settings.stain),
                      ("organ", settings.organ), ("label", tile.label or None), ("encoding", tile.encoding)))
    mpp = "null" if np.isnan(tile.mpp) else round(tile.mpp, 6)
    return (f'{head}, "x": {tile.x}, "y": {tile.y}, "mpp": {mpp}, "size": [{tile.size[0]}, {tile.size[1]}], '
            f'"digest": "{tile.digest.hex()}", "class": null}}').encode()


@functools.lru_cache(maxsize=64)
def _repeated(words: tuple[tuple[str, str | None], ...]) -> str:
    """The words of a tile that most of its slide's tiles share, as the beginning of its JSON."""
    return json.dumps(dict(words))[:-1]


def _files(unit: list[Source], number: int, settings: Settings, work: Path,
           skip: dict[int, str]) -> Iterator[Tile | Rejected]:
    if settings.kind == "arrays":
        yield from tiles.of_array(unit[0], settings)
        return
    for place, reason in skip.items():
        yield Rejected(unit[place], "failed", reason.replace(unit[place].file, unit[place].filename))
    with _writing(work):
        at = os.open(spool.path(work, number, "at"), os.O_WRONLY | os.O_CREAT)
    try:

        def one_by_one() -> Iterator[Source]:
            for place, source in enumerate(unit):
                if place not in skip:
                    with _writing(work):        # where we are, for whoever finds us dead
                        os.pwrite(at, b"%6d" % place, 0)
                    yield source

        yield from tiles.of_files(one_by_one(), settings)
    finally:
        os.close(at)


def _slide(source: Source, writer: spool.Writer, settings: Settings) -> float:
    """Cuts one slide or region and draws what was cut; returns its microns per pixel."""
    out = spool.path(writer.work, writer.number, "png")
    kept: list[tuple[int, int, float]] = []
    rejected: list[tuple[int, int, float, str]] = []
    with opened(source, settings) as slide:
        small = slide.thumbnail(tissue.MASK_MPP)
        found = tissue.mask(small)
        drawn = annotated(source, slide, settings)
        for item in tiles.of_slide(source, slide, found, settings, drawn):
            _take(item, writer, settings)
            if isinstance(item, Tile):
                kept.append((item.x, item.y, item.side))
            elif item.x is not None and item.y is not None:
                rejected.append((item.x, item.y, item.side, item.reason))
        mpp = slide.mpp if np.isfinite(slide.mpp) else ASSUMED_MPP
        wanted = max(slide.width * mpp / show.OVERLAY_WIDTH, mpp)
        if wanted >= tissue.MASK_MPP:       # a large slide: what the mask was made from will do
            picture = np.asarray(Image.fromarray(small).reduce(max(1, int(small.shape[1] / show.OVERLAY_WIDTH))))
        else:
            picture = slide.thumbnail(wanted)
        with _writing(writer.work):
            show.overlay(picture, picture.shape[1] / slide.width, found, kept, rejected, out)
        return slide.mpp


def annotated(source: Source, slide: Slide | Picture, settings: Settings) -> annotation.Annotation | None:
    """What a pathologist drew on a slide, where that is asked for."""
    if settings.labels != "annotations" and not settings.inside:
        return None
    return annotation.Annotation.read(annotation.find(source.path, settings.annotations), (slide.width, slide.height),
                                      slide.mpp)


def opened(source: Source, settings: Settings) -> Slide | Picture:
    """A slide, or an image that is cut like one."""
    if settings.kind == "regions":
        return tiles.picture(source, settings)
    return Slide(source.path, source.mpp, settings.slide_mpp, power=settings.power)


def overlay_name(source: Source, settings: Settings) -> str:
    """The file name of a slide's overlay; regions of one slide are told apart by their own names."""
    return f"{key(source.slide) if settings.kind == 'slides' else key(*source.name.split('/'))}.png"

