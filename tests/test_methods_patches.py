"""Patches against plain loops in NumPy: where they are drawn, how alike they are, what it costs, how far apart."""

import math

import numpy as np
import pytest
import torch
from skimage.color import rgb2hed
from torch import Tensor

from ssl_dist.methods import patches
from ssl_dist.models.patches import LEVELS, LUMA, SHOWN, Grid, entropy, histograms, jensen_shannon, separation, shown

GRID = Grid(5, 3)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def places(size: int) -> list[tuple[int, int]]:
    return [(top, left) for top in range(0, size - GRID.side + 1, GRID.stride)
            for left in range(0, size - GRID.side + 1, GRID.stride)]


# ---- where patches lie

def test_a_patch_is_its_pixels_and_its_mean_is_theirs() -> None:
    maps = drawn(2, 3, 15, 15)
    corners = places(15)
    means = GRID.means(maps)
    assert means.shape == (2, 3, len(corners)) == (2, 3, GRID.across(15) ** 2)
    chosen = torch.tensor([0, 3, 15, 7])
    cut = GRID.cut(maps, chosen.expand(2, 3, 4))
    for tile in range(2):
        for number in range(3):
            for place, (top, left) in enumerate(corners):
                own = maps[tile, number, top:top + 5, left:left + 5]
                assert float(means[tile, number, place]) == pytest.approx(float(own.mean()))
                for at in (chosen == place).nonzero()[:, 0]:
                    assert torch.equal(cut[tile, number, at], own)


def test_what_is_shown_is_light_what_tissue_takes_of_it_or_what_haematoxylin_takes() -> None:
    light = torch.from_numpy(np.random.default_rng(0).integers(1, 256, (2, 3, 9, 7)) / 255)
    own, ink, stain = (shown(light, how) for how in SHOWN)
    assert float(own.min()) > 0 and torch.equal(ink, 1 - own) and torch.allclose(own, 0.05 + 0.95 * light)
    # scikit-image has amounts in units of its darkest, a millionth of the light.
    amount = rgb2hed(light.permute(0, 2, 3, 1).numpy())[..., 0] * -math.log(1e-6)
    assert np.allclose(stain.numpy(), (1 - np.exp(-np.maximum(amount, 0)))[:, None], atol=1e-6)
    assert float(shown(torch.ones(1, 3, 2, 2), "haematoxylin").abs().max()) == 0, "glass has none"
    assert bool(shown(torch.zeros(1, 3, 2, 2), "haematoxylin").isfinite().all())


def test_a_patch_is_seen_as_far_as_its_class_is_confident() -> None:
    colours, maps = drawn(1, 3, 12, 12), drawn(1, 2, 12, 12, seed=1)
    seen = GRID.seen(colours, maps, torch.tensor([[[4], [1]]]))
    for number, (top, left) in enumerate([places(12)[4], places(12)[1]]):
        own = (slice(top, top + 5), slice(left, left + 5))
        assert torch.allclose(seen[0, number, 0], colours[0][:, *own] * maps[0, number][own])


def test_entropy_is_of_a_coin_in_bits() -> None:
    found = entropy(torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64))
    assert found.tolist() == pytest.approx([0, -0.25 * math.log2(0.25) - 0.75 * math.log2(0.75), 1, 0])


# ---- where they are drawn

def often(maps: Tensor, sampler: str, *more: float | int, count: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Of one tile and class how often each place is drawn as of the class, and as not."""
    chances = drawn(1, 1, patches.chances(sampler, GRID.across(maps.shape[-1]) ** 2, count), seed=3)
    given = getattr(patches, {"entropy": "by_entropy"}.get(sampler, sampler))(maps, GRID, chances, count, *more)
    found = []
    for kind in (given.positive_NCK, given.negative_NCK):
        found.append(np.bincount(given.places_NCK[kind].numpy(), minlength=GRID.across(maps.shape[-1]) ** 2) / count)
    return found[0], found[1]


def test_by_entropy_a_place_is_drawn_as_it_is_sure_and_is_of_one_kind() -> None:
    maps = drawn(1, 1, 15, 15) ** 3
    positive, negative = often(maps, "entropy")
    sure = 1 - np.array([float(entropy(maps[0, 0, top:top + 5, left:left + 5]).mean()) for top, left in places(15)])
    assert positive + negative == pytest.approx(sure / sure.sum(), abs=0.015)
    assert not (positive * negative).any(), "a place was of the class and was not"


def test_by_entropy_a_place_is_of_the_class_with_its_mean_confidence() -> None:
    maps = drawn(1, 1, 15, 15)
    confidence = np.array([float(maps[0, 0, top:top + 5, left:left + 5].mean()) for top, left in places(15)])
    chances = drawn(4000, 1, 200 + 16, seed=5)
    given = patches.by_entropy(maps.expand(4000, -1, -1, -1), GRID, chances, 200)
    of_class = np.array([float(given.positive_NCK[given.places_NCK == place].double().mean()) for place in range(16)])
    assert of_class == pytest.approx(confidence, abs=0.04)


def test_of_a_map_that_knows_nothing_all_places_are_drawn_alike() -> None:
    positive, negative = often(torch.full((1, 1, 15, 15), 0.5, dtype=torch.float64), "entropy")
    assert positive + negative == pytest.approx(np.full(16, 1 / 16), abs=0.01)


def test_other_samplers_draw_as_they_say() -> None:
    maps = drawn(1, 1, 15, 15) ** 2
    confidence = np.array([float(maps[0, 0, top:top + 5, left:left + 5].mean()) for top, left in places(15)])
    positive, negative = often(maps, "uniform")
    assert positive == pytest.approx(np.full(16, 1 / 16), abs=0.01)
    assert negative == pytest.approx(np.full(16, 1 / 16), abs=0.01)
    share = (confidence / confidence.max()) ** 2 / ((confidence / confidence.max()) ** 2).sum()
    positive, negative = often(maps, "probabilistic", 2.0)
    assert positive == pytest.approx(share, abs=0.015)
    assert negative == pytest.approx((1 - share) / 15, abs=0.015)
    share = np.append(confidence, 1.0) ** 2 / (np.append(confidence, 1.0) ** 2).sum()
    positive, negative = often(maps, "sentinel", 2.0)
    assert positive == pytest.approx(share[:-1], abs=0.015)
    assert negative == pytest.approx((1 - share[:-1]) / 16, abs=0.015)
    positive, negative = often(maps, "top", 4)
    best = np.isin(np.arange(16), np.argsort(confidence)[-4:])
    assert positive == pytest.approx(best / 4, abs=0.015)
    assert negative == pytest.approx(~best / 12, abs=0.015)


# ---- how alike

def greys(patch: Tensor) -> np.ndarray:
    return np.einsum("cpq,c->pq", patch.numpy(), np.array(LUMA)).ravel()


def alike(name: str, one: Tensor, other: Tensor) -> float:
    a, b = one.numpy().ravel(), other.numpy().ravel()
    match name:
        case "squares":
            return -sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)
        case "cross_entropy":
            return sum(x * math.log2(y) + (1 - x) * math.log2(1 - y) for x, y in zip(a, b, strict=True)) / len(a)
        case "divergence":
            a, b = greys(one), greys(other)
            return -sum(y * math.log(y / x) - y + x for x, y in zip(a, b, strict=True)) / len(a)
        case _:
            both = np.zeros((LEVELS, LEVELS))
            for x, y in zip(greys(one), greys(other), strict=True):
                for i in range(LEVELS):
                    for j in range(LEVELS):
                        both[i, j] += math.exp(-0.5 * (((x - i / (LEVELS - 1)) / 0.9) ** 2
                                                       + ((y - j / (LEVELS - 1)) / 0.9) ** 2))
            both /= both.sum()
            return float((both * np.log2(both / np.outer(both.sum(1), both.sum(0)))).sum())


@pytest.mark.parametrize("name", ["squares", "cross_entropy", "information", "divergence"])
def test_two_patches_are_as_alike_as_loops_say(name: str) -> None:
    anchors, others = 0.1 + 0.8 * drawn(2, 3, 4, 4), 0.1 + 0.8 * drawn(3, 3, 4, 4, seed=1)
    found = patches.SIMILARITIES[name](anchors, others)
    for a in range(2):
        for m in range(3):
            assert float(found[a, m]) == pytest.approx(alike(name, anchors[a], others[m]), rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("name", ["squares", "cross_entropy", "features", "information", "divergence"])
def test_likeness_has_a_gradient_also_of_equals_and_of_black(name: str) -> None:
    anchors = torch.cat([torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4), 0.5 * torch.ones(1, 3, 4, 4)])
    anchors = (anchors.flatten(1) if name == "features" else anchors).requires_grad_()
    found = patches.SIMILARITIES[name](anchors, anchors)
    found.sum().backward()
    assert bool(found.isfinite().all())
    assert anchors.grad is not None
    assert bool(anchors.grad.isfinite().all())


# ---- what it costs

def test_the_loss_is_the_authors_sum() -> None:
    own, negatives, positive = drawn(3, 7), drawn(3, 4, seed=1), torch.tensor([1, 0, 1, 1, 0, 0, 1]) > 0
    expected = 0.0
    for a in range(3):
        for j in range(7):
            if positive[j]:
                below = sum(math.exp(float(each)) for each in negatives[a])
                expected -= math.log(math.exp(float(own[a, j])) / below)
    assert float(patches.contrast(own, positive, negatives)) == pytest.approx(expected)


def test_anchors_are_of_the_class_and_drawn_evenly() -> None:
    positive = torch.tensor([0, 1, 0, 1, 1]) > 0
    found = patches.anchors(positive, drawn(30_000))
    assert np.bincount(found.numpy(), minlength=5) / 30_000 == pytest.approx([0, 1 / 3, 0, 1 / 3, 1 / 3], abs=0.01)
    assert len(patches.anchors(torch.zeros(5) > 0, drawn(3))) == 0


# ---- how far apart

def test_divergence_of_histograms_is_jensen_and_shannons() -> None:
    one, other = (drawn(2, 6, seed=seed) for seed in (0, 1))
    one, other = one / one.sum(1, keepdim=True), other / other.sum(1, keepdim=True)
    found = jensen_shannon(one, other)
    for a in range(2):
        for m in range(2):
            p, q = one[a].numpy(), other[m].numpy()
            middle = (p + q) / 2
            expected = (p * np.log2(p / middle)).sum() / 2 + (q * np.log2(q / middle)).sum() / 2
            assert float(found[a, m]) == pytest.approx(expected)


def test_separation_is_all_there_can_be_between_black_and_white_and_nothing_between_equals() -> None:
    black, white = torch.zeros(3, 3, 4, 4), torch.ones(2, 3, 4, 4)
    kinds = torch.tensor([1, 1, 1, 0, 0]) > 0
    within, between = separation(histograms(torch.cat([black, white])), kinds, ~kinds, kinds.nonzero()[:, 0])
    assert (float(within), float(between)) == pytest.approx((0, 1))
    within, between = separation(histograms(torch.zeros(5, 3, 4, 4)), kinds, ~kinds, kinds.nonzero()[:, 0])
    assert (float(within), float(between)) == pytest.approx((0, 0))
    nothing = torch.zeros(5) > 0
    apart = separation(histograms(black), nothing[:3], ~nothing[:3], nothing.nonzero()[:, 0])
    assert [float(each) for each in apart] == [0, 0]
