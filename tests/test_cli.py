"""What a person types, and what comes back: exit codes and one line that says what to do."""

import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def ssl_dist(*words: object, cwd: Path = ROOT, **extra: str) -> subprocess.CompletedProcess:
    """The command line in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **extra}
    return subprocess.run([sys.executable, "-m", "ssl_dist", *map(str, words)], cwd=cwd, env=environment,
                          capture_output=True, text=True, check=False, timeout=120)


def errors(done: subprocess.CompletedProcess) -> list[str]:
    """The error lines; a traceback is no error line."""
    assert "Traceback" not in done.stderr, done.stderr
    return [line.removeprefix("ssl-dist: error: ") for line in done.stderr.splitlines()
            if line.startswith("ssl-dist: error: ")]


@pytest.fixture(scope="module")
def somewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("somewhere")


def train(somewhere: Path, *words: object) -> subprocess.CompletedProcess:
    return ssl_dist("train", "configs/demo.yaml", f"run={somewhere / 'run'}", f"data.shards=[{somewhere}]", *words)


def test_a_mistyped_key_names_the_key_the_file_and_the_right_key_before_torch_is_imported(somewhere: Path) -> None:
    done = ssl_dist("train", "configs/demo.yaml", "optim.lrr=1", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 2
    line = next(line for line in errors(done) if "optim.lrr" in line)
    assert "optim.lrr=1" in line and "optim.lr?" in line and "configs/demo.yaml" in line
    assert not any(line.rstrip().endswith((" torch", " numpy")) for line in done.stderr.splitlines())
    assert not (somewhere / "run").exists()


@pytest.mark.parametrize(("word", "needles"), [
    ("optim.lrr=1", ["optim.lrr=1", "optim.lr?"]),
    ("optm.lr=1", ["optm", "optim"]),
    ("lr=1", ["lr=1", "optim.lr?"]),
    ("Optim.LR=1", ["Optim", "optim?"]),
    ("steps=-5", ["steps=-5", "out of range"]),
    ("steps=ten", ["steps='ten'", "whole number"]),
    ("steps=3.5", ["steps=3.5", "whole number"]),
    ("steps=true", ["steps=True", "whole number"]),
    ("steps=null", ["steps=None", "whole number"]),
    ("optim.lr=None", ["optim.lr='None'", "write null"]),
    ("run=none", ["run='none'", "write null"]),
    ("optim=adam", ["optim='adam'", "holds keys", "weight_decay"]),
    ("optim.name=adam", ["optim.name='adam'", "adamw"]),
    ("data.shards=/nowhere", ["data.shards='/nowhere'", "data.shards=[a,b]"]),
    ("data.shards=[/nowhere]", ["data.shards[0]='/nowhere'", "does not exist", "ssl-dist shard"]),
    ("data.shards=[]", ["data.shards=[]", "empty"]),
    ("data.only={oragn: [breast]}", ["data.only.oragn", "organ"]),
    ("data.only={organ: breast}", ["data.only.organ='breast'", "not a list of words"]),
    ("data.only={mpp: [half]}", ["data.only.mpp=['half']", "not a list of numbers"]),
    ("data.mixture=evn", ["data.mixture='evn'", "did you mean 'even'"]),
    ("data.mixture=weights", ["mixture='weights'", "takes weights"]),
    ("data.weights={bach: 1}", ["mixture='natural'", "do not go together"]),
    ("data.block=/nowhere", ["data.block='/nowhere'", "does not exist"]),
    ("method.name=simclar", ["method.name='simclar'", "did you mean 'simclr'"]),
    ("encoder.mean=[0.5,0.5]", ["encoder.mean", "has 2 items, needs 3"]),
    ("debug.ledger=2", ["debug.ledger=2", "true or false"]),
    ("optim.final_lr=1", ["optim.final_lr=1", "above optim.lr"]),
    ("optim.lr=.nan", ["optim.lr=nan", "finite"]),
    ("seed", ["'seed'", "not key=value"]),
    ("=3", ["'=3'", "not key=value"]),
    ("seed=[1", ["seed=[1", "cannot be read"]),
    ("seed=${oc.env:NO_SUCH_VARIABLE_HERE}", ["NO_SUCH_VARIABLE_HERE"]),
])
def test_every_wrong_word_is_refused_in_one_line(somewhere: Path, word: str, needles: list[str]) -> None:
    from ssl_dist import config, schema

    with pytest.raises(schema.ConfigError) as refusal:
        config.load(config.Train, str(ROOT / "configs" / "demo.yaml"),
                    [f"run={somewhere / 'run'}", f"data.shards=[{somewhere}]", word])
    assert len(refusal.value.problems) == 1
    assert all(needle in str(refusal.value) for needle in needles), str(refusal.value)


@pytest.mark.parametrize(("word", "needles"), [
    ("method.temprature=1", ["method.temprature=1", "method.temperature?"]),
    ("method.views.sise=3", ["method.views[0].sise=3", "method.views[0].size?"]),
    ("method.views.preset=dyno", ["method.views", "preset='dyno'", "did you mean 'dino'?"]),
    ("method.views.preset=dino", ["method.views are of [64, 64, 64,", "two of one size"]),
    ("method.temperature=0", ["method.temperature=0", "out of range"]),
    ("method.views.scale=[1.0,0.2]", ["method.views[0].scale", "high to low"]),
])
def test_a_methods_own_keys_are_held_as_strictly(somewhere: Path, word: str, needles: list[str]) -> None:
    from ssl_dist import config, schema

    with pytest.raises(schema.ConfigError) as refusal:
        config.load_train(str(ROOT / "configs" / "demo.yaml"),
                          [f"run={somewhere / 'run'}", f"data.shards=[{somewhere}]", word])
    assert all(needle in str(refusal.value) for needle in needles), str(refusal.value)
    assert "[command line, " in str(refusal.value)


@pytest.mark.parametrize(("words", "expected"), [
    ([], (50, 0, 0)), (["steps=4"], (4, 0, 0)), (["epochs=2"], (0, 2, 0)), (["samples=640"], (0, 0, 640)),
    (["steps=0", "epochs=2"], (0, 2, 0))])
def test_a_length_that_is_typed_stands_in_for_the_recipes(somewhere: Path, tmp_path: Path, words: list[str],
                                                          expected: tuple) -> None:
    from ssl_dist import config, schema

    (tmp_path / "mine.yaml").write_text(f"run: here\nsteps: 50\ndata: {{shards: [{somewhere}]}}\n"
                                        "method: {name: simclr}\n")
    for load in (config.load_train, lambda *told: config.load(config.Train, *told)):
        found = load(str(tmp_path / "mine.yaml"), words)
        assert (found.steps, found.epochs, found.samples) == expected
    with pytest.raises(schema.ConfigError, match=r"steps=4 and epochs=2 .* \[command line, .*mine.yaml\]"):
        config.load_train(str(tmp_path / "mine.yaml"), ["steps=4", "epochs=2"])


def test_all_mistakes_come_in_one_list_with_their_lines(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("run: here\nsteps: many\ndata:\n  shards: [.]\n  batch: -1\nmethod:\n"
                                        "  name: simclr\nsed: 3\n")
    done = ssl_dist("train", "mine.yaml", "optim.lr=-1", cwd=tmp_path)
    assert done.returncode == 2
    found = errors(done)
    assert [line.split("=")[0] for line in found] == ["sed", "data.batch", "steps", "optim.lr"]
    assert "[mine.yaml:8]" in found[0] and "[mine.yaml:5]" in found[1] and "[mine.yaml:2]" in found[2]
    assert "command line" in found[3]


@pytest.mark.parametrize(("text", "needle"), [("run: [", "not YAML"), ("- 1\n- 2\n", "not keys and values"),
                                              ("a: 1\na: 2\n", "a"), ("\x00", "not YAML")])
def test_a_file_that_is_no_config_is_refused_in_one_line(tmp_path: Path, text: str, needle: str) -> None:
    from ssl_dist import config, schema

    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(schema.ConfigError) as refusal:
        config.load(config.Train, str(tmp_path / "odd.yaml"), [])
    assert needle in str(refusal.value)


def test_an_unknown_recipe_names_the_nearest() -> None:
    done = ssl_dist("train", "pretrain/simclear")
    assert done.returncode == 2
    assert "pretrain/simclr" in errors(done)[0]


def test_recipes_are_found_by_path_and_by_name(tmp_path: Path) -> None:
    from ssl_dist import config

    assert config.recipe("pretrain/simclr") == config.recipe("configs/pretrain/simclr.yaml").resolve().relative_to(
        Path.cwd()) or config.recipe("pretrain/simclr").samefile(config.recipe("configs/pretrain/simclr.yaml"))
    listed = ssl_dist("recipes", cwd=tmp_path)
    assert listed.returncode == 0
    for path in set((ROOT / "configs").rglob("*.yaml")) - set((ROOT / "configs" / "datasets").glob("*.yaml")):
        name = path.relative_to(ROOT / "configs").with_suffix("").as_posix()
        assert f"{name} " in listed.stdout and path.read_text().split("\n")[0].lstrip("# ") in listed.stdout


def test_a_shard_folder_without_an_index_is_refused_with_what_to_do(tmp_path: Path) -> None:
    done = ssl_dist("train", "demo", f"run={tmp_path / 'run'}", f"data.shards=[{tmp_path}]")
    assert done.returncode == 3
    assert "has no index.json" in errors(done)[0] and "ssl-dist shard" in errors(done)[0]


@pytest.mark.parametrize("verb", ["check", "show"])
def test_a_missing_shard_folder_is_refused(tmp_path: Path, verb: str) -> None:
    done = ssl_dist(verb, tmp_path / "nothing")
    assert done.returncode == 3
    assert "no shard folder" in errors(done)[0]


def test_a_slide_that_is_a_text_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "letter.svs").write_text("Dear pathologist")
    done = ssl_dist("shard", "shards/demo", f"source={tmp_path / 'slides'}", f"out={tmp_path / 'out'}",
                    "labels=names")
    assert done.returncode == 3
    assert "letter.svs" in errors(done)[0] and "max_failed" in errors(done)[0]
    assert not (tmp_path / "out" / "index.json").exists()


def test_a_folder_where_nobody_may_write_is_refused(slides: Path) -> None:
    done = ssl_dist("shard", "shards/demo", f"source={slides}", "out=/proc/shards")
    assert done.returncode == 9 or "/proc" in done.stderr
    assert len(errors(done)) == 1


def test_a_run_folder_in_use_is_refused_at_once_and_names_its_owner(shard: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with (run / "run.lock").open("w") as lock:
        lock.write("process 4711 on elsewhere\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        for words in (["train"], ["launch", "local", "ranks=2", "--", "train"]):
            done = ssl_dist(*words, "demo", f"run={run}", f"data.shards=[{shard}]")
            assert done.returncode == 10
            assert len(errors(done)) == 1 and "process 4711 on elsewhere" in errors(done)[0]


def test_a_port_in_use_is_refused_before_anything_starts(shard: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = ssl_dist("launch", "local", f"port={port}", "--", "train", "demo", f"run={tmp_path / 'run'}",
                        f"data.shards=[{shard}]")
    assert done.returncode == 2
    assert f"port={port}" in errors(done)[0] and "port=0" in errors(done)[0]


def test_a_batch_that_the_ranks_cannot_share_is_refused_with_sizes_that_work(shard: Path, tmp_path: Path) -> None:
    done = ssl_dist("launch", "local", "ranks=3", "--", "train", "demo", f"run={tmp_path / 'run'}",
                    f"data.shards=[{shard}]", "data.batch=64")
    assert done.returncode == 2
    assert "63" in errors(done)[0] and "66" in errors(done)[0]


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = ssl_dist("check", tmp_path / "nothing", "--debug")
    assert "Traceback" in done.stderr and "ShardError" in done.stderr


def test_print_config_prints_a_tree_that_can_be_run_again(shard: Path, tmp_path: Path) -> None:
    words = [f"run={tmp_path / 'run'}", f"data.shards=[{shard}]"]
    first = ssl_dist("train", "demo", *words, "--print-config")
    assert first.returncode == 0 and "temperature:" in first.stdout and "batchnorm:" in first.stdout
    (tmp_path / "again.yaml").write_text(first.stdout)
    assert ssl_dist("train", tmp_path / "again.yaml", "--print-config").stdout == first.stdout
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_and_touches_nothing(shard: Path, tmp_path: Path) -> None:
    from ssl_dist.data.reader import Reader

    done = ssl_dist("train", "demo", f"run={tmp_path / 'run'}", f"data.shards=[{shard}]", "data.batch=8", "--dry-run")
    assert done.returncode == 0, done.stderr
    figures = dict(line.rsplit(maxsplit=1) for line in done.stdout.splitlines())
    tiles = int(Reader([shard], "train").counts.sum())
    assert {name.strip(): value for name, value in figures.items()}["tiles"] == str(tiles)
    assert not (tmp_path / "run").exists()


def test_help_is_quick_enough_to_be_asked_often() -> None:
    """A timing only in the sense that a second of imports would show: the promise is 300 ms on an idle machine."""
    started = time.monotonic()
    assert ssl_dist("--help").returncode == 0
    assert time.monotonic() - started < 5


def test_doctor_speaks_json() -> None:
    done = ssl_dist("doctor", "--json")
    assert {"name", "state", "found", "advice"} <= set(json.loads(done.stdout)[0])


@pytest.mark.parametrize("name", ["a #2", "1", "with space", "it's", "[x]", "a: b", "1e3"])
def test_a_path_on_the_command_line_is_taken_as_typed(somewhere: Path, name: str) -> None:
    from ssl_dist import config

    loaded = config.load(config.Train, str(ROOT / "configs" / "demo.yaml"),
                         [f"run={name}", f"data.shards=[{somewhere}]"])
    assert loaded.run == Path(name)


def test_the_same_shards_twice_are_refused(shard: Path, tmp_path: Path) -> None:
    done = ssl_dist("train", "demo", f"run={tmp_path / 'run'}", f"data.shards=[{shard},{shard}]", "--dry-run")
    assert done.returncode == 3 and "more than once" in errors(done)[0]


def test_a_gpu_that_is_not_there_is_refused_in_one_line(shard: Path, tmp_path: Path) -> None:
    for words in (["train"], ["launch", "local", "ranks=1", "--", "train"]):
        done = ssl_dist(*words, "demo", f"run={tmp_path / 'run'}", f"data.shards=[{shard}]", "device=cuda",
                        "data.batch=8", CUDA_VISIBLE_DEVICES="")
        assert done.returncode == 2 and len(errors(done)) == 1 and "device=auto" in errors(done)[0]
