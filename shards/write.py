"""Tiles of many slides, shuffled across all of them, in equal tars: the same input gives the same bytes.

Two phases. First every slide (or every few hundred image files) is cut by a worker into a spool below `.work/`; a spool
is whole or absent, so a job that is called again goes on with the slides that are missing. Then all tiles are put in
the order of a keyed hash of what they are, cut into equal tars, and published: `index.json` comes last.
"""

import concurrent.futures
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shards import folder, index, show, tiles
from shards.index import ShardError
from shards.slide import SlideError

Progress = Callable[[str, int, int], None]      # what is being done, how many are done, of how many

FILES_A_UNIT = 500      # image files that one worker takes at a time: a second or so of work

GROUPS = {"slide", "patient", "split", "label", "mpp"}      # what names= may tell of a file

ROW = pa.schema([
    ("order", pa.uint64()), ("key", pa.string()), ("start", pa.int64()), ("size", pa.int32()), ("crc32", pa.uint32()),
    ("slide", pa.string()), ("patient", pa.string()), ("split", pa.string()), ("x", pa.int32()), ("y", pa.int32()),
    ("mpp", pa.float32()), ("width", pa.int32()), ("height", pa.int32()), ("label", pa.string()),
    ("encoding", pa.string()), ("digest", pa.binary(16)), ("unit", pa.int32()), ("file", pa.string()),
])


class SettingsChanged(ValueError):
    """The folder holds shards written with other settings."""

    exit_code = 2


@dataclass
class Settings:
    """What a shard job is told; everything but `out`, `workers` and `max_failed` decides the bytes."""

    source: Path = field(metadata={"help": "folder of slides or of tile images", "exists": True})
    out: Path = field(metadata={"help": "shard folder to write"})
    dataset: str = field(metadata={"help": "name of the dataset", "pattern": "[a-z0-9_-]{1,40}"})
    kind: str = field(default="slides", metadata={"choices": ("slides", "tiles"), "help": "what the source holds"})
    size: int = field(default=256, metadata={"range": (16, 4096), "help": "tile width, pixels (slides)"})
    mpp: float | None = field(default=None, metadata={"range": (0.05, 100), "help": "microns per pixel of a tile"})
    slide_mpp: float | None = field(default=None, metadata={"range": (0.05, 5), "help": "of slides that do not say it"})
    min_tissue: float = field(default=0.5, metadata={"range": (0, 1), "help": "tissue fraction a tile must have"})
    labels: str = field(default="names", metadata={"choices": ("names", "annotations"),
                                                   "help": "from names= and slides.csv, or from <slide>.geojson"})
    min_label: float = field(default=0.75, metadata={"range": (0, 1), "help": "fraction a class must cover"})
    names: str = field(default="", metadata={"regex": True, "help": "groups slide, patient, split, label of the path"})
    organ: str = field(default="unknown", metadata={"help": "organ, for the dataset card"})
    stain: str = field(default="H&E", metadata={"help": "stain, for the dataset card"})
    licence: str = field(default="unknown", metadata={"help": "licence, for the dataset card"})
    about: str = field(default="", metadata={"help": "one line on where the data comes from"})
    quality: int = field(default=90, metadata={"range": (50, 100), "help": "JPEG quality of tiles we encode"})
    subsampling: str = field(default="4:4:4", metadata={"choices": ("4:4:4", "4:2:0"), "help": "of the colour"})
    tar_samples: int = field(default=5000, metadata={"range": (1, 100_000), "help": "about this many tiles a tar"})
    seed: int = field(default=0, metadata={"range": (0, 2**63 - 1), "help": "of the shuffle"})
    workers: int = field(default=0, metadata={"range": (0, 1024), "help": "processes; 0: one a core"})
    max_failed: int = field(default=0, metadata={"range": (0, 10**9), "help": "slides that may fail before we stop"})

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        if self.kind == "slides" and self.mpp is None:
            return ["mpp is not set: slides are cut at a resolution you name, in microns per pixel (0.5 is 20x)"]
        if self.kind == "tiles" and self.labels == "annotations":
            return ["labels='annotations' belongs to slides; image files are labelled by names= or slides.csv"]
        out, source = Path(self.out).resolve(), Path(self.source).resolve()
        if out == source or source in out.parents:
            return [f"out={self.out} lies inside source={self.source}: the next call would take our pictures for "
                    "tiles; choose an out elsewhere"]
        groups = re.compile(self.names).groupindex.keys() - GROUPS
        return [f"names= has a group {group!r}, which is not one of {', '.join(sorted(GROUPS))}" for group in groups]


@dataclass(frozen=True)
class Summary:
    """What a job left behind."""

    out: Path
    samples: int
    tars: int
    rejected: dict[str, int]        # reason -> count
    untouched: bool                 # the folder was complete before


def write(settings: Settings, progress: Progress = lambda what, done, total: None) -> Summary:
    """The whole job: from a folder of slides or images to a published shard folder."""
    out = Path(settings.out)
    suffixes = tiles.SLIDES if settings.kind == "slides" else tiles.IMAGES
    units = _units(tiles.sources(Path(settings.source), suffixes, settings.names), settings)
    decided = _decided(settings, units)
    with folder.hold(out, ".lock"):
        if (out / "index.json").exists():
            finished = _finished(out, decided)
            _discard(out / ".work")
            return finished
        work = _work(out, decided)
        _cut_all(units, settings, work, progress)
        with folder.storage(out):
            summary = _publish(units, settings, decided, work, out, progress)
        _discard(work)
    return summary


def _units(sources: list[tiles.Source], settings: Settings) -> list[list[tiles.Source]]:
    step = 1 if settings.kind == "slides" else FILES_A_UNIT
    return [sources[first:first + step] for first in range(0, len(sources), step)]


def _decided(settings: Settings, units: list[list[tiles.Source]]) -> dict[str, Any]:
    """All that decides the bytes: the settings, and the names and sizes of the files they will be applied to."""
    decided = {name: value for name, value in asdict(settings).items() if name not in ("out", "workers", "max_failed")}
    decided["source"] = Path(settings.source).name
    listing = hashlib.sha256()
    for unit in units:
        for source in unit:
            known = {**asdict(source), "path": source.path.name, "bytes": source.path.stat().st_size}
            drawn = source.path.with_suffix(".geojson")
            if settings.labels == "annotations" and drawn.is_file():    # small, and renaming a class keeps its size
                known["annotation"] = hashlib.sha256(drawn.read_bytes()).hexdigest()
            listing.update(json.dumps(known, sort_keys=True).encode(errors="surrogateescape"))
    return {**decided, "files": sum(map(len, units)), "listing": listing.hexdigest()}


def _finished(out: Path, decided: dict[str, Any]) -> Summary:
    found = index.read(out)
    if changed := [name for name in decided if found.settings.get(name) != decided[name]]:
        name = changed[0]
        what = ("the files of the source changed" if name in ("files", "listing") else
                f"{name} was {found.settings.get(name)!r}, now {decided[name]!r}")
        raise SettingsChanged(f"out={out} holds shards written from something else ({what}); choose another out, or "
                              "delete that folder first")
    for name, size in [(tar.name, tar.bytes) for tar in found.tars] + [
            (Path(tar.name).with_suffix(".idx").name, None) for tar in found.tars] + [("rejected.jsonl", None)]:
        if not (out / name).is_file() or size not in (None, (out / name).stat().st_size):
            raise ShardError(f"{out} was complete, but {name} is missing or cut short now; restore it, or delete "
                             "index.json and call again")
    return Summary(out, found.samples, len(found.tars), _reasons(out / "rejected.jsonl"), untouched=True)


def _work(out: Path, decided: dict[str, Any]) -> Path:
    """The folder of half-done work; what other settings left there is of no use and goes."""
    work, note = out / ".work", json.dumps(decided, sort_keys=True)
    old = (work / "settings.json").read_text() if (work / "settings.json").exists() else None
    if old != note:
        if old is not None:
            _remove_tars(out, json.loads(old)["dataset"])
        _discard(work)
    folder.make(work)
    for draft in work.glob("*.draft"):      # of a worker that was killed: we hold the lock, so nobody writes it
        draft.unlink()
    folder.write(work / "settings.json", note)
    return work


def _discard(work: Path) -> None:
    """Removes half-done work, its note first: what a kill leaves of the rest is then nobody's, and goes next time."""
    if work.exists():
        (work / "settings.json").unlink(missing_ok=True)
        shutil.rmtree(work)


def _cut_all(units: list[list[tiles.Source]], settings: Settings, work: Path, progress: Progress) -> None:
    missing = [number for number in range(len(units)) if not _spool(work, number, ".arrow").exists()]
    failed: list[str] = []
    workers = min(settings.workers or len(os.sched_getaffinity(0)), max(len(missing), 1))
    what = "cutting slides" if settings.kind == "slides" else "reading images"
    progress(what, len(units) - len(missing), len(units))
    # spawn: a forked copy of a process with threads may find a lock held by a thread that was not copied.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            jobs = [pool.submit(_cut, units[number], number, settings, work) for number in missing]
            for count, job in enumerate(concurrent.futures.as_completed(jobs), start=len(units) - len(missing) + 1):
                if (reason := job.result()) is not None:
                    failed.append(reason)
                    if len(failed) > settings.max_failed:
                        raise ShardError(f"{failed[-1]} [{len(failed)} failed, max_failed={settings.max_failed}]")
                progress(what, count, len(units))
        except concurrent.futures.process.BrokenProcessPool:
            raise ShardError("a worker died while cutting (out of memory, or a slide that crashes its reader); "
                             "call again to go on, with workers=1 to find the slide") from None
        finally:        # whatever ended the job, the thousand slides still waiting are not cut first
            pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """In a worker: ends it with its job, for it would wait for work for ever, and write beside the next job."""
    def watch() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is for the job, which ends its workers itself
    threading.Thread(target=watch, daemon=True).start()


def _spool(work: Path, number: int, suffix: str) -> Path:
    return work / f"unit-{number:06d}{suffix}"


def _cut(unit: list[tiles.Source], number: int, settings: Settings, work: Path) -> str | None:
    """One unit of work, in its own process: spools its tiles; returns why the slide failed, or None."""
    encode = tiles.Jpeg(settings.quality, settings.subsampling)
    rows: dict[str, list[Any]] = {name: [] for name in ROW.names}
    rejected: list[tiles.Rejected] = []
    failure = None
    image, spool = _spool(work, number, f".{os.getpid()}.draft"), _spool(work, number, ".tiles")
    with folder.storage(image), image.open("wb") as handle:
        try:
            for item in _items(unit, settings, encode):
                if isinstance(item, tiles.Rejected):
                    rejected.append(item)
                    continue
                for name, value in _row(item, handle.tell(), number, settings).items():
                    rows[name].append(value)
                handle.write(item.image)
        except SlideError as error:     # this slide's fault; anything else concerns the job and ends it
            failure = str(error)
            # What was cut before the failure goes too: half a slide would pass for a small one.
            rows, rejected = {name: [] for name in ROW.names}, [tiles.Rejected(
                unit[0], failure.replace(str(unit[0].path), unit[0].path.name))]
    if settings.kind == "slides" and failure is None:
        kept = list(zip(rows["x"], rows["y"], strict=True))
        show.overlay(unit[0].path, (unit[0].mpp, settings.slide_mpp), kept,
                     [(item.x, item.y, item.reason) for item in rejected if item.x is not None and item.y is not None],
                     settings.size, settings.mpp or 1.0, _spool(work, number, ".png"))
    folder.publish(image, spool)
    folder.write(_spool(work, number, ".jsonl"), _lines(rejected))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, ROW) as writer:
        writer.write_table(pa.table(rows, schema=ROW))
    if failure is None:             # a failed slide is tried again by the next call
        folder.write(_spool(work, number, ".arrow"), sink.getvalue().to_pybytes())
    return failure


def _items(unit: list[tiles.Source], settings: Settings, encode: tiles.Jpeg) -> Iterable[tiles.Tile | tiles.Rejected]:
    if settings.kind == "tiles":
        mpp = float("nan") if settings.mpp is None else settings.mpp
        return (tiles.of_file(source, mpp=mpp, encode=encode) for source in unit)
    if settings.mpp is None:
        raise ShardError("mpp is not set; slides are cut at a resolution you name")
    return tiles.of_slide(unit[0], size=settings.size, mpp=settings.mpp, min_tissue=settings.min_tissue,
                          annotated=settings.labels == "annotations", min_label=settings.min_label, encode=encode,
                          slide_mpp=settings.slide_mpp)


def _row(tile: tiles.Tile, start: int, unit: int, settings: Settings) -> dict[str, Any]:
    # The order of the tars: a keyed hash of what a tile is, so tiles of one slide lie as far apart as chance puts them.
    identity = (settings.seed, settings.dataset, tile.source.slide, tile.key, tile.x, tile.y, tile.mpp)
    text = "|".join(map(str, identity)).encode(errors="surrogateescape")
    order = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())
    return {"order": order, "key": tile.key, "start": start, "size": len(tile.image), "crc32": zlib.crc32(tile.image),
            "slide": tile.source.slide, "patient": tile.source.patient, "split": tile.source.split, "x": tile.x,
            "y": tile.y, "mpp": tile.mpp, "width": tile.size[0], "height": tile.size[1], "label": tile.label,
            "encoding": tile.encoding, "digest": tile.digest, "unit": unit, "file": tile.source.path.name}


def _lines(rejected: list[tiles.Rejected]) -> str:
    return "".join(json.dumps({"slide": item.source.slide, "file": item.source.path.name, "x": item.x, "y": item.y,
                               "reason": item.reason}) + "\n" for item in rejected)


def _publish(units: list[list[tiles.Source]], settings: Settings, decided: dict[str, Any], work: Path, out: Path,
             progress: Progress) -> Summary:
    done = [number for number in range(len(units)) if _spool(work, number, ".arrow").exists()]
    table = pa.concat_tables([ROW.empty_table(), *(
        pa.ipc.open_file(pa.memory_map(str(_spool(work, number, ".arrow")))).read_all() for number in done)])
    table = table.take(pa.array(np.argsort(table["order"].to_numpy(), kind="stable")))
    table, duplicates = _without_duplicates(table)
    if not table.num_rows:
        raise ShardError(f"not one tile of {settings.source} was accepted; the reasons: "
                         f"{_count(work.glob('*.jsonl'))}; look at {work}/*.png and at min_tissue")
    twice = table["key"].value_counts().to_pylist()
    if repeated := [pair["values"] for pair in twice if pair["counts"] > 1]:
        raise ShardError(f"{len(repeated)} tiles share their key with another, first {repeated[0]!r}: two files of the "
                         "source have the same name; rename one, or shard the folders apart")

    classes = sorted(set(table["label"].to_pylist()) - {""})
    tars = max(1, round(table.num_rows / settings.tar_samples))
    bounds = np.linspace(0, table.num_rows, tars + 1).round().astype(int)
    written: list[tuple[index.Tar, list[int]]] = []
    progress("writing tars", 0, tars)
    with concurrent.futures.ThreadPoolExecutor(settings.workers or len(os.sched_getaffinity(0))) as pool:
        jobs = [pool.submit(_tar, out / f"{settings.dataset}-{number:06d}.tar", table.slice(first, last - first),
                            classes, settings, work)
                for number, (first, last) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))]
        for count, job in enumerate(jobs, start=1):
            written.append(job.result())
            progress("writing tars", count, tars)

    number = {name: position for position, name in enumerate(classes)}
    index.write_samples(out, {
        **{name: table[name].combine_chunks() for name in
           ("key", "size", "crc32", "slide", "patient", "x", "y", "mpp", "split", "encoding", "digest")},
        "tar": np.repeat(np.arange(tars, dtype=np.int32), np.diff(bounds)),
        "offset": np.concatenate([np.array(offsets, dtype=np.int64) for _, offsets in written]),
        "label": np.array([number.get(label, index.NO_LABEL) for label in table["label"].to_pylist()], dtype=np.int32),
        **{name: [getattr(settings, name)] * table.num_rows for name in ("dataset", "stain", "organ")},
    })
    folder.write(out / "rejected.jsonl", "".join(_spool(work, number, ".jsonl").read_text()
                                                 for number in range(len(units))) + duplicates)
    _pictures(units, work, out)
    card = {"name": settings.dataset, "organ": settings.organ, "stain": settings.stain, "licence": settings.licence,
            "about": settings.about, "classes": classes, "samples": table.num_rows,
            "slides": len(table["slide"].unique()), "patients": len(table["patient"].unique())}
    listed = [tar for tar, _ in written]
    _remove_tars(out, settings.dataset, keep=[tar.name for tar in listed])
    found = index.Index([card], decided, "", listed)
    index.write(out, replace(found, fingerprint=index.fingerprint(out, found)))
    return Summary(out, table.num_rows, tars, _reasons(out / "rejected.jsonl"), untouched=False)


def _remove_tars(out: Path, dataset: str, keep: Iterable[str] = ()) -> None:
    """What a killed job with other settings left: whoever reads *.tar would take its tiles for those of this job."""
    for path in out.iterdir():
        match = re.fullmatch(rf"\.?({re.escape(dataset)}-\d{{6}}\.)(tar|idx|tar\.tmp)", path.name)
        if match and match[1] + "tar" not in keep:
            path.unlink()


def _without_duplicates(table: pa.Table) -> tuple[pa.Table, str]:
    """The table with the first of every set of equal tiles, and a line for each that went."""
    digests = np.frombuffer(b"".join(table["digest"].to_pylist()), dtype="V16")
    first = np.sort(np.unique(digests, return_index=True)[1])
    gone = table.take(pa.array(np.setdiff1d(np.arange(table.num_rows), first))).select(["slide", "file", "x", "y"])
    lines = "".join(json.dumps({**row, "reason": "duplicate"}) + "\n" for row in gone.to_pylist())
    return table.take(pa.array(first)), lines


def _tar(path: Path, rows: pa.Table, classes: list[str], settings: Settings, work: Path) -> tuple[index.Tar, list[int]]:
    """One tar and its idx, whole or absent; returns what index.json says of it and where its images start."""
    draft, digest, offsets, members = path.with_name(f".{path.name}.tmp"), hashlib.sha256(), [], []
    with draft.open("wb") as out:

        def put(data: bytes) -> None:
            out.write(data)
            digest.update(data)

        def member(name: str, data: bytes) -> int:
            header = tarfile.TarInfo(name)      # owner, group and time stay 0: same input, same bytes
            header.size, header.mode = len(data), 0o644
            put(header.tobuf(tarfile.USTAR_FORMAT))
            start = out.tell()
            put(data + bytes(-len(data) % tarfile.BLOCKSIZE))
            return start

        for row in rows.to_pylist():
            with _spool(work, row["unit"], ".tiles").open("rb") as spool:
                image = os.pread(spool.fileno(), row["size"], row["start"])
            if zlib.crc32(image) != row["crc32"]:
                raise ShardError(f"the spool of {row['slide']} changed on disk; delete {work} and shard again")
            about = json.dumps({
                "dataset": settings.dataset, "slide": row["slide"], "patient": row["patient"], "x": row["x"],
                "y": row["y"], "mpp": None if np.isnan(row["mpp"]) else round(row["mpp"], 6),
                "size": [row["width"], row["height"]], "label": row["label"] or None,
                "class": classes.index(row["label"]) if row["label"] else None, "split": row["split"],
                "stain": settings.stain, "organ": settings.organ, "encoding": row["encoding"],
            }, ensure_ascii=True).encode()
            name = row["key"]
            # JSON after the image: webdataset and DALI group neighbours of one name into one sample.
            start = member(f"{name}.jpg", image)
            members.append([("jpg", start, len(image), f"{name}.jpg"),
                            ("json", member(f"{name}.json", about), len(about), f"{name}.json")])
            offsets.append(start)
        put(bytes(2 * tarfile.BLOCKSIZE))       # the end of a tar
        out.flush()
        os.fsync(out.fileno())
        size = out.tell()
    folder.publish(draft, path)
    folder.write(path.with_suffix(".idx"), index.idx(members))
    return index.Tar(path.name, len(members), size, digest.hexdigest()), offsets


def _pictures(units: list[list[tiles.Source]], work: Path, out: Path) -> None:
    overlays = folder.make(out / "overlays")
    for number, unit in enumerate(units):
        picture = _spool(work, number, ".png")
        if picture.exists():
            folder.publish(picture, overlays / f"{tiles.key(unit[0].slide)}.png")


def _reasons(path: Path) -> dict[str, int]:
    return _count([path]) if path.exists() else {}


def _count(paths: Iterable[Path]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for path in paths:
        for line in io.StringIO(path.read_text()):
            reason = json.loads(line)["reason"]
            counts[reason] = counts.get(reason, 0) + 1
    return counts
