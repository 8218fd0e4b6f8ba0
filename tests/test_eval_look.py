"""Pictures of what an encoder sees: against plain loops, NumPy's own decomposition, attention written out by hand."""

import csv
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.manifold import trustworthiness

from shards import index
from ssl_dist.eval import features, look, maps, sheets
from ssl_dist.eval.settings import Look, Tiles
from ssl_dist.models.encoder import Encoder, load

HALF = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    Encoder("test_vit", {"img_size": 64}, HALF, HALF).save(folder := tmp_path_factory.mktemp("e") / "encoder", 64, {})
    return folder


def drawn(encoder: Path, shard: Path, out: Path, **changes: object) -> dict:
    settings = Look(**{"encoder": str(encoder), "data": Tiles(shards=[shard]), "out": out, "batch": 64,      # type: ignore
                       "tiles": 60, "maps": ["pca"], **changes})
    return look.run(settings, torch.device("cpu"), 2, lambda *_: None)


def test_neighbours_are_the_nearest_others_even_among_copies() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 8)).astype(np.float32)
    vectors[5:12] = vectors[4]          # more copies than neighbours asked for
    similarity, places = look.alike(torch.from_numpy(vectors), 3)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for own in range(40):
        every = sorted((float(unit[own] @ unit[other]) for other in range(40) if other != own), reverse=True)
        assert own not in places[own]
        assert len(set(places[own].tolist())) == 3
        assert similarity[own].numpy() == pytest.approx(every[:3], abs=1e-5)
        assert [float(unit[own] @ unit[other]) for other in places[own]] == pytest.approx(every[:3], abs=1e-5)


def test_how_often_a_word_is_shared_is_a_plain_count() -> None:
    words, places = list("aaabbc"), np.array([[1, 2], [0, 3], [3, 4], [4, 0], [3, 5], [0, 1]])
    hits = [words[own] == words[other] for own in range(6) for other in places[own]]
    chance = [words[own] == words[other] for own in range(6) for other in range(6) if other != own]
    assert look.same(places, words) == {"neighbours": round(np.mean(hits), 4), "chance": round(np.mean(chance), 4)}


@pytest.mark.parametrize(("args", "prefix"), [({}, 1), ({"class_token": False, "global_pool": "avg"}, 0),
                                              ({"reg_tokens": 2}, 3)])
def test_attention_is_what_queries_and_keys_of_the_last_block_give(args: dict, prefix: int) -> None:
    torch.manual_seed(0)
    encoder = Encoder("vit_tiny_patch16_224", {"img_size": 64, "depth": 2, **args}, HALF, HALF).eval()
    pixels = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    seen: list[torch.Tensor] = []
    last = encoder.network.blocks[-1]           # type: ignore[index,union-attr]
    hook = last.attn.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.inference_mode():
        found, before = encoder.attention(pixels), encoder(pixels)
        hook.remove()
        tokens, heads = seen[0], last.attn.num_heads
        query, key, _ = last.attn.qkv(tokens).chunk(3, dim=-1)
        width = query.shape[-1] // heads
        assert found is not None and found.shape == (3, heads, 4, 4)
        for tile in range(3):
            for head in range(heads):
                part = slice(head * width, (head + 1) * width)
                scores = query[tile][:, part] @ key[tile][:, part].T / width**0.5
                weights = scores.softmax(dim=1)
                row = weights[0, prefix:] if prefix else weights.mean(dim=0)
                assert found[tile, head].flatten().numpy() == pytest.approx(row.numpy(), abs=1e-5)
        assert torch.equal(encoder(pixels), before), "the network is as it was"
    assert last.attn.fused_attn is Encoder("vit_tiny_patch16_224", {}, HALF, HALF).network.blocks[0].attn.fused_attn   # type: ignore


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_a_network_without_attention_has_none(name: str) -> None:
    assert Encoder(name, {}, HALF, HALF).eval().attention(torch.zeros(1, 64, 64, 3, dtype=torch.uint8)) is None


def test_the_main_directions_are_those_of_numpy() -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 6)) * [3, 2, 1, 1, 1, 1]
    (place, axes), = maps.drawn(vectors, ["pca"], 0)[0].values()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    centred = unit - unit.mean(axis=0)
    left, size, _ = np.linalg.svd(centred, full_matrices=False)
    for number in range(2):
        assert np.abs(place[:, number]) == pytest.approx(np.abs(left[:, number] * size[number]), abs=1e-8)
        assert axes[number] == f"{size[number]**2 / (size**2).sum():.0%} of the variance"


def test_umap_keeps_neighbours_and_is_the_same_twice() -> None:
    pytest.importorskip("umap")
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(4, 16))[np.arange(120) % 4] + 0.1 * rng.normal(size=(120, 16))
    (place, _), = maps.drawn(vectors, ["umap"], 3)[0].values()
    assert trustworthiness(vectors, place, n_neighbors=10, metric="cosine") > 0.85      # at random 0.5
    assert np.array_equal(place, maps.drawn(vectors, ["umap"], 3)[0]["umap"][0])


def test_without_umap_the_other_map_is_drawn_and_it_is_said(exported: Path, shard: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    result = drawn(exported, shard, tmp_path, maps=["pca", "umap"], projector=False)
    assert "look_pca.png" in result["pictures"] and "look_umap.png" not in result["pictures"]
    assert "pip install" in result["warnings"][0]
    assert not (tmp_path / "projector").exists()


def test_every_picture_is_there_and_says_what_it_is_and_a_second_time_it_is_the_same(exported: Path, shard: Path,
                                                                                   tmp_path: Path) -> None:
    result = drawn(exported, shard, tmp_path)
    assert result["pictures"] == ["look_neighbours.png", "look_pca.png", "look_attention.png"]
    assert set(result["captions"]) == set(result["pictures"])
    pixels = [Image.open(tmp_path / name).convert("RGB").tobytes() for name in result["pictures"]]
    table, samples = pq.read_table(tmp_path / "look.parquet"), index.samples(shard)
    assert table.num_rows == result["counts"]["tiles"] == min(60, samples.num_rows)
    slide = dict(zip(samples["key"].to_pylist(), samples["slide"].to_pylist(), strict=True))
    assert [slide[key] for key in table["key"].to_pylist()] == table["slide"].to_pylist()
    assert {"pca_x", "pca_y", "label", "split"} <= set(table.column_names)
    assert drawn(exported, shard, tmp_path) == result
    assert [Image.open(tmp_path / name).convert("RGB").tobytes() for name in result["pictures"]] == pixels
    config = (tmp_path / "projector" / "projector_config.pbtxt").read_text()
    assert config.count("embeddings {") == 1, "a second time does not add to the first"


def test_the_projector_gets_the_vectors_and_what_is_known_of_each(exported: Path, shard: Path, tmp_path: Path) -> None:
    drawn(exported, shard, tmp_path)
    home, = (tmp_path / "projector").glob("*/*")
    vectors = np.loadtxt(home / "tensors.tsv", delimiter="\t")
    with (home / "metadata.tsv").open(newline="") as handle:
        rows = list(csv.DictReader(handle, delimiter="\t"))
    table = pq.read_table(tmp_path / "look.parquet")
    assert [row["key"] for row in rows] == table["key"].to_pylist()
    split = features.every([shard])
    place = {key: number for number, key in enumerate(split.reader.column("key", split.rows))}
    chosen = split.part(np.array([place[row["key"]] for row in rows]))
    truth = features.extract(load(exported), chosen, size=64, batch=16, threads=1, device=torch.device("cpu"),
                             progress=lambda *_: None)
    unit = torch.nn.functional.normalize(truth).numpy()
    assert vectors == pytest.approx(unit, abs=1e-4)
    side = int(np.ceil(len(rows)**0.5)) * look.SMALL
    assert Image.open(home / "sprite.png").size == (side, side)


def test_frames_tell_the_slide_from_the_patient_from_others(shard: Path, tmp_path: Path) -> None:
    split = features.every([shard])
    slides, own = np.array(split.slides), 0
    same, other = np.flatnonzero(slides == slides[own])[1], np.flatnonzero(slides != slides[own])[0]
    split.patients[other] = "somebody else"
    third = np.flatnonzero(slides != slides[own])[1]
    split.patients[third] = split.patients[own]
    sheets.neighbours(split, np.array([own]), np.array([[same, third, other]]), tmp_path / "a.png")
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    line = [tuple(pixel) for pixel in picture[sheets.GAP + sheets.LINE + 50].tolist()]
    order = [colour for number, colour in enumerate(line) if colour != line[number - 1] and colour in (
        sheets.QUERY, sheets.BAD, sheets.NEAR, sheets.PLAIN)]
    assert list(dict.fromkeys(order)) == [sheets.QUERY, sheets.BAD, sheets.NEAR, sheets.PLAIN]
