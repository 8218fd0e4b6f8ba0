"""Every chain of attempts, on any numbers of ranks, stopped or killed, sees what one rank sees that nobody interrupts.

The ranks are processes, each with a loader and a ledger of its own, wired as `ssl-dist train` wires them; a killed rank
is killed, with batches on their way. As a program: test_data_ledgers.py PLAN imports torch once and forks every rank.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards import index, write
from ssl_dist import config, schema, train
from ssl_dist.data import mixture
from ssl_dist.data.batch import View
from ssl_dist.data.loader import Loader
from ssl_dist.data.quarantine import Quarantine
from ssl_dist.log import Ledger

ROOT = Path(__file__).resolve().parent.parent
BATCH, STEPS, FAR = 30, 16, 130
VIEWS = (View(size=8, jitter=0, grey=0, blur=0), View(size=8, jitter=0, grey=0, blur=0))
Line = tuple[int, int, str]
Attempt = tuple[int, int, int, bool]        # ranks, first step, step that is saved, whether it is killed after that

WHOLE: dict[str, list[Attempt]] = {f"{world} whole": [(world, 0, STEPS, False)] for world in (1, 2, 3, 5)}
KILLED: list[Attempt] = [(3, 0, 4, True), (2, 4, 9, False), (5, 9, STEPS, False)]
OFTEN: list[Attempt] = [(5, 0, 1, False), (1, 1, 6, True), (3, 6, 7, False), (2, 7, 8, True), (3, 8, STEPS, False)]
LABELS = ["stroma", "lymphoid", "tumour"]
WEIGHTS = {"large": 1.0, "middle": 4.0, "small": 2.5}


def chains(*worlds: int, **more: list[Attempt]) -> dict[str, list[Attempt]]:
    return {f"{world} whole": WHOLE[f"{world} whole"] for world in worlds} | more


# By name: what the config says of the data, and the chains, of which "1 whole" is the truth.
CASES: dict[str, tuple[dict[str, Any], dict[str, list[Attempt]]]] = {
    "natural": ({}, chains(1, 2, 3, 5, killed=KILLED, often=OFTEN)),
    "even": ({"mixture": "even"}, chains(1, 5, killed=KILLED)),
    "weighted": ({"mixture": "weights", "weights": WEIGHTS}, chains(1, 3, often=OFTEN)),
    "filtered": ({"split": "", "only": {"label": LABELS}, "block": True}, chains(1, 2, killed=KILLED)),
    "filtered and even": ({"split": "", "only": {"label": LABELS}, "mixture": "even"}, chains(1, killed=KILLED)),
    "hurt": ({"hurt": True}, chains(1, 2, killed=KILLED)),
    "hurt and even": ({"hurt": True, "mixture": "even"}, chains(1, 2, 3, 5, often=OFTEN)),
    # Past the first 4,096 samples another window of the mixture begins, within step 136.
    "even, far on": ({"mixture": "even"}, {"1 whole": [(1, FAR, FAR + 12, False)],
                                           "killed": [(3, FAR, 134, True), (2, 134, 139, False),
                                                      (5, 139, FAR + 12, False)]}),
    "another seed": ({"seed": 8}, chains(1)),
}


# ---- the ranks

def _rank(case: dict[str, Any], run: Path, rank: int, attempt: Attempt) -> None:
    world, start, stop, killed = attempt
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    settings = schema.build(config.Train, {**case, "run": str(run)}, where="plan")
    reader = train._reader(settings)
    loader = Loader(reader, train._stream(settings, reader), VIEWS, rank=rank, world=world, device=torch.device("cpu"),
                    threads=1, ahead=3, quarantine=Quarantine(run / "quarantine.jsonl", settings.data.max_bad))
    ledger = Ledger(run, reader)
    for step, batch in enumerate(loader.batches(start, stop + 50 if killed else stop), start):
        ledger.write(step, batch)
        if killed and step == stop - 1 + rank:      # all have the step that is saved, and some have gone on
            os.kill(os.getpid(), signal.SIGKILL)
    loader.close()


def _attempt(case: dict[str, Any], run: Path, attempt: Attempt) -> bool:
    """Whether every rank ended as it was meant to."""
    children = []
    for rank in range(attempt[0]):
        if (child := os.fork()) == 0:
            code = 1
            try:
                _rank(case, run, rank, attempt)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    wanted = -signal.SIGKILL if attempt[3] else 0
    return all([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == wanted for child in children])


def _main(plan: Path) -> int:
    for case in json.loads(plan.read_text()):
        for attempt in case["attempts"]:
            if not _attempt(case["settings"], Path(case["run"]), attempt):
                sys.stderr.write(f"{case['run']}: {attempt} did not end as it was meant to")
                return 1
    return 0


# ---- the shards

@pytest.fixture(scope="module")
def folders(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three painted shard folders of different sizes, and of slides of different names, so that a key is one tile's."""
    home, found = tmp_path_factory.mktemp("three"), []
    for name, size in (("large", 48), ("middle", 64), ("small", 96)):
        source = home / f"slides-{name}"
        source.mkdir()
        for file in slides.iterdir():
            if file.name == "slides.csv":
                head, *lines = file.read_text().splitlines()
                (source / file.name).write_text("\n".join([head, *(f"{name}-{line}" for line in lines)]))
            else:
                (source / f"{name}-{file.name}").symlink_to(file)
        write.write(write.Settings(source=source, out=home / name, dataset=name, size=size, mpp=1.0, workers=2,
                                   labels="annotations", tar_samples=20, organ="none", licence="Apache-2.0"))
        found.append(home / name)
    return found


@pytest.fixture(scope="module")
def hurt(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Copies in which every ninth tile is no picture, or is not what was written."""
    home, found = tmp_path_factory.mktemp("hurt"), []
    for folder in folders:
        copy = shutil.copytree(folder, home / folder.name)
        known, columns = index.read(copy), index.samples(copy).to_pydict()
        for row in range(0, len(columns["key"]), 9):
            size = columns["size"][row]
            garbage = (b"this was never a picture " * size)[:size]
            with (copy / known.tars[columns["tar"][row]].name).open("r+b") as handle:
                handle.seek(columns["offset"][row])
                handle.write(garbage)
            if row % 2:
                columns["crc32"][row] = zlib.crc32(garbage)
        index.write_samples(copy, columns)
        index.write(copy, replace(known, fingerprint=index.fingerprint(copy, known)))
        found.append(copy)
    return found


def table(folders: list[Path]) -> list[dict[str, Any]]:
    """Every sample of the folders, as the writer wrote it down."""
    return [{**row, "class": index.read(folder).datasets[0]["classes"][row["label"]] if row["label"] >= 0 else "",
             "row": number} for folder in folders for number, row in enumerate(index.samples(folder).to_pylist())]


# ---- the ledgers

@pytest.fixture(scope="module")
def runs(folders: list[Path], hurt: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder a case and chain, all made by one program."""
    home, plan = tmp_path_factory.mktemp("runs"), []
    block = home / "block.txt"
    block.write_text("\n".join(row["key"] for row in table(folders)[::7]))
    for name, (data, of_case) in CASES.items():
        data = {"shards": list(map(str, hurt if data.get("hurt") else folders)), "split": "train", "batch": BATCH,
                "window": 4, **data}
        data.pop("hurt", None)
        seed = data.pop("seed", 7)
        if data.pop("block", False):
            data["block"] = str(block)
        for chain, attempts in of_case.items():
            run = home / name / chain
            run.mkdir(parents=True)
            plan.append({"run": str(run), "attempts": attempts, "settings": {
                "data": data, "method": {"name": "simclr"}, "steps": 10**6, "seed": seed}})
    (home / "plan.json").write_text(json.dumps(plan))
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run([sys.executable, __file__, str(home / "plan.json")], capture_output=True, text=True,
                          timeout=280, check=False, env={**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-4000:]
    return home


def ledger(run: Path) -> list[Line]:
    """What the ranks wrote, in the order of steps and places; twice where it was seen twice."""
    rows = [json.loads(line) for path in (run / "ledger").glob("*.jsonl") for line in path.read_text().splitlines()]
    return sorted((row["step"], row["position"], row["key"]) for row in rows)


def truth(runs: Path, case: str) -> list[Line]:
    return ledger(runs / case / "1 whole")


def beyond(attempts: list[Attempt]) -> int:
    """How many samples ranks saw after the step that was saved, and somebody sees again."""
    return sum(BATCH // world * rank for world, _, _, killed in attempts if killed for rank in range(world))


@pytest.mark.parametrize(("case", "chain"), [(case, chain) for case, (_, found) in CASES.items() for chain in found])
def test_the_ledger_of_a_chain_is_that_of_one_rank_that_nobody_interrupts(runs: Path, case: str, chain: str) -> None:
    attempts, seen, expected = CASES[case][1][chain], ledger(runs / case / chain), truth(runs, case)
    assert len(expected) == BATCH * (attempts[-1][2] - attempts[0][1])
    assert sorted(set(seen)) == expected
    assert len(seen) == len(expected) + beyond(attempts), "a stopped rank sees each sample once"
    ranks = max(world for world, *_ in attempts)
    assert len(list((runs / case / chain / "ledger").iterdir())) == ranks, "a rank wrote nothing"


def test_cases_and_seeds_differ_and_each_says_what_it_means(runs: Path, folders: list[Path]) -> None:
    """So that no ledger is another's by chance, and the truth not an empty one."""
    keys = {case: [key for _, _, key in truth(runs, case)] for case in CASES}
    assert all(keys[one] != keys[other] for one in keys for other in keys if one != other)
    assert len({row["key"] for row in table(folders)}) == len(table(folders)), "one key, two tiles"


@pytest.mark.parametrize("case", CASES)
def test_steps_and_places_follow_each_other_without_a_gap(runs: Path, case: str, folders: list[Path]) -> None:
    tiles = len(wanted(case, runs, folders))
    an_epoch = tiles // BATCH
    start = CASES[case][1]["1 whole"][0][1]
    assert an_epoch < STEPS - 1, "no chain crosses the end of an epoch"
    assert [line[:2] for line in truth(runs, case)] == [
        (step, step % an_epoch * BATCH + place) for step in range(start, start + len(truth(runs, case)) // BATCH)
        for place in range(BATCH)]


def wanted(case: str, runs: Path, folders: list[Path]) -> dict[str, str]:
    """The tiles that a case asks for, and their datasets, by a plain look at every row."""
    if not case.startswith("filtered"):
        return {row["key"]: row["dataset"] for row in table(folders) if row["split"] == "train"}
    block = set((runs / "block.txt").read_text().split()) if case == "filtered" else set()
    return {row["key"]: row["dataset"] for row in table(folders) if row["class"] in LABELS and row["key"] not in block}


@pytest.mark.parametrize("case", ["natural", "filtered", "another seed"])
def test_one_rank_sees_every_wanted_tile_once_an_epoch_but_the_tail(runs: Path, case: str, folders: list[Path]) -> None:
    tiles = wanted(case, runs, folders)
    an_epoch = len(tiles) // BATCH * BATCH
    seen = [key for _, _, key in truth(runs, case)]
    assert len(tiles) < len(table(folders)) and set(seen) <= tiles.keys()
    for first in range(0, len(seen), an_epoch):
        epoch = seen[first:first + an_epoch]
        assert len(set(epoch)) == len(epoch)
    assert len(seen) > 2 * an_epoch


@pytest.mark.parametrize(("case", "shares"), [
    ("even", dict.fromkeys(WEIGHTS, 1.0)), ("filtered and even", dict.fromkeys(WEIGHTS, 1.0)), ("weighted", WEIGHTS),
    ("hurt and even", dict.fromkeys(WEIGHTS, 1.0))])
def test_one_rank_sees_each_dataset_as_often_as_its_share(runs: Path, case: str, shares: dict[str, float],
                                                          folders: list[Path]) -> None:
    tiles = wanted(case, runs, folders)
    counts = Counter(tiles[key] for _, _, key in truth(runs, case))
    for name, share in shares.items():
        # Places within a window are drawn by lot: 480 of 4,096 samples, five standard deviations.
        part = share / sum(shares.values())
        assert abs(counts[name] - BATCH * STEPS * part) < 5 * np.sqrt(BATCH * STEPS * part * (1 - part)), counts
    assert BATCH * STEPS < mixture.WINDOW < BATCH * (FAR + 12)


@pytest.mark.parametrize("case", ["even", "weighted", "filtered and even"])
def test_of_a_mixture_no_tile_comes_again_before_all_of_its_dataset_came(runs: Path, case: str,
                                                                        folders: list[Path]) -> None:
    tiles, repeated = wanted(case, runs, folders), 0
    for name in WEIGHTS:
        mine = {key for key, dataset in tiles.items() if dataset == name}
        seen = [key for _, _, key in truth(runs, case) if tiles[key] == name]
        for first in range(0, len(seen), len(mine)):
            turn = seen[first:first + len(mine)]
            assert len(set(turn)) == len(turn)
            assert len(turn) < len(mine) or set(turn) == mine
        repeated += len(seen) > 2 * len(mine)
    assert repeated, "no dataset was gone through twice"


def test_the_second_window_of_a_mixture_is_not_the_first_again(runs: Path) -> None:
    far = [key for _, _, key in truth(runs, "even, far on")][mixture.WINDOW - FAR * BATCH:]
    early = [key for _, _, key in truth(runs, "even")][:len(far)]
    assert len(far) == len(early) > 100
    assert sum(one == other for one, other in zip(far, early, strict=True)) < 15      # by chance 164 / 100


@pytest.mark.parametrize("case", ["hurt", "hurt and even"])
def test_bad_tiles_are_never_seen_and_all_else_is_where_it_was(runs: Path, case: str, folders: list[Path]) -> None:
    bad = {row["key"] for row in table(folders) if row["row"] % 9 == 0}
    sound, seen = truth(runs, {"hurt": "natural"}.get(case, "even")), truth(runs, case)
    replaced = 0
    for one, other in zip(sound, seen, strict=True):
        assert other[2] not in bad
        if one[2] in bad:
            replaced += 1
        else:
            assert one == other
    assert replaced > 20


def listed(run: Path, name: str = "quarantine.jsonl") -> list[str]:
    return [json.loads(line)["key"] for line in (run / name).read_text().splitlines()]


@pytest.mark.parametrize(("case", "chain"), [(case, chain) for case in ("hurt", "hurt and even")
                                             for chain in CASES[case][1]])
def test_the_same_bad_tiles_are_listed_by_every_chain(runs: Path, case: str, chain: str) -> None:
    """Those of the truth; a killed chain may have met some more, ahead of its last step."""
    expected, found = set(listed(runs / case / "1 whole")), set(listed(runs / case / chain))
    assert len(expected) > 10
    assert found >= expected
    assert found == expected or any(killed for *_, killed in CASES[case][1][chain])


@pytest.mark.parametrize(("case", "chain"), [("hurt", "1 whole"), ("hurt", "2 whole"), ("hurt and even", "5 whole")])
def test_a_bad_tile_is_listed_once(runs: Path, case: str, chain: str) -> None:
    found = listed(runs / case / chain)
    assert len(found) == len(set(found)), f"{len(found)} lines of {len(set(found))} tiles"


def test_two_bad_tiles_of_one_key_are_two(slides: Path, tmp_path: Path) -> None:
    for name in ("one", "other"):
        write.write(write.Settings(source=slides, out=tmp_path / name, dataset=name, size=96, mpp=1.0, workers=2,
                                   labels="annotations", tar_samples=200, organ="none", licence="Apache-2.0"))
    kept = Quarantine(tmp_path / "list.jsonl", 1000)
    bad = [(row["key"], str(tmp_path / row["dataset"] / f"{row['dataset']}-000000.tar"), row["offset"])
           for row in table([tmp_path / "one", tmp_path / "other"])]
    assert len({key for key, *_ in bad}) < len(set(bad)) == len(bad), "no key of two tiles"
    for tile in bad:
        kept.add(*tile, "its bytes changed on disk")
    assert len(listed(tmp_path, "list.jsonl")) == len(bad)


# ---- through the command that a user types

def test_a_training_that_goes_on_with_other_ranks_has_the_ledger_of_one_rank(runs: Path, hurt: list[Path],
                                                                            tmp_path: Path) -> None:
    """Three ranks, then two across the end of an epoch; an even mixture with bad tiles; held against the rank above."""
    run, last = tmp_path / "run", 11
    command = ["train", "demo", f"run={run}", f"data.shards=[{','.join(map(str, hurt))}]", f"data.batch={BATCH}",
               "data.split=train", "data.mixture=even", "data.window=4", f"steps={last}", "seed=7", "device=cpu",
               "debug.ledger=true", "checkpoint.every=100", "log.pictures=0", "method.views.size=16",
               "encoder.args.layers=[1,1,1,1]", "encoder.args.channels=[8,8,16,16]"]
    for ranks, stop in ((3, 4), (2, last)):
        done = subprocess.run([sys.executable, "-m", "ssl_dist", "launch", "local", f"ranks={ranks}", "--", *command,
                               f"stop={stop}"], capture_output=True, text=True, check=False, timeout=200,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr[-4000:]
    assert ledger(run) == [line for line in truth(runs, "hurt and even") if line[0] < last]
    attempts = json.loads((run / "run.json").read_text())["attempts"]
    assert [(each["world"], each["from_step"], each["to_step"]) for each in attempts] == [
        (3, 0, 4), (2, 4, last)]


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1])))
