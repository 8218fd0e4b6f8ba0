"""Networks on slides: against plain loops over one slide, whatever else is in the batch and in any order of tiles; what
is padded elsewhere; and that they find one tile in a hundred, and one in a thousand, where the mean does not."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from ssl_dist.eval import settings
from ssl_dist.models import mil

WIDTH, COUNTS = 5, [40, 1, 7, 100, 23]
SMALL = {"mean": {}, "weldon": {}, "chowder": {}, "deepmil": {}, "clam": {"narrow": 16, "attention": 8},
         "transmil": {"narrow": 16, "heads": 2}}


def network(name: str, outputs: int = 1) -> nn.Module:
    torch.manual_seed(1)
    return mil.build(name, WIDTH, outputs, SMALL[name]).double().eval()


def tiles(counts: list[int] = COUNTS, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(sum(counts), WIDTH)))


def test_what_settings_name_is_what_there_is() -> None:
    assert set(settings.MODELS) == set(mil.MODELS) == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("outputs", [1, 3])
def test_a_slide_is_judged_alike_alone_and_among_others(name: str, outputs: int) -> None:
    head, all_TD = network(name, outputs), tiles()
    together = head(all_TD, COUNTS)
    assert together.outputs_BC.shape == (len(COUNTS), outputs) and together.shown_T.shape == (sum(COUNTS),)
    for number, own_ND in enumerate(all_TD.split(COUNTS)):
        alone = head(own_ND, [len(own_ND)])
        assert torch.allclose(alone.outputs_BC[0], together.outputs_BC[number], rtol=0, atol=1e-10)
        assert torch.allclose(alone.shown_T, together.shown_T.split(COUNTS)[number], rtol=0, atol=1e-10)
        if mil.MODELS[name].SHOWS == "attention":
            assert float(alone.shown_T.sum().detach()) == pytest.approx(1) and bool((alone.shown_T >= 0).all())


@pytest.mark.parametrize("name", SMALL)
def test_in_which_order_tiles_stand_changes_nothing(name: str) -> None:
    head, own_ND = network(name), tiles([64])
    order = torch.from_numpy(np.random.default_rng(2).permutation(64))
    one, other = head(own_ND, [64]), head(own_ND[order], [64])
    assert torch.allclose(one.outputs_BC, other.outputs_BC, rtol=0, atol=1e-10)
    assert torch.allclose(one.shown_T[order], other.shown_T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_those_of_the_slides_one_by_one(name: str) -> None:
    def gradients(parts: list[tuple[Tensor, list[int]]]) -> list[np.ndarray]:
        head = network(name)
        sum(head(each, counts).outputs_BC.square().sum() for each, counts in parts).backward()
        return [each.grad.numpy() for each in head.parameters() if each.grad is not None]

    all_TD = tiles()
    apart = gradients([(each, [len(each)]) for each in all_TD.split(COUNTS)])
    for one, other in zip(gradients([(all_TD, COUNTS)]), apart, strict=True):
        assert one == pytest.approx(other, rel=0, abs=1e-10)


def padded(all_TD: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    most = max(counts)
    return (torch.stack([torch.cat([own, torch.zeros(most - len(own), WIDTH).double()])
                         for own in all_TD.split(counts)]),
            torch.tensor([[place >= count for place in range(most)] for count in counts]))


def padded_deepmil(head: Any, all_TD: Tensor, counts: list[int]) -> Tensor:
    """As others do it: slides filled up with zeros, a mask, and what is masked set to minus infinity."""
    filled, mask = padded(all_TD, counts)
    narrow = head.embed(filled)
    scores = head.attention(narrow.flatten(0, 1)).unflatten(0, mask.shape)
    weights = scores.masked_fill(mask, -math.inf).softmax(dim=1)
    return head.layers((weights[..., None] * narrow).sum(dim=1))


def padded_chowder(head: mil.Chowder, all_TD: Tensor, counts: list[int]) -> Tensor:
    """The pitfall: what fills up must not be among the highest, nor among the lowest."""
    filled, mask = padded(all_TD, counts)
    scores = head.score(filled)[..., 0]
    top = scores.masked_fill(mask, -math.inf).topk(head.top, dim=1).values
    low = scores.masked_fill(mask, math.inf).topk(head.bottom, dim=1, largest=False).values.flip(1)
    return head.layers(torch.cat([top, low], dim=1))


def test_what_is_not_padded_is_what_padding_with_a_mask_gives() -> None:
    counts = [40, 25, 100, 10]
    head, all_TD = network("deepmil"), tiles(counts)
    assert torch.allclose(head(all_TD, counts).outputs_BC, padded_deepmil(head, all_TD, counts), rtol=0, atol=1e-10)
    chowder = network("chowder")
    assert isinstance(chowder, mil.Chowder)
    assert torch.allclose(chowder(all_TD, counts).outputs_BC, padded_chowder(chowder, all_TD, counts), rtol=0,
                          atol=1e-10)


# --- plain loops over one slide, in NumPy

def linear(layer: Any, vector: np.ndarray) -> np.ndarray:
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    return np.array([sum(w * x for w, x in zip(row, vector, strict=True)) + b for row, b in zip(weight, bias,
                                                                                                strict=True)])


def through(layers: Any, vector: np.ndarray) -> np.ndarray:
    for layer in layers.children():
        if isinstance(layer, nn.Linear):
            vector = linear(layer, vector)
        elif isinstance(layer, nn.ReLU):
            vector = np.maximum(vector, 0)
        elif isinstance(layer, nn.Sigmoid):
            vector = 1 / (1 + np.exp(-vector))
        elif isinstance(layer, nn.Tanh):
            vector = np.tanh(vector)
        else:
            assert isinstance(layer, nn.Dropout)
    return vector


def attended(attention: Any, narrow: list[np.ndarray]) -> np.ndarray:
    raw = [float(linear(attention.weigh, through(attention.what, each) * through(attention.gate, each))[0])
           for each in narrow]
    return np.array([math.exp(each) for each in raw]) / sum(math.exp(each) for each in raw)


def plain(name: str, head: Any, own: np.ndarray) -> np.ndarray:
    if name == "mean":
        return through(head.layers, np.array([sum(column) / len(own) for column in own.T]))
    if name in ("weldon", "chowder"):
        scores = [linear(head.score, each) if name == "weldon" else through(head.score, each)
                  for each in own]
        found = []
        for column in range(len(scores[0])):
            ranked = sorted((float(each[column]) for each in scores), reverse=True)
            high = [ranked[min(each, len(ranked) - 1)] for each in range(10)]
            low = [ranked[max(len(ranked) - each, 0)] for each in range(10, 0, -1)]
            found.append(sum(high + low) / 20 if name == "weldon" else
                         float(through(head.layers, np.array(high + low))[0]))
        return np.array(found)
    if name == "deepmil":
        narrow = [linear(head.embed, each) for each in own]
    else:
        narrow = [through(head.embed, each) for each in own]
    if name in ("deepmil", "clam"):
        weights = attended(head.attention, narrow)
        slide = sum(weight * each for weight, each in zip(weights, narrow, strict=True))
        return through(head.layers, slide) if name == "deepmil" else linear(head.layers, slide)
    rows = [head.word.detach().numpy(), *narrow]
    for block in head.blocks:
        normed = [(each - each.mean()) / np.sqrt(each.var() + 1e-5) for each in rows]      # norms as they begin
        mixed = [block.qkv.weight.detach().numpy() @ each for each in normed]
        size = len(rows[0]) // block.heads
        anew = []
        for own_mixed in mixed:
            parts = []
            for number in range(block.heads):
                at = slice(number * size, (number + 1) * size)
                query, keys, values = own_mixed[:16][at], [each[16:32][at] for each in mixed], [
                    each[32:][at] for each in mixed]
                raw = np.array([math.exp(float(query @ key) / math.sqrt(size)) for key in keys])
                parts.append(sum(weight * value for weight, value in zip(raw / raw.sum(), values, strict=True)))
            anew.append(linear(block.out, np.concatenate(parts)))
        rows = [each + more for each, more in zip(rows, anew, strict=True)]
    return linear(head.layers, (rows[0] - rows[0].mean()) / np.sqrt(rows[0].var() + 1e-5))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("count", [1, 6, 33])
def test_it_is_what_plain_loops_give(name: str, outputs: int, count: int) -> None:
    head, own_ND = network(name, outputs), tiles([count], seed=count)
    expected = plain(name, head, own_ND.numpy())
    assert head(own_ND, [count]).outputs_BC[0].detach().numpy() == pytest.approx(expected, rel=0, abs=1e-10)


def test_the_shape_of_deepmil_is_the_papers() -> None:
    head = mil.build("deepmil", 2048, 1, {})
    shapes = [tuple(each.weight.shape) for each in head.modules() if isinstance(each, nn.Linear)]
    assert shapes == [(128, 2048), (128, 128), (128, 128), (1, 128), (128, 128), (64, 128), (1, 64)]


def test_the_loss_of_clams_tiles_is_of_those_most_and_least_attended_to() -> None:
    head = network("clam", 1)
    counts, labels = [40, 5, 1], [1, 0, 1]
    all_TD = tiles(counts)
    found = head(all_TD, counts, torch.tensor(labels))
    losses = []
    for own, label in zip(all_TD.split(counts), labels, strict=True):
        narrow = [through(head.embed, each) for each in own.numpy()]
        order = np.argsort(-attended(head.attention, narrow))
        count = max(1, min(8, len(own) // 2))
        least = order[-count:] if len(own) > 1 else []
        chosen = [*((each, 1) for each in order[:count]), *((each, 0) for each in least)]
        own_losses = []
        for place, truth in chosen:
            logits = linear(head.instances[label], narrow[place])
            own_losses.append(math.log(sum(math.exp(each) for each in logits)) - float(logits[truth]))
        losses.append(sum(own_losses) / len(own_losses))
    assert float(found.extra.detach()) == pytest.approx(sum(losses) / 3, abs=1e-10)
    assert head(all_TD, counts).extra == 0


def test_what_a_network_does_not_take_is_refused_by_name() -> None:
    with pytest.raises(mil.HeadError, match=r"args has 'hiden', which chowder does not take; .*hidden"):
        mil.build("chowder", 4, 1, {"hiden": [3]})


def test_a_slide_of_too_many_tiles_for_exact_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mil.TransMil, "MOST", 99)
    with pytest.raises(mil.HeadError, match="100 tiles"):
        network("transmil")(tiles(), COUNTS)


# --- what they learn

FINDERS: dict[str, tuple[dict[str, Any], float, int, int]] = {       # learning rate, slides a step, epochs
    "deepmil": ({"narrow": 16, "attention": 16}, 0.003, 4, 25), "chowder": ({"tile": [32]}, 0.01, 16, 60),
    "mean": ({}, 0.01, 16, 20)}


@pytest.mark.parametrize(("count", "shift"), [(100, 7.0), (1000, 20.0)])
def test_one_tile_of_many_is_found_where_the_mean_does_not_find_it(count: int, shift: float) -> None:
    """Half of 160 slides of noise have one tile that lies off in one direction; half are learnt from."""
    rng, area, before = np.random.default_rng(0), {}, torch.get_num_threads()
    bags = [rng.normal(size=(int(rng.integers(count * 3 // 4, count * 5 // 4)), 4)) for _ in range(160)]
    truth = np.arange(160) % 2
    for own, positive in zip(bags, truth, strict=True):
        own[rng.integers(len(own)), 0] += shift * positive
    slides = [torch.from_numpy(own).float() for own in bags]
    torch.set_num_threads(1)        # several would wait for each other longer than they work
    for name, (args, rate, batch, epochs) in FINDERS.items():
        torch.manual_seed(0)
        head, order = mil.build(name, 4, 1, args), np.random.default_rng(0)
        optimizer = torch.optim.Adam(head.parameters(), lr=rate)
        for _ in range(epochs):
            for rows in np.split(order.permutation(80), range(batch, 80, batch)):
                answer = head(torch.cat([slides[row] for row in rows]), [len(slides[row]) for row in rows])
                loss = F.binary_cross_entropy_with_logits(answer.outputs_BC, torch.from_numpy(truth[rows, None]) * 1.0)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.inference_mode():
            scores = head(torch.cat(slides[80:]), [len(own) for own in slides[80:]]).outputs_BC[:, 0].numpy()
        area[name] = roc_auc_score(truth[80:], scores)
    torch.set_num_threads(before)
    assert area["deepmil"] >= 0.95, area
    assert area["chowder"] >= 0.90, area
    assert area["mean"] <= 0.80, area
