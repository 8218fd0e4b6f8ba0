"""An encoder as one file: read by another program, in a process without timm and without us, with equal features."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_dist import export
from ssl_dist.models import encoder as encoders
from ssl_dist.models.encoder import Encoder

NETWORKS = {"resnet": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}),
            "vit": ("vit_tiny_patch16_224", {"img_size": 48, "patch_size": 8, "embed_dim": 24, "depth": 2,
                                             "num_heads": 3})}
READ = {"onnx": """
    import onnxruntime
    session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: pixels})[0]
    """, "torchscript": """
    import torch
    found = torch.jit.load(sys.argv[1])(torch.from_numpy(pixels)).numpy()
    """}
PROGRAM = """
import sys
import numpy as np
for count in (1, 3):
    pixels = np.load(sys.argv[2])[:count]
{read}
    np.save(f"{{sys.argv[3]}}-{{count}}.npy", found)
assert not {{"timm", "ssl_dist"}} & set(sys.modules)
"""


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("kind", READ)
def test_another_program_computes_the_same_features(kind: str, network: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    name, args = NETWORKS[network]
    encoder = Encoder(name, args, (0.7, 0.5, 0.6), (0.2, 0.25, 0.3))
    for each in encoder.modules():          # statistics as after a training, not those of a first day
        if isinstance(each, torch.nn.BatchNorm2d):
            each.running_mean.uniform_(-0.3, 0.3)
            each.running_var.uniform_(0.5, 2)
    encoder.save(tmp_path / "encoder", 48, {})
    path = export.portable(tmp_path / "encoder", kind)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8)
    np.save(tmp_path / "pixels.npy", pixels)
    subprocess.run([sys.executable, "-P", "-c", PROGRAM.format(read=READ[kind]), str(path),
                    str(tmp_path / "pixels.npy"), str(tmp_path / "found")], check=True, cwd=tmp_path)
    with torch.inference_mode():
        truth = encoders.load(tmp_path / "encoder").eval()(torch.from_numpy(pixels)).numpy()
    assert truth.std() > 0.01
    for count in (1, 3):
        assert np.load(tmp_path / f"found-{count}.npy") == pytest.approx(truth[:count], abs=1e-5, rel=1e-4)
    assert not list((tmp_path / "encoder").glob(".*"))
    if kind == "onnx":      # it travels, and where it was made is nobody's business
        assert str(Path(export.__file__).parent).encode() not in path.read_bytes()
        assert str(Path(torch.__file__).parent).encode() not in path.read_bytes()


def test_without_what_writes_onnx_it_is_said_and_nothing_is_left(tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    Encoder("test_resnet", {}, (0.5,) * 3, (0.5,) * 3).save(tmp_path / "encoder", 32, {})
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(export.NotPortable, match=r"ssl_dist\[onnx\]"):
        export.portable(tmp_path / "encoder", "onnx")
    assert {path.name for path in (tmp_path / "encoder").iterdir()} == {"config.json", "model.safetensors"}
