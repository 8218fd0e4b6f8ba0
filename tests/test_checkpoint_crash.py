"""A save that ends at every one of its file operations: killed there, and with the power cut there.

A power cut leaves what was synced: contents of files, and lists of names of folders. What was not may be there or not,
so two disks are looked at: one that kept no name that was not synced, and one that kept every name and lost contents.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssl_dist import checkpoint

NAMES = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "open")


class Numbers:
    """What a checkpoint asks of an engine."""

    def __init__(self, step: int) -> None:
        self.value = torch.full((50,), float(step))

    def weights(self) -> dict[str, Tensor]:
        return {"weight": self.value}

    def buffers(self) -> dict[str, Tensor]:
        return {"buffer": -self.value}

    def moments(self) -> dict[str, Tensor]:
        return {"weight|exp_avg": 2 * self.value}


class Disk:
    """What of a folder would be there after a power cut."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.contents: dict[int, bytes] = {}
        self.names: dict[int, dict[str, int]] = {}
        for parent, _, files in os.walk(root):
            self.synced(Path(parent))
            for file in files:
                self.synced(Path(parent, file))

    def synced(self, path: Path) -> None:
        if path.is_dir():
            self.names[path.stat().st_ino] = {each.name: each.stat().st_ino for each in path.iterdir()}
        else:
            self.contents[path.stat().st_ino] = path.read_bytes()

    def left(self, copy: Path, *, every_name: bool) -> None:
        """Writes it down as a folder of its own."""
        live = {Path(parent).stat().st_ino: {each.name: each.stat().st_ino for each in Path(parent).iterdir()}
                for parent, _, _ in os.walk(self.root)}

        def build(folder: Path, number: int) -> None:
            folder.mkdir()
            names = live.get(number, {}) if every_name else self.names.get(number, {})
            for name, inner in names.items():
                if inner in live or inner in self.names:
                    build(folder / name, inner)
                else:
                    (folder / name).write_bytes(self.contents.get(inner, b""))

        build(copy, self.root.stat().st_ino)


def ended_at(count: int, root: Path, copies: Path | None) -> int:
    """Saves step 6 in a process of its own that ends before operation `count`; how many there were."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        code = 1
        try:
            disk, seen = Disk(root), 0
            for name in NAMES:
                plainly: Callable[..., Any] = getattr(os, name)

                def counted(*args: Any, name: str = name, plainly: Callable[..., Any] = plainly, **how: Any) -> Any:
                    nonlocal seen
                    if name != "open" or args[1] & (os.O_CREAT | os.O_TRUNC):
                        if seen == count:
                            if copies:
                                for each in NAMES:
                                    setattr(os, each, real[each])
                                disk.left(copies / "synced", every_name=False)
                                disk.left(copies / "named", every_name=True)
                            os._exit(0)
                        seen += 1
                    found = plainly(*args, **how)
                    if name == "fsync":
                        disk.synced(Path(f"/proc/self/fd/{args[0]}").readlink())
                    return found

                real[name] = plainly
                setattr(os, name, counted)
            checkpoint.save(root, 6, Numbers(6), {"identity": {}}, keep=2)      # type: ignore[arg-type]
            os.write(writer, f"{seen}".encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    said = os.read(reader, 100)
    os.close(reader)
    assert os.waitpid(child, 0)[1] == 0
    return int(said or -1)


real: dict[str, Any] = {}


def prepared(root: Path) -> Path:
    for step in (2, 4):
        checkpoint.save(root, step, Numbers(step), {"identity": {}}, keep=2)        # type: ignore[arg-type]
    return root


def test_wherever_a_save_ends_the_newest_checkpoint_is_whole(tmp_path: Path) -> None:
    operations = ended_at(10**6, prepared(tmp_path / "all"), None)
    assert operations > 20
    assert checkpoint.steps(tmp_path / "all") == [6, 4]
    found: dict[str, list[int]] = {"killed": [], "synced": [], "named": []}
    for count in range(operations + 1):
        home = tmp_path / str(count)
        root = prepared(home / "killed")
        ended_at(count, root, home)
        for disk, steps in found.items():
            if not (home / disk).exists():      # the whole save went by
                continue
            newest = checkpoint.newest(home / disk)         # verifies every digest
            assert newest is not None, f"{disk} at operation {count}: no checkpoint is left"
            step = checkpoint.state(newest)["step"]
            weight = checkpoint.weights(newest)
            assert torch.equal(weight["weight"], Numbers(step).value)
            assert len(checkpoint.steps(home / disk)) >= 2, f"{disk} at operation {count}: fewer than two"
            steps.append(step)
    for disk, steps in found.items():
        assert steps == sorted(steps), f"{disk}: a finished checkpoint was lost again"
        assert set(steps) == {4, 6}, f"{disk}: it proves nothing"


def test_the_disk_of_the_test_forgets_what_was_not_synced(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "old").write_text("old")
    disk = Disk(root)
    (root / "new").write_text("new")
    (root / "old").write_text("changed")
    disk.left(tmp_path / "synced", every_name=False)
    disk.left(tmp_path / "named", every_name=True)
    assert {path.name: path.read_text() for path in (tmp_path / "synced").iterdir()} == {"old": "old"}
    assert {path.name: path.read_text() for path in (tmp_path / "named").iterdir()} == {"old": "old", "new": ""}


@pytest.mark.parametrize("keep_every", [0, 4])
def test_every_nth_stays_besides_the_newest(keep_every: int, tmp_path: Path) -> None:
    from ssl_dist import config

    for step in range(1, 10):
        saver = checkpoint.Saver(tmp_path, Numbers(step), config.Checkpoint(keep=2, keep_every=keep_every,   # type: ignore
                                                                            background=False))
        saver.begin(step, {})
        saver.publish()
    assert checkpoint.steps(tmp_path) == ([9, 8, 4] if keep_every else [9, 8])


def test_old_ones_stay_where_the_newest_do_not_verify(tmp_path: Path) -> None:
    """Fewer than two that hold what they say are never left."""
    prepared(tmp_path)
    (tmp_path / "step-000004" / "weights.safetensors").write_bytes(b"")
    checkpoint.save(tmp_path, 6, Numbers(6), {}, keep=2)        # type: ignore[arg-type]
    assert checkpoint.steps(tmp_path) == [6, 4, 2]
    checkpoint.save(tmp_path, 8, Numbers(8), {}, keep=2)        # type: ignore[arg-type]
    assert checkpoint.steps(tmp_path) == [8, 6]


def test_in_the_background_it_is_the_state_at_the_beginning_that_is_saved(tmp_path: Path,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    from shards import folder
    from ssl_dist import config

    go, plainly = threading.Event(), folder.write
    monkeypatch.setattr(folder, "write", lambda *args: go.wait(60) and plainly(*args))
    engine = Numbers(1)
    saver = checkpoint.Saver(tmp_path, engine, config.Checkpoint())         # type: ignore[arg-type]
    saver.begin(1, {"left_out": []})
    assert saver.pending
    assert saver.writing
    engine.value.fill_(7.0)
    assert checkpoint.steps(tmp_path) == []
    go.set()
    path = saver.publish()
    assert path is not None
    assert not saver.pending
    assert torch.equal(checkpoint.weights(path)["weight"], torch.full((50,), 1.0))


def test_a_value_that_is_no_number_is_in_no_checkpoint(tmp_path: Path) -> None:
    from ssl_dist.finite import NotFinite

    engine = Numbers(1)
    engine.value[3] = float("nan")
    with pytest.raises(NotFinite, match=r"(weight|buffer) of step 1") as refused:
        checkpoint.save(tmp_path, 1, engine, {}, keep=2)        # type: ignore[arg-type]
    assert refused.value.exit_code == 8
    assert not list(tmp_path.iterdir())
