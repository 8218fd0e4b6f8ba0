"""DINO (Caron et al. 2021): a student says of every view what its own average of the past says of the large ones.

B tiles of one rank   D width of the encoder   K classes of the head   V views, the first L of them large
"""

import math
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from ssl_dist import dist, schedule
from ssl_dist.data import presets
from ssl_dist.data.batch import Batch, View, each
from ssl_dist.methods import base, losses
from ssl_dist.models.encoder import Encoder
from ssl_dist.models.heads import DinoHead


@dataclass(frozen=True)
class Config:
    student_temperature: float = field(default=0.1, metadata={"range": (1e-3, 10)})
    teacher_temperature: tuple[float, float] = field(default=(0.04, 0.07), metadata={
        "range": (1e-3, 10), "help": "at the start, and after the warm-up"})
    temperature_warmup: float = field(default=0.1, metadata={"range": (0, 1), "help": "part of the run"})
    momentum: tuple[float, float] = field(default=(0.996, 1.0), metadata={"range": (0, 1), "help": "of the teacher, "
                                                                          "at the start and at the end"})
    centre_momentum: float = field(default=0.9, metadata={"range": (0, 1)})
    frozen: float = field(default=0.01, metadata={"range": (0, 1), "help": "part of the run in which the head's last "
                                                  "layer stays: one pass of the tiles in the paper"})
    classes: int = field(default=65_536, metadata={"range": (2, 10**6), "help": "of the head"})
    hidden: int = field(default=2048, metadata={"range": (1, 10**5), "help": "of the head"})
    narrow: int = field(default=256, metadata={"range": (1, 10**5), "help": "of the head, before its last layer"})
    views: tuple[View, ...] = presets.asked("dino")

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        return base.large_first(self.views, "DINO")


class Method(base.Method):
    """Student and teacher, each an encoder with a head; `encoder` is the teacher's, as in the paper."""

    student: nn.ModuleDict
    teacher: nn.ModuleDict
    centre_K: Tensor

    def __init__(self, config: Config, encoder: Encoder):
        super().__init__()
        self.config = config
        self.student = nn.ModuleDict({"encoder": encoder, "head": DinoHead(encoder.width, config.hidden, config.narrow,
                                                                           config.classes)})
        self.teacher = cast(nn.ModuleDict, base.teacher(self.student))
        self.register_buffer("centre_K", torch.zeros(config.classes))
        self.views = each(config.views)
        self.large, self.chance = base.large(self.views), math.log(config.classes)
        self._said: list[Tensor] = []       # of every part of a batch, summed over so many rows
        self._rows = 0

    @property
    def encoder(self) -> nn.Module:     # type: ignore[override]
        """The teacher's."""
        return self.teacher["encoder"]

    @property
    def last(self) -> nn.Parameter:
        """The last layer of the student's head."""
        return cast(DinoHead, self.student["head"]).last

    def resting(self) -> list[nn.Parameter]:
        """The last layer, at the start."""
        return [self.last] if self.config.frozen else []

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """The loss, and the entropies that show a collapse: to one answer (0), or to none (ln K)."""
        base.freeze(self.last, progress < self.config.frozen)
        features = base.by_size(self.student["encoder"], batch.views)
        student = self.student["head"](features).chunk(len(batch.views))
        with torch.no_grad():
            teacher_NK = self.teacher["head"](base.by_size(self.encoder, batch.views[:self.large]))
        teacher = teacher_NK.chunk(self.large)
        temperature = self.temperature(progress)
        loss = losses.dino(student, teacher, self.centre_K, self.config.student_temperature, temperature)
        with torch.no_grad():
            self._said.append(losses.wide(teacher_NK).sum(dim=0))
            self._rows += len(teacher_NK)
            said = torch.softmax((losses.wide(teacher_NK) - self.centre_K) / temperature, dim=1)
            each_one = -(said * said.clamp_min(1e-12).log()).sum(dim=1).mean()
            together = said.mean(dim=0)
            of_all = -(together * together.clamp_min(1e-12).log()).sum()
        return {"loss": loss, "teacher_entropy": each_one / math.log(self.config.classes),
                "batch_entropy": of_all / math.log(self.config.classes), **base.spread(features[:len(teacher[0])])}

    def temperature(self, progress: float) -> float:
        """The teacher's, which must not be sharp before it knows anything."""
        start, end = self.config.teacher_temperature
        done = min(progress / self.config.temperature_warmup, 1.0) if self.config.temperature_warmup else 1.0
        return start + (end - start) * done

    def after_step(self, progress: float) -> None:
        """The teacher follows, and the centre moves to what it said."""
        base.follow(self.teacher, self.student, schedule.cosine(progress, *self.config.momentum))
        if self._said:
            momentum = self.config.centre_momentum
            mean_K = dist.average(torch.stack(self._said).sum(dim=0) / self._rows)
            self.centre_K.mul_(momentum).add_(mean_K, alpha=1 - momentum)
            self.forget()

    def forget(self) -> None:
        """Of the centre, what no step has confirmed."""
        self._said.clear()
        self._rows = 0
