"""Every kind of damage to a shard folder is found and named; a sound folder has none."""

import hashlib
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from shards import check, index


@pytest.fixture
def copy(shard: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shard, tmp_path / "copy", ignore=shutil.ignore_patterns("overlays")))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def tar(folder: Path, number: int = 1) -> Path:
    return folder / f"painted-{number:06d}.tar"


def places(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as archive:
        return archive.getmembers()


def test_a_sound_folder_has_no_problems_and_every_tar_is_told(shard: Path) -> None:
    told: list[tuple[str, int, int]] = []
    assert check.check(shard, lambda *word: told.append(word)) == []
    tars = len(list(shard.glob("*.tar")))
    assert told == [("checking tars", number, tars) for number in range(tars + 1)]


def cut_at_a_member(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:places(path)[6].offset])


def cut_inside_data(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:places(path)[6].offset_data + 100])


def cut_at_the_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-512])


def a_tile_left_out(path: Path) -> None:
    """A tar that is sound in itself, as its idx would be, but not the one that was written."""
    gone = places(path)[4]
    whole = path.read_bytes()
    path.write_bytes(whole[:gone.offset] + whole[places(path)[6].offset:])


@pytest.mark.parametrize(("damage", "says"), [
    (cut_at_a_member, r"bytes, should be \d+: it was cut short or replaced"),
    (cut_inside_data, r"bytes, should be \d+: it was cut short or replaced"),
    (cut_at_the_end, r"bytes, should be \d+: it was cut short or replaced"),
    (a_tile_left_out, r"bytes, should be \d+: it was cut short or replaced"),
    (Path.unlink, "missing; restore it"),
    (lambda path: flip(path, places(path)[6].offset_data + 300), "changed in 1 images, first {key}; restore it"),
    (lambda path: flip(path, places(path)[7].offset_data + 3), "changed outside the images"),
    (lambda path: flip(path, places(path)[6].offset + 2), "changed outside the images"),
    (lambda path: flip(path, len(path.read_bytes()) - 1), "changed outside the images"),
    (lambda path: path.with_suffix(".idx").unlink(), r"painted-000001\.idx is missing or does not belong"),
    (lambda path: flip(path.with_suffix(".idx"), 40), r"painted-000001\.idx is missing or does not belong"),
    (lambda path: path.with_suffix(".idx").write_bytes(b"\xff\xfe"), r"painted-000001\.idx is missing or does not"),
    (lambda path: shutil.copy(tar(path.parent, 2).with_suffix(".idx"), path.with_suffix(".idx")), r"\.idx is missing"),
])
def test_damage_to_a_tar_is_one_line_that_names_it(copy: Path, damage: Callable[[Path], None], says: str) -> None:
    key = places(tar(copy))[6].name.removesuffix(".jpg")
    damage(tar(copy))
    (problem,) = check.check(copy)
    assert problem.startswith("painted-000001.tar: ")
    assert re.search(says.format(key=key), problem), problem


def test_two_damaged_tars_are_two_lines(copy: Path) -> None:
    tar(copy, 0).unlink()
    flip(tar(copy, 2), 600)
    assert [line.split(":")[0] for line in check.check(copy)] == ["painted-000000.tar", "painted-000002.tar"]


def test_a_tar_rewritten_with_a_digest_to_match_is_still_not_what_the_table_says(copy: Path) -> None:
    """Somebody repaired index.json by hand after leaving two tiles out."""
    a_tile_left_out(tar(copy))

    said = json.loads((copy / "index.json").read_text())
    whole = tar(copy).read_bytes()
    said["tars"][1].update(bytes=len(whole), sha256=hashlib.sha256(whole).hexdigest())
    (copy / "index.json").write_text(json.dumps(said))
    problems = "\n".join(check.check(copy))
    for named in ("do not fit the fingerprint", "samples, index.json counts", "samples.arrow has other samples",
                  "painted-000001.idx"):
        assert named in problems


def rewritten(folder: Path, change: Callable[[dict[str, list]], None]) -> None:
    path = folder / "samples.arrow"
    columns = pa.ipc.open_file(pa.OSFile(str(path))).read_all().to_pydict()
    change(columns)
    index.write_samples(folder, columns)


@pytest.mark.parametrize("column", ["key", "tar", "offset", "size", "crc32", "slide", "patient", "x", "label", "split",
                                    "mpp", "digest"])
def test_a_table_with_one_wrong_value_is_found_whatever_its_column(copy: Path, column: str) -> None:
    def change(columns: dict[str, list]) -> None:
        value = columns[column][50]
        other = {str: "other", bytes: bytes(16)}.get(type(value))
        columns[column][50] = value + 1 if other is None else other

    rewritten(copy, change)
    problems = check.check(copy)
    assert "samples.arrow" in problems[0] and "fingerprint" in problems[0]
    if column in ("key", "tar", "offset", "size"):
        assert any(line.startswith("painted-") and "samples.arrow has other samples" in line for line in problems)


def test_a_table_short_of_a_row_is_found(copy: Path) -> None:
    rewritten(copy, lambda columns: [values.pop() for values in columns.values()] and None)
    assert any("rows, index.json counts" in line for line in check.check(copy))


def test_any_flipped_bit_of_the_table_is_found(copy: Path) -> None:
    path = copy / "samples.arrow"
    whole = path.read_bytes()
    for at in range(3, len(whole), len(whole) // 60):
        flip(path, at)
        try:
            problems = check.check(copy)
        except index.ShardError as error:
            problems = [str(error)]
        assert any("samples.arrow" in line for line in problems), at
        path.write_bytes(whole)
    assert check.check(copy) == []


@pytest.mark.parametrize("keep", [0, 7, 5000, -1])
def test_a_table_cut_short_is_refused_by_name(copy: Path, keep: int) -> None:
    path = copy / "samples.arrow"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(index.ShardError, match=r"samples\.arrow cannot be read"):
        check.check(copy)


def test_any_changed_word_of_the_index_is_found(copy: Path) -> None:
    path = copy / "index.json"
    text = path.read_text()
    for old, new in (('"quality": 90', '"quality": 91'), ('"organ": "none"', '"organ": "node"'), ("tumour", "tumor"),
                     ('"samples": ', '"samples": 1'), ('"sha256": "', '"sha256": "0')):
        assert old in text
        path.write_text(text.replace(old, new, 1))
        assert "index.json and samples.arrow do not fit the fingerprint" in check.check(copy)[0], old
    path.write_text(text[:-100])
    with pytest.raises(index.ShardError, match=r"index\.json is not a readable index"):
        check.check(copy)


def test_a_hostile_table_does_not_read_beyond_a_tar(copy: Path) -> None:
    """Sizes and offsets out of a damaged table reach pread only where the tar has such bytes."""
    flip(tar(copy), places(tar(copy))[0].offset_data + 9)

    def change(columns: dict[str, list]) -> None:
        for row, number in enumerate(columns["tar"]):
            if number == 1:
                columns["offset"][row], columns["size"][row] = (-5, 2**31 - 1) if row % 2 else (2**62, -7)

    rewritten(copy, change)
    assert any(line.startswith("painted-000001.tar: its bytes changed in ") for line in check.check(copy))


def test_checking_reads_and_does_not_write(copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    check.check(copy)
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
