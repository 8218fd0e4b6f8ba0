"""What the papers' code gets right and others' copies get wrong: teachers, queues, prototypes, centres, statistics."""

import copy
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_dist import schedule
from ssl_dist.data.batch import View
from ssl_dist.methods import base, losses
from ssl_dist.methods.dino import Method as Dino
from ssl_dist.methods.moco import Method as Moco
from ssl_dist.methods.swav import Method as Swav

small = runpy.run_path(str(Path(__file__).with_name("small.py")))
build, batch, train, sgd, SETTINGS, STEPS = (small[name] for name in ("build", "batch", "train", "sgd", "SETTINGS",
                                                                      "STEPS"))
one_thread = small["one_thread"]


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def inputs(module: nn.Module) -> list[Tensor]:
    """Fills with what the module is given."""
    found: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    return found


def outputs(module: nn.Module) -> list[Tensor]:
    found: list[Tensor] = []
    module.register_forward_hook(lambda _, given, said: found.append(said))
    return found


# ---- teachers

def teacher_and_student(method: base.Method) -> tuple[nn.Module, nn.Module]:
    if isinstance(method, Dino):
        return method.teacher, method.student
    assert isinstance(method, Moco)
    return method.keys, nn.Sequential(method.encoder, method.projector)


@pytest.mark.parametrize("name", ["moco", "dino"])
def test_a_teacher_begins_as_its_student_and_never_has_a_gradient(name: str) -> None:
    method = build(name)
    teacher, student = teacher_and_student(method)
    for behind, ahead in zip(teacher.parameters(), student.parameters(), strict=True):
        assert torch.equal(behind, ahead)
        assert behind.data_ptr() != ahead.data_ptr()
        assert not behind.requires_grad
        assert ahead.requires_grad
    list(train(method, sgd(method)))
    assert all(each.grad is None for each in teacher.parameters())


@pytest.mark.parametrize("name", ["moco", "dino"])
def test_a_teacher_moves_after_the_step_by_the_scheduled_part_of_the_way(name: str) -> None:
    method = build(name)
    teacher, student = teacher_and_student(method)
    for step in range(STEPS):
        before = [each.clone() for each in teacher.parameters()]
        list(train(method, sgd(method), first=step, last=step + 1))
        momentum = schedule.cosine(step / STEPS, 0.6, 1.0) if name == "dino" else 0.7
        for old, new, ahead in zip(before, teacher.parameters(), student.parameters(), strict=True):
            torch.testing.assert_close(new, momentum * old + (1 - momentum) * ahead, rtol=1e-12, atol=1e-14)


def test_a_teachers_momentum_may_reach_one_and_then_it_stays() -> None:
    method = build("dino")
    with torch.no_grad():
        for each in method.student.parameters():
            each.add_(1)
    before = copied(method.teacher)
    method.after_step(1.0)
    assert not moved(method.teacher, before)


@pytest.mark.parametrize("name", ["moco", "dino"])
def test_a_teachers_running_statistics_are_of_what_it_sees_itself(name: str) -> None:
    method = build(name)
    teacher, student = teacher_and_student(method)
    statistics = {key for key in copied(teacher) if "running" in key or "num_batches" in key}
    before = copied(teacher)
    with torch.no_grad():
        method(batch(method), 0.0)
    assert moved(teacher, before) == statistics, "it normalises by the batch, as in training, and remembers it"
    before = copied(teacher)
    with torch.no_grad():
        for values in student.buffers():
            values.add_(1)
    method.after_step(0.0)
    assert not moved(teacher, before) & statistics


@pytest.mark.parametrize("name", ["moco", "dino"])
def test_training_does_not_switch_a_teachers_batchnorm_off(name: str) -> None:
    method = build(name).eval().train()
    assert all(module.training for module in teacher_and_student(method)[0].modules())


@pytest.mark.parametrize(("network", "args"), [
    ("resnet18", {"drop_rate": 0.5, "drop_path_rate": 0.5, "drop_block_rate": 0.5}),
    ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2, "drop_rate": 0.5, "pos_drop_rate": 0.5,
                              "patch_drop_rate": 0.5, "proj_drop_rate": 0.5, "attn_drop_rate": 0.5,
                              "drop_path_rate": 0.5}),
    ("convnext_atto", {"drop_rate": 0.5, "drop_path_rate": 0.5}),
    ("efficientnet_b0", {"drop_rate": 0.5, "drop_path_rate": 0.5}),
    ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 4, "depths": (1, 1, 1, 1), "drop_rate": 0.5,
                                      "proj_drop_rate": 0.5, "attn_drop_rate": 0.5, "drop_path_rate": 0.5}),
])
def test_a_teacher_drops_nothing_whatever_its_student_drops(network: str, args: dict[str, Any]) -> None:
    student = timm.create_model(network, num_classes=0, **args).train()
    teacher = base.teacher(student)
    size = args.get("img_size", 64)
    pixels = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert teacher.training
        assert torch.equal(teacher(pixels), teacher(pixels))
        assert not torch.equal(student(pixels), student(pixels)), "nothing was dropped, so nothing was tested"


def test_evaluation_loads_dinos_teacher_and_mocos_query() -> None:
    dino, moco = build("dino"), build("moco")
    assert dino.encoder is dino.teacher["encoder"]
    assert dino.encoder is not dino.student["encoder"]
    list(train(dino, sgd(dino)))
    assert not any(torch.equal(*each) for each in zip(dino.encoder.parameters(), dino.student["encoder"].parameters(),
                                                      strict=True))
    assert moco.encoder is not moco.keys[0]
    assert all(each.requires_grad for each in moco.encoder.parameters())


# ---- MoCo's queue

def test_a_query_is_told_from_the_keys_of_earlier_steps_and_its_own_come_after_the_loss() -> None:
    method = build("moco", queue=100)
    queries, keys = outputs(method.projector), outputs(method.keys)
    seen = torch.zeros(0, 8, dtype=torch.float64)
    for step in range(STEPS):
        assert torch.equal(method.queue.filled(), seen)
        said = method(batch(method, step), step / STEPS)
        assert torch.equal(method.queue.filled(), seen), "the queue moved before the step"
        key = F.normalize(keys[-1], dim=1)
        torch.testing.assert_close(said["loss"], losses.info_nce(queries[-1], key, seen, 0.2))
        method.after_step(step / STEPS)
        seen = torch.cat([seen, key])


def test_with_an_empty_queue_the_loss_is_nothing_for_rows_that_were_never_written_are_not_used() -> None:
    method = build("moco", queue=65_536)
    assert float(method(batch(method), 0.0)["loss"].detach()) == pytest.approx(0, abs=1e-12)
    assert len(method.queue.filled()) == 0


@pytest.mark.parametrize("length", [5, 12, 17, 24, 100])
def test_a_queue_holds_the_newest_unit_vectors_whatever_its_length(length: int) -> None:
    queue, given = base.Queue(length, 3), []
    for step in range(7):
        new = F.normalize(torch.randn(12, 3, generator=torch.Generator().manual_seed(step)), dim=1)
        given += new.tolist()
        for part in new.chunk(1 + step % 3):
            queue.take(part)
        queue.push()
        assert sorted(queue.filled().tolist()) == sorted(given[-length:])
    assert torch.allclose(queue.filled().norm(dim=1), torch.ones(min(length, 84)))


def test_a_queue_of_random_unit_vectors_asks_for_the_logarithm_of_its_length() -> None:
    generator = torch.Generator().manual_seed(0)
    queue = F.normalize(torch.randn(65_536, 128, generator=generator), dim=1)
    query, key = torch.randn(8, 128, generator=generator), torch.randn(8, 128, generator=generator)
    loss = float(losses.info_nce(query, key, queue, 0.2))
    # A cosine of random vectors has deviation 1/sqrt(128), so e^(cosine/0.2) has mean e^(0.5/128/0.04).
    pull = float((F.normalize(query, dim=1) * F.normalize(key, dim=1)).sum(dim=1).mean()) / 0.2
    assert loss == pytest.approx(math.log(65_537) + 0.5 / 128 / 0.04 - pull, abs=0.01)


# ---- prototypes, classes: unit, frozen

def frozen(method: base.Method) -> nn.Parameter:
    return method.prototypes.weight if isinstance(method, Swav) else method.student["head"].last


OPTIMIZERS = {
    "sgd": sgd,
    "adamw": lambda method: torch.optim.AdamW([each for each in method.parameters() if each.requires_grad], lr=0.01,
                                              weight_decay=0.5),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["swav", "dino"])
def test_what_is_frozen_stays_to_the_last_bit_and_then_moves(name: str, optimizer: str) -> None:
    method = build(name, kind=torch.float32, frozen=0.5)
    steps = OPTIMIZERS[optimizer](method)
    before = frozen(method).detach().clone()
    for step, learns in ((0, False), (1, False), (2, True), (0, False), (2, True)):     # whatever came before
        before = frozen(method).detach().clone()
        method(batch(method, step), step / STEPS)["loss"].backward()
        assert (frozen(method).grad is not None) == learns
        for each in method.parameters():        # as DeepSpeed does before it averages
            if each.requires_grad and each.grad is None:
                each.grad = torch.zeros_like(each)
        steps.step()
        method.after_step(step / STEPS)
        steps.zero_grad()
        assert torch.equal(frozen(method), before) != learns


def test_prototypes_are_of_unit_length_before_every_forward() -> None:
    method = build("swav", frozen=0.0)
    optimizer = sgd(method)
    lengths = [method.prototypes.weight.norm(dim=1)]
    for _ in train(method, optimizer):
        lengths.append(method.prototypes.weight.norm(dim=1))
    assert len(lengths) == STEPS + 1
    for each, within in zip(lengths, (1e-6, *[1e-12] * STEPS), strict=True):      # they were drawn in float32
        torch.testing.assert_close(each, torch.ones_like(each), rtol=within, atol=within)


def test_embeddings_and_classes_are_compared_as_directions() -> None:
    method = build("swav")
    given = inputs(method.prototypes)
    method(batch(method), 0.0)
    torch.testing.assert_close(given[0].norm(dim=1), torch.ones(len(given[0]), dtype=torch.float64))
    head = build("dino").student["head"]
    features = torch.randn(5, 16, dtype=torch.float64)
    before = head(features)
    with torch.no_grad():
        head.last.mul_(torch.rand(11, 1, dtype=torch.float64) + 0.5)
    torch.testing.assert_close(head(features), before)
    assert float(before.detach().abs().max()) <= 1 + 1e-12


# ---- SwAV's queue

def test_assignments_are_among_the_queue_once_its_time_has_come() -> None:
    method = build("swav", queue=17, queue_from=0.6)
    scored = inputs(method.prototypes)
    for step in range(STEPS):
        scored.clear()
        method(batch(method, step), step / STEPS)
        # The views' own scores, and for each of the two large views those of its queue, which fills from the start.
        assert [len(each) for each in scored] == [48, *([17] * 2 if step / STEPS >= 0.6 else [0] * 2)]
        method.after_step(step / STEPS)
        assert [len(each.filled()) for each in method.queues] == [min(17, 12 * (step + 1))] * 2


def test_the_queue_decides_who_gets_which_prototype() -> None:
    losses_by_queue = []
    for queue in (0, 17):
        method = build("swav", queue=queue, queue_from=0.0)
        optimizer = sgd(method)
        list(train(method, optimizer, last=1))
        losses_by_queue.append(float(method(batch(method, 1), 1 / STEPS)["loss"].detach()))
    assert losses_by_queue[0] != losses_by_queue[1]


# ---- DINO

def test_the_teacher_sees_the_large_views_alone_and_views_of_one_size_go_together() -> None:
    method = build("dino")
    taught, learnt = inputs(method.teacher["encoder"]), inputs(method.student["encoder"])
    method(batch(method), 0.0)
    assert [tuple(each.shape) for each in taught] == [(24, 32, 32, 3)]
    assert [tuple(each.shape) for each in learnt] == [(24, 32, 32, 3), (24, 16, 16, 3)]


def test_the_centre_moves_after_the_loss_to_the_mean_of_what_the_teacher_said() -> None:
    method = build("dino")
    said, heard = outputs(method.teacher["head"]), outputs(method.student["head"])
    centre = torch.zeros(11, dtype=torch.float64)
    for step in range(STEPS):
        loss = method(batch(method, step), step / STEPS)["loss"]
        assert torch.equal(method.centre_K, centre), "the centre moved before the step"
        expected = losses.dino(heard[-1].chunk(4), said[-1].chunk(2), centre, 0.1, method.temperature(step / STEPS))
        torch.testing.assert_close(loss, expected)
        method.after_step(step / STEPS)
        centre = 0.9 * centre + 0.1 * said[-1].mean(dim=0)
        torch.testing.assert_close(method.centre_K, centre, rtol=1e-12, atol=1e-14)
        centre = method.centre_K.clone()


def test_a_view_is_not_compared_with_itself() -> None:
    method = build("dino", views=(View(size=32), View(size=32)))
    said, heard = outputs(method.teacher["head"]), outputs(method.student["head"])
    loss = method(batch(method), 0.0)["loss"]
    (first, second), (one, other) = said[0].div(0.04).softmax(1).chunk(2), heard[0].div(0.1).log_softmax(1).chunk(2)
    torch.testing.assert_close(loss, -((first * other).sum(1).mean() + (second * one).sum(1).mean()) / 2)


@pytest.mark.parametrize(("warmup", "expected"), [
    (0.5, {0.0: 0.04, 0.25: 0.055, 0.5: 0.07, 0.75: 0.07, 1.0: 0.07}), (0.0, {0.0: 0.07, 1.0: 0.07}),
])
def test_the_teachers_temperature_rises_in_a_line_and_stays(warmup: float, expected: dict[float, float]) -> None:
    method = build("dino", temperature_warmup=warmup)
    assert {progress: method.temperature(progress) for progress in expected} == pytest.approx(expected)


# ---- all methods

@pytest.mark.parametrize("order", [(32, 32, 16, 16), (32, 16, 32, 16), (16, 24, 32, 16), (16,)])
def test_views_of_any_sizes_come_back_in_their_order(order: tuple[int, ...]) -> None:
    views = [torch.full((2, size, size, 3), float(number)) for number, size in enumerate(order)]
    network = nn.Module()
    network.forward = lambda pixels: pixels.mean(dim=(1, 2))        # type: ignore[method-assign]
    found = base.by_size(network, views).chunk(len(order))
    assert [each[0, 0].item() for each in found] == list(range(len(order)))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_method_goes_on_from_its_state_as_if_nothing_had_happened(name: str) -> None:
    method = build(name)
    optimizer = sgd(method)
    list(train(method, optimizer, last=STEPS - 1))
    state, moments = copy.deepcopy(method.state_dict()), copy.deepcopy(optimizer.state_dict())
    (expected,) = train(method, optimizer, first=STEPS - 1)
    torch.manual_seed(1)
    again = build(name)
    with torch.no_grad():
        for values in again.state_dict().values():
            values.add_(1)          # nothing of a fresh method may be left
    again.load_state_dict(state)
    resumed = sgd(again)
    resumed.load_state_dict(moments)
    (found,) = train(again, resumed, first=STEPS - 1)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    after = again.state_dict()
    assert all(torch.equal(after[key], value) for key, value in method.state_dict().items())


def test_what_a_method_remembers_stands_in_its_state() -> None:
    assert {"queue.rows_KD", "queue._written", "keys.0.network.conv1.weight"} <= build("moco").state_dict().keys()
    assert {f"queues.{view}.{name}" for view in (0, 1) for name in ("rows_KD", "_written")} | {
        "prototypes.weight"} <= build("swav").state_dict().keys()
    assert {"centre_K", "teacher.head.last", "teacher.encoder.network.bn1.running_mean"} <= \
        build("dino").state_dict().keys()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_collapse_shows_in_the_figures_that_come_with_the_loss(name: str) -> None:
    method = build(name)
    said = method(batch(method), 0.0)
    assert {"loss", "deviation", "rank"} <= said.keys()
    assert all(value.ndim == 0 and torch.isfinite(value) for value in said.values())
    assert not any(value.requires_grad for key, value in said.items() if key != "loss")
    own = {"dino": {"teacher_entropy", "batch_entropy"}, "swav": {"prototypes_used"},
           "simclr": {"positive_similarity"}, "moco": {"positive_similarity"},
           "vicreg": {"invariance", "variance", "covariance"}}
    assert own.get(name, set()) <= said.keys()
    alike, unlike = base.spread(torch.ones(8, 4)), base.spread(torch.eye(8))
    assert float(alike["deviation"]) == pytest.approx(0, abs=1e-6)
    assert float(unlike["deviation"]) == pytest.approx(math.sqrt(7 / 8))
    assert float(unlike["rank"]) == pytest.approx(7)
