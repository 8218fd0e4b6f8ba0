"""The report: the page says what the files say, whatever state they are in, and reaches for nothing outside itself."""

import ast
import base64
import io
import json
import math
import re
import shutil
import statistics
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ssl_dist.report import chart, collect, page

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&{{ 7919 * 7907 }}"
VOID = {"meta", "br", "img", "hr", "input", "link", "wbr"}


class Page(HTMLParser):
    """A page taken apart by the standard library: tags with attributes, text, tables by their data-table name."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.glued = False
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.glued = tag == "wbr"
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.rows = self.tables.setdefault(dict(attributes).get("data-table") or "", [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"
        self.glued = False
        if tag in ("td", "th"):
            self.rows[-1][-1] = " ".join(self.rows[-1][-1].split())

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            return
        if self.glued:
            self.words[-1] += data
        else:
            self.words.append(data)
        self.glued = False
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def column(self, table: str, name: str) -> list[str]:
        head, *rows = self.tables[table]
        return [row[head.index(name)] for row in rows if len(row) == len(head)]  # others are headings

    def between(self, first: str, last: str) -> str:
        """The text from one heading to another."""
        return self.text.split(first, 1)[1].split(last, 1)[0]

    def charts(self) -> list[str]:
        return [str(a["data-metric"]) for tag, a in self.tags if tag == "svg" and "data-metric" in a]


def write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def write_png(file: Path, width: int = 8, colour: tuple[int, int, int] = (200, 120, 180)) -> bytes:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, 8), colour).save(file)
    return file.read_bytes()


def metric_row(step: int, loss: float, speed: float = 100.0) -> dict[str, float]:
    return {
        "step": step, "samples": 64 * step, "epoch": step / 10, "time": 1.0 * step, "loss": loss, "lr": 0.1 / step,
        "images_per_second": speed, "data_wait": 0.25, "grad_norm": 1.5, "effective_rank": 10.0 + step,
    }  # fmt: skip


def bare_run(folder: Path, **card: Any) -> Path:
    write_json(folder / "run.json", {"state": "running", "step": 0, "steps": 20, "attempts": [], **card})
    return folder


def shard_folder(folder: Path, licence: str = "CC BY 4.0") -> Path:
    datasets = [{"name": "bach", "licence": licence, "organ": "breast"}, {"name": "crc-he", "licence": "CC0"}]
    tars = [
        {"name": "bach-000000.tar", "samples": 700, "bytes": 10_000_000, "sha256": "0"},
        {"name": "bach-000001.tar", "samples": 650, "bytes": 9_000_000, "sha256": "0"},
        {"name": "crc-he-000000.tar", "samples": 42, "bytes": 500_000, "sha256": "0"},
    ]
    write_json(folder / "index.json", {"format": 1, "datasets": datasets, "settings": {"mpp": 0.5}, "tars": tars})
    rejected = ["blank"] * 1203 + ["blur"] * 17 + ["pen"]
    rows = [json.dumps({"slide": "s", "reason": reason}) + "\n" for reason in rejected]
    (folder / "rejected.jsonl").write_text("".join(rows))
    write_png(folder / "sheets" / "sheet-0.png")
    write_png(folder / "overlays" / "slide-0.png")
    return folder


def full_run(folder: Path, shards: Path, losses: dict[int, float], **config: Any) -> Path:
    attempts = [
        {"started": "2026-11-20T09:00:00+00:00", "ended": "2026-11-20T10:30:00+00:00", "host": "alpha", "pid": 1,
         "world": 4, "device": "cuda", "from_step": 0, "to_step": 12, "outcome": "preempted"},
        {"started": "2026-11-20T11:00:00+00:00", "ended": "2026-11-20T11:02:05+00:00", "host": "beta", "pid": 2,
         "world": 2, "device": "cuda", "from_step": 10, "to_step": 20, "outcome": "done"},
    ]  # fmt: skip
    bare_run(folder, state="done", exit_code=0, error=None, step=20, attempts=attempts)
    lr = config.get("lr", 0.3)
    (folder / "config.yaml").write_text(
        f"data:\n  shards: [{shards}]\nmethod:\n  name: simclr\noptim:\n  lr: {lr}\n  decay: 1.0e-06\n"
    )
    write_json(folder / "env.json", {"python": "3.11.7", "gpus": [], "packages": {"torch": "2.15.0"}})
    rows = [metric_row(step, 9.0, speed=400.0) for step in range(1, 13)]  # 11 and 12 are done again below
    rows += [metric_row(step, losses[step], speed=200.0 + step) for step in range(11, 21)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_png(folder / "pictures" / "views.png")
    write_png(folder / "eval" / "knn_neighbours.png")
    write_json(
        folder / "eval" / "knn.json",
        {
            "protocol": "knn",
            "encoder": {"path": "encoder", "architecture": "resnet18", "sha256": "ab"},
            "metrics": {"accuracy": config.get("accuracy", 0.912), "balanced_accuracy": 0.9, "loss_of_probe": 1.75},
            "baselines": {"random": {"accuracy": 0.55, "balanced_accuracy": 0.925, "loss_of_probe": 2.5}},
            "intervals": {"accuracy": [0.88, 0.934], "loss_of_probe": ["x", None], "gone": 3},
            "against": {"random": {"accuracy": {"difference": 0.36, "p": 0.002}, "balanced_accuracy": "torn"}, "x": 1},
            "warnings": ["the patients of 12 query tiles are unknown"],
            "counts": {"bank": 2000, "queries": 700, "shared_patients": 0},
            "classes": ["fat", "gland", "stroma"],
            "confusion": [[90, 10, 0], [5, 15, 0], [0, 0, 0]],
            "pictures": ["knn_neighbours.png"],
        },
    )
    write_json(folder / "encoder" / "config.json", {"architecture": "resnet18", "num_features": 512})
    (folder / "encoder" / "README.md").write_text("# A model card\n")
    write_json(folder / "encoder" / "pretraining.json", {"tiles": 1392})
    return folder


@pytest.fixture
def losses() -> dict[int, float]:
    return {step: 5.0 - step / 8 for step in range(1, 21)}


@pytest.fixture
def run(tmp_path: Path, losses: dict[int, float]) -> Path:
    return full_run(tmp_path / "runs" / "first", shard_folder(tmp_path / "bach"), losses)


def evaluate(run: Path, name: str, **changes: Any) -> None:
    """Changes a result, or writes a new one."""
    file = run / "eval" / f"{name}.json"
    write_json(file, {**(json.loads(file.read_text()) if file.exists() else {"protocol": name}), **changes})


def read(folder: Path, *more: Path) -> Page:
    return Page(page.write([folder, *more], folder / "report.html"))


def test_scores_stand_with_their_intervals_their_chances_and_their_doubts(run: Path) -> None:
    said = read(run)
    assert "91.2 % 88.0 % to 93.4 %" in said.text
    assert "p 0.002" in said.text
    assert "knn: the patients of 12 query tiles are unknown" in said.between("What to know first", "Curves")
    assert "the patients of 12 query tiles are unknown" in said.between("k nearest neighbours · resnet18", "Confusion")


def test_of_errors_the_smaller_is_the_better() -> None:
    assert page.Score("knn", "calibration_error", 0.02, {"random": 0.3}, True).better("random")
    assert not page.Score("knn", "accuracy", 0.02, {"random": 0.3}, True).better("random")


@pytest.mark.parametrize(("p", "better"), [(0.002, True), (0.05, True), (0.3, False)])
def test_what_may_be_chance_is_not_called_better(p: float, better: bool) -> None:
    assert page.Score("knn", "accuracy", 0.4, {"random": 0.3}, True, chances={"random": p}).better("random") is better


def test_the_headline_says_what_the_files_say(run: Path, losses: dict[int, float]) -> None:
    said = read(run)
    assert not said.open, "an element is never closed"
    assert "final loss 2.5 step 20 of 20, from 9" in said.text, f"the last row has loss {losses[20]}"
    speed = statistics.median(200 + step for step in range(11, 21))  # of the last attempt, not across both
    assert f"images / s {speed:.4g} median of the last attempt; 25.0 % of a step waits for data" in said.text
    assert "knn accuracy 91.2 % random 55.0 %, +36.2 points" in said.text
    assert "images seen 1,280 epoch 2, 2 attempts" in said.text
    assert "done" in said.text


def test_the_last_row_of_a_step_counts(run: Path, losses: dict[int, float]) -> None:
    found = collect.run(run)
    assert [row["step"] for row in found.rows] == list(range(1, 21))
    assert dict(found.curve("loss")) == {step: 9.0 if step <= 10 else losses[step] for step in range(1, 21)}
    assert "2 steps were done twice" in read(run).text


def test_every_curve_is_drawn_where_its_numbers_are(run: Path) -> None:
    said = read(run)
    assert said.charts() == ["loss", "lr", "images_per_second", "data_wait", "grad_norm", "effective_rank"]
    (loss,) = [one for one in page.run_curves(collect.run(run)) if one.metric == "loss"]
    points = [tuple(map(float, point)) for point in re.findall(r"[ML]([\d.]+) ([\d.]+)", loss.lines[0].path)]
    assert len(points) == 20
    ticks = {float(label): y for y, label in loss.y_ticks}
    (low, at_low), (high, at_high) = min(ticks.items()), max(ticks.items())
    for (_, y), (_, value) in zip(points, collect.run(run).curve("loss"), strict=True):
        assert low + (at_low - y) / (at_low - at_high) * (high - low) == pytest.approx(value, abs=0.02)
    assert [label for _, label in loss.marks] == ["2"], "the start of the second attempt"
    (position,) = [x for x, _ in loss.marks]
    assert position == pytest.approx(points[9][0]), "it took over at step 10"


def test_differences_are_in_points_for_fractions_only(run: Path) -> None:
    said = read(run)
    assert said.column("scores", "metric") == ["accuracy", "balanced accuracy", "loss of probe"]
    assert said.column("scores", "this encoder") == ["91.2 % 88.0 % to 93.4 %", "90.0 %", "1.75"]
    assert said.column("scores", "random") == ["55.0 %", "92.5 %", "2.5"]
    assert said.column("scores", "difference") == ["+36.2 points p 0.002", "\N{MINUS SIGN}2.5 points", "-0.75"]


def test_the_confusion_matrix_has_recalls(run: Path) -> None:
    rows = read(run).tables[""]
    fat, gland, stroma = (next(row for row in rows if row and row[0] == name) for name in ("fat", "gland", "stroma"))
    assert fat == ["fat", "90", "10", "·", "90.0 %"]
    assert gland == ["gland", "5", "15", "·", "75.0 %"]
    assert stroma[-1] == "—", "a class without a sample has no recall"


def test_attempts_rejects_and_licences_are_tables(run: Path) -> None:
    said = read(run)
    assert said.column("attempts", "lasted") == ["1 h 30 min", "2 min 05 s"]
    assert said.column("attempts", "steps") == ["0 → 12", "10 → 20"]
    assert said.column("attempts", "outcome") == ["preempted", "done"]
    assert dict(row[:2] for row in said.tables["rejected"][1:]) == {"blank": "1,203", "blur": "17", "pen": "1"}
    assert said.tables["datasets"][0] == ["name", "licence", "tiles", "organ"]
    assert said.column("datasets", "name") == ["bach", "crc-he"]
    assert said.column("datasets", "licence") == ["CC BY 4.0", "CC0"]
    assert said.column("datasets", "tiles") == ["1,350", "42"]
    assert "1,392 tiles in 3 tars, 19.5 MB; 1,221 left out" in said.text


def test_the_page_reaches_for_nothing(run: Path) -> None:
    said = read(run)
    for tag, attributes in said.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form"), f"<{tag}> in the page"
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#")), f"<{tag} {name}={value!r}>"
    assert "url(" not in said.source
    assert "@import" not in said.source
    assert not re.search(r"https?:", said.source)
    anchors = [str(a["href"])[1:] for tag, a in said.tags if tag == "a"]
    ids = [a["id"] for _, a in said.tags if "id" in a]
    assert set(anchors) <= set(ids)
    assert len(ids) == len(set(ids)), "an id is used twice"


def test_pictures_are_inside_byte_for_byte_or_smaller(run: Path) -> None:
    small = write_png(run / "pictures" / "views.png", width=12)
    noise = Image.effect_noise((2000, 600), 90).convert("RGB")
    noise.save(run / "pictures" / "big.png")
    (run / "pictures" / "torn.png").write_bytes(small[:40])
    (run / "pictures" / "text.png").write_text("root:x:0:0")
    said = read(run)
    sources = {a["alt"]: str(a["src"]) for tag, a in said.tags if tag == "img"}
    decoded = base64.b64decode(sources["augmented views: views.png"].removeprefix("data:image/png;base64,"))
    assert decoded == small
    kind, _, packed = sources["augmented views: big.png"].partition(";base64,")
    assert kind == "data:image/jpeg"
    assert Image.open(io.BytesIO(base64.b64decode(packed))).size == (1400, 420)
    assert "torn.png cannot be shown" in said.text
    assert "text.png cannot be shown" in said.text
    assert base64.b64encode(b"root:x").decode()[:6] not in said.source
    for picture in ("knn: knn_neighbours.png", "contact sheet: sheet-0.png", "tissue overlay: slide-0.png"):
        assert picture in sources


def test_an_evaluation_cannot_name_a_picture_outside_its_folder(run: Path) -> None:
    write_png(run / "secret.png")
    write_json(run / "eval" / "linear.json", {"metrics": {"accuracy": 0.5}, "pictures": ["../secret.png"]})
    assert not [a for tag, a in read(run).tags if tag == "img" and "secret" in str(a["alt"])]


def test_hostile_strings_are_only_text(tmp_path: Path, losses: dict[int, float]) -> None:
    shards = shard_folder(tmp_path / "bach", licence=HOSTILE)
    (shards / "rejected.jsonl").write_text(json.dumps({"reason": HOSTILE}) + "\n")
    folder = full_run(tmp_path / "<b>run", shards, losses)
    card = json.loads((folder / "run.json").read_text())
    card |= {"state": HOSTILE, "error": HOSTILE}
    card["attempts"][0] |= {"host": HOSTILE, "outcome": HOSTILE, "device": HOSTILE, "world": HOSTILE}
    write_json(folder / "run.json", card)
    evaluation = json.loads((folder / "eval" / "knn.json").read_text())
    evaluation |= {"protocol": HOSTILE, "classes": [HOSTILE] * 3, "counts": {HOSTILE: HOSTILE}, "pictures": [HOSTILE]}
    evaluation["metrics"][HOSTILE] = 0.5
    write_json(folder / "eval" / "knn.json", evaluation)
    write_json(folder / "env.json", {HOSTILE: HOSTILE, "packages": {HOSTILE: HOSTILE}})
    write_json(folder / "encoder" / "config.json", {"architecture": HOSTILE})
    (folder / "encoder" / "README.md").write_text(HOSTILE)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**metric_row(20, 1.0), HOSTILE: 1.0}) + "\n")
    other = full_run(tmp_path / "other", shards, losses)
    (other / "config.yaml").write_text(json.dumps({HOSTILE: HOSTILE}))
    for said in (read(folder), read(folder, other)):
        assert HOSTILE in said.text, "the string is to be read as it is"
        assert "62615533" not in said.text.replace("{{ 7919 * 7907 }}", ""), "a string from disk was run as a template"
        for tag, attributes in said.tags:
            assert tag not in ("script", "b") or not attributes
            assert tag != "script"
            assert not [name for name in attributes if name.startswith("on")]
            assert attributes.get("src") != "x"


def test_a_run_that_has_only_begun_says_what_is_missing(tmp_path: Path) -> None:
    said = read(bare_run(tmp_path / "young"))
    for missing in ("no metrics yet", "no evaluation", "no pictures", "no exported encoder", "config.yaml", "env.json"):
        assert missing in said.text
    assert said.charts() == []
    assert "latest loss —" in said.text


def test_a_crashed_run_keeps_its_error_and_all_whole_lines(tmp_path: Path) -> None:
    folder = bare_run(tmp_path / "crashed", state="failed", exit_code=8, error="loss is nan at step 3", step=3)
    rows = [metric_row(1, 3.0), metric_row(2, 2.0), {**metric_row(3, math.nan), "grad_norm": math.inf}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines + "[1]\nnot json\n" + '{"step": 4, "lo')
    said = read(folder)
    assert "failed , exit code 8: loss is nan at step 3" in said.text
    assert "the last line of metrics.jsonl is torn" in said.text
    assert "2 lines of metrics.jsonl are not JSON objects" in said.text
    assert "the loss was not finite at 1 logged steps, first at step 3" in said.text
    assert "latest loss nan" in said.text
    assert "nan" not in "".join(str(a.get("d")) for tag, a in said.tags if tag == "path")


def test_odd_types_in_every_file_do_not_stop_the_page(tmp_path: Path) -> None:
    told = ("metrics", "counts", "classes", "captions", "curves", "seeds", "seen_in_pretraining", "warnings", "shards")
    odds = (3, [], [3], "word", {"encoder": 3}, {"encoder": [{"share": 0.1, "balanced_accuracy": {"mean": "x"}}]},
            {"encoder": [{"epoch": 1}, {"epoch": None}]}, {"tiles": "x", "slides": -3}, [{"path": "\0"}, {"path": 3}],
            {"encoder": {"accuracy": {"mean": math.inf, "deviation": 1, "values": 3}}})  # fmt: skip
    files = (None, [], {}, "word", 7, [[1], "x", {}], *(dict.fromkeys(told, odd) for odd in odds))
    for number, odd in enumerate(files):
        folder = tmp_path / f"odd{number}"
        for name in ("run.json", "env.json", "eval/knn.json", "encoder/config.json", "encoder/pretraining.json"):
            write_json(folder / name, odd)
        write_json(folder / "config.yaml", odd)
        (folder / "metrics.jsonl").write_text(json.dumps(odd) + "\n" + '{"step": 1e999}\n{"step": true, "loss": []}\n')
        assert not read(folder).open
    folder = bare_run(tmp_path / "last", step="x", attempts=[{"started": 5, "world": []}, 3], heartbeat="yesterday")
    write_json(folder / "eval" / "knn.json", {"confusion": [[1, 2], [3]], "baselines": {"random": 3}})
    (folder / "config.yaml").write_text("a: &a [1]\nb: [*a, *a]\n")
    said = read(folder)
    assert "the confusion matrix is not a square" in said.text
    assert "config.yaml is not YAML" in said.text, "aliases can unfold to more than the memory holds"


def test_patients_on_both_sides_are_said_aloud(run: Path) -> None:
    card = json.loads((run / "eval" / "knn.json").read_text())
    card["counts"]["shared_patients"] = 3
    write_json(run / "eval" / "knn.json", card)
    assert "3 patients are on both sides of the split" in read(run).text


def test_a_run_without_a_heartbeat_for_an_hour_is_not_believed_to_run(tmp_path: Path) -> None:
    beat = datetime(2026, 11, 20, 13, tzinfo=UTC)
    folder = bare_run(tmp_path / "silent", heartbeat=beat.isoformat())
    assert any("60 minutes old" in note for note in collect.run(folder, now=beat + timedelta(hours=1)).notes)
    assert not any("minutes old" in note for note in collect.run(folder, now=beat + timedelta(minutes=1)).notes)


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "holiday"
    if there:
        folder.mkdir()
    with pytest.raises(collect.ReportError, match=r"holiday is not a run folder: .*; give the folder") as refused:
        page.write([folder], tmp_path / "report.html")
    assert isinstance(refused.value, ValueError)
    assert refused.value.exit_code == 3
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(collect.ReportError, match="no run folder was given"):
        page.write([], tmp_path / "report.html")


def test_several_runs_are_compared_and_overlaid(tmp_path: Path, losses: dict[int, float]) -> None:
    shards = shard_folder(tmp_path / "bach")
    first = full_run(tmp_path / "a" / "run", shards, losses)
    second = full_run(tmp_path / "b" / "run", shards, {k: v + 1 for k, v in losses.items()}, lr=0.6, accuracy=0.8)
    third = bare_run(tmp_path / "young")
    said = read(first, second, third)
    assert said.column("comparison", "run") == ["a/run", "b/run", "young"], "names are long enough to tell them apart"
    assert said.column("comparison", "knn accuracy") == ["91.2 % +36.2", "80.0 % +25.0", "—"]
    assert said.column("conduct", "last loss") == ["2.5", "3.5", "—"]
    assert said.column("conduct", "state") == ["done", "done", "running"]
    keys = [row[0] for row in said.tables["differences"][1:]]
    assert keys == ["optim.lr"], "only what differs is listed"
    assert said.tables["differences"][1][1:3] == ["0.3", "0.6"]
    overlaid = page.overlaid(collect.runs([first, second, third]))
    assert [line.name for line in overlaid[0].lines] == ["a/run", "b/run"]
    assert overlaid[0].x_label == "images seen"
    assert said.text.count("1,392 tiles in 3 tars") == 1, "a shard folder that two runs share is shown once"


SEEN = {"tiles": 1412, "slides": 0, "patients": 1}
MARK = "seen in pretraining"


def test_a_figure_of_what_was_seen_in_pretraining_is_marked_wherever_it_stands(run: Path, tmp_path: Path) -> None:
    clean = read(run)
    assert MARK not in clean.text
    few = [{"share": 0.1, "draws": 5, "balanced_accuracy": {"mean": 0.6, "deviation": 0.02}}]
    evaluate(run, "knn", seen_in_pretraining=SEEN, curves={"encoder": few})
    said = read(run)
    values = said.column("scores", "this encoder")
    assert len(values) == 3 and all(MARK in value for value in values)
    assert not any(MARK in value for value in said.column("scores", "random")), "the random network saw nothing"
    assert f"91.2 % {MARK} 1,412 tiles, 1 patient: too good" in said.between("knn accuracy", "images seen")
    assert f"Confusion {MARK}" in said.text
    assert f"Few labels {MARK}" in said.text
    assert "The encoder was pretrained on 1,412 tiles, 1 patient of those" in said.text
    other = full_run(tmp_path / "other", tmp_path / "bach", dict.fromkeys(range(1, 21), 1.0))
    several = read(run, other)
    assert [MARK in value for value in several.column("comparison", "knn accuracy")] == [True, False]
    assert "first, knn: seen in pretraining. The encoder was pretrained on 1,412 tiles" in several.text
    evaluate(run, "knn", seen_in_pretraining=dict.fromkeys(SEEN, 0), curves={})
    assert MARK not in read(run).text


def test_a_figure_of_unseen_tiles_leads_before_a_better_one_of_seen_tiles(run: Path) -> None:
    evaluate(run, "linear", metrics={"accuracy": 0.7}, baselines={"random": {"accuracy": 0.6}})
    evaluate(run, "knn", seen_in_pretraining=SEEN)
    assert "linear accuracy 70.0 % random 60.0 %, +10.0 points" in read(run).text


def test_an_encoder_that_does_not_say_what_it_saw_is_mentioned_once(run: Path, tmp_path: Path) -> None:
    for name in ("knn", "linear"):
        evaluate(run, name, metrics={"accuracy": 0.7}, seen_in_pretraining=None)
    said = read(run)
    assert said.text.count("it does not say what it was trained on") == 1
    assert "is not known (knn, linear)" in said.text
    assert MARK not in said.text
    other = full_run(tmp_path / "other", tmp_path / "bach", dict.fromkeys(range(1, 21), 1.0))
    assert "is not known of first: it does not say" in read(run, other).between("Side by side", "Each run")


def test_what_several_evaluations_warn_of_is_said_once_above_and_with_each(run: Path) -> None:
    doubt = "the query is of 2 patients"
    for name in ("knn", "linear"):
        evaluate(run, name, metrics={"accuracy": 0.7}, warnings=["shown by chance", doubt])
    evaluate(run, "linear", seen_in_pretraining=SEEN, warnings=["pretrained on it", doubt])
    said = read(run)
    above = said.between("What to know first", "Curves")
    assert above.count(doubt) == 1
    assert f"linear, knn: {doubt}" in above
    assert above.index("pretrained on it") < above.index("shown by chance"), "the gravest comes first"
    assert doubt in said.between("k nearest neighbours · resnet18", "linear probe")
    assert said.text.count(doubt) == 3


def test_an_evaluation_of_pictures_alone_shows_them_with_what_they_say(tmp_path: Path) -> None:
    folder = bare_run(tmp_path / "looked")
    write_png(folder / "eval" / "map.png", width=12)
    write_png(folder / "eval" / "plain.png")
    evaluate(folder, "look", metrics={}, pictures=["plain.png", "map.png"], captions={"map.png": "Alike lie near."})
    said = read(folder)
    assert "scores" not in said.tables
    assert "look: no figure of merit" in said.text
    assert "Coloured" not in said.text
    assert "Alike lie near." in said.text
    assert "map.png" not in said.text, "the caption stands for the name"
    assert [a["class"] for tag, a in said.tags if tag == "figure"] == ["picture told broad", "picture"]
    figures = [a["alt"] for tag, a in said.tags if tag == "img"]
    assert figures == ["look: map.png", "look: plain.png"], "what has a caption comes first"
    several = read(folder, bare_run(tmp_path / "young"))
    assert "comparison" not in several.tables
    assert "None of the runs has a figure of merit yet" in several.text
    assert several.column("conduct", "run") == ["looked", "young"]


def test_few_labels_are_a_table(run: Path) -> None:
    def rows(by: float) -> list[dict[str, Any]]:
        told = [("per_class", 2, 6.4, 5), ("share", 0.005, 9.0, 5), ("share", 1.0, 1800.0, 1)]
        return [{how: value, "draws": draws, "tiles": {"mean": tiles, "deviation": 1.0},
                 "balanced_accuracy": {"mean": by + tiles / 1e4, "deviation": 0.0123}}
                for how, value, tiles, draws in told]  # fmt: skip

    evaluate(run, "low", metrics={"accuracy": 0.9}, curves={"encoder": rows(0.5), "random": rows(0.4)[1:]})
    said = read(run)
    assert said.column("labels", "labels known") == ["2 of each class", "0.5 %", "100 %"]
    assert said.column("labels", "tiles") == ["6", "9", "1,800"]
    assert said.column("labels", "this encoder") == ["50.1 ± 1.2 %", "50.1 ± 1.2 %", "68.0 %"]
    assert said.column("labels", "random") == ["—", "40.1 ± 1.2 %", "58.0 %"]
    assert "over 5 choices" in said.text


def test_several_seeds_stand_beneath_the_figure_of_the_first(run: Path) -> None:
    spread = {"mean": 0.9, "deviation": 0.0149, "values": [0.912, 0.89, 0.898]}
    evaluate(run, "knn", seeds={"encoder": {"accuracy": spread}, "random": {"accuracy": {**spread, "mean": 0.5}}})
    said = read(run)
    assert said.column("scores", "this encoder")[0] == "91.2 % 88.0 % to 93.4 % 90.0 ± 1.5 %"
    assert said.column("scores", "random") == ["55.0 % 50.0 ± 1.5 %", "92.5 %", "2.5"]
    assert "standard deviation over 3 seeds" in said.text


def test_what_fine_tuning_learnt_with_every_pass_is_drawn(run: Path) -> None:
    passes = [{"epoch": number, "loss": 1 / number, "balanced_accuracy_held_out": 0.5} for number in (1, 2, 3)]
    evaluate(run, "finetune", metrics={"accuracy": 0.9}, curves={"encoder": passes, "random": passes[:2]})
    said = read(run)
    assert said.charts()[-2:] == ["loss", "balanced_accuracy_held_out"]
    drawn, _ = page.passes(collect.run(run).evaluations[0])
    assert [line.name for line in drawn.lines] == ["encoder", "random"]
    assert [len(re.findall("[ML]", line.path)) for line in drawn.lines] == [3, 2]
    assert [label for _, label in drawn.x_ticks] == ["1", "2", "3"], "between two passes there is nothing"


def test_the_licences_of_all_data_are_in_one_table(run: Path, tmp_path: Path) -> None:
    labelled = shard_folder(tmp_path / "labelled", licence="CC BY-NC-SA 4.0")
    gone = tmp_path / "gone"
    evaluate(run, "knn", shards=[{"path": str(labelled)}, {"path": str(tmp_path / "bach")}, {"path": str(gone)}])
    (tmp_path / "bach" / "index.json").write_text(
        json.dumps({**json.loads((tmp_path / "bach" / "index.json").read_text()), "datasets": [{"name": "bach"}]})
    )
    rows = read(run).tables["licences"][1:]
    unseen = "not known: its folder is not to be seen from here"
    assert [row[:4] for row in rows] == [
        ["bach", "not stated", "1,350", "pretraining, knn"],
        ["gone", unseen, "—", "knn"],
        ["bach", "CC BY-NC-SA 4.0", "1,350", "knn"],
        ["crc-he", "CC0", "42", "knn"],
    ]
    assert [row[4] for row in rows] == [str(tmp_path / name) for name in ("bach", "gone", "labelled", "labelled")]
    other = full_run(tmp_path / "other", tmp_path / "bach", dict.fromkeys(range(1, 21), 1.0))
    assert read(run, other).tables["licences"][1][3] == "pretraining; knn (1 of 2 runs)"


def test_what_was_counted_is_said_in_words() -> None:
    counts = {"bank": 6000, "queries": 10, "bank_patients": 1, "query_patients": 0, "shared_patients": 0, "folds": 3}
    assert page.tally(counts) == ["6,000 tiles to learn from of 1 patient", "10 tiles asked about, patients unknown",
                                  "folds 3"]  # fmt: skip
    assert page.tally({"tiles": 5, "width": 384}) == ["tiles 5", "width 384"]


@pytest.mark.parametrize("name", ["runs/moco_v2-lr0.03,seed=1", "__a//b", "", "plain"])
def test_a_long_name_is_cut_without_loss(name: str) -> None:
    assert "".join(page.parts(name)) == name


def test_a_long_curve_keeps_its_extremes() -> None:
    points = [(float(step), 1.0 + math.sin(step / 500)) for step in range(20_000)]
    points[7777] = (7777.0, 3.5)
    drawn = chart.draw({"run": points}, "loss", "loss", "step", [])
    assert drawn is not None
    (line,) = drawn.lines
    assert line.path.count("L") < chart.BUCKETS
    top = min(float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", line.band))
    ticks = {float(label): y for y, label in drawn.y_ticks}
    (low, at_low), (high, at_high) = min(ticks.items()), max(ticks.items())
    assert low + (at_low - top) / (at_low - at_high) * (high - low) == pytest.approx(3.5, abs=0.02)


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [-1.0, -3.0], [1e-12, 2e-12], [1e30, -1e30], [1e-5, 1.0, 1e-5]])
def test_any_range_has_readable_ticks_around_it(values: list[float]) -> None:
    drawn = chart.draw({"r": [(float(i), v) for i, v in enumerate(values)]}, "m", "m", "step", [])
    assert drawn is not None
    assert 2 <= len(drawn.y_ticks) <= 12
    labels = [label for _, label in drawn.y_ticks]
    assert len(labels) == len(set(labels)), f"two ticks read the same: {labels}"
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([-\d.]+)", drawn.lines[0].path)]
    for y in heights + [y for y, _ in drawn.y_ticks]:
        assert chart.TOP - 0.01 <= y <= chart.HEIGHT - chart.BOTTOM + 0.01


def test_the_report_imports_none_of_ours() -> None:
    for file in Path(page.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                ours = name.split(".")[0] in ("ssl_dist", "shards", "launch", "torch")
                assert not ours or name.startswith("ssl_dist.report"), f"{file.name} imports {name}"


def test_figures_of_other_tiles_are_said_not_to_compare(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    for folder, splits, size in ((run, ["train", "test"], 64), (other, ["train", "valid"], 32)):
        evaluate(folder, "knn", asked=dict(zip(("bank", "query"), splits, strict=True)), size=size,
                 shards=[{"path": "x", "datasets": ["pcam"]}])
    said = read(run, other)
    assert "knn is not of the same tiles everywhere" in said.text
    assert "pcam, train → test, 64 px" in said.text and "pcam, train → valid, 32 px" in said.text
    evaluate(other, "knn", asked={"bank": "train", "query": "test"}, size=64)
    assert "is not of the same tiles" not in read(run, other).text


def test_a_baseline_that_saw_what_it_is_asked_about_is_marked_at_its_own_figure(run: Path) -> None:
    evaluate(run, "linear", metrics={"accuracy": 0.7}, baselines={"theirs": {"accuracy": 0.9}, "random": {
        "accuracy": 0.5}}, seen_by_baselines={"theirs": {"tiles": 3}, "other": None})
    said = read(run).text
    assert "90.0 % seen in pretraining" in said
    assert "50.0 % seen in pretraining" not in said and "70.0 % seen in pretraining" not in said
