"""Protocols of pixels from regions to files: split by patient, learn, find, and again on whole pictures by what was
kept."""

import json
import runpy
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from shards.index import ShardError
from ssl_dist import config
from ssl_dist.eval import dense, networks, nuclei, outline, protocol, semantic, summary
from ssl_dist.models.encoder import EncoderError

planted = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("planted.py"))))
CPU = torch.device("cpu")
SMALL = ["data.part=0.4", "data.query=", "window=48", "margin=8", "width=8", "fine=false", "epochs=[1,8]", "drop=6",
         "batches=[8,8]", "windows=8", "lr=5e-3", "jitter=0", "baselines=[]"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pixels")
    planted.regions(folder / "regions", count=5, size=64, nuclei=7)
    torch.manual_seed(0)
    planted.encoder(folder / "run" / "encoder")
    return folder


def told(home: Path, name: str, *words: str) -> object:
    return config.load_eval(f"eval/{name}", [f"encoder={home / 'run' / 'encoder'}", f"data.regions={home / 'regions'}",
                                             *SMALL, *words])


def run(module: object, settings: object) -> dict:
    return protocol.repeated(lambda one: module.run(one, CPU, 1, lambda *_: None), settings)


@pytest.fixture(scope="module")
def result(home: Path) -> dict:
    return run(nuclei, told(home, "nuclei", "kernel=3", "write=[png,geojson,npy]"))


def test_nuclei_are_found_and_every_file_tells_of_the_same(home: Path, result: dict) -> None:
    out = home / "run" / "eval"
    assert json.loads((out / "nuclei.json").read_text()) == json.loads(json.dumps(result))
    assert result["metrics"]["dice"] > 0.6 and result["metrics"]["pq"] > 0.1
    assert result["classes"] == ["violet", "blue"] and {"mpq", "f1_violet", "f1_blue"} <= result["metrics"].keys()
    assert np.shape(result["confusion"]) == (2, 2)
    assert (result["counts"]["bank"], result["counts"]["queries"], result["counts"]["shared_patients"]) == (3, 2, 0)
    first, last = result["curves"]["encoder"][0], result["curves"]["encoder"][-1]
    assert last["loss"] < first["loss"] / 2 and last["epoch"] == 9
    for told_of in result["regions"]:
        base = out / "nuclei-regions" / told_of["region"].replace("/", "_")
        numbers_HW = np.asarray(Image.open(f"{base}.png"))
        assert (numbers_HW == np.load(f"{base}.npy")).all() and numbers_HW.max() == told_of["found"]
        features = json.loads(Path(f"{base}.geojson").read_text())["features"]
        assert len(features) == told_of["found"]
        assert {each["properties"]["classification"]["name"] for each in features} <= {"violet", "blue"}
    assert all((out / name).is_file() and name in result["captions"] for name in result["pictures"])
    lines = "\n".join(summary.lines(result))
    assert "pq 0." in lines and "2 patients are asked about, too few for intervals" in lines


def test_the_network_that_is_kept_finds_the_same_on_the_picture_again(home: Path, result: dict) -> None:
    region = result["regions"][0]["region"]
    picture = home / "regions" / f"{region}.png"
    settings = config.load_eval("eval/outline", [
        f"network={home / 'run' / 'eval' / 'nuclei-network'}", f"slides=[{picture}]", "write=[npy,geojson]",
        f"out={home / 'outlines'}", "batch=3"])
    assert outline.rehearse(settings)["slides"] == 1
    found = outline.run(settings, CPU, 1, lambda *_: None)
    once = home / "run" / "eval" / "nuclei-regions" / region.replace("/", "_")
    again = home / "outlines" / picture.stem
    # Batches of another size may round otherwise, by the last bit of a likelihood.
    assert np.mean(np.load(f"{again}.npy") == np.load(f"{once}.npy")) > 0.999
    assert found["counts"]["nuclei"] == result["regions"][0]["found"]
    rows = (home / "outlines" / f"{picture.stem}.csv").read_text().splitlines()
    assert len(rows) == 1 + found["counts"]["nuclei"] and rows[0].startswith("number,x,y,pixels,type")
    assert "nuclei of 1 slides" in next(iter(summary.lines(found)))
    files = [home / "outlines" / f"{picture.stem}.{form}" for form in ("npy", "geojson", "csv")]
    written = [each.stat().st_mtime_ns for each in files]
    more = replace(settings, slides=[*settings.slides, str(home / "broken.png")])
    (home / "broken.png").write_bytes(picture.read_bytes()[:1000])
    both = outline.run(more, CPU, 1, lambda *_: None)
    assert both["failed"] == ["broken"] and both["slides"] == found["slides"]
    assert [each.stat().st_mtime_ns for each in files] == written, "what is done is not done again"
    outline.run(replace(settings, precision="bf16"), CPU, 1, lambda *_: None)
    assert all(each.stat().st_mtime_ns > before for each, before in zip(files, written, strict=True))


def test_a_slide_is_outlined_in_level_0_pixels_at_the_resolution_that_was_learnt(home: Path, result: dict,      # noqa: ARG001
                                                                                 tmp_path: Path) -> None:
    from shards import tiff

    numbers_HW = planted.ellipses((300, 280), 40, 9, axes=(10, 26))
    image = planted.painted(numbers_HW, ((numbers_HW > 0) * 1).astype(np.uint8), 0)
    tiff.write_pyramid(tmp_path / "s.svs", image, 0.125, 95)
    settings = config.load_eval("eval/outline", [f"network={home / 'run' / 'eval' / 'nuclei-network'}",
                                                 f"slides=[{tmp_path / 's.svs'}]", f"out={tmp_path}",
                                                 "write=[npy,geojson]"])
    found = outline.run(settings, CPU, 1, lambda *_: None)
    assert found["slides"][0]["pixels"] == [150, 140]               # 0.25 of 0.125
    features = json.loads((tmp_path / "s.geojson").read_text())["features"]
    corners = np.concatenate([np.array(each["geometry"]["coordinates"][0]) for each in features])
    assert corners.max() > 200 and (corners <= (280, 300)).all()
    hit = [numbers_HW[int(y), int(x)] > 0 for x, y in (
        np.array(each["geometry"]["coordinates"][0]).mean(axis=0) for each in features)]
    assert np.mean(hit) > 0.5


def test_shares_of_the_labels_lie_in_each_other_and_are_told(home: Path) -> None:
    known = dense.halves(told(home, "nuclei"))
    few, more = (dense.shared(known.bank, share, 0) for share in (0.4, 0.7))
    assert len(few) == 1 and len(more) == 2 and {each.name for each in few} <= {each.name for each in more}
    found = run(semantic, told(home, "semantic", "shares=[0.4,1]", "baselines=[random]", "epochs=[0,1]",
                               f"out={home}/s"))
    assert [row["regions"] for row in found["labels"]["encoder"]] == [1, 3]
    assert found["labels"]["random"][1]["dice"] == found["baselines"]["random"]["dice"]
    assert "by the part of the labels: 40% dice" in "\n".join(summary.lines(found))


def test_a_unet_learns_what_every_pixel_is(home: Path) -> None:
    found = run(semantic, told(home, "semantic"))
    assert found["metrics"]["dice"] > 0.5 and found["classes"] == ["background", "violet", "blue"]
    assert 0 < found["metrics"]["iou"] < found["metrics"]["dice"]
    assert sum(map(sum, found["confusion"])) == 2 * 64 * 64


def test_dice_and_iou_are_those_of_plain_counting() -> None:
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 3, (2, 500)), rng.integers(0, 3, (2, 500))
    from ssl_dist.eval import metrics
    counts = np.array([metrics.confusion(*pair, 3) for pair in zip(truth, guess, strict=True)])
    found = semantic.measured(counts, ["background", "a", "b"])(None)
    dices, ratios = [], []
    for kind in (1, 2):
        both, either = ((truth == kind) & (guess == kind)).sum(), ((truth == kind) | (guess == kind)).sum()
        dices.append(2 * both / ((truth == kind).sum() + (guess == kind).sum()))
        ratios.append(both / either)
    assert (found["dice"], found["iou"]) == pytest.approx((np.mean(dices), np.mean(ratios)))
    assert found["dice_a"] == pytest.approx(dices[0])


def test_types_are_taken_together_and_patients_never_on_both_sides(home: Path, tmp_path: Path) -> None:
    together = dense.halves(told(home, "nuclei", "data.types={any: [violet, blue]}"))
    assert together.classes == ["any"]
    pixels = together.retyped(together.bank[0].read())
    assert {*np.unique(pixels.types_HW)} == {0, 1}
    with pytest.raises(ShardError, match=r"types has 'green'; types of .* are violet, blue"):
        dense.halves(told(home, "nuclei", "data.types={any: [green]}"))
    for seed in range(4):
        known = dense.halves(told(home, "nuclei", f"seed={seed}"))
        assert not {each.patient for each in known.bank} & {each.patient for each in known.query}
        assert len(known.bank) + len(known.query) == 5
    for split in ("Train", "Test"):
        for kind in ("images", "labels"):
            (tmp_path / split / kind).mkdir(parents=True)
            Image.new("L" if kind == "labels" else "RGB", (32, 32)).save(tmp_path / split / kind / f"P1_{split}.png")
    with pytest.raises(ShardError, match="1 patients have regions on both sides"):
        dense.halves(told(home, "nuclei", f"data.regions={tmp_path}", "data.query=test",
                          "data.names=(?P<patient>P1)_"))
    with pytest.raises(ShardError, match=r"no region below .* is of split 'valid'; splits are test, train"):
        dense.halves(told(home, "nuclei", f"data.regions={tmp_path}", "data.query=valid"))


def test_rehearsal_says_what_would_be_done_and_a_damaged_network_is_refused(home: Path, tmp_path: Path) -> None:
    said = nuclei.rehearse(told(home, "nuclei"))
    assert (said["regions to learn from"], said["regions asked about"], said["types"]) == (3, 2, "violet, blue")
    assert semantic.rehearse(told(home, "semantic"))["decoders"].endswith("weights")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EncoderError, match="is no network that eval/nuclei has written"):
        networks.load(tmp_path)


@pytest.mark.parametrize(("word", "said"), [
    ("margin=24", r"margin=24 leaves nothing of window=48"), ("epochs=[1]", r"epochs has 1 values, not two"),
    ("epochs=[0,0]", "nothing would be learnt"), ("width=10", "no multiple of 4"),
    ("baselines=[colours]", "neither random, nor an encoder's folder")])
def test_settings_that_mean_nothing_are_refused(home: Path, word: str, said: str) -> None:
    with pytest.raises(config.ConfigError, match=said):
        told(home, "nuclei", word)


def test_a_region_without_types_among_others_and_one_that_is_torn_are_refused_before_anything_learns(
        home: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(home / "regions", tmp_path / "regions"))
    first, *_, last = sorted((own / "types").iterdir())
    for gone in (first, last):          # whichever is the first to be looked at
        content = gone.read_bytes()
        gone.unlink()
        for module in (nuclei, semantic):
            with pytest.raises(ShardError, match=f"region images/{gone.stem} has no map of types"):
                module.rehearse(told(home, module.__name__.rpartition(".")[2], f"data.regions={own}"))
        gone.write_bytes(content)
    picture = sorted((own / "images").iterdir())[-1]
    picture.write_bytes(picture.read_bytes()[:200])
    with pytest.raises(ShardError, match="is not a readable image"):
        nuclei.rehearse(told(home, "nuclei", f"data.regions={own}"))
