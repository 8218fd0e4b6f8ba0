"""The verbs. Nothing heavy is imported before a verb needs it, so that help and refusals come at once."""

import contextlib
import functools
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
                  context_settings={"help_option_names": ["-h", "--help"]},
                  help="Self-supervised pretraining on histology, from whole slides to result tables.")

Config = Annotated[str, typer.Argument(help="A recipe, by path or by name (see `ssl-dist recipes`).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value …, on top of the recipe.", show_default=False)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the resolved tree and stop.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check all that can fail, and stop.")]
AllowChange = Annotated[list[str] | None, typer.Option(
    "--allow-change", help="A key that may differ from what the run was begun with; may be given several times.",
    show_default=False)]


def verb(function: Callable[..., int | None]) -> Callable[..., None]:
    """A command whose errors are one line that says what to do, and whose exit code says what kind they were."""

    @functools.wraps(function)
    def command(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        # Of torch's C++ parts only errors: each rank would warn that no parameter rests, in methods where none does.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        try:
            code = function(*args, **kwargs) or 0
        except BrokenPipeError:         # whoever read us (head, less) has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 0
        except KeyboardInterrupt:
            print("ssl-dist: interrupted; run the same command again to go on", file=sys.stderr)    # noqa: T201
            code = 130
        except Exception as error:
            known = getattr(error, "exit_code", None)
            if debug or (known is None and not isinstance(error, OSError)):
                raise
            # Every rank fails together; rank 0 speaks for all, and each has its own log. What one alone knows, it says.
            if os.environ.get("RANK", "0") == "0" or hasattr(error, "alone"):
                for line in (_sentence(error) or type(error).__name__).splitlines():
                    print(f"ssl-dist: error: {line}", file=sys.stderr)      # noqa: T201
            code = 9 if known is None else known
        sys.exit(code)

    return command


def _sentence(error: Exception) -> str:
    """The error's words; a bare refusal of the disk is given the advice that goes with it."""
    if isinstance(error, OSError) and not hasattr(error, "exit_code"):
        from shards import folder

        try:
            with folder.storage(Path(error.filename or "the disk")):
                raise error
        except OSError as better:
            return str(better)
    return str(error)


def say(*lines: str) -> None:
    """Prints lines for the person who typed the command: once, however many ranks there are."""
    if os.environ.get("RANK", "0") == "0":
        print(*lines, sep="\n", flush=True)        # noqa: T201


@contextlib.contextmanager
def bars() -> Iterator[Callable[..., None]]:
    """One progress bar a piece of work, drawn on a terminal and left out of a file; beside it its pace, if told."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                  TextColumn("{task.fields[pace]}"), console=console, disable=not console.is_terminal) as progress:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int, pace: str = "") -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total, pace="")
            progress.update(tasks[what], completed=done, total=total, pace=pace)

        yield show


@app.command()
@verb
def doctor(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
           debug: Debug = False) -> int:       # noqa: ARG001
    """Look at this machine: what is installed, GPU, decoder, network, disk, scheduler, and what to do."""
    from rich.console import Console

    from ssl_dist import doctor as doctors

    findings = doctors.examine(Path.cwd())
    if as_json:
        say(doctors.as_json(findings))
    else:
        Console().print(doctors.table(findings))
    return doctors.exit_code(findings)


@app.command()
@verb
def recipes(debug: Debug = False) -> None:     # noqa: ARG001
    """List the recipes that come along, each with its first comment."""
    from ssl_dist import config

    folder = config.recipes()
    for path in sorted(folder.rglob("*.yaml")):
        if path.parent.name == "datasets":      # for those there is a verb
            continue
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        say(f"{path.relative_to(folder).with_suffix('').as_posix():24} {first.lstrip('# ')}")


@app.command()
@verb
def datasets(look: Annotated[list[str] | None, typer.Argument(
                 help="root=FOLDER of the datasets, records=FOLDER of your own records.", show_default=False)] = None,
             as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
             debug: Debug = False) -> None:    # noqa: ARG001
    """List the datasets that we know how to read: licence, and how many files of each lie under a root."""
    from rich.console import Console
    from rich.table import Table

    from shards import catalogue
    from ssl_dist import config, schema

    where = schema.load(catalogue.Look, None, look or [])
    listed = catalogue.records(config.recipes() / "datasets", where.records)
    rows = [{"name": name, "organ": record.said("organ"), "kind": record.kind, "images": record.said("size"),
             "licence": record.said("licence"),
             "files": catalogue.present(record, where.root) if where.root else None} for name, record in listed.items()]
    if as_json:
        return say(json.dumps(rows, indent=2))
    table = Table("name", "organ", "kind", "images", "licence", "files", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*("" if value is None else str(value or "none") for value in row.values()))
    # Into a pipe a row is a line, however long: for grep.
    Console(width=None if sys.stdout.isatty() else 400).print(table)
    if where.root:
        say(f"{sum(bool(row['files']) for row in rows)} of {len(rows)} lie under {where.root}")
    return None


@app.command()
@verb
def shard(config: Config, overrides: Overrides = None, print_config: PrintConfig = False, dry_run: DryRun = False,
          debug: Debug = False) -> int:        # noqa: ARG001
    """Cut slides, or take tile folders, into a shard folder; CONFIG may be a dataset's record, or a job over many."""
    from shards import catalogue
    from shards.settings import Settings
    from ssl_dist import config as configs
    from ssl_dist import schema

    path, words = configs.recipe(config), overrides or []
    kind = catalogue.holds(path)
    if kind == "many":
        return _shard_many(path, words, print_config, dry_run)
    if kind == "record":        # what it says of the dataset goes before what is typed, as if typed first
        given = next((word.partition("=")[2] for word in words if word.startswith("source=")), None)
        told = catalogue.job(catalogue.read(path), Path(given).expanduser() if given else None)
        settings = schema.load(Settings, None, [*map(_typed, told.items()), *words])
    else:
        settings = schema.load(Settings, path, words)
    if print_config:
        say(schema.dump(settings).rstrip())
    elif dry_run:
        return _rehearse(settings)
    else:
        say(*_written(settings))
    return 0


def _typed(setting: tuple[str, Any]) -> str:
    """A setting as the word that somebody would type."""
    name, value = setting
    return f"{name}={value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"


def _rehearse(settings: Any) -> int:
    """Opens every slide and finds its annotation: all that a job of days would be stopped by is said at once."""
    from shards import cut, sources

    remarks: list[str] = []
    found = sources.sources(settings, remarks.append)
    patients = len({each.patient for each in found} - {""})
    with bars() as progress:
        refused = list(cut.refused(found, settings, progress))
    say(f"{len(found)} {settings.kind} of {patients or 'unknown'} patients in {settings.source}", *remarks, *refused)
    if len(refused) > settings.max_failed:
        say(f"{len(refused)} of {len(found)} would fail, max_failed={settings.max_failed}")
        return 3
    return 0


def _written(settings: Any) -> list[str]:
    """Does one shard job; returns what there is to say of it."""
    from shards import gallery, show, write

    with bars() as progress:
        done = write.write(settings, progress)
        # Also where an earlier call was killed before it had drawn them.
        if done and not settings.part and not (done.untouched and (done.out / "show.html").exists()):
            show.sheets(done.out)
            gallery.write(done.out)
    if done is None:
        return [f"{settings.out}: part {settings.part} is cut; when all are, call again without part="]
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(done.rejected.items())) or "none"
    return [f"{done.out}: {done.samples} tiles in {done.tars} tars" + (", complete before" if done.untouched else ""),
            f"left out: {left_out}", *(f"note: {remark}" for remark in done.remarks)]


def _shard_many(path: Path, words: list[str], print_config: bool, dry_run: bool) -> int:
    """A shard job for each dataset under a root; one that fails does not end the others."""
    from shards import catalogue
    from shards.settings import Settings
    from ssl_dist import config as configs
    from ssl_dist import schema

    many = schema.load(catalogue.Many, path, words)
    if print_config:
        say(schema.dump(many).rstrip())
        return 0
    listed = catalogue.records(configs.recipes() / "datasets", many.records)
    asked = catalogue.chosen(many, listed)
    files = {name: catalogue.present(record, many.root) for name, record in asked.items()}
    here = [name for name, count in files.items() if count]
    if not here:
        raise schema.ConfigError([f"root={many.root} holds none of the {len(asked)} datasets; each is looked for in a "
                                  f"folder of its own: {', '.join(sorted({each.folder for each in asked.values()}))}"])

    def told() -> Iterator[Any]:
        for values in catalogue.jobs(many, listed, here):
            yield schema.build(Settings, values, where=f"{path} and the record of {values['dataset']}")

    ready = list(told())        # every mistake in a record is found before any tile is written
    if dry_run:
        say(*(f"{each.dataset}: {files[each.dataset]} {each.kind} in {each.source} -> {each.out}" for each in ready))
    failed = []     # exit codes
    for settings in () if dry_run else told():
        try:
            say(f"{settings.dataset}: " + "; ".join(_written(settings)))
        except Exception as error:
            if getattr(error, "exit_code", 9) == 9:     # a full disk is everybody's, and a bug is ours
                raise
            failed.append(getattr(error, "exit_code", 3))
            say(f"{settings.dataset}: failed: {error}")
    say(f"{len(here) - len(failed)} of {len(asked)} datasets " + ("would be written" if dry_run else "are written")
        + (f", {len(failed)} failed" if failed else ""))
    if missing := [name for name, count in files.items() if not count]:
        say(f"not under {many.root}: {', '.join(missing)}")
    return (failed[0] if len(set(failed)) == 1 else 3) if failed else 0


@app.command()
@verb
def check(folder: Annotated[Path, typer.Argument(help="A shard folder.")],
          decode: Annotated[bool, typer.Option("--decode", help="Decode every tile as well.")] = False,
          mend: Annotated[bool, typer.Option("--mend", help="Rebuild what the tars can tell, remove what killed jobs "
                                                            "left. Without it nothing is written.")] = False,
          workers: Annotated[int, typer.Option(min=0, help="Threads and processes; 0: one a core.")] = 0,
          debug: Debug = False) -> int:        # noqa: ARG001
    """Hold a shard folder against its index: sizes, digests, members, idx, keys; decode its tiles; mend it."""
    from shards import check as checks

    with bars() as progress:
        done, problems = (checks.mend(folder, progress, decode, workers) if mend else
                          ([], checks.check(folder, progress, decode, workers)))
    for line in done:
        say(f"mended: {line}")
    for problem in problems:
        say(problem)
    say(f"{folder}: {len(problems)} problems" if problems else f"{folder}: sound")
    return 3 if problems else 0


@app.command()
@verb
def show(folder: Annotated[Path, typer.Argument(help="A shard folder.")], debug: Debug = False) -> None:  # noqa: ARG001
    """Draw contact sheets of a shard folder, and one page of all there is to see: look at it before training on it."""
    from shards import gallery
    from shards import show as shows

    for path in (*shows.sheets(folder), gallery.write(folder)):
        say(str(path))


@app.command()
@verb
def bench(what: Annotated[list[str], typer.Argument(
              help="Shard folders; or a recipe and key=value words, whose speed is measured on these ranks; or a "
                   "folder of such runs, for the table of all.")],
          views: Annotated[str, typer.Option(help="A preset of views.")] = "histology",
          batch: Annotated[int, typer.Option(min=1, help="Tiles a step, of one rank.")] = 256,
          seconds: Annotated[float, typer.Option(min=0.01, help="A turn; five parts take two each.")] = 5.0,
          threads: Annotated[int, typer.Option(min=0, help="0: one a core.")] = 0,
          as_json: Annotated[Path | None, typer.Option("--json", help="A file for the figures.",
                                                       show_default=False)] = None,
          debug: Debug = False) -> int:         # noqa: ARG001
    """Measure the data path on your own shards and machine, or a recipe's training on any number of machines."""
    from rich.console import Console

    from shards import folder, index
    from ssl_dist import schema

    if _is_recipe(what[0]) or list(Path(what[0]).glob("*/bench.json")):
        return _scaling(what)
    folders = [Path(each) for each in what]
    for each in folders:
        index.read(each)        # refused before torch is imported
    from ssl_dist import bench as benches
    from ssl_dist import dist
    from ssl_dist.data import presets

    if views not in presets.PRESETS:
        raise schema.ConfigError([f"--views {views} is not one of {', '.join(presets.PRESETS)}"])
    with bars() as progress:
        found = benches.measure(folders, views, batch=batch, seconds=seconds, device=dist.device("auto"),
                                threads=threads or len(os.sched_getaffinity(0)), progress=progress)
    Console().print(benches.table(found))
    say(*found.sentences())
    if as_json:
        folder.write(as_json, benches.as_json(found) + "\n")
    return 0


def _is_recipe(name: str) -> bool:
    """Whether a word names a recipe, and no folder."""
    from ssl_dist import config as configs

    with contextlib.suppress(configs.ConfigError):
        return bool(configs.recipe(name)) and not Path(name).is_dir()
    return False


def _scaling(what: list[str]) -> int:
    """A short run of a recipe on these ranks, or the table of those that were done."""
    from ssl_dist import scaling

    if Path(what[0]).is_dir():
        say(*scaling.table(Path(what[0])))
        return 0
    from ssl_dist import config as configs
    from ssl_dist import train as trainer

    settings = configs.load_train(what[0], [*what[1:], *scaling.ALONE])
    if (code := trainer.train(settings)) == 0 and os.environ.get("RANK", "0") == "0":
        found = scaling.write(settings.run)
        say(f"{settings.run}: {found.images_per_second:,.0f} images/s on {found.ranks} ranks of {found.machines} "
            f"machines, waiting for tiles {found.waiting:.0%} of the time")
    return code


@app.command()
@verb
def views(folder: Annotated[Path | None, typer.Argument(help="A shard folder; without one, the presets are listed.",
                                                        show_default=False)] = None,
          preset: Annotated[list[str] | None, typer.Option(help="Draw these alone.", show_default="all")] = None,
          out: Annotated[Path, typer.Option(help="Folder of the pictures, one a preset.")] = Path("views"),
          fit: Annotated[Path | None, typer.Option(help="What stain-fit found: draws the stain steps that need "
                                                        "it.", show_default=False)] = None,
          tiles: Annotated[int, typer.Option(min=1, max=64, help="A picture.")] = 4,
          seed: Annotated[int, typer.Option(min=0)] = 0,
          debug: Debug = False) -> None:        # noqa: ARG001
    """List the presets of views with where their values come from, or draw each on your own tiles."""
    from shards import folder as folders
    from shards import index
    from ssl_dist import schema

    if folder is not None:
        index.read(folder)          # refused before torch is imported
    from ssl_dist.data import presets

    if unknown := [name for name in preset or [] if name not in presets.PRESETS]:
        raise schema.ConfigError([f"--preset {unknown[0]} is not one of {', '.join(presets.PRESETS)}"])
    chosen = preset or list(presets.PRESETS)
    if folder is None:
        for name in chosen:
            say(*presets.told(name))
        say(*(f"[{letter}] {meaning}" for letter, meaning in presets.MARKS.items()))
        return
    import numpy as np

    from ssl_dist import sheet
    from ssl_dist.data import stain
    from ssl_dist.data.reader import Reader

    found, reader = stain.read(fit) if fit else None, Reader([folder])
    rows = np.unique(np.linspace(0, len(reader.all_rows()) - 1, tiles).astype(int))     # tars are shuffled
    folders.make(out)
    for name in chosen:
        path = out / f"{name}.png"
        sheet.of(reader, rows, sheet.strips(name, found), found, seed).save(path)
        say(str(path))


@app.command("stain-fit")
@verb
def stain_fit(folders: Annotated[list[Path], typer.Argument(help="Shard folders, of H&E.")],
              out: Annotated[Path | None, typer.Option(
                  help="The file to write.", show_default="FOLDER/stain.json; of several: must be given")] = None,
              tiles: Annotated[int, typer.Option(min=1, help="Looked at of each slide; fewer where slides are "
                                                             "many.")] = 32,
              components: Annotated[int, typer.Option(min=0, help="Of the Gaussian mixture; 0: up to 10, as the "
                                                                  "Bayesian criterion says.")] = 0,
              seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the choice of tiles, and of the "
                                                                           "mixture.")] = 0,
              split: Annotated[str, typer.Option(help="Look at this split only.")] = "",
              workers: Annotated[int, typer.Option(min=0, help="Threads; 0: one a core.")] = 0,
              debug: Debug = False) -> None:    # noqa: ARG001
    """Find the stains of every slide, and the colours of tiles, for augmentation that stays among real ones."""
    from shards import folder, index
    from ssl_dist import schema

    if out is None and len(folders) > 1:
        raise schema.ConfigError([f"{len(folders)} shard folders, and no --out: say where their one file goes"])
    out = out or folders[0] / "stain.json"
    if out.is_dir():
        raise schema.ConfigError([f"--out {out} is a folder; name a file in it"])
    for each in folders:
        index.read(each)        # refused before torch is imported, and before anything is made
    folder.make(out.parent)
    from ssl_dist.data import stain, stainfit

    with bars() as progress:
        found = stainfit.fit(folders, tiles=tiles, components=components, seed=seed, split=split,
                             threads=workers or len(os.sched_getaffinity(0)), progress=progress)
    folder.write_json(out, stain.as_json(found))
    mean, spread = found.lab_mean_6, found.lab_std_6
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(found.left_out.items())) or "none"
    say(f"{out}: stains of {len(found.slides)} slides, {len(found.weights_K)} components of {found.tiles} tiles",
        f"left out: {left_out}",
        "LAB: " + ", ".join(f"{name} {mean[place]:.1f} ± {spread[place]:.1f}" for place, name in enumerate("Lab")))


@app.command()
@verb
def train(config: Config, overrides: Overrides = None, print_config: PrintConfig = False, dry_run: DryRun = False,
          allow_change: AllowChange = None, debug: Debug = False) -> int:        # noqa: ARG001
    """Train, or go on with, one run: on this process alone, or as one rank of a launched job."""
    from ssl_dist import config as configs
    from ssl_dist import schema

    settings = configs.load(configs.Train, config, overrides or [])     # refuses before torch is imported
    settings = configs.load_train(config, overrides or [])
    if print_config:
        say(schema.dump(settings).rstrip())
        return 0
    from launch import rank
    from ssl_dist import train as trainer

    if words := rank.words(os.environ):
        print(f"ssl-dist: warning: {words}", file=sys.stderr)       # noqa: T201
    if dry_run:
        for name, value in trainer.rehearse(settings, int(os.environ.get("WORLD_SIZE", 1)), allow_change or []).items():
            say(f"{name:28} {value}")
        return 0
    return trainer.train(settings, allow_change or [])


@app.command()
@verb
def replay(step: Annotated[Path, typer.Argument(help="RUN/replay/step-000123, as a run writes it.")],
           debug: Debug = False) -> None:       # noqa: ARG001
    """Do a step that gave no finite number once more, on this CPU, and say where the first bad value arises."""
    from ssl_dist import train as trainer

    found = trainer.replay(step)
    say(f"step {found['step']}, {found['world']} ranks' tiles in one process: loss {found['loss']:g}, gradient norm "
        f"{found['gradient_norm']:g} (then: the {found['bad']} was not finite"
        + (f" on rank {found['rank']})" if found["rank"] is not None else ")"))
    for what in ("weights", "outputs", "gradients"):
        say(f"{what} that hold no number: " + (", ".join(found[what][:3]) + (f" and {len(found[what]) - 3} more" if len(
            found[what]) > 3 else "") if found[what] else "none"))
    if not any(found[what] for what in ("weights", "outputs", "gradients")):
        say("here all is finite: another device, another kernel, or a fault of that machine's memory")


@app.command()
@verb
def status(run: Annotated[Path, typer.Argument(help="A run folder, or what else was launched.")],
           as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
           debug: Debug = False) -> None:       # noqa: ARG001
    """What became of a run: state, attempts, last step, rate, time left, what went wrong last."""
    from ssl_dist import jobs
    from ssl_dist import status as statuses

    states = jobs.states(run)
    try:
        found = statuses.read(run)
    except statuses.NoRun:
        if not states:
            raise
        told, lines = {"path": run, "state": "submitted"}, [f"{run}: submitted"]
    else:
        told, lines = vars(found), statuses.lines(found)
    if as_json:
        say(json.dumps({**told, "jobs": [vars(state) for state in states]}, indent=2, default=str))
    else:
        say(*lines, *map(str, states))


@app.command()
@verb
def runs(folder: Annotated[Path, typer.Argument(help="Looked through for runs, three folders down.")] = Path("runs"),
         as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
         debug: Debug = False) -> int:          # noqa: ARG001
    """List the runs below a folder, a line each."""
    from rich.console import Console
    from rich.table import Table

    from ssl_dist import status as statuses

    found = statuses.below(folder)
    if as_json:
        say(json.dumps([vars(each) for each in found], indent=2, default=str))
        return 0
    if not found:
        say(f"no run below {folder}")
        return 0
    table = Table("run", "state", "step", "images/s", "left", "attempts", "last trouble", box=None, pad_edge=False)
    for each in found:
        table.add_row(*statuses.row(each))
    Console(width=None if sys.stdout.isatty() else 400).print(table)
    return 0


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@verb
def launch(where: Annotated[str, typer.Argument(help="local: torchrun on this machine; slurm: sbatch.")],
           arguments: Annotated[list[str], typer.Argument(
               help="[CLUSTER] key=value … -- VERB CONFIG key=value …; --print shows what would be done.")],
           debug: Debug = False) -> int:       # noqa: ARG001
    """Run a verb on several ranks, here or on a cluster, without changing a word of it."""
    from ssl_dist import jobs

    return jobs.run(jobs.parse(where, arguments), say, _would_train)


def _would_train(words: list[str], world: int, allowed: list[str]) -> None:
    """Refuses a run that would fail at its first step, before it is queued; the device is another machine's."""
    from ssl_dist import config as configs
    from ssl_dist import train as trainer

    trainer.rehearse(configs.load_train(words[0], [*words[1:], "device=auto"]), world, allowed)


@app.command()
@verb
def resume(run: Annotated[Path, typer.Argument(help="A run or shard folder.")], debug: Debug = False) -> int:  # noqa: ARG001
    """Launch once more what was launched for a folder, in the same words and from the same place."""
    from ssl_dist import jobs

    return jobs.run(jobs.again(run), say, _would_train)


@app.command()
@verb
def cancel(run: Annotated[Path, typer.Argument(help="A run or shard folder.")], debug: Debug = False) -> None:  # noqa: ARG001
    """Ask what was launched for a folder to end: its ranks save first, and it does not go on by itself."""
    from ssl_dist import jobs

    say(jobs.cancel(run))


@app.command()
@verb
def logs(run: Annotated[Path, typer.Argument(help="A run folder.")],
         rank: Annotated[int | None, typer.Option(min=0, help="This one's alone.", show_default="all")] = None,
         debug: Debug = False) -> None:         # noqa: ARG001
    """The logs of all ranks as one, in the order of time."""
    from ssl_dist import jobs

    say(*jobs.logs(run, rank))


@app.command(name="eval")
@verb
def evaluate(config: Config, overrides: Overrides = None, print_config: PrintConfig = False, dry_run: DryRun = False,
             debug: Debug = False) -> int:      # noqa: ARG001
    """Measure what an exported encoder is worth on labelled shards, or take what was learnt to whole slides."""
    from ssl_dist import config as configs
    from ssl_dist import schema

    settings: Any = configs.load_eval(config, overrides or [])
    if print_config:
        say(schema.dump(settings).rstrip())
        return 0
    from ssl_dist import dist
    from ssl_dist.eval import protocol as shared
    from ssl_dist.eval import summary

    protocol = importlib.import_module(f"ssl_dist.eval.{settings.protocol}")
    if dry_run:
        dist.device(settings.device)
        rehearse = getattr(protocol, "rehearse", functools.partial(shared.rehearse, allow=getattr(
            protocol, "allow", lambda *_: None)))
        for name, value in rehearse(settings).items():
            say(*(f"warning: {words}" for words in value) if name == "warnings" else (f"{name:20} {value}",))
        return 0
    with bars() as progress:
        threads = settings.threads or len(os.sched_getaffinity(0))
        device = dist.device(settings.device)
        result = shared.repeated(lambda one: protocol.run(one, device, threads, progress), settings)
    say(*summary.lines(result))
    return 3 if result.get("failed") else 0


@app.command()
@verb
def embed(config: Config, overrides: Overrides = None, print_config: PrintConfig = False, dry_run: DryRun = False,
          debug: Debug = False) -> int:         # noqa: ARG001
    """Vectors of whole slides, a file a slide: each is read once, without shards between; done ones are skipped."""
    from ssl_dist import config as configs
    from ssl_dist import schema
    from ssl_dist.slides import Slides

    settings = schema.load(Slides, configs.recipe(config), overrides or [])
    if print_config:
        say(schema.dump(settings).rstrip())
        return 0
    from ssl_dist import dist
    from ssl_dist import embed as embeds

    with bars() as progress:
        if dry_run:
            told, failed = embeds.rehearse(settings, progress)
        else:
            done = embeds.run(settings, dist.device(settings.device), settings.threads or dist.cores(),
                              functools.partial(_paced, progress, [time.monotonic()]))
            told, failed = embeds.lines(done, settings), len(done.failed)
    say(*told)
    return 3 if failed > settings.max_failed else 0


@app.command()
@verb
def draw(config: Config, overrides: Overrides = None, print_config: PrintConfig = False, dry_run: DryRun = False,
         debug: Debug = False) -> None:         # noqa: ARG001
    """Draws of slides out of shards of tiles: what an encoder makes of some tiles, again and again, for Giga-SSL."""
    from ssl_dist import config as configs
    from ssl_dist import schema
    from ssl_dist.slides import Draws

    settings = schema.load(Draws, configs.recipe(config), overrides or [])
    if print_config:
        return say(schema.dump(settings).rstrip())
    from ssl_dist import dist
    from ssl_dist import draw as draws

    if dry_run:
        return say(*draws.rehearse(settings))
    with bars() as progress:
        done = draws.run(settings, dist.device(settings.device), settings.threads or dist.cores(), progress)
    return say(*draws.lines(done, settings))


def _paced(progress: Callable[..., None], last: list[float], what: str, done: int, total: int, pace: str) -> None:
    """A bar on a terminal, and a line a minute in a file: a night's job is looked at in its log."""
    progress(what, done, total, pace)
    if not sys.stderr.isatty() and time.monotonic() - last[0] > 60:
        last[0] = time.monotonic()
        say(f"{done} of {total} {what}, {pace}")


@app.command()
@verb
def chain(config: Config, overrides: Overrides = None, print_config: PrintConfig = False, dry_run: DryRun = False,
          debug: Debug = False) -> None:        # noqa: ARG001
    """A paper's whole chain, from slides to the report: lines that could be typed, each once; again, it goes on."""
    from ssl_dist import chain as chains
    from ssl_dist import config as configs
    from ssl_dist import schema

    settings = schema.load(chains.Chain, configs.recipe(config), overrides or [])
    if print_config:
        return say(schema.dump(settings).rstrip())
    told = chains.check(settings)
    return say(*told) if dry_run else chains.run(settings)


@app.command()
@verb
def export(run: Annotated[Path, typer.Argument(help="A run folder.")],
           onnx: Annotated[bool, typer.Option("--onnx", help="And as encoder/model.onnx.")] = False,
           torchscript: Annotated[bool, typer.Option("--torchscript",
                                                     help="And as encoder/model.torchscript.pt.")] = False,
           debug: Debug = False) -> None:      # noqa: ARG001
    """Write the encoder of a run's newest checkpoint as a folder that timm loads, and as one file if asked to."""
    from ssl_dist import config, schema

    path = run / "config.yaml"
    if not path.is_file():
        raise schema.ConfigError([f"{run} has no config.yaml: it is not a run folder, or its run never began"])
    from ssl_dist import lock
    from ssl_dist import train as trainer

    with lock.hold(run) as owner:
        owner.alone()
        from ssl_dist import export as exports

        forms = [*(["onnx"] if onnx else []), *(["torchscript"] if torchscript else [])]
        home = trainer.from_checkpoint(config.load_train(str(path), [f"run={run}"]), run, owner, forms)
        say(str(home), *(str(home / exports.FORMS[kind]) for kind in forms))


@app.command()
@verb
def report(runs: Annotated[list[Path], typer.Argument(help="One run folder, or several to compare.")],
           out: Annotated[Path | None, typer.Option(
               help="The page to write.", show_default="RUN/report.html; of several: ./report.html")] = None,
           debug: Debug = False) -> None:      # noqa: ARG001
    """Write report.html: curves, pictures, figures, one file that can be mailed."""
    from ssl_dist.report import page

    say(str(page.write(runs, out or (runs[0] if len(runs) == 1 else Path()) / "report.html")))


@app.command()
@verb
def demo(folder: Annotated[Path, typer.Argument(help="Where everything goes.")] = Path("demo"),
         seed: Annotated[int, typer.Option(help="Of slides, training and baseline.")] = 0,
         debug: Debug = False) -> int:         # noqa: ARG001
    """The whole line in a few minutes: painted slides, shards, training on two ranks, evaluation, report."""
    from ssl_dist import demo as demos

    return demos.demo(folder, seed)


def main() -> None:
    """The console script."""
    from launch import rank

    # Before anybody asks which rank this is.
    os.environ.update(rank.environment(os.environ, terminal=bool(sys.stdin and sys.stdin.isatty())))
    for stream in (sys.stdout, sys.stderr):     # µ must not end a command where the locale is older than UTF-8
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app()
