"""Vectors for other programs: a table and a file a slide, read back with other libraries."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from shards import index, write
from shards.index import ShardError
from ssl_dist.eval import embed, features
from ssl_dist.eval.settings import Embed, Tiles
from ssl_dist.models import encoder as encoders
from ssl_dist.models.encoder import Encoder


@pytest.fixture(scope="module")
def written(shard: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("embed")
    Encoder("test_resnet", {}, (0.5,) * 3, (0.5,) * 3).save(home / "encoder", 64, {})
    told = Embed(encoder=str(home / "encoder"), data=Tiles(shards=[shard]), batch=32)
    result = embed.run(told, torch.device("cpu"), 2, lambda *_: None)
    return home, result


def expected(home: Path, shard: Path) -> dict[str, np.ndarray]:
    split = features.every([shard])
    vectors = features.extract(encoders.load(home / "encoder"), split, size=64, batch=50, threads=1,
                               device=torch.device("cpu"), progress=lambda *_: None).numpy()
    return dict(zip(split.reader.column("key", split.rows), vectors, strict=True))


def test_the_table_has_every_tile_with_its_vector(written: tuple[Path, dict[str, Any]], shard: Path) -> None:
    home, result = written
    table, truth = pq.read_table(home / "eval" / "embeddings.parquet"), expected(home, shard)
    samples = index.samples(shard)
    assert table["key"].to_pylist() == samples["key"].to_pylist()
    for name in ("slide", "patient", "x", "y", "label", "split"):
        assert table[name].to_pylist() == samples[name].to_pylist()
    for key, vector in zip(table["key"].to_pylist(), table["features"].to_pylist(), strict=True):
        assert vector == pytest.approx(truth[key], rel=1e-3, abs=1e-4)
    assert result["counts"]["tiles"] == samples.num_rows
    assert table.schema.metadata[b"sha256"].decode() == result["encoder"]["sha256"]


def test_a_slide_s_file_has_its_tiles_from_the_top_left_on(written: tuple[Path, dict[str, Any]], shard: Path) -> None:
    home, result = written
    truth, samples = expected(home, shard), index.samples(shard).to_pydict()
    files = sorted((home / "eval" / "h5").glob("*.h5"))
    assert [path.stem for path in files] == sorted(set(samples["slide"]))
    assert result["counts"]["slides"] == len(files)
    for path in files:
        own = sorted((y, x, key) for slide, x, y, key in zip(samples["slide"], samples["x"], samples["y"],
                                                             samples["key"], strict=True) if slide == path.stem)
        with h5py.File(path) as file:
            assert file["coords"][:].tolist() == [[x, y] for y, x, _ in own]
            assert file["features"].dtype == np.float32
            assert np.allclose(file["features"][:], [truth[key] for *_, key in own], rtol=1e-3, atol=1e-4)
            assert file.attrs["slide"] == path.stem
            assert file.attrs["encoder"] == "test_resnet"


def test_names_that_are_no_file_names_do_not_meet() -> None:
    names = [embed.file_name("d", slide) for slide in ("a/b", "a b", "a_b", "a:b", "../x", "x")]
    assert len(set(names)) == len(names)
    assert not [name for name in names if "/" in name or " " in name or ":" in name]
    assert (names[2], names[5]) == ("a_b", "x")
    assert embed.file_name("e", "a/b") != names[0]
    both = embed.file_names([("d", "S1"), ("e", "S1"), ("e", "S2"), ("d", "a b"), ("e", "a b")])
    assert len(set(both)) == 5 and both[2] == "S2" and both[0].startswith("S1-")


def test_slides_of_two_datasets_that_are_called_the_same_are_two_files(shard: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write.write(write.Settings(source=_pictures(tmp_path / "src", index.samples(shard)["slide"].to_pylist()[0]),
                               kind="tiles", mpp=1.0, dataset="other", out=other, names=r"(?P<slide>[^/]+)/[^/]+$",
                               workers=1))
    Encoder("test_resnet", {}, (0.5,) * 3, (0.5,) * 3).save(tmp_path / "encoder", 64, {})
    told = Embed(encoder=str(tmp_path / "encoder"), data=Tiles(shards=[shard, other]), batch=32)
    result = embed.run(told, torch.device("cpu"), 2, lambda *_: None)
    files = list((tmp_path / "eval" / "h5").glob("*.h5"))
    assert len(files) == result["counts"]["slides"] == len(set(index.samples(shard)["slide"].to_pylist())) + 1
    counts = [len(h5py.File(path)["features"]) for path in files]
    assert sum(counts) == result["counts"]["tiles"]
    with pytest.raises(ShardError, match="files of other slides"):
        embed.run(Embed(encoder=str(tmp_path / "encoder"), data=Tiles(shards=[other]), batch=32), torch.device("cpu"),
                  2, lambda *_: None)


def _pictures(home: Path, slide: str) -> Path:
    (home / slide).mkdir(parents=True)
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(home / slide / f"{number}.png")
    return home
