"""Same input, same bytes: whatever the workers, the kills and the second calls; one writer; nothing lost in silence."""

import contextlib
import csv
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.path import Path as Outline
from PIL import Image

from shards import folder, index, write

# A job in its own process: tells what it is doing, and kills itself at the call it is told to.
JOB = """
import json, os, signal, sys
from pathlib import Path
from shards import write
said, calls = json.loads(sys.argv[1]), 0
def tell(what, done, total):
    global calls
    calls += 1
    print(what, done, total, flush=True)
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    write.write(write.Settings(**{**said, "source": Path(said["source"]), "out": Path(said["out"])}), tell)
"""


@contextlib.contextmanager
def job(settings: write.Settings, stop: int = 0) -> Iterator[subprocess.Popen]:
    """The job in a process of its own, killed at the `stop`-th thing it tells; nothing of it outlives the block."""
    said = json.dumps(asdict(settings), default=str)
    root = Path(write.__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", JOB, said, str(stop)], stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.PIPE, cwd=root) as process:
        try:
            yield process
        finally:
            process.kill()


def digests(shard: Path) -> dict[str, str]:
    return {str(path.relative_to(shard)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(shard.rglob("*")) if path.is_file() and path.name != ".lock"}


def rows(shard: Path) -> list[dict]:
    return pa.ipc.open_file(pa.OSFile(str(shard / "samples.arrow"))).read_all().to_pylist()


def rejected(shard: Path) -> list[dict]:
    return [json.loads(line) for line in (shard / "rejected.jsonl").read_text().splitlines()]


def picture(path: Path, seed: int, size: int = 24) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8)).save(path)


@pytest.fixture
def few(tmp_path: Path) -> write.Settings:
    """Thirty small JPEGs."""
    for number in range(30):
        picture(tmp_path / "few" / f"{number:02d}.jpg", number)
    return write.Settings(source=tmp_path / "few", out=tmp_path / "out", dataset="few", kind="tiles", tar_samples=7,
                          workers=1)


# --- the same bytes


def test_one_worker_writes_the_bytes_that_two_wrote(shard: Path, settings: write.Settings, tmp_path: Path) -> None:
    write.write(replace(settings, out=tmp_path / "out", workers=1))
    assert digests(tmp_path / "out") == digests(shard)
    assert sum(name.startswith("overlays/") for name in digests(shard)) == 4


def descendants(process: int) -> set[int]:
    """Processes below one, at any depth: those that cut are children of the one that starts them."""
    found: set[int] = set()
    tasks = Path(f"/proc/{process}/task")
    with contextlib.suppress(FileNotFoundError):
        for child in {int(word) for task in tasks.iterdir() for word in (task / "children").read_text().split()}:
            found |= {child, *descendants(child)}
    return found


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def killed(settings: write.Settings, after: float) -> bool:
    """Kills a job so many seconds after its first word, and sees its processes off; False if it was done before."""
    with job(settings) as process:
        assert process.stdout.readline().startswith(("cutting slides", "reading images"))
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            below = descendants(process.pid)
            process.kill()
            process.wait()
            patience = time.monotonic() + 20
            while any(map(alive, below)) and time.monotonic() < patience:
                time.sleep(0.02)
            assert not any(map(alive, below)), "a process outlived its job"
            return True
        assert process.returncode == 0, process.stderr.read()
        return False


def test_jobs_killed_at_ten_random_moments_end_with_the_bytes_of_one_that_was_not(
    shard: Path, settings: write.Settings, tmp_path: Path
) -> None:
    mine = replace(settings, out=tmp_path / "out", workers=2)
    start = time.monotonic()
    with job(mine) as process:
        assert process.stdout.readline() == "cutting slides 0 4\n"
        start, _ = time.monotonic(), process.wait()
        whole = time.monotonic() - start
    assert digests(mine.out) == digests(shard)
    kills, random_of = 0, random.Random()
    for attempt in itertools.count():
        if kills >= 10:
            break
        mine = replace(mine, out=tmp_path / str(attempt), workers=random_of.choice([1, 2, 3]))
        kills += killed(mine, random_of.uniform(0, whole))
        if not (mine.out / "index.json").exists():
            with pytest.raises(index.ShardError, match="has not finished"):
                index.read(mine.out)
            kills += killed(replace(mine, workers=random_of.choice([1, 2, 3])), random_of.uniform(0, whole / 2))
            write.write(replace(mine, workers=random_of.choice([1, 2, 3])))
        assert digests(mine.out) == digests(shard)


@pytest.mark.parametrize("stop", range(1, 9))
def test_a_job_killed_at_any_word_it_tells_goes_on_from_there(settings: write.Settings, shard: Path, tmp_path: Path,
                                                            stop: int) -> None:
    """0 to 4 of 4 slides, then the tars: what was cut is not cut again."""
    mine = replace(settings, out=tmp_path / "out", workers=1)
    with job(mine, stop=stop) as process:
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
    done = len(list((mine.out / ".work").glob("unit-*.json")))
    assert done >= min(stop - 1, 4)
    told: list[tuple] = []
    assert not write.write(mine, lambda *word: told.append(word)).untouched
    assert told[0] == ("cutting slides", done, 4)
    assert digests(mine.out) == digests(shard)


def test_a_second_call_on_a_finished_folder_changes_nothing(shard: Path, settings: write.Settings) -> None:
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in shard.rglob("*") if path.name != ".lock"}
    again = write.write(replace(settings, workers=1, max_failed=3))
    assert again.untouched
    assert (again.samples, again.tars) == (len(rows(shard)), len(list(shard.glob("*.tar"))))
    assert sum(again.rejected.values()) == len(rejected(shard))
    after = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in shard.rglob("*") if path.name != ".lock"}
    before.pop(shard, None), after.pop(shard, None)
    assert after == before


@pytest.mark.parametrize(("change", "says"), [
    ({"mpp": [2.0]}, r"mpp was \[1.0\], now \[2.0\]"), ({"seed": 1}, "seed was 0, now 1"),
    ({"quality": 91}, "quality was 90"),
    ({"labels": "names"}, "labels was 'annotations'"), ({"dataset": "other"}, "dataset was 'painted'"),
])
def test_other_settings_on_a_finished_folder_are_refused_by_name(shard: Path, settings: write.Settings, change: dict,
                                                                 says: str) -> None:
    before = digests(shard)
    with pytest.raises(write.SettingsChanged, match=says) as caught:
        write.write(replace(settings, **change))
    assert caught.value.exit_code == 2
    assert digests(shard) == before


def test_a_changed_source_under_a_finished_folder_is_noticed(shard: Path, slides: Path, settings: write.Settings,
                                                             tmp_path: Path) -> None:
    source, out = tmp_path / slides.name, tmp_path / "out"
    shutil.copytree(slides, source)
    shutil.copytree(shard, out)
    mine = replace(settings, source=source, out=out)
    assert write.write(mine).untouched, "the place of the source is not what it says"
    drawn = source / "P00-S0.geojson"
    text = drawn.read_text()
    for changed in (text.replace("fat", "fit").replace("gland", "glend").replace("stroma", "strama"), ""):
        drawn.write_text(changed)
        with pytest.raises(write.SettingsChanged, match="files of the source changed"):
            write.write(mine)
    drawn.write_text(text)
    assert write.write(mine).untouched
    (source / "P03-S0.svs").unlink()
    with pytest.raises(write.SettingsChanged, match="files of the source changed"):
        write.write(mine)


def test_work_that_other_settings_left_half_done_does_not_get_into_the_tars(few: write.Settings) -> None:
    plain = replace(few, out=few.out.with_name("plain"), dataset="new", tar_samples=20)
    write.write(plain)
    for old in (replace(few, tar_samples=3), replace(few, dataset="new", tar_samples=3)):
        with job(old, stop=6) as process:       # 0 and 1 of 1 read, tars 0, 1, 2, 3 of 10
            assert process.wait() == -signal.SIGKILL, process.stderr.read()
        assert len(list(few.out.glob("*.tar"))) > 2
        with pytest.raises(write.SettingsChanged, match=r"holds 1 finished pieces of a job that was told"):
            write.write(replace(plain, out=few.out))
        for path in (few.out / ".work").glob("unit-*"):     # a cut that gave nothing is nothing to lose
            path.unlink()
    write.write(replace(plain, out=few.out))
    assert digests(few.out) == digests(plain.out), "tars of the killed job lie among ours"
    (few.out / "index.json").unlink()           # what `check` advises, and then with larger tars
    fewer = write.write(replace(plain, out=few.out, tar_samples=30))
    assert fewer.tars == len(list(few.out.glob("*.tar"))) == len(list(few.out.glob("*.idx"))) == 1


def test_rubbish_of_a_kill_during_the_last_cleaning_goes_with_the_next_call(few: write.Settings) -> None:
    write.write(few)
    before = digests(few.out)
    (few.out / ".work").mkdir()
    (few.out / ".work" / "unit-000000.tiles").write_bytes(b"half")
    assert write.write(few).untouched
    assert digests(few.out) == before


def test_another_seed_gives_another_order_of_the_same_tiles(few: write.Settings) -> None:
    write.write(few)
    write.write(replace(few, seed=1, out=few.out.with_name("other")))
    first, second = ([row["key"] for row in rows(out)] for out in (few.out, few.out.with_name("other")))
    assert sorted(first) == sorted(second) and first != second and first != sorted(first)


# --- one writer


def test_a_second_writer_is_refused_and_told_who_the_first_is(few: write.Settings) -> None:
    code = ("import sys, time; from pathlib import Path; from shards import folder\n"
            "with folder.hold(Path(sys.argv[1]), '.lock'): print('held', flush=True); time.sleep(600)")
    with subprocess.Popen([sys.executable, "-c", code, str(few.out)], stdout=subprocess.PIPE, text=True,
                          cwd=Path(write.__file__).parents[1]) as first:
        try:
            assert first.stdout.readline() == "held\n"
            with pytest.raises(folder.FolderInUse, match=f"process {first.pid} on {os.uname().nodename}") as caught:
                write.write(few)
            assert caught.value.exit_code == 10
            assert str(few.out) in str(caught.value)
            assert digests(few.out) == {}
        finally:
            first.kill()
    assert f"process {first.pid}" in (few.out / ".lock").read_text(), "the dead process left its name"
    assert write.write(few).samples == 30


# --- the order of the tars


def test_tiles_of_one_slide_are_neighbours_no_more_often_than_chance_has_it(shard: Path) -> None:
    slides = np.array([row["slide"] for row in rows(shard)])
    counts = np.unique(slides, return_counts=True)[1]
    chance = (counts * (counts - 1)).sum() / (len(slides) * (len(slides) - 1))
    seen = (slides[1:] == slides[:-1]).mean()
    assert abs(seen - chance) < 4 * np.sqrt(chance * (1 - chance) / (len(slides) - 1))
    assert chance < 0.5, "sorted by slide, nearly all would be"


@pytest.mark.parametrize(("tar_samples", "tars"), [(7, 4), (30, 1), (100_000, 1), (1, 30)])
def test_tars_hold_the_same_number_to_within_one(few: write.Settings, tar_samples: int, tars: int) -> None:
    write.write(replace(few, tar_samples=tar_samples))
    counts = np.bincount([row["tar"] for row in rows(few.out)])
    assert len(counts) == tars == len(list(few.out.glob("few-*.tar"))) == len(list(few.out.glob("few-*.idx")))
    assert counts.max() - counts.min() <= 1 and counts.sum() == 30


# --- labels


def test_labels_are_those_of_the_polygons_a_tile_lies_in(shard: Path, slides: Path) -> None:
    """Every tile probed at 24 x 24 points by matplotlib's point in polygon, later polygons over earlier ones."""
    polygons = {path.stem: [(feature["properties"]["classification"]["name"],
                             [Outline(ring) for ring in feature["geometry"]["coordinates"]])
                            for feature in json.loads(path.read_text())["features"]]
                for path in slides.glob("*.geojson")}
    classes = json.loads((shard / "index.json").read_text())["datasets"][0]["classes"]
    steps = (np.arange(24) + 0.5) / 24 * 128        # 64 pixels of 1 micrometre are 128 of the slide's
    grid = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    judged = {"labelled": 0, "unlabelled": 0}
    for row in rows(shard):
        drawn = np.full(len(grid), "", dtype="U16")
        for name, (outline,) in polygons[row["slide"]]:
            drawn[outline.contains_points(grid + (row["x"], row["y"]))] = name
        names, counts = np.unique(drawn[drawn != ""], return_counts=True)
        cover = dict(zip(names.tolist(), (counts / len(grid)).tolist(), strict=True))
        label = classes[row["label"]] if row["label"] >= 0 else ""
        if label:
            assert cover.get(label, 0) > 0.75 - 0.08, (row, cover)      # half a mask pixel of 32 on every side
            judged["labelled"] += 1
        elif cover and max(cover.values()) > 0.75 + 0.08:
            raise AssertionError(f"{row} has no label, but is covered by {cover}")
        else:
            judged["unlabelled"] += 1
    assert min(judged.values()) > 10


# --- what cannot be cut


def test_a_slide_that_cannot_be_opened_stops_the_job_unless_that_was_allowed(slides: Path, settings: write.Settings,
                                                                              tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "good.svs").symlink_to(slides / "P00-S0.svs")
    (source / "good.geojson").symlink_to(slides / "P00-S0.geojson")
    (source / "text.svs").write_text("this is no slide")
    with (source / "slides.csv").open("w") as handle:
        csv.writer(handle).writerows([("slide", "patient", "split"), ("good", "A", "train"), ("text", "B", "test")])
    mine = replace(settings, source=source, out=tmp_path / "out", workers=1, mpp=2.0)
    with pytest.raises(index.ShardError, match=r"text\.svs cannot be opened as a slide.*max_failed=0") as caught:
        write.write(mine)
    assert caught.value.exit_code == 3
    assert not (mine.out / "index.json").exists()
    done = write.write(replace(mine, max_failed=1))
    (line,) = (line for line in rejected(mine.out) if line["slide"] == "text")
    assert (line["file"], line["x"], line["y"]) == ("text.svs", None, None)
    assert "text.svs cannot be opened as a slide" in line["detail"] and line["reason"] == "failed"
    assert {row["slide"] for row in rows(mine.out)} == {"good"}
    assert done.samples + sum(done.rejected.values()) == 16 + 1     # a grid of 1024 / 256 squared, and the slide

    (source / "good.svs").unlink()
    with pytest.raises(index.ShardError, match=r"not one tile of .* was accepted.*text\.svs cannot be opened"):
        write.write(replace(mine, out=tmp_path / "none", max_failed=1))


def test_an_error_of_the_job_ends_it_before_the_slides_that_wait_are_cut(slides: Path, settings: write.Settings,
                                                                         tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(12):
        (source / f"s{number:02d}.svs").symlink_to(slides / "P00-S0.svs")
        if number:
            (source / f"s{number:02d}.geojson").symlink_to(slides / "P00-S0.geojson")
    with pytest.raises(index.ShardError, match=r"no annotation of .*s00\.geojson.*labels=names"):
        write.write(replace(settings, source=source, out=tmp_path / "out", workers=1))
    assert len(list((tmp_path / "out" / ".work").glob("unit-*.json"))) < 6


def test_a_full_disk_ends_the_job_with_what_to_do_and_the_next_call_completes_it(
    few: write.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(index.Columns, "write", full)
        with pytest.raises(folder.StorageError, match="disk is full: free some space") as caught:
            write.write(few)
    assert caught.value.exit_code == 9
    assert not (few.out / "index.json").exists()
    assert write.write(few).samples == 30


def test_rules_that_concern_two_settings_are_said_in_a_line(tmp_path: Path) -> None:
    plain = {"source": tmp_path / "in", "out": tmp_path / "out", "dataset": "a"}
    assert write.Settings(**plain, mpp=0.5).rules() == []
    assert write.Settings(**plain, kind="tiles").rules() == []
    assert "mpp is not set" in write.Settings(**plain).rules()[0]
    assert "labels='annotations'" in write.Settings(**plain, kind="tiles", labels="annotations").rules()[0]
    assert "'pateint'" in write.Settings(**plain, kind="tiles", names="(?P<pateint>.)").rules()[0]
    for inside in (tmp_path / "in", tmp_path / "in" / "shards", tmp_path / "out" / ".." / "in"):
        assert "lies inside source" in write.Settings(**{**plain, "out": inside}, kind="tiles").rules()[0]
