"""JPEG in and out: encode a tile, look at an eighth of one, make a slide's own tile a file of its own."""

import numpy as np
import simplejpeg

SIDE = 65_500       # pixels: what the format can say, and libjpeg will write
START, TABLES_END = b"\xff\xd8", -2         # of the tables, the end-of-image marker is cut
# Adobe's marker with its last byte: 0, the three channels are RGB; 1, they are YCbCr. Without it decoders guess.
MARKER = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
SUBSAMPLINGS = {"4:4:4": "444", "4:2:0": "420"}


class JpegError(ValueError):
    """Bytes that are not a JPEG that we can use."""


def encode(pixels: np.ndarray, quality: int, subsampling: str) -> bytes:
    """RGB pixels as a baseline JPEG."""
    if max(pixels.shape[:2]) > SIDE:
        raise JpegError(f"{pixels.shape[1]} x {pixels.shape[0]} pixels are more than a JPEG holds ({SIDE} a side)")
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", SUBSAMPLINGS[subsampling],
                                  fastdct=False)


def decode(content: bytes | np.ndarray, factor: int = 1) -> np.ndarray:
    """The picture, RGB, at 1, a half, a quarter or an eighth of its size.

    At an eighth a pixel is the mean of a block of the file, for a third of the work of all of it.
    """
    try:
        if factor == 1:
            return simplejpeg.decode_jpeg(content, "RGB", fastdct=False)
        height, width = (1, 1) if factor == 8 else simplejpeg.decode_jpeg_header(content)[:2]
        return simplejpeg.decode_jpeg(content, "RGB", fastdct=False, min_height=-(-height // factor),
                                      min_width=-(-width // factor), min_factor=factor)
    except ValueError as error:
        raise JpegError(str(error)) from None


def decode_into(content: bytes, pixels_HW3: np.ndarray) -> None:
    """The picture, RGB, into an array of its size that is there already: no copy of it is made."""
    try:
        height, width = simplejpeg.decode_jpeg_header(content)[:2]
        if pixels_HW3.shape != (height, width, 3) or not pixels_HW3.flags.c_contiguous:
            raise ValueError(f"{width} x {height} pixels where {pixels_HW3.shape[1]} x {pixels_HW3.shape[0]} belong")
        simplejpeg.decode_jpeg(content, "RGB", fastdct=False, buffer=pixels_HW3)
    except ValueError as error:
        raise JpegError(str(error)) from None


def header(content: bytes) -> tuple[int, int, str]:
    """Width, height and colour space as the file says them."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError as error:
        raise JpegError(str(error)) from None
    return width, height, colours


def splice(tile: bytes, tables: bytes, rgb: bool) -> bytes:
    """A tile of a TIFF as a JPEG file: its bytes, behind the tables it shares with others and a marker of its colours.

    Raises where the tile carries a JFIF marker although it is RGB: decoders believe JFIF, and would show wrong colours.
    """
    jfif, adobe = (mark in tile[:64] for mark in (b"JFIF\x00", b"\xff\xee\x00\x0eAdobe"))
    if jfif and rgb:
        raise JpegError("RGB within JFIF, which means YCbCr to whoever reads it")
    marker = b"" if jfif or adobe else MARKER + bytes([not rgb])
    return START + marker + tables[2:TABLES_END] + tile[2:]
