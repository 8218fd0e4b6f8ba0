"""Bytes and numbers -> pixels, with NVIDIA DALI: decode anywhere, and on a GPU crop, stain, colour and blur as well.

DALI draws nothing itself: bytes and numbers come in through external_source, so it has no state to save. The graph of
views is one function for both devices; on a CPU the tests hold it against NumPy, without a GPU.
"""

from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.math as dmath
import nvidia.dali.types as types
from nvidia.dali.pipeline import Pipeline

from ssl_dist.data.augment import Numbers
from ssl_dist.data.batch import View

# The inputs of a view, each with the setting that switches its step on. DALI prunes inputs that nothing reads, and then
# refuses to be fed them.
NEEDS = {"box": "size", "stain": "stain", "stain_offset": "stain", "colour": "size", "colour_offset": "size",
         "sigma": "blur", "window": "blur", "solarise": "solarise", "flip": "size"}


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
        self._pipeline.feed_input("encoded", encoded)
        (pictures,) = self._pipeline.run()
        # `at` gives a copy: DALI may write the next batch into the same memory.
        return [pictures.at(number) for number in range(len(encoded))]


class Drawer:
    """Bytes and the numbers of every view -> the views, uint8, on one GPU (or, for the tests, on the CPU)."""

    def __init__(self, views: tuple[View, ...], batch: int, threads: int, device_id: int | None):
        self.views = views
        self._pipeline = Pipeline(batch_size=batch, num_threads=threads, device_id=device_id, prefetch_queue_depth=1,
                                  exec_dynamic=True)
        with self._pipeline:
            encoded = fn.external_source(name="encoded", no_copy=True)
            shape = fn.peek_image_shape(encoded)
            decoder = "mixed" if device_id is not None else "cpu"
            # fancy upsampling: the GPU's decoder then treats colour as libjpeg-turbo does on the CPU
            pictures = fn.decoders.image(encoded, device=decoder, output_type=types.RGB, jpeg_fancy_upsampling=True)
            self._pipeline.set_outputs(*(self._view(number, view, pictures, shape)
                                         for number, view in enumerate(views)))
        self._pipeline.build()

    def _view(self, number: int, view: View, pictures: Any, shape: Any) -> Any:
        fed = {name: fn.external_source(name=f"{name}{number}") for name in _inputs(view)}
        sides = fn.cast(fn.stack(shape[1], shape[0]), dtype=types.FLOAT)
        size = dmath.max(dmath.floor(fed["box"][2:4] * sides + 0.5), 1.0)
        start = dmath.min(dmath.floor(fed["box"][0:2] * sides + 0.5), sides - size)
        cut = fn.slice(pictures, start, size, axis_names="WH", normalized_anchor=False, normalized_shape=False)
        drawn = fn.resize(cut, size=[view.size, view.size], interp_type=types.INTERP_LINEAR, antialias=False)
        if view.stain:
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
        return fn.flip(drawn, horizontal=fed["flip"][0], vertical=fed["flip"][1])

    def __call__(self, encoded: list[np.ndarray], numbers: list[Numbers]) -> list[Any]:
        """One DALI tensor of uint8 (N, size, size, 3) a view; RuntimeError where a tile cannot be decoded."""
        self._pipeline.feed_input("encoded", encoded)
        for number, (view, each) in enumerate(zip(self.views, numbers, strict=True)):
            values = _values(each)
            for name in _inputs(view):
                self._pipeline.feed_input(f"{name}{number}", values[name])
        return [output.as_tensor() for output in self._pipeline.run()]


def _pixels(values: Any) -> Any:
    return fn.cast(dmath.clamp(values, 0.0, 255.0), dtype=types.UINT8)      # rounds to nearest


def _inputs(view: View) -> list[str]:
    return [name for name, setting in NEEDS.items() if getattr(view, setting)]


def _values(numbers: Numbers) -> dict[str, np.ndarray]:
    """The numbers in DALI's types: contiguous, float32 or int32, one row a sample."""
    window = np.where(numbers.sigma_N > 0, 2 * np.ceil(3 * numbers.sigma_N) + 1, 1)
    floats = {"box": numbers.box_N4, "stain": numbers.stain_N34[:, :, :3], "stain_offset": numbers.stain_N34[:, :, 3],
              "colour": numbers.colour_N34[:, :, :3], "colour_offset": numbers.colour_N34[:, :, 3] * 255,
              "sigma": np.where(numbers.sigma_N > 0, numbers.sigma_N, 1)}
    whole = {"window": window, "solarise": numbers.solarise_N, "flip": numbers.flip_N2}
    return {**{name: np.ascontiguousarray(value, dtype=np.float32) for name, value in floats.items()},
            **{name: np.ascontiguousarray(value, dtype=np.int32) for name, value in whole.items()}}
