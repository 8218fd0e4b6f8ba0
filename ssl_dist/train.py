"""Build everything, then the loop. The only file that knows everyone."""

import contextlib
import hashlib
import io
import itertools
import json
import logging
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from launch import account
from shards import folder
from ssl_dist import checkpoint, config, dist, export, finite, lock, methods, optim, points, schema, sheet, watch
from ssl_dist import run as runs
from ssl_dist.collapse import PATIENCE
from ssl_dist.collapse import Watch as Symptoms
from ssl_dist.config import ConfigError, Train
from ssl_dist.data import mixture, stain, sweep
from ssl_dist.data.batch import Batch, View
from ssl_dist.data.loader import Ahead, Loader, SlideLoader
from ssl_dist.data.quarantine import Quarantine
from ssl_dist.data.reader import Reader
from ssl_dist.data.stage import Stage
from ssl_dist.data.stream import Stream
from ssl_dist.engine import Engine
from ssl_dist.finite import NotFinite
from ssl_dist.log import Clock, Ledger, Log
from ssl_dist.methods.base import Method
from ssl_dist.models.batchnorm import has_any, synchronise
from ssl_dist.models.encoder import Encoder
from ssl_dist.watch import Watch

logger = logging.getLogger(__name__)

PREEMPTED = 4


@dataclass
class Parts:
    """What a run is made of, once everything is built."""

    settings: Train
    path: Path
    run: runs.Run
    device: torch.device
    engine: Engine
    method: Method
    loader: Ahead
    saver: checkpoint.Saver
    log: Log
    ledger: Ledger | None
    watch: Watch
    statistics: finite.Statistics
    asked: list[int]                # signals that ask this rank to stop
    kept: dict[str, Any]            # what a checkpoint says besides numbers: identity, way, left_out

    def publish(self, *, must: bool = False) -> None:
        """The checkpoint that is being written is complete, on all ranks."""
        if found := self.saver.publish(must=must):
            self.run.saved(int(found.name.rpartition("-")[2]))

    @property
    def left_out(self) -> list[int]:
        """Steps whose batch gave no finite number, and taught nothing."""
        return self.kept["left_out"]


class Rewind(Exception):
    """The last checkpoint is to be taken up again."""


def train(settings: Train, allowed: Sequence[str] = ()) -> int:
    """Runs, or goes on with, the run that `settings` describe; returns the exit code.

    `allowed`: keys that may differ from those that the run was begun with.
    """
    device = dist.device(settings.device)
    points.arm(settings.debug.faults)
    path, run, reached = Path(settings.run), None, {"imports": runs.age()}
    with contextlib.ExitStack() as stack:
        # Before the ranks meet: whoever died of a signal then would keep the others waiting.
        asked = stack.enter_context(runs.asked_to_stop())
        joining = watch.Joining(watch.FIRST * settings.hang)
        stack.callback(joining.over)
        # The watch ends a hang; the group's own patience is for where it cannot.
        dist.start(device, timedelta(seconds=watch.FIRST * settings.hang + 60))
        stack.callback(dist.stop)
        reached["ranks"] = runs.age()
        owner = dist.once(lambda: stack.enter_context(lock.hold(path)))
        if dist.rank():
            owner = lock.Owner(path, owner.token)
        dist.once(lambda: _greet(path, owner))
        # At once: on a disk whose locks end at the machine, who gives no sign of life is taken for dead.
        watching = Watch(path, dist.rank(), dist.world(), hang=settings.hang, grace=settings.grace, owner=owner,
                         account=lambda state, code, words: run.breaks_off(state, code, words) if run else
                         runs.last_words(path, owner, code, words))
        joining.over()
        stack.callback(watching.close)
        stack.enter_context(runs.logged(path))
        runs.end_with_launcher()
        try:
            reader = _reader(settings)
            dist.once(reader.verify)
            settings = config.with_steps(settings, _stream(settings, reader).steps_an_epoch)
            plan = _plan(settings)
            _tries(settings, plan, dist.world())
            _refuses(plan, reader)
            if words := _imitated(settings, device):
                _tell(f"warning: {words}")
            identity = _identity(settings, reader)
            found = checkpoint.agreed(path / "checkpoints")
            if found and _finished(found, identity, settings, path, allowed):
                return 0
            dist.once(lambda: _clear(path, owner))
            run = runs.Run(path, owner, settings.steps, device, reached)
            own = _built(settings, path, run, device, reader, identity, found, watching, asked, owner)
            stack.callback(own.log.close)
            stack.callback(own.loader.close)
            run.reaches("network")
            code = _train(own, checkpoint.load(found, own.engine) if found else 0)
            watching.over = True
            return code
        except BaseException as error:
            failure = runs.cause(error, path, owner)
            if run:
                run.fails(failure)
            raise failure from error


def _greet(path: Path, owner: lock.Owner) -> None:
    """Before any rank watches: drops an earlier attempt's signs of life, and what somebody said to its ranks."""
    owner.check()
    watch.forget(path)
    if not os.environ.get(runs.LAUNCH):      # who types this wants it to go on, whatever was cancelled before
        (path / account.STOP).unlink(missing_ok=True)


def _clear(path: Path, owner: lock.Owner) -> None:
    """Before the first thing is written that lasts: drops what an earlier attempt said at its end or left half-done."""
    owner.alone()
    watch.forget(path, stacks=True)
    runs.forget(path)
    checkpoint.clean(path / "checkpoints")


def _built(settings: Train, path: Path, run: runs.Run, device: torch.device, reader: Reader, identity: dict[str, Any],
           found: Path | None, watching: Watch, asked: list[int], owner: lock.Owner) -> Parts:
    threads = dist.cores()
    torch.set_num_threads(threads)
    threads = settings.data.threads or threads
    stream = _stream(settings, reader)
    method = build(settings).to(device)
    if not found:
        method.begin()
    if settings.compile:
        _compile(method)
    optimizer = optim.build(method, settings.optim, method.resting())
    engine = Engine(method, optimizer, config.deepspeed(settings, dist.world()), device)
    before = checkpoint.state(found) if found else {}
    start = before.get("step", 0)
    way = dist.once(lambda: _way(settings, reader, stream, device, threads, before.get("way")))
    run.starts_at(start)
    if dist.rank() == 0:
        owner.check()
        folder.write(path / "config.yaml", schema.dump(settings))
        folder.write_json(path / "env.json", runs.environment())
    own = Parts(settings, path, run, device, engine, method,
                _loader(settings, path, reader, stream, method, device, threads, way),
                checkpoint.Saver(path / "checkpoints", engine, settings.checkpoint, owner.check, owner.token),
                Log(path, settings.steps, start, owner.check, "slides" if method.INPUT == "bags" else "images"),
                Ledger(path, reader, owner.check) if settings.debug.ledger else None, watching,
                finite.Statistics(method), asked,
                {"identity": identity, "way": way, "left_out": before.get("left_out", [])})
    own.log.text("config", schema.dump(settings), start)
    if dist.rank() == 0 and start == 0 and settings.log.pictures and isinstance(own.loader, Loader):
        _draw_views(own.loader, settings.log.pictures, path, own.log)
    return own


def _train(own: Parts, start: int) -> int:
    """Steps until the end, or until somebody asks to stop; and what is left to do then."""
    settings, run = own.settings, own.run
    last = min(settings.steps, settings.stop or settings.steps)
    while True:
        try:
            step = _loop(own, start, last)
            break
        except Rewind:
            start = _rewound(own)
    if step < last:
        run.ends("preempted", PREEMPTED, step)
        with contextlib.suppress(RuntimeError):     # whoever ends first may end the others
            dist.barrier()
        _tell(f"{own.path} was asked to stop and is saved at step {step}; run the same command again to go on")
        return PREEMPTED
    if step == settings.steps and dist.rank() == 0:
        points.at("export", step)
        export.export(own.method.encoder, settings, own.loader.reader, step, own.path / "encoder", own.saver.check)
    dist.barrier()
    run.ends("done" if step == settings.steps else "stopped", 0, step)
    return 0


def _loop(own: Parts, step: int, last: int) -> int:
    """From `step` on; the step after which it ended, which is not the last where somebody asked to stop."""
    settings, engine, method, saver = own.settings, own.engine, own.method, own.saver
    clock, symptoms, slow = Clock(), Symptoms(), Counter[str]()
    batches = own.loader.batches(step, last)
    for batch in _timed(batches, clock, step):
        progress = step / settings.steps
        lr, weight_decay = config.rates(settings, progress)
        optim.set_rates(engine.optimizer, lr, weight_decay)
        torch.manual_seed(hash((settings.seed, step, dist.rank())))     # for dropout: no state to save
        own.statistics.keep()
        own.run.reaches("tiles")
        scalars = {} if step in own.left_out else \
            _gradients(engine, batch.to(own.device).split(settings.accumulate), progress, step)
        stopping, due, writing, culprit = _agree(own, scalars.get("loss"), step)
        if scalars:
            norm = engine.gradient_norm()
            if culprit is not None or not math.isfinite(norm):
                _leave_out(own, batch, step, progress, culprit)
            else:
                points.at("step.update", step)
                engine.step()
                points.at("step.after", step)
                method.after_step(progress)
                if own.ledger:
                    own.ledger.write(step, batch)
        own.run.reaches("step")
        step, own.watch.settled = step + 1, True
        own.log.advance(step)
        if step - 1 not in own.left_out and (step % settings.log.every == 0 or step == last):
            row = dist.mean({name: float(value) for name, value in scalars.items()}, own.device)
            for words in (*symptoms(row, method.chance, progress), *_slow(slow)):
                own.log.warn(words, step)
            own.log.write(step, {"samples": step * settings.data.batch, "epoch": own.loader.stream.epoch(step - 1),
                                 "lr": lr, "grad_norm": norm, **row, **clock.read(settings.data.batch)})
        own.run.alive(step)
        ends = stopping or step == last
        if saver.pending and (ends or not writing):
            own.publish()
        if ends or due or step % settings.checkpoint.every == 0:
            if saver.pending:
                own.publish()
            saver.begin(step, own.kept, hasty=stopping)
        if ends:
            own.publish(must=True)
            own.watch.saved = True
            break
    return step


def _leave_out(own: Parts, batch: Batch, step: int, progress: float, culprit: int | None) -> None:
    """Nothing learns from a batch whose loss or gradient is no number; whether the run goes on, the settings say."""
    settings, where = own.settings, "gradient" if culprit is None else "loss"
    own.statistics.put_back()
    own.engine.discard()
    own.method.forget()
    told = (f"the {where} of step {step} is not finite" + ("" if culprit is None else f" on rank {culprit}")
            + "; nothing of this step was kept")
    try:
        home = finite.bundle(own.path, step, batch, own.method, {
            "progress": progress, "accumulate": settings.accumulate, "bad": where, "rank": culprit})
        told += f". Look at it: ssl-dist replay {home}"
    except OSError as error:        # not for that does a run end
        logger.warning("the tiles of step %d could not be written to be looked at: %s", step, error)
    if settings.nonfinite == "fail" or len(own.left_out) >= settings.nonfinite_max:
        many = f" ({len(own.left_out)} batches were left out before it)" if own.left_out else ""
        raise NotFinite(f"{told}{many}. Try a smaller optim.lr, a longer optim.warmup, or optim.clip=1; "
                        "nonfinite=skip goes on without such batches")
    own.left_out.append(step)
    own.log.warn(f"{told} ({len(own.left_out)} of {settings.nonfinite_max} batches left out)", step)
    if settings.nonfinite == "rewind":
        raise Rewind


def _rewound(own: Parts) -> int:
    """The step of the last checkpoint, taken up again; its weights are those of this run before anything went wrong."""
    if own.saver.pending:
        own.publish()
    if (found := checkpoint.agreed(own.path / "checkpoints")) is None:
        raise NotFinite("nonfinite=rewind, and there is no checkpoint to go back to yet; use a smaller "
                        "checkpoint.every, or nonfinite=skip")
    step = checkpoint.load(found, own.engine)
    own.log.goes_back(step)
    own.log.warn(f"goes back to step {step}, and on from there without the batches of steps "
                 f"{', '.join(map(str, own.left_out))}", step)
    return step


def _slow(seen: "Counter[str]") -> list[str]:
    """Who keeps the others waiting, once it has done so in several rows."""
    found = dist.gather((points.alone.read(), watch.host()))
    words = watch.stragglers([seconds for seconds, _ in found], [host for _, host in found])
    who = words.partition(" takes ")[0]
    for name in [name for name in seen if name != who]:
        del seen[name]
    if not words:
        return []
    seen[who] += 1
    return [f"{words}; all go at that pace. Look at that machine, or its disk"] if seen[who] == PATIENCE else []


def _gradients(engine: Engine, parts: list[Batch], progress: float, step: int) -> dict[str, torch.Tensor]:
    """Leaves the gradients of the mean loss of a batch's parts; the means of their scalars."""
    found = []
    for number, part in enumerate(parts):
        with engine.part(number, len(parts)):
            points.at("step.forward", step)
            scalars = engine(part, progress)
            if (factor := points.value("step.forward", step, 1.0)) != 1.0:      # a fault that was asked for
                scalars["loss"] = scalars["loss"] * factor
            points.at("step.backward", step)
            points.alone.meets()
            engine.backward(scalars["loss"])
        found.append({name: value.detach() for name, value in scalars.items()})
    return {name: torch.stack([each[name] for each in found]).mean(dim=0) for name in found[0]}


def build(settings: Train) -> Method:
    """The method with its encoder, on every rank the same weights."""
    torch.manual_seed(settings.seed)
    encoder = _network(settings)
    if settings.encoder.checkpointing:
        if not isinstance(encoder, Encoder):
            raise ConfigError(["encoder.checkpointing=true is for networks of timm; leave it out"])
        encoder.checkpoint()
    method = methods.load(settings.method["name"]).Method(config.method_config(settings), encoder)
    if settings.encoder.batchnorm == "synchronised":
        synchronise(method, settings.encoder.batchnorm_ranks)
    return method


def _network(settings: Train) -> torch.nn.Module:
    asked = settings.encoder
    return _kind(settings).network(asked.name, asked.args, asked.mean, asked.std)


def _kind(settings: Train) -> type[Method]:
    return methods.load(settings.method["name"]).Method


def _plan(settings: Train) -> Method:
    """The method without the memory of its weights."""
    with torch.device("meta"):
        return build(settings)


def _tries(settings: Train, plan: Method, world: int) -> None:
    """Refuses what the encoder would choke on at the first step."""
    tiles = config.rank_batch(settings, world) // settings.accumulate
    if settings.encoder.batchnorm == "synchronised":
        tiles *= settings.encoder.batchnorm_ranks or world
    with torch.device("meta"):
        encoder = _network(settings)
    if tiles == 1 and has_any(encoder):
        raise ConfigError([f"data.batch={settings.data.batch} on {world} ranks shows BatchNorm one tile at a time, "
                           "which it cannot learn from; use a larger data.batch"
                           + (", a smaller accumulate" if settings.accumulate > 1 else "")
                           + (", or encoder.batchnorm=synchronised" if settings.encoder.batchnorm == "local" else "")])
    if isinstance(encoder, Encoder):
        for size in sorted({view.size for view in plan.views if isinstance(view, View)}):
            encoder.tries(tiles, size)


def _refuses(plan: Method, reader: Reader) -> None:
    """Shards that the method cannot learn from."""
    if found := plan.objections({str(home): {**index.settings, **index.datasets[0]}
                                 for home, index in zip(reader.folders, reader.indexes, strict=True)}):
        raise ConfigError(found)


def _imitated(settings: Train, device: torch.device) -> str:
    """A warning, where the processor has no bfloat16 of its own."""
    if settings.precision != "bf16" or device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return ""
    return ("precision=bf16 is imitated on this CPU, which has no bfloat16 of its own, and may take ten times as long "
            "as precision=fp32")


def _compile(method: Method) -> None:
    """Every encoder in place, so that no weight changes its name; a graph for each size of view."""
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "c++", "g++", "clang++"))):
        raise ConfigError(["compile=true needs a C++ compiler, and no g++ or clang++ is in PATH; use compile=false"])
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)      # it tells of its own compiler's version
    for each in method.modules():
        if isinstance(each, Encoder):
            each.compile(dynamic=False)


def replay(home: Path) -> dict[str, Any]:
    """A step that gave no finite number once more, on this machine's CPU, all ranks' tiles in one process."""
    run = home.parent.parent
    if not (home / "step.json").is_file() or not (run / "config.yaml").is_file():
        raise ConfigError([f"{home} is not a step to replay: a run writes RUN/replay/step-000123 where a loss or "
                           "gradient is not finite"])
    settings = config.load_train(str(run / "config.yaml"), [f"run={run}", "device=cpu"])
    dist.start(torch.device("cpu"))
    try:
        told, state, batch = finite.unbundled(home)
        method = build(settings)
        method.load_state_dict(state)
        torch.manual_seed(hash((settings.seed, told["step"], 0)))
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
            return {**told, **finite.examine(method, batch, told["progress"])}
    finally:
        dist.stop()


def from_checkpoint(settings: Train, path: Path, owner: lock.Owner, forms: Sequence[str] = ()) -> Path:
    """Exports the encoder of the newest sound checkpoint of a run folder, and its other `forms`."""
    newest = checkpoint.newest(path / "checkpoints")
    if newest is None:
        raise ConfigError([f"{path} has no complete checkpoint to export; train it first"])
    method = build(settings)
    method.load_state_dict(checkpoint.weights(newest))
    return export.export(method.encoder, settings, _reader(settings),
                         checkpoint.state(newest)["step"], path / "encoder", owner.check, forms)


def _reader(settings: Train) -> Reader:
    data = settings.data
    if data.stage and data.stage.exists() and not data.stage.is_dir():
        raise ConfigError([f"data.stage={data.stage} is a file; name a folder on a local disk"])
    stage = Stage(data.stage, int(data.stage_gb * 1e9)) if data.stage else None
    return Reader(data.shards, data.split, data.only, data.block, stage, data.readers,
                  slides=_kind(settings).INPUT == "bags")


def _stream(settings: Train, reader: Reader) -> Stream:
    data = settings.data
    if data.mixture == "natural":
        shares = None
    else:
        if unknown := sorted(data.weights.keys() - set(reader.datasets)):
            raise ConfigError([f"data.weights.{name}: no such dataset in data.shards; there are "
                               f"{', '.join(reader.datasets)}" for name in unknown])
        weights = np.array([data.weights.get(name, 0.0) for name in reader.datasets]) if data.weights else None
        shares = mixture.shares(reader.sizes, data.temperature if data.mixture == "temperature" else None, weights)
        if not shares.any():
            raise ConfigError([f"data.weights={data.weights} leave no dataset that has a tile"])
    return Stream(reader.counts, seed=settings.seed, window=data.window, batch=data.batch, datasets=reader.dataset_of,
                  shares=shares)


def _loader(settings: Train, path: Path, reader: Reader, stream: Stream, method: Method, device: torch.device,
            threads: int, way: str) -> Ahead:
    data = settings.data
    listed = Quarantine(path / "quarantine.jsonl", data.max_bad) if data.bad == "quarantine" else None
    if method.INPUT == "bags":
        return SlideLoader(reader, stream, cast(Any, method.views), rank=dist.rank(), world=dist.world(),
                           ahead=data.ahead, quarantine=listed)
    return Loader(reader, stream, cast(Any, method.views), rank=dist.rank(), world=dist.world(), device=device,
                  threads=threads, ahead=data.ahead, quarantine=listed,
                  fit=stain.read(data.stain) if data.stain else None, way=way)


def _way(settings: Train, reader: Reader, stream: Stream, device: torch.device, threads: int,
         before: str | None) -> str:
    """How tiles are decoded: as this run did `before`, for two decoders differ by a grey level here and there."""
    if device.type == "cpu" or _kind(settings).INPUT == "bags":
        return "cpu"
    if settings.data.decode != "auto":
        return settings.data.decode
    if before:
        return before
    encoded = reader.fetch(reader.rows(*stream.locate(0, stream.positions(0, 0, dist.world()))))
    return sweep.on_gpu([each for each in encoded if each is not None], threads, device.index or 0)


def rehearse(settings: Train, world: int, allowed: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that can fail before a machine is booked; what the run would be."""
    share = config.rank_batch(settings, world)
    if settings.data.stain:
        stain.read(settings.data.stain)
    reader = _reader(settings)
    stream = _stream(settings, reader)
    settings = config.with_steps(settings, stream.steps_an_epoch)
    method = _plan(settings)
    _tries(settings, method, world)
    _refuses(method, reader)
    weights = sum(parameter.numel() for parameter in method.parameters())
    path = Path(settings.run)
    words = _imitated(settings, dist.device(settings.device))
    if path.exists() and not path.is_dir():
        raise ConfigError([f"run={path} is a file; choose a folder"])
    if found := checkpoint.newest(path / "checkpoints"):
        _hold(found, _identity(settings, reader), path, allowed)
    home = _writable(path)
    need = 4 * weights * 3 * (settings.checkpoint.keep + 1)       # weights and two moments, fp32, and one in the making
    if need > (free := shutil.disk_usage(home).free):
        raise folder.StorageError(28, f"{path}: checkpoints may take {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    what = "slides" if method.INPUT == "bags" else "tiles"
    return {what: stream.samples, "steps an epoch": stream.steps_an_epoch,
            "left out of an epoch": stream.samples % settings.data.batch,
            "steps": settings.steps, "epochs": round(settings.steps / stream.steps_an_epoch, 2),
            "learning rate at the top": float(f"{settings.optim.lr * config.lr_scale(settings):.4g}"),
            f"{what} a rank and step": share, **_parts(settings, method, share), "parameters": weights,
            "disk for checkpoints, GB": round(need / 1e9, 2), **_room(settings, reader),
            **({"warning": words} if words else {})}


def _parts(settings: Train, method: Method, share: int) -> dict[str, Any]:
    """What accumulation changes: gradients are those of the whole batch, but for what BatchNorm sees at a time."""
    if settings.accumulate == 1 or not has_any(method):
        return {}
    return {"BatchNorm": f"sees {share // settings.accumulate} tiles a rank at a time, not {share} "
                         f"(accumulate={settings.accumulate})"}


def _writable(path: Path) -> Path:
    """The folder that is there already, of those in which `path` is to be."""
    home = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    with folder.storage(path):
        if not os.access(home, os.W_OK):
            raise PermissionError(13, "not writable", str(home))
    return home


def _room(settings: Train, reader: Reader) -> dict[str, Any]:
    """What the stage may hold, and whether it can."""
    if (stage := reader.stage) is None:
        return {}
    largest = max(tar.bytes for found in reader.indexes for tar in found.tars)
    wanted = settings.data.stage_gb
    if largest > stage.limit:
        raise ConfigError([f"data.stage_gb={wanted:g} is less than one tar takes, {largest / 1e9:.3f} GB; give it "
                           "several times that, or leave data.stage out"])
    room = stage.used() + shutil.disk_usage(_writable(stage.folder)).free
    return {"stage, GB": f"{wanted:g}" if room >= stage.limit else
            f"{wanted:g}, but its disk has room for {room / 1e9:.3f}: no more will be kept there"}


def _finished(found: Path, identity: dict[str, Any], settings: Train, path: Path, allowed: Sequence[str]) -> bool:
    """Whether there is nothing left to do; refuses to go on with a run that was begun as another."""
    done = _hold(found, identity, path, allowed) == settings.steps and (path / "encoder" / "config.json").is_file()
    if done:
        _tell(f"{path} is done already: {settings.steps} steps")
    return done


def _hold(found: Path, identity: dict[str, Any], path: Path, allowed: Sequence[str] = ()) -> int:
    """The step of a checkpoint, if it belongs to the run that the settings describe, but for what may differ."""
    state = checkpoint.state(found)
    plain = {"accumulate": 1}       # what is not written down
    changed = _differences({**plain, **state["identity"]}, {**plain, **identity})
    may = {key: words for key, words in changed.items()
           if any(key == each or key.startswith(f"{each}.") for each in allowed)}
    if refused := {key: words for key, words in changed.items() if key not in may}:
        raise ConfigError([f"{path} was begun with other settings: {words}; put it back, choose another run folder, or "
                           f"go on all the same with --allow-change {key}" for key, words in refused.items()])
    for words in may.values():
        logger.warning("goes on with other settings than before: %s", words)
    return state["step"]


def _tell(sentence: str) -> None:
    if dist.rank() == 0:
        Console(stderr=True).print(sentence, markup=False, highlight=False, soft_wrap=True)


def _identity(settings: Train, reader: Reader) -> dict[str, Any]:
    """All that decides the weights: a run that resumes under another identity would be neither of the two."""
    data = {name: getattr(settings.data, name) for name in ("split", "batch", "window")}
    plain = config.Data(settings.data.shards)
    data |= {name: value for name in ("only", "mixture", "temperature", "weights")     # what says nothing is nothing
             if (value := getattr(settings.data, name)) != getattr(plain, name)}
    for name in ("block", "stain"):
        if file := getattr(settings.data, name):
            data[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    tree = json.loads(json.dumps({name: schema.plain(getattr(settings, name)) for name in
                                  ("seed", "steps", "precision", "encoder", "optim", "method")}))
    for name in ("checkpointing", *(() if settings.encoder.batchnorm_ranks else ("batchnorm_ranks",))):
        del tree["encoder"][name]       # the same numbers, whichever
    if settings.accumulate > 1 and has_any(_plan(settings)):
        tree["accumulate"] = settings.accumulate        # BatchNorm sees smaller batches
    return {**tree, "data": data, "shards": [found.fingerprint for found in reader.indexes]}


def _differences(before: Any, after: Any, key: str = "") -> dict[str, str]:
    """What changed, in words, by key."""
    if isinstance(before, dict) and isinstance(after, dict):
        return {inner: words for name in sorted(before.keys() | after.keys())
                for inner, words in _differences(before.get(name), after.get(name),
                                                 f"{key}.{name}" if key else name).items()}
    return {} if before == after else {key: f"{key} was {before}, now {after}"}


def _timed(batches: Iterator[Batch], clock: Clock, step: int) -> Iterator[Batch]:
    """The batches from `step` on, with every wait for one on the clock."""
    for number in itertools.count(step):
        since = time.perf_counter()
        points.alone.begins()
        points.at("data.next", number)
        batch = next(batches, None)
        if batch is None:
            return
        clock.waits(since)
        yield batch


def _agree(own: Parts, loss: torch.Tensor | None, step: int) -> tuple[bool, bool, bool, int | None]:
    """What one rank knows, all know, before anything learns: whether one was asked to stop, whether a checkpoint is
    due, whether one is still being written, and which rank's loss is no number."""
    points.at("step.agree", step)
    bad = loss is not None and not math.isfinite(float(loss.detach()))
    stopping, due, writing, culprit = dist.largest(
        [float(bool(own.asked)), float(own.saver.due()), float(own.saver.writing), float(bad * (dist.rank() + 1))],
        own.device)
    return bool(stopping), bool(due), bool(writing), int(culprit) - 1 if culprit else None


def _draw_views(loader: Loader, count: int, path: Path, log: Log) -> None:
    """A picture of what the encoder will see: a tile a row, first whole, then its views."""
    batch = loader.make(0)
    count = min(count, len(batch.rows))
    whole = [np.asarray(Image.open(io.BytesIO(encoded.tobytes())).convert("RGB"))
             for encoded in loader.reader.read(batch.rows[:count])]
    picture = sheet.paste(whole, [("", [view[:count].cpu().numpy() for view in batch.views])])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    folder.write(folder.make(path / "pictures") / "views.png", buffer.getvalue())
    log.picture("views", np.asarray(picture), 0)
