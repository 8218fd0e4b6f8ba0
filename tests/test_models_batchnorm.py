"""BatchNorm over all ranks against torch's own on the whole batch."""

import copy
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from ssl_dist import dist
from ssl_dist.models.batchnorm import SyncBatchNorm, SyncBatchNormAct, has_local, synchronise

run = runpy.run_path(str(Path(__file__).with_name("ranks.py")))["run"]

SHAPES = {"pictures": (12, 5, 3, 4), "vectors": (12, 7), "sequences": (12, 3, 6), "single": (6, 4)}
KINDS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}
SETTINGS = {"ordinary": {}, "cumulative": {"momentum": None}, "heavy": {"momentum": 0.7, "eps": 0.1},
            "bare": {"affine": False}, "forgetful": {"track_running_stats": False}}


def norm(shape: tuple[int, ...], settings: dict) -> nn.Module:
    torch.manual_seed(1)
    found = KINDS[len(shape)](shape[1], **settings)
    if found.affine:
        nn.init.normal_(found.weight)
        nn.init.normal_(found.bias)
    return found


def given(shape: tuple[int, ...], step: int) -> Tensor:
    """The whole batch of a step, far from zero: there a variance as a difference of squares would cancel."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(step)) * 3 + 40


def share(whole: Tensor) -> Tensor:
    return whole.chunk(dist.world())[dist.rank()].clone()


def global_loss(own: Tensor) -> Tensor:
    """Every rank computes the same loss of all ranks' rows, and it is not a mean over rows."""
    whole = dist.gather_with_gradient(own)
    flat = whole.flatten(1)
    weights = torch.linspace(-1, 2, flat.numel()).view_as(flat)
    return (flat.sigmoid() * weights).sum() + (flat @ flat.T).tanh().mean()


def train(network: nn.Module, shape: tuple[int, ...], kind: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What three steps leave behind; gradients of parameters averaged over ranks, as DeepSpeed does."""
    found = {}
    for step in range(3):
        own = share(given(shape, step)).to(kind).requires_grad_()
        for parameter in network.parameters():
            parameter.grad = None
        output = network(own)
        global_loss(output).backward()
        # A gradient that stays on its rank is world times that of the mean over ranks.
        found |= {f"output {step}": output.detach(), f"input gradient {step}": own.grad / dist.world()}
        for name, parameter in network.named_parameters():
            found[f"gradient {step} {name}"] = torch.stack(dist.gather(parameter.grad)).mean(0)
    return found | {f"state {name}": value.clone() for name, value in network.state_dict().items()}


def small_network() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(5, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1),
                         BatchNormAct2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4), nn.BatchNorm1d(4))


def cases() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    alone = {f"{form}, {name}": (norm(shape, settings), shape) for form, shape in SHAPES.items()
             for name, settings in SETTINGS.items() if form == "pictures" or name == "ordinary"}
    return {**alone, "network": (small_network(), (12, 5, 8, 8))}


def on_ranks(_: Path) -> dict[str, dict[str, Tensor]]:
    found = {name: train(synchronise(nn.Sequential(network)), shape) for name, (network, shape) in cases().items()}
    exact = {f"exact {name}": train(synchronise(nn.Sequential(network).double()), shape, torch.float64)
             for name, (network, shape) in cases().items()}
    half = synchronise(nn.Sequential(norm(SHAPES["pictures"], {})))(share(given(SHAPES["pictures"], 0)).bfloat16())
    resting = synchronise(nn.Sequential(small_network())).eval()(share(given((12, 5, 8, 8), 0)))
    return {**found, **exact, "half": {"output 0": half.detach()}, "resting": {"output 0": resting.detach()}}


def in_groups(_: Path) -> dict[str, dict[str, Tensor]]:
    return {name: train(synchronise(nn.Sequential(network), ranks=2), shape)
            for name, (network, shape) in grouped().items()}


def grouped() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    return {"pictures": (norm(SHAPES["pictures"], {}), SHAPES["pictures"]),
            "network": (small_network(), (12, 5, 8, 8))}


class Halves(nn.Module):
    """torch's BatchNorm on each half of the batch by itself: what two groups of ranks are to do."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.first, self.second = network, copy.deepcopy(network)
        for name, parameter in self.first.named_parameters():       # one weight, two sets of running statistics
            owner, _, last = name.rpartition(".")
            setattr(self.second.get_submodule(owner), last, parameter)

    def forward(self, input: Tensor) -> Tensor:
        one, other = input.chunk(2)
        return torch.cat([self.first(one), self.second(other)])


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list]:
    return run(on_ranks, (2, 3), tmp_path_factory.mktemp("ranks"))


def extent(values: Tensor) -> float:
    return max(1.0, float(values.abs().max()))


@pytest.fixture
def _two_threads() -> Iterator[None]:
    """How torch rounds depends on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_do_what_torchs_batchnorm_does_on_the_whole_batch(world: int, ranked: dict) -> None:
    ranks = ranked[world]
    for case, (network, shape) in cases().items():
        torchs = train(nn.Sequential(copy.deepcopy(network)), shape)
        expected = train(nn.Sequential(network).double(), shape, torch.float64)
        # In float64 there is no rounding to speak of, and a wrong term of any size shows.
        for name, truth in expected.items():
            found = [rank[f"exact {case}"][name] for rank in ranks]
            for each in [torch.cat(found)] if name.startswith(("output", "input")) else found:
                assert float((each - truth).abs().max()) / extent(truth) < 1e-9, f"{case}, {name}"
        # As near that as torch's own in float32, give or take: of what cancels, as a bias before a norm, rounding is
        # all there is, and another processor's differs tenfold.
        rounding = 4e-5 + 16 * max(float((torchs[name] - truth).abs().max()) / extent(truth)
                                   for name, truth in expected.items())
        assert rounding < 0.01
        for name, truth in expected.items():
            found = [rank[case][name] for rank in ranks]
            if name.startswith(("output", "input")):
                found = [torch.cat(found)]
            for each in found:          # parameters and running statistics are the same on every rank
                apart = float((each - truth).abs().max()) / extent(truth)
                assert apart < rounding, f"{case}, {name}: {apart}, rounding explains {rounding}"
    half = torch.cat([rank["half"]["output 0"] for rank in ranks])
    assert half.dtype == torch.bfloat16
    whole = norm(SHAPES["pictures"], {})(given(SHAPES["pictures"], 0).bfloat16().float())
    torch.testing.assert_close(half.float(), whole, rtol=0.01, atol=0.02)
    resting = torch.cat([rank["resting"]["output 0"] for rank in ranks])
    torch.testing.assert_close(resting, nn.Sequential(small_network()).eval()(given((12, 5, 8, 8), 0)))


def test_groups_of_ranks_do_what_torchs_batchnorm_does_on_each_part(tmp_path: Path) -> None:
    ranks = run(in_groups, (4,), tmp_path)[4]
    for case, (network, shape) in grouped().items():
        expected = train(Halves(nn.Sequential(network).double()), shape, torch.float64)
        for name, truth in expected.items():
            if name.startswith("state "):
                _, half, rest = name.replace("state ", "state.").split(".", 2)
                found = [rank[case][f"state {rest}"] for rank in (ranks[:2] if half == "first" else ranks[2:])]
            elif name.startswith("gradient "):
                found = [rank[case][name.replace(" first.", " ")] for rank in ranks]
            else:
                found = [torch.cat([rank[case][name] for rank in ranks])]
            for each in found:
                apart = float((each - truth).abs().max()) / extent(truth)
                assert apart < 2e-3, f"{case}, {name}: {apart}"
    means = [rank["pictures"]["state 0.running_mean"] for rank in ranks]
    assert torch.equal(means[0], means[1]) and torch.equal(means[2], means[3]) and not torch.equal(means[0], means[2])


def test_a_group_of_some_ranks_still_tells_a_query_from_which_ranks_its_key_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "world", lambda: 4)
    for ranks, local in ((0, False), (4, False), (2, True), (1, True)):
        assert has_local(synchronise(nn.Sequential(nn.BatchNorm2d(4)), ranks)) == local
    assert has_local(nn.Sequential(nn.BatchNorm2d(4))) and not has_local(nn.Sequential(nn.LayerNorm(4)))


def test_alone_it_is_torchs_to_the_last_bit() -> None:
    for case in cases():
        (network, shape), (twin, _) = cases()[case], cases()[case]
        found, expected = train(synchronise(nn.Sequential(twin)), shape), train(nn.Sequential(network), shape)
        assert found.keys() == expected.keys()
        for name, truth in expected.items():
            assert torch.equal(found[name], truth), f"{case}: {name}"


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "resnet18"])
def test_a_network_keeps_its_names_weights_and_answers(name: str) -> None:
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=0)
    pixels = torch.randn(2, 3, 64, 64)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    parameters = dict(network.named_parameters())
    count = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    expected = network.eval()(pixels)
    synchronised = synchronise(network)
    assert sum(isinstance(module, SyncBatchNorm) for module in synchronised.modules()) == count > 0
    assert not [module for module in synchronised.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
                and not isinstance(module, SyncBatchNorm)]
    assert list(synchronised.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in synchronised.state_dict().items())
    assert {key: id(value) for key, value in synchronised.named_parameters()} == \
        {key: id(value) for key, value in parameters.items()}, "an optimizer made before would train dead weights"
    assert torch.equal(synchronised(pixels), expected)
    timm.create_model(name, num_classes=0).load_state_dict(synchronised.state_dict())


def test_timms_batchnorm_with_its_activation_keeps_it() -> None:
    (found,) = synchronise(nn.Sequential(BatchNormAct2d(4, act_layer=nn.SiLU)))
    assert isinstance(found, SyncBatchNormAct)
    (plain,) = synchronise(nn.Sequential(nn.BatchNorm2d(4)))
    assert not isinstance(plain, SyncBatchNormAct)
    pixels = torch.randn(3, 4, 2, 2)
    assert torch.equal(found(pixels), nn.functional.silu(nn.BatchNorm2d(4)(pixels)))


def test_a_batchnorm_by_itself_is_synchronised_and_a_second_time_changes_nothing() -> None:
    found = synchronise(nn.BatchNorm1d(3))
    assert isinstance(found, SyncBatchNorm)
    assert synchronise(found) is found
    network = synchronise(nn.Sequential(nn.BatchNorm1d(3)))
    (once,) = network
    (twice,) = synchronise(network)
    assert once is twice


def test_training_or_resting_is_kept() -> None:
    (found,) = synchronise(nn.Sequential(nn.BatchNorm2d(4).eval()))
    assert not found.training
    (found,) = synchronise(nn.Sequential(nn.BatchNorm2d(4)))
    assert found.training
