"""From slide to report through the commands that a user types: two stops, two resumes, one across an epoch's end."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from ssl_dist.data.reader import Reader
from ssl_dist.data.stream import Stream

ROOT = Path(__file__).resolve().parent.parent
STEPS, BATCH = 12, 8
SMALL = ["data.batch=8", f"steps={STEPS}", "seed=7", "log.every=1", "checkpoint.every=100", "debug.ledger=true",
         "method.views.size=32", "device=cpu", "encoder.args.layers=[1,1,1,1]", "encoder.args.channels=[8,8,16,16]"]


def ssl_dist(*words: object) -> str:
    import os

    done = subprocess.run([sys.executable, "-m", "ssl_dist", *map(str, words)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Warning" not in done.stderr, "a run that is as it should be warns of nothing"
    return done.stdout


def train(run: Path, shard: Path, ranks: int, *words: object) -> None:
    command = ["train", "demo", f"run={run}", f"data.shards=[{shard}]", *SMALL, *words]
    ssl_dist(*(["launch", "local", f"ranks={ranks}", "--", *command] if ranks > 1 else command))


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


def ledger(run: Path) -> list[tuple[int, int, str]]:
    rows = [json.loads(line) for path in (run / "ledger").glob("*.jsonl") for line in path.read_text().splitlines()]
    return sorted((row["step"], row["position"], row["key"]) for row in rows)


@pytest.fixture(scope="module")
def whole(shard: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank, never interrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(run, shard, 1)
    return run


@pytest.fixture(scope="module")
def shared(shard: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, never interrupted."""
    run = tmp_path_factory.mktemp("shared") / "run"
    train(run, shard, 2)
    return run


@pytest.fixture(scope="module")
def broken(shard: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, stopped twice; the second attempt crosses the end of the first epoch."""
    run = tmp_path_factory.mktemp("broken") / "run"
    epoch = Stream(Reader([shard], "train").counts, seed=7, window=16, batch=BATCH).steps_an_epoch
    assert 2 < epoch < STEPS - 2, f"an epoch of {epoch} steps does not end between the two stops"
    train(run, shard, 2, "stop=2")
    train(run, shard, 2, f"stop={epoch + 1}")
    train(run, shard, 2)
    return run


def test_the_first_loss_of_two_ranks_is_that_of_one_on_the_whole_batch(whole: Path, shared: Path) -> None:
    assert losses(whole)[1] == pytest.approx(losses(shared)[1], rel=1e-5)


def test_two_ranks_see_the_samples_of_one_in_the_same_order(whole: Path, shared: Path) -> None:
    assert ledger(whole) == ledger(shared)
    assert len(ledger(whole)) == STEPS * BATCH


def test_two_stops_leave_no_trace_in_samples_losses_or_weights(shared: Path, broken: Path) -> None:
    assert ledger(broken) == ledger(shared)
    assert losses(broken) == losses(shared)
    ours, theirs = (load_file(run / "encoder" / "model.safetensors") for run in (broken, shared))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_the_run_folder_tells_its_story(broken: Path) -> None:
    run = json.loads((broken / "run.json").read_text())
    assert run["state"] == "done" and run["exit_code"] == 0 and run["step"] == run["steps"] == STEPS
    assert [attempt["outcome"] for attempt in run["attempts"]] == ["stopped", "stopped", "done"]
    assert [attempt["from_step"] for attempt in run["attempts"]][1:] == [
        attempt["to_step"] for attempt in run["attempts"]][:-1]
    assert {attempt["world"] for attempt in run["attempts"]} == {2}
    names = {path.name for path in broken.iterdir()}
    assert names >= {"config.yaml", "run.json", "env.json", "run.lock", "metrics.jsonl", "tb", "logs", "checkpoints",
                     "encoder", "ledger", "pictures"}
    assert {"step", "samples", "loss", "lr", "images_per_second", "data_wait", "grad_norm"} <= set(
        json.loads((broken / "metrics.jsonl").read_text().splitlines()[0]))
    assert {path.name for path in (broken / "encoder").iterdir()} == {"config.json", "model.safetensors", "README.md",
                                                                     "pretraining.json"}
    newest = max((broken / "checkpoints").glob("step-*"))
    manifest = json.loads((newest / "MANIFEST.json").read_text())
    assert {file["name"] for file in manifest["files"]} == {path.name for path in newest.iterdir()} - {"MANIFEST.json"}


def test_a_finished_run_is_left_alone(whole: Path, shard: Path) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()
                and path.name != "run.lock" and path.parent.name != "alive"}       # of who looked

    before = times()
    train(whole, shard, 1)
    assert before == times()


def test_a_run_does_not_go_on_under_other_settings(broken: Path, shard: Path, tmp_path: Path) -> None:
    import os
    import shutil

    run = shutil.copytree(broken, tmp_path / "run")
    shutil.rmtree(run / "encoder")
    command = ["train", "demo", f"run={run}", f"data.shards=[{shard}]", *SMALL, "seed=8", "method.temperature=0.3"]
    done = subprocess.run([sys.executable, "-m", "ssl_dist", *command], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)
    assert done.returncode == 2
    assert (run / "run.json").read_text() == (broken / "run.json").read_text(), "a refusal is no attempt"
    assert "seed was 7, now 8" in done.stderr and "method.temperature was 0.2, now 0.3" in done.stderr


def test_the_encoder_loads_where_only_timm_is_installed(shared: Path) -> None:
    program = f"""
import sys, timm, torch
network = timm.create_model("local-dir:{shared / 'encoder'}", pretrained=True, num_classes=0).eval()
assert not any(name.startswith(("ssl_dist", "shards")) for name in sys.modules)
torch.manual_seed(0)
with torch.no_grad():
    features = network(torch.rand(4, 3, 32, 32))
print(*features.sum(1).tolist())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd="/")
    from ssl_dist.models import encoder

    own = encoder.load(shared / "encoder").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        expected = own.network(torch.rand(4, 3, 32, 32)).sum(1)
    assert torch.allclose(torch.tensor([float(word) for word in done.stdout.split()]), expected, atol=1e-5)


def test_an_encoder_that_is_exported_again_keeps_its_other_forms_while_they_are_true(shared: Path,
                                                                                   tmp_path: Path) -> None:
    import shutil

    run = Path(shutil.copytree(shared, tmp_path / "run"))
    said = ssl_dist("export", run, "--torchscript")
    form = run / "encoder" / "model.torchscript.pt"
    assert str(form) in said
    before = form.read_bytes()
    ssl_dist("export", run)
    assert form.read_bytes() == before
    assert form.stat().st_mode & 0o777 == (run / "encoder" / "model.safetensors").stat().st_mode & 0o777
    with (run / "encoder" / "model.safetensors").open("r+b") as file:       # as if it were another training's
        file.seek(-2, 2)
        file.write(b"xx")
    ssl_dist("export", run)
    assert not form.exists()


def test_evaluation_and_report_close_the_line(shared: Path, shard: Path) -> None:
    said = ssl_dist("eval", "eval/knn", f"encoder={shared / 'encoder'}", f"data.shards=[{shard}]", "k=5")
    assert "random: accuracy" in said
    assert f"written to {shared / 'eval' / 'knn.json'}" in said
    result = json.loads((shared / "eval" / "knn.json").read_text())
    assert 0 <= result["metrics"]["accuracy"] <= 1 and result["counts"]["shared_patients"] == 0
    assert result["size"] == 32, "the size that the encoder was trained on"
    assert np.sum(result["confusion"]) == result["counts"]["queries"]
    page = Path(ssl_dist("report", shared).strip().splitlines()[-1])
    assert page == shared / "report.html"
    text = page.read_text()
    assert text.count("data:image/") >= 2 and "random" in text
