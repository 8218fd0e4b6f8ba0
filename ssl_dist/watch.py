"""Who watches the ranks: signs of life beside the run, stacks of all when one hangs, and the end of a signal's grace.

    RUN/alive/owner.json        whose folder this is (lock.py): of another attempt's ranks it tells that they shall end
    RUN/alive/rank-00001.json   who this rank is, where it is, and a number that grows while its process lives
    RUN/alive/hang              a rank of the attempt named in it has waited too long: all write their stacks and end
    RUN/stacks/rank-00001.txt   what every thread of it was doing
    RUN/launch/stop             somebody cancelled the run: rank 0 takes it for a signal

A thread of its own does this: while the main thread sits in a collective, no signal handler of Python's runs. No clocks
of two machines are compared: of others, only whether their number grows.
"""

import contextlib
import faulthandler
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch import account
from shards import folder
from shards.folder import FolderInUse
from ssl_dist import points
from ssl_dist.lock import BEAT, Owner

logger = logging.getLogger(__name__)

CROWD = 50              # signs a second that a shared disk is asked to take; of more ranks each gives fewer, but rank 0
FIRST = 3.0             # so many times the patience for what comes before the end of the first step
HANG, UNSAVED = 6, 5    # exit codes
ASKING = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)

Account = Callable[[str, int, str], None]       # writes down how this attempt ends: state, exit code, sentence


class Watch:
    """The watching thread of one rank."""

    def __init__(self, path: Path, rank: int, world: int, *, hang: float, grace: float, owner: Owner,
                 account: Account):
        self.path, self.rank, self.world, self.hang, self.grace, self.owner = path, rank, world, hang, grace, owner
        self.settled = False        # the first step is over
        self.saved = False          # the last checkpoint of this attempt is complete: nothing is lost any more
        self.over = False           # the run has come to its end: whoever takes the folder now takes it from nobody
        self._pause = max(BEAT, world / CROWD)
        self._account, self._beat, self._asked = account, 0, 0.0
        self._closing = False
        self._ear, mouth = socket.socketpair()
        self._mouth = mouth
        mouth.setblocking(False)
        folder.make(path / "alive")
        self._before = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the watching."""
        self._closing = True
        signal.set_wakeup_fd(self._before)
        self._mouth.send(b"\0")
        self._thread.join(BEAT)
        self._ear.close()
        self._mouth.close()

    def _run(self) -> None:
        while not self._closing:
            # Each for itself: a disk that refuses a sign of life must not keep a hang from being seen.
            for look in (self._breathe, self._hangs, self._look, self._cancelled):
                try:
                    look()
                except FolderInUse as error:
                    self._end_ousted(str(error))
                except (OSError, ValueError) as error:      # of a disk that refuses for a while nobody dies
                    logger.info("watching: %s", error)
            if self._closing:
                return
            pause = BEAT if self.rank == 0 or self._asked else self._pause
            heard, _, _ = select.select([self._ear], [], [], pause)
            for number in self._ear.recv(64) if heard else b"":
                if number in ASKING and not self._asked:
                    self._asked = time.monotonic()
                    here = points.where()
                    logger.info("%s came while this rank was at %s of step %d", signal.Signals(number).name, here.point,
                                here.step)

    def _hangs(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            if (self.path / "alive" / "hang").read_text() == self.owner.token:
                self._end_hung()

    def _cancelled(self) -> None:
        if self.rank == 0 and not self._asked and (self.path / account.STOP).exists():
            os.kill(os.getpid(), signal.SIGTERM)        # from a machine that can send no signal to this one

    def _breathe(self) -> None:
        self.owner.check()
        here = points.where()
        self._beat += 1
        path = self.path / "alive" / f"rank-{self.rank:05d}.json"
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps({
            "attempt": self.owner.token, "beat": self._beat, "host": host(), "pid": os.getpid(), "point": here.point,
            "step": here.step, "seconds": round(time.monotonic() - here.since, 1), "frame": _frame()}))
        draft.replace(path)         # not synced: it need not outlive a power cut
        self.owner.check()          # a disk that was away for a while is back just now

    def _look(self) -> None:
        here, now = points.where(), time.monotonic()
        waited, patience = now - here.since, self.hang * (1.0 if self.settled else FIRST)
        if waited > patience:
            try:
                (self.path / "alive" / "hang").write_text(self.owner.token)
            except OSError:         # nobody can be told, and nobody is waited for
                self._end_hung()
        if self._asked and not self.saved and now - self._asked > self.grace - BEAT:
            self._end(UNSAVED, "preempted", f"asked to stop {now - self._asked:.0f} s ago, and rank {self.rank} is "
                      f"still at {here.point} of step {here.step}: grace={self.grace:g} runs out, and nothing after "
                      "the last checkpoint is saved")

    def _end_ousted(self, sentence: str) -> None:
        """Ends where the folder is another's by now, in which nothing is to be written any more."""
        if self.over or self._closing:
            return
        sys.stderr.write(f"ssl-dist: error: {sentence}\n")
        sys.stderr.flush()
        os._exit(FolderInUse.exit_code)

    def _end_hung(self) -> None:
        """Writes this rank's stacks, finds out who keeps the others waiting, and ends."""
        with contextlib.suppress(OSError), (folder.make(self.path / "stacks") / f"rank-{self.rank:05d}.txt").open(
                "w") as file:
            here = points.where()
            file.write(f"rank {self.rank} on {socket.gethostname()}, at {here.point} of step {here.step} for "
                       f"{time.monotonic() - here.since:.0f} s\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        before = alive(self.path, self.owner.token)
        for _ in range(3):
            time.sleep(self._pause)
            with contextlib.suppress(OSError):
                self._breathe()
        words = blame(before, alive(self.path, self.owner.token), self.world)
        self._end(HANG, "failed", f"{words}; stacks: {self.path / 'stacks'}. Run the same command again to resume from "
                  "the last checkpoint")

    def _end(self, code: int, state: str, sentence: str) -> None:
        try:
            self._account(state, code, sentence)
        except Exception as error:      # whatever the disk holds or refuses, this rank ends
            logger.info("watching: %s", error)
        finally:
            if self.rank == 0:
                sys.stderr.write(f"ssl-dist: error: {sentence}\n")
            logger.error("%s", sentence)
            logging.shutdown()
            os._exit(code)      # the main thread will not come back


class Joining:
    """Ends this process where the ranks do not come together: a store that was stopped answers nobody, for ever."""

    def __init__(self, seconds: float):
        self._timer = threading.Timer(seconds, self._end, (seconds,))
        self._timer.daemon = True
        self._timer.start()

    def over(self) -> None:
        """They are together, and `Watch` takes over."""
        self._timer.cancel()

    @staticmethod
    def _end(seconds: float) -> None:
        sys.stderr.write(f"ssl-dist: error: rank {os.environ.get('RANK', 0)} has waited {seconds:.0f} s for the other "
                         "ranks to start; look whether all were started, and reach each other. Run the same command "
                         "again\n")
        sys.stderr.flush()
        os._exit(HANG)


def alive(path: Path, attempt: str | None = None) -> dict[int, dict[str, Any]]:
    """The last sign of life of every rank, or of those of one attempt."""
    found = {}
    for file in path.glob("alive/rank-*.json"):
        with contextlib.suppress(OSError, ValueError):
            told = json.loads(file.read_text())
            if attempt in (None, told.get("attempt")):
                found[int(file.stem.removeprefix("rank-"))] = told
    return found


def forget(path: Path, *, stacks: bool = False) -> None:
    """Drops an earlier attempt's signs, or its stacks. Only for who holds the run folder."""
    for file in path.glob("stacks/rank-*.txt") if stacks else (*path.glob("alive/rank-*.json"),
                                                               *path.glob("alive/hang")):
        file.unlink(missing_ok=True)


def blame(before: dict[int, dict[str, Any]], after: dict[int, dict[str, Any]], world: int) -> str:
    """Whom the others wait for: who gives no sign of life; else who is behind; else who is where the others are not."""
    silent = [rank for rank in range(world) if rank not in after
              or after[rank]["beat"] == before.get(rank, {"beat": -1})["beat"]]
    if silent:
        return f"{_named(silent, {**before, **after})} gives no sign of life: stopped, or its machine is gone"

    def progress(rank: int) -> tuple[int, int]:
        return after[rank]["step"], (*points.POINTS, "start").index(after[rank]["point"])

    behind = [rank for rank in range(world) if progress(rank) == min(map(progress, range(world)))]
    if len(behind) == world > 1:        # of those that wait in one place, the collective's code is the last
        behind = [rank for rank in range(world) if "/torch/" not in after[rank]["frame"]] or behind
    if len(behind) == world > 1:
        return f"all {world} ranks hang at {after[0]['point']} of step {after[0]['step']}: the network, or all at once"
    told = after[behind[0]]
    return (f"{_named(behind, after)} hangs at {told['point']} of step {told['step']} for {told['seconds']:.0f} s "
            f"(in {told['frame']})" + ("" if world == 1 else ", and the others wait"))


def stragglers(seconds: list[float], hosts: list[str]) -> str:
    """Who needs so much longer than the others to come to where ranks meet that all go at its pace; "" where none."""
    typical = sorted(seconds)[(len(seconds) - 1) // 2]
    slow = [rank for rank, own in enumerate(seconds) if own > 1.5 * typical + 0.02]
    return ", ".join(f"rank {rank} on {hosts[rank]} takes {seconds[rank]:.2f} s of its own a step, others {typical:.2f}"
                     for rank in slow)


def host() -> str:
    """This machine, as the scheduler calls it."""
    node = os.environ.get("SLURMD_NODENAME", "")
    return socket.gethostname() + (f" ({node})" if node and node != socket.gethostname() else "")


def _named(ranks: list[int], told: dict[int, dict[str, Any]]) -> str:
    names = [f"rank {rank} on {told[rank]['host']}" if rank in told else f"rank {rank}" for rank in ranks[:4]]
    return " and ".join(names + ([f"{len(ranks) - 4} more"] if len(ranks) > 4 else []))


def _frame() -> str:
    """What the main thread does."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else ""
