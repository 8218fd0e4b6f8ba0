"""Stream -> bytes -> pixels -> Batch, always ahead of the step."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from shards.index import ShardError
from ssl_dist.data import augment, dali, opencv
from ssl_dist.data.batch import Batch, View
from ssl_dist.data.reader import Reader
from ssl_dist.data.stream import Stream


class Loader:
    """The batches of one rank, from any step on. It holds no state but what it has prepared."""

    def __init__(self, reader: Reader, stream: Stream, views: tuple[View, ...], *, rank: int, world: int,
                 device: torch.device, threads: int, ahead: int):
        self.reader, self.stream, self.views = reader, stream, views
        self.rank, self.world, self.device, self.ahead = rank, world, device, ahead
        share = stream.batch // world
        # Two makers: one decodes the next batch while the other's views are drawn.
        self._makers = ThreadPoolExecutor(2, thread_name_prefix="batch")
        self._painters = ThreadPoolExecutor(threads, thread_name_prefix="view")
        self._reading, self._decoding = threading.Lock(), threading.Lock()
        self._draw: Callable[[list[np.ndarray], list[augment.Numbers], np.ndarray], list[torch.Tensor]]
        if device.type == "cuda":
            self._drawer = dali.Drawer(views, share, threads, device.index or 0)
            self._draw = self._on_gpu
        else:
            opencv.one_thread()
            self._decoder = dali.Decoder(share, threads)
            self._draw = self._on_cpu

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps start .. stop - 1."""
        waiting: deque[Future[Batch]] = deque()
        upcoming = iter(range(start, stop))
        try:
            for step in upcoming:
                waiting.append(self._makers.submit(self.make, step))
                if len(waiting) > self.ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def make(self, step: int) -> Batch:
        """This rank's share of the global batch `step` (from 0)."""
        stream, epoch = self.stream, self.stream.epoch(step)
        positions = stream.positions(step, self.rank, self.world)
        with self._reading:
            rows = self.reader.rows(*stream.locate(epoch, positions))
            encoded = self.reader.read(rows)
        drawn = [augment.numbers(view, augment.uniforms(stream.seed, epoch, number, int(positions[0]), len(positions)))
                 for number, view in enumerate(self.views)]
        return Batch(self._draw(encoded, drawn, rows), [numbers.box_N4 for numbers in drawn], rows, positions)

    def _on_cpu(self, encoded: list[np.ndarray], numbers: list[augment.Numbers],
                rows: np.ndarray) -> list[torch.Tensor]:
        with self._decoding:
            images = decoded(self._decoder, encoded, rows, self.reader)
        return [torch.from_numpy(opencv.views(images, each, view.size, self._painters))
                for each, view in zip(numbers, self.views, strict=True)]

    def _on_gpu(self, encoded: list[np.ndarray], numbers: list[augment.Numbers],
                rows: np.ndarray) -> list[torch.Tensor]:
        with self._decoding:
            drawn = decoded(lambda images: self._drawer(images, numbers), encoded, rows, self.reader)
        return [torch.from_dlpack(each) for each in drawn]

    def close(self) -> None:
        """Ends the threads."""
        self._makers.shutdown(wait=True, cancel_futures=True)
        self._painters.shutdown(wait=True)
        self.reader.close()


def decoded(decode: Callable, encoded: list[np.ndarray], rows: np.ndarray, reader: Reader) -> list:
    """What `decode` makes of the images; where it cannot, an error that names the tile."""
    try:
        return decode(encoded)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ShardError(f"a tile cannot be decoded: {_culprit(encoded, rows, reader)} ({reason}); its bytes are as "
                         "written, so it was broken before: drop it from the source and shard again") from error


def _culprit(encoded: list[np.ndarray], rows: np.ndarray, reader: Reader) -> str:
    single = dali.Decoder(1, 1)
    for image, row in zip(encoded, rows, strict=True):
        try:
            single([image])
        except RuntimeError:
            key, slide = (reader.column(name, np.array([row]))[0] for name in ("key", "slide"))
            return f"{key!r} of slide {slide!r}"
    return f"one of {len(rows)}, though each alone is sound"
