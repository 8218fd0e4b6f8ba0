"""`ssl-dist doctor`: look at this machine and say what would go wrong, before a job finds it out."""

import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import platform
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.table import Table

OLDEST_PYTHON = (3, 11)
DALI_WHEELS = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")
CUDA13_DRIVER = 580  # the first driver branch that runs CUDA 13
OPEN_FILES = 4096  # a rank holds one descriptor a tar; the usual 1024 is gone with a thousand tars and a few sockets
SHARED_MEMORY = 10**9  # bytes; Docker gives 64 MB, which NCCL fills with a handful of GPUs
FREE_PROBLEM, FREE_WARNING = 10**9, 20 * 10**9  # bytes; ViT-S with AdamW's moments: 21.7 M x 12 bytes, 0.26 GB
SLOW_WRITE = 2.0  # seconds for PROBE bytes
PROBE = 1 << 22
GLOO_SECONDS = 30
IMPORT_SECONDS = 90  # torch from a cold network disk

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")

# One process imports torch and forks: the import is most of the time, and is paid once.
GLOO_PROGRAM = f"""
import datetime, os, sys, time, torch, torch.distributed as dist
child = os.fork()
begin = time.perf_counter()
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:" + sys.argv[1], rank=0 if child else 1, world_size=2,
                        timeout=datetime.timedelta(seconds={GLOO_SECONDS}))
numbers = torch.full((1000,), 1.0 if child else 2.0)
dist.all_reduce(numbers)
seconds = time.perf_counter() - begin
if not bool((numbers == 3).all()):
    raise ArithmeticError(f"1 + 2 all-reduced to {{numbers[0].item()}}")
dist.barrier()
dist.destroy_process_group()
if child:
    sys.stdout.write(f"{{seconds:.3f}}")
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@dataclass(frozen=True)
class Finding:
    """What one check saw. `advice` says what to do, and is empty where nothing is to be done."""

    name: str
    state: Literal["ok", "warning", "problem"]
    found: str
    advice: str = ""


def examine(folder: Path = Path()) -> list[Finding]:
    """Run every check; `folder` is where runs or shards are to be written. A check that breaks is a problem itself."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        network = pool.submit(run, gloo)  # its process imports torch while we do
        machine = [run(check) for check in (python, packages, dali_wheels, gpu, torchvision, dali, openslide)]
        place = [run(disk, Path(folder)), *(run(check) for check in (shared_memory, open_files, cpus))]
        cluster = [run(check) for check in (slurm, environment)]
        return [*machine, network.result(), *place, *cluster]


def exit_code(findings: list[Finding]) -> int:
    """0, or 1 where there is a problem. Warnings do not stop anyone."""
    return int(any(one.state == "problem" for one in findings))


def table(findings: list[Finding]) -> "Table":
    """The findings for a terminal, as a rich renderable."""
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "warning": "yellow", "problem": "bold red"}
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("check", "state", "found, and what to do"):
        drawn.add_column(column, header_style="dim", no_wrap=column != "found, and what to do")
    for one in findings:
        said = Text(one.found)  # Text, not markup: an error message may hold [brackets]
        if one.advice:
            said.append(f"\n→ {one.advice}", style="dim" if one.state == "ok" else "")
        drawn.add_row(Text(one.name), Text(one.state, style=colours[one.state]), said)
    return drawn


def as_json(findings: list[Finding]) -> str:
    """The findings for a program: a list of objects."""
    return json.dumps([asdict(one) for one in findings], indent=2, ensure_ascii=False)


def run(check: Callable[..., Finding], *arguments: Any) -> Finding:
    """One check, shielded: what it raises becomes a line, never a traceback."""
    try:
        return check(*arguments)
    except Exception as error:
        name = check.__name__.replace("_", " ")
        return Finding(name, "problem", one_line(error), "the check itself broke: repair what the message names")


# ---- Python and its packages ----------------------------------------------------------------------------------------


def python() -> Finding:
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info[:2] >= OLDEST_PYTHON:
        return Finding("python", "ok", found)
    wanted = ".".join(map(str, OLDEST_PYTHON))
    return Finding("python", "problem", found, f"make the environment anew with Python {wanted} or newer")


def packages() -> Finding:
    from packaging.requirements import Requirement

    source, lines = requirements()
    if not lines:
        return Finding("packages", "warning", source, "pip install -e . in the checkout, or pip install ssl_dist")
    needed = [Requirement(line) for line in lines]
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    missing, old = [], []
    for one in needed:
        # CUDA 12 and 13 builds of DALI are one package under two names; which of them is dali_wheels' question
        names = DALI_WHEELS if one.name in DALI_WHEELS else (one.name,)
        version = next((found for name in names if (found := installed(name))), "")
        if not version:
            missing.append(str(one))
        elif not one.specifier.contains(version, prereleases=True):
            old.append(f"{one.name} {version} (wanted {one.specifier})")
    if missing or old:
        found = "; ".join(["missing: " + ", ".join(missing)] * bool(missing) + ["wrong: " + ", ".join(old)] * bool(old))
        wanted = [f"'{one}'" for one in needed if str(one) in missing or any(o.startswith(f"{one.name} ") for o in old)]
        return Finding("packages", "problem", found, "pip install " + " ".join(wanted))
    return Finding("packages", "ok", f"{len(needed)} of {len(needed)} as {source} wants them")


def requirements() -> tuple[str, list[str]]:
    """Where our dependencies are written down, and the lines: the installed metadata, or the checkout's pyproject."""
    try:
        return "the installed ssl_dist", importlib.metadata.requires("ssl_dist") or []
    except importlib.metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parent.parent / "pyproject.toml"
        if not project.is_file():
            return "ssl_dist is not installed, so the versions it needs are not known", []
        return "pyproject.toml", tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]


def installed(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def dali_wheels() -> Finding:
    found = [name for name in DALI_WHEELS if installed(name)]
    if len(found) == 2:
        return Finding(
            "dali wheels",
            "problem",
            f"both {DALI_WHEELS[0]} and {DALI_WHEELS[1]} are installed, and they share one folder",
            f"pip uninstall -y {' '.join(DALI_WHEELS)}, then install one of them: cuda130 for drivers from "
            f"{CUDA13_DRIVER} on, cuda120 for older ones",
        )
    if not found:
        return Finding("dali wheels", "problem", "no DALI is installed", f"pip install {DALI_WHEELS[1]}")
    version = driver()
    if found == [DALI_WHEELS[1]] and version and int(version.split(".")[0]) < CUDA13_DRIVER:
        return Finding(
            "dali wheels",
            "warning",
            f"{found[0]} {installed(found[0])} with driver {version}, which is older than {CUDA13_DRIVER}",
            f"pip uninstall -y {DALI_WHEELS[1]} && pip install {DALI_WHEELS[0]}, or update the driver",
        )
    return Finding("dali wheels", "ok", f"{found[0]} {installed(found[0])}")


# ---- the heavy libraries, used for a moment -------------------------------------------------------------------------


def gpu() -> Finding:
    torch = importlib.import_module("torch")
    with warnings.catch_warnings(record=True) as said:  # torch warns of a driver that is too old, and says False
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    build = f"torch {torch.__version__} for CUDA {torch.version.cuda}" if torch.version.cuda else (
        f"torch {torch.__version__}, a CPU build"
    )  # fmt: skip
    if usable:
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        listed = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        return Finding("gpu", "ok", f"{listed}, driver {driver() or 'unknown'}, {build}")
    if not device_files():
        return Finding("gpu", "ok", f"none; {build}", "training runs on the CPU: enough for the demo and the tests")
    reason = f" ({one_line(said[0].message)})" if said else ""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        advice = f"CUDA_VISIBLE_DEVICES={hidden!r} hides the GPUs: unset it"
    elif not torch.version.cuda:
        advice = "this torch is a CPU build: install the ordinary one, pip install --force-reinstall torch torchvision"
    else:
        advice = (
            f"the driver ({driver() or 'version unknown'}) must be new enough for torch's CUDA {torch.version.cuda}: "
            "update it, or install a torch for an older CUDA; in a container, start it with --gpus all (--nv)"
        )
    return Finding("gpu", "warning", f"{device_files()[0]} is there, but torch sees no GPU{reason}; {build}", advice)


def torchvision() -> Finding:
    try:
        version = importlib.import_module("torchvision").__version__
    except (ImportError, OSError, RuntimeError) as error:  # operator torchvision::nms does not exist
        advice = "torch and torchvision must be builds of one kind: pip install --force-reinstall torch torchvision"
        return Finding("torchvision", "problem", one_line(error), advice)
    return Finding("torchvision", "ok", f"{version} goes with torch")


def dali() -> Finding:
    numpy = importlib.import_module("numpy")
    image = importlib.import_module("PIL.Image")
    colour = (200, 120, 180)
    jpeg = io.BytesIO()
    image.new("RGB", (48, 32), colour).save(jpeg, "JPEG", quality=95)
    try:
        fn = importlib.import_module("nvidia.dali.fn")
        pipeline = importlib.import_module("nvidia.dali.pipeline").Pipeline(1, num_threads=1, device_id=None)
        with pipeline:
            encoded = fn.external_source(source=lambda: [numpy.frombuffer(jpeg.getvalue(), numpy.uint8)], device="cpu")
            pipeline.set_outputs(fn.decoders.image(encoded, device="cpu"))
        pipeline.build()
        begin = time.perf_counter()
        (decoded,) = pipeline.run()
        pixels = numpy.asarray(decoded.at(0)).astype(int)
        seconds = time.perf_counter() - begin
    except (ImportError, OSError, RuntimeError) as error:
        return Finding("dali", "problem", one_line(error), "pip install --force-reinstall the DALI wheel named above")
    if pixels.shape != (32, 48, 3) or abs(pixels - colour).max() > 4:  # 4: what JPEG at quality 95 may cost
        found = f"a 32 x 48 JPEG of colour {colour} came out as {pixels.shape} of {pixels.mean((0, 1)).round(1)}"
        return Finding("dali", "problem", found, "pip install --force-reinstall the DALI wheel named above")
    return Finding("dali", "ok", f"decodes a JPEG on the CPU ({1000 * seconds:.0f} ms)")


def openslide() -> Finding:
    try:
        library = importlib.import_module("openslide").__library_version__
    except (ImportError, OSError) as error:
        return Finding("openslide", "problem", one_line(error), "pip install openslide-bin openslide-python")
    if int(library.split(".")[0]) < 4:
        advice = "pip install openslide-bin, which is found before the system's library"
        return Finding("openslide", "warning", f"library {library}: no DICOM, no colour profiles", advice)
    return Finding("openslide", "ok", f"library {library}")


def gloo() -> Finding:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    surroundings = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    surroundings |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ranks = subprocess.Popen(
        [sys.executable, "-c", GLOO_PROGRAM, str(port)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=surroundings, start_new_session=True,
    )  # fmt: skip
    try:
        said, error = ranks.communicate(timeout=GLOO_SECONDS + IMPORT_SECONDS)
        broken = last_line(error) if ranks.returncode else ""
    except subprocess.TimeoutExpired:
        broken = f"no answer within {GLOO_SECONDS + IMPORT_SECONDS} s"
    finally:
        with contextlib.suppress(ProcessLookupError):  # the session is ours alone: both ranks, and nobody else
            os.killpg(ranks.pid, signal.SIGKILL)
        ranks.communicate()
    if broken:
        return Finding(
            "gloo",
            "problem",
            f"two processes on 127.0.0.1 could not all-reduce: {broken}",
            f"gloo asks for the address of this host's name: put '127.0.0.1 {socket.gethostname()}' into /etc/hosts, "
            "or on a single machine export GLOO_SOCKET_IFNAME=lo",
        )
    seconds = float(said.split()[-1])  # gloo itself may greet on the same stream
    if seconds > GLOO_SECONDS / 3:
        advice = f"the host name {socket.gethostname()} is looked up slowly: put it into /etc/hosts"
        return Finding("gloo", "warning", f"two processes met and all-reduced, but in {seconds:.1f} s", advice)
    return Finding("gloo", "ok", f"two processes met and all-reduced in {seconds:.2f} s")


# ---- the machine ----------------------------------------------------------------------------------------------------


def disk(folder: Path) -> Finding:
    folder = Path(folder)
    if not folder.is_dir():
        return Finding("disk", "problem", f"{folder} is not a folder", f"mkdir -p {folder}, or name another folder")
    before, after = (folder / f".ssl-dist-doctor-{os.getpid()}.{end}" for end in ("tmp", "done"))
    begin = time.perf_counter()
    try:
        with before.open("xb") as file:
            file.write(bytes(PROBE))
            file.flush()
            os.fsync(file.fileno())
        before.replace(after)
        if after.stat().st_size != PROBE:
            raise OSError(f"{after.name} has {after.stat().st_size} bytes after writing {PROBE}")
        after.unlink()
    except OSError as error:
        for file_left in (before, after):
            file_left.unlink(missing_ok=True)
        found = f"cannot write, fsync and rename in {folder.resolve()}: {one_line(error)}"
        return Finding("disk", "problem", found, "check its permissions, quota and mount, or name another folder")
    seconds = time.perf_counter() - begin
    free = shutil.disk_usage(folder).free
    found = f"{free / 1e9:,.1f} GB free in {folder.resolve()}; 4 MB written, synced, renamed: {1000 * seconds:,.0f} ms"
    if free < FREE_PROBLEM:
        return Finding("disk", "problem", found, "free some space: a checkpoint does not fit")
    if free < FREE_WARNING:
        return Finding("disk", "warning", found, "enough for the demo; a real run keeps several checkpoints")
    if seconds > SLOW_WRITE:
        return Finding("disk", "warning", found, "checkpoints will hold training up: use a faster disk for runs")
    return Finding("disk", "ok", found)


def shared_memory() -> Finding:
    if not Path("/dev/shm").is_dir():
        return Finding("shared memory", "warning", "no /dev/shm", "mount one (tmpfs): NCCL and worker processes use it")
    size = shutil.disk_usage("/dev/shm").total
    found = f"/dev/shm has {size / 1e9:,.1f} GB"
    if size < SHARED_MEMORY:
        return Finding("shared memory", "warning", found, "too little for NCCL: docker run --shm-size=8g or --ipc=host")
    return Finding("shared memory", "ok", found)


def open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = ["unlimited" if one == resource.RLIM_INFINITY else f"{one:,}" for one in (soft, hard)]
    found = f"at most {shown[0]} open files (may be raised to {shown[1]})"
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        reachable = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        return Finding("open files", "warning", found, f"ulimit -n {reachable} before training: a tar is a descriptor")
    return Finding("open files", "ok", found)


def cpus() -> Finding:
    present, allowed, quota = os.cpu_count() or 1, len(os.sched_getaffinity(0)), cgroup_quota()
    found = f"{allowed} of {present} may be used" + ("" if quota is None else f", the cgroup allows {quota:g} at once")
    if quota is not None and quota < allowed:
        advice = f"threads beyond {max(1, int(quota))} will only be throttled: count on {max(1, int(quota))}"
        return Finding("cpus", "warning", found, advice)
    if allowed == 1 < present:
        advice = "one core cannot feed a GPU: under SLURM pass --cpus-per-task to srun, else look at taskset"
        return Finding("cpus", "warning", found, advice)
    return Finding("cpus", "ok", found)


def cgroup_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """The CPUs' worth of time this process may use: the least quota on its way up the cgroup tree, or None."""
    quotas = []
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, controllers, path = line.split(":", 2)
        tree = root if not controllers else root / "cpu" if "cpu" in controllers.split(",") else None
        if tree is None:
            continue
        here = tree / path.strip("/")
        for group in (here, *here.parents):
            if not group.is_relative_to(tree):
                break
            if (group / "cpu.max").is_file():  # version 2: "200000 100000" or "max 100000"
                quota, period = (group / "cpu.max").read_text().split()
            elif (group / "cpu.cfs_quota_us").is_file():  # version 1: -1 is no limit
                quota = (group / "cpu.cfs_quota_us").read_text().strip()
                period = (group / "cpu.cfs_period_us").read_text().strip()
            else:
                continue
            if quota not in ("max", "-1"):
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


# ---- the cluster ----------------------------------------------------------------------------------------------------


def slurm() -> Finding:
    missing = [tool for tool in ("sbatch", "srun") if not shutil.which(tool)]
    if len(missing) == 2:
        return Finding("slurm", "ok", "none", "one machine is all there is: `ssl-dist launch local` runs on it")
    if missing:
        return Finding("slurm", "warning", f"{missing[0]} is not on PATH", "ask for SLURM's full client package")
    version = command("sbatch", "--version")
    job = os.environ.get("SLURM_JOB_ID")
    found = f"{version.stdout.strip() or 'version unknown'}, " + (f"inside job {job}" if job else "outside a job")
    if version.returncode:
        return Finding("slurm", "warning", f"sbatch --version fails: {last_line(version.stderr)}", "look at slurm.conf")
    if not shutil.which("sacct"):
        return Finding("slurm", "warning", f"{found}; no sacct", "without it submitit calls every job UNKNOWN")
    accounting = command("sacct", "--noheader", "--allocations", "--format=JobID")
    if accounting.returncode:
        return Finding(
            "slurm",
            "warning",
            f"{found}; sacct does not answer: {last_line(accounting.stderr)}",
            "jobs can be submitted, but their state stays UNKNOWN to submitit: ask for accounting (slurmdbd)",
        )
    return Finding("slurm", "ok", f"{found}; sacct answers")


def environment() -> Finding:
    left = [name for name in LAUNCHED if os.environ.get(name)]
    tasks = os.environ.get("SLURM_NTASKS", "")
    if tasks.isdigit() and int(tasks) > 1:  # in a shell of salloc, or of srun --pty with several tasks
        left.append("SLURM_NTASKS")
    if left:
        found = ", ".join(f"{name}={os.environ[name]}" for name in left)
        advice = f"a single process would wait for peers that never come: unset {' '.join(left)}"
        return Finding("environment", "warning", found, advice)
    return Finding("environment", "ok", "no variables left over from torchrun or SLURM")


def device_files() -> list[Path]:
    return sorted(Path("/dev").glob("nvidia[0-9]*"))


def driver() -> str:
    """The NVIDIA driver's version, or nothing."""
    if not shutil.which("nvidia-smi"):
        return ""
    asked = command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    lines = asked.stdout.split()
    return lines[0] if not asked.returncode and lines and lines[0][0].isdigit() else ""


def command(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a program and keep what it says; one that does not answer in ten seconds has failed."""
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, 124, "", f"{words[0]} did not answer in 10 s")


def last_line(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def one_line(error: BaseException | Warning | str) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if isinstance(error, BaseException) and text else text or repr(error)
