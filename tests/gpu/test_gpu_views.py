"""The views as the GPU draws them, against the twin in NumPy that holds the CPU's kernels too; and the loader there."""

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ssl_dist.data import dali, sweep
from ssl_dist.data.loader import Loader
from ssl_dist.data.reader import Reader
from ssl_dist.data.stream import Stream

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]

on_cpu = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "test_data_views.py")))


def pixels(views: list) -> list[np.ndarray]:
    return [torch.from_dlpack(view).cpu().numpy() for view in views]


@pytest.mark.parametrize("step", on_cpu.STEPS)
def test_the_gpu_draws_what_the_twin_draws(step: str, data: Path) -> None:
    """From PNG, so that decoding is exact and only the drawing is on trial."""
    view, encoded = on_cpu.STEPS[step], on_cpu.of_all_sizes(data)
    encoded += [on_cpu.png(image) for image in on_cpu.decoded(on_cpu.real(data))]
    images, numbers = on_cpu.decoded(encoded), on_cpu.chosen(view, len(encoded))
    (drawn,) = pixels(dali.Drawer((view,), len(encoded), 2, 0)(encoded, [numbers]))
    on_cpu.compare(drawn, images, numbers, view, average=0.3)


@pytest.mark.parametrize("way", dali.WAYS)
def test_the_gpu_decodes_jpeg_as_pillow_does(way: str, data: Path) -> None:
    encoded, view = on_cpu.real(data), on_cpu.STEPS["whole"]        # 96 pixels to 96: nothing but decoding
    (drawn,) = pixels(dali.Drawer((view,), len(encoded), 2, 0, way)(encoded, [on_cpu.chosen(view, len(encoded))]))
    for mine, theirs in zip(drawn, on_cpu.decoded(encoded), strict=True):
        apart = np.abs(mine.astype(int) - theirs)
        assert apart.mean() < 0.6
        assert apart.max() <= 4


@pytest.mark.parametrize("way", dali.WAYS)
def test_what_others_write_is_drawn_by_the_loader_whatever_the_gpus_decoder_takes(way: str, data: Path) -> None:
    """CMYK, 16 bits, a picture to be turned: where the GPU's decoder refuses, the CPU's has a second chance."""
    view = replace(on_cpu.PLAIN, size=131)
    for name, (encoded, shown) in on_cpu.odd(data).items():
        numbers = on_cpu.chosen(view, 1)
        for each in (way, "cpu"):
            try:
                (drawn,) = pixels(dali.Drawer((view,), 1, 2, 0, each)([encoded], [numbers]))
                break
            except RuntimeError:
                assert each != "cpu", f"{name} cannot be decoded at all"
        expected, _ = on_cpu.twin(shown, numbers, 0, view.size)
        apart = np.abs(drawn[0].astype(int) - expected)
        assert apart.mean() < 1.0, (name, apart.mean())


def test_the_fastest_way_to_decode_is_found_and_kept(data: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    encoded = on_cpu.real(data) * 4
    found = sweep.on_gpu(encoded, 2, 0)
    assert found in dali.WAYS
    assert list(sweep.read(sweep.home()).values()) == [found]
    assert sweep.on_gpu(encoded, 2, 0) == found


@pytest.mark.parametrize("way", dali.WAYS)
def test_of_many_tiles_a_broken_one_is_an_error_and_no_crash(way: str, data: Path) -> None:
    encoded = on_cpu.real(data) * 4
    numbers = on_cpu.chosen(on_cpu.PLAIN, len(encoded))
    drawer = dali.Drawer((on_cpu.PLAIN,), len(encoded), 2, 0, way)
    (good,) = pixels(drawer(encoded, [numbers]))
    for broken in (encoded[0][:30], encoded[0][:0], encoded[0][:len(encoded[0]) // 2], encoded[0][5:]):
        with pytest.raises(RuntimeError):
            drawer([*encoded[:40], broken, *encoded[41:]], [numbers])
        apart = np.abs(pixels(drawer(encoded, [numbers]))[0].astype(int) - good)
        assert apart.mean() < 0.1


def test_the_gpus_views_are_not_overwritten_by_the_next_call(data: Path) -> None:
    encoded = on_cpu.real(data)
    views = (on_cpu.ALL, on_cpu.PLAIN)
    drawer = dali.Drawer(views, len(encoded), 2, 0)
    kept = [torch.from_dlpack(each) for each in drawer(encoded, [on_cpu.chosen(view, len(encoded)) for view in views])]
    before = [each.cpu().clone() for each in kept]
    for number in range(1, 6):
        drawer(encoded[::-1], [on_cpu.chosen(view, len(encoded), number) for view in views])
    torch.cuda.synchronize()
    assert all(torch.equal(each.cpu(), old) for each, old in zip(kept, before, strict=True))


def test_a_broken_image_is_an_error_and_the_gpus_drawer_works_on(data: Path) -> None:
    encoded, view = on_cpu.real(data), on_cpu.PLAIN
    numbers = on_cpu.chosen(view, len(encoded))
    drawer = dali.Drawer((view,), len(encoded), 2, 0)
    (good,) = pixels(drawer(encoded, [numbers]))
    with pytest.raises(RuntimeError):
        drawer([*encoded[:-1], encoded[0][:30]], [numbers])
    assert np.array_equal(pixels(drawer(encoded, [numbers]))[0], good)


def loader(shard: Path, device: str, *, rank: int = 0, world: int = 1) -> Loader:
    reader = Reader([shard], "train")
    views = (replace(on_cpu.ALL, size=48), replace(on_cpu.PLAIN, size=32))
    return Loader(reader, Stream(reader.counts, seed=5, window=2, batch=12), views, rank=rank, world=world,
                  device=torch.device(device), threads=2, ahead=2, fit=on_cpu.palette(1).fit)


def test_the_loader_gives_the_same_pictures_on_the_gpu_as_on_the_cpu(shard: Path) -> None:
    gpu, cpu = loader(shard, "cuda"), loader(shard, "cpu")
    for one, other in zip(gpu.batches(0, 4), cpu.batches(0, 4), strict=True):
        assert np.array_equal(one.rows, other.rows)
        for mine, theirs in zip(one.views, other.views, strict=True):
            assert mine.device.type == "cuda"
            apart = (mine.cpu().int() - theirs.int()).abs().float()
            assert mine.shape == theirs.shape
            assert apart.mean() < 1.0           # two decoders and two kernels, a grey level here and there
    gpu.close()
    cpu.close()


def test_the_gpus_loader_resumes_with_the_same_pixels_and_shares_them_among_ranks(shard: Path) -> None:
    alone = loader(shard, "cuda")
    whole = list(alone.batches(0, 5))
    later = list(alone.batches(3, 5))
    for one, other in zip(whole[3:], later, strict=True):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(one.views, other.views, strict=True))
    ranks = [loader(shard, "cuda", rank=rank, world=3) for rank in range(3)]
    parts = [rank.make(4) for rank in ranks]
    for number, view in enumerate(whole[4].views):
        # The GPU's decoder may treat a picture differently in another batch: a rounding, not a picture.
        apart = (torch.cat([part.views[number] for part in parts]).int() - view.int()).abs()
        assert apart.float().mean() < 0.1
    for each in (alone, *ranks):
        each.close()
