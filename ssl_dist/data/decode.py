"""Bytes -> RGB pixels on a CPU: every tile in the thread that asks for it, and no tile takes another down with it.

Plain JPEG, which is what shards hold, goes to libjpeg-turbo; what else a shard may hold (PNG, CMYK, a camera's picture
that is to be turned) goes to DALI, a batch at a time. Both show the same pixels.
"""

import threading
from collections.abc import Sequence

import numpy as np

from shards import jpeg
from ssl_dist.data import dali

BLANK = np.zeros((1, 1, 3), np.uint8)


class Decoder:
    """Decodes batches of encoded tiles."""

    def __init__(self, batch: int, threads: int):
        self._size, self._threads = batch, threads
        self._dali: dali.Decoder | None = None      # most runs never need it
        self._turn = threading.Lock()

    def open(self, encoded: Sequence[np.ndarray]) -> "Pictures":
        """The pictures of a batch: plain ones are decoded when they are asked for, the others here."""
        others = [place for place, tile in enumerate(encoded) if not plain(tile)]
        found = self.other([encoded[place] for place in others]) if others else []
        return Pictures(self, encoded, dict(zip(others, found, strict=True)))

    def other(self, encoded: list[np.ndarray]) -> list[np.ndarray | str]:
        """Each picture, or why it is none."""
        with self._turn:
            found: list[np.ndarray | str] = list(dali.unreadable(encoded))
            readable = [place for place, reason in enumerate(found) if not reason]
            try:
                if self._dali is None:
                    self._dali = dali.Decoder(self._size, self._threads)
                pictures: list = self._dali([encoded[place] for place in readable]) if readable else []
            except RuntimeError:
                self._dali = None           # one that failed is not asked again
                pictures = [_alone(encoded[place]) for place in readable]
        for place, picture in zip(readable, pictures, strict=True):
            found[place] = picture
        return found


class Pictures:
    """The tiles of a batch as RGB arrays of any size; `bad` says of those that were asked for and are none, why."""

    def __init__(self, decoder: Decoder, encoded: Sequence[np.ndarray], ready: dict[int, np.ndarray | str]):
        self._decoder, self._encoded, self._ready = decoder, encoded, ready
        self.bad: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._encoded)

    def __call__(self, place: int) -> np.ndarray:
        """One picture, from any thread; a pixel of black where there is none."""
        found = self._ready.get(place)
        if found is None:
            try:
                return jpeg.decode(self._encoded[place])
            except jpeg.JpegError:          # CMYK, or damaged: DALI has the last word, on a GPU as well
                (found,) = self._decoder.other([self._encoded[place]])
        if isinstance(found, str):
            self.bad[place] = found
            return BLANK
        return found


def plain(encoded: np.ndarray) -> bool:
    """Whether a tile is a JPEG that is shown as its pixels lie: no EXIF block, which might turn it."""
    content = encoded.tobytes()
    return content[:3] == b"\xff\xd8\xff" and b"Exif\0\0" not in content


def _alone(encoded: np.ndarray) -> np.ndarray | str:
    try:
        return dali.Decoder(1, 1)([encoded])[0]
    except RuntimeError as error:
        return dali.reason(error)
