"""Folders of draws of made-up slides, for tests of what learns from them."""

from pathlib import Path

import numpy as np

from shards import drawing, draws, folder
from shards.drawing import Slide
from shards.draws import Draw

WIDTH, DRAWS, TILES, A_TAR = 16, 4, 12, 5


def written(out: Path, slides: int = 23, seed: int = 0, draw_count: int = DRAWS, name: str = "made") -> Path:
    """Slides of some dozen cells, in tars of five; vectors say of which slide and draw they are, and of which cell."""
    work = folder.make(out / ".work")
    numbers, notes = np.random.default_rng(seed), []
    for number, first in enumerate(range(0, slides, A_TAR)):
        made = []
        for slide in range(first, min(first + A_TAR, slides)):
            cells = np.stack(np.unravel_index(numbers.choice(64, TILES + slide % 5, replace=False), (8, 8)), axis=1)
            contents = []
            for draw in range(draw_count):
                own = numbers.permutation(cells)[:TILES]
                features = numbers.normal(size=(len(own), WIDTH)) / 4
                features[:, :4] += np.stack([np.full(len(own), slide % 7), np.full(len(own), draw), *own.T], axis=1)
                contents.append(draws.packed(Draw(features, own)))
            made.append((Slide(f"s{slide:03d}", f"p{slide // 2:03d}", "train" if slide % 4 else "test", 1.0), contents))
        path, note = out / f"{name}-{number:06d}.tar", work / f"{number}.json"
        drawing.write_tar(path, note, {"dataset": name, "organ": "none", "stain": "H&E"}, made)
        notes.append(drawing.noted(path, note))
    card = {"name": name, "organ": "none", "stain": "H&E", "licence": "Apache-2.0", "classes": [], "draws": draw_count,
            "tiles": TILES, "width": WIDTH, "encoder": "made-up", "encoder_sha256": "0" * 64, "slides": slides}
    drawing.publish(out, card, {"stage": 3}, notes, {})
    for path in work.iterdir():
        path.unlink()
    work.rmdir()
    return out
