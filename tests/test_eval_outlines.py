"""Outlines of nuclei: filled by the even-odd rule they are the nuclei again, to the pixel."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import annotation
from shards.index import ShardError
from ssl_dist.eval import qupath
from ssl_dist.eval.outlines import outlines

ellipses = runpy.run_path(str(Path(__file__).with_name("planted.py")))["ellipses"]


def filled(rings: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    inside = np.zeros(shape, bool)
    for ring in rings:
        inside ^= annotation.inside(ring.astype(float), shape[1], shape[0])
    return inside


@pytest.mark.parametrize("kind", ["ellipses", "noise", "rings", "nothing"])
def test_rings_filled_again_are_the_objects(kind: str) -> None:
    rng = np.random.default_rng(0)
    numbers_HW = {"ellipses": ellipses((80, 90), 20, 0), "noise": rng.integers(0, 4, (30, 40)).astype(np.int32),
                  "rings": np.pad(np.ones((7, 9), np.int32), 3), "nothing": np.zeros((5, 6), np.int32)}[kind]
    if kind == "rings":
        numbers_HW[5:8, 5:10], numbers_HW[6, 7] = 0, 2
    found = outlines(numbers_HW)
    assert len(found) == numbers_HW.max()
    for number, rings in enumerate(found, start=1):
        assert (filled(rings, numbers_HW.shape) == (numbers_HW == number)).all()
        for ring in rings:      # every corner is one: the way changes there
            ways = np.sign(np.diff(np.concatenate([ring, ring[:1]]), axis=0))
            assert (np.abs(ways).sum(axis=1) == 1).all() and (ways != np.roll(ways, 1, axis=0)).any(axis=1).all()


def test_geojson_has_a_polygon_a_nucleus_with_its_type_and_reads_back_as_the_same_pixels(tmp_path) -> None:
    numbers_HW = ellipses((60, 70), 8, 3)
    numbers_HW[30:32, 30:32] = 0
    kinds = [1 + number % 2 for number in range(numbers_HW.max())]
    sure = np.linspace(0.5, 1, len(kinds))
    found = qupath.features(numbers_HW, 100, 200, 2.0, kinds, sure, sure, ["a", "b"])
    qupath.write_geojson(tmp_path / "a.geojson", found)
    read = json.loads((tmp_path / "a.geojson").read_text())
    assert read["type"] == "FeatureCollection" and len(read["features"]) == len(kinds)
    for number, feature in enumerate(read["features"], start=1):
        rings = [np.array(ring) for ring in feature["geometry"]["coordinates"]]
        assert all((ring[0] == ring[-1]).all() for ring in rings)
        back = [ring[:-1] / 2 - (200, 100) for ring in rings]
        assert (filled(back, numbers_HW.shape) == (numbers_HW == number)).all()
        told = feature["properties"]
        assert told["classification"]["name"] == "ab"[kinds[number - 1] - 1] and told["objectType"] == "detection"
        assert told["measurements"]["type probability"] == pytest.approx(sure[number - 1], abs=1e-4)


def test_maps_of_numbers_come_back_from_every_kind_of_file(tmp_path) -> None:
    numbers_HW = ellipses((50, 50), 6, 0)
    for suffix in ("png", "tif", "npy"):
        qupath.write_map(tmp_path / f"a.{suffix}", numbers_HW)
        read = np.load(tmp_path / "a.npy", allow_pickle=False) if suffix == "npy" else np.asarray(
            Image.open(tmp_path / f"a.{suffix}"))
        assert (read == numbers_HW).all()
    many_HW = np.arange(300 * 300, dtype=np.int32).reshape(300, 300)
    qupath.write_map(tmp_path / "b.tif", many_HW)
    assert (np.asarray(Image.open(tmp_path / "b.tif")) == many_HW).all()
    with pytest.raises(ShardError, match=r"more than a PNG of 16 bits can count"):
        qupath.write_map(tmp_path / "b.png", many_HW)


def test_rims_are_between_what_differs() -> None:
    numbers_HW = np.zeros((6, 8), np.int32)
    numbers_HW[1:5, 1:4], numbers_HW[1:5, 4:7] = 1, 2
    rims = qupath.rims(numbers_HW)
    assert rims[1:5, 4].all() and not rims[2:4, 3].any()         # one pixel wide where they touch
    assert rims[1, 1:7].all() and rims[4, 1:7].all() and not rims[0].any() and not rims[2, 2]
