"""Windows and their labels, and maps of regions of any size: cut, turned and put together so that nothing is lost."""

import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from shards.regions import Pixels, Region
from ssl_dist.data import augment, opencv
from ssl_dist.data.batch import View
from ssl_dist.eval import tiling
from ssl_dist.eval.settings import Nuclei, Outlined
from ssl_dist.eval.windows import Windows, alike, apart

ellipses = runpy.run_path(str(Path(__file__).with_name("planted.py")))["ellipses"]


def settings(**changed: object) -> Nuclei:
    return Nuclei(**{"encoder": "timm:resnet18", "data": Outlined(regions="."), "window": 32, "margin": 4,       # type: ignore[arg-type]
                     "jitter": 0.0, "stain": 0.0, "blur": 0.0, **changed})


def test_distances_are_those_of_plain_loops() -> None:
    numbers_HW = ellipses((50, 60), 12, 0)
    numbers_HW[48, 3] = 50                          # a nucleus of one pixel
    found = apart(numbers_HW)
    truth = np.zeros((2, 50, 60))
    for number in np.unique(numbers_HW[numbers_HW > 0]):
        y, x = np.nonzero(numbers_HW == number)
        for axis, place in ((0, x), (1, y)):
            away = place - place.mean()
            for row, column, value in zip(y, x, away, strict=True):
                side = -away.min() if value < 0 else away.max()
                truth[axis, row, column] = value / side if side else 0
    assert found == pytest.approx(truth, abs=1e-6)
    assert found[:, 48, 3].tolist() == [0, 0] and not apart(np.zeros((4, 5), np.int32)).any()


def test_labels_are_cut_turned_and_mirrored_as_their_picture_is() -> None:
    """The picture of a map whose nuclei have one grey level each, seen as the picture is, shows the same map."""
    numbers_HW = np.kron(np.arange(64).reshape(8, 8), np.ones((8, 8), int)).astype(np.int32)
    image = np.repeat((numbers_HW * 3)[..., None], 3, axis=2).astype(np.uint8)
    view = View(size=48, scale=(0.4, 1.0), ratio=(1, 1), jitter=0, grey=0, blur=0, turn=1)
    numbers = augment.numbers(view, augment.uniforms(0, 0, 0, 0, 40))
    with ThreadPoolExecutor(1) as pool:
        seen, = opencv.views(lambda _: image, [numbers], [48], pool)
    for row in range(40):
        cut = alike(numbers_HW, numbers, row, 48)
        assert np.mean(seen[row, :, :, 0] == cut * 3) > 0.6     # all but what is smeared between two squares
        assert np.abs(seen[row, 8:40, 8:40, 0] / 3 - cut[8:40, 8:40]).mean() < 3
    assert len({(*map(int, pair), int(turn)) for pair, turn in zip(numbers.flip_N2, numbers.turn_N, strict=True)}) > 8


def test_windows_depend_on_seed_and_step_alone_and_reach_every_pixel() -> None:
    numbers_HW = ellipses((40, 44), 6, 0)
    image = np.random.default_rng(0).integers(0, 256, (40, 44, 3), dtype=np.uint8)
    region = Region("a", "", "", "", lambda: Pixels(image, numbers_HW, (numbers_HW > 0).astype(np.uint8)))
    told = settings(zoom=1.0)
    windows = Windows([region, region], told, lambda known: known)
    assert windows.a_pass == round(2 * 40 * 44 / 24**2)
    with ThreadPoolExecutor(2) as pool:
        first, again, other = (windows.draw(step, 16, pool) for step in (3, 3, 4))
        assert (first.pixels_BSS3 == again.pixels_BSS3).all() and (first.numbers_BSS == again.numbers_BSS).all()
        assert (first.pixels_BSS3 != other.pixels_BSS3).any()
        inner = slice(4, 28)
        seen = {number for step in range(30)
                for number in np.unique(windows.draw(step, 16, pool).numbers_BSS[:, inner, inner])}
    assert {*range(numbers_HW.max() + 1)} <= seen
    assert ((first.types_BSS > 0) == (first.numbers_BSS > 0)).all()


def test_a_nucleus_at_the_rim_and_its_mirror_image_are_two() -> None:
    numbers_HW = np.zeros((40, 40), np.int32)
    numbers_HW[10:20, 0:6] = 1
    region = Region("a", "", "", "", lambda: Pixels(np.zeros((40, 40, 3), np.uint8), numbers_HW))
    framed = Windows([region], settings(zoom=1.0), lambda known: known)._regions[0].numbers_HW
    row = framed[framed.shape[0] // 2 - 5]
    assert len(np.unique(row)) == 3 and framed.shape[0] > 40


@pytest.mark.parametrize(("size", "window", "margin"), [((70, 50), 32, 4), ((9, 13), 32, 8), ((64, 64), 16, 0)])
def test_every_pixel_is_said_once_and_by_the_middle_of_a_window(size: tuple[int, int], window: int, margin: int
                                                                ) -> None:
    image = np.random.default_rng(0).integers(0, 200, (*size, 3), dtype=np.uint8)

    def says(pixels: torch.Tensor) -> torch.Tensor:
        said = pixels.permute(0, 3, 1, 2).float()
        rim = torch.full_like(said, 999)
        inner = slice(margin, window - margin)
        rim[..., inner, inner] = said[..., inner, inner]        # what is not kept would be seen
        return rim

    for batch in (1, 3, 100):
        found = [*tiling.strips(says, 3, tiling.of_picture(image), size, window, margin, batch)]
        assert (np.concatenate(found, axis=1) == image.transpose(2, 0, 1)).all()


def test_strips_end_where_memory_ends_and_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).integers(0, 200, (100, 60, 3), dtype=np.uint8)

    def said() -> list[np.ndarray]:
        return [*tiling.strips(lambda pixels: pixels.permute(0, 3, 1, 2).float(), 3, tiling.of_picture(image),
                               (100, 60), 32, 4, 5)]

    whole = said()
    monkeypatch.setattr(tiling, "STRIP", 1)
    pieces = said()
    assert len(whole) == 1 and len(pieces) == 5
    assert (np.concatenate(pieces, axis=1) == whole[0]).all()


def test_glass_is_not_looked_at() -> None:
    image = np.full((64, 96, 3), 250, np.uint8)
    image[20, 50] = 30
    asked = []

    def says(pixels: torch.Tensor) -> torch.Tensor:
        asked.append(len(pixels))
        return torch.ones(len(pixels), 1, 32, 32)

    found = np.concatenate([*tiling.strips(says, 1, tiling.of_picture(image), (64, 96), 32, 0, 8)], axis=1)
    assert sum(asked) == 1 and found.sum() == 32 * 32


def test_beyond_the_rim_a_picture_is_mirrored_as_numpy_pads() -> None:
    image = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
    read = tiling.of_picture(image)(-6, -7, 17, 20)
    assert (read == np.pad(image, ((7, 8), (6, 7), (0, 0)), mode="reflect")).all()
    assert (tiling.of_picture(image[:1, :1])(-2, -2, 5, 5) == image[0, 0]).all()


def test_a_picture_that_is_smaller_than_its_rim_is_mirrored_into_copies_each_of_its_own() -> None:
    numbers_HW = np.zeros((9, 7), np.int32)
    numbers_HW[2:4, 1:4], numbers_HW[5:8, 2:6] = 1, 2
    image = np.zeros((9, 7, 3), np.uint8)
    region = Region("tiny", "", "", "", lambda: Pixels(image, numbers_HW))
    framed = Windows([region], settings(zoom=1.0), lambda known: known)._regions[0].numbers_HW
    assert min(framed.shape) >= 32
    for number in np.unique(framed[framed > 0]).tolist():
        rows, columns = np.nonzero(framed == number)
        kind = 2 - number % 2           # two nuclei: odd numbers are copies of the first
        high, wide = (2, 3) if kind == 1 else (3, 4)
        assert np.ptp(rows) < high and np.ptp(columns) < wide, "no two copies share a number"
    assert len(np.unique(framed[framed > 0])) > 2 * 9
