"""Ellipses on tissue that is none: regions whose nuclei are known to the pixel, and a network that learns them in
seconds."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from ssl_dist.models.encoder import Encoder

# Of 8 channels torch 2.15 on a CPU writes beyond its memory in the gradient of a 1x1 convolution of stride 2.
TINY = {"layers": [1, 1, 1, 1], "channels": [16, 16, 16, 16]}


def ellipses(size: tuple[int, int], count: int, seed: int, axes: tuple[float, float] = (5, 14)) -> np.ndarray:
    """A map of `count` ellipses that may touch and never lie over each other."""
    rng, numbers_HW = np.random.default_rng(seed), np.zeros(size, np.int32)
    number = 0
    while number < count:
        (a, b), turn = rng.uniform(*axes, 2), rng.uniform(0, np.pi)
        middle_y, middle_x = rng.uniform(0, size[0]), rng.uniform(0, size[1])
        reach = int(max(a, b)) + 2
        top, left = max(0, int(middle_y) - reach), max(0, int(middle_x) - reach)
        y, x = np.mgrid[top:min(size[0], int(middle_y) + reach), left:min(size[1], int(middle_x) + reach)]
        along = (x - middle_x) * np.cos(turn) + (y - middle_y) * np.sin(turn)
        across = (y - middle_y) * np.cos(turn) - (x - middle_x) * np.sin(turn)
        inside = (along / a) ** 2 + (across / b) ** 2 <= 1
        window = numbers_HW[top:top + inside.shape[0], left:left + inside.shape[1]]
        if inside.sum() < 60 or window[inside].any():
            continue
        number += 1
        window[inside] = number
    return numbers_HW


def painted(numbers_HW: np.ndarray, types_HW: np.ndarray, seed: int) -> np.ndarray:
    """Violet nuclei on pink, each a little darker or lighter; those of type 2 are blue."""
    rng = np.random.default_rng(seed)
    shade = rng.uniform(0.85, 1.15, numbers_HW.max() + 1)[numbers_HW][..., None]
    inks = np.array([(225, 165, 200), (110, 70, 150), (60, 90, 190)], float)
    noise = rng.normal(0, 6, (*numbers_HW.shape, 3))
    return np.clip(inks[types_HW] * shade + noise, 0, 255).astype(np.uint8)


def regions(home: Path, count: int = 6, size: int = 96, nuclei: int = 14) -> None:
    """images/, labels/ and types/ of so many regions, each of a patient of its own."""
    for name in ("images", "labels", "types"):
        (home / name).mkdir(parents=True)
    for number in range(count):
        numbers_HW = ellipses((size, size), nuclei, number)
        types_HW = ((numbers_HW > 0) * (1 + numbers_HW % 2)).astype(np.uint8)
        name = f"TCGA-AA-{number:04}-01Z"
        Image.fromarray(painted(numbers_HW, types_HW, number)).save(home / "images" / f"{name}.png")
        Image.fromarray(numbers_HW.astype(np.uint16)).save(home / "labels" / f"{name}.png")
        Image.fromarray(types_HW).save(home / "types" / f"{name}.png")
    (home / "classes.txt").write_text("violet\nblue\n")


def encoder(home: Path) -> Path:
    """An exported encoder that takes milliseconds."""
    home.mkdir(parents=True)
    Encoder("resnet18", TINY, (0.5,) * 3, (0.5,) * 3).save(home, 64, {"mpp": [0.25]})
    assert json.loads((home / "config.json").read_text())["architecture"] == "resnet18"
    return home
