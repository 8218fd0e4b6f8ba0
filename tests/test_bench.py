"""`ssl-dist bench` measures what there is, and refuses what there is not. No timing is held against anything."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shards import index
from ssl_dist import bench
from ssl_dist.data.batch import each
from ssl_dist.data.presets import PRESETS
from ssl_dist.schema import ConfigError

ROOT = Path(__file__).resolve().parent.parent
PARTS = ["order", "reading", "decoding", "views", "whole path"]
QUICK = ["--batch", "8", "--seconds", "0.05", "--threads", "2"]


def ssl_dist(*words: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-m", "ssl_dist", "bench", *map(str, words)], env=environment,
                          capture_output=True, text=True, check=False, timeout=240)


def error(done: subprocess.CompletedProcess) -> str:
    assert "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ssl-dist: error: ")]
    return line


def measure(folders: list[Path], preset: str = "histology", batch: int = 8) -> bench.Figures:
    return bench.measure(folders, preset, batch=batch, seconds=0.02, threads=2, device=torch.device("cpu"))


def test_every_part_is_measured_and_the_figures_are_numbers(shard: Path, tmp_path: Path) -> None:
    done = ssl_dist(shard, *QUICK, "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [part["name"] for part in figures["parts"]] == PARTS
    for part in figures["parts"]:
        assert all(0 < part[name] < math.inf for name in ("first", "second", "core")), part
        assert any(line.startswith(part["name"]) for line in done.stdout.splitlines()), "a part is not in the table"
    assert figures["tiles"] == index.read(shard).samples and figures["views"] == [224, 224]
    assert figures["step_seconds"] == pytest.approx(8 / figures["parts"][-1]["second"])
    assert isinstance(figures["cached"], bool) and figures["bytes_a_tile"] > 0
    assert "A step of 8 tiles (16 views)" in done.stdout and "in memory" in done.stdout


@pytest.mark.parametrize("preset", ["dino", "dehaene"])
def test_every_view_of_a_preset_is_drawn(shard: Path, preset: str) -> None:
    figures = measure([shard], preset)
    assert figures.views == [view.size for view in each(PRESETS[preset].views)]
    assert f"({8 * len(figures.views)} views)" in figures.sentences()[1]


def test_several_folders_are_measured_together(shard: Path, tmp_path: Path) -> None:
    other = shutil.copytree(shard, tmp_path / "other")
    found = index.read(other)
    index.write(other, index.Index(found.datasets, found.settings, "another", found.tars, found.files))
    assert measure([shard, other]).tiles == 2 * index.read(shard).samples


def test_figures_say_whether_the_files_were_in_memory() -> None:
    def figures(first: float) -> bench.Figures:
        parts = [bench.Part("reading", 8, first, 1000.0, 900.0), bench.Part("whole path", 2, 10.0, 20.0, 12.0)]
        return bench.Figures(["a"], 100, 25_000, "simclr", [224, 224], 60, "cpu", {}, parts)

    assert figures(990).cached and "nothing here waited for a disk" in figures(990).sentences()[0]
    assert not figures(200).cached and "200 tiles a second (5 MB/s)" in figures(200).sentences()[0]
    assert figures(990).step_seconds == 3.0 and "60 tiles (120 views)" in figures(990).sentences()[1]


@pytest.mark.parametrize(("words", "code", "needle"), [
    (["{nowhere}"], 3, "no shard folder at"),
    (["{empty}"], 3, "has no index.json"),
    (["{shard}", "{shard}"], 3, "more than once"),
    (["{shard}", "--views", "dyno"], 2, "--views dyno is not one of histology, simclr"),
    (["{shard}", "--batch", "100000"], 2, "--batch 100000 is more than the"),
])
def test_what_cannot_be_measured_is_refused_in_one_line(shard: Path, tmp_path: Path, words: list[str], code: int,
                                                        needle: str) -> None:
    (tmp_path / "empty").mkdir()
    done = ssl_dist(*(word.format(shard=shard, nowhere=tmp_path / "nowhere", empty=tmp_path / "empty")
                      for word in words))
    assert done.returncode == code and needle in error(done)


def test_a_tile_that_changed_on_disk_is_named(shard: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shard, tmp_path / "copy")
    for tar in copy.glob("*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    done = ssl_dist(copy, *QUICK)
    assert done.returncode == 3 and "changed on disk" in error(done) and "ssl-dist check" in error(done)


def test_more_tiles_a_step_than_there_are_is_a_mistake_of_the_command(shard: Path) -> None:
    with pytest.raises(ConfigError, match="--batch 9999"):
        measure([shard], batch=9999)
