"""torchrun on this machine: one rank a GPU, or a few on the CPU; alone, or with other machines that do the same."""

import contextlib
import fcntl
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path

from launch import account
from launch.job import Local
from launch.rank import LAUNCH, MEETING

ELSEWHERE = "192.0.2.1", 9      # an address of nobody's, beyond every router
SIOCGIFADDR = 0x8915        # asks Linux for an interface's address
LINGER = 15         # seconds that torchrun may take to end after its ranks
CPU_RANKS = 2       # enough to be distributed, few enough for a laptop

# torchrun answers every failed rank with a page of its own traceback, below which the rank's one line is lost.
TORCHRUN = """
import ctypes, logging, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)      # if the launcher is killed, torchrun is asked to stop
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
logging.disable(logging.CRITICAL)
try:
    main(sys.argv[1:])
except ChildFailedError as error:
    code = error.get_first_failure()[1].exitcode
    sys.exit(code if code > 0 else 128 - code)
except SignalException:
    sys.exit(1)
"""


class Unreachable(RuntimeError):
    """A rendezvous that this machine cannot reach."""

    exit_code = 2


class PortInUse(RuntimeError):
    """Somebody listens on the port that was asked for."""

    exit_code = 2


def ranks(job: Local) -> int:
    """How many processes to start."""
    return job.ranks or gpus() or CPU_RANKS


def gpus() -> int:
    """NVIDIA GPUs this process may use, counted without torch: by the variable that hides them, or by the driver."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([each for each in visible.split(",") if each.strip() not in ("", "-1")])
    return len([each for each in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", each.name)])


def command(job: Local, arguments: list[str], debug: bool = False) -> list[str]:
    """The argv that runs `ssl-dist ARGUMENTS` on every rank."""
    torchrun = ["-m", "torch.distributed.run"] if debug else ["-c", TORCHRUN]
    least, most = job.least_most
    if job.rendezvous:
        meet = ["--nnodes", job.nodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", job.rendezvous, "--rdzv-id",
                meeting(arguments), "--local-addr", address(job),
                # Whose machine keeps the list of all: torchrun would compare names, which need not resolve.
                "--rdzv-conf", f"is_host={'true' if hosts(job) else 'false'}"]
        meet += ["--max-restarts", str(job.restarts)] if least < most else []
    elif job.port:
        meet = ["--master-port", str(job.port)]
    else:       # a port of 0 would be free when looked up and perhaps not when used; torchrun itself finds one
        meet = ["--standalone"]
    return [sys.executable, *torchrun, "--nproc-per-node", str(ranks(job)), *meet, "-m", "ssl_dist", *arguments]


def meeting(arguments: list[str]) -> str:
    """By what machines that are to do the same know each other."""
    return f"{zlib.crc32(' '.join(arguments).encode()):x}"


def address(job: Local) -> str:
    """This machine's address on the way to the rendezvous: its name need not be known to the others."""
    host, _, port = job.rendezvous.rpartition(":")
    try:
        family, kind, protocol, _, there = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(there)        # nothing is sent
            own = str(probe.getsockname()[0])
        if own.startswith("127.") and host not in ("localhost", own):       # its own name, as Debian resolves it
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect(ELSEWHERE)
                own = str(probe.getsockname()[0])
        return own
    except OSError as error:
        raise Unreachable(f"rendezvous={job.rendezvous}: {error.strerror}; name a machine that this one "
                          "reaches") from None


def hosts(job: Local) -> bool:
    """Whether the rendezvous is on this machine: its address can be listened on."""
    host, _, port = job.rendezvous.rpartition(":")
    for family, _, _, _, there in socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM):
        with contextlib.suppress(OSError), socket.socket(family) as probe:
            probe.bind((there[0], 0))
            return True
    return False


def interface(own: str) -> str:
    """The interface that has an address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == own:
                    return name
    return ""


def run(job: Local, arguments: list[str], run_folder: Path) -> int:
    """Runs the command to its end. torchrun says 1 for every failure; run.json knows which exit code it was."""
    if job.port:
        _claim(job.port)
    environment = dict(os.environ)
    # What a surrounding job left behind would make the ranks meet somewhere else.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", MEETING):
        environment.pop(name, None)
    cores = len(os.sched_getaffinity(0))
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks(job))))
    if name := job.network or (interface(address(job)) if job.rendezvous else ""):
        environment.setdefault("GLOO_SOCKET_IFNAME", name)
        environment.setdefault("NCCL_SOCKET_IFNAME", name)
    if job.rendezvous:
        # torchrun's own store outlives a round, and in the next its ranks find the addresses of those that are gone.
        environment |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", MEETING: meeting(arguments)}
    launch = environment[LAUNCH] = uuid.uuid4().hex
    least, most = job.least_most
    code = _wait(subprocess.Popen(command(job, arguments, debug="--debug" in arguments), env=environment),
                 lambda: 1 < most == least and account.code(run_folder, launch) is not None)
    if code < 0:        # torchrun was killed; its ranks are asked to stop, and have half a minute as under it
        code = 128 - code
        for _ in range(300):
            if account.code(run_folder, launch) is not None:
                break
            time.sleep(0.1)
    return account.settle(run_folder, launch, code) if code else 0


def _wait(torchrun: subprocess.Popen, over: Callable[[], bool]) -> int:
    """Waits for torchrun, and passes on what we are asked: it gives the ranks half a minute to save. Once all is over
    and its ranks are gone, torchrun may go on asking for other machines for minutes; it is not waited for."""

    def pass_on(number: int, _: object) -> None:
        # At a terminal Ctrl-C reaches the whole group, torchrun too; said twice it would end at once.
        if number != signal.SIGINT or not sys.stdin.isatty():
            torchrun.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)}
    try:
        alone = 0
        while alone < LINGER:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return torchrun.wait(1)
            alone = alone + 1 if over() and not _children(torchrun.pid) else 0
        torchrun.kill()
        return torchrun.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _children(process: int) -> list[str]:
    """Those that live; who has ended, and was not asked how, is none."""
    found: list[str] = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += task.read_text().split()
    return [child for child in found if _state(child) not in "Z"]


def _state(process: str) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return "Z"


def _claim(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise PortInUse(f"port={port} cannot be used ({error.strerror}); choose another, or leave port=0 and "
                            "a free one is found") from None
