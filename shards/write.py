"""Tiles of many slides, shuffled across all of them, in equal tars: the same input gives the same bytes.

Two phases. First every slide (or some hundred image files) is cut into a unit of the spool (cut.py). Then all tiles are
taken in the order of a keyed hash of what they are, copies are left out, and equal tars are written and published:
`index.json` comes last. Memory holds some tars' worth of rows and one tar's tiles a process, however many there are.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shards import annotation, arrays, copies, cut, folder, index, sources, spool, tar
from shards.cut import Progress
from shards.folder import FolderInUse, StorageError
from shards.index import ShardError
from shards.settings import CUT, Settings
from shards.tiles import Rejected

__all__ = ["Settings", "SettingsChanged", "Summary", "write"]



class SettingsChanged(ValueError):
    """The folder holds shards written with other settings."""

    exit_code = 2


@dataclass(frozen=True)
class Summary:
    """What a job left behind."""

    out: Path
    samples: int
    tars: int
    rejected: dict[str, int]        # reason -> count
    untouched: bool                 # the folder was complete before
    remarks: tuple[str, ...] = ()   # what is odd about the source, and is no error


def write(settings: Settings, progress: Progress = lambda what, done, total: None) -> Summary | None:
    """The whole job: from a folder of slides or images to a published shard folder; of a part of it only the cutting.

    Returns what there is then, or None for a part.
    """
    remarks: list[str] = []
    units = sources.units(settings, sources.sources(settings, remarks.append))
    (decided, times), out = _decided(settings, units), settings.out
    _refuse_strangers(out)
    with contextlib.ExitStack() as held:
        if settings.part:       # parts hold the folder together; whoever publishes holds it alone
            with folder.hold(out, ".setup.lock", wait=True):
                _prepare_part(out, _note(decided, times))
                held.enter_context(folder.hold(out, ".lock", shared=True))
        else:
            held.enter_context(folder.hold(out, ".lock"))
        if (out / "index.json").exists():
            finished = _finished(out, decided, settings)
            if not settings.part:
                _discard(out / ".work")
            return replace(finished, remarks=tuple(remarks))
        if settings.part:
            cut.all_units(units, settings, out / ".work", progress)
            return None
        work = _work(out, _note(decided, times))
        failed = cut.all_units(units, settings, work, progress)
        with folder.storage(out):
            summary = _publish(len(units), failed, settings, decided, units, progress)
        _discard(work)
    return replace(summary, remarks=tuple(remarks))


def _refuse_strangers(out: Path) -> None:
    """A folder that was somebody else's before is not written to: tars and pages of the same names would go."""
    ours = (out / ".lock").exists() or (out / "index.json").exists()
    if out.is_dir() and not ours and (there := sorted(path.name for path in out.iterdir())):
        raise SettingsChanged(f"out={out} holds {there[0]!r} and is no shard folder; choose a new or an empty "
                              "folder")


def _decided(settings: Settings, units: list[list[sources.Source]]) -> tuple[dict[str, Any], str]:
    """All that decides the bytes: the settings, and the names and sizes of the files they will be applied to.

    And a digest of the times at which those were written, for a shared disk should be asked of each file only once.
    """
    decided = json.loads(json.dumps(settings.deciding(), default=str))
    listing, times, files = hashlib.sha256(), hashlib.sha256(), 0
    for unit in units:
        for source in unit:
            there = source.path.stat()
            times.update(there.st_mtime_ns.to_bytes(8, "big", signed=True))
            known = [source.filename, there.st_size, source.name, source.slide, source.patient,
                     source.site, source.split, source.label, source.mpp, source.rows]
            listing.update(json.dumps([*known, *_beside(source, settings)]).encode(errors="surrogateescape"))
            files += 1
    others = [index.read(other).fingerprint for other in settings.against]
    decided |= {"files": files, "listing": listing.hexdigest(), "against_fingerprints": others}
    return decided, times.hexdigest()


def _beside(source: sources.Source, settings: Settings) -> list[Any]:
    """Of files that a source is read together with: digests of small ones, names and sizes of large ones."""
    if settings.kind == "arrays":       # every piece would say the same
        return [] if source.rows[0] else [_digest(path) for path in arrays.neighbours(source.path)]
    if settings.labels == "annotations" or settings.inside:
        with contextlib.suppress(ShardError):
            return [_digest(annotation.find(source.path, settings.annotations))]
    if source.file.lower().endswith((".mrxs", ".vms", ".vmu")):
        folder = source.path.with_suffix("") if source.file.lower().endswith(".mrxs") else source.path.parent
        return [[path.name, path.stat().st_size] for path in sorted(folder.glob("*")) if path.is_file()]
    return []


def _digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _note(decided: dict[str, Any], times: str) -> str:
    """What half-done work must agree with: all that decides the bytes, the times of its files, and what decodes them.

    Times stand in no finished folder, for the same files may be copied; but half a job must not see a file change.
    """
    versions = {name: importlib.metadata.version(name) for name in ("openslide-bin", "pillow", "simplejpeg")}
    return json.dumps({**decided, "files' times": times, "versions": versions}, sort_keys=True)


def _change(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first thing that is not as it was, in words; "" where all is."""
    for name in now:
        if before.get(name) != now[name]:
            return {"files": "the files of the source changed", "listing": "the files of the source changed",
                    "files' times": "files of the source were written again",
                    "against_fingerprints": "a folder that against= names changed"}.get(
                        name, f"{name} was {before.get(name)!r}, now {now[name]!r}")
    return ""


def _finished(out: Path, decided: dict[str, Any], settings: Settings) -> Summary:
    found = index.read(out)
    if what := _change(found.settings, decided):
        raise SettingsChanged(f"out={out} holds shards written from something else ({what}); choose another out, or "
                              "delete that folder first")
    failed = found.datasets[0].get("rejected", {}).get("failed", 0)
    if failed > settings.max_failed:
        raise ShardError(f"{out} is complete but for {failed} that failed (rejected.jsonl names them), and max_failed "
                         f"is {settings.max_failed} now; allow for them, or delete {out}/index.json to cut all anew")
    sizes: dict[str, int | None] = {tar.name: tar.bytes for tar in found.tars}
    for name, size in (sizes | {Path(name).with_suffix(".idx").name: None for name in sizes}
                       | dict.fromkeys(found.files)).items():
        if not (out / name).is_file() or size not in (None, (out / name).stat().st_size):
            raise ShardError(f"{out} was complete, but {name} is missing or cut short now; restore it, or delete "
                             "index.json and call again")
    return Summary(out, found.samples, len(found.tars), found.datasets[0].get("rejected", {}), untouched=True)


def _prepare_part(out: Path, note: str) -> None:
    """The folder of half-done work for one part of many: set up by the first, and agreed to by the others."""
    if (out / "index.json").exists() or _noted(out / ".work") == note:
        return
    try:
        with folder.hold(out, ".lock"):
            _work(out, note)
    except FolderInUse as error:
        raise SettingsChanged(f"{error}, with other settings or another source than this part has; give all parts the "
                              "same") from None


def _noted(work: Path) -> str | None:
    return (work / "settings.json").read_text() if (work / "settings.json").exists() else None


def _work(out: Path, note: str) -> Path:
    """The folder of half-done work. What other settings cut there may be days of it: it is not thrown away unasked."""
    work = out / ".work"
    old = _noted(work)
    if old != note:
        if old is not None:
            if units := sum(path.stat().st_size > 0 for path in work.glob("unit-*.tiles")):
                raise SettingsChanged(f"{work} holds {units} finished pieces of a job that was told something else "
                                      f"({_change(json.loads(old), json.loads(note))}); delete {work} to begin anew, "
                                      "or choose another out")
            _remove_tars(out, json.loads(old)["dataset"])
        _discard(work)
    folder.make(work)
    # Drafts of a process that was killed: we hold the lock, so nobody writes them.
    for draft in (*work.glob("*.draft"), *work.glob(".*.tmp"), *out.glob(".*.tmp"), *out.glob("overlays/.*.tmp")):
        draft.unlink()
    folder.write(work / "settings.json", note)
    return work


def _discard(work: Path) -> None:
    """Removes half-done work, its note first: what a kill leaves of the rest is then nobody's, and goes next time."""
    if work.exists():
        (work / "settings.json").unlink(missing_ok=True)
        shutil.rmtree(work.resolve())
        if work.is_symlink():       # to a scratch disk
            work.unlink()


# --- the second phase


class Words(NamedTuple):
    """The words of all kept tiles, sorted: what a sample table codes."""

    slide: list[str]
    patient: list[str]
    split: list[str]
    encoding: list[str]
    label: list[str]
    site: list[str]


def _publish(count: int, failed: list[Rejected], settings: Settings, decided: dict[str, Any],
             units: list[list[sources.Source]], progress: Progress) -> Summary:
    out, work = settings.out, settings.out / ".work"
    done = [number for number in range(count) if spool.done(work, number)]
    opened = {number: spool.Unit(work, number) for number in done}
    rejected: dict[str, int] = {}
    for unit in opened.values():
        _add(rejected, unit.rejected)
    _add(rejected, {"failed": len(failed)} if failed else {})
    keep, gone, lines = copies.kept(opened, settings)
    _add(rejected, gone)
    samples = sum(int(kept.sum()) for kept in keep.values())
    if not samples:
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(rejected.items())) or "there is none"
        raise ShardError(f"not one tile of {settings.source} was accepted: {why}; look at {work}/*.png and at the "
                         "limits in the config (min_tissue, min_focus, ...)"
                         + (f"; the last that failed: {failed[-1].detail}" if failed else ""))
    words = _words(opened, keep)
    index.hold_words(words._asdict())
    tars = max(1, round(samples / settings.tar_samples))
    bounds = np.linspace(0, samples, tars + 1).round().astype(int)
    _room(out, sum(unit.bytes for unit in opened.values()), samples, settings.dataset)
    columns = index.Columns(work / "columns", samples)
    listed = _tars(opened, keep, words, bounds.tolist(), settings, columns, progress)
    columns.write(out, words._asdict() | {name: [getattr(settings, name)] for name in ("dataset", "stain", "organ")})
    written = {name: _joined(out / name, [spool.path(work, number, name.partition(".")[0]) for number in done], last)
               for name, last in (("rejected.jsonl", spool.lines(failed) + lines), ("slides.jsonl", ""))}
    _pictures(units, settings, done)
    card = {"name": settings.dataset, "organ": settings.organ, "stain": settings.stain, "licence": settings.licence,
            "about": settings.about, "classes": words.label, "samples": samples, "slides": len(words.slide),
            "patients": len(set(words.patient) - {""}), "sites": len(set(words.site) - {""}), "rejected": rejected}
    _remove_tars(out, settings.dataset, keep=[each.name for each in listed])
    found = index.Index([card], decided, "", listed, written)
    index.write(out, replace(found, fingerprint=index.fingerprint(out, found)))
    return Summary(out, samples, tars, rejected, untouched=False)


def _add(counts: dict[str, int], more: dict[str, int]) -> None:
    for reason, count in more.items():
        counts[reason] = counts.get(reason, 0) + count


def _words(opened: dict[int, spool.Unit], keep: dict[int, np.ndarray]) -> Words:
    found: dict[str, set[str]] = {name: set() for name in Words._fields}
    for number, unit in opened.items():
        rows = {name: np.flatnonzero(np.bincount(unit.rows[name][keep[number]])).tolist()
                for name in ("who", "label", "encoding")}
        for who in map(unit.whos().__getitem__, rows["who"]):
            for name, word in zip(("slide", "patient", "site", "split"), who[:4], strict=True):
                found[name].add(word)
        found["label"].update(map(unit.labels.__getitem__, rows["label"]))
        found["encoding"].update(map(unit.encodings.__getitem__, rows["encoding"]))
    found["label"].discard("")
    return Words(**{name: sorted(words) for name, words in found.items()})


class Codes(NamedTuple):
    """What a unit's own numbers mean among the words of all units."""

    who: np.ndarray         # (whos, 3): slide, patient, split
    label: np.ndarray
    encoding: np.ndarray


def _codes(opened: dict[int, spool.Unit], words: Words) -> dict[int, Codes]:
    at = {name: {word: number for number, word in enumerate(known)} for name, known in words._asdict().items()}
    none = index.NO_LABEL       # also of words that only copies had, which were left out
    return {number: Codes(
        np.array([(at["slide"].get(slide, none), at["patient"].get(patient, none), at["split"].get(split, none))
                  for slide, patient, _, split, _ in unit.whos()], np.int32).reshape(-1, 3),
        np.array([at["label"].get(label, none) for label in unit.labels], np.int32),
        np.array([at["encoding"].get(encoding, none) for encoding in unit.encodings], np.int32),
    ) for number, unit in opened.items()}


def _room(out: Path, images: int, samples: int, dataset: str) -> None:
    """Refuses before the first tar where the disk cannot hold all of them."""
    needed = images + samples * 4 * tarfile.BLOCKSIZE + (64 << 20)      # two headers, JSON, padding; tables
    there = sum(path.stat().st_size for path in out.glob(f"{dataset}-*.tar"))
    if (free := shutil.disk_usage(out).free) < needed - there:
        raise StorageError(errno.ENOSPC, f"{out}: the disk is full: the tars take about {(needed - there) / 2**30:.1f} "
                                         f"GiB more, {free / 2**30:.1f} GiB are free. What is cut is kept: free some "
                                         "space and call again")


def _tars(opened: dict[int, spool.Unit], keep: dict[int, np.ndarray], words: Words, bounds: list[int],
          settings: Settings, columns: index.Columns, progress: Progress) -> list[index.Tar]:
    """All tars, in processes, a few at a time; their rows go into the columns of the sample table."""
    out, total = settings.out, len(bounds) - 1
    codes = _codes(opened, words)
    listed: list[index.Tar] = []
    progress("writing tars", 0, total)
    workers = min(cut.cores(settings), total)
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=cut.processes(), initializer=cut.end_with_parent)
    with pool:
        waiting: list[tuple[np.ndarray, concurrent.futures.Future]] = []
        try:
            chunks = _chunks(opened, keep, codes, bounds)
            for number in range(total + 2 * workers):       # so many wait for us at most
                if number < total:
                    rows, path = next(chunks), out / f"{settings.dataset}-{number:06d}.tar"
                    waiting.append((rows, pool.submit(tar.write, path, out / ".work", rows)))
                if number >= 2 * workers and waiting:
                    rows, job = waiting.pop(0)
                    one, offsets = job.result()
                    columns.add(_table(rows, offsets, len(listed), codes))
                    listed.append(one)
                    progress("writing tars", len(listed), total)
        except concurrent.futures.process.BrokenProcessPool:
            raise ShardError("a process died while it wrote a tar (out of memory, or killed); call again to go on"
                             ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return listed


def _chunks(opened: dict[int, spool.Unit], keep: dict[int, np.ndarray], codes: dict[int, Codes],
            bounds: list[int]) -> Iterator[np.ndarray]:
    """The rows of each tar, in order: range by range of the places, so that memory holds a few tars of them."""
    total = sum(len(unit.rows) for unit in opened.values())
    parts = -(-total // spool.ROWS_AT_ONCE) or 1
    edges = [part * 2**64 // parts for part in range(parts + 1)]
    left, tar, last = np.empty(0, spool.PLACED), 0, np.empty(0, spool.PLACED)
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        chosen = {}
        for number, unit in opened.items():
            between = unit.between(low, high)
            chosen[number] = between[keep[number][between]]
        rows, _ = spool.placed(chosen, opened)
        ends = np.cumsum([0, *map(len, chosen.values())])
        for number, first, end in zip(chosen, ends[:-1], ends[1:], strict=True):     # classes of all, not of a unit
            rows["label"][first:end] = codes[number].label[rows["label"][first:end]]
        rows = rows[np.argsort(rows["order"], kind="stable")]
        _refuse_twins(np.concatenate([last, rows]))
        left, last = np.concatenate([left, rows]), rows[-1:]
        while tar + 1 < len(bounds) and len(left) >= bounds[tar + 1] - bounds[tar]:
            yield left[:bounds[tar + 1] - bounds[tar]]
            left, tar = left[bounds[tar + 1] - bounds[tar]:], tar + 1


def _refuse_twins(rows: np.ndarray) -> None:
    """Equal keys have equal places, so they are neighbours."""
    twins = rows["key"][1:][rows["key"][1:] == rows["key"][:-1]].tolist()
    if twins:
        raise ShardError(f"{len(twins)} tiles share their key with another, first {twins[0].decode()!r}: two files of "
                         "the source have the same name; rename one, or shard the folders apart")


def _table(rows: np.ndarray, offsets: np.ndarray, tar: int, codes: dict[int, Codes]) -> dict[str, np.ndarray]:
    """Rows of the spool as rows of the sample table."""
    units, one = rows["unit"].tolist(), np.zeros(len(rows), np.int8)
    who = np.array([codes[unit].who[number] for unit, number in zip(units, rows["who"].tolist(), strict=True)])
    return {
        **{name: rows[name] for name in ("key", "size", "crc32", "x", "y", "mpp", "label", "digest")},
        "tar": np.full(len(rows), tar), "offset": offsets, "dataset": one, "stain": one, "organ": one,
        "slide": who[:, 0], "patient": who[:, 1], "split": who[:, 2],
        "encoding": np.array([codes[unit].encoding[number]
                              for unit, number in zip(units, rows["encoding"].tolist(), strict=True)]),
    }


# --- what lies beside the tars


def _joined(path: Path, pieces: list[Path], last: str) -> str:
    """One file from many, however long; returns its SHA-256."""
    draft, digest = path.with_name(f".{path.name}.tmp"), hashlib.sha256()
    with draft.open("wb") as out:
        for piece in pieces:
            content = piece.read_bytes()
            out.write(content)
            digest.update(content)
        out.write(last.encode())
        digest.update(last.encode())
        out.flush()
        os.fsync(out.fileno())
    folder.publish(draft, path)
    return digest.hexdigest()


def _pictures(units: list[list[sources.Source]], settings: Settings, done: list[int]) -> None:
    if settings.kind not in CUT:
        return
    overlays = folder.make(settings.out / "overlays")
    for number in done:
        picture = spool.path(settings.out / ".work", number, "png")
        if picture.exists():
            # Linked and not moved: a call that comes after a kill finds it again.
            draft = overlays / f".{number}.tmp"
            draft.unlink(missing_ok=True)
            try:
                os.link(picture, draft)
            except OSError:         # a file system without links
                shutil.copyfile(picture, draft)
            draft.replace(overlays / cut.overlay_name(units[number][0], settings))
    folder.sync(overlays)


def _remove_tars(out: Path, dataset: str, keep: list[str] | tuple[str, ...] = ()) -> None:
    """What a killed job with other settings left: whoever reads *.tar would take its tiles for those of this job."""
    for path in out.iterdir():
        match = re.fullmatch(rf"\.?({re.escape(dataset)}-\d{{6}}\.)(tar|idx|tar\.tmp)", path.name)
        if match and match[1] + "tar" not in keep:
            path.unlink()
