"""Bytes and numbers -> pixels, with NVIDIA DALI: decode anywhere, and on a GPU crop, stain, colour and blur as well.

DALI draws nothing itself: bytes and numbers come in through external_source, so it has no state to save. The graph of
views is one function for both devices; on a CPU the tests hold it against NumPy, without a GPU.
"""

from typing import Any

import numpy as np
import nvidia.dali
import nvidia.dali.fn as fn
import nvidia.dali.math as dmath
import nvidia.dali.types as types
import torch
from nvidia import nvimgcodec
from nvidia.dali.pipeline import Pipeline

from ssl_dist.data import stain
from ssl_dist.data.augment import Numbers
from ssl_dist.data.batch import View

# The inputs of a view, each with the setting that switches its step on. DALI prunes inputs that nothing reads, and then
# refuses to be fed them.
NEEDS = {"box": "size", "target": "randstain", "restained": "randstain", "stain": "stains", "stain_offset": "stains",
         "colour": "size", "colour_offset": "size", "sigma": "blur", "window": "blur", "solarise": "solarise",
         "turn": "turn", "flip": "size"}
KNEE, SLOPE = (6 / 29) ** 3, 3 * (6 / 29) ** 2      # where LAB's cube root becomes a line
MOST_PIXELS = 1 << 28       # of a tile: what claims more is damaged, or meant to hurt
HALVINGS = 3        # at most, as in opencv.halvings


# How tiles may be decoded where there is a GPU, in the decoder's words. A part of the load may go to the GPU's JPEG
# engine; the rest goes to its cores, with the Huffman codes read on the CPU. Never a part of a picture: with DALI 2.4
# that fails on some GPUs (NVIDIA/nvImageCodec#55), and a tile is decoded once for all its views.
WAYS: dict[str, dict[str, Any]] = {"cpu": {"device": "cpu"}, "mixed": {"device": "mixed", "hw_decoder_load": 0.65},
                                   "mixed, engine only": {"device": "mixed", "hw_decoder_load": 1.0},
                                   "mixed, no engine": {"device": "mixed", "hw_decoder_load": 0.0}}


def unreadable(encoded: list[np.ndarray]) -> list[str]:
    """Of each image, why no decoder gets as far as its pixels; "" where one may.

    Asked before every batch: of 32 images or more, DALI 2.4 does not survive one whose header it cannot make sense of.
    Its operator throws while threads of its pool still look at what it throws away, and the process is gone.
    """
    return [_header(image) for image in encoded]


def _header(image: np.ndarray) -> str:
    try:
        stream = nvimgcodec.CodeStream(image.tobytes())
        sound = stream.num_channels in (1, 2, 3, 4) and 0 < stream.height * stream.width < MOST_PIXELS
        _ = stream.dtype        # fails where a channel has an odd number of bits
    except (RuntimeError, TypeError, ValueError):
        sound = False
    return "" if sound else "it is no picture, or its header is damaged"


def reason(error: RuntimeError) -> str:
    """What DALI met, without what it says of itself."""
    met = str(error).partition("encountered:")[2].partition("Current pipeline")[0]
    return "it cannot be decoded: " + " ".join((met or str(error)).split())[:200]


class Decoder:
    """JPEG or PNG bytes -> RGB arrays of any size, on the CPU."""

    def __init__(self, batch: int, threads: int):
        self._pipeline = Pipeline(batch_size=batch, num_threads=threads, device_id=None, prefetch_queue_depth=1,
                                  exec_dynamic=True)
        with self._pipeline:
            encoded = fn.external_source(name="encoded", no_copy=True)
            self._pipeline.set_outputs(fn.decoders.image(encoded, device="cpu", output_type=types.RGB))
        self._pipeline.build()

    def __call__(self, encoded: list[np.ndarray]) -> list[np.ndarray]:
        """The decoded pictures; RuntimeError where one of them cannot be decoded."""
        _hold(encoded)
        self._pipeline.feed_input("encoded", encoded)
        (pictures,) = self._pipeline.run()
        # `at` gives a copy: DALI may write the next batch into the same memory.
        return [pictures.at(number) for number in range(len(encoded))]


class Drawer:
    """Bytes and the numbers of every view -> the views, uint8, on one GPU (or, for the tests, on the CPU)."""

    def __init__(self, views: tuple[View, ...], batch: int, threads: int, device_id: int | None, way: str = "cpu"):
        """`way`: how to decode (see WAYS). Without a view it only decodes, and gives back no pixel."""
        self.views = views
        self._pipeline = Pipeline(batch_size=batch, num_threads=threads, device_id=device_id, prefetch_queue_depth=1,
                                  exec_dynamic=True)
        with self._pipeline:
            encoded = fn.external_source(name="encoded", no_copy=True)
            shape = fn.peek_image_shape(encoded)
            # fancy upsampling: the GPU's decoder then treats colour as libjpeg-turbo does on the CPU
            pictures = fn.decoders.image(encoded, output_type=types.RGB, jpeg_fancy_upsampling=True, **WAYS[way])
            if way == "cpu" and device_id is not None:
                pictures = pictures.gpu()
            drawn = [self._view(number, view, pictures, shape) for number, view in enumerate(views)]
            self._pipeline.set_outputs(*(drawn or [pictures]))
        self._pipeline.build()

    def _view(self, number: int, view: View, pictures: Any, shape: Any) -> Any:
        fed = {name: fn.external_source(name=f"{name}{number}") for name in _inputs(view)}
        sides = fn.cast(fn.stack(shape[1], shape[0]), dtype=types.FLOAT)
        size = dmath.max(dmath.floor(fed["box"][2:4] * sides + 0.5), 1.0)
        start = dmath.min(dmath.floor(fed["box"][0:2] * sides + 0.5), sides - size)
        drawn = fn.slice(pictures, start, size, axis_names="WH", normalized_anchor=False, normalized_shape=False)
        size = dmath.floor(size[::-1])          # height first, as resize wants it
        for _ in range(HALVINGS):
            large = fn.cast(fn.reductions.min(size) >= 2 * view.size, dtype=types.FLOAT)
            size = size * (1 - large) + dmath.floor(size / 2) * large
            drawn = fn.resize(drawn, size=size, interp_type=types.INTERP_LINEAR, antialias=False)
        drawn = fn.resize(drawn, size=[view.size, view.size], interp_type=types.INTERP_LINEAR, antialias=False)
        if view.randstain:
            drawn = _restain(drawn, _lab(pictures), fed["target"], fed["restained"])
        if view.stains:
            density = -dmath.log(dmath.max(fn.cast(drawn, dtype=types.FLOAT), 1.0) / 255.0)
            density = fn.coord_transform(density, M=fed["stain"], T=fed["stain_offset"])
            drawn = _pixels(dmath.exp(-dmath.max(density, 0.0)) * 255.0)
        drawn = fn.coord_transform(fn.cast(drawn, dtype=types.FLOAT), M=fed["colour"], T=fed["colour_offset"])
        drawn = fn.reshape(_pixels(drawn), layout="HWC")
        if view.blur:
            drawn = fn.gaussian_blur(drawn, sigma=fed["sigma"], window_size=fed["window"])
        if view.solarise:
            inverted = fn.cast(drawn >= 128, dtype=types.INT32) * fed["solarise"]
            signed = fn.cast(drawn, dtype=types.INT32)
            drawn = fn.cast(signed + inverted * (255 - 2 * signed), dtype=types.UINT8)
        if view.turn:
            across = fn.transpose(drawn, perm=[1, 0, 2], transpose_layout=False)
            swapped = fn.cast(fed["turn"][0], dtype=types.UINT8)
            drawn = fn.cast(drawn * (1 - swapped) + across * swapped, dtype=types.UINT8)     # one of the two is 0
            drawn = fn.flip(drawn, horizontal=fed["turn"][1], vertical=fed["turn"][2])
        return fn.flip(drawn, horizontal=fed["flip"][0], vertical=fed["flip"][1])

    def __call__(self, encoded: list[np.ndarray], numbers: list[Numbers]) -> list[Any]:
        """One DALI tensor of uint8 (N, size, size, 3) a view; RuntimeError where a tile cannot be decoded."""
        _hold(encoded)
        self._pipeline.feed_input("encoded", encoded)
        for number, (view, each) in enumerate(zip(self.views, numbers, strict=True)):
            values = _values(each)
            for name in _inputs(view):
                self._pipeline.feed_input(f"{name}{number}", values[name])
        outputs = self._pipeline.run()
        return [output.as_tensor() for output in outputs] if self.views else []


def _hold(encoded: list[np.ndarray]) -> None:
    if broken := [f"image {place}: {said}" for place, said in enumerate(unreadable(encoded)) if said]:
        raise RuntimeError("; ".join(broken))


def machine(device_id: int) -> str:
    """What decides how fast a GPU decodes."""
    return f"{torch.cuda.get_device_name(device_id)}, DALI {nvidia.dali.__version__}"


def _lab(pictures: Any) -> Any:
    """RGB as LAB, in the units of stain.py; DALI has no LAB of its own."""
    light = fn.lookup_table(pictures, keys=list(range(256)), values=stain.GAMMA.tolist(), dtype=types.FLOAT)
    white = fn.coord_transform(light, M=stain.RGB_TO_XYZ.ravel().tolist())
    bright = fn.cast(white > KNEE, dtype=types.FLOAT)
    cubes = bright * dmath.cbrt(dmath.max(white, KNEE)) + (1 - bright) * (white / SLOPE + 16 / 116)
    return fn.coord_transform(cubes, M=stain.CUBES_TO_LAB.ravel().tolist(), T=stain.LAB_OFFSET.tolist())


def _restain(drawn: Any, whole: Any, target: Any, restained: Any) -> Any:
    """A view whose LAB statistics are moved as those of the whole tile must be to reach the target (stain.towards)."""
    mean = fn.reductions.mean(whole, axes=[0, 1])
    gain = dmath.min(target[3:6] / dmath.max(fn.reductions.std_dev(whole, mean, axes=[0, 1]), 1e-6), stain.MOST_GAIN)
    moved = (_lab(drawn) - mean) * gain + target[0:3]
    inverse = np.linalg.inv(stain.CUBES_TO_LAB)
    cubes = fn.coord_transform(moved, M=inverse.ravel().tolist(), T=(-inverse @ stain.LAB_OFFSET).tolist())
    bright = fn.cast(cubes > KNEE ** (1 / 3), dtype=types.FLOAT)
    white = bright * cubes * cubes * cubes + (1 - bright) * (cubes - 16 / 116) * SLOPE
    light = fn.coord_transform(white, M=np.linalg.inv(stain.RGB_TO_XYZ).ravel().tolist())
    bright = fn.cast(light > 0.0031308, dtype=types.FLOAT)
    shown = bright * (1.055 * dmath.pow(dmath.max(light, 0.0031308), 1 / 2.4) - 0.055) + (1 - bright) * 12.92 * light
    return _pixels(shown * 255.0 * restained + fn.cast(drawn, dtype=types.FLOAT) * (1 - restained))


def _pixels(values: Any) -> Any:
    return fn.cast(dmath.clamp(values, 0.0, 255.0), dtype=types.UINT8)      # rounds to nearest


def _inputs(view: View) -> list[str]:
    return [name for name, setting in NEEDS.items() if getattr(view, setting)]


def _values(numbers: Numbers) -> dict[str, np.ndarray]:
    """The numbers in DALI's types: contiguous, float32 or int32, one row a sample."""
    window = np.where(numbers.sigma_N > 0, 2 * np.ceil(3 * numbers.sigma_N) + 1, 1)
    turn = numbers.turn_N
    floats = {"box": numbers.box_N4, "target": np.nan_to_num(numbers.target_N6),
              "restained": ~np.isnan(numbers.target_N6[:, :1]),
              "stain": numbers.stain_N34[:, :, :3], "stain_offset": numbers.stain_N34[:, :, 3],
              "colour": numbers.colour_N34[:, :, :3], "colour_offset": numbers.colour_N34[:, :, 3] * 255,
              "sigma": np.where(numbers.sigma_N > 0, numbers.sigma_N, 1)}
    # A quarter counter-clockwise is rows for columns, then upside down.
    whole = {"window": window, "solarise": numbers.solarise_N, "flip": numbers.flip_N2,
             "turn": np.stack([turn % 2, turn >= 2, (turn == 1) | (turn == 2)], axis=1)}
    return {**{name: np.ascontiguousarray(value, dtype=np.float32) for name, value in floats.items()},
            **{name: np.ascontiguousarray(value, dtype=np.int32) for name, value in whole.items()}}
