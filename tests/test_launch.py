"""Launches: what is typed, what is refused, which rank a process is, and whether a run goes on by itself."""

import contextlib
import json
import os
import random
import re
import shlex
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from submitit.slurm.slurm import _parse_node_list

from launch import account, local, rank, slurm
from launch.job import Cluster, Local
from ssl_dist import jobs, schema
from ssl_dist.config import ConfigError

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).with_name("slurm") / "golden"

# What srun sets in the fourth task of two nodes with three and two tasks, and what else may lie about.
TASK = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "3",
        "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "3,2",
        "SLURM_STEP_NODELIST": "localhost,other", "SLURM_NTASKS": "5"}


def test_a_task_of_srun_is_a_rank() -> None:
    found = rank.environment(TASK)
    assert {name: found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")} == {
        "RANK": "3", "WORLD_SIZE": "5", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    assert 1024 < int(found["MASTER_PORT"]) < 65_536


def test_ranks_of_one_attempt_agree_and_those_of_another_have_another_name() -> None:
    first, other = rank.environment(TASK), rank.environment({**TASK, "SLURM_PROCID": "0", "SLURM_NODEID": "0"})
    again = rank.environment({**TASK, "SLURM_RESTART_COUNT": "1"})
    for name in ("MASTER_ADDR", "MASTER_PORT", rank.MEETING, rank.LAUNCH):
        assert first[name] == other[name]
    assert first[rank.MEETING] != again[rank.MEETING]


@pytest.mark.parametrize("shell", [
    {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "5", "SLURM_PROCID": "0"},                    # salloc, a batch script
    {**TASK, "SLURM_STEP_ID": "4294967290"}, {**TASK, "SLURM_STEP_ID": "interactive"},     # its interactive step
    {**TASK, "SLURM_STEP_NUM_TASKS": "1"},
    {**TASK, "TORCHELASTIC_RUN_ID": "x", "RANK": "1"}])                                 # torchrun in a task
def test_a_shell_is_no_rank(shell: dict[str, str]) -> None:
    assert rank.environment(shell) == {}


def test_srun_in_a_shell_of_srun_starts_ranks_and_the_shell_is_none() -> None:
    """The shell of `srun -n5 --pty bash` and what srun starts in it have the same variables, but not the same input."""
    given = {**TASK, "SLURM_PTY_PORT": "40000"}
    assert rank.environment(given, terminal=True) == {}
    assert rank.environment(given)["RANK"] == "3"


def test_what_other_launchers_left_behind_is_not_believed() -> None:
    left = {"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"}
    assert rank.environment({**TASK, **left}) == rank.environment(TASK)
    mine = {"RANK": "3", "WORLD_SIZE": "5", "MASTER_ADDR": "here", "MASTER_PORT": "1"}      # somebody's own script
    assert not set(mine) & set(rank.environment({**TASK, **mine}))


def test_one_process_where_there_are_tasks_for_more_is_said() -> None:
    assert "srun" in rank.words({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "5"})
    assert not rank.words({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"})
    assert not rank.words({**TASK, "RANK": "3"})


def test_the_first_node_of_a_list_is_the_one_that_submitit_reads() -> None:
    draw = random.Random(0)
    for _ in range(300):
        groups = []
        for _ in range(draw.randint(1, 3)):
            name = draw.choice(["n", "gpu-", "rack1node"])
            if draw.random() < 0.3:
                groups.append(f"{name}{draw.randint(0, 99)}")
            else:
                low = draw.randint(0, 50)
                inside = draw.choice([f"{low:03d}-{low + 3:03d}", f"{low}", f"{low},{low + 7}-{low + 9}"])
                groups.append(f"{name}[{inside}]{draw.choice(['', '-ib'])}")
        written = ",".join(groups)
        assert rank.first(written) == _parse_node_list(written)[0], written


def test_tasks_of_a_node_are_counted_as_plain_lists_count_them() -> None:
    for written, plain in {"2(x3),1": [2, 2, 2, 1], "4": [4], "1,3(x2),2": [1, 3, 3, 2]}.items():
        for node, count in enumerate(plain):
            assert rank.environment({**TASK, "SLURM_STEP_TASKS_PER_NODE": written, "SLURM_NODEID": str(node)})[
                "LOCAL_WORLD_SIZE"] == str(count)


def test_a_rank_takes_the_cores_that_slurm_gave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssl_dist import dist

    here = len(os.sched_getaffinity(0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert dist.cores() == max(1, here // 64), "a share of all, where nobody said more"
    monkeypatch.setenv(rank.MEETING, "7.0.0")
    for given, cores in (("1", 1), (str(here), here), (str(64 * here), here)):      # the last: bound to what it has
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", given)
        assert dist.cores() == cores
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")      # torchrun in such a task: its ranks share what the task has
    assert dist.cores() == max(1, here // 64)


def test_ranks_meet_where_others_listen_on_their_port(tmp_path: Path) -> None:
    """On the first port something that never answers, on the second another job of ours, on the third a chatterbox,
    on the fourth one who speaks in numbers."""
    program = textwrap.dedent("""
        import os, sys
        from datetime import timedelta
        import torch, torch.distributed as c10d
        from ssl_dist import dist
        dist.start(torch.device("cpu"), timedelta(seconds=60))
        print(sum(dist.gather(dist.rank() + 1)), flush=True)
        dist.stop()
        """)
    def answers(listener: socket.socket, answer: bytes) -> None:
        with contextlib.suppress(OSError):
            while True:
                asked, _ = listener.accept()
                with asked, contextlib.suppress(OSError):
                    asked.sendall(answer)

    with contextlib.ExitStack() as stack:
        deaf = stack.enter_context(socket.create_server(("", 0)))
        port = deaf.getsockname()[1]
        for number, answer in ((1, b"another 1234\n"), (2, b"SSH-2.0-x\n" * 1000), (3, b"ours\xfe\n")):
            listener = stack.enter_context(socket.create_server(("", port + number)))
            threading.Thread(target=answers, args=(listener, answer), daemon=True).start()
        ranks = [subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": "0",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), rank.MEETING: "ours",
                 "GLOO_SOCKET_IFNAME": "lo"}) for number in range(2)]
        assert [process.communicate(timeout=120)[0].split() for process in ranks] == [["3"], ["3"]]


def run_folder(path: Path, **told: Any) -> Path:
    """A run folder as an attempt leaves it that went from step 4 to its checkpoint of step 6."""
    for step in (4, 6):
        home = path / "checkpoints" / f"step-{step:06d}"
        home.mkdir(parents=True)
        (home / "MANIFEST.json").write_text("{}")
    (path / "run.json").write_text(json.dumps({
        "state": "running", "exit_code": None, "error": None, "step": 7,
        "attempts": [{"launch": "7.0", "from_step": 4, "saved": 6, "outcome": None, **told}]}))
    return path


@pytest.mark.parametrize(("code", "more", "again"), [
    (4, {}, True), (7, {}, True), (6, {}, True), (137, {}, True), (1, {}, True),    # preempted, a peer died, hang, …
    (0, {}, False), (2, {}, False), (3, {}, False), (8, {}, False), (9, {}, False), (130, {}, False),
    (4, {"from_step": 6}, False), (1, {"saved": 0}, False),                 # nothing came of this attempt
    (4, {"launch": "6.0"}, False), (137, {"launch": "6.0"}, False)])        # it had not begun
def test_a_run_goes_on_by_itself_only_where_another_attempt_may_do_better(
        code: int, more: dict[str, Any], again: bool, tmp_path: Path) -> None:
    found, why = account.goes_on(run_folder(tmp_path, **more), "7.0", code)
    assert found is again
    assert bool(why) is (code != 0)


@pytest.mark.parametrize("code", [5, 10, 140, 143])
def test_bad_luck_is_tried_again_three_times_in_a_row(code: int, tmp_path: Path) -> None:
    run = run_folder(tmp_path, launch="6.0")
    assert [account.goes_on(run, "7.0", code)[0] for _ in range(4)] == [True, True, False, False]
    assert account.goes_on(run, "6.0", code)[0], "this one got on, and the count begins anew"
    assert account.goes_on(run, "7.0", code)[0]


def test_a_run_that_was_cancelled_does_not_go_on(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    (run / "launch").mkdir()
    (run / account.STOP).write_text("")
    assert account.goes_on(run, "7.0", 4) == (False, "it was cancelled and does not go on by itself")


def test_an_end_that_nobody_could_tell_of_is_written_down(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    assert account.settle(run, "7.0", 137) == 137
    told = json.loads((run / "run.json").read_text())
    assert (told["state"], told["exit_code"], told["attempts"][-1]["outcome"]) == ("failed", 137, "failed")
    assert "killed by signal 9" in told["error"]
    assert account.settle(run, "7.0", 1) == 137, "what is written stays"


def test_a_run_that_is_done_is_done_though_a_rank_stumbled_on_its_way_out(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    told = json.loads((run / "run.json").read_text())
    told["attempts"][-1]["outcome"] = "done"
    (run / "run.json").write_text(json.dumps({**told, "state": "done", "exit_code": 0}))
    assert account.settle(run, "7.0", 134) == 0


def test_a_rank_that_left_a_reason_is_believed_before_the_launcher(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    (run / "logs").mkdir()
    (run / "logs" / "rank-00001.exit.json").write_text(json.dumps({"exit_code": 3, "error": "bad", "launch": "7.0"}))
    assert account.settle(run, "7.0", 137) == 3
    assert json.loads((run / "run.json").read_text())["error"] == "bad"
    (run / "run.json").unlink()
    assert account.settle(run, "7.0", 137) == 3
    assert account.settle(run, "8.0", 137) == 137, "of another attempt"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a shard folder's name and a source in it, to launch from; of no cluster."""
    for name in ("data/mine", "data/tcga", "archive"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "ssl_dist.sif").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def launched(where: str, words: str) -> list[str]:
    """What `ssl-dist launch` says to these words."""
    said: list[str] = []
    assert jobs.run(jobs.parse(where, shlex.split(words)), said.append, lambda words, world, allowed: None) == 0
    return said


@pytest.mark.parametrize(("name", "words"), [
    ("cluster", "launch/cluster --print -- train pretrain/simclr run=runs/first data.shards=[data/mine]"),
    ("machines", "launch/machines account=lab --print -- train pretrain/dino_tcga run=runs/dino "
                 "data.shards=[data/tcga] seed=1,2"),
    ("cpu", "launch/cpu parts=3 partition=cpu --print -- shard shards/slides source=archive out=data/cut dataset=mine"),
    ("container", "launch/container container=ssl_dist.sif binds=[/archive] --print -- "
                  "eval eval/linear encoder=runs/old/encoder data.shards=[data/mine]"),
    ("chain", "launch/chain --print -- train pretrain/simclr run=runs/first data.shards=[data/mine]")])
def test_a_script_is_what_it_was(name: str, words: str, place: Path) -> None:
    (place / "runs" / "old" / "encoder").mkdir(parents=True)
    text = "\n\n".join(launched("slurm", words)).replace(sys.executable, "PYTHON").replace(str(place), "HERE") + "\n"
    if os.environ.get("WRITE_GOLDEN"):
        (GOLDEN / f"{name}.sh").write_text(text)
    assert text == (GOLDEN / f"{name}.sh").read_text()


def test_a_job_over_many_datasets_is_one_job(place: Path) -> None:
    (text,) = launched("slurm", "launch/cpu parts=1 --print -- shard shards/all57 root=archive out=data/all")
    assert "ssl_dist shard shards/all57 root=archive out=data/all\n" in text
    assert f"#SBATCH --output={place}/data/all.launch/" in text


def test_every_script_is_one_that_bash_reads() -> None:
    for path in sorted(GOLDEN.glob("*.sh")):
        assert subprocess.run(["bash", "-n", str(path)], capture_output=True, check=False).returncode == 0, path


def test_what_stands_in_a_script_reaches_the_command_as_it_was_typed(place: Path) -> None:
    """The line of srun, read by a shell: quotes, spaces, dollars, and a stage whose names are put in."""
    odd = "it's a \"run\" $HOME `x`"
    job = Cluster(stage="/scratch/$JOB/x y", nodes=1)
    work = slurm.Work("x", place / odd / "launch", [jobs._told(job, ["demo", f"run={odd}"])])
    text = slurm.script(job, work)
    line = next(line for line in text.splitlines() if line.startswith("srun "))
    shown = subprocess.run(["/bin/bash", "-c", "JOB=7; shift() { :; }; srun() { printf '%s\\0' \"$@\"; }\n" + line],
                           capture_output=True, text=True, check=True).stdout.split("\0")
    assert f"run={odd}" in shown
    assert "data.stage=/scratch/7/x y" in shown
    assert str(place / odd / "launch" / "%j_%t_log.out") in shown


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(("words", "said"), [
    ("-- fly demo", "shard, eval, chain, bench, not 'fly'"), ("ranks=2", "not 'nothing'"),
    ("nodes=2 -- train demo data.shards=[data/mine]", "needs rendezvous=HOST:PORT"),
    ("nodes=3:2 rendezvous=a:1 ranks=1 -- train demo data.shards=[data/mine]", "least:most"),
    ("ranks=3 -- train demo data.shards=[data/mine] data.batch=16", "cannot be shared evenly by 3 ranks"),
    ("--nodes 2:3 --rendezvous a:1 --ranks 1 -- train demo data.shards=[data/mine] data.batch=16",
     "cannot be shared evenly by 3 ranks"),
    ("nodse=2 -- train demo", "did you mean nodes?")])
def test_what_cannot_be_launched_here_is_said_at_once(words: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        launched("local", words)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(("words", "said"), [
    ("gpus=3 nodes=1 -- train demo data.shards=[data/mine] data.batch=16", "cannot be shared evenly by 3 ranks"),
    ("hours=0 -- train demo data.shards=[data/mine]", "hours=0"),
    ("grace=3600 hours=1 gpus=0 -- train demo data.shards=[data/mine]", "more than half of hours=1"),
    ("options.time=3 -- train demo data.shards=[data/mine]", "has a key of its own here: hours"),
    ("container=docker://a/b -- train demo data.shards=[data/mine]", "apptainer pull image.sif docker://a/b"),
    ("gpus=0 -- train demo data.shards=[data/mine] --dry-rnu", "--dry-rnu is no option that a launch hands on"),
    ("gpus=0 -- train demo data.shards=[data/mine] 'data.stage=/a/$(reboot)'", "only names such as"),
    ("container=none.sif -- train demo data.shards=[data/mine]", "does not exist"),
    ("stage='/a/$(reboot)' -- train demo data.shards=[data/mine]", "only names such as"),
    ("launch/nowhere -- train demo", "no config launch/nowhere"),
    ("launch/cpu parts=2 -- shard shards/all57 root=archive", "takes many datasets one after the other"),
    ("gpus=0 -- train demo data.shards=[data/mine] optim.lr=1e-3,2e-3 method.name=nothing", "method.name='nothing'")])
def test_what_a_cluster_cannot_be_asked_is_said_at_once(words: str, said: str) -> None:
    with pytest.raises((ConfigError, slurm.SlurmError), match=re.escape(said)):
        launched("slurm", f"--print {words}")


@pytest.mark.usefixtures("place")
def test_a_sweep_is_every_combination_each_in_a_folder_of_its_own() -> None:
    asked = jobs.parse("local", shlex.split(
        "-- train demo data.shards=[data/mine] optim.lr=1e-3,2e-3 seed=1,2 run=runs/s encoder.args.layers=[1,1,1,1]"))
    swept = jobs._swept(asked)
    assert [words[-1] for words in swept] == [f"run=runs/s/lr={lr},seed={seed}" for lr in ("1e-3", "2e-3")
                                              for seed in (1, 2)]
    assert all("encoder.args.layers=[1,1,1,1]" in words and words[0] == "demo" for words in swept)
    assert {(words[2], words[3]) for words in swept} == {(f"optim.lr={lr}", f"seed={seed}") for lr in ("1e-3", "2e-3")
                                                        for seed in (1, 2)}


@pytest.mark.parametrize(("word", "values"), [
    ("a=1,2", ["a=1", "a=2"]), ("a=[1,2]", ["a=[1,2]"]), ("a=[1,2],[3]", ["a=[1,2]", "a=[3]"]),
    ("a='x,y'", ["a='x,y'"]), ("a={b: 1, c: 2}", ["a={b: 1, c: 2}"]), ("run=a,b", ["run=a,b"]), ("a=,", ["a=,"]),
    ("a=1,", ["a=1,"]), ("a=", ["a="])])
def test_a_comma_between_values_makes_a_sweep_and_one_inside_of_a_value_does_not(word: str, values: list[str]) -> None:
    assert jobs._values(word) == values


@pytest.mark.usefixtures("place")
def test_nodes_and_rendezvous_become_torchruns() -> None:
    (said,) = launched("local", "--nodes 2:3 --rendezvous localhost:29400 ranks=2 --print -- train demo "
                                "data.shards=[data/mine] data.batch=24")
    words = shlex.split(said)
    for name, value in (("--nnodes", "2:3"), ("--rdzv-endpoint", "localhost:29400"), ("--rdzv-backend", "c10d"),
                        ("--nproc-per-node", "2"), ("--max-restarts", "3")):
        assert words[words.index(name) + 1] == value
    assert words[words.index("ssl_dist") + 1:] == ["train", "demo", "data.shards=[data/mine]", "data.batch=24"]


def test_a_launch_reads_back_as_it_was_typed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = jobs.parse("slurm", shlex.split("gpus=2 hours=3 -- train demo data.shards=[data/mine] run=runs/x "
                                            "--allow-change seed"))
    jobs._note(asked, place / "runs" / "x" / "launch", asked.words, [])
    monkeypatch.chdir("/")
    again = jobs.again(place / "runs" / "x")
    assert (again.job, again.words, again.verb, Path.cwd()) == (asked.job, asked.words, "train", place)
    assert asked.words[-1] == "--allow-change=seed"
    with pytest.raises(jobs.NoLaunch, match="nothing was launched"):
        jobs.again(place)


def test_logs_of_all_ranks_are_one_in_the_order_of_time(tmp_path: Path) -> None:
    home, draw = tmp_path / "logs", random.Random(1)
    home.mkdir()
    said = []
    for number in range(12):
        lines, at = [], 0
        for line in range(20):
            at += draw.randint(1, 400)
            stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at // 1000)) + f",{at % 1000:03d}"
            said.append((at, number, line))
            lines.append(f"{stamp} INFO rank {number} line {line}\n  more of {number} {line}\n")
        (home / f"rank-{number:05d}.log").write_text("".join(lines))
    expected = [words for _, number, line in sorted(said) for words in (
        f"rank {number} line {line}", f"more of {number} {line}")]
    found = [re.sub(r"^ *\d+ (\S+ \S+ INFO )?", "", line).strip() for line in jobs.logs(tmp_path)]
    assert found == expected
    assert len(jobs.logs(tmp_path, 3)) == 40
    with pytest.raises(jobs.NoLaunch, match="no log of rank 12"):
        jobs.logs(tmp_path, 12)


def test_a_launch_folder_that_sbatch_would_misread_is_refused(place: Path) -> None:
    for name in ("a\\b", "a%j"):
        with pytest.raises(slurm.SlurmError, match="choose another name"):
            slurm.script(Cluster(), slurm.Work("x", place / name, [["train"]]))


def test_time_limits_and_gpus_are_read_as_slurm_writes_them() -> None:
    for written, minutes in {"1-12:00:00": 2160, "12:30:00": 750, "00:05:00": 5, "30:00": 30, "UNLIMITED": None,
                             "2-00:00:30": 2880.5}.items():
        assert slurm._minutes(written) == minutes
    for written, gpus in {"(null)": 0, "gpu:4": 4, "gpu:a100:8(S:0-1)": 8, "gpu:a:2,gpu:b:1,lustre:1": 3}.items():
        assert slurm._gpus(written) == gpus


def test_a_port_that_is_taken_is_refused_here() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(local.PortInUse, match=f"port={port}"):
            local.run(Local(ranks=1, port=port), ["train"], Path("nowhere"))


def test_every_key_of_a_cluster_says_what_it_is() -> None:
    assert not [name for name, each in Cluster.__dataclass_fields__.items() if "help" not in each.metadata]
    assert schema.load(Cluster, None, ["umask=002"]).umask == "002"
