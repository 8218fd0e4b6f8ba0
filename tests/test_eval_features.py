"""Features of a split: the same whoever computes them, in the order of the tiles, whatever ends first."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssl_dist.eval import features
from ssl_dist.models.encoder import Encoder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder("test_resnet", {}, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def extracted(encoder: Encoder, shard: Path, **changes: Any) -> torch.Tensor:
    split = features.every([shard])
    try:
        return features.extract(encoder, split, **{"size": 64, "batch": 16, "threads": 2, "device": CPU,
                                                   "progress": lambda *_: None, **changes})
    finally:
        split.reader.close()


def test_several_devices_take_turns_and_give_what_one_gives(encoder: Encoder, shard: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    alone = extracted(encoder, shard)
    seen: list[int] = []
    looked_at = features._looked_at

    def slowly(network: Encoder, pixels: torch.Tensor, *more: Any) -> torch.Tensor:
        seen.append(id(network))
        time.sleep(0.05 * (len(seen) % 3))          # some end before those that began earlier
        return looked_at(network, pixels, *more)

    monkeypatch.setattr(features, "spread", lambda _: [CPU] * 3)
    monkeypatch.setattr(features, "_looked_at", slowly)
    told: list[tuple[int, int]] = []
    together = extracted(encoder, shard, progress=lambda done, whole: told.append((done, whole)))
    assert torch.equal(together, alone)
    assert len(set(seen)) == 3
    assert told[-1] == (len(alone), len(alone)) and [done for done, _ in told] == sorted(done for done, _ in told)


def test_an_error_of_one_device_is_the_error_of_all(encoder: Encoder, shard: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(features, "spread", lambda _: [CPU] * 2)
    monkeypatch.setattr(features, "_looked_at", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        extracted(encoder, shard)


def test_a_batch_more_or_less_changes_no_feature_and_bf16_little(encoder: Encoder, shard: Path) -> None:
    one, other = extracted(encoder, shard, batch=7), extracted(encoder, shard, batch=64)
    assert one.numpy() == pytest.approx(other.numpy(), abs=1e-5)
    half = extracted(encoder, shard, precision="bf16")
    assert half.dtype == torch.float32
    apart = (half - one).norm(dim=1) / one.norm(dim=1)
    assert 0 < float(apart.max()) < 0.03


def test_nothing_is_left_that_learns(encoder: Encoder, shard: Path) -> None:
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder.train()
    found = extracted(encoder, shard)
    assert not found.requires_grad and not encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert np.isfinite(found.numpy()).all()
