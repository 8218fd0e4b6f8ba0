"""One writer a run folder, on machines that share a disk whose locks reach across them, and on those whose do not.

The kernel's lock decides between processes of one machine, and is gone with its holder. Where another machine was the
last to write, it is watched until its signs of life (watch.py) prove it dead: they do not grow any more. Clocks are not
asked, nor is the age of a file. Whoever was taken for dead and wakes up finds another's token, and ends: every rank
looks for its own with each sign of life that it gives, and rank 0 before whatever it writes.
"""

import contextlib
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards import folder
from shards.folder import FolderInUse

logger = logging.getLogger(__name__)

BEAT = 2.0              # seconds between two signs of life
LATE = 120.0            # seconds until a file is seen on every machine
SILENCE = 10 * BEAT     # without a sign of life, and its writer is dead; NFS may show one seconds late
SHARED = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "fuse", "9p", "glusterfs", "panfs", "wekafs")


class Owner:
    """An attempt that holds a run folder, as long as its token is there. Each of its ranks has one."""

    def __init__(self, path: Path, token: str):
        self.path, self.token = path / "alive" / "owner.json", token
        self._since, self._seen = time.monotonic(), False

    def write(self, *, left: bool = False) -> None:
        """Puts our token there; once more when rank 0 ends. It stays: what is not there, somebody took away."""
        folder.make(self.path.parent)
        folder.write_json(self.path, {"token": self.token, "host": socket.gethostname(), "boot": _boot(),
                                      "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID", ""), "left": left})
        self._since, self._seen = time.monotonic(), True

    def check(self) -> None:
        """Refuses to go on where another took the folder over; a disk that does not answer raises what it says.

        Until this machine has seen the token once it may for a while see what was there before: NFS shows things late.
        """
        for _ in range(5):      # not every disk replaces a file at one go
            try:
                told = _told(self.path.read_text())
            except FileNotFoundError:
                told = {}
            if told or not self._seen:
                break
            time.sleep(BEAT / 20)
        if told.get("token") == self.token:
            self._seen = True
        elif self._seen or time.monotonic() - self._since > LATE:
            raise FolderInUse(f"{self.path.parent.parent} was taken over by {_words(told)} while this process gave no "
                              "sign of life; it ends, and leaves the folder as it is" if told else
                              f"{self.path} is gone, or no longer what was written: whoever took it away, or made the "
                              "folder anew, may write there now; this process ends")

    def alone(self) -> None:
        """Waits, where locks may not reach all who see the folder, until of two who came at once one has gone."""
        if _shared(self.path.parent):
            time.sleep(max(0.0, self._since + 2 * BEAT - time.monotonic()))
        self.check()


@contextlib.contextmanager
def hold(path: Path) -> Iterator[Owner]:
    """The only writer of a run folder while the block runs; `Owner.alone` says from when on."""
    with folder.hold(path, "run.lock"):
        before = _owner(path / "alive" / "owner.json")
        if before and not before.get("left") and (before["host"], before["boot"]) != (socket.gethostname(), _boot()):
            _prove_dead(path, _words(before))
        owner = Owner(path, uuid.uuid4().hex)
        owner.write()
        try:
            yield owner
        finally:
            with contextlib.suppress(OSError, FolderInUse):
                owner.check()
                owner.write(left=True)


def free(path: Path) -> None:
    """Refuses a run folder that a process of this machine holds; of others', the holder's own call finds out."""
    with folder.hold(path, "run.lock"):
        pass


def _prove_dead(path: Path, who: str) -> None:
    """Waits for a sign of life of another machine's writer, and refuses if there is one."""
    logger.warning("%s was last written by %s; watching for %.0f s whether it lives", path, who, SILENCE)
    before, until = _signs(path), time.monotonic() + SILENCE
    while time.monotonic() < until:
        time.sleep(BEAT / 2)
        if _signs(path) != before:
            raise FolderInUse(f"{path} is being written by {who}; wait for it, stop it, or choose another folder")
    logger.warning("%s gives no sign of life; its folder %s is taken over", who, path)


def _signs(path: Path) -> dict[str, str]:
    found = {}
    with contextlib.suppress(OSError):
        for file in (path / "alive").iterdir():     # NFS looks anew at what is listed
            if file.match("rank-*.json"):
                found[file.name] = file.read_text()
    return found


def _owner(path: Path) -> dict[str, Any]:
    try:
        return _told(path.read_text())
    except OSError:
        return {}


def _told(content: str) -> dict[str, Any]:
    try:
        told = json.loads(content)
        return told if {"token", "host", "boot", "pid"} <= told.keys() else {}
    except (ValueError, AttributeError):
        return {}


def _words(told: dict[str, Any]) -> str:
    job = f", job {told['job']}" if told.get("job") else ""
    return f"process {told.get('pid', '?')} on {told.get('host', '?')}{job}"


def _boot() -> str:
    """Tells this machine, since it was started, from every other."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _shared(path: Path) -> bool:
    """Whether other machines may see this folder: by the kind of its file system."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return True
    there = str(path.resolve())
    kind = max(((point, kind) for point, kind in mounts if there == point or there.startswith(point.rstrip("/") + "/")),
               key=lambda each: len(each[0]), default=("", ""))[1]
    return kind.startswith(SHARED)
