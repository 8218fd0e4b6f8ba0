"""Tiles in rows on one picture: beside each query what an encoder holds to be alike, or where it looks."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont

from shards import folder
from ssl_dist.eval import features
from ssl_dist.eval.features import Split
from ssl_dist.eval.protocol import Source

SIDE, GAP, LINE, EDGE = 112, 10, 20, 3      # pixels: a tile, between two, a line of words, a frame
QUERY, PLAIN, GOOD, NEAR, BAD = (60, 60, 60), (205, 205, 205), (22, 130, 80), (235, 150, 20), (200, 50, 45)
NEAREST = 8         # neighbours of a tile
HEADS = 6           # of a ViT's attention, drawn beside their mean


@dataclass(frozen=True)
class Cell:
    """A picture, its frame, and a word below it."""

    picture: Image.Image
    frame: tuple[int, int, int] = PLAIN
    word: str = ""


def paste(lines: Sequence[tuple[str, Sequence[Cell]]], out: Path) -> None:
    """Writes a row of cells for each line, a title above it; the first cell stands a little apart."""
    words = any(cell.word for _, cells in lines for cell in cells)
    high = LINE + SIDE + (LINE if words else 0) + GAP
    wide = max(len(cells) for _, cells in lines) * (SIDE + GAP) + 3 * GAP
    sheet = Image.new("RGB", (wide, len(lines) * high + GAP), (255, 255, 255))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, (title, cells) in enumerate(lines):
        top = GAP + number * high
        draw.text((GAP, top), title, fill=(0, 0, 0), font=font)
        for column, cell in enumerate(cells):
            left, down = GAP + column * (SIDE + GAP) + (GAP if column else 0), top + LINE
            sheet.paste(cell.picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, down))
            draw.rectangle((left - EDGE, down - EDGE, left + SIDE + EDGE - 1, down + SIDE + EDGE - 1),
                           outline=cell.frame, width=EDGE)
            draw.text((left, down + SIDE + EDGE), cell.word[:SIDE // 7], fill=(90, 90, 90), font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    folder.write(out, buffer.getvalue())


def tile(split: Split, place: int) -> Image.Image:
    """One tile of a split, as it was written."""
    return Image.open(io.BytesIO(split.reader.read(split.rows[[place]])[0].tobytes())).convert("RGB")


def neighbours(split: Split, shown: np.ndarray, places_QK: np.ndarray, out: Path) -> None:
    """Tiles of one split beside their neighbours in it; framed where those are of the same slide or patient."""
    def frame(own: int, other: int) -> tuple[int, int, int]:
        if split.slides[own] == split.slides[other]:
            return BAD
        return NEAR if split.patients[own] and split.patients[own] == split.patients[other] else PLAIN

    paste([(split.slides[own], [Cell(tile(split, own), QUERY), *(
        Cell(tile(split, other), frame(own, other), "same slide" if split.slides[own] == split.slides[other] else
             "same patient" if frame(own, other) == NEAR else "") for other in others)])
        for own, others in zip(shown.tolist(), places_QK.tolist(), strict=True)], out)


def votes(bank: Split, query: Split, shown: np.ndarray, places_QK: np.ndarray, answers: list[int], out: Path) -> None:
    """Queries beside the tiles of the bank that vote for them; green where the class agrees."""
    lines = []
    for own, others, answer in zip(shown.tolist(), places_QK.tolist(), answers, strict=True):
        truth, guess = (bank.classes[each] for each in (int(query.labels_S[own]), answer))
        lines.append((truth if truth == guess else f"{truth}, taken for {guess}", [Cell(tile(query, own), QUERY), *(
            Cell(tile(bank, other), GOOD if bank.labels_S[other] == query.labels_S[own] else BAD)
            for other in others)]))
    paste(lines, out)


def attention(source: Source, split: Split, shown: np.ndarray, out: Path, threads: int,
              device: torch.device) -> str | None:
    """Where a ViT's last block looks, a tile a row: all heads, then each; and what to say of it. None of other
    networks."""
    encoder = source.network(0).eval().to(device)
    _, pixels = next(features.tiles(split, shown, size=source.size, batch=len(shown), threads=threads))
    with torch.inference_mode():
        weights_QHhw = encoder.attention(pixels.to(device))
    if weights_QHhw is None:
        return None
    heads = weights_QHhw.shape[1]
    lines = []
    for number, place in enumerate(shown.tolist()):
        own_Hhw = weights_QHhw[number].float().cpu().numpy()
        picture = Image.fromarray(pixels[number].numpy())
        mean = Cell(_heated(picture, own_Hhw.mean(axis=0)), QUERY)
        lines.append((split.slides[place], [Cell(picture, QUERY), mean, *(
            Cell(_heated(picture, own_Hhw[head])) for head in range(min(heads, HEADS)))]))
    paste(lines, out)
    return (f"Where the encoder looks: attention of its last block, bright where it is high; first the mean of its "
            f"{heads} heads, then {'each' if heads <= HEADS else f'{HEADS} of them'}.")


def _heated(picture: Image.Image, weights_hw: np.ndarray) -> Image.Image:
    """The picture, dark and grey, under its weights from the least to the greatest."""
    low, high = weights_hw.min(), weights_hw.max()
    level = Image.fromarray((255 * (weights_hw - low) / max(high - low, 1e-12)).astype(np.uint8))
    level_HW = np.asarray(level.resize(picture.size, Image.Resampling.BICUBIC))
    heat_HW3 = colormaps["inferno"](level_HW)[..., :3]
    grey_HW1 = np.asarray(picture.convert("L"))[..., None] / 255
    return Image.fromarray((255 * (0.35 * grey_HW1 + 0.65 * heat_HW3)).astype(np.uint8))
