"""Launches: what is asked of which machine, refused before anything is booked, written down, and found again.

    RUN/launch/launch.json      what was asked for, and where
    RUN/launch/jobs             numbers of SLURM's jobs, a line each
    RUN/launch/123_0_log.out    what rank 0 of job 123 printed; 123_submission.sh: its script

Of a shard folder, which holds nothing but shards, it is OUT.launch.
"""

import itertools
import json
import os
import re
import shlex
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launch import account, local, slurm
from launch.job import Cluster, Local
from shards import folder
from ssl_dist import config, lock, schema
from ssl_dist.config import ConfigError
from ssl_dist.slides import Draws, Slides

VERBS = ("train", "embed", "draw", "shard", "eval", "chain", "bench")
EXAMPLE = "ssl-dist launch local ranks=2 -- train CONFIG key=value …"
SWITCHES = ("print", "unchecked", "debug")
ALLOW = "--allow-change="
STOPPED = (4, 5, 130)       # exit codes of a run that somebody ended

Say = Callable[[str], None]
# Refuses a recipe and its words, on so many ranks, that would fail at once; the last are keys that may have changed.
Check = Callable[[list[str], int, list[str]], None]


@dataclass
class Asked:
    """A launch, in the words of whoever typed it."""

    where: str                      # local or slurm
    job: Any                        # Local or Cluster
    recipe: str                     # of the cluster
    verb: str
    words: list[str]                # of the verb: a recipe, key=value, options
    switches: list[str]
    sizes: list[int]                # numbers of nodes, of a benchmark of scaling

    @property
    def overrides(self) -> list[str]:
        """key=value words of the verb."""
        return [word for word in self.words[1:] if not word.startswith("-")]


def parse(where: str, arguments: list[str]) -> Asked:
    """The launch that was typed."""
    if where not in ("local", "slurm"):
        raise ConfigError([f"launch {where!r} is not one of 'local', 'slurm'"])
    before, verb, words = _parted(arguments)
    if verb not in VERBS or not words:
        said = verb or next(iter(arguments[arguments.index("--") + 1:]), "nothing") if "--" in arguments else "nothing"
        raise ConfigError([f"launch runs the verbs {', '.join(VERBS)}, not {said!r}; write: {EXAMPLE}"])
    typed, switches, recipe, sizes = [], [], "", []
    for word in before:
        if word in SWITCHES:
            switches.append(word)
        elif where == "slurm" and "=" not in word and not recipe:
            recipe = word
        elif word.startswith("nodes=") and verb == "bench" and "," in word:
            sizes = _numbers(word)
        else:
            typed.append(word)
    if where == "slurm":
        job = config.load(Cluster, recipe or "launch/cluster", typed)
    else:
        job = schema.load(Local, None, typed)
    if "debug" in switches:
        words.append("--debug")
    while "--allow-change" in words:    # its word is no key=value of the recipe
        place = words.index("--allow-change")
        words[place:place + 2] = ["=".join(words[place:place + 2])]
    if strange := [word for word in words if word.startswith("-") and word != "--debug" and not word.startswith(ALLOW)
                   and verb in ("train", "embed", "draw", "shard", "eval", "chain")]:
        raise ConfigError([f"{strange[0]} is no option that a launch hands on to {verb}: --debug and --allow-change "
                           "are; --print-config and --dry-run go without a launch"])
    return Asked(where, job, recipe, verb, words, switches, sizes or [job.nodes] if where == "slurm" else [])


def _parted(arguments: list[str]) -> tuple[list[str], str, list[str]]:
    """What is said of the machine, the verb, and what is said of it; --nodes 2 and --nodes=2 are nodes=2."""
    before: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            continue
        name = word.removeprefix("--")
        if word in VERBS:
            return before, word, rest
        if word.startswith("--") and name not in SWITCHES and "=" not in word and rest:
            name += f"={rest.pop(0)}"
        before.append(name)
    return before, "", []


def _numbers(word: str) -> list[int]:
    values = word.partition("=")[2].split(",")
    if not all(value.isdigit() and int(value) for value in values):
        raise ConfigError([f"{word} is not a list of numbers of machines, such as nodes=1,2,4"])
    return sorted({int(value) for value in values})


def run(asked: Asked, say: Say, check: Check) -> int:
    """Launches; returns the exit code, of what ran here or of what was submitted."""
    if asked.where == "slurm":
        return _submit(asked, say, check)
    worst = 0
    for words in _swept(asked) if asked.verb == "train" else [asked.words]:
        code = _here(replace(asked, words=words), say)
        worst = worst or code
        if code in STOPPED:
            break
    return worst


def _here(asked: Asked, say: Say) -> int:
    """On this machine."""
    job: Local = asked.job
    if asked.verb != "train" and not (asked.verb == "bench" and not Path(asked.words[0]).is_dir()):
        if job != Local():
            raise ConfigError([f"{asked.verb} is one process, on one machine: leave out what is said of ranks and "
                               "nodes"])
        words = [sys.executable, "-m", "ssl_dist", asked.verb, *asked.words]
        if "print" not in asked.switches:
            os.execv(words[0], words)       # so that signals are its own
        say(shlex.join(words))
        return 0
    settings = config.load(config.Train, asked.words[0], asked.overrides)
    least, most = job.least_most
    for nodes in range(least, most + 1):
        config.rank_batch(settings, nodes * local.ranks(job))
    if settings.device == "cuda" and not local.gpus():
        raise ConfigError(["device='cuda', but this machine shows no GPU; `ssl-dist doctor` says more, device=auto "
                           "takes the CPU"])
    words = [asked.verb, *asked.words]
    if "print" in asked.switches:
        say(shlex.join(local.command(job, words)))
        return 0
    if most == 1:
        lock.free(settings.run)         # a folder in use is refused here, before the ranks start
    _fresh(settings.run)
    _note(asked, settings.run / "launch", asked.words, [settings.run])
    code = local.run(job, words, settings.run)
    if code == 1:
        raise LaunchFailed(f"the ranks ended without a word; their logs are in {settings.run / 'logs'}. "
                           "Run the same command again to resume, with --debug to see torchrun's own report")
    return code


class LaunchFailed(RuntimeError):
    """Ranks that ended and left no reason."""

    exit_code = 1


def _submit(asked: Asked, say: Say, check: Check) -> int:
    """On a cluster."""
    works = {"train": _trains, "embed": _embeds, "draw": _draws, "shard": _shards, "eval": _evals,
             "chain": _chains, "bench": _scales}[asked.verb](asked)
    if "unchecked" not in asked.switches:
        if broken := list(dict.fromkeys(words for work in works for words in slurm.refused(asked.job, work))):
            raise ConfigError(broken)
        for work in works:
            for verb, recipe, *words in work.commands:
                if verb == "train" or (verb == "bench" and not Path(recipe).is_dir()):
                    plain = [word for word in words if not word.startswith("-") and "$" not in word]
                    check([recipe, *plain], work.nodes * work.ranks,
                          [word.removeprefix(ALLOW) for word in words if word.startswith(ALLOW)])
    if "print" in asked.switches:
        for work in works:
            say(slurm.script(asked.job, work).rstrip())
        return 0
    for home in {work.folder for work in works}:
        if active := [state for state in slurm.states(slurm.jobs(home)) if not state.over]:
            raise folder.FolderInUse(f"{home.parent}: {active[0]} works there already; `ssl-dist cancel` ends it")
    before = os.umask(int(asked.job.umask, 8)) if asked.job.umask else None
    try:
        _queue(asked, works, say)
    finally:
        if before is not None:
            os.umask(before)
    return 0


def _queue(asked: Asked, works: list[slurm.Work], say: Say) -> None:
    """Submits all jobs, or none: where one is refused, those before it are taken back."""
    for work in works:
        for path in work.runs:
            _fresh(path)
        _note(asked, work.folder, asked.words, [run for each in works for run in each.runs])
    done: dict[str, str] = {}
    try:
        for work in works:
            work.after = [done[name] for name in work.after]
            done[work.name] = slurm.submit(asked.job, work)
    except slurm.SlurmError:
        if done:
            slurm.cancel([slurm.State(number, "PENDING") for number in done.values()], saves=False)
        raise
    for work in works:
        say(f"job {done[work.name]}: {work.name}" + (f", {len(work.commands)} tasks" if len(work.commands) > 1 else "")
            + (f", after {', '.join(work.after)}" if work.after else "")
            + f"; `ssl-dist status {_subject(work)}` says how it goes")
        for number, path in enumerate(work.runs if len(work.runs) > 1 else []):     # of a sweep, each knows its task
            home = folder.make(path / "launch")
            with (home / slurm.JOBS).open("a") as file:
                file.write(f"{done[work.name]}_{number}\n")
            _note(asked, home, work.commands[number][1:], [path])


def _fresh(run: Path) -> None:
    """Who launches a run again wants it to go on, whatever was said before."""
    for note in (account.STOP, account.FRUITLESS):
        (run / note).unlink(missing_ok=True)


def _subject(work: slurm.Work) -> Path:
    return work.folder.with_suffix("") if work.folder.suffix == ".launch" else work.folder.parent


def _trains(asked: Asked) -> list[slurm.Work]:
    job: Cluster = asked.job
    commands, runs = [], []
    for words in _swept(asked):
        runs.append(_shared(words, job.nodes * job.tasks).run)
        commands.append(["train", *_told(job, words)])
    home = runs[0] if len(runs) == 1 else runs[0].parent
    return [slurm.Work(home.name, home / "launch", commands, runs, job.nodes, job.tasks, job.gpus)]


def _shared(words: list[str], world: int) -> config.Train:
    """The settings of a run whose batch so many ranks can share."""
    settings = config.load(config.Train, words[0], [word for word in words[1:] if not word.startswith("-")])
    config.rank_batch(settings, world)
    return settings


def _told(job: Cluster, words: list[str]) -> list[str]:
    """The words of a run, with what the cluster adds to them where nobody typed it."""
    adds = {"grace": str(max(job.grace // 2, job.grace - 30)), "data.stage": job.stage,
            "device": "cuda" if job.gpus else ""}
    typed = {word.partition("=")[0] for word in words}
    return [*words, *(f"{name}={value}" for name, value in adds.items() if value and name not in typed)]


def _shards(asked: Asked) -> list[slurm.Work]:
    from shards import catalogue
    from shards.settings import Settings

    job: Cluster = asked.job
    path = config.recipe(asked.words[0])
    if (kind := catalogue.holds(path)) == "many" and job.parts > 1:
        raise ConfigError([f"parts={job.parts}, but {asked.words[0]} takes many datasets one after the other, each "
                           "knowing the tiles of those before it; leave parts out, or launch a dataset by itself"])
    if kind == "many":
        out = schema.load(catalogue.Many, path, asked.overrides).out
    elif kind == "record":
        given = next((word.partition("=")[2] for word in asked.overrides if word.startswith("source=")), None)
        values = catalogue.job(catalogue.read(path), Path(given).expanduser() if given else None)
        out = Path(next((word.partition("=")[2] for word in asked.overrides if word.startswith("out=")),
                        values.get("out", "")))
    else:
        out = schema.load(Settings, path, asked.overrides).out
    home = out.parent / f"{out.name}.launch"
    command = ["shard", *asked.words]
    parts = [[*command, f"part={number + 1}/{job.parts}"] for number in range(job.parts)]
    cut = slurm.Work(out.name, home, parts if job.parts > 1 else [command])
    return [cut] if job.parts == 1 else [cut, slurm.Work(f"{out.name}-publish", home, [command], after=[out.name])]


def _embeds(asked: Asked) -> list[slurm.Work]:
    """A task a part, each with GPUs of its own; whoever ends last lists what all have done."""
    out = schema.load(Slides, config.recipe(asked.words[0]), asked.overrides).out
    command, parts = ["embed", *asked.words], asked.job.parts
    commands = [[*command, f"part={number + 1}/{parts}"] for number in range(parts)] if parts > 1 else [command]
    return [slurm.Work(out.name, out.parent / f"{out.name}.launch", commands, gpus=asked.job.gpus)]


def _draws(asked: Asked) -> list[slurm.Work]:
    """A task a part, each with GPUs of its own, and a last job that publishes."""
    out = schema.load(Draws, config.recipe(asked.words[0]), asked.overrides).out
    home, command, parts = out.parent / f"{out.name}.launch", ["draw", *asked.words], asked.job.parts
    if parts == 1:
        return [slurm.Work(out.name, home, [command], gpus=asked.job.gpus)]
    commands = [[*command, f"part={number + 1}/{parts}"] for number in range(parts)]
    return [slurm.Work(out.name, home, commands, gpus=asked.job.gpus),
            slurm.Work(f"{out.name}-publish", home, [command], after=[out.name])]


def _chains(asked: Asked) -> list[slurm.Work]:
    """One job on one machine, with all its GPUs; what it had no time for, the next one does."""
    from ssl_dist import chain

    settings = schema.load(chain.Chain, config.recipe(asked.words[0]), asked.overrides)
    chain.check(settings)
    out = settings.out
    return [slurm.Work(out.name, out.parent / f"{out.name}.launch", [["chain", *asked.words]], gpus=asked.job.gpus)]


def _evals(asked: Asked) -> list[slurm.Work]:
    settings = config.load_eval(asked.words[0], asked.overrides)
    name = f"{settings.home.absolute().parent.name}-{settings.protocol}"
    # One process: features are computed by all its GPUs, and what learns, by the first.
    gpus = min(1, asked.job.gpus) if settings.protocol == "finetune" else asked.job.gpus
    return [slurm.Work(name, settings.home / "launch", [["eval", *asked.words]], gpus=gpus)]


def _scales(asked: Asked) -> list[slurm.Work]:
    """A run for each number of nodes, each node with as many tiles a step, one after the other as they would share a
    disk; and the table of them."""
    job: Cluster = asked.job
    if (Path(asked.words[0]) / "index.json").exists():        # the data path of one rank
        home = Path(f"{Path(asked.words[0])}.launch")
        return [slurm.Work(f"{Path(asked.words[0]).name}-bench", home, [["bench", *asked.words]],
                           gpus=min(1, job.gpus))]
    base = config.load(config.Train, asked.words[0], asked.overrides)
    works: list[slurm.Work] = []
    typed = [word for word in asked.words if not word.startswith(("run=", "data.batch="))]
    for nodes in asked.sizes:
        words = [*typed, f"run={base.run / f'nodes-{nodes}'}", f"data.batch={base.data.batch * nodes}"]
        _shared(words, nodes * job.tasks)
        works.append(slurm.Work(f"{base.run.name}-{nodes}", base.run / "launch", [["bench", *_told(job, words)]], [],
                                nodes, job.tasks, job.gpus, [each.name for each in works[-1:]], well=False))
    return [*works, slurm.Work(f"{base.run.name}-table", base.run / "launch", [["bench", str(base.run)]],
                               after=[works[-1].name], well=False)]


def _swept(asked: Asked) -> list[list[str]]:
    """The words of each run: key=a,b is two runs, each in a folder of its own."""
    lists = {place: values for place, word in enumerate(asked.words)
             if place and not word.startswith("-") and len(values := _values(word)) > 1}
    if not lists:
        return [asked.words]
    base = config.load(config.Train, asked.words[0], [
        lists[place][0] if place in lists else word for place, word in enumerate(asked.words)
        if place and not word.startswith("-")]).run
    runs = []
    for chosen in itertools.product(*lists.values()):
        name = ",".join(re.sub(r"[^\w.=+-]+", "-", word.partition("=")[0].rpartition(".")[2] + "="
                               + word.partition("=")[2]) for word in chosen)
        words = [dict(zip(lists, chosen, strict=True)).get(place, word) for place, word in enumerate(asked.words)
                 if not word.startswith("run=")]
        runs.append([*words, f"run={base / name}"])
    if len({words[-1] for words in runs}) < len(runs):
        raise ConfigError(["two runs of the sweep would have the same folder; the last parts of keys must differ"])
    return runs


def _values(word: str) -> list[str]:
    """key=a,b as key=a and key=b; what stands in brackets or quotes is one value."""
    name, _, text = word.partition("=")
    if name == "run" or not re.fullmatch(r"[\w.]+", name):
        return [word]
    parts = re.findall(r"(?:[^,\[\](){}'\"]|\[[^\]]*\]|\{[^}]*\}|\([^)]*\)|'[^']*'|\"[^\"]*\")+", text)
    return [f"{name}={part}" for part in parts] if len(parts) > 1 and ",".join(parts) == text else [word]


def _note(asked: Asked, home: Path, words: list[str], runs: list[Path]) -> None:
    folder.write_json(folder.make(home) / "launch.json", {
        "where": asked.where, "recipe": asked.recipe, "job": schema.plain(asked.job), "verb": asked.verb,
        "words": words, "sizes": asked.sizes, "runs": [str(path.absolute()) for path in runs],
        "folder": str(Path.cwd()), "host": socket.gethostname(),
        "pid": os.getpid(), "begun": datetime.now(UTC).isoformat(timespec="seconds")})


@dataclass
class Noted:
    """A launch that was written down."""

    home: Path
    told: dict[str, Any]

    def states(self) -> list[slurm.State]:
        """What SLURM says of its jobs."""
        return slurm.states(slurm.jobs(self.home)) if self.told["where"] == "slurm" else []


class NoLaunch(ValueError):
    """A folder that nothing was launched for."""

    exit_code = 2


def of(path: Path) -> Noted:
    """The launch of a run folder, a shard folder, or a folder of results."""
    for home in (path / "launch", path.parent / f"{path.name}.launch"):
        try:
            told = json.loads((home / "launch.json").read_text())
            if {"where", "job", "verb", "words", "runs", "folder", "host", "pid"} <= told.keys():
                return Noted(home, told)
        except (OSError, ValueError, AttributeError):
            continue
    raise NoLaunch(f"{path}: nothing was launched there with `ssl-dist launch`, or its notes in launch/ are lost")


def states(path: Path) -> list[slurm.State]:
    """What SLURM says of the jobs of a folder, if any were launched for it."""
    try:
        return of(path).states()
    except NoLaunch:
        return []


def cancel(path: Path) -> str:
    """Asks a launch to end: its ranks save first. It does not go on by itself."""
    noted = of(path)
    for run in map(Path, noted.told["runs"]):
        if run.is_dir():
            folder.make(run / "launch")
            folder.write(run / account.STOP, "cancelled\n")
    if noted.told["where"] == "slurm":
        active = [state for state in noted.states() if not state.over]
        if silent := [state for state in active if state.state == slurm.SILENT]:
            raise slurm.SlurmError(f"{path}: SLURM does not answer ({silent[0].reason}); whether job {silent[0].job} "
                                   "runs is not known, so it was not asked to end")
        if not active:
            return f"{path}: none of its jobs waits or runs"
        saves = noted.told["verb"] == "train"
        slurm.cancel(active, saves=saves)
        return (f"{path}: job {', '.join(state.job for state in active)} is asked to " +
                ("save and end; `scancel` ends it at once" if saves else "end"))
    if noted.told["host"] == socket.gethostname() and not _launcher(noted.told["pid"]):
        return f"{path}: its launcher has ended"
    return f"{path}: its ranks are asked to save and end, within a step"


def _launcher(process: int) -> bool:
    """Whether a process is still one that launches."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return "launch" in words and "local" in words


def again(path: Path) -> Asked:
    """The launch of a folder, to be done once more."""
    noted = of(path)
    told = noted.told
    if not Path(told["folder"]).is_dir():
        raise NoLaunch(f"{path} was launched in {told['folder']}, which is no more")
    os.chdir(told["folder"])
    job = schema.build(Cluster if told["where"] == "slurm" else Local, told["job"], where=f"{noted.home}/launch.json")
    return Asked(told["where"], job, told["recipe"], told["verb"], told["words"], [], told["sizes"])


def logs(path: Path, rank: int | None = None) -> list[str]:
    """The lines of all ranks' logs in the order of time, each with its rank; lines that go on stay together."""
    files = sorted((path / "logs").glob("rank-*.log"))
    if rank is not None:
        files = [file for file in files if file.name == f"rank-{rank:05d}.log"]
    if not files:
        raise NoLaunch(f"{path / 'logs'} holds no log" + (f" of rank {rank}" if rank is not None else "")
                       + (f"; what SLURM's jobs printed is in {path / 'launch'}" if (path / "launch").is_dir() else ""))
    found: list[tuple[str, int, int, str]] = []
    for file in files:
        number, stamp = int(file.stem.removeprefix("rank-")), ""
        for place, line in enumerate(file.read_text(errors="replace").splitlines()):
            if begins := re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", line):
                stamp = begins.group()
            found.append((stamp, number, place, line))
    width = len(str(max(number for _, number, _, _ in found))) if found else 1
    return [f"{number:{width}} {line}" for _, number, _, line in sorted(found)]

