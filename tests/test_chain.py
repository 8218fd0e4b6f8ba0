"""A chain of commands: each once, in order, again from where it stopped; and the whole one, on a few painted slides."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from shards import synthetic
from shards.folder import FolderInUse, hold
from ssl_dist import chain, cli, config, jobs, schema
from ssl_dist.schema import ConfigError

ROOT = Path(chain.__file__).parents[1]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen small lymph nodes as CAMELYON16 lies on a disk. Not to be changed."""
    folder = tmp_path_factory.mktemp("nodes")
    synthetic.write_nodes(folder, train=8, test=8, size=1024, workers=2)
    return folder


def recipe(path: Path, *lines: str, **more: Any) -> Path:
    path.write_text("# test\n" + yaml.safe_dump({"out": str(path.with_suffix("")), "lines": {"paper": list(lines)},
                                                  **more}))
    return path


def load(path: Path, nodes: Path, *words: str) -> chain.Chain:
    return schema.load(chain.Chain, path, [f"source={nodes}", f"labels={nodes / 'labels.csv'}", *words])


def test_every_line_runs_once_and_a_changed_one_takes_those_after_it_along(nodes: Path, tmp_path: Path,
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(chain, "step", lambda _, __, words: ran.append(words))
    lines = ["check {source}", "check '{out}/a b'", "report {labels}"]
    told = load(recipe(tmp_path / "one.yaml", *lines), nodes)
    chain.run(told)
    words = [["check", str(nodes)], ["check", f"{tmp_path}/one/a b"], ["report", str(nodes / "labels.csv")]]
    assert ran == words
    chain.run(told)
    assert ran == words, "nothing twice"
    lines[1] = "check other"
    chain.run(load(recipe(tmp_path / "one.yaml", *lines), nodes))
    assert ran[3:] == [["check", "other"], words[2]]
    own = tmp_path / "own.yaml"
    own.write_text("# first\n" + config.recipe("eval/knn").read_text())
    lines = ["check {source}", f"eval {own} encoder={{source}}"]
    for _ in range(2):
        chain.run(load(recipe(tmp_path / "two.yaml", *lines), nodes))
        own.write_text("# other\n" + config.recipe("eval/knn").read_text())
    assert [each[0] for each in ran[5:]] == ["check", "eval", "eval"], "another recipe of that name is another line"
    del ran[5:]
    (tmp_path / "one" / "chain.json").write_text("{torn")
    chain.run(load(recipe(tmp_path / "one.yaml", *lines[:1]), nodes))
    assert ran[5:] == words[:1]
    with hold(tmp_path / "one", ".chain.lock"), pytest.raises(FolderInUse):
        chain.run(told)


def test_a_line_that_fails_ends_the_chain_with_its_code_and_is_tried_again(nodes: Path, tmp_path: Path) -> None:
    told = load(recipe(tmp_path / "fails.yaml", "check {source}", "report {out}"), nodes)
    with pytest.raises(chain.LineFailed, match="ended at: 1 of 2: check") as failed:
        chain.run(told)
    assert failed.value.exit_code == 3, "what `ssl-dist check` says of a folder that holds no shards"
    assert json.loads((told.out / "chain.json").read_text())["lines"] == []


def test_a_signal_reaches_the_line_at_work_and_its_code_comes_back(tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    child = tmp_path / "child.py"
    child.write_text("import signal, sys, time\n"
                     "signal.signal(signal.SIGUSR2, lambda *_: sys.exit(4))\n"
                     f"open({str(tmp_path / 'ready')!r}, 'w').close()\ntime.sleep(60)\n")
    start = subprocess.Popen
    monkeypatch.setattr(chain.subprocess, "Popen", lambda words: start([sys.executable, str(child)]))
    if (pid := os.fork()) == 0:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getppid(), signal.SIGUSR2)
        os._exit(0)
    before = signal.getsignal(signal.SIGUSR2)
    with pytest.raises(chain.LineFailed) as failed:
        chain.step(Console(), "a line", ["check"])
    os.waitpid(pid, 0)
    assert failed.value.exit_code == 4 and signal.getsignal(signal.SIGUSR2) == before


@pytest.mark.parametrize(("lines", "words", "said"), [
    (["check {sorce}"], [], r"\{sorce\}"), (["rm -rf {out}"], [], "begins with 'rm'"),
    ([], [], "not a list of commands"),
    (["check x"], ["size=medium"], "size='medium' is not one of paper"),
    (["check x"], ["labels=null"], "go together"), (["train nothing_like_it"], [], "no config nothing_like_it"),
    (["launch local -- train pretrain/simcrl"], [], "did you mean pretrain/simclr"),
    (["train"], [], "says nothing of what"), (["launch local --"], [], "says nothing of what"),
    (["check 'x"], [], "cannot be read"), (["report {out"], [], "cannot be read"),
    (["train demo x={size: 1}"], [], "other braces are doubled"),
    (["check x"], ["paint.train=12"], "no multiple of 8")])
def test_what_cannot_be_is_refused_before_anything_runs(lines: list[str], words: list[str], said: str, nodes: Path,
                                                        tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        chain.check(load(recipe(tmp_path / "bad.yaml", *lines), nodes, *words))


def test_the_command_shows_its_lines_and_a_launch_is_one_job(tmp_path: Path) -> None:
    ran = CliRunner().invoke(cli.app, ["chain", "eval/camelyon16", f"out={tmp_path / 'c'}", "--dry-run"])
    assert ran.exit_code == 0 and ran.output.count("$ ssl-dist ") == 5, ran.output
    assert "pretrain/moco_nodes" in ran.output and not (tmp_path / "c").exists()
    ran = CliRunner().invoke(cli.app, ["chain", "eval/camelyon16", f"out={tmp_path / 'c'}", "size=paper", "--dry-run"])
    assert ran.exit_code == 2 and "give source= and labels=" in ran.output
    asked = jobs.parse("slurm", ["gpus=4", "--", "chain", "eval/camelyon16", f"out={tmp_path / 'c'}"])
    (work,) = jobs._chains(asked)
    assert (work.commands, work.gpus, work.folder) == ([["chain", "eval/camelyon16", f"out={tmp_path / 'c'}"]], 4,
                                                       tmp_path / "c.launch")


def test_other_slides_are_not_painted_into_a_chain_that_was_begun(tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "step", lambda *_: None)
    painted: list[dict[str, Any]] = []
    monkeypatch.setattr(chain.synthetic, "write_nodes", lambda _, **told: painted.append(told))
    path = recipe(tmp_path / "own.yaml", "check {out}")
    path.write_text(path.read_text().replace("paper:", "small:"))
    chain.run(schema.load(chain.Chain, path, []))
    with pytest.raises(ConfigError, match=r"'seed': 0.* is to be .*'seed': 5"):
        chain.run(schema.load(chain.Chain, path, ["paint.seed=5"]))
    assert len(painted) == 1


def test_nodes_lie_as_camelyon16_does_and_no_scanner_tells(nodes: Path) -> None:
    rows = [line.split(",") for line in (nodes / "labels.csv").read_text().splitlines()[1:]]
    assert [kind for _, kind, _ in rows].count("tumor") == 8
    record = config.recipe("datasets/camelyon16").read_text()
    assert "testing/images" in record
    for name, kind, split in rows:
        (path,) = nodes.rglob(f"{name}.tif")
        assert path.relative_to(nodes).parts[:2] == (("training", kind) if split == "training" else
                                                     ("testing", "images"))
        told = json.loads(path.with_suffix(".geojson").read_text())["features"]
        assert any(each["properties"]["classification"]["name"] == "tumour" for each in told) is (kind == "tumor")
        with openslide.OpenSlide(str(path)) as slide:
            assert slide.dimensions == (1024, 1024)
    scanners: dict[str, list[str]] = {"normal": [], "tumor": []}
    for number, (_, kind, _) in enumerate(rows):
        scanners[kind].append(synthetic.scanner_of(number).scanner)
    assert sorted(scanners["normal"]) == sorted(scanners["tumor"])
    with pytest.raises(ValueError, match="multiples of 8"):
        synthetic.write_nodes(nodes, train=8, test=4)
    alone = [synthetic.paint(0, 4, 0, size=1024, metastasis=metastasis).pixels for metastasis in (True, False)]
    assert np.mean(alone[0] != alone[1]) < 0.5, "but for its island it is the same node"


@pytest.mark.timeout(600)
def test_the_paper_s_chain_goes_from_slides_to_a_report(nodes: Path, tmp_path: Path) -> None:
    """The recipe's own small lines, on slides so few that only the way is tested, and not what comes of it."""
    lines = yaml.safe_load(config.recipe("eval/camelyon16").read_text())["lines"]["small"]
    shorter = {"launch": " data.batch=8 epochs=0 steps=3 checkpoint.every=10",
               "eval": " epochs=2 inner=2 rates=[0.001]"}
    small = [line + next((more for verb, more in shorter.items() if line.startswith(verb)), "") for line in lines]
    told = load(recipe(tmp_path / "way.yaml", *small), nodes)
    chain.check(told)
    ran = CliRunner().invoke(cli.app, ["chain", str(tmp_path / "way.yaml"), f"source={nodes}",
                                       f"labels={nodes / 'labels.csv'}"])
    assert ran.exit_code == 0, ran.output
    result = json.loads((told.out / "run" / "eval" / "mil.json").read_text())
    assert result["counts"]["slides"] == 16 or result["counts"]["queries"] == 8, result["counts"]
    assert "deepmil" in (told.out / "run" / "report.html").read_text()
    assert len(json.loads((told.out / "chain.json").read_text())["lines"]) == len(lines)
