"""Jobs on a real SLURM: submitted, stopped, requeued, preempted, cancelled, and every time with the samples and weights
of a run that nothing happened to. Needs root and Debian's packages; the cluster is this machine's own (cluster.py)."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
clusters = runpy.run_path(str(Path(__file__).with_name("cluster.py")))
drill = runpy.run_path(str(ROOT / "tests" / "drill.py"))
account = drill["account"]
LACKING = clusters["missing"](accounting=True)

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600),
              pytest.mark.skipif(bool(LACKING), reason=f"no SLURM here: {LACKING}")]

RANKS, STEPS = 2, 8
ASKS = {"nodes": RANKS, "cpus": 1, "hours": 0.2, "grace": 30, "network": "lo"}
# Steps long enough for something to happen in one, at any pace of the machine.
SLOW = [drill["fault"]("slow@step.forward:seconds=1.5"), "log.every=1"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("slurm")
    try:
        found = clusters["up"](folder, accounting=True)
    except clusters["NotHere"] as error:
        pytest.skip(f"no SLURM comes up here: {error}")
    yield found
    clusters["down"](folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where jobs are submitted from: a path that a shell, sbatch or srun might take apart."""
    folder = tmp_path_factory.mktemp("home") / "it's a \"lab\" of 100% $HOME"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def whole(home: Path, shard: Path) -> Path:
    """The run that nothing happens to, not on SLURM."""
    drill["drills"](home, shard, [("whole", RANKS, [])])
    return home / "whole"


class Lab:
    """A user of the cluster, in a folder."""

    def __init__(self, cluster: Any, home: Path, shard: Path):
        self.cluster, self.home, self.shard = cluster, home, shard
        self.environment = {**{name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
                            **cluster.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def call(self, *words: object, code: int = 0) -> str:
        """ssl-dist, as it is typed."""
        done = subprocess.run([sys.executable, "-m", "ssl_dist", *map(str, words)], cwd=self.home, check=False,
                              env=self.environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    def launch(self, name: str, *more: str, verb: str = "train", **asks: Any) -> str:
        """Submits a run; returns the job's number."""
        recipe = self.home / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump({**ASKS, **asks}))
        words = drill["words"](Path(name), self.shard, *more) if verb == "train" else list(more)
        return self.call("launch", "slurm", recipe, "--unchecked", "--", verb, *words).split()[1].rstrip(":")

    def told(self, name: str) -> dict[str, Any]:
        try:
            return account(self.home / name)
        except (OSError, ValueError):
            return {}

    def until(self, ready: Callable[[], object], what: str, patience: float = 240) -> None:
        deadline = time.monotonic() + patience
        while not ready():
            if time.monotonic() > deadline:
                pytest.fail(f"{what}: not in {patience} s\n{self.cluster.ask('squeue', '-a')}\n{self.said()}")
            time.sleep(0.2)

    def until_step(self, name: str, step: int, attempt: int = 1) -> None:
        """Waits until an attempt has logged a step."""
        def there() -> bool:
            rows = self.home / name / "metrics.jsonl"
            return len(self.told(name).get("attempts", [])) >= attempt and rows.exists() and any(
                json.loads(line)["step"] >= step for line in rows.read_text().splitlines())

        self.until(there, f"{name} at step {step}")

    def until_state(self, name: str, state: str) -> None:
        self.until(lambda: self.told(name).get("state") == state, f"{name} {state}")

    def until_over(self, job: str, patience: float = 240) -> str:
        """Waits for the end of a job; returns how SLURM calls it."""
        def state() -> str:
            told = self.cluster.ask("squeue", "-h", "-t", "all", "-j", job, "-o", "%T", check=False)
            return (told or self.cluster.ask("sacct", "-n", "-X", "-j", job, "-o", "State")).split()[0]

        going = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")
        self.until(lambda: state() not in going, f"the end of {job}", patience)
        return state()

    def until_recorded(self, job: str, what: str, words: str) -> None:
        """Waits until the accounting says so: slurmdbd hears of things after squeue does."""
        self.until(lambda: words in self.cluster.ask("sacct", "-D", "-n", "-X", "-j", job, "-o", what).split(),
                   f"{what} {words} of {job}", patience=30)

    def said(self) -> str:
        newest = sorted(self.home.glob("*/launch/*_log.err"), key=lambda path: path.stat().st_mtime)[-4:]
        return "\n".join(f"== {path}\n{path.read_text(errors='replace')[-1500:]}" for path in newest)

    def holds(self, name: str, whole: Path) -> None:
        """That a run is done, with samples and weights of the whole one."""
        assert self.told(name)["state"] == "done", self.said()
        assert drill["ledger"](self.home / name) == drill["ledger"](whole)
        ours, theirs = drill["weights"](self.home / name), drill["weights"](whole)
        assert not [key for key in theirs if not np.array_equal(ours[key], theirs[key])]


@pytest.fixture(scope="module")
def lab(cluster: Any, home: Path, shard: Path) -> Lab:
    return Lab(cluster, home, shard)


def test_a_run_on_two_nodes_is_the_run_that_torchrun_would_have_made(lab: Lab, whole: Path) -> None:
    job = lab.launch("plain")
    assert lab.until_over(job) == "COMPLETED", lab.said()
    lab.holds("plain", whole)
    (attempt,) = lab.told("plain")["attempts"]
    assert (attempt["world"], attempt["machines"], attempt["job"]) == (RANKS, 2, job)
    assert list(attempt["seconds_to"]) == ["imports", "ranks", "network", "tiles", "step"]
    assert f"job {job}: completed" in lab.call("status", "plain")
    logs = lab.call("logs", "plain").splitlines()
    assert {line.split()[0] for line in logs} == {"0", "1"}
    assert len([line for line in logs if line.endswith("step-000008")]) == RANKS, "each says that it saved"


def test_a_signal_before_the_time_limit_saves_and_requeues(lab: Lab, whole: Path) -> None:
    job = lab.launch("signal", *SLOW)
    lab.until_step("signal", 3)
    lab.cluster.ask("scancel", "--signal=USR2", f"{job}.0")         # what --signal=USR2@30 sends: to the steps
    lab.until(lambda: len(lab.told("signal").get("attempts", [])) == 2, "the second attempt")
    assert lab.until_over(job) == "COMPLETED"
    lab.holds("signal", whole)
    first, second = lab.told("signal")["attempts"]
    assert (first["outcome"], second["from_step"]) == ("preempted", first["to_step"])
    assert [first["launch"], second["launch"]] == [f"{job}.0", f"{job}.1"]
    lab.until_recorded(job, "State", "REQUEUED")


@pytest.mark.faults
def test_a_real_time_limit_is_lived_through(lab: Lab, whole: Path) -> None:
    """Two minutes, of which SLURM leaves one or less before it asks: its clock of limits goes by the minute."""
    job = lab.launch("limit", drill["fault"]("slow@step.forward:seconds=12"), "log.every=1", hours=2 / 60, grace=60)
    assert lab.until_over(job) == "COMPLETED"
    lab.holds("limit", whole)
    first, *_, last = lab.told("limit")["attempts"]
    assert (first["outcome"], last["outcome"]) == ("preempted", "done")
    assert last["from_step"] > 0


def test_somebody_requeues_it(lab: Lab, whole: Path) -> None:
    job = lab.launch("requeued", *SLOW)
    lab.until_step("requeued", 3)
    lab.cluster.ask("scontrol", "requeue", job)
    lab.until(lambda: len(lab.told("requeued").get("attempts", [])) == 2, "the second attempt")
    assert lab.until_over(job) == "COMPLETED"
    lab.holds("requeued", whole)


def test_a_job_of_a_higher_partition_takes_its_nodes_and_it_goes_on_afterwards(lab: Lab, whole: Path) -> None:
    job = lab.launch("preempted", *SLOW, partition="low")
    lab.until_step("preempted", 3)
    other = lab.cluster.ask("sbatch", "--parsable", "-p", "high", "-N3", "--exclusive", "-o", "/dev/null", "--wrap",
                            "sleep 3").strip()
    assert lab.until_over(other) == "COMPLETED"
    assert lab.until_over(job) == "COMPLETED"
    lab.holds("preempted", whole)
    first, *_ = lab.told("preempted")["attempts"]
    assert first["outcome"] == "preempted", "twenty seconds of grace were enough to save"


def test_a_node_that_goes_down_costs_at_most_what_was_not_saved(lab: Lab, whole: Path) -> None:
    job = lab.launch("lost", *SLOW)
    lab.until_step("lost", 3)
    node = lab.cluster.ask("squeue", "-h", "-j", job, "-o", "%N").strip()
    last = lab.cluster.ask("scontrol", "show", "hostnames", node).split()[-1]
    lab.cluster.ask("scontrol", "update", f"nodename={last}", "state=down", "reason=test")
    try:
        lab.until(lambda: len(lab.told("lost").get("attempts", [])) == 2, "the second attempt")
        assert lab.until_over(job) == "COMPLETED"
    finally:
        lab.cluster.ask("scontrol", "update", f"nodename={last}", "state=resume", check=False)
    lab.holds("lost", whole)
    assert lab.told("lost")["attempts"][1]["from_step"] >= 2


def test_what_is_cancelled_is_saved_and_stays_away(lab: Lab, whole: Path) -> None:
    job = lab.launch("cancelled", *SLOW)
    lab.until_step("cancelled", 3)
    assert f"job {job}" in lab.call("cancel", "cancelled")
    assert lab.until_over(job) == "FAILED"
    lab.until_recorded(job, "ExitCode", "4:0")     # saved, as its code says
    time.sleep(3)
    assert lab.until_over(job) == "FAILED", "it came back"
    status = lab.call("status", "cancelled")
    assert "cancelled: preempted" in status and f"job {job}: failed" in status
    assert "none of its jobs" in lab.call("cancel", "cancelled")
    (again,) = [word.rstrip(":") for word in lab.call("resume", "cancelled").split() if word.rstrip(":").isdigit()][:1]
    assert lab.until_over(again) == "COMPLETED"
    lab.holds("cancelled", whole)


def test_a_crash_in_one_rank_ends_the_job_in_seconds_and_is_not_tried_for_ever(lab: Lab) -> None:
    """The rank dies at step 5 in every attempt: the first has saved 4, the second saves nothing more."""
    job = lab.launch("crash", drill["fault"]("kill@step.forward:rank=1,step=5"))
    lab.until_step("crash", 5)
    since = time.monotonic()
    lab.until(lambda: lab.told("crash")["attempts"][0]["outcome"], "the end of the attempt")
    assert time.monotonic() - since < 15
    assert lab.until_over(job) == "FAILED"
    told = lab.told("crash")
    assert (told["state"], told["exit_code"]) == ("failed", 7)
    assert [attempt["from_step"] for attempt in told["attempts"]] == [0, 4]
    said = "".join(path.read_text() for path in (lab.home / "crash" / "launch").glob("*.err"))
    assert "saved nothing beyond step 4" in said
    lab.until_recorded(job, "ExitCode", "7:0")     # and not srun's word: 9


def test_a_site_that_does_not_requeue_gets_one_job_after_the_other(lab: Lab, whole: Path) -> None:
    job = lab.launch("chain", *SLOW, again="submit")
    lab.until_step("chain", 3)
    lab.cluster.ask("scancel", "--signal=USR2", f"{job}.0")
    lab.until_state("chain", "done")
    first, second = (lab.home / "chain" / "launch" / "jobs").read_text().split()
    assert first == job
    lab.until_over(second)
    lab.holds("chain", whole)
    assert [attempt["job"] for attempt in lab.told("chain")["attempts"]] == [first, second]


def test_a_sweep_is_one_array_and_each_run_knows_its_task(lab: Lab) -> None:
    job = lab.launch("sweep", "seed=0,1", "steps=3")
    names = [f"sweep/seed={seed}" for seed in (0, 1)]
    for name in names:
        lab.until_state(name, "done")
    for number, name in enumerate(names):
        lab.until(lambda name=name, number=number: f"job {job}_{number}: completed" in lab.call("status", name),
                  f"the end of {name}")
    first, second = (drill["weights"](lab.home / name) for name in names)
    assert [key for key in first if not np.array_equal(first[key], second[key])]


def test_one_run_of_a_sweep_is_requeued_alone_and_all_are_cancelled_together(lab: Lab) -> None:
    job = lab.launch("swept", "seed=0,1", *SLOW, nodes=1, ranks=2)
    names = [f"swept/seed={seed}" for seed in (0, 1)]
    for name in names:
        lab.until_step(name, 2)
    lab.cluster.ask("scancel", "--signal=USR2", f"{job}_1.0")
    lab.until(lambda: len(lab.told(names[1]).get("attempts", [])) == 2, "the second attempt")
    assert len(lab.told(names[0])["attempts"]) == 1, "the other was requeued as well"
    lab.until_step(names[1], 5, attempt=2)
    lab.call("cancel", "swept")
    for number, name in enumerate(names):
        lab.until(lambda name=name, number=number: re.search(f"job {job}_{number}: (failed|completed)", lab.call(
            "status", name)), f"the end of {name}")
        assert lab.told(name)["state"] in ("preempted", "done")
    assert lab.told(names[1])["state"] == "preempted"


def test_a_shard_job_in_eight_tasks_one_of_them_killed_writes_what_one_process_writes(
        lab: Lab, slides: Path) -> None:
    words = [f"source={slides}", "dataset=painted", "size=64", "mpp=1.0", "labels=annotations", "tar_samples=40",
             "workers=1"]
    lab.call("shard", "shards/slides", *words, "out=here")
    out = "cut shards"
    # A task that is killed as soon as it runs: its first line of setup is the executioner.
    setup = ['[ "$SLURM_ARRAY_TASK_ID" != 3 ] || [ -e spared ] || kill -9 $$']
    job = lab.launch(f"{out}.launch", "shards/slides", *words, f"out={out}", verb="shard", nodes=1, parts=8,
                     setup=setup)
    lab.until(lambda: f"job {job}_3: failed" in lab.call("status", out), "the end of task 3")
    lab.until(lambda: not lab.cluster.ask("squeue", "-h", "-r", "-t", "R,PD", "-o", "%i"), "the end of all")
    assert not (lab.home / out / "index.json").exists(), "published without the part that was killed"
    (lab.home / "spared").touch()
    lab.call("resume", out)
    lab.until(lambda: (lab.home / out / "index.json").exists(), "the shards")
    here = lab.home / "here"
    assert len(list(here.glob("*.tar"))) == 3
    for path in (*here.glob("*.tar"), *here.glob("*.idx"), here / "samples.arrow", here / "index.json"):
        assert (lab.home / out / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_part_that_makes_room_comes_back_and_the_shards_are_whole(lab: Lab, slides: Path) -> None:
    words = [f"source={slides}", "dataset=painted", "size=64", "mpp=1.0", "labels=annotations", "tar_samples=40",
             "workers=1"]
    slow = lab.home / "slow python"
    slow.write_text(f"#!/bin/sh\n[ -e roomy ] || sleep 30\nexec {sys.executable} \"$@\"\n")
    slow.chmod(0o755)
    job = lab.launch("roomy.launch", "shards/slides", *words, "out=roomy shards", verb="shard", nodes=1, parts=2,
                     partition="low", python=str(slow))
    lab.until(lambda: "R" in lab.cluster.ask("squeue", "-h", "-r", "-j", f"{job}_1", "-o", "%t"), "part 1 running")
    time.sleep(2)
    (lab.home / "roomy").touch()
    other = lab.cluster.ask("sbatch", "--parsable", "-p", "high", "-N3", "--exclusive", "-o", "/dev/null", "--wrap",
                            "sleep 1").strip()
    assert lab.until_over(other) == "COMPLETED"
    lab.until((lab.home / "roomy shards" / "index.json").exists, "the shards")
    lab.until_recorded(f"{job}_1", "State", "COMPLETED")
    lab.until_recorded(f"{job}_1", "State", "PREEMPTED")


def test_scaling_over_one_and_two_nodes_ends_in_a_table(lab: Lab) -> None:
    lab.home.joinpath("scale.yaml").write_text(yaml.safe_dump({**ASKS, "nodes": 1}))
    lab.call("launch", "slurm", "scale.yaml", "nodes=1,2", "--unchecked", "--", "bench",
             *[word for word in drill["words"](Path("scale"), lab.shard) if not word.startswith(("steps=", "log."))],
             "steps=30")
    table = lab.home / "scale" / "scaling.md"
    lab.until(table.exists, "the table")
    rows = json.loads((lab.home / "scale" / "scaling.json").read_text())
    assert [(row["machines"], row["ranks"], row["batch"]) for row in rows] == [(1, 1, 12), (2, 2, 24)]
    assert all(row["images_per_second"] > 0 and row["first_step"] > 0 for row in rows)
    assert table.read_text().count("\n") == 4


def test_an_evaluation_goes_the_same_way(lab: Lab, whole: Path) -> None:
    job = lab.launch("evaluated", "eval/knn", f"encoder={whole / 'encoder'}", f"data.shards=[{lab.shard}]", "k=3",
                     "out=evaluated", "device=cpu", verb="eval", nodes=1)
    assert lab.until_over(job) == "COMPLETED", lab.said()
    assert 0 <= json.loads((lab.home / "evaluated" / "knn.json").read_text())["metrics"]["accuracy"] <= 1


def test_what_the_cluster_could_never_start_is_refused(lab: Lab) -> None:
    recipe = lab.home / "never.yaml"
    for asks, said in (({"hours": 1, "partition": "short"}, "hours=1 is more than partition short gives"),
                       ({"nodes": 4, "partition": "main"}, "nodes=4 is more than partition main has, 3"),
                       ({"gpus": 1, "partition": "main"}, "gpus=1 is more than any machine of partition main"),
                       ({"memory": 900, "partition": "main"}, "memory=900 is more than any machine"),
                       ({"partition": "hihg"}, "did you mean high?")):
        recipe.write_text(yaml.safe_dump({**ASKS, **asks}))
        words = drill["words"](Path("never"), lab.shard, "device=auto")
        assert said in lab.call("launch", "slurm", recipe, "--", "train", *words, code=2)
    assert not (lab.home / "never").exists()


def test_a_folder_whose_job_runs_is_not_launched_twice(lab: Lab) -> None:
    job = lab.launch("once", *SLOW)
    said = lab.call("launch", "slurm", "once.yaml", "--unchecked", "--", "train",
                    *drill["words"](Path("once"), lab.shard, *SLOW), code=10)
    assert f"job {job}" in said
    lab.cluster.ask("scancel", job)
    assert lab.until_over(job) == "CANCELLED"


def test_a_shell_of_salloc_is_no_rank_and_srun_in_it_is(lab: Lab) -> None:
    """Two tasks, in the shell of which nobody would answer the other."""
    ask = "import os; from launch import rank; print(rank.environment(os.environ).get('RANK', 'none'))"
    python = f"{sys.executable} -c \"{ask}\""
    said = subprocess.run(["salloc", "-N2", "--ntasks=2", "bash", "-c", f"{python}; srun {python}"], cwd=lab.home,
                          env=lab.environment, capture_output=True, text=True, check=True, timeout=120).stdout.split()
    assert said[0] == "none"
    assert sorted(said[1:]) == ["0", "1"]


def test_without_accounting_states_come_from_run_json_and_squeue(
        lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A PATH without sacct, and jobs that squeue has forgotten."""
    forgotten = lab.call("status", "plain")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo", "bash"):
        (tools / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setitem(lab.environment, "PATH", str(tools))
    assert ": completed" in forgotten, "sacct knows"
    said = lab.call("status", "plain")
    assert "plain: done, step 8 of 8" in said
    assert ": unknown" in said
    job = lab.launch("alone")
    assert f"job {job}: " in lab.call("status", "alone")
    lab.until_state("alone", "done")
    lab.until(lambda: f"job {job}: completed" in lab.call("status", "alone"), "the end")
