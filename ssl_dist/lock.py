"""One writer a run folder, on machines that share a disk whose locks reach across them, and on those whose do not.

The kernel's lock decides between processes of one machine, and is gone with its holder. Where another machine was the
last to write, it is watched until its signs of life (watch.py) prove it dead: they do not grow any more. Clocks are not
asked, nor is the age of a file. Whoever was taken for dead and wakes up finds another's token, and ends.
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

from shards import folder
from shards.folder import FolderInUse
from ssl_dist import watch

logger = logging.getLogger(__name__)

SILENCE = 10 * watch.BEAT       # without a sign of life, and its writer is dead; NFS may show one seconds late
SHARED = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "fuse", "9p", "glusterfs", "panfs", "wekafs")


class Owner:
    """Who holds a run folder now: this process, as long as its token is there."""

    def __init__(self, path: Path):
        self.path, self.token = path / "alive" / "owner.json", uuid.uuid4().hex

    def write(self) -> None:
        """Puts our token there."""
        folder.make(self.path.parent)
        folder.write_json(self.path, {"token": self.token, "host": socket.gethostname(), "boot": _boot(),
                                      "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID", "")})

    def check(self) -> None:
        """Refuses to go on where another took the folder over."""
        if (told := _owner(self.path)).get("token") != self.token:
            raise FolderInUse(f"{self.path.parent.parent} was taken over by {_words(told)} while this process gave no "
                              "sign of life; it ends, and has written nothing since")

    def leave(self) -> None:
        """Takes our token away."""
        if _owner(self.path).get("token") == self.token:
            self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def hold(path: Path) -> Iterator[Owner]:
    """The only writer of a run folder while the block runs."""
    with folder.hold(path, "run.lock"):
        owner = Owner(path)
        before = _owner(owner.path)
        if before and (before["host"], before["boot"]) != (socket.gethostname(), _boot()):
            _prove_dead(path, _words(before))
        owner.write()
        if _shared(path):       # where locks may not reach, two may have come this far: the last token stays
            time.sleep(2 * watch.BEAT)
            owner.check()
        try:
            yield owner
        finally:
            owner.leave()


def free(path: Path) -> None:
    """Refuses a run folder that a process of this machine holds; of others', the holder's own call finds out."""
    with folder.hold(path, "run.lock"):
        pass


def _prove_dead(path: Path, who: str) -> None:
    """Waits for a sign of life of another machine's writer, and refuses if there is one."""
    logger.warning("%s was last written by %s; watching for %.0f s whether it lives", path, who, SILENCE)
    before, until = _beats(path), time.monotonic() + SILENCE
    while time.monotonic() < until:
        time.sleep(watch.BEAT / 2)
        if _beats(path) != before:
            raise FolderInUse(f"{path} is being written by {who}; wait for it, stop it, or choose another folder")
    logger.warning("%s gives no sign of life; its folder %s is taken over", who, path)


def _beats(path: Path) -> dict[int, int]:
    with contextlib.suppress(OSError):
        list((path / "alive").iterdir())        # NFS looks anew at what is listed
    return {rank: told["beat"] for rank, told in watch.alive(path).items()}


def _owner(path: Path) -> dict[str, str]:
    try:
        told = json.loads(path.read_text())
        return told if {"token", "host", "boot", "pid"} <= told.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _words(told: dict[str, str]) -> str:
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
