"""SLURM: sbatch scripts by submitit, jobs submitted, asked about and cancelled. The only submitit.

What is submitted is a script that a person can read: the command, once for each rank under srun, and after it a line
that decides whether the run goes on by itself. Nothing is pickled; the run folder is all the state there is.
"""

import contextlib
import difflib
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import SlurmExecutor

from launch import account
from launch.job import Cluster, names_only
from launch.rank import LAUNCH

JOBS = "jobs"               # in the folder of a launch: the numbers of its jobs, a line each
IF_AGAIN = 'if [ "$again" = 0 ]; then'
UNKNOWN, SILENT = "unknown", "unanswered"       # SLURM has forgotten a job; SLURM does not answer
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE",
         "PREEMPTED", "REVOKED")


class SlurmError(RuntimeError):
    """What SLURM refused, or what it would refuse."""

    exit_code = 2


@dataclass
class Work:
    """What a job does: one command, or one of several in each task of an array."""

    name: str
    folder: Path                    # of its script and of what it prints
    commands: list[list[str]]       # words of ssl-dist
    runs: list[Path] = field(default_factory=list)      # of each command that can go on by itself, its run folder
    nodes: int = 1
    ranks: int = 1
    gpus: int = 0                   # of each node
    after: list[str] = field(default_factory=list)      # jobs that must have ended before, by name or number
    well: bool = True               # and done well


class _Executor(SlurmExecutor):
    """submitit's knowledge of sbatch, with a command in place of a pickle."""

    def __init__(self, folder: Path, command: str, parameters: dict[str, Any], *, saves: bool):
        super().__init__(folder)
        self._command, self._saves = command, saves
        self.update_parameters(**{name: value for name, value in parameters.items() if name != "map_count"})
        self.parameters |= {name: value for name, value in parameters.items() if name == "map_count"}

    @classmethod
    def affinity(cls) -> int:
        return 1            # a script can be looked at where there is no srun

    def text(self) -> str:
        return self._make_submission_file_text(self._command, "")

    def submit_it(self) -> str:
        try:
            return str(self._submit_command(self._command).job_id)
        except Exception as error:      # submitit has one of its own around what sbatch says
            said = [line for line in str(error).splitlines() if "sbatch: " in line] or [str(error).splitlines()[-1]]
            for script in self.folder.glob(".submission_file_*.sh"):
                script.unlink()
            raise SlurmError("; ".join(line.strip().removeprefix("sbatch: ") for line in said)) from None

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        folder, self.folder = self.folder, Path(str(self.folder).replace("%", "%%"))     # sbatch would put in a number
        try:
            lines = super()._make_submission_file_text(command, uid).splitlines()
        finally:
            self.folder = folder
        # submitit asks for a signal always; what cannot save would only end early by it.
        return "\n".join(line for line in lines if self._saves or not line.startswith("#SBATCH --signal=")) + "\n"


def script(job: Cluster, work: Work) -> str:
    """The sbatch script, as it would be submitted."""
    return _executor(job, work).text()


def submit(job: Cluster, work: Work) -> str:
    """Submits, and writes the job's number down; returns it."""
    work.folder.mkdir(parents=True, exist_ok=True)
    with _outside():
        number = _executor(job, work).submit_it()
    with (work.folder / JOBS).open("a") as jobs:
        jobs.write(f"{number}\n")
    return number


@contextlib.contextmanager
def _outside() -> Iterator[None]:
    """Without the variables of a job that this may be in: sbatch would hand them on to the next one."""
    left = {name: os.environ.pop(name) for name in list(os.environ)
            if name.startswith("SLURM_") and name != "SLURM_CONF"}
    try:
        yield
    finally:
        os.environ.update(left)


def _executor(job: Cluster, work: Work) -> _Executor:
    folder = str(work.folder.absolute())
    if found := re.search(r"[\\\n]|%[jAat]", folder):
        raise SlurmError(f"SLURM would read {found.group()!r} in {folder} as something else; choose another name")
    parameters: dict[str, Any] = {
        "job_name": work.name, "time": math.ceil(job.hours * 60), "nodes": work.nodes, "ntasks_per_node": work.ranks,
        "cpus_per_task": job.cpus, "signal_delay_s": job.grace, "wckey": None,
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={job.cpus}"],
        "setup": _setup(job, work), "teardown": _teardown(job, work),
        "additional_parameters": {"requeue" if job.again == "requeue" else "no-requeue": True, **job.options}}
    gpus = f"{job.gpu_type}:{work.gpus}" if work.gpus and job.gpu_type else work.gpus
    after = work.after and ":".join(["afterok" if work.well else "afterany", *work.after])
    for name, value in (("partition", job.partition), ("account", job.account), ("qos", job.qos), ("dependency", after),
                        ("constraint", job.constraint), ("gpus_per_node", gpus), ("mem", _memory(job.memory))):
        if value:
            parameters[name] = value
    if work.after:
        parameters["additional_parameters"]["kill-on-invalid-dep"] = "yes"
    if len(work.commands) > 1:
        parameters |= {"map_count": len(work.commands), "array_parallelism": job.parallel}
    command = f"{python(job)} -P -u -m ssl_dist " + (_line(work.commands[0]) if len(work.commands) == 1 else
                                                  '"${words[@]}"')
    return _Executor(work.folder.absolute(), command, parameters, saves=bool(work.runs))


def python(job: Cluster) -> str:
    """What runs Python in the job: this one, another, or that of a container."""
    if not job.container:
        return shlex.quote(job.python or sys.executable)
    image = str(Path(job.container).expanduser().absolute()) if "://" not in job.container else job.container
    binds = [word for folder in job.binds for word in ("--bind", folder)]
    return shlex.join(["apptainer", "exec", *(["--nv"] if job.gpus else []), *binds, image, job.python or "python"])


def _setup(job: Cluster, work: Work) -> list[str]:
    lines = [f"cd {shlex.quote(str(Path.cwd()))} || exit 2"]
    if job.umask:
        lines.append(f"umask {job.umask}")
    lines += job.setup
    lines.append(f'export {LAUNCH}="$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}"')
    if job.network:
        name = shlex.quote(job.network)
        lines.append(f"export NCCL_SOCKET_IFNAME={name} GLOO_SOCKET_IFNAME={name}")
    if job.offline:
        lines.append("export HF_HUB_OFFLINE=1")
    if len(work.commands) > 1:
        lines.append('case "$SLURM_ARRAY_TASK_ID" in')
        for number, words in enumerate(work.commands):
            run = f" run={shlex.quote(str(work.runs[number]))}" if work.runs else ""
            lines.append(f"{number}) words=({_line(words)}){run} ;;")
        lines.append("esac")
    elif work.runs:
        lines.append(f"run={shlex.quote(str(work.runs[0]))}")
    if work.runs:
        lines.append(f'[ ! -e "$run/{account.STOP}" ] || {{ echo "$run was cancelled" >&2; exit 0; }}')
    return lines


def _teardown(job: Cluster, work: Work) -> list[str]:
    lines, many = ["code=$?"], len(work.commands) > 1
    if work.runs and "SLURM_JOB_ID" in job.stage:       # a folder of this job's, on every machine's own disk
        stage = re.sub(r"\$(SLURM_JOB_ID\b|\{SLURM_JOB_ID\})", "${SLURM_JOB_ID:?}", job.stage)
        lines.append(f'srun --ntasks={work.nodes} --ntasks-per-node=1 rm -rf -- "{stage}"')
    if work.runs:
        # srun says how the last rank was ended, be it by the end of the first; what they wrote down is the truth.
        lines += [f'told=$({python(job)} -P -m launch.account "$run" --code "$code"); again=$?', "code=${told:-$code}"]
        task = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if many else "$SLURM_JOB_ID"
        array, number = ('--array="$SLURM_ARRAY_TASK_ID" ', "_$SLURM_ARRAY_TASK_ID") if many else ("", "")
        lines += {"requeue": [IF_AGAIN, f'  scontrol requeue "{task}" && sleep 60', "fi"],
                  "submit": [IF_AGAIN,
                             f'  cp "$0" "$run/launch/next.sh"; words=(--parsable {array}"$run/launch/next.sh")',
                             "  next=$(unset $(compgen -v SLURM_ | grep -vx SLURM_CONF); sbatch \"${words[@]}\") &&",
                             f'    echo "${{next%%;*}}{number}" >> "$run/launch/{JOBS}" ||',
                             '    echo "the next job could not be submitted; do it yourself: sbatch ${words[*]}" >&2',
                             "fi"],
                  "never": [IF_AGAIN, "  echo 'again=never: submit it again to go on' >&2", "fi"]}[job.again]
    return [*lines, 'exit "$code"']


def _line(words: list[str]) -> str:
    """Words for the shell, as they are; of data.stage, $NAMES are put in."""
    if bad := [word for word in words if word.startswith("data.stage=") and not names_only(word)]:
        raise SlurmError(f"{bad[0]}: only names such as $SLURM_JOB_ID are put in")
    return " ".join(f'{word.partition("=")[0]}="{word.partition("=")[2]}"' if word.startswith("data.stage=") and
                    "$" in word else shlex.quote(word) for word in words)


def _memory(gigabytes: float) -> str:
    return f"{math.ceil(gigabytes * 1024)}M" if gigabytes else ""


def refused(job: Cluster, work: Work) -> list[str]:
    """What this cluster could never start, in words; nothing where it is not asked, for want of its commands."""
    told = _ask("scontrol", "--all", "-o", "show", "partition") if job.partition else None
    if not told:            # without a name, the site may send the job anywhere
        return []
    partitions = {found["PartitionName"]: found for line in told.splitlines() if (found := _pairs(line))}
    reasons = []
    for chosen in job.partition.split(","):
        if chosen not in partitions:
            close = difflib.get_close_matches(chosen, partitions, n=1)
            return [f"partition={chosen!r} is not one of {', '.join(sorted(partitions))}"
                    + (f"; did you mean {close[0]}?" if close else "")]
        reasons.append(_too_much(job, work, chosen, partitions[chosen]))
    return [] if not all(reasons) else reasons[0]      # of several, one that fits is enough


def _too_much(job: Cluster, work: Work, chosen: str, found: dict[str, str]) -> list[str]:
    """What a partition has not."""
    broken = []
    if (most := _minutes(found.get("MaxTime", ""))) and job.hours * 60 > most:
        broken.append(f"hours={job.hours:g} is more than partition {chosen} gives, {most / 60:.3g}")
    for name in ("MaxNodes", "TotalNodes"):
        if found.get(name, "").isdigit() and work.nodes > int(found[name]):
            broken.append(f"nodes={work.nodes} is more than partition {chosen} "
                          f"{'gives' if name == 'MaxNodes' else 'has'}, {found[name]}")
            break
    if nodes := [line.split("|") for line in (_ask("sinfo", "-h", "-N", "-p", chosen, "-o", "%c|%m|%G") or "").split()]:
        needs = {"gpus": work.gpus, "cpus": job.cpus * work.ranks, "memory": math.ceil(job.memory * 1024)}
        has = [{"gpus": _gpus(gres), "cpus": int(cpus), "memory": int(memory)} for cpus, memory, gres in nodes]
        for name, need in needs.items():
            if (largest := max(each[name] for each in has)) < need:
                asked, there = {"gpus": (f"gpus={need}", f"{largest} GPUs"),
                                "cpus": (f"cpus={job.cpus} for each of {work.ranks} ranks", f"{largest} cores"),
                                "memory": (f"memory={job.memory:g}", f"{largest / 1024:.4g} GB")}[name]
                broken.append(f"{asked} is more than any machine of partition {chosen} has, {there}")
    return broken


@dataclass
class State:
    """What SLURM says of a job."""

    job: str
    state: str                  # as SLURM writes it; or UNKNOWN, or SILENT
    reason: str = ""
    start: str = ""

    @property
    def over(self) -> bool:
        """Whether it is not waiting and not running."""
        return self.state in (*ENDED, UNKNOWN)

    def __str__(self) -> str:
        more = f" ({self.reason})" if self.reason not in ("", "None") else ""
        when = f", not before {self.start}" if self.state == "PENDING" and self.start not in ("", "N/A") else ""
        return f"job {self.job}: {self.state.lower()}{more}{when}"


def jobs(folder: Path) -> list[str]:
    """The numbers of the jobs that a launch wrote down, the first first."""
    try:
        return (folder / JOBS).read_text().split()
    except OSError:
        return []


def states(numbers: list[str]) -> list[State]:
    """What became of jobs: by squeue while SLURM remembers them, then by sacct where there is accounting."""
    found: dict[str, list[State]] = {}
    for number in numbers:
        told, why = _answer("squeue", "-h", "-r", "-t", "all", "-j", number, "-o", "%i|%T|%r|%S")
        if told:
            found[number] = [State(*line.split("|")) for line in told.splitlines()]
        elif told is None and "Invalid job id" not in why:
            found[number] = [State(number, SILENT, why)]
        elif told := _ask("sacct", "-n", "-P", "-X", "-j", number, "-o", "JobID,State"):
            found[number] = [State(name, state.split()[0]) for name, state in
                             (line.split("|") for line in told.splitlines())]
    return [state for number in numbers for state in found.get(number, [State(number, UNKNOWN)])]


def cancel(found: list[State], *, saves: bool) -> None:
    """Ends jobs. Where they can save, those that run are asked to, in their own time: SLURM would kill them soon."""
    numbers = [state.job for state in found]
    if not shutil.which("scancel"):
        raise SlurmError(f"job {', '.join(numbers)} is SLURM's, and scancel is not on PATH here; go to a machine that "
                         "submits jobs")
    gently = [state.job for state in found if saves and state.state == "RUNNING"]
    for words in (["--signal=USR2", *gently], [number for number in numbers if number not in gently]):
        if any(not word.startswith("-") for word in words):
            done = subprocess.run(["scancel", *words], capture_output=True, text=True, check=False)
            if done.returncode:
                raise SlurmError(done.stderr.strip() or f"scancel {' '.join(words)} failed")


def _ask(*words: str) -> str | None:
    """What a command of SLURM prints; None where there is none, or it refuses."""
    return _answer(*words)[0]


def _answer(*words: str) -> tuple[str | None, str]:
    """What a command prints; or None, and why."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"{words[0]}: {getattr(error, 'strerror', None) or error}"
    return (None, done.stderr.strip()) if done.returncode else (done.stdout, "")


def _pairs(line: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S*)", line))


def _minutes(written: str) -> float | None:
    """Minutes of 1-12:00:00, 12:00:00 or 30:00; None: no limit."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", written)
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0, 0)
    return (days * 24 + hours) * 60 + minutes + seconds / 60 or None


def _gpus(gres: str) -> int:
    """GPUs of gpu:a100:4(S:0-1),gpu:2."""
    return sum(int(count) for count in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", gres))
