"""The views of the papers: each value as its source has it, what a recipe may change, and that all can be drawn."""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_dist import config, schema
from ssl_dist.data import presets
from ssl_dist.data.batch import View, each
from ssl_dist.data.loader import Loader
from ssl_dist.data.presets import PRESETS, expand
from ssl_dist.data.reader import Reader
from ssl_dist.data.stream import Stream
from ssl_dist.schema import ConfigError

# ---- what the sources say, in full, once more


def paper(count: int, size: int, scale: tuple[float, float], jitter: tuple[float, float, float, float], *,
          blur: float = 0.5, solarise: float = 0.0, vertical: float = 0.0, turn: float = 0.0,
          stain: float = 0.0) -> dict:
    """All that a view is, but for its name. In all of these papers: ColorJitter with a chance of 0.8, grey 0.2, sigma
    from 0.1 to 2, left-right flips, torchvision's shapes of 3/4 to 4/3."""
    brightness, contrast, saturation, hue = jitter
    return {"count": count, "size": size, "scale": scale, "ratio": (3 / 4, 4 / 3), "jitter": 0.8,
            "brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue, "grey": 0.2,
            "blur": blur, "sigma": (0.1, 2.0), "solarise": solarise, "turn": turn, "horizontal": 0.5,
            "vertical": vertical, "stain": stain, "stained": 1.0, "basis": "fixed", "randstain": 0.0,
            "randstain_spread": 1.0, "randstain_mixture": False}


STRONG = (0.8, 0.8, 0.8, 0.2)       # strength 1
MOCO = (0.4, 0.4, 0.4, 0.1)         # moco/main_moco.py, --aug-plus
BARLOW = (0.4, 0.4, 0.2, 0.1)       # barlowtwins/main.py, dino/main_dino.py
KANG = {"jitter": (0.2, 0.2, 0.2, 0.1), "vertical": 0.5, "stain": 0.05}
PAPERS = {
    "histology": [paper(2, 224, (0.2, 1.0), (0.2, 0.2, 0.2, 0.05), vertical=0.5)],
    "simclr": [paper(2, 224, (0.08, 1.0), STRONG)],
    "moco_v2": [paper(2, 224, (0.2, 1.0), MOCO)],
    "swav": [paper(2, 224, (0.14, 1.0), STRONG), paper(6, 96, (0.05, 0.14), STRONG)],
    "barlow": [paper(1, 224, (0.08, 1.0), BARLOW, blur=1.0),
               paper(1, 224, (0.08, 1.0), BARLOW, blur=0.1, solarise=0.2)],
    "dino": [paper(1, 224, (0.4, 1.0), BARLOW, blur=1.0), paper(1, 224, (0.4, 1.0), BARLOW, blur=0.1, solarise=0.2),
             paper(8, 96, (0.05, 0.4), BARLOW)],
    "moco_v2_kang": [paper(2, 224, (0.08, 1.0), **KANG)],       # VISSL's crops, on which Kang et al. built
    "swav_kang": [paper(2, 224, (0.14, 1.0), **KANG), paper(6, 96, (0.05, 0.14), **KANG)],
    "barlow_kang": [paper(1, 224, (0.08, 1.0), blur=1.0, **KANG),
                    paper(1, 224, (0.08, 1.0), blur=0.1, solarise=0.2, **KANG)],
    "dino_kang": [paper(1, 224, (0.4, 1.0), blur=1.0, **KANG),
                  paper(1, 224, (0.4, 1.0), blur=0.1, solarise=0.2, **KANG), paper(8, 96, (0.05, 0.4), **KANG)],
    "ciga": [paper(2, 224, (0.08, 1.0), STRONG)],
    "dehaene": [paper(2, 224, (0.2, 1.0), MOCO, vertical=0.5, turn=1.0)],
    # 250 of 1000 pixels, no colour is changed.
    "patchseg": [{**paper(1, 250, (1 / 16, 1 / 16), (0.2, 0.2, 0.2, 0.05), blur=0.0, vertical=0.5, turn=1.0),
                  "ratio": (1.0, 1.0), "jitter": 0.0, "grey": 0.0}],
}
NAMES = {field.name for field in fields(View)}
# What the notes on the papers do not call read in code (C): the letter and the values.
DOUBTED = {
    "moco_v2_kang": {"R": "vertical stain", "S": "brightness contrast saturation hue"},
    "ciga": {"?": "scale ratio jitter brightness contrast saturation hue grey blur sigma"},
    "dehaene": {"R": "size turn vertical",
                "?": "scale ratio jitter brightness contrast saturation hue grey blur sigma"},
    "patchseg": {"?": "turn horizontal vertical"},
}
DOUBTED |= dict.fromkeys(("swav_kang", "barlow_kang", "dino_kang"), DOUBTED["moco_v2_kang"])


def test_every_preset_is_held_against_its_paper() -> None:
    assert PAPERS.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PAPERS)
def test_a_preset_has_the_values_of_its_paper(name: str) -> None:
    found = [asdict(view) for view in PRESETS[name].views]
    assert len({view.pop("name") for view in found}) == len(found), "a recipe could not tell two views apart"
    assert found == PAPERS[name]


@pytest.mark.parametrize("name", PAPERS)
def test_a_preset_is_within_the_limits_of_a_recipe(name: str) -> None:
    assert built({"preset": name}) == PRESETS[name].views


def test_the_marks_are_five_and_each_says_what_it_means() -> None:
    assert presets.MARKS.keys() == {"C", "S", "R", "?", "O"}
    assert all(len(words.split()) > 0 for words in presets.MARKS.values())
    assert len(set(presets.MARKS.values())) == 5


@pytest.mark.parametrize("name", PAPERS)
def test_every_mark_is_one_of_the_five_and_names_values_of_a_view_once(name: str) -> None:
    preset = PRESETS[name]
    assert preset.marks.keys() <= presets.MARKS.keys()
    marked = [word for names in preset.marks.values() for word in names.split()]
    assert set(marked) <= NAMES
    assert len(marked) == len(set(marked)), "a value has two marks"
    assert all(preset.mark(word) == mark for mark, names in preset.marks.items() for word in names.split())
    assert {preset.mark(word) for word in NAMES - set(marked)} <= {"C"}


@pytest.mark.parametrize("name", PAPERS)
def test_nothing_doubtful_is_claimed_as_read_in_the_code(name: str) -> None:
    for mark, names in DOUBTED.get(name, {}).items():
        for word in names.split():
            assert PRESETS[name].mark(word) == mark, word
    if name == "histology":
        assert {PRESETS[name].mark(word) for word in NAMES} == {"O"}
    elif name not in DOUBTED:
        assert PRESETS[name].marks == {}, "all of it was read"


@pytest.mark.parametrize(("name", "word"), [("dehaene", "horizontal"),
                                            *((name, "randstain") for name in PAPERS if name.endswith("_kang"))])
def test_what_was_not_read_is_not_claimed_by_silence(name: str, word: str) -> None:
    assert PRESETS[name].mark(word) in ("R", "?")


@pytest.mark.parametrize("name", PAPERS)
def test_a_preset_tells_each_value_with_its_mark(name: str) -> None:
    title, *lines = presets.told(name)
    assert title == f"{name}: {PRESETS[name].source}"
    assert len(lines) == len(PAPERS[name])
    for line, values in zip(lines, PAPERS[name], strict=True):
        count, _, *words = line.replace(" x ", " ").split()
        assert int(count) == values["count"]
        said = dict(word.partition("=")[::2] for word in words)
        assert said["brightness"] == f"{values['brightness']:g}[{PRESETS[name].mark('brightness')}]"
        assert said["scale"] == f"{values['scale'][0]:g}-{values['scale'][1]:g}[{PRESETS[name].mark('scale')}]"
        assert ("stain" in said) == (values["stain"] > 0)
        assert ("turn" in said) == (values["turn"] > 0)
        assert ("solarise" in said) == (values["solarise"] > 0)


# ---- what a recipe asks for

@dataclass(frozen=True)
class Recipe:
    """A method that takes any views."""

    views: tuple[View, ...] = field(metadata={"expand": expand})


def built(given: object) -> tuple[View, ...]:
    return schema.build(Recipe, {"views": given}, where="test").views


def refused(given: object) -> list[str]:
    with pytest.raises(ConfigError) as error:
        built(given)
    assert error.value.exit_code == 2
    return error.value.problems


def test_a_change_reaches_all_views_and_nothing_else_of_them() -> None:
    for name, preset in PRESETS.items():
        changed = built({"preset": name, "stain": 0.17, "sigma": [0.3, 0.9]})
        assert [asdict(view) for view in changed] == [
            {**asdict(view), "stain": 0.17, "sigma": (0.3, 0.9)} for view in preset.views]


def test_a_change_under_a_views_name_reaches_that_view_and_goes_before_one_of_all() -> None:
    large, small = built({"preset": "swav", "blur": 0.3, "small": {"size": 48, "blur": 0.7, "count": 2}})
    before = PRESETS["swav"].views
    assert asdict(large) == {**asdict(before[0]), "blur": 0.3}
    assert asdict(small) == {**asdict(before[1]), "size": 48, "blur": 0.7, "count": 2}
    assert len(each((large, small))) == 4
    assert built({"preset": "swav", "small": None}) == before, "nothing said, nothing changed"
    assert PRESETS["swav"].views == before and before[1].size == 96


def test_what_names_no_preset_changes_histologys() -> None:
    assert built({}) == PRESETS["histology"].views
    (view,) = built({"size": 64})
    assert asdict(view) == {**asdict(PRESETS["histology"].views[0]), "size": 64}


def test_a_list_of_views_stands_for_itself() -> None:
    given = [{"size": 64, "count": 2}, {"name": "other", "size": 32, "hue": 0.0}]
    assert expand(given) is given
    assert built(given) == (View(size=64, count=2), View(name="other", size=32, hue=0.0))


@pytest.mark.parametrize(("given", "near"), [("dinno", "dino"), ("swav-kang", "swav_kang"), ("moco", "moco_v2"),
                                             ("Barlow", "barlow"), ("histolgy", "histology")])
def test_an_unknown_preset_is_named_with_the_nearest(given: str, near: str) -> None:
    (said,) = refused({"preset": given})
    assert f"'{given}' is not one of" in said and said.startswith("views")
    assert f"did you mean '{near}'" in said
    assert all(name in said for name in PRESETS)


@pytest.mark.parametrize("name", PAPERS)
def test_an_unknown_key_is_reported_once_however_many_views(name: str) -> None:
    (said,) = refused({"preset": name, "brigthness": 0.3, "blur": 0.1})
    assert "brigthness=0.3 is not a key; did you mean" in said and "brightness" in said


def test_mistakes_in_a_views_own_keys_and_values_are_each_reported() -> None:
    (said,) = refused({"preset": "swav", "small": {"sise": 48}})
    assert "sise=48 is not a key" in said and "[1]" in said
    (said,) = refused({"preset": "swav", "small": 48})
    assert "small=48" in said
    (said,) = refused({"preset": "swav", "small": {"hue": 0.7}})
    assert "hue=0.7 is out of range" in said and "[1]" in said
    (said,) = refused({"preset": "dino", "first": {"sigma": [2.0, 0.1]}})
    assert "sigma=[2.0, 0.1] runs from high to low" in said and "[0]" in said


@pytest.mark.parametrize("given", [["dino"], 5, None, {"dino": 1}], ids=str)
def test_a_preset_that_is_no_word_is_refused_like_any_mistake(given: object) -> None:
    (said,) = refused({"preset": given})
    assert "is not one of" in said


@pytest.mark.parametrize("name", PAPERS)
def test_views_in_full_read_back_as_themselves(name: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"views:\n  preset: {name}\n  stain: 0.11\n")
    first = schema.load(Recipe, recipe, [])
    assert {view.stain for view in first.views} == {0.11}
    recipe.write_text(schema.dump(first))
    assert "preset" not in recipe.read_text()
    assert schema.load(Recipe, recipe, []) == first


def test_the_command_line_reaches_one_view_of_a_preset(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("views:\n  preset: simclr\n")
    large, small = schema.load(Recipe, recipe, ["views.preset=swav", "views.grey=0.3", "views.small.size=48"]).views
    assert (large.size, small.size, large.grey, small.grey) == (224, 48, 0.3, 0.3)


# ---- in the config of a run

def loaded(tmp_path: Path, views: str, *words: str) -> config.Train:
    (tmp_path / "run.yaml").write_text(
        f"run: runs/one\ndata:\n  shards: [{tmp_path}]\nsteps: 3\nmethod:\n  name: simclr\n  views: {views}\n")
    return config.load_train(str(tmp_path / "run.yaml"), list(words))


@pytest.mark.parametrize("name", ["histology", "simclr", "moco_v2", "barlow", "moco_v2_kang", "barlow_kang", "ciga",
                                  "dehaene"])
def test_a_resolved_run_has_the_views_of_its_preset_and_reads_back(name: str, tmp_path: Path) -> None:
    first = loaded(tmp_path, f"{{preset: {name}}}", "method.views.size=64")
    views = config.method_config(first).views
    assert [asdict(view) | {"size": 224} for view in views] == [asdict(view) for view in PRESETS[name].views]
    assert {view.size for view in views} == {64}
    (tmp_path / "again.yaml").write_text(schema.dump(first))
    again = config.load_train(str(tmp_path / "again.yaml"), [])
    assert again == first
    assert config.method_config(again).views == views


@pytest.mark.parametrize(("views", "said"), [
    ("{preset: dino}", "SimCLR takes two of one size"), ("{preset: swav}", "SimCLR takes two of one size"),
    ("{preset: barlow, second: {size: 96}}", "SimCLR takes two of one size"),
    ("{preset: simclr, count: 3}", "SimCLR takes two of one size"),
    ("{preset: dinno}", "did you mean 'dino'"), ("{preset: simclr, hue: 0.6}", "hue=0.6 is out of range"),
    ("{preset: simclr, randstain: 0.5}", "randstain=0.5 needs data.stain"),
    ("{preset: barlow, second: {randstain: 0.5}}", "views[1].randstain=0.5 needs data.stain"),
    ("{preset: moco_v2_kang, basis: slide}", "basis='slide' needs data.stain"),
    ("{preset: simclr, basis: reference}", "basis='reference' needs data.stain"),
])
def test_a_run_that_cannot_be_is_refused_before_it_begins(views: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        loaded(tmp_path, views)
    assert error.value.exit_code == 2
    assert said in str(error.value)
    assert "method.views" in str(error.value) or said.startswith("SimCLR")


def test_a_view_that_moves_no_stain_needs_no_fit(tmp_path: Path) -> None:
    for views in ("{preset: simclr, basis: slide}", "{preset: moco_v2_kang, basis: slide, stained: 0.0}",
                  "{preset: simclr, randstain_mixture: true}"):
        assert loaded(tmp_path, views).data.stain is None


# ---- drawn

@pytest.fixture(scope="module")
def tiles(shard: Path) -> Iterator[Reader]:
    reader = Reader([shard], "train")
    yield reader
    reader.close()


@pytest.mark.parametrize("name", PAPERS)
def test_every_preset_is_drawn_by_the_loader(name: str, tiles: Reader) -> None:
    views = each(PRESETS[name].views)
    stream = Stream(tiles.counts, seed=3, window=2, batch=5)
    loader = Loader(tiles, stream, views, rank=0, world=1, device=torch.device("cpu"), threads=2, ahead=1)
    (batch,) = loader.batches(1, 2)
    expected = list(itertools.chain.from_iterable([paper] * paper["count"] for paper in PAPERS[name]))
    assert len(batch.views) == len(batch.boxes) == len(expected)
    for view, box, paper in zip(batch.views, batch.boxes, expected, strict=True):
        assert view.shape == (5, paper["size"], paper["size"], 3) and view.dtype == torch.uint8
        area = box[:, 2] * box[:, 3]
        assert ((area >= paper["scale"][0] - 1e-9) & (area <= paper["scale"][1] + 1e-9) | (area == 1)).all()
        assert view.float().std() > 2, "a view of nothing"
    for one, other in itertools.combinations(batch.boxes, 2):
        assert not np.array_equal(one, other), "two views are one"
