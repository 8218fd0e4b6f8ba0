"""What protocols share: features kept and read again, encoders from elsewhere, doubts that are said, comparisons."""

import json
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards import index
from shards.index import ShardError
from ssl_dist import config
from ssl_dist.config import ConfigError
from ssl_dist.eval import features, knn, protocol, summary
from ssl_dist.eval.settings import Knn, Labelled
from ssl_dist.models import encoder as encoders
from ssl_dist.models.encoder import Encoder, EncoderError, salted

relabelled = runpy.run_path(str(Path(__file__).with_name("tables.py")))["relabelled"]

HALF = (0.5,) * 3
FEW = re.compile("the query is of 2 patients or slides, too few for intervals")


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    return saved(tmp_path / "first" / "encoder", 0)


def saved(folder: Path, seed: int, **about: Any) -> Path:
    torch.manual_seed(seed)
    Encoder("test_resnet", {}, HALF, HALF).save(folder, 64, about)
    return folder


def evaluated(encoder: Path | str, shard: Path, **changes: Any) -> dict[str, Any]:
    settings = Knn(**{"encoder": str(encoder), "data": Labelled(shards=[shard]), "size": 64,
                       "k": 5, "batch": 32, "baselines": [], **changes})
    return knn.run(settings, torch.device("cpu"), 2, lambda *_: None)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tiles are looked at by an encoder."""
    seen: list[int] = []
    forward = Encoder.forward

    def counting(self: Encoder, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.device.type != "meta":
            seen.append(len(pixels))
        return forward(self, pixels)

    monkeypatch.setattr(Encoder, "forward", counting)
    return seen


# ---- the cache

def test_what_was_computed_once_is_read_again_and_gives_the_same(exported: Path, shard: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    seen = counted(monkeypatch)
    first = evaluated(exported, shard, baselines=["random", "colours"])
    assert sum(seen) == 2 * (first["counts"]["bank"] + first["counts"]["queries"])
    seen.clear()
    monkeypatch.setattr(features, "colours", None)
    assert evaluated(exported, shard, baselines=["random", "colours"]) == first
    assert not seen


@pytest.mark.parametrize("change", [{"size": 48}, {"precision": "bf16"}, {"cache": False}])
def test_whatever_decides_the_features_is_in_their_key(change: dict[str, Any], exported: Path, shard: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated(exported, shard)
    seen = counted(monkeypatch)
    evaluated(exported, shard, **change)
    assert seen
    seen.clear()
    saved(exported, 1)
    evaluated(exported, shard)
    assert seen, "other weights in the same folder"


def test_other_tiles_have_other_features(exported: Path, shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated(exported, shard)
    seen = counted(monkeypatch)
    evaluated(exported, shard, data=Labelled(shards=[shard], bank="test", query="train"))
    assert not seen, "each split for itself"
    labels = [index.NO_LABEL if number % 5 == 0 else label
              for number, label in enumerate(index.samples(shard)["label"].to_pylist())]
    evaluated(exported, relabelled(shard, exported.parent / "fewer", label=labels))
    assert seen


def test_features_that_were_damaged_are_computed_anew(exported: Path, shard: Path, monkeypatch: pytest.MonkeyPatch,
                                                      caplog: pytest.LogCaptureFixture) -> None:
    first = evaluated(exported, shard)
    kept = sorted((exported.parent / "eval" / "features").glob("*.npy"))
    assert len(kept) == 2
    data = bytearray(kept[0].read_bytes())
    data[-3] ^= 1
    kept[0].write_bytes(data)
    kept[1].write_bytes(kept[1].read_bytes()[:-8])
    seen = counted(monkeypatch)
    assert evaluated(exported, shard) == first
    assert sum(seen) == first["counts"]["bank"] + first["counts"]["queries"]
    assert caplog.text.count("is damaged and is computed anew") == 2


# ---- encoders

def test_another_encoder_is_a_baseline_and_is_compared_on_the_same_drawings(exported: Path, shard: Path,
                                                                            tmp_path: Path) -> None:
    other = saved(tmp_path / "other" / "encoder", 1)
    cohort(shard, tmp_path / "many", [f"p{number}" for number in range(14)], [f"s{number}" for number in range(14)])
    data = Labelled(shards=[tmp_path / "many"], bank="", query="", hold="patient", part=0.5)
    result = evaluated(exported, shard, baselines=[str(other)], data=data)
    alone = evaluated(other, shard, data=data)
    told = result["baselines"][str(other)]
    assert {name: told[name] for name in alone["metrics"]} == alone["metrics"]
    against = result["against"][str(other)]["accuracy"]
    assert against["difference"] == pytest.approx(result["metrics"]["accuracy"] - told["accuracy"], abs=2e-4)
    assert against["interval"][0] <= against["difference"] <= against["interval"][1]
    low, high = result["intervals"]["accuracy"]
    assert low <= result["metrics"]["accuracy"] <= high


def test_a_name_of_timm_is_taken_with_its_own_normalisation(shard: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights come from the network; what lies in its stead here are ours, under timm's name."""
    create, built = encoders.timm.create_model, {}

    def offline(name: str, pretrained: bool = False, **more: Any) -> Any:
        torch.manual_seed(5 if pretrained else 6)
        network = create(name, pretrained=False, **more)
        built[pretrained] = network
        return network

    monkeypatch.setattr(encoders.timm, "create_model", offline)
    found = encoders.load("timm:test_resnet")
    first = built[True].state_dict()
    assert all(torch.equal(value, first[name]) for name, value in found.network.state_dict().items())
    card = built[True].pretrained_cfg
    assert (found.mean, found.std) == (tuple(card["mean"]), tuple(card["std"]))
    result = evaluated("timm:test_resnet", shard, out=tmp_path / "out")
    assert result["encoder"]["architecture"] == "test_resnet"
    assert len(result["encoder"]["sha256"]) == 64
    assert result["seen_in_pretraining"] is None


def test_a_name_whose_weights_cannot_be_had_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(EncoderError, match=r"timm:resnett18 cannot be had .*near it: .*resnet18"):
        encoders.load("timm:resnett18")


@pytest.mark.parametrize(("words", "said"), [
    (["encoder=nowhere"], "encoder='nowhere' is no folder here"),
    (["encoder=.", "baselines=[rndom]"], "baselines has 'rndom', which is neither random nor colours"),
    (["encoder=.", "data.query=train"], "both 'train'"),
    (["encoder=.", "data.valid=test"], "data.valid=test is no split apart"),
    (["encoder=.", "data.hold=patient", "data.valid=valid"], "data.valid=valid is no split apart"),
    (["encoder=.", "data.targets=."], "say what the table holds with data.kind=several"),
    (["encoder=.", "protocol=lineer"], "protocol='lineer' is not one of .* did you mean 'linear'"),
    (["encoder=.", "k=3"], "k=3 is not a key"),
    (["encoder=.", "protocol=finetune", "baselines=[colours]"], "no weights to fine-tune")])
def test_what_is_no_encoder_is_said_before_anything_is_loaded(words: list[str], said: str, shard: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        config.load_eval("eval/linear", [*words, f"data.shards=[{shard}]"])


def test_results_of_an_encoder_that_is_no_folder_go_below_eval(shard: Path) -> None:
    for encoder, home in (("hf-hub:MahmoodLab/UNI", "eval/hf-hub_MahmoodLab_UNI"), ("runs/a/encoder", "runs/a/eval")):
        assert Knn(encoder=encoder, data=Labelled(shards=[shard])).home == Path(home)


# ---- what is held out

def cohort(shard: Path, copy: Path, patients: list[str], slides: list[str]) -> features.Split:
    """The painted tiles as if of other patients and slides, in turns."""
    count = index.samples(shard).num_rows
    many = relabelled(shard, copy, split=[""] * count, label=[number % 2 for number in range(count)],
                      patient=[patients[number // 3 % len(patients)] for number in range(count)],
                      slide=[slides[number // 3 % len(slides)] for number in range(count)])
    return features.labelled([many], "")


@pytest.mark.parametrize("by", ["patient", "slide", "site"])
@pytest.mark.parametrize("part", [0.1, 0.5])
def test_what_is_held_out_is_whole_and_as_much_as_was_asked_for(by: str, part: float, shard: Path,
                                                               tmp_path: Path) -> None:
    patients = [f"TCGA-{site}-{number}" for number in range(4) for site in ("A1", "B2", "C3", "D4", "E5")]
    split = cohort(shard, tmp_path / "many", patients, [f"s{number}" for number in range(len(patients))])
    sides = [features.held_out(split, by, part, seed) for seed in range(4)]
    for bank, query in sides:
        names = [{{"patient": patient, "slide": slide, "site": patient[5:7]}[by]
                  for patient, slide in zip(side.patients, side.slides, strict=True)} for side in (bank, query)]
        assert not names[0] & names[1]
        assert sorted([*bank.rows, *query.rows]) == split.rows.tolist()
        assert abs(len(query.rows) / len(split.rows) - part) < (0.15 if by == "site" else 0.06)
        assert bank.labels_S.unique().tolist() == query.labels_S.unique().tolist() == [0, 1]
    assert len({tuple(query.rows) for _, query in sides}) > 1, "another seed holds others out"


def test_a_result_of_other_tiles_goes_beside_the_one_that_is_there(exported: Path, shard: Path) -> None:
    first, again = evaluated(exported, shard), evaluated(exported, shard, k=3)
    other = evaluated(exported, shard, data=Labelled(shards=[shard], bank="test", query="train"))
    assert [Path(each["written"]).name for each in (first, again, other)] == ["knn.json", "knn.json", "knn-2.json"]
    assert Path(evaluated(exported, shard, data=Labelled(shards=[shard], bank="test", query="train"))["written"]) == \
        Path(other["written"])
    assert json.loads(Path(first["written"]).read_text()) == again


def test_patients_that_are_unknown_are_not_held_out(shard: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"the patients of .* tiles are unknown; use hold=slide"):
        features.held_out(cohort(shard, tmp_path / "many", ["p", ""], ["s", "t"]), "patient", 0.5, 0)


def test_what_cannot_be_held_out_is_said(shard: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="of 1 patients no part can be held out"):
        features.held_out(cohort(shard, tmp_path / "one", ["p"], ["s"]), "patient", 0.5, 0)
    with pytest.raises(ShardError, match="'p' is none"):
        features.held_out(cohort(shard, tmp_path / "other", ["p"], ["s"]), "site", 0.5, 0)


def test_an_evaluation_may_hold_out_patients_of_one_split(exported: Path, shard: Path, tmp_path: Path) -> None:
    cohort(shard, tmp_path / "many", ["a", "b", "c", "d"], ["s", "t", "u", "v"])
    result = evaluated(exported, tmp_path / "many", data=Labelled(shards=[tmp_path / "many"], bank="", query="",
                                                                  hold="patient"))
    assert (result["counts"]["bank_patients"], result["counts"]["query_patients"]) == (3, 1)


def test_several_seeds_are_each_what_it_would_have_been_alone(exported: Path, shard: Path, tmp_path: Path) -> None:
    cohort(shard, tmp_path / "many", ["a", "b", "c", "d"], ["s", "t", "u", "v"])
    data = Labelled(shards=[tmp_path / "many"], bank="", query="", hold="patient")

    def once(settings: Knn) -> dict[str, Any]:
        return knn.run(settings, torch.device("cpu"), 2, lambda *_: None)

    told = Knn(encoder=str(exported), data=data, size=64, k=5, batch=32, seeds=3, seed=4)
    result = protocol.repeated(once, told)
    alone = [evaluated(exported, shard, data=data, baselines=["random"], seed=seed) for seed in (4, 5, 6)]
    assert result["seeds"]["encoder"]["accuracy"]["values"] == [each["metrics"]["accuracy"] for each in alone]
    assert result["seeds"]["random"]["auroc"]["mean"] == pytest.approx(
        np.mean([each["baselines"]["random"]["auroc"] for each in alone]), abs=1e-4)
    assert result["metrics"] == alone[0]["metrics"]


# ---- doubts

def pretrained_on(encoder: Path, shard: Path, split: str, *kinds: str) -> None:
    """An encoder that says it saw these of a split, as an export says it."""
    seen = features.labelled([shard], split)
    words = {"tiles": [digest.hex() for digest in seen.reader.column("digest", seen.rows)], "slides": seen.slides,
             "patients": seen.patients}
    (encoder / "pretraining.json").write_text(json.dumps({"salt": "s", **{
        name: [salted("s", word) for word in set(each)] if name in kinds else [] for name, each in words.items()}}))


def doubts(result: dict[str, Any]) -> list[str]:
    """Its warnings, but for tiles of the painted slides without a label, and encoders of the tests without a past."""
    return [words for words in result["warnings"] if "have no label" not in words and "is not known:" not in words]


def test_an_encoder_that_saw_the_very_tiles_is_caught_and_one_that_saw_others_of_their_patients(
        exported: Path, shard: Path) -> None:
    pretrained_on(exported, shard, "test", "tiles", "slides", "patients")
    result = evaluated(exported, shard)
    assert result["seen_in_pretraining"]["tiles"] == result["counts"]["queries"]
    assert "too good" in doubts(result)[0]
    pretrained_on(exported, shard, "test", "patients")
    result = evaluated(exported, shard)
    assert result["seen_in_pretraining"] == {"tiles": 0, "slides": 0, "patients": result["counts"]["query_patients"]}
    assert "too good" in doubts(result)[0]
    pretrained_on(exported, shard, "train", "tiles", "slides", "patients")
    assert FEW.match(*doubts(evaluated(exported, shard)))


def test_another_resolution_than_the_encoder_was_trained_at_is_said(shard: Path, tmp_path: Path) -> None:
    (shown,) = {round(float(each), 3) for each in index.samples(shard)["mpp"].to_pylist()}
    assert FEW.match(*doubts(evaluated(saved(tmp_path / "a" / "encoder", 0, mpp=[shown * 1.05]), shard)))
    _, words = doubts(evaluated(saved(tmp_path / "b" / "encoder", 0, mpp=[shown / 2]), shard))
    assert f"tiles of {shown:g} µm/px, and the encoder was trained at {shown / 2:g}" in words


def test_features_that_are_no_numbers_are_refused(exported: Path, shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Encoder, "forward", lambda self, pixels: torch.full((len(pixels), self.width), np.nan))
    with pytest.raises(EncoderError, match="no numbers"):
        evaluated(exported, shard)


def test_the_probability_of_every_class_is_what_the_figures_are_of(exported: Path, shard: Path) -> None:
    result = evaluated(exported, shard)
    assert set(result["metrics"]) == {"accuracy", "balanced_accuracy", "macro_f1", "weighted_f1", "auroc",
                                      "calibration_error"}
    counts = np.array(result["confusion"])
    assert counts.sum() == result["counts"]["queries"]
    assert result["metrics"]["accuracy"] == pytest.approx(np.trace(counts) / counts.sum(), abs=1e-4)


def test_what_a_recipe_says_of_its_own_protocol_does_not_bind_another(exported: Path, shard: Path) -> None:
    words = [f"encoder={exported}", f"data.shards=[{shard}]"]
    assert config.load_eval("eval/knn", words).k == 20
    other = config.load_eval("eval/knn", [*words, "protocol=linear"])
    assert other.protocol == "linear" and not hasattr(other, "k")
    with pytest.raises(ConfigError, match=r"k=3 is not a key.*command line"):
        config.load_eval("eval/knn", [*words, "protocol=linear", "k=3"])


def test_where_labels_are_missing_it_is_said_once(exported: Path, shard: Path, tmp_path: Path) -> None:
    labels, splits = (index.samples(shard)[name].to_pylist() for name in ("label", "split"))
    half = [number // 2 % 2 if number % 2 else index.NO_LABEL for number in range(len(labels))]
    result = evaluated(exported, relabelled(shard, tmp_path / "half", label=half))
    for split in ("train", "test"):
        whole = splits.count(split)
        left = sum(half[number] == index.NO_LABEL for number in range(len(half)) if splits[number] == split)
        words = f"{left} of {whole} tiles of split {split!r} have no label and are left out"
        assert result["warnings"].count(words) == 1
    assert result["counts"]["queries"] + result["counts"]["bank"] == len(labels) - half.count(index.NO_LABEL)
    held = evaluated(exported, relabelled(shard, tmp_path / "held", label=half), data=Labelled(
        shards=[tmp_path / "held"], bank="", query="", hold="patient"))
    assert sum("have no label" in words for words in held["warnings"]) == 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_one_class_alone_is_refused(split: str, exported: Path, shard: Path, tmp_path: Path) -> None:
    labels, splits = (index.samples(shard)[name].to_pylist() for name in ("label", "split"))
    same = [0 if splits[number] == split else label for number, label in enumerate(labels)]
    with pytest.raises(ShardError, match=f"split {split!r} holds one class only"):
        evaluated(exported, relabelled(shard, tmp_path / "same", label=same))


def test_a_rehearsal_refuses_what_the_evaluation_would_and_computes_nothing(
        exported: Path, shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "extract", None)
    words = [f"encoder={exported}", f"data.shards=[{shard}]", "k=5"]
    told = protocol.rehearse(config.load_eval("eval/knn", words), knn.allow)
    splits = index.samples(shard)["split"].to_pylist()
    labels = index.samples(shard)["label"].to_pylist()
    for words_of, split in (("tiles to learn from", "train"), ("tiles asked about", "test")):
        assert told[words_of] == sum(own == split and label != index.NO_LABEL
                                     for own, label in zip(splits, labels, strict=True))
    assert any("have no label" in each for each in told["warnings"])
    assert not (exported.parent / "eval" / "knn.json").exists()
    with pytest.raises(ShardError, match="lower k"):
        protocol.rehearse(config.load_eval("eval/knn", [*words[:2], "k=100000"]), knn.allow)
    told = protocol.rehearse(config.load_eval("eval/embed", words[:2]))
    assert told["tiles"] == len(labels)


@pytest.mark.parametrize("changed", [{"mean": [0.9, 0.2, 0.4]}, {"std": [0.2, 0.9, 0.1]},
                                     {"args": {"global_pool": "max"}}])
def test_the_same_weights_under_another_card_are_another_encoder(changed: dict[str, Any], exported: Path, shard: Path,
                                                                tmp_path: Path) -> None:
    """Normalisation and pooling decide the features as much as the weights do; and so in one call as well."""
    shutil.copytree(exported, tmp_path / "other")
    card = json.loads((tmp_path / "other" / "config.json").read_text())
    card["pretrained_cfg"] |= {name: value for name, value in changed.items() if name != "args"}
    card["model_args"] = {**(card.get("model_args") or {}), **changed.get("args", {})}
    (tmp_path / "other" / "config.json").write_text(json.dumps(card))
    both = evaluated(exported, shard, out=tmp_path / "out", baselines=[str(tmp_path / "other")])
    alone = evaluated(tmp_path / "other", shard, out=tmp_path / "fresh")
    assert {name: both["baselines"][str(tmp_path / "other")][name] for name in alone["metrics"]} == alone["metrics"]
    assert both["metrics"] != alone["metrics"]


def test_pictures_are_of_the_result_beside_which_they_lie(exported: Path, shard: Path, tmp_path: Path) -> None:
    first = evaluated(exported, shard, out=tmp_path)
    before = (tmp_path / first["pictures"][0]).read_bytes()
    second = evaluated(exported, shard, out=tmp_path, data=Labelled(shards=[shard], bank="test", query="train"))
    assert second["written"].endswith("knn-2.json") and second["pictures"] == ["knn-2_neighbours.png"]
    assert (tmp_path / "knn_neighbours.png").read_bytes() == before


def test_a_result_of_another_encoder_does_not_take_the_place_of_the_first(exported: Path, shard: Path,
                                                                         tmp_path: Path) -> None:
    other = saved(tmp_path / "other" / "encoder", 5)
    written = [evaluated(encoder, shard, out=tmp_path / "out")["written"] for encoder in (exported, other, exported)]
    assert [Path(path).name for path in written] == ["knn.json", "knn-2.json", "knn.json"]
    smaller = evaluated(exported, shard, out=tmp_path / "out", size=32)
    assert Path(smaller["written"]).name == "knn-3.json"


def test_a_baseline_that_saw_the_query_is_told_of_and_not_to_know_is_said(exported: Path, shard: Path,
                                                                         tmp_path: Path) -> None:
    other = saved(tmp_path / "other" / "encoder", 5)
    pretrained_on(other, shard, "test", "tiles")
    found = evaluated(exported, shard, out=tmp_path, baselines=[str(other)])
    assert any(f"baseline {other} was pretrained on" in words for words in found["warnings"])
    assert found["seen_by_baselines"][str(other)]["tiles"] == found["counts"]["queries"]
    assert any(line.startswith(f"{other}, on tiles seen in pretraining: accuracy") for line in summary.lines(found))
    ours = saved(tmp_path / "ours" / "encoder", 5, method="simclr")
    assert any("seen in pretraining is not known" in words for words in evaluated(ours, shard)["warnings"])
    assert not any("not known:" in words for words in evaluated(exported, shard)["warnings"])


def test_what_is_held_out_of_slides_is_called_so_where_patients_are_on_both_sides(exported: Path, shard: Path,
                                                                                 tmp_path: Path) -> None:
    samples = index.samples(shard)
    count = samples.num_rows
    many = relabelled(shard, tmp_path / "many", slide=[f"s{number % 12}" for number in range(count)],
                      patient=["one"] * count, label=[number // 2 % 2 for number in range(count)])
    with pytest.raises(ShardError, match=r"both 'what is left of all' and 'what data\.hold=slide holds out'"):
        evaluated(exported, many, data=Labelled(shards=[many], bank="", hold="slide"))
