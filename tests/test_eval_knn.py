"""Nearest neighbours and figures of merit against scikit-learn; and what an evaluation refuses."""

import json
import math
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix
from sklearn.neighbors import NearestNeighbors

from shards import index
from shards.index import ShardError
from ssl_dist.eval import features, knn
from ssl_dist.eval.settings import Knn, Labelled
from ssl_dist.models import encoder as encoders
from ssl_dist.models.encoder import Encoder, EncoderError

relabelled = runpy.run_path(str(Path(__file__).with_name("tables.py")))["relabelled"]

QUERIES, BANK, WIDTH, CLASSES = 70, 200, 12, 5
RANDOM = np.random.default_rng(0)


def vectors() -> tuple[np.ndarray, np.ndarray]:
    return (RANDOM.normal(size=(QUERIES, WIDTH)) * RANDOM.uniform(0.1, 9, (QUERIES, 1)),
            RANDOM.normal(size=(BANK, WIDTH)) * RANDOM.uniform(0.1, 9, (BANK, 1)))


@pytest.mark.parametrize("k", [1, 7, 200])
@pytest.mark.parametrize("chunk", [1024, 16, 1])
def test_neighbours_are_those_of_scikit_learn(k: int, chunk: int) -> None:
    query, bank = vectors()
    distance, place = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(bank).kneighbors(query)
    similarity, places = knn.neighbours(torch.from_numpy(query).float(), torch.from_numpy(bank).float(), k, chunk)
    assert places.shape == (QUERIES, k)
    assert similarity.numpy() == pytest.approx(1 - distance, abs=1e-5)
    assert (places.numpy() == place).mean() > 0.99          # neighbours equally far within float32 may change places


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_a_vote_is_the_plain_weighted_vote(temperature: float) -> None:
    similarity = np.sort(RANDOM.uniform(-1, 1, (QUERIES, 9)))[:, ::-1].copy()
    labels = RANDOM.integers(0, CLASSES, (QUERIES, 9))
    found = knn.votes(torch.from_numpy(similarity).float(), torch.from_numpy(labels), CLASSES, temperature)
    assert found.sum(dim=1).numpy() == pytest.approx(1, abs=1e-6)
    for query in range(QUERIES):
        votes = [math.fsum(math.exp(float(similarity[query, place]) / temperature) for place in range(9)
                           if labels[query, place] == name) for name in range(CLASSES)]
        assert found[query].numpy() == pytest.approx(np.array(votes) / sum(votes), abs=1e-4)


def test_a_close_neighbour_outvotes_two_far_ones_only_at_a_low_temperature() -> None:
    similarity, labels = torch.tensor([[0.9, 0.5, 0.5]]), torch.tensor([[2, 1, 1]])
    assert knn.votes(similarity, labels, 3, 0.07).argmax(dim=1).tolist() == [2]
    assert knn.votes(similarity, labels, 3, 10.0).argmax(dim=1).tolist() == [1]


# ---- the protocol, on painted tiles

@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("exported") / "encoder"
    Encoder("test_resnet", {}, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).save(folder, 64, {})
    return folder


def settings(encoder: Path, shard: Path, out: Path, **changes: object) -> Knn:
    return Knn(**{"encoder": str(encoder), "data": Labelled(shards=[shard]), "out": out, "size": 64, "k": 5,
                  "batch": 32, **changes})      # type: ignore[arg-type]


def run(chosen: Knn) -> dict:
    return knn.run(chosen, torch.device("cpu"), 2, lambda *_: None)


def plainly(bank: np.ndarray, known: np.ndarray, query: np.ndarray, classes: int) -> list[int]:
    """The vote of scikit-learn's five nearest neighbours."""
    distance, place = NearestNeighbors(n_neighbors=5, metric="cosine", algorithm="brute").fit(bank).kneighbors(query)
    guess = []
    for row in range(len(query)):
        votes = np.zeros(classes)
        for far, where in zip(distance[row], place[row], strict=True):
            votes[known[where]] += math.exp((1 - far) / 0.07)
        guess.append(int(votes.argmax()))
    return guess


def test_the_protocol_gives_what_scikit_learn_makes_of_the_same_features(exported: Path, shard: Path,
                                                                         tmp_path: Path) -> None:
    result = run(settings(exported, shard, tmp_path))
    assert json.loads((tmp_path / "knn.json").read_text()) == result
    network = encoders.load(exported)
    found = {}
    for split in ("train", "test"):
        own = features.labelled([shard], split)
        found[split] = (features.extract(network, own, size=64, batch=7, threads=2, device=torch.device("cpu"),
                                         progress=lambda *_: None).numpy(), own.labels_S.numpy())
        table = index.samples(shard).filter([word == split and label >= 0 for word, label in zip(
            *(index.samples(shard)[name].to_pylist() for name in ("split", "label")), strict=True)])
        assert own.labels_S.tolist() == table["label"].to_pylist()
        assert own.patients == table["patient"].to_pylist()
    (bank, known), (query, truth) = found["train"], found["test"]
    assert result["counts"]["queries"] == len(truth)
    assert result["counts"]["bank"] == len(known)
    guess = plainly(bank, known, query, len(result["classes"]))
    told = confusion_matrix(truth, guess, labels=range(len(result["classes"])))
    apart = np.abs(np.array(result["confusion"]) - told).sum()
    assert apart <= 2, "more than one tile is told apart otherwise"         # one on the edge may fall either way
    assert result["metrics"]["accuracy"] == pytest.approx(accuracy_score(truth, guess), abs=1.01 / len(truth))
    torch.manual_seed(result["seed"])
    fresh = Encoder("test_resnet", {}, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    untrained = [features.extract(fresh, features.labelled([shard], split), size=64, batch=9, threads=1,
                                  device=torch.device("cpu"), progress=lambda *_: None).numpy()
                 for split in ("train", "test")]
    guess = plainly(untrained[0], known, untrained[1], len(result["classes"]))
    assert result["baselines"]["random"]["accuracy"] == pytest.approx(accuracy_score(truth, guess),
                                                                      abs=1.01 / len(truth))
    assert (tmp_path / "knn_neighbours.png").is_file()


def test_features_do_not_depend_on_the_size_of_the_batch(exported: Path, shard: Path) -> None:
    split, network = features.labelled([shard], "test"), encoders.load(exported)
    whole, parts = (features.extract(network, split, size=64, batch=batch, threads=2, device=torch.device("cpu"),
                                     progress=lambda *_: None) for batch in (len(split.rows), 5))
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


def test_a_patient_in_both_splits_is_refused(exported: Path, shard: Path, tmp_path: Path) -> None:
    table = index.samples(shard)
    # Of labelled tiles: the others take no part.
    splits = [split if label >= 0 else "" for split, label in zip(*(table[name].to_pylist() for name in
                                                                  ("split", "label")), strict=True)]
    test, train = splits.index("test"), splits.index("train")
    patients = table["patient"].to_pylist()
    patients[test] = patients[train]
    both = relabelled(shard, tmp_path / "both", patient=patients)
    with pytest.raises(ShardError, match="patients are in both 'train' and 'test'") as refused:
        run(settings(exported, both, tmp_path / "out"))
    assert refused.value.exit_code == 3
    assert not (tmp_path / "out").exists()


def test_tiles_without_a_label_take_no_part(shard: Path, tmp_path: Path) -> None:
    labels = index.samples(shard)["label"].to_pylist()
    splits = index.samples(shard)["split"].to_pylist()
    some = [index.NO_LABEL if number % 3 else label for number, label in enumerate(labels)]
    found = features.labelled([relabelled(shard, tmp_path / "some", label=some)], "train")
    assert found.rows.tolist() == [number for number, split in enumerate(splits)
                                   if split == "train" and some[number] >= 0]
    assert found.labels_S.tolist() == [some[number] for number in found.rows]
    count = splits.count("train")
    assert found.remarks == [f"{count - len(found.rows)} of {count} tiles of split 'train' have no label and are left "
                             "out"]
    told = relabelled(shard, tmp_path / "all", label=[number % 2 for number in range(len(labels))])
    assert not features.labelled([told], "train").remarks
    with pytest.raises(ShardError, match="has a label"):
        features.labelled([relabelled(shard, tmp_path / "none", label=[index.NO_LABEL] * len(labels))], "train")


def test_more_neighbours_than_tiles_are_refused_before_a_tile_is_read(exported: Path, shard: Path, tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    count = len(features.labelled([shard], "train").rows)
    monkeypatch.setattr(features, "extract", None)
    with pytest.raises(ShardError, match=f"k={count + 1} neighbours are more than the {count} tiles"):
        run(settings(exported, shard, tmp_path, k=count + 1))


def test_a_size_that_the_encoder_does_not_take_is_refused_before_shards_are_opened(shard: Path, tmp_path: Path,
                                                                                   monkeypatch: pytest.MonkeyPatch,
                                                                                   ) -> None:
    Encoder("test_vit", {"img_size": 48, "patch_size": 16, "dynamic_img_size": False}, (0.5,) * 3,
            (0.5,) * 3).save(tmp_path / "vit", 48, {})
    monkeypatch.setattr(features, "labelled", None)
    with pytest.raises(EncoderError, match="tiles of 64 pixels"):
        run(settings(tmp_path / "vit", shard, tmp_path))


def test_a_run_folder_is_no_encoder_and_a_card_that_was_torn_is_said_to_be(exported: Path, shard: Path,
                                                                           tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(EncoderError, match="is not an exported encoder"):
        run(settings(tmp_path / "run", shard, tmp_path, size=None))
    torn = Path(shutil.copytree(exported, tmp_path / "torn"))
    (torn / "config.json").write_text((exported / "config.json").read_text()[:40])
    with pytest.raises(EncoderError, match="not readable"):
        run(settings(torn, shard, tmp_path, size=None))
