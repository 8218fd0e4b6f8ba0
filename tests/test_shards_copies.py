"""Equal tiles: which one stays, what is said of the others, and that no memory limit changes a byte of it."""

import hashlib
import itertools
import json
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from shards import check, copies, cut, folder, index, sources, spool, tar, tiles, write
from shards.sources import Source

LABELLED = "^(?P<label>[^/]*)/"


def rows(shard: Path) -> list[dict]:
    return pa.ipc.open_file(pa.OSFile(str(shard / "samples.arrow"))).read_all().to_pylist()


def rejected(shard: Path) -> list[dict]:
    return [json.loads(line) for line in (shard / "rejected.jsonl").read_text().splitlines()]


def digests(shard: Path) -> dict[str, str]:
    return {str(path.relative_to(shard)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(shard.rglob("*")) if path.is_file() and path.name != ".lock"}


def picture(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 24, 3), np.uint8)).save(path)
    return path


def settings_of(tmp_path: Path, **told: object) -> write.Settings:
    return write.Settings(**{"source": tmp_path / "in", "out": tmp_path / "out", "dataset": "a", "kind": "tiles",
                             "workers": 1, "names": LABELLED, **told})


def classes(shard: Path) -> list[str]:
    return json.loads((shard / "index.json").read_text())["datasets"][0]["classes"]


def labels(shard: Path) -> dict[str, str]:
    names = classes(shard)
    return {row["key"]: names[row["label"]] if row["label"] >= 0 else "" for row in rows(shard)}


def by_place(settings: write.Settings, keys: list[str]) -> list[str]:
    """Keys in the order of the tars, as the hash of what they are says."""
    text = {key: f"{settings.seed}|{settings.dataset}|{key}".encode() for key in keys}
    return sorted(keys, key=lambda key: int.from_bytes(hashlib.blake2b(text[key], digest_size=8).digest()))


# --- equal tiles


def test_of_equal_tiles_with_equal_labels_the_first_in_order_is_kept_and_named_by_the_others(tmp_path: Path) -> None:
    for seed in range(6):
        for number in range(seed % 3 + 1):      # one, two or three of each
            picture(tmp_path / "in" / "x" / f"p{seed}-{number}.png", seed)
    for seed in (0, 3):                         # and one with two names for its files' bytes: another compression
        image = Image.open(tmp_path / "in" / "x" / f"p{seed}-0.png")
        image.save(tmp_path / "in" / "x" / f"p{seed}-again.bmp")
    settings = settings_of(tmp_path)
    done = write.write(settings)
    groups = [[f"x-p{seed}-{number}" for number in range(seed % 3 + 1)] + [f"x-p{seed}-again"] * (seed in (0, 3))
              for seed in range(6)]
    kept = {by_place(settings, keys)[0]: keys for keys in groups}
    assert set(labels(settings.out)) == set(kept) and set(labels(settings.out).values()) == {"x"}
    lines = rejected(settings.out)
    assert {(line["slide"], line["reason"], line["detail"]) for line in lines} == {
        (key.removeprefix("x-"), "duplicate", f"of {first}") for first, keys in kept.items() for key in keys
        if key != first}
    assert done.rejected == {"duplicate": len(lines)} and len(lines) == sum(map(len, groups)) - 6 == 8
    assert all((line["x"], line["y"], line["mpp"]) == (0, 0, None) for line in lines)
    assert check.check(settings.out) == []


def test_equal_tiles_with_different_labels_are_all_left_out_and_the_labels_named(tmp_path: Path) -> None:
    for label, seeds in (("benign", (0, 1, 2)), ("tumour", (0, 3)), ("stroma", (0, 1))):
        for seed in seeds:
            picture(tmp_path / "in" / label / f"{seed}.png", seed)
    settings = settings_of(tmp_path)
    done = write.write(settings)
    assert labels(settings.out) == {"benign-2": "benign", "tumour-3": "tumour"}
    assert classes(settings.out) == ["benign", "tumour"], "stroma has no tile left"
    lines = rejected(settings.out)
    assert Counter((line["slide"], line["reason"], line["detail"]) for line in lines) == {
        ("0", "conflict", "the same picture is labelled benign, stroma, tumour"): 3,
        ("1", "conflict", "the same picture is labelled benign, stroma"): 2}
    assert done.rejected == {"conflict": 5}


def test_conflicts_first_keeps_the_first_in_order_with_its_label(tmp_path: Path) -> None:
    for seed, label in itertools.product(range(12), ("b", "a", "c")):
        picture(tmp_path / "in" / label / f"{seed}.png", seed)
    settings = settings_of(tmp_path, conflicts="first")
    write.write(settings)
    first = {by_place(settings, [f"{label}-{seed}" for label in "abc"])[0] for seed in range(12)}
    assert labels(settings.out) == {key: key[0] for key in first}
    assert len({key[0] for key in first}) > 1, "this test would prove nothing"
    assert Counter(line["reason"] for line in rejected(settings.out)) == {"duplicate": 24}


def test_of_a_labelled_and_unlabelled_copies_the_labelled_stays(tmp_path: Path) -> None:
    for seed in range(12):
        for name in ("one", "two"):
            picture(tmp_path / "in" / f"{name}{seed}.png", seed)
        picture(tmp_path / "in" / "grade" / f"{seed}.png", seed)
    for conflicts in ("drop", "first"):
        settings = settings_of(tmp_path, names="^((?P<label>grade)/)?", conflicts=conflicts, out=tmp_path / conflicts)
        write.write(settings)
        assert labels(settings.out) == {f"grade-{seed}": "grade" for seed in range(12)}
        assert Counter(line["detail"] for line in rejected(settings.out)) == {
            f"of grade-{seed}": 2 for seed in range(12)}


def test_duplicates_keep_keeps_all_with_all_their_labels(tmp_path: Path) -> None:
    for seed, label in itertools.product(range(3), "ab"):
        picture(tmp_path / "in" / label / f"{seed}.png", seed)
    settings = settings_of(tmp_path, duplicates="keep")
    done = write.write(settings)
    assert done.samples == 6 and done.rejected == {} and rejected(settings.out) == []
    assert labels(settings.out) == {f"{label}-{seed}": label for seed, label in itertools.product(range(3), "ab")}


def test_equal_squares_of_slides_are_found_and_listed_where_they_lie(slides: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("one", "two"):
        shutil.copy(slides / "P00-S0.svs", tmp_path / "in" / f"{name}.svs")
    settings = write.Settings(tmp_path / "in", tmp_path / "out", "a", size=256, mpp=0.5, workers=2)
    done = write.write(settings)
    listed = [line for line in rejected(settings.out) if line["reason"] == "duplicate"]
    assert done.samples == len(listed) > 5
    kept = {(row["x"], row["y"]): row for row in rows(settings.out)}
    for line in listed:
        row = kept[line["x"], line["y"]]
        assert {row["slide"], line["slide"]} == {"one", "two"} and line["file"] == f"{line['slide']}.svs"
        assert line["detail"] == f"of {row['key']}" and line["mpp"] == pytest.approx(row["mpp"])


# --- against other folders


def test_what_another_folder_holds_is_listed_and_not_written_again(tmp_path: Path) -> None:
    for seed in range(8):
        picture(tmp_path / "test" / "t" / f"{seed}.png", seed)
    for seed in range(4, 14):
        picture(tmp_path / "in" / "x" / f"{seed}.png", seed)
    picture(tmp_path / "in" / "x" / "copy.png", 5)
    write.write(settings_of(tmp_path, source=tmp_path / "test", out=tmp_path / "published", dataset="test"))
    settings = settings_of(tmp_path, against=[tmp_path / "published"])
    done = write.write(settings)
    assert {row["slide"] for row in rows(settings.out)} == {str(seed) for seed in range(8, 14)}
    lines = rejected(settings.out)
    assert {(line["slide"], line["detail"]) for line in lines} == {
        (name, "is in published already") for name in ("4", "5", "6", "7", "copy")}
    assert done.rejected == {"duplicate": 5}
    assert write.write(settings).untouched
    with pytest.raises(write.SettingsChanged, match="against"):
        write.write(replace(settings, against=[]))


def test_all_folders_count_that_are_named_also_where_two_have_one_name(tmp_path: Path) -> None:
    """`train/shards` and `valid/shards` are an ordinary way to lie on a disk."""
    for split, seeds in (("train", (0, 1, 2)), ("valid", (3, 4, 5))):
        for seed in seeds:
            picture(tmp_path / split / "in" / "t" / f"{seed}.png", seed)
        write.write(settings_of(tmp_path, source=tmp_path / split / "in", out=tmp_path / split / "shards"))
    for seed in range(8):
        picture(tmp_path / "in" / "x" / f"{seed}.png", seed)
    settings = settings_of(tmp_path, against=[tmp_path / "train" / "shards", tmp_path / "valid" / "shards"])
    write.write(settings)
    assert {row["slide"] for row in rows(settings.out)} == {"6", "7"}


def test_what_another_folder_holds_is_left_out_also_where_copies_within_are_kept(tmp_path: Path) -> None:
    """`duplicates` speaks of the equal tiles of this set, `against` of those of another, such as the test set."""
    for seed in range(3):
        picture(tmp_path / "test" / "t" / f"{seed}.png", seed)
        picture(tmp_path / "in" / "x" / f"{seed}.png", seed + 2)
        picture(tmp_path / "in" / "x" / f"{seed}-again.png", seed + 2)
    write.write(settings_of(tmp_path, source=tmp_path / "test", out=tmp_path / "published"))
    settings = settings_of(tmp_path, against=[tmp_path / "published"], duplicates="keep")
    write.write(settings)
    assert {row["slide"] for row in rows(settings.out)} == {"1", "1-again", "2", "2-again"}


def test_against_a_folder_that_is_not_finished_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "x" / "0.png", 0)
    (tmp_path / "other").mkdir()
    with pytest.raises(index.ShardError, match=r"other has no index\.json"):
        write.write(settings_of(tmp_path, against=[tmp_path / "other"]))


# --- digests as they may fall


def unit(work: Path, number: int, known: list[tuple[str, bytes, str]]) -> spool.Unit:
    """A unit by hand: key, digest and label of each of its tiles."""
    work.mkdir(exist_ok=True)
    writer = spool.Writer(work, number, cut=False)
    for key, digest, label in known:
        source = Source(f"/s/{key}.png", key, key)
        writer.add(tiles.Tile(key, source, 0, 0, float("nan"), (8, 8), label, b"image", "source", digest, (1., 1., 0.)),
                   int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()), b"{}")
    writer.close()
    return spool.Unit(work, number)


def begun(out: Path) -> Path:
    """A folder that a job has begun to write: by its lock it is known as ours."""
    (folder.make(out) / ".lock").touch()
    return out


def settled(known: list[tuple[str, bytes, str]], conflicts: str) -> tuple[set[str], dict[str, str]]:
    """Kept keys, and why the others are not, by plain dictionaries."""
    groups: dict[bytes, list[tuple[str, str]]] = {}
    for key, digest, label in sorted(known, key=lambda one: hashlib.blake2b(one[0].encode(), digest_size=8).digest()):
        groups.setdefault(digest, []).append((key, label))
    kept, gone = set(), {}
    for group in groups.values():
        said = {label for _, label in group if label}
        if len(said) > 1 and conflicts == "drop":
            gone |= dict.fromkeys([key for key, _ in group], "conflict")
            continue
        first = ([key for key, label in group if label] + [key for key, _ in group])[0]
        kept.add(first)
        gone |= dict.fromkeys([key for key, _ in group if key != first], "duplicate")
    return kept, gone


EDGES = [bytes(16), b"\1" + bytes(15), bytes(15) + b"\1", b"\1\0\1" + bytes(13), b"\1\0\1" + bytes(12) + b"\2",
         b"a" * 16, b"a" * 15 + b"\0", b"a" * 14 + b"\0\0", b"a" * 14 + b"\0a", b"\0" + b"a" * 15, b"\xff" * 16,
         b"\xff" * 15 + b"\0", b"\0" * 8 + b"\xff" * 8, b"\x80" + bytes(14) + b"\x80", b"\n" * 16, b" " * 16,
         b" " * 15 + b"\0"]


@pytest.mark.parametrize("rows_at_once", [1 << 20, 8, 1])
@pytest.mark.parametrize("conflicts", ["drop", "first"])
def test_digests_that_differ_only_in_zeros_are_different_however_many_parts_they_are_taken_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_at_once: int, conflicts: str
) -> None:
    monkeypatch.setattr(spool, "ROWS_AT_ONCE", rows_at_once)
    random_of = random.Random(rows_at_once)
    for attempt in range(4):
        many = attempt > 0
        known = [(f"k{attempt}-{number}", random_of.choice(EDGES) if many else EDGES[number],
                  random_of.choice(["", "", "x", "y"] if many else ["x"])) for number in range(60 if many else 17)]
        units = {number: unit(tmp_path / str(attempt), number, known[number::3]) for number in range(3)}
        settings = settings_of(tmp_path, conflicts=conflicts)
        keep, _, text = copies.kept(units, settings)
        lines = list(map(json.loads, text.splitlines()))
        kept = {key.decode() for number, each in units.items() for key in each.rows["key"][keep[number]].tolist()}
        truth, gone = settled(known, conflicts)
        assert kept == truth
        assert {line["slide"]: line["reason"] for line in lines} == gone
        assert many or len(kept) == 17


@pytest.mark.parametrize("rows_at_once", [1 << 20, 2])
def test_digests_of_another_folder_are_told_apart_by_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                               rows_at_once: int) -> None:
    monkeypatch.setattr(spool, "ROWS_AT_ONCE", rows_at_once)
    random_of = random.Random(0)
    for attempt in range(6):
        there = random_of.sample(EDGES, attempt * 3)
        other = tmp_path / f"other{attempt}"
        other.mkdir()
        plain = {"key": "k", "tar": 0, "offset": 0, "size": 1, "crc32": 0, "dataset": "o", "slide": "s",
                 "patient": "", "x": 0, "y": 0, "mpp": 1.0, "label": -1, "split": "", "stain": "", "organ": "",
                 "encoding": "source"}
        index.write_samples(other, {**{name: [value] * len(there) for name, value in plain.items()}, "digest": there})
        known = [(f"k{number}", digest, "") for number, digest in enumerate(EDGES)]
        units = {number: unit(tmp_path / f"work{attempt}", number, known[number::2]) for number in range(2)}
        keep, _, text = copies.kept(units, settings_of(tmp_path, against=[other]))
        lines = list(map(json.loads, text.splitlines()))
        kept = {bytes(row["digest"]) for number, each in units.items() for row in each.rows[keep[number]]}
        assert kept == set(EDGES) - set(there)
        assert {line["detail"] for line in lines} <= {f"is in other{attempt} already"} and len(lines) == len(there)


# --- little memory, the same bytes


def test_rows_and_tiles_taken_in_small_pieces_give_the_same_bytes(
    shard: Path, settings: write.Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every unit is cut here with tiny runs, the tars are written here from tiny reads; then a job publishes them."""
    monkeypatch.setattr(spool, "RUN_BYTES", 20_000)
    monkeypatch.setattr(spool, "ROWS_AT_ONCE", 16)
    monkeypatch.setattr(tar, "BYTES_AT_ONCE", 5_000)
    mine = replace(settings, out=tmp_path / "out")
    units = sources.units(mine, sources.sources(mine))
    work = write._work(begun(mine.out), write._note(*write._decided(mine, units)))
    for number, each in enumerate(units):
        cut.cut(each, number, mine, work, {})
        known = json.loads(spool.path(work, number, "json").read_text())
        assert len(known["runs"]) > 2, "this test would prove nothing"
    opened = {number: spool.Unit(work, number) for number in range(len(units))}
    keep, *_ = copies.kept(opened, mine)
    words = write._words(opened, keep)
    bounds = np.linspace(0, len(rows(shard)), len(list(shard.glob("*.tar"))) + 1).round().astype(int).tolist()
    for number, chunk in enumerate(write._chunks(opened, keep, write._codes(opened, words), bounds)):
        tar.write(mine.out / f"painted-{number:06d}.tar", work, chunk)
    told: list[tuple] = []
    written = {path: path.stat().st_mtime_ns for path in mine.out.glob("*.tar")}
    assert len(written) == len(bounds) - 1 > 1
    write.write(mine, lambda *word: told.append(word))
    assert told[0] == ("cutting slides", 4, 4), "what was cut here is what is published"
    assert {path: path.stat().st_mtime_ns for path in mine.out.glob("*.tar")} == written
    assert digests(mine.out) == digests(shard)


def test_copies_and_conflicts_are_the_same_in_small_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_of = random.Random(0)
    for number in range(150):
        picture(tmp_path / "in" / random_of.choice("xxxy") / f"{number:03d}.png", random_of.randrange(60))
    settings = settings_of(tmp_path, tar_samples=13)
    write.write(settings)
    assert {line["reason"] for line in rejected(settings.out)} == {"duplicate", "conflict"}
    monkeypatch.setattr(spool, "ROWS_AT_ONCE", 4)
    write.write(replace(settings, out=tmp_path / "again"))
    assert digests(tmp_path / "again") == digests(settings.out)


def test_keys_that_two_tiles_share_are_found_at_the_border_of_two_pieces_too(tmp_path: Path,
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        picture(tmp_path / "in" / f"{number}.png", number)
    picture(tmp_path / "in" / "17.bmp", 99)
    for rows_at_once in (1, 2, 3, 1 << 20):
        monkeypatch.setattr(spool, "ROWS_AT_ONCE", rows_at_once)
        with pytest.raises(index.ShardError, match=r"17\.bmp and .*17\.png would be one to whoever trains"):
            write.write(settings_of(tmp_path, names=""))


def test_a_spool_that_changed_on_disk_is_noticed_before_a_tar_is_written_from_it(tmp_path: Path) -> None:
    for number in range(5):
        picture(tmp_path / "in" / "x" / f"{number}.png", number)
    settings = settings_of(tmp_path)
    units = sources.units(settings, sources.sources(settings))
    work = write._work(begun(settings.out), write._note(*write._decided(settings, units)))
    cut.cut(units[0], 0, settings, work, {})
    spooled = spool.path(work, 0, "tiles")
    content = bytearray(spooled.read_bytes())
    content[100] ^= 1
    folder.write(spooled, bytes(content))
    with pytest.raises(index.ShardError, match=r"unit-000000\.tiles changed on disk; delete"):
        write.write(settings)
    assert not (settings.out / "index.json").exists()


def test_a_second_job_of_this_process_into_the_same_place_tells_of_its_own_slides(tmp_path: Path) -> None:
    for number in range(6):
        picture(tmp_path / "in" / f"A{number % 2}_{number}.png", number)
    settings = settings_of(tmp_path, names="")
    write.write(settings)
    assert {row["patient"] for row in rows(settings.out)} == {""}
    shutil.rmtree(settings.out)
    write.write(replace(settings, names="(?P<patient>A.)_(?P<slide>.)"))
    assert {(row["slide"], row["patient"]) for row in rows(settings.out)} == {
        (str(number), f"A{number % 2}") for number in range(6)}
    assert check.check(settings.out) == []
