"""What became of runs, from the files of their folders alone: state, attempts, how far, how fast, what went wrong."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

STALE = 120.0           # seconds without a sign in run.json, after which a run that calls itself running is doubted
TAIL = 1 << 16          # bytes of metrics.jsonl that are looked at


@dataclass
class Status:
    """One run folder."""

    path: Path
    state: str                      # running, done, stopped, preempted, failed; silent: it says running and is not
    step: int
    steps: int
    attempts: list[dict[str, Any]]
    heartbeat: str
    checkpoints: list[int]
    rate: float | None              # images a second, of the last row
    seconds_left: float | None
    loss: float | None
    trouble: str                    # what went wrong last


class NoRun(ValueError):
    """A folder that is not a run's."""

    exit_code = 2


def read(path: Path) -> Status:
    """The status of a run folder; nothing is written and nobody is asked."""
    try:
        account = json.loads((path / "run.json").read_text())
        state, steps, attempts = account["state"], int(account["steps"]), account["attempts"]
        step, heartbeat = int(account["step"]), account["heartbeat"]
    except FileNotFoundError:
        raise NoRun(f"{path} has no run.json: it is not a run folder, or its run never began") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NoRun(f"{path}/run.json cannot be read ({type(error).__name__}: {error})") from None
    rows = _rows(path / "metrics.jsonl")
    last = rows[-1] if rows else {}
    step = max(step, int(last.get("step", 0))) if state == "running" else step
    if state == "running" and _age(heartbeat) > STALE and _quiet(path):
        state = "silent"
    per_step = _per_step(rows)
    failed = [each for each in attempts if each.get("outcome") in ("killed", "failed")]
    trouble = account.get("error") or (f"{len(failed)} of {len(attempts)} attempts were "
                                       f"{'killed' if failed[-1]['outcome'] == 'killed' else 'ended by a failure'}"
                                       if failed else "")
    return Status(path, state, step, steps, attempts, heartbeat, _checkpoints(path), last.get("images_per_second"),
                  (steps - step) * per_step if per_step and state == "running" else None, last.get("loss"), trouble)


def below(root: Path) -> list[Status]:
    """Every run in a folder, at most three folders down, the last to give a sign first."""
    found = []
    for pattern in ("run.json", "*/run.json", "*/*/run.json", "*/*/*/run.json"):
        for path in root.glob(pattern):
            try:
                found.append(read(path.parent))
            except NoRun:
                continue
    return sorted(found, key=lambda each: each.heartbeat, reverse=True)


def lines(one: Status) -> list[str]:
    """A status for a person."""
    words = [f"{one.path}: {one.state}, step {one.step} of {one.steps} ({one.step / max(1, one.steps):.0%})"]
    if one.rate is not None:
        words.append(f"{one.rate:,.0f} images/s, loss {one.loss:.4g}" + (f", {_left(one)} left" if _left(one) else ""))
    words.append("checkpoints: " + (", ".join(map(str, one.checkpoints)) or "none"))
    for number, each in enumerate(one.attempts, 1):
        words.append(f"attempt {number}: {each.get('started')} on {each.get('host')}, {each.get('world')} ranks, steps "
                     f"{each.get('from_step')} to {each.get('to_step')}, {each.get('outcome') or one.state}")
    if one.state == "silent":
        words.append(f"its last sign is of {one.heartbeat}: it was killed, or its disk is not seen from here; run the "
                     "same command again to resume")
    if one.trouble:
        words.append(f"last trouble: {one.trouble}")
    return words


def row(one: Status) -> tuple[str, ...]:
    """A status as a row of a table: folder, state, step, rate, time left, attempts, trouble."""
    return (str(one.path), one.state, f"{one.step}/{one.steps}", "" if one.rate is None else f"{one.rate:,.0f}",
            _left(one), str(len(one.attempts)), one.trouble.partition(";")[0][:60])


def _left(one: Status) -> str:
    return "" if one.seconds_left is None else str(timedelta(seconds=round(one.seconds_left)))


def _rows(path: Path) -> list[dict[str, Any]]:
    """The last rows; a torn one is left out."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            text = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in text:
        try:
            each = json.loads(line)
        except ValueError:
            continue
        if isinstance(each, dict) and isinstance(each.get("step"), int):
            found.append(each)
    return found


def _per_step(rows: list[dict[str, Any]]) -> float | None:
    """Seconds a step takes, by the last two rows of one attempt."""
    if len(rows) < 2:
        return None
    (first, then), (early, late) = (rows[-2]["step"], rows[-1]["step"]), (rows[-2].get("time"), rows[-1].get("time"))
    return (late - early) / (then - first) if early is not None and late is not None and then > first and late > early \
        else None


def _checkpoints(path: Path) -> list[int]:
    names = [each.parent.name.removeprefix("step-") for each in path.glob("checkpoints/step-*/MANIFEST.json")]
    return sorted(int(name) for name in names if name.isdecimal())


def _age(stamp: str) -> float:
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(stamp)).total_seconds()
    except (ValueError, TypeError):
        return 0.0


def _quiet(path: Path) -> bool:
    """Whether no rank has given a sign for as long: run.json tells of rows alone, which may be far apart."""
    try:
        newest = max((each.stat().st_mtime for each in path.glob("alive/rank-*.json")), default=0.0)
    except OSError:
        return False
    return datetime.now(UTC).timestamp() - newest > STALE
