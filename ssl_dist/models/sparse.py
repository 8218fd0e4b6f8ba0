"""Convolution on sparse maps of tiles: a slide as the cells that hold tissue, and nothing for those that do not.

Plain gathers and matrix products, so that it runs wherever torch does; no convolution here knows how large a slide is.

T cells   D, C width before and after   K = 9 places of a 3 x 3 window, row by row   B slides
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WINDOW = tuple((row, column) for row in (-1, 0, 1) for column in (-1, 0, 1))
FULL = 0.4              # of a map's windows, from which on one product of them whole is quicker than nine of parts
STRIP = 512             # windows gathered at a time, each nine vectors wide; 256 to 2,048 were equally quick
LARGEST = 2**62         # of a cell's number; what lies apart so far is no slide
STAGE = 256, 512        # widths before and after ResNet-18's last stage
KINDS = "sparse", "mlp"


@dataclass(frozen=True)
class Reach:
    """Where the cells of one map look at those of another: of each place of the window the row that it meets, or one
    past the last where it meets none."""

    row_TK: Tensor
    pairs: list[tuple[Tensor, Tensor]] | None       # a place, who meets whom, where few do

    @classmethod
    def of(cls, row_KT: Tensor, rows: int) -> "Reach":
        """`rows`: how many there are to be met."""
        place_P, looking_P = (row_KT < rows).nonzero(as_tuple=True)
        if len(place_P) > FULL * row_KT.numel():
            return cls(row_KT.T.contiguous(), None)
        many = torch.bincount(place_P, minlength=len(WINDOW)).tolist()
        return cls(row_KT.T.contiguous(), list(zip(looking_P.split(many), row_KT[place_P, looking_P].split(many),
                                                   strict=True)))


class Cells:
    """The cells of some slides that hold something, each once, in the order of slide, row, column.

    What depends on nothing but where they lie is computed once and serves every layer.
    """

    def __init__(self, cell_T3: Tensor, slides: int):
        """Slide, column and row of each (int64), in order."""
        self.cell_T3, self.slides = cell_T3, slides

    @cached_property
    def starts_B(self) -> Tensor:
        """The first row of each slide."""
        count_B = torch.bincount(self.cell_T3[:, 0], minlength=self.slides)
        return count_B.cumsum(0) - count_B

    @cached_property
    def near(self) -> tuple[Reach, Reach]:
        """The 3 x 3 neighbours of each cell: forwards, and backwards as gradients go."""
        rows = len(self.cell_T3)
        number_T, across = _numbered(self.cell_T3)
        row_KT = number_T.new_full((len(WINDOW), rows), rows)
        for place, (row, column) in enumerate(WINDOW[:4]):      # who is left of me has me on its right
            wanted_T = number_T + row * across + column
            found_T = torch.searchsorted(number_T, wanted_T).clamp_(max=rows - 1)
            there_T = (number_T[found_T] == wanted_T).nonzero().squeeze(1)
            row_KT[place, there_T] = found_T[there_T]
            row_KT[-1 - place, found_T[there_T]] = there_T
        row_KT[len(WINDOW) // 2] = torch.arange(rows, device=row_KT.device)
        return Reach.of(row_KT, rows), Reach.of(row_KT.flip(0), rows)

    @cached_property
    def halved(self) -> tuple["Cells", Reach, Reach]:
        """The map at half the resolution: its cells, what each sees of these, and what of it each of these reaches.

        A cell there sees the 3 x 3 around twice its place, as F.conv2d with stride 2 and padding 1 has it on a grid
        whose first place is even; there is one wherever that is anything, as in spconv's SparseConv and SparseConvNet's
        Convolution: then nothing of the dense result is lost, for all else of it is zero.
        """
        rows = len(self.cell_T3)
        offset_K13 = self.cell_T3.new_tensor([(0, column, row) for row, column in WINDOW])[:, None]
        twice_KT3 = self.cell_T3 - offset_K13
        place_P, row_P = (twice_KT3[..., 1:] % 2 == 0).all(dim=2).nonzero(as_tuple=True)
        cell_P3 = twice_KT3[place_P, row_P]
        cell_P3[:, 1:] //= 2
        cells, target_P = _unique(cell_P3, self.slides)
        seen_KU = row_P.new_full((len(WINDOW), len(cells.cell_T3)), rows)
        reached_KT = row_P.new_full((len(WINDOW), rows), len(cells.cell_T3))
        seen_KU[place_P, target_P], reached_KT[place_P, row_P] = row_P, target_P
        return cells, Reach.of(seen_KU, rows), Reach.of(reached_KT, len(cells.cell_T3))


@dataclass(frozen=True)
class Map:
    """Vectors of cells."""

    cells: Cells
    features_TD: Tensor

    def with_features(self, features_TD: Tensor) -> "Map":
        """The same cells with other vectors."""
        return Map(self.cells, features_TD)

    def halved(self) -> "Map":
        """The mean of what each cell at half the resolution sees. What is empty is not counted: at the rim of a tissue
        vectors would else shrink towards zero, a thing of the outline and not of the tissue."""
        cells, seen, _ = self.cells.halved
        return Map(cells, F.embedding_bag(seen.row_TK, _padded(self.features_TD), mode="mean",
                                          padding_idx=len(self.features_TD)))

    def mean(self) -> Tensor:
        """The mean over the cells of each slide (B, D)."""
        rows_T = torch.arange(len(self.features_TD), device=self.features_TD.device)
        return F.embedding_bag(rows_T, self.features_TD, self.cells.starts_B, mode="mean")


def of_tiles(features_TD: Tensor, cell_T2: Tensor, owner_T: Tensor, slides: int) -> Map:
    """The map of tiles, each with its column and row (any whole numbers) and the number of its slide; of tiles in one
    cell the mean."""
    _checked(features_TD, cell_T2, owner_T, slides)
    cells, cell_of_T = _unique(torch.cat([owner_T[:, None], cell_T2], dim=1), slides)
    order_T = cell_of_T.argsort(stable=True)
    if len(cells.cell_T3) == len(features_TD):
        return Map(cells, features_TD.index_select(0, order_T))
    count_U = torch.bincount(cell_of_T)
    return Map(cells, F.embedding_bag(order_T, features_TD, count_U.cumsum(0) - count_U, mode="mean"))


def _checked(features_TD: Tensor, cell_T2: Tensor, owner_T: Tensor, slides: int) -> None:
    if cell_T2.is_floating_point() or owner_T.is_floating_point():
        raise ValueError(f"cells are {cell_T2.dtype} and owners {owner_T.dtype}; columns and rows are whole numbers: "
                         "divide corners by the width of a tile and round")
    if not len(features_TD) == len(cell_T2) == len(owner_T) or cell_T2.shape[1:] != (2,):
        raise ValueError(f"{tuple(features_TD.shape)} features, {tuple(cell_T2.shape)} cells and "
                         f"{tuple(owner_T.shape)} owners are not of the same tiles; give (T, D), (T, 2) and (T,)")
    tiles = torch.bincount(owner_T, minlength=slides).tolist() if len(owner_T) else [0] * max(1, slides)
    if len(tiles) > slides:
        raise ValueError(f"a tile is of slide {len(tiles) - 1}, and there are {slides}, numbered from 0")
    if 0 in tiles:
        raise ValueError(f"slide {tiles.index(0)} of {slides} has no tiles, so nothing can be said of it; leave it out")


def _numbered(cell_T3: Tensor) -> tuple[Tensor, int]:
    """A number for each cell, in the order of slide, row, column, with an empty cell around all; and by how much the
    number of the next row is larger."""
    (low_slide, *low), (high_slide, *high) = cell_T3.amin(dim=0).tolist(), cell_T3.amax(dim=0).tolist()
    across, down = (last - first + 3 for first, last in zip(low, high, strict=True))
    if (high_slide - low_slide + 1) * across * down > LARGEST:
        raise ValueError(f"cells lie {across - 2} columns and {down - 2} rows apart; they are columns and rows of "
                         "tiles, not pixels of many slides: divide corners by the width of a tile")
    slide_T, column_T, row_T = cell_T3.unbind(dim=1)
    return (((slide_T - low_slide) * down + (row_T - low[1] + 1)) * across + (column_T - low[0] + 1)), across


def _unique(cell_P3: Tensor, slides: int) -> tuple[Cells, Tensor]:
    """Every cell once, and which of them each was."""
    number_P, _ = _numbered(cell_P3)
    number_T, which_P = torch.unique(number_P, return_inverse=True)
    cell_T3 = cell_P3.new_empty(len(number_T), 3)
    cell_T3[which_P] = cell_P3          # equals write the same
    return Cells(cell_T3, slides), which_P


def _padded(features_TD: Tensor) -> Tensor:
    """With one row more, of zeros, for those who meet none."""
    return F.pad(features_TD, (0, 0, 0, 1))


def _windows(padded_TD: Tensor, reach: Reach) -> Iterator[tuple[slice, Tensor]]:
    """What each row of `reach` meets, side by side (strip, K D), some rows at a time."""
    for first in range(0, len(reach.row_TK), STRIP):
        strip = slice(first, min(first + STRIP, len(reach.row_TK)))
        yield strip, padded_TD.index_select(0, reach.row_TK[strip].flatten()).view(strip.stop - first, -1)


def _met(features_TD: Tensor, reach: Reach, weight_KDC: Tensor) -> Tensor:
    """For each row of `reach`, the sum over what it meets of vector times weight (rows, C).

    Of each place of the window it meets one at most, so no two products go to one row, and the sum is the same every
    time.
    """
    rows, channels = len(reach.row_TK), weight_KDC.shape[2]
    if reach.pairs is None:
        sum_UC, flat_MC = features_TD.new_empty(rows, channels), weight_KDC.flatten(0, 1)
        for strip, window_SM in _windows(_padded(features_TD), reach):
            torch.mm(window_SM, flat_MC, out=sum_UC[strip])
        return sum_UC
    half = features_TD.dtype in (torch.bfloat16, torch.float16)
    sum_UC = features_TD.new_zeros(rows, channels, dtype=torch.float32 if half else features_TD.dtype)
    for (looking_P, met_P), weight_DC in zip(reach.pairs, weight_KDC, strict=True):
        if len(met_P):
            sum_UC.index_add_(0, looking_P, (features_TD.index_select(0, met_P) @ weight_DC).to(sum_UC.dtype))
    return sum_UC.to(features_TD.dtype)


class _Convolve(torch.autograd.Function):
    """Keeps the vectors and none of the gathered ones, which are nine times as many."""

    @staticmethod
    def forward(ctx: Any, features_TD: Tensor, weight_CKD: Tensor, seen: Reach, reached: Reach) -> Tensor:
        ctx.save_for_backward(features_TD, weight_CKD)
        ctx.seen, ctx.reached = seen, reached
        return _met(features_TD, seen, weight_CKD.permute(1, 2, 0))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_UC: Tensor) -> Any:         # type: ignore[override]
        features_TD, weight_CKD = ctx.saved_tensors
        before_TD = after_CKD = None
        gradient_UC = gradient_UC.contiguous()
        if ctx.needs_input_grad[0]:
            before_TD = _met(gradient_UC, ctx.reached, weight_CKD.transpose(0, 1))
        if ctx.needs_input_grad[1]:
            after_CKD = torch.zeros_like(weight_CKD)
            if ctx.seen.pairs is None:
                flat_CM = after_CKD.flatten(1)
                for strip, window_SM in _windows(_padded(features_TD), ctx.seen):
                    flat_CM.addmm_(gradient_UC[strip].T, window_SM)
            else:
                for place, (looking_P, met_P) in enumerate(ctx.seen.pairs):
                    if len(met_P):
                        after_CKD[:, place] = (gradient_UC.index_select(0, looking_P).T
                                               @ features_TD.index_select(0, met_P))
        return before_TD, after_CKD, None, None


class Convolution(nn.Module):
    """3 x 3 without bias: as many cells as before (submanifold), or at half the resolution all that see any.
    With `kernel` 1 each cell for itself.

    A submanifold convolution is the dense one of a grid with zeros in what is empty, read where something was: tissue
    does not grow by a cell with every layer.
    """

    def __init__(self, width: int, channels: int, *, kernel: int = 3, stride: int = 1):
        super().__init__()
        self.stride = stride
        # Contiguous, as DeepSpeed wants it of every weight: the copy below, in the order of vectors, costs little.
        self.weight = nn.Parameter(torch.empty(channels, width, kernel, kernel))
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")       # as timm's ResNets begin

    def forward(self, tiles: Map) -> Map:
        """Width D -> C."""
        if self.weight.shape[-1] == 1:
            return tiles.with_features(F.linear(tiles.features_TD, self.weight[:, :, 0, 0]))
        cells, seen, reached = (tiles.cells, *tiles.cells.near) if self.stride == 1 else tiles.cells.halved
        weight_CKD, features_TD = self.weight.permute(0, 2, 3, 1).flatten(1, 2), tiles.features_TD
        device = features_TD.device.type
        if torch.is_autocast_enabled(device):
            kind = torch.get_autocast_dtype(device)
            weight_CKD, features_TD = weight_CKD.to(kind), features_TD.to(kind)
        return Map(cells, _Convolve.apply(features_TD, weight_CKD.contiguous(), seen, reached))


class Block(nn.Module):
    """ResNet's basic block on a map; the names in its state are timm's."""

    def __init__(self, width: int, channels: int, *, kernel: int, stride: int):
        super().__init__()
        self.conv1 = Convolution(width, channels, kernel=kernel, stride=stride)
        self.bn1 = nn.BatchNorm1d(channels)
        self.conv2 = Convolution(channels, channels, kernel=kernel)
        self.bn2 = nn.BatchNorm1d(channels)
        self.downsample = None if width == channels and stride == 1 else nn.ModuleList(
            [Convolution(width, channels, kernel=1), nn.BatchNorm1d(channels)])
        self.stride = stride

    def forward(self, tiles: Map) -> Map:
        """Width D -> C, at half the resolution where it strides."""
        inner = self.conv1(tiles)
        inner = self.conv2(inner.with_features(F.relu(self.bn1(inner.features_TD))))
        if self.downsample is not None:
            pointwise, norm = self.downsample
            # A dense ResNet reads every second cell here; of a sparse map that may be one that is empty.
            tiles = pointwise(tiles.halved() if self.stride > 1 else tiles)
            tiles = tiles.with_features(norm(tiles.features_TD))
        return inner.with_features(F.relu(self.bn2(inner.features_TD) + tiles.features_TD))


class SlideEncoder(nn.Module):
    """Vectors of tiles and where they lie -> one vector a slide.

    `sparse`: the last stage of a ResNet-18 on the map of tiles. `mlp`: the same blocks on each tile for itself, which
    know nothing of places. A mean over all cells follows either.
    """

    name = "slide"

    def __init__(self, tiles: int = STAGE[0], width: int = STAGE[1], kind: str = "sparse"):
        """`tiles`: width of the vectors of tiles; `width`: of those of slides."""
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
        self.tiles, self.width, self.kind = tiles, width, kind
        kernel, stride = (3, 2) if kind == "sparse" else (1, 1)
        self.blocks = nn.ModuleList([Block(tiles, width, kernel=kernel, stride=stride),
                                     Block(width, width, kernel=kernel, stride=1)])

    def forward(self, features_TD: Tensor, cell_T2: Tensor, owner_T: Tensor, count: int) -> Tensor:
        """Tiles of `count` slides, each with its column and row and the number of its slide -> (B, C)."""
        if features_TD.shape[1:] != (self.tiles,):
            raise ValueError(f"vectors are {tuple(features_TD.shape)}, and this encoder takes (T, {self.tiles})")
        if self.kind == "mlp":      # every tile a cell of its own
            cell_T2 = torch.stack([torch.arange(len(owner_T), device=owner_T.device), torch.zeros_like(owner_T)], dim=1)
        found = of_tiles(features_TD, cell_T2, owner_T, count)
        for block in self.blocks:
            found = block(found)
        return found.mean()

    def of_views(self, features_BTD: Tensor, cell_BT2: Tensor) -> Tensor:
        """As many tiles of every slide -> (B, C)."""
        count, tiles = cell_BT2.shape[:2]
        owner_T = torch.arange(count, device=cell_BT2.device).repeat_interleave(tiles)
        return self(features_BTD.flatten(0, 1).to(next(self.parameters()).dtype), cell_BT2.flatten(0, 1), owner_T,
                    count)

    @property
    def args(self) -> dict[str, Any]:
        """What it is made with."""
        return {"tiles": self.tiles, "width": self.width, "kind": self.kind}

    def begin_as(self, state: dict[str, Tensor]) -> None:
        """Weights and statistics of the last stage of a dense ResNet-18, out of the state of the whole network or of
        `layer4` alone."""
        own = {name.removeprefix("layer4."): value for name, value in state.items() if name.startswith("layer4.")}
        try:
            self.blocks.load_state_dict(own or state)
        except RuntimeError as error:
            raise ValueError(f"these are no weights for the {self.kind} encoder of {self.tiles} -> {self.width} "
                             "numbers, which begins as layer4 of a ResNet-18 (256 -> 512), kind=sparse: "
                             f"{str(error).splitlines()[1].strip()[:200]}") from None
