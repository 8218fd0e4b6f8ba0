"""Encoders: timm's networks and nothing else, before and after a folder of files."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from ssl_dist import config
from ssl_dist.models import encoder as encoders
from ssl_dist.models.batchnorm import SyncBatchNorm, synchronise
from ssl_dist.models.encoder import Encoder, EncoderError

MEAN, STD = (0.7, 0.5, 0.6), (0.2, 0.25, 0.3)
NETWORKS = {
    "plain": ("test_resnet", {}, 64),
    "with args": ("test_vit", {"img_size": 48, "patch_size": 16, "depth": 2, "class_token": False,
                               "global_pool": "avg"}, 48),
    "with a list": ("test_resnet", {"channels": [16, 24, 32, 40], "layers": [1, 1, 2, 1]}, 64),
    "a wider head": ("mobilenetv3_small_050", {}, 64),
}

# What a stranger has: timm, torch, and a folder of exported folders.
STRANGER = """
import sys, timm, torch
from pathlib import Path
for folder in Path(sys.argv[1]).iterdir():
    network = timm.create_model(f"local-dir:{folder / 'encoder'}", pretrained=True, num_classes=0).eval()
    config = timm.data.resolve_data_config(model=network)
    mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        features = network((torch.load(folder / "pixels.pt").permute(0, 3, 1, 2) / 255.0 - mean) / std)
    torch.save({"features": features, "input": list(config["input_size"])}, folder / "theirs.pt")
assert not [name for name in sys.modules if name.split(".")[0] in ("ssl_dist", "shards")]
"""


def pixels(size: int, count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)


def trained(which: str) -> Encoder:
    """An encoder with weights and running statistics that are not those of a fresh one."""
    name, args, size = NETWORKS[which]
    torch.manual_seed(3)
    found = Encoder(name, args, MEAN, STD)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        found.train()(pixels(size, 8))
    return found.eval()


@pytest.mark.parametrize(("name", "parameters", "width"), [("resnet18", 11_176_512, 512),
                                                           ("vit_small_patch16_224", 21_665_664, 384)])
def test_the_networks_of_the_papers_have_their_number_of_parameters(name: str, parameters: int, width: int) -> None:
    with torch.device("meta"):
        found = Encoder(name, {}, MEAN, STD)
    assert sum(parameter.numel() for parameter in found.parameters()) == parameters
    assert found.width == width


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_mambaout", "mobilenetv3_small_050"])
def test_the_width_is_the_width_of_what_comes_out(name: str) -> None:
    found = Encoder(name, {}, MEAN, STD).eval()
    assert found(pixels(64)).shape == (3, found.width)


def test_pixels_are_normalised_as_a_plain_loop_does() -> None:
    found = trained("plain")
    given = pixels(64)
    expected = np.empty((3, 3, 64, 64), dtype=np.float32)
    for band in range(3):
        expected[:, band] = (given[..., band].numpy() / 255 - MEAN[band]) / STD[band]
    torch.testing.assert_close(found(given), found.network(torch.from_numpy(expected)), rtol=1e-4, atol=1e-5)


def test_the_constants_of_normalisation_are_no_weights() -> None:
    found = trained("plain")
    assert all(name.startswith("network.") for name in found.state_dict())
    assert list(found.network.state_dict()) == list(timm.create_model("test_resnet", num_classes=0).state_dict())


@pytest.fixture(scope="module")
def abroad(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    """Every network exported, and loaded in a process that knows nothing of us."""
    root, kept = tmp_path_factory.mktemp("abroad"), {}
    for which in [*NETWORKS, "synchronised"]:
        name = "plain" if which == "synchronised" else which
        found, size = trained(name), NETWORKS[name][2]
        with torch.no_grad():
            expected = found(pixels(size))
        if which == "synchronised":
            synchronise(found)
            assert any(isinstance(module, SyncBatchNorm) for module in found.modules())
            found.to(memory_format=torch.channels_last)
        found.save(root / which / "encoder", size, {"method": "a test"})
        torch.save(pixels(size), root / which / "pixels.pt")
        kept[which] = root / which, found, expected
    done = subprocess.run([sys.executable, "-c", STRANGER, str(root)], cwd=root, env={"HF_HUB_OFFLINE": "1"},
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return kept


@pytest.mark.parametrize("which", [*NETWORKS, "synchronised"])
def test_timm_alone_gives_the_same_features_from_the_exported_folder(which: str, abroad: dict[str, tuple]) -> None:
    folder, found, expected = abroad[which]
    size = NETWORKS.get(which, NETWORKS["plain"])[2]
    theirs = torch.load(folder / "theirs.pt")
    torch.testing.assert_close(theirs["features"], expected, rtol=1e-5, atol=1e-5)
    assert theirs["input"] == [3, size, size]
    again = encoders.load(folder / "encoder").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(pixels(size)), expected, rtol=1e-5, atol=1e-5)
    assert (again.width, again.mean, again.std) == (found.width, MEAN, STD)
    written = json.loads((folder / "encoder/config.json").read_text())
    assert written["ssl_dist"] == {"method": "a test"}
    strangers = [key for key in ("hf_hub_id", "url", "origin_url", "paper_ids") if written["pretrained_cfg"].get(key)]
    assert not strangers, "the card tells of somebody else's weights"


def test_what_was_loaded_can_be_exported_again(tmp_path: Path) -> None:
    for which in ("with args", "with a list"):
        first, second = tmp_path / which / "first", tmp_path / which / "second"
        trained(which).save(first, NETWORKS[which][2], {})
        encoders.load(first).save(second, NETWORKS[which][2], {})
        assert encoders.digest(first) == encoders.digest(second)
        assert json.loads((first / "config.json").read_text()) == json.loads((second / "config.json").read_text())


def test_building_a_folder_gives_fresh_weights_of_the_same_shape(tmp_path: Path) -> None:
    for which in ("with args", "with a list"):
        found = trained(which)
        found.save(tmp_path / which, NETWORKS[which][2], {})
        fresh = encoders.build(tmp_path / which)
        mine, theirs = found.network.state_dict(), fresh.network.state_dict()
        assert list(mine) == list(theirs)
        assert [value.shape for value in mine.values()] == [value.shape for value in theirs.values()]
        matrices = [name for name, value in mine.items() if value.ndim > 1]
        assert matrices
        assert not any(torch.equal(mine[name], theirs[name]) for name in matrices)


def test_nothing_is_saved_that_a_single_weight_does_not_survive(tmp_path: Path) -> None:
    found = trained("plain")
    found.save(tmp_path / "encoder", 64, {})
    again = encoders.load(tmp_path / "encoder")
    assert isinstance(again.network, nn.Module)
    for name, value in found.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], value), name


# ---- what is refused

def harmed(kind: str, folder: Path) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    if kind == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif kind == "no weights":
        weights.unlink()
    elif kind == "no config":
        config.unlink()
    elif kind == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "no header":
        weights.write_bytes(b"")
    elif kind == "cut config":
        config.write_text(config.read_text()[:50])
    elif kind == "somebody else's":
        config.write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    elif kind == "a list":
        config.write_text("[1, 2]")
    elif kind == "other weights":
        Encoder("test_efficientnet", {}, MEAN, STD).save(folder / "other", 64, {})
        shutil.copy(folder / "other/model.safetensors", weights)
    elif kind == "unknown architecture":
        config.write_text(config.read_text().replace("test_resnet", "test_resnot"))


@pytest.mark.parametrize("kind", ["empty", "no weights", "no config", "cut weights", "no header", "cut config",
                                  "somebody else's", "a list", "other weights", "unknown architecture"])
def test_a_folder_that_is_no_sound_export_is_refused_with_its_name(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    trained("plain").save(folder, 64, {})
    harmed(kind, folder)
    with pytest.raises(EncoderError) as refused:
        encoders.load(folder)
    assert refused.value.exit_code == 2
    assert str(folder) in str(refused.value) or "test_resnot" in str(refused.value)


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="not an exported encoder"):
        encoders.load(tmp_path / "nowhere")


@pytest.mark.parametrize(("wrong", "right"), [
    ("resnet81", "resnet18"), ("resnte18", "resnet18"), ("ResNet18", "resnet18"),
    ("vit_smal_patch16_224", "vit_small_patch16_224"),
])
def test_an_unknown_architecture_names_those_near_it(wrong: str, right: str) -> None:
    with pytest.raises(EncoderError) as refused:
        Encoder(wrong, {}, MEAN, STD)
    assert wrong in str(refused.value)
    assert right in str(refused.value).replace(wrong, "").replace(",", " ").split()
    assert refused.value.exit_code == 2


def test_an_argument_that_the_network_does_not_know_is_named_and_no_other_network_is_proposed() -> None:
    with pytest.raises(EncoderError, match="'depht': 3") as refused:
        Encoder("resnet18", {"depht": 3}, MEAN, STD)
    assert "near it" not in str(refused.value)


def test_null_takes_an_argument_of_a_recipe_away() -> None:
    found = Encoder("test_resnet", {"stem_type": None, "channels": [16, 24, 32, 40]}, MEAN, STD)
    assert found.args == {"channels": [16, 24, 32, 40]}


@pytest.mark.parametrize(("args", "needle"), [({"{img_size:64}": None}, "a space follows each colon"),
                                              ({"in_chans": 1}, "3 channels")])
def test_what_is_no_argument_or_none_for_tiles_is_refused(args: dict, needle: str) -> None:
    (broken,) = config.Encoder(args=args).rules()
    assert needle in broken
    assert config.Encoder(args={"img_size": 64, "in_chans": 3}).rules() == []


def test_a_network_that_gives_no_vectors_is_refused() -> None:
    with pytest.raises(EncoderError, match="features_only"):
        Encoder("test_resnet", {"features_only": True}, MEAN, STD)


@pytest.mark.parametrize(("name", "args", "good", "bad"), [
    ("vit_tiny_patch16_224", {"img_size": 64}, 64, 96),
    ("vit_tiny_patch16_224", {"img_size": 64, "dynamic_img_size": True}, 96, 100),
    ("swin_tiny_patch4_window7_224", {}, 224, 64),
    ("mixer_s16_224", {}, 224, 192)])
def test_tiles_that_a_network_does_not_take_are_refused_before_it_has_weights(name: str, args: dict, good: int,
                                                                             bad: int) -> None:
    with torch.device("meta"):
        found = Encoder(name, args, MEAN, STD).eval()
    found.tries(2, good)
    with pytest.raises(EncoderError, match=rf"no 2 tiles of {bad} pixels .*encoder\.args\.img_size={bad}"):
        found.tries(2, bad)
