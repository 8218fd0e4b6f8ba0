"""Stream -> bytes -> pixels -> Batch, always ahead of the step."""

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial

import numpy as np
import torch

from shards.draws import Draw, unpacked
from shards.index import ShardError
from ssl_dist import dist
from ssl_dist.data import augment, dali, opencv, slideviews, stain
from ssl_dist.data.batch import Batch, SlideView, View
from ssl_dist.data.decode import Decoder
from ssl_dist.data.quarantine import Quarantine, instead
from ssl_dist.data.reader import Reader
from ssl_dist.data.stream import Stream

TURNS = 16          # tiles, or slides, tried for one place
CHANGED = "its bytes changed on disk"


class Ahead(ABC):
    """The batches of one rank, from any step on, made before they are asked for. It holds no state but what it has
    prepared."""

    def __init__(self, reader: Reader, stream: Stream, *, rank: int, world: int, ahead: int,
                 quarantine: Quarantine | None = None):
        """`quarantine`: where samples that cannot be used are listed; without it the first of them ends the batches."""
        self.quarantine = quarantine
        self.reader, self.stream, self.rank, self.world, self.ahead = reader, stream, rank, world, ahead
        # Two makers: one reads the next batch while the other's views are drawn.
        self._makers = ThreadPoolExecutor(2, thread_name_prefix="batch")
        self._reading, self._listing = threading.Lock(), threading.Lock()

    @abstractmethod
    def make(self, step: int) -> Batch:
        """This rank's share of the global batch `step` (from 0)."""

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps start .. stop - 1."""
        waiting: deque[Future[Batch]] = deque()
        upcoming = iter(range(start, stop))
        self.reader.follow(self.stream, start, stop, copying=dist.local_rank() == 0)
        try:
            for step in upcoming:
                waiting.append(self._makers.submit(self.make, step))
                if len(waiting) > self.ahead:
                    self.reader.at(step - self.ahead)       # asked for, so the step before it is over on every rank
                    yield waiting.popleft().result()
            while waiting:
                self.reader.at(stop - len(waiting))
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        """Ends the threads."""
        self.reader.stop_staging()      # a maker may wait for a copy
        self._makers.shutdown(wait=True, cancel_futures=True)
        self.reader.close()

    def _another(self, row: int, tar: int, epoch: int, position: int, turn: int, reason: str) -> int:
        """Lists a sample that cannot be used; the row of another of its tar, which its position alone decides."""
        assert self.quarantine is not None
        key, path, offset = self.reader.place(row)
        with self._listing:
            self.quarantine.add(key, str(path), offset, reason)
        member = instead(self.stream.seed, epoch, position, turn, int(self.reader.counts[tar]))
        return int(self.reader.rows(np.array([tar]), np.array([member]))[0])


class Loader(Ahead):
    """Batches of tiles."""

    def __init__(self, reader: Reader, stream: Stream, views: tuple[View, ...], *, rank: int, world: int,
                 device: torch.device, threads: int, ahead: int, quarantine: Quarantine | None = None,
                 fit: stain.Fit | None = None, way: str = "cpu"):
        """`fit`: what stain-fit found, for views that need it. `way`: how tiles are decoded for a GPU (dali.WAYS)."""
        super().__init__(reader, stream, rank=rank, world=world, ahead=ahead, quarantine=quarantine)
        self._palette = Palettes(reader, fit) if fit and any(view.fitted for view in views) else None
        self.views, self.device = views, device
        share = stream.batch // world
        self._painters = ThreadPoolExecutor(threads, thread_name_prefix="view")
        self._drawing = threading.Lock()
        self._decoder = Decoder(share, threads)
        self._draw: Callable[[list[np.ndarray], list[augment.Numbers], np.ndarray], list[torch.Tensor]]
        if device.type == "cuda":
            # What the GPU's decoder does not take (CMYK, 16 bits, ...), the CPU's may: so a batch has a second chance.
            self._drawers = [lru_cache(maxsize=1)(partial(dali.Drawer, views, share, threads, device.index or 0, each))
                             for each in dict.fromkeys((way, "cpu"))]
            self._draw = self._on_gpu
        else:
            opencv.one_thread()
            self._draw = self._on_cpu

    def make(self, step: int) -> Batch:
        """This rank's share of the global batch `step` (from 0)."""
        stream, epoch = self.stream, self.stream.epoch(step)
        positions = stream.positions(step, self.rank, self.world)
        tars, members = stream.locate(epoch, positions)
        rows = self.reader.rows(tars, members)
        encoded = self._read(rows, tars, epoch, positions)
        drawn = self._numbers(epoch, positions, rows)
        try:
            views = self._draw(encoded, drawn, rows)
        except Undecodable as error:
            if self.quarantine is None:
                raise
            # Once more, without those that no decoder takes.
            for place, reason in error.bad.items():
                encoded[place] = self._instead(place, reason, rows, tars, epoch, positions)
            drawn = self._numbers(epoch, positions, rows)       # another tile may be of another slide, other stains
            views = self._draw(encoded, drawn, rows)
        return Batch(views, [numbers.box_N4 for numbers in drawn], rows, positions)

    def _numbers(self, epoch: int, positions: np.ndarray, rows: np.ndarray) -> list[augment.Numbers]:
        """The numbers of every view: of the places, and of the slides' stains where a view asks for them."""
        palette = self._palette(rows) if self._palette else None
        return [augment.numbers(view, augment.uniforms(self.stream.seed, epoch, number, int(positions[0]),
                                                       len(positions)), palette)
                for number, view in enumerate(self.views)]

    def _read(self, rows: np.ndarray, tars: np.ndarray, epoch: int, positions: np.ndarray) -> list[np.ndarray]:
        """The encoded tiles of `rows`; where one is not what was written, another of its tar, in `rows` too."""
        if self.quarantine is None:
            with self._reading:
                return self.reader.read(rows)
        with self._reading:
            encoded = self.reader.fetch(rows)
        return [image if image is not None else
                self._instead(place, CHANGED, rows, tars, epoch, positions)
                for place, image in enumerate(encoded)]

    def _instead(self, place: int, reason: str, rows: np.ndarray, tars: np.ndarray, epoch: int,
                 positions: np.ndarray) -> np.ndarray:
        """Lists the tile at `place` and puts another there: one of its tar, which its position alone decides."""
        tar, position = int(tars[place]), int(positions[place])
        for turn in range(TURNS):
            rows[place] = self._another(int(rows[place]), tar, epoch, position, turn, reason)
            with self._reading:
                image = self.reader.fetch(rows[[place]])[0]
            if image is None:
                reason = CHANGED
                continue
            pictures = self._decoder.open([image])
            pictures(0)
            if not pictures.bad:
                return image
            reason = pictures.bad[0]
        raise ShardError(f"{self.reader.tars[tar]} holds {TURNS} bad tiles for one place; run: ssl-dist check "
                         f"{self.reader.tars[tar].parent} --decode")

    def _on_cpu(self, encoded: list[np.ndarray], numbers: list[augment.Numbers],
                rows: np.ndarray) -> list[torch.Tensor]:
        pictures = self._decoder.open(encoded)
        drawn = opencv.views(pictures, numbers, [view.size for view in self.views], self._painters)
        if pictures.bad:
            raise Undecodable(pictures.bad, rows, self.reader)
        return [torch.from_numpy(each) for each in drawn]

    def _on_gpu(self, encoded: list[np.ndarray], numbers: list[augment.Numbers],
                rows: np.ndarray) -> list[torch.Tensor]:
        with self._drawing:
            for drawer in self._drawers:
                try:
                    return [torch.from_dlpack(each) for each in drawer()(encoded, numbers)]
                except RuntimeError as error:
                    refused = error
        pictures = self._decoder.open(encoded)
        for place in range(len(encoded)):
            pictures(place)
        if not pictures.bad:
            raise refused           # not the tiles' fault
        raise Undecodable(pictures.bad, rows, self.reader)

    def close(self) -> None:
        """Ends the threads."""
        super().close()
        self._painters.shutdown(wait=True)


class SlideLoader(Ahead):
    """Batches of slides: of each, tiles of as many of its draws as there are views."""

    def __init__(self, reader: Reader, stream: Stream, views: tuple[SlideView, ...], *, rank: int, world: int,
                 ahead: int, quarantine: Quarantine | None = None):
        super().__init__(reader, stream, rank=rank, world=world, ahead=ahead, quarantine=quarantine)
        self.views = views

    def make(self, step: int) -> Batch:
        """This rank's share of the global batch `step` (from 0)."""
        stream, epoch = self.stream, self.stream.epoch(step)
        positions = stream.positions(step, self.rank, self.world)
        tars, members = stream.locate(epoch, positions)
        drawn = [slideviews.numbers(view, stream.seed, epoch, number, int(positions[0]), len(positions))
                 for number, view in enumerate(self.views)]
        which_VB = slideviews.chosen(drawn, self.reader.draws)
        first_B = self.reader.rows(tars, members)
        read = self._read((first_B + which_VB).T.ravel())       # of a slide, one draw after the other
        draws = [self._sound(read[place * len(drawn):(place + 1) * len(drawn)], first_B, which_VB, place,
                             int(tars[place]), epoch, position) for place, position in enumerate(positions.tolist())]
        views = [torch.from_numpy(each) for number, numbers in enumerate(drawn)
                 for each in slideviews.view([own[number] for own in draws], numbers)]
        return Batch(views, [], first_B + which_VB[0], positions)

    def _read(self, rows: np.ndarray) -> list[Draw | str]:
        """The draws of rows, or why one cannot be used."""
        with self._reading:
            contents = self.reader.read(rows) if self.quarantine is None else self.reader.fetch(rows)
        return [_draw(content) for content in contents]

    def _sound(self, read: list[Draw | str], first_B: np.ndarray, which_VB: np.ndarray, place: int, tar: int,
               epoch: int, position: int) -> list[Draw]:
        """The draws of one slide; where one cannot be used all are another slide's, and so is its row in `first_B`."""
        for turn in range(TURNS):
            bad = next((number for number, each in enumerate(read) if isinstance(each, str)), None)
            if bad is None:
                return read     # type: ignore[return-value]
            row = int(first_B[place] + which_VB[bad, place])
            if self.quarantine is None:
                key, path, _ = self.reader.place(row)
                raise ShardError(f"draw {key!r} of {path} cannot be used: {read[bad]}; its bytes are as written, so it "
                                 "was broken before: draw again")
            first_B[place] = self._another(row, tar, epoch, position, turn, str(read[bad]))
            read = self._read(first_B[place] + which_VB[:, place])
        raise ShardError(f"{self.reader.tars[tar]} holds {TURNS} bad draws for one place; run: ssl-dist check "
                         f"{self.reader.tars[tar].parent} --decode")


def _draw(content: np.ndarray | None) -> Draw | str:
    try:
        return CHANGED if content is None else unpacked(content)
    except ShardError as error:
        return str(error)


class Palettes:
    """The stains of any rows: of their slides, or the reference where a slide had too little tissue to fit."""

    def __init__(self, reader: Reader, fit: stain.Fit):
        self._reader, self._fit = reader, fit
        slides = reader.words("slide")
        ours = {found.fingerprint for found in reader.indexes}
        if not ours & {*fit.shards} and not any(slide in fit.slides for slide in slides):
            raise ShardError(f"data.stain knows none of the {len(slides)} slides of "
                             f"{', '.join(map(str, reader.folders))}: it was fitted to other shards; run ssl-dist "
                             "stain-fit on these")
        known = [fit.slides.get(slide, (fit.reference_23, fit.reference_strength_2)) for slide in slides]
        self._stains_S33 = stain.complete(np.array([stains for stains, _ in known]))
        self._strength_S2 = np.array([strength for _, strength in known])

    def __call__(self, rows: np.ndarray) -> stain.Palette:
        """What the numbers of a batch need."""
        slides = self._reader.codes("slide", rows)
        return stain.Palette(self._fit, self._stains_S33[slides], self._strength_S2[slides])


class Undecodable(ShardError):
    """A batch in which tiles are no pictures, although their bytes are those that were written."""

    def __init__(self, bad: dict[int, str], rows: np.ndarray, reader: Reader):
        self.bad = bad                  # places in the batch, and why
        place, reason = next(iter(bad.items()))
        key, slide = (reader.column(name, np.array([rows[place]]))[0] for name in ("key", "slide"))
        super().__init__(f"a tile cannot be decoded: {key!r} of slide {slide!r} ({reason}); its bytes are as written, "
                         "so it was broken before: drop it from the source and shard again")
