"""Evaluation on GPUs: the features of a CPU, whoever of several GPUs computes them, and every protocol to its end."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ssl_dist.eval import features, finetune, knn, look
from ssl_dist.eval.settings import Finetune, Knn, Labelled, Look, Tiles
from ssl_dist.models.encoder import Encoder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]

HALF, GPU, CPU = (0.5, 0.5, 0.5), torch.device("cuda", 0), torch.device("cpu")


def extracted(shard: Path, device: torch.device, precision: str = "fp32") -> torch.Tensor:
    torch.manual_seed(0)
    encoder, split = Encoder("resnet18", {}, HALF, HALF), features.every([shard])
    try:
        return features.extract(encoder, split, size=64, batch=16, threads=2, device=device, precision=precision,
                                progress=lambda *_: None)
    finally:
        split.reader.close()


@pytest.mark.parametrize(("precision", "apart"), [("fp32", 1e-4), ("bf16", 5e-3)])
def test_a_gpu_sees_what_a_cpu_sees_in_the_same_order(precision: str, apart: float, shard: Path) -> None:
    here, there = extracted(shard, GPU, precision), extracted(shard, CPU)
    assert here.device == CPU and here.shape == there.shape
    assert float((1 - F.cosine_similarity(here, there)).max()) < apart


def test_one_gpu_more_than_once_takes_turns_with_itself(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = extracted(shard, GPU)
    monkeypatch.setattr(features, "spread", lambda _: [torch.device("cuda", 0)] * 3)
    assert extracted(shard, GPU).numpy() == pytest.approx(alone.numpy(), abs=1e-4)


@pytest.mark.parametrize("name", ["knn", "finetune", "look"])
def test_a_protocol_goes_to_its_end(name: str, shard: Path, tmp_path: Path) -> None:
    Encoder("test_vit", {"img_size": 64}, HALF, HALF).save(tmp_path / "encoder", 64, {})
    own: dict[str, Any] = {"encoder": str(tmp_path / "encoder"), "size": 64, "batch": 16}
    data = Labelled(shards=[shard])
    settings, protocol = {"knn": (Knn(**own, data=data, k=5), knn),
                          "finetune": (Finetune(**own, data=data, epochs=1), finetune),
                          "look": (Look(**own, data=Tiles(shards=[shard]), tiles=40, maps=["pca"]), look)}[name]
    result = protocol.run(settings, GPU, 2, lambda *_: None)        # type: ignore[attr-defined]
    assert Path(result["written"]).is_file()
    assert name == "look" or 0 <= result["metrics"]["accuracy"] <= 1
