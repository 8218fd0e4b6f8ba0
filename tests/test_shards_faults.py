"""What must not happen to somebody's data: strangers' folders, silent losses, other bytes from the same files."""

import json
import os
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from shards import annotation, index, write
from shards.folder import StorageError
from shards.index import ShardError


def picture(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 40, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def few(tmp_path: Path) -> write.Settings:
    """Six pictures."""
    for number in range(6):
        picture(tmp_path / "in" / f"{number}.png", number)
    return write.Settings(source=tmp_path / "in", out=tmp_path / "out", dataset="few", kind="tiles", workers=1)


def rejected(shard: Path) -> list[dict]:
    return [json.loads(line) for line in (shard / "rejected.jsonl").read_text().splitlines()]


def everything(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != ".lock"}


def test_a_folder_that_is_somebody_elses_is_refused_and_left_as_it_is(few: write.Settings) -> None:
    (few.out / ".work").mkdir(parents=True)
    (few.out / ".work" / "thesis.txt").write_text("years of work")
    (few.out / "few-000000.tar").write_text("mine")
    before = everything(few.out)
    with pytest.raises(write.SettingsChanged, match=r"out=.*out holds '\.work' and is no shard folder") as caught:
        write.write(few)
    assert caught.value.exit_code == 2
    assert everything(few.out) == before


def test_pictures_that_cannot_be_decoded_leave_the_same_lines_in_every_run(few: write.Settings) -> None:
    (few.source / "empty.png").write_bytes(b"")
    (few.source / "text.jpg").write_bytes(b"no picture")
    (few.source / "cut.png").write_bytes((few.source / "0.png").read_bytes()[:300])
    again = replace(few, out=few.out.with_name("again"))
    assert write.write(few).rejected == write.write(again).rejected == {"unreadable": 3}
    assert everything(few.out) == everything(again.out)
    told = {line["file"]: line["detail"] for line in rejected(few.out)}
    assert told["empty.png"] == "it is empty" and told["text.jpg"] == "no picture that we know"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file: refusals of the disk cannot be had this way")
def test_a_file_that_may_not_be_read_counts_as_failed(few: write.Settings) -> None:
    (few.source / "2.png").chmod(0)
    with pytest.raises(ShardError, match=r"2\.png cannot be read: Permission denied.*max_failed=0"):
        write.write(few)
    assert write.write(replace(few, max_failed=1)).rejected == {"failed": 1}


def test_a_file_that_vanishes_counts_as_failed_and_the_others_are_written(few: write.Settings) -> None:
    vanishing = few.source / "2.png"

    def gone(*_: object) -> None:       # after the list was made, before the first is read
        vanishing.unlink(missing_ok=True)

    with pytest.raises(ShardError, match=r"2\.png cannot be read: No such file.*max_failed=0"):
        write.write(few, gone)
    picture(vanishing, 2)
    done = write.write(replace(few, max_failed=1, out=few.out.with_name("allowed")), gone)
    assert done.rejected == {"failed": 1} and done.samples == 5


def test_a_folder_published_with_failures_says_so_when_none_are_allowed_any_more(few: write.Settings) -> None:
    allowed = replace(few, max_failed=1, unit_memory_gb=0.25)
    Image.new("RGB", (9_400, 9_400)).save(few.source / "huge.png")
    assert write.write(allowed).rejected == {"failed": 1}
    assert write.write(allowed).untouched
    with pytest.raises(ShardError, match=r"is complete but for 1 that failed .*max_failed is 0 now"):
        write.write(replace(allowed, max_failed=0))


def bomb(path: Path, side: int) -> None:
    """A PNG of a few bytes that claims `side` squared pixels."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


@pytest.mark.parametrize("side", [9_500, 13_000, 60_000])
def test_a_bomb_is_unreadable_and_takes_no_memory(few: write.Settings, side: int) -> None:
    bomb(few.source / "bomb.png", side)
    done = write.write(replace(few, unit_memory_gb=0.3))
    assert done.rejected == {"unreadable": 1} and done.samples == 6


def test_a_jpeg_that_claims_to_be_huge_is_unreadable(few: write.Settings) -> None:
    Image.new("RGB", (16, 16)).save(few.source / "bomb.jpg")
    content = bytearray((few.source / "bomb.jpg").read_bytes())
    place = content.index(b"\xff\xc0") + 5
    content[place:place + 4] = struct.pack(">HH", 65_000, 65_000)
    (few.source / "bomb.jpg").write_bytes(bytes(content))
    assert write.write(replace(few, unit_memory_gb=0.3)).rejected == {"unreadable": 1}


def test_several_pictures_in_one_file_are_not_taken_for_one(few: write.Settings) -> None:
    pages = [Image.fromarray(np.full((40, 40, 3), 40 * number, np.uint8)) for number in range(3)]
    pages[0].save(few.source / "pages.tif", save_all=True, append_images=pages[1:])
    write.write(few)
    (line,) = rejected(few.out)
    assert (line["file"], line["reason"]) == ("pages.tif", "unreadable") and "holds 3 pictures" in line["detail"]


def test_labels_beside_an_array_are_part_of_what_was_sharded(tmp_path: Path) -> None:
    def labels(values: list) -> None:
        with h5py.File(tmp_path / "in" / "t_y.h5", "w") as file:
            file["y"] = values

    (tmp_path / "in").mkdir()
    with h5py.File(tmp_path / "in" / "t_x.h5", "w") as file:
        file["x"] = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), np.uint8)
    labels([b"fat", b"gland"] * 4)
    settings = write.Settings(source=tmp_path / "in", out=tmp_path / "out", dataset="t", kind="arrays", workers=1)
    write.write(settings)
    assert index.read(settings.out).datasets[0]["classes"] == ["fat", "gland"], "words, and not how Python shows bytes"
    labels([b"gland", b"fat"] * 4)
    with pytest.raises(write.SettingsChanged, match="the files of the source changed"):
        write.write(settings)
    labels([b"fat"] * 7)
    allowed = replace(settings, out=tmp_path / "allowed", max_failed=1)
    with pytest.raises(ShardError, match=r"not one tile .* was accepted: 1 failed"):
        write.write(allowed)
    with pytest.raises(ShardError, match=r"\(its images 0 to 7\) \[1 failed, max_failed=0\]"):
        write.write(replace(allowed, max_failed=0))
    for wrong in (np.zeros((8, 2, 2), int), np.zeros(9, int), np.zeros(8, float), np.int64(3)):
        labels(wrong)
        with pytest.raises(ShardError, match=r"t_y\.h5: array 'y' is .*not one whole number or word for each of 8"):
            write.write(replace(settings, out=tmp_path / "wrong"))


def test_half_a_job_does_not_go_on_over_files_that_were_written_again(few: write.Settings) -> None:
    write.write(replace(few, part="1/1"))
    path, size = few.source / "0.png", (few.source / "0.png").stat().st_size
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(1, 1))
    assert path.stat().st_size == size
    with pytest.raises(write.SettingsChanged, match=r"finished pieces .*source were written again.*delete"):
        write.write(few)


@pytest.mark.parametrize("text", [
    "[]", "null", "3", '"x"', '{"format": 1}', "[" * 100_000,
    *(json.dumps({"format": 1, "settings": {}, "fingerprint": "", "datasets": [], "tars": [], **wrong}) for wrong in (
        {"datasets": "x"}, {"datasets": [None]}, {"files": None}, {"files": []}, {"tars": [3]}, {"settings": 3},
        {"tars": [{"name": None, "samples": 1, "bytes": 1, "sha256": ""}]},
        {"tars": [{"name": "a", "samples": None, "bytes": 1, "sha256": ""}]})),
], ids=range(14))
def test_an_index_of_any_shape_is_refused_in_a_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ShardError, match=r"index\.json") as caught:
        index.read(tmp_path)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 3


def test_an_annotation_of_another_slide_is_refused_and_an_empty_one_is_not(tmp_path: Path) -> None:
    square = [[[5000, 5000], [6000, 5000], [6000, 6000], [5000, 6000], [5000, 5000]]]
    feature = {"properties": {"classification": {"name": "a"}}, "geometry": {"type": "Polygon", "coordinates": square}}
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [{"type": "Feature", **feature}]}))
    assert annotation.Annotation.read(path, (8000, 8000), 0.5).classes == ["a"]
    with pytest.raises(ShardError, match=r"none of its 1 regions lies on the slide of 4000 x 4000 pixels"):
        annotation.Annotation.read(path, (4000, 4000), 0.5)
    path.write_text(json.dumps({"type": "FeatureCollection", "features": []}))
    assert annotation.Annotation.read(path, (4000, 4000), 0.5).classes == []


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A disk of a few megabytes that can grow."""
    place = tmp_path / "disk"
    place.mkdir()

    def sized(megabytes: int) -> Path:
        options = f"{'remount,' if place.is_mount() else ''}size={megabytes}m"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True,
                              check=False)
        if done.returncode:
            pytest.skip(f"a small disk needs the right to mount one: {done.stderr.strip()}")
        return place

    yield sized
    if place.is_mount():
        subprocess.run(["umount", "--lazy", place], check=True)      # the test's own tracebacks keep maps open


def test_a_full_disk_says_how_much_is_needed_and_what_is_whole_stays(disk: Callable[[int], Path],
                                                                    tmp_path: Path) -> None:
    for number in range(3000):          # two units of work, of 6 and 3 megabytes
        path = tmp_path / "in" / f"{number:04d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (48, 48, 3), np.uint8)).save(path)
    settings = write.Settings(source=tmp_path / "in", out=disk(7) / "out", dataset="few", kind="tiles", workers=1)
    with pytest.raises(StorageError, match=r"the disk is full: free some space.*the whole job takes about [\d.]+ GiB"):
        write.write(settings)
    assert [path.name for path in (settings.out / ".work").glob("unit-*.json")] == ["unit-000000.json"]
    disk(16)
    with pytest.raises(StorageError, match=r"the tars take about [\d.]+ GiB more, [\d.]+ GiB are free") as refused:
        write.write(settings)
    assert refused.value.exit_code == 9 and not list(settings.out.glob("*.tar"))
    disk(200)
    done = write.write(settings)
    plain = replace(settings, out=tmp_path / "plain")
    assert write.write(plain).samples == done.samples == 3000
    assert everything(settings.out) == everything(plain.out)
