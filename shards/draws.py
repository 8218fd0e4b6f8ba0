"""Draws: some tiles of a slide as an encoder saw them through one augmentation, a sample of a shard folder each.

    <key>.safetensors   features (T, D) in half precision, cells (T, 2): column and row of each tile in its slide's grid
    <key>.json          as of a tile: dataset, slide, patient, mpp, …; x and y are 0

All draws of a slide lie one after the other in one tar, as many of every slide: the card in index.json says how
many (`draws`), how many tiles each has at most (`tiles`), and how wide their vectors are (`width`). What reads tiles by
index and checksum reads draws as well.

T tiles of a draw   D width of a vector
"""

from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from shards.index import ShardError

KIND = "safetensors"            # of a member's name, and in the column `encoding`
LARGEST = float(np.finfo(np.float16).max)


class Draw(NamedTuple):
    """Some tiles of a slide, seen through one augmentation."""

    features_TD: np.ndarray
    cell_T2: np.ndarray


def packed(draw: Draw) -> bytes:
    """A draw as a member of a tar."""
    if not len(draw.features_TD) or not (np.abs(draw.features_TD) <= LARGEST).all():
        raise ShardError(f"a draw of {len(draw.features_TD)} tiles holds vectors that half precision cannot: numbers "
                         f"up to {LARGEST:g}, and all of them numbers; the encoder's weights are damaged")
    return save({"features": draw.features_TD.astype(np.float16), "cells": draw.cell_T2.astype(np.int32)})


def unpacked(content: np.ndarray | bytes) -> Draw:
    """What `packed` wrote; refuses what is anything else."""
    try:
        found = load(bytes(content))
        features_TD, cell_T2 = found["features"], found["cells"]
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ShardError(f"it is no draw ({type(error).__name__}: {error})") from None
    if (features_TD.dtype != np.float16 or features_TD.ndim != 2 or not features_TD.size or cell_T2.dtype != np.int32
            or cell_T2.shape != (len(features_TD), 2)):
        raise ShardError(f"it holds {features_TD.dtype} features {features_TD.shape} and {cell_T2.dtype} cells "
                         f"{cell_T2.shape}, and is no draw")
    if not np.isfinite(features_TD).all():
        raise ShardError("it holds features that are no numbers")
    return Draw(features_TD, cell_T2)
