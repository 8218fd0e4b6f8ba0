"""Sparse convolution against a dense one on the grid with zeros where nothing is, and what place is worth.

T tiles or cells   D width   B slides   H, W rows and columns of the grid
"""

import copy
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from ssl_dist import dist
from ssl_dist.models import sparse
from ssl_dist.models.batchnorm import synchronise
from ssl_dist.models.sparse import Convolution, Map, SlideEncoder

run = runpy.run_path(str(Path(__file__).with_name("ranks.py")))["run"]

Tiles = tuple[Tensor, Tensor, int]          # cells (T, 2), owners (T,), slides


def random(tiles: int, extent: int, slides: int, *, low: int = 0, seed: int = 0) -> Tiles:
    """Tiles anywhere, several in one cell where they are many, every slide with one at least."""
    told = torch.Generator().manual_seed(seed)
    owner_T = torch.cat([torch.arange(slides), torch.randint(slides, (tiles - slides,), generator=told)])
    return torch.randint(low, low + extent, (tiles, 2), generator=told), owner_T, slides


def grid(columns: int, rows: int) -> Tiles:
    cell_T2 = torch.cartesian_prod(torch.arange(columns), torch.arange(rows))
    return cell_T2, torch.zeros(len(cell_T2), dtype=torch.int64), 1


MAPS: dict[str, Tiles] = {
    "one tile": (torch.tensor([[3, 4]]), torch.tensor([0]), 1), "an odd tile": (torch.tensor([[5, -7]]),
                                                                               torch.tensor([0]), 1),
    "full": grid(6, 5), "alone": random(12, 40, 1), "dense": random(60, 8, 1), "duplicates": random(90, 5, 1),
    "negative": random(40, 9, 1, low=-17), "several slides": random(80, 9, 3, low=-4, seed=1),
    "many slides, few tiles": random(25, 6, 20, seed=2)}


class Dense:
    """The same tiles on a grid: sums and counts by plain loops."""

    def __init__(self, features_TD: Tensor, tiles: Tiles):
        cell_T2, owner_T, slides = tiles
        self.low = [2 * (int(low) // 2) - 2 for low in cell_T2.amin(0)]         # its first place is even
        across, down = (int(high) - low + 4 for high, low in zip(cell_T2.amax(0), self.low, strict=True))
        self.mask = torch.zeros(slides, 1, down, across, dtype=features_TD.dtype)
        sums: dict[tuple[int, int, int], list[Tensor]] = {}
        for row, ((column, line), slide) in enumerate(zip(cell_T2.tolist(), owner_T.tolist(), strict=True)):
            sums.setdefault((slide, line - self.low[1], column - self.low[0]), []).append(features_TD[row])
        self.grid = torch.zeros(slides, features_TD.shape[1], down, across, dtype=features_TD.dtype)
        for (slide, row, column), found in sums.items():
            self.mask[slide, 0, row, column] = 1
            self.grid[slide, :, row, column] = sum(found) / len(found)          # type: ignore[operator]


def on_grid(tiles: Map, like: Tensor, low: list[int]) -> Tensor:
    """Vectors of cells at their places on a grid of the shape of `like`."""
    slide_T, column_T, row_T = tiles.cells.cell_T3.unbind(1)
    empty = torch.zeros(like.shape[0], *like.shape[2:], tiles.features_TD.shape[1], dtype=tiles.features_TD.dtype)
    return empty.index_put((slide_T, row_T - low[1], column_T - low[0]), tiles.features_TD).permute(0, 3, 1, 2)


def given(tiles: Tiles, width: int = 4) -> Tensor:
    told = torch.Generator().manual_seed(7)
    return torch.randn(len(tiles[0]), width, dtype=torch.float64, generator=told).requires_grad_()


def weighed(values: Tensor) -> Tensor:
    """A number to which every place gives something else."""
    return (values * torch.linspace(-1, 2, values.numel(), dtype=values.dtype).view_as(values).cos()).sum()


def gradients(loss: Tensor, of: list[Tensor]) -> list[Tensor]:
    return [each.clone() for each in torch.autograd.grad(loss, of)]


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", MAPS)
def test_a_sparse_convolution_is_the_dense_one_of_the_grid(name: str, stride: int) -> None:
    tiles = MAPS[name]
    torch.manual_seed(1)
    layer, features_TD = Convolution(4, 6, stride=stride).double(), given(tiles)
    dense = Dense(features_TD, tiles)
    expected = F.conv2d(dense.grid, layer.weight, padding=1, stride=stride)
    if stride == 1:
        expected = expected * dense.mask
    found = layer(sparse.of_tiles(features_TD, *tiles))
    low = [each // stride for each in dense.low]
    mine = on_grid(found, expected, low)
    same([mine], [expected])
    assert len(found.features_TD) == len(found.cells.cell_T3.unique(dim=0))
    of: list[Tensor] = [features_TD, layer.weight]
    same(gradients(weighed(mine), of), gradients(weighed(expected), of))


@pytest.mark.parametrize("name", MAPS)
def test_means_are_of_what_is_there(name: str) -> None:
    tiles, features_TD = MAPS[name], given(MAPS[name])
    dense, found = Dense(features_TD, tiles), sparse.of_tiles(features_TD, *tiles)
    same([found.mean()], [dense.grid.sum((2, 3)) / dense.mask.sum((2, 3))])
    expected = halved(dense.grid, dense.mask)[0]
    mine = on_grid(found.halved(), expected, [each // 2 for each in dense.low])
    same([mine], [expected])
    same(gradients(weighed(mine) + weighed(found.mean()), [features_TD]),
         gradients(weighed(expected) + weighed(dense.grid.sum((2, 3)) / dense.mask.sum((2, 3))), [features_TD]))


def halved(grid: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over what is there of each 3 x 3, and where any of it is."""
    part = F.avg_pool2d(mask, 3, 2, 1)
    return F.avg_pool2d(grid, 3, 2, 1) / part.clamp(min=1e-9), (part > 0).to(grid.dtype)


def normed(grid: Tensor, mask: Tensor, norm: nn.Module) -> Tensor:
    """BatchNorm of the cells that are there, and zeros elsewhere."""
    there = mask[:, 0] > 0
    return torch.zeros_like(grid.permute(0, 2, 3, 1)).masked_scatter(
        there[..., None], norm(grid.permute(0, 2, 3, 1)[there])).permute(0, 3, 1, 2)


def twin(encoder: SlideEncoder, grid: Tensor, mask: Tensor) -> Tensor:
    """The slide encoder on a grid."""
    for block in encoder.blocks:
        shortcut, stride = grid, block.stride
        inner = F.conv2d(grid, block.conv1.weight, stride=stride, padding=1)
        if block.downsample is not None:
            pooled, mask = halved(grid, mask)
            shortcut = normed(F.conv2d(pooled, block.downsample[0].weight), mask, block.downsample[1])
        inner = F.relu(normed(inner, mask, block.bn1))
        inner = normed(F.conv2d(inner, block.conv2.weight, padding=1) * mask, mask, block.bn2)
        grid = F.relu(inner + shortcut) * mask
    return grid.sum((2, 3)) / mask.sum((2, 3))


def small(kind: str = "sparse", seed: int = 3) -> SlideEncoder:
    torch.manual_seed(seed)
    encoder = SlideEncoder(4, 6, kind).double()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return encoder


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["full", "duplicates", "negative", "several slides", "many slides, few tiles"])
def test_the_slide_encoder_is_its_dense_twin(name: str, training: bool) -> None:
    tiles, encoder, features_TD = MAPS[name], small().train(training), given(MAPS[name])
    other = copy.deepcopy(encoder)
    dense = Dense(features_TD, tiles)
    found, expected = encoder(features_TD, *tiles), twin(other, dense.grid, dense.mask)
    assert found.shape == (tiles[2], 6)
    same([found], [expected])
    same(gradients(weighed(found), [features_TD, *encoder.parameters()]),
         gradients(weighed(expected), [features_TD, *other.parameters()]))
    same(list(encoder.buffers()), list(other.buffers()))


def test_it_begins_as_the_last_stage_of_a_dense_resnet() -> None:
    network = timm.create_model("resnet18", num_classes=0).double().eval()
    encoder = SlideEncoder().double().eval()
    encoder.begin_as(network.state_dict())
    alone = SlideEncoder().double()
    alone.begin_as(network.layer4.state_dict())
    same(list(alone.parameters()), list(encoder.parameters()))
    tiles = grid(4, 6)
    features_TD = given(tiles, 256)
    dense, whole = Dense(features_TD, tiles), sparse.of_tiles(features_TD, *tiles)
    inner = encoder.blocks[0].conv1(whole)
    expected = network.layer4[0].conv1(dense.grid)
    same([on_grid(inner, expected, [each // 2 for each in dense.low])], [expected])
    # On a grid without a gap the second block has nothing that timm's has not.
    square = torch.randn(1, 512, 5, 7, dtype=torch.float64)
    cell_T2 = torch.cartesian_prod(torch.arange(5), torch.arange(7)).flip(1)
    found = encoder.blocks[1](sparse.of_tiles(square[0].flatten(1).T, cell_T2, torch.zeros(35, dtype=torch.int64), 1))
    same([on_grid(found, square, [0, 0])], [network.layer4[1](square)])
    with pytest.raises(ValueError, match="no weights for the mlp encoder of 256 -> 512"):
        SlideEncoder(kind="mlp").begin_as(network.state_dict())
    with pytest.raises(ValueError, match="no weights for the sparse encoder of 4 -> 6"):
        small().begin_as(network.state_dict())


def test_the_order_of_tiles_and_what_else_is_in_the_batch_do_not_matter() -> None:
    tiles, features_TD = MAPS["several slides"], given(MAPS["several slides"]).detach()
    cell_T2, owner_T, slides = tiles
    for kind in sparse.KINDS:
        encoder, order_T = small(kind).eval(), torch.randperm(len(owner_T))
        found = encoder(features_TD, *tiles)
        same([encoder(features_TD[order_T], cell_T2[order_T], owner_T[order_T], slides)], [found])
        for slide in range(slides):
            own = owner_T == slide
            same([encoder(features_TD[own], cell_T2[own], owner_T[own] * 0, 1)], [found[slide:slide + 1]])


def test_the_mlp_knows_nothing_of_places_and_the_sparse_one_does() -> None:
    tiles, features_TD = MAPS["dense"], given(MAPS["dense"]).detach()
    elsewhere_T2 = tiles[0][torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    mlp, places = small("mlp").eval(), small().eval()
    same([mlp(features_TD, elsewhere_T2, *tiles[1:])], [mlp(features_TD, *tiles)])
    assert (places(features_TD, elsewhere_T2, *tiles[1:]) - places(features_TD, *tiles)).abs().max() > 1e-3
    # Moved by an even number of cells, nothing changes.
    same([places(features_TD, tiles[0] + torch.tensor([-6, 128]), *tiles[1:])], [places(features_TD, *tiles)])


def kept(encoder: SlideEncoder, tiles: Tiles) -> int:
    """Bytes that a forward pass keeps for the backward one, weights aside."""
    features_TD = torch.zeros(len(tiles[0]), encoder.tiles, requires_grad=True)
    weights = {each.untyped_storage().data_ptr() for each in encoder.state_dict().values()}
    found: dict[int, int] = {}

    def keep(each: Tensor) -> Tensor:
        storage = each.untyped_storage()
        if storage.data_ptr() not in weights and each.shape[1:2] != (9,):      # a weight, its places second
            found[storage.data_ptr()] = storage.nbytes()
        alive.append(each)
        return each

    alive: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda each: each):
        encoder(features_TD, *tiles)
    return sum(found.values())


def test_memory_goes_with_the_tiles_and_not_with_the_slide() -> None:
    encoder = SlideEncoder(64, 128)
    once, twice = kept(encoder, grid(32, 16)), kept(encoder, grid(32, 32))
    assert 1.9 < twice / once < 2.1
    cell_T2, owner_T, _ = grid(32, 32)
    apart_T2 = torch.where(cell_T2 >= 16, cell_T2 + 1000, cell_T2)
    # Four pieces have more rim, where the half resolution has cells that see little.
    assert kept(encoder, (apart_T2, owner_T, 1)) < 1.2 * twice
    assert once < 512 * 6000, "a tile keeps no more than some vectors"


def test_what_is_no_map_is_refused_by_name() -> None:
    features_TD, encoder = torch.zeros(3, 4, dtype=torch.float64), small()
    cell_T2, owner_T = torch.tensor([[0, 0], [1, 0], [2, 0]]), torch.tensor([0, 0, 2])
    with pytest.raises(ValueError, match="slide 1 of 3 has no tiles"):
        encoder(features_TD, cell_T2, owner_T, 3)
    with pytest.raises(ValueError, match="of slide 2, and there are 2"):
        encoder(features_TD, cell_T2, owner_T, 2)
    with pytest.raises(ValueError, match=r"cells are torch\.float32"):
        encoder(features_TD, cell_T2.float(), owner_T * 0, 1)
    with pytest.raises(ValueError, match="not of the same tiles"):
        encoder(features_TD, cell_T2[:2], owner_T * 0, 1)
    with pytest.raises(ValueError, match=r"takes \(T, 4\)"):
        encoder(features_TD[:, :3], cell_T2, owner_T * 0, 1)
    with pytest.raises(ValueError, match="not pixels"):
        encoder(features_TD, torch.tensor([[0, 0], [2**40, 0], [0, 2**40]]), owner_T * 0, 1)
    with pytest.raises(ValueError, match="kind='mpl' is not one of sparse, mlp"):
        SlideEncoder(kind="mpl")


def test_in_half_precision_it_is_nearly_the_same() -> None:
    tiles = MAPS["several slides"]
    encoder, features_TD = small().float().eval(), given(tiles).detach().float().requires_grad_()
    exact = encoder(features_TD, *tiles)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = encoder(features_TD, *tiles)
    torch.testing.assert_close(half.float(), exact, rtol=0.05, atol=0.05 * float(exact.detach().abs().max()))
    (slope,), (other,) = gradients(weighed(half.float()), [features_TD]), gradients(weighed(exact), [features_TD])
    # Where a ReLU is about to open, rounding decides.
    assert F.cosine_similarity(slope.flatten(), other.flatten(), dim=0) > 0.95


# --- on several ranks, each with as many tiles as its slides happen to have

BATCH = random(90, 7, 6, seed=5)


def learnt(encoder: nn.Module) -> list[Tensor]:
    """Vectors of all slides, gradients averaged over ranks, and running statistics, after one pass."""
    cell_T2, owner_T, slides = BATCH
    share, first = slides // dist.world(), slides // dist.world() * dist.rank()
    own_T = ((owner_T >= first) & (owner_T < first + share)).nonzero().squeeze(1)
    own_BD = encoder(given(BATCH).detach()[own_T], cell_T2[own_T], owner_T[own_T] - first, share)
    whole_BD = dist.gather_with_gradient(own_BD)
    (weighed(whole_BD) + (whole_BD @ whole_BD.T).tanh().sum()).backward()
    slopes = [torch.stack(dist.gather(each.grad)).mean(0) for each in encoder.parameters()]
    return [whole_BD.detach(), *slopes, *encoder.buffers()]


def on_ranks(_: Path) -> list[Tensor]:
    return learnt(synchronise(small()))


def test_ranks_with_different_numbers_of_tiles_are_one_batch(tmp_path: Path) -> None:
    expected = learnt(small())
    for ranks in run(on_ranks, (3,), tmp_path).values():
        for found in ranks:
            same([each.double() for each in found], [each.double() for each in expected])


# --- what place is worth

WIDTH, SIDE, KINDS_OF_TILE = 8, 10, 4


def slides_of(classes: Callable[[np.random.Generator, int], np.ndarray], count: int, seed: int) -> dict[str, Any]:
    """Painted maps of two classes, half each: `classes` says which kind of tile lies in each cell of a map; a tile is
    the vector of its kind, and noise."""
    rng = np.random.default_rng(seed)
    kinds_KD = np.random.default_rng(99).normal(size=(KINDS_OF_TILE, WIDTH))
    features, cells, owners, labels = [], [], [], np.arange(count) % 2
    for slide, label in enumerate(labels):
        kind_HW = classes(rng, int(label))
        row_T, column_T = np.nonzero(kind_HW >= 0)
        features.append(kinds_KD[kind_HW[row_T, column_T]] + 0.3 * rng.normal(size=(len(row_T), WIDTH)))
        cells.append(np.stack([column_T, row_T], axis=1))
        owners.append(np.full(len(row_T), slide))
    return {"features": torch.tensor(np.concatenate(features), dtype=torch.float32),
            "cell": torch.tensor(np.concatenate(cells)), "owner": torch.tensor(np.concatenate(owners)),
            "label": torch.tensor(labels), "count": count}


def tissue(rng: np.random.Generator) -> np.ndarray:
    """A lobed disc somewhere on an empty slide: -1 where nothing is, else 0."""
    row_HW, column_HW = np.mgrid[:SIDE + 6, :SIDE + 6] - (SIDE / 2 + rng.uniform(0, 6, 2))[:, None, None]
    lobes = 1 + 0.25 * np.sin(rng.integers(2, 5) * np.arctan2(row_HW, column_HW) + rng.uniform(0, 6))
    return np.where(np.hypot(row_HW, column_HW) < SIDE / 2 * lobes, 0, -1)


def where(rng: np.random.Generator, label: int) -> np.ndarray:
    """Both classes hold the same tiles: kinds in clusters of like, or the very same scattered."""
    kind_HW = tissue(rng)
    there = np.argwhere(kind_HW == 0)
    centres = there[rng.integers(len(there), size=KINDS_OF_TILE)]
    near = np.square(there[:, None] - centres).sum(axis=2).argmin(axis=1)
    kind_HW[tuple(there.T)] = rng.permutation(near) if label else near
    return kind_HW


def what(rng: np.random.Generator, label: int) -> np.ndarray:
    """Kinds are scattered in both, and one has a few more of one kind."""
    kind_HW = tissue(rng)
    share = [0.4, 0.2, 0.2, 0.2] if label else [0.2, 0.2, 0.2, 0.4]
    kind_HW[kind_HW == 0] = rng.choice(KINDS_OF_TILE, (kind_HW == 0).sum(), p=share)
    return kind_HW


def trained(kind: str, told: dict[str, Any], steps: int = 40) -> Callable[[dict[str, Any]], float]:
    """A slide encoder with a linear layer, taught on all slides at once; what it then gets right of others."""
    torch.manual_seed(0)
    network = nn.ModuleDict({"encoder": SlideEncoder(WIDTH, 16, kind), "head": nn.Linear(16, 2)})
    optimiser = torch.optim.AdamW(network.parameters(), lr=0.01, weight_decay=0.01)

    def scores(of: dict[str, Any]) -> Tensor:
        return network["head"](network["encoder"](of["features"], of["cell"], of["owner"], of["count"]))

    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(scores(told), told["label"]).backward()
        optimiser.step()

    @torch.no_grad()
    def right(of: dict[str, Any]) -> float:
        network.eval()
        return float((scores(of).argmax(1) == of["label"]).float().mean())

    return right


@pytest.fixture
def one_thread() -> Iterator[None]:
    """So narrow a network is done before a second thread wakes, and on a busy machine the first waits for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def means(of: dict[str, Any]) -> np.ndarray:
    sums = torch.zeros(of["count"], WIDTH).index_add_(0, of["owner"], of["features"])
    return (sums / torch.bincount(of["owner"])[:, None]).numpy()


@pytest.mark.parametrize(("classes", "by_place"), [(where, True), (what, False)])
def test_what_differs_in_places_alone_is_seen_by_the_sparse_encoder_alone(
        classes: Callable[[np.random.Generator, int], np.ndarray], by_place: bool, one_thread: None) -> None:  # noqa: ARG001
    told, asked = slides_of(classes, 48, seed=0), slides_of(classes, 200, seed=1)
    mean = LogisticRegression(max_iter=1000).fit(means(told), told["label"]).score(means(asked), asked["label"])
    figures = {"sparse": trained("sparse", told)(asked), "mlp": trained("mlp", told)(asked), "mean": mean}
    assert figures["sparse"] >= 0.9, figures
    for blind in ("mlp", "mean"):
        assert figures[blind] <= 0.65 if by_place else figures[blind] >= 0.9, figures
