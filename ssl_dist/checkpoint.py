"""One folder a step, complete or invisible.

All ranks write into a hidden folder; when every file is on the disk, rank 0 lists them with size and digest in
MANIFEST.json and renames the folder to the name that a resume looks for. Tensors are safetensors: nothing here can run.
"""

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from shards import folder
from ssl_dist import dist
from ssl_dist.engine import Engine

logger = logging.getLogger(__name__)

FORMAT = 1


class CheckpointError(RuntimeError):
    """Checkpoints are there, and none can be used."""

    exit_code = 9


def save(root: Path, step: int, engine: Engine, state: dict[str, Any], keep: int) -> Path:
    """Writes `root`/step-000123 with all ranks; on return it is complete on every rank's view of the disk."""
    final, draft = root / name(step), root / f".{name(step)}.tmp"

    def prepare() -> None:
        shutil.rmtree(draft, ignore_errors=True)
        folder.make(draft)

    dist.once(prepare)
    moments = engine.moments()          # of all ranks: each may have a part of them
    files, failure = [], None
    try:
        content = {f"rank-{dist.rank():05d}.safetensors": _bytes(engine.buffers())}
        if dist.rank() == 0:
            content |= {"weights.safetensors": _bytes(engine.weights()),
                        "optimizer.safetensors": _bytes(moments),
                        "state.json": json.dumps({**state, "step": step, "world": dist.world()}, indent=2).encode()}
        for file, data in content.items():
            folder.write(draft / file, data)
            files.append({"name": file, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    except OSError as error:
        failure = error
    outcomes = dist.gather((files, failure))

    def publish() -> None:
        if broken := [error for _, error in outcomes if error]:
            shutil.rmtree(draft, ignore_errors=True)
            raise broken[0]
        folder.write_json(draft / "MANIFEST.json", {"format": FORMAT, "step": step, "world": dist.world(),
                                                    "files": [file for files, _ in outcomes for file in files]})
        shutil.rmtree(final, ignore_errors=True)        # a folder of this step that did not verify
        folder.publish(draft, final)
        # Higher numbers are damaged folders that this attempt passed over; counting them would throw away sound ones.
        for old in [older for older in steps(root) if older <= step][keep:]:
            shutil.rmtree(root / name(old))

    dist.once(publish)
    logger.info("saved %s", final)
    return final


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


def verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint's files; an empty list is a sound checkpoint."""
    try:
        manifest = json.loads((path / "MANIFEST.json").read_text())
        listed = [(file["name"], file["bytes"], file["sha256"]) for file in manifest["files"]]
        if manifest["format"] != FORMAT:
            return [f"format {manifest['format']}, this version reads {FORMAT}"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"MANIFEST.json cannot be read ({error})"]
    problems = []
    for file, size, sha256 in listed:
        if not (path / file).is_file():
            problems.append(f"{file} is missing")
        elif (path / file).stat().st_size != size:
            problems.append(f"{file} has {(path / file).stat().st_size} bytes, should have {size}")
        else:
            try:
                with (path / file).open("rb") as handle:
                    if hashlib.file_digest(handle, "sha256").hexdigest() != sha256:
                        problems.append(f"{file} changed on disk")
            except OSError as error:        # a bad sector must not hide the checkpoint before this one
                problems.append(f"{file} cannot be read ({error.strerror})")
    return problems


def state(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: step, world, and what the run passed to `save`."""
    return json.loads((path / "state.json").read_text())


def load(path: Path, engine: Engine) -> int:
    """Puts weights, optimizer state and this rank's buffers back; returns the step to go on with."""
    own = path / f"rank-{dist.rank():05d}.safetensors"
    # More ranks than there were: running statistics of rank 0 stand in for those that nobody kept.
    buffers = own if own.exists() else path / "rank-00000.safetensors"
    engine.restore(_tensors(path / "weights.safetensors"), _tensors(buffers), _tensors(path / "optimizer.safetensors"))
    logger.info("resumed from %s", path)
    return state(path)["step"]


def weights(path: Path) -> dict[str, Tensor]:
    """Parameters of a checkpoint and rank 0's buffers, by name."""
    return _tensors(path / "weights.safetensors") | _tensors(path / "rank-00000.safetensors")


def _bytes(tensors: dict[str, Tensor]) -> bytes:
    return tensors_to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _tensors(path: Path) -> dict[str, Tensor]:
    return tensors_from_bytes(path.read_bytes())
