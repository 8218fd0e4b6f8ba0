"""One HTML page of a shard folder, to look at before training: no network, no script, pictures beside it.

All that a folder says comes from a disk, names of files above all. So there is one door into the page: `element`
escapes every text and every attribute that it is given, and only what it returned itself passes as markup.
"""

import dataclasses
import html
import json
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa

from shards import folder, index, judge, show
from shards.settings import Settings
from shards.sources import key

NAME = "show.html"
MEASURES: dict[str, np.ndarray] = {"focus": judge.FOCUS_EDGES, "density": judge.DENSITY_EDGES, "hue": judge.HUE_EDGES}
TITLES = {"focus": ("Focus", "blurred to sharp"), "density": ("Stain density", "pale to dark"),
          "hue": ("Stain hue", "eosin to haematoxylin")}
BINS = 24
PLACES = np.arange(BINS) + 0.5  # of the bins' middles
# So many are shown at most: what a browser draws at once, and more than anyone looks at.
ROWS, OVERLAYS, SLIDES, CLASSES, REASONS, COLUMNS, FAILURES = 48, 200, 500, 100, 14, 7, 20
ENOUGH = 10                     # tiles, below which a slide's distribution is chance
BAR, HEIGHT = 10, 40            # a histogram's bin and height, in units of its drawing
VOID = ("meta", "img", "br")    # elements of HTML that have no end

COPIES = ("duplicate", "conflict")      # reasons that are known only when all tiles are


class Html(str):
    """Markup that `element` made; any other string is a text, and is escaped."""


@dataclasses.dataclass
class Slide:
    """What slides.jsonl says of one slide, all its lines together."""

    name: str
    patient: str = ""
    site: str = ""
    split: str = ""
    kept: int = 0
    rejected: Counter[str] = dataclasses.field(default_factory=Counter)
    bins: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((len(MEASURES), BINS), np.int64))

    def add(self, line: dict[str, Any]) -> None:
        self.patient, self.site, self.split = (line.get(name) or "" for name in ("patient", "site", "split"))
        self.kept += line["kept"]
        self.rejected.update({word(reason): count for reason, count in line["rejected"].items()})
        self.bins += histograms(line)


@dataclasses.dataclass
class Survey:
    """A first reading of slides.jsonl: its sums, and of every slide only the few numbers that choose what is shown."""

    names: list[str]
    kept: np.ndarray            # tiles in the tars
    copies: np.ndarray          # tiles that were accepted, and then found to be in the tars already
    rejected: np.ndarray        # without background: glass is no reproach
    means: np.ndarray           # (slides, measures): the mean place among the bins
    reasons: Counter[str]
    copied: str                 # what a copy's reason is called
    sites: dict[str, Slide]
    splits: dict[str, Slide]
    whole: Slide                # all of it as if it were one slide
    measured: bool              # whether the folder has histograms at all


def write(shard: Path) -> Path:
    """Writes show.html into the shard folder; what it shows of pictures is what lies in sheets/ and overlays/."""
    found, table = index.read(shard), index.samples(shard)
    survey = read(shard, found, table)
    apart, listed = furthest(survey), worst_first(survey)[:SLIDES]
    known = chosen(shard, table, survey, {*apart, *listed})
    body = [head(found, table, survey), datasets(found, table), left_out(shard, found, survey), contact_sheets(shard),
            distributions(survey, [known[row] for row in apart], found.settings), overlays(shard, survey),
            slides(survey, [known[row] for row in listed]), settings(found)]
    title = f"{', '.join(card['name'] for card in found.datasets)} · shards"
    page = element("html", element(
        "head", element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        # Should a name ever slip through: nothing runs, and nothing is fetched from elsewhere.
        element("meta", **{"http-equiv": "Content-Security-Policy"},
                content="default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'"),
        element("title", title), Html(f"<style>{STYLE}</style>")), element("body", element("main", *body)), lang="en")
    out = shard / NAME
    folder.write(out, f"<!doctype html>\n{page}\n")
    return out


# Reading.

def read(shard: Path, found: index.Index, table: pa.Table) -> Survey:
    """Everything that can be said without keeping more than a few numbers of every slide."""
    number: dict[str, int] = {}
    accepted, rejected = array("q"), array("q")
    sums, counted = ([array("d") for _ in MEASURES] for _ in range(2))
    columns: tuple[array, ...] = (accepted, rejected, *sums, *counted)
    sites: dict[str, Slide] = {}
    splits: dict[str, Slide] = {}
    whole, measured = Slide(""), False
    for line in lines(shard, table):
        row = number.setdefault(line["slide"], len(number))
        if row == len(accepted):
            for column in columns:
                column.append(0)
        accepted[row] += line["kept"]
        rejected[row] += sum(count for reason, count in line["rejected"].items() if reason != show.NOT_DRAWN)
        for above, below, bins in zip(sums, counted, histograms(line), strict=True):
            above[row] += float(bins @ PLACES)
            below[row] += float(bins.sum())
        measured |= "focus" in line
        whole.add(line)
        for groups, name in ((sites, line.get("site") or ""), (splits, line.get("split") or "")):
            groups.setdefault(name, Slide(name)).add(line)
    kept = np.zeros(len(number), np.int64)
    for name, count in tiles_of_slides(table):
        if name not in number:
            raise index.ShardError(f"slides.jsonl of {shard} has no line of slide {clip(name)!r}; restore the file, or "
                                   "delete index.json and run the shard job again")
        kept[number[name]] = count
    counts = np.array(accepted, dtype=np.int64)
    # Copies are found when all tiles are known, after the lines were written.
    copies = np.maximum(counts - kept, 0)
    with np.errstate(invalid="ignore"):     # a tile too small to be judged has no focus: NaN, and not the lowest
        means = (np.array(sums) / np.array(counted)).reshape(len(MEASURES), -1).T
    reasons = whole.rejected.copy()     # the cards know the same, and what was found out later
    for card in found.datasets:
        reasons |= Counter({word(reason): count for reason, count in card.get("rejected", {}).items()})
    copied = " or ".join(sorted(reason for reason in COPIES if reasons[reason])) or COPIES[0]
    if copies.any() and not any(reasons[reason] for reason in COPIES):
        reasons[copied] = int(copies.sum())
    lost = np.array(rejected, dtype=np.int64) + copies
    return Survey(list(number), kept, copies, lost, means, reasons, copied, sites, splits, whole, measured)


def tiles_of_slides(table: pa.Table) -> Iterator[tuple[str, int]]:
    """How many tiles of each slide are in the tars."""
    column = index.column(table, "slide")
    names = column.dictionary.to_pylist()
    return zip(names, np.bincount(column.indices.to_numpy(), minlength=len(names)).tolist(), strict=True)


def lines(shard: Path, table: pa.Table) -> Iterator[dict[str, Any]]:
    """The lines of slides.jsonl; of an older folder, the same from its table and rejected.jsonl, without histograms."""
    if (shard / "slides.jsonl").exists():
        yield from show.slide_lines(shard)
        return
    rejected: dict[str, Counter[str]] = {}
    for line in refused(shard):
        rejected.setdefault(line["slide"], Counter())[word(line["reason"])] += 1
    for name, count in sorted({**dict.fromkeys(rejected, 0), **dict(tiles_of_slides(table))}.items()):
        yield {"slide": name, "kept": count, "rejected": rejected.get(name, {})}


def refused(shard: Path, holding: tuple[str, ...] = ('"',)) -> Iterator[dict[str, Any]]:
    """The lines of rejected.jsonl, one at a time, that hold one of these texts: there may be millions of them."""
    path = shard / "rejected.jsonl"
    if not path.exists():
        return
    with path.open(encoding="utf-8") as handle:
        for number, text in enumerate(handle, start=1):
            if not any(each in text for each in holding):
                continue
            try:
                line = json.loads(text)
                if missing := {"slide", "reason"} - line.keys():
                    raise ValueError(f"it lacks {', '.join(sorted(missing))}")
            except (ValueError, AttributeError) as error:
                raise index.ShardError(f"line {number} of {path} does not say what was left out ({error}); restore the "
                                       "file, or delete index.json and run the shard job again") from error
            yield line


def chosen(shard: Path, table: pa.Table, survey: Survey, rows: set[int]) -> dict[int, Slide]:
    """These slides in full: a second reading, which keeps nothing of the others."""
    found = {survey.names[row]: Slide(survey.names[row]) for row in rows}
    for line in lines(shard, table):
        if line["slide"] in found:
            found[line["slide"]].add(line)
    for row in rows:
        slide = found[survey.names[row]]
        slide.kept = int(survey.kept[row])
        if survey.copies[row]:
            slide.rejected[survey.copied] += int(survey.copies[row])
    return {row: found[survey.names[row]] for row in rows}


def furthest(survey: Survey) -> list[int]:
    """The slides that look least like the rest, of those with tiles enough to say so."""
    enough = np.flatnonzero(survey.kept >= ENOUGH)
    far = outlying(survey.means[enough], survey.whole.bins)
    return enough[np.argsort(-far, kind="stable")[:ROWS]].tolist() if survey.measured else []


def histograms(line: dict[str, Any]) -> np.ndarray:
    """(measures, bins) of one line; zeros where it has none."""
    rows = [line.get(name) or [0] * BINS for name in MEASURES]
    try:
        bins = np.array(rows, dtype=np.int64)
        if bins.shape != (len(MEASURES), BINS):
            raise ValueError(f"{BINS} numbers are expected")
        return bins
    except (ValueError, TypeError, OverflowError) as error:
        raise index.ShardError(f"the histograms of slide {line['slide']!r} in slides.jsonl are none ({error}); restore "
                               "the file, or delete index.json and run the shard job again") from error


def outlying(means: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """How far each mean lies from the mean of all, at its worst measure, in standard deviations of all tiles."""
    total = np.maximum(bins.sum(axis=1), 1)
    centre = bins @ PLACES / total
    spread = np.sqrt((bins * (PLACES - centre[:, None]) ** 2).sum(axis=1) / total)
    return np.nan_to_num(np.abs(means - centre) / np.maximum(spread, 0.5)).max(axis=1, initial=0)


# The sections.

def head(found: index.Index, table: pa.Table, survey: Survey) -> Html:
    patients = len(set(index.column(table, "patient").dictionary.to_pylist()) - {""})
    named = len(index.column(table, "slide").dictionary)
    sites = len(survey.sites.keys() - {""})
    rejected, background = survey.reasons.total(), survey.reasons[show.NOT_DRAWN]
    tissue = found.samples + rejected - background
    microns = [f"{value:.4g}" for value in np.unique(table["mpp"].to_numpy()) if not math.isnan(value)]
    cut = f"{found.settings['size']} px" if found.settings.get("kind") in ("slides", "regions") else ""
    scale = f"{listed(microns[:6])} µm/px" if microns else "no resolution known"
    about = " · ".join(filter(None, (card.get("about") for card in found.datasets)))
    names = [("datasets", "Datasets"), ("left-out", "Left out"), ("sheets", "Contact sheets"),
             ("looks", "Focus and stain"), ("overlays", "Overlays"), ("slides", "Slides"), ("settings", "Settings")]
    share = (f"{percent((rejected - background) / tissue)} of what is tissue" if rejected > background
             else "nothing of what is tissue" if background else "nothing")
    return element(
        "header", element("p", "ssl_dist · shard folder", class_="kicker"),
        element("h1", ", ".join(visible(card["name"]) for card in found.datasets)),
        element("p", *([about, element("br")] if about else []), " at ".join(filter(None, (cut, scale))),
                class_="muted"),
        element("nav", *(element("a", name, href=f"#{target}") for target, name in names)),
        element("dl",
                figure("tiles", f"{found.samples:,}",
                       f"in {many(len(found.tars), 'tar')}, {size(sum(tar.bytes for tar in found.tars))}"),
                figure("slides", f"{named:,}", many(sites, "site") if sites else "sites not known"),
                figure("patients", f"{patients:,}" if patients else "—",
                       "" if patients else "not known: leakage between splits cannot be seen"),
                figure("left out", f"{rejected - background:,}",
                       share + (f"; {background:,} of background beside it" if background else "")),
                class_="headline"))


def figure(name: str, value: str, note: str) -> Html:
    return element("div", element("dt", name), element("dd", value), element("dd", note, class_="muted"))


def datasets(found: index.Index, table: pa.Table) -> Html:
    head = ("name", "licence", "organ", "stain", "tiles", "slides", "patients", "classes")
    rows = [[card.get(name) if name != "tiles" else card.get("samples") for name in head[:-1]]
            + [len(card["classes"]) or "none"] for card in found.datasets]
    return section(
        "datasets", "Datasets", data_table("datasets", head, rows, {4, 5, 6, 7}),
        *(tally(card, position, found, table) for position, card in enumerate(found.datasets)))


def tally(card: dict[str, Any], position: int, found: index.Index, table: pa.Table) -> Html:
    """Tiles of one dataset by class and split."""
    dataset, split = index.column(table, "dataset"), index.column(table, "split")
    names = dataset.dictionary.to_pylist()
    mine = (dataset.indices.to_numpy() == names.index(card["name"]) if card["name"] in names
            else np.zeros(len(table), bool))
    splits, classes = split.dictionary.to_pylist() or [""], [*card["classes"], "unlabelled"]
    label = table["label"].to_numpy()[mine] % len(classes)
    codes = label * len(splits) + split.indices.to_numpy()[mine]
    counts = np.bincount(codes, minlength=len(classes) * len(splits)).reshape(len(classes), len(splits))
    counts = counts if counts[-1].any() or len(classes) == 1 else counts[:-1]
    shown = np.sort(np.argsort(-counts.sum(axis=1), kind="stable")[:CLASSES])
    most = max(int(counts.sum(axis=1).max(initial=0)), 1)
    rows: list[list[Any]] = [[clip(classes[row]), *counts[row].tolist(), int(counts[row].sum()),
                              bar(counts[row].sum() / most)] for row in shown.tolist()]
    if len(counts) > 1:
        rows.append(["all", *counts.sum(axis=0).tolist(), int(counts.sum()), ""])
    head = ["class", *(clip(name) if name else "no split" if len(splits) > 1 else "tiles" for name in splits)]
    if len(splits) == 1:
        rows, head = [[*row[:2], row[3]] for row in rows], [*head, ""]
    else:
        head += ["all", ""]
    title = f"Classes of {clip(card['name'])}" if len(found.datasets) > 1 else "Classes"
    less = (element("p", f"The {len(shown):,} largest of {len(counts):,} classes.", class_="muted")
            if len(shown) < len(counts) else "")
    return element("div", element("h3", title), less,
                   data_table(f"classes-{position}", head, rows, set(range(1, len(head) - 1))))


def left_out(shard: Path, found: index.Index, survey: Survey) -> Html:
    background = survey.reasons[show.NOT_DRAWN]
    total = survey.reasons.total() - background
    # Glass is most of every slide: it would dwarf the bars that tell something.
    ranked = [(reason, count) for reason, count in by_count(survey.reasons) if reason != show.NOT_DRAWN]
    seen = found.samples + total
    parts = [paragraph(f"Of {seen:,} tiles and files looked at, {total:,} were left out"
                       + (f"; {background:,} tiles of background lie beside the tissue" if background else "") + ".")]
    if ranked:
        colours = {reason: show.colour(reason, list(survey.reasons)) for reason in survey.reasons}
        rows: list[list[Any]] = [[swatch(colours[reason]), clip(reason), count, percent(count / seen),
                                  bar(count / ranked[0][1], colours[reason])] for reason, count in ranked[:REASONS]]
        if rest := ranked[REASONS:]:
            count = sum(each for _, each in rest)
            rows.append(["", f"{len(rest):,} other reasons", count, percent(count / seen), ""])
        parts += [data_table("rejected", ("", "reason", "times", "share", ""), rows, {2, 3}), *failures(shard, ranked)]
    if survey.reasons and (shard / "rejected.jsonl").exists():
        parts.append(paragraph("Each of them with its reason: ",
                               element("a", "rejected.jsonl", href="rejected.jsonl"), "."))
    return section("left-out", "Left out", *parts)


def by_count(reasons: Counter[str]) -> list[tuple[str, int]]:
    return sorted(reasons.items(), key=lambda one: (-one[1], one[0]))


def failures(shard: Path, ranked: list[tuple[str, int]]) -> Iterator[Html]:
    """Slides and files that are absent as a whole, with what their reader said of them."""
    usual = {"background", "blank", "blurred", "pen", "blood", "outside annotations", "duplicate", "conflict"}
    unusual = [reason for reason, _ in ranked if reason not in usual]
    if not unusual:
        return
    found = []
    for line in refused(shard, tuple(json.dumps(reason)[1:-1] for reason in unusual)):
        if line.get("x") is None and word(line["reason"]) not in usual:
            found.append([clip(str(line.get("file") or line["slide"]), 60), clip(word(line["reason"])),
                          clip(str(line.get("detail") or line["reason"]), 300)])
            if len(found) > FAILURES:
                break
    if found:
        more = f"The first {FAILURES} of them; the others are in rejected.jsonl." if len(found) > FAILURES else ""
        yield element("h3", "Slides and files absent as a whole")
        yield data_table("failures", ("file", "reason", "what its reader said"), found[:FAILURES], set())
        if more:
            yield paragraph(more)


def contact_sheets(shard: Path) -> Html:
    pictures = []
    for name, words in (("classes", "by class"), ("sites", "by site"), ("slides", "by slide")):
        if (shard / "sheets" / f"{name}.png").is_file():
            source = f"sheets/{name}.png"
            pictures.append(element("figure", element("figcaption", element("b", words.capitalize())), element(
                "a", element("img", src=source, alt=f"contact sheet {words}", loading="lazy"), href=source),
                class_="sheet"))
    none = missing("No contact sheets: ", element("code", "ssl-dist show"), " draws them.")
    return section("sheets", "Contact sheets", *(pictures or [none]))


def distributions(survey: Survey, apart: list[Slide], told: dict[str, Any]) -> Html:
    title = "Focus and stain"
    if not survey.measured:
        return section("looks", title, missing(
            "This folder was written before focus and stain were measured (it has no slides.jsonl): shard again to see "
            "them."))
    focus = told.get("min_focus") or 0
    later = " Copies that were found later are still in them." if survey.copies.any() else ""
    parts = [paragraph("Of the kept tiles, each distribution drawn to its own height; grey is the distribution of all, "
                       f"and the outermost bins hold what lies beyond.{later} The line is the median, whose value "
                       f"stands beside it{'; the dashed one is min_focus' * bool(focus)}. What lies furthest from the "
                       "rest comes first: the column ", element("i", "apart"), " is the distance of its mean from the "
                       "mean of all, at the worst of the three, in standard deviations of all tiles.")]
    # The drawing of all, once; every row shows it behind its own.
    parts.append(element("svg", element("defs", gradient(), *(
        element("path", id=f"all-{name}", d=steps(bins), class_="ghost")
        for name, bins in zip(MEASURES, survey.whole.bins, strict=True))), class_="defs", aria_hidden="true"))
    for name, groups in (("split", survey.splits), ("site", survey.sites)):
        if len(groups) > 1:
            parts += multiples(name, list(groups.values()), survey, len(groups), "", focus)
    few = int((survey.kept < ENOUGH).sum())
    note = ""
    if len(apart) < len(survey.names):
        note = f"{len(apart):,} of {many(len(survey.names), 'slide')}" + (
            ", those furthest from the rest" * (len(apart) + few < len(survey.names))) + (
            f"; {few:,} of fewer than {ENOUGH} tiles say too little" * (few > 0)) + "."
    parts += multiples("slide", apart, survey, len(apart), note, focus)
    return section("looks", title, *parts)


def multiples(what: str, groups: list[Slide], survey: Survey, of: int, note: str, min_focus: float) -> list[Html]:
    """One row a group, one column a measure: small drawings on one scale, to be compared along the column."""
    parts = [element("h3", f"By {what}"), *([paragraph(note)] if note else [])]
    if not groups:
        return parts
    bins = np.stack([group.bins for group in groups])
    with np.errstate(invalid="ignore"):
        means = bins @ PLACES / bins.sum(axis=2)
    far = outlying(means, survey.whole.bins)
    order = np.argsort(-far, kind="stable")[:ROWS].tolist()
    if len(order) < of and not note:
        parts.append(paragraph(f"{len(order):,} of {of:,}, those furthest from the rest."))
    sited = what == "slide" and any(survey.sites.keys() - {""})
    heads = [element("th", what, scope="col"), *([element("th", "site", scope="col")] if sited else []),
             element("th", "tiles", scope="col", class_="figure"), element("th", "apart", scope="col", class_="figure")]
    for name, edges in MEASURES.items():
        heads.append(element("th", element("b", TITLES[name][0]), f" {TITLES[name][1]}", axis(edges), scope="col",
                             class_="measure"))
    rows = [multiple("all", None, survey.whole, sited, min_focus, "")]
    for row in order:
        group = groups[row]
        rows.append(multiple(group.name or f"no {what}", group.site, group, sited, min_focus, f"{far[row]:.1f}"))
    parts.append(element("div", element("table", element("thead", element("tr", *heads)), element("tbody", *rows),
                                        class_="multiples", data_table=f"by-{what}"), class_="wide"))
    return parts


def multiple(name: str, site: str | None, group: Slide, sited: bool, min_focus: float, far: str) -> Html:
    cells = [name_cell(name), *([name_cell(site or "")] if sited else []),
             element("td", f"{group.bins.sum(axis=1).max():,}", class_="figure"),
             element("td", far, class_="figure muted")]
    for (measure, edges), bins in zip(MEASURES.items(), group.bins, strict=True):
        middle = median(bins, edges)
        marks = []
        if math.isfinite(middle):
            marks.append(upright(middle, edges, "median"))
        if measure == "focus" and edges[0] < min_focus < edges[-1]:
            marks.append(upright(min_focus, edges, "limit"))
        value = number(middle, 2)
        drawing = element(
            "svg", element("use", href=f"#all-{measure}"), element("path", d=steps(bins), class_=f"bins {measure}"),
            *marks, viewBox=f"0 0 {BAR * BINS} {HEIGHT}", preserveAspectRatio="none", role="img",
            aria_label=f"{measure} of {visible(name)}, median {value}", data_measure=measure)
        cells.append(element("td", element("div", drawing, element("span", value), class_="drawing")))
    return element("tr", *cells)


def overlays(shard: Path, survey: Survey) -> Html:
    title = "Overlays"
    there = {path.name for path in (shard / "overlays").iterdir()} if (shard / "overlays").is_dir() else set()
    if not there:
        return section("overlays", title, missing("No overlays: these tiles were not cut from slides."))
    ranked = worst_first(survey)
    named = ((row, f"{key(survey.names[row])}.png") for row in ranked)
    drawn = [(row, picture) for row, picture in named if picture in there]
    # Regions of one slide have names of their own, of which the tables say nothing.
    claimed = {picture for _, picture in drawn}
    drawn += [(-1, name) for name in sorted(there - claimed) if name.endswith(".png") and not name.startswith(".")]
    first = drawn[:OVERLAYS]
    if len(drawn) <= OVERLAYS:
        first = sorted(first, key=lambda one: one[1])
    note = ("Tissue is outlined; kept tiles are green; what was left out wears the colour of its reason. "
            "Each opens at its full size.")
    if len(drawn) > len(first):
        note += (f" {len(first):,} of {len(drawn):,} pictures, those that lost the largest share of their tissue "
                 "first; the others are in the folder ")
    cards = []
    for row, picture in first:
        source = quote(f"overlays/{picture}")
        name, counts = picture.removesuffix(".png"), ""
        if row >= 0:
            name, lost = survey.names[row], int(survey.rejected[row])
            counts = f"{int(survey.kept[row]):,} kept" + (f", {lost:,} left out" if lost else "")
        cards.append(element("figure", element("a", element(
            "img", src=source, alt=f"overlay of {name}", loading="lazy"), href=source), element(
                "figcaption", element("b", clip(name, 34), title=name), element("br"), counts)))
    link = [element("a", "overlays/", href="overlays/"), "."] if len(drawn) > len(first) else []
    return section("overlays", title, element("p", note, *link, class_="muted"),
                   element("div", *cards, class_="gallery"))


def slides(survey: Survey, found: list[Slide]) -> Html:
    less = len(found) < len(survey.names)
    found = found if less else sorted(found, key=lambda slide: slide.name)
    total: Counter[str] = Counter()
    for slide in found:
        total.update(slide.rejected)
    ranked = [reason for reason, _ in by_count(total)]
    columns = ranked if len(ranked) <= COLUMNS + 1 else ranked[:COLUMNS]
    rest = ranked[len(columns):]
    told = [name for name in ("patient", "site", "split") if any(getattr(slide, name) for slide in found)]
    head = ["slide", *told, "kept", *map(clip, columns), *(["other"] if rest else [])]
    cells: list[list[Any]] = []
    for slide in found:
        counts: list[Any] = [slide.rejected[reason] or "·" for reason in columns]
        if rest:
            counts.append(sum(slide.rejected[reason] for reason in rest) or "·")
        cells.append([Html(name_cell(slide.name)), *(Html(name_cell(getattr(slide, name))) for name in told),
                      slide.kept, *counts])
    note = (f"{len(found):,} of {len(survey.names):,} slides, those that lost the largest share of their tissue first."
            if less else "")
    return section("slides", "Slides", *([paragraph(note)] if note else []),
                   data_table("slides", head, cells, set(range(1 + len(told), len(head)))))


def worst_first(survey: Survey) -> list[int]:
    """The slides by the share of their tissue that was left out, the largest first; of equals, by name."""
    share = survey.rejected / np.maximum(survey.kept + survey.rejected, 1)
    share[survey.kept == 0] = 2.0
    return sorted(range(len(survey.names)), key=lambda row: (-share[row], survey.names[row]))


def settings(found: index.Index) -> Html:
    """What the job was told, in the order and the words of Settings; what differs from the default stands out."""
    known = {each.name: each for each in dataclasses.fields(Settings)}
    rows = []
    for name in [*(name for name in known if name in found.settings), *sorted(found.settings.keys() - known.keys())]:
        value = found.settings[name]
        field = known.get(name)
        usual = field is not None and value == (field.default_factory() if callable(field.default_factory)
                                                else field.default)
        rows.append(element("tr", element("th", clip(name), scope="row"),
                            element("td", clip(plain(value), 120), class_="usual" if usual else ""),
                            element("td", (field.metadata.get("help", "") if field else ""), class_="muted")))
    return section("settings", "Settings", paragraph("What the job was told; defaults are pale."),
                   element("div", element("table", *rows, class_="pairs", data_table="settings"), class_="wide"),
                   element("footer", "Written by ", element("code", "ssl-dist show"), " from what lies in this folder. "
                           "It needs no network; its pictures lie beside it in sheets/ and overlays/. Fingerprint ",
                           element("code", clip(found.fingerprint, 80)), "."))


# The parts.

def element(tag: str, *children: Any, **attributes: Any) -> Html:
    """One element. Whatever is not markup of ours is text, and is escaped; so is every attribute's value."""
    inside = "".join(child if isinstance(child, Html) else html.escape(visible(child)) for child in children)
    words = "".join(f' {name.rstrip("_").replace("_", "-")}="{html.escape(visible(value))}"'
                    for name, value in attributes.items() if value != "" or name == "alt")
    return Html(f"<{tag}{words}>" if tag in VOID else f"<{tag}{words}>{inside}</{tag}>")


def visible(value: Any) -> str:
    """A text in which nothing hides: what has no shape of its own, or turns the line around, is a mark."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(value))


def clip(text: str, most: int = 48) -> str:
    """A name short enough for its place: its middle goes, for the ends are what tells names apart."""
    return text if len(text) <= most else f"{text[:most - most // 3 - 1]}…{text[-(most // 3):]}"


def word(reason: str) -> str:
    """The word of a reason: older folders put a sentence behind it."""
    return clip(reason.split(":")[0], 60)


def section(name: str, title: str, *children: Any) -> Html:
    return element("section", element("h2", title), *children, id=name)


def paragraph(*words: Any) -> Html:
    return element("p", *words, class_="muted")


def missing(*words: Any) -> Html:
    return element("p", *words, class_="missing")


def name_cell(name: str) -> Html:
    short = clip(name)
    return element("td", short, title=name if short != name else "", class_="name")


def data_table(name: str, head: Iterable[str], rows: Iterable[Iterable[Any]], figures: set[int]) -> Html:
    """A table; a cell is a text, a whole number, or markup, and the columns `figures` are set to the right."""
    def cell(value: Any, place: int) -> Html:
        if isinstance(value, Html) and value.startswith("<td"):
            return value
        text = f"{value:,}" if type(value) is int else "—" if value is None else value
        return element("td", text, class_="figure" if place in figures else "")

    titles = [element("th", title, scope="col", class_="figure" if place in figures else "")
              for place, title in enumerate(head)]
    return element("div", element("table", element("thead", element("tr", *titles)), element("tbody", *(
        element("tr", *(cell(value, place) for place, value in enumerate(row))) for row in rows)), data_table=name),
        class_="wide")


def bar(share: float, ink: show.Colour | None = None) -> Html:
    style = f"width:{100 * float(share):.2f}%" + (f";background:rgb{ink}".replace(" ", "") if ink else "")
    return element("span", element("span", style=style), class_="track")


def swatch(ink: show.Colour) -> Html:
    return element("span", class_="swatch", style=f"background:rgb{ink}".replace(" ", ""))


def steps(bins: np.ndarray) -> str:
    """The outline of a histogram as a path, its highest bin as high as the drawing."""
    most = max(int(bins.max()), 1)
    heights = [f"{HEIGHT - (HEIGHT - 2) * count / most:.4g}" for count in bins.tolist()]
    return f"M0 {HEIGHT}" + "".join(f"V{height}H{BAR * (place + 1)}" for place, height in enumerate(heights)) + \
        f"V{HEIGHT}Z"


def place_of(value: float, edges: np.ndarray) -> float:
    """Where a value lies in a drawing, whatever the spacing of the edges."""
    return float(np.interp(value, edges, np.arange(len(edges)) * BAR))


def upright(value: float, edges: np.ndarray, kind: str) -> Html:
    x = f"{place_of(value, edges):.4g}"
    return element("line", x1=x, x2=x, y1=0, y2=HEIGHT, class_=kind)


def median(bins: np.ndarray, edges: np.ndarray) -> float:
    """The value that half of the counts lie below, as if they lay evenly within their bins."""
    below = np.concatenate([[0], np.cumsum(bins)])
    return float(np.interp(below[-1] / 2, below, edges)) if below[-1] else math.nan


def axis(edges: np.ndarray) -> Html:
    """The numbers below a column's title, at every sixth edge."""
    shown = [(number(edges[place], 1), 100 * place / BINS) for place in (0, 6, 12, 18, 24)]
    return element("span", *(element("span", label, style=f"left:{left:g}%") for label, left in shown), class_="axis")


def gradient() -> Html:
    """From eosin to haematoxylin, along the axis of hue."""
    ends = ("#d4527f", "#a65aa6", "#5a4aa0")
    return element("linearGradient", *(element("stop", offset=f"{50 * place}%", **{"stop-color": ink})
                                       for place, ink in enumerate(ends)),
                   id="stain", gradientUnits="userSpaceOnUse", x1=0.3 * BAR * BINS, x2=0.8 * BAR * BINS, y1=0, y2=0)


def plain(value: Any) -> str:
    """A setting on one line."""
    if value is None or value in ("", [], {}):
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list) and all(isinstance(one, str | int | float) for one in value):
        return ", ".join(map(str, value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def number(value: float, digits: int) -> str:
    """So many decimals, with a minus that is as wide as a plus, and none before a zero."""
    return f"{value:z.{digits}f}".replace("-", "\N{MINUS SIGN}") if math.isfinite(value) else "—"


def many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def percent(share: float) -> str:
    return "< 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def size(value: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


# The look of the report's page, so that a run and its data are read alike.
STYLE = """
:root { color-scheme: light dark; --paper: #fbf9f7; --card: #fff; --ink: #242029; --muted: #6e6675; --rule: #e7e0e4;
  --ghost: #d9d1d8; --accent: #55408f; --eosin: #b93d70; --teal: #16848a; }
@media (prefers-color-scheme: dark) { :root { --paper: #17151a; --card: #1e1b23; --ink: #e8e4ec; --muted: #9c94a6;
  --rule: #342f3b; --ghost: #423b4a; --accent: #b5a5f2; --eosin: #f08fb5; --teal: #55c4c4; } }
@media print { :root { color-scheme: light; --paper: #fff; --card: #fff; --ink: #000; --muted: #555; --rule: #ccc;
  --ghost: #ddd; --accent: #55408f; --eosin: #b93d70; --teal: #16848a; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: clamp(1rem, 4vw, 3.5rem) clamp(1rem, 4vw, 2.5rem); }
h1, h2, h3, .headline dd:nth-of-type(1) { font-weight: 500;
  font-family: "Iowan Old Style", "Palatino Linotype", Palatino, "Book Antiqua", "URW Palladio L", Georgia, serif; }
h1 { font-size: clamp(1.7rem, 5vw, 2.4rem); line-height: 1.15; margin: .2rem 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.35rem; margin: 0 0 .6rem; padding-top: 1.1rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1.08rem; margin: 1.6rem 0 .3rem; }
p { margin: .3rem 0 .8rem; max-width: 52rem; }
section { margin-top: 2.4rem; }
a { color: inherit; text-decoration-color: var(--rule); text-underline-offset: .2em; }
code { font: .92em ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.muted, figcaption { color: var(--muted); }
.muted, .missing, figcaption { font-size: .88rem; }
figcaption b { color: var(--ink); font-weight: 600; }
.missing { font-style: italic; color: var(--muted); }
.kicker { font-size: .8rem; letter-spacing: .09em; color: var(--muted); margin: 0; }
nav { font-size: .88rem; color: var(--muted); margin-top: .9rem; display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; }
.headline { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 11.5rem), 1fr)); gap: 1px;
  margin: 1.6rem 0 0; background: var(--rule); border: 1px solid var(--rule); border-radius: 10px; overflow: hidden; }
.headline > div { background: var(--card); padding: .9rem 1.1rem 1rem; }
.headline dt { color: var(--muted); font-size: .82rem; } .headline dd { margin: 0; }
.headline dd:nth-of-type(1) { font-size: 2rem; line-height: 1.25; font-variant-numeric: lining-nums;
  white-space: nowrap; }
figure { margin: 0; break-inside: avoid; }
.wide { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { text-align: left; padding: .34rem 1.05rem .34rem 0; border-bottom: 1px solid var(--rule); vertical-align: top;
  max-width: 28rem; }
th { font-weight: 500; color: var(--muted); } thead th { vertical-align: bottom; }
tr { break-inside: avoid; }
.figure { text-align: right; white-space: nowrap; }
td.muted { color: var(--muted); }
.name { overflow-wrap: anywhere; min-width: 5.5rem; max-width: 15rem; }
.pairs th { white-space: nowrap; } .pairs td { overflow-wrap: anywhere; } .usual { color: var(--muted); }
.track { display: inline-block; width: 11rem; height: .6rem; background: var(--rule); border-radius: 2px;
  overflow: hidden; }
.track span { display: block; height: 100%; min-width: 2px; background: var(--accent); }
.track span[style*=rgb], .swatch { box-shadow: inset 0 0 0 1px rgb(128 128 128 / .45); }
.swatch { display: inline-block; width: .75rem; height: .75rem; border-radius: 2px; vertical-align: -.05rem;
  margin-right: -.4rem; }
.sheet { margin: 1rem 0 1.6rem; }
.sheet img { display: block; max-width: 100%; height: auto; border-radius: 6px; background: #fff; margin-top: .4rem;
  border: 1px solid var(--rule); }
.defs { position: absolute; width: 0; height: 0; }
.multiples { width: 100%; } .multiples td { vertical-align: middle; padding-top: .3rem; padding-bottom: .3rem; }
.multiples .name { max-width: 12rem; font-size: .86rem; line-height: 1.3; }
.multiples tbody tr:first-child td { border-bottom-width: 2px; }
.multiples .name:first-child { width: 12rem; min-width: 9.5rem; } .multiples .figure { width: 1%; }
.measure { width: 22%; min-width: 11rem; font-size: .82rem; } .measure b { color: var(--ink); font-weight: 600; }
.axis { display: block; position: relative; height: 1.25rem; margin-right: 2.9rem; font-weight: 400; }
.axis span { position: absolute; transform: translateX(-50%); font-size: .74rem; }
.axis span:first-child { transform: none; }
.drawing { display: flex; align-items: center; gap: .5rem; }
.drawing svg { flex: 1; width: 0; min-width: 0; height: 2.5rem; display: block; border-bottom: 1px solid var(--ghost); }
.drawing span { width: 2.4rem; font-size: .8rem; color: var(--muted); text-align: right; }
.ghost { fill: var(--ghost); }
.bins { fill-opacity: .62; stroke-width: 1.2; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
.focus { fill: var(--teal); stroke: var(--teal); } .density { fill: var(--accent); stroke: var(--accent); }
.hue { fill: url(#stain); stroke: url(#stain); fill-opacity: .75; }
.median, .limit { stroke: var(--ink); stroke-width: 1.2; vector-effect: non-scaling-stroke; }
.limit { stroke: var(--eosin); stroke-dasharray: 3 2; }
.gallery { display: grid; gap: 1.3rem 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 15.5rem), 1fr)); }
.gallery img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #fff; border-radius: 6px;
  border: 1px solid var(--rule); }
.gallery figcaption { margin-top: .35rem; line-height: 1.35; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--rule); color: var(--muted);
  font-size: .82rem; }
@media print { body { font-size: 10pt; } main { max-width: none; padding: 0; } nav { display: none; }
  h2, h3, figcaption { break-after: avoid; } .wide { overflow: visible; } }
"""
