"""Batches: resumed, shared among ranks and held against the parts they are made of; and what a bad tile does."""

import json
import shutil
import threading
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shards import index
from shards.index import ShardError
from ssl_dist.data import augment, dali, opencv, stain
from ssl_dist.data.batch import Batch, View
from ssl_dist.data.loader import Loader, Palettes
from ssl_dist.data.quarantine import Quarantine
from ssl_dist.data.reader import Reader
from ssl_dist.data.stream import Stream

BATCH = 12          # five steps an epoch of the painted shards
VIEWS = (View(size=48, stain=0.1), View(size=32, scale=(0.05, 0.3), solarise=0.2))
made: list[Loader] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while made:
        made.pop().close()


def loader(shard: Path, *, split: str = "train", rank: int = 0, world: int = 1, ahead: int = 3,
           views: tuple[View, ...] = VIEWS, batch: int = BATCH, quarantine: Quarantine | None = None) -> Loader:
    reader = Reader([shard], split)
    made.append(Loader(reader, Stream(reader.counts, seed=5, window=2, batch=batch), views, rank=rank, world=world,
                       device=torch.device("cpu"), threads=2, ahead=ahead, quarantine=quarantine))
    return made[-1]


def equal(one: Batch, other: Batch) -> bool:
    return (np.array_equal(one.rows, other.rows) and np.array_equal(one.positions, other.positions)
            and all(map(np.array_equal, one.boxes, other.boxes)) and all(map(torch.equal, one.views, other.views)))


def broken(shard: Path, copy: Path, rows: list[int], content: bytes = b"this was never a picture ") -> None:
    """A copy of a shard folder in which the images of `rows` are garbage, and the index knows no better."""
    shutil.copytree(shard, copy)
    columns = index.samples(copy).to_pydict()
    for row in rows:
        size = columns["size"][row]
        garbage = (content * size)[:size]
        with (copy / index.read(copy).tars[columns["tar"][row]].name).open("r+b") as handle:
            handle.seek(columns["offset"][row])
            handle.write(garbage)
        columns["crc32"][row] = zlib.crc32(garbage)
    index.write_samples(copy, columns)


def test_a_batch_is_made_of_the_tiles_and_numbers_of_its_step(shard: Path) -> None:
    mine = loader(shard)
    step = mine.stream.steps_an_epoch + 1                       # the second step of the second epoch
    (batch,) = mine.batches(step, step + 1)
    assert batch.positions.tolist() == list(range(BATCH, 2 * BATCH))
    assert batch.rows.tolist() == mine.reader.rows(*mine.stream.locate(1, batch.positions)).tolist()
    images = dali.Decoder(1, 1)
    for number, view in enumerate(VIEWS):
        assert batch.views[number].shape == (BATCH, view.size, view.size, 3)
        for place in range(BATCH):
            u = augment.uniforms(5, 1, number, BATCH + place, 1)
            numbers = augment.numbers(view, u)
            expected = np.empty((view.size, view.size, 3), dtype=np.uint8)
            (image,), (stroke,) = images(mine.reader.read(batch.rows[[place]])), opencv.strokes(numbers)
            opencv.draw(image, stroke, view.size, expected)
            assert np.array_equal(batch.views[number][place].numpy(), expected)
            assert batch.boxes[number][place] == pytest.approx(numbers.box_N4[0], abs=0)


def stained(shard: Path) -> stain.Fit:
    """A fit in which every slide but one has stains of its own."""
    reader, random = Reader([shard]), np.random.default_rng(2)
    slides = sorted(set(reader.column("slide", reader.all_rows())))
    name = reader.indexes[0].datasets[0]["name"]
    pairs = np.array([stain.HAEMATOXYLIN, stain.EOSIN]) + random.uniform(0, 0.2, (len(slides), 2, 3))
    pairs /= np.linalg.norm(pairs, axis=2, keepdims=True)
    mean, spread = np.array([160.0, 150, 118, 35, 8, 6]), np.array([20.0, 6, 5, 8, 2, 1.5])
    return stain.Fit(mean, spread, np.ones(1), mean[None], np.diag(spread**2)[None], pairs[0], np.array([1.1, 0.9]),
                     {(name, slide): (pair, np.array([1.0 + number / 9, 0.8]))
                      for number, (slide, pair) in enumerate(zip(slides[1:], pairs[1:], strict=True))}, ["f"], 1, {})


def test_a_slides_own_stains_move_its_tiles_and_no_others(shard: Path, tmp_path: Path) -> None:
    fit = stained(shard)
    view = View(size=40, stain=0.2, basis="reference", randstain=0.5, jitter=0, grey=0, blur=0)

    def made_of(folder: Path, listed: Quarantine | None = None) -> Loader:
        reader = Reader([folder], "train")
        made.append(Loader(reader, Stream(reader.counts, seed=5, window=2, batch=BATCH), (view,), rank=0, world=1,
                           device=torch.device("cpu"), threads=2, ahead=2, fit=fit, quarantine=listed))
        return made[-1]

    def expected(mine: Loader, batch: Batch) -> np.ndarray:
        drawn, name = np.empty((BATCH, 40, 40, 3), np.uint8), mine.reader.indexes[0].datasets[0]["name"]
        for place, (row, slide) in enumerate(zip(batch.rows, mine.reader.column("slide", batch.rows), strict=True)):
            pair, strength = fit.slides.get((name, slide), (fit.reference_23, fit.reference_strength_2))
            palette = stain.Palette(fit, stain.complete(pair)[None], strength[None])
            numbers = augment.numbers(view, augment.uniforms(5, 0, 0, int(batch.positions[place]), 1), palette)
            image = dali.Decoder(1, 1)(mine.reader.read(np.array([row])))[0]
            opencv.draw(image, opencv.strokes(numbers)[0], 40, drawn[place], opencv.lab_statistics(image))
        return drawn

    mine = made_of(shard)
    batch = mine.make(1)
    assert len(set(mine.reader.column("slide", batch.rows))) > 1
    assert np.array_equal(batch.views[0].numpy(), expected(mine, batch))
    # A tile that takes a bad one's place brings its own slide's stains.
    broken(shard, tmp_path / "hurt", batch.rows[:6].tolist())
    hurt = made_of(tmp_path / "hurt", Quarantine(tmp_path / "list.jsonl", 99))
    other = hurt.make(1)
    assert not set(other.rows.tolist()) & set(batch.rows[:6].tolist())
    assert np.array_equal(other.views[0].numpy(), expected(hurt, other))


def test_a_fit_of_other_shards_is_refused(shard: Path) -> None:
    fit = replace(stained(shard), slides={("other", "slide"): (np.eye(2, 3), np.ones(2))})
    reader = Reader([shard])
    with pytest.raises(ShardError, match="fitted to other shards"):
        Loader(reader, Stream(reader.counts, seed=5, window=2, batch=BATCH), (View(basis="slide", stain=0.1),), rank=0,
               world=1, device=torch.device("cpu"), threads=1, ahead=1, fit=fit)
    Palettes(reader, replace(fit, shards=[reader.indexes[0].fingerprint]))      # ours, though no slide could be fitted
    reader.close()


def test_resuming_gives_the_later_part_of_the_same_batches(shard: Path) -> None:
    steps = loader(shard).stream.steps_an_epoch + 3             # across the end of an epoch
    whole = list(loader(shard).batches(0, steps))
    assert len(whole) == steps
    for start in (1, 4, steps - 2):
        later = list(loader(shard).batches(start, steps))
        assert len(later) == steps - start
        assert all(map(equal, later, whole[start:]))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_shares_of_all_ranks_are_the_batch_of_one(shard: Path, world: int) -> None:
    alone = list(loader(shard).batches(0, 3))
    ranks = [list(loader(shard, rank=rank, world=world).batches(0, 3)) for rank in range(world)]
    for step, whole in enumerate(alone):
        parts = [rank[step] for rank in ranks]
        assert np.concatenate([part.rows for part in parts]).tolist() == whole.rows.tolist()
        assert np.concatenate([part.positions for part in parts]).tolist() == whole.positions.tolist()
        for number, view in enumerate(whole.views):
            assert torch.equal(torch.cat([part.views[number] for part in parts]), view)
            assert np.array_equal(np.concatenate([part.boxes[number] for part in parts]), whole.boxes[number])


def test_an_epoch_of_batches_visits_every_tile_of_the_split_but_the_tail(shard: Path) -> None:
    mine = loader(shard, views=(replace(VIEWS[0], size=8, blur=0, stain=0),))
    seen = np.concatenate([batch.rows for batch in mine.batches(0, mine.stream.steps_an_epoch)])
    assert len(set(seen.tolist())) == len(seen) == mine.stream.steps_an_epoch * BATCH
    assert set(seen.tolist()) <= set(mine.reader.all_rows().tolist())
    assert len(mine.reader.all_rows()) - len(seen) < BATCH


@pytest.mark.parametrize("ahead", [1, 3, 64])
def test_how_far_ahead_batches_are_made_changes_nothing(shard: Path, ahead: int) -> None:
    expected = [loader(shard).make(step) for step in range(6)]
    assert all(map(equal, loader(shard, ahead=ahead).batches(0, 6), expected))


def test_batches_handed_out_are_not_overwritten(shard: Path) -> None:
    mine = loader(shard)
    kept = []
    for batch in mine.batches(0, 8):
        kept.append((batch, [view.clone() for view in batch.views]))
    for batch, copies in kept:
        assert all(map(torch.equal, batch.views, copies))


def test_a_tile_that_cannot_be_decoded_is_named(shard: Path, tmp_path: Path) -> None:
    sound = loader(shard)
    assert sound.stream.steps_an_epoch > 3
    victim = int(sound.make(2).rows[7])
    broken(shard, tmp_path / "broken", [victim])
    mine = loader(tmp_path / "broken")
    key, slide = (sound.reader.column(name, np.array([victim]))[0] for name in ("key", "slide"))
    received = 0
    with pytest.raises(ShardError, match="cannot be decoded") as refused:
        for batch in mine.batches(0, 6):
            assert equal(batch, sound.make(received))
            received += 1
    assert received == 2, "the batches before the bad tile's were lost"
    assert repr(key) in str(refused.value)
    assert repr(slide) in str(refused.value)
    assert refused.value.exit_code == 3
    assert equal(mine.make(3), sound.make(3)), "after a bad tile the loader gives other batches"


def test_of_several_ranks_only_the_one_with_the_bad_tile_fails(shard: Path, tmp_path: Path) -> None:
    victim = int(loader(shard).make(0).rows[-1])
    broken(shard, tmp_path / "broken", [victim])
    loader(tmp_path / "broken", rank=0, world=2).make(0)
    with pytest.raises(ShardError, match="cannot be decoded"):
        loader(tmp_path / "broken", rank=1, world=2).make(0)


def test_a_tile_that_changed_on_disk_ends_the_batches(shard: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shard, copy)
    mine = loader(copy)
    victim = mine.make(1).rows[[3]]
    columns = {name: mine.reader.column(name, victim)[0] for name in ("tar", "offset", "key")}
    with mine.reader.tars[columns["tar"]].open("r+b") as handle:
        handle.seek(columns["offset"] + 40)
        byte = handle.read(1)[0]
        handle.seek(columns["offset"] + 40)
        handle.write(bytes([byte ^ 255]))
    with pytest.raises(ShardError, match="changed on disk") as refused:
        list(mine.batches(0, 6))
    assert repr(columns["key"]) in str(refused.value)


# --- quarantine


def hurt(shard: Path, copy: Path) -> tuple[dict[str, str], set[int]]:
    """A copy with three tiles that are no pictures and two whose bytes changed; keys with what is said, and rows."""
    chosen = [int(row) for row in loader(shard).reader.all_rows()[[0, 9, 17, 25, 33]]]
    broken(shard, copy, chosen[:3])
    reader = Reader([copy], "train")
    for row in chosen[3:]:
        _, tar, offset = reader.place(row)
        with tar.open("r+b") as handle:
            handle.seek(offset + 40)
            handle.write(b"\0\1\2\3\4\5")
    said = {key: "decode" if row in chosen[:3] else "its bytes changed on disk"
            for row, key in zip(chosen, reader.column("key", np.array(chosen)), strict=True)}
    return said, set(chosen)


def test_bad_tiles_are_listed_once_and_others_take_their_places_on_any_number_of_ranks(shard: Path,
                                                                                     tmp_path: Path) -> None:
    said, bad = hurt(shard, tmp_path / "hurt")
    sound, mine = loader(shard), loader(tmp_path / "hurt", quarantine=Quarantine(tmp_path / "list.jsonl", 5))
    steps = 2 * sound.stream.steps_an_epoch
    expected, got = list(sound.batches(0, steps)), list(mine.batches(0, steps))
    replaced = 0
    for one, other in zip(expected, got, strict=True):
        stays = np.array([row not in bad for row in one.rows.tolist()])
        assert np.array_equal(one.rows[stays], other.rows[stays])
        assert not set(other.rows.tolist()) & bad
        for first, second in zip(one.views, other.views, strict=True):
            assert torch.equal(first[stays], second[stays]), "what is sound is as it was, crop and colour"
        assert all(map(np.array_equal, one.boxes, other.boxes))
        replaced += int((~stays).sum())
    assert replaced > 6
    listed = [json.loads(line) for line in (tmp_path / "list.jsonl").read_text().splitlines()]
    assert len(listed) == len({line["key"] for line in listed})
    assert {line["key"] for line in listed} <= set(said) and len(listed) >= 4
    for line in listed:
        assert (line["reason"] == "its bytes changed on disk") == (said[line["key"]] != "decode")
        assert (tmp_path / "hurt").samefile(Path(line["tar"]).parent) and line["offset"] > 0
    # Two ranks, and an attempt that begins in the middle and knows the list, put the same tiles there.
    for world in (1, 2, 3):
        ranks = [loader(tmp_path / "hurt", rank=rank, world=world, quarantine=Quarantine(tmp_path / "list.jsonl", 5))
                 for rank in range(world)]
        for step in range(3, steps):
            shares = [each.make(step) for each in ranks]
            assert np.array_equal(np.concatenate([share.rows for share in shares]), got[step].rows)
            assert torch.equal(torch.cat([share.views[0] for share in shares]), got[step].views[0])
    assert len((tmp_path / "list.jsonl").read_text().splitlines()) == len(listed), "none is listed twice"


def test_more_bad_tiles_than_the_budget_end_the_batches_with_the_list(shard: Path, tmp_path: Path) -> None:
    hurt(shard, tmp_path / "hurt")
    mine = loader(tmp_path / "hurt", quarantine=Quarantine(tmp_path / "list.jsonl", 1))
    with pytest.raises(ShardError, match=r"[2-5] tiles cannot be used, data\.max_bad=1; .*list\.jsonl") as refused:
        list(mine.batches(0, 20))
    assert refused.value.exit_code == 3


def test_where_no_tile_of_a_tar_is_sound_the_batches_end(shard: Path, tmp_path: Path) -> None:
    rows = loader(shard).reader.all_rows()
    broken(shard, tmp_path / "broken", rows.tolist())
    mine = loader(tmp_path / "broken", quarantine=Quarantine(tmp_path / "list.jsonl", 10**6))
    with pytest.raises(ShardError, match="holds 16 bad tiles for one place"):
        mine.make(0)


def test_a_list_with_a_line_cut_short_is_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text('{"key": "a", "tar": "t", "offset": 1, "reason": "r"}\n{"key": "b", "ta')
    listed = Quarantine(tmp_path / "list.jsonl", 5)
    assert listed.listed == {("a", "t")}
    listed.add("a", "t", 1, "r")
    assert (tmp_path / "list.jsonl").read_text().count("\n") == 1
    listed.add("c", "t", 2, "r")
    assert Quarantine(tmp_path / "list.jsonl", 5).listed == {("a", "t"), ("c", "t")}


def test_closing_with_batches_in_flight_ends(shard: Path) -> None:
    before = threading.active_count()
    mine = loader(shard, ahead=8)
    batches = mine.batches(0, 1000)
    next(batches)
    made.remove(mine)
    closing = threading.Thread(target=mine.close, daemon=True)
    closing.start()
    closing.join(timeout=60)
    assert not closing.is_alive(), "closing waits for ever"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("batch", "view"))]
    assert threading.active_count() <= before
    batches.close()


def test_a_loop_that_is_left_early_leaves_nothing_waiting(shard: Path) -> None:
    mine = loader(shard, ahead=6)
    for batch in mine.batches(0, 1000):
        assert len(batch.rows) == BATCH
        break
    assert equal(next(mine.batches(5, 6)), mine.make(5))
