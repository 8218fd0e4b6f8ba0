"""The page of a shard folder: what it draws is what was counted, and no name from a disk becomes markup."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from shards import gallery, index, judge, show
from shards.sources import key

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = ["../../etc/passwd", "two\nlines", "<img src=x onerror=alert(1)>", '"><script>alert(1)</script>', "n" * 300,
           "' onload='x", "&lt;b&gt;", "腫瘍\u202e", "\x00\x1b[31m", "</td></table><h1>", "javascript:alert(1)"]
TAME = [f"name{number}" for number in range(len(HOSTILE))]


class Page(HTMLParser):
    """A page taken apart: its elements, its tables, its histograms."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.histograms: dict[str, list[dict[str, list[float]]]] = {}     # table -> rows -> measure -> heights
        self.text = ""
        self._rows: list[list[str]] = []
        self._open: list[str] = []
        self._measure = self._table = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self._open, "every element ends"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = {name: value or "" for name, value in attrs}
        self.elements.append((tag, said))
        if tag not in ("meta", "img", "br"):
            self._open.append(tag)
        if tag == "table":
            self._table = said["data-table"]
            self._rows = self.tables[self._table] = []
            self.histograms[self._table] = []
        elif tag == "tr":
            self._rows.append([])
            self.histograms[self._table].append({})
        elif tag in ("td", "th") and self._rows:
            self._rows[-1].append("")
        elif tag == "svg":
            self._measure = said.get("data-measure", "")
        elif tag == "path" and self._measure:
            steps = re.findall(r"V([\d.]+)H", said["d"])
            self.histograms[self._table][-1][self._measure] = [gallery.HEIGHT - float(step) for step in steps]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "table":
            self._rows = []

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += data
        if self._rows and self._rows[-1]:
            self._rows[-1][-1] += data

    def table(self, name: str) -> list[dict[str, str]]:
        """Rows of a table by the words over its columns."""
        head, *rows = self.tables[name]
        return [dict(zip(head, row, strict=True)) for row in rows]


def make(folder: Path, names: list[str], tiles: int = 12, lines: bool = True) -> Path:
    """A shard folder by hand, in which every word that a disk can tell is one of `names`."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    slides = names * tiles
    rows = {"key": [f"k{number}" for number in range(len(slides))], "tar": [0] * len(slides),
            "offset": [0] * len(slides), "size": [0] * len(slides), "crc32": [0] * len(slides), "dataset": names[:1],
            "slide": slides, "patient": slides, "x": [0] * len(slides), "y": [0] * len(slides),
            "mpp": [0.5] * len(slides), "label": [number % (len(names) + 1) - 1 for number in range(len(slides))],
            "split": [names[number % 2] for number in range(len(slides))], "stain": names[1:2], "organ": names[2:3],
            "encoding": [""], "digest": [bytes(16)] * len(slides)}
    index.write_samples(folder, {name: value * (len(slides) // len(value)) for name, value in rows.items()})
    card = {"name": names[0], "organ": names[2], "stain": names[1], "licence": names[3], "about": names[4],
            "classes": names, "samples": len(slides), "slides": len(names), "patients": len(names),
            "rejected": {"background": 9 * len(names), names[2]: 3 * len(names), "duplicate": 2}}
    settings = {"kind": "slides", "size": 256, "min_focus": 0.3, "dataset": names[0], "source": names[5],
                "names": names[6], "columns": {names[7]: names[8]}, names[9]: names[10]}
    index.write(folder, index.Index([card], settings, "f" * 64, [index.Tar("a-000000.tar", len(slides), 1234567, "")]))
    written = []
    for number, name in enumerate(names):
        accepted = tiles + 2 * (number == 0)                    # two were copies
        counts = {measure: np.bincount(rng.integers(0, 24, accepted), minlength=24).tolist()
                  for measure in gallery.MEASURES}
        written.append({"slide": name, "patient": name, "site": names[number % 3], "split": names[number % 2],
                        "file": name, "mpp": 0.25, "kept": accepted, "rejected": {"background": 9, names[2]: 3},
                        **counts})
    refused = [{"slide": name, "file": name, "x": x, "y": x, "mpp": None, "reason": reason, "detail": name}
               for name in names for x, reason in [*[(7, "background")] * 9, *[(7, names[2])] * 2, (None, names[2])]]
    if lines:
        (folder / "slides.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    (folder / "rejected.jsonl").write_text("".join(json.dumps(line) + "\n" for line in refused))
    for path in [*(folder / "overlays" / f"{key(name)}.png" for name in names[:-1]), folder / "sheets" / "classes.png"]:
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    return folder


def test_names_from_a_disk_are_text_and_nothing_else(tmp_path: Path) -> None:
    hostile, tame = (Page(gallery.write(make(tmp_path / place, names)))
                     for place, names in (("hostile", HOSTILE), ("tame", TAME)))

    # The same folder with harmless names has the same elements with the same attributes; a title is a clipped name's.
    def bones(page: Page) -> list[tuple[str, list[str]]]:
        return sorted((tag, sorted(said.keys() - {"title"})) for tag, said in page.elements)

    assert bones(hostile) == bones(tame)
    for name in HOSTILE:
        assert gallery.visible(gallery.clip(name, 34)) in hostile.text
    source = (tmp_path / "hostile" / "show.html").read_text(encoding="utf-8")
    for forbidden in ("<script", "<img src=x", "</td></table><h1>", "\u202e", "\x00", "\x1b", "two\nlines"):
        assert forbidden not in source


def test_every_picture_and_link_is_a_file_beside_the_page(tmp_path: Path) -> None:
    shard = make(tmp_path / "a", HOSTILE)
    page = Page(gallery.write(shard))
    pictures = [said["src"] for tag, said in page.elements if tag == "img"]
    assert len(pictures) == len(HOSTILE)        # one class sheet, and one slide has no overlay
    ids = {said["id"] for _, said in page.elements if "id" in said}
    links = [said["href"] for _, said in page.elements if "href" in said]
    for link in [*pictures, *links]:
        if link.startswith("#"):
            assert link[1:] in ids
        else:
            assert re.fullmatch(r"[a-z]+[a-z0-9_./-]*", link), "a relative path without a scheme"
            assert (shard / unquote(link)).resolve().is_relative_to(shard) and (shard / unquote(link)).exists()
    assert all(said.get("loading") == "lazy" for tag, said in page.elements if tag == "img")
    policy = next(said["content"] for _, said in page.elements if said.get("http-equiv"))
    assert policy.startswith("default-src 'none'") and "script" not in policy


def test_histograms_are_the_sums_of_the_lines_counted_by_plain_loops(tmp_path: Path) -> None:
    shard = make(tmp_path / "a", TAME)
    lines = [json.loads(line) for line in (shard / "slides.jsonl").read_text().splitlines()]
    lines += [{**line, "focus": line["hue"], "hue": line["density"]} for line in lines]     # slides in two files
    (shard / "slides.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(gallery.write(shard))
    for what, field in (("slide", "slide"), ("site", "site"), ("split", "split")):
        rows = page.tables[f"by-{what}"][1:]
        drawn = {row[0]: heights for row, heights in zip(rows, page.histograms[f"by-{what}"][1:], strict=True)}
        assert drawn.keys() == {"all"} | {line[field] for line in lines}
        for name, heights in drawn.items():
            for measure in ("focus", "density", "hue"):
                counts = [0] * 24
                for line in lines:
                    for place in range(24):
                        if name in ("all", line[field]):
                            counts[place] += line[measure][place]
                most = max(counts)
                assert heights[measure] == pytest.approx([(gallery.HEIGHT - 2) * count / most for count in counts],
                                                         abs=0.01)


def test_the_median_is_that_of_the_values_as_near_as_bins_can_tell() -> None:
    rng = np.random.default_rng(0)
    for edges in gallery.MEASURES.values():
        values = rng.uniform(edges[0], edges[-1], 1001)
        bins = np.array(judge.histograms(values, np.zeros(len(values), int), 1, edges)[0])
        assert abs(gallery.median(bins, edges) - np.median(values)) < edges[1] - edges[0]


def test_what_lies_apart_comes_first_and_slides_of_few_tiles_say_nothing(tmp_path: Path) -> None:
    shard = make(tmp_path / "a", TAME)
    lines = [json.loads(line) for line in (shard / "slides.jsonl").read_text().splitlines()]
    for line in lines:
        for measure in gallery.MEASURES:
            line[measure] = [0] * 24
            line[measure][12] = line["kept"]
    lines[4]["hue"] = [lines[4]["kept"], *[0] * 23]
    lines[7]["focus"][23], lines[7]["focus"][12] = 6, lines[7]["kept"] - 6
    (shard / "slides.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = Page(gallery.write(shard)).table("by-slide")
    assert [row["slide"] for row in rows][:3] == ["all", "name4", "name7"]
    assert float(rows[1]["apart"]) > float(rows[2]["apart"]) > float(rows[3]["apart"])

    table = index.samples(shard)
    few = {name: table[name].combine_chunks().filter(pa.array(
        [slide != "name4" or number < 11 * 9 for number, slide in enumerate(table["slide"].to_pylist())]))
        for name in table.schema.names}
    index.write_samples(shard, {name: array.to_pylist() for name, array in few.items()})
    page = Page(gallery.write(shard))
    assert "name4" not in [row["slide"] for row in page.table("by-slide")]
    assert "10 of 11 slides; 1 of fewer than 10 tiles say too little." in page.text


def test_what_could_not_be_measured_is_not_taken_for_the_lowest(tmp_path: Path) -> None:
    shard = make(tmp_path / "a", TAME)
    lines = [json.loads(line) for line in (shard / "slides.jsonl").read_text().splitlines()]
    lines[3]["focus"] = [0] * 24
    (shard / "slides.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(gallery.write(shard))
    row = next(row for row in page.table("by-slide") if row["slide"] == "name3")
    assert row["tiles"] == "12" and float(row["apart"]) < 1
    assert "focus of name3, median —" in [said.get("aria-label") for _, said in page.elements]


def test_tables_count_what_is_in_the_folder(tmp_path: Path) -> None:
    shard = make(tmp_path / "a", TAME)
    table, page = index.samples(shard).to_pylist(), Page(gallery.write(shard))
    assert page.table("datasets") == [{
        "name": "name0", "licence": "name3", "organ": "name2", "stain": "name1", "tiles": "132", "slides": "11",
        "patients": "11", "classes": "11"}]
    classes = [*TAME, "unlabelled"]
    for row in page.table("classes-0"):
        mine = [tile for tile in table if row["class"] in ("all", classes[tile["label"]])]
        assert row["all"] == str(len(mine))
        for split in ("name0", "name1"):
            assert row[split] == str(sum(tile["split"] == split for tile in mine))
    slides = {row["slide"]: row for row in page.table("slides")}
    assert slides.keys() == set(TAME)
    for name, row in slides.items():
        assert (row["kept"], row["background"], row["name2"]) == ("12", "9", "3"), "what is in the tars"
        assert row["duplicate"] == ("2" if name == "name0" else "·"), "copies are found after the lines were written"
    reasons = {row["reason"]: row["times"] for row in page.table("rejected")}
    assert reasons == {"name2": "33", "duplicate": "2"} and "99 tiles of background" in page.text
    told = {row[0]: row[1:] for row in page.tables["settings"]}
    assert told["min_focus"][0] == "0.3" and "blurred" in told["min_focus"][1]
    assert len(page.table("failures")) == len(TAME), "whole slides that are absent, and not the tiles of that reason"


def test_a_folder_of_before_there_were_histograms_is_shown_without(tmp_path: Path) -> None:
    new, old = (Page(gallery.write(make(tmp_path / str(lines), TAME, lines=lines))) for lines in (True, False))
    assert "This folder was written before focus and stain were measured" in old.text
    assert not [name for name in old.tables if name.startswith("by-")]
    assert {row["slide"]: (row["kept"], row["background"], row["name2"]) for row in old.table("slides")} == {
        row["slide"]: (row["kept"], row["background"], row["name2"]) for row in new.table("slides")}


def test_a_folder_of_a_job_is_shown(shard: Path, tmp_path: Path) -> None:
    copy = tmp_path / "shard"
    shutil.copytree(shard, copy)
    show.sheets(copy)
    page = Page(gallery.write(copy))
    counts = Counter(index.samples(copy)["slide"].to_pylist())
    assert {row["slide"]: row["kept"] for row in page.table("slides")} == {
        slide: str(count) for slide, count in counts.items()}
    sources = {said["src"] for tag, said in page.elements if tag == "img"}
    assert sources == {path.relative_to(copy).as_posix() for path in copy.rglob("*.png")}


def test_the_command_draws_and_says_what_it_drew(shard: Path, tmp_path: Path) -> None:
    shutil.copytree(shard, tmp_path / "shard")
    done = subprocess.run([sys.executable, "-m", "ssl_dist", "show", str(tmp_path / "shard")], cwd=ROOT, check=True,
                          capture_output=True, text=True)
    said = [Path(line) for line in done.stdout.splitlines()]
    assert said[-1] == tmp_path / "shard" / "show.html" and len(said) > 2 and all(path.is_file() for path in said)


def test_the_same_folder_gives_the_same_page(tmp_path: Path) -> None:
    one, other = (gallery.write(make(tmp_path / place / "shards", HOSTILE)) for place in ("here", "elsewhere"))
    assert one.read_bytes() == other.read_bytes()
    before = one.read_bytes()
    assert gallery.write(one.parent).read_bytes() == before


def test_a_thousand_slides_make_a_page_that_a_browser_can_draw_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    names = [f"slide{number:04d}" for number in range(1000)]
    shard = make(tmp_path / "a", names)
    lines = [json.loads(line) for line in (shard / "slides.jsonl").read_text().splitlines()]
    lines[777]["density"] = [*[0] * 23, lines[777]["kept"]]
    lines[555]["rejected"]["pen"] = 100
    (shard / "slides.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(gallery.write(shard))
    assert (shard / "show.html").stat().st_size < 1_000_000
    assert len(page.table("by-slide")) == 1 + gallery.ROWS and "48 of 1,000 slides, those furthest" in page.text
    assert page.table("by-slide")[1]["slide"] == "slide0777"
    assert page.table("slides")[0]["slide"] == "slide0555"
    assert len(page.table("slides")) == gallery.SLIDES and "500 of 1,000 slides" in page.text
    assert sum(tag == "img" for tag, _ in page.elements) == gallery.OVERLAYS + 1
    assert "200 of 999 pictures" in page.text
    assert len(page.table("classes-0")) == gallery.CLASSES + 1 and "The 100 largest of 1,001 classes" in page.text


@pytest.mark.parametrize(("name", "line", "words"), [
    ("slides.jsonl", "{", "line 12 of .*slides.jsonl does not tell of a slide"),
    ("slides.jsonl", "[]", "line 12 of .*slides.jsonl does not tell of a slide"),
    ("slides.jsonl", json.dumps({"slide": "name1", "site": "", "split": "", "kept": 1, "rejected": {}, "focus": [1]}),
     "the histograms of slide 'name1'"),
    ("rejected.jsonl", '{"reason": "name2"', "line 133 of .*rejected.jsonl does not say"),
])
def test_a_damaged_line_is_named_with_what_to_do(tmp_path: Path, name: str, line: str, words: str) -> None:
    shard = make(tmp_path / "a", TAME)
    with (shard / name).open("a") as handle:
        handle.write(line + "\n")
    with pytest.raises(index.ShardError, match=f"{words}.* restore the file, or delete index.json"):
        gallery.write(shard)


def test_a_slide_without_a_line_is_named(tmp_path: Path) -> None:
    shard = make(tmp_path / "a", TAME)
    lines = (shard / "slides.jsonl").read_text().splitlines(keepends=True)
    (shard / "slides.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(index.ShardError, match="has no line of slide 'name0'"):
        gallery.write(shard)
