"""Every method on 2, 3 and 4 ranks, and in parts, is the method on one: losses, gradients, and all it keeps."""

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

run = runpy.run_path(str(Path(__file__).with_name("ranks.py")))["run"]
small = runpy.run_path(str(Path(__file__).with_name("small.py")))
CASES, STEPS, apart = small["CASES"], small["STEPS"], small["apart"]

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
    from ssl_dist import dist

    return {**all_cases(), **{f"{name} in parts": learn(name, network, parts=PARTS[dist.world()])
                              for name, network in IN_PARTS}}


def all_cases() -> dict[str, list[dict[str, Tensor]]]:
    exact = {f"{name} {network}": learn(name, network) for name, network in CASES}
    return {**exact, **{f"{name} {network} float32": learn(name, network, torch.float32, steps=1)
                        for name, network in CASES}}


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list]:
    return run(on_ranks, WORLDS, tmp_path_factory.mktemp("ranks"), "ssl_dist.methods.base")


@pytest.fixture(scope="module")
def alone() -> Iterator[dict[str, list[dict[str, Tensor]]]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)        # for networks of this size, threads wait for each other longer than they reckon
    yield all_cases()
    torch.set_num_threads(threads)


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
    for case in first:
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


def test_what_was_compared_moved(alone: dict) -> None:
    for name, network in CASES:
        steps = alone[f"{name} {network}"]
        gradients = [value for key, value in steps[-1].items() if key.startswith("gradient")]
        assert max(float(each.abs().max()) for each in gradients) > 1e-3, name
        still = [key for key in steps[0] if key.startswith("state") and torch.equal(steps[-1][key], steps[0][key])]
        assert not still, f"{name}: {still}"
