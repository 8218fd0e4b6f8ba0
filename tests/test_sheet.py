"""Pictures of views: every tile with all its views, where they belong, as the loader draws them; and the verb."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_dist import sheet
from ssl_dist.data import augment, presets
from ssl_dist.data.batch import each
from ssl_dist.data.reader import Reader


def flat(colour: int, size: int, count: int = 2) -> np.ndarray:
    return np.full((count, size, size, 3), colour, np.uint8)


def test_every_picture_stands_where_it_belongs_and_none_on_another() -> None:
    views = [flat(10, 224), flat(20, 224), *(flat(30 + 5 * number, 96) for number in range(5))]
    page = np.asarray(sheet.paste([flat(1, 50)[0], flat(2, 70)[0]], [("", views), ("", views[:1])]))
    colours, counts = np.unique(page[page[:, :, 0] == page[:, :, 1]].reshape(-1, 3)[:, 0], return_counts=True)
    area = dict(zip(colours.tolist(), counts.tolist(), strict=True))
    whole, small = sheet.SIDE**2, (sheet.SIDE * 96 // 224) ** 2
    assert area[1] == area[2] == 2 * whole, "each tile once a block"
    assert area[10] == 4 * whole
    assert area[20] == 2 * whole
    assert [area[30 + 5 * number] for number in range(5)] == [2 * small] * 5


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_is_drawn_with_the_numbers_of_training(name: str, shard: Path) -> None:
    reader = Reader([shard])
    rows = np.array([0, 3])
    strips = sheet.strips(name, None)
    assert [strip.title for strip in strips] == [f"{name}, no stain step", f"{name}, stain 0.05"]
    assert len(strips[0].views) == len(each(presets.PRESETS[name].views))
    page = sheet.of(reader, rows, strips, None, 7)
    same = sheet.of(reader, rows, strips, None, 7)
    assert np.array_equal(np.asarray(page), np.asarray(same))
    assert not np.array_equal(np.asarray(page), np.asarray(sheet.of(reader, rows, strips, None, 8)))
    assert augment.numbers(strips[0].views[0], augment.uniforms(7, 0, 0, 0, 2)).stain_N34.shape[1] == 0


def test_the_verb_lists_and_draws(shard: Path, tmp_path: Path) -> None:
    def views(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "ssl_dist", "views", *words], capture_output=True, text=True,
                              check=False, cwd=tmp_path)

    listed = views()
    assert listed.returncode == 0, listed.stderr
    for name, preset in presets.PRESETS.items():
        assert f"{name}: {preset.source}" in listed.stdout
    assert "[C] read in the authors' code" in listed.stdout
    drawn = views(str(shard), "--preset", "swav", "--tiles", "2")
    assert drawn.returncode == 0, drawn.stderr
    with Image.open(tmp_path / "views" / "swav.png") as page:
        assert page.width > 4 * sheet.SIDE
    for words, said in ((["--preset", "swaf"], "swaf is not one of"), ([str(tmp_path / "none")], "no shard folder"),
                        ([str(shard), "--fit", str(tmp_path / "none.json")], "none.json")):
        refused = views(*words)
        assert refused.returncode in (2, 3), refused
        assert said in refused.stderr
        assert "Traceback" not in refused.stderr
