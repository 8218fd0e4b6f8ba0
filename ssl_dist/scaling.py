"""What more machines bring: a short run on each number of them, and the table of all."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards import folder

ALONE = ["checkpoint.every=1000000000", "checkpoint.minutes=0", "log.pictures=0", "log.every=5"]     # nothing but steps
WARM = 2                # rows left out at the beginning: compilers, caches, first batches


class NoFigures(ValueError):
    """A folder without a run that could be measured."""

    exit_code = 2


@dataclass
class Row:
    """A run on some machines."""

    machines: int
    ranks: int
    batch: int
    images_per_second: float
    waiting: float              # for tiles, as part of the time
    first_step: float | None    # seconds from the start of a rank to the end of its first step


def write(run: Path) -> Row:
    """The figures of a run that has ended, kept beside it in bench.json."""
    account = json.loads((run / "run.json").read_text())
    attempt, rows = account["attempts"][-1], _rows(run)
    first = attempt.get("seconds_to", {}).get("step")
    if len(rows) <= WARM:
        raise NoFigures(f"{run} logged {len(rows)} rows of five steps, too few to leave out {WARM}; use steps="
                        f"{5 * (WARM + 4)} or more")
    told, kept = json.loads((run / "env.json").read_text()), rows[WARM:]
    found = Row(attempt.get("machines", 1), attempt["world"], rows[-1]["samples"] // rows[-1]["step"],
                round(statistics.median(row["images_per_second"] for row in kept), 1),
                round(statistics.median(row["data_wait"] for row in kept), 4), first)
    folder.write_json(run / "bench.json", {**vars(found), "machine": told, "rows": len(kept)})
    return found


def table(home: Path) -> list[str]:
    """Lines of a Markdown table of all runs below, written as scaling.md and scaling.json too."""
    found = sorted((_read(path) for path in home.glob("*/bench.json")), key=lambda row: (row.machines, row.ranks))
    if not found:
        raise NoFigures(f"{home} holds no run with a bench.json; `ssl-dist bench RECIPE run={home}/one …` makes one")
    base = found[0]
    lines = ["| machines | ranks | tiles a step | images/s | of linear | waiting for tiles | first step after |",
             "|---|---|---|---|---|---|---|"]
    for row in found:
        linear = row.images_per_second / base.images_per_second / (row.ranks / base.ranks)
        first = "" if row.first_step is None else f"{row.first_step:.1f} s"
        lines.append(f"| {row.machines} | {row.ranks} | {row.batch} | {row.images_per_second:,.0f} | {linear:.0%} | "
                     f"{row.waiting:.0%} | {first} |")
    folder.write(home / "scaling.md", "\n".join(lines) + "\n")
    folder.write_json(home / "scaling.json", [vars(row) for row in found])
    return lines


def _read(path: Path) -> Row:
    told = json.loads(path.read_text())
    return Row(**{name: told[name] for name in Row.__annotations__})


def _rows(run: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except FileNotFoundError:
        raise NoFigures(f"{run} has no metrics.jsonl: it is no run, or never began") from None
