"""The model card: counts as in the tars, figures as in the results, a snippet that runs, and nobody's name."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from PIL import Image

from shards import index, write
from ssl_dist import card, config, export, train
from ssl_dist.data.reader import Reader
from ssl_dist.models import encoder as encoders

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["method.views.size=32", "encoder.args.layers=[1,1,1,1]", "encoder.args.channels=[8,8,16,16]", "device=cpu",
         "encoder.mean=[0.7,0.5,0.6]", "encoder.std=[0.2,0.25,0.3]", "data.batch=8", "steps=12"]
ODD = {"name": 'co|hort: "one"\n`x` [y](z) *w* <b> \\', "organ": "breast | \"left\": it's\n---", "stain": "H&E #2",
       "licence": "CC BY-NC: 4.0 |\n- see {this}, [that]"}


class Card:
    """A card taken apart by other people's libraries."""

    def __init__(self, home: Path):
        self.text = (home / "README.md").read_text(encoding="utf-8")
        front, self.body = self.text.removeprefix("---\n").split("\n---\n", 1)
        self.front = yaml.safe_load(front)
        tokens = MarkdownIt().enable("table").parse(self.body)
        self.tables: list[list[list[str]]] = []
        self.code = [(token.info, token.content) for token in tokens if token.type == "fence"]
        for place, token in enumerate(tokens):
            if token.type == "table_open":
                self.tables.append([])
            elif token.type == "tr_open":
                self.tables[-1].append([])
            elif token.type in ("th_open", "td_open"):
                said = tokens[place + 1].children or []
                assert {each.type for each in said} <= {"text", "text_special"}, "a cell is text and nothing else"
                self.tables[-1][-1].append("".join(each.content for each in said))

    def rows(self, first: str) -> list[dict[str, str]]:
        """The table whose first column is called so."""
        head, *rows = next(table for table in self.tables if table[0][0] == first)
        return [dict(zip(head, row, strict=True)) for row in rows]

    def facts(self) -> dict[str, str]:
        """The table of what training was."""
        return {row[0]: row[1] for row in next(table for table in self.tables if table[0] == ["", ""])[1:]}


def renamed(shard: Path, copy: Path, **words: str) -> Path:
    """The same tars as a dataset of other words."""
    shutil.copytree(shard, copy)
    found, count = index.read(copy), index.samples(copy).num_rows
    columns = {"dataset" if key == "name" else key: [word] * count for key, word in words.items() if key != "licence"}
    index.write_samples(copy, index.samples(shard).to_pydict() | columns)
    found = replace(found, datasets=[{**found.datasets[0], **words}])
    index.write(copy, replace(found, fingerprint=index.fingerprint(copy, found)))
    return copy


@pytest.fixture(scope="module")
def two(shard: Path, settings: write.Settings, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The painted tiles, and coarser ones of the same slides, under names that break what is not careful."""
    home = tmp_path_factory.mktemp("two")
    write.write(replace(settings, out=home / "coarse", dataset="coarse", mpp=[2.0]))
    return [shard, renamed(home / "coarse", home / "odd", **ODD)]


def settings_of(shards: list[Path], run: Path, *words: str) -> config.Train:
    return config.load_train("demo", [*SMALL, f"run={run}", f"data.shards={[str(each) for each in shards]}",
                                      "data.split=", *words])


def exported(shards: list[Path], run: Path, *words: str, step: int = 12) -> Path:
    """What a run would export that learnt nothing."""
    told = settings_of(shards, run, *words)
    run.mkdir(parents=True, exist_ok=True)
    reader = Reader(told.data.shards, told.data.split, told.data.only, told.data.block)
    return export.export(train.build(told).encoder, told, reader, step, run / "encoder")


def written(shard: Path) -> list[dict[str, Any]]:
    """What the tars say of every tile, as anybody would read them."""
    found = []
    for path in sorted(shard.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [json.load(tar.extractfile(each)) | {"key": each.name.removesuffix(".json")}  # type: ignore[arg-type]
                      for each in tar if each.name.endswith(".json")]
    return found


# ---- what it was trained on

@pytest.mark.parametrize("case", ["all", "a split", "patients", "a block list"])
def test_of_every_dataset_the_card_counts_what_the_tars_hold(case: str, two: list[Path], tmp_path: Path) -> None:
    tiles = [written(each) for each in two]
    patients = sorted({tile["patient"] for tile in tiles[0]})
    keys = [tile["key"] for tile in tiles[0][::3]]
    (tmp_path / "block.txt").write_text("\n".join(f"painted/{key}" for key in keys))
    words, kept = {
        "all": ([], lambda number, tile: True),
        "a split": (["data.split=train"], lambda number, tile: tile["split"] == "train"),
        "patients": ([f"data.only={{patient: [{patients[0]}]}}"], lambda number, tile: tile["patient"] == patients[0]),
        "a block list": ([f"data.block={tmp_path / 'block.txt'}"],
                         lambda number, tile: number == 1 or tile["key"] not in keys)}[case]
    told = Card(exported(two, tmp_path / "run", *words))
    rows = told.rows("dataset")
    assert [row["dataset"] for row in rows] == ["painted", " ".join(ODD["name"].split()), "total"]
    left = [[tile for tile in each if kept(number, tile)] for number, each in enumerate(tiles)]
    for row, each in zip(rows, left, strict=False):
        assert [row[name] for name in ("tiles", "slides", "patients")] == [
            f"{len(each):,}", str(len({tile["slide"] for tile in each})), str(len({tile["patient"] for tile in each}))]
        assert row["µm/px"] == ", ".join(f"{mpp:g}" for mpp in sorted({tile["mpp"] for tile in each}))
    assert rows[2]["tiles"] == f"{sum(map(len, left)):,}"
    assert [rows[1][key] for key in ("organ", "stain", "licence")] == [
        " ".join(ODD[key].split()) for key in ("organ", "stain", "licence")]
    assert [rows[0][key] for key in ("organ", "stain", "licence")] == ["none", "H&E", "Apache-2.0"]
    everything = sum(map(len, tiles))
    assert f"{f'{sum(map(len, left)):,} of' if case != 'all' else 'All'} the {everything:,} tiles" in told.body
    assert {"all": "were read. ", "a split": "(split train)", "patients": "(patients: 1 that were named)",
            "a block list": "(without those of a block list)"}[case] in told.body


def test_a_patient_that_nobody_knows_is_not_counted_as_one(shard: Path, tmp_path: Path) -> None:
    count = index.samples(shard).num_rows
    for name, patients, shown in (("none", [""] * count, "unknown"), ("some", ["", *["p"] * (count - 1)],
                                                                      "1 and unknown")):
        copy = renamed(shard, tmp_path / name)
        index.write_samples(copy, index.samples(shard).to_pydict() | {"patient": patients,
                                                                      "slide": list(map(str, range(count)))})
        (row,) = Card(exported([copy], tmp_path / f"run-{name}")).rows("dataset")
        assert (row["patients"], row["slides"]) == (shown, f"{count:,}, one a tile")


# ---- its head

def test_the_front_matter_is_what_the_hub_reads_whatever_names_hold(two: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    result(run, exported(two, run), shards=[{"datasets": [ODD["name"]], "fingerprint": "f"}], asked={
        "bank": "tr: 'ain'", "query": 'te"st\n---\n'})
    told = Card(exported(two, run))
    assert {key: told.front[key] for key in ("library_name", "pipeline_tag", "license")} == {
        "library_name": "timm", "pipeline_tag": "image-feature-extraction", "license": "other"}
    assert told.front["data_licences"] == ["Apache-2.0", " ".join(ODD["licence"].split())]
    hub = pytest.importorskip("huggingface_hub")
    theirs = hub.ModelCard(told.text)
    assert theirs.data.to_dict() == told.front, "read, understood and written again, it is the same"
    assert theirs.text.strip() == told.body.strip()
    assert {each.metric_type: each.metric_value for each in theirs.data.eval_results} == {
        "balanced_accuracy": 0.75, "auroc": 0.8125}
    assert theirs.data.eval_results[0].dataset_name == " ".join(ODD["name"].split())


# ---- results

def result(run: Path, home: Path, name: str = "knn", **changed: Any) -> None:
    """A result as `ssl-dist eval` writes it."""
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval" / f"{name}.json").write_text(json.dumps({
        "protocol": "knn", "k": 20, "encoder": {"path": str(home), "sha256": encoders.digest(home)},
        "shards": [{"path": "/data/smith_john", "fingerprint": "abcdef0123456789", "datasets": ["bones"]}],
        "metrics": {"accuracy": 0.9, "balanced_accuracy": 0.75, "auroc": 0.8125},
        "intervals": {"balanced_accuracy": [0.7, 0.79], "auroc": [0.775, 0.85]},
        "baselines": {"random": {"balanced_accuracy": 0.5, "auroc": 0.55},
                      "/home/john/runs/other/encoder": {"balanced_accuracy": 0.8}},
        "against": {"random": {"balanced_accuracy": {"difference": 0.25, "interval": [0.2, 0.31], "p": 0.001}}},
        "counts": {"bank": 4000, "queries": 1000, "query_patients": 7}, "asked": {"bank": "train", "query": "test"},
        "seen_in_pretraining": {"tiles": 0, "slides": 0, "patients": 0},
        "warnings": ["slide 'smith_john_7' has no row in /home/john/table.csv"], **changed}))


def test_a_result_stands_in_the_table_with_intervals_and_beside_its_baselines(shard: Path, tmp_path: Path) -> None:
    home = exported([shard], tmp_path)
    assert "ssl-dist eval eval/knn encoder=RUN/encoder" in Card(home).body and "model-index" not in Card(home).front
    result(tmp_path, home)
    told = Card(exported([shard], tmp_path))
    both = {"protocol": "kNN, k = 20", "remark": "",
            "learnt from → asked about": "bones: train, 4,000 tiles → test, 1,000 of 7 patients"}
    assert told.rows("protocol") == [
        {**both, "figure": "balanced accuracy", "this encoder": "0.750 (0.700 to 0.790)",
         "untrained": "0.500, Δ +0.250 (+0.200 to +0.310)", "other": "0.800"},
        {**both, "figure": "AUROC", "this encoder": "0.812 (0.775 to 0.850)", "untrained": "0.550", "other": ""}]
    assert "Nothing was evaluated" not in told.body


def test_another_encoders_result_is_left_out_and_one_that_was_seen_is_marked(shard: Path, tmp_path: Path) -> None:
    home = exported([shard], tmp_path)
    result(tmp_path, home, "foreign", encoder={"sha256": "0" * 64}, protocol="foreign")
    result(tmp_path, home, "leaked", protocol="linear", seen_in_pretraining={"tiles": 0, "slides": 3, "patients": 2})
    result(tmp_path, home, "unknown", protocol="sgd", seen_in_pretraining=None)
    result(tmp_path, home, "clean", intervals={})
    told = Card(exported([shard], tmp_path))
    remarks = {row["protocol"]: row["remark"] for row in told.rows("protocol")}
    assert remarks == {"linear probe": "seen in pretraining: 3 slides, 2 patients",
                       "linear layer, SGD": "not known whether seen in pretraining",
                       "kNN, k = 20": "too few patients for an interval"}
    (listed,) = told.front["model-index"][0]["results"]
    assert listed["task"]["name"] == "kNN, k = 20", "what was seen is for no list of results"
    assert "too good" in told.body


def test_few_labels_seeds_numbers_and_tiles_held_out_are_told(shard: Path, tmp_path: Path) -> None:
    home = exported([shard], tmp_path)
    curve = [{"share": 0.07, "draws": 5, "balanced_accuracy": {"mean": 0.6, "deviation": 0.1}},
             {"per_class": 3, "draws": 5, "balanced_accuracy": {"mean": 0.5, "deviation": 0.2}},
             {"share": 1.0, "draws": 1, "balanced_accuracy": {"mean": 0.75, "deviation": 0.0}}]
    result(tmp_path, home, "low", protocol="low", curves={"encoder": curve, "random": curve[:1]})
    result(tmp_path, home, "number", metrics={"r2": 0.5, "mean_absolute_error": 3.0}, baselines={}, asked={
        "bank": "", "query": "patient", "targets": "/home/john/table.csv"}, seeds={
            "encoder": {"r2": {"mean": 0.45, "deviation": 0.03, "values": [0.4, 0.5]}}})
    low = Card(exported([shard], tmp_path)).rows("protocol")
    assert [(row["figure"], row["this encoder"], row["untrained"]) for row in low] == [
        ("balanced accuracy, 7 % of the labels", "0.600 ± 0.100", "0.600 ± 0.100"),
        ("balanced accuracy, 3 labels a class", "0.500 ± 0.200", ""),
        ("balanced accuracy, 100 % of the labels", "0.750", ""),
        ("R²", "0.500; 0.450 ± 0.030 over 2 seeds", "")]
    assert low[-1]["learnt from → asked about"] == ("bones: all, 4,000 tiles → patients held out, 1,000 of 7 patients, "
                                                    "by a table")


def test_the_data_of_a_result_is_called_by_name_or_by_its_digest_and_never_by_its_path(shard: Path,
                                                                                     tmp_path: Path) -> None:
    home, own = exported([shard], tmp_path), index.read(shard).fingerprint
    result(tmp_path, home, shards=[{"path": "/data/smith_john", "fingerprint": own},
                                   {"path": "/data/smith_john", "fingerprint": "abcdef0123456789"}])
    row = Card(exported([shard], tmp_path)).rows("protocol")[0]
    assert row["learnt from → asked about"].startswith("painted, shards abcdef012345: train")


def test_what_was_asked_about_outlined_regions_is_told_in_the_text_and_is_in_no_list_of_results(shard: Path,
                                                                                             tmp_path: Path) -> None:
    home = exported([shard], tmp_path)
    result(tmp_path, home, "nuclei", protocol="nuclei", shards=[], metrics={"pq": 0.5, "aji": 0.4, "f1_detection": 0.7},
           intervals={"pq": [0.4, 0.6]}, baselines={"random": {"pq": 0.3}}, against={},
           counts={"of": "regions", "bank": 24, "queries": 6, "query_patients": 5},
           asked={"bank": "others", "query": "20% by patient", "regions": "/home/john/smith"})
    told = Card(exported([shard], tmp_path))
    both = {"protocol": "nuclei, HoVer-Net",
            "learnt from → asked about": "outlined regions: others, 24 regions → 20% by patient, 6 regions of 5 "
                                         "patients"}
    assert told.rows("protocol") == [
        {**both, "figure": "PQ", "this encoder": "0.500 (0.400 to 0.600)", "untrained": "0.300", "remark": ""},
        {**both, "figure": "AJI", "this encoder": "0.400", "untrained": "",
         "remark": "too few patients for an interval"}]
    assert "model-index" not in told.front
    assert "john" not in told.body
    for number, cut in ((1, "half"), (2, "otsu")):
        result(tmp_path, home, f"segment-{number}", protocol="segment", shards=[], metrics={"dice": 0.7}, cut=cut,
               step=40, **{"class": number}, baselines={}, against={},
               counts={"of": "regions", "bank": 4, "queries": 1})
    rows = [row["protocol"] for row in Card(exported([shard], tmp_path)).rows("protocol")]
    assert rows[-2:] == ["maps against outlines, class 1 of step 40, cut at half",
                         "maps against outlines, class 2 of step 40, cut at otsu"]


# ---- what must not be told, and what must not stop it

def test_nobody_is_named(two: list[Path], tmp_path: Path) -> None:
    tiles = [tile for each in two for tile in written(each)]
    names = {kind: sorted({tile[kind] for tile in tiles}) for kind in ("slide", "patient")}
    run = tmp_path / "run"
    words = [f"data.only={{slide: {names['slide']}, patient: {names['patient']}}}".replace("'", "")]
    result(run, exported(two, run, *words))
    (run / "env.json").write_text(json.dumps({"host": "smith_john", "cpu": "A CPU", "cpus": 2}))
    text = Card(exported(two, run, *words)).text
    forbidden = [*names["slide"], *names["patient"], "john", str(tmp_path), *map(str, two)]
    assert len(forbidden) > 8 and not [word for word in forbidden if word in text]


RUBBISH = {"missing": None, "torn": '{"attempts": [{"star', "a list": "[1, 2]", "empty": "", "bytes": "\udcff{}",
           "odd": json.dumps({"attempts": [3, None, {"started": "yesterday", "world": "two", "device": ["x"]}],
                              "heartbeat": 7, "encoder": [], "packages": [], "gpus": "one", "metrics": 3})}


@pytest.mark.parametrize("kind", RUBBISH)
def test_what_is_missing_torn_or_odd_costs_its_own_line_and_no_export(kind: str, shard: Path, tmp_path: Path,
                                                                      caplog: pytest.LogCaptureFixture) -> None:
    result(tmp_path, exported([shard], tmp_path))
    for name in ("run.json", "env.json", "eval/bad.json"):
        if (content := RUBBISH[kind]) is not None:
            (tmp_path / name).write_text(content, errors="surrogateescape")
    told = Card(exported([shard], tmp_path))
    assert [row["this encoder"] for row in told.rows("protocol")] == [
        "0.750 (0.700 to 0.790)", "0.812 (0.775 to 0.850)"]
    assert told.facts()["optimizer"].startswith("adamw, learning rate 0.002, 10% warm-up")
    assert "unknown" in told.facts()["hardware"] and not caplog.text


@pytest.mark.parametrize("change", [
    {"metrics": {"auroc": float("nan"), "balanced_accuracy": 10**400, "r2": "0.5"}}, {"metrics": [0.5]},
    {"metrics": None}, {"encoder": "this"}, {"encoder": {"sha256": ["x"]}}])
def test_a_result_without_a_figure_is_none(change: dict[str, Any], shard: Path, tmp_path: Path) -> None:
    result(tmp_path, exported([shard], tmp_path), **change)
    assert "Nothing was evaluated yet" in Card(exported([shard], tmp_path)).body


@pytest.mark.parametrize("change", [
    {"intervals": {"auroc": [0.1], "balanced_accuracy": 3}, "against": [], "baselines": {"random": 0.5}},
    {"shards": None, "counts": {"bank": "many"}, "asked": None, "baselines": None},
    {"shards": ["x", {"path": 3}], "seeds": {"encoder": {"auroc": 3}}, "protocol": {"knn": 1}, "k": [20],
     "seen_in_pretraining": {"tiles": "0"}},
    {"protocol": "a|\n\ud800b", "curves": [[]], "asked": {"bank": {}, "query": [1]}}])
def test_an_odd_result_tells_what_can_be_told(change: dict[str, Any], shard: Path, tmp_path: Path,
                                              caplog: pytest.LogCaptureFixture) -> None:
    result(tmp_path, exported([shard], tmp_path), **change)
    rows = Card(exported([shard], tmp_path)).rows("protocol")
    assert [row["this encoder"].split()[0] for row in rows] == ["0.750", "0.812"] and not caplog.text
    assert ("not known whether seen" in rows[0]["remark"]) == ("seen_in_pretraining" in change)


def test_a_card_that_cannot_be_made_costs_no_encoder(shard: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: card.Facts) -> str:
        raise ZeroDivisionError("of smith_john")

    monkeypatch.setattr(card, "told", broken)
    home = exported([shard], tmp_path)
    assert encoders.load(home).width == 16
    assert "ZeroDivisionError" in Card(home).body and "john" not in Card(home).text
    assert "README.md says next to nothing" in caplog.text


# ---- what it took

def test_the_hours_of_all_attempts_are_added_and_of_one_that_was_killed_more_are_owned_to(shard: Path,
                                                                                       tmp_path: Path) -> None:
    def attempt(hour: int, end: int | None, **more: Any) -> dict[str, Any]:
        return {"started": f"2026-01-01T{hour:02}:00:00+00:00", "device": "cuda", "world": 2, "machines": 1,
                "ended": None if end is None else f"2026-01-01T{end:02}:00:00+00:00", **more}

    def told(*attempts: dict[str, Any]) -> dict[str, str]:
        (tmp_path / "run.json").write_text(json.dumps({
            "state": "running", "heartbeat": "2026-01-01T09:30:00+00:00", "attempts": attempts}))
        return Card(exported([shard], tmp_path)).facts()

    (tmp_path / "env.json").write_text(json.dumps({
        "cpu": "A CPU", "cpus": 96, "gpus": ["NVIDIA H100"] * 8, "commit": "c0ffee", "packages": {
            "ssl_dist": "0.1.0", "torch": "2.15.0", "numpy": "2"}}))
    assert told(attempt(1, 3), attempt(9, None))["time"] == "2.5 hours, in 2 attempts"
    assert told(attempt(1, None), attempt(2, 3, world=4))["time"] == "more than 1.0 hours, in 2 attempts"
    facts = told(attempt(9, None))
    assert facts["time"] == "30 minutes, in 1 attempt"
    assert facts["hardware"] == "2 ranks on 1 machine, cuda; rank 0: 8 x NVIDIA H100, A CPU, 96 cores"
    assert facts["software"] == "ssl_dist 0.1.0, commit c0ffee, torch 2.15.0"
    assert told(attempt(1, 2), attempt(2, 3, world=4))["hardware"].startswith("2 or 4 ranks on 1 machine")


def test_the_recipe_is_what_was_set_and_the_views_in_words(two: list[Path], tmp_path: Path) -> None:
    words = ["optim.lr=0.5", "optim.scale=linear", "method.width=48", "precision=bf16", "seed=7", "accumulate=1",
             "data.mixture=weights", f"data.weights={{painted: 3, {json.dumps(ODD['name'])}: 1}}", "data.batch=64",
             "method.views.stain=0", "method.views.turn=0.25", "data.stage=/somewhere"]
    told = Card(exported(two, tmp_path / "run", *words, step=3))
    (settings,) = [yaml.safe_load(content) for kind, content in told.code if kind == "yaml"]
    assert settings["method"] == {"name": "simclr", "temperature": 0.2, "width": 48}
    assert settings["data"] == {"batch": 64, "mixture": "weights", "weights": {"painted": 3, ODD["name"]: 1}}
    assert (settings["precision"], settings["seed"], settings["encoder"]["args"]["layers"]) == ("bf16", 7, [1] * 4)
    facts = told.facts()
    assert facts["optimizer"].startswith("adamw, learning rate 0.125 (0.5 for 256 tiles a step, linear)")
    assert facts["tiles seen"].startswith("192 (3 steps of 64)")
    assert "is of step 3 of 12" in told.body
    (view,) = [line for line in told.body.splitlines() if line.startswith("- 2 of 32 px: ")]
    assert view == ("- 2 of 32 px: crops of 50% to 100% of the area, width over height 0.75 to 1.33; brightness ± 0.3, "
                    "contrast ± 0.3, saturation ± 0.3, hue ± 0.2 (80%); grey (40%); blur of 0.1 to 1 px (30%); quarter "
                    "turns (25%); left-right flip (50%); up-down flip (50%)")


# ---- how it is used

STRANGER = """
import json, numpy, pathlib, sys
for number, code in enumerate(json.loads(pathlib.Path("code.json").read_text())):
    known = {}
    exec(code, known)
    numpy.save(f"found-{number}.npy", known["features"])
    assert not {"ssl_dist", "shards"} & set(sys.modules)
"""


def test_the_snippets_run_where_nothing_of_ours_is_and_give_our_features(shard: Path, tmp_path: Path) -> None:
    told = settings_of([shard], tmp_path)
    method = train.build(told)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in method.encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    home = export.export(method.encoder, told, Reader([shard]), 12, tmp_path / "encoder",
                         forms=["torchscript", "onnx"])
    pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels[0]).save(home / "tile.png")
    snippets = [content for kind, content in Card(home).code if kind == "python"]
    assert ["timm" in each for each in snippets] == [True, False, False]
    (home / "code.json").write_text(json.dumps(snippets))
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-P", "-c", STRANGER], cwd=home, check=True, timeout=120,
                   env={**clean, "HF_HUB_OFFLINE": "1"})
    with torch.inference_mode():
        truth = encoders.load(home).eval()(torch.from_numpy(pixels)).numpy()
    assert truth.std() > 0.01
    for number in range(3):
        assert np.load(home / f"found-{number}.npy") == pytest.approx(truth, abs=1e-5, rel=1e-4)


def test_of_the_same_run_a_second_export_has_the_same_weights_and_what_came_since(shard: Path, tmp_path: Path) -> None:
    home = exported([shard], tmp_path)
    before, first = encoders.digest(home), Card(home)
    assert first.facts()["weights"] == f"SHA-256 {before}"
    export.portable(home, "torchscript")
    result(tmp_path, home)
    again = Card(exported([shard], tmp_path))
    assert encoders.digest(home) == before
    assert again.rows("protocol")[0]["this encoder"] == "0.750 (0.700 to 0.790)"
    assert "model.torchscript.pt" in again.body and "model.torchscript.pt" not in first.body
    assert exported([shard], tmp_path, "seed=1") == home and encoders.digest(home) != before
    assert "Nothing was evaluated yet" in Card(home).body and "torchscript" not in Card(home).body


# The words of several commands, one after the other in one process, and what the card says after each.
COMMANDS = """
import json, pathlib, sys
from ssl_dist import cli
for number, words in enumerate(json.loads(sys.argv[1])):
    sys.argv = ["ssl-dist", *words]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, words
    pathlib.Path(f"card-{number}.md").write_text(pathlib.Path("run/encoder/README.md").read_text())
"""


def test_trained_evaluated_and_exported_by_its_commands_the_card_tells_of_all_three(shard: Path,
                                                                                 tmp_path: Path) -> None:
    commands = [["train", "demo", "run=run", f"data.shards=[{shard}]", *SMALL, "log.pictures=0", "steps=3"],
                ["eval", "eval/knn", "encoder=run/encoder", f"data.shards=[{shard}]", "k=5",
                 "baselines=[random,colours]"], ["export", "run"]]
    done = subprocess.run([sys.executable, "-c", COMMANDS, json.dumps(commands)], capture_output=True, text=True,
                          cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    before, after, _ = ((tmp_path / f"card-{number}.md").read_text() for number in range(3))
    assert "Nothing was evaluated yet" in before and "is of step" not in before
    assert after == before, "an evaluation writes nothing there"
    told, found = Card(tmp_path / "run/encoder"), json.loads((tmp_path / "run/eval/knn.json").read_text())
    assert f"SHA-256 {found['encoder']['sha256']}" in before and f"SHA-256 {found['encoder']['sha256']}" in told.body
    row = told.rows("protocol")[0]
    assert found["shards"][0]["datasets"] == ["painted"]
    assert row["learnt from → asked about"].startswith("painted: train, ")
    assert row["this encoder"] == f"{found['metrics']['balanced_accuracy']:.3f}"
    assert row["colour histograms"] == f"{found['baselines']['colours']['balanced_accuracy']:.3f}"
    assert row["remark"] == "too few patients for an interval"
    tiles = [tile for tile in written(shard) if tile["split"] == "train"]
    assert told.rows("dataset")[0]["tiles"] == str(len(tiles))
    facts = told.facts()
    assert facts["time"].endswith(", in 1 attempt") and facts["hardware"].startswith("1 rank on 1 machine, cpu")
    assert facts["software"].startswith("ssl_dist ") and f"torch {torch.__version__.partition('+')[0]}" in facts[
        "software"]
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        assert f"commit {head.stdout.strip()}" in facts["software"]
