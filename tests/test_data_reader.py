"""The catalogue and the bytes of shard folders, against tarfile and plain lists."""

import json
import os
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from shards import index
from shards.index import ShardError, Tar
from ssl_dist.data.reader import Reader

SPLITS = ("train", "test", "")


def pack(folder: Path, *, tars: int, name: str = "made", seed: int = 0) -> list[dict]:
    """A shard folder of noise, packed by tarfile: every fifth tar empty; returns a dict a sample."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    rows, listed = [], []
    for number in range(tars):
        path = folder / f"{name}-{number:06d}.tar"
        for member in range(int(rng.integers(1, 10)) if number % 5 else 0):
            rows.append({"key": f"{name}_{number}_{member}", "tar": number, "split": SPLITS[int(rng.integers(3))],
                         "bytes": rng.bytes(int(rng.integers(1, 2000)))})
        mine = [row for row in rows if row["tar"] == number]
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in mine:
                (folder / "member").write_bytes(row["bytes"])
                tar.add(folder / "member", f"{row['key']}.jpg")
        with tarfile.open(path) as tar:
            for row in mine:
                row["offset"] = tar.getmember(f"{row['key']}.jpg").offset_data
        listed.append(Tar(path.name, len(mine), path.stat().st_size, "not looked at"))
    (folder / "member").unlink(missing_ok=True)
    count = len(rows)
    index.write_samples(folder, {
        "key": [row["key"] for row in rows], "tar": [row["tar"] for row in rows],
        "offset": [row["offset"] for row in rows], "size": [len(row["bytes"]) for row in rows],
        "crc32": [zlib.crc32(row["bytes"]) for row in rows], "dataset": [name] * count,
        "slide": [f"S{number}" for number in range(count)], "patient": ["P0"] * count,
        "x": range(count), "y": range(count), "mpp": [0.5] * count, "label": [-1] * count,
        "split": [row["split"] for row in rows], "stain": ["H&E"] * count, "organ": [""] * count,
        "encoding": ["source"] * count, "digest": [bytes(16)] * count})
    index.write(folder, index.Index([{"name": name, "classes": []}], {}, f"the fingerprint of {name}", listed))
    return rows


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[dict]]:
    """Three folders as one catalogue, and its rows as plain dicts."""
    root = tmp_path_factory.mktemp("reader")
    paths, rows = [root / "a", root / "b", root / "c"], []
    for number, (path, tars) in enumerate(zip(paths, (7, 1, 12), strict=True)):
        rows += pack(path, tars=tars, name=f"set{number}", seed=number)
    return paths, rows


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as handle:
        handle.seek(place)
        byte = handle.read(1)[0]
        handle.seek(place)
        handle.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("split", ["", "train", "test"])
def test_several_folders_are_one_catalogue_and_a_split_is_its_rows(folders: tuple, split: str) -> None:
    paths, rows = folders
    reader = Reader(paths, split)
    wanted = [number for number, row in enumerate(rows) if row["split"] == split or not split]
    assert reader.all_rows().tolist() == wanted
    assert reader.column("key", reader.all_rows()) == [rows[number]["key"] for number in wanted]
    assert reader.counts.sum() == len(wanted)
    assert len(reader.counts) == len(reader.tars) == 20
    assert reader.splits() == ["", "test", "train"]
    reader.close()


@pytest.mark.parametrize("split", ["", "train", "test"])
def test_a_member_of_a_tar_within_a_split_is_found_in_the_catalogue(folders: tuple, split: str) -> None:
    paths, rows = folders
    reader = Reader(paths, split)
    expected = {}
    for number, row in enumerate(rows):
        if row["split"] == split or not split:
            path = paths[int(row["key"][3])] / f"{row['key'][:4]}-{row['tar']:06d}.tar"
            expected.setdefault(path, []).append(number)
    for tar, path in enumerate(reader.tars):
        members = expected.get(path, [])
        assert reader.counts[tar] == len(members)
        assert reader.rows(np.full(len(members), tar), np.arange(len(members))).tolist() == members
    reader.close()


def test_the_bytes_are_what_tarfile_reads(folders: tuple) -> None:
    paths, rows = folders
    reader = Reader(paths)
    content = {}
    for path in paths:
        for tar in path.glob("*.tar"):
            with tarfile.open(tar) as opened:
                content |= {member.name: opened.extractfile(member).read() for member in opened}
    order = np.random.default_rng(0).permutation(len(rows))
    for number, image in zip(order, reader.read(order), strict=True):
        assert image.dtype == np.uint8
        assert image.tobytes() == content[f"{rows[number]['key']}.jpg"]
    reader.close()


def test_the_writers_own_folder_reads_as_tarfile_reads_it(shard: Path) -> None:
    reader = Reader([shard], "test")
    rows = reader.all_rows()[::5]
    keys, places = reader.column("key", rows), reader.column("tar", rows)
    for key, place, image in zip(keys, places, reader.read(rows), strict=True):
        with tarfile.open(shard / reader.indexes[0].tars[place].name) as tar:
            assert tar.extractfile(f"{key}.jpg").read() == image.tobytes()
            assert json.load(tar.extractfile(f"{key}.json"))["split"] == "test"
    reader.close()


def test_a_column_comes_back_in_the_order_of_the_rows_asked_for(folders: tuple) -> None:
    paths, rows = folders
    reader = Reader(paths)
    asked = np.array([len(rows) - 1, 0, 5, 5, len(rows) // 2])
    assert reader.column("split", asked) == [rows[number]["split"] for number in asked]
    assert reader.column("size", asked) == [len(rows[number]["bytes"]) for number in asked]
    reader.close()


def test_more_tars_than_may_be_open_are_read_all_the_same(folders: tuple) -> None:
    paths, rows = folders
    reader = Reader(paths)
    reader._open_limit = 3
    for number in [*range(len(rows)), *reversed(range(len(rows)))]:
        assert reader.read(np.array([number]))[0].tobytes() == rows[number]["bytes"]
        assert len(reader._open) <= 3
    reader.close()
    assert not reader._open


def test_a_flipped_byte_is_refused_with_the_tar_and_the_key(tmp_path: Path) -> None:
    rows = pack(tmp_path / "shards", tars=4)
    victim = next(number for number, row in enumerate(rows) if row["tar"] == 2)
    path = tmp_path / "shards/made-000002.tar"
    flip(path, rows[victim]["offset"] + len(rows[victim]["bytes"]) // 2)
    reader = Reader([tmp_path / "shards"])
    with pytest.raises(ShardError) as refused:
        reader.read(np.arange(len(rows)))
    assert str(path) in str(refused.value)
    assert repr(rows[victim]["key"]) in str(refused.value)
    assert refused.value.exit_code == 3
    others = np.array([number for number in range(len(rows)) if number != victim])
    assert [image.tobytes() for image in reader.read(others)] == [rows[number]["bytes"] for number in others]
    reader.close()


def test_a_tar_cut_short_while_it_is_read_is_refused(tmp_path: Path) -> None:
    rows = pack(tmp_path / "shards", tars=4)
    reader = Reader([tmp_path / "shards"])
    reader.read(np.arange(len(rows)))
    with (tmp_path / "shards/made-000003.tar").open("r+b") as handle:
        handle.truncate(rows[-1]["offset"] + 1 if len(rows[-1]["bytes"]) > 1 else rows[-1]["offset"])
    with pytest.raises(ShardError, match=r"made-000003\.tar changed on disk"):
        reader.read(np.array([len(rows) - 1]))
    reader.close()


@pytest.mark.parametrize(("harm", "said"), [
    (lambda tar: tar.unlink(), "is missing"),
    (lambda tar: tar.write_bytes(tar.read_bytes()[:-512]), "bytes, should have"),
    (lambda tar: tar.write_bytes(tar.read_bytes() + bytes(512)), "bytes, should have"),
    (lambda tar: tar.write_bytes(b""), "has 0 bytes"),
], ids=["missing", "cut", "longer", "empty"])
def test_a_tar_that_is_not_what_the_index_says_is_refused_at_opening(tmp_path: Path, harm: object, said: str) -> None:
    pack(tmp_path / "shards", tars=4)
    harm(tmp_path / "shards/made-000002.tar")       # type: ignore[operator]
    with pytest.raises(ShardError, match=r"made-000002\.tar") as refused:
        Reader([tmp_path / "shards"])
    assert said in str(refused.value)
    assert "ssl-dist check" in str(refused.value)


def test_a_tar_that_vanishes_after_opening_is_named(tmp_path: Path) -> None:
    rows = pack(tmp_path / "shards", tars=4)
    reader = Reader([tmp_path / "shards"])
    (tmp_path / "shards/made-000003.tar").unlink()
    with pytest.raises(ShardError, match=r"made-000003\.tar cannot be opened"):
        reader.read(np.array([len(rows) - 1]))
    reader.close()


def test_a_table_with_other_rows_than_the_index_counts_is_refused(tmp_path: Path) -> None:
    pack(tmp_path / "shards", tars=4, seed=1)
    pack(tmp_path / "other", tars=3, seed=1)
    shutil.copy(tmp_path / "other/samples.arrow", tmp_path / "shards/samples.arrow")
    with pytest.raises(ShardError, match=r"samples\.arrow has \d+ rows, index\.json counts \d+"):
        Reader([tmp_path / "shards"])


def test_a_split_that_does_not_exist_names_those_that_do(folders: tuple) -> None:
    with pytest.raises(ShardError) as refused:
        Reader(folders[0], "valid")
    for word in ("'valid'", "'train'", "'test'"):
        assert word in str(refused.value)
    assert refused.value.exit_code == 3


def test_an_unfinished_folder_is_refused(tmp_path: Path) -> None:
    pack(tmp_path / "shards", tars=2)
    (tmp_path / "shards/index.json").unlink()
    with pytest.raises(ShardError, match=r"no index\.json"):
        Reader([tmp_path / "shards"])
    with pytest.raises(ShardError, match="no shard folder"):
        Reader([tmp_path / "nowhere"])


# --- choosing


@pytest.fixture(scope="module")
def chosen_from(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[dict]]:
    """Two folders of two datasets whose tiles differ in every column that they can be chosen by."""
    root, paths, rows = tmp_path_factory.mktemp("chosen"), [], []
    for number, classes in enumerate((["fat", "tumour"], ["gland", "tumour"])):
        path = root / f"set{number}"
        mine = pack(path, tars=6, name=f"set{number}", seed=number)
        rng, count = np.random.default_rng(number), len(mine)
        table = index.samples(path).to_pydict()
        table |= {"mpp": rng.choice([0.25, 0.499, 0.5, 1.0], count).tolist(),
                  "label": rng.choice([-1, 0, 1], count).tolist(),
                  "organ": rng.choice(["breast", "colon"], count).tolist(),
                  "stain": rng.choice(["H&E", "IHC"], count).tolist(),
                  "patient": rng.choice(["a", "b", "c"], count).tolist()}
        index.write_samples(path, table)
        found = index.read(path)
        card = {"name": f"set{number}", "classes": classes}
        index.write(path, index.Index([card], {}, found.fingerprint, found.tars))
        words = [{**{name: column[place] for name, column in table.items()},
                  "label": [*classes, ""][table["label"][place]]} for place in range(count)]
        paths, rows = [*paths, path], rows + words
    return paths, rows


@pytest.mark.parametrize("only", [
    {"organ": ["breast"]}, {"label": ["tumour"]}, {"label": ["gland"]}, {"label": ["fat", "gland"], "organ": ["colon"]},
    {"dataset": ["set1"]}, {"patient": ["a", "c"], "stain": ["IHC"]}, {"mpp": [0.5]}, {"mpp": [0.25, 1.0]},
], ids=str)
@pytest.mark.parametrize("split", ["", "train"])
def test_tiles_are_chosen_by_the_words_of_their_columns(chosen_from: tuple, only: dict, split: str) -> None:
    paths, rows = chosen_from
    reader = Reader(paths, split, only)

    def fits(row: dict) -> bool:
        near = {"mpp": lambda value, words: any(abs(value - word) < 0.01 * word for word in words)}
        return all(near.get(name, lambda value, words: value in words)(row[name], words)
                   for name, words in only.items()) and (not split or row["split"] == split)

    wanted = [number for number, row in enumerate(rows) if fits(row)]
    assert reader.all_rows().tolist() == wanted and wanted
    assert reader.counts.sum() == len(wanted)
    assert reader.sizes.tolist() == [sum(rows[number]["dataset"] == name for number in wanted)
                                     for name in reader.datasets]
    located = [reader.rows(np.full(count, tar), np.arange(count)).tolist() for tar, count in enumerate(reader.counts)]
    assert [row for rows in located for row in rows] == wanted
    for tar, of in enumerate(reader.dataset_of.tolist()):
        assert {rows[number]["dataset"] for number in located[tar]} <= {reader.datasets[of]}
    reader.close()


def test_blocked_keys_are_left_out_and_unknown_ones_do_no_harm(chosen_from: tuple, tmp_path: Path) -> None:
    paths, rows = chosen_from
    gone = [row["key"] for row in rows[::3]]
    (tmp_path / "block.txt").write_text("\n".join([*gone, "nobody", ""]))
    reader = Reader(paths, block=tmp_path / "block.txt")
    assert reader.column("key", reader.all_rows()) == [row["key"] for row in rows if row["key"] not in gone]
    # Datasets may share a key: with a dataset's name before it, it is one tile's.
    (tmp_path / "block.txt").write_text("\n".join(f"set1/{row['key']}" for row in rows))
    one = Reader(paths, block=tmp_path / "block.txt")
    assert set(one.column("dataset", one.all_rows())) == {"set0"}
    assert len(one.all_rows()) == sum(row["dataset"] == "set0" for row in rows)


def test_a_choice_that_leaves_nothing_says_what_there_is(chosen_from: tuple) -> None:
    paths, _ = chosen_from
    with pytest.raises(ShardError, match=r"no tile of organ 'brest' .*the organs there: 'breast', 'colon'"):
        Reader(paths, only={"label": ["fat"], "organ": ["brest"]})
    with pytest.raises(ShardError, match=r"no tile of mpp 2.0 .*0\.25"):
        Reader(paths, only={"mpp": [2.0]})
    with pytest.raises(ShardError, match=r"no tile .* is of all of \{'label': \['fat'\], 'dataset': \['set1'\]\}"):
        Reader(paths, only={"label": ["fat"], "dataset": ["set1"]})


@pytest.mark.parametrize("readers", [1, 2, 8])
def test_many_readers_read_what_one_reads_in_the_same_order(readers: int, shard: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shard, copy)
    one, many = Reader([shard]), Reader([copy], readers=readers)
    rows = np.random.default_rng(0).permutation(one.all_rows())
    assert len(rows) > 4 * 8
    expected = one.read(rows)
    assert all(map(np.array_equal, many.read(rows), expected))
    _, tar, offset = many.place(int(rows[20]))
    with tar.open("r+b") as handle:
        handle.seek(offset + 30)
        handle.write(b"\0\1\2\3")
    found = many.fetch(rows)
    assert found[20] is None
    assert all(np.array_equal(found[place], image) for place, image in enumerate(expected) if place != 20)
    many._open_limit = 2        # fewer than the tars of a batch
    again = many.fetch(rows)
    assert [image is None for image in again] == [image is None for image in found]
    many.close()
    one.close()


def test_a_disk_that_fails_is_the_disks_trouble_and_not_the_tiles(shard: Path, tmp_path: Path) -> None:
    """A directory in a descriptor's place: reading it fails as a dying disk does, with an error of the system."""
    for readers in (1, 4):
        mine = Reader([shard], readers=readers)
        rows = mine.all_rows()
        mine.fetch(rows)
        for tar, descriptor in list(mine._open.items()):
            os.close(descriptor)
            mine._open[tar] = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(OSError, match="Is a directory"):
            mine.fetch(rows)
        mine.close()


def test_columns_are_read_where_they_lie_in_the_map(shard: Path) -> None:
    """What is copied is copied on every rank: of 32 million rows, 650 MB each."""
    reader = Reader([shard])
    for name, mine in zip(("tar", "offset", "size", "crc32"), reader._places[0], strict=True):
        (chunk,) = reader.tables[0][name].chunks
        assert mine.__array_interface__["data"][0] == chunk.buffers()[1].address
    codes = index.column(reader.tables[0], "slide").indices
    assert codes.buffers()[1].address == reader.tables[0]["slide"].chunks[0].indices.buffers()[1].address
    reader.close()


def test_a_block_file_that_is_none_is_named(shard: Path, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(bytes(range(128, 256)))
    for path in (tmp_path / "binary", tmp_path):
        with pytest.raises(ShardError, match=f"data.block={path} is no list of keys"):
            Reader([shard], block=path)
