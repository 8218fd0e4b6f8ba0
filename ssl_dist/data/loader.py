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
from ssl_dist.data.quarantine import Quarantine, instead
from ssl_dist.data.reader import Reader
from ssl_dist.data.stream import Stream

TURNS = 16          # tiles tried for one place


class Loader:
    """The batches of one rank, from any step on. It holds no state but what it has prepared."""

    def __init__(self, reader: Reader, stream: Stream, views: tuple[View, ...], *, rank: int, world: int,
                 device: torch.device, threads: int, ahead: int, quarantine: Quarantine | None = None):
        """`quarantine`: where tiles that cannot be used are listed; without it the first of them ends the batches."""
        self.quarantine = quarantine
        self.reader, self.stream, self.views = reader, stream, views
        self.rank, self.world, self.device, self.ahead = rank, world, device, ahead
        share = stream.batch // world
        # Two makers: one decodes the next batch while the other's views are drawn.
        self._makers = ThreadPoolExecutor(2, thread_name_prefix="batch")
        self._painters = ThreadPoolExecutor(threads, thread_name_prefix="view")
        self._reading, self._decoding, self._listing = threading.Lock(), threading.Lock(), threading.Lock()
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
        tars, members = stream.locate(epoch, positions)
        rows = self.reader.rows(tars, members)
        encoded = self._read(rows, tars, epoch, positions)
        drawn = [augment.numbers(view, augment.uniforms(stream.seed, epoch, number, int(positions[0]), len(positions)))
                 for number, view in enumerate(self.views)]
        try:
            views = self._draw(encoded, drawn, rows)
        except Undecodable as error:
            if self.quarantine is None:
                raise
            # Once more, without those that no decoder takes: what is bad is found by decoding each tile alone.
            views = self._draw(self._without_undecodable(error, encoded, rows, tars, epoch, positions), drawn, rows)
        return Batch(views, [numbers.box_N4 for numbers in drawn], rows, positions)

    def _read(self, rows: np.ndarray, tars: np.ndarray, epoch: int, positions: np.ndarray) -> list[np.ndarray]:
        """The encoded tiles of `rows`; where one is not what was written, another of its tar, in `rows` too."""
        if self.quarantine is None:
            with self._reading:
                return self.reader.read(rows)
        with self._reading:
            encoded = self.reader.fetch(rows)
        return [image if image is not None else
                self._instead(place, "its bytes changed on disk", rows, tars, epoch, positions, decode=False)
                for place, image in enumerate(encoded)]

    def _without_undecodable(self, error: "Undecodable", encoded: list[np.ndarray], rows: np.ndarray, tars: np.ndarray,
                             epoch: int, positions: np.ndarray) -> list[np.ndarray]:
        if not (bad := _undecodable(encoded)):
            raise error
        return [image if place not in bad else
                self._instead(place, bad[place], rows, tars, epoch, positions, decode=True)
                for place, image in enumerate(encoded)]

    def _instead(self, place: int, reason: str, rows: np.ndarray, tars: np.ndarray, epoch: int, positions: np.ndarray,
                 *, decode: bool) -> np.ndarray:
        """Lists the tile at `place` and puts another there: one of its tar, which its position alone decides."""
        assert self.quarantine is not None
        tar, position = int(tars[place]), int(positions[place])
        for turn in range(TURNS):
            key, path, offset = self.reader.place(int(rows[place]))
            with self._listing:
                self.quarantine.add(key, str(path), offset, reason)
            member = instead(self.stream.seed, epoch, position, turn, int(self.reader.counts[tar]))
            rows[place] = self.reader.rows(np.array([tar]), np.array([member]))[0]
            with self._reading:
                image = self.reader.fetch(rows[[place]])[0]
            reason = "its bytes changed on disk"
            if image is not None:
                if not decode or not (bad := _undecodable([image])):
                    return image
                reason = bad[0]
        raise ShardError(f"{self.reader.tars[tar]} holds {TURNS} bad tiles for one place; run: ssl-dist check "
                         f"{self.reader.tars[tar].parent} --decode")

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


class Undecodable(ShardError):
    """A batch in which a tile is no picture, although its bytes are those that were written."""


def decoded(decode: Callable, encoded: list[np.ndarray], rows: np.ndarray, reader: Reader) -> list:
    """What `decode` makes of the images; where it cannot, an error that names the tile."""
    try:
        return decode(encoded)
    except RuntimeError as error:
        reason = _reason(error)
        raise Undecodable(f"a tile cannot be decoded: {_culprit(encoded, rows, reader)} ({reason}); its bytes are as "
                          "written, so it was broken before: drop it from the source and shard again") from error


def _undecodable(encoded: list[np.ndarray]) -> dict[int, str]:
    """Places of the images that cannot be decoded alone, and why."""
    single, bad = dali.Decoder(1, 1), {}
    for place, image in enumerate(encoded):
        try:
            single([image])
        except RuntimeError as error:
            bad[place] = _reason(error)
            single = dali.Decoder(1, 1)     # one that failed does not decode any more
    return bad


def _reason(error: RuntimeError) -> str:
    """What DALI met, without what it says of itself."""
    met = str(error).partition("encountered:")[2].partition("Current pipeline")[0]
    return "it cannot be decoded: " + " ".join((met or str(error)).split())[:200]


def _culprit(encoded: list[np.ndarray], rows: np.ndarray, reader: Reader) -> str:
    for place in _undecodable(encoded):
        key, slide = (reader.column(name, np.array([rows[place]]))[0] for name in ("key", "slide"))
        return f"{key!r} of slide {slide!r}"
    return f"one of {len(rows)}, though each alone is sound"
