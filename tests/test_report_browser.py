"""The report in a real browser: nothing is cut, nothing is fetched, everything can be seen and read, and it prints."""

import contextlib
import functools
import html
import http.server
import json
import re
import runpy
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shards import synthetic
from ssl_dist.report import page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser here: on Debian, apt-get install chromium")
told = runpy.run_path(str(Path(__file__).with_name("test_report.py")))

LAPTOP, PHONE = 1280, 420
DARK = "--blink-settings=preferredColorScheme=0"
LEAST = 4.5         # contrast of text with what is behind it, that WCAG 2 asks for
NAMES = ["moco_v2_tcga_resnet50_batch4096_lr0.03_randstain_seed0", "simclr_57datasets_resnet18_batch512_even_seed1",
         "dino_tcga_vit_small_patch16_batch1024_20x_40x_seed0", "barlow_twins_tcga_resnet50_lars_batch2048_seed2",
         "swav_camelyon_resnet18_multicrop_queue3840_seed0"]
STATES = ["done", "running", "failed", "preempted", "odd"]

# A page that looks at others in frames as wide as a screen, and leaves what it saw as JSON in its own title.
LOOK = """<!doctype html><meta charset="utf-8">{frames}<script>
// Browsers write colours as rgb(0 to 255) or, where they mixed them, as color(srgb 0 to 1).
function channels(colour) {{
  const all = colour.match(/[\\d.]+(e-\\d+)?/g).map(Number);
  const rgb = colour.startsWith("color") ? all.slice(0, 3).map(each => 255 * each) : all.slice(0, 3);
  return {{rgb, alpha: all.length > 3 ? all[3] : 1}};
}}
function light(colour) {{
  const [r, g, b] = channels(colour).rgb.map(each => each / 255)
    .map(each => each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}}
function contrast(one, other) {{
  const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}}
function look(frame) {{
  const page = frame.contentDocument, view = frame.contentWindow, wide = page.documentElement.clientWidth;
  const style = element => view.getComputedStyle(element);
  const behind = element => {{
    for (; element; element = element.parentElement)
      if (channels(style(element).backgroundColor).alpha > 0.99) return style(element).backgroundColor;
    return "rgb(255, 255, 255)";
  }};
  const own = element => [...element.childNodes].filter(node => node.nodeType === 3)
    .map(node => node.data).join("").trim();
  const said = element => element.tagName + "." + element.getAttribute("class") + ": "
    + element.textContent.trim().slice(0, 60);
  const charts = [...page.querySelectorAll(".chart svg")].filter(chart => chart.getClientRects().length).map(chart => {{
    const box = chart.getBoundingClientRect();
    return {{box: [box.left, box.top, box.right, box.bottom],
             colours: [...chart.querySelectorAll(".line")].map(line => channels(style(line).stroke).rgb)}};
  }});
  page.querySelectorAll("details").forEach(each => {{ each.open = true; }});
  const shown = [...page.body.querySelectorAll("*")].filter(element => element.getClientRects().length);
  const texts = shown.filter(own).map(element => ({{
    contrast: contrast(style(element)[element.closest("svg") ? "fill" : "color"], behind(element)),
    said: said(element)}}));
  return {{
    over: page.documentElement.scrollWidth - wide,
    // What a table scrolls is not cut; of the rest nothing may stand outside the screen or its own box.
    outside: shown.filter(element => !element.closest(".wide") && element.getBoundingClientRect().right > wide + 1)
      .map(said),
    cut: shown.filter(element => element.matches("p, dd, dt, h1, h2, h3, li, figcaption, td, th, summary")
      && element.scrollWidth > element.clientWidth + 1).map(said),
    pictures: [...page.images].map(image => [image.alt, image.complete && image.naturalWidth,
      image.getBoundingClientRect().width]),
    charts,
    column: page.querySelector("main").clientWidth,
    paper: channels(style(page.body).backgroundColor).rgb,
    texts: texts.length,
    faint: texts.filter(text => text.contrast < {least}).map(text => text.contrast.toFixed(2) + " " + text.said),
    fetched: view.performance.getEntriesByType("resource").map(entry => entry.name),
  }};
}}
addEventListener("load", () => {{
  document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(look));
}});
</script>"""


def browse(*flags: str, profile: Path) -> tuple[str, list[str]]:
    """What a browser without a screen writes, and what it says on its console."""
    done = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
         "--force-color-profile=srgb", "--no-first-run", "--disable-background-networking", "--enable-logging=stderr",
         f"--user-data-dir={profile}", *flags],
        capture_output=True, text=True, errors="replace", check=True, timeout=120)  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


class Silent(http.server.SimpleHTTPRequestHandler):
    """A server of one folder: of what comes from a disk, a browser does not say what was fetched for a page."""

    def log_message(self, *words: Any) -> None:
        """Nothing is written for a person."""


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder's address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def look(folder: Path, pages: list[tuple[Path, int]], *flags: str) -> tuple[list[dict[str, Any]], list[str]]:
    """What a reader would see of every page at its width, and the console of all."""
    frames = "".join(f'<iframe src="{path.name}" width="{width}" height="900" style="border:0"></iframe>'
                     for path, width in pages)  # fmt: skip
    (folder / "look.html").write_text(LOOK.format(frames=frames, least=LEAST))
    with served(folder) as address:
        dom, console = browse("--virtual-time-budget=20000", "--dump-dom", *flags, f"{address}/look.html",
                              profile=folder / "profile")  # fmt: skip
    found = re.search("<title>(.*?)</title>", dom, re.S)
    assert found, f"the browser looked at nothing; console: {console}"
    return json.loads(html.unescape(found[1])), console


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def single(folder: Path) -> Path:
    """The page of a run that has everything: two attempts, each kind of evaluation, one of it too good."""
    tissue = Image.fromarray(synthetic.paint(0, 0, 0, size=512).pixels)
    shards = told["shard_folder"](folder / "bach")
    run = told["full_run"](folder / NAMES[0], shards, {step: 5.0 - step / 8 for step in range(1, 21)})
    card = json.loads((run / "run.json").read_text())
    (run / "metrics.jsonl").write_text("".join(
        json.dumps({**told["metric_row"](step, 4 + 3 / step), "samples": 4096 * step}) + "\n"
        for step in range(100, 20001, 50)))  # fmt: skip
    told["write_json"](run / "run.json", {**card, "step": 20000, "steps": 20000})
    tissue.resize((848, 954)).save(run / "eval" / "knn_neighbours.png")
    tissue.crop((0, 0, 512, 300)).save(run / "eval" / "map.png")
    tissue.save(run / "pictures" / "views.png")
    few = [{"share": share, "draws": 5, "tiles": {"mean": 2000 * share, "deviation": 3.0},
            "balanced_accuracy": {"mean": 0.8 + share / 10, "deviation": 0.02}} for share in (0.01, 0.1, 0.5)]
    seeds = {"accuracy": {"mean": 0.9, "deviation": 0.01, "values": [0.89, 0.9, 0.91]}}
    passes = [{"epoch": number, "loss": 1 / number, "balanced_accuracy_held_out": 1 - 1 / (1 + number)}
              for number in range(1, 11)]  # fmt: skip
    slower = [{"epoch": row["epoch"], "loss": row["loss"] + 0.5, "balanced_accuracy_held_out": 0.4} for row in passes]
    found = json.loads((run / "eval" / "knn.json").read_text())
    for name, more in (("low", {"curves": {"encoder": few, "random": few}}),
                       ("linear", {"seeds": {"encoder": seeds, "random": seeds}, "pictures": []}),
                       ("finetune", {"curves": {"encoder": passes, "random": slower}, "pictures": []})):
        told["evaluate"](run, name, **{**found, "protocol": name, **more})
    told["evaluate"](run, "look", metrics={}, pictures=["map.png"], captions={"map.png": "What is alike lies near."})
    told["evaluate"](run, "knn", seen_in_pretraining={"tiles": 412, "slides": 37, "patients": 9})
    return page.write([run], folder / "single.html")


@pytest.fixture(scope="module")
def several(folder: Path, single: Path) -> Path:        # noqa: ARG001      the shards are there
    """Five runs side by side, their names long."""
    runs = []
    for number, (name, state) in enumerate(zip(NAMES, STATES, strict=True)):
        run = told["full_run"](folder / "several" / name, folder / "bach",
                               {step: 6.0 - number - step / 9 for step in range(1, 21)}, lr=number / 10)  # fmt: skip
        card = json.loads((run / "run.json").read_text())
        told["write_json"](run / "run.json", {**card, "state": state, "error": "no room" if state == "failed" else ""})
        runs.append(run)
    told["evaluate"](runs[1], "knn", seen_in_pretraining={"tiles": 412, "slides": 37, "patients": 9})
    return page.write(runs, folder / "several.html")


@pytest.fixture(scope="module")
def seen(folder: Path, single: Path, several: Path) -> tuple[dict[tuple[str, int], dict[str, Any]], list[str]]:
    """Both pages at both widths."""
    pages = [(path, width) for path in (single, several) for width in (LAPTOP, PHONE)]
    found, console = look(folder, pages)
    return {(path.stem, width): one for (path, width), one in zip(pages, found, strict=True)}, console


def test_the_looking_sees_what_is_wrong(folder: Path) -> None:
    """Of a page that does all that a report must not, every fault is seen."""
    (folder / "bad.html").write_text(
        '<body style="background:#fff"><main><p style="color:#ddd">faint</p><p style="width:3000px">long</p>'
        '<p style="width:20px">unbreakable</p><img alt="none" src="gone.png"><img alt="there" src="there.png">'
        '<script>console.error("oh")</script>'
    )
    told["write_png"](folder / "there.png")
    ((bad,), console) = look(folder, [(folder / "bad.html", LAPTOP)])
    assert bad["over"] > 1000
    assert [one.split(": ")[1] for one in bad["outside"]] == ["long"]
    assert [one.split(": ")[1] for one in bad["cut"]] == ["unbreakable"]
    assert [one.split(": ")[1] for one in bad["faint"]] == ["faint"]
    assert [natural for _, natural, _ in bad["pictures"]] == [0, 8]
    assert {Path(name).name for name in bad["fetched"]} >= {"there.png", "gone.png"}
    assert any('"oh"' in line for line in console)


@pytest.mark.parametrize("width", [LAPTOP, PHONE])
@pytest.mark.parametrize("name", ["single", "several"])
def test_nothing_is_cut_and_nothing_is_fetched(name: str, width: int, seen: Any) -> None:
    found, console = seen
    one = found[name, width]
    assert one["over"] <= 0, f"the page is {one['over']} pixels wider than the screen"
    assert one["outside"] == []
    assert one["cut"] == []
    assert one["fetched"] == []
    assert console == []
    assert one["texts"] > 200


@pytest.mark.parametrize("width", [LAPTOP, PHONE])
def test_every_picture_is_decoded_and_fits(width: int, seen: Any) -> None:
    one = seen[0]["single", width]
    assert len(one["pictures"]) == 6, "neighbours of two evaluations, a map, views, a sheet, an overlay"
    for alt, natural, shown in one["pictures"]:
        assert natural > 0, f"{alt} is not decoded"
        assert 0 < shown <= one["column"]
    (shown,) = [shown for alt, _, shown in one["pictures"] if alt == "look: map.png"]
    padding = one["column"] - max(shown for _, _, shown in one["pictures"])
    assert padding < 100, "a picture with a sentence of its own is as wide as the column"
    assert shown == one["column"] - padding


def test_every_text_can_be_told_from_what_is_behind_it(seen: Any, folder: Path, single: Path, several: Path) -> None:
    light = [seen[0][name, width] for name in ("single", "several") for width in (LAPTOP, PHONE)]
    dark, _ = look(folder, [(single, LAPTOP), (several, LAPTOP)], DARK)
    assert min(min(one["paper"]) for one in light) > 240
    assert max(max(one["paper"]) for one in dark) < 40, "the page is as dark as the reader's system"
    for one in light + dark:
        assert one["faint"] == []


@pytest.mark.parametrize(("name", "width"), [("single", LAPTOP), ("several", PHONE)])
def test_the_lines_of_every_chart_are_painted(name: str, width: int, seen: Any, folder: Path) -> None:
    one = seen[0][name, width]
    charts = one["charts"]
    assert len(charts) >= 6
    assert len(charts[0]["colours"]) == (1 if name == "single" else len(NAMES))
    height = int(max(chart["box"][3] for chart in charts)) + 50
    browse(f"--screenshot={folder / 'shot.png'}", f"--window-size={width},{height}",
           (folder / f"{name}.html").as_uri(), profile=folder / "profile")  # fmt: skip
    pixels = np.asarray(Image.open(folder / "shot.png").convert("RGB")).astype(int)
    assert pixels.shape[1] == width
    for chart in charts[:None if name == "single" else 1]:      # the losses of several lie apart; others may hide
        left, top, right, bottom = (round(edge) for edge in chart["box"])
        box = pixels[top:bottom, left:right]
        for colour in chart["colours"]:
            # A line lets a little of the paper through.
            painted = 0.88 * np.array(colour) + 0.12 * np.array(one["paper"])
            assert (np.abs(box - painted).max(axis=2) < 14).sum() > 20, f"no line of {colour} in {chart['box']}"


def test_it_prints_with_everything_opened(folder: Path, single: Path) -> None:
    out = folder / "single.pdf"
    browse("--no-pdf-header-footer", f"--print-to-pdf={out}", single.as_uri(), profile=folder / "profile")
    pages = len(re.findall(rb"/Type\s*/Page\b", out.read_bytes()))
    assert 4 <= pages <= 20
    if shutil.which("pdftotext") is None:
        pytest.skip("no pdftotext here: of what is printed the pages are counted, and the words not read")
    done = subprocess.run(["pdftotext", str(out), "-"], capture_output=True, text=True, check=True)
    for words in ("CC BY 4.0", "seen in pretraining", "decay: 1.0e-06", "A model card", "What is alike lies near."):
        assert words in done.stdout, f"{words!r} is not printed"
    subprocess.run(["pdftoppm", "-r", "20", "-l", "3", "-png", str(out), str(folder / "printed")], check=True)
    for path in folder.glob("printed*.png"):
        tones = Image.open(path).convert("L").histogram()
        assert tones.index(max(tones)) == 255, "paper is white"
