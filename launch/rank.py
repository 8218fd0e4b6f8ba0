"""Which rank a process is, where SLURM started it: the variables that torch wants, from those that srun sets.

torchrun sets them itself. A shell of salloc, a batch script or `srun --pty` has SLURM's variables as well and is no
rank: it is left alone.
"""

import contextlib
import os
import re
import socket
import subprocess
import zlib
from collections.abc import Mapping

MEETING = "SSL_DIST_MEETING"        # by which ranks know each other, on a port where others may listen
LAUNCH = "SSL_DIST_LAUNCH"          # this attempt, by which its launcher finds what became of it
FIRST_PORT, PORTS = 20_000, 40_000
SPECIAL = 4_294_967_280             # steps from here on are SLURM's own: of a batch script, of an interactive shell


def environment(given: Mapping[str, str], *, terminal: bool = False) -> dict[str, str]:
    """What torch wants, of a task of srun; nothing of a process that is no such task. What is typed at a `terminal` is
    in the shell of `srun --pty`, whose variables srun in it hands on."""
    step, tasks = given.get("SLURM_STEP_ID", ""), given.get("SLURM_STEP_NUM_TASKS", "1")
    alone = not step.isdigit() or int(step) >= SPECIAL or not tasks.isdigit() or int(tasks) < 2
    if alone or (terminal and "SLURM_PTY_PORT" in given) or "TORCHELASTIC_RUN_ID" in given:
        return {}
    job, again = given["SLURM_JOB_ID"], given.get("SLURM_RESTART_COUNT", "0")
    attempt = f"{job}.{step}.{again}"
    own = {"RANK": given["SLURM_PROCID"], "WORLD_SIZE": tasks, "LOCAL_RANK": given["SLURM_LOCALID"],
           "LOCAL_WORLD_SIZE": str(_here(given.get("SLURM_STEP_TASKS_PER_NODE", "1"), int(given["SLURM_NODEID"])))}
    if given.get("RANK") == own["RANK"] and given.get("WORLD_SIZE") == tasks and "MASTER_ADDR" in given \
            and "MASTER_PORT" in given and MEETING not in given:
        # Somebody has set them all.
        return {"LOCAL_RANK": own["LOCAL_RANK"], "LOCAL_WORLD_SIZE": own["LOCAL_WORLD_SIZE"]}
    port = FIRST_PORT + zlib.crc32(attempt.encode()) % PORTS
    return {**own, "MASTER_ADDR": _address(first(given["SLURM_STEP_NODELIST"]), given), "MASTER_PORT": str(port),
            MEETING: attempt, LAUNCH: given.get(LAUNCH) or attempt}


def words(given: Mapping[str, str]) -> str:
    """What to say of a process that SLURM gave several tasks and that is no rank of any; else nothing."""
    tasks = given.get("SLURM_NTASKS", "1")
    if not tasks.isdigit() or int(tasks) < 2 or "RANK" in given:
        return ""
    return (f"this is one process alone, though job {given.get('SLURM_JOB_ID', '?')} of SLURM has {tasks} tasks: write "
            "srun before the command to have a rank in each")


def first(nodes: str) -> str:
    """The first name of a list of SLURM's: n[01-03,7],m2 begins with n01."""
    name, more = nodes.partition("[")[::2] if "[" in nodes.partition(",")[0] else (nodes.partition(",")[0], "")
    return name + (re.split(r"[-,\]]", more)[0] + more.partition("]")[2].partition(",")[0] if more else "")


def _here(per_node: str, node: int) -> int:
    """How many tasks are on one node, of 2(x3),1: two on each of three, and one on the last."""
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node):
        node -= int(times or 1)
        if node < 0:
            return int(count)
    return 1


def _address(name: str, given: Mapping[str, str]) -> str:
    """A name that resolves, or the address that SLURM has of it; of the first node, where srun was called there."""
    with contextlib.suppress(OSError):
        socket.getaddrinfo(name, None)
        return name
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(["scontrol", "-o", "show", "node", name], capture_output=True, text=True, timeout=20,
                              check=True, env=dict(os.environ)).stdout
        if found := re.search(r"NodeAddr=(\S+)", told):
            socket.getaddrinfo(found.group(1), None)
            return found.group(1)
    return given.get("SLURM_LAUNCH_NODE_IPADDR") or name
