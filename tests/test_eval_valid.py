"""A split of its own to choose by: nothing is learnt from it, and every protocol chooses by it alone."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from shards import write
from shards.index import ShardError
from ssl_dist.eval import features, finetune, knn, linear, low, sgd
from ssl_dist.eval.settings import PROTOCOLS, Labelled
from ssl_dist.models.encoder import Encoder

TILES = {"train": 40, "valid": 16, "test": 24}
NAMES = r"(?P<split>\w+)/(?P<label>\w+)/(?P<patient>p\d+)-"


def pictures(home: Path, counts: dict[str, int], patients: dict[str, int]) -> Path:
    """Noise with a hint of red or of blue, so that a probe may err."""
    rng = np.random.default_rng(3)
    for split, count in counts.items():
        for number in range(count):
            label = ("red", "blue")[number % 2]
            picture = rng.integers(90, 160, (24, 24, 3))
            picture[..., 0 if label == "red" else 2] += rng.integers(-6, 12)
            path = home / split / label / f"p{patients[split] + number // 2 % 4}-{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.astype(np.uint8)).save(path)
    return home


def sharded(home: Path, out: Path) -> Path:
    write.write(write.Settings(source=home, kind="tiles", mpp=1.0, dataset="hints", out=out, names=NAMES, workers=1))
    return out


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("hints")
    return sharded(pictures(home / "files", TILES, {"train": 0, "valid": 10, "test": 20}), home / "shards")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "encoder"
    torch.manual_seed(0)
    Encoder("test_resnet", {}, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).save(folder, 32, {})
    return folder


def evaluated(protocol: Any, encoder: Path, tiles: Path, out: Path, valid: str, **more: Any) -> dict[str, Any]:
    kind = PROTOCOLS[protocol.__name__.rpartition(".")[2]]
    told = kind(encoder=str(encoder), data=Labelled(shards=[tiles], valid=valid), out=out, size=32,     # type: ignore
                **{"batch": 16, "baselines": [], **more})
    assert not told.rules()
    return protocol.run(told, torch.device("cpu"), 2, lambda *_: None)


def test_a_probe_is_chosen_by_that_split_and_learns_from_the_bank_alone(exported: Path, tiles: Path,
                                                                         tmp_path: Path) -> None:
    result = evaluated(linear, exported, tiles, tmp_path, "valid", baselines=["colours"])
    counts = result["counts"]
    assert (counts["bank"], counts["valid"], counts["queries"]) == tuple(TILES.values())
    assert result["asked"]["valid"] == "valid"
    known = {}
    for split in TILES:
        part = features.labelled([tiles], split)
        known[split] = (features.colours(part, batch=8, threads=1, progress=lambda *_: None).numpy(),
                        part.labels_S.numpy())
    scaler = StandardScaler().fit(known["train"][0])
    probes = [LogisticRegression(C=strength, max_iter=3000).fit(scaler.transform(known["train"][0]), known["train"][1])
              for strength in linear.STRENGTHS]
    held = [probe.score(scaler.transform(known["valid"][0]), known["valid"][1]) for probe in probes]
    best = int(np.argmax(held))
    found = result["baselines"]["colours"]
    assert found["C"] == linear.STRENGTHS[best]
    assert found["accuracy_held_out"] == pytest.approx(held[best], abs=1e-4)
    assert found["accuracy"] == pytest.approx(probes[best].score(scaler.transform(known["test"][0]), known["test"][1]),
                                              abs=1e-4)
    drawn = evaluated(linear, exported, tiles, tmp_path / "drawn", "", baselines=["colours"])
    assert "valid" not in drawn["counts"]


def test_few_labels_are_those_of_the_bank(exported: Path, tiles: Path, tmp_path: Path) -> None:
    rows = evaluated(low, exported, tiles, tmp_path, "valid", shares=[0.5], draws=2)["curves"]["encoder"]
    assert [row["tiles"]["mean"] for row in rows] == pytest.approx([TILES["train"] / 2, TILES["train"]], abs=2)


@pytest.mark.parametrize(("protocol", "more"), [(sgd, {"steps": 20}), (finetune, {"epochs": 1, "batch": 8})])
def test_what_is_trained_step_by_step_looks_at_that_split(protocol: Any, more: dict[str, Any], exported: Path,
                                                          tiles: Path, tmp_path: Path) -> None:
    """Of 8 tiles a class, what is held out is right in sixteenths; of the bank's own patients it would be tenths."""
    result = evaluated(protocol, exported, tiles, tmp_path, "valid", **more)
    share = 16 * result["balanced_accuracy_held_out"]
    assert share == pytest.approx(round(share), abs=2e-3)
    assert result["counts"]["valid"] == 16


def test_neighbours_choose_nothing_and_are_the_same_without(exported: Path, tiles: Path, tmp_path: Path) -> None:
    apart = [evaluated(knn, exported, tiles, tmp_path / (valid or "none"), valid, k=5) for valid in ("valid", "")]
    assert apart[0]["metrics"] == apart[1]["metrics"]
    assert apart[0]["counts"]["bank"] == TILES["train"]
    assert json.dumps(apart[0]["intervals"]) == json.dumps(apart[1]["intervals"])


def test_a_split_that_is_not_there_or_shares_patients_is_refused(exported: Path, tiles: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=re.escape("no tile of split 'validation'")):
        evaluated(linear, exported, tiles, tmp_path, "validation")
    shared = sharded(pictures(tmp_path / "files", TILES, {"train": 0, "valid": 2, "test": 20}), tmp_path / "shards")
    with pytest.raises(ShardError, match="2 patients are in both 'train' and 'valid'"):
        evaluated(linear, exported, shared, tmp_path, "valid")
