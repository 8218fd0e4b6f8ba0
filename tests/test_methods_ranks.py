"""Every method on 2, 3 and 4 ranks, and in parts, is the method on one: losses, gradients, and all it keeps.

And where each rank has a BatchNorm of its own, MoCo's keys come from shuffled groups.
"""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssl_dist import dist

run = runpy.run_path(str(Path(__file__).with_name("ranks.py")))["run"]
small = runpy.run_path(str(Path(__file__).with_name("small.py")))
CASES, STEPS, apart, one_thread = small["CASES"], small["STEPS"], small["apart"], small["one_thread"]

WORLDS = (2, 3, 4)
PARTS = {2: 2, 3: 4, 4: 3}                      # of the 6, 4 and 3 tiles that a rank has
IN_PARTS = small["WITHOUT_BATCHNORM"]           # methods whose losses are means over tiles


def learn(name: str, network: str, kind: torch.dtype = torch.float64, parts: int = 1,
          steps: int = STEPS) -> list[dict[str, Tensor]]:
    """What every step gave and what the method was after it."""
    method = small["build"](name, network, kind=kind)
    optimizer = small["sgd"](method)
    return [{**{f"gradient {key}" if key != "loss" else key: value for key, value in given.items()},
             **{f"state {key}": value.clone() for key, value in method.state_dict().items()}}
            for given in small["train"](method, optimizer, parts=parts, last=steps)]


def on_ranks(_: Path) -> dict[str, Any]:
    return {**all_cases(), "shuffled": shuffled(), "statistics": statistics(),
            **{f"{name} in parts": learn(name, network, parts=PARTS[dist.world()]) for name, network in IN_PARTS}}


def all_cases() -> dict[str, list[dict[str, Tensor]]]:
    exact = {f"{name} {network}": learn(name, network) for name, network in CASES}
    return {**exact, **{f"{name} {network} float32": learn(name, network, torch.float32, steps=1)
                        for name, network in CASES}}


class Told(nn.Module):
    """In place of the keys' network: says of a tile its first pixels, and remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.given = nn.BatchNorm1d(1), torch.empty(0)

    def forward(self, pixels: Tensor) -> Tensor:
        self.given = pixels.clone()
        return self.first(pixels)

    @staticmethod
    def first(pixels: Tensor) -> Tensor:
        return pixels.flatten(1)[:, :30].double()


def shuffled() -> dict[str, Tensor]:
    """By step and part: whether every tile got its own key, and the tiles whose keys this rank made."""
    method, found = small["build"]("moco", local=True), {}
    method.keys = Told()
    for step in (0, 0, 1, 2):
        for parts in (1, PARTS[dist.world()]):
            own = small["cut"](small["batch"](method, step), dist.world(), dist.rank())
            for part in range(parts):
                given = small["cut"](own, parts, part)
                keys = method._keys(given)
                assert torch.equal(keys, Told.first(given.views[1])), "a tile has the key of another"
                whole = small["batch"](method, step).views[1]
                same = (Told.first(method.keys.given)[:, None] == Told.first(whole)[None]).all(dim=2)
                places = same.int().argmax(dim=1)
                name = f"{step}, {part} of {parts}"
                assert torch.equal(found.setdefault(name, places), places), "done again, it was shuffled otherwise"
    return found


def statistics() -> dict[str, Tensor]:
    """The mean that the first BatchNorm of each encoder saw, where both are given the same tiles."""
    found = {}
    for local in (True, False):
        method = small["build"]("moco", local=local)
        own = small["cut"](small["batch"](method), dist.world(), dist.rank())
        own.views[1] = own.views[0]
        method(own, 0.0)
        for name, encoder in (("query", method.encoder), ("key", method.keys[0])):
            found[f"{'local' if local else 'synchronised'} {name}"] = encoder.network.bn1.running_mean.clone()
    return found


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list]:
    return run(on_ranks, WORLDS, tmp_path_factory.mktemp("ranks"), "ssl_dist.methods.base")


@pytest.fixture(scope="module")
def alone() -> dict[str, list[dict[str, Tensor]]]:
    return all_cases()


def hold(found: list[dict[str, Tensor]], truth: list[dict[str, Tensor]], within: float, where: str) -> None:
    for step, (mine, expected) in enumerate(zip(found, truth, strict=True)):
        assert mine.keys() == expected.keys(), f"{where}, step {step}"
        for key, value in expected.items():
            assert apart(mine[key], value) < within, f"{where}, step {step}: {key} is {apart(mine[key], value)} apart"


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("name", "network"), CASES)
def test_on_any_number_of_ranks_a_method_does_what_one_process_does(name: str, network: str, world: int, ranked: dict,
                                                                    alone: dict) -> None:
    for number, rank in enumerate(ranked[world]):
        hold(rank[f"{name} {network}"], alone[f"{name} {network}"], 1e-10, f"rank {number} of {world}")


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("name", "network"), CASES)
def test_in_float32_it_is_as_near_the_truth_as_one_process_is(name: str, network: str, world: int, ranked: dict,
                                                              alone: dict) -> None:
    case = f"{name} {network}"
    (single,), truth = alone[f"{case} float32"], alone[case][0]
    rounding = 1e-5 + 4 * max(apart(single[key], exact) for key, exact in truth.items())
    assert rounding < 2e-3      # a wrong term is far off
    for rank in ranked[world]:
        (found,) = rank[f"{case} float32"]
        assert apart(found["loss"], truth["loss"]) < 1e-5
        for key, exact in truth.items():
            assert apart(found[key], exact) < rounding, f"{key}: {apart(found[key], exact)}, not {rounding}"


@pytest.mark.parametrize("world", WORLDS)
def test_a_method_is_the_same_on_every_rank_to_the_last_bit(world: int, ranked: dict) -> None:
    first, *others = ranked[world]
    for case in first.keys() - {"shuffled", "statistics"}:
        for other in others:
            for key, value in first[case][-1].items():
                assert torch.equal(other[case][-1][key], value), f"{case}: {key}"


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("name", "network"), IN_PARTS)
def test_a_batch_in_parts_is_the_batch(name: str, network: str, world: int, ranked: dict, alone: dict) -> None:
    for rank in ranked[world]:
        hold(rank[f"{name} in parts"], alone[f"{name} {network}"], 1e-10, f"{PARTS[world]} parts on {world} ranks")


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize(("name", "network"), IN_PARTS)
def test_a_batch_in_parts_is_the_batch_on_one_process_too(name: str, network: str, parts: int, alone: dict) -> None:
    hold(learn(name, network, parts=parts), alone[f"{name} {network}"], 1e-10, f"{parts} parts")


@pytest.mark.parametrize("world", WORLDS)
def test_keys_are_made_in_groups_of_tiles_that_are_shuffled_over_ranks(world: int, ranked: dict) -> None:
    ranks = [rank["shuffled"] for rank in ranked[world]]
    share, orders = small["TILES"] // world, []
    for step in range(3):
        # One permutation for all ranks: together they made a key of every tile, each once.
        order = torch.cat([rank[f"{step}, 0 of 1"] for rank in ranks])
        assert sorted(order.tolist()) == list(range(small["TILES"]))
        orders.append(order.tolist())
        groups = [set(each.tolist()) for each in order.split(share)]
        assert any(group != set(range(number * share, (number + 1) * share)) for number, group in enumerate(groups))
        parts = PARTS[world]
        for part in range(parts):
            made = torch.cat([rank[f"{step}, {part} of {parts}"] for rank in ranks])
            size = share // parts
            of_part = [rank * share + part * size + number for rank in range(world) for number in range(size)]
            assert sorted(made.tolist()) == of_part
    assert len({tuple(each) for each in orders}) == 3, "every step is shuffled alike"


@pytest.mark.parametrize("world", WORLDS)
def test_a_query_does_not_share_its_statistics_with_its_key(world: int, ranked: dict) -> None:
    seen = [rank["statistics"] for rank in ranked[world]]
    assert any(not torch.allclose(each["local query"], each["local key"], rtol=1e-6) for each in seen)
    assert all(torch.equal(each["synchronised query"], each["synchronised key"]) for each in seen), "nothing to hide"


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("name", "network"), CASES)
def test_what_some_ranks_saved_one_process_goes_on_from(name: str, network: str, world: int, ranked: dict,
                                                        alone: dict) -> None:
    method = small["build"](name, network)
    saved = {key.removeprefix("state "): value for key, value in ranked[world][-1][f"{name} {network}"][0].items()
             if key.startswith("state ")}
    method.load_state_dict(saved)
    (given,) = small["train"](method, small["sgd"](method), first=1, last=2)
    for key, value in given.items():
        expected = alone[f"{name} {network}"][1][key if key == "loss" else f"gradient {key}"]
        assert apart(value, expected) < 1e-10, key


def test_what_was_compared_moved(alone: dict) -> None:
    for name, network in CASES:
        steps = alone[f"{name} {network}"]
        gradients = [value for key, value in steps[-1].items() if key.startswith("gradient")]
        assert max(float(each.abs().max()) for each in gradients) > 1e-3, name
        still = [key for key in steps[0] if key.startswith("state") and torch.equal(steps[-1][key], steps[0][key])]
        assert not still, f"{name}: {still}"
