"""Copies of tars on a local disk: those that are needed next, within a limit, shared by a machine. The only fsspec.

    STAGE/lock                      held by whoever makes room, or gives a file its last name: none is missed in a count
    STAGE/2ace000a518e4032/         of one shard folder, by its fingerprint
        breast-000000.tar           a copy: whole, and what index.json says
        .breast-000001.tar.draft    in the making, locked by who makes it; unlocked: its maker was killed
        index.json  samples.arrow   where the shard folder is a URL

A copy may vanish at any time. Whoever has it open reads on, and whoever opens it next takes the source, or copies anew:
so nothing has to be known of the other processes that use a stage, and they may belong to other runs.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from shards import index
from shards.index import ShardError, Tar
from ssl_dist.data.stream import Stream

logger = logging.getLogger(__name__)

PIECE = 1 << 22         # bytes read at a time; between two of them a copier looks whether it shall end
TURNS = 2               # tries for what came out wrong
PAUSE = 0.05            # seconds until another process's copy is looked for again
IDLE = 10.0             # seconds until a copier without work looks what others have removed
PATIENCE = 5.0          # seconds that closing waits for a source that does not answer, and a reader for a full disk


class Url(str):
    """A folder or file that fsspec reaches, joined and taken apart like a path, which would lose one of its slashes."""

    def __truediv__(self, name: str) -> "Url":
        return Url(f"{self.rstrip('/')}/{name}")

    @property
    def parent(self) -> "Url":
        return Url(self.rpartition("/")[0])


@dataclass(frozen=True)
class Copy:
    """A file at its source, and where its copy lies once it is made."""

    source: Path | Url
    path: Path
    size: int
    sha256: str         # empty: held against something else by who asked for the copy


class Closed(Exception):
    """The stage was closed while something waited for it."""


class Full(Exception):
    """What is in the stage now has to stay there."""


class Stage:
    """A folder of copies for one process. One process of a machine copies ahead, all of them use what is there."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit         # bytes
        self.copied = 0         # copies that this process made
        self._copies: dict[int, Copy] = {}
        self._plan: Plan | None = None
        self._step = 0
        self._given_up: set[Path] = set()
        self._said: set[str] = set()
        self._moved, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def copy(self, source: Path | Url, fingerprint: str, tar: Tar) -> Copy:
        """A tar of a shard folder, and where its copy belongs."""
        if not re.fullmatch(r"[^./][^/]*\.tar", tar.name):      # an index from elsewhere must not choose where we write
            raise ShardError(f"{source}: {tar.name!r} in its index.json is no name of a tar; restore it")
        if isinstance(source, Path) and self.folder.resolve() in (source.resolve(), *source.resolve().parents):
            raise ShardError(f"data.stage={self.folder} holds the shard folder {source} itself, and a stage removes "
                             "what it does not need; choose a folder of its own")
        return Copy(source / tar.name, self._home(source, fingerprint) / tar.name, tar.bytes, tar.sha256)

    def _home(self, source: Path | Url, fingerprint: str) -> Path:
        if not re.fullmatch("[0-9a-f]{64}", fingerprint):
            raise ShardError(f"{source}: {fingerprint!r} in its index.json is no fingerprint; restore it")
        return self.folder / fingerprint[:16]

    # --- reading

    def open(self, copy: Copy) -> int | None:
        """A descriptor of the copy, or None where there is none; of a URL's tar it is made here and now."""
        there = _open(copy)
        return self._now(copy) if there is None and isinstance(copy.source, Url) else there

    def _now(self, copy: Copy) -> int:
        """The copy, made here, or by another process while this one waits."""
        patience = PATIENCE
        while not self._closing.is_set():
            try:
                if (descriptor := self._make(copy, None)) is not None:
                    return descriptor
            except Full:            # others' drafts fill it; they become copies, which may go
                logger.debug("%s waits for room", copy.path)
            except OSError as error:
                patience -= PAUSE   # what was removed may be open yet in others, and keep its room
                if not _is_full(error) or patience < 0:
                    raise
            self._closing.wait(PAUSE)
        raise Closed(f"{copy.source} was asked for when its stage was closed")

    def discard(self, copy: Copy) -> None:
        """Removes a copy that does not hold any more what was copied."""
        logger.info("%s went bad and is removed", copy.path)
        copy.path.unlink(missing_ok=True)

    def catalogue(self, url: Url) -> Path:
        """The folder with index.json and samples.arrow of the shard folder at `url`, fetched once a machine."""
        content = b"".join(self._pieces(url / "index.json"))
        try:
            fingerprint = json.loads(content)["fingerprint"]
        except (KeyError, TypeError, ValueError) as error:
            raise ShardError(f"{url}/index.json is no readable index ({error}); restore it, or shard again") from error
        home = self._home(url, str(fingerprint))
        home.mkdir(parents=True, exist_ok=True)
        lock = _draft(home / "index.json")
        while not _catalogued(home, content):
            if (descriptor := _claim(lock)) is None:
                self._closing.wait(PAUSE)
                continue
            try:
                if not _catalogued(home, content):
                    self._fetch(url, content, home)
            finally:
                lock.unlink(missing_ok=True)
                os.close(descriptor)
        return home

    def _fetch(self, url: Url, content: bytes, home: Path) -> None:
        """The two files, held against the fingerprint that one of them names; index.json last, it stands for both."""
        draft = home.with_name(f".{home.name}.draft")
        table = Copy(url / "samples.arrow", draft / "samples.arrow", _size(url / "samples.arrow"), "")
        listing = Copy(url / "index.json", draft / "index.json", len(content), hashlib.sha256(content).hexdigest())
        for _ in range(TURNS):
            shutil.rmtree(draft, ignore_errors=True)        # of one that was killed, or what came out wrong
            draft.mkdir()
            for copy in (listing, table):
                os.close(self._now(copy))
            found = index.read(draft)
            if (fingerprint := index.fingerprint(draft, found)) == found.fingerprint:
                with self._locked():
                    for name in ("samples.arrow", "index.json"):
                        (draft / name).replace(home / name)
                draft.rmdir()
                return
        shutil.rmtree(draft, ignore_errors=True)
        raise ShardError(f"{url}: index.json or samples.arrow changed since they were written: fingerprint "
                         f"{found.fingerprint} expected, {fingerprint} found; restore them")

    # --- copying ahead

    def follow(self, copies: dict[int, Copy], stream: Stream, start: int, stop: int, *, copying: bool) -> None:
        """From now on keeps what steps start .. stop - 1 need next, and where `copying`, copies it in a thread."""
        self._copies, self._step = copies, start
        self._plan = Plan(stream, stop, len(copies))
        self.folder.mkdir(parents=True, exist_ok=True)      # where that cannot be, better now than a slow run
        if copying and (large := sum(copy.size > self.limit for copy in copies.values())):
            self._say("size", f"{large} of {len(copies)} tars are larger than data.stage_gb and not copied ahead")
        self._moved.set()
        if copying and self._thread is None:
            self._thread = threading.Thread(target=self._copy_ahead, name="stage", daemon=True)
            self._thread.start()

    def at(self, step: int) -> None:
        """Of steps before this one nothing is needed any more, on any rank."""
        before, self._step = self._step, step
        if self._plan and self._plan.part(before) != self._plan.part(step):
            self._moved.set()

    def close(self) -> None:
        """Ends the copying, and whoever waits for a copy."""
        self._closing.set()
        self._moved.set()
        if self._thread:
            self._thread.join(PATIENCE)

    def _copy_ahead(self) -> None:
        """The thread. Whatever goes wrong here costs speed and no run: reading does not depend on it."""
        while not self._closing.is_set():
            self._moved.clear()
            try:
                if self._advance():
                    continue
            except Closed:
                break
            except OSError as error:
                if not _is_full(error):
                    self._say("disk", f"{self.folder} refuses ({error.strerror or error}); no more is copied there")
                    break
                self._say_full(self.used())
            except Exception as error:
                logger.info("the copier failed", exc_info=error)
                self._say("copier", f"copying to {self.folder} ended ({type(error).__name__}: {error})")
                break
            self._moved.wait(IDLE)
        logger.info("%d copies made in %s", self.copied, self.folder)

    def _advance(self) -> bool:
        """Makes, of the copies that are not there, the one that is needed first; False where there is none to make."""
        files = self._files()
        missing = {copy.path for copy in self._copies.values() if copy.path not in self._given_up
                   and (copy.path not in files or files[copy.path].st_size != copy.size)}
        sooner: list[Path] = []
        for copy in self._coming() if missing else ():
            if copy.path in missing:
                try:
                    if (descriptor := self._make(copy, sooner)) is not None:
                        os.close(descriptor)
                        return True
                except Full:
                    break
                except ShardError as error:
                    self._given_up.add(copy.path)
                    self._say("source", f"{error}" if isinstance(copy.source, Url) else
                              f"{error}; it is not copied, but read where it is")
                    return True
            sooner.append(copy.path)
        return False

    def _coming(self) -> Iterator[Copy]:
        """What is needed next, in this order, as far as it fits into the stage together."""
        room = self.limit
        for number in self._plan.coming(self._step) if self._plan else ():
            copy = self._copies[number]
            if self._closing.is_set():
                raise Closed(f"{self.folder} was closed")
            if copy.size > self.limit:
                continue
            if (room := room - copy.size) < 0:
                break
            yield copy

    def _say(self, what: str, sentence: str) -> None:
        """Each trouble to the person once, and every time to the log: more of the same would bury what matters."""
        (logger.info if what in self._said else logger.warning)("data.stage: %s", sentence)
        self._said.add(what)

    def _say_full(self, room: int) -> None:
        self._say("disk", f"the disk of {self.folder} has room for {room / 1e9:.3f} GB of it, less than data.stage_gb; "
                          "no more than fits is kept there")

    # --- one copy

    def _make(self, copy: Copy, sooner: list[Path] | None) -> int | None:
        """The copy, made now, as a descriptor; None where another process is at it, Full where there is no room.

        `sooner`: what is needed before it and stays. None: nothing is, and it may exceed the limit where all that is
        there has to stay.
        """
        copy.path.parent.mkdir(parents=True, exist_ok=True)
        draft = _draft(copy.path)
        if (descriptor := _claim(draft)) is None:
            return None
        made = False
        try:
            if (there := _open(copy)) is not None:
                return there
            copy.path.unlink(missing_ok=True)       # of another size, it is nobody's
            self._reserve(copy, descriptor, sooner)
            self._write(copy, descriptor)
            os.fsync(descriptor)
            with self._locked():
                draft.replace(copy.path)
            made = True
        finally:
            if not made:
                draft.unlink(missing_ok=True)
                os.close(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        self.copied += 1
        return descriptor

    def _write(self, copy: Copy, draft: int) -> None:
        """The source's bytes into the draft, held against the index as they come."""
        for turn in range(TURNS):
            digest, place = hashlib.sha256(), 0
            try:
                for piece in self._pieces(copy.source):
                    digest.update(piece)
                    place += len(piece)
                    if place > copy.size:
                        break               # nor does it get more room than was made
                    _put(draft, piece, place - len(piece))
            except ShardError:
                if turn + 1 == TURNS:
                    raise
                continue
            if place == copy.size and digest.hexdigest() == (copy.sha256 or digest.hexdigest()):
                return
        size = f"more than {copy.size}" if place > copy.size else str(place)
        raise ShardError(f"{copy.source} is not what index.json says: {copy.size} bytes of SHA-256 {copy.sha256} "
                         f"expected, {size} of {digest.hexdigest()} found; restore it"
                         + ("" if isinstance(copy.source, Url) else f", then run: ssl-dist check {copy.source.parent}"))

    def _pieces(self, source: Path | Url) -> Iterator[bytes]:
        try:
            with _opened(source) as file:
                while piece := file.read(PIECE):
                    if self._closing.is_set():
                        raise Closed(f"{source} was being read when its stage was closed")
                    yield piece
        except Closed:
            raise
        except Exception as error:      # every file system and every service has its own
            raise _unreachable(source, error) from error

    # --- room

    def _reserve(self, copy: Copy, draft: int, sooner: list[Path] | None) -> None:
        """Makes room for the copy and takes it at once, by giving the draft its whole length."""
        with self._locked():
            os.ftruncate(draft, 0)
            files = self._files()
            used = sum(status.st_size for status in files.values())
            limit = min(self.limit, used + self._free())
            if used + copy.size > limit:
                if limit < self.limit:
                    self._say_full(limit)
                _bury_drafts(files, besides=_draft(copy.path))
                used = sum(status.st_size for status in files.values())
                last = self._needed_last(files, self._needed_now() if sooner is None else sooner)
                least = used - sum(files[path].st_size for path in last)
                if least + copy.size > limit and (sooner is not None or least > limit):
                    waiting = any(_is_draft(path) and status.st_size for path, status in files.items())
                    if sooner is None and not waiting:
                        raise ShardError(f"{copy.source} has no room in {self.folder}: of {limit / 1e9:g} GB, "
                                         f"{least / 1e9:.3f} have to stay, what one step needs above all; raise "
                                         "data.stage_gb, or lower data.window")
                    raise Full(str(copy.path))
                for path in last:
                    if used + copy.size <= limit:
                        break
                    path.unlink(missing_ok=True)
                    used -= files[path].st_size
            if copy.size > self._free():        # somebody has what was removed still open, and its room comes later
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder))
            os.ftruncate(draft, copy.size)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone, of all processes that use the stage."""
        with (self.folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)        # until it is closed
            yield

    def _free(self) -> int:
        disk = os.statvfs(self.folder)
        return disk.f_bavail * disk.f_frsize

    def used(self) -> int:
        """Bytes of all that lies in the stage."""
        return sum(status.st_size for status in self._files().values())

    def _files(self) -> dict[Path, os.stat_result]:
        """All that lies in the stage, whoever put it there."""
        found = {}
        for folder, _, names in os.walk(self.folder):
            for path in (Path(folder, name) for name in names):
                with contextlib.suppress(FileNotFoundError):
                    found[path] = path.lstat()
        return found

    def _needed_now(self) -> list[Path]:
        if self._plan is None:
            return []
        return [self._copies[number].path for number in self._plan.stream.tars(self._step, self._step + 1)]

    def _needed_last(self, files: dict[Path, os.stat_result], stays: list[Path]) -> list[Path]:
        """Copies that may go, what is needed latest first: ours beyond what the stage can hold, then other runs'."""
        ours = {copy.path for copy in self._copies.values()}
        turn = {copy.path: number for number, copy in enumerate(self._coming())}

        def lateness(path: Path) -> tuple[int, float]:
            if path in turn:
                return 2, -turn[path]
            return int(path not in ours), files[path].st_mtime

        return sorted((path for path in files.keys() - set(stays) if _is_copy(path)), key=lateness)


class Plan:
    """The tars that a run reads from any step on, in the order in which it needs them."""

    def __init__(self, stream: Stream, stop: int, tars: int):
        self.stream, self.stop = stream, stop
        # As many steps as one tar's samples make: in fewer, what is needed next hardly changes.
        self._stride = max(1, stream.samples // (stream.batch * tars))
        self._parts: dict[int, list[int]] = {}      # tars of each stretch of so many steps, as far as anybody looked

    def part(self, step: int) -> int:
        """The stretch of steps that `step` lies in."""
        return step // self._stride

    def coming(self, step: int) -> Iterator[int]:
        """The tars that are needed from `step` on, each once, looked for no farther than they are asked for.

        Nor farther than two epochs: there the natural order shows every tar, and another mixture's rare ones may wait.
        """
        end = min(self.stop, step + 2 * self.stream.steps_an_epoch)
        for past in [part for part in tuple(self._parts) if part <= self.part(step)]:
            self._parts.pop(past, None)
        told: set[int] = set()
        for part in range(self.part(step), self.part(max(step, end - 1)) + 1):
            tars = self._parts.get(part) if part > self.part(step) else None     # of the first, only what is left
            if tars is None:
                last = min(self.stop, (part + 1) * self._stride)
                tars = self._parts[part] = self.stream.tars(max(step, part * self._stride), last)
            for tar in tars:
                if tar not in told:
                    told.add(tar)
                    yield tar


def place(name: Path | str) -> Path | Url:
    """A shard folder as it was named: a URL, or a path."""
    return Url(name) if isinstance(name, str) and "://" in name else Path(name)


def sizes(url: Url) -> dict[str, int]:
    """Sizes of the files at `url` by name; empty where they cannot be listed, as of a web server."""
    try:
        system, path = fsspec.url_to_fs(url)
        listed = system.ls(path, detail=True)
    except Exception:       # every service has its own; what is missing is found when it is copied
        return {}
    return {entry["name"].rstrip("/").rpartition("/")[2]: entry["size"] for entry in listed
            if entry.get("type") == "file" and isinstance(entry.get("size"), int)}


def _size(url: Url) -> int:
    try:
        system, path = fsspec.url_to_fs(url)
        size = system.size(path)
    except Exception as error:
        raise _unreachable(url, error) from error
    if size is None:
        raise ShardError(f"{url}: its size is not told there; put the shards where it is")
    return size


def _opened(source: Path | Url) -> Any:
    if isinstance(source, Path):
        return source.open("rb", buffering=0)
    system, path = fsspec.url_to_fs(source)
    return system.open(path, "rb")


def _unreachable(source: Path | Url, error: Exception) -> ShardError:
    reason = (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"
    return ShardError(f"{source} cannot be read ({reason}); look whether it is there, and may be read from this "
                      "machine")


def _catalogued(home: Path, content: bytes) -> bool:
    """Whether the two files of a URL were fetched, with this index.json."""
    path = home / "index.json"
    return path.is_file() and path.read_bytes() == content and (home / "samples.arrow").is_file()


def _open(copy: Copy) -> int | None:
    """A descriptor of the copy if it is there; of another size, it is none of ours."""
    try:
        descriptor = os.open(copy.path, os.O_RDONLY)
    except OSError:         # it is not there, or it is another user's, or its disk is dying
        return None
    if os.fstat(descriptor).st_size == copy.size:
        return descriptor
    os.close(descriptor)
    return None


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.name}.draft")


def _is_draft(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix == ".draft"


def _is_copy(path: Path) -> bool:
    """Whether we may remove it. Catalogues stay: others map them, and they are a hundredth of their tars or less."""
    return path.suffix == ".tar" and not path.name.startswith(".") and bool(
        re.fullmatch("[0-9a-f]{16}", path.parent.name))


def _claim(draft: Path) -> int | None:
    """The draft, locked and open for writing; None while another holds it. The kernel frees it when its holder ends."""
    while True:
        descriptor = os.open(draft, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Since we opened it, whoever held it may have renamed or removed it.
            if os.path.samestat(draft.stat(), os.fstat(descriptor)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        os.close(descriptor)


def _bury_drafts(files: dict[Path, os.stat_result], besides: Path) -> None:
    """Removes drafts whose makers were killed, from disk and from `files`."""
    for path in [path for path in files if _is_draft(path) and path != besides]:
        with contextlib.suppress(OSError):      # gone with its folder, or another user's
            if (descriptor := _claim(path)) is not None:
                path.unlink(missing_ok=True)
                os.close(descriptor)
                del files[path]


def _put(descriptor: int, piece: bytes, place: int) -> None:
    rest = memoryview(piece)
    while rest:
        written = os.pwrite(descriptor, rest, place)
        rest, place = rest[written:], place + written


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
