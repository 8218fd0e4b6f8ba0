"""Tars of draws (draws.py), written one by one and published together."""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from shards import draws, folder, index, sources, tar


@dataclass(frozen=True)
class Slide:
    """What is known of a slide, of which all draws are stored."""

    name: str
    patient: str
    split: str
    mpp: float

    def key(self, number: int) -> str:
        """The name of one draw."""
        return sources.key(self.name, f"d{number:04d}")


def write_tar(path: Path, note: Path, words: dict[str, str], slides: Iterable[tuple[Slide, list[bytes]]],
              more: Callable[[], dict[str, Any]] = dict) -> None:
    """One tar of all draws of some slides, whole or absent; and in `note` what the sample table is to say of it, and
    what there is `more` to say once it is written.

    `words`: dataset, organ and stain.
    """
    rows: list[dict[str, Any]] = []

    def members() -> Iterator[tuple[str, bytes, bytes]]:
        for slide, contents in slides:
            for number, content in enumerate(contents):
                shape = list(draws.unpacked(content).features_TD.shape)
                digest = hashlib.blake2b(content, digest_size=16).hexdigest()
                about = {**words, "slide": slide.name, "patient": slide.patient, "split": slide.split,
                         "encoding": draws.KIND, "x": 0, "y": 0, "digest": digest}
                rows.append({**about, "key": slide.key(number), "size": len(content), "crc32": zlib.crc32(content),
                             "mpp": slide.mpp, "label": index.NO_LABEL})
                told = {**about, "mpp": slide.mpp if math.isfinite(slide.mpp) else None, "size": shape, "label": None,
                        "class": None}
                yield slide.key(number), content, json.dumps(told, ensure_ascii=False).encode()

    with folder.storage(path):
        draft = path.with_name(f".{path.name}.tmp")
        with draft.open("wb") as out:
            digest, listed = tar.store(out, draws.KIND, members())
            out.flush()
            os.fsync(out.fileno())
            size = out.tell()
        folder.publish(draft, path)
        folder.write(path.with_suffix(".idx"), index.idx(listed))
    for row, sample in zip(rows, listed, strict=True):
        row["offset"] = sample[0][1]
    folder.write_json(note, {"tar": asdict(index.Tar(path.name, len(rows), size, digest)), "rows": rows, **more()})


def noted(path: Path, note: Path) -> dict[str, Any] | None:
    """What an earlier call noted of a tar, if the tar is still there."""
    try:
        known = json.loads(note.read_text())
        sound = path.stat().st_size == known["tar"]["bytes"] and path.with_suffix(".idx").is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return known if sound else None


def publish(out: Path, card: dict[str, Any], decided: dict[str, Any], notes: list[dict[str, Any]],
            files: dict[str, str]) -> index.Index:
    """The sample table and index.json of tars that are all written."""
    rows = [{**row, "tar": number} for number, note in enumerate(notes) for row in note["rows"]]
    columns = {name: [row[name] for row in rows] for name in index.SCHEMA.names if name != "digest"}
    index.write_samples(out, {**columns, "digest": [bytes.fromhex(row["digest"]) for row in rows]})
    found = index.Index([card], decided, "", [index.Tar(**note["tar"]) for note in notes], files)
    found = replace(found, fingerprint=index.fingerprint(out, found))
    index.write(out, found)
    return found
