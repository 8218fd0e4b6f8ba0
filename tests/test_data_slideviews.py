"""Views of slides: against plain loops, the same on any number of ranks, and as likely as they should be."""

import runpy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from shards import draws, index
from shards.draws import Draw
from shards.index import ShardError
from ssl_dist.data import augment, slideviews
from ssl_dist.data.batch import SlideView
from ssl_dist.data.loader import SlideLoader
from ssl_dist.data.quarantine import Quarantine
from ssl_dist.data.reader import Reader
from ssl_dist.data.stream import Stream

bags = runpy.run_path(str(Path(__file__).with_name("bags.py")))
VIEWS = (SlideView(tiles=5), SlideView(tiles=70, turn=30, flip=1.0, stretch=(0.5, 0.5), shift=3))
STILL = SlideView(tiles=9, turn=0, flip=0, stretch=(1, 1), shift=0)
BATCH = 6


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 slides in five tars. Not to be changed."""
    return bags["written"](tmp_path_factory.mktemp("draws") / "made")


def loader(home: Path, views: tuple[SlideView, ...] = VIEWS, rank: int = 0, world: int = 1,
           listed: Quarantine | None = None) -> SlideLoader:
    reader = Reader([home], slides=True)
    return SlideLoader(reader, Stream(reader.counts, seed=5, window=2, batch=BATCH), views, rank=rank, world=world,
                       ahead=2, quarantine=listed)


def by_hand(content: Draw, view: SlideView, u: np.ndarray, more: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One view of one slide, a number at a time."""
    angle = np.pi * view.turn / 180 * (2 * u[1] - 1)
    scale = [(-1 if u[2 + axis] < view.flip else 1)
             * (view.stretch[0] + (view.stretch[1] - view.stretch[0]) * u[4 + axis]) for axis in (0, 1)]
    shift = [view.shift * (2 * u[6 + axis] - 1) for axis in (0, 1)]
    middle = [sum(float(cell[axis]) for cell in content.cell_T2) / len(content.cell_T2) for axis in (0, 1)]
    features, cells = [], []
    for number in range(view.tiles):
        tile = int(more[number] * len(content.cell_T2))
        features.append(content.features_TD[tile])
        x, y = ((float(content.cell_T2[tile][axis]) - middle[axis]) * scale[axis] for axis in (0, 1))
        cells.append([round(np.cos(angle) * x - np.sin(angle) * y + shift[0]),
                      round(np.sin(angle) * x + np.cos(angle) * y + shift[1])])
    return np.stack(features), np.array(cells)


def test_a_batch_is_made_of_the_slides_draws_tiles_and_numbers_of_its_step(home: Path) -> None:
    mine = loader(home)
    step = mine.stream.steps_an_epoch + 1                       # the second step of the second epoch
    (batch,) = mine.batches(step, step + 1)
    assert batch.positions.tolist() == list(range(BATCH, 2 * BATCH)) and batch.boxes == []
    assert [tuple(view.shape) for view in batch.views] == [(6, 5, 16), (6, 5, 2), (6, 70, 16), (6, 70, 2)]
    assert [view.dtype for view in batch.views] == [torch.float16, torch.int64] * 2
    first = mine.reader.rows(*mine.stream.locate(1, batch.positions))
    for place in range(BATCH):
        taken: list[int] = []
        for number, view in enumerate(VIEWS):
            u = augment.uniforms(5, 1, number, BATCH + place, 1)[0]
            left = [draw for draw in range(bags["DRAWS"]) if draw not in taken]
            taken.append(left[int(u[0] * len(left))])
            more = np.concatenate([augment.uniforms(5, 1, (block + 1) * 65536 + number, BATCH + place, 1)[0]
                                   for block in range(2)])
            content = draws.unpacked(mine.reader.read(np.array([first[place] + taken[-1]]))[0])
            features, cells = by_hand(content, view, u, more)
            assert np.array_equal(batch.views[2 * number][place].numpy(), features)
            assert np.array_equal(batch.views[2 * number + 1][place].numpy(), cells)
        assert batch.rows[place] == first[place] + taken[0]
    mine.close()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_have_the_batch_of_one(home: Path, world: int) -> None:
    alone = loader(home)
    ranks = [loader(home, rank=rank, world=world) for rank in range(world)]
    for step in (0, 5):
        whole, parts = alone.make(step), [each.make(step) for each in ranks]
        assert np.array_equal(np.concatenate([each.rows for each in parts]), whole.rows)
        for number, view in enumerate(whole.views):
            assert torch.equal(torch.cat([each.views[number] for each in parts]), view)
    for each in (alone, *ranks):
        each.close()


def test_an_epoch_is_every_slide_once_but_the_tail_and_another_epoch_shows_it_otherwise(home: Path) -> None:
    mine = loader(home)
    seen = [mine.make(step) for step in range(2 * mine.stream.steps_an_epoch)]
    half = mine.stream.steps_an_epoch
    for epoch in (seen[:half], seen[half:]):
        rows = np.concatenate([each.rows for each in epoch]) // bags["DRAWS"]
        assert len(set(rows.tolist())) == len(rows) == 18, "of 23 slides three batches of six"
    assert not torch.equal(seen[0].views[0], seen[half].views[0])
    mine.close()


def test_two_views_are_of_two_draws_each_as_often_and_of_one_where_there_is_one() -> None:
    many = 4000
    numbers = [slideviews.numbers(VIEWS[0], 3, 0, view, 0, many) for view in range(5)]
    which = slideviews.chosen(numbers[:2], 4)
    pairs = Counter(zip(*which.tolist(), strict=True))
    assert len(pairs) == 12 and all(one != other for one, other in pairs)
    # Each pair a twelfth of 4,000: within five deviations of 17.5.
    assert all(abs(count - many / 12) < 88 for count in pairs.values())
    assert (slideviews.chosen(numbers[:2], 1) == 0).all()
    five = slideviews.chosen(numbers, 4)
    assert all(len(set(column)) == 4 for column in five[:4].T.tolist()), "four views of four draws: each once"
    assert (five[4] != five[3]).all(), "the fifth is not of the draws of the three before it"


def test_what_stands_still_keeps_its_shape_and_a_turn_its_distances(home: Path) -> None:
    mine, moved = (loader(home, (view, view)) for view in (STILL, SlideView(tiles=9, stretch=(1, 1))))
    one, other = mine.make(0), moved.make(0)
    content = [draws.unpacked(each) for each in mine.reader.read(one.rows)]
    for place, draw in enumerate(content):
        at = {feature.tobytes(): cell for feature, cell in zip(draw.features_TD, draw.cell_T2, strict=True)}
        cells = np.array([at[feature.numpy().tobytes()] for feature in one.views[0][place]])
        gaps = one.views[1][place].numpy() - cells
        assert (np.ptp(gaps, axis=0) == 0).all() or np.abs(gaps - gaps[0]).max() <= 1, "a half may round either way"
        far = np.linalg.norm(cells[:, None] - cells[None], axis=2)
        turned = other.views[1][place].numpy().astype(float)
        assert np.abs(np.linalg.norm(turned[:, None] - turned[None], axis=2) - far).max() <= 2 ** 0.5 + 1e-9
    for each in (mine, moved):
        each.close()


def damaged(home: Path, out: Path, rows: list[int]) -> Path:
    """A copy of which some draws were written over."""
    out.mkdir()
    for path in home.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    table = index.samples(out).to_pydict()
    for row in rows:
        with (out / f"made-{table['tar'][row]:06d}.tar").open("r+b") as file:
            file.seek(table["offset"][row] + table["size"][row] - 4)
            file.write(b"\x7f\xff\x7f\xff")
    return out


def test_a_bad_draw_takes_its_slide_along_and_another_comes_whole(home: Path, tmp_path: Path) -> None:
    sound = loader(home)
    before = sound.make(0)
    slide = before.rows[2] // bags["DRAWS"]
    hurt = damaged(home, tmp_path / "hurt", [int(slide * bags["DRAWS"] + draw) for draw in range(bags["DRAWS"])])
    listed = Quarantine(tmp_path / "list.jsonl", 99)
    mine = loader(hurt, listed=listed)
    after = mine.make(0)
    assert after.rows[2] // bags["DRAWS"] != slide and (np.delete(after.rows, 2) == np.delete(before.rows, 2)).all()
    # Both views of the place are of one slide: the first number of a vector says of which.
    instead = after.rows[2] // bags["DRAWS"]
    of = index.samples(home)["slide"].to_pylist()[int(instead) * bags["DRAWS"]]
    for view in after.views[::2]:
        assert (view[2, :, 0].float() - int(of[1:]) % 7).abs().max() < 1.5
    assert len(listed.listed) == 1, "the first that was met"
    others = [loader(hurt, rank=rank, world=3, listed=Quarantine(tmp_path / f"{rank}.jsonl", 99)) for rank in range(3)]
    assert np.array_equal(np.concatenate([each.make(0).rows for each in others]), after.rows)
    with pytest.raises(ShardError, match="changed on disk"):
        loader(hurt).make(0)
    with pytest.raises(ShardError, match="max_bad=0"):
        loader(hurt, listed=Quarantine(tmp_path / "none.jsonl", 0)).make(0)
    for each in (sound, mine, *others):
        each.close()
