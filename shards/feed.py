"""Pixels of slides for whoever looks at them at once: a process a slide, with limits. Nothing is written.

A process decodes tiles straight into memory that it shares with its reader, and waits where all of that is full: so
slides of any size take the same memory. What becomes of a slide (read, failed, to be read once more) is told after its
last tiles; one that crashes its process or hangs ends alone.

N tiles   S pixels a side
"""

import contextlib
import ctypes
import multiprocessing.connection
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any, NamedTuple

import numpy as np

from shards import cut, jpeg, tiles, tissue
from shards.cut import Crashed
from shards.index import ShardError
from shards.jpeg import JpegError
from shards.settings import Settings
from shards.sources import Source
from shards.tiles import Rejected, Seen

# Tiles cross in pieces of about so many bytes: some dozen tiles, so that a message costs next to nothing.
PIECE = 8 << 20
# Pieces a process may have filled that nobody took yet: it reads on while an encoder looks at a batch.
PIECES = 4
MOST = 1024             # tiles of a piece: a message must fit into a pipe, or a reader that hangs within it holds us
PATIENCE = 10.0         # seconds that a process has to end, once it has said all, and once it was killed


class Tiles(NamedTuple):
    """Some tiles of a slide; the pixels are there until the next are asked for."""

    slide: int                  # its place among the sources
    attempt: int                # tiles of an earlier one than the newest are not to be used
    corner_N2: np.ndarray       # in pixels of level 0
    pixels_NSS3: np.ndarray     # uint8


@dataclass
class Ended:
    """What became of a slide."""

    slide: int
    attempt: int
    error: Exception | None = None
    again: bool = False         # its process died, and it is read once more
    mpp: float = 0.0            # microns per pixel of its tiles, as they are and not as they were asked for
    side: float = 0.0           # width of a tile in pixels of level 0
    tiles: int = 0
    native: bool = False        # its tiles were its own JPEGs
    rejected: dict[str, int] = field(default_factory=dict)
    detail: str = ""            # of a slide that has no tile at all, why


class _Running:
    """A slide at work, in memory that belongs to one process at a time."""

    def __init__(self, slide: int, attempt: int, process: ForkServerProcess, says: Connection, memory: Any,
                 room: np.ndarray):
        self.slide, self.attempt, self.process, self.says, self.memory = slide, attempt, process, says, memory
        self.room = room                    # (PIECES, N, S, S, 3)
        self.heard = time.monotonic()       # when it last said something, or was given room
        self.end: Ended | None = None

    def gone(self, seconds: float) -> bool:
        """Ends the process where it does not end by itself; whether that was done (not where its disk is dead)."""
        self.process.join(seconds)
        self.process.kill()
        self.process.join(PATIENCE)
        return not self.process.is_alive()


def read(found: list[Source], settings: Settings) -> Generator[Tiles | Ended, None, None]:
    """The tiles of all slides as they come, of several slides at a time; of each, in their order."""
    context, size = cut.processes(), settings.size
    count = min(max(1, PIECE // (size * size * 3)), MOST)
    waiting = deque((number, 1) for number in range(len(found)))
    running: list[_Running] = []
    # Made as it is needed: zeroed, and so its pages are there, or it is refused, before anything is read.
    free: list[Any] = []

    def start() -> None:
        slide, attempt = waiting.popleft()
        memory: Any = free.pop() if free else context.RawArray(ctypes.c_uint8, PIECES * count * size * size * 3)
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(found[slide], settings, memory, count, theirs), daemon=True)
        process.start()
        theirs.close()
        room = np.frombuffer(memory, np.uint8).reshape(PIECES, count, size, size, 3)
        running.append(_Running(slide, attempt, process, ours, memory, room))

    try:
        while waiting or running:
            while waiting and len(running) < cut.cores(settings):
                start()
            until = min(each.heard for each in running) + settings.unit_seconds
            multiprocessing.connection.wait([each.says for each in running], max(until - time.monotonic(), 0))
            for each in [*running]:
                yield from _heard(each)
                if each.end is None and time.monotonic() > each.heard + settings.unit_seconds:
                    each.end = Ended(each.slide, each.attempt, ShardError(
                        f"no tile came for {settings.unit_seconds:g} s: it was stopped; look at it, or give it longer "
                        "with unit_seconds="))
                if each.end is None:
                    continue
                running.remove(each)
                if each.gone(PATIENCE if each.end.error is None else 0):
                    free.append(each.memory)        # of one that cannot be ended nobody takes it again
                if isinstance(each.end.error, Crashed) and each.attempt == 1:       # once is no proof against the slide
                    each.end.again = True
                    waiting.appendleft((each.slide, 2))
                each.says.close()
                yield each.end
    finally:        # whatever ended the job, no process of it goes on
        for left in running:
            left.process.kill()
        for left in running:
            left.gone(0)


def _heard(each: _Running) -> Iterator[Tiles]:
    """The tiles that a process has sent, as many as there is room for; sets its end where it came to one."""
    for _ in range(PIECES):
        try:
            if not each.says.poll():
                return
            word = each.says.recv()
        except (EOFError, OSError):         # it ended, without a last word
            each.process.join()
            each.end = Ended(each.slide, each.attempt, cut.crash(each.process))
            return
        each.heard = time.monotonic()
        if isinstance(word, Exception):
            each.end = Ended(each.slide, each.attempt, word)
            return
        if isinstance(word, dict):
            each.end = Ended(each.slide, each.attempt, **word)
            return
        piece, corner_N2 = word
        yield Tiles(each.slide, each.attempt, corner_N2, each.room[piece, :len(corner_N2)])
        each.heard = time.monotonic()       # what the user did meanwhile was not its time
        with contextlib.suppress(OSError):      # it ended meanwhile; why is heard next
            each.says.send(piece)


# --- in the process of a slide


def _work(source: Source, settings: Settings, memory: Any, count: int, says: Connection) -> None:
    size = settings.size
    room = np.frombuffer(memory, np.uint8).reshape(PIECES, count, size, size, 3)
    with cut.answering(settings, says):
        says.send(_slide(source, settings, room, says))


def _slide(source: Source, settings: Settings, room: np.ndarray, says: Connection) -> dict[str, Any]:
    """Sends all tiles of one slide; returns what there is to say of them."""
    free, rejected, detail, total = deque(range(len(room))), Counter[str](), "", 0
    mpp = side = 0.0
    native = False
    corners: list[tuple[int, int]] = []

    def send() -> None:
        nonlocal total
        says.send((free.popleft(), np.array(corners, np.int64)))
        total += len(corners)
        corners.clear()
        while says.poll() or not free:      # waits where all is full
            free.append(says.recv())

    with cut.opened(source, settings) as slide:
        found = tissue.mask(slide.thumbnail(tissue.MASK_MPP))
        for one in tiles.cuts(source, slide, settings, cut.annotated(source, slide, settings)):
            if isinstance(one, Rejected):
                rejected[one.reason] += 1
                detail = one.detail
                continue
            mpp, side, native = one.mpp, one.side, one.native is not None
            for item in tiles.seen(one, found):
                if isinstance(item, Seen) and _pixels(item, room[free[0], len(corners)]):
                    corners.append((item.x, item.y))
                    if len(corners) == room.shape[1]:
                        send()
                else:
                    rejected[item.reason if isinstance(item, Rejected) else "unreadable"] += 1
    if corners:
        send()
    return {"mpp": mpp, "side": side, "tiles": total, "native": native, "rejected": dict(rejected), "detail": detail}


def _pixels(tile: Seen, out_SS3: np.ndarray) -> bool:
    """Puts a tile's pixels where they belong, if they can be had."""
    if isinstance(tile.content, np.ndarray):
        out_SS3[:] = tile.content
        return True
    try:
        jpeg.decode_into(tile.content, out_SS3)
    except JpegError:
        return False
    return True
