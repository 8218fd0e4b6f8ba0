"""Decoders over encoders: weights as the reference has them, losses against NumPy, maps of ResNets and ViTs."""

import numpy as np
import pytest
import torch

from ssl_dist.models import hovernet
from ssl_dist.models.encoder import Encoder, EncoderError
from ssl_dist.models.hovernet import Branch, HoverNet, Maps
from ssl_dist.models.unet import UNet

SMALL = {"layers": [1, 1, 1, 1], "channels": [16, 16, 16, 16]}


def encoder(name: str = "resnet18", **args: object) -> Encoder:
    return Encoder(name, args or SMALL, (0.5,) * 3, (0.5,) * 3)


def vit(**args: object) -> Encoder:
    return encoder("vit_tiny_patch16_224", **{"img_size": 32, "embed_dim": 24, "depth": 4, "num_heads": 3, **args})


def test_a_branch_over_a_resnet_50_that_looks_closely_has_the_references_weights() -> None:
    with torch.device("meta"):
        network = encoder("resnet50", in_chans=3)
        network.look_closely()
        assert network.levels() == [(256, 1), (512, 2), (1024, 4), (2048, 8)]
        branch = Branch(network.levels(), 2, 64, 5)

    def dense(channels: int, units: int) -> int:
        """As vqdang/hover_net's net_desc.py writes it: 1x1 to 128, 5x5 in four groups to 32, BatchNorms before both."""
        total = 0
        for number in range(units):
            inner = channels + 32 * number
            total += 2 * inner + inner * 128 + 2 * 128 + 128 // 4 * 32 * 25
        return total + 2 * (channels + 32 * units)

    u3 = 1024 * 256 * 25 + dense(256, 8) + 512 * 512
    u2 = 512 * 128 * 25 + dense(128, 4) + 256 * 256
    u1, u0 = 256 * 64 * 25, 2 * 64 + 64 * 2 + 2
    assert sum(each.numel() for each in branch.parameters()) == u3 + u2 + u1 + u0


@pytest.mark.parametrize(("make", "strides"), [
    (lambda: encoder(), [2, 4, 8, 16, 32]), (lambda: vit(), [4, 8, 16, 32]),
    (lambda: vit(patch_size=8), [2, 4, 8, 16])], ids=["resnet", "vit 16", "vit 8"])
@pytest.mark.parametrize("size", [64, 96])
def test_maps_are_as_wide_and_as_fine_as_levels_say_and_answers_as_large_as_the_window(make, strides, size) -> None:
    network = make()
    network.fit_to(size)
    pixels = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8)
    levels, maps = network.levels(), network.pyramid(pixels)
    assert [step for _, step in levels] == strides
    for (channels, step), each in zip(levels, maps, strict=True):
        assert tuple(each.shape) == (2, channels, size // step, size // step)
    found = HoverNet(network, 3, 8, 3)(pixels)
    assert found.nuclear_B2HW.shape == found.apart_B2HW.shape == (2, 2, size, size)
    assert found.types_BCHW is not None and found.types_BCHW.shape == (2, 4, size, size)
    assert HoverNet(network, 0, 8, 3)(pixels).types_BCHW is None
    assert UNet(network, 5, 8)(pixels).shape == (2, 5, size, size)


def test_windows_that_no_map_divides_are_answered_as_well() -> None:
    found = HoverNet(encoder(), 0, 8, 3)(torch.zeros(1, 70, 70, 3, dtype=torch.uint8))
    assert found.nuclear_B2HW.shape == (1, 2, 70, 70)


def test_looking_closely_changes_no_weight_and_no_encoder_that_cannot() -> None:
    near, far = encoder(), encoder()
    near.network.load_state_dict(far.network.state_dict())
    near.look_closely()
    assert near.state_dict().keys() == far.state_dict().keys()
    pixels = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    assert [each.shape[-1] for each in near.pyramid(pixels)] == [64, 32, 16, 8]
    with pytest.raises(EncoderError, match="use fine=false"):
        vit().look_closely()
    with pytest.raises(EncoderError, match="no whole number of patches of 16"):
        vit().fit_to(70)
    with pytest.raises(EncoderError, match="no maps that become coarser"):
        encoder("mixer_s32_224", img_size=64).levels()


def test_losses_are_what_numpy_makes_of_their_definitions() -> None:
    rng = np.random.default_rng(0)
    logits, apart, truth_apart = rng.normal(size=(2, 2, 7, 8)), rng.normal(size=(2, 2, 7, 8)), rng.normal(
        size=(2, 2, 7, 8))
    truth = rng.integers(0, 2, (2, 7, 8))
    likely = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    entropy = -np.mean([np.log(likely[b, truth[b, y, x], y, x]) for b in range(2) for y in range(7) for x in range(8)])
    dice = 0.0
    for kind in (0, 1):
        own = (truth == kind).astype(float)
        dice += 1 - (2 * (likely[:, kind] * own).sum() + 1e-3) / (likely[:, kind].sum() + own.sum() + 1e-3)
    slopes = []
    difference = np.pad(apart - truth_apart, ((0, 0), (0, 0), (2, 2), (2, 2)))
    for b in range(2):
        for y in range(7):
            for x in range(8):
                if not truth[b, y, x]:
                    continue
                across = down = 0.0
                for dy in range(-2, 3):
                    for dx in range(-2, 3):
                        if dy or dx:
                            across += dx / (dx * dx + dy * dy) * difference[b, 0, y + dy + 2, x + dx + 2]
                            down += dy / (dx * dx + dy * dy) * difference[b, 1, y + dy + 2, x + dx + 2]
                slopes += [across ** 2, down ** 2]
    maps = Maps(torch.from_numpy(logits), torch.from_numpy(apart), None)
    found = hovernet.losses(maps, torch.from_numpy(truth), torch.from_numpy(truth_apart), None)
    parts = {"nuclear": entropy, "nuclear_dice": dice, "apart": np.mean((apart - truth_apart) ** 2),
             "apart_gradient": np.mean(slopes)}
    assert {name: float(found[name]) for name in parts} == pytest.approx(parts)
    assert float(found["loss"]) == pytest.approx(sum(parts.values()))


def test_the_slope_of_a_horizontal_map_is_taken_along_rows() -> None:
    inside = torch.ones(1, 9, 9, dtype=torch.long)
    ramp = torch.linspace(-1, 1, 9)
    along = torch.stack([ramp.expand(9, 9), torch.zeros(9, 9)])[None]           # the horizontal map rises to the right
    across = torch.stack([ramp[:, None].expand(9, 9), torch.zeros(9, 9)])[None]     # it rises downwards: no slope
    nothing = torch.zeros(1, 2, 9, 9)
    middle = torch.zeros(1, 9, 9, dtype=torch.long)
    middle[0, 4, 4] = 1
    assert float(hovernet.gradient_error(along, nothing, middle)) > 0.1
    assert float(hovernet.gradient_error(across, nothing, middle)) == pytest.approx(0, abs=1e-9)
    assert float(hovernet.gradient_error(along, along, inside)) == 0
    assert float(hovernet.gradient_error(along, nothing, torch.zeros_like(inside))) == 0        # no nucleus, no number
