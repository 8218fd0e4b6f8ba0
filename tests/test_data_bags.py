"""Slides as bags: what was written, what others write, and what cannot be one."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from shards import arrays
from shards.index import ShardError
from ssl_dist.data.bags import Bags


def test_a_bag_comes_back_as_it_was_written(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    corners = np.array([[100, 200], [612, 200], [100, 712], [612, 712], [1124, 1224]])
    arrays.write_bag(tmp_path / "b.h5", features, corners, {"slide": "S2", "patient": "P", "mpp": 0.5}, wide=512)
    arrays.write_bag(tmp_path / "a.h5", features[:1], corners[:1], {"slide": "S1", "encoder_sha256": "e"})
    bags = Bags(tmp_path)
    assert bags.slides == ["S1", "S2"] and bags.patients == ["", "P"] and bags.width == 3 and bags.encoder == "e"
    assert bags.counts.tolist() == [1, 5] and bags.groups.tolist() == ["slide S1", "P"]
    bag = bags[1]
    assert np.array_equal(bag.features_ND, features) and np.array_equal(bag.corner_N2, corners)
    assert bag.wide == 512
    assert bag.cell_N2.tolist() == [[0, 0], [1, 0], [0, 1], [1, 1], [2, 2]]
    assert bags[0].cell_N2.tolist() == [[0, 0]]


def test_files_of_others_are_read_and_the_grid_is_found_where_it_is_not_told(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "slide-7.h5", "w") as file:       # as CLAM has it; half precision, a batch of one
        file["features"] = np.ones((1, 4, 2), np.float16)
        file["coords"] = np.array([[0, 0], [256, 0], [0, 512], [768, 512]], np.int32)
    bags = Bags(tmp_path)
    assert bags.slides == ["slide-7"]
    assert bags[0].features_ND.shape == (4, 2) and bags[0].wide == 256
    assert bags[0].cell_N2.tolist() == [[0, 0], [1, 0], [0, 2], [3, 2]]


def test_the_fingerprint_is_of_every_number_and_of_no_folder(tmp_path: Path) -> None:
    prints = []
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        (tmp_path / name).mkdir()
        arrays.write_bag(tmp_path / name / "s.h5", np.full((2, 2), value), np.array([[0, 0], [1, 0]]), {})
        prints.append(Bags(tmp_path / name).fingerprint)
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(("features", "coords", "said"), [
    (np.zeros((3, 2)), np.zeros((2, 2)), "not features"), (np.zeros(3), np.zeros((3, 2)), "not features"),
    (np.zeros((0, 2)), np.zeros((0, 2)), "not features"), (np.full((1, 2), np.nan), np.zeros((1, 2)), "no numbers")])
def test_what_is_no_bag_is_refused_by_name(features: np.ndarray, coords: np.ndarray, said: str, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "odd.h5", "w") as file:
        file["features"], file["coords"] = features, coords
    with pytest.raises(ShardError, match=rf"odd\.h5 .*{said}"):
        Bags(tmp_path)[0]


def test_vectors_of_two_encoders_do_not_go_together(tmp_path: Path) -> None:
    place = np.array([[0, 0]])
    for name in ("w", "e", "none"):
        (tmp_path / name).mkdir()
    arrays.write_bag(tmp_path / "w" / "a.h5", np.zeros((1, 2)), place, {})
    arrays.write_bag(tmp_path / "w" / "b.h5", np.zeros((1, 3)), place, {})
    arrays.write_bag(tmp_path / "e" / "a.h5", np.zeros((1, 2)), place, {"encoder_sha256": "x"})
    arrays.write_bag(tmp_path / "e" / "b.h5", np.zeros((1, 2)), place, {"encoder_sha256": "y"})
    for name in "we":
        with pytest.raises(ShardError, match="two encoders"):
            Bags(tmp_path / name)
    with pytest.raises(ShardError, match=r"no \*\.h5"):
        Bags(tmp_path / "none")
