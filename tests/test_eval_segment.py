"""Maps of any size are those of one pass; thresholds, cleaning and Dice against loops; the choice without labels; and
the protocol over a run, on painted squares."""

import json
import os
import runpy
import shutil
from pathlib import Path

import numpy as np
import openslide
import pytest
import torch
from PIL import Image
from scipy import ndimage
from skimage.color import hed_from_rgb, rgb2hed
from skimage.filters import threshold_otsu

from shards import tiff, write
from shards.annotation import inside
from ssl_dist import checkpoint, cli, config, train
from ssl_dist.eval import blobs, confidence, pieces, segment
from ssl_dist.eval.segment import Look
from ssl_dist.eval.settings import CUTS, Confidence, Segment
from ssl_dist.models import encoder as encoders
from ssl_dist.models.encoder import Encoder
from ssl_dist.models.fcnn import SEES, SPREAD

one_thread = runpy.run_path(str(Path(__file__).with_name("small.py")))["one_thread"]
CPU = torch.device("cpu")
NETWORK = {"classes": 2, "dilations": [1, 2, 4]}


def network(sees: str = "colours") -> Encoder:
    torch.manual_seed(0)
    found = Encoder("fcnn", {**NETWORK, "sees": sees}, (0.0,) * 3, (1.0,) * 3)
    with torch.no_grad():
        for name, each in found.named_buffers():        # a BatchNorm that has seen something
            if "running_mean" in name:
                each.normal_(0, 0.2)
    return found.eval()


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---- maps in pieces

@pytest.mark.parametrize("sees", SEES)
@pytest.mark.parametrize("side", [20, 31, 64, 1000])
def test_a_map_in_pieces_is_the_map_of_one_pass(side: int, sees: str) -> None:
    encoder, picture = network(sees), noise(97, 71)
    alone = pieces.looked_at(encoder, picture)
    assert alone.std() > 0.01
    assert np.abs(pieces.whole(encoder, picture, side) - alone).max() < 1e-6


@pytest.mark.parametrize("side", [20, 1000])
def test_glass_has_no_confidence_wherever_pieces_lie(side: int) -> None:
    picture = np.full((90, 80, 3), 240, np.uint8)
    picture[:30, :25] = noise(30, 25) // 2
    sure, there = confidence.mapped(pieces.of_picture(picture), network("stains"), 0, (90, 80), side=side)
    assert sure[:30, :25].all() and not sure[30:].any() and not sure[:, 25:].any()
    assert not there[40:].any() and not there[:, 35:].any()


def test_pieces_without_their_rims_would_be_another_map() -> None:
    encoder, picture = network(), noise(97, 71)
    encoder.network.reach = 2
    assert np.abs(pieces.whole(encoder, picture, 31) - pieces.looked_at(encoder, picture)).max() > 1e-3


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("side", [40, 77])
def test_what_is_there_does_not_depend_on_pieces_either(side: int, cut: str) -> None:
    encoder, picture = network(), noise(150, 130)
    sure, there = confidence.mapped(pieces.of_picture(picture), encoder, 1, (150, 130), cut, side=side)
    alone = pieces.looked_at(encoder, picture)[1]
    assert np.abs(sure.astype(int) - np.rint(255 * alone)).max() <= 1
    assert np.array_equal(there, blobs.cleaned(blobs.there(alone, picture, cut)))
    if cut == "half":
        assert np.array_equal(there, blobs.cleaned(alone > 0.5))


def test_stains_are_seen_as_how_much_more_there_is_than_on_the_whole_picture() -> None:
    """Against scikit-image, whose amounts are in units of a millionth of the light."""
    picture = noise(40, 50)
    picture[:, :20] = 250       # glass, which does not count
    shown: list[torch.Tensor] = []
    found = network("stains")
    found.network.stem.register_forward_pre_hook(lambda _, given: shown.append(given[0]))
    pieces.looked_at(found, picture)
    amounts = rgb2hed(np.maximum(picture, 1) / 255) * -np.log(1e-6)
    raw = np.log(np.maximum(picture, 1) / 255) @ hed_from_rgb * -1     # rgb2hed leaves out what is less than nothing
    assert np.allclose(np.maximum(raw, 0), amounts, atol=1e-6)
    seen = shown[0][0].permute(1, 2, 0).numpy() * SPREAD + raw[(picture < 0.9 * 255).any(axis=2)].mean(axis=0)
    assert np.allclose(seen, raw, atol=1e-4)


# ---- what is there

def test_cleaning_is_opening_and_closing_by_disks() -> None:
    found = np.random.default_rng(0).random((60, 50)) > 0.45
    expected = np.pad(found, 40, mode="edge")
    for radius in (3, 1):
        y, x = np.mgrid[-radius:radius + 1, -radius:radius + 1]
        disk = x**2 + y**2 <= radius**2
        expected = ndimage.binary_closing(ndimage.binary_opening(expected, disk), disk)
    middle = slice(20, -20)         # at the rim conventions differ
    assert np.array_equal(blobs.cleaned(found)[middle, middle], expected[40:-40, 40:-40][middle, middle])


def test_cleaning_reaches_no_further_than_it_says() -> None:
    reach, rng = blobs.cleaning_reach(), np.random.default_rng(0)
    for _ in range(20):
        found = ndimage.gaussian_filter(rng.random((61, 61)), 1) > 0.5
        other = found.copy()
        other[[0, -1]], other[:, [0, -1]] = ~other[[0, -1]], ~other[:, [0, -1]]
        apart = blobs.cleaned(found) != blobs.cleaned(other)
        assert not apart[1 + reach:-1 - reach, 1 + reach:-1 - reach].any()


def test_dice_counts_pixels() -> None:
    one, other = (np.random.default_rng(seed).random((9, 7)) > 0.6 for seed in (0, 1))
    both = sum(bool(one[y, x]) and bool(other[y, x]) for y in range(9) for x in range(7))
    assert blobs.dice(one, other) == pytest.approx(2 * both / (one.sum() + other.sum()))
    nothing = np.zeros((3, 3), bool)
    assert blobs.dice(nothing, nothing) == 1


def test_otsu_parts_where_variance_within_is_least() -> None:
    values = np.concatenate([np.random.default_rng(0).normal(0, 1, 700), np.random.default_rng(1).normal(6, 2, 300)])
    def within(level: float) -> float:
        low, high = values[values <= level], values[values > level]
        return len(low) * low.var() + len(high) * high.var()

    levels = np.linspace(values.min() + 0.1, values.max() - 0.1, 500)
    best = min(levels, key=within)
    assert blobs.otsu(values) == pytest.approx(best, abs=(values.max() - values.min()) / blobs.BINS * 2)


def test_a_map_is_cut_where_otsu_s_threshold_parts_the_logits_of_what_is_no_glass() -> None:
    rng = np.random.default_rng(0)
    logit = np.concatenate([rng.normal(-1, 0.5, 3000), rng.normal(3, 0.7, 1000)]).reshape(40, 100)
    map_HW, picture = 1 / (1 + np.exp(-logit)), np.full((40, 100, 3), 200, np.uint8)
    map_HW[:, 90:], picture[:, 90:] = 0.999, 240        # glass, of which a network might say anything
    found = blobs.there(map_HW, picture, "otsu")[:, :90]
    level = threshold_otsu(logit[:, :90], nbins=200)
    assert np.mean(found == (logit[:, :90] > level)) > 0.995
    assert blobs.dice(found, logit[:, :90] > 1) > 0.98 > blobs.dice(blobs.there(map_HW, picture, "half")[:, :90],
                                                                   logit[:, :90] > 1)
    assert np.array_equal(blobs.there(map_HW, picture, "half"), map_HW > 0.5)
    for flat in (np.full((9, 9), 0.2), np.linspace(0.45, 0.49, 81).reshape(9, 9)):
        assert not blobs.there(flat, np.full((9, 9, 3), 100, np.uint8), "otsu").any(), "nothing to part"
    nothing = np.zeros((9, 9))
    assert not blobs.there(nothing, np.full((9, 9, 3), 255, np.uint8), "otsu").any(), "of glass alone"
    assert not blobs.there(nothing, np.full((9, 9, 3), 100, np.uint8), "otsu").any(), "of one level alone"


def squares(seed: int, ground: int = 220) -> tuple[np.ndarray, np.ndarray]:
    """Dark squares on bright ground, and where they are."""
    rng = np.random.default_rng(seed)
    picture, numbers = rng.integers(ground - 20, ground, (120, 120, 3), dtype=np.uint8), np.zeros((120, 120), np.int32)
    for number in range(1, 9):
        top, left = rng.integers(0, 100, 2)
        picture[top:top + 14, left:left + 14] = rng.integers(60, 90, (14, 14, 3))
        numbers[top:top + 14, left:left + 14] = number
    return picture, numbers


def test_the_best_level_of_grey_is_found_by_the_outlines_given() -> None:
    bank = [(picture, numbers > 0) for picture, numbers in map(squares, range(3))]
    found = blobs.Threshold("grey", bank)
    each = {level: np.mean([blobs.dice(blobs.grey(picture) < level, true) for picture, true in bank])
            for level in np.arange(20.0, 250.0, 2.0)}
    assert each[found.level] == max(each.values())
    assert 90 <= found.level <= 200
    assert blobs.dice(found(*squares(9)[:1]), squares(9)[1] > 0) > 0.95


# ---- the choice

def look(step: int, number: int, separation: float, stain: float, bank: float) -> Look:
    return Look(step, number, separation, stain, bank)


def test_without_labels_the_first_checkpoint_is_taken_from_which_the_chosen_class_is_flat() -> None:
    looks = [look(step, number, (0.4, 0.6)[number], (0.9, 0.1)[number], bank)
             for number in (0, 1) for step, bank in zip((10, 20, 30, 40), (0.1, 0.2, 0.9, 0.3), strict=True)]
    steps = np.arange(1, 41)
    curve = steps, np.stack([np.minimum(steps / 16, 1), steps / 40])
    chosen = segment.without_labels(looks, "haematoxylin", curve)
    assert (chosen.number, chosen.step) == (0, 20)
    later = segment.without_labels(looks, "separation", curve)
    assert (later.number, later.step) == (1, 40)
    for each in looks:          # labels decide nothing
        each.bank = -each.bank
    assert segment.without_labels(looks, "haematoxylin", curve) is chosen
    assert segment.without_labels(looks, "haematoxylin").step == 40, "without a curve, the last"


def test_a_curve_is_flat_from_where_the_mean_of_some_rows_is_nearly_its_largest() -> None:
    values = np.concatenate([np.linspace(0, 1, 50), np.ones(50)])
    noisy = values + np.random.default_rng(0).normal(0, 0.1, 100)
    means = [values[max(0, row - 19):row + 1].mean() for row in range(100)]
    expected = next(row for row in range(19, 100) if means[row] >= 0.95)
    assert segment.flat_from(np.arange(100), values) == expected
    assert abs(segment.flat_from(np.arange(100), noisy) - expected) < 10


# ---- files

def test_a_map_is_a_pyramid_that_openslide_opens(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (700, 523), dtype=np.uint8)
    tiff.write_map(tmp_path / "map.tif", values, 0.25)
    with openslide.OpenSlide(str(tmp_path / "map.tif")) as slide:
        assert slide.level_dimensions == ((523, 700), (262, 350), (131, 175))
        assert float(slide.properties[openslide.PROPERTY_NAME_MPP_X]) == pytest.approx(0.25, rel=1e-3)
        shown = np.asarray(slide.read_region((0, 0), 0, (523, 700)).convert("RGB"))
        assert np.array_equal(shown[..., 0], values)
        half = np.asarray(slide.read_region((0, 0), 1, (261, 350)).convert("RGB"))[..., 0]
    means = values[:, :522].reshape(350, 2, 261, 2).mean(axis=(1, 3))
    assert np.abs(half - means).max() <= 0.5


def told(folder: Path, **more: object) -> config.Train:
    return config.load_train("pretrain/patchseg", [
        f"run={folder / 'run'}", f"data.shards=[{folder / 'shards'}]", "data.batch=4", "device=cpu", "steps=4",
        "log.every=2", "log.pictures=0", "checkpoint.every=2", "checkpoint.keep=9", "method.views.size=64",
        "method.views.scale=[0.25,0.36]", "method.patch=12", "method.stride=6", "method.top=10",
        "encoder.args={classes: 2, dilations: [1, 2]}", *(f"{key}={value}" for key, value in more.items())])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Regions of dark squares, shards of them, and a short run."""
    folder = tmp_path_factory.mktemp("squares")
    for name in ("images", "labels"):
        (folder / "regions" / name).mkdir(parents=True)
    for number in range(12):
        picture, numbers = squares(number)
        stem = f"TCGA-AA-00{number:02}-region"
        Image.fromarray(picture).save(folder / "regions" / "images" / f"{stem}.png")
        Image.fromarray(numbers.astype(np.uint16)).save(folder / "regions" / "labels" / f"{stem}.png")
    write.write(write.Settings(source=folder / "regions" / "images", out=folder / "shards", dataset="squares",
                               kind="tiles", workers=1, mpp=[0.25], quality=100))
    assert train.train(told(folder)) == 0
    return folder


def test_a_run_goes_from_tiles_to_an_exported_network_with_its_separation_in_every_row(home: Path) -> None:
    rows = [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert all(row["separation"] == pytest.approx(row["between"] - row["within"], abs=1e-6) for row in rows)
    card = json.loads((home / "run" / "encoder" / "config.json").read_text())
    assert card["architecture"] == "fcnn"
    assert "2 maps of a picture" in (home / "run" / "encoder" / "README.md").read_text()
    loaded = encoders.load(home / "run" / "encoder").eval()
    assert loaded(torch.from_numpy(noise(40, 40)[None])).shape == (1, 2, 40, 40)
    assert encoders.trained_size(home / "run" / "encoder") == 64


def test_every_checkpoint_is_judged_and_labels_choose_beside_and_not_for_it(home: Path) -> None:
    asked = Segment(encoder=str(home / "run" / "encoder"), regions=home / "regions", every=2)
    found = segment.run(asked, CPU, 1, lambda *_: None)
    rows = found["curves"]["encoder"]
    assert [(row["step"], row["class"]) for row in rows] == [(2, 0), (2, 1), (4, 0), (4, 1)]
    assert found["baselines"].keys() == {"by_labels", "random", "otsu", "grey"}
    best = max(rows, key=lambda row: row["dice_bank"])
    assert (found["baselines"]["by_labels"]["step"], found["baselines"]["by_labels"]["class"]) == (
        best["step"], best["class"])
    assert found["baselines"]["grey"]["dice"] > 0.9
    assert found["intervals"]["dice"][0] <= found["metrics"]["dice"] <= found["intervals"]["dice"][1]
    assert found["seen_in_pretraining"]["patients"] == 6
    assert any("trained" in words for words in found["warnings"])
    # The exported network is the last checkpoint's: what is said of that, by hand.
    exported = encoders.load(home / "run" / "encoder").eval()
    known = segment.halves(asked)
    assert (len(known.bank), len(known.query)) == (6, 6)
    for half, said in ((known.bank, [row["dice_bank"] for row in rows if row["step"] == 4]),
                       (known.query, found["metrics"]["dice"] if found["step"] == 4 else None)):
        read = [each.read() for each in half]
        by_hand = [np.mean([blobs.dice(blobs.cleaned(pieces.looked_at(exported, each.image_HW3)[number] > 0.5),
                                       each.instances_HW > 0) for each in read]) for number in (0, 1)]
        if said is not None:
            assert said == pytest.approx(by_hand if isinstance(said, list) else by_hand[found["class"]], abs=1e-4)


def test_a_slide_and_a_picture_are_drawn_outlined_and_tiled(home: Path) -> None:
    picture = home / "regions" / "images" / "TCGA-AA-0003-region.png"
    found = confidence.run(Confidence(encoder=str(home / "run" / "encoder"), slides=[str(picture)], number=1,
                                      smallest=1), CPU, 1, lambda *_: None)
    out = home / "run" / "maps"
    exported = encoders.load(home / "run" / "encoder").eval()
    sure = pieces.looked_at(exported, np.asarray(Image.open(picture).convert("RGB")))[1]
    assert np.abs(np.asarray(Image.open(out / f"{picture.stem}.png")).astype(int) - np.rint(255 * sure)).max() <= 1
    drawn = np.zeros(sure.shape, bool)
    features = json.loads((out / f"{picture.stem}.geojson").read_text())["features"]
    assert len(features) == found["slides"][0]["objects"]
    for each in features:
        outer, *holes = (inside(np.array(ring[:-1]), *sure.shape[::-1]) for ring in each["geometry"]["coordinates"])
        for hole in holes:
            outer &= ~hole
        drawn |= outer
    assert np.array_equal(drawn, blobs.cleaned(sure > 0.5))
    with openslide.OpenSlide(str(out / f"{picture.stem}.tif")) as slide:
        assert slide.dimensions == sure.shape[::-1]


def test_a_whole_slide_is_mapped_in_its_own_coordinates(home: Path, slides: Path) -> None:
    first = sorted(slides.glob("*.svs"))[0]
    found = confidence.run(Confidence(encoder=str(home / "run" / "encoder"), slides=[str(first)], number=0, mpp=1.0,
                                      out=home / "slides"), CPU, 1, lambda *_: None)
    row = found["slides"][0]
    mapped = home / "slides" / f"{row['slide']}.tif"
    with openslide.OpenSlide(str(first)) as slide, openslide.OpenSlide(str(mapped)) as own:
        assert own.dimensions == (round(slide.dimensions[0] / 2), round(slide.dimensions[1] / 2))
    corners = [corner for each in json.loads((home / "slides" / f"{row['slide']}.geojson").read_text())["features"]
               for ring in each["geometry"]["coordinates"] for corner in ring]
    if corners:
        assert max(map(max, corners)) <= 1024 + 2


def test_a_broken_picture_costs_itself_alone_and_what_is_done_is_not_done_again(
        home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    whole = sorted((home / "regions" / "images").glob("*.png"))[:3]
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for path in whole:
        shutil.copy(path, pictures)
    broken = pictures / whole[1].name
    broken.write_bytes(whole[1].read_bytes()[:2000])
    drawn: list[str] = []
    monkeypatch.setattr(confidence, "_mapped", lambda source, *more, own=confidence._mapped: (
        drawn.append(source.slide), own(source, *more))[1])

    def call(*words: str) -> dict:
        drawn.clear()
        with pytest.raises(SystemExit) as ended:
            cli.evaluate("eval/confidence", [f"encoder={home / 'run' / 'encoder'}", f"slides=[{pictures}]", "number=1",
                                             f"out={tmp_path / 'maps'}", "device=cpu", "write=[png,geojson]", *words])
        result = json.loads((tmp_path / "maps" / "confidence.json").read_text())
        assert ended.value.code == (3 if result["failed"] else 0)
        return result

    first = call()
    assert first["failed"] == [broken.stem] and first["counts"]["slides"] == 2
    assert f"{broken.stem} cannot be read, and has no files" in capsys.readouterr().out
    assert call()["slides"] == first["slides"] and drawn == [broken.stem], "it is tried again, and nothing else"
    shutil.copy(whole[1], broken)
    assert call()["failed"] == [] and drawn == [broken.stem]
    assert call("smallest=3")["failed"] == [] and len(drawn) == 3, "outlined otherwise"
    (tmp_path / "maps" / f"{whole[2].stem}.geojson").unlink()
    assert call("smallest=3")["failed"] == [] and drawn == [whole[2].stem], "a file has gone"
    os.utime(pictures / whole[0].name, ns=(1, 1))
    broken.write_bytes(b"nothing")
    assert call("smallest=3")["failed"] == [broken.stem] and drawn == [whole[0].stem, broken.stem], "of other files"
    assert not list((tmp_path / "maps").glob(f"{broken.stem}*")), "no map of what it was before"


def test_which_class_is_drawn_is_asked_for_where_nobody_has_chosen(home: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="number=0 to number=1"):
        confidence.run(Confidence(encoder=str(_copied(home, tmp_path)), slides=[str(home / "regions" / "images")]),
                       CPU, 1, lambda *_: None)


def test_maps_are_of_the_step_that_was_chosen_of_this_very_encoder(home: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(home / "run", tmp_path / "run"))
    (run / "eval").mkdir(exist_ok=True)
    for path in (run / "eval").glob("segment*.json"):
        path.unlink()
    told = Confidence(encoder=str(run / "encoder"), slides=[str(home / "regions" / "images")], mpp=1.0)
    step = min(checkpoint.steps(run / "checkpoints"))
    chosen = {"step": step, "class": 1, "encoder": {"sha256": encoders.digest(run / "encoder")}}
    (run / "eval" / "segment.json").write_text(json.dumps({**chosen, "encoder": {"sha256": "of another"}}))
    assert confidence._chosen(told) == {}, "weights that are no more"
    (run / "eval" / "segment-2.json").write_text(json.dumps({**chosen, "cut": "otsu"}))
    (run / "eval" / "segment-3.json").write_text(json.dumps({**chosen, "class": 0}))
    os.utime(run / "eval" / "segment-3.json", ns=(1, 1))
    found = confidence._chosen(told)
    assert (found["cut"], found["by"]) == ("otsu", "segment-2.json"), "what was asked last"
    network, said = confidence._network(told, found)
    assert confidence._number(told, network, found) == 1 and not said
    weights = checkpoint.weights(run / "checkpoints" / checkpoint.name(step))
    assert all(torch.equal(each, weights[f"encoder.network.{name}"])
               for name, each in network.network.state_dict().items())
    shutil.rmtree(run / "checkpoints" / checkpoint.name(step))
    _, said = confidence._network(told, found)
    assert len(said) == 1 and f"chose step {step}, whose checkpoint is not kept" in said[0]


def _copied(home: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(home / "run" / "encoder", tmp_path / "encoder"))


def test_a_folder_that_holds_other_weights_is_refused(home: Path, tmp_path: Path) -> None:
    folder = _copied(home, tmp_path)
    card = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**card, "model_args": {"classes": 3}}))
    with pytest.raises(encoders.EncoderError, match="does not hold the weights"):
        encoders.load(folder)


def test_real_outlines_are_read_for_it(data: Path) -> None:
    known = segment.halves(Segment(encoder=str(data), regions=data / "monuseg2018" / "train", form="maps"))
    assert (len(known.bank), len(known.query)) == (24, 6)
    assert not {each.patient for each in known.bank} & {each.patient for each in known.query}
