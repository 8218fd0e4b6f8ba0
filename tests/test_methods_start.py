"""Every method at its papers' sizes: parameters to the last one, and the loss with which training starts."""

import math
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from ssl_dist import methods
from ssl_dist.methods import base
from ssl_dist.models.encoder import Encoder
from ssl_dist.models.heads import DinoHead

small = runpy.run_path(str(Path(__file__).with_name("small.py")))
build, batch, one_thread = small["build"], small["batch"], small["one_thread"]


def full(name: str, network: str) -> base.Method:
    """As its defaults have it, without memory for the weights."""
    module = methods.load(name)
    with torch.device("meta"):
        return module.Method(module.Config(), Encoder(network, {}, (0.5,) * 3, (0.5,) * 3))


def count(*modules: nn.Module) -> int:
    return sum(each.numel() for module in modules for each in module.parameters())


@pytest.mark.parametrize(("network", "expected"), [
    ("resnet18", 11_176_512), ("vit_small_patch16_224", 21_665_664), ("vit_small_patch8_224", 21_670_272),
])
def test_an_encoder_has_the_papers_number_of_parameters(network: str, expected: int) -> None:
    with torch.device("meta"):
        assert count(Encoder(network, {}, (0.5,) * 3, (0.5,) * 3)) == expected


@pytest.mark.parametrize(("name", "network", "heads", "expected"), [
    ("simclr", "resnet18", ["projector"], 328_320),
    ("moco", "resnet50", ["projector"], 4_458_624),
    ("swav", "resnet50", ["projector", "prototypes"], 4_846_720),
    ("barlow", "resnet50", ["projector"], 151_027_712),
    ("vicreg", "resnet50", ["projector"], 151_027_712),
    # 384-2048-2048-256 with biases, and 65,536 directions of 256.
    ("dino", "vit_small_patch16_224", ["student.head"], 788_480 + 4_196_352 + 524_544 + 65_536 * 256),
])
def test_a_head_has_the_papers_number_of_parameters(name: str, network: str, heads: list[str], expected: int) -> None:
    method = full(name, network)
    assert count(*(method.get_submodule(head) for head in heads)) == expected
    learns = sum(each.numel() for each in method.parameters() if each.requires_grad)
    student = method.get_submodule("student.encoder") if name == "dino" else method.encoder
    assert learns == count(student) + expected, "something else learns as well"


def start(name: str, **changed: object) -> float:
    method = build(name, kind=torch.float32, **changed)
    return float(method(batch(method), 0.0)["loss"].detach())


def test_dino_starts_near_the_logarithm_of_its_classes() -> None:
    torch.manual_seed(0)
    method = build("dino", kind=torch.float32, classes=65_536, hidden=2048, narrow=256)
    for head in (method.student, method.teacher):
        head["head"] = DinoHead(16, 2048, 256, 65_536)
    assert float(method(batch(method), 0.0)["loss"].detach()) == pytest.approx(math.log(65_536), abs=0.3)


def test_swav_starts_near_the_logarithm_of_its_prototypes() -> None:
    assert start("swav", prototypes=3000, width=128, hidden=64, queue=0) == pytest.approx(math.log(3000), abs=0.6)


def test_simclr_starts_below_the_logarithm_of_the_other_views_for_a_tile_is_like_itself() -> None:
    assert math.log(2 * 12 - 1) - 2 < start("simclr", temperature=1.0) < math.log(2 * 12 - 1)


def test_barlow_starts_near_what_unrelated_features_cost() -> None:
    # D (1 + 1/N) for features that do not agree, and less as they do; the rest is small: lambda D (D - 1) / N.
    width = 64
    assert 0 < start("barlow", width=width, hidden=64, scale=1.0) < width * (1 + 1 / 12) + 0.0051 * width * (width - 1)
