"""The contract of a shard folder, held against tarfile, GNU tar, webdataset, DALI's reader and its own wds2idx."""

import csv
import hashlib
import io
import json
import re
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import openslide
import pyarrow as pa
import pytest
import wds2idx
from PIL import Image

from shards import index, write

WORD = "dictionary<values=string, indices={}, ordered=0>"
COLUMNS = {     # contract 4.1, in its order
    "key": "string", "tar": "int32", "offset": "int64", "size": "int32", "crc32": "uint32",
    "dataset": WORD.format("int16"), "slide": WORD.format("int32"), "patient": WORD.format("int32"), "x": "int32",
    "y": "int32", "mpp": "float", "label": "int32", "split": WORD.format("int8"), "stain": WORD.format("int8"),
    "organ": WORD.format("int8"), "encoding": WORD.format("int8"), "digest": "fixed_size_binary[16]",
}


def content(shard: Path) -> dict:
    return json.loads((shard / "index.json").read_text())


def rows(shard: Path) -> list[dict]:
    return pa.ipc.open_file(pa.OSFile(str(shard / "samples.arrow"))).read_all().to_pylist()


def members(shard: Path) -> list[tuple[str, int, bytes, int]]:
    """Name, place, bytes and number of the tar of everything in the tars, as Python's own reader finds it."""
    found = []
    for number, tar in enumerate(content(shard)["tars"]):
        with tarfile.open(shard / tar["name"]) as archive:
            for member in archive:
                found.append((member.name, member.offset_data, archive.extractfile(member).read(), number))
    return found


# --- index.json


def test_the_index_says_what_lies_in_the_folder(shard: Path, settings: write.Settings) -> None:
    found = content(shard)
    assert set(found) == {"format", "datasets", "settings", "fingerprint", "tars", "files"}
    assert found["format"] == 1
    assert sorted(path.name for path in shard.glob("*.tar")) == [tar["name"] for tar in found["tars"]]
    assert len(found["tars"]) > 2
    for number, tar in enumerate(found["tars"]):
        assert set(tar) == {"name", "samples", "bytes", "sha256"}
        assert tar["name"] == f"painted-{number:06d}.tar"
        whole = (shard / tar["name"]).read_bytes()
        assert (tar["bytes"], tar["sha256"]) == (len(whole), hashlib.sha256(whole).hexdigest())
    (card,) = found["datasets"]
    table = rows(shard)
    labels = {row["label"] for row in table} - {-1}
    assert {**card, "classes": len(card["classes"])} == {
        "name": "painted", "organ": "none", "stain": "H&E", "licence": "Apache-2.0", "about": "",
        "classes": len(labels), "samples": len(table), "slides": 4, "patients": 4, "sites": 0,
        "rejected": Counter(json.loads(line)["reason"] for line in (shard / "rejected.jsonl").read_text().splitlines())}
    assert card["classes"] == sorted(card["classes"])
    assert labels == set(range(len(card["classes"])))
    said = {name: found["settings"][name] for name in ("size", "mpp", "seed", "tar_samples", "labels", "quality")}
    assert said == {name: getattr(settings, name) for name in said}
    assert not {"out", "workers", "max_failed"} & set(found["settings"]), "what does not decide the bytes is no setting"


def test_what_the_reader_returns_is_what_the_file_says(shard: Path) -> None:
    found, said = index.read(shard), content(shard)
    assert found.samples == len(rows(shard)) == sum(tar["samples"] for tar in said["tars"])
    assert [vars(tar) for tar in found.tars] == said["tars"]
    assert found.settings == said["settings"]


@pytest.mark.parametrize(("text", "says"), [
    (None, "has no index.json.*run the same `ssl-dist shard` command again"),
    ("{", "not a readable index"), ("[1]", "not a readable index"), ("", "not a readable index"),
    ('{"format": 1}', "not a readable index"), ('{"format": 2}', "has format 2, this version reads 1"),
    ('{"format": 1, "datasets": [], "settings": {}, "fingerprint": "", "tars": [{"nam": 1}]}', "not a readable index"),
    (b"\xff\xfe", "not a readable index"),
])
def test_an_index_that_cannot_be_used_is_refused_with_a_reason(tmp_path: Path, text: str | bytes | None,
                                                                says: str) -> None:
    if text is not None:
        (tmp_path / "index.json").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(index.ShardError, match=says) as caught:
        index.read(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_folder_that_is_not_there_is_refused_with_the_place_we_looked_in(tmp_path: Path) -> None:
    with pytest.raises(index.ShardError, match=f"no shard folder at nowhere .looked in {re.escape(str(Path.cwd()))}"):
        index.read(Path("nowhere"))
    (tmp_path / "samples.arrow").write_bytes(b"ARROW1")
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(index.ShardError, match=r"samples\.arrow cannot be read"):
            index.samples(folder)


# --- samples.arrow


def test_the_table_has_the_columns_of_the_contract_in_one_uncompressed_batch_without_nulls(shard: Path) -> None:
    with pa.OSFile(str(shard / "samples.arrow")) as handle:
        reader = pa.ipc.open_file(handle)
        assert reader.num_record_batches == 1
        batch = reader.get_batch(0)
    assert {field.name: str(field.type) for field in batch.schema} == COLUMNS
    assert list(batch.schema.names) == list(COLUMNS)
    batch.validate(full=True)
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        assert column.null_count == 0, name
        assert not batch.schema.field(name).nullable, name
    assert len(set(batch["key"].to_pylist())) == batch.num_rows


def test_columns_map_into_memory_without_a_copy(shard: Path) -> None:
    table = index.samples(shard)
    source = pa.memory_map(str(shard / "samples.arrow")).read_buffer()
    batch = pa.ipc.open_file(source).get_batch(0)
    first, last = source.address, source.address + source.size
    for name in COLUMNS:
        column = batch[name].indices if pa.types.is_dictionary(batch[name].type) else batch[name]
        for buffer in column.buffers():
            assert buffer is None or first <= buffer.address < last, f"{name} was copied out of the file"
        chunked = table[name]
        assert chunked.num_chunks == 1
        (chunk,) = chunked.chunks
        if pa.types.is_integer(chunk.type) or pa.types.is_floating(chunk.type):
            chunk.to_numpy(zero_copy_only=True)     # raises where it would have to copy
        elif pa.types.is_dictionary(chunk.type):
            chunk.indices.to_numpy(zero_copy_only=True)


def test_offset_size_and_checksum_are_those_of_the_bytes_that_tarfile_finds(shard: Path) -> None:
    images = [member for member in members(shard) if member[0].endswith(".jpg")]
    table = rows(shard)
    assert len(table) == len(images)
    for row, (name, offset, data, number) in zip(table, images, strict=True):
        assert f"{row['key']}.jpg" == name
        assert (row["tar"], row["offset"], row["size"], row["crc32"]) == (number, offset, len(data), zlib.crc32(data))


def test_json_says_of_every_tile_what_the_table_says(shard: Path) -> None:
    found = members(shard)
    classes = content(shard)["datasets"][0]["classes"]
    told = [(name, json.loads(data)) for name, _, data, _ in found if name.endswith(".json")]
    images = {name: data for name, _, data, _ in found}
    for row, (name, about) in zip(rows(shard), told, strict=True):
        assert name == f"{row['key']}.json"
        promised = {"dataset", "slide", "patient", "x", "y", "mpp", "size", "label", "split", "stain", "organ"}
        assert promised <= set(about)
        for same in ("dataset", "slide", "patient", "x", "y", "mpp", "split", "stain", "organ", "encoding"):
            assert about[same] == row[same], same
        assert about["label"] == (classes[row["label"]] if row["label"] >= 0 else None)
        with Image.open(io.BytesIO(images[f"{row['key']}.jpg"])) as picture:
            assert (list(picture.size), picture.mode, picture.format) == ([64, 64], "RGB", "JPEG")
            assert about["size"] == [64, 64]
    assert {about["label"] for _, about in told} > {None}, "some tiles are labelled and some are not"


def test_mpp_patient_and_split_are_those_of_the_cohort(shard: Path, slides: Path) -> None:
    with (slides / "slides.csv").open() as handle:
        known = {row["slide"]: row for row in csv.DictReader(handle)}
    table = rows(shard)
    assert {row["slide"] for row in table} == set(known)
    for row in table:
        assert (row["patient"], row["split"]) == (known[row["slide"]]["patient"], known[row["slide"]]["split"])
        assert (row["mpp"], row["dataset"], row["encoding"]) == (1.0, "painted", "jpeg-90-4:4:4")


# --- the grid: nothing is lost without a word


def test_every_square_of_the_grid_is_a_sample_or_a_line_in_rejected(shard: Path, slides: Path) -> None:
    grid = set()
    for path in slides.glob("*.svs"):
        with openslide.OpenSlide(path) as slide:
            side = int(64 * 1.0 / float(slide.properties["openslide.mpp-x"]))
            grid |= {(path.stem, x, y) for x in range(0, slide.dimensions[0] - side + 1, side)
                     for y in range(0, slide.dimensions[1] - side + 1, side)}
    kept = [(row["slide"], row["x"], row["y"]) for row in rows(shard)]
    left_out = [json.loads(line) for line in (shard / "rejected.jsonl").read_text().splitlines()]
    gone = [(line["slide"], line["x"], line["y"]) for line in left_out]
    assert sorted(kept + gone) == sorted(grid)
    assert all(set(line) == {"slide", "file", "x", "y", "mpp", "reason", "detail"} and line["reason"]
               for line in left_out)
    assert {line["file"] for line in left_out} <= {path.name for path in slides.glob("*.svs")}
    assert len(kept) > 60 and len(gone) > 60


# --- the tars


def test_headers_are_plain_ustar_with_fixed_times_and_owners(shard: Path) -> None:
    for path in shard.glob("*.tar"):
        whole, at, headers = path.read_bytes(), 0, 0
        while whole[at:at + 512].strip(b"\0"):
            header = whole[at:at + 512]
            assert header[257:265] == b"ustar\x0000"
            assert header[156:157] == b"0", "no extended headers: each entry is a plain file"
            assert header[100:108] == b"0000644\0"
            for field in (header[108:116], header[116:124], header[136:148]):       # owner, group, time
                assert int(field.rstrip(b"\0 "), 8) == 0
            assert header[265:345].rstrip(b"\0") == b"", "no names of owners"
            at, headers = at + 512 + -(-int(header[124:135], 8) // 512) * 512, headers + 1
        assert len(whole) - at == 1024 and not whole[at:].strip(b"\0"), "two empty blocks end a tar"
        assert headers > 2


def test_the_idx_is_byte_for_byte_what_dalis_own_tool_writes(shard: Path, tmp_path: Path) -> None:
    for path in sorted(shard.glob("*.tar")):
        with wds2idx.IndexCreator(str(path), str(tmp_path / "own.idx"), verbose=False) as tool:
            tool.create_index()
        assert path.with_suffix(".idx").read_bytes() == (tmp_path / "own.idx").read_bytes()


def test_the_idx_of_samples_with_masks_is_also_what_dalis_own_tool_writes(tmp_path: Path) -> None:
    ours = []
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for key, parts in (("a", {"jpg": 5, "json": 700, "instances.png": 512, "types.png": 1}), ("b-1", {"png": 513})):
            ours.append([])
            for extension, size in parts.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = size
                start = archive.offset + 512
                archive.addfile(member, io.BytesIO(bytes(size)))
                ours[-1].append((extension, start, size, member.name))
    with wds2idx.IndexCreator(str(tmp_path / "a.tar"), str(tmp_path / "own.idx"), verbose=False) as tool:
        tool.create_index()
    assert index.idx(ours) == (tmp_path / "own.idx").read_text()


def test_the_webdataset_library_reads_the_tars_untouched(shard: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    paths = [str(path) for path in sorted(shard.glob("*.tar"))]
    read = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))
    truth = members(shard)
    assert [sample["__key__"] for sample in read] == [row["key"] for row in rows(shard)]
    for sample, image, about in zip(read, truth[::2], truth[1::2], strict=True):
        assert (sample["jpg"], sample["json"]) == (image[2], about[2])
        assert {name for name in sample if not name.startswith("__")} == {"jpg", "json"}


def test_dalis_own_reader_reads_the_tars_by_our_idx(shard: Path) -> None:
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import pipeline_def

    @pipeline_def(batch_size=7, num_threads=1, device_id=None)
    def read():
        image, about = fn.readers.webdataset(
            paths=[str(path) for path in sorted(shard.glob("*.tar"))],
            index_paths=[str(path) for path in sorted(shard.glob("*.idx"))], ext=["jpg", "json"],
            missing_component_behavior="error", name="reader")
        return image, about, fn.get_property(image, key="source_info")

    truth = members(shard)
    pipeline = read()
    pipeline.build()
    assert pipeline.epoch_size("reader") == len(truth) // 2
    got = []
    while len(got) < len(truth) // 2:
        images, abouts, places = pipeline.run()
        got += [(images.at(k).tobytes(), abouts.at(k).tobytes(), places.at(k).tobytes().decode()) for k in range(7)]
    for (image, about, place), first, second in zip(got, truth[::2], truth[1::2], strict=False):
        assert (image, about) == (first[2], second[2])
        assert first[0] in place, "another file's name"


# --- the table's words


def columns(count: int, **changed: list) -> dict[str, list]:
    plain = {"key": [f"k{n}" for n in range(count)], "digest": [bytes(16)] * count, "mpp": [float("nan")] * count}
    words = {name: [""] * count for name, kind in COLUMNS.items() if kind.startswith("dictionary")}
    return {**{name: [0] * count for name in COLUMNS}, **words, **plain, **changed}


def test_words_are_sorted_so_that_the_file_does_not_depend_on_which_came_first(tmp_path: Path) -> None:
    index.write_samples(tmp_path, columns(5, slide=["b", "ä", "b", "a", ""], split=["x"] * 5))
    slide = index.samples(tmp_path)["slide"].chunk(0)
    assert slide.to_pylist() == ["b", "ä", "b", "a", ""]
    assert slide.dictionary.to_pylist() == ["", "a", "b", "ä"]
    assert index.samples(tmp_path)["mpp"].null_count == 0 and np.isnan(index.samples(tmp_path)["mpp"].to_numpy()).all()


def test_more_words_than_a_column_holds_are_refused_by_name(tmp_path: Path) -> None:
    index.write_samples(tmp_path, columns(128, split=[f"s{n}" for n in range(128)]))
    assert len(set(index.samples(tmp_path)["split"].to_pylist())) == 128
    with pytest.raises(index.ShardError, match="129 different words for 'split'"):
        index.write_samples(tmp_path, columns(129, split=[f"s{n}" for n in range(129)]))


def test_a_table_with_other_columns_is_refused(tmp_path: Path) -> None:
    with pa.OSFile(str(tmp_path / "samples.arrow"), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("a", "int8")])):
        pass
    with pytest.raises(index.ShardError, match="other columns"):
        index.samples(tmp_path)


def test_the_fingerprint_moves_with_every_word_of_the_index_and_every_byte_of_the_table(tmp_path: Path) -> None:
    index.write_samples(tmp_path, columns(3))
    tar = index.Tar("a-000000.tar", 3, 10, "00")
    plain = index.Index([{"name": "a"}], {"mpp": 1.0}, "", [tar])
    said = index.fingerprint(tmp_path, plain)
    assert said == index.fingerprint(tmp_path, index.Index([{"name": "a"}], {"mpp": 1.0}, said, [tar]))
    others = [index.Index([{"name": "b"}], {"mpp": 1.0}, "", [tar]),
              index.Index([{"name": "a"}], {"mpp": 2.0}, "", [tar]),
              index.Index([{"name": "a"}], {"mpp": 1.0}, "", [index.Tar("a-000000.tar", 3, 10, "01")])]
    found = {said, *(index.fingerprint(tmp_path, other) for other in others)}
    index.write_samples(tmp_path, columns(3, x=[0, 0, 1]))
    assert len(found | {index.fingerprint(tmp_path, plain)}) == 5
