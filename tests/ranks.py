"""Runs a function of a test file on several ranks, and hands back what every rank returned.

As a program: ranks.py FILE FUNCTION WORLDS FOLDER [MODULE ...] imports torch, the modules and the file once and then
forks, for an import of torch on every rank would take longer than the tests.
"""

import importlib
import importlib.util
import inspect
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as c10d

SECONDS = 120


def run(function: Callable[[Path], Any], worlds: tuple[int, ...], folder: Path, *modules: str) -> dict[int, list[Any]]:
    """By number of ranks, what function(folder) returned on each of them: tensors, numbers, lists and dicts of them."""
    words = [inspect.getfile(function), function.__name__, ",".join(map(str, worlds)), str(folder), *modules]
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, __file__, *words],
        env={"GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu", **clean, "OMP_NUM_THREADS": "1",
             "PYTHONPATH": os.pathsep.join(path for path in [str(Path(__file__).parents[1]), *sys.path] if path)},
        capture_output=True, text=True, timeout=2 * SECONDS, check=False)
    assert done.returncode == 0, f"{function.__name__} failed on {worlds} ranks:\n{done.stdout}\n{done.stderr}"
    return {world: [torch.load(folder / f"rank-{rank}-of-{world}.pt", weights_only=True) for rank in range(world)]
            for world in worlds}


def _be(rank: int, world: int, function: Callable[[Path], Any], folder: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    store = c10d.FileStore(str(folder / f"store-of-{world}"), world)
    c10d.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=SECONDS))
    torch.save(function(folder), folder / f"rank-{rank}-of-{world}.pt")
    c10d.barrier()
    c10d.destroy_process_group()


def _start(function: Callable[[Path], Any], world: int, folder: Path) -> bool:
    """Whether every rank came to its end; if one does not, the others do not wait for it."""
    children = []
    for rank in range(world):
        if (child := os.fork()) == 0:
            code = 1
            try:
                _be(rank, world, function, folder)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    sound = True
    while children:
        child, status = os.wait()
        children.remove(child)
        if status and sound:
            sound = False
            for other in children:
                os.kill(other, signal.SIGKILL)
    return sound


def _main(file: str, name: str, worlds: str, folder: Path, modules: list[str]) -> int:
    for module in modules:
        importlib.import_module(module)
    spec = importlib.util.spec_from_file_location("ranked", file)
    assert spec is not None, file
    assert spec.loader is not None, file
    ranked = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ranked)
    return 0 if all(_start(getattr(ranked, name), int(world), folder) for world in worlds.split(",")) else 1


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]), sys.argv[5:]))
