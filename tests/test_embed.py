"""From slides to vectors: the same as by a plain loop and by shards; who fails fails alone; what is done stays done."""

import contextlib
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import openslide
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from typer.testing import CliRunner

from shards import jpeg, synthetic, tiff, write
from shards.folder import FolderInUse
from shards.index import ShardError
from ssl_dist import cli, embed, jobs, schema
from ssl_dist.data.bags import Bags
from ssl_dist.eval import embed as eval_embed
from ssl_dist.eval.settings import Embed, Tiles
from ssl_dist.models import encoder as encoders
from ssl_dist.models.encoder import Encoder
from ssl_dist.slides import Slides

CPU = torch.device("cpu")
ROOT = Path(embed.__file__).parents[1]
KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch
from ssl_dist import embed
from ssl_dist.slides import Slides
said = json.loads(sys.argv[1])
if __name__ == "__main__":
    def progress(what, done, total, pace):
        if done == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    embed.run(Slides(**{**said, "out": Path(said["out"])}), torch.device("cpu"), 2, progress)
"""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("run") / "encoder"
    Encoder("test_resnet", {}, (0.5,) * 3, (0.5,) * 3).save(home, 64, {})
    return home


@pytest.fixture(scope="module")
def told(slides: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Slides:
    """What `whole` was written with: tiles at half the resolution of the painted slides, off their own grid."""
    return Slides(encoder=str(encoder), slides=[str(slides)], out=tmp_path_factory.mktemp("vectors") / "out", size=64,
                  mpp=1.0, batch=24, workers=2, write=["h5", "parquet"], dataset="painted")


@pytest.fixture(scope="module")
def whole(told: Slides) -> Path:
    """The vectors of the painted slides. Not to be changed: copy them first."""
    done = embed.run(told, CPU, 2)
    assert (done.slides, done.empty, done.before, done.failed) == (4, 0, 0, [])
    return told.out


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*"))
            if path.is_file() and not path.name.endswith(".lock")}


def listed(out: Path, name: str) -> dict[str, dict[str, Any]]:
    return {line["slide"]: line for line in map(json.loads, (out / f"{name}.jsonl").read_text().splitlines())}


def plainly(encoder: Path, file: Path, corners: np.ndarray, wide: int, size: int) -> np.ndarray:
    """What the encoder makes of a slide's regions, one by one, as OpenSlide shows them."""
    network, found = encoders.load(encoder).eval(), []
    with openslide.OpenSlide(str(file)) as slide, torch.inference_mode():
        for x, y in corners.tolist():
            pixels = np.asarray(slide.read_region((x, y), 0, (wide, wide)).convert("RGB"))
            shown = cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)
            found.append(network(torch.from_numpy(shown)[None])[0].numpy())
    return np.stack(found)


def painted(path: Path, size: tuple[int, int] = (512, 512), mpp: float = 0.5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tiff.write_pyramid(path, synthetic.paint(3, 1, 0, size=size).pixels, mpp, 87)
    return path


# --- the vectors


def test_they_are_those_of_a_plain_loop_over_what_openslide_shows(slides: Path, told: Slides, encoder: Path,
                                                                  tmp_path: Path) -> None:
    mine = replace(told, slides=[f"{slides}/P0[01]*.svs"], out=tmp_path / "out", size=256, mpp=0.5, write=["h5"])
    embed.run(mine, CPU, 2)
    bags = Bags(mine.out)
    assert bags.slides == ["P00-S0", "P01-S0"] and bags.patients == ["P00", "P01"] and bags.counts.min() > 4
    for name, bag in zip(bags.slides, bags, strict=True):
        assert listed(mine.out, "slides")[name]["native"], "the tiles are the slide's own"
        assert bag.wide == 256 and (bag.corner_N2 % 256 == 0).all()
        truth = plainly(encoder, slides / f"{name}.svs", bag.corner_N2, 256, 64)
        assert np.allclose(bag.features_ND, truth, rtol=1e-5, atol=1e-5)


def test_of_a_real_slide_they_are_those_of_a_plain_loop(data: Path, told: Slides, encoder: Path,
                                                        tmp_path: Path) -> None:
    file = data / "wsi_svs" / "CMU-1-Small-Region.svs"
    mine = replace(told, slides=[str(file)], out=tmp_path / "out", size=240, mpp=0.5)
    embed.run(mine, CPU, 2)
    (bag,) = Bags(mine.out)
    assert len(bag.corner_N2) > 40 and listed(mine.out, "slides")["CMU-1-Small-Region"]["native"]
    truth = plainly(encoder, file, bag.corner_N2, 240, 64)
    assert np.allclose(bag.features_ND, truth, rtol=1e-5, atol=1e-5)
    with h5py.File(mine.out / "h5" / "CMU-1-Small-Region.h5") as file_:
        assert file_.attrs["mpp"] == pytest.approx(0.499) and file_.attrs["size"] == 64


def test_they_are_those_of_shards_and_their_evaluation(slides: Path, told: Slides, whole: Path, shard: Path,
                                                       encoder: Path, tmp_path: Path) -> None:
    """Of a slide's own JPEGs to the last digits; of tiles that shards encode anew, nearly."""
    own = write.write(write.Settings(slides, tmp_path / "own", "painted", size=256, mpp=0.5, workers=2,
                                     duplicates="keep"))
    mine = replace(told, out=tmp_path / "vectors", size=256, mpp=0.5)
    embed.run(mine, CPU, 2)
    for shards, vectors, near in ((own.out, mine.out, 1e-5), (shard, whole, 0.1)):
        eval_embed.run(Embed(encoder=str(encoder), data=Tiles(shards=[shards]), out=tmp_path / shards.name / "eval"),
                       CPU, 2, lambda *_: None)
        theirs, ours = Bags(tmp_path / shards.name / "eval"), Bags(vectors)
        assert theirs.slides == ours.slides and theirs.patients == ours.patients and theirs.encoder == ours.encoder
        for one, other in zip(theirs, ours, strict=True):
            assert np.array_equal(one.corner_N2, other.corner_N2)
            scale = np.abs(one.features_ND).max()
            assert np.abs(one.features_ND - other.features_ND).max() < near * scale


def test_a_table_says_the_same_as_the_file(whole: Path) -> None:
    for path in sorted((whole / "h5").iterdir()):
        table = pq.read_table(whole / "parquet" / f"{path.stem}.parquet")
        with h5py.File(path) as file:
            assert [*zip(table["x"].to_pylist(), table["y"].to_pylist(), strict=True)] == [*map(tuple,
                                                                                              file["coords"][:].tolist())]
            assert np.array_equal(np.array(table["features"].to_pylist(), np.float32), file["features"][:])
            assert set(table["slide"].to_pylist()) == {path.stem} == {file.attrs["slide"]}
            assert table.schema.metadata[b"sha256"].decode() == file.attrs["encoder_sha256"]
            decided = json.loads(file.attrs["decided"])
        assert decided["mpp"] == 1.0 and decided["size"] == 64
        assert set(table["split"].to_pylist()) <= {"train", "test"}


def test_a_slide_may_have_one_tile(told: Slides, tmp_path: Path) -> None:
    painted(tmp_path / "in" / "one.svs", (256, 256))
    mine = replace(told, slides=[str(tmp_path / "in" / "one.svs")], out=tmp_path / "out", size=256, mpp=0.5,
                   min_tissue=0.0, min_contrast=0.0, min_focus=0.0)
    assert embed.run(mine, CPU, 1).tiles == 1
    (bag,) = Bags(mine.out)
    assert bag.features_ND.shape[0] == 1 and bag.corner_N2.tolist() == [[0, 0]]


def test_many_tiles_take_the_memory_of_a_few(told: Slides, tmp_path: Path) -> None:
    """1,024 tiles are 201 MB of pixels; neither the job nor a reader ever holds that much."""
    side, tile = 32 * 256, synthetic.paint(3, 1, 0, size=256).pixels
    encoded = jpeg.encode(tile, 60, "4:4:4")
    (tmp_path / "in").mkdir()
    with tifffile.TiffWriter(tmp_path / "in" / "large.svs") as out:
        out.write(iter([encoded] * 32 ** 2), shape=(side, side, 3), dtype=np.uint8, tile=(256, 256), metadata=None,
                  photometric="ycbcr", subsampling=(1, 1), compression="jpeg", software=False,
                  description="Aperio Image Library v12.0.0 \r\n|AppMag = 20|MPP = 0.5000")
    mine = replace(told, slides=[str(tmp_path / "in")], out=tmp_path / "out", size=256, mpp=0.5, resize=32, batch=256,
                   write=["h5"], workers=1, unit_memory_gb=0.3, min_tissue=0.0, min_contrast=0.0, min_focus=0.0)
    embed.run(replace(mine, max_tiles=1, out=tmp_path / "warm"), CPU, 1)
    Path("/proc/self/clear_refs").write_text("5")       # the peak begins anew
    before = peak()
    done = embed.run(mine, CPU, 1)
    assert done.tiles == 32 ** 2 and listed(mine.out, "slides")["large"]["native"]
    assert peak() - before < 100 << 20


def peak() -> int:
    """Memory that this process held at most, with what it shares."""
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) << 10


# --- the same, however it went


def test_one_worker_writes_the_same_bytes_as_two(told: Slides, whole: Path, tmp_path: Path) -> None:
    mine = replace(told, out=tmp_path / "out", workers=1)
    embed.run(mine, CPU, 2)
    assert contents(mine.out) == contents(whole)


def test_parts_add_up_to_the_whole(told: Slides, whole: Path, tmp_path: Path) -> None:
    mine = replace(told, out=tmp_path / "out")
    assert [embed.run(replace(mine, part=part), CPU, 2).slides for part in ("2/3", "3/3", "1/3")] == [1, 1, 2]
    assert contents(mine.out) == contents(whole)
    assert embed.run(mine, CPU, 2).before == 4


def test_a_killed_job_leaves_whole_slides_and_goes_on(told: Slides, whole: Path, tmp_path: Path) -> None:
    mine = replace(told, out=tmp_path / "out", workers=1)
    done = subprocess.run([sys.executable, "-c", KILLED, json.dumps(vars(mine), default=str)], cwd=ROOT, check=False,
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL, done.stderr
    there = {name: content for name, content in contents(mine.out).items() if name.startswith((".notes", "h5", "parq"))}
    assert sum(name.endswith(".h5") for name in there) == 2
    assert there.items() <= contents(whole).items()
    (mine.out / "h5" / ".P03-S0.h5.1.tmp").write_bytes(b"half")
    again = embed.run(mine, CPU, 2)
    assert (again.before, again.slides) == (2, 2)
    assert contents(mine.out) == contents(whole)


def test_an_interrupted_job_keeps_what_is_complete_and_leaves_no_process(told: Slides, whole: Path,
                                                                        tmp_path: Path) -> None:
    mine = replace(told, out=tmp_path / "out")

    def interrupt(_what: str, done: int, _total: int, _pace: str) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed.run(mine, CPU, 2, interrupt)
    assert not multiprocessing.active_children()
    assert len(listed(mine.out, "slides")) == 1
    embed.run(mine, CPU, 2)
    assert contents(mine.out) == contents(whole)


def test_a_slide_whose_file_is_gone_is_embedded_again(told: Slides, whole: Path, tmp_path: Path) -> None:
    mine = replace(told, out=tmp_path / "out")
    shutil.copytree(whole, mine.out)
    (mine.out / "h5" / "P01-S0.h5").unlink()
    assert embed.run(mine, CPU, 2).slides == 1
    assert contents(mine.out) == contents(whole)


# --- who fails


@contextlib.contextmanager
def on_each_process(do: Callable[[int], None], count: int) -> Iterator[list[int]]:
    """Does something to the first so many processes that read, as soon as each is there."""
    seen: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while len(seen) < count and not over.is_set():
            for process in multiprocessing.active_children():
                if process.pid and process.pid not in seen and len(seen) < count:
                    seen.append(process.pid)
                    do(process.pid)
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("kills", [1, 2])
def test_a_slide_that_crashes_its_reader_is_read_once_more_and_then_listed(told: Slides, whole: Path, tmp_path: Path,
                                                                          kills: int) -> None:
    mine = replace(told, out=tmp_path / "out", workers=1)
    with on_each_process(lambda process: os.kill(process, signal.SIGKILL), kills) as killed:
        done = embed.run(mine, CPU, 2)
    assert len(killed) == kills
    if kills == 2:
        (text,) = done.failed
        assert "P00-S0.svs" in text and "crashed twice, now with SIGKILL" in text
        assert [*listed(mine.out, "failed")] == ["P00-S0"] and len(listed(mine.out, "slides")) == 3
        assert embed.run(mine, CPU, 2).slides == 1, "the next call tries it again"
    assert contents(mine.out) == contents(whole)


def test_a_slide_that_hangs_is_ended_and_listed(told: Slides, tmp_path: Path) -> None:
    mine = replace(told, out=tmp_path / "out", workers=2, unit_seconds=6.0)
    with on_each_process(lambda process: os.kill(process, signal.SIGSTOP), 1):
        done = embed.run(mine, CPU, 2)
    assert done.slides == 3 and "no tile came for 6 s" in done.failed[0]


def test_what_cannot_be_embedded_is_listed_and_the_others_are_done(told: Slides, tmp_path: Path) -> None:
    source = tmp_path / "in"
    good = painted(source / "good.svs")
    (source / "torn.svs").write_bytes(good.read_bytes()[:20_000])
    (source / "words.svs").write_text("no slide")
    with tifffile.TiffWriter(source / "unknown.tif") as out:
        out.write(np.asarray(synthetic.paint(3, 1, 0, size=512).pixels), photometric="rgb", tile=(256, 256),
                  metadata=None)
    tiff.write_pyramid(source / "glass.svs", np.full((512, 512, 3), 245, np.uint8), 0.5, 87)
    painted(source / "coarse.svs", mpp=2.0)
    out = tmp_path / "out"
    words = ["embed", f"encoder={told.encoder}", f"slides={source}", f"out={out}", "size=64", "mpp=1.0", "batch=8"]
    done = CliRunner().invoke(cli.app, ["embed", *words])
    assert done.exit_code == 3, done.output
    failed = listed(out, "failed")
    assert sorted(failed) == ["torn", "unknown", "words"]
    assert "does not say its microns per pixel" in failed["unknown"]["reason"]
    assert "cannot be opened as a slide" in failed["words"]["reason"]
    assert str(tmp_path) not in str(failed), "the same list wherever the slides lie"
    kept = listed(out, "slides")
    assert {name: line["state"] for name, line in kept.items()} == {"good": "done", "glass": "empty", "coarse": "empty"}
    assert set(kept["glass"]["rejected"]) == {"background"} and "hold no tile" in kept["coarse"]["detail"]
    assert Bags(out).slides == ["good"]
    assert "3 failed, max_failed=0" in done.output
    (source / "unknown.tif").unlink()
    again = CliRunner().invoke(cli.app, ["embed", *words, "max_failed=2"])
    assert again.exit_code == 0, again.output
    assert "3 were done before" in again.output
    rehearsed = CliRunner().invoke(cli.app, ["embed", *words, "--dry-run"])
    assert rehearsed.exit_code == 3 and "words.svs cannot be opened" in rehearsed.output


# --- what is refused


def test_another_encoder_other_tiles_and_other_slides_are_refused_by_name(told: Slides, whole: Path, slides: Path,
                                                                          tmp_path: Path) -> None:
    out, source = tmp_path / "out", tmp_path / "in"
    shutil.copytree(whole, out)
    shutil.copytree(slides, source)
    mine, before = replace(told, out=out, slides=[str(source)]), contents(whole)
    torch.manual_seed(1)
    Encoder("test_resnet", {}, (0.5,) * 3, (0.5,) * 3).save(tmp_path / "other", 64, {})
    for change, said in ((dict(encoder=str(tmp_path / "other")), "encoder_sha256 was"), (dict(mpp=0.5), "mpp was 1.0"),
                         (dict(resize=32), "resize was 64, now 32"), (dict(min_tissue=0.1), "min_tissue was 0.5")):
        with pytest.raises(embed.SettingsChanged, match=said):
            embed.run(replace(mine, **change), CPU, 2)
    with (source / "P02-S0.svs").open("ab") as file:
        file.write(b"more")
    done = embed.run(mine, CPU, 2)
    assert done.before == 3 and "P02-S0.svs: it is done already, and since then bytes was" in done.failed[0]
    after = contents(out)
    assert all(after[name] == content for name, content in before.items() if name.startswith("h5"))


def test_a_folder_of_something_else_and_one_in_use_are_refused(told: Slides, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(embed.SettingsChanged, match=r"mine\.txt.*not begun by ssl-dist embed"):
        embed.run(replace(told, out=tmp_path), CPU, 2)

    def meanwhile(*_: Any) -> None:
        with pytest.raises(FolderInUse):
            embed.run(replace(told, out=tmp_path / "out"), CPU, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed.run(replace(told, out=tmp_path / "out"), CPU, 2, meanwhile)


def test_slides_are_a_folder_a_file_a_pattern_or_several(slides: Path, told: Slides, tmp_path: Path) -> None:
    recipe = ROOT / "configs" / "embed.yaml"

    def found(word: str) -> list[str]:
        told_ = schema.load(Slides, recipe, [f"encoder={told.encoder}", f"out={tmp_path / 'out'}", f"slides={word}"])
        return [source.slide for source in embed.plan(told_).found]

    for name in ("a b #1.svs", "c.svs"):
        (tmp_path / name).symlink_to(slides / "P00-S0.svs")
    every = ["P00-S0", "P01-S0", "P02-S0", "P03-S0"]
    assert found(str(slides)) == found(f"{slides}/*.svs") == found(f"'{slides}/*.svs'") == every
    assert found(f"{tmp_path}/a b #1.svs") == ["a b #1"]
    assert found(f"[{slides}/P01-S0.svs, '{slides}/P0[12]*.svs', {tmp_path}/c.svs]") == ["P01-S0", "P02-S0", "c"]
    with pytest.raises(ShardError, match=r"nowhere/\*\.svs names no slide"):
        found("nowhere/*.svs")
    (tmp_path / "twin").mkdir()
    (tmp_path / "twin" / "c.svs").symlink_to(slides / "P01-S0.svs")
    with pytest.raises(ShardError, match="would both be slide 'c'"):
        found(f"[{tmp_path}/c.svs, {tmp_path}/twin]")


@pytest.mark.parametrize(("words", "said"), [
    (["encoder=nowhere"], "encoder='nowhere' is no folder"), (["part=5/4"], "part='5/4' is none of 1/4 to 4/4"),
    (["mpq=1"], "did you mean mpp?"), (["min_tissue=2"], "out of range"), (["write=[csv]"], "write")])
def test_what_cannot_be_asked_is_said_before_torch_is_imported(words: list[str], said: str, encoder: Path) -> None:
    with pytest.raises(schema.ConfigError, match=re.escape(said)):
        schema.load(Slides, ROOT / "configs" / "embed.yaml", [f"encoder={encoder}", *words])


def test_a_launch_is_a_task_a_part(encoder: Path, tmp_path: Path) -> None:
    asked = jobs.parse("slurm", shlex.split(
        f"launch/cpu parts=3 -- embed embed encoder={encoder} 'slides=/data/*.svs' out={tmp_path}/out"))
    (work,) = jobs._embeds(asked)
    assert [words[-1] for words in work.commands] == ["part=1/3", "part=2/3", "part=3/3"]
    assert all(words[:2] == ["embed", "embed"] and "slides=/data/*.svs" in words for words in work.commands)
    assert work.folder == tmp_path / "out.launch"
