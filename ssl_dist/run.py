"""The run folder's own account: what state it is in, who tried when, on which machine, with which versions."""

import contextlib
import ctypes
import importlib.metadata
import json
import logging
import os
import platform
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from launch.rank import LAUNCH
from shards import folder
from shards.folder import FolderInUse
from ssl_dist import dist, lock, watch

logger = logging.getLogger(__name__)

HEARTBEAT = 10.0        # seconds between two signs of life in run.json
PATIENCE = 5            # seconds that a survivor waits for rank 0's word; torchrun leaves it thirty

PACKAGES = ("ssl_dist", "torch", "torchvision", "timm", "deepspeed", "nvidia-dali-cuda130", "nvidia-dali-cuda120",
            "numpy", "opencv-python-headless", "openslide-bin", "pyarrow", "omegaconf", "safetensors")


def age() -> float:
    """Seconds since this process began, import of Python included."""
    begun = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return round(time.clock_gettime(time.CLOCK_BOOTTIME) - begun, 2)


class PeerDied(RuntimeError):
    """Another rank is gone."""

    exit_code = 7


def now() -> str:
    """The time as text, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Run:
    """run.json of one attempt. Rank 0 writes; on other ranks nothing happens."""

    def __init__(self, path: Path, owner: lock.Owner, steps: int, device: torch.device, reached: dict[str, float]):
        self.path, self.owner, self._beat, self._speaker = path / "run.json", owner, 0.0, dist.rank() == 0
        before = _before(self.path)
        for attempt in before["attempts"]:
            # Whoever did not say goodbye was killed; a rank of it that lives ends when it looks whose folder this is.
            attempt["outcome"] = attempt["outcome"] or "killed"
        self.content: dict[str, Any] = {
            "state": "running", "exit_code": None, "error": None, "step": before.get("step", 0), "steps": steps,
            "heartbeat": now(), "attempts": before["attempts"] + [{
                "started": now(), "ended": None, "host": socket.gethostname(), "pid": os.getpid(),
                "world": dist.world(), "device": str(device.type), "from_step": 0, "to_step": 0, "outcome": None,
                "attempt": owner.token, "launch": os.environ.get(LAUNCH), "job": os.environ.get("SLURM_JOB_ID"),
                **_machines(), "process": round(time.time() - age(), 2), "seconds_to": dict(reached)}]}
        self._write()

    def starts_at(self, step: int) -> None:
        """Where this attempt takes over."""
        self.content["attempts"][-1] |= {"from_step": step, "to_step": step}
        self.content["step"] = step
        self._write()

    def saved(self, step: int) -> None:
        """A checkpoint of this attempt is complete: whoever started it knows that it gets on."""
        self.content["attempts"][-1]["saved"] = step
        with contextlib.suppress(OSError):      # the checkpoint is there all the same
            self._write()

    def reaches(self, what: str) -> None:
        """Says how long after the start of this process something was there, the first time that it was."""
        if what not in (known := self.content["attempts"][-1]["seconds_to"]):
            known[what] = age()

    def alive(self, step: int) -> None:
        """A sign of life after `step`."""
        self.content["step"] = self.content["attempts"][-1]["to_step"] = step
        if time.monotonic() - self._beat > HEARTBEAT:
            try:
                self._write()
            except OSError as error:        # a full disk costs a sign of life, and not the run
                logger.info("run.json: %s", error)

    def ends(self, state: str, exit_code: int, step: int | None = None, error: str | None = None) -> None:
        """The last word of this attempt: done, stopped, preempted or failed."""
        if step is not None:
            self.content["step"] = self.content["attempts"][-1]["to_step"] = step
        self.content |= {"state": state, "exit_code": exit_code, "error": error}
        self.content["attempts"][-1] |= {"ended": now(), "outcome": state}
        self._write()

    def fails(self, failure: BaseException) -> None:
        """The last word of an attempt that failed; a survivor speaks where rank 0 is the one that died."""
        if isinstance(failure, PeerDied) and dist.rank():
            self._speaker = self._silent()
        with contextlib.suppress(FolderInUse):      # what is told there now is another attempt's story
            self.ends("failed", getattr(failure, "exit_code", 1), error=f"{type(failure).__name__}: {failure}")

    def breaks_off(self, state: str, exit_code: int, error: str) -> None:
        """The last word, said by a thread because the main one is stuck; again by a survivor where rank 0 says none."""
        last_words(self.path.parent, self.owner, exit_code, error)
        if dist.rank():
            self._speaker = self._silent()
        with contextlib.suppress(FolderInUse):
            self.ends(state, exit_code, error=error)

    def _silent(self) -> bool:
        """Whether rank 0 has not said how this attempt ends, and does not in time."""
        for _ in range(PATIENCE * 10):
            told = json.loads(self.path.read_text())
            if told["state"] != "running" or told["attempts"][-1].get("attempt") != self.owner.token:
                return False
            time.sleep(0.1)
        return True

    def _write(self) -> None:
        if self._speaker:
            self._beat = time.monotonic()
            self.owner.check()
            folder.write_json(self.path, self.content | {"heartbeat": now()})


def _machines() -> dict[str, Any]:
    """On how many machines this attempt is, and its names, where each machine's launcher has one of its own."""
    found = dist.gather((watch.host(), os.environ.get(LAUNCH)))
    names = sorted({name for _, name in found if name})
    return {"machines": len({host for host, _ in found}), **({"launches": names} if len(names) > 1 else {})}


def _before(path: Path) -> dict[str, Any]:
    """What run.json says of earlier attempts; an unreadable one is history lost, and no reason not to go on."""
    try:
        before = json.loads(path.read_text())
        if all("outcome" in attempt for attempt in before["attempts"]):
            return before
        raise KeyError("outcome")
    except FileNotFoundError:
        return {"attempts": []}
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be read (%s) and is begun anew", path, error)
        return {"attempts": []}


def cause(error: BaseException, path: Path, owner: lock.Owner) -> BaseException:
    """The failure to report: our own, or, where a peer's death broke a collective, the peer's."""
    lost = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in dist.LOST)
    logger.info("ended by %s", error, exc_info=error)        # the whole story for the log; one line goes to the person
    if not lost:
        last_words(path, owner, getattr(error, "exit_code", 1), str(error))
        return error
    for _ in range(20):         # the peer writes its reason before it goes; give it two seconds
        for other in sorted(path.glob("logs/rank-*.exit.json")):
            try:
                reason = json.loads(other.read_text())
            except (OSError, ValueError):       # another attempt clears away
                continue
            if reason.get("attempt") != owner.token:
                continue
            failure = PeerDied(f"rank {int(other.name[5:10])} ended: {reason['error']}")
            failure.exit_code = reason["exit_code"] if reason["exit_code"] != 1 else PeerDied.exit_code
            return failure
        time.sleep(0.1)
    said = str(error).splitlines()[0].partition(" This is typically")[0]
    return PeerDied(f"another rank is gone without a word ({said}); logs: {path / 'logs'}. "
                    "Run the same command again to resume from the last checkpoint")


def last_words(path: Path, owner: lock.Owner, exit_code: int, error: str) -> None:
    """Says beside this rank's log why it ends: for its peers, and for whoever started it."""
    with contextlib.suppress(OSError, FolderInUse):
        owner.check()
        folder.write_json(folder.make(path / "logs") / f"rank-{dist.rank():05d}.exit.json", {
            "attempt": owner.token, "exit_code": exit_code, "error": error, "launch": os.environ.get(LAUNCH)})


def forget(path: Path) -> None:
    """Drops the last words of an earlier attempt, so that nobody takes them for ours."""
    for words in path.glob("logs/rank-*.exit.json"):
        words.unlink(missing_ok=True)


def end_with_launcher() -> None:
    """Asks this rank to stop when torchrun is gone, however it went: nobody else could end it, and it holds the run."""
    if os.environ.get(LAUNCH):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)      # PR_SET_PDEATHSIG


@contextlib.contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """Collects requests to end (SLURM's USR2, torchrun's TERM, Ctrl-C); a second Ctrl-C is taken at its word."""
    asked: list[int] = []

    def note(number: int, _: Any) -> None:
        if number == signal.SIGINT and number in asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def environment() -> dict[str, Any]:
    """What this attempt runs on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    described = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = re.search(r"model name\s*:\s*(.+)", described)
    return {"python": platform.python_version(), "platform": platform.platform(), "host": socket.gethostname(),
            "cpu": cpu.group(1) if cpu else platform.processor(), "cpus": len(os.sched_getaffinity(0)),
            "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
            "slurm": {name: value for name, value in os.environ.items() if name.startswith("SLURM_JOB")},
            "commit": _commit(), "packages": versions}


def _commit() -> str | None:
    """Of which commit this code is, where it is a checkout; with -dirty, where files differ from it."""
    home = Path(__file__).parent.parent
    if not (home / ".git").exists():        # an installed package may lie inside a repository of somebody else's
        return None
    try:
        return subprocess.run(["git", "-C", str(home), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                              capture_output=True, text=True, timeout=10, check=True,
                              env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"}).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """Sends this rank's log lines to logs/rank-00000.log, and rank 0's warnings to the person as well."""
    file = logging.FileHandler(folder.make(path / "logs") / f"rank-{dist.rank():05d}.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers: list[logging.Handler] = [file]
    if dist.rank() == 0:
        person = logging.StreamHandler()
        person.setLevel(logging.WARNING)
        person.setFormatter(logging.Formatter("ssl-dist: warning: %(message)s"))
        handlers.append(person)
    root = logging.getLogger("ssl_dist")
    root.setLevel(logging.INFO)
    for handler in handlers:
        root.addHandler(handler)
    try:
        yield
    finally:        # a notebook's next run has a log of its own
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
