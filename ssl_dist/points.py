"""Named points of a run: they tell where a rank is, for whoever watches it, and are where faults are made to happen.

A fault is `what@point`, and when: `kill@save.rename:rank=1,step=7`, `slow@data.next:rank=2,seconds=0.5`. Without
`rank` it is every rank's, without `step` it happens at every step. `times=1` ends it after so many.
"""

import errno
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# In the order in which a rank comes by; a save may come between any two steps.
POINTS = ("resume.load", "data.next", "step.forward", "step.backward", "step.agree", "step.update", "step.after",
          "save.begin", "save.file", "save.written", "save.manifest", "save.rename", "save.keep", "export")
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "usr2": signal.SIGUSR2,
           "int": signal.SIGINT}
REFUSALS = {"full": errno.ENOSPC, "quota": errno.EDQUOT, "ioerror": errno.EIO}
VALUES = {"nan": float("nan"), "inf": float("inf")}
ACTIONS = (*SIGNALS, *REFUSALS, *VALUES, "slow", "hang", "cut", "raise")


class Injected(RuntimeError):
    """A failure that was asked for."""

    exit_code = 1


@dataclass
class Fault:
    """One thing that shall go wrong."""

    what: str
    point: str
    rank: int | None = None
    step: int | None = None
    times: int = -1             # -1: always
    seconds: float = 1.0        # of `slow`

    def meets(self, point: str, step: int) -> bool:
        """Whether this is the point and the time."""
        return (self.point == point and self.times != 0 and self.rank in (None, int(os.environ.get("RANK", 0)))
                and self.step in (None, step))


@dataclass
class Mark:
    """Where a rank is, and since when, by a clock that only runs."""

    point: str
    step: int
    since: float


def fault(words: str) -> Fault:
    """A fault as it is written, or a ValueError that says what is wrong with it."""
    told = re.fullmatch(r"(\w+)@([\w.]+)(?::(.+))?", words)
    if told is None:
        raise ValueError(f"{words!r} is not what@point:rank=1,step=7")
    what, point, when = told.groups()
    if what not in ACTIONS:
        raise ValueError(f"{what!r} is not one of {', '.join(ACTIONS)}")
    if point not in POINTS:
        raise ValueError(f"{point!r} is not one of {', '.join(POINTS)}")
    if what in VALUES and point != "step.forward":
        raise ValueError(f"{what} needs a number, and there is one at step.forward alone: the loss")
    given: dict[str, float] = {}
    for word in when.split(",") if when else ():
        name, _, value = word.partition("=")
        try:
            given[name] = {"rank": int, "step": int, "times": int, "seconds": float}[name](value)
        except (KeyError, ValueError):
            raise ValueError(f"{word!r} is not rank=, step= or times= and a whole number, nor seconds= and a number"
                             ) from None
    return Fault(what, point, **given)      # type: ignore[arg-type]


_faults: list[Fault] = []
_mark = Mark("start", -1, time.monotonic())


def arm(words: list[str]) -> None:
    """A run begins here: from now on these faults happen in this process, and no others."""
    _faults[:] = map(fault, words)
    _mark.point, _mark.step, _mark.since = "start", -1, time.monotonic()


def at(point: str, step: int, path: Path | None = None) -> None:
    """This rank comes by a point. `path`: the file that is at stake there."""
    _mark.point, _mark.step, _mark.since = point, step, time.monotonic()
    at_side(point, step, path)


def at_side(point: str, step: int, path: Path | None = None) -> None:
    """A point that a helping thread comes by: where the rank is, it does not say."""
    for each in _faults:
        if each.what not in VALUES and each.meets(point, step):
            each.times -= 1
            _happen(each, path)


def value(point: str, step: int, found: float) -> float:
    """`found`, or what a fault makes of it."""
    for each in _faults:
        if each.what in VALUES and each.meets(point, step):
            each.times -= 1
            return VALUES[each.what]
    return found


def where() -> Mark:
    """Where this rank is."""
    return _mark


def _happen(told: Fault, path: Path | None) -> None:
    if told.what in SIGNALS:
        os.kill(os.getpid(), SIGNALS[told.what])
    elif told.what in REFUSALS:
        number = REFUSALS[told.what]
        raise OSError(number, os.strerror(number), str(path) if path else None)
    elif told.what == "slow":
        time.sleep(told.seconds)
    elif told.what == "hang":
        while True:
            time.sleep(3600)
    elif told.what == "raise":
        raise Injected(f"debug.faults: raise@{told.point}")
    elif told.what == "cut" and path is not None:
        os.truncate(path, path.stat().st_size // 2)


class Stopwatch:
    """How long this rank takes from the beginning of a step until it first needs the others: what makes all wait."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock, self._begun, self._spent, self._steps = clock, 0.0, 0.0, 0
        self._alone = False

    def begins(self) -> None:
        """A step begins."""
        self._begun, self._alone = self._clock(), True

    def meets(self) -> None:
        """This rank needs the others now; the first time in a step counts."""
        if self._alone:
            self._spent, self._steps, self._alone = self._spent + self._clock() - self._begun, self._steps + 1, False

    def read(self) -> float:
        """Seconds a step, since the last reading."""
        mean, self._spent, self._steps = self._spent / max(1, self._steps), 0.0, 0
        return mean


alone = Stopwatch()
