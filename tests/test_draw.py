"""Draws of slides: what an encoder makes of their tiles by hand, one augmentation for all tiles of a draw; whatever
happens meanwhile, the same bytes."""

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

from shards import check, draws, index, write
from shards.folder import FolderInUse, hold
from shards.index import ShardError
from ssl_dist import cli, config, draw, jobs, schema
from ssl_dist.data.reader import Reader
from ssl_dist.data.view import View
from ssl_dist.models.encoder import Encoder, EncoderError
from ssl_dist.slides import Draws

CPU = torch.device("cpu")
ROOT = Path(draw.__file__).parents[1]
PLAIN = View(size=64, scale=(1.0, 1.0), ratio=(1.0, 1.0), jitter=0.0, grey=0.0, blur=0.0, horizontal=0.0, vertical=0.0)
KILLED = """
import os, signal, sys, torch
from ssl_dist import draw, schema
from ssl_dist.slides import Draws
def progress(what, done, total):
    if done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
draw.run(schema.load(Draws, None, sys.argv[1:]), torch.device("cpu"), 2, progress)
"""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    network = Encoder("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 12, 16]}, (0.6,) * 3, (0.3,) * 3)
    network.save(folder, 64, {})
    return folder


def settings(encoder: Path, shard: Path, out: Path, **more: Any) -> Draws:
    return Draws(**{"encoder": str(encoder), "shards": [shard], "out": out, "draws": 3, "tiles": 20, "view": PLAIN,
                    "stage": 3, "tar_slides": 1, **more})


def made(told: Draws, threads: int = 2) -> Path:
    draw.run(told, CPU, threads)
    return told.out


@pytest.fixture(scope="module")
def plain(encoder: Path, shard: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three draws of up to 20 tiles of each of the four slides, as they are. Not to be changed."""
    return made(settings(encoder, shard, tmp_path_factory.mktemp("plain") / "draws"))


def contents(home: Path) -> dict[str, draws.Draw]:
    reader = Reader([home], slides=True)
    rows = reader.all_rows()
    return dict(zip(reader.column("key", rows), map(draws.unpacked, reader.read(rows)), strict=True))


def files(home: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in home.iterdir() if not path.name.startswith(".")}


class Looked:
    """Tiles of the shards by slide and cell, and what layer3 of the network makes of pixels, with timm alone."""

    def __init__(self, encoder: Path, shard: Path):
        reader = Reader([shard])
        rows = reader.all_rows()
        self.network: Any = timm.create_model(f"local-dir:{encoder}", pretrained=True, num_classes=0).eval()
        self.seen: list[torch.Tensor] = []
        self.network.layer3.register_forward_hook(lambda _, __, out: self.seen.append(out))
        self.tiles: dict[str, dict[tuple[int, int], np.ndarray]] = {}
        places = np.stack([reader.column("x", rows), reader.column("y", rows)], axis=1)
        slides = np.array(reader.column("slide", rows))
        for slide in set(slides.tolist()):
            own = np.flatnonzero(slides == slide)
            # 64 pixels of 1 µm on slides of 0.5: every 128 pixels of level 0.
            cells = (places[own] - places[own].min(axis=0)) // 128
            self.tiles[slide] = {tuple(cell): np.asarray(Image.open(io.BytesIO(content.tobytes())))
                                 for cell, content in zip(cells.tolist(), reader.read(rows[own]), strict=True)}

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        self.seen.clear()
        with torch.inference_mode():
            self.network((torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float() / 255 - 0.6) / 0.3)
        return self.seen[0].mean(dim=(2, 3)).numpy()


@pytest.fixture(scope="module")
def looked(encoder: Path, shard: Path) -> Looked:
    return Looked(encoder, shard)


def test_a_draw_is_what_the_third_stage_makes_of_tiles_none_twice(plain: Path, looked: Looked) -> None:
    table = index.samples(plain).to_pydict()
    found = contents(plain)
    assert len(found) == 4 * 3 and len(set(table["slide"])) == 4
    for key, slide in zip(table["key"], table["slide"], strict=True):
        one, there = found[key], looked.tiles[slide]
        assert len(one.cell_T2) == min(20, len(there)) == len({tuple(cell) for cell in one.cell_T2.tolist()})
        expected = looked(np.stack([there[tuple(cell)] for cell in one.cell_T2.tolist()]))
        assert np.abs(one.features_TD - expected).max() < 2e-3 * np.abs(expected).max(), "half precision, no more"
    by_slide = {slide: [found[key].cell_T2 for key, own in zip(table["key"], table["slide"], strict=True)
                        if own == slide] for slide in set(table["slide"])}
    large = [drawn for slide, drawn in by_slide.items() if len(looked.tiles[slide]) > 25]
    assert large and all(not np.array_equal(one[0], one[1]) for one in large), "every draw is of other tiles"
    assert check.check(plain, decode=True) == []


def test_all_tiles_of_a_draw_are_turned_alike_and_other_draws_otherwise(encoder: Path, shard: Path, looked: Looked,
                                                                         tmp_path: Path) -> None:
    home = made(settings(encoder, shard, tmp_path / "flips", draws=8, tiles=6,
                         view=replace(PLAIN, horizontal=0.5, vertical=0.5)))
    table, ways = index.samples(home).to_pydict(), []
    for (key, one), slide in zip(contents(home).items(), table["slide"], strict=True):
        tiles = np.stack([looked.tiles[slide][tuple(cell)] for cell in one.cell_T2.tolist()])
        apart = [np.abs(one.features_TD - looked(turned)).max(axis=1) / np.abs(one.features_TD).max()
                 for turned in (tiles, tiles[:, :, ::-1], tiles[:, ::-1], tiles[:, ::-1, ::-1])]
        fits = [way for way, each in enumerate(apart) if (each < 2e-3).all()]
        assert len(fits) == 1, f"{key}: one way fits all its tiles"
        ways.append(fits[0])
    assert set(ways) == {0, 1, 2, 3}, "of 32 draws all four ways"


def test_a_slides_draws_do_not_depend_on_other_slides_threads_or_tars(encoder: Path, shard: Path, plain: Path,
                                                                      tmp_path: Path) -> None:
    whole = contents(plain)
    part = contents(made(settings(encoder, shard, tmp_path / "part", split="test", tar_slides=7), threads=1))
    assert 0 < len(part) < len(whole)
    for key, one in part.items():
        assert np.array_equal(one.features_TD, whole[key].features_TD)
        assert np.array_equal(one.cell_T2, whole[key].cell_T2)
    other = contents(made(settings(encoder, shard, tmp_path / "other", seed=1)))
    assert any(not np.array_equal(one.cell_T2, whole[key].cell_T2) for key, one in other.items())


def test_parts_and_a_kill_leave_the_same_bytes(encoder: Path, shard: Path, plain: Path, tmp_path: Path) -> None:
    told = settings(encoder, shard, tmp_path / "parts")
    for number in (2, 1, 3):
        said = draw.run(replace(told, part=f"{number}/3"), CPU, 2)
        assert said.part and not (told.out / "index.json").exists()
    draw.run(told, CPU, 2)
    assert files(told.out) == files(plain)
    words = [f"encoder={encoder}", f"shards=[{shard}]", f"out={tmp_path / 'killed'}", "draws=3", "tiles=20", "stage=3",
             "tar_slides=1", *(f"view.{name}={list(value) if isinstance(value, tuple) else value}"
                               for name, value in vars(PLAIN).items() if value != getattr(View(), name))]
    died = subprocess.run([sys.executable, "-c", KILLED, *words], check=False, capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert died.returncode == -signal.SIGKILL, died.stderr
    there = sorted(path.name for path in (tmp_path / "killed").glob("*") if path.suffix in (".tar", ".tmp", ".json"))
    assert there == [".painted-000001.tar.tmp", "painted-000000.tar"], "killed as it had all draws of the second"
    before = (tmp_path / "killed" / "painted-000000.tar").stat().st_mtime_ns
    draw.run(schema.load(Draws, None, words), CPU, 2)
    assert files(tmp_path / "killed") == files(plain)
    assert (tmp_path / "killed" / "painted-000000.tar").stat().st_mtime_ns == before, "what was done is not done again"
    assert draw.run(told, CPU, 2).untouched


def test_what_would_mix_two_kinds_of_draws_is_refused(encoder: Path, shard: Path, plain: Path, tmp_path: Path) -> None:
    told = settings(encoder, shard, plain)
    for more, said in (({"seed": 2}, "seed was 0, now 2"), ({"tiles": 19}, "tiles was 20, now 19"),
                       ({"stage": 2}, "stage was 3, now 2"), ({"view": replace(PLAIN, grey=0.5)}, "view was")):
        with pytest.raises(draw.SettingsChanged, match=said):
            draw.run(replace(told, **more), CPU, 1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(draw.SettingsChanged, match=r"thesis\.tex"):
        draw.run(replace(told, out=tmp_path / "mine"), CPU, 1)
    draw.run(replace(told, out=tmp_path / "half", part="1/4"), CPU, 1)
    with pytest.raises(draw.SettingsChanged, match="draws was 3, now 2"):
        draw.run(replace(told, out=tmp_path / "half", draws=2), CPU, 1)
    with hold(tmp_path / "half", ".lock"), pytest.raises(FolderInUse):
        draw.run(replace(told, out=tmp_path / "half"), CPU, 1)
    with pytest.raises(EncoderError, match=r"stage=9 is none of resnet18, whose stages are 0 \(act1\), 1 \(layer1\)"):
        draw.run(replace(told, out=tmp_path / "new", stage=9), CPU, 1)
    assert not (tmp_path / "new").exists()
    with pytest.raises(draw.SettingsChanged, match="one of shards="):
        draw.run(replace(told, out=told.shards[0]), CPU, 1)
    with hold(tmp_path / "vectors", ".lock"):       # as ssl-dist embed leaves its folder
        (tmp_path / "vectors" / "embed.json").write_text("{}")
    for what in (draw.rehearse, lambda one: draw.run(one, CPU, 1)):
        with pytest.raises(draw.SettingsChanged, match=r"embed\.json.* not begun by ssl-dist draw"):
            what(replace(told, out=tmp_path / "vectors"))
    assert "complete before" in draw.rehearse(told)[0]


def hurt(shard: Path, out: Path, rows: list[int]) -> Path:
    """A copy of shards of which some tiles were written over."""
    out.mkdir()
    for path in shard.iterdir():
        if path.is_file():
            (out / path.name).write_bytes(path.read_bytes())
    found, table = index.read(out), index.samples(out).to_pydict()
    for row in rows:
        with (out / found.tars[table["tar"][row]].name).open("r+b") as file:
            file.seek(table["offset"][row])
            file.write(b"no picture")
    return out


def test_a_tile_that_cannot_be_read_is_left_out_and_listed_up_to_a_budget(encoder: Path, shard: Path, plain: Path,
                                                                          looked: Looked, tmp_path: Path) -> None:
    table = index.samples(shard).to_pydict()
    slide = max(looked.tiles, key=lambda each: len(looked.tiles[each]))
    bad = [row for row, each in enumerate(table["slide"]) if each == slide][:3]
    told = settings(encoder, hurt(shard, tmp_path / "hurt", bad), tmp_path / "out", tiles=1000)
    said = draw.run(told, CPU, 2)
    assert sorted(line["key"] for line in said.bad) == sorted(table["key"][row] for row in bad)
    listed = [json.loads(line) for line in (told.out / "rejected.jsonl").read_text().splitlines()]
    assert listed == said.bad and {line["reason"] for line in listed} == {"unreadable"}
    assert check.check(told.out, decode=True) == []
    counts = {key: len(one.cell_T2) for key, one in contents(told.out).items()}
    ours = [count for key, count in counts.items() if key.startswith(slide.lower())]
    assert ours == [len(looked.tiles[slide]) - 3] * 3, "all draws of the slide are without them"
    whole, few = contents(plain), contents(made(replace(told, out=tmp_path / "few", tiles=20)))
    assert all(np.array_equal(one.features_TD, whole[key].features_TD) for key, one in few.items()
               if not key.startswith(slide.lower()))
    with pytest.raises(ShardError, match="max_bad=2"):
        draw.run(replace(told, out=tmp_path / "strict", max_bad=2), CPU, 2)
    every = [row for row, each in enumerate(table["slide"]) if each == slide]
    gone = hurt(shard, tmp_path / "gone", every)
    with pytest.raises(ShardError, match=f"no tile of slide '{slide}' can be read"):
        draw.run(replace(told, shards=[gone], out=tmp_path / "none", max_bad=10**6), CPU, 2)


def test_tiles_without_a_place_and_of_two_grids_are_refused(encoder: Path, slides: Path, tmp_path: Path) -> None:
    both = write.Settings(source=slides, out=tmp_path / "both", dataset="both", size=64, mpp=[1.0, 2.0], workers=2)
    write.write(both)
    told = settings(encoder, both.out, tmp_path / "out")
    with pytest.raises(ShardError, match=r"tiles of 1, 2 µm/px.*mpp=1"):
        draw.run(told, CPU, 1)
    assert draw.run(replace(told, mpp=2.0), CPU, 1).slides == 4
    (tmp_path / "tiles").mkdir()
    for number in range(3):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)).save(
            tmp_path / "tiles" / f"a-{number}.png")
    loose = write.Settings(source=tmp_path / "tiles", out=tmp_path / "loose", dataset="loose", kind="tiles", size=64,
                           names="(?P<slide>a)-", min_focus=0, workers=1)
    write.write(loose)
    with pytest.raises(ShardError, match="lie at one place"):
        draw.run(settings(encoder, loose.out, tmp_path / "nowhere"), CPU, 1)


def test_tiles_that_lie_apart_keep_their_distance(encoder: Path, slides: Path, tmp_path: Path) -> None:
    """Of two tiles of a slide the gap says nothing: how wide a tile is, the shards know."""
    few = write.Settings(source=slides, out=tmp_path / "few", dataset="few", size=64, mpp=1.0, max_tiles=2, workers=2)
    write.write(few)
    table = index.samples(few.out).to_pydict()
    for key, one in contents(made(settings(encoder, few.out, tmp_path / "draws"))).items():
        own = [row for row, slide in enumerate(table["slide"]) if key.startswith(slide.lower())]
        corners = np.stack([[table["x"][row], table["y"][row]] for row in own])
        assert {tuple(cell) for cell in one.cell_T2.tolist()} == {
            tuple(cell) for cell in ((corners - corners.min(axis=0)) // 128).tolist()}


def test_the_command_says_what_it_would_do_does_it_and_refuses_what_cannot_be(encoder: Path, shard: Path,
                                                                             tmp_path: Path) -> None:
    words = ["draw", "draw", f"encoder={encoder}", f"shards=[{shard}]", f"out={tmp_path / 'out'}", "draws=2", "tiles=4",
             "view.size=64"]
    ran = CliRunner().invoke(cli.app, [*words, "--dry-run"])
    assert ran.exit_code == 0 and "4 slides, 2 draws of up to 4 tiles each: 32 looks of resnet18" in ran.output
    assert not (tmp_path / "out").exists()
    ran = CliRunner().invoke(cli.app, words)
    assert ran.exit_code == 0 and "2 draws of each of 4 slides in 1 tars" in ran.output, ran.output
    for more, said in (("view.count=2", "view.count=2"), ("view.randstain=0.5", "needs stain"), ("part=5/4", "part="),
                       ("view.scale=[1,0.5]", "runs from high to low"), ("draws=0", "draws=0")):
        ran = CliRunner().invoke(cli.app, [*words, more])
        assert ran.exit_code == 2 and said in ran.output, ran.output


def test_a_launch_draws_in_parts_and_publishes_after_them(tmp_path: Path) -> None:
    (tmp_path / "encoder").mkdir()
    (tmp_path / "shards").mkdir()
    asked = jobs.parse("slurm", ["parts=3", "--", "draw", "draw", f"encoder={tmp_path / 'encoder'}",
                                 f"shards=[{tmp_path / 'shards'}]", f"out={tmp_path / 'draws'}"])
    cut, publish = jobs._draws(asked)
    assert [command[-1] for command in cut.commands] == ["part=1/3", "part=2/3", "part=3/3"]
    assert publish.after == [cut.name] and not any(word.startswith("part=") for word in publish.commands[0])


def test_the_recipe_holds_what_the_paper_s_code_draws() -> None:
    recipe = schema.load(Draws, config.recipe("draw"), ["encoder=timm:resnet18", f"shards=[{ROOT}]", "out=x"])
    assert (recipe.draws, recipe.tiles, recipe.stage, recipe.view.size, recipe.view.scale) == (50, 256, 3, 224,
                                                                                                     (0.5, 1))
