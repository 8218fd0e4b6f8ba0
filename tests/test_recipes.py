"""The papers' recipes: every value says where it comes from, and what follows from them is what the originals had."""

import re
from pathlib import Path

import pytest
import torch

from ssl_dist import config, train

ROOT = Path(__file__).resolve().parent.parent
PAPERS = ("simclr_57", "moco_tcga", "swav_tcga", "barlow_tcga", "dino_tcga", "moco_camelyon")
MARKS = ("paper", "code", "seen", "recalled", "default")
IMAGENET = 1_281_167        # images of ImageNet-1k, by which Kang et al. count epochs


def loaded(name: str, tmp_path: Path, *words: str) -> config.Train:
    return config.load_train(f"pretrain/{name}", [f"data.shards=[{tmp_path}]", *words])


@pytest.mark.parametrize("name", PAPERS)
def test_every_value_of_a_papers_recipe_says_where_it_comes_from(name: str) -> None:
    lines = (ROOT / "configs" / "pretrain" / f"{name}.yaml").read_text().splitlines()
    values = [line for line in lines if re.match(r"\s*\w+: *\S", line)
              and not re.match(r"(run|\s+name: (simclr|moco|swav|barlow|dino)|\s+shards|\s+every):? ?", line)]
    assert len(values) > 12
    for line in values:
        comment = line.partition("# ")[2]
        assert re.match(rf"({'|'.join(MARKS)})\b", comment), f"{name}: {line.strip()!r} says no origin"
    assert len(lines) <= 50, "a recipe is one screen"
    used = {line.partition("# ")[2].partition(":")[0].split(",")[0].split()[0].rstrip(";") for line in values}
    assert all(mark in " ".join(lines[:6]) for mark in used), used


# What the originals had at their own batch: learning rate at the top and at the end, and of vectors.
@pytest.mark.parametrize(("name", "batch", "top", "end", "vectors"), [
    ("moco_tcga", 256, 0.03, 0.0, 0.03), ("swav_tcga", 4096, 4.8, 0.0048, 4.8),
    ("barlow_tcga", 2048, 1.6, 0.0016, 0.0384), ("dino_tcga", 1024, 2e-3, 1e-5, 2e-3),
    ("moco_camelyon", 256, 0.03, 0.0, 0.03)])
def test_learning_rates_are_the_originals_at_their_batch(name: str, batch: int, top: float, end: float, vectors: float,
                                                         tmp_path: Path) -> None:
    told = loaded(name, tmp_path)
    assert told.data.batch == batch
    assert config.rates(told, told.optim.warmup)[0] == pytest.approx(top)
    assert config.rates(told, 1.0)[0] == pytest.approx(end)
    assert config.lr_scale(told) * (told.optim.lr_vectors or told.optim.lr) == pytest.approx(vectors)
    larger = loaded(name, tmp_path, f"data.batch={4 * batch}")
    assert config.rates(larger, told.optim.warmup)[0] == pytest.approx(4 * top)


def test_parts_of_a_run_are_the_steps_that_the_originals_count(tmp_path: Path) -> None:
    swav, dino = (config.with_steps(loaded(name, tmp_path), 1) for name in ("swav_tcga", "dino_tcga"))
    assert swav.steps == pytest.approx(200 * IMAGENET / 4096, abs=1)
    assert swav.method["frozen"] * swav.steps == pytest.approx(313, rel=0.01)
    assert dino.method["frozen"] * dino.steps == pytest.approx(1251, rel=0.01)
    assert dino.method["temperature_warmup"] * dino.steps == pytest.approx(37_530, rel=0.01)
    assert dino.optim.warmup * dino.steps == pytest.approx(10 * IMAGENET / 1024, rel=0.01)


# Trunk and head: the numbers that the papers' weights have.
@pytest.mark.parametrize(("name", "encoder", "rest"), [
    ("simclr_57", 11_176_512, 328_320), ("moco_tcga", 23_508_032, 4_458_624), ("swav_tcga", 23_508_032, 4_846_720),
    ("barlow_tcga", 23_508_032, 151_027_712)])
def test_networks_have_the_papers_size(name: str, encoder: int, rest: int, tmp_path: Path) -> None:
    with torch.device("meta"):
        method = train.build(loaded(name, tmp_path))
    learning = {key: each.numel() for key, each in method.named_parameters() if each.requires_grad}
    own = {key: count for key, count in learning.items() if key.startswith("encoder.")}
    assert sum(own.values()) == encoder
    assert sum(learning.values()) - encoder == rest
