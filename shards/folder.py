"""What a folder on disk promises: one writer at a time, and files that are whole or absent."""

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path


class FolderInUse(RuntimeError):
    """Another living process writes to this folder."""

    exit_code = 10


class StorageError(OSError):
    """The disk refused: full, read-only, or not ours to write to."""

    exit_code = 9

    def __str__(self) -> str:
        return self.strerror or super().__str__()       # the number says nothing that the sentence does not


@contextlib.contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turns the operating system's refusals below into one sentence that says what to do."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        advice = {
            errno.ENOSPC: "the disk is full: free some space or choose another folder",
            errno.EDQUOT: "your quota is used up: free some space or choose another folder",
            errno.EACCES: "no permission to write there: choose a folder of your own, or ask its owner",
            errno.EPERM: "no permission to write there: choose a folder of your own, or ask its owner",
            errno.EROFS: "the file system is read-only: choose another folder",
            errno.ENOTDIR: "a file stands where a folder is needed: choose another name",
            errno.EEXIST: "a file stands where a folder is needed: choose another name",
        }.get(error.errno or 0)
        if advice is None:
            raise
        raise StorageError(error.errno, f"{error.filename or path}: {advice}") from error


def make(folder: Path) -> Path:
    """The folder, made if needed; refused with a reason where we cannot write."""
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "not writable", str(folder))
    return folder


@contextlib.contextmanager
def hold(folder: Path, lock: str, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """The only writer of `folder` while the block runs, or one of those that `shared` it.

    The kernel drops the lock when its holder ends, however it ends, so there is no stale lock to clean up. The file
    itself stays: removing it would let two processes hold two locks of one name.
    """
    make(folder)
    path = folder / lock
    with storage(path):
        handle = path.open("a+")
    with handle:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            handle.seek(0)
            raise FolderInUse(
                f"{folder} is being written by {handle.read().strip() or 'another process'}; "
                "wait for it, stop it, or choose another folder"
            ) from None
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        handle.flush()
        yield


def write(path: Path, content: bytes | memoryview | str) -> None:
    """The file whole under its name, or not there at all, even after a power cut."""
    data = content.encode() if isinstance(content, str) else content
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage(path):
        try:
            with draft.open("wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            publish(draft, path)
        finally:
            draft.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """`write`, as JSON that a person can read."""
    write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def publish(draft: Path, path: Path) -> None:
    """Renames a finished file or folder to the name that readers look for, and makes the rename last."""
    draft.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Asks the disk to keep what was written: a file's content, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
