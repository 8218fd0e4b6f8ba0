"""Look at the data before training on it: what was cut from a slide, and contact sheets of the tiles."""

import io
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw, ImageFont, ImageOps

from shards import folder, index
from shards.index import ShardError

Colour = tuple[int, int, int]

OVERLAY_WIDTH = 1024            # pixels: a tile of 256 at 20x is 5 of them on a slide of 100,000
INK, PALE, PAPER = (36, 32, 41), (110, 102, 117), (255, 255, 255)
TISSUE = (44, 36, 100)
OUTLINED = 16                   # pixels of the overlay: tiles of fewer are dots
# Of Okabe and Ito's colours, which people with any colour vision tell apart, those that H&E does not hold itself.
KEPT = (0, 158, 115)
REASONS: dict[str, Colour] = {
    "background": (190, 184, 192), "blank": (86, 180, 233), "blurred": (225, 150, 0), "pen": (0, 90, 178),
    "blood": (213, 70, 0), "outside annotations": (75, 75, 80), "duplicate": (20, 20, 20),
    "conflict": (250, 240, 110), "unreadable": (136, 34, 110), "failed": (130, 80, 20),
}
OTHERS: tuple[Colour, ...] = ((148, 52, 110), (102, 80, 20), (60, 130, 140), (90, 90, 160))
NOT_DRAWN = "background"        # most of a slide: drawn, it would hide what was missed

CELL, GAP, MARGIN, HEAD, CAPTION = 96, 3, 14, 20, 13
ONE = {"classes": "class", "slides": "slide", "sites": "site"}
FEW = 4                         # slides of fewer tiles share their lines
LINES = 12                      # of tiles at least, where there are so many: few classes get several lines each


def colour(reason: str, reasons: list[str]) -> Colour:
    """The colour of a reason: its own, or, of one that we do not know, by its place among those of `reasons`."""
    strangers = sorted(set(reasons) - REASONS.keys())
    return REASONS.get(reason) or OTHERS[strangers.index(reason) % len(OTHERS)]


def overlay(picture: np.ndarray, scale: float, mask: np.ndarray, kept: list[tuple[int, int, float]],
            rejected: list[tuple[int, int, float, str]], out: Path) -> None:
    """The slide, the outline of its tissue, the tiles kept (green) and the rejected (crossed, a colour a reason).

    `scale` is pixels of `picture` per level-0 pixel, in which tiles are (x, y, side); `mask` covers what `picture`
    covers, at any resolution. Below lies a legend with the count of each reason.
    """
    pixels = np.array(picture[..., :3])
    pixels[_outline(mask, pixels.shape[1], pixels.shape[0])] = TISSUE
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image, "RGBA")
    counts = Counter(reason for *_, reason in rejected)
    colours = {reason: colour(reason, list(counts)) for reason in counts}
    # Large ones first: of several resolutions, the finer lies within the coarser.
    for x, y, side in sorted(kept, key=lambda tile: (-tile[2], tile)):
        _mark(draw, x * scale, y * scale, side * scale, KEPT, crossed=False)
    for x, y, side, reason in sorted(rejected, key=lambda tile: (-tile[2], tile)):
        if reason != NOT_DRAWN:
            _mark(draw, x * scale, y * scale, side * scale, colours[reason], crossed=True)
    entries = [("tissue", -1, TISSUE), ("kept", len(kept), KEPT)]
    entries += [(word, count, colours[word]) for word, count in sorted(counts.items(), key=lambda one: (-one[1], one))]
    dots = 0 < max([side for *_, side in kept] + [side for *_, side, _ in rejected], default=0) * scale < OUTLINED
    _save(_with_legend(image, entries, dots), out)


def _outline(mask: np.ndarray, width: int, height: int) -> np.ndarray:
    """True along both sides of the mask's edge: one line of two pixels."""
    grown = Image.fromarray(mask.astype(np.uint8) * 255).resize((width, height), Image.Resampling.BILINEAR)
    padded = np.pad(np.asarray(grown) >= 128, 1)
    inner = padded[1:-1, 1:-1]
    differs = [inner != padded[down:down + height, right:right + width]
               for down, right in ((0, 1), (2, 1), (1, 0), (1, 2))]
    return np.logical_or.reduce(differs)


def _mark(draw: ImageDraw.ImageDraw, x: float, y: float, side: float, ink: Colour, crossed: bool) -> None:
    """One tile: a square a pixel short of its neighbour's, or, where squares would hide the slide, a dot."""
    if side < OUTLINED and not crossed:
        x, y, side = x + 0.375 * side, y + 0.375 * side, 0.25 * side + 1
    left, top = int(x + 0.5), int(y + 0.5)
    right, bottom = max(left, int(x + side + 0.5) - 2), max(top, int(y + side + 0.5) - 2)
    if side < OUTLINED:
        return draw.rectangle((left, top, right, bottom), fill=ink)
    # A kept tile stays clear, to be looked at. A rejected one is tinted and struck through: not by colour alone.
    wide = 2 if side >= 2 * OUTLINED else 1
    draw.rectangle((left, top, right, bottom), outline=ink, fill=(*ink, 70) if crossed else None, width=wide)
    if crossed and wide > 1:        # light beneath: red on blood, or brown on pigment, would not be seen
        draw.line((left + 5, bottom - 5, right - 5, top + 5), fill=PAPER, width=2 * wide + 1)
    return draw.line((left, bottom, right, top), fill=ink, width=wide) if crossed else None


def _with_legend(image: Image.Image, entries: list[tuple[str, int, Colour]], dots: bool) -> Image.Image:
    """The picture above one entry (word, count or -1, colour) a kind of mark, each drawn as the picture has it."""
    font, width, row, swatch = _font(14), max(image.width, 300), 24, OUTLINED - 2
    places, left, top = [], MARGIN, 0
    for word, count, ink in entries:
        text = printable(word, 40) + (f"  {count:,}" if count >= 0 else "") + (", not drawn" * (word == NOT_DRAWN))
        wide = swatch + 7 + int(font.getlength(text)) + 22
        if left > MARGIN and left + wide - 22 > width - MARGIN:
            left, top = MARGIN, top + row
        places.append((left, top, text, word, ink))
        left += wide
    legend = Image.new("RGB", (width, image.height + top + row + 2 * 9), PAPER)
    legend.paste(image)
    draw = ImageDraw.Draw(legend, "RGBA")
    for left, top, text, word, ink in places:
        top += image.height + 9 + (row - swatch) // 2
        if word == "tissue":
            draw.rectangle((left, top + swatch // 2 - 1, left + swatch, top + swatch // 2), fill=ink)
        elif word == NOT_DRAWN:
            draw.rectangle((left, top, left + swatch, top + swatch), fill=(*ink, 70))
        elif dots:
            inset = 5 if word == "kept" else 2
            draw.rectangle((left + inset, top + inset, left + swatch - inset, top + swatch - inset), fill=ink)
        else:
            _mark(draw, left, top, swatch + 2, ink, crossed=word != "kept")
        draw.text((left + swatch + 7, top + swatch / 2), text, fill=INK, font=font, anchor="lm")
    return legend


@dataclass(frozen=True)
class Group:
    """What one heading of a contact sheet stands over: rows of the sample table, each perhaps with a caption."""

    heading: str
    count: str
    rows: list[int]
    captions: list[str]


def sheets(shard: Path, columns: int = 12, rows: int = 24) -> list[Path]:
    """Contact sheets of a shard folder by class, by slide and, where they are known, by site: at most `rows` lines."""
    found, table = index.read(shard), index.samples(shard)
    if index.draws(found):
        raise ShardError(f"{shard} holds draws of slides, which are numbers and no pictures; look at the shards that "
                         "they were made of")
    title = ", ".join(card["name"] for card in found.datasets)
    written, out = [], folder.make(shard / "sheets")
    for name, codes, names in groupings(shard, found, table):
        groups, note = _groups(codes, names, name, columns, rows)
        path = out / f"{name}.png"
        _save(_sheet(shard, found, table, f"{title}: {note}", groups, columns), path)
        written.append(path)
    return written


def groupings(shard: Path, found: index.Index, table: pa.Table) -> list[tuple[str, np.ndarray, list[str]]]:
    """(what they are called, the group of every row of the table, the groups' names): classes, slides, sites."""
    classes = found.datasets[0]["classes"]
    # The unlabelled (-1) come last.
    label = table["label"].to_numpy() % (len(classes) + 1)
    slide = index.column(table, "slide")
    codes, names = slide.indices.to_numpy(), slide.dictionary.to_pylist()
    found_groups = [("classes", label, [*classes, "unlabelled"]), ("slides", codes, names)]
    site_of = {line["slide"]: line["site"] for line in slide_lines(shard) if line["site"]}
    if site_of:
        sites = sorted(set(site_of.values()))
        number = {name: position for position, name in enumerate([*sites, ""])}
        found_groups.append(("sites", np.array([number[site_of.get(name, "")] for name in names])[codes],
                             [*sites, "no site"]))
    return found_groups


def slide_lines(shard: Path) -> Iterator[dict[str, Any]]:
    """The lines of slides.jsonl, one at a time; none of a folder that was written before there was such a file."""
    path = shard / "slides.jsonl"
    if not path.exists():
        return
    with path.open(encoding="utf-8") as handle:
        for number, text in enumerate(handle, start=1):
            try:
                line = json.loads(text)
                if missing := {"slide", "site", "split", "kept", "rejected"} - line.keys():
                    raise ValueError(f"it lacks {', '.join(sorted(missing))}")
            except (ValueError, AttributeError) as error:
                raise index.ShardError(f"line {number} of {path} does not tell of a slide ({error}); restore the file, "
                                       "or delete index.json and run the shard job again") from error
            yield line


def _groups(codes: np.ndarray, names: list[str], what: str, columns: int, rows: int) -> tuple[list[Group], str]:
    """Which tiles a sheet shows below which headings, and a sentence on how many of how many these are."""
    counts = np.bincount(codes, minlength=len(names))
    present = np.flatnonzero(counts)
    # A slide of one tile needs no line of its own. A class does: that it has one tile only is worth seeing.
    few = present[counts[present] < FEW] if what != "classes" else present[:0]
    few = few if len(few) > 1 else few[:0]
    many = np.setdiff1d(present, few)
    shown = _spread(many, rows - min(4, -(-len(few) // columns)))
    lines = max(1, min(4, min(rows, LINES) // max(len(shown), 1)))
    # The first of each group: the tars are shuffled, so the first are as good as any, and the same every time.
    groups = []
    for code in shown.tolist():
        count = int(counts[code])
        groups.append(Group(printable(names[code], 90), f"{count:,} tile{'s' * (count > 1)}",
                            np.flatnonzero(codes == code)[:lines * columns].tolist(), []))
    room = max(rows - sum(-(-len(group.rows) // columns) for group in groups), 4) * columns
    if len(few):
        chosen = _spread(few, room)
        order = np.flatnonzero(np.isin(codes, chosen))
        order = order[np.argsort(codes[order], kind="stable")]
        if len(order) > room:       # one tile of each is a fairer sight than all tiles of some
            order = order[np.unique(codes[order], return_index=True)[1]]
        of = f"{len(chosen):,} of the {len(few):,}" if len(chosen) < len(few) else f"the {len(few):,}"
        groups.append(Group(f"{of} {what} of fewer than {FEW} tiles", "", order.tolist(),
                            [printable(names[code], 40) for code in codes[order].tolist()]))
    known = int((present < len(names) - 1).sum()) if what != "slides" else len(present)
    note = f"{known:,} {what if known != 1 else ONE[what]}"
    if len(shown) < len(many):
        note += f"; shown are {len(shown):,} of {len(many):,}, evenly over their names"
    return groups, note


def _spread(values: np.ndarray, most: int) -> np.ndarray:
    """At most so many, evenly from first to last: names that stand together often are of one site."""
    return values if len(values) <= most else values[np.arange(most) * len(values) // most]


def _sheet(shard: Path, found: index.Index, table: pa.Table, title: str, groups: list[Group],
           columns: int) -> Image.Image:
    wide = min(columns, max((len(group.rows) for group in groups), default=1))
    width = max(2 * MARGIN + wide * (CELL + GAP) - GAP, 480)
    step = [CELL + GAP + CAPTION * bool(group.captions) for group in groups]
    height = 2 * MARGIN + HEAD + sum(HEAD + 8 + -(-len(group.rows) // columns) * each
                                     for group, each in zip(groups, step, strict=True))
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    head, body, small = _font(15), _font(13), _font(10)
    draw.text((MARGIN, MARGIN), _fitted(title, head, width - 2 * MARGIN), fill=INK, font=head)
    top = MARGIN + HEAD
    for group, each in zip(groups, step, strict=True):
        heading = _fitted(group.heading, body, width - 2 * MARGIN - 100)
        draw.text((MARGIN, top + 8), heading, fill=INK, font=body)
        draw.text((MARGIN + body.getlength(heading) + 10, top + 8), group.count, fill=PALE, font=body)
        top += HEAD + 8
        for place, row in enumerate(group.rows):
            left, below = MARGIN + place % columns * (CELL + GAP), top + place // columns * each
            tile = ImageOps.contain(image(shard, found, table, row, CELL), (CELL, CELL))
            sheet.paste(tile, (left + (CELL - tile.width) // 2, below + (CELL - tile.height) // 2))
            if group.captions:
                draw.text((left, below + CELL + 1), _fitted(group.captions[place], small, CELL), fill=PALE, font=small)
        top += -(-len(group.rows) // columns) * each
    return sheet


def image(shard: Path, found: index.Index, table: pa.Table, row: int, least: int = 0) -> Image.Image:
    """The picture of one sample, decoded; where `least` is given, at any size that is still as large as that."""
    tar, offset, size = (table[name][row].as_py() for name in ("tar", "offset", "size"))
    path = shard / found.tars[tar].name
    if not path.is_file():
        raise index.ShardError(f"{path} is missing; restore it, then run: ssl-dist check {shard}")
    with path.open("rb") as handle:
        content = os.pread(handle.fileno(), size, offset)
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as opened:
            if least:
                opened.draft("RGB", (least, least))         # a JPEG gives an eighth away cheaply
            return opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise index.ShardError(f"tile {table['key'][row].as_py()} of {path} cannot be decoded ({error}); run: ssl-dist "
                               f"check {shard}") from error


def printable(name: str, most: int) -> str:
    """A name from a disk in the letters that our font draws, its middle left out where it is longer than `most`."""
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", name) if not unicodedata.combining(letter))
    plain = "".join(letter if letter.isprintable() and letter.isascii() else
                    letter.encode("ascii", "backslashreplace").decode() if ord(letter) > 126 else "?"
                    for letter in plain)
    return plain if len(plain) <= most else f"{plain[:most - most // 3 - 3]}...{plain[-(most // 3):]}"


def _fitted(text: str, font: Any, width: float) -> str:
    """`text`, shortened in its middle until it is no wider."""
    shorter, most = text, len(text)
    while font.getlength(shorter) > width and most > 4:
        most -= 1
        shorter = printable(text, most)
    return shorter


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _save(picture: Image.Image, out: Path) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)       # tissue is noise: more takes twice as long for a tenth
    folder.write(out, buffer.getvalue())
