"""Pictures of the data: every tile where it lies, every sheet with the tiles it names."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import index, show, write
from shards.slide import Slide


def test_an_overlay_draws_kept_tiles_green_and_rejected_ones_red_where_they_lie(slides: Path, tmp_path: Path) -> None:
    kept, rejected = [(256, 128), (512, 640)], [(128, 512, "blank"), (768, 768, "background")]
    show.overlay(slides / "P00-S0.svs", (None, None), kept, rejected, size=64, mpp=1.0, out=tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (800, 800)
        pixels = np.asarray(picture.convert("RGB"))
    with Slide(slides / "P00-S0.svs") as slide:
        plain = slide.thumbnail(slide.width * slide.mpp / 800)

    def outlined(colour: tuple[int, int, int]) -> set[tuple[int, int]]:
        return {(x, y) for y, x in np.argwhere((pixels == colour).all(axis=-1)).tolist()}

    scale = 800 / 1024
    for colour, corners in ((show.KEPT, kept), (show.REJECTED, [(x, y) for x, y, why in rejected if why == "blank"])):
        expected = set()
        for x, y in corners:
            left, top, right, bottom = x * scale + 1, y * scale + 1, (x + 128) * scale - 1, (y + 128) * scale - 1
            for along in range(int(left), int(right) + 1):
                expected |= {(along, int(top)), (along, int(bottom))}
            for along in range(int(top), int(bottom) + 1):
                expected |= {(int(left), along), (int(right), along)}
        assert outlined(colour) == expected
    assert (pixels == plain).all(axis=-1).mean() > 0.8, "the rest is the slide itself"


def test_tiles_smaller_than_their_outline_are_dots_and_do_not_end_the_job(slides: Path, tmp_path: Path,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """A slide of 100,000 pixels with tiles of 224: less than two pixels of the overlay."""
    monkeypatch.setattr(show, "OVERLAY_WIDTH", 40)
    kept = [(x, y) for x in range(0, 1024, 32) for y in range(0, 1024, 32)]
    show.overlay(slides / "P00-S0.svs", (None, None), kept, [(0, 0, "blank")], size=16, mpp=1.0, out=tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape == (40, 40, 3)
    assert (pixels == show.KEPT).all(axis=-1).mean() > 0.5


def test_a_job_over_slides_leaves_one_overlay_a_slide(shard: Path) -> None:
    pictures = sorted(path.name for path in (shard / "overlays").iterdir())
    assert len(pictures) == 4 and all(name.startswith(f"p{number:02d}-s0-") for number, name in enumerate(pictures))
    for path in (shard / "overlays").iterdir():
        with Image.open(path) as picture:
            assert (np.asarray(picture.convert("RGB")) == show.KEPT).all(axis=-1).sum() > 500


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Three classes, one of them named in another alphabet, a class of one tile, and tiles without a class."""
    rng = np.random.default_rng(0)
    for name, count in (("腫瘍", 5), ("b", 1), ("", 3)):
        for number in range(count):
            path = tmp_path / "in" / f"[{name}]" / f"{number}{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (1, 1, 3), np.uint8)).resize((30, 20)).save(path)
    write.write(write.Settings(tmp_path / "in", tmp_path / "out", "a", kind="tiles", workers=1,
                               names=r"\[(?P<label>.*)\]/"))
    return tmp_path / "out"


def test_sheets_show_the_first_tiles_of_every_class_and_slide(folders: Path) -> None:
    written = show.sheets(folders, columns=4)
    assert [path.relative_to(folders).as_posix() for path in written] == ["sheets/classes.png", "sheets/slides.png"]
    found, table = index.read(folders), index.samples(folders).to_pylist()
    assert found.datasets[0]["classes"] == ["b", "腫瘍"]
    with Image.open(written[0]) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert pixels.shape == (3 * 116 + 4, 4 * 100 + 4, 3)
    for line, label in enumerate((-1, 0, 1)):
        rows = [row for row in table if row["label"] == label][:4]
        for column in range(4):
            cell = pixels[4 + line * 116 + 16:, 4 + column * 100:][:96, :96]
            if column < len(rows):
                tar = (folders / found.tars[rows[column]["tar"]].name).read_bytes()
                data = tar[rows[column]["offset"]:][:rows[column]["size"]]
                (folders / "one.jpg").write_bytes(data)
                with Image.open(folders / "one.jpg") as one:
                    assert np.abs(cell - np.asarray(one).mean(axis=(0, 1))).max() < 4
            else:
                assert (cell == 255).all(), "no tile, no picture"
    with Image.open(written[1]) as picture:
        assert picture.height == 9 * 116 + 4


def test_sheets_are_drawn_again_over_the_old_ones_and_say_nothing_new_of_the_folder(folders: Path) -> None:
    first = [path.read_bytes() for path in show.sheets(folders)]
    assert [path.read_bytes() for path in show.sheets(folders)] == first
    assert sorted(path.name for path in (folders / "sheets").iterdir()) == ["classes.png", "slides.png"]
    assert json.loads((folders / "index.json").read_text())["format"] == 1
