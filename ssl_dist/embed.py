"""From whole slides to vectors, without shards between: each slide is read once, and its tiles go to the encoder.

    OUT/embed.json      which encoder, and what decides the tiles: nothing else is ever written there
    OUT/h5/             a file a slide: features, coords (pixels of level 0), and where they come from
    OUT/parquet/        the same as tables, if asked for
    OUT/slides.jsonl    a line a slide that is done: tiles, what was left out and why; also of those without a tile
    OUT/failed.jsonl    a line a slide that failed, and why; they are tried again by the next call
    OUT/.notes/         a file a slide, written last: what is done, for the next call and the other parts

Slides are read in processes of their own (shards/feed.py), several at a time, and tiles of all of them share a batch.
Every batch has the same shape, the last one padded, so that a tile's vector does not depend on its neighbours.

N tiles of a slide   B of a batch   D width   S pixels a side
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards import arrays, feed, folder, sources
from shards.index import ShardError
from shards.sources import Source
from ssl_dist.data import opencv
from ssl_dist.eval import embed, features
from ssl_dist.models import encoder as encoders
from ssl_dist.slides import Slides

FORMAT = 1              # of what is written: another one where the same settings would give other tiles or vectors
# On a CPU more at a time is no quicker, and what the last batch of a job is padded with is looked at as well.
BATCH = {"cpu": 32, "cuda": 256}
SUFFIXES = {"h5": ".h5", "parquet": ".parquet"}

Progress = Callable[[str, int, int, str], None]     # what, how many are done, of how many, how fast


class SettingsChanged(ValueError):
    """The folder holds vectors of another encoder, or of other tiles."""

    exit_code = 2


@dataclass
class Looks:
    """An encoder, before its weights are needed: what it is, and the pixels that it sees."""

    architecture: str
    sha256: str
    size: int
    decides: dict[str, Any]         # its vectors, beside the weights


@dataclass
class Summary:
    """What a call did, and what there is."""

    slides: int = 0             # with vectors, done by this call
    before: int = 0             # done by earlier ones
    empty: int = 0              # of those done by this call, without any tile
    tiles: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def pace(self) -> str:
        """How fast it goes, or went."""
        seconds = max(self.seconds, 1e-9)
        return f"{self.tiles / seconds:,.0f} tiles/s, {3600 * (self.slides + self.empty) / seconds:,.0f} slides/hour"


@dataclass
class _Slide:
    """The vectors of a slide so far, as they come."""

    attempt: int
    corners: list[np.ndarray] = field(default_factory=list)
    vectors: list[np.ndarray] = field(default_factory=list)
    tiles: int = 0              # that have come back from the encoder
    end: feed.Ended | None = None


@dataclass
class Job:
    """What is to be done, held against what there is."""

    settings: Slides
    looks: Looks
    decided: dict[str, Any]
    found: list[Source]         # of this part
    left: list[Source]          # that are not done
    changed: list[tuple[Source, str]]       # that were done, and are not what they were


def plan(settings: Slides) -> Job:
    """Finds the slides and refuses what cannot be; writes nothing."""
    looks = looked(settings)
    decided = json.loads(json.dumps({
        "format": FORMAT, **looks.decides, "encoder": looks.architecture, "encoder_sha256": looks.sha256,
        "resize": looks.size, **settings.deciding()}))
    found = sources.named(settings.slides, settings.reading())
    number, of = map(int, settings.part.split("/")) if settings.part else (1, 1)
    found = found[number - 1::of]
    _agreed(settings.out, decided)
    job = Job(settings, looks, decided, found, [], [])
    for source in found:
        done = _noted(settings, source)
        if done is None or not _written(settings, source, done):
            job.left.append(source)
        elif what := _difference(done["source"], _told(source)):
            job.changed.append((source, f"it is done already, and since then {what}; delete "
                                        f"{_note(settings, source)} to embed it anew"))
    return job


def looked(settings: Slides) -> Looks:
    """Which encoder it is; refuses a size that it does not take, at once."""
    size = settings.resize or encoders.trained_size(settings.encoder)
    with torch.device("meta"):
        network = encoders.build(settings.encoder).ends_at(settings.stage).eval()
        network.tries(1, size)
    return Looks(network.name, encoders.digest(settings.encoder), size, network.identity)


def run(settings: Slides, device: torch.device, threads: int, progress: Progress = lambda *_: None) -> Summary:
    """Embeds all slides that are not done; those that fail are listed, and the others done."""
    job = plan(settings)
    out = folder.make(settings.out)
    with contextlib.ExitStack() as held:
        # Parts hold the folder together, each its own part alone.
        held.enter_context(folder.hold(out, ".lock", shared=bool(settings.part)))
        if settings.part:
            held.enter_context(folder.hold(out, f".part-{settings.part.replace('/', '-of-')}.lock"))
        with folder.hold(out, ".setup.lock", wait=True):
            _agreed(out, job.decided)
            folder.write_json(out / "embed.json", job.decided)
        for name in (".notes", *settings.write):
            folder.make(out / name)
        if not settings.part:           # of a call that was killed: we hold the lock, so nobody writes them
            for draft in out.glob("*/.*.tmp"):
                draft.unlink()
        summary = Summary(before=len(job.found) - len(job.left) - len(job.changed))
        for source, why in job.changed:
            _failed(job, summary, source, why)
        held.callback(_list, out)
        if job.left:
            _embed(job, summary, encoders.load(settings.encoder).ends_at(settings.stage), device, threads, progress)
    return summary


def _embed(job: Job, summary: Summary, network: encoders.Encoder, device: torch.device, threads: int,
           progress: Progress) -> None:
    settings, began = job.settings, time.monotonic()

    def told() -> None:
        summary.seconds = time.monotonic() - began
        done = summary.slides + summary.empty + len(summary.failed)
        progress("slides", done, len(job.left) + len(job.changed), summary.pace)

    told()
    batches = _Batches(job, summary, settings.batch or BATCH[device.type], threads, told)
    with contextlib.closing(batches.made()) as made:
        for whose, vectors_BD in features.look(network, made, device, settings.precision):
            batches.take(whose, vectors_BD.numpy())


class _Batches:
    """Tiles of all slides in batches of one shape, and what becomes of the slides."""

    def __init__(self, job: Job, summary: Summary, batch: int, threads: int, told: Callable[[], None]):
        self._job, self._summary, self._batch, self._threads, self._told = job, summary, batch, threads, told
        self._slides: dict[int, _Slide] = {}        # that are not written yet, by their places in what is left

    def made(self) -> Generator[tuple[list[tuple[_Slide, int]], Tensor], None, None]:
        """Each batch (B, S, S, 3), and whose its tiles are: slides, and how many of each in turn."""
        opencv.one_thread()
        settings, size = self._job.settings, self._job.looks.size
        whose: list[tuple[_Slide, int]] = []
        pixels = np.empty((self._batch, size, size, 3), np.uint8)
        filled = 0
        with ThreadPoolExecutor(self._threads) as pool, \
                contextlib.closing(feed.read(self._job.left, settings.reading())) as feeding:
            for item in feeding:
                if isinstance(item, feed.Ended):
                    self._ended(item)
                    continue
                slide = self._slides.get(item.slide)
                if slide is None or slide.attempt < item.attempt:
                    slide = self._slides[item.slide] = _Slide(item.attempt)
                slide.corners.append(item.corner_N2)
                first, count = 0, len(item.corner_N2)
                while first < count:
                    some = min(count - first, self._batch - filled)
                    opencv.resized(item.pixels_NSS3[first:first + some].__getitem__, some, size, pool,
                                   pixels[filled:filled + some])
                    whose.append((slide, some))
                    first, filled = first + some, filled + some
                    if filled == self._batch:
                        yield whose, torch.from_numpy(pixels)
                        # Fresh: what is handed over is never reused.
                        whose, pixels, filled = [], np.empty_like(pixels), 0
        if filled:
            pixels[filled:] = 0
            yield whose, torch.from_numpy(pixels)

    def take(self, whose: list[tuple[_Slide, int]], vectors_BD: np.ndarray) -> None:
        """The vectors of a batch; writes the slides that have all of theirs."""
        first = 0
        for slide, count in whose:
            slide.vectors.append(vectors_BD[first:first + count].copy())      # of its own, or the batch would stay
            first, slide.tiles = first + count, slide.tiles + count
        self._summary.tiles += first
        self._settle()

    def _ended(self, end: feed.Ended) -> None:
        if end.error is None:
            self._slides.setdefault(end.slide, _Slide(end.attempt)).end = end
        else:
            self._slides.pop(end.slide, None)
            if not end.again:
                _failed(self._job, self._summary, self._job.left[end.slide], str(end.error))
        self._settle()

    def _settle(self) -> None:
        for number, slide in [*self._slides.items()]:
            if slide.end is not None and slide.tiles == slide.end.tiles:
                del self._slides[number]
                self._write(self._job.left[number], slide, slide.end)
        self._told()

    def _write(self, source: Source, slide: _Slide, end: feed.Ended) -> None:
        summary, job = self._summary, self._job
        facts = {"slide": source.slide, "patient": source.patient, "file": source.filename,
                 "state": "done" if end.tiles else "empty", "tiles": end.tiles, "mpp": round(end.mpp, 6),
                 "native": end.native, "rejected": end.rejected, **({"detail": end.detail} if end.detail else {})}
        if end.tiles:
            corner_N2, vectors_ND = np.concatenate(slide.corners), np.concatenate(slide.vectors)
            slide.vectors.clear()
            if not np.isfinite(vectors_ND).all():
                _failed(job, summary, source, "the encoder gives vectors that are no numbers; its weights are damaged, "
                                              "or it needs precision=fp32")
                return
            order = np.lexsort((corner_N2[:, 0], corner_N2[:, 1]))      # from the top left on
            if (order != np.arange(len(order))).any():
                corner_N2, vectors_ND = corner_N2[order], vectors_ND[order]
            for form in job.settings.write:
                _store(form, _file(job.settings, source, form), vectors_ND, corner_N2, source, end, job)
            summary.slides += 1
        else:
            summary.empty += 1
        folder.write_json(_note(job.settings, source), {**facts, "source": _told(source)})
        _note(job.settings, source, "failed.json").unlink(missing_ok=True)


def _store(form: str, path: Path, vectors_ND: np.ndarray, corner_N2: np.ndarray, source: Source, end: feed.Ended,
           job: Job) -> None:
    """A slide's vectors in one form."""
    dataset = job.settings.dataset
    if form == "h5":
        arrays.write_bag(path, vectors_ND, corner_N2, {
            "slide": source.slide, "patient": source.patient, "dataset": dataset, "mpp": end.mpp,
            "encoder": job.looks.architecture, "encoder_sha256": job.looks.sha256, "size": job.looks.size,
            **({} if job.settings.stage is None else {"stage": job.settings.stage}),
            "decided": json.dumps({**job.decided, **_told(source)}, sort_keys=True)}, wide=end.side)
        return
    count = len(corner_N2)
    words = {"dataset": dataset, "slide": source.slide, "patient": source.patient, "mpp": end.mpp,
             "label": source.label, "split": source.split}
    x, y = corner_N2.T.tolist()
    table = {"key": [sources.key(source.slide, f"x{left}", f"y{top}") for left, top in zip(x, y, strict=True)],
             "x": x, "y": y, **{name: [word] * count for name, word in words.items()}}
    embed.write_table(path, vectors_ND, {name: table[name] for name in embed.COLUMNS}, job.looks.architecture,
                      job.looks.sha256)


# --- what is done


def _file(settings: Slides, source: Source, form: str) -> Path:
    return settings.out / form / f"{embed.file_name(settings.dataset, source.slide)}{SUFFIXES[form]}"


def _note(settings: Slides, source: Source, suffix: str = "json") -> Path:
    return settings.out / ".notes" / f"{embed.file_name(settings.dataset, source.slide)}.{suffix}"


def _noted(settings: Slides, source: Source) -> dict[str, Any] | None:
    """What was noted of a slide, if anything was."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        note = json.loads(_note(settings, source).read_text())
        return note if {"state", "source"} <= note.keys() else None
    return None


def _written(settings: Slides, source: Source, note: dict[str, Any]) -> bool:
    return note["state"] == "empty" or all(_file(settings, source, form).is_file() for form in settings.write)


def _told(source: Source) -> dict[str, Any]:
    """What was known of a slide before it was opened, and decides its vectors."""
    there = 0
    with contextlib.suppress(OSError):      # gone since it was found: who reads it will say so
        there = source.path.stat().st_size
    return {"bytes": there, "slide_mpp_told": source.mpp, "patient": source.patient}


def _failed(job: Job, summary: Summary, source: Source, why: str) -> None:
    text = (why if source.file in why else f"{source.file}: {why}").replace(source.file, source.filename)
    summary.failed.append(text)
    folder.write_json(_note(job.settings, source, "failed.json"), {
        "slide": source.slide, "file": source.filename, "state": "failed", "reason": text})


def _list(out: Path) -> None:
    """slides.jsonl and failed.jsonl anew, from the notes of all parts."""
    with folder.hold(out, ".setup.lock", wait=True):
        lines: dict[str, list[str]] = {"slides": [], "failed": []}
        for path in sorted((out / ".notes").glob("*.json")):
            with contextlib.suppress(ValueError):
                note = json.loads(path.read_text())
                shown = {name: value for name, value in note.items() if name != "source"}
                lines["failed" if note["state"] == "failed" else "slides"].append(
                    json.dumps(shown, ensure_ascii=False) + "\n")
        for name, found in lines.items():
            folder.write(out / f"{name}.jsonl", "".join(found))


def _agreed(out: Path, decided: dict[str, Any]) -> None:
    """Refuses a folder of something else: vectors of two encoders, or of two grids, must not lie side by side."""
    path = out / "embed.json"
    if not path.is_file():
        there = sorted(each.name for each in out.iterdir() if not each.name.startswith(".")) if out.is_dir() else []
        if there:
            raise SettingsChanged(f"out={out} holds {there[0]!r} and was not begun by ssl-dist embed; choose a new or "
                                  "an empty folder")
        return
    try:
        before = json.loads(path.read_text())
    except ValueError:
        raise ShardError(f"{path} is damaged; choose another out") from None
    if what := _difference(before, decided):
        raise SettingsChanged(f"out={out} holds vectors of something else: {what}; choose another out, or delete that "
                              "folder first")


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first thing that is not as it was, in words; "" where all is."""
    return next((f"{name} was {before.get(name)!r}, now {value!r}" for name, value in now.items()
                 if before.get(name) != value), "")


def lines(summary: Summary, settings: Slides) -> list[str]:
    """What there is to say of a call."""
    said = [f"{settings.out}: {summary.slides} slides, {summary.tiles} tiles"
            + (f", {summary.pace}" if summary.tiles else "")
            + (f"; {summary.empty} without a tile (slides.jsonl says why)" if summary.empty else "")
            + (f"; {summary.before} were done before" if summary.before else "")]
    if summary.failed:
        said += [f"failed: {text}" for text in summary.failed[:10]]
        said.append(f"{len(summary.failed)} failed, max_failed={settings.max_failed}; {settings.out / 'failed.jsonl'} "
                    "names them, and the next call tries them again")
    return said


def rehearse(settings: Slides, progress: Callable[[str, int, int], None]) -> tuple[list[str], int]:
    """Opens every slide that is left: what a night would be lost by is said at once. Lines, and how many would fail."""
    from shards import cut

    job = plan(settings)
    if settings.out.exists() and not os.access(settings.out, os.W_OK | os.X_OK):
        raise folder.StorageError(13, f"out={settings.out}: no permission to write there: choose a folder of your own")
    refused = [*(f"{source.file}: {why}" for source, why in job.changed),
               *cut.refused(job.left, settings.reading(), progress)]
    patients = len({each.patient for each in job.found} - {""})
    return [f"{len(job.found)} slides of {patients or 'unknown'} patients, {len(job.found) - len(job.left)} of them "
            f"done; {job.looks.architecture} at {job.looks.size} px, sha256 {job.looks.sha256[:12]}", *refused], \
        len(refused)
