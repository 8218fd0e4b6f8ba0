"""From shards of tiles to draws of slides: what an encoder makes of some tiles, again and again, seen through one
augmentation that all tiles of a draw share. Computed once, so that slides can be trained on without seeing a tile.

    OUT/<dataset>-000000.tar    all draws of some slides, slides in an order of lots (shards/draws.py)
    OUT/index.json …            as of any shard folder, written last
    OUT/.work/                  what was noted of tars that are done, until all are

Tiles and augmentation of a draw are a pure function of (seed, slide, draw): a slide's draws are the same whatever other
slides there are.

N tiles of a slide   T of a draw   B looked at together   D width
"""

import contextlib
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards import drawing, draws, folder, index, show
from shards.drawing import Slide
from shards.draws import Draw
from shards.index import ShardError
from shards.settings import CUT
from ssl_dist.data import augment, bags, opencv, stain
from ssl_dist.data.decode import Decoder
from ssl_dist.data.loader import Palettes
from ssl_dist.data.reader import Reader
from ssl_dist.eval import features
from ssl_dist.models import encoder as encoders
from ssl_dist.slides import Draws

KIND = "draws"
FORMAT = 1              # of what is written: another one where the same settings would give other draws
TOGETHER = 256          # tiles of a draw that are looked at together
ORDER = 5               # the last word of Philox's counter; 0 to 4 are used by what batches are made of

Progress = Callable[[str, int, int], None]


class SettingsChanged(ValueError):
    """The folder holds draws made with other settings."""

    exit_code = 2


@dataclass(frozen=True)
class Tiles:
    """A slide and where its tiles lie."""

    slide: Slide
    rows_N: np.ndarray          # of the catalogue
    cell_N2: np.ndarray
    lot: int                    # decides its draws, by its name alone


@dataclass
class Job:
    """What is to be done, held against what there is."""

    settings: Draws
    reader: Reader
    tars: list[list[Tiles]]     # in order
    decided: dict[str, Any]
    card: dict[str, Any]

    def path(self, number: int) -> Path:
        """One of the tars."""
        return self.settings.out / f"{self.card['name']}-{number:06d}.tar"

    def note(self, number: int) -> Path:
        """What is noted of one of the tars."""
        return self.settings.out / ".work" / f"{number:06d}.json"

    def done(self, number: int) -> dict[str, Any] | None:
        """What was noted of a tar that is written."""
        return drawing.noted(self.path(number), self.note(number))


@dataclass
class Summary:
    """What a call did, and what there is."""

    slides: int
    tars: int
    untouched: bool = False         # the folder was complete before
    part: bool = False
    bytes: int = 0                  # of all tars, once they are published
    bad: list[dict[str, str]] = field(default_factory=list)


def plan(settings: Draws) -> Job:
    """Finds the slides and refuses what cannot be; writes nothing."""
    with torch.device("meta"):
        network = encoders.build(settings.encoder).ends_at(settings.stage).eval()
        network.tries(1, settings.view.size)
        width = network(torch.empty(1, settings.view.size, settings.view.size, 3, dtype=torch.uint8)).shape[1]
    only = {"mpp": [settings.mpp]} if settings.mpp else {}
    reader = Reader(settings.shards, settings.split, only)
    if len(reader.datasets) > 1:
        raise ShardError(f"shards are of {', '.join(reader.datasets)}; draw each dataset into a folder of its own, and "
                         "train on all of them")
    found = _slides(reader)
    if settings.out.resolve() in {path.resolve() for path in settings.shards}:
        raise SettingsChanged(f"out={settings.out} is one of shards=, which are read; choose a new folder")
    _refuse_strangers(settings.out)
    cards, sha256 = [found.datasets[0] for found in reader.indexes], encoders.digest(settings.encoder)
    order = sorted(found, key=lambda each: hashlib.blake2b(f"{settings.seed} {each.slide.name}".encode()).digest())
    tars = [order[first:first + settings.tar_slides] for first in range(0, len(order), settings.tar_slides)]
    kept = {name: getattr(settings, name) for name in ("split", "mpp", "draws", "tiles", "stage", "precision", "seed",
                                                       "tar_slides")}
    decided = json.loads(json.dumps({
        "format": FORMAT, "kind": KIND, **kept, "view": asdict(settings.view), **network.identity,
        "encoder_sha256": sha256, "shards": [each.fingerprint for each in reader.indexes],
        "stain": hashlib.sha256(settings.stain.read_bytes()).hexdigest() if settings.stain else ""}))
    told = {name: cards[0].get(name, "") for name in ("name", "organ", "stain", "licence", "about")}
    card = {**told, "classes": [], "samples": settings.draws * len(found), "slides": len(found),
            "patients": len({each.slide.patient for each in found} - {""}), "rejected": {}, "draws": settings.draws,
            "tiles": settings.tiles, "width": width, "encoder": network.name, "encoder_sha256": sha256}
    return Job(settings, reader, tars, decided, card)


def _slides(reader: Reader) -> list[Tiles]:
    """The slides, by name, with the cells of their tiles."""
    rows = reader.all_rows()
    called, of_code = np.unique([name for _, name in reader.words("slide")], return_inverse=True)
    used, first_S, place_R = np.unique(of_code[reader.codes("slide", rows)], return_index=True, return_inverse=True)
    names = called[used]
    corner_R2 = np.stack([reader.numbers(name, rows).astype(np.int64) for name in ("x", "y")], axis=1)
    mpp_R = np.round(reader.numbers("mpp", rows).astype(np.float64), 4)
    told = {name: reader.column(name, rows[first_S]) for name in ("patient", "split")}
    wides = _wides(reader)
    found = []
    parts = np.split(np.argsort(place_R, kind="stable"), np.cumsum(np.bincount(place_R))[:-1])
    for number, (name, own) in enumerate(zip(names.tolist(), parts, strict=True)):
        corner_N2, several = corner_R2[own], np.unique(mpp_R[own])
        if len(several) > 1:
            raise ShardError(f"slide {name!r} has tiles of {', '.join(f'{each:g}' for each in several[:4])} µm/px, "
                             f"which lie on different grids; choose one kind with mpp={several[0]:g}")
        if len(own) > 1 and (corner_N2 == corner_N2[0]).all():
            raise ShardError(f"all {len(own)} tiles of slide {name!r} lie at one place, x={corner_N2[0, 0]} "
                             f"y={corner_N2[0, 1]}: nobody knows where they were; shard the slides themselves")
        known = name in wides and np.isfinite(several[0])
        wide = wides[name] * several[0] if known else bags.pitch(corner_N2)
        cell_N2 = np.rint((corner_N2 - corner_N2.min(axis=0)) / wide).astype(np.int32)
        lot = int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest(), "big")
        found.append(Tiles(Slide(name, told["patient"][number], told["split"][number], float(several[0])), rows[own],
                           cell_N2, lot))
    return found


def _wides(reader: Reader) -> dict[str, float]:
    """How wide a tile is at level 0 of each slide for every micron a pixel, where the shards know: of few tiles that
    lie apart, gaps alone do not tell."""
    found: dict[str, float] = {}
    for home, told in zip(reader.folders, reader.indexes, strict=True):
        if isinstance(home, Path) and told.settings.get("kind") in CUT and (size := told.settings.get("size")):
            for line in show.slide_lines(home):
                if isinstance(mpp := line.get("mpp"), int | float) and mpp > 0:
                    found[line["slide"]] = size / mpp
    return found


def run(settings: Draws, device: torch.device, threads: int, progress: Progress = lambda *_: None) -> Summary:
    """Draws what is not drawn yet; without `part`, publishes the folder."""
    job = plan(settings)
    out, work = settings.out, settings.out / ".work"
    with contextlib.closing(job.reader), contextlib.ExitStack() as held:
        held.enter_context(folder.hold(out, ".lock", shared=bool(settings.part)))
        if settings.part:
            held.enter_context(folder.hold(out, f".part-{settings.part.replace('/', '-of-')}.lock"))
        if (out / "index.json").exists():
            return _finished(job)
        with folder.hold(out, ".setup.lock", wait=True):
            _agreed(work, job.decided)
        if not settings.part:       # of a call that was killed: we hold the lock, so nobody writes them
            for draft in out.glob(".*.tmp"):
                draft.unlink()
        number, of = map(int, settings.part.split("/")) if settings.part else (1, 1)
        own = range(number - 1, len(job.tars), of)
        slides = sum(len(job.tars[each]) for each in own)
        if left := [each for each in own if job.done(each) is None]:
            network = encoders.load(settings.encoder).ends_at(settings.stage)
            _draw(job, left, network, device, threads, progress, slides)
        if settings.part:
            return Summary(slides, len(own), part=True)
        notes = [note for each in own if (note := job.done(each))]
        assert len(notes) == len(job.tars), "a tar vanished as it was written"
        return _published(job, notes)


def _draw(job: Job, left: list[int], network: encoders.Encoder, device: torch.device, threads: int,
          progress: Progress, total: int) -> None:
    """The tars that are left, one after the other."""
    done = total - sum(len(job.tars[number]) for number in left)
    words = {"dataset": job.card["name"], "organ": job.card["organ"], "stain": job.card["stain"]}
    bad: list[dict[str, str]] = []
    progress("slides", done, total)

    def counted(found: Iterator[tuple[Slide, list[bytes]]]) -> Iterator[tuple[Slide, list[bytes]]]:
        nonlocal done
        for each in found:
            yield each
            done += 1
            progress("slides", done, total)

    with contextlib.closing(_Shown(job, threads, bad)) as shown:
        for number in left:
            before = len(bad)

            def lost(first: int = before) -> dict[str, Any]:
                return {"bad": bad[first:]}

            looked = features.look(network, shown.batches(job.tars[number]), device, job.settings.precision)
            drawing.write_tar(job.path(number), job.note(number), words, counted(_packed(job, looked)), lost)


def _packed(job: Job, looked: Iterator[tuple["_Piece", Tensor]]) -> Iterator[tuple[Slide, list[bytes]]]:
    """Slides with all their draws, of pieces of draws as they come."""
    parts: list[np.ndarray] = []
    contents: list[bytes] = []
    for piece, vectors_BD in looked:
        parts.append(vectors_BD.numpy())
        if piece.cell_T2 is not None:
            contents.append(draws.packed(Draw(np.concatenate(parts), piece.cell_T2)))
            parts.clear()
            if len(contents) == job.settings.draws:
                yield piece.slide, contents
                contents = []


@dataclass(frozen=True)
class _Piece:
    """Whose tiles a batch holds; with the last piece of a draw come the cells of all of it."""

    slide: Slide
    cell_T2: np.ndarray | None


class _Shown:
    """The tiles of draws as the encoder is to see them, a batch at a time."""

    def __init__(self, job: Job, threads: int, bad: list[dict[str, str]]):
        self._job, self._bad = job, bad
        self._pool, self._decoder = ThreadPoolExecutor(threads), Decoder(TOGETHER, threads)
        fit = stain.read(job.settings.stain) if job.settings.stain else None
        self._palette = Palettes(job.reader, fit) if fit and job.settings.view.fitted else None
        opencv.one_thread()

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=True)

    def batches(self, slides: list[Tiles]) -> Iterator[tuple[_Piece, Tensor]]:
        """Every draw of every slide, in pieces (B, S, S, 3)."""
        for tiles in slides:
            lost: set[int] = set()          # places of tiles that cannot be read
            for number in range(self._job.settings.draws):
                yield from self._draw(tiles, number, lost)

    def _draw(self, tiles: Tiles, number: int, lost: set[int]) -> Iterator[tuple[_Piece, Tensor]]:
        settings = self._job.settings
        order_N = np.random.Generator(np.random.Philox(key=[settings.seed, tiles.lot], counter=[0, number, 0, ORDER])
                                      ).permutation(len(tiles.rows_N))
        drawn = self._numbers(tiles, number)
        seen: list[np.ndarray] = []         # places of tiles that were shown
        left, wanted, shown = iter(order_N.tolist()), min(settings.tiles, len(order_N)), 0
        while True:
            room = min(TOGETHER, wanted - shown)
            asked = list(itertools.islice((each for each in left if each not in lost), room))
            pixels_BSS3, own = self._views(tiles, np.array(asked, np.int64), drawn, lost)
            seen.append(own)
            shown += len(own)
            last = shown == wanted or len(asked) < room         # fewer than there is room for: there are no others
            if last and not shown:
                raise ShardError(f"no tile of slide {tiles.slide.name!r} can be read; run: ssl-dist check "
                                 f"{settings.shards[0]} --decode")
            if len(own) or last:
                yield _Piece(tiles.slide, tiles.cell_N2[np.concatenate(seen)] if last else None), \
                    torch.from_numpy(pixels_BSS3)
            if last:
                return

    def _numbers(self, tiles: Tiles, number: int) -> augment.Numbers:
        """The one augmentation of a draw."""
        settings = self._job.settings
        palette = self._palette(tiles.rows_N[:1]) if self._palette else None
        return augment.numbers(settings.view, augment.uniforms(settings.seed, tiles.lot, 0, number, 1), palette)

    def _views(self, tiles: Tiles, places: np.ndarray, drawn: augment.Numbers,
               lost: set[int]) -> tuple[np.ndarray, np.ndarray]:
        """The views of those of the tiles that can be read, and which they are."""
        rows = tiles.rows_N[places]
        content = self._job.reader.fetch(rows) if len(rows) else []
        whole = np.array([each is not None for each in content], bool)
        pictures = self._decoder.open([each for each in content if each is not None])
        same = augment.Numbers(**{name: np.repeat(value, len(pictures), axis=0) for name, value in vars(drawn).items()})
        (pixels_BSS3,) = opencv.views(pictures, [same], [self._job.settings.view.size], self._pool)
        fine = np.flatnonzero(whole)
        whole[fine[list(pictures.bad)]] = False
        for place, row, sound in zip(places.tolist(), rows.tolist(), whole, strict=True):
            if not sound:
                lost.add(place)
                self._lose(row)
        return pixels_BSS3[whole[fine]], places[whole]

    def _lose(self, row: int) -> None:
        key, path, _ = self._job.reader.place(row)
        self._bad.append({"key": key, "tar": str(path), "reason": "unreadable"})
        if len(self._bad) > self._job.settings.max_bad:
            raise ShardError(f"{len(self._bad)} tiles cannot be read, max_bad={self._job.settings.max_bad}; the last "
                             f"is {key!r}. Run: ssl-dist check {path.parent} --decode")


# --- what is done


def _refuse_strangers(out: Path) -> None:
    """A folder of anything else is not written to."""
    ours = (out / "index.json").is_file() and index.draws(index.read(out))
    with contextlib.suppress(OSError, ValueError, AttributeError):
        ours = ours or json.loads((out / ".work" / "settings.json").read_text()).get("kind") == KIND
    there = sorted(each.name for each in out.iterdir() if not each.name.startswith(".")) if out.is_dir() else []
    if there and not ours:
        raise SettingsChanged(f"out={out} holds {there[0]!r} and was not begun by ssl-dist draw; choose a new or an "
                              "empty folder")


def _agreed(work: Path, decided: dict[str, Any]) -> None:
    """Refuses half-done work of something else."""
    note = work / "settings.json"
    if note.exists():
        _same(work, json.loads(note.read_text()), decided)
    else:
        folder.make(work)
        folder.write_json(note, decided)


def _same(home: Path, before: dict[str, Any], decided: dict[str, Any]) -> None:
    if changed := [name for name in decided if before.get(name) != decided[name]]:
        raise SettingsChanged(f"{home} is of other draws: {changed[0]} was {before.get(changed[0])!r}, now "
                              f"{decided[changed[0]]!r}; choose another out, or delete that folder first")


def _finished(job: Job) -> Summary:
    found = index.read(job.settings.out)
    _same(job.settings.out, found.settings, job.decided)
    for each in found.tars:
        path = job.settings.out / each.name
        if not path.is_file() or path.stat().st_size != each.bytes:
            raise ShardError(f"{job.settings.out} was complete, but {each.name} is missing or cut short now; restore "
                             "it, or delete index.json and call again")
    return Summary(job.card["slides"], len(found.tars), untouched=True, bytes=sum(each.bytes for each in found.tars))


def _published(job: Job, notes: list[dict[str, Any]]) -> Summary:
    out, bad = job.settings.out, [line for note in notes for line in note.get("bad", [])]
    if len(bad) > job.settings.max_bad:
        raise ShardError(f"{len(bad)} tiles cannot be read, max_bad={job.settings.max_bad}; the last is "
                         f"{bad[-1]['key']!r}. Run: ssl-dist check {job.settings.shards[0]} --decode")
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in bad)
    folder.write(out / "rejected.jsonl", lines)
    card = {**job.card, "rejected": {"unreadable": len(bad)} if bad else {}}
    found = drawing.publish(out, card, job.decided, notes,
                            {"rejected.jsonl": hashlib.sha256(lines.encode()).hexdigest()})
    shutil.rmtree(out / ".work")
    return Summary(job.card["slides"], len(found.tars), bytes=sum(each.bytes for each in found.tars), bad=bad)


def lines(summary: Summary, settings: Draws) -> list[str]:
    """What there is to say of a call."""
    if summary.part:
        return [f"{settings.out}: part {settings.part} is drawn, {summary.slides} slides in {summary.tars} tars; when "
                "all parts are, call again without part="]
    return [f"{settings.out}: {settings.draws} draws of each of {summary.slides} slides in {summary.tars} tars, "
            f"{summary.bytes / 1e9:.3f} GB" + (", complete before" if summary.untouched else ""),
            *([f"{len(summary.bad)} tiles cannot be read and are left out; rejected.jsonl names them"]
              if summary.bad else [])]


def rehearse(settings: Draws) -> list[str]:
    """What would be drawn, once everything is refused that can be."""
    job = plan(settings)
    job.reader.close()
    if (settings.out / "index.json").exists():
        return lines(_finished(job), settings)
    if (note := settings.out / ".work" / "settings.json").exists():
        _same(settings.out, json.loads(note.read_text()), job.decided)
    tiles = sum(min(settings.tiles, len(each.rows_N)) for tar in job.tars for each in tar)
    held = tiles * settings.draws * (2 * job.card["width"] + 8)
    return [f"{job.card['slides']} slides, {settings.draws} draws of up to {settings.tiles} tiles each: "
            f"{tiles * settings.draws:,} looks of {job.card['encoder']} at {settings.view.size} px, "
            f"{job.card['width']} numbers each; {held / 1e9:.3f} GB in {len(job.tars)} tars"]
