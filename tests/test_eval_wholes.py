"""Slides and pictures that are mapped whole: each found once, and read where it says it lies."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import synthetic, tiff
from shards.index import ShardError
from shards.slide import SlideError
from shards.sources import Source
from ssl_dist.eval import pieces, segment, wholes


def picture(path: Path) -> Path:
    """White, but for a black square at rows 40 to 59, columns 120 to 159."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((200, 200, 3), 255, np.uint8)
    pixels[40:60, 120:160] = 0
    Image.fromarray(pixels).save(path)
    return path


def seen(place: Path, asked: float, slide_mpp: float | None = None) -> tuple[tuple[int, ...], list[float], float]:
    """Size of the map, where the square's corners are in pixels of level 0 by it, and the scale."""
    (source,) = wholes.found([str(place)])
    with wholes.opened(source, asked, slide_mpp) as whole:
        rows, columns = np.nonzero(whole.read(0, 0, whole.size[1], whole.size[0])[:, :, 0] < 128)
        edges = [rows.min(), rows.max() + 1, columns.min(), columns.max() + 1]
        return whole.size, [float(each * whole.scale) for each in edges], whole.scale


@pytest.mark.parametrize("by", ["table", "word", "nothing"])
def test_a_picture_is_read_at_the_resolution_that_is_known_of_it(by: str, tmp_path: Path) -> None:
    place = picture(tmp_path / "own" / "p.png")
    if by == "table":
        (tmp_path / "own" / "slides.csv").write_text("slide,mpp\np,0.5\n")
    word = 0.5 if by == "word" else None
    size, edges, scale = seen(place, 1.0, word)
    assert (size, scale) == (((200, 200), 1.0) if by == "nothing" else ((100, 100), 2.0))
    assert edges == [40, 60, 120, 160]
    if by != "nothing":
        with pytest.raises(SlideError, match=r"what is not in it cannot be read; mpp=0\.5"):
            seen(place, 0.25, word)
        with pytest.raises(ShardError, match="is not known; say mpp="):
            seen(place, float("nan"), word)


def test_slides_and_pictures_are_found_by_folder_and_two_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("a/x.png", "b/x.png", "b/y.png"):
        picture(tmp_path / name)
    assert [each.slide for each in wholes.found([str(tmp_path / "b")])] == ["x", "y"], "a folder of pictures alone"
    assert len(wholes.found([str(tmp_path / "b"), str(tmp_path / "b" / "y.png")])) == 2, "each once"
    with pytest.raises(ShardError, match="are both called 'x'"):
        wholes.found([str(tmp_path / "a"), str(tmp_path / "b")])
    with pytest.raises(ShardError, match="would both be slide 'x'"):
        wholes.found([str(tmp_path)])
    tiff.write_pyramid(tmp_path / "b" / "s.svs", synthetic.paint(0, 0, 0, size=512).pixels, 0.5, 87)
    assert [each.slide for each in wholes.found([str(tmp_path / "b")])] == ["s"], "where there are slides, those"
    with pytest.raises(ShardError, match="names no slide"):
        wholes.found([str(tmp_path / "nothing")])


def test_the_colours_of_a_large_picture_are_not_those_of_its_edges() -> None:
    """A picture as tall as puts every so manieth of its pieces into two columns, and these are glass."""
    side, rows, columns = 8, 255, 150

    taken: list[int] = []

    def told(left: int, _: int, wide: int, high: int) -> np.ndarray:
        taken.append(left // side)
        tissue = np.full((high, wide, 3), 90, np.uint8)
        tissue[::2] -= 40
        return tissue

    pieces.colours(told, (rows * side, columns * side), side)
    assert len(taken) == pieces.SOME and len(set(taken)) > 75


@pytest.mark.parametrize(("values", "expected"), [
    (-0.1 - 0.01 * np.arange(10.0), 1), (np.full(10, np.nan), 9), (np.r_[np.zeros(5), np.ones(5)], 6),
    (np.r_[np.full(5, -1.0), np.full(5, -0.1)], 6)])
def test_a_separation_is_flat_somewhere_whatever_its_sign(values: np.ndarray, expected: int) -> None:
    assert segment.flat_from(np.arange(10), values) == expected


# ---- each once

def files(source: Source) -> list[str]:
    return [f"{source.slide}.txt"]


def done(out: Path, some: list[Source], broken: tuple[str, ...] = (), **told: object) -> tuple[list[dict], list[str]]:
    """The rows of a call, and the slides that it looked at."""
    looked: list[str] = []

    def do(source: Source) -> dict:
        looked.append(source.slide)
        if source.slide in broken:
            raise SlideError("torn")
        (out / f"{source.slide}.txt").write_text(str(told))
        return {"slide": source.slide, "made": len(looked)}

    return wholes.rows(some, out, {"cut": 1, **told}, do, files), looked


@pytest.fixture
def three(tmp_path: Path) -> list[Source]:
    for name in "abc":
        picture(tmp_path / "own" / f"{name}.png")
    return wholes.found([str(tmp_path / "own")])


def test_a_slide_that_is_done_is_not_done_again_and_one_that_changed_is(three: list[Source], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    rows, looked = done(out, three, ("b",))
    assert looked == ["a", "b", "c"] and rows[1] == {"slide": "b", "error": "torn"}
    assert wholes.failed(rows)["failed"] == ["b"]
    again, looked = done(out, three)
    assert looked == ["b"] and (again[0], again[2]) == (rows[0], rows[2])
    assert done(out, three)[1] == []
    assert done(out, three, cut=2)[1] == ["a", "b", "c"], "in other words"
    assert done(out, [replace(each, mpp=0.5) for each in three], cut=2)[1] == ["a", "b", "c"], "a table says otherwise"


def test_no_file_of_an_earlier_call_stays_beside_what_is_made_otherwise(three: list[Source], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    more = [f"{each.slide}.{form}" for each in three for form in ("txt", "tif")]
    for name in more:
        (out / name).write_text("old")
    wholes.rows(three, out, {"cut": 0}, lambda source: {"slide": source.slide},
                lambda source: [f"{source.slide}.txt", f"{source.slide}.tif"])
    for name in more:
        (out / name).write_text("old")
    done(out, three, ("a", "b", "c"))
    assert sorted(each.name for each in out.iterdir()) == [".done"] and not list((out / ".done").iterdir())


def test_nothing_that_is_not_ours_is_deleted_or_written_over(three: list[Source], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.txt").write_text("somebody's notes on slide a")
    done(out, three, ("a",))
    assert (out / "a.txt").read_text() == "somebody's notes on slide a", "where nothing is written, nothing goes"
    for home in (tmp_path / "own", tmp_path / "out" / ".." / "own"):
        with pytest.raises(ShardError, match="its map would be written over it"):
            wholes.rows(three, home, {}, lambda source: {"slide": source.slide}, lambda source: [f"{source.slide}.png"])
    assert all(each.path.is_file() for each in three)


def test_a_disk_that_is_full_is_not_the_slide_s_failure(three: list[Source], tmp_path: Path) -> None:
    looked: list[str] = []

    def do(source: Source) -> dict:
        looked.append(source.slide)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        wholes.rows(three, tmp_path, {}, do, files)
    assert looked == ["a"]


def test_a_slide_that_is_damaged_in_the_middle_is_one_that_cannot_be_read(tmp_path: Path) -> None:
    """Not an error of whatever decoder met it."""
    pixels = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    tiff.write_pyramid(tmp_path / "s.svs", pixels, 0.5, 87)
    content = bytearray((tmp_path / "s.svs").read_bytes())
    content[100_000:400_000] = bytes(300_000)
    (tmp_path / "s.svs").write_bytes(content)
    (source,) = wholes.found([str(tmp_path)])
    assert wholes.tried([source], 0.5, None) == []
    with wholes.opened(source, 0.5, None) as whole, pytest.raises(SlideError, match="cannot be read"):
        whole.read(0, 0, 1024, 1024)
