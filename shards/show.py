"""Look at the data before training on it: contact sheets of tiles, overlays of what was cut from a slide."""

import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from shards import folder, index, tissue
from shards.slide import Slide

OVERLAY_WIDTH = 800             # pixels: the outline and the tiles can still be told apart
KEPT = (22, 130, 80)
REJECTED = (200, 60, 50)


def overlay(slide_path: Path, slide_mpp: tuple[float | None, float | None], kept: list[tuple[int, int]],
            rejected: list[tuple[int, int, str]], size: int, mpp: float, out: Path) -> None:
    """The slide, the outline of its tissue, the tiles kept (green) and those rejected for more than glass (red)."""
    with Slide(slide_path, *slide_mpp) as slide:
        picture_mpp = max(slide.width * slide.mpp / OVERLAY_WIDTH, slide.mpp)
        picture = Image.fromarray(slide.thumbnail(picture_mpp))
        found = Image.fromarray(tissue.mask(slide.thumbnail(tissue.MASK_MPP)).astype(np.uint8) * 255)
        scale, side = slide.mpp / picture_mpp, size * mpp / slide.mpp
    region = np.asarray(found.resize(picture.size, Image.Resampling.NEAREST)) > 0
    edge = region ^ np.pad(region, 1)[:-2, 1:-1] | region ^ np.pad(region, 1)[1:-1, :-2]
    pixels = np.array(picture)
    pixels[edge] = (40, 80, 200)
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    boxes = [(x, y, KEPT) for x, y in kept] + [(x, y, REJECTED) for x, y, why in rejected if why != "background"]
    for x, y, colour in boxes:
        left, top = x * scale + 1, y * scale + 1
        # A tile of a large slide may be narrower here than its two outlines: then it is a dot.
        right, bottom = max(left, (x + side) * scale - 1), max(top, (y + side) * scale - 1)
        draw.rectangle((left, top, right, bottom), outline=colour)
    _save(picture, out)


def sheets(shard: Path, columns: int = 12, rows: int = 24) -> list[Path]:
    """Contact sheets of a shard folder: one row a class, and one row a slide (the first `rows` of each)."""
    found, table = index.read(shard), index.samples(shard)
    classes = found.datasets[0]["classes"]
    label = table["label"].to_numpy()
    groups = {"classes": [(classes[number] if number >= 0 else "unlabelled", np.flatnonzero(label == number))
                          for number in np.unique(label)[:rows]]}
    slide = table["slide"].combine_chunks()
    codes, names = slide.indices.to_numpy(), slide.dictionary.to_pylist()
    groups["slides"] = [(name, np.flatnonzero(codes == number)) for number, name in enumerate(names[:rows])]
    written = []
    for name, members in groups.items():
        path = folder.make(shard / "sheets") / f"{name}.png"
        # The first of each group: the tars are shuffled, so the first are as good as any, and the same every time.
        _save(_sheet(shard, found, table, [(word, chosen[:columns]) for word, chosen in members]), path)
        written.append(path)
    return written


def _sheet(shard: Path, found: index.Index, table: pa.Table, groups: list[tuple[str, np.ndarray]]) -> Image.Image:
    cell, gap, head = 96, 4, 16
    columns = max(len(rows) for _, rows in groups)
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, len(groups) * (cell + gap + head) + gap), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for line, (name, rows) in enumerate(groups):
        top = gap + line * (cell + gap + head)
        draw.text((gap, top), name, fill=(0, 0, 0))
        for column, row in enumerate(rows.tolist()):
            tile = image(shard, found, table, row).resize((cell, cell), Image.Resampling.BILINEAR)
            sheet.paste(tile, (gap + column * (cell + gap), top + head))
    return sheet


def image(shard: Path, found: index.Index, table: pa.Table, row: int) -> Image.Image:
    """The picture of one sample, decoded."""
    tar, offset, size = (table[name][row].as_py() for name in ("tar", "offset", "size"))
    path = shard / found.tars[tar].name
    if not path.is_file():
        raise index.ShardError(f"{path} is missing; restore it, then run: ssl-dist check {shard}")
    with path.open("rb") as handle:
        return Image.open(io.BytesIO(os.pread(handle.fileno(), size, offset))).convert("RGB")


def _save(picture: Image.Image, out: Path) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)       # tissue is noise: more takes twice as long for a tenth
    folder.write(out, buffer.getvalue())
