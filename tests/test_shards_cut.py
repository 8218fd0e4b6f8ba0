"""Cutting: who fails fails alone, parts add up to the whole; resolutions, regions and annotations are as asked."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import openslide
import pyarrow as pa
import pytest
import tifffile
from PIL import Image

from shards import check, cut, folder, index, sources, synthetic, write
from shards.slide import Slide, SlideError

JOB = """
import json, sys
from pathlib import Path
from shards import write
said = json.loads(sys.argv[1])
if __name__ == "__main__":
    write.write(write.Settings(**{**said, "source": Path(said["source"]), "out": Path(said["out"])}),
                lambda *word: print(*word, flush=True))
"""


def rows(shard: Path) -> list[dict]:
    return pa.ipc.open_file(pa.OSFile(str(shard / "samples.arrow"))).read_all().to_pylist()


def rejected(shard: Path) -> list[dict]:
    return [json.loads(line) for line in (shard / "rejected.jsonl").read_text().splitlines()]


def stored(shard: Path) -> list[tuple[dict, np.ndarray]]:
    """Every row with its pixels, cut from the tars with plain file reads."""
    tars = [tar["name"] for tar in json.loads((shard / "index.json").read_text())["tars"]]
    found = []
    for row in rows(shard):
        data = (shard / tars[row["tar"]]).read_bytes()[row["offset"]:row["offset"] + row["size"]]
        found.append((row, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)))
    return found


def digests(shard: Path) -> dict[str, str]:
    return {str(path.relative_to(shard)): sha256(path.read_bytes()).hexdigest()
            for path in sorted(shard.rglob("*")) if path.is_file() and path.name not in (".lock", ".setup.lock")}


def noisy(path: Path, size: tuple[int, int] = (96, 96), seed: int = 0) -> Path:
    """A picture that tiles can be cut from anywhere; of a palette, so that a large one is soon written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    wide = Image.fromarray(np.tile(rng.integers(0, 256, (64, 64), np.uint8), (-(-size[1] // 64), -(-size[0] // 64))))
    picture = wide.crop((0, 0, *size)).convert("P")
    picture.putpalette(rng.integers(30, 200, 768, np.uint8).tobytes())
    picture.save(path, compress_level=1)
    return path


def empty_png(path: Path, side: int) -> Path:
    """A large picture of one colour: a few kilobytes on disk, three bytes a pixel in memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("P", (side, side), 1).save(path, compress_level=1)
    return path


@contextlib.contextmanager
def in_background(settings: write.Settings) -> Iterator[subprocess.Popen]:
    with subprocess.Popen([sys.executable, "-c", JOB, json.dumps(asdict(settings), default=str)], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(write.__file__).parents[1]) as one:
        try:
            yield one
        finally:
            one.kill()


def worker_of(work: Path, unit: int, patience: float = 20) -> int:
    """The process that cuts a unit now, by the name of its draft."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        for draft in work.glob(f"unit-{unit:06d}.*.draft"):
            process = int(draft.name.split("-")[-1].partition(".")[0])
            with contextlib.suppress(FileNotFoundError):        # one that was killed leaves its draft
                if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    return process
        time.sleep(0.002)
    raise AssertionError(f"nobody cuts unit {unit}")


@pytest.fixture
def regions(tmp_path: Path) -> write.Settings:
    """Six small pictures to be cut into four tiles each."""
    for number in range(6):
        noisy(tmp_path / "in" / f"r{number}.png", seed=number)
    return write.Settings(source=tmp_path / "in", out=tmp_path / "out", dataset="cut", kind="regions", size=48,
                          workers=2, tar_samples=7, min_contrast=0.0)


# --- a slide that fails


def test_a_slide_that_takes_too_long_is_recorded_and_the_others_are_written(regions: write.Settings) -> None:
    noisy(regions.source / "r2-endless.png", (6400, 6400))
    mine = replace(regions, size=16, unit_seconds=1.5, max_failed=1, duplicates="keep", max_pen=1.0)
    start = time.monotonic()
    done = write.write(mine)
    assert time.monotonic() - start < 30
    (line,) = (line for line in rejected(mine.out) if line["reason"] == "failed")
    assert (line["file"], line["slide"], line["x"]) == ("r2-endless.png", "r2-endless", None)
    assert "not done after 1.5 s" in line["detail"] and "unit_seconds=" in line["detail"]
    assert {row["slide"] for row in rows(mine.out)} == {f"r{number}" for number in range(6)}
    assert done.samples == 6 * 36 and done.rejected == {"failed": 1}
    assert not list((mine.out / "overlays").glob("*endless*"))
    assert check.check(mine.out) == []


def test_a_slide_that_takes_too_much_memory_is_recorded_and_the_others_are_written(regions: write.Settings) -> None:
    empty_png(regions.source / "r3-huge.png", 9_300)
    mine = replace(regions, unit_memory_gb=0.3, max_failed=1)
    done = write.write(mine)
    (line,) = (line for line in rejected(mine.out) if line["reason"] == "failed")
    assert (line["file"], line["x"]) == ("r3-huge.png", None)
    assert "unit_memory_gb=0.3" in line["detail"] and str(mine.source) not in line["detail"]
    assert done.samples == 24 and {row["slide"] for row in rows(mine.out)} == {f"r{number}" for number in range(6)}


def test_a_slide_whose_process_is_killed_has_failed_and_the_job_goes_on(regions: write.Settings) -> None:
    noisy(regions.source / "r2z-long.png", (6400, 6400))
    mine = replace(regions, size=16, max_failed=1)
    with in_background(mine) as job:
        for _ in range(2):      # after r0, r1 and r2; once is no proof against the slide
            os.kill(worker_of(mine.out / ".work", 3), signal.SIGKILL)
            time.sleep(0.02)
        _, errors = job.communicate(timeout=60)
        assert job.returncode == 0, errors
    (line,) = (line for line in rejected(mine.out) if line["reason"] == "failed")
    assert line["file"] == "r2z-long.png" and "its reader crashed twice, now with SIGKILL" in line["detail"]
    assert {row["slide"] for row in rows(mine.out)} == {f"r{number}" for number in range(6)}
    assert check.check(mine.out) == []

    (mine.source / "r2z-long.png").unlink()      # without it from the start: the same of all the others
    write.write(replace(mine, out=mine.out.with_name("without")))
    assert str(rows(mine.out)) == str(rows(mine.out.with_name("without")))       # NaN is not itself
    with_it, without = digests(mine.out), digests(mine.out.with_name("without"))
    assert {name for name in with_it.keys() | without.keys() if with_it.get(name) != without.get(name)} == {
        "index.json", "rejected.jsonl"}


def test_a_kill_leaves_out_that_slide_and_changes_no_byte_of_the_others(settings: write.Settings, shard: Path,
                                                                        tmp_path: Path) -> None:
    mine = replace(settings, out=tmp_path / "out", workers=1, max_failed=1)
    killed: list[int] = []

    def kill() -> None:
        for _ in range(2):
            killed.append(worker_of(mine.out / ".work", 1))
            os.kill(killed[-1], signal.SIGKILL)
            time.sleep(0.02)

    killer = threading.Thread(target=kill)
    killer.start()
    write.write(mine)
    killer.join()
    assert [line["slide"] for line in rejected(mine.out) if line["reason"] == "failed"] == ["P01-S0"]
    plain = {row["key"]: row for row in rows(shard)}
    mended = {row["key"]: row for row in rows(mine.out)}
    assert set(mended) == {key for key, row in plain.items() if row["slide"] != "P01-S0"}
    placed = ("tar", "offset")
    assert all({name: value for name, value in row.items() if name not in placed} ==
               {name: value for name, value in plain[key].items() if name not in placed}
               for key, row in mended.items())
    assert [row["key"] for row in rows(mine.out)] == [row["key"] for row in rows(shard) if row["key"] in mended]


@pytest.mark.parametrize("fails", ["slowly", "with memory", "killed"])
def test_one_failure_too_many_stops_the_job_at_once_and_names_the_slide(regions: write.Settings, fails: str) -> None:
    for number in range(6, 30):
        shutil.copy(regions.source / "r5.png", regions.source / f"r{number:02d}.png")
    mine = replace(regions, duplicates="keep", workers=1)
    if fails == "with memory":
        empty_png(regions.source / "a-bad.png", 9_300)
        mine = replace(mine, unit_memory_gb=0.3)
    else:
        noisy(regions.source / "a-bad.png", (6400, 6400))
        mine = replace(mine, size=16, unit_seconds=1.0 if fails == "slowly" else 3600.0)
    def kill() -> None:
        for _ in range(2):
            os.kill(worker_of(mine.out / ".work", 0), signal.SIGKILL)
            time.sleep(0.02)

    killer = threading.Thread(target=kill)
    if fails == "killed":
        killer.start()
    with pytest.raises(index.ShardError, match=r"max_failed=0") as caught:
        write.write(mine)
    assert caught.value.exit_code == 3
    assert not (mine.out / "index.json").exists()
    assert len(list((mine.out / ".work").glob("unit-*.json"))) < 5, "what waited was not cut"
    assert "a-bad.png" in str(caught.value), "which of a thousand slides is it?"


def test_a_slide_that_fails_halfway_leaves_no_tile_of_it(slides: Path, tmp_path: Path) -> None:
    """Its thumbnail can be read; its last rows of tiles cannot, and OpenSlide gives up the whole slide then."""
    source = tmp_path / "in"
    source.mkdir()
    (source / "good.svs").symlink_to(slides / "P00-S0.svs")
    pixels = synthetic.paint(3, 1, 0, size=(2048, 2048)).pixels
    with tifffile.TiffWriter(source / "half.tif") as out:
        for step in (1, 8):
            out.write(pixels[::step, ::step], photometric="rgb", tile=(256, 256), compression="deflate", metadata=None,
                      subfiletype=int(step > 1), resolution=(20000 / step, 20000 / step), resolutionunit="CENTIMETER")
    with tifffile.TiffFile(source / "half.tif") as file:
        start, size = file.pages[0].dataoffsets[60], file.pages[0].databytecounts[60]
    content = bytearray((source / "half.tif").read_bytes())
    content[start:start + size] = bytes(size)
    (source / "half.tif").write_bytes(content)
    mine = write.Settings(source, tmp_path / "out", "half", size=64, mpp=0.5, min_tissue=0.0, workers=1, max_failed=1)
    with Slide(source / "half.tif") as slide:
        assert (slide.region(0, 0, (500, 500), 0.5) == pixels[:500, :500]).all(), "its first tiles are sound"
    write.write(mine)
    assert {row["slide"] for row in rows(mine.out)} == {"good"}
    lines = [line for line in rejected(mine.out) if line["slide"] == "half"]
    assert [(line["reason"], line["x"]) for line in lines] == [("failed", None)]
    assert "half.tif is damaged near" in lines[0]["detail"]
    assert not list(mine.out.glob("overlays/half*"))


def test_of_many_files_only_the_one_that_breaks_its_process_is_lost_and_it_is_named(tmp_path: Path) -> None:
    for number in range(20):
        noisy(tmp_path / "in" / f"t{number:02d}.png", seed=number)
    empty_png(tmp_path / "in" / "t10-huge.png", 9_300)
    mine = write.Settings(tmp_path / "in", tmp_path / "out", "files", kind="tiles", workers=2, unit_memory_gb=0.3,
                          max_failed=1)
    done = write.write(mine)
    assert {row["slide"] for row in rows(mine.out)} == {f"t{number:02d}" for number in range(20)}
    assert done.rejected == {"failed": 1}
    (line,) = rejected(mine.out)
    assert (line["file"], line["slide"], line["reason"]) == ("t10-huge.png", "t10-huge", "failed")
    assert "unit_memory_gb=0.3" in line["detail"]
    assert "t00.png" not in line["detail"], "it is not the fault of the first file"
    assert str(tmp_path) not in line["detail"], "the same list wherever the source lies"
    with pytest.raises(index.ShardError, match=r"t10-huge\.png.*max_failed=0"):
        write.write(replace(mine, out=tmp_path / "strict", max_failed=0))


# --- parts


@pytest.fixture(scope="module")
def parted(settings: write.Settings, shard: Path, tmp_path_factory: pytest.TempPathFactory) -> write.Settings:
    """Three parts in any order, then the call that publishes."""
    mine = replace(settings, out=tmp_path_factory.mktemp("parts") / "out", workers=1)
    for number, (part, units) in enumerate((("3/3", {2}), ("1/3", {0, 2, 3}), ("2/3", {0, 1, 2, 3}))):
        assert write.write(replace(mine, part=part)) is None
        assert not (mine.out / "index.json").exists() and not list(mine.out.glob("*.tar")), number
        assert {int(path.stem[5:]) for path in (mine.out / ".work").glob("unit-*.json")} == units
        with pytest.raises(index.ShardError, match="has not finished"):
            index.read(mine.out)
    told: list[tuple] = []
    assert write.write(replace(mine, workers=2), lambda *word: told.append(word)).samples == len(rows(shard))
    assert told[0] == ("cutting slides", 4, 4), "the call that publishes cuts nothing again"
    return mine


def test_parts_in_any_order_give_the_bytes_of_one_job(parted: write.Settings, shard: Path) -> None:
    assert digests(parted.out) == digests(shard)
    assert check.check(parted.out) == []
    assert not (parted.out / ".work").exists()


def test_a_part_of_a_finished_folder_says_that_it_is_finished(parted: write.Settings) -> None:
    before = digests(parted.out)
    told: list[tuple] = []
    again = write.write(replace(parted, part="2/3"), lambda *word: told.append(word))
    assert again.untouched and not told
    with pytest.raises(write.SettingsChanged, match="seed was 0, now 1"):
        write.write(replace(parted, part="2/3", seed=1))
    assert digests(parted.out) == before


def test_the_call_without_part_cuts_what_parts_left_over(settings: write.Settings, shard: Path, tmp_path: Path) -> None:
    mine = replace(settings, out=tmp_path / "out")
    write.write(replace(mine, part="2/4"))
    write.write(replace(mine, part="7/9"))          # more parts than slides: nothing to do
    told: list[tuple] = []
    write.write(mine, lambda *word: told.append(word))
    assert told[0] == ("cutting slides", 1, 4)
    assert digests(mine.out) == digests(shard)


def test_while_a_part_runs_others_may_and_who_publishes_or_has_other_settings_may_not(regions: write.Settings) -> None:
    noisy(regions.source / "r0z-long.png", (6400, 6400))
    mine = replace(regions, size=16, max_failed=1, workers=1)
    with in_background(replace(mine, part="2/2")) as running:      # of seven: r0z-long, r2, r4
        worker = worker_of(mine.out / ".work", 1)
        with pytest.raises(folder.FolderInUse, match="is being written by process") as caught:
            write.write(mine)
        assert caught.value.exit_code == 10
        for other in ({"part": "1/2", "seed": 7}, {"part": "1/2", "size": 32}):
            with pytest.raises(write.SettingsChanged, match="with other settings or another source than this part"):
                write.write(replace(mine, **other))
        assert write.write(replace(mine, part="1/2")) is None
        assert sorted(int(path.stem[5:]) for path in (mine.out / ".work").glob("unit-*.json")) == [0, 2, 4, 6]
        assert running.poll() is None, "it went on all the time"
        running.kill()      # a machine that was switched off
        running.wait()
        until = time.monotonic() + 20
        while Path(f"/proc/{worker}").exists() and time.monotonic() < until:
            time.sleep(0.02)
    noisy(regions.source / "r0z-long.png", (96, 96), seed=50)        # and had an easier slide
    shutil.rmtree(mine.out)
    write.write(replace(mine, out=mine.out.with_name("plain")))
    with in_background(replace(mine, part="2/2")) as running:
        worker_of(mine.out / ".work", 1)
        running.kill()
    write.write(replace(mine, part="1/2"))
    write.write(replace(mine, part="2/2"))
    write.write(mine)
    assert digests(mine.out) == digests(mine.out.with_name("plain"))


def test_a_part_with_other_settings_does_not_throw_away_what_the_others_cut(regions: write.Settings) -> None:
    write.write(replace(regions, part="1/2"))
    with pytest.raises(write.SettingsChanged, match=r"holds 3 finished pieces .*seed was 0, now 3.*delete .*\.work"):
        write.write(replace(regions, part="2/2", seed=3))
    shutil.rmtree(regions.out / ".work")
    write.write(replace(regions, part="2/2", seed=3))
    assert sorted(int(path.stem[5:]) for path in (regions.out / ".work").glob("unit-*.json")) == [1, 3, 5]
    write.write(replace(regions, seed=3))
    assert len(rows(regions.out)) == 24 and index.read(regions.out).settings["seed"] == 3


# --- resolutions


def slide_of(path: Path, pixels: np.ndarray, description: str | None = None, mpp: tuple[float, float] | None = None,
             **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    where = {"resolution": tuple(1e4 / each for each in mpp), "resolutionunit": "CENTIMETER"} if mpp else {}
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(256, 256), compression="jpeg", metadata=None,
                     description=description, **where, **options)
    return path


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return synthetic.paint(3, 1, 0, size=(1024, 1024)).pixels


def test_two_resolutions_in_one_job_are_both_there_with_keys_of_their_own_and_the_right_pixels(
    slides: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "P00-S0.svs").symlink_to(slides / "P00-S0.svs")
    mine = write.Settings(tmp_path / "in", tmp_path / "out", "two", size=128, mpp=[0.5, 1.0, 2.0], workers=1,
                          min_tissue=0.2)
    write.write(mine)
    found = stored(mine.out)
    counts = Counter(row["mpp"] for row, _ in found)
    assert set(counts) == {0.5, 1.0, 2.0} and counts[0.5] > counts[1.0] > counts[2.0] > 0
    assert len({row["key"] for row, _ in found}) == len(found)
    with openslide.OpenSlide(slides / "P00-S0.svs") as handle:
        for row, shown in found:
            step = round(row["mpp"] / 0.5)
            assert row["x"] % (128 * step) == row["y"] % (128 * step) == 0
            whole = handle.read_region((row["x"], row["y"]), 0, (128 * step, 128 * step)).convert("RGB")
            truth = np.asarray(whole.reduce(step) if step > 1 else whole).astype(int)
            assert np.abs(shown - truth).mean() < 6, row
            assert row["key"] == sources.key("P00-S0", f"x{row['x']}", f"y{row['y']}", f"m{step * 500}")
    assert len(rejected(mine.out)) + len(found) == 64 + 16 + 4
    assert {line["mpp"] for line in rejected(mine.out)} <= {0.5, 1.0, 2.0}


def test_at_most_so_many_tiles_are_those_that_come_first_of_all_whatever_the_workers(
    settings: write.Settings, shard: Path, tmp_path: Path
) -> None:
    mine = replace(settings, out=tmp_path / "one", max_tiles=5, workers=1)
    write.write(mine)
    write.write(replace(mine, out=tmp_path / "two", workers=3))
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert Counter(row["slide"] for row in rows(tmp_path / "one")) == {f"P{number:02d}-S0": 5 for number in range(4)}
    first: dict[str, list[str]] = {}
    for row in rows(shard):         # in the order of the tars
        first.setdefault(row["slide"], []).append(row["key"])
    assert {row["key"] for row in rows(tmp_path / "one")} == {key for keys in first.values() for key in keys[:5]}


def test_of_each_resolution_so_many_are_drawn_or_all_where_there_are_fewer(slides: Path, tmp_path: Path) -> None:
    mine = write.Settings(slides, tmp_path / "out", "few", size=128, mpp=[0.5, 2.0], max_tiles=5, workers=2, seed=1)
    write.write(mine)
    counts = Counter((row["slide"], row["mpp"]) for row in rows(mine.out))
    assert {count for (_, mpp), count in counts.items() if mpp == 0.5} == {5}
    assert all(1 <= count <= 4 for (_, mpp), count in counts.items() if mpp == 2.0)


def test_the_drawn_tiles_are_strewn_over_the_slide_and_not_its_first_rows(tmp_path: Path) -> None:
    noisy(tmp_path / "in" / "a.png", (1024, 1024))
    noisy(tmp_path / "in" / "b.png", (1024, 1024), seed=1)
    base = write.Settings(tmp_path / "in", tmp_path / "out", "drawn", kind="regions", size=32, max_tiles=200,
                          min_tissue=0.0, min_contrast=0.0, workers=2, duplicates="keep")
    write.write(base)
    write.write(replace(base, out=tmp_path / "other", seed=1))
    first, other = ({(row["slide"], row["x"], row["y"]) for row in rows(out)} for out in (base.out, tmp_path / "other"))
    assert len(first) == len(other) == 400
    for drawn in (first, other):
        for axis in (1, 2):
            quarters = np.bincount([place[axis] // 256 for place in drawn], minlength=4)
            assert quarters.min() > 100 - 4 * np.sqrt(75), quarters     # four deviations of a binomial
    assert 80 * 0.5 < len(first & other) < 80 * 1.6, "another seed draws others: 400 * 200 / 1024 by chance"


APERIO = "Aperio Image Library v12.0.0 \r\n1024x1024 [0,0 1024x1024] (256x256) JPEG/RGB Q=85|AppMag = 20"


def test_power_stands_in_for_microns_where_it_is_allowed_and_is_named_where_not(pixels: np.ndarray,
                                                                              tmp_path: Path) -> None:
    path = slide_of(tmp_path / "in" / "a.svs", pixels, APERIO)
    with openslide.OpenSlide(path) as handle:
        assert handle.properties["openslide.vendor"] == "aperio" and "openslide.mpp-x" not in handle.properties
    mine = write.Settings(tmp_path / "in", tmp_path / "out", "power", size=256, mpp=0.5, workers=1)
    with pytest.raises(index.ShardError, match=r"does not say its microns.*or power=true to take 0\.5 from its .* 20x"):
        write.write(mine)
    write.write(replace(mine, power=True))
    assert {row["mpp"] for row in rows(mine.out)} == {0.5} and {row["encoding"] for row in rows(mine.out)} == {"source"}
    with Slide(path, missing_mpp=0.25, power=True) as slide:
        assert slide.mpp == 0.5, "what the slide says of its objective goes before what is said of all"
    with Slide(path, missing_mpp=0.25) as slide:
        assert slide.mpp == 0.25
    with Slide(path, 0.3, 0.25, power=True) as slide:
        assert slide.mpp == 0.3
    silent = slide_of(tmp_path / "none.svs", pixels, APERIO.partition("|")[0])
    for power in (False, True):
        with pytest.raises(SlideError, match=r"does not say its microns") as caught:
            Slide(silent, power=power)
        assert "power=true" not in str(caught.value), "it has none to take it from"


@pytest.mark.parametrize(("mpp", "says"), [
    ((0.5, 0.6), "pixels of 0.5.* x 0.6.* microns, not square"), ((0.01, 0.01), "which no scanner makes"),
    ((9.0, 9.0), "which no scanner makes"),
])
def test_microns_that_cannot_be_stop_the_job_and_the_table_goes_before_them(
    pixels: np.ndarray, tmp_path: Path, mpp: tuple[float, float], says: str
) -> None:
    slide_of(tmp_path / "in" / "a.tif", pixels, mpp=mpp)
    mine = write.Settings(tmp_path / "in", tmp_path / "out", "mpp", size=256, mpp=1.0, workers=1)
    with pytest.raises(index.ShardError, match=says):
        write.write(mine)
    (tmp_path / "in" / "slides.csv").write_text("slide,mpp\na,1.0\n")
    write.write(mine)
    assert {row["mpp"] for row in rows(mine.out)} == {1.0}
    assert all(row["x"] % 256 == 0 for row in rows(mine.out)) and {row["encoding"] for row in rows(mine.out)} == {
        "source"}
    (line,) = map(json.loads, (mine.out / "slides.jsonl").read_text().splitlines())
    assert line["mpp"] == 1.0


# --- regions


def test_real_images_of_1024_pixels_are_cut_into_their_own_pixels(data: Path, tmp_path: Path) -> None:
    chosen = sorted((data / "osteosarcoma_tcia_1024px").rglob("*.jpg"))[::10]
    for path in chosen:
        (tmp_path / "in" / path.parent.name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / path.parent.name / path.name).symlink_to(path)
    mine = write.Settings(tmp_path / "in", tmp_path / "out", "bone", kind="regions", size=256, workers=2,
                          names=r"^(?P<label>[^/]+)/.*___(?P<slide>(?P<patient>Case-\d+-P5|Case-\d+|P9)-[ABC]\d+)-")
    done = write.write(mine)
    assert done.samples + sum(done.rejected.values()) == 16 * len(chosen)
    names = json.loads((mine.out / "index.json").read_text())["datasets"][0]["classes"]
    by_name = {path.stem: path for path in chosen}
    keys = set()
    for row, shown in stored(mine.out):
        assert np.isnan(row["mpp"]) and row["encoding"] == "jpeg-90-4:4:4"
        (name,) = (stem for stem in by_name if row["key"] == sources.key(
            by_name[stem].parent.name, stem, f"x{row['x']}", f"y{row['y']}"))
        truth = np.asarray(Image.open(by_name[name]).convert("RGB"))[row["y"]:row["y"] + 256, row["x"]:row["x"] + 256]
        assert np.abs(shown - truth).mean() < 5
        assert names[row["label"]] == by_name[name].parent.name and row["slide"] in name
        keys.add(row["key"])
    assert len(keys) == done.samples > 40
    assert {path.name for path in (mine.out / "overlays").iterdir()} == {
        f"{sources.key(path.parent.name, path.stem)}.png" for path in chosen}
    assert check.check(mine.out) == []


def test_real_images_of_40x_are_cut_at_20x(data: Path, tmp_path: Path) -> None:
    folder_of = data / "monuseg2018" / "train" / "images"
    chosen = sorted(folder_of.iterdir())[:5]
    (tmp_path / "in").mkdir()
    for path in chosen:
        (tmp_path / "in" / path.name).symlink_to(path)
    mine = write.Settings(tmp_path / "in", tmp_path / "out", "nuclei", kind="regions", size=224, mpp=0.5, workers=2)
    with pytest.raises(index.ShardError, match=r"TCGA-.*\.tif does not say its microns per pixel.*slide_mpp=0\.25"):
        write.write(mine)
    write.write(replace(mine, slide_mpp=0.25))
    found = stored(mine.out)
    assert len(found) == 4 * len(chosen), "two by two of 448 in 1000"
    for row, shown in found:
        (path,) = (path for path in chosen if path.stem == row["slide"])
        whole = Image.open(path).convert("RGB").crop((row["x"], row["y"], row["x"] + 448, row["y"] + 448))
        assert np.abs(shown - np.asarray(whole.reduce(2)).astype(int)).mean() < 7
        assert row["mpp"] == 0.5 and row["patient"] == path.name[:12] and (row["x"], row["y"]) in [
            (x, y) for x in (0, 448) for y in (0, 448)]
    assert {path.name for path in (mine.out / "overlays").iterdir()} == {f"{sources.key(path.stem)}.png"
                                                                         for path in chosen}


def test_regions_of_one_slide_in_many_files_have_keys_and_overlays_of_their_own(tmp_path: Path) -> None:
    for number, name in enumerate(("a/S1_1", "a/S1_2", "b/S1_1")):
        noisy(tmp_path / "in" / f"{name}.png", seed=number)
    mine = write.Settings(tmp_path / "in", tmp_path / "out", "parts", kind="regions", size=48, workers=1,
                          min_contrast=0.0, names=r"(?P<slide>S\d)_")
    assert write.write(mine).samples == 12
    assert {row["slide"] for row in rows(mine.out)} == {"S1"}
    assert {path.name for path in (mine.out / "overlays").iterdir()} == {
        f"{sources.key(*name.split('/'))}.png" for name in ("a/S1_1", "a/S1_2", "b/S1_1")}


# --- annotations


def squares(path: Path, **named: tuple[int, int, int, int]) -> Path:
    """A GeoJSON of boxes: left, top, right, bottom."""
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [
        {"type": "Feature", "properties": {"objectType": "annotation", "classification": {"name": name}},
         "geometry": {"type": "Polygon", "coordinates": [[[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]]}}
        for name, (x0, y0, x1, y1) in named.items()]}))
    return path


@pytest.mark.parametrize("labels", ["annotations", "names"])
def test_inside_keeps_only_tiles_that_an_annotation_covers_whatever_the_labels_come_from(tmp_path: Path,
                                                                                       labels: str) -> None:
    """Two boxes on a picture of eight by eight tiles; the second covers half a row of tiles."""
    noisy(tmp_path / "in" / "grade3" / "r.png", (512, 512))
    squares(tmp_path / "in" / "grade3" / "r.geojson", tumour=(64, 64, 256, 192), stroma=(320, 352, 512, 448))
    mine = write.Settings(tmp_path / "in", tmp_path / "out", "inside", kind="regions", size=64, workers=1, inside=True,
                          labels=labels, names="^(?P<label>[^/]+)/", duplicates="keep", min_tissue=0.0)
    done = write.write(mine)
    names = json.loads((mine.out / "index.json").read_text())["datasets"][0]["classes"]
    tumour = {(x, y) for x in (64, 128, 192) for y in (64, 128)}
    stroma = {(x, 384) for x in (320, 384, 448)}
    assert {(row["x"], row["y"]): names[row["label"]] for row in rows(mine.out)} == {
        place: ("tumour" if place in tumour else "stroma") if labels == "annotations" else "grade3"
        for place in tumour | stroma}
    assert done.rejected == {"outside annotations": 64 - 9}
    assert {(line["x"], line["y"]) for line in rejected(mine.out)} == {
        (x, y) for x in range(0, 512, 64) for y in range(0, 512, 64)} - tumour - stroma
    write.write(replace(mine, out=tmp_path / "half", min_label=0.5))
    assert len(rows(tmp_path / "half")) == 9 + 3, "half of a tile is enough then"


def test_inside_without_an_annotation_is_refused_and_annotations_may_lie_elsewhere(regions: write.Settings,
                                                                                 tmp_path: Path) -> None:
    with pytest.raises(index.ShardError, match=r"no annotation of .*r\d\.png.*annotations=.*inside=false"):
        write.write(replace(regions, inside=True))
    (tmp_path / "drawn").mkdir()
    for number in range(6):
        squares(tmp_path / "drawn" / f"r{number}.geojson", here=(0, 0, 48, 96))
    write.write(replace(regions, inside=True, annotations=tmp_path / "drawn"))
    assert Counter((row["x"], row["y"]) for row in rows(regions.out)) == {(0, 0): 6, (0, 48): 6}


def test_inside_and_at_most_so_many_go_together(tmp_path: Path) -> None:
    noisy(tmp_path / "in" / "r.png", (512, 512))
    squares(tmp_path / "in" / "r.geojson", tumour=(64, 64, 448, 256))
    mine = write.Settings(tmp_path / "in", tmp_path / "out", "inside", kind="regions", size=64, workers=1, inside=True,
                          max_tiles=4, duplicates="keep", min_tissue=0.0)
    write.write(mine)
    assert len(rows(mine.out)) == 4
    assert all(64 <= row["x"] < 448 and 64 <= row["y"] < 256 for row in rows(mine.out))


def test_the_processes_of_a_job_start_from_one_that_holds_nothing_of_ours() -> None:
    assert cut.processes().get_start_method() == "forkserver"
