"""Pictures of the data: every tile where it lies, every sheet with the tiles it names."""

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shards import index, show

Pixels = set[tuple[int, int]]
HOSTILE = ["../../etc/passwd", "two\nlines", 'quo"te\'s', "<img src=x onerror=alert(1)>", "n" * 300, "腫瘍",
           "é\u202eß\x00"]


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def coloured(pixels: np.ndarray, ink: tuple[int, int, int]) -> Pixels:
    return {(x, y) for y, x in np.argwhere((pixels == ink).all(axis=-1)).tolist()}


def grey(width: int, height: int) -> np.ndarray:
    """A picture in none of our colours."""
    return np.random.default_rng(0).integers(150, 250, (height, width, 1), np.uint8).repeat(3, axis=2)


def test_an_overlay_draws_every_tile_where_it_lies_in_the_colour_of_what_became_of_it(tmp_path: Path) -> None:
    picture, scale, side = grey(400, 300), 0.1, 200.0
    kept = [(0, 0, side), (1000, 400, side), (3800, 2800, side)]
    rejected = [(400, 1000, side, "blurred"), (2000, 2000, side, "pen"), (800, 0, side, "background")]
    show.overlay(picture, scale, np.zeros((10, 10), bool), kept, rejected, tmp_path / "a.png")
    pixels = read(tmp_path / "a.png")[:300]

    def square(x: float, y: float) -> tuple[Pixels, Pixels]:
        """The border and the whole of a tile's square, which ends a pixel before its neighbour's."""
        left, top, right, bottom = x * scale, y * scale, (x + side) * scale - 2, (y + side) * scale - 2
        whole = set(itertools.product(range(int(left), int(right) + 1), range(int(top), int(bottom) + 1)))
        return {(x, y) for x, y in whole if x in (left, right) or y in (top, bottom)}, whole

    touched: Pixels = set()
    borders = [square(x, y)[0] for x, y, _ in kept]
    assert coloured(pixels, show.KEPT) == set.union(*borders), "and nothing inside: a kept tile is there to be seen"
    touched |= set.union(*borders)
    for x, y, _, reason in rejected[:2]:
        border, whole = square(x, y)
        found = coloured(pixels, show.REASONS[reason])
        assert border < found < whole, "the border, and a stroke through it"
        touched |= whole
    changed = {(x, y) for y, x in np.argwhere((pixels != picture).any(axis=-1)).tolist()}
    assert changed == touched, "the rest is the slide itself, background too"


def test_the_outline_lies_on_both_sides_of_the_masks_edge_and_nowhere_else(tmp_path: Path) -> None:
    mask = np.zeros((30, 40), bool)
    mask[:, 20:] = True
    show.overlay(grey(400, 300), 1.0, mask, [], [], tmp_path / "a.png")
    found = coloured(read(tmp_path / "a.png")[:300], show.TISSUE)
    rim = {(x, y) for x, y in found if x == 399 or y in (0, 299)}     # tissue that the picture cuts off ends there
    assert {x for x, _ in found - rim} == {199, 200} and len(found - rim) == 2 * 298


def test_tiles_too_small_for_an_outline_are_dots_that_leave_the_slide_to_be_seen(tmp_path: Path) -> None:
    """A slide of 100,000 pixels: a tile is a few pixels of the overlay, or less than one."""
    picture = grey(400, 400)
    for side, least, most in ((8, 0.03, 0.3), (4, 0.05, 0.3), (2, 0.2, 0.3), (0.7, 0.9, 1.0)):
        grid = np.arange(0, 400, side)
        kept = [(round(x * 250), round(y * 250), side * 250) for x in grid for y in grid]
        show.overlay(picture, 1 / 250, np.zeros((4, 4), bool), kept[1:], [(*kept[0], "pen")], tmp_path / "a.png")
        pixels = read(tmp_path / "a.png")[:400]
        assert least < len(coloured(pixels, show.KEPT)) / 160_000 <= most, side
        assert side < 1 or (pixels[0, 0] == show.REASONS["pen"]).all()


def test_of_several_resolutions_the_fine_tiles_lie_over_the_coarse(tmp_path: Path) -> None:
    tiles = [(40, 40, 20.0, "pen"), (0, 0, 100.0, "blood")]
    for order in (tiles, tiles[::-1]):
        show.overlay(grey(200, 200), 1.0, np.zeros((4, 4), bool), [], order, tmp_path / "a.png")
        assert tuple(read(tmp_path / "a.png")[40, 45]) == show.REASONS["pen"]


def test_the_same_input_gives_the_same_bytes_and_any_name_of_a_reason_passes(tmp_path: Path) -> None:
    rejected = [(10 * number, 0, 9.0, reason) for number, reason in enumerate([*show.REASONS, *HOSTILE])]
    for name in "ab":
        show.overlay(grey(90, 60), 1.0, np.ones((3, 3), bool), [(0, 30, 9.0)], rejected, tmp_path / f"{name}.png")
        rejected = rejected[::-1]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes(), "in whatever order tiles come"
    assert read(tmp_path / "a.png").shape[1] == 300, "a slide narrower than its legend"


def test_every_reason_has_a_colour_of_its_own_to_every_eye() -> None:
    """As people without one kind of cone see it (Machado et al. 2009), in steps of CIE Lab; 2 is just seen."""
    eyes = np.array([np.eye(3), [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                                 [-0.003882, -0.048116, 1.051998]],
                     [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
                     [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]]])
    white, to_xyz = [0.9505, 1, 1.089], [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]

    def lab(ink: tuple[int, int, int], eye: np.ndarray) -> np.ndarray:
        share = np.array(ink) / 255
        light = np.clip(eye @ np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4), 0, 1)
        ratio = np.array(to_xyz) @ light / white
        x, y, z = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    drawn = [show.KEPT, *(ink for reason, ink in show.REASONS.items()       # whole files are not on any overlay
                          if reason not in (show.NOT_DRAWN, "unreadable", "failed"))]
    for eye in eyes:
        for one, other in itertools.combinations(drawn, 2):
            assert np.linalg.norm(lab(one, eye) - lab(other, eye)) > 15, (one, other)
    strangers = ["a", "b", "c"]
    assert len({show.colour(reason, [*strangers, "pen"]) for reason in [*strangers, "pen"]}) == 4


def test_a_job_over_slides_leaves_one_overlay_a_slide(shard: Path) -> None:
    pictures = sorted(path.name for path in (shard / "overlays").iterdir())
    assert len(pictures) == 4 and all(name.startswith(f"p{number:02d}-s0-") for number, name in enumerate(pictures))
    for path in (shard / "overlays").iterdir():
        assert len(coloured(read(path), show.KEPT)) > 500


def make(folder: Path, tiles: list[dict[str, Any]], classes: list[str], sites: dict[str, str] | None = None) -> Path:
    """A shard folder by hand: each tile has a slide, a label, a colour and a size."""
    folder.mkdir(parents=True)
    rows, content = [], b"any header"
    for number, tile in enumerate(tiles):
        buffer = io.BytesIO()
        Image.new("RGB", tile.get("size", (64, 64)), tile["colour"]).save(buffer, "PNG")
        rows.append({"key": f"k{number}", "tar": 0, "offset": len(content), "size": len(buffer.getvalue()), "crc32": 0,
                     "dataset": "a", "slide": tile["slide"], "patient": "", "x": 0, "y": 0, "mpp": 0.5,
                     "label": tile.get("label", -1), "split": "", "stain": "", "organ": "", "encoding": "",
                     "digest": bytes(16)})
        content += buffer.getvalue()
    index.write_samples(folder, {name: [row[name] for row in rows] for name in index.SCHEMA.names})
    (folder / "a-000000.tar").write_bytes(content)
    index.write(folder, index.Index([{"name": "a", "classes": classes}], {}, "",
                                    [index.Tar("a-000000.tar", len(rows), len(content), "")]))
    if sites is not None:
        (folder / "slides.jsonl").write_text("".join(json.dumps(
            {"slide": slide, "site": site, "split": "", "kept": 1, "rejected": {}}) + "\n"
            for slide, site in sites.items()))
    return folder


def shades(count: int) -> list[tuple[int, int, int]]:
    """So many colours that no text has."""
    return [(250 - number % 8 * 30, 40 + number // 8 % 8 * 25, number // 64 * 60) for number in range(count)]


def places(sheet: Path, inks: list[tuple[int, int, int]]) -> list[tuple[int, int, int, int] | None]:
    """Left, top, width and height of each colour."""
    pixels, found = read(sheet), []
    for ink in inks:
        at = np.argwhere((pixels == ink).all(axis=-1))
        (top, left), (bottom, right) = (at.min(axis=0), at.max(axis=0)) if len(at) else ((0, 0), (0, 0))
        found.append((int(left), int(top), int(right - left) + 1, int(bottom - top) + 1) if len(at) else None)
    return found


def test_a_sheet_shows_the_first_tiles_of_each_class_in_order_and_the_unlabelled_last(tmp_path: Path) -> None:
    inks = shades(40)
    labels = [number % 3 - 1 for number in range(40)]           # -1, 0, 1
    shard = make(tmp_path / "a", [{"slide": "s", "label": label, "colour": ink}
                                  for label, ink in zip(labels, inks, strict=True)], ["b", "腫瘍"])
    written = show.sheets(shard, columns=4, rows=6)
    assert [path.relative_to(shard).as_posix() for path in written] == ["sheets/classes.png", "sheets/slides.png"]
    found = places(written[0], inks)
    order = [number for label in (0, 1, -1) for number in range(40) if labels[number] == label]
    seen = [number for number in order if found[number]]
    by_place = sorted(seen, key=lambda number: (found[number][1], found[number][0]))     # type: ignore[index]
    assert by_place == seen, "from left to right and top to bottom, as the table has them"
    for label in (0, 1, -1):
        mine = [number for number in order if labels[number] == label]
        assert [number for number in mine if found[number]] == mine[:8], "two lines of four, the first of them"
    assert {place[2:] for place in found if place} == {(show.CELL, show.CELL)}


def test_tiles_of_any_size_keep_their_shape(tmp_path: Path) -> None:
    sizes, inks = [(30, 20), (20, 60), (500, 100), (1, 1), (96, 96)], shades(5)
    shard = make(tmp_path / "a", [{"slide": "s", "colour": ink, "size": size}
                                  for ink, size in zip(inks, sizes, strict=True)], [])
    found = places(show.sheets(shard)[0], inks)
    assert [place and place[2:] for place in found] == [(96, 64), (32, 96), (96, 19), (96, 96), (96, 96)]


def test_many_slides_of_one_tile_share_lines_and_those_of_more_come_first(tmp_path: Path) -> None:
    inks = shades(256)
    slides = ["big"] * 6 + [f"s{number:03}" for number in range(250)]
    shard = make(tmp_path / "a", [{"slide": slide, "colour": ink} for slide, ink in zip(slides, inks, strict=True)], [])
    show.sheets(shard, rows=8)
    sheet = shard / "sheets" / "slides.png"
    found = places(sheet, inks)
    tops = sorted({place[1] for place in found if place})
    assert [number for number in range(256) if found[number] and found[number][1] == tops[0]] == list(range(6))  # type: ignore[index]
    shown = [number for number in range(6, 256) if found[number]]
    assert len(tops) == 8 and len(shown) == 7 * 12, "as many lines as were asked for, and they are full"
    assert max(np.diff(shown)) <= 4 and shown[0] == 6 and shown[-1] > 250, "spread evenly over the names"
    assert read(sheet).shape[0] < 8 * 140


def test_there_is_a_sheet_of_sites_where_sites_are_known(tmp_path: Path) -> None:
    inks = shades(12)
    shard = make(tmp_path / "a", [{"slide": f"s{number % 3}", "colour": ink} for number, ink in enumerate(inks)], [],
                 {"s0": "Ulm", "s1": "Aachen", "s2": ""})
    written = show.sheets(shard)
    assert [path.name for path in written] == ["classes.png", "slides.png", "sites.png"]
    found = places(written[2], inks)
    tops = [sorted({found[number][1] for number in range(12) if number % 3 == slide})       # type: ignore[index]
            for slide in (1, 0, 2)]
    assert [len(each) for each in tops] == [1, 1, 1] and tops == sorted(tops), "Aachen, Ulm, and no site"
    shard = make(tmp_path / "b", [{"slide": "s0", "colour": inks[0]}], [], {"s0": ""})
    assert [path.name for path in show.sheets(shard)] == ["classes.png", "slides.png"]


def test_any_name_passes_and_sheets_are_drawn_again_as_they_were(tmp_path: Path) -> None:
    tiles = [{"slide": name, "label": number, "colour": ink} for number, name in enumerate(HOSTILE)
             for ink in shades(5)]
    shard = make(tmp_path / "a", tiles, HOSTILE, dict.fromkeys(HOSTILE, "<b>site\n"))
    first = [path.read_bytes() for path in show.sheets(shard)]
    assert [path.read_bytes() for path in show.sheets(shard)] == first
    assert sorted(path.name for path in (shard / "sheets").iterdir()) == ["classes.png", "sites.png", "slides.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"], "no name became a path"


def test_a_name_is_written_in_letters_that_there_are() -> None:
    assert show.printable("Müller", 20) == "Muller"
    assert show.printable("a\nb", 20) == "a?b"
    assert len(show.printable("n" * 300, 40)) == 40
    different = [*HOSTILE, "間質"]
    assert len({show.printable(name, 100) for name in different}) == len(different), "and names that differ still do"
    assert all(show.printable(name, 100).isascii() and show.printable(name, 100).isprintable() for name in HOSTILE)


def test_a_tile_that_cannot_be_shown_is_named_with_what_to_do(tmp_path: Path) -> None:
    shard = make(tmp_path / "a", [{"slide": "s", "colour": (1, 2, 3)}], [])
    (shard / "a-000000.tar").write_bytes(bytes(1000))
    with pytest.raises(index.ShardError, match=r"tile k0 of .*a-000000.tar cannot be decoded .* ssl-dist check"):
        show.sheets(shard)
    (shard / "a-000000.tar").unlink()
    with pytest.raises(index.ShardError, match=r"a-000000.tar is missing; restore it"):
        show.sheets(shard)
    (shard / "slides.jsonl").write_text('{"slide": "s"}\n')
    with pytest.raises(index.ShardError, match=r"line 1 of .*slides.jsonl does not tell of a slide"):
        show.sheets(shard)
