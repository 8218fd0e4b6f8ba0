"""A real SLURM on this one machine: munge, slurmctld, three slurmd, and with accounting MariaDB and slurmdbd.

    python tests/slurm/cluster.py up FOLDER [--accounting]      prints what to export
    python tests/slurm/cluster.py down FOLDER

Everything lies in FOLDER, ports are free ones, nothing outside is changed. As root, for slurmd becomes the job's user.
Partitions: main; low, whose jobs give way to those of high, after twenty seconds; short, of at most five minutes, whose
jobs may not be requeued by anybody but their own user.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
ACCOUNTING = ("mariadbd", "mariadb-install-db", "slurmdbd", "sacct")
NODES = 3
CPUS = 4                # a node says it has; the machine may have fewer

SLURM_CONF = """
ClusterName=demo
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser=root
AuthType=auth/munge
# A credential of five seconds: a job that is requeued starts again at once, and not after two minutes.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,requeue_setup_env_fail
ReturnToService=2
JobRequeue=1
KillWait=10
# So that squeue forgets what sacct still knows.
MinJobAge=30
InactiveLimit=0
MessageTimeout=10
SlurmdTimeout=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{accounting}
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs={cpus} RealMemory=8000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=5 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=short Nodes=ALL MaxTime=5 State=UP PriorityTier=5 PreemptMode=OFF
"""
ACCOUNTED = """AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd}
AccountingStoragePass={folder}/munge.sock
JobAcctGatherType=jobacct_gather/linux"""
SLURMDBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
DbdHost=localhost
DbdPort={dbd}
SlurmUser=root
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={db}
StorageUser=slurm
StoragePass=slurm
StorageLoc=accounts
"""


class NotHere(RuntimeError):
    """Why there can be no SLURM on this machine."""


@dataclass
class Cluster:
    """A SLURM that runs; `environment` is what its commands need."""

    folder: Path
    accounting: bool

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def ask(self, *words: object, check: bool = True) -> str:
        """What a command of SLURM prints."""
        done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False, timeout=60,
                              env={**os.environ, **self.environment})
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(map(str, words))}: {done.stderr.strip()}")
        return done.stdout


def missing(*, accounting: bool) -> str:
    """What is missing for a SLURM here; nothing, where all is there."""
    if os.geteuid() != 0:
        return "slurmd becomes the user of each job, which only root can"
    lacking = [name for name in (*DAEMONS, *(ACCOUNTING if accounting else ())) if not shutil.which(name, path=_path())]
    return (f"{', '.join(lacking)} not installed; on Debian: apt install slurmctld slurmd slurm-client munge"
            + (" slurmdbd mariadb-server" if accounting else "")) if lacking else ""


def up(folder: Path, *, accounting: bool) -> Cluster:
    """Starts everything, and waits until all nodes are idle."""
    if lacking := missing(accounting=accounting):
        raise NotHere(lacking)
    folder = folder.resolve()
    if (folder / "pids.json").exists():
        raise NotHere(f"{folder} has one already, or had: take it down first")
    for name in ("", "state", *(f"spool-n{number + 1}" for number in range(NODES))):
        (folder / name).mkdir(mode=0o755, parents=True, exist_ok=True)
    ports = _ports(3 + NODES)
    values = {"folder": folder, "host": socket.gethostname().partition(".")[0], "nodes": NODES, "cpus": CPUS,
              "ctld": ports[0], "dbd": ports[1], "db": ports[2], "first": ports[3], "last": ports[-1]}
    conf = folder / "slurm.conf"
    conf.write_text(SLURM_CONF.format(
        accounting=ACCOUNTED.format(**values) if accounting else "AccountingStorageType=accounting_storage/none",
        **values))
    cluster = Cluster(folder, accounting)
    pids: dict[str, int] = {}
    try:
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        # --force: the folder may lie under /tmp, which others may write to.
        _start(pids, folder, "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.sock",
               f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed")
        _wait(lambda: (folder / "munge.sock").exists(), "munged", folder)
        if accounting:
            _accounts(pids, folder, values)
        _start(pids, folder, "slurmctld", "-D", "-f", conf, "-i")
        for number in range(NODES):
            _start(pids, folder, "slurmd", "-D", "-f", conf, "-N", f"n{number + 1}", name=f"slurmd-n{number + 1}")
        _wait(lambda: cluster.ask("sinfo", "-h", "-p", "main", "-o", "%t %D", check=False).strip() == f"idle {NODES}",
              "slurmctld", folder)
    except subprocess.CalledProcessError as error:
        down(folder)
        raise NotHere(f"{' '.join(map(str, error.cmd[:3]))} fails: {(error.stderr or b'').decode()[-500:]}") from None
    except BaseException:
        down(folder)
        raise
    return cluster


def down(folder: Path) -> None:
    """Ends what `up` started here, jobs included; the files stay."""
    folder = folder.resolve()
    try:
        pids = json.loads((folder / "pids.json").read_text())
    except (OSError, ValueError):
        return
    if "slurmctld" in pids:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(["scancel", "--full", "-s", "KILL", "-u", "root"], check=False, timeout=20,
                           capture_output=True, env={**os.environ, "SLURM_CONF": str(folder / "slurm.conf")})
    for name in reversed(pids):
        _end(pids[name], name.partition("-")[0])
    for stepd in [int(path.name) for path in Path("/proc").glob("[0-9]*") if _of(path, folder)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stepd, signal.SIGKILL)
    (folder / "pids.json").unlink()


def _accounts(pids: dict[str, int], folder: Path, values: dict[str, object]) -> None:
    database = folder / "db"
    subprocess.run(["mariadb-install-db", "--no-defaults", f"--datadir={database}", "--user=root",
                    "--auth-root-authentication-method=normal", "--skip-test-db"], check=True, capture_output=True)
    _start(pids, folder, "mariadbd", "--no-defaults", f"--datadir={database}", "--user=root", f"--port={values['db']}",
           "--bind-address=127.0.0.1", f"--socket={folder}/db.sock", f"--pid-file={folder}/mariadbd.pid",
           "--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900")
    ask = ["mariadb", "--no-defaults", f"--socket={folder}/db.sock", "-u", "root", "-e"]
    _wait(lambda: subprocess.run([*ask, "select 1"], check=False, capture_output=True).returncode == 0, "mariadbd",
          folder)
    subprocess.run([*ask, "create user 'slurm'@'%' identified by 'slurm'; create database accounts; "
                    "grant all on accounts.* to 'slurm'@'%'"], check=True)
    conf = folder / "slurmdbd.conf"
    conf.write_text(SLURMDBD_CONF.format(**values))
    conf.chmod(0o600)
    _start(pids, folder, "slurmdbd", "-D")
    manage = ["sacctmgr", "-i", "add"]
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    _wait(lambda: subprocess.run([*manage, "cluster", "demo"], check=False, capture_output=True, env=environment
                                 ).returncode == 0, "slurmdbd", folder)
    subprocess.run([*manage, "account", "lab"], check=True, capture_output=True, env=environment)
    subprocess.run([*manage, "user", "root", "account=lab"], check=True, capture_output=True, env=environment)


def _start(pids: dict[str, int], folder: Path, program: str, *words: object, name: str = "") -> None:
    with (folder / f"{name or program}.out").open("ab") as output:
        process = subprocess.Popen([str(shutil.which(program, path=_path())), *map(str, words)], stdout=output,
                                   stderr=output, stdin=subprocess.DEVNULL, start_new_session=True,
                                   env={**os.environ, "SLURM_CONF": str(folder / "slurm.conf")})
    pids[name or program] = process.pid
    (folder / "pids.json").write_text(json.dumps(pids))


def _wait(ready: object, what: str, folder: Path, patience: float = 60) -> None:
    deadline = time.monotonic() + patience
    while not ready():          # type: ignore[operator]
        if time.monotonic() > deadline:
            words = "".join(path.read_text(errors="replace")[-2000:] for path in folder.glob(f"{what}*.*")
                            if path.suffix in (".log", ".out"))
            raise NotHere(f"{what} does not come up: {words}")
        time.sleep(0.1)


def _end(pid: int, program: str) -> None:
    """Ends a process that is still the program it was started as."""
    for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 5)):
        deadline = time.monotonic() + patience
        while _is(pid, program) and time.monotonic() < deadline:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            time.sleep(0.1)


def _is(pid: int, program: str) -> bool:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return program in Path(words[0].decode()).name
    return False


def _of(process: Path, folder: Path) -> bool:
    """Whether a process is a step daemon of ours that outlived its slurmd."""
    with contextlib.suppress(OSError):
        if b"slurmstepd" in (process / "cmdline").read_bytes():
            return f"SLURM_CONF={folder}/".encode() in (process / "environ").read_bytes()
    return False


def _ports(count: int) -> list[int]:
    """Free ports, one after the other as SLURM wants those of its nodes."""
    for first in range(21000 + os.getpid() % 5000, 60000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return list(range(first, first + count))
    raise NotHere("no free ports")


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def main() -> int:
    """The commands."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("up", "down"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--accounting", action="store_true", help="with sacct; takes MariaDB")
    asked = parser.parse_args()
    try:
        if asked.what == "up":
            up(asked.folder, accounting=asked.accounting)
            sys.stdout.write(f"export SLURM_CONF={asked.folder.resolve()}/slurm.conf\n")
        else:
            down(asked.folder)
    except NotHere as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
