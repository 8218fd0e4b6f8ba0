"""Fine-tuning: rates by layer, tiles turned, the best pass kept, and more learnt than by a frozen encoder's probe."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shards import write
from ssl_dist.eval import finetune, linear
from ssl_dist.eval.settings import Finetune, Labelled, Linear
from ssl_dist.models import encoder as encoders
from ssl_dist.models.encoder import Encoder

HALF = (0.5,) * 3


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tune") / "encoder"
    Encoder("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]}, HALF, HALF).save(folder, 64, {})
    return folder


def settings(encoder: Path, shard: Path, out: Path, **changes: Any) -> Finetune:
    return Finetune(**{"encoder": str(encoder), "data": Labelled(shards=[shard]), "size": 64, "out": out,
                       "batch": 16, "baselines": [], "epochs": 8, "lr": 3e-3, **changes})


def run(chosen: Finetune) -> dict[str, Any]:
    return finetune.run(chosen, torch.device("cpu"), 2, lambda *_: None)


def test_on_real_tiles_it_learns_more_than_a_probe_of_the_same_encoder_frozen(exported: Path, data: Path,
                                                                             tmp_path: Path) -> None:
    tiles = tmp_path / "pcam"
    write.write(write.Settings(source=data / "pcam_subset_96px", kind="tiles", mpp=1.0, dataset="pcam", out=tiles,
                               names="(?P<split>train|valid)/(?P<label>[01])/", workers=2))
    data = Labelled(shards=[tiles], query="valid")
    tuned = run(settings(exported, tiles, tmp_path / "a", data=data, size=48, batch=64, epochs=3))
    frozen = linear.run(Linear(encoder=str(exported), data=data, size=48, batch=64, out=tmp_path / "b"),
                        torch.device("cpu"), 2, lambda *_: None)
    assert tuned["metrics"]["balanced_accuracy"] > frozen["metrics"]["balanced_accuracy"] + 0.02
    rows = tuned["curves"]["encoder"]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[-1]["loss"] < np.log(2)


def test_the_pass_that_is_best_on_patients_held_out_is_the_one_that_is_asked(exported: Path, shard: Path,
                                                                            tmp_path: Path) -> None:
    tuned = run(settings(exported, shard, tmp_path / "a"))
    rows = tuned["curves"]["encoder"]
    assert [row["epoch"] for row in rows] == list(range(1, 9))
    best = max(rows, key=lambda row: row["balanced_accuracy_held_out"])
    assert tuned["best_epoch"] == best["epoch"]
    assert tuned["balanced_accuracy_held_out"] == best["balanced_accuracy_held_out"]
    assert run(settings(exported, shard, tmp_path / "a"))["confusion"] == tuned["confusion"], "the same again"


def test_with_no_rate_nothing_is_learnt_and_the_weights_in_the_folder_stay(exported: Path, shard: Path,
                                                                           tmp_path: Path) -> None:
    before = encoders.digest(exported)
    result = run(settings(exported, shard, tmp_path, epochs=1, lr=1e-9))
    assert np.array(result["confusion"]).sum(axis=0).max() == result["counts"]["queries"], "one answer to all"
    assert encoders.digest(exported) == before


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_every_layer_learns_slower_than_the_one_after_it(name: str) -> None:
    encoder = Encoder(name, {}, HALF, HALF)
    groups = encoder.groups(1.0, 0.05, 0.5)
    rate = {id(weight): group["lr"] for group in groups for weight in group["params"]}
    decay = {id(weight): group["weight_decay"] for group in groups for weight in group["params"]}
    assert len(rate) == len(list(encoder.network.parameters()))
    named = dict(encoder.network.named_parameters())
    assert all(decay[id(weight)] == 0 for weight in named.values() if weight.ndim == 1)
    first, *later = (("conv1.weight", "layer1.0.conv1.weight", "layer2.0.conv1.weight", "layer4.1.conv2.weight")
                     if name == "resnet18" else
                     ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "blocks.5.mlp.fc1.weight",
                      "blocks.11.mlp.fc1.weight"))
    rates = [rate[id(named[each])] for each in (first, *later)]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1] <= 1.0
    assert decay[id(named[first])] == 0.05


def test_a_tile_is_shown_in_all_eight_ways_and_in_no_other() -> None:
    tile = torch.arange(3 * 3 * 3, dtype=torch.uint8).reshape(1, 3, 3, 3)
    plain = tile[0].numpy()
    ways = {each.tobytes() for side in (plain, plain[::-1]) for each in (np.rot90(side, turn) for turn in range(4))}
    found: Tensor = finetune.turned(tile.repeat(300, 1, 1, 1), np.random.default_rng(0))
    assert {each.numpy().tobytes() for each in found} == {np.ascontiguousarray(
        np.frombuffer(each, np.uint8).reshape(3, 3, 3)).tobytes() for each in ways}


def test_histograms_have_nothing_to_tune(exported: Path, shard: Path, tmp_path: Path) -> None:
    assert "no weights to fine-tune" in settings(exported, shard, tmp_path, baselines=["colours"]).rules()[0]
