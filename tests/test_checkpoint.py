"""The training step and its checkpoints: an interrupted run against an uninterrupted one, and every kind of damage."""

import errno
import json
import os
import runpy
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from shards import folder
from ssl_dist import checkpoint, config, dist, optim
from ssl_dist.config import Optim, Train
from ssl_dist.data.batch import Batch
from ssl_dist.engine import Engine
from ssl_dist.methods import base

run = runpy.run_path(str(Path(__file__).with_name("ranks.py")))["run"]

CPU = torch.device("cpu")
BATCH, SIDE, STEPS = 12, 10, 6
OPTIMIZERS = {"adamw": Optim(name="adamw", lr=0.01), "sgd": Optim(name="sgd", lr=0.05),
              "lars": Optim(name="lars", lr=5.0), "plain": Optim(name="sgd", lr=0.05, momentum=0.0)}


class Tiny(base.Method):
    """Convolutions with BatchNorm, dropout, and a queue that moves without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                                     nn.Conv2d(8, 6, 2, bias=False), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1),
                                     nn.Flatten(), nn.Dropout(0.2), nn.Linear(6, 4))
        self.views = ()
        self.register_buffer("queue", torch.zeros(4))
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        pixels = batch.views[0].permute(0, 3, 1, 2).float() / 255
        out = self.encoder(pixels)
        self.latest = out.detach().mean(0)
        return {"loss": F.mse_loss(out.sigmoid(), pixels.mean((2, 3)).repeat(1, 2)[:, :4] + self.queue * progress)}

    def after_step(self, progress: float) -> None:
        self.queue.mul_(0.9).add_(self.latest * (1 - progress))


def built(optimizer: Optim, world: int = 1) -> Engine:
    torch.manual_seed(4)
    method = Tiny()
    settings = Train(run=Path("nowhere"), data=config.Data(shards=[], batch=BATCH), method={}, steps=STEPS,
                     optim=optimizer)
    return Engine(method, optim.build(method, optimizer), config.deepspeed(settings, world), CPU)


def trained(engine: Engine, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        whole = np.random.default_rng(step).integers(0, 256, (BATCH, SIDE, SIDE, 3), dtype=np.uint8)
        own = np.array_split(whole, dist.world())[dist.rank()]
        optim.set_rates(engine.optimizer, OPTIMIZERS["adamw"].lr * (1 + step % 3), OPTIMIZERS["adamw"].weight_decay)
        torch.manual_seed(100 * step + dist.rank())         # as the loop does, for dropout
        scalars = engine(Batch([torch.from_numpy(own)], [], np.arange(len(own)), np.arange(len(own))), step / STEPS)
        engine.backward(scalars["loss"])
        engine.step()
        engine.method.after_step(step / STEPS)
        losses.append(float(scalars["loss"].detach()))
    return losses


def everything(engine: Engine) -> dict[str, Tensor]:
    return {kind + name: tensor.detach().clone().contiguous() for kind, tensors in (
        ("weights ", engine.weights()), ("buffers ", engine.buffers()), ("moments ", engine.moments()))
        for name, tensor in tensors.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """The names of tensors that differ in one bit or more."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.fixture(scope="module")
def _group() -> Iterator[None]:
    """A group of one, and the variables that DeepSpeed wants to see gone again afterwards."""
    before = dict(os.environ)
    dist.start(CPU)
    yield
    dist.stop()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def engine(_group: None) -> Engine:
    engine = built(OPTIMIZERS["adamw"])
    trained(engine, 0, 2)
    return engine


def saved(root: Path, engine: Engine, *steps: int, keep: int = 9) -> list[Path]:
    return [checkpoint.save(root, step, engine, {"identity": step}, keep) for step in steps]


# ---- resuming

@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one_to_the_last_bit(name: str, tmp_path: Path) -> None:
    whole = built(OPTIMIZERS[name])
    start = {name: weight.clone() for name, weight in whole.weights().items()}
    losses = trained(whole, 0, 3)
    checkpoint.save(tmp_path, 3, whole, {"identity": {"seed": 0}}, keep=2)
    losses += trained(whole, 3, STEPS)
    assert same(start, whole.weights()) == list(start), "a weight did not learn, so its return proves nothing"
    again = built(OPTIMIZERS[name])
    found = checkpoint.newest(tmp_path)
    assert found == tmp_path / "step-000003"
    assert checkpoint.state(found) == {"identity": {"seed": 0}, "step": 3, "world": 1}
    checkpoint.load(found, again)
    assert trained(again, 3, STEPS) == losses[3:]
    assert same(everything(whole), everything(again)) == []
    assert not torch.equal(whole.buffers()["queue"], torch.zeros(4))


@pytest.mark.usefixtures("_group")
def test_going_back_leaves_no_moments_of_weights_that_had_none(tmp_path: Path) -> None:
    engine = built(OPTIMIZERS["adamw"])
    checkpoint.save(tmp_path, 0, engine, {}, keep=2)
    first = trained(engine, 0, 3)
    once = everything(engine)
    checkpoint.load(tmp_path / "step-000000", engine)
    assert engine.moments() == {}
    assert trained(engine, 0, 3) == first
    assert same(once, everything(engine)) == []


def on_ranks(path: Path) -> dict[str, dict[str, Tensor] | list[float]]:
    root = path / f"checkpoints-of-{dist.world()}"
    whole = built(OPTIMIZERS["adamw"], dist.world())
    losses = trained(whole, 0, 3)
    checkpoint.save(root, 3, whole, {}, keep=2)
    losses += trained(whole, 3, STEPS)
    again = built(OPTIMIZERS["adamw"], dist.world())
    checkpoint.load(checkpoint.newest(root), again)
    resumed = trained(again, 3, STEPS)

    # The last rank's disk is full: every rank must learn of it, and none may see a checkpoint.
    keep = folder.write

    def full(file: Path, data: bytes) -> None:
        if dist.rank() == dist.world() - 1:
            raise OSError(errno.ENOSPC, "full", str(file))
        keep(file, data)

    folder.write = full
    refused = ""
    try:
        checkpoint.save(root, 6, again, {}, keep=2)
    except OSError as error:
        refused = errno.errorcode[error.errno]
    folder.write = keep
    return {"whole": everything(whole), "again": everything(again), "losses": losses[3:], "resumed": resumed,
            "refused": refused, "left": sorted(each.name for each in root.iterdir())}


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return run(on_ranks, (3,), tmp_path_factory.mktemp("ranks"), "deepspeed")[3]


def test_three_ranks_resume_to_the_last_bit_each_with_its_own_buffers(ranked: list[dict]) -> None:
    for rank in ranked:
        assert rank["resumed"] == rank["losses"]
        assert same(rank["whole"], rank["again"]) == []
    first, *others = ranked
    for other in others:
        differing = same(first["whole"], other["whole"])
        assert differing, "running statistics of different slices cannot be equal: the test proves nothing"
        assert all(name.startswith("buffers ") for name in differing), "the ranks' weights have drifted apart"


def test_when_one_ranks_disk_is_full_every_rank_is_told_and_no_checkpoint_appears(ranked: list[dict]) -> None:
    for rank in ranked:
        assert rank["refused"] == "ENOSPC"
        assert rank["left"] == ["step-000003"]


@pytest.mark.usefixtures("_group")
def test_the_engine_steps_as_a_plain_loop_without_deepspeed_does() -> None:
    engine = built(OPTIMIZERS["sgd"])
    torch.manual_seed(4)
    method = Tiny()
    shapes = {many: [each for each in method.parameters() if (each.ndim > 1) == many] for many in (True, False)}
    plain = torch.optim.SGD([{"params": each, "weight_decay": OPTIMIZERS["sgd"].weight_decay * many}
                             for many, each in shapes.items()], lr=0.03, momentum=0.9, nesterov=True)
    optim.set_rates(engine.optimizer, 0.03, OPTIMIZERS["sgd"].weight_decay)
    for step in range(3):
        whole = np.random.default_rng(step).integers(0, 256, (BATCH, SIDE, SIDE, 3), dtype=np.uint8)
        batch = Batch([torch.from_numpy(whole)], [], np.arange(BATCH), np.arange(BATCH))
        torch.manual_seed(step)
        mine = engine(batch, 0.5)["loss"]
        engine.backward(mine)
        torch.manual_seed(step)
        theirs = method(batch, 0.5)["loss"]
        theirs.backward()
        expected = torch.cat([parameter.grad.flatten() for parameter in method.parameters()]).norm()
        assert float(mine.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
        assert engine.gradient_norm() == pytest.approx(float(expected), rel=1e-4)
        engine.step()
        plain.step()
        plain.zero_grad()
        assert all(parameter.grad is None or not parameter.grad.any() for parameter in engine.method.parameters())
    for mine, theirs in zip(engine.method.parameters(), method.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("_group")
def test_gradients_are_clipped_only_when_asked_to() -> None:
    for clip in (0.0, 1e-3):
        engine = built(replace(OPTIMIZERS["plain"], clip=clip, weight_decay=0.0))
        before = {name: weight.clone() for name, weight in engine.weights().items()}
        optim.set_rates(engine.optimizer, 1.0, 0.0)
        pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (BATCH, SIDE, SIDE, 3), dtype=np.uint8))
        engine.backward(engine(Batch([pixels], [], np.arange(BATCH), np.arange(BATCH)), 0.0)["loss"])
        norm = engine.gradient_norm()
        engine.step()
        moved = torch.cat([(weight - before[name]).flatten() for name, weight in engine.weights().items()]).norm()
        assert norm > 0.01
        assert float(moved) == pytest.approx(clip or norm, rel=1e-3)


def test_a_checkpoint_of_another_method_is_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="name different tensors"):
        engine.restore({**engine.weights(), "stranger": torch.zeros(1)}, engine.buffers(), {})
    with pytest.raises(ValueError, match="name different tensors"):
        engine.restore(engine.weights(), {}, {})


# ---- what is on the disk

def test_the_manifest_tells_the_truth_about_every_file(engine: Engine, tmp_path: Path) -> None:
    (path,) = saved(tmp_path, engine, 5)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert {file["name"] for file in manifest["files"]} | {"MANIFEST.json"} == {each.name for each in path.iterdir()}
    assert (manifest["step"], manifest["world"]) == (5, 1)
    assert checkpoint.verify(path) == []


def test_tensors_are_safetensors_and_nothing_else_is_loaded(engine: Engine, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = saved(tmp_path, engine, 5)
    kinds = {each.suffix for each in path.iterdir()}
    assert kinds == {".json", ".safetensors"}
    with safe_open(path / "weights.safetensors", "pt") as file:
        assert set(file.keys()) == set(engine.weights())
        for name, weight in engine.weights().items():
            assert torch.equal(file.get_tensor(name), weight)
    with safe_open(path / "rank-00000.safetensors", "pt") as file:
        assert set(file.keys()) == set(engine.buffers())
        assert "scratch" not in file.keys()      # noqa: SIM118  (it is no dictionary)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    for name in ("torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler"):
        monkeypatch.setattr(name, never)
    checkpoint.load(path, engine)
    assert set(checkpoint.weights(path)) == set(engine.method.state_dict())


def test_only_the_newest_are_kept(engine: Engine, tmp_path: Path) -> None:
    saved(tmp_path, engine, 1, 2, 3, 4, keep=2)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["step-000003", "step-000004"]
    assert checkpoint.steps(tmp_path) == [4, 3]
    assert checkpoint.newest(tmp_path) == tmp_path / "step-000004"


def test_an_older_one_goes_only_while_two_are_left_that_were_read_and_are_good(engine: Engine, tmp_path: Path) -> None:
    """What this process wrote itself may have changed since: it is read again before another is relied on for it."""
    saver = checkpoint.Saver(tmp_path, engine, config.Checkpoint(keep=2))
    for step in (1, 2, 3):
        saver.begin(step, {})
        saver.publish(must=True)
    assert checkpoint.steps(tmp_path) == [3, 2]
    changed(tmp_path / "step-000003")
    for step, left in ((4, [4, 3, 2]), (5, [5, 4])):
        saver.begin(step, {})
        saver.publish(must=True)
        assert checkpoint.steps(tmp_path) == left
        good = [each for each in left if not checkpoint.verify(tmp_path / checkpoint.name(each))]
        assert len(good) == 2


def test_what_is_waited_for_is_written_and_nothing_more(engine: Engine, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked to stop, with seconds left: no file is read, and no checkpoint goes for which another would have to be."""
    saver = checkpoint.Saver(tmp_path, engine, config.Checkpoint(keep=2))
    for step in (1, 2):
        saver.begin(step, {})
        saver.publish(must=True)
    wrong = checkpoint._wrong
    monkeypatch.setattr(checkpoint, "_wrong", None)
    saver.begin(3, {}, hasty=True)
    assert saver.publish(must=True)
    assert checkpoint.steps(tmp_path) == [3, 2, 1]
    monkeypatch.setattr(checkpoint, "_wrong", wrong)
    saver.begin(4, {})
    saver.publish(must=True)
    assert checkpoint.steps(tmp_path) == [4, 3]


def test_two_attempts_write_their_halves_under_names_of_their_own(engine: Engine, tmp_path: Path) -> None:
    savers = [checkpoint.Saver(tmp_path, engine, config.Checkpoint(background=False), mark=mark) for mark in "ab"]
    for saver in savers:
        saver.begin(3, {})
    assert {each.name for each in tmp_path.iterdir()} == {".step-000003.a.tmp", ".step-000003.b.tmp"}
    assert savers[1].publish()
    assert checkpoint.verify(tmp_path / "step-000003") == []
    checkpoint.clean(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["step-000003"]


def test_what_comes_back_otherwise_from_the_disk_is_no_checkpoint(engine: Engine, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    saver = checkpoint.Saver(tmp_path, engine, config.Checkpoint(keep=2))
    for step in (1, 2):
        saver.begin(step, {})
        saver.publish(must=True)
    write = folder.write

    def rotten(path: Path, content: bytes | str) -> None:
        write(path, content)
        if path.name == "optimizer.safetensors":
            with path.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(bytes([content[-1] ^ 1]))

    monkeypatch.setattr(folder, "write", rotten)
    saver.begin(3, {})
    assert saver.publish() is None
    with pytest.raises(OSError, match=r"optimizer\.safetensors changed on disk as soon as it was written"):
        checkpoint.save(tmp_path, 3, engine, {}, keep=2)
    assert checkpoint.steps(tmp_path) == [2, 1]


def test_steps_are_numbers_and_not_words(engine: Engine, tmp_path: Path) -> None:
    saved(tmp_path, engine, 999_999, 1_000_000, keep=2)
    assert checkpoint.newest(tmp_path) == tmp_path / "step-1000000"
    saved(tmp_path, engine, 1_000_001, keep=2)
    assert checkpoint.steps(tmp_path) == [1_000_001, 1_000_000]


def test_folders_of_other_names_are_left_alone(engine: Engine, tmp_path: Path) -> None:
    saved(tmp_path, engine, 1)
    for name in ("step-000009-copy", "step-best", "step-9", ".step-000009.tmp"):
        shutil.copytree(tmp_path / "step-000001", tmp_path / name)
    (tmp_path / "step-000008").mkdir()      # no manifest: it does not exist
    assert checkpoint.steps(tmp_path) == [1]
    assert checkpoint.newest(tmp_path) == tmp_path / "step-000001"
    saved(tmp_path, engine, 2, 3, keep=2)
    assert checkpoint.steps(tmp_path) == [3, 2]
    assert (tmp_path / "step-best/weights.safetensors").is_file()


def test_a_folder_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "nowhere") is None


# ---- damage

def changed(path: Path) -> None:
    with (path / "weights.safetensors").open("r+b") as handle:
        handle.seek(-5, os.SEEK_END)
        byte = handle.read(1)[0]
        handle.seek(-5, os.SEEK_END)
        handle.write(bytes([byte ^ 1]))


def cut(path: Path, name: str) -> None:
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:len(content) // 2])


DAMAGE = {
    "a changed byte": (changed, "weights.safetensors changed on disk"),
    "a missing file": (lambda path: (path / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
    "a missing rank": (lambda path: (path / "rank-00000.safetensors").unlink(), "rank-00000.safetensors is missing"),
    "a cut file": (lambda path: cut(path, "weights.safetensors"), "bytes, should have"),
    "a cut state": (lambda path: cut(path, "state.json"), "bytes, should have"),
    "a cut manifest": (lambda path: cut(path, "MANIFEST.json"), "MANIFEST.json cannot be read"),
    "an empty manifest": (lambda path: (path / "MANIFEST.json").write_text(""), "MANIFEST.json cannot be read"),
    "a manifest of nothing": (lambda path: (path / "MANIFEST.json").write_text('{"format": 1, "files": []}'),
                              "does not list weights.safetensors"),
    "another manifest": (lambda path: (path / "MANIFEST.json").write_text('["files"]'), "MANIFEST.json cannot be read"),
    "another format": (lambda path: (path / "MANIFEST.json").write_text('{"format": 99, "files": []}'), "format 99"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_not_chosen_and_the_one_before_it_is(damage: str, engine: Engine, tmp_path: Path,
                                                                     caplog: pytest.LogCaptureFixture) -> None:
    first, second = saved(tmp_path, engine, 3, 6)
    harm, said = DAMAGE[damage]
    harm(second)
    assert checkpoint.verify(first) == []
    assert any(said in problem for problem in checkpoint.verify(second))
    assert checkpoint.newest(tmp_path) == first
    assert str(second) in caplog.text
    harm(first)
    if checkpoint.steps(tmp_path):      # to begin again from step 0 in silence would throw the run away
        with pytest.raises(checkpoint.CheckpointError, match="restore one, or delete"):
            checkpoint.newest(tmp_path)
    else:                               # without a manifest it never was one
        assert checkpoint.newest(tmp_path) is None


def test_a_checkpoint_on_a_bad_sector_is_passed_over(engine: Engine, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = saved(tmp_path, engine, 3, 6)
    digest = checkpoint.hashlib.file_digest

    def bad(handle: BinaryIO, kind: str) -> object:
        if handle.name == str(second / "weights.safetensors"):
            raise OSError(errno.EIO, "Input/output error")
        return digest(handle, kind)

    monkeypatch.setattr(checkpoint.hashlib, "file_digest", bad)
    assert checkpoint.verify(second) == ["weights.safetensors cannot be read (Input/output error)"]
    assert checkpoint.newest(tmp_path) == first


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_saved_again(engine: Engine, tmp_path: Path) -> None:
    _, second = saved(tmp_path, engine, 3, 6)
    changed(second)
    saved(tmp_path, engine, 6)
    assert checkpoint.newest(tmp_path) == second


def test_what_was_just_saved_is_kept_though_damaged_ones_have_higher_numbers(engine: Engine, tmp_path: Path) -> None:
    """Resumed at 3, for 6 and 9 are damaged, and preempted at 4: the step that was paid for must not be thrown away."""
    _, second, third = saved(tmp_path, engine, 3, 6, 9)
    changed(second)
    changed(third)
    saved(tmp_path, engine, 4, keep=2)
    assert checkpoint.newest(tmp_path) == tmp_path / "step-000004"
    assert (tmp_path / "step-000003/MANIFEST.json").is_file()


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_a_full_disk_leaves_nothing_to_see_and_the_older_checkpoint_loads(number: int, engine: Engine, tmp_path: Path,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the five files (the manifest is the last) does not fit."""
    (first,) = saved(tmp_path, engine, 3)
    before, write, written = everything(engine), folder.write, []

    def full(path: Path, content: bytes | str) -> None:
        written.append(path)
        if len(written) == number:
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(folder, "write", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 6, engine, {}, keep=2)
    monkeypatch.undo()
    assert len(written) == number
    assert [each.name for each in tmp_path.iterdir() if not each.name.startswith(".")] == ["step-000003"]
    assert checkpoint.newest(tmp_path) == first
    checkpoint.load(first, engine)
    assert same(before, everything(engine)) == []
    saved(tmp_path, engine, 6)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["step-000003", "step-000006"], "leftovers stay"


def test_left_overs_of_a_killed_save_do_not_get_into_the_next(engine: Engine, tmp_path: Path) -> None:
    draft = tmp_path / ".step-000006.tmp"
    draft.mkdir()
    (draft / "rank-00007.safetensors").write_bytes(b"of a rank that is no more")
    (path,) = saved(tmp_path, engine, 6)
    assert not (path / "rank-00007.safetensors").exists()
    assert not draft.exists()
