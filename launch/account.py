"""What became of an attempt: read from its run folder by whoever started it, and put right where the end was sudden.

    python -m launch.account RUN --code 15     after the ranks have ended with srun's code: prints their own, and exits
                                               with 0 where the run should go on by itself, with 3 where not
"""

import argparse
import json
import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launch.rank import LAUNCH

STOP = "launch/stop"        # in the run folder: somebody does not want it to go on
FRUITLESS = "launch/fruitless"      # attempts in a row that could not even begin, or save
# Nothing that a second attempt would do better: mistakes, data, numbers, disk, somebody's Ctrl-C.
FINAL = (0, 2, 3, 8, 9, 130)
# Not the run's own doing: no time to save, a folder that its last writer still holds, SLURM's signals before anybody
# heard them. These may happen so many times in a row.
BAD_LUCK, TIMES = (5, 10, 128 + 12, 128 + 15), 3


def code(run: Path, launch: str) -> int | None:
    """The exit code that this launch left in run.json, or, if it ended before it had one, beside a rank's log."""
    for path in (run / "run.json", *sorted(run.glob("logs/rank-*.exit.json"))):
        try:
            account = json.loads(path.read_text())
            attempt = account.get("attempts", [account])[-1]
            if launch in (attempt["launch"], *attempt.get("launches", [])):
                return int(account["exit_code"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None


def settle(run: Path, launch: str, ended: int) -> int:
    """Writes into run.json how a launch ended that said nothing any more; the exit code there, or `ended`."""
    try:
        account = json.loads((run / "run.json").read_text())
        attempt = account["attempts"][-1]
        if attempt["launch"] != launch or attempt["outcome"]:
            return ended if (own := code(run, launch)) is None else own
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return ended if (own := code(run, launch)) is None else own
    told = [each for path in sorted(run.glob("logs/rank-*.exit.json")) if (each := _read(path)).get("launch") == launch]
    ended = next((each["exit_code"] for each in told if each.get("exit_code")), ended)
    words = next((each["error"] for each in told if each.get("error")), f"the ranks ended with {ended}, and none said "
                 "why" + (f": killed by signal {ended - 128}" if ended > 128 else ""))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    attempt |= {"ended": now, "outcome": "failed"}
    _write(run / "run.json", account | {"state": "failed", "exit_code": ended, "error": words})
    return ended


def goes_on(run: Path, launch: str, ended: int) -> tuple[bool, str]:
    """Whether a run that ended should be taken up again by itself, and why not."""
    if ended in FINAL:
        return False, "" if ended == 0 else f"exit code {ended} is for somebody to look at; it does not go on by itself"
    if (run / STOP).exists():
        return False, "it was cancelled and does not go on by itself"
    account = _read(run / "run.json")
    attempt = (account.get("attempts") or [{}])[-1]
    begun = attempt.get("launch") == launch
    if begun and attempt.get("saved", 0) > attempt.get("from_step", 0):
        (run / FRUITLESS).unlink(missing_ok=True)
        return True, f"it goes on from step {attempt['saved']}"
    why = f"this attempt saved nothing beyond step {attempt.get('from_step', 0)}" if begun else \
        "this attempt had not begun when it ended"
    if ended in BAD_LUCK and (times := _count(run / FRUITLESS)) < TIMES:
        return True, f"{why}, with exit code {ended}; it is tried again ({times} of {TIMES})"
    return False, f"{why}, and another would not either; it does not go on by itself"


def _count(path: Path) -> int:
    """One more than the number in a file, kept there."""
    try:
        number = int(path.read_text()) + 1
    except (OSError, ValueError):
        number = 1
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{number}\n")
    return number


def _read(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text())
        return told if isinstance(told, dict) else {}
    except (OSError, ValueError):
        return {}


def _write(path: Path, content: dict[str, Any]) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".run-", delete=False) as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
        os.fchmod(file.fileno(), path.stat().st_mode & 0o777)
    Path(file.name).replace(path)


def main() -> int:
    """For the batch script of a cluster's job."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--code", type=int, required=True, help="with which the ranks ended")
    asked = parser.parse_args()
    launch = os.environ.get(LAUNCH, "")
    ended = settle(asked.run, launch, asked.code)
    again, why = goes_on(asked.run, launch, ended)
    sys.stdout.write(f"{ended}\n")
    if why:
        sys.stderr.write(f"ssl-dist: {asked.run}: {why}\n")
    return 0 if again else 3


if __name__ == "__main__":
    sys.exit(main())
