"""A paper's whole chain as one command: lines that a user could type, one after the other, and not again once done.

    OUT/chain.json      what slides were painted, the lines that are done, and the seconds that each took

Every line goes on where it stopped, so a chain does; whoever asks it to stop asks the line at work.
"""

import hashlib
import json
import os
import shlex
import signal
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from shards import folder, synthetic
from ssl_dist.schema import ConfigError

NAMES = "source", "labels", "out"
VERBS = "shard", "check", "train", "launch", "draw", "embed", "eval", "export", "report"
FORWARDED = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2


@dataclass(kw_only=True)
class Nodes:
    """Lymph nodes to paint, where there are no slides."""

    train: int = field(default=48, metadata={"range": (8, 10**4), "help": "slides, half of them with a metastasis"})
    test: int = field(default=32, metadata={"range": (8, 10**4)})
    size: int = field(default=3072, metadata={"range": (512, 32_768), "help": "pixels of half a micron"})
    seed: int = field(default=0, metadata={"range": (0, 2**32 - 1)})

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        both = 2 * len(synthetic.SCANNERS)
        return [f"{name}={value} is no multiple of {both}: every scanner has as many slides with metastasis as without"
                for name, value in (("train", self.train), ("test", self.test)) if value % both]


@dataclass(kw_only=True)
class Chain:
    """`ssl-dist chain`."""

    out: Path = field(metadata={"help": "folder of all that is made"})
    source: Path | None = field(default=None, metadata={"exists": True, "help": "folder of the slides; null: small "
                                                        "ones are painted, in OUT/slides"})
    labels: Path | None = field(default=None, metadata={
        "exists": True, "help": "a CSV table of slides: slide, label, split; of painted ones it is written"})
    paint: Nodes = field(default_factory=Nodes)
    size: str = field(default="", metadata={"help": "which of `lines`; empty: small for painted slides, paper for "
                                                    "others"})
    lines: dict[str, Any] = field(metadata={"help": "by size, the commands, with {source}, {labels} and {out} in them"})

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        broken = []
        if (self.source is None) != (self.labels is None):
            broken.append(f"source={self.source} and labels={self.labels} go together: give both, or neither")
        if self.asked not in self.lines:
            broken.append(f"size={self.asked!r} is not one of {', '.join(map(str, self.lines))}")
        for size, lines in self.lines.items():
            if not isinstance(lines, list) or not lines or not all(isinstance(line, str) for line in lines):
                broken.append(f"lines.{size} is not a list of commands")
                continue
            broken += [f"lines.{size}[{number}] {words}" for number, line in enumerate(lines) if (words := _odd(line))]
        return broken

    @property
    def asked(self) -> str:
        """The size of the lines."""
        return self.size or ("small" if self.source is None else "paper")

    def commands(self) -> list[list[str]]:
        """The words of every line."""
        slides = self.out / "slides"
        names = {"out": self.out, "source": self.source or slides, "labels": self.labels or slides / "labels.csv"}
        return [[word.format(**names) for word in shlex.split(line)] for line in self.lines[self.asked]]


def _odd(line: str) -> str:
    """What is wrong with a line, if anything is."""
    try:
        unknown = {name for _, name, *_ in string.Formatter().parse(line) if name is not None} - {*NAMES}
        words = shlex.split(line) or [""]
    except ValueError as error:
        return f"cannot be read ({error}); braces that are no name are doubled: {{{{size: 64}}}}"
    if unknown:
        return (f"has {{{unknown.pop()}}}; known are {', '.join(f'{{{name}}}' for name in NAMES)}, and other braces "
                "are doubled: {{size: 64}}")
    if words[0] not in VERBS:
        return f"begins with {words[0]!r}, not one of {', '.join(VERBS)}"
    rest = words[words.index("--") + 1:] if "--" in words else words
    return "" if len(rest) > 1 else "says nothing of what to do it with"


class LineFailed(RuntimeError):
    """A line that ended with an error; its own words stand above."""

    def __init__(self, what: str, exit_code: int):
        super().__init__(f"ended at: {what}; mend what the line above says, call it again, it goes on there")
        self.exit_code = exit_code


def run(settings: Chain) -> None:
    """Paints slides, if there are none, and does every line that is not done."""
    console, note = Console(), folder.make(settings.out) / "chain.json"
    with folder.hold(settings.out, ".chain.lock"):
        commands, before = settings.commands(), _noted(note)
        painted = vars(settings.paint) if settings.source is None else None
        if before.get("painted", painted) != painted:
            raise ConfigError([f"{settings.out} was begun with {before['painted'] or 'slides of your own'}, and now it "
                               f"is to be {painted or 'slides of your own'}; choose another out"])
        done: list[dict[str, Any]] = before.get("lines", [])
        digests = [_digest(settings, words) for words in commands]
        left = next((number for number, digest in enumerate(digests)
                     if number >= len(done) or done[number]["digest"] != digest), len(commands))
        del done[left:]
        folder.write_json(note, {"painted": painted, "lines": done})
        if settings.source is None:
            _paint(settings, console)
        for number, words in enumerate(commands):
            title = f"{number + 1} of {len(commands)}: {words[0]}"
            if number < left:
                console.print(f"{title}, done in {done[number]['seconds']:.0f} s", highlight=False)
                continue
            since = time.monotonic()
            step(console, title, words)
            done.append({"words": words, "seconds": round(time.monotonic() - since, 1), "digest": digests[number]})
            folder.write_json(note, {"painted": painted, "lines": done})
        total = sum(each["seconds"] for each in done)
        console.print(f"{settings.out}: all {len(done)} lines are done, in {total:.0f} s", highlight=False,
                      soft_wrap=True)


def _noted(note: Path) -> dict[str, Any]:
    """What earlier calls did."""
    try:
        found = json.loads(note.read_text())
        sound = all({"words", "seconds", "digest"} <= each.keys() for each in found["lines"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    return found if sound else {}


def _digest(settings: Chain, words: list[str]) -> str:
    """Of all that a line is told: its words, the recipe that it names, and the table of labels where that is asked."""
    told = hashlib.sha256(json.dumps(words).encode())
    if (recipe := _recipe(words)) is not None:
        told.update(recipe.read_bytes())
    if settings.labels and any(str(settings.labels) in word for word in words):
        told.update(settings.labels.read_bytes())
    return told.hexdigest()


def _recipe(words: list[str]) -> Path | None:
    """The file of the recipe that a line names."""
    from ssl_dist import config

    rest = words[words.index("--") + 1:] if "--" in words else words
    return config.recipe(rest[1]) if rest[0] in ("shard", "train", "draw", "embed", "eval") else None


def _paint(settings: Chain, console: Console) -> None:
    console.rule("[bold]paint slides", align="left")
    told, slides = settings.paint, settings.out / "slides"
    with bar(console, "painting slides") as show:
        synthetic.write_nodes(slides, train=told.train, test=told.test, size=told.size, seed=told.seed,
                              workers=len(os.sched_getaffinity(0)), progress=show)
    console.print(f"{slides}: {told.train + told.test} slides, half with a metastasis", highlight=False, soft_wrap=True)


@contextmanager
def bar(console: Console, what: str) -> Iterator[Any]:
    """One progress bar, drawn on a terminal alone."""
    with Progress(TextColumn(what), BarColumn(), MofNCompleteColumn(), console=console,
                  disable=not console.is_terminal) as progress:
        task = progress.add_task(what)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def step(console: Console, title: str, words: list[str]) -> None:
    """One command, printed before it runs; what asks us to stop asks it."""
    console.rule(f"[bold]{title}", align="left")
    console.print(f"$ ssl-dist {shlex.join(words)}", style="dim", markup=False, highlight=False, soft_wrap=True)
    child = subprocess.Popen([sys.executable, "-m", "ssl_dist", *words])
    before = {each: signal.signal(each, lambda number, _: child.send_signal(number)) for each in FORWARDED}
    try:
        code = child.wait()
    except KeyboardInterrupt:
        code = child.wait()         # it heard the same Ctrl-C, and may be saving
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    if code:
        raise LineFailed(title, code if code > 0 else 128 - code)


def check(settings: Chain) -> list[str]:
    """The lines; refuses one whose recipe there is not."""
    commands = settings.commands()
    for words in commands:
        _recipe(words)
    missing = [name for name in ("source", "labels") if getattr(settings, name) is None]
    if missing and any(f"{{{name}}}" in line for line in settings.lines[settings.asked] for name in missing) \
            and settings.asked != "small":
        raise ConfigError([f"size={settings.asked} is for slides of your own: give source= and labels="])
    return [f"$ ssl-dist {shlex.join(words)}" for words in commands]
