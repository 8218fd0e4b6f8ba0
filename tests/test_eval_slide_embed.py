"""One vector a slide: against loops over its views, the same in any batch, and refused where tiles are another's."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from shards import arrays
from shards.index import ShardError
from ssl_dist import cli, config
from ssl_dist.data import vectors
from ssl_dist.eval import slide_embed
from ssl_dist.eval.settings import SlideEmbed
from ssl_dist.models import own
from ssl_dist.models.encoder import Encoder, EncoderError
from ssl_dist.models.sparse import SlideEncoder

TILES = {"a": 37, "b": 3, "c": 1, "d": 10}
SHA = "5" * 64
CPU = torch.device("cpu")


def quiet(*_: Any) -> None:
    pass


@pytest.fixture
def told(tmp_path: Path) -> SlideEmbed:
    """An encoder of slides, and four slides, one of a single tile."""
    torch.manual_seed(0)
    (tmp_path / "run" / "encoder").mkdir(parents=True)
    own.save(SlideEncoder(6, 9), tmp_path / "run" / "encoder", {"tile_encoder_sha256": SHA, "tile_stage": 3,
                                                                "mpp": [1.0]})
    (tmp_path / "h5").mkdir()
    numbers = np.random.default_rng(0)
    for name, count in TILES.items():
        cells = np.stack(np.unravel_index(numbers.choice(100, count, replace=False), (10, 10)), axis=1)
        arrays.write_bag(tmp_path / "h5" / f"{name}.h5", numbers.normal(size=(count, 6)), 512 * cells, {
            "slide": name, "patient": f"p{name}", "encoder_sha256": SHA, "stage": 3}, wide=512)
    return SlideEmbed(encoder=tmp_path / "run" / "encoder", bags=tmp_path / "h5", views=11, tiles=4)


def test_a_slides_vector_is_the_mean_of_its_views_one_by_one(told: SlideEmbed) -> None:
    result = slide_embed.run(told, CPU, 1, quiet)
    table = pq.read_table(told.home / "slides.parquet").to_pydict()
    assert table["slide"] == sorted(TILES) and table["patient"] == ["pa", "pb", "pc", "pd"]
    network = own.load(told.encoder).eval()
    for name, vector in zip(table["slide"], table["features"], strict=True):
        features, corners = arrays.read_bag(told.bags / f"{name}.h5")
        cells, total = (corners - corners.min(axis=0)) // 512, np.zeros(9)
        for place in slide_embed.views(len(features), 4, 11, 0, name):
            assert len(place) == len(set(place.tolist())) == min(4, len(features))
            with torch.inference_mode():
                total += network(torch.from_numpy(features[place]), torch.from_numpy(cells[place]),
                                 torch.zeros(len(place), dtype=torch.int64), 1)[0].numpy()
        assert np.allclose(vector, total / np.linalg.norm(total), atol=1e-6)
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
    assert result["counts"] == {"tiles": 51, "slides": 4, "width": 9}
    assert json.loads(Path(result["written"]).read_text())["encoder"]["vectors_of"] == SHA
    read = vectors.read(told.home / "slides.parquet")
    assert read.slides == sorted(TILES) and read.features_SD.shape == (4, 9)


def test_batches_and_other_slides_change_nothing_and_another_seed_does(told: SlideEmbed, tmp_path: Path) -> None:
    def made(one: SlideEmbed) -> np.ndarray:
        slide_embed.run(one, CPU, 1, quiet)
        return vectors.read(one.home / "slides.parquet").features_SD

    whole = made(told)
    assert np.allclose(made(replace(told, batch=3, out=tmp_path / "few")), whole, atol=1e-6)
    assert not np.allclose(made(replace(told, seed=1, out=tmp_path / "seed"))[0], whole[0], atol=1e-6)
    (told.bags / "a.h5").unlink()
    assert np.allclose(made(replace(told, out=tmp_path / "three")), whole[1:], atol=1e-6)


def test_views_go_through_all_tiles_before_any_comes_again() -> None:
    seen = Counter(np.concatenate(list(slide_embed.views(12, 4, 9, 0, "s"))).tolist())
    assert seen == dict.fromkeys(range(12), 3)
    first = np.concatenate(list(slide_embed.views(14, 4, 3, 0, "s")))
    assert len(set(first.tolist())) == 12, "of 14 tiles three views of four, and two are left over"
    assert [each.tolist() for each in slide_embed.views(14, 4, 3, 0, "s")] == first.reshape(3, 4).tolist()
    assert [each.tolist() for each in slide_embed.views(1, 4, 3, 0, "s")] == [[0]] * 3


def test_vectors_of_another_encoder_stage_or_width_are_refused(told: SlideEmbed, tmp_path: Path) -> None:
    def bags(name: str, width: int = 6, **facts: Any) -> SlideEmbed:
        (tmp_path / name).mkdir()
        arrays.write_bag(tmp_path / name / "s.h5", np.ones((2, width)), np.array([[0, 0], [0, 512]]),
                         {"slide": "s", **facts}, wide=512)
        return replace(told, bags=tmp_path / name)

    for one, said in ((bags("wide", 7), "vectors of 7 numbers"),
                      (bags("stage", encoder_sha256=SHA), "stage None"),
                      (bags("sha", encoder_sha256="6" * 64, stage=3), "encoder 666666666666"),
                      (bags("mpp", encoder_sha256=SHA, stage=3, mpp=2.0), "2 µm/px, .* learnt at 1; .*mpp=1")):
        with pytest.raises(ShardError, match=said):
            slide_embed.rehearse(one)
    silent = slide_embed.rehearse(bags("silent"))
    assert silent["slides"] == 1 and "does not say which encoder" in silent["warnings"][0]
    assert slide_embed.rehearse(bags("near", encoder_sha256=SHA, stage=3, mpp=1.004))["warnings"] == []
    Encoder("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}, (0.5,) * 3, (0.5,) * 3).save(
        tmp_path / "timm", 64, {})
    with pytest.raises(EncoderError, match="is of 'resnet18'"):
        slide_embed.rehearse(replace(told, encoder=tmp_path / "timm"))


def test_the_command_rehearses_runs_and_says_where_it_wrote(told: SlideEmbed) -> None:
    words = ["eval", "eval/slide_embed", f"encoder={told.encoder}", f"bags={told.bags}"]
    ran = CliRunner().invoke(cli.app, [*words, "--dry-run"])
    assert ran.exit_code == 0 and "51" in ran.output and not told.home.exists(), ran.output
    ran = CliRunner().invoke(cli.app, words)
    assert ran.exit_code == 0 and "51 tiles of 4 slides, 9 numbers each" in ran.output, ran.output
    recipe = config.load_eval("eval/slide_embed", words[2:])
    assert (recipe.views, recipe.tiles, recipe.home) == (100, 5, told.encoder.parent / "eval")
