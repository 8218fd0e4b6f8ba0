"""Every kind of damage to a shard folder is found and named, and mended where it can be; a sound folder has none."""

import hashlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from shards import check, folder, index


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


def cut_inside_a_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:places(path)[6].offset + 140])


def zeroed_blocks(path: Path) -> None:
    """As a disk or a copy leaves them that failed: some kilobytes of zeros where tiles were."""
    whole = bytearray(path.read_bytes())
    first, last = places(path)[6].offset_data + 1024, places(path)[10].offset_data + 512
    whole[first:last] = bytes(last - first)
    path.write_bytes(whole)


def cut_at_the_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-512])


def a_tile_left_out(path: Path) -> None:
    """A tar that is sound in itself, as its idx would be, but not the one that was written."""
    gone = places(path)[4]
    whole = path.read_bytes()
    path.write_bytes(whole[:gone.offset] + whole[places(path)[6].offset:])


@pytest.mark.parametrize(("damage", "says"), [
    (cut_at_a_member, r"bytes, should be \d+: it was cut short or replaced .\d+ of \d+ images lie beyond its end."),
    (cut_inside_a_header, r"bytes, should be \d+: it was cut short or replaced .\d+ of \d+ images lie beyond its end."),
    (zeroed_blocks, "changed in 3 images, first {key}; restore it"),
    (cut_inside_data, r"bytes, should be \d+: it was cut short or replaced"),
    (cut_at_the_end, r"bytes, should be \d+: it was cut short or replaced"),
    (a_tile_left_out, r"bytes, should be \d+: it was cut short or replaced"),
    (Path.unlink, "missing; restore it, or delete index.json and painted-000001.tar and run the shard job again"),
    (lambda path: flip(path, places(path)[6].offset_data + 300), "changed in 1 images, first {key}; restore it"),
    (lambda path: flip(path, places(path)[7].offset_data + 3), "changed outside the images"),
    (lambda path: flip(path, places(path)[6].offset + 2), "changed outside the images .no header that we write at"),
    (lambda path: flip(path, len(path.read_bytes()) - 1), "changed outside the images"),
    (lambda path: path.with_suffix(".idx").unlink(),
     r"painted-000001\.idx is missing or does not belong to this tar; `ssl-dist check --mend` writes it anew"),
    (lambda path: path.with_suffix(".idx").write_text("v1.2 1000000000\n"), r"painted-000001\.idx is missing or does"),
    (lambda path: path.with_suffix(".idx").write_bytes(bytes(10**6)), r"painted-000001\.idx is missing or does not"),
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
    """Somebody repaired index.json by hand after leaving a tile out."""
    a_tile_left_out(tar(copy))
    said = json.loads((copy / "index.json").read_text())
    whole = tar(copy).read_bytes()
    said["tars"][1].update(bytes=len(whole), sha256=hashlib.sha256(whole).hexdigest())
    (copy / "index.json").write_text(json.dumps(said))
    problems = "\n".join(check.check(copy))
    for named in ("do not fit the fingerprint", "samples, index.json counts", "samples.arrow has other samples",
                  "painted-000001.idx"):
        assert named in problems
    assert {line.split(":")[0] for line in problems.splitlines()} == {"samples.arrow", "painted-000001.tar"}


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
        assert any("samples.arrow" in line for line in check.check(copy)), at
        path.write_bytes(whole)
    assert check.check(copy) == []


@pytest.mark.parametrize("keep", [0, 7, 5000, -1, None])
def test_a_table_cut_short_is_named_and_the_tars_are_checked_all_the_same(copy: Path, keep: int | None) -> None:
    path = copy / "samples.arrow"
    path.unlink() if keep is None else path.write_bytes(path.read_bytes()[:keep])
    flip(tar(copy), 600)
    first, second = check.check(copy)
    assert re.search(r"samples\.arrow cannot be read .*`ssl-dist check --mend` rebuilds it from the tars", first)
    assert second.startswith("painted-000001.tar: its bytes changed since it was written; restore it")


def test_any_changed_word_of_the_index_is_found(copy: Path) -> None:
    path = copy / "index.json"
    text = path.read_text()
    for old, new in (('"quality": 90', '"quality": 91'), ('"organ": "none"', '"organ": "node"'), ("tumour", "tumor"),
                     ('"samples": ', '"samples": 1'), ('"sha256": "', '"sha256": "0')):
        assert old in text
        path.write_text(text.replace(old, new, 1))
        assert "samples.arrow: it and index.json do not fit the fingerprint" in check.check(copy)[0], old
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


# --- the tars in themselves, whatever the digests say


def agree(shard: Path) -> None:
    """Makes index.json say of the tars what they are now: whoever did the damage wrote the digests as well."""
    found = index.read(shard)
    tars = [replace(each, bytes=(shard / each.name).stat().st_size,
                    sha256=hashlib.sha256((shard / each.name).read_bytes()).hexdigest()) for each in found.tars]
    found = replace(found, tars=tars)
    index.write(shard, replace(found, fingerprint=index.fingerprint(shard, found)))


def picture(number: int, size: tuple[int, int] = (32, 24), kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def about(**changed: object) -> bytes:
    return json.dumps({"dataset": "d", "slide": "s", "patient": "p", "x": 0, "y": 0, "mpp": None, "size": [32, 24],
                       "label": None, "class": None, "split": "", "stain": "H&E", "organ": "none", "encoding": "e",
                       "digest": "00" * 16, **changed}).encode()


def built(shard: Path, *tars: list[tuple[str, bytes]]) -> Path:
    """A shard folder of tars with these members, by Python's own tarfile; index, table and idx say what they hold."""
    shard.mkdir()
    rows: dict[str, list] = {name: [] for name in index.SCHEMA.names}
    listed = []
    for number, members in enumerate(tars):
        path = shard / f"d-{number:06d}.tar"
        with path.open("wb") as out, tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT,
                                                  bufsize=512) as archive:
            for name, data in members:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        whole = path.read_bytes()
        path.write_bytes(whole[:len(whole.rstrip(b"\0")) // 512 * 512 + 512 + 1024])     # tarfile fills up to 10 KB
        samples: list[list] = []
        for member, (name, data) in zip(places(path), members, strict=True):
            key, _, extension = name.partition(".")
            if extension in ("jpg", "png"):
                samples.append([])
                for column, value in {"key": key, "tar": number, "offset": member.offset_data, "size": member.size,
                                      "crc32": zlib.crc32(data), "dataset": "d", "slide": "s", "patient": "p", "x": 0,
                                      "y": 0, "mpp": float("nan"), "label": -1, "split": "", "stain": "H&E",
                                      "organ": "none", "encoding": "e", "digest": bytes(16)}.items():
                    rows[column].append(value)
            samples[-1].append((extension, member.offset_data, member.size, name))
        path.with_suffix(".idx").write_text(index.idx(samples))
        listed.append(index.Tar(path.name, len(samples), 0, ""))
    index.write_samples(shard, rows)
    index.write(shard, index.Index([{"name": "d", "classes": []}], {}, "", listed))
    agree(shard)
    return shard


def sample(key: str, image: bytes | None = None, **changed: object) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", picture(0) if image is None else image), (f"{key}.json", about(**changed))]


def test_a_folder_that_tarfile_made_is_as_sound_as_ours(tmp_path: Path) -> None:
    masks = [("c.instances.png", picture(0, kind="PNG")), ("c.types.png", picture(1, kind="PNG"))]
    shard = built(tmp_path / "d", sample("a") + sample("b"), [*sample("c"), *masks, *sample("d")],
                  [("e.png", picture(3, kind="PNG")), ("e.json", about())])
    assert check.check(shard, decode=True) == []


@pytest.mark.parametrize(("damage", "says"), [
    (cut_at_a_member, "no header that we write at byte .* and not the end of a tar"),
    (cut_inside_a_header, "no header that we write at byte"), (cut_inside_data, "it ends within .*jpg"),
    (cut_at_the_end, "not the end of a tar"), (zeroed_blocks, "not the end of a tar|no header"),
    (lambda path: path.write_bytes(path.read_bytes() + bytes(512)), "not the end of a tar"),
    (lambda path: path.write_bytes(b""), "not the end of a tar"),
    (lambda path: path.write_bytes(b"GIF89a" * 1000), "not the end of a tar"),
])
def test_a_damaged_tar_with_a_digest_to_match_is_no_tar_of_samples(copy: Path, damage: Callable[[Path], None],
                                                                    says: str) -> None:
    damage(tar(copy))
    agree(copy)
    (problem,) = check.check(copy)
    assert re.match(f"painted-000001.tar: it is no tar of samples: .*({says}).*; restore it", problem), problem


def test_any_changed_byte_of_any_header_is_found_without_a_digest(copy: Path) -> None:
    whole = tar(copy).read_bytes()
    headers = [member.offset for member in places(tar(copy))]
    rng = np.random.default_rng(0)
    for at in [*(rng.choice(headers) + rng.integers(0, 512) for _ in range(300)),
               *(headers[0] + place for place in range(512))]:
        changed = bytearray(whole)
        changed[at] ^= 1 << int(rng.integers(0, 8))
        tar(copy).write_bytes(changed)
        with tar(copy).open("rb") as handle:
            _, wrong = check._samples(handle.fileno(), len(whole))
        assert wrong or at % 512 in range(154, 156), f"byte {at}"      # how a checksum ends says nothing


def test_no_damage_to_a_tar_raises_or_goes_on_for_ever(copy: Path) -> None:
    whole = tar(copy).read_bytes()
    rng = np.random.default_rng(1)
    for _ in range(300):
        changed = bytearray(whole[:rng.integers(1, len(whole))] if rng.random() < 0.3 else whole)
        for header in rng.choice(len(changed) // 512, 20):
            changed[header * 512 + rng.integers(0, 156)] = rng.integers(256)
        tar(copy).write_bytes(changed)
        with tar(copy).open("rb") as handle:
            samples, wrong = check._samples(handle.fileno(), len(changed))
        assert wrong and all(start + size <= len(changed) for each in samples for _, start, size, _ in each)


@pytest.mark.parametrize(("members", "says"), [
    ([("a.jpg", b"1")], "a has the members jpg, and not an image and its JSON"),
    ([("a.json", b"1"), ("a.jpg", b"1")], "a has the members json, jpg, and not"),
    ([*sample("a"), ("a.jpg", b"1")], "a has the members jpg, and not"),
    ([("a.jpg", b"1"), ("a.json", b"{}"), ("a.txt", b"")], "a has the members jpg, json, txt, and not"),
    ([*sample("a"), ("A.jpg", b"1")], r"a member named b'A\.jpg' at byte"),
    ([("../a.jpg", b"1")], r"a member named b'\.\./a\.jpg' at byte 0"),
    ([("x" * 81 + ".jpg", b"1")], "a member named b'xxx"),
])
def test_members_that_are_no_samples_are_named(tmp_path: Path, members: list, says: str) -> None:
    shard = built(tmp_path / "d", sample("z"))
    made = built(tmp_path / "made", [("k.jpg", b"")] + members)
    whole = (made / "d-000000.tar").read_bytes()[512:]      # the first member is there for the table only
    (shard / "d-000000.tar").write_bytes(whole)
    agree(shard)
    (problem,) = check.check(shard)
    assert re.search(f"d-000000.tar: it is no tar of samples: {says}", problem), problem


def test_links_and_long_names_are_no_members(tmp_path: Path) -> None:
    shard = built(tmp_path / "d", sample("z"))
    for change, kind in (({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, tarfile.USTAR_FORMAT),
                         ({"pax_headers": {"comment": "b"}}, tarfile.PAX_FORMAT), ({"type": tarfile.DIRTYPE}, 0)):
        member = tarfile.TarInfo("a.jpg")
        for name, value in change.items():
            setattr(member, name, value)
        with tarfile.open(shard / "d-000000.tar", "w", format=kind) as archive:
            archive.addfile(member)
        agree(shard)
        (problem,) = check.check(shard)
        assert "it is no tar of samples: no header that we write at byte 0" in problem


def test_a_key_that_two_samples_have_is_named_with_their_tars(tmp_path: Path) -> None:
    shard = built(tmp_path / "d", sample("a") + sample("b"), sample("c") + sample("a"), sample("a"),
                  sample("d") + sample("e") + sample("d"))
    assert sorted(check.check(shard, workers=3)) == [
        "d-000000.tar: 3 samples have the key a, in d-000000.tar, d-000001.tar, d-000002.tar; delete index.json and "
        "run the shard job again",
        "d-000003.tar: 2 samples have the key d, in d-000003.tar; delete index.json and run the shard job again"]
    twins = built(tmp_path / "neighbours", sample("a") + sample("a"))
    assert "2 samples have the key a" in check.check(twins)[0]
    many = built(tmp_path / "many", *([item for n in range(30) for item in sample(f"k{n}")] for _ in range(2)))
    problems = check.check(many)
    assert len(problems) == 21
    assert "10 more keys belong to more than one sample" in problems[-1]


def test_any_number_of_threads_says_the_same(copy: Path) -> None:
    flip(tar(copy, 0), 600)
    tar(copy, 1).with_suffix(".idx").unlink()
    cut_inside_data(tar(copy, 2))
    shutil.copy(tar(copy, 1), copy / "other.tar")
    expected = check.check(copy, workers=1)
    assert len(expected) == 4
    for workers in (0, 2, 7):
        assert check.check(copy, workers=workers) == expected


def test_a_tar_larger_than_memory_should_be_takes_no_memory(tmp_path: Path) -> None:
    """One image of half a gibibyte of zeros, sparse on disk, in a process that measures itself."""
    shard = built(tmp_path / "d", sample("a"))
    path, size = shard / "d-000000.tar", 2**29
    member = tarfile.TarInfo("a.jpg")
    member.size = size
    rest = path.read_bytes()[places(path)[1].offset:]
    with path.open("wb") as out:
        out.write(member.tobuf(tarfile.USTAR_FORMAT))
        out.seek(512 + size)
        out.write(rest)
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    found = index.read(shard)
    index.write(shard, replace(found, tars=[replace(found.tars[0], bytes=path.stat().st_size, sha256=digest)]))
    # VmHWM, for ru_maxrss remembers how large the process was that started this one.
    code = ("import re, sys; from pathlib import Path; from shards import check\n"
            "print(len(check.check(Path(sys.argv[1]))), re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status')"
            ".read_text())[1])")
    done = subprocess.run([sys.executable, "-c", code, str(shard)], capture_output=True, text=True, check=True)
    problems, peak = map(int, done.stdout.split())
    assert problems == 3, "fingerprint, table and idx are not what they were"
    assert peak < 300_000


# --- what lies beside the tars


def test_what_the_index_does_not_know_is_named(copy: Path) -> None:
    for name in ("left.tar", "left.idx", ".painted-000009.tar.tmp", ".samples.arrow.31.tmp", "notes.txt"):
        (copy / name).write_bytes(b"1")
    (copy / ".work").mkdir()
    problems = check.check(copy)
    assert [line.split(":")[0] for line in problems] == [".painted-000009.tar.tmp", ".samples.arrow.31.tmp", ".work",
                                                         "left.idx", "left.tar"]
    for line in problems:
        said = "whoever reads *." if line.startswith("left") else "`ssl-dist check --mend` removes it"
        assert said in line


def test_files_that_the_index_promises_are_held_against_it(copy: Path) -> None:
    promised = index.read(copy).files
    assert "rejected.jsonl" in promised
    for name in promised:
        whole = (copy / name).read_bytes()
        flip(copy / name, len(whole) // 2)
        assert [line.split(";")[0] for line in check.check(copy)] == [f"{name}: it changed since it was written"]
        (copy / name).unlink()
        assert [line.split(";")[0] for line in check.check(copy)] == [f"{name}: missing"]
        (copy / name).write_bytes(whole)
    assert check.check(copy) == []


def test_names_in_an_index_do_not_lead_out_of_the_folder(copy: Path, tmp_path: Path) -> None:
    shutil.copy(tar(copy), tmp_path / "outside.tar")
    found = index.read(copy)
    for name in ("../outside.tar", str(tmp_path / "outside.tar"), "overlays/../../outside.tar", "..", ""):
        index.write(copy, replace(found, tars=[found.tars[0], replace(found.tars[1], name=name), *found.tars[2:]],
                                  files={"../copy/samples.arrow": ""}))
        done, left = check.mend(copy)
        assert any(line.startswith(f"{name}: missing") for line in left), name
        assert done == [] and not list(tmp_path.glob("*.idx"))


# --- decoding


def test_decoding_finds_nothing_in_a_sound_folder_and_tells_every_tar(shard: Path) -> None:
    told: list[tuple[str, int, int]] = []
    assert check.check(shard, lambda *word: told.append(word), decode=True, workers=2) == []
    tars = len(list(shard.glob("*.tar")))
    assert [word for word in told if word[0] == "decoding tiles"] == [
        ("decoding tiles", number, tars) for number in range(tars + 1)]


def claims(image: bytes, width: int, height: int) -> bytes:
    """A JPEG that says it is as large."""
    at = image.index(b"\xff\xc0") + 5
    return image[:at] + struct.pack(">HH", height, width) + image[at + 4:]


@pytest.mark.parametrize(("members", "says"), [
    (sample("bad", picture(1)[:300]), r"bad\.jpg cannot be decoded \(.*(T|t)runcated"),
    (sample("bad", b""), r"bad\.jpg cannot be decoded \(cannot identify image file"),
    (sample("bad", picture(1, kind="PNG")), r"bad\.jpg cannot be decoded \(cannot identify image file"),
    (sample("bad", b"\xff\xd8\xff\xe0" + bytes(3000)), r"bad\.jpg cannot be decoded"),
    (sample("bad", size=[32, 32]), r"bad\.jpg has 32 x 24 pixels, its JSON says 32 x 32"),
    (sample("bad", claims(picture(1), 60_000, 60_000)), r"bad\.jpg (cannot be decoded|has 60000 x 60000 pixels)"),
    (sample("bad", claims(picture(1), 60_000, 60_000), size=[60_000, 60_000]), r"bad\.jpg cannot be decoded .*bomb"),
    (sample("bad", claims(picture(1), 10_000, 10_000), size=[10_000, 10_000]), r"bad\.jpg cannot be decoded .*bomb"),
    ([("bad.jpg", picture(1)), ("bad.json", b"{")], r"bad\.json cannot be read"),
    ([("bad.jpg", picture(1)), ("bad.json", b"{}")], r"bad\.json cannot be read"),
    ([*sample("bad"), ("bad.types.png", picture(1, kind="PNG")[:-30])], r"bad\.types\.png cannot be decoded"),
    ([*sample("bad"), ("bad.instances.png", picture(1, (8, 8), "PNG"))], r"bad\.instances\.png has 8 x 8 pixels"),
])
def test_a_tile_that_cannot_be_decoded_is_named_although_every_digest_fits(tmp_path: Path, members: list,
                                                                            says: str) -> None:
    shard = built(tmp_path / "d", sample("a"), sample("b") + members + sample("c"))
    assert check.check(shard) == []
    (problem,) = check.check(shard, decode=True, workers=2)
    assert re.match(rf"d-000001\.tar: {says}.*; delete index\.json and run the shard job again$", problem), problem


# --- mending


def content(shard: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in shard.iterdir() if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("damage", [
    lambda path: [each.unlink() for each in path.glob("*.idx")],
    lambda path: tar(path).with_suffix(".idx").write_bytes(b"\xff" * 99),
    lambda path: (path / "samples.arrow").unlink(),
    lambda path: (path / "samples.arrow").write_bytes((path / "samples.arrow").read_bytes()[:-100]),
    lambda path: flip(path / "samples.arrow", 2000),
    lambda path: rewritten(path, lambda columns: columns["label"].__setitem__(5, 1 - columns["label"][5])),
    lambda path: rewritten(path, lambda columns: [values.reverse() for values in columns.values()] and None),
    lambda path: rewritten(path, lambda columns: [values.pop() for values in columns.values()] and None),
    lambda path: [(path / name).write_text("") for name in (".a.tar.tmp", ".index.json.12.tmp")],
    lambda path: [(path / ".work").mkdir(), (path / ".work/settings.json").write_text("{}"),
                  (path / "samples.arrow").unlink(), tar(path, 2).with_suffix(".idx").unlink()],
])
def test_what_the_tars_can_tell_is_mended_to_the_byte(shard: Path, copy: Path,
                                                       damage: Callable[[Path], object]) -> None:
    damage(copy)
    before = check.check(copy)
    assert before and all("--mend" in line for line in before)
    done, left = check.mend(copy)
    assert done and left == []
    assert content(copy) == content(shard)
    assert check.check(copy) == [] and check.mend(copy) == ([], [])


@pytest.mark.parametrize("change", [('"quality": 90', '"quality": 91'), ("tumour", "tumor")])
def test_an_index_that_changed_is_told_from_a_table_that_did(copy: Path, change: tuple[str, str]) -> None:
    path = copy / "index.json"
    path.write_text(path.read_text().replace(*change))
    before = content(copy)
    done, left = check.mend(copy)
    assert done == [] and content(copy) == before
    assert any("it is what the tars say: it was index.json that changed; restore that" in line for line in left)
    (copy / "samples.arrow").unlink()
    done, left = check.mend(copy)
    assert done == []
    assert any("does not fit the fingerprint either: index.json changed as well" in line for line in left)
    assert not (copy / "samples.arrow").exists() and not (copy / ".mend").exists()


def test_a_damaged_tar_is_not_mended_but_the_rest_is(copy: Path) -> None:
    flip(tar(copy, 1), 600)
    tar(copy, 2).with_suffix(".idx").unlink()
    (copy / "samples.arrow").unlink()
    before = content(copy)
    done, left = check.mend(copy)
    assert done == ["painted-000002.tar: its idx is written anew"]
    assert {name: data for name, data in content(copy).items() if name != "painted-000002.idx"} == before
    said = "\n".join(left)
    assert "painted-000001.tar: its bytes changed" in said
    assert "restore it, or delete index.json and painted-000001.tar and run the shard job again" in said
    assert "samples.arrow: it can be rebuilt when the tars named here are restored" in said


def test_strangers_are_left_where_they_are(copy: Path) -> None:
    (copy / "mine.tar").write_bytes(b"mine")
    done, left = check.mend(copy)
    assert done == [] and len(left) == 1 and left[0].startswith("mine.tar: not in index.json")
    assert (copy / "mine.tar").read_bytes() == b"mine"


def test_tars_of_an_older_version_cannot_tell_the_table(tmp_path: Path) -> None:
    older = json.loads(about())
    del older["digest"]
    shard = built(tmp_path / "d", sample("a"), [("b.jpg", picture(1)), ("b.json", json.dumps(older).encode())])
    assert check.check(shard) == []
    (shard / "samples.arrow").unlink()
    done, left = check.mend(shard)
    assert done == []
    assert "b.json in d-000001.tar does not say all that it needs (KeyError('digest'))" in left[0]


def test_mending_needs_the_folder_for_itself(copy: Path, tmp_path: Path) -> None:
    (copy / "samples.arrow").unlink()
    with folder.hold(copy, ".lock"), pytest.raises(folder.FolderInUse, match="is being written by process"):
        check.mend(copy)
    assert not (copy / "samples.arrow").exists()
    with pytest.raises(index.ShardError, match="no shard folder at"):
        check.mend(tmp_path / "mistyped")
    assert not (tmp_path / "mistyped").exists()


def test_the_verb_lists_mends_and_ends_with_the_code_of_what_is_left(copy: Path) -> None:
    def verb(*options: str) -> tuple[int, str]:
        done = subprocess.run([sys.executable, "-m", "ssl_dist", "check", str(copy), *options], capture_output=True,
                              text=True, check=False, env={**os.environ, "COLUMNS": "200"})
        return done.returncode, done.stdout

    tar(copy).with_suffix(".idx").unlink()
    (copy / "mine.tar").write_bytes(b"mine")
    code, said = verb()
    assert code == 3 and "painted-000001.idx is missing" in said and said.endswith(": 2 problems\n")
    code, said = verb("--mend", "--decode", "--workers", "2")
    assert code == 3 and said.startswith("mended: painted-000001.tar: its idx is written anew\nmine.tar: not in")
    (copy / "mine.tar").unlink()
    assert verb() == (0, f"{copy}: sound\n")
