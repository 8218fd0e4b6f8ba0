"""The run folder's own account: what state it is in, who tried when, on which machine, with which versions."""

import importlib.metadata
import json
import logging
import os
import platform
import re
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from shards import folder
from ssl_dist import dist

HEARTBEAT = 10.0        # seconds between two signs of life in run.json
PATIENCE = 5            # seconds that a survivor waits for rank 0's word; torchrun leaves it thirty

PACKAGES = ("ssl_dist", "torch", "torchvision", "timm", "deepspeed", "nvidia-dali-cuda130", "nvidia-dali-cuda120",
            "numpy", "opencv-python-headless", "openslide-bin", "pyarrow", "omegaconf", "safetensors")


def now() -> str:
    """The time as text, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Run:
    """run.json of one attempt. Rank 0 writes; on other ranks nothing happens."""

    def __init__(self, path: Path, steps: int, device: torch.device):
        self.path, self._beat, self._speaker = path / "run.json", 0.0, dist.rank() == 0
        before = json.loads(self.path.read_text()) if self.path.is_file() else {"attempts": []}
        for attempt in before["attempts"]:
            # Whoever did not say goodbye was killed: we hold the lock now, so nobody else is alive.
            attempt["outcome"] = attempt["outcome"] or "killed"
        self.content: dict[str, Any] = {
            "state": "running", "exit_code": None, "error": None, "step": before.get("step", 0), "steps": steps,
            "heartbeat": now(), "attempts": before["attempts"] + [{
                "started": now(), "ended": None, "host": socket.gethostname(), "pid": os.getpid(),
                "world": dist.world(), "device": str(device.type), "from_step": 0, "to_step": 0, "outcome": None}]}
        self._write()

    def starts_at(self, step: int) -> None:
        """Where this attempt takes over."""
        self.content["attempts"][-1] |= {"from_step": step, "to_step": step}
        self.content["step"] = step
        self._write()

    def alive(self, step: int) -> None:
        """A sign of life after `step`."""
        self.content["step"] = self.content["attempts"][-1]["to_step"] = step
        if time.monotonic() - self._beat > HEARTBEAT:
            self._write()

    def ends(self, state: str, exit_code: int, error: str | None = None) -> None:
        """The last word of this attempt: done, stopped, preempted or failed."""
        self.content |= {"state": state, "exit_code": exit_code, "error": error}
        self.content["attempts"][-1] |= {"ended": now(), "outcome": state}
        self._write()

    def survived(self, exit_code: int, error: str) -> None:
        """The last word where it may be rank 0 that died: a survivor gives it some seconds to speak for itself."""
        for _ in range(PATIENCE * 10):
            if dist.rank() == 0 or json.loads(self.path.read_text())["state"] != "running":
                break
            time.sleep(0.1)
        else:
            self._speaker = True
        self.ends("failed", exit_code, error)

    def _write(self) -> None:
        if self._speaker:
            self._beat = time.monotonic()
            folder.write_json(self.path, self.content | {"heartbeat": now()})


def environment() -> dict[str, Any]:
    """What this attempt runs on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    described = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = re.search(r"model name\s*:\s*(.+)", described)
    return {"python": platform.python_version(), "platform": platform.platform(), "host": socket.gethostname(),
            "cpu": cpu.group(1) if cpu else platform.processor(), "cpus": len(os.sched_getaffinity(0)),
            "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
            "slurm": {name: value for name, value in os.environ.items() if name.startswith("SLURM_JOB")},
            "packages": versions}


def log_to(path: Path) -> None:
    """Sends this rank's log lines to logs/rank-00000.log."""
    handler = logging.FileHandler(folder.make(path / "logs") / f"rank-{dist.rank():05d}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("ssl_dist")
    root.setLevel(logging.INFO)
    root.addHandler(handler)
