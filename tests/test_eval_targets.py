"""Several labels a tile, and numbers, of a table: read as it is, guessed as scikit-learn does, refused where torn."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.preprocessing import StandardScaler

from shards import index
from shards.index import ShardError
from ssl_dist.config import ConfigError
from ssl_dist.eval import features, knn, linear
from ssl_dist.eval.settings import PROTOCOLS, Labelled, Low
from ssl_dist.models.encoder import Encoder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("targets") / "encoder"
    Encoder("test_resnet", {}, (0.5,) * 3, (0.5,) * 3).save(folder, 64, {})
    return folder


def table(shard: Path, path: Path, columns: dict[str, Any], by: str = "key") -> Path:
    """What is to be guessed, by what the tile's own colours are: something that can be learnt."""
    split = features.every([shard])
    colours = features.colours(split, batch=64, threads=1, progress=lambda *_: None).numpy()
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([by, *columns])
        for name, colour in zip(split.reader.column(by, split.rows), colours, strict=True):
            rows.writerow([name, *(make(colour) for make in columns.values())])
    return path


def redness(colour: np.ndarray) -> float:
    return float((colour[:32] * np.arange(32)).sum())


def blueness(colour: np.ndarray) -> float:
    return float((colour[64:] * np.arange(32)).sum())


SEVERAL = {"red": lambda colour: int(redness(colour) > 24), "blue": lambda colour: int(blueness(colour) > 24)}


def evaluated(encoder: Path, shard: Path, out: Path, targets: Path, kind: str, protocol: Any = linear,
              **more: Any) -> dict[str, Any]:
    own = {"k": 7} if protocol is knn else {}
    settings = PROTOCOLS[protocol.__name__.rpartition(".")[2]](
        encoder=str(encoder), data=Labelled(shards=[shard], targets=targets, kind=kind, **more), out=out, size=64,
        batch=32, baselines=["colours"], **own)
    return protocol.run(settings, torch.device("cpu"), 2, lambda *_: None)


def of_colours(shard: Path, targets: Path, kind: str) -> tuple[np.ndarray, ...]:
    sides = [features.told([shard], split, targets, kind) for split in ("train", "test")]
    known, asked = (StandardScaler().fit(features.colours(sides[0], batch=64, threads=1, progress=lambda *_: None)
                                         ).transform(features.colours(side, batch=64, threads=1,
                                                                      progress=lambda *_: None)) for side in sides)
    return known, sides[0].targets_SC.numpy(), asked, sides[1].targets_SC.numpy()


def test_several_labels_are_guessed_as_scikit_learn_guesses_each(exported: Path, shard: Path, tmp_path: Path) -> None:
    targets = table(shard, tmp_path / "t.csv", SEVERAL)
    result = evaluated(exported, shard, tmp_path, targets, "several")
    known, truth, asked, answer = of_colours(shard, targets, "several")
    told = result["baselines"]["colours"]
    areas = [roc_auc_score(answer[:, each], LogisticRegression(C=told["C"], max_iter=5000).fit(
        known, truth[:, each]).predict_proba(asked)[:, 1]) for each in range(2)]
    assert told["auroc"] == pytest.approx(np.mean(areas), abs=0.01)
    assert told["auroc"] > 0.9
    assert set(result["metrics"]) == {"accuracy", "macro_f1", "auroc", "average_precision"}
    assert result["classes"] == ["red", "blue"]
    assert result["confusion"] == []


def test_a_number_is_guessed_as_ridge_regression_guesses_it(exported: Path, shard: Path, tmp_path: Path) -> None:
    targets = table(shard, tmp_path / "t.csv", {"redness": redness})
    result = evaluated(exported, shard, tmp_path, targets, "numbers")
    known, truth, asked, answer = of_colours(shard, targets, "numbers")
    told = result["baselines"]["colours"]
    guess = Ridge(alpha=1 / told["C"]).fit(known, truth[:, 0]).predict(asked)
    assert told["r2"] == pytest.approx(r2_score(answer[:, 0], guess), abs=0.01)
    assert told["r2"] > 0.7
    assert set(result["metrics"]) == {"r2", "mean_absolute_error", "pearson", "spearman"}


@pytest.mark.parametrize(("kind", "columns", "figure"), [("several", SEVERAL, "auroc"),
                                                         ("numbers", {"redness": redness}, "pearson")])
def test_neighbours_tell_their_mean(kind: str, columns: dict[str, Any], figure: str, exported: Path, shard: Path,
                                    tmp_path: Path) -> None:
    targets = table(shard, tmp_path / "t.csv", columns)
    assert evaluated(exported, shard, tmp_path, targets, kind, knn)["baselines"]["colours"][figure] > 0.8
    similarity, values = torch.tensor([[0.9, 0.5], [0.3, 0.3]]), torch.tensor([[[1.0], [0.0]], [[2.0], [4.0]]])
    found = knn.averaged(similarity, values, 0.2)
    weight = np.exp(0.9 / 0.2), np.exp(0.5 / 0.2)
    assert found[:, 0].numpy() == pytest.approx([weight[0] / sum(weight), 3.0])


def test_a_table_may_tell_of_slides_and_leave_some_out(shard: Path, tmp_path: Path) -> None:
    slides = sorted(set(index.samples(shard)["slide"].to_pylist()))
    (tmp_path / "t.csv").write_text(f"slide,age\n{slides[0]},61\n{slides[1]},\n{slides[2]},70\nnobody,3\n")
    found = features.told([shard], "", tmp_path / "t.csv", "numbers")
    assert set(found.slides) == {slides[0], slides[2]}
    assert found.targets_SC is not None
    assert len(found.remarks) == 2
    assert "1 rows of" in found.remarks[0] and "('nobody')" in found.remarks[0]
    assert f"{len(slides) - 2} of {len(slides)} slides of split '' have no row" in found.remarks[1]
    assert found.targets_SC[:, 0].tolist() == [61.0 if slide == slides[0] else 70.0 for slide in found.slides]


@pytest.mark.parametrize(("text", "kind", "said"), [
    ("", "numbers", "begins with nothing"), ("age\n3\n", "numbers", "needs one of key, slide, patient"),
    ("slide,patient,age\n", "numbers", "needs one of"), ("slide,a,a\n", "several", "two columns 'a'"),
    ("slide,age\nx,old\n", "numbers", "line 2 holds old"), ("slide,age\nx,nan\n", "numbers", "not one finite number"),
    ("slide,age\nx,3\nx,4\n", "numbers", "line 3: 'x' has 4"), ("slide,age\nx,3,4\n", "numbers", "has 3 cells"),
    ("slide,age,sex\nx,3,1\n", "numbers", "guesses one"), ("slide,age\nx,3\n", "several", "holds 3"),
    ("slide,age\nx,3\n", "numbers", "names no slide of split 'train'")])
def test_a_table_that_cannot_be_used_is_refused_by_its_line(text: str, kind: str, said: str, shard: Path,
                                                            tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ShardError, match=said):
        features.told([shard], "train", tmp_path / "t.csv", kind)


def test_a_table_of_another_encoding_is_refused_and_empty_lines_are_no_lines(shard: Path, tmp_path: Path) -> None:
    slide = index.samples(shard)["slide"].to_pylist()[0]
    (tmp_path / "latin.csv").write_bytes("slide,größe\nx,3\n".encode("latin-1"))
    with pytest.raises(ShardError, match="in UTF-8"):
        features.told([shard], "", tmp_path / "latin.csv", "numbers")
    (tmp_path / "t.csv").write_text(f"slide,age\n\n{slide},3\n\n")
    assert set(features.told([shard], "", tmp_path / "t.csv", "numbers").slides) == {slide}


def test_a_column_of_one_value_and_a_kind_without_a_table_are_refused(exported: Path, shard: Path,
                                                                     tmp_path: Path) -> None:
    targets = table(shard, tmp_path / "t.csv", {"same": lambda _: 1, **SEVERAL})
    with pytest.raises(ShardError, match="one value only of a column"):
        evaluated(exported, shard, tmp_path, targets, "several")
    for changes, said in (({"kind": "several"}, "named by data.targets"), ({"targets": targets}, "data.kind=numbers")):
        assert any(said in each for each in Labelled(shards=[shard], **changes).rules())
    with pytest.raises(ConfigError, match="knows classes alone"):
        raise ConfigError(Low(encoder=str(exported),
                              data=Labelled(shards=[shard], targets=targets, kind="numbers")).rules())
