"""The house rules: who imports whom, one door a library, importing does nothing, and the README tells the truth."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("shards", "ssl_dist", "launch")
FILES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# module (or package) -> what of ours it may import. The longest prefix that fits a file decides.
MAY_IMPORT = {
    "shards": ["shards"],
    "launch": ["launch"],
    "ssl_dist": ["ssl_dist.notebook"],          # `from ssl_dist import Run`; nobody else does
    "ssl_dist.schema": [],
    "ssl_dist.points": [],
    "ssl_dist.config": ["ssl_dist.schema", "ssl_dist.schedule", "ssl_dist.methods", "ssl_dist.points",
                        "ssl_dist.eval.settings"],
    "ssl_dist.eval.settings": ["ssl_dist.models"],
    "ssl_dist.collapse": [],
    "ssl_dist.dist": ["ssl_dist.points", "launch.rank"],
    "ssl_dist.finite": ["ssl_dist.dist", "ssl_dist.data.batch", "shards.folder"],
    "ssl_dist.watch": ["ssl_dist.points", "ssl_dist.lock", "shards.folder", "launch.account"],
    "ssl_dist.status": [],
    "ssl_dist.jobs": ["launch", "ssl_dist.config", "ssl_dist.schema", "ssl_dist.lock", "shards.folder",
                      "shards.catalogue", "shards.settings", "ssl_dist.slides", "ssl_dist.chain"],
    "ssl_dist.slides": ["ssl_dist.models", "shards.settings", "ssl_dist.data.view"],
    "ssl_dist.embed": ["ssl_dist.slides", "ssl_dist.data.opencv", "ssl_dist.eval", "ssl_dist.models", "shards"],
    "ssl_dist.draw": ["ssl_dist.slides", "ssl_dist.data", "ssl_dist.eval", "ssl_dist.models", "shards"],
    "ssl_dist.scaling": ["shards.folder"],
    "ssl_dist.lock": ["shards.folder"],
    "ssl_dist.schedule": [],
    "ssl_dist.data": ["ssl_dist.data", "ssl_dist.dist", "shards.index", "shards.jpeg", "shards.arrays", "shards.draws"],
    "ssl_dist.models": ["ssl_dist.models", "ssl_dist.dist", "ssl_dist.points"],
    "ssl_dist.methods": ["ssl_dist.methods", "ssl_dist.models", "ssl_dist.data.batch",
                         "ssl_dist.data.presets", "ssl_dist.dist", "ssl_dist.schedule"],
    "ssl_dist.optim": ["ssl_dist.config", "ssl_dist.dist"],
    "ssl_dist.engine": ["ssl_dist.config", "ssl_dist.dist", "ssl_dist.data.batch"],
    "ssl_dist.log": ["ssl_dist.config", "ssl_dist.dist", "ssl_dist.data.batch", "ssl_dist.data.reader",
                     "shards.folder"],
    "ssl_dist.run": ["ssl_dist.dist", "ssl_dist.lock", "ssl_dist.watch", "shards.folder", "launch.rank"],
    "ssl_dist.checkpoint": ["ssl_dist.config", "ssl_dist.dist", "ssl_dist.engine", "ssl_dist.finite", "ssl_dist.points",
                            "shards.folder"],
    "ssl_dist.provenance": ["ssl_dist.config", "ssl_dist.data.reader", "ssl_dist.models", "shards.index"],
    "ssl_dist.card": ["ssl_dist.provenance", "ssl_dist.config", "ssl_dist.schema", "ssl_dist.data.reader",
                      "ssl_dist.models", "shards.folder"],
    "ssl_dist.export": ["ssl_dist.card", "ssl_dist.config", "ssl_dist.data.reader", "ssl_dist.models", "shards.folder",
                        "shards.index", "ssl_dist"],
    "ssl_dist.eval": ["ssl_dist.eval", "ssl_dist.models", "ssl_dist.data", "ssl_dist.dist", "ssl_dist.config",
                      "ssl_dist.log", "ssl_dist.engine", "ssl_dist.optim", "ssl_dist.schedule", "ssl_dist.checkpoint",
                      "shards"],
    "ssl_dist.report": ["ssl_dist.report"],
    "ssl_dist.notebook": ["ssl_dist.report", "ssl_dist.models", "ssl_dist.status"],
    "ssl_dist.doctor": [],
    "ssl_dist.chain": ["shards.synthetic", "shards.folder", "ssl_dist.schema", "ssl_dist.config"],
    "ssl_dist.demo": ["shards.synthetic", "shards.folder", "ssl_dist.chain"],
    "ssl_dist.sheet": ["ssl_dist.data"],
    "ssl_dist.bench": ["ssl_dist.config", "ssl_dist.data", "ssl_dist.run", "ssl_dist.schema"],
    "ssl_dist.train": ["ssl_dist", "shards", "launch.account"],
    "ssl_dist.cli": ["ssl_dist", "shards", "launch"],
    "ssl_dist.__main__": ["ssl_dist.cli"],
}
NOBODY_IMPORTS = {"ssl_dist.train": ["ssl_dist.cli"], "ssl_dist.cli": ["ssl_dist.__main__"],
                  "ssl_dist.notebook": ["ssl_dist"]}
DOORS = {
    "openslide": "shards/slide.py", "nvidia": "ssl_dist/data/dali.py", "cv2": "ssl_dist/data/opencv.py",
    "timm": "ssl_dist/models/encoder.py", "deepspeed": "ssl_dist/engine.py", "submitit": "launch/slurm.py",
    "tifffile": "shards/tiff.py", "simplejpeg": "shards/jpeg.py", "h5py": "shards/arrays.py",
    "typer": "ssl_dist/cli.py", "omegaconf": "ssl_dist/schema.py", "jinja2": "ssl_dist/report/page.py",
    "fsspec": "ssl_dist/data/stage.py", "skimage": "ssl_dist/eval/watershed.py",
}
NEVER_TORCH = ("shards", "launch", "ssl_dist/report", "ssl_dist/schema.py", "ssl_dist/config.py", "ssl_dist/cli.py",
               "ssl_dist/eval/settings.py", "ssl_dist/slides.py")


def module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> list[str]:
    """Every module a file imports, at any depth of it, as full names."""
    found = []
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; write the full name"
            found.append(str(node.module))
            found += [f"{node.module}.{alias.name}" for alias in node.names if is_module(f"{node.module}.{alias.name}")]
    return found


def is_module(name: str) -> bool:
    base = ROOT / Path(*name.split("."))
    return base.with_suffix(".py").exists() or (base / "__init__.py").exists()


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_only_what_its_place_in_the_house_allows(path: Path) -> None:
    own = module(path)
    rule = max((place for place in MAY_IMPORT if inside(own, place)), key=len)
    for name in imports(path):
        if not any(inside(name, package) for package in PACKAGES):
            continue
        packages = [each for each in imports(path) if inside(each, name) and each != name]
        if packages and (ROOT / Path(*name.split(".")) / "__init__.py").exists():
            continue            # `from shards import folder` names the package and the module; the module is judged
        assert any(inside(name, allowed) for allowed in MAY_IMPORT[rule]), f"{path} may not import {name}"


@pytest.mark.parametrize(("target", "allowed"), NOBODY_IMPORTS.items())
def test_nobody_imports_what_stands_on_top(target: str, allowed: list[str]) -> None:
    users = [module(path) for path in FILES if target in imports(path)]
    assert set(users) <= set(allowed)


@pytest.mark.parametrize(("library", "door"), DOORS.items())
def test_a_heavy_library_has_one_door(library: str, door: str) -> None:
    users = [str(path) for path in FILES if any(inside(name, library) for name in imports(path))]
    assert users == [door] or (not users and not (ROOT / door).exists())


@pytest.mark.parametrize("path", [path for path in FILES if str(path).startswith(NEVER_TORCH)], ids=str)
def test_what_runs_without_torch_never_names_it(path: Path) -> None:
    assert not [name for name in imports(path) if inside(name, "torch")]


def test_no_file_has_a_name_that_means_i_did_not_decide() -> None:
    assert not [path for path in FILES if path.stem in ("utils", "util", "helpers", "helper", "common", "misc", "core")]


def test_importing_does_nothing(tmp_path: Path) -> None:
    """Every module in one process: no thread, no file, no word, no process group, no signal handler is left behind."""
    names = [module(path) for path in FILES if path.stem != "__main__"]
    program = f"""
import importlib, json, os, signal, sys, threading
handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)]
torch_by = None
for name in {sorted(names, key=lambda name: (not name.startswith(('shards', 'launch', 'ssl_dist.report')), name))!r}:
    importlib.import_module(name)
    if torch_by is None and "torch" in sys.modules:
        torch_by = name
import torch.distributed
threads = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
print(json.dumps(dict(
    threads=threads, files=os.listdir("."), group=torch.distributed.is_initialized(), torch_by=torch_by,
    handlers=handlers == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)],
    deepspeed="deepspeed" in sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True,
                          env={**clean_environment(), "PYTHONPATH": str(ROOT)})
    assert done.stdout.count("\n") == 1, f"an import prints: {done.stdout}"
    seen = json.loads(done.stdout)
    assert seen["torch_by"].startswith("ssl_dist."), seen["torch_by"]
    assert not seen["torch_by"].startswith("ssl_dist.report")
    assert {**seen, "torch_by": None} == {"threads": [], "files": [], "group": False, "torch_by": None,
                                          "handlers": True, "deepspeed": False}


def test_the_command_line_starts_without_anything_heavy() -> None:
    program = "import ssl_dist.cli, sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                          env={**clean_environment(), "PYTHONPATH": str(ROOT)})
    heavy = {"torch", "numpy", "timm", "deepspeed", "openslide", "omegaconf", "pyarrow"}
    assert not set(json.loads(done.stdout)) & heavy


def clean_environment() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_the_generated_parts_of_the_readme_are_what_the_tree_and_the_results_say() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "readme.py"), "--check"], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_file_of_the_tree_says_what_it_is() -> None:
    silent = [path for path in FILES if not ast.get_docstring(ast.parse((ROOT / path).read_text()))]
    assert not silent


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses_and_begins_with_what_it_is(path: Path, tmp_path: Path) -> None:
    from launch.job import Cluster
    from shards import catalogue, write
    from ssl_dist import chain, config, schema, slides
    from ssl_dist.eval.settings import PROTOCOLS

    assert path.read_text().startswith("# ")
    if catalogue.holds(path) == "record":
        assert catalogue.read(path).name == path.stem       # all else: test_shards_catalogue.py
        return
    if path.stem == "embed" and path.parent.name == "configs":
        told = schema.load(slides.Slides, path, [f"encoder={tmp_path}"])
        assert told.reading().mpp == [told.mpp]
        return
    if "lines" in (yaml.safe_load(path.read_text()) or {}):
        assert chain.check(schema.load(chain.Chain, path, [f"out={tmp_path}"]))
        return
    if path.stem == "draw" and path.parent.name == "configs":
        assert schema.load(slides.Draws, path, [f"encoder={tmp_path}", f"shards=[{tmp_path}]"]).draws > 1
        return
    if catalogue.holds(path) == "many":
        assert schema.load(catalogue.Many, path, [f"root={tmp_path}"])
        return
    folder = path.relative_to(ROOT / "configs").parts[0]
    if folder == "eval":
        tiles = [f"encoder={tmp_path}", f"data.shards=[{tmp_path}]"]
        slides = {"slide_linear": [f"vectors={tmp_path}", f"labels={tmp_path}"],
                  "slide_embed": [f"encoder={tmp_path}", f"bags={tmp_path}"],
                  "mil": [f"bags={tmp_path}", f"labels={tmp_path}"],
                  "segment": [f"encoder={tmp_path}", f"regions={tmp_path}"],
                  "confidence": [f"encoder={tmp_path}", f"slides=[{tmp_path}]"],
                  **{name: [f"encoder={tmp_path}", f"data.regions={tmp_path}"] for name in ("nuclei", "semantic")},
                  "outline": [f"network={tmp_path}", f"slides=[{tmp_path}]"]}
        words = {name: slides.get(name, tiles) for name in PROTOCOLS}
        own = yaml.safe_load(path.read_text())["protocol"]
        assert config.load_eval(str(path), words[own]).protocol == own
        for protocol in PROTOCOLS:      # what a recipe says of all holds for any other
            assert config.load_eval(str(path), [*words[protocol], f"protocol={protocol}"]).protocol == protocol
        return
    kind = {"shards": write.Settings, "launch": Cluster}.get(folder, config.Train)
    # Paths of somebody's machine cannot exist here; everything else must hold.
    where = {write.Settings: ["source={}"], config.Train: ["data.shards=[{}]"], Cluster: []}[kind]
    loaded = schema.load(kind, path, [word.format(tmp_path) for word in where])
    if kind is config.Train:
        config.method_config(loaded)
        config.deepspeed(loaded, 1)


def test_a_resolved_config_reads_back_as_itself(tmp_path: Path) -> None:
    from ssl_dist import config, schema

    loaded = config.load_train(str(ROOT / "configs" / "demo.yaml"), [f"data.shards=[{tmp_path}]"])
    (tmp_path / "again.yaml").write_text(schema.dump(loaded))
    assert config.load_train(str(tmp_path / "again.yaml"), []) == loaded
    assert yaml.safe_load(schema.dump(loaded))["method"]["views"][0]["size"] == 64


def test_nothing_names_this_machine_or_a_registry() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not listed:
        pytest.skip("not a git checkout: the list of the project's files is not known")
    places = ("/wo" "rk/", "/ro" "ot/", r"pyp" r"i\.org", "/opt/py" "pi", "files.python" "hosted")
    forbidden = re.compile("|".join(places))
    texts = [ROOT / name for name in listed if not name.endswith((".png", ".jpg"))]
    guilty = {path for path in texts if path.is_file() and forbidden.search(path.read_text(errors="ignore"))}
    assert not guilty
