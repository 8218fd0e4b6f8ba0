"""Slides as sparse maps against slides as grids: seconds of a slide encoder forwards and backwards, in turns.

    python benchmarks/sparse.py [--rounds 5] [--tiles 300 2000 10000] [--threads 1]

Outlines are of real tissue and of painted, cut into as many tiles as asked for: what is measured depends on where tiles
lie and not on what is on them, so vectors are noise. `dense` is the same network on the smallest grid that holds the
tissue: F.conv2d with zeros where nothing is, and masks after it. Before any is timed, both must give the same numbers.
`together` is a batch of all slides, of different sizes as slides are; `views` are batches as Giga-SSL trains on: of
each slide five tiles out of a thousand.
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards import synthetic, tissue
from shards.slide import Slide
from ssl_dist import dist
from ssl_dist.models.sparse import SlideEncoder

MPP = 0.5               # of slides that do not say theirs
VIEWS, OF_EACH, AMONG = 16, 5, 1000
PAINTED = 2

Tiles = tuple[Tensor, Tensor, int]


def masks(folder: Path) -> dict[str, tuple[np.ndarray, tuple[int, int]]]:
    """Where tissue is, and how large the slide, by the slide's name; painted ones are said to be."""
    synthetic.write_cohort(folder, patients=PAINTED, size=4096, test_patients=0)
    found = {}
    for path in [*sorted((measure.DATA / "wsi_svs").glob("*.svs")), *sorted(folder.glob("*.svs"))]:
        with Slide(path, missing_mpp=MPP) as slide:
            name = f"painted {path.stem}" if path.parent == folder else path.stem
            found[name] = tissue.mask(slide.thumbnail(tissue.MASK_MPP)), (slide.width, slide.height)
    return found


def cells(mask: np.ndarray, slide: tuple[int, int], tiles: int) -> np.ndarray:
    """Columns and rows (T, 2) of about so many tiles, each at least half of tissue."""
    side = (slide[0] * slide[1] * mask.mean() / tiles) ** 0.5
    corner_N2, share_N = tissue.corners(mask, slide, side)
    return np.rint(corner_N2[share_N >= 0.5] / side).astype(np.int64)


def whole(cell_T2: np.ndarray) -> Tiles:
    return torch.from_numpy(cell_T2), torch.zeros(len(cell_T2), dtype=torch.int64), 1


def views(cell_T2: np.ndarray) -> Tiles:
    rng = np.random.default_rng(0)
    chosen = np.concatenate([rng.choice(len(cell_T2), OF_EACH, replace=False) for _ in range(VIEWS)])
    return torch.from_numpy(cell_T2[chosen]), torch.arange(VIEWS).repeat_interleave(OF_EACH), VIEWS


def together(many: list[np.ndarray]) -> Tiles:
    owner_T = np.repeat(np.arange(len(many)), [len(each) for each in many])
    return torch.from_numpy(np.concatenate(many)), torch.from_numpy(owner_T), len(many)


class Dense(nn.Module):
    """The slide encoder on a grid, with the same weights."""

    def __init__(self, encoder: SlideEncoder):
        super().__init__()
        self.blocks = copy.deepcopy(encoder.blocks)

    def forward(self, grid_BDHW: Tensor, mask_B1HW: Tensor) -> Tensor:
        """(B, D, H, W) and where anything is -> (B, C)."""
        for block in self.blocks:
            shortcut, stride = grid_BDHW, block.stride
            inner = F.conv2d(grid_BDHW, block.conv1.weight, stride=stride, padding=1)
            if block.downsample is not None:
                part = F.avg_pool2d(mask_B1HW, 3, 2, 1)
                pooled = F.avg_pool2d(grid_BDHW, 3, 2, 1) / part.clamp(min=1e-6)
                mask_B1HW = (part > 0).float()
                shortcut = normed(F.conv2d(pooled, block.downsample[0].weight), block.downsample[1])
            inner = F.relu(normed(inner, block.bn1)) * mask_B1HW
            inner = normed(F.conv2d(inner, block.conv2.weight, padding=1), block.bn2)
            grid_BDHW = F.relu(inner + shortcut) * mask_B1HW
        return grid_BDHW.sum((2, 3)) / mask_B1HW.sum((2, 3))


def normed(grid: Tensor, norm: nn.Module) -> Tensor:
    """As nn.BatchNorm2d, which takes the whole grid at once: what is empty counts, in time as well."""
    return F.batch_norm(grid, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training)


def gridded(features_TD: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """The smallest grid that holds them, its first place even, and where anything is."""
    cell_T2, owner_T, slides = tiles
    place_T2 = cell_T2 - 2 * torch.div(cell_T2.amin(0), 2, rounding_mode="floor")
    across, down = (int(each) + 2 for each in place_T2.amax(0))       # half the resolution sees one place further
    grid_BHWD = torch.zeros(slides, down, across, features_TD.shape[1])
    grid_BHWD[owner_T, place_T2[:, 1], place_T2[:, 0]] = features_TD
    mask_B1HW = torch.zeros(slides, 1, down, across)
    mask_B1HW[owner_T, 0, place_T2[:, 1], place_T2[:, 0]] = 1
    return grid_BHWD.permute(0, 3, 1, 2).contiguous(), mask_B1HW


def contest(tiles: Tiles, device: torch.device, rounds: int) -> dict[str, Any]:
    """Seconds of both, and by how much the sparse one is faster, round by round."""
    torch.manual_seed(0)
    encoder = SlideEncoder().to(device)
    dense = Dense(encoder).to(device)
    features_TD = torch.randn(len(tiles[0]), encoder.tiles)
    grid_BDHW, mask_B1HW = gridded(features_TD, tiles)
    told = [each.to(device) for each in (features_TD, *tiles[:2])]
    grids = [grid_BDHW.to(device), mask_B1HW.to(device)]
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(*told, tiles[2]), dense.eval()(*grids), rtol=1e-3, atol=1e-4)
    contenders: dict[str, Callable[[], Tensor]] = {"dense": lambda: dense.train()(*grids),
                                                   "sparse": lambda: encoder.train()(*told, tiles[2])}
    for leaf in (told[0], grids[0]):        # as if an encoder of tiles learnt as well, or not: gradients are asked for
        leaf.requires_grad_()
    rows = []
    for _ in range(rounds + 1):             # the first warms up
        row = {}
        for name, do in contenders.items():
            since, spent = time.perf_counter(), time.process_time()
            do().sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            row |= {name: time.perf_counter() - since, f"{name}_cpu": time.process_time() - spent}
        rows.append(row)
    ratios = [row["dense"] / row["sparse"] for row in rows[1:]]
    return {"tiles": len(tiles[0]), "slides": tiles[2], "grid": list(grid_BDHW.shape[2:]),
            "share": round(float(mask_B1HW.mean()), 4),
            "seconds": {name: round(statistics.median(row[name] for row in rows[1:]), 4) for name in rows[0]},
            "cpu_ratio": round(statistics.median(row["dense_cpu"] / row["sparse_cpu"] for row in rows[1:]), 2),
            "ratio": round(statistics.median(ratios), 2),
            "ratio_quartiles": [round(each, 2) for each in measure.quartiles(ratios)]}


def draw(found: dict[str, Any]) -> Any:
    """How many times faster the sparse one is over the share of the grid that holds tissue."""
    figure, axis = measure.plt.subplots(figsize=(6, 3.2), layout="constrained")
    for number, name in enumerate(dict.fromkeys(row["name"] for row in found["rows"])):
        own = [row for row in found["rows"] if row["name"] == name]
        axis.scatter([row["share"] for row in own], [row["ratio"] for row in own], color=f"C{number}", s=18, label=name)
        for row in own:
            axis.annotate(f"{row['tiles']:,}", (row["share"], row["ratio"]), fontsize=6, xytext=(3, 3),
                          textcoords="offset points")
    axis.axhline(1, color="grey", lw=0.8)
    axis.set(xscale="log", yscale="log", xlabel="part of the grid that holds tissue",
             ylabel="times as fast as a dense grid")
    axis.legend(frameon=False, fontsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Times them, appends the result and its plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiles", type=int, nargs="+", default=[300, 2000, 10000])
    # Where others use the cores as well, threads wait for each other, and that is what would be measured.
    parser.add_argument("--threads", type=int, default=dist.cores())
    told = parser.parse_args()
    device = dist.device("auto")
    torch.set_num_threads(told.threads)
    found: dict[str, Any] = {**measure.machine(), "device": device.type, "rounds": told.rounds,
                             "threads": told.threads, "rows": []}
    with tempfile.TemporaryDirectory() as scratch:
        outlines = masks(Path(scratch))
    jobs = [(name, whole(cells(mask, size, tiles))) for name, (mask, size) in outlines.items() for tiles in told.tiles]
    name, (mask, size) = next(iter(outlines.items()))
    jobs.append((f"views of {name}", views(cells(mask, size, AMONG))))
    jobs.append(("together", together([cells(mask, size, AMONG // 2 * 2**number)
                                       for number, (mask, size) in enumerate(outlines.values())])))
    for name, tiles in jobs:
        row = {"name": name, "real": "painted" not in name and name != "together",
               **contest(tiles, device, told.rounds)}
        found["rows"].append(row)
        sys.stderr.write(f"{json.dumps(row)}\n")
    sys.stderr.write(f"{measure.keep(found, 'sparse', draw, measure.RESULTS)}\n")


if __name__ == "__main__":
    main()
