"""One folder a step, complete or invisible.

All ranks write into a hidden folder, beside the training where memory allows; when every file is on the disk, rank 0
lists them with size and digest in MANIFEST.json and renames the folder to the name that a resume looks for. Tensors are
safetensors: nothing here can run.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load as tensors_from_bytes
from torch import Tensor

from shards import folder
from shards.folder import StorageError
from ssl_dist import config, dist, finite, points
from ssl_dist.engine import Engine
from ssl_dist.finite import NotFinite

logger = logging.getLogger(__name__)

FORMAT = 1
ALWAYS = ("weights.safetensors", "optimizer.safetensors", "state.json")
SEEN = 120.0        # seconds until a folder that rank 0 renamed is seen on every machine: NFS takes its time


class CheckpointError(RuntimeError):
    """Checkpoints are there, and none can be used."""

    exit_code = 9


class Saver:
    """The checkpoints of one run, at most one in the making. All ranks call it alike, between two steps."""

    def __init__(self, root: Path, engine: Engine, told: config.Checkpoint, check: Callable[[], None] = lambda: None,
                 mark: str = ""):
        """`check` refuses to write where the folder is no longer ours; `mark` is in the names of what is half-written.
        """
        self.root, self.engine, self.told, self.check = root, engine, told, check
        self._thread: threading.Thread | None = None
        self._step = -1                 # of the one in the making
        self._files: list[dict[str, Any]] = []
        self._failure: Exception | None = None
        self._failures = 0              # in a row
        self._begun = time.monotonic()
        self._sound: set[int] = set()   # older steps whose files were read beside this save, and hold what they say
        self._mark = mark
        self._hasty = False             # the one in the making is waited for: nothing is proved, and nothing removed

    def due(self) -> bool:
        """Whether so much time has passed that a checkpoint is wanted at any step; of rank 0's clock."""
        return bool(self.told.minutes) and dist.rank() == 0 and time.monotonic() - self._begun > 60 * self.told.minutes

    @property
    def pending(self) -> bool:
        """Whether a checkpoint was begun and is not published."""
        return self._step >= 0

    @property
    def writing(self) -> bool:
        """Whether this rank still writes."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, step: int, state: dict[str, Any], *, hasty: bool = False) -> None:
        """Takes the state as it is now and writes it, in a thread where memory has room for a copy.

        Each file is read back, for an older checkpoint goes because this one is good; `hasty` does neither.
        """
        assert not self.pending, "the checkpoint before this one was not published"
        self._step, self._files, self._failure, self._begun = step, [], None, time.monotonic()
        self._hasty = hasty
        points.at("save.begin", step)
        content = self._content(step, state)
        dist.once(self._prepare)
        if bad := [offender for tensors in content.values() if isinstance(tensors, dict)
                   for offender in finite.offenders(tensors)]:
            self._failure = NotFinite(f"{bad[0]} of step {step} holds a value that is no number; it was not saved")
        elif self.told.background and _fits(content):
            kept = {file: _copied(tensors) for file, tensors in content.items()}
            self._thread = threading.Thread(target=self._write, args=(kept,), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._write(content)

    def _content(self, step: int, state: dict[str, Any]) -> dict[str, dict[str, Tensor] | bytes]:
        """What this rank writes, by the name of the file."""
        moments = self.engine.moments()         # of all ranks: each may have a part of them
        own: dict[str, dict[str, Tensor] | bytes] = {f"rank-{dist.rank():05d}.safetensors": self.engine.buffers()}
        if dist.rank() == 0:
            own |= {"weights.safetensors": self.engine.weights(), "optimizer.safetensors": moments,
                    "state.json": json.dumps({**state, "step": step, "world": dist.world()}, indent=2).encode()}
        return own

    @property
    def _draft(self) -> Path:
        return self.root / f".{name(self._step)}{self._mark and '.'}{self._mark}.tmp"

    def _prepare(self) -> None:
        try:
            self.check()
            shutil.rmtree(self._draft, ignore_errors=True)
            folder.make(self._draft)
        except OSError as error:
            self._failure = error

    def _write(self, content: dict[str, dict[str, Tensor] | bytes]) -> None:
        if self._failure:
            return
        try:
            for file, tensors in content.items():
                data = tensors if isinstance(tensors, bytes) else finite.packed(tensors)
                points.at_side("save.file", self._step, self._draft / file)
                folder.write(self._draft / file, data)
                self._files.append({"name": file, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
            for told in () if self._hasty else self._files:
                if problem := _wrong(self._draft, told["name"], told["bytes"], told["sha256"], afresh=True):
                    raise StorageError(errno.EIO, f"{problem} as soon as it was written")
            if dist.rank() == 0 and not self._hasty:
                self._reread()
        except Exception as error:      # of a thread; `publish` tells it to all
            self._failure = error

    def publish(self, *, must: bool = False) -> Path | None:
        """Waits until all ranks have written; on return the checkpoint is complete on every rank's view of the disk.

        None where the disk refused, and the one before is still the newest; too often in a row, or where there `must`
        be one, is an error.
        """
        if self._thread:
            self._thread.join()
            self._thread = None
        step = self._step
        points.at("save.written", step)
        outcomes = dist.gather((self._files, self._failure))
        try:
            broken = [error for _, error in outcomes if error]
            failure = broken[0] if broken else dist.once(lambda: self._publish([file for files, _ in outcomes
                                                                                for file in files]))
        finally:
            draft, self._step = self._draft, -1
        if failure is None:
            self._failures = 0
            _await(self.root / name(step) / "MANIFEST.json")
            logger.info("saved %s", self.root / name(step))
            return self.root / name(step)
        dist.once(lambda: shutil.rmtree(draft, ignore_errors=True))
        if not isinstance(failure, OSError):
            raise failure
        self._failures += 1
        sentence = _refused(self.root, step, failure, dist.first(self._need()))
        if must or self._failures >= self.told.failures:
            raise StorageError(failure.errno, f"{sentence}; {self._failures} in a row")
        if dist.rank() == 0:
            logger.warning("%s; training goes on (%d of %d in a row)", sentence, self._failures, self.told.failures)
        return None

    def _publish(self, files: list[dict[str, Any]]) -> OSError | None:
        """Rank 0: the list of files, and then the name. A disk that refuses is told to all."""
        draft, final = self._draft, self.root / name(self._step)
        try:
            self.check()
            points.at("save.manifest", self._step, draft / "MANIFEST.json")
            folder.write_json(draft / "MANIFEST.json", {"format": FORMAT, "step": self._step, "world": dist.world(),
                                                        "files": files})
            self.check()        # the disk may have taken its time
            shutil.rmtree(final, ignore_errors=True)        # a folder of this step that did not verify
            points.at("save.rename", self._step, draft / "weights.safetensors")
            folder.publish(draft, final)
        except OSError as error:
            return error
        points.at("save.keep", self._step, final / "weights.safetensors")
        if not self._hasty:
            self._retire()
        return None

    def _retire(self) -> None:
        """Removes old ones, but never so many that fewer than two are left that hold what they say."""
        # Higher numbers are damaged folders that this attempt passed over; counting them would throw away sound ones.
        older = [each for each in steps(self.root) if each <= self._step]
        sound = 0
        for number, step in enumerate(older):
            if number >= self.told.keep and sound >= 2:
                if not (self.told.keep_every and step % self.told.keep_every == 0):
                    shutil.rmtree(self.root / name(step), ignore_errors=True)
            elif sound < 2:
                sound += step == self._step or step in self._sound or not verify(self.root / name(step))

    def _reread(self) -> None:
        """Looks for one older checkpoint that is still good, if any is to go; in a thread nobody waits for it."""
        self._sound.clear()
        older = [step for step in steps(self.root) if step < self._step]
        for step in older if len(older) >= self.told.keep else ():
            if not self._sound and not verify(self.root / name(step)):
                self._sound.add(step)

    def _need(self) -> int:
        """Bytes of a checkpoint, nearly: a weight has two moments, and every rank buffers of its own."""
        weights, buffers = (sum(each.numel() * each.element_size() for each in tensors.values())
                            for tensors in (self.engine.weights(), self.engine.buffers()))
        return 3 * weights + dist.world() * buffers


def save(root: Path, step: int, engine: Engine, state: dict[str, Any], keep: int) -> Path:
    """One checkpoint, here and now."""
    saver = Saver(root, engine, config.Checkpoint(keep=keep, background=False, failures=1))
    saver.begin(step, state)
    found = saver.publish(must=True)
    assert found is not None, "what must be is there or raises"
    return found


def clean(root: Path) -> None:
    """Removes what killed attempts left half-written. Only for who holds the run folder."""
    for draft in root.glob(".step-*.tmp"):
        shutil.rmtree(draft, ignore_errors=True)


def name(step: int) -> str:
    """The folder's name of a step."""
    return f"step-{step:06d}"


def steps(root: Path) -> list[int]:
    """The steps that have a folder with a manifest, the newest first; a copy under a name of its own is not one."""
    folders = [path.parent.name for path in root.glob("step-*/MANIFEST.json")]
    numbers = [int(number) for number in (each.removeprefix("step-") for each in folders) if number.isdecimal()]
    return sorted((number for number in numbers if name(number) in folders), reverse=True)


def newest(root: Path) -> Path | None:
    """The newest checkpoint that is what its manifest says; those that are not are named in the log."""
    for step in steps(root):
        if not (problems := verify(root / name(step))):
            return root / name(step)
        logger.warning("%s is damaged and will not be used: %s", root / name(step), "; ".join(problems))
    if damaged := steps(root):
        raise CheckpointError(f"all {len(damaged)} checkpoints in {root} are damaged (see the warnings above); restore "
                              "one, or delete that folder to begin again from step 0")
    return None


def agreed(root: Path) -> Path | None:
    """The newest sound checkpoint, the same on every rank, and there on every machine."""
    found = dist.once(lambda: newest(root))
    if found:
        _await(found / "MANIFEST.json")
    return found


def verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint's files; an empty list is a sound checkpoint."""
    try:
        manifest = json.loads((path / "MANIFEST.json").read_text())
        listed = [(file["name"], file["bytes"], file["sha256"]) for file in manifest["files"]]
        if manifest["format"] != FORMAT:
            return [f"format {manifest['format']}, this version reads {FORMAT}"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"MANIFEST.json cannot be read ({error})"]
    problems = [f"MANIFEST.json does not list {file}" for file in (*ALWAYS, "rank-00000.safetensors")
                if file not in [each for each, _, _ in listed]]
    return problems + [problem for told in listed if (problem := _wrong(path, *told))]


def _wrong(path: Path, file: str, size: int, sha256: str, *, afresh: bool = False) -> str:
    """What is wrong with a file; `afresh`: by what the disk holds, as far as it can be asked, and not the memory."""
    if not (path / file).is_file():
        return f"{file} is missing"
    if (path / file).stat().st_size != size:
        return f"{file} has {(path / file).stat().st_size} bytes, should have {size}"
    try:
        with (path / file).open("rb") as handle:
            if afresh:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if hashlib.file_digest(handle, "sha256").hexdigest() != sha256:
                return f"{file} changed on disk"
    except OSError as error:        # a bad sector must not hide the checkpoint before this one
        return f"{file} cannot be read ({error.strerror})"
    return ""


def state(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: step, world, and what the run passed to `save`."""
    return json.loads((path / "state.json").read_text())


def load(path: Path, engine: Engine) -> int:
    """Puts weights, optimizer state and this rank's buffers back; returns the step to go on with."""
    step, own = state(path)["step"], path / f"rank-{dist.rank():05d}.safetensors"
    points.at("resume.load", step, path / "weights.safetensors")
    # More ranks than there were: running statistics of rank 0 stand in for those that nobody kept.
    buffers = own if own.exists() else path / "rank-00000.safetensors"
    engine.restore(_tensors(path / "weights.safetensors"), _tensors(buffers), _tensors(path / "optimizer.safetensors"))
    logger.info("resumed from %s", path)
    return step


def weights(path: Path) -> dict[str, Tensor]:
    """Parameters of a checkpoint and rank 0's buffers, by name."""
    return _tensors(path / "weights.safetensors") | _tensors(path / "rank-00000.safetensors")


def _copied(tensors: dict[str, Tensor] | bytes) -> dict[str, Tensor] | bytes:
    return tensors if isinstance(tensors, bytes) else {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _fits(content: dict[str, dict[str, Tensor] | bytes]) -> bool:
    """Whether this machine has room for a copy of every tensor, and for the largest file once more, on each rank."""
    sizes = [sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
             for tensors in content.values() if isinstance(tensors, dict)]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return False
    return (sum(sizes) + 2 * max(sizes)) * dist.local_world() < free / 2


def _await(path: Path) -> None:
    """Until this machine sees a file that rank 0 has published: NFS shows it late elsewhere."""
    since = time.monotonic()
    while not path.exists():
        if time.monotonic() - since > SEEN:
            raise StorageError(0, f"{path} was published by rank 0 and is not seen here after {SEEN:.0f} s; put the "
                               "run folder on a disk that all machines share")
        time.sleep(0.1)


def _refused(root: Path, step: int, error: OSError, need: int) -> str:
    """Why a checkpoint is not there, in one sentence."""
    try:
        free = f"{shutil.disk_usage(root).free / 1e9:.3f} GB are free"
    except OSError:
        free = "the disk does not say what is free"
    reason = error.strerror if isinstance(error, StorageError) else os.strerror(error.errno or 0)
    return f"{root}: the checkpoint of step {step} was refused ({reason}); it needs {need / 1e9:.3f} GB, {free}"


def _tensors(path: Path) -> dict[str, Tensor]:
    return tensors_from_bytes(path.read_bytes())
