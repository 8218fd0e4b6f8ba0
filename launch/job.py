"""What is asked of machines, in words that no scheduler owns."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Local:
    """Some ranks of this machine, alone or together with those that others start on theirs."""

    ranks: int = field(default=0, metadata={"range": (0, 10_000), "help": "processes of this machine; 0: one a GPU, or "
                                            "two on a CPU"})
    port: int = field(default=0, metadata={"range": (0, 65535), "help": "where the ranks meet; 0: any free one"})
    nodes: str = field(default="1", metadata={
        "pattern": r"\d+(:\d+)?", "expand": str, "help": "machines that this is started on, or least:most, and the run "
                                                         "goes on with those that are there"})
    rendezvous: str = field(default="", metadata={
        "pattern": r"([\w.\-]+|\[[\da-fA-F:]+\]):\d+|", "help": "HOST:PORT of one of the machines, the same on all"})
    network: str = field(default="", metadata={"help": "the interface that ranks talk over, such as ib0; empty: the "
                                               "one towards the rendezvous"})
    restarts: int = field(default=3, metadata={"range": (0, 1000), "help": "least:most machines: so often ranks that "
                                               "failed are started again"})

    @property
    def least_most(self) -> tuple[int, int]:
        """Machines: at least so many, and at most."""
        least, _, most = self.nodes.partition(":")
        return int(least), int(most or least)

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        least, most = self.least_most
        broken = []
        if not 1 <= least <= most:
            broken.append(f"nodes={self.nodes} is not a number of machines, such as 2, or least:most, such as 2:4")
        if most > 1 and not self.rendezvous:
            broken.append(f"nodes={self.nodes} needs rendezvous=HOST:PORT, the same on every machine: the name of one "
                          "of them and a port that is free there")
        if most > 1 and not self.ranks:
            broken.append(f"nodes={self.nodes} needs ranks=N, the processes of each machine: they cannot see each "
                          "other's GPUs")
        if self.rendezvous and self.port:
            broken.append(f"port={self.port} and rendezvous={self.rendezvous} both say where the ranks meet; leave "
                          "one out")
        return broken


@dataclass
class Cluster:
    """What a job asks of SLURM. No site's name is in the code: all of them are here."""

    partition: str = field(default="", metadata={"help": "empty: the site's default"})
    account: str = field(default="", metadata={"help": "whose hours these are"})
    qos: str = field(default="", metadata={"help": "quality of service"})
    nodes: int = field(default=1, metadata={"range": (1, 100_000), "help": "machines"})
    gpus: int = field(default=0, metadata={"range": (0, 1000), "help": "of each machine, one a rank; 0: CPU alone"})
    gpu_type: str = field(default="", metadata={"pattern": r"[\w.\-]*", "help": "where a site has several: a100"})
    ranks: int = field(default=0, metadata={"range": (0, 10_000), "help": "of each machine; 0: one a GPU, or one"})
    cpus: int = field(default=4, metadata={"range": (1, 10_000), "help": "of each rank"})
    memory: float = field(default=0.0, metadata={"range": (0, 1e6), "help": "GB a machine; 0: the site's default"})
    hours: float = field(default=24.0, metadata={"range": (1 / 60, 24 * 365), "help": "of one attempt"})
    constraint: str = field(default="", metadata={"help": "features that the machines must have"})
    options: dict[str, Any] = field(default_factory=dict, metadata={
        "help": "any others of sbatch, by their long names: {reservation: week42, exclusive: true}"})
    grace: int = field(default=120, metadata={"range": (30, 86_400), "help": "seconds before the time limit, in which "
                                              "a run saves"})
    again: str = field(default="requeue", metadata={
        "choices": ("requeue", "submit", "never"), "help": "how a run that was stopped and got on goes on by itself: "
        "the same job, another one where the site does not requeue, or not"})
    setup: list[str] = field(default_factory=list, metadata={"help": "lines of shell before the command, such as "
                                                             "module load cuda"})
    python: str = field(default="", metadata={"help": "empty: the one that submits, or python in the container"})
    container: str = field(default="", metadata={"help": "an image for apptainer; empty: none"})
    binds: list[str] = field(default_factory=list, metadata={"help": "folders that the container sees"})
    stage: str = field(default="", metadata={"help": "a folder on each machine's own disk for copies of tars; $NAMES "
                                             "are those of the job: /scratch/$SLURM_JOB_ID"})
    network: str = field(default="", metadata={"help": "the interface that ranks talk over, such as ib0"})
    umask: str = field(default="", metadata={"pattern": "[0-7]{3,4}|", "expand": str, "help": "\"002\": the group may "
                                             "write to what is made"})
    offline: bool = field(default=True, metadata={"help": "the machines have no internet: nothing asks for it"})
    parts: int = field(default=1, metadata={"range": (1, 100_000), "help": "of a shard job, as an array"})
    parallel: int = field(default=256, metadata={"range": (1, 100_000), "help": "of an array, so many at once"})

    @property
    def tasks(self) -> int:
        """Ranks of each machine."""
        return self.ranks or self.gpus or 1

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        broken = []
        if self.gpus and self.ranks not in (0, self.gpus):
            broken.append(f"ranks={self.ranks} and gpus={self.gpus} do not go together: each rank has one GPU; leave "
                          "ranks out")
        if self.grace > self.hours * 3600 / 2:
            broken.append(f"grace={self.grace} seconds are more than half of hours={self.hours:g}; use less")
        if self.binds and not self.container:
            broken.append(f"binds={self.binds} are for a container, and container is empty")
        for name in self.options:
            if not re.fullmatch(r"[a-z][a-z0-9-]*", str(name)):
                broken.append(f"options.{name} is no long option of sbatch, such as reservation or mail-type")
            elif name in OWN:
                broken.append(f"options.{name} has a key of its own here: {OWN[name]}")
        if not names_only(self.stage):
            broken.append(f"stage={self.stage!r}: only names such as $SLURM_JOB_ID are put in")
        if "://" in self.container and self.offline:
            broken.append(f"container={self.container} would be fetched by every machine of the job, which has no "
                          f"internet (offline=true): fetch it now, apptainer pull image.sif {self.container}, and name "
                          "image.sif")
        if self.container and "://" not in self.container and not Path(self.container).expanduser().exists():
            broken.append(f"container={self.container} does not exist (looked in {Path.cwd()})")
        return broken


def names_only(path: str) -> bool:
    """Whether a shell would put in names at most, in double quotes."""
    return not re.search(r"[`\"\\\n]|\$[^\w{]|\$\{[^}]*\W[^}]*\}", path)


# Options of sbatch that a job sets by itself.
OWN = {"partition": "partition", "account": "account", "qos": "qos", "nodes": "nodes", "gpus-per-node": "gpus",
       "ntasks-per-node": "ranks", "cpus-per-task": "cpus", "mem": "memory", "time": "hours",
       "constraint": "constraint", "signal": "grace", "requeue": "again", "no-requeue": "again", "array": "parts",
       "output": "the run folder", "error": "the run folder", "dependency": "again", "job-name": "the run folder"}
