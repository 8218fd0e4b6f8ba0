"""What is asked of a machine, in words that no scheduler owns."""

from dataclasses import dataclass, field


@dataclass
class Job:
    """One command on some ranks of one machine."""

    ranks: int = field(default=0, metadata={"range": (0, 10_000), "help": "processes; 0: one a GPU, or two on a CPU"})
    port: int = field(default=0, metadata={"range": (0, 65535), "help": "where the ranks meet; 0: any free one"})
