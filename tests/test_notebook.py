"""A run in a notebook: arrays that say what the file says, a figure of them, an encoder that timm agrees with."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import ssl_dist
from ssl_dist import Run, notebook, status
from ssl_dist.models.encoder import Encoder, EncoderError

ROOT = Path(__file__).resolve().parent.parent
ROWS = [{"step": step, "loss": 5 - step / 8, "lr": 0.1 / step, "images_per_second": 90.0 + step, "data_wait": 0.25,
         "grad_norm": math.nan if step == 7 else 1.0 + step, "samples": 64 * step} for step in range(1, 21)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two attempts, of which the second does steps 11 and 12 again, and a row that was cut short."""
    folder = tmp_path / "runs" / "first"
    written(folder / "run.json", {
        "state": "done", "step": 20, "steps": 20, "heartbeat": "2026-11-20T11:02:05+00:00", "error": None,
        "attempts": [{"from_step": 0, "to_step": 12, "outcome": "preempted"},
                     {"from_step": 10, "to_step": 20, "outcome": "done"}]})
    first = [{**row, "loss": 99.0} for row in ROWS[:12]]
    rest = [row if row["step"] % 2 else {**row, "rank": 3.5} for row in ROWS[10:]]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in first + rest) + '{"step": 21, "lo')
    return folder


def written(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def test_metrics_are_the_columns_of_the_file(run: Path) -> None:
    found = Run(str(run)).metrics
    assert found["step"].tolist() == list(range(1, 21))
    assert found["step"].dtype == np.int64
    assert found["loss"].tolist() == [99.0] * 10 + [row["loss"] for row in ROWS[10:]], "what was done twice counts once"
    assert np.isnan(found["grad_norm"]).tolist() == [step == 7 for step in range(1, 21)]
    assert found["rank"][11] == 3.5
    assert np.isnan(found["rank"]).tolist() == [step <= 10 or step % 2 == 1 for step in range(1, 21)]
    assert {len(column) for column in found.values()} == {20}, "they make a table"
    with (run / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 22, "loss": 1.5}\n')
    assert Run(run).metrics["loss"][-1] == 1.5


def test_a_figure_has_the_curves_and_the_attempts(run: Path) -> None:
    figure = Run(run).plot()
    assert [place.get_title(loc="left") for place in figure.axes] == [
        "loss", "learning rate", "images / s", "time spent waiting for data"]
    found = Run(run).metrics
    for name, place in zip(notebook.PLOTTED, figure.axes, strict=True):
        curve, attempt = place.get_lines()
        assert curve.get_xydata() == pytest.approx(np.stack([found["step"], found[name]], axis=1))
        assert list(attempt.get_xdata()) == [10, 10]
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    picture = Image.open(io.BytesIO(figure._repr_png_()))       # what a notebook shows
    assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 10
    assert picture.width > 500


def test_any_metrics_may_be_drawn(run: Path) -> None:
    figure = Run(run).plot("loss", "grad_norm", "rank")
    assert [place.get_title(loc="left") for place in figure.axes] == ["loss", "gradient norm", "rank"]
    (one,) = Run(run).plot("rank").axes
    assert np.isfinite(one.get_lines()[0].get_ydata()).sum() == 5
    with pytest.raises(notebook.RunError, match="has no metric 'grad_nrm', but grad_norm; it has step, loss, lr"):
        Run(run).plot("loss", "grad_nrm")


def test_the_encoder_gives_what_timm_gives(run: Path) -> None:
    torch.manual_seed(0)
    trained = Encoder("test_resnet", {}, (0.7, 0.5, 0.6), (0.2, 0.25, 0.3))
    for each in trained.modules():      # statistics as after a training: without them eval mode would be as good as any
        if isinstance(each, torch.nn.BatchNorm2d):
            each.running_mean.uniform_(-0.3, 0.3)
            each.running_var.uniform_(0.5, 2)
    trained.save(run / "encoder", 48, {})
    pixels = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8)
    other = timm.create_model(f"local-dir:{run / 'encoder'}", pretrained=True, num_classes=0).eval()
    plain = (pixels / 255 - [0.7, 0.5, 0.6]) / [0.2, 0.25, 0.3]
    with torch.inference_mode():
        found = Run(run).encoder()(torch.from_numpy(pixels)).numpy()
        truth = other(torch.from_numpy(plain.transpose(0, 3, 1, 2).astype(np.float32))).numpy()
    assert truth.std() > 0.01
    assert found == pytest.approx(truth, abs=1e-5, rel=1e-4)


def test_results_are_by_name_and_a_torn_one_is_warned_of(run: Path) -> None:
    assert Run(run).results == {}
    written(run / "eval" / "knn.json", {"metrics": {"accuracy": 0.9}})
    assert Run(run).results == {"knn": {"metrics": {"accuracy": 0.9}}}
    (run / "eval" / "low.json").write_text('{"metr')
    with pytest.warns(UserWarning, match=r"eval/low\.json cannot be read"):
        assert list(Run(run).results) == ["knn"]


def test_a_run_says_in_a_line_how_it_stands(run: Path) -> None:
    assert repr(Run(run)) == f"{run}: done, step 20 of 20, loss 2.5"
    written(run / "run.json", {**json.loads((run / "run.json").read_text()), "state": "<b>", "steps": 5000})
    assert "&lt;b&gt;, step 20 of 5,000" in Run(run)._repr_html_()


def test_what_is_not_there_is_said_with_what_to_do(run: Path, tmp_path: Path) -> None:
    with pytest.raises(notebook.RunError, match=r"runs/frist is no folder \(looked in .*\); give the one that"):
        Run(tmp_path / "runs" / "frist")
    with pytest.raises(status.NoRun, match=r"runs has no run\.json: it is not a run folder"):
        Run(tmp_path / "runs")
    with pytest.raises(notebook.RunError, match=r"20 of 20.* has no encoder yet: .*: ssl-dist export .*runs/first"):
        Run(run).encoder()
    (run / "encoder").mkdir()
    with pytest.raises(EncoderError, match=r"has no config\.json and no model\.safetensors"):
        Run(run).encoder()
    (run / "metrics.jsonl").unlink()
    for ask in (lambda: Run(run).metrics, lambda: Run(run).plot()):
        with pytest.raises(notebook.RunError, match=r"first: done, step 20 of 20 has no metrics yet: .*look again"):
            ask()
    assert repr(Run(run)) == f"{run}: done, step 20 of 20"


def test_who_does_not_ask_for_it_imports_nothing(run: Path) -> None:
    program = """
import json, sys
import ssl_dist
before = set(sys.modules)
from ssl_dist import Run
after = set(sys.modules)
Run(sys.argv[1]).metrics, Run(sys.argv[1]).results, repr(Run(sys.argv[1]))
print(json.dumps([sorted(before), sorted(after | set(sys.modules))]))
"""
    done = subprocess.run([sys.executable, "-c", program, str(run)], capture_output=True, text=True, check=True,
                          cwd=ROOT)
    package, asked = (set(each) for each in json.loads(done.stdout))
    assert not package & {"numpy", "yaml", "ssl_dist.notebook", "torch"}
    assert "ssl_dist.notebook" in asked
    assert not asked & {"torch", "matplotlib", "jinja2", "PIL"}
    with pytest.raises(AttributeError, match="'ssl_dist' has no attribute 'Rum'"):
        ssl_dist.Rum        # noqa: B018
