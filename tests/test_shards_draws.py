"""Draws as samples of a shard folder: read back as written, by other libraries as well, and refused where damaged."""

import json
import runpy
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from nvidia.dali import fn, pipeline_def
from safetensors.numpy import load, save

from shards import check, draws, index, show
from shards.draws import Draw
from shards.index import ShardError
from ssl_dist.data.reader import Reader

bags = runpy.run_path(str(Path(__file__).with_name("bags.py")))
DRAW = Draw(np.array([[0.5, -2.0], [3.25, 1.0], [0.0, 65504.0]]), np.array([[0, 4], [2, 1], [7, -3]]))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 slides in five tars. Not to be changed."""
    return bags["written"](tmp_path_factory.mktemp("draws") / "made")


def test_a_draw_comes_back_and_another_library_reads_it() -> None:
    content = draws.packed(DRAW)
    theirs = load(content)
    for found in (draws.unpacked(content), draws.unpacked(np.frombuffer(content, np.uint8)),
                  Draw(theirs["features"], theirs["cells"])):
        assert found.features_TD.dtype == np.float16 and np.array_equal(found.features_TD, DRAW.features_TD)
        assert np.array_equal(found.cell_T2, DRAW.cell_T2)
    assert len(content) < 2 * 6 + 4 * 6 + 200, "two bytes a number, four a coordinate, and a header"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -7e4])
def test_vectors_that_half_precision_cannot_hold_are_refused(bad: float) -> None:
    features = DRAW.features_TD.copy()
    features[1, 1] = bad
    with pytest.raises(ShardError, match="half precision"):
        draws.packed(Draw(features, DRAW.cell_T2))
    with pytest.raises(ShardError, match="0 tiles"):
        draws.packed(Draw(features[:0], DRAW.cell_T2[:0]))


HALF, CELLS = DRAW.features_TD.astype(np.float16), DRAW.cell_T2.astype(np.int32)


@pytest.mark.parametrize(("content", "said"), [
    (b"", "no draw"), (b"\xff\xd8\xff\xe0 a JPEG", "no draw"), (draws.packed(DRAW)[:-3], "no draw"),
    (save({"features": HALF}), "no draw .KeyError"),
    (save({"features": HALF.astype(np.float32), "cells": CELLS}), "float32 features"),
    (save({"features": HALF, "cells": CELLS[:2]}), r"cells \(2, 2\)"),
    (save({"features": HALF[0], "cells": CELLS}), r"features \(2,\)"),
    (save({"features": HALF * np.float16(np.nan), "cells": CELLS}), "no numbers")])
def test_what_is_no_draw_is_refused(content: bytes, said: str) -> None:
    with pytest.raises(ShardError, match=said):
        draws.unpacked(content)


def test_the_folder_is_sound_by_its_index_and_by_two_other_readers(home: Path) -> None:
    assert check.check(home, decode=True) == []
    found = index.read(home)
    table = index.samples(home)
    assert index.draws(found) == bags["DRAWS"] and table.num_rows == 23 * bags["DRAWS"] == found.samples
    reader = Reader([home], slides=True)
    ours = [draws.unpacked(content) for content in reader.read(reader.all_rows())]
    theirs = [load(sample["safetensors"]) for sample in webdataset.WebDataset(
        [str(home / tar.name) for tar in found.tars], shardshuffle=False, empty_check=False)]
    assert all(np.array_equal(one.features_TD, other["features"]) and np.array_equal(one.cell_T2, other["cells"])
               for one, other in zip(ours, theirs, strict=True))

    @pipeline_def(batch_size=4, num_threads=1, device_id=None)
    def pipe():
        return fn.readers.webdataset(paths=[str(home / tar.name) for tar in found.tars], ext=["safetensors"],
                                     index_paths=[str((home / tar.name).with_suffix(".idx")) for tar in found.tars])

    built = pipe()
    built.build()
    (batch,) = built.run()
    for row in range(4):
        assert bytes(np.array(batch[row])) == bytes(reader.read(np.array([row]))[0])


def test_all_draws_of_a_slide_lie_together_and_say_whose_they_are(home: Path) -> None:
    table, count = index.samples(home).to_pydict(), bags["DRAWS"]
    for first in range(0, len(table["slide"]), count):
        own = slice(first, first + count)
        assert len(set(table["slide"][own])) == len(set(table["tar"][own])) == len(set(table["patient"][own])) == 1
        assert [key.rpartition("-d")[2] for key in table["key"][own]] == [f"{number:04d}" for number in range(count)]
    with tarfile.open(home / "made-000001.tar") as tar:
        name = next(each for each in tar.getnames() if each.endswith(".json"))
        told = json.load(tar.extractfile(name))
    assert (told["slide"], told["patient"], told["size"], told["label"]) == ("s005", "p002", [12, 16], None)


def test_a_damaged_draw_is_found_and_a_lost_table_is_rebuilt(home: Path, tmp_path: Path) -> None:
    hurt = tmp_path / "hurt"
    shutil.copytree(home, hurt)
    before = (hurt / "samples.arrow").read_bytes()
    (hurt / "samples.arrow").unlink()
    done, left = check.mend(hurt)
    assert left == [] and (hurt / "samples.arrow").read_bytes() == before and done
    row = index.samples(hurt).slice(7, 1).to_pylist()[0]
    with (hurt / "made-000000.tar").open("r+b") as file:
        file.seek(row["offset"] + row["size"] - 2)
        file.write(b"\x7f\xff")
    (said,) = check.check(hurt)
    assert "made-000000.tar" in said and row["key"] in said
    (also,) = [line for line in check.check(hurt, decode=True) if "cannot be read" in line or "JSON says" in line]
    assert row["key"] in also


def test_draws_and_tiles_are_not_taken_for_each_other(home: Path, shard: Path) -> None:
    with pytest.raises(ShardError, match="holds draws of slides, and what is asked for are tiles"):
        Reader([home])
    with pytest.raises(ShardError, match="holds tiles, and what is asked for are draws"):
        Reader([shard], slides=True)
    with pytest.raises(ShardError, match="numbers and no pictures"):
        show.sheets(home)


def test_slides_are_counted_chosen_and_refused_as_wholes(home: Path, tmp_path: Path) -> None:
    reader = Reader([home], slides=True)
    assert reader.counts.tolist() == [5, 5, 5, 5, 3] and reader.sizes.tolist() == [23]
    rows = reader.rows(np.array([0, 4, 4]), np.array([3, 0, 2]))
    assert reader.column("slide", rows) == ["s003", "s020", "s022"]
    assert all(key.endswith("-d0000") for key in reader.column("key", rows))
    part = Reader([home], "test", slides=True)
    assert part.counts.tolist() == [2, 1, 1, 1, 1]
    assert part.column("slide", part.rows(np.array([0, 0, 4]), np.array([0, 1, 0]))) == ["s000", "s004", "s020"]
    some = Reader([home], only={"slide": ["s003", "s020"]}, slides=True)
    assert some.counts.sum() == 2
    (tmp_path / "block").write_text("s003-d0001\n")
    with pytest.raises(ShardError, match="choose whole slides"):
        Reader([home], block=tmp_path / "block", slides=True)
    other = bags["written"](tmp_path / "other", slides=4, draw_count=3, name="other")
    with pytest.raises(ShardError, match="hold 4, 3 draws"):
        Reader([home, other], slides=True)
