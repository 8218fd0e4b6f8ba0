"""A tar that is deleted, replaced or overwritten while a run reads it: `make test-faults`."""

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards import index

drill = runpy.run_path(str(Path(__file__).with_name("drill.py")))
WORLD, STEPS = drill["WORLD"], drill["STEPS"]

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

# Tar after tar, and each step long enough for something to happen in it.
SLOWLY = ["data.window=1", "data.ahead=1", "data.bad=fail", "data.batch=6"]
SLOW = [*SLOWLY, drill["fault"]("slow@step.forward:seconds=0.7")]

# What is done to a tar once a row is logged: to the one that is being read, or to one that is needed later.
GONE = "rm {tar}"
ANOTHER = "head -c {bytes} /dev/zero > {tar}.new && mv {tar}.new {tar}"
OVERWRITTEN = "head -c {bytes} /dev/zero | dd of={tar} conv=notrunc status=none"
CUT = "truncate -s {half} {tar}"
DEEDS = {"gone while it is read": ("now", GONE, ""), "another while it is read": ("now", ANOTHER, ""),
         "gone before it is read": ("later", GONE, "cannot be opened any more (No such file or directory)"),
         "another before it is read": ("later", ANOTHER, "changed on disk"),
         "overwritten": ("later", OVERWRITTEN, "changed on disk"), "cut": ("later", CUT, "changed on disk")}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drills")


@pytest.fixture(scope="module")
def tars(home: Path, shard: Path) -> dict[str, str]:
    """The tar of the first step, and one that is opened long after it."""
    drill["drills"](home, shard, [("whole", WORLD, SLOWLY)])
    where = dict(zip(*(index.column(index.samples(shard), name).to_pylist() for name in ("key", "tar")), strict=True))
    names = [tar.name for tar in index.read(shard).tars]
    used = {step: {where[key] for _, key in rows} for step, rows in drill["ledger"](home / "whole").items()}
    first = {tar: min(step for step in used if tar in used[step]) for tar in set().union(*used.values())}
    assert max(first.values()) >= 4, "every tar is open before anything can happen to it"
    return {"now": names[min(used[0])], "later": names[max(first, key=lambda tar: first[tar])]}


@pytest.fixture(scope="module")
def ended(home: Path, shard: Path, tars: dict[str, str]) -> dict[str, list[Any]]:
    """What became of each run, and of the same once its tar was there again."""
    jobs: list[tuple[dict[str, Any], ...]] = []
    for name, (when, deed, _) in DEEDS.items():
        own = shutil.copytree(shard, home / "shards" / name)
        size = (own / tars[when]).stat().st_size
        shell = deed.format(tar=f"'{own / tars[when]}'", bytes=size, half=size // 2)
        run = home / name
        jobs.append(({"words": drill["words"](run, own, *SLOW), "world": WORLD, "strike": {"rows": 1, "shell": shell}},
                     {"words": drill["words"](run, own, *SLOWLY), "world": WORLD}))
    first = drill["drill"](home / "first", [job for job, _ in jobs])
    for name, (when, _, _) in DEEDS.items():
        shutil.copy(shard / tars[when], home / "shards" / name / tars[when])
    second = drill["drill"](home / "second", [again for _, again in jobs])
    return {name: list(both) for name, both in zip(DEEDS, zip(first, second, strict=True), strict=True)}


@pytest.mark.parametrize("name", DEEDS)
def test_what_happens_to_a_tar_is_noticed_where_it_matters_and_leaves_no_trace(
        name: str, home: Path, tars: dict[str, str], ended: dict[str, list[Any]]) -> None:
    when, _, said = DEEDS[name]
    first, second = ended[name]
    run, tar = home / name, home / "shards" / name / tars[when]
    # What is open stays as it was, whatever its name comes to mean.
    assert first.codes == [3 if said else 0] * WORLD, first.said
    if said:
        assert f"{tar} {said}" in first.said
        attempt = json.loads((run / "run.json").read_text())["attempts"][0]
        assert 1 < attempt["to_step"] < STEPS, "it was not while training"
    assert "Traceback" not in first.said
    assert not first.outlived
    assert second.codes == [0] * WORLD, second.said
    assert drill["ledger"](run) == drill["ledger"](home / "whole")
    ours, theirs = drill["weights"](run), drill["weights"](home / "whole")
    assert not [key for key in theirs if not np.array_equal(ours[key], theirs[key])]
