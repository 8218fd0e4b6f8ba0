"""A table of its owner's, CSV, as lines of named cells; what is no such table is refused, with the line and what to
do."""

import csv
from collections.abc import Sequence
from pathlib import Path

from shards.index import ShardError


def lines(path: Path, needs: Sequence[str] = ()) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The names of the columns, and of every line that is not empty its number and its cells, stripped; `needs`: names
    that there must be."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:     # spreadsheets put a mark before the first word
            rows = list(csv.reader(handle))
    except (UnicodeDecodeError, OSError, csv.Error) as error:
        raise ShardError(f"{path} is no table ({error}); save it as CSV, separated by commas, in UTF-8") from None
    head = [name.strip() for name in rows[0]] if rows else []
    if len(head) == 1 and (other := next((sign for sign in ";\t" if sign in head[0]), None)):
        raise ShardError(f"{path} is separated by {'semicolons' if other == ';' else 'tabs'}; save it as CSV, "
                         "separated by commas")
    if lacking := [name for name in needs if name not in head]:
        raise ShardError(f"{path} begins with {', '.join(head) or 'nothing'}; it has no column {lacking[0]}")
    if len(set(head)) < len(head):
        raise ShardError(f"{path} has two columns {next(name for name in head if head.count(name) > 1)!r}; rename one")
    found = []
    for number, cells in enumerate(rows[1:], 2):
        if not any(cells):
            continue            # an empty line, as editors leave at the end
        if len(cells) != len(head):
            raise ShardError(f"{path}, line {number} has {len(cells)} cells and the first {len(head)}")
        found.append((number, dict(zip(head, map(str.strip, cells), strict=True))))
    return head, found
