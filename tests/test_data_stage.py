"""Copies on a local disk: batches as without them, within the limit, shared by processes, and what trouble does."""

import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from shards import index
from shards.index import ShardError
from ssl_dist import config, schema, train
from ssl_dist.data import mixture, stage
from ssl_dist.data.batch import Batch, View
from ssl_dist.data.loader import Loader
from ssl_dist.data.reader import LOOK, Reader
from ssl_dist.data.stage import Copy, Plan, Stage, Url
from ssl_dist.data.stream import Stream

ROOT = Path(__file__).resolve().parent.parent
BATCH, PLENTY = 12, 10**9
made: list[Reader | Loader] = []


def pack(folder: Path, name: str, tars: int, samples: int) -> Path:
    """A shard folder of painted noise in tars of two sizes, packed by tarfile, with true digests."""
    rng = np.random.default_rng(tars)
    folder.mkdir()
    columns: dict[str, list] = {word: [] for word in index.SCHEMA.names}
    listed = []
    for number in range(tars):
        path, images = folder / f"{name}-{number:06d}.tar", {}
        for member in range(samples + 4 * (number % 2)):
            pixels, buffer = rng.integers(0, 256, (8, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1), io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG")
            images[f"{name}_{number}_{member}"] = buffer.getvalue()
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, image in images.items():
                member_of = tarfile.TarInfo(f"{key}.jpg")
                member_of.size = len(image)
                tar.addfile(member_of, io.BytesIO(image))
        with tarfile.open(path) as tar:
            for key, image in images.items():
                row = {"key": key, "tar": number, "offset": tar.getmember(f"{key}.jpg").offset_data, "size": len(image),
                       "crc32": zlib.crc32(image), "dataset": name, "slide": "S", "patient": "P", "x": 0, "y": 0,
                       "mpp": 0.5, "label": -1, "split": "train", "stain": "H&E", "organ": "", "encoding": "source",
                       "digest": hashlib.sha256(image).digest()[:16]}
                for word, values in columns.items():
                    values.append(row[word])
        content = path.read_bytes()
        listed.append(index.Tar(path.name, len(images), len(content), hashlib.sha256(content).hexdigest()))
    index.write_samples(folder, columns)
    found = index.Index([{"name": name, "classes": []}], {}, "", listed)
    index.write(folder, replace(found, fingerprint=index.fingerprint(folder, found)))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two shard folders of many small tars: two datasets of different sizes. Not to be changed."""
    root = tmp_path_factory.mktemp("many")
    return [pack(root / "first", "first", 15, 9), pack(root / "second", "second", 9, 4)]


@pytest.fixture
def copies(folders: list[Path], tmp_path: Path) -> list[Path]:
    """Both folders again, to be changed."""
    return [Path(shutil.copytree(folder, tmp_path / "sources" / folder.name)) for folder in folders]


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while made:
        made.pop().close()
    assert not [thread for thread in threading.enumerate() if thread.name == "stage"]


def reader(sources: list[Any], folder: Path | None = None, limit: int = PLENTY) -> Reader:
    made.append(Reader(sources, stage=Stage(folder, limit) if folder else None))
    return made[-1]


def stream(of: Reader, *, even: bool = False, seed: int = 5) -> Stream:
    return Stream(of.counts, seed=seed, window=3, batch=BATCH, datasets=of.dataset_of,
                  shares=mixture.shares(of.sizes, None) if even else None)


def loader(of: Reader, *, even: bool = False) -> Loader:
    made.append(Loader(of, stream(of, even=even), (View(size=32),), rank=0, world=1, device=torch.device("cpu"),
                       threads=2, ahead=2))
    return made[-1]


def urls(sources: list[Path]) -> list[str]:
    return [f"file://{source}" for source in sources]


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as handle:
        handle.seek(place)
        byte = handle.read(1)[0]
        handle.seek(place)
        handle.write(bytes([byte ^ 1]))


def until(condition: Callable[[], Any]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited for a minute in vain")


def there(folder: Path) -> set[str]:
    """The copies in a stage, as the last two parts of their paths."""
    return {"/".join(path.parts[-2:]) for path in folder.glob("*/*.tar")}


def of_tars(mine: Reader) -> list[str]:
    """What `there` says of the copies of all tars, by their numbers."""
    return ["/".join(copy.path.parts[-2:]) for copy in mine._copies]


def read_alike(one: Reader, other: Reader) -> bool:
    rows = np.random.default_rng(0).permutation(other.all_rows())
    return [image.tobytes() for image in one.read(rows)] == [image.tobytes() for image in other.read(rows)]


def equal(one: Batch, other: Batch) -> bool:
    return (np.array_equal(one.rows, other.rows) and np.array_equal(one.positions, other.positions)
            and all(map(np.array_equal, one.boxes, other.boxes)) and all(map(torch.equal, one.views, other.views)))


class Look:
    """What lies in a stage at one moment: nothing is removed or begun meanwhile; what is renamed counts once."""

    def __init__(self, folder: Path):
        self.copies: set[str] = set()
        self.drafts: set[str] = set()
        files: dict[int, int] = {}
        with (folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for path in (Path(parent, name) for parent, _, names in os.walk(folder) for name in names):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    files[status.st_ino] = status.st_size
                    if path.suffix == ".tar":
                        self.copies.add("/".join(path.parts[-2:]))
                    elif status.st_size and path.name.endswith(".tar.draft"):
                        self.drafts.add(f"{path.parent.name}/{path.name[1:].removesuffix('.draft')}")
        self.used = sum(files.values())


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[list[Look]]:
    """Looks at a stage all the while that the block runs."""
    looks, done = [], threading.Event()
    folder.mkdir(exist_ok=True)

    def watch() -> None:
        while not done.is_set():
            looks.append(Look(folder))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield looks
    finally:
        done.set()
        watcher.join()


# --- which tars are next


def walked(of: Stream, start: int, stop: int) -> list[int]:
    """The tars of some steps, one sample after another."""
    found = []
    for step in range(start, stop):
        for tar in of.locate(of.epoch(step), of.positions(step))[0].tolist():
            if tar not in found:
                found.append(tar)
    return found


@pytest.mark.parametrize("even", [False, True])
def test_the_tars_of_steps_are_those_of_their_samples_in_order(even: bool) -> None:
    counts = np.array([50, 51, 0, 49, 3, 50, 52, 47, 50, 50, 48, 20])
    of = Stream(counts, seed=7, window=4, batch=BATCH, datasets=np.arange(12) // 7,
                shares=mixture.shares(np.array([255, 215]), None) if even else None)
    steps = of.steps_an_epoch
    for start, stop in ((0, 1), (0, steps), (3, 9), (steps - 2, steps + 2), (5, 3 * steps + 1), (4, 4)):
        assert of.tars(start, stop) == walked(of, start, stop)
    plan = Plan(of, 2 * steps + 7, 11)
    for step in (0, 1, 2, 9, 10, steps - 1, steps, steps + 3, 4, 2 * steps + 6):        # even back
        assert list(plan.coming(step)) == walked(of, step, min(2 * steps + 7, step + 2 * steps))
    assert next(plan.coming(3)) == walked(of, 3, 4)[0]


# --- batches


@pytest.mark.parametrize("limit", [PLENTY, 300_000])
@pytest.mark.parametrize("kind", ["folders", "urls"])
@pytest.mark.parametrize("even", [False, True])
def test_batches_from_copies_are_those_from_the_source(folders: list[Path], tmp_path: Path, even: bool, kind: str,
                                                       limit: int) -> None:
    plain = loader(reader(folders), even=even)
    steps = 2 * plain.stream.steps_an_epoch
    expected = list(plain.batches(0, steps))
    sources = folders if kind == "folders" else urls(folders)
    for start in (0, steps // 3, steps - 3):
        mine = loader(reader(sources, tmp_path / "stage", limit), even=even)
        mine.reader.follow(mine.stream, start, steps, copying=True)
        until(lambda: len(there(tmp_path / "stage")) > 3)       # else all is read before anything is copied
        got = list(mine.batches(start, steps))
        assert len(got) == steps - start
        assert all(map(equal, got, expected[start:]))
        mine.close()


def test_what_is_staged_is_read_although_its_source_is_gone(copies: list[Path], folders: list[Path],
                                                            tmp_path: Path) -> None:
    plain = loader(reader(folders))
    for number, sources in enumerate((copies, urls(copies))):
        mine = loader(reader(sources, tmp_path / f"stage{number}"))
        mine.reader.follow(mine.stream, 0, 100, copying=True)
        until(lambda mine=mine: there(mine.reader.stage.folder) == set(of_tars(mine.reader)))
        (tmp_path / "sources").rename(tmp_path / "gone")
        got, expected = list(mine.batches(0, 20)), list(plain.batches(0, 20))
        assert all(map(equal, got, expected)) and mine.reader.stage.copied >= len(mine.reader.tars)
        (tmp_path / "gone").rename(tmp_path / "sources")


def test_the_stage_is_told_the_step_that_is_handed_out(folders: list[Path], tmp_path: Path) -> None:
    mine = loader(reader(folders, tmp_path / "stage"))
    told = [mine.reader.stage._step for _ in mine.batches(5, 14)]
    assert told == list(range(5, 14)), "what one of an earlier step may still need could go, or what none needs stay"


def test_a_rank_that_does_not_copy_reads_a_folders_tars_where_they_are_and_copies_a_urls(folders: list[Path],
                                                                                         tmp_path: Path) -> None:
    plain = reader(folders)
    mine = reader(folders, tmp_path / "of folders")
    mine.follow(stream(mine), 0, 100, copying=False)
    assert read_alike(mine, plain) and not there(tmp_path / "of folders")
    mine = reader(urls(folders), tmp_path / "of urls")
    mine.follow(stream(mine), 0, 100, copying=False)
    assert read_alike(mine, plain) and there(tmp_path / "of urls") == set(of_tars(mine))
    assert not list((tmp_path / "of urls").rglob("*.draft"))


# --- the limit


@pytest.mark.parametrize("strange", [0, 100_000])
def test_the_copies_stay_within_the_limit_and_are_those_that_are_needed_soonest(folders: list[Path], tmp_path: Path,
                                                                                strange: int) -> None:
    """At every rest the first of the coming tars that fit are there, whatever was there before; while one is made, all
    that are needed before it; and none of them is removed only to be copied again."""
    mine = reader(folders, tmp_path / "stage", limit := 250_000)
    of, names = stream(mine), of_tars(mine)
    sizes = [copy.size for copy in mine._copies]
    assert sum(sizes) > 2 * limit and max(sizes) < limit / 4
    stop, before = 3 * of.steps_an_epoch, 0
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage/somebody's").write_bytes(bytes(strange))
    for start in (0, 1, 2, 3, 5, 9, 10, 8, 7, 5, 3, stop - 4, stop - 1):         # as if resumed, or begun anew
        coming = [names[tar] for tar in walked(of, start, min(stop, start + 2 * of.steps_an_epoch))]
        fit = np.cumsum([sizes[names.index(name)] for name in coming]) <= limit - strange
        soonest = {name for name, fits in zip(coming, fit, strict=True) if fits}
        with watched(tmp_path / "stage") as looks:
            expected = mine.stage.copied + len(soonest - there(tmp_path / "stage"))
            if start > before:
                mine.at(start)
            else:
                mine.follow(of, start, stop, copying=True)
            until(lambda expected=expected: mine.stage.copied >= expected)
            assert soonest <= there(tmp_path / "stage") and mine.stage.copied == expected
        before = start
        assert max(look.used for look in looks) <= limit
        for look in looks:
            for draft in look.drafts & set(coming):
                assert set(coming[:coming.index(draft)]) <= look.copies
    assert read_alike(mine, reader(folders))


def test_two_runs_of_one_stage_keep_the_limit_together(folders: list[Path], tmp_path: Path) -> None:
    plain = reader(folders)
    with watched(tmp_path / "stage") as looks:
        runs = [reader(folders, tmp_path / "stage", 150_000) for _ in range(2)]
        for seed, each in enumerate(runs):
            each.follow(stream(each, seed=seed), 0, 100, copying=True)
        for step in range(0, 60, 4):
            for seed, each in enumerate(runs):
                each.at(step)
                rows = each.rows(*stream(plain, seed=seed).locate(0, np.arange(step, step + BATCH)))
                assert [image.tobytes() for image in each.read(rows)] == [image.tobytes() for image in plain.read(rows)]
        until(lambda: all(each.stage.copied for each in runs))
        for each in runs:
            each.close()
    assert max(look.used for look in looks) <= 150_000


def test_no_copy_gets_its_name_while_somebody_counts_what_is_there(folders: list[Path], tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Who lists a folder and then asks for sizes would find neither the draft nor the copy, and take too much room."""
    written, go = threading.Event(), threading.Event()
    plainly = Stage._write

    def slowly(self: Stage, copy: Copy, draft: int) -> None:
        plainly(self, copy, draft)
        written.set()
        assert go.wait(60)

    monkeypatch.setattr(Stage, "_write", slowly)
    mine = reader(folders, tmp_path / "stage")
    mine.follow(stream(mine), 0, 100, copying=True)
    assert written.wait(60)
    with (tmp_path / "stage/lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        go.set()
        time.sleep(0.3)
        assert not there(tmp_path / "stage")
    until(lambda: there(tmp_path / "stage"))


def test_a_url_exceeds_the_limit_by_one_tar_or_is_refused_where_one_step_needs_more(folders: list[Path],
                                                                                    tmp_path: Path) -> None:
    plain = reader(folders[:1])
    largest = max(tar.bytes for tar in plain.indexes[0].tars)
    one = Stream(plain.counts, seed=5, window=1, batch=4)        # a step of four takes from two tars at most
    with watched(tmp_path / "one") as looks:
        table = (folders[0] / "samples.arrow").stat().st_size + (folders[0] / "index.json").stat().st_size
        mine = reader(urls(folders[:1]), tmp_path / "one", table + 2 * largest)
        mine.follow(one, 0, 60, copying=False)
        for step in range(60):
            mine.at(step)
            rows = mine.rows(*one.locate(one.epoch(step), one.positions(step)))
            assert [image.tobytes() for image in mine.read(rows)] == [image.tobytes() for image in plain.read(rows)]
    assert max(look.used for look in looks) <= table + 3 * largest
    assert mine.stage.copied > len(mine.tars), "the second epoch is copied again"

    mine = reader(urls(folders[:1]), tmp_path / "less", table + largest // 2)
    assert mine.read(mine.all_rows()[:1]), "by one tar it may be exceeded"
    mine.follow(stream(mine), 0, 60, copying=False)
    with pytest.raises(ShardError, match=r"first-\d+\.tar has no room in .*raise data\.stage_gb, or lower") as refused:
        mine.read(mine.rows(*stream(mine).locate(0, np.arange(BATCH))))
    assert "file://" in str(refused.value) and refused.value.exit_code == 3


def test_copies_that_come_and_go_while_tiles_are_read_do_no_harm(folders: list[Path], tmp_path: Path) -> None:
    mine, plain, done = reader(folders, tmp_path / "stage"), reader(folders), threading.Event()
    mine.follow(stream(mine), 0, 100, copying=True)
    until(lambda: there(tmp_path / "stage") == set(of_tars(mine)))
    mine.stop_staging()
    homes = [copy.path.parent for copy in (mine._copies[0], mine._copies[-1])]
    looks = reader(folders, tmp_path / "stage")

    def come_and_go() -> None:
        while not done.is_set():
            for home in homes:
                home.rename(home.with_name("away"))
                home.with_name("away").rename(home)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(30):
            assert read_alike(looks, plain)
            looks.close()
    finally:
        done.set()
        thread.join()
    assert there(tmp_path / "stage") == set(of_tars(mine)), "a sound copy was taken for a bad one"


def test_copies_that_were_removed_are_closed_soon_so_that_their_room_is_free(folders: list[Path],
                                                                              tmp_path: Path) -> None:
    mine = reader(urls(folders), tmp_path / "stage")
    mine.read(rows := mine.all_rows())

    def removed() -> list[str]:
        """Files of this process that have no name any more."""
        found = []
        for descriptor in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.append(str(descriptor.readlink()))
        return [name for name in found if str(tmp_path) in name and name.endswith("(deleted)")]

    gone = sorted((tmp_path / "stage").glob("*/first-*.tar"))
    for copy in gone:
        copy.unlink()
    assert len(removed()) == len(gone)
    last = rows[-1:]            # of the second dataset
    for _ in range(LOOK):
        mine.read(last)
    assert not removed()
    assert read_alike(mine, reader(folders)) and there(tmp_path / "stage") == set(of_tars(mine))


# --- many processes

READS = """
import hashlib, json, sys, time
from pathlib import Path
import numpy as np
from ssl_dist.data.reader import Reader
from ssl_dist.data.stage import Stage
from ssl_dist.data.stream import Stream

folder, limit, number, *sources = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
stage = Stage(Path(folder), int(limit))
reader = Reader([Path(source) if source[0] == "/" else source for source in sources], stage=stage)
reader.follow(Stream(reader.counts, seed=int(number), window=3, batch=12), 0, 100, copying=True)
rows = reader.all_rows()
read = {}
for _ in range(2):
    for part in np.array_split(np.roll(rows, 50 * int(number)), 10):
        read |= dict(zip(part.tolist(), (image.tobytes() for image in reader.read(part))))
patience = time.monotonic() + 60
while int(limit) >= 10**9 and not all(copy.path.exists() for copy in reader._copies) and time.monotonic() < patience:
    time.sleep(0.01)
reader.close()
digest = hashlib.sha256(b"".join(read[row] for row in sorted(read))).hexdigest()
print(json.dumps({"copied": stage.copied, "sha256": digest}))
"""


def processes(count: int, folder: Path, limit: int, sources: list[Any]) -> tuple[list[dict], list[str]]:
    """What processes that began at once say of what they read, and what they say on stderr."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [subprocess.Popen([sys.executable, "-c", READS, *map(str, (folder, limit, number, *sources))],
                                env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE) for number in range(count)]
    for each in running:
        assert each.stdout is not None and each.stdout.readline() == "ready\n"
    told = [each.communicate("go\n", timeout=120) for each in running]
    assert [each.returncode for each in running] == [0] * count, told
    return [json.loads(out) for out, _ in told], [said for _, said in told]


def content(folders: list[Path]) -> str:
    """Of all images of the folders, in order."""
    of = reader(folders)
    return hashlib.sha256(b"".join(image.tobytes() for image in of.read(of.all_rows()))).hexdigest()


@pytest.mark.parametrize("kind", ["folders", "urls"])
def test_processes_that_copy_at_once_copy_each_tar_once(folders: list[Path], tmp_path: Path, kind: str) -> None:
    sources = folders if kind == "folders" else urls(folders)
    told, said = processes(3, tmp_path / "stage", PLENTY, sources)
    assert {each["sha256"] for each in told} == {content(folders)} and said == [""] * 3
    tars = sum(len(index.read(folder).tars) for folder in folders)
    catalogues = 2 * len(folders) if kind == "urls" else 0
    assert sum(each["copied"] for each in told) == tars + catalogues
    assert len(there(tmp_path / "stage")) == tars
    for folder in folders:
        found = index.read(folder)
        for tar in found.tars:
            copy = tmp_path / "stage" / found.fingerprint[:16] / tar.name
            assert copy.read_bytes() == (folder / tar.name).read_bytes()
    assert len(list((tmp_path / "stage").glob("*/samples.arrow"))) == catalogues // 2


def test_processes_that_take_each_others_room_read_the_same(folders: list[Path], tmp_path: Path) -> None:
    with watched(tmp_path / "stage") as looks:
        told, _ = processes(2, tmp_path / "stage", 300_000, urls(folders))
    assert {each["sha256"] for each in told} == {content(folders)}
    assert max(look.used for look in looks) <= 300_000 + max(tar.bytes for tar in index.read(folders[0]).tars)


def test_copies_of_an_earlier_run_are_used(folders: list[Path], tmp_path: Path) -> None:
    mine = reader(urls(folders), tmp_path / "stage")
    mine.read(mine.all_rows())
    before = {path: path.stat() for path in (tmp_path / "stage").rglob("*") if path.is_file()}
    again = reader(urls(folders), tmp_path / "stage")
    assert read_alike(again, mine)
    assert again.stage.copied == 0
    assert {path: path.stat().st_ino for path in before} == {path: status.st_ino for path, status in before.items()}


def test_a_killed_copier_leaves_nothing_that_is_believed(folders: list[Path], tmp_path: Path) -> None:
    """The source is a pipe, so that the kill comes while half of the copy is written."""
    folder = tmp_path / "stage" / ("0" * 16)
    tar, other = (folders[0] / each.name for each in index.read(folders[0]).tars[:2])
    pipe, whole = tmp_path / "pipe", tar.read_bytes()
    os.mkfifo(pipe)
    program = """
import sys
from pathlib import Path
from ssl_dist.data.stage import Copy, Stage
folder, pipe, path, size, sha256 = sys.argv[1:]
Stage(Path(folder), 10**9)._make(Copy(Path(pipe), Path(path), int(size), sha256), [])
"""
    words = (tmp_path / "stage", pipe, folder / tar.name, len(whole), hashlib.sha256(whole).hexdigest())
    copier = subprocess.Popen([sys.executable, "-c", program, *map(str, words)],
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
    draft = folder / f".{tar.name}.draft"
    sound = Copy(Url(f"file://{tar}"), folder / tar.name, len(whole), hashlib.sha256(whole).hexdigest())
    with pipe.open("wb") as handle:
        handle.write(whole[:len(whole) // 2])
        handle.flush()
        until(lambda: draft.exists() and draft.stat().st_size == len(whole) and draft.read_bytes()[:512] == whole[:512])
        mine = Stage(tmp_path / "stage", PLENTY)
        assert mine._make(sound, []) is None, "it is being made by another process"
        copier.send_signal(signal.SIGKILL)
        copier.wait()
    assert draft.stat().st_size == len(whole) and not sound.path.exists()
    sound.path.write_bytes(whole[:-1])
    assert mine.open(replace(sound, source=tar)) is None, "a folder's is read where it is"

    # What it left takes room, which is taken from it where there is no other.
    content = other.read_bytes()
    small = Stage(tmp_path / "stage", len(content) + 100)
    second = Copy(Url(f"file://{other}"), folder / other.name, len(content), hashlib.sha256(content).hexdigest())
    os.close(small.open(second))
    assert not draft.exists() and second.path.read_bytes() == content

    descriptor = mine.open(sound)
    assert os.pread(descriptor, len(whole), 0) == whole == sound.path.read_bytes()
    os.close(descriptor)
    assert not list(folder.glob("*.draft"))


def test_a_draft_that_became_a_copy_while_it_was_claimed_is_not_written_to(tmp_path: Path,
                                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """Its maker renames it between our opening and our locking it."""
    draft, lock = tmp_path / ".a.tar.draft", fcntl.flock
    draft.write_bytes(b"whole")

    def late(descriptor: int, kind: int) -> None:
        if not (tmp_path / "a.tar").exists():
            draft.rename(tmp_path / "a.tar")
        lock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    descriptor = stage._claim(draft)
    os.pwrite(descriptor, b"half", 0)
    os.close(descriptor)
    assert (tmp_path / "a.tar").read_bytes() == b"whole" and draft.read_bytes() == b"half"


# --- trouble


def test_a_source_that_is_not_what_its_index_says_is_named_with_both_digests(copies: list[Path], folders: list[Path],
                                                                             tmp_path: Path,
                                                                             caplog: pytest.LogCaptureFixture) -> None:
    """Its images are sound, so it is read where it is; a URL's can be read only once it is copied."""
    tar = index.read(copies[0]).tars[2]
    flip(copies[0] / tar.name, tar.bytes - 1)
    found = hashlib.sha256((copies[0] / tar.name).read_bytes()).hexdigest()
    with caplog.at_level(logging.WARNING, "ssl_dist"):
        mine = reader(copies, tmp_path / "stage")
        mine.follow(stream(mine), 0, 100, copying=True)
        until(lambda: len(there(tmp_path / "stage")) == len(mine.tars) - 1 and caplog.messages)
        assert read_alike(mine, reader(folders))
        mine.close()
    (said,) = caplog.messages
    for word in (str(copies[0] / tar.name), tar.sha256, found, "read where it is"):
        assert word in said
    assert not list((tmp_path / "stage").rglob("*.draft"))
    assert not list((tmp_path / "stage").rglob(tar.name))

    mine = reader(urls(copies), tmp_path / "of urls")
    with pytest.raises(ShardError) as refused:
        mine.read(mine.all_rows())
    for word in (f"file://{copies[0] / tar.name}", tar.sha256, found):
        assert word in str(refused.value)
    assert refused.value.exit_code == 3
    assert not list((tmp_path / "of urls").rglob(tar.name))


class Torn(LocalFileSystem):
    """A file system whose every tar comes wrong the first time: cut, with other bytes, too long, or not at all."""

    protocol = "torn"
    opened: dict[str, int] = {}     # noqa: RUF012

    def _open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        self.opened[path] = self.opened.get(path, 0) + 1
        if not path.endswith(".tar") or self.opened[path] > 1:
            return super()._open(path, mode, **more)
        kind, content = int(path[-5]) % 4, bytearray(Path(path).read_bytes())
        if kind == 0:
            raise ConnectionResetError("the other end is gone")
        torn = fsspec.filesystem("memory").open("/torn", "w+b")
        torn.write([content[:-1], content[:-1] + b"?", content + b"?"][kind - 1])
        torn.seek(0)
        return torn


def test_a_copy_that_came_wrong_is_made_once_more(folders: list[Path], tmp_path: Path) -> None:
    fsspec.register_implementation("torn", Torn, clobber=True)
    Torn.opened.clear()
    mine = reader([f"torn://{folder}" for folder in folders], tmp_path / "stage")
    assert read_alike(mine, reader(folders))
    opened = [count for path, count in Torn.opened.items() if path.endswith(".tar")]
    assert opened == [2] * len(mine.tars)
    assert there(tmp_path / "stage") == set(of_tars(mine))


def test_a_copy_that_went_bad_is_read_from_its_source_and_made_anew(folders: list[Path], tmp_path: Path) -> None:
    for number, sources in enumerate((folders, urls(folders))):
        root = tmp_path / f"stage{number}"
        mine = reader(sources, root)
        mine.follow(stream(mine), 0, 100, copying=True)
        until(lambda mine=mine, root=root: there(root) == set(of_tars(mine)))
        mine.stop_staging()
        again = reader(sources, root)           # nobody copies ahead for it
        key, tar, offset = again.place(int(again.all_rows()[7]))
        bad = next(copy.path for copy in again._copies if copy.source == tar)
        flip(bad, offset + 40)
        short = next(copy.path for copy in again._copies if copy.source != tar)
        with short.open("r+b") as handle:
            handle.truncate(1000)
        assert read_alike(again, reader(folders)), key
        assert bad.exists() == (number == 1), "of a folder it is left out"
        if number:
            assert short.stat().st_size > 1000 and bad.read_bytes() == (folders[0] / bad.name).read_bytes()


def stderr_of(program: str, *words: Any, shell: tuple[str, ...] = ()) -> list[str]:
    done = subprocess.run([*shell, sys.executable, "-c", program, *map(str, words)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


GOES_ON = """
import itertools, resource, sys, time
from pathlib import Path
from ssl_dist.data.reader import Reader
from ssl_dist.data.stage import Stage
from ssl_dist.data.stream import Stream

def until(condition):
    patience = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < patience
        time.sleep(0.01)

folder, largest, *sources = sys.argv[1:]
plain = Reader([Path(source) for source in sources])
if int(largest):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(largest), int(largest)))
stage = Stage(Path(folder), 10**9)
reader = Reader([Path(source) for source in sources], stage=stage)
stream = Stream(reader.counts, seed=1, window=3, batch=12)
reader.follow(stream, 0, 1000, copying=True)
until(lambda: "disk" in stage._said)
rows = reader.all_rows()
for _ in range(3):
    assert [image.tobytes() for image in reader.read(rows)] == [image.tobytes() for image in plain.read(rows)]
if int(largest):
    until(lambda: not stage._thread.is_alive())
else:                           # within what there is, it goes on to make what is next
    before, steps = stage.copied, itertools.count()
    assert before
    until(lambda: reader.at(next(steps) % 500) or reader.read(rows[:20]) and stage.copied > before + 10)
    assert [image.tobytes() for image in reader.read(rows)] == [image.tobytes() for image in plain.read(rows)]
reader.close()
assert not stage._thread.is_alive()
assert not list(Path(folder).rglob("*.draft"))
"""


def test_a_disk_that_refuses_is_told_once_and_reading_goes_on(folders: list[Path], tmp_path: Path) -> None:
    """The kernel refuses any file of more than 10,000 bytes."""
    (said,) = stderr_of(GOES_ON, tmp_path / "stage", 10_000, *folders)
    assert str(tmp_path / "stage") in said and "refuses (File too large)" in said


def test_a_full_disk_is_told_once_and_what_fits_there_is_used(folders: list[Path], tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    mount = ("unshare", "--mount", "--map-root-user", "sh", "-c",
             f'mount -t tmpfs -o size=200k none {tmp_path / "small"} && exec "$@"', "sh")
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no small disk can be made here")
    (said,) = stderr_of(GOES_ON, tmp_path / "small/stage", 0, *folders, shell=mount)
    assert "has room for 0.000 GB of it, less than data.stage_gb" in said and str(tmp_path / "small/stage") in said


def test_a_tar_larger_than_the_limit_is_told_and_read_where_it_is(folders: list[Path], tmp_path: Path,
                                                                  caplog: pytest.LogCaptureFixture) -> None:
    sizes = sorted(tar.bytes for tar in index.read(folders[0]).tars)
    mine = reader(folders[:1], tmp_path / "stage", sizes[-1] - 1)
    with caplog.at_level(logging.WARNING, "ssl_dist"):
        mine.follow(stream(mine), 0, 100, copying=True)
        until(lambda: there(tmp_path / "stage"))
    assert read_alike(mine, reader(folders[:1]))
    (said,) = caplog.messages
    assert f"{sizes.count(sizes[-1])} of {len(sizes)} tars are larger than data.stage_gb" in said


def test_closing_ends_the_copying_and_whoever_waits_for_a_copy(folders: list[Path], tmp_path: Path) -> None:
    mine = reader(folders, tmp_path / "stage")
    mine.follow(stream(mine), 0, 100, copying=True)
    thread = mine.stage._thread
    mine.close()
    assert not thread.is_alive()

    waits = loader(reader(urls(folders), tmp_path / "of urls"))
    copy = waits.reader._copies[waits.stream.tars(0, 1)[0]]
    descriptor = stage._claim(stage._draft(copy.path))      # as if another process were at it, for ever
    batch = waits._makers.submit(waits.make, 0)
    others = [waits.reader._copies[tar].path for tar in waits.stream.tars(0, 1)[1:]]
    waits.reader.follow(waits.stream, 0, 9, copying=True)
    until(lambda: all(path.exists() for path in others))
    assert not batch.done()
    closing = threading.Thread(target=waits.close, daemon=True)
    closing.start()
    closing.join(60)
    os.close(descriptor)
    assert not closing.is_alive() and isinstance(batch.exception(), stage.Closed)


def test_a_fault_of_our_own_in_the_thread_ends_the_thread_alone(folders: list[Path], tmp_path: Path,
                                                                caplog: pytest.LogCaptureFixture) -> None:
    mine = reader(folders, tmp_path / "stage")
    of = stream(mine)
    of.tars = None      # type: ignore[assignment,method-assign]
    with caplog.at_level(logging.WARNING, "ssl_dist"):
        mine.follow(of, 0, 100, copying=True)
        until(lambda: not mine.stage._thread.is_alive())
    assert "ended (TypeError" in caplog.messages[0]
    assert read_alike(mine, reader(folders))


# --- shard folders at URLs


def test_a_url_without_an_index_or_a_package_is_named(tmp_path: Path) -> None:
    for url, needle in ((f"file://{tmp_path}/nowhere", "No such file"), ("s3://bucket/x", "s3fs"),
                        ("s4://bucket/x", "Protocol not known: s4")):
        with pytest.raises(ShardError) as refused:
            reader([url], tmp_path / "stage")
        assert f"{url}/index.json" in str(refused.value) and needle in str(refused.value)
        assert refused.value.exit_code == 3
    with pytest.raises(ShardError, match=r"s3://bucket/x is a URL.*data\.stage=FOLDER"):
        reader(["s3://bucket/x"])
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/index.json").write_text("[1]")
    with pytest.raises(ShardError, match=r"odd/index\.json is no readable index"):
        reader(urls([tmp_path / "odd"]), tmp_path / "stage")


def test_a_catalogue_is_held_against_its_fingerprint_and_tars_against_their_sizes(copies: list[Path],
                                                                                  tmp_path: Path) -> None:
    source, tar = copies[0], index.read(copies[0]).tars[1]
    before = (source / tar.name).read_bytes()
    (source / tar.name).write_bytes(before[:-512])
    with pytest.raises(ShardError, match=rf"file://.*{tar.name} has \d+ bytes, should have {tar.bytes}"):
        reader(urls([source]), tmp_path / "stage")
    (source / tar.name).unlink()
    with pytest.raises(ShardError, match=rf"file://.*{tar.name} is missing"):
        reader(urls([source]), tmp_path / "stage")
    (source / tar.name).write_bytes(before)

    flip(source / "samples.arrow", (source / "samples.arrow").stat().st_size // 2)
    assert reader(urls([source]), tmp_path / "stage").verify() is None, "what was fetched before is sound"
    with pytest.raises(ShardError, match=rf"file://{source}: index\.json or samples\.arrow changed"):
        reader(urls([source]), tmp_path / "new")
    assert not [path for path in (tmp_path / "new").rglob("*") if path.is_file() and path.name != "lock"]
    home = next((tmp_path / "stage").glob("*/samples.arrow"))
    flip(home, home.stat().st_size // 2)
    mine = reader(urls([copies[1], source]), tmp_path / "stage")
    with pytest.raises(ShardError, match=rf"{home.parent}: .* changed .* fetched anew from file://{source}"):
        mine.verify()


def test_an_index_from_elsewhere_does_not_choose_where_copies_go(copies: list[Path], tmp_path: Path) -> None:
    found = index.read(copies[0])
    for name, fingerprint in (("../../outside.tar", found.fingerprint), (".hidden.tar", found.fingerprint),
                              (found.tars[0].name, "../../outside")):
        tars = [replace(found.tars[0], name=name), *found.tars[1:]]
        index.write(copies[0], replace(found, tars=tars, fingerprint=fingerprint))
        (copies[0] / name).parent.mkdir(exist_ok=True)
        if not (copies[0] / name).exists():
            shutil.copy(folder_tar := copies[0] / found.tars[0].name, copies[0] / name)
            assert folder_tar.exists()
        with pytest.raises(ShardError, match=r"in its index\.json is no (name of a tar|fingerprint)"):
            reader([copies[0]], tmp_path / "stage")


# --- settings


def settings_of(*words: str) -> config.Train:
    return config.load(config.Train, str(ROOT / "configs/demo.yaml"), list(words))


def test_a_url_survives_the_config_and_is_refused_without_a_stage(folders: list[Path], tmp_path: Path) -> None:
    words = [f"run={tmp_path / 'run'}", f"data.shards=[s3://bucket/x,{folders[0]},file:///y/z]"]
    loaded = settings_of(*words, f"data.stage={tmp_path}")
    assert loaded.data.shards == ["s3://bucket/x", folders[0], "file:///y/z"]
    (tmp_path / "again.yaml").write_text(schema.dump(loaded))
    assert config.load(config.Train, str(tmp_path / "again.yaml"), []) == loaded
    for given, needles in (
            ([], ["data.shards[0]='s3://bucket/x' is a URL", "set data.stage=FOLDER"]),
            (["data.shards=[/nowhere]", f"data.stage={tmp_path}"],
             [f"data.shards[0]='/nowhere' does not exist (looked in {Path.cwd()}); write it with: ssl-dist shard "
              "CONFIG out=FOLDER"]),
            (["data.shards=[s3:/bucket/x]", f"data.stage={tmp_path}"], ["does not exist"]),
            (["data.shards=[null]", f"data.stage={tmp_path}"], ["data.shards[0]=None is nothing, needs a path"]),
            (["data.shards=[3]", f"data.stage={tmp_path}"], ["data.shards[0]=3 is a whole number, needs a path"]),
            (["data.stage_gb=0", f"data.stage={tmp_path}"], ["data.stage_gb=0", "out of range"])):
        with pytest.raises(schema.ConfigError) as refused:
            settings_of(*words, *given)
        assert all(needle in str(refused.value) for needle in needles), str(refused.value)


def test_a_stage_is_no_part_of_what_a_run_is(folders: list[Path], tmp_path: Path) -> None:
    words = [f"run={tmp_path / 'run'}", f"data.stage={tmp_path / 'stage'}"]
    identities = []
    for given in ([f"data.shards=[{','.join(map(str, folders))}]", "data.stage=null"],
                  [f"data.shards=[{','.join(map(str, folders))}]"], [f"data.shards=[{','.join(urls(folders))}]"]):
        settings = settings_of(*words, "data.split=", *given)
        identities.append(train._identity(settings, train._reader(settings)))
    assert identities[0] == identities[1] == identities[2]


def test_a_rehearsal_says_where_a_stage_cannot_hold_what_it_may(folders: list[Path], tmp_path: Path) -> None:
    def rehearsed(*words: str) -> dict[str, Any]:
        loaded = config.load_train(str(ROOT / "configs/demo.yaml"), [
            f"run={tmp_path / 'run'}", f"data.shards=[{folders[0]}]", "data.split=", "data.batch=8", "device=cpu",
            f"data.stage={tmp_path / 'stage'}", *words])
        return train.rehearse(loaded, 1)

    assert rehearsed("data.stage_gb=0.01")["stage, GB"] == "0.01"
    assert "but its disk has room for" in rehearsed("data.stage_gb=1e6")["stage, GB"]
    assert "stage, GB" not in rehearsed("data.stage=null")
    assert not (tmp_path / "stage").exists()


def test_a_rehearsal_refuses_a_stage_that_is_smaller_than_a_tar(folders: list[Path], tmp_path: Path) -> None:
    mine = reader(folders, tmp_path / "stage", 20_000)
    loaded = settings_of(f"run={tmp_path / 'run'}", f"data.shards=[{folders[0]}]")
    with pytest.raises(schema.ConfigError, match=r"data\.stage_gb=.* is less than one tar takes"):
        train._room(loaded, mine)


def test_a_stage_that_holds_the_shards_themselves_is_refused_before_it_removes_any(shard: Path, tmp_path: Path) -> None:
    own = tmp_path / "own" / index.read(shard).fingerprint[:16]
    shutil.copytree(shard, own)
    for folder in (tmp_path / "own", own):
        with pytest.raises(ShardError, match="holds the shard folder"):
            Reader([own], stage=Stage(folder, 10**9))
    assert sorted(path.name for path in own.iterdir()) == sorted(path.name for path in shard.iterdir())
