"""Collapse, seen in what a run logs: features that are all one, answers that are all one or none, a loss at chance."""

import statistics
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

PATIENCE = 3            # logged rows in a row that show a symptom before anybody is told
YOUNG = 0.05            # of the run, in which nothing is expected to have been learnt
STUCK = 0.002           # of the loss at chance
SPIKE = 6.0             # deviations above the mean of the rows before
ROWS = 64               # before it, that a spike is held against


@dataclass(frozen=True)
class Symptom:
    """What one scalar looks like when a method collapses, and what to try."""

    name: str
    shown: Callable[[float], bool]
    words: str
    advice: str


# Thresholds are ours: far from what healthy runs showed (0.3 to 1 for the deviation, 5 and more for the rank), near to
# what constant features give (0, and 1).
SYMPTOMS = (
    Symptom("deviation", lambda value: value < 0.02, "all tiles have nearly the same features",
            "a smaller optim.lr, a longer optim.warmup, synchronised BatchNorm, or a larger batch"),
    Symptom("rank", lambda value: value < 1.5, "features vary along one direction only",
            "stronger views (ssl-dist views), a larger batch, or less weight decay"),
    Symptom("teacher_entropy", lambda value: value > 0.999, "the teacher gives every class the same chance",
            "a lower method.teacher_temperature, or a lower method.centre_momentum"),
    Symptom("batch_entropy", lambda value: value < 0.02, "the teacher gives every tile the same answer",
            "a higher method.teacher_temperature, a longer method.temperature_warmup, or a smaller optim.lr"),
    Symptom("prototypes_used", lambda value: value < 0.05, "nearly all tiles go to the same few prototypes",
            "a smaller method.epsilon, more method.iterations, method.queue, or fewer method.prototypes"),
)


class Watch:
    """Says once of each symptom that it has stayed; remembers nothing that a resumed run would need."""

    def __init__(self) -> None:
        self._rows: Counter[str] = Counter()
        self._told: set[str] = set()
        self._losses: deque[float] = deque(maxlen=ROWS)
        self._leaping = False

    def __call__(self, row: Mapping[str, float], chance: float, progress: float) -> list[str]:
        """What a logged row adds to what is wrong, a sentence each. `chance`: the loss of who knows nothing."""
        spike = self._spike(row["loss"])
        if progress < YOUNG:
            return []
        shown = {each.name: f"{each.name}={row[each.name]:.3g}: {each.words}; try {each.advice}"
                 for each in SYMPTOMS if each.name in row and each.shown(row[each.name])}
        if abs(row["loss"] - chance) < STUCK * chance:
            shown["loss"] = (f"loss={row['loss']:.4g} is still what knowing nothing gives ({chance:.4g}); try another "
                             "optim.lr, or weaker views")
        self._rows = Counter({name: self._rows[name] + 1 for name in shown})
        new = [name for name in shown if self._rows[name] >= PATIENCE and name not in self._told]
        self._told.update(new)
        return [*spike, *(f"collapse? {shown[name]}" for name in new)]

    def _spike(self, loss: float) -> list[str]:
        """Whether the loss leaps out of what it was in the rows before; each leap is told once."""
        mean, deviation = (statistics.fmean(self._losses), statistics.pstdev(self._losses)) if self._losses else (0, 0)
        bound = mean + SPIKE * max(deviation, 0.002 * abs(mean))
        leaps, before = len(self._losses) >= ROWS // 4 and loss > bound, self._leaping
        # Were it to stay there, that would in time be what it was before.
        self._losses.append(bound if leaps else loss)
        self._leaping = leaps
        return [f"the loss leaps to {loss:.4g}, from {mean:.4g} ± {deviation:.2g} in the rows before; should it not "
                "come back, go on from an older checkpoint with a smaller optim.lr, or optim.clip=1"] \
            if leaps and not before else []
