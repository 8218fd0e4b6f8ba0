"""Batches in parts, encoders that are compiled or keep less in memory: what is refused, and what must not change."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from ssl_dist import config, methods, train
from ssl_dist.config import ConfigError, Train
from ssl_dist.data.batch import Batch
from ssl_dist.methods import base
from ssl_dist.models.encoder import Encoder, EncoderError

HALF = (0.5, 0.5, 0.5)
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def told(**how: Any) -> Train:
    return Train(run=Path("nowhere"), data=config.Data(shards=[], batch=how.pop("batch", 24)),
                 method={"name": "moco"}, steps=1, **how)


def test_parts_are_all_of_a_batch_in_order() -> None:
    rows, views = np.arange(12) * 7, [torch.randn(12, 4, 4, 3), torch.randn(12, 2, 2, 3)]
    boxes = [np.random.default_rng(number).random((12, 4)) for number in range(2)]
    whole = Batch(views, boxes, rows, np.arange(12) + 3)
    parts = whole.split(3)
    assert [len(part.rows) for part in parts] == [4, 4, 4]
    for number, view in enumerate(views):
        assert torch.equal(torch.cat([part.views[number] for part in parts]), view)
        assert np.array_equal(np.concatenate([part.boxes[number] for part in parts]), whole.boxes[number])
    assert np.concatenate([part.rows for part in parts]).tolist() == rows.tolist()
    assert np.concatenate([part.positions for part in parts]).tolist() == list(range(3, 15))
    (only,) = whole.split(1)
    assert torch.equal(only.views[0], views[0])


def test_a_batch_is_shared_by_ranks_and_parts_or_refused_with_what_would_fit() -> None:
    assert config.rank_batch(told(accumulate=3), 4) == 6
    assert config.deepspeed(told(accumulate=3), 4)["train_micro_batch_size_per_gpu"] == 2
    with pytest.raises(ConfigError, match=r"batch=24 .* 2 ranks in 5 parts each \(accumulate\); .*batch=20 or 30"):
        config.rank_batch(told(accumulate=5), 2)
    with pytest.raises(ConfigError, match=r"batchnorm_ranks=4 does not divide 6 ranks .* use 1, 2, 3, 6"):
        config.rank_batch(told(encoder=config.Encoder(batchnorm_ranks=4)), 6)
    assert config.rank_batch(told(encoder=config.Encoder(batchnorm_ranks=3)), 6) == 4
    (broken,) = config.Encoder(batchnorm="local", batchnorm_ranks=2).rules()
    assert "batchnorm=local" in broken and "batchnorm_ranks=2" in broken


@pytest.mark.parametrize("name", config.methods())
def test_a_loss_of_all_tiles_together_is_not_taken_in_parts(name: str, tmp_path: Path) -> None:
    recipe = {"moco": "moco_tcga", "swav": "swav_tcga", "barlow": "barlow_tcga", "dino": "dino_tcga"}.get(name, name)
    words = [f"data.shards=[{tmp_path}]", f"run={tmp_path / 'run'}", "accumulate=2"]
    given = config.load(Train, f"pretrain/{recipe}", words)
    if stain := next((view for view in given.method.get("views", [])), None) and tmp_path / "stain.npz":
        stain.write_bytes(b"")
        words.append(f"data.stain={stain}")
    whole = methods.load(name).Method.WHOLE
    assert bool(whole) == (name not in ("moco", "dino")), "only these two look at one tile, and what was before"
    if not whole:
        assert config.load_train(f"pretrain/{recipe}", words).accumulate == 2
        return
    with pytest.raises(ConfigError, match=rf"accumulate=2: {name} takes its {whole} .*use accumulate=1"):
        config.load_train(f"pretrain/{recipe}", words)


class Two(base.Method):
    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder, self.views = encoder, ()
        self.teacher = base.teacher(encoder)

    def forward(self, batch: Batch, progress: float) -> dict[str, torch.Tensor]:        # noqa: ARG002
        return {"loss": self.encoder(batch.views[0]).mean()}


def test_a_dry_run_says_what_batchnorm_sees() -> None:
    resnet = Two(Encoder("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}, HALF, HALF))
    assert "sees 3 tiles a rank at a time, not 12" in train._parts(told(accumulate=4), resnet, 12)["BatchNorm"]
    assert train._parts(told(), resnet, 12) == {}
    assert train._parts(told(accumulate=4), Two(Encoder("vit_tiny_patch16_224", VIT, HALF, HALF)), 12) == {}


def test_a_compiled_encoder_keeps_its_names_and_has_a_graph_for_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    counter, compiles = CompileCounter(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compiles(self, backend=counter, **how))
    torch.manual_seed(0)
    method = Two(Encoder("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}, HALF, HALF)).eval()
    pixels = {size: torch.randint(0, 256, (4, size, size, 3), dtype=torch.uint8) for size in (32, 48)}
    names = list(method.state_dict())
    with torch.no_grad():
        expected = {size: method.encoder(view) for size, view in pixels.items()}
        train._compile(method)
        for _ in range(2):
            for size, view in pixels.items():
                torch.testing.assert_close(method.encoder(view), expected[size])
        assert counter.frame_count == 2
    assert list(method.state_dict()) == names
    assert isinstance(method.encoder, Encoder)
    torch._dynamo.reset()


def test_without_a_compiler_compile_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match="compile=true needs a C"):
        train._compile(Two(Encoder("vit_tiny_patch16_224", VIT, HALF, HALF)))


def test_activations_computed_twice_give_the_same_gradients() -> None:
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = Encoder("vit_tiny_patch16_224", VIT, HALF, HALF)
        if checkpointing:
            encoder.checkpoint()
        passes = []
        encoder.network.blocks[0].register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        encoder(pixels).square().sum().backward()
        assert len(passes) == 1 + checkpointing
        found.append({name: weight.grad for name, weight in encoder.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_a_network_with_batchnorm_is_not_run_twice() -> None:
    with pytest.raises(EncoderError, match=r"BatchNorms of resnet18; use encoder\.checkpointing=false"):
        Encoder("resnet18", {}, HALF, HALF).checkpoint()


def test_what_does_not_change_the_numbers_is_no_part_of_a_runs_identity() -> None:
    class Nothing:
        indexes: tuple = ()

    plain = told()
    before = train._identity(plain, Nothing())      # type: ignore[arg-type]
    for change in ({"zero": 2}, {"compile": True}, {"encoder": config.Encoder(checkpointing=True)}):
        assert train._identity(dataclasses.replace(plain, **change), Nothing()) == before       # type: ignore[arg-type]
    for change in ({"accumulate": 2}, {"encoder": config.Encoder(batchnorm_ranks=2)}):
        assert train._identity(dataclasses.replace(plain, **change), Nothing()) != before       # type: ignore[arg-type]
    vit = dataclasses.replace(plain, encoder=config.Encoder("vit_tiny_patch16_224", VIT))
    parted = dataclasses.replace(vit, accumulate=2)
    assert train._identity(vit, Nothing()) == train._identity(parted, Nothing()), "it has no BatchNorm"   # type: ignore


def test_whoever_goes_on_in_other_parts_is_told_the_two_numbers(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"step": 3, "identity": {"seed": 0, "accumulate": 2}}))
    with pytest.raises(ConfigError, match="accumulate was 2, now 1"):
        train._hold(tmp_path, {"seed": 0}, tmp_path)
    assert train._hold(tmp_path, {"seed": 0, "accumulate": 2}, tmp_path) == 3


def tried(settings: Train, world: int) -> None:
    train._tries(settings, train._plan(settings), world)


def test_views_that_the_network_does_not_take_are_refused_before_the_first_step() -> None:
    vit = {"method": {"name": "dino"}, "encoder": config.Encoder("vit_tiny_patch16_224", {"img_size": 224})}
    with pytest.raises(EncoderError, match=r"tiles of 96 pixels .*dynamic_img_size=true"):
        tried(dataclasses.replace(told(), **vit), 1)
    fitting = config.Encoder("vit_tiny_patch16_224", {"img_size": 224, "dynamic_img_size": True})
    tried(dataclasses.replace(told(), **{**vit, "encoder": fitting}), 1)


@pytest.mark.parametrize(("batch", "world", "how", "needle"), [
    (4, 4, {"encoder": config.Encoder(batchnorm="local")}, "encoder.batchnorm=synchronised"),
    (4, 4, {"encoder": config.Encoder(batchnorm_ranks=1)}, "use a larger data.batch"),
    (4, 1, {"accumulate": 4}, "a smaller accumulate")])
def test_a_batchnorm_that_would_see_one_tile_is_refused(batch: int, world: int, how: dict, needle: str) -> None:
    with pytest.raises(ConfigError, match="one tile at a time") as refused:
        tried(told(batch=batch, **how), world)
    assert needle in str(refused.value) and f"data.batch={batch} on {world} ranks" in str(refused.value)
    tried(told(batch=2 * batch, **how), world)
    tried(told(batch=batch, **{**how, "encoder": config.Encoder("vit_tiny_patch16_224")}), world)


def test_bf16_on_a_processor_without_it_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, bf16 = torch.device("cpu"), told(precision="bf16")
    for has in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda has=has: has)
        assert ("precision=fp32" in train._imitated(bf16, cpu)) == (not has)
        assert train._imitated(told(), cpu) == train._imitated(bf16, torch.device("cuda")) == ""
