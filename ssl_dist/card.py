"""The model card of an exported encoder: the sentences and tables that tell of it, for the hub and for a reader."""

import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from shards import folder
from ssl_dist import __version__, provenance, schema
from ssl_dist import config as configs
from ssl_dist.data.reader import Reader
from ssl_dist.models import encoder as encoders
from ssl_dist.provenance import FIGURES, Dataset, Effort, Evaluation, Facts, Score, a_dict, a_list, printable, under

logger = logging.getLogger(__name__)

NAMELESS = "slide", "patient"       # columns whose words are counted and not written
BASELINES = {"random": "untrained", "colours": "colour histograms"}

FRONT = "---\n{}---\n"
CARD = """# {architecture}, {method} on {tiles:,} histology tiles

A {whose} `{architecture}` ({parameters:,} weights) that makes {makes}, pretrained without labels by
`{method}` with ssl_dist {version}{unfinished}. **For research only, not for diagnosis.**

## Use

```python
{use}
```

Tiles are RGB, scaled to 0 to 1, less the mean {mean}, over the deviation {std} (`{prepared}` does that); in training
they were {size} pixels wide, at {mpp}.{hub}{forms}

## Trained on

{data}

{choice} The licences of the data may bind these weights as well: read them before you use them or pass them on.
`pretraining.json` holds salted digests of the slides, patients and tiles, so that an evaluation can tell whether it
tests on what was trained on; nobody is named.

## Training

{training}

What the method sees of a tile (in brackets: how often a step is taken):

{views}

What was set otherwise than by default:

```yaml
{settings}```

## Results

{results}
## Limits

- Research only. Neither the weights nor any figure here were made or checked for diagnosis, or for any decision about a
  patient.
- Trained on these organs: {organs}; stained with: {stains}; at {mpp}. What it is worth on others, or on tissue
  that was prepared otherwise, is not known until it is evaluated there.
- Scanners, laboratories, and the age, sex and origin of patients are not recorded: whether it serves all alike is not
  known. Features may tell a scanner or a hospital apart; keep the tiles of a patient, better of a site, on one side of
  a split.
"""
OWN = """# {architecture} encoder, {method} on {count:,} {samples} of histology

A network of ssl_dist's own ({parameters:,} weights) that makes {width} numbers, pretrained without labels by `{method}`
with ssl_dist {version}{unfinished}. **For research only, not for diagnosis.**

## Use

```python
from pathlib import Path

from ssl_dist.models import own

encoder = own.load(Path(".")).eval()    # in this folder
```

## Trained on

{data}

The licences of the data may bind these weights as well: read them before you use them or pass them on.
`pretraining.json` holds salted digests of slides and patients; nobody is named.

## Training

{training}

What was set otherwise than by default:

```yaml
{settings}```

## Limits

- Research only. Neither the weights nor any figure of them were made or checked for diagnosis, or for any decision
  about a patient.
- What it is worth on tissue of another organ, stain or scanner, is not known until it is evaluated there.
"""
PLAIN = """---
library_name: timm
license: other
---
The facts about this encoder could not be put together ({}). For research only, not for diagnosis.
"""
USE = """import timm
import torch
from PIL import Image

encoder = timm.create_model("local-dir:.", pretrained=True, num_classes=0).eval()    # in this folder
prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))
tiles = [prepare(Image.open(path).convert("RGB")) for path in ["tile.png"]]
with torch.inference_mode():
    features = encoder(torch.stack(tiles))    # (tiles, {width})"""
HUB = " Once this folder lies on the Hugging Face hub, `hf-hub:OWNER/NAME` stands for `local-dir:.`."
USE_MAPS = """import numpy as np
import torch
from PIL import Image
from ssl_dist.models import encoder as encoders

encoder = encoders.load(".").eval()         # in this folder
picture = np.asarray(Image.open("region.png").convert("RGB"))       # of any size
with torch.inference_mode():
    maps = encoder(torch.from_numpy(picture)[None])    # (1, {classes}, height, width), from 0 to 1"""
OPEN = """import numpy as np
{imports}
from PIL import Image

pictures = [Image.open(path).convert("RGB").resize(({size}, {size})) for path in ["tile.png"]]
tiles = np.stack([np.asarray(picture) for picture in pictures]){run}"""
FORMS = {
    "onnx": ("import onnxruntime", """
session = onnxruntime.InferenceSession("{file}", providers=["CPUExecutionProvider"])
features = session.run(["features"], {{"pixels": tiles}})[0]"""),
    "torchscript": ("import torch", """
with torch.inference_mode():
    features = torch.jit.load("{file}")(torch.from_numpy(tiles))""")}
NOTHING = """Nothing was evaluated yet. `ssl-dist eval eval/knn encoder=RUN/encoder data.shards=[LABELLED]` does it. It
writes beside this folder and never into it: `ssl-dist export RUN`, called again, takes up here what was found.
"""
KEY = """In brackets: where 95 % of resamplings of the patients lie (of slides, where patients are unknown; none of
fewer than five). Δ: this encoder's figure less the other's. ±: standard deviation over choices of labels, or over
seeds. Evaluations write beside this folder and never into it: `ssl-dist export RUN`, called again, takes up newer ones.
"""
SEEN = """
What is marked *seen in pretraining* is too good: the encoder was trained on tiles, slides or patients that it was asked
about.
"""


def write(home: Path, run: Path, forms: dict[str, str], encoder: nn.Module, train: configs.Train, reader: Reader,
          step: int) -> None:
    """Writes README.md into an encoder's folder. What a card could not tell is no reason to lose an encoder."""
    try:
        text = told(provenance.gathered(home, run, forms, encoder, train, reader, step))
    except Exception as error:      # weeks of training end here, and a method of somebody's own may have odd settings
        logger.warning("%s/README.md says next to nothing: %s", home, error, exc_info=error)
        text = PLAIN.format(type(error).__name__)
    folder.write(home / "README.md", text)


def told(facts: Facts) -> str:
    """The card: metadata as the Hugging Face hub reads it, and text for a reader."""
    if not facts.tiles:
        return _own(facts)
    train, mpp = facts.train, _mpp({each for one in facts.datasets for each in one.mpp})
    front = yaml.safe_dump(metadata(facts), sort_keys=False, allow_unicode=True)
    return FRONT.format(front) + CARD.format(
        architecture=facts.architecture, method=train.method["name"], tiles=sum(one.tiles for one in facts.datasets),
        parameters=facts.parameters, version=_version(facts), size=facts.size, mean=facts.mean, std=facts.std, mpp=mpp,
        forms=_forms(facts), data=_data(facts.datasets), **(
            {"whose": "timm", "makes": f"{facts.width} numbers of a tile", "prepared": "prepare", "hub": HUB,
             "use": USE.format(width=facts.width)} if facts.width else
            {"whose": "network", "makes": f"{facts.classes} maps of a picture, a number a pixel", "prepared": "encoder",
             "hub": "", "use": USE_MAPS.format(classes=facts.classes)}),
        unfinished=_unfinished(facts),
        choice=_choice(facts), training=_training(facts), settings=_settings(facts), results=_results(facts),
        views="\n".join(map(_view, getattr(facts.method, "views", ()))) or "- not told by the method",
        organs=_listed(word for one in facts.datasets for word in one.organs),
        stains=_listed(word for one in facts.datasets for word in one.stains))


def _own(facts: Facts) -> str:
    """The card of a network that timm does not know."""
    front = {"library_name": "ssl_dist", "license": "other", "license_name": "see-the-licences-of-its-data",
             "data_licences": sorted({word for one in facts.datasets for word in one.licences}),
             "tags": ["histology", "pathology", "self-supervised", facts.train.method["name"]]}
    return FRONT.format(yaml.safe_dump(front, sort_keys=False, allow_unicode=True)) + OWN.format(
        architecture=facts.architecture, method=facts.train.method["name"], samples=facts.samples,
        count=sum(one.tiles for one in facts.datasets), parameters=facts.parameters, width=facts.width,
        version=_version(facts), unfinished=_unfinished(facts), data=_data(facts.datasets, facts.samples),
        training=_training(facts), settings=_settings(facts))


def _unfinished(facts: Facts) -> str:
    return f", and is of step {facts.step:,} of {facts.train.steps:,}" if facts.step < facts.train.steps else ""


def metadata(facts: Facts) -> dict[str, Any]:
    """What stands above the card. Names of datasets are ours, and on the hub might be somebody else's: they are told in
    the text alone. Results that were seen in pretraining are not for a list of results."""
    method = facts.train.method["name"]
    results = [{"task": {"type": "image-classification", "name": each.protocol},
                "dataset": {"type": _id(name), "name": name, "split": each.splits[1]},
                "metrics": [{"type": figure, "value": own.value, "name": f"{FIGURES[figure]}, {each.protocol}"}
                            for figure, _, own, _ in each.scores]}
               for each in facts.evaluations if each.listed for name in [", ".join(each.datasets) or "unknown"]]
    kind = ("timm", "image-feature-extraction") if facts.width else ("ssl_dist", "image-segmentation")
    return {"library_name": kind[0], "pipeline_tag": kind[1], "license": "other",
            "license_name": "see-the-licences-of-its-data",
            "data_licences": sorted({word for one in facts.datasets for word in one.licences}),
            "tags": ["histology", "pathology", "self-supervised", method],
            **({"model-index": [{"name": f"{facts.architecture}-{method}", "results": results}]} if results else {})}


def _data(found: list[Dataset], samples: str = "tiles") -> str:
    def patients(one: Dataset) -> str:
        return " and ".join([*([f"{one.patients:,}"] if one.patients else []), *(["unknown"] if one.strangers else [])])

    if samples == "slides":
        rows = [[one.name, f"{one.slides:,}", patients(one), _mpp(one.mpp).removesuffix(" µm/px"),
                 ", ".join(one.licences)] for one in found]
        return _table(["dataset", "slides", "patients", "µm/px", "licence"], rows)
    rows = [[one.name, f"{one.tiles:,}", f"{one.slides:,}" + (", one a tile" if one.slides == one.tiles > 1 else ""),
             patients(one), ", ".join(one.organs), ", ".join(one.stains),
             _mpp(one.mpp).removesuffix(" µm/px"), ", ".join(one.licences)] for one in found]
    if len(found) > 1:
        whole = [sum(getattr(one, name) for one in found) for name in ("tiles", "slides", "patients")]
        rows.append(["total", *(f"{each:,}" for each in whole), "", "", "", ""])
    return _table(["dataset", "tiles", "slides", "patients", "organ", "stain", "µm/px", "licence"], rows)


def _choice(facts: Facts) -> str:
    """Which of the tiles in the shards were read."""
    data, used = facts.train.data, sum(one.tiles for one in facts.datasets)
    asked = [f"split {_cell(printable(data.split))}"] if data.split else []
    asked += [f"{column}s: {len(words)} that were named" if column in NAMELESS else
              f"{column}: {', '.join(_cell(printable(each)) for each in words)}" for column, words in data.only.items()]
    asked += ["without those of a block list"] if data.block else []
    return (f"{'All' if used == facts.there else f'{used:,} of'} the {facts.there:,} tiles in the shards were read"
            + (f" ({'; '.join(asked)})" if asked else "") + "."
            + (f" {_counted(facts.namesakes, 'patient')} of one dataset have the name of one of another, and are "
               "counted in each." if facts.namesakes else ""))


def _training(facts: Facts) -> str:
    train, seen, read = facts.train, facts.step * facts.train.data.batch, sum(one.tiles for one in facts.datasets)
    packages = a_dict(facts.environment.get("packages"))
    software = [f"{name} {printable(packages[name])}" for name in ("torch", "timm", "deepspeed") if name in packages]
    commit = f", commit {printable(facts.environment['commit'])}" if facts.environment.get("commit") else ""
    scale = configs.lr_scale(train)
    written = f" ({train.optim.lr:g} for {configs.LR_TILES} tiles a step, {train.optim.scale})" if scale != 1 else ""
    return _table(["", ""], [
        ["method", train.method["name"]],
        [f"{facts.samples} seen", f"{seen:,} ({facts.step:,} steps of {train.data.batch:,}), {seen / read:.3g} times "
                                  "those above"],
        ["optimizer", f"{train.optim.name}, learning rate {scale * train.optim.lr:.4g}{written}, "
                      f"{train.optim.warmup:.0%} warm-up, then half a cosine to {scale * train.optim.final_lr:.4g}"],
        ["precision, seed", f"{train.precision}, {train.seed}"],
        ["software", ", ".join([f"ssl_dist {_version(facts)}{commit}", *software])],
        ["hardware", _hardware(facts.effort, facts.environment)],
        ["time", _time(facts.effort)],
        ["weights", f"SHA-256 {facts.sha256}"]])


def _hardware(effort: Effort, environment: dict[str, Any]) -> str:
    """Of all attempts how many ranks and machines, and of the last one what rank 0 ran on; no machine's name."""
    ranks, machines = (f"{' or '.join(map(str, counts)) or 'an unknown number of'} {what}{'s' * (counts != [1])}"
                       for counts, what in ((effort.ranks, "rank"), (effort.machines, "machine")))
    kind = [f"{count} x {name}" for name, count in Counter(map(printable, a_list(environment.get("gpus")))).items()] \
        if "cuda" in effort.devices else []
    if environment.get("cpu"):
        kind.append(f"{printable(environment['cpu'])}, {printable(environment.get('cpus'))} cores")
    return (f"{ranks} on {machines}, {' or '.join(effort.devices) or 'unknown device'}"
            + (f"; rank 0: {', '.join(kind)}" if kind else ""))


def _time(effort: Effort) -> str:
    if not effort.attempts:
        return "unknown"
    hours = effort.hours
    told = f"{hours:,.0f} hours" if hours >= 10 else f"{hours:.1f} hours" if hours >= 1 else \
        f"{60 * hours:.0f} minutes" if hours >= 1 / 60 else f"{3600 * hours:.0f} seconds"
    return f"{'more than ' if effort.more else ''}{told}, in {_counted(effort.attempts, 'attempt')}"


def _settings(facts: Facts) -> str:
    """What decides the weights and is not as by default, as a recipe has it; paths are of one machine and left out."""
    train = facts.train
    own = {name: value for name, value in _changed(facts.method).items() if name != "views"}
    tree = {"method": {"name": train.method["name"], **own},
            "encoder": {"name": train.encoder.name, **_changed(train.encoder)},
            "optim": {"name": train.optim.name, "lr": train.optim.lr, **_changed(train.optim)},
            "data": {"batch": train.data.batch, **{name: value for name, value in _changed(train.data).items() if name
                                                   in ("mixture", "temperature", "weights", "window")}},
            **{name: value for name, value in _changed(train).items() if name in
               ("seed", "precision", "accumulate", "zero", "compile", "nonfinite")}}
    # One line a value, however long: a line that breaks might begin with what ends the block.
    return yaml.safe_dump(schema.plain(tree), sort_keys=False, default_flow_style=None, allow_unicode=True, width=10**6)


def _changed(settings: Any) -> dict[str, Any]:
    plain = {each.name: each.default_factory() if each.default is dataclasses.MISSING and
             each.default_factory is not dataclasses.MISSING else each.default for each in dataclasses.fields(settings)}
    return {name: value for name, default in plain.items() if (value := getattr(settings, name)) != default}


def _view(view: Any) -> str:
    """The steps that one kind of view goes through, in words."""
    strengths = ", ".join(f"{name} ± {value:g}" for name in ("brightness", "contrast", "saturation", "hue")
                          if (value := getattr(view, name)))
    whose = {"slide": " in the slide's own basis,", "reference": " normalised to a reference,"}.get(view.basis, "")
    steps = [(view.randstain, "colour statistics drawn anew (RandStainNA)"),
             (view.stained * view.stains, f"stains{whose} scaled and shifted by up to {view.stain:g}"),
             (view.jitter * bool(strengths), strengths), (view.grey, "grey"),
             (view.blur, f"blur of {view.sigma[0]:g} to {view.sigma[1]:g} px"), (view.solarise, "solarised"),
             (view.turn, "quarter turns"), (view.horizontal, "left-right flip"), (view.vertical, "up-down flip")]
    return (f"- {view.count} of {view.size} px: crops of {view.scale[0]:.0%} to {view.scale[1]:.0%} of the area, width "
            f"over height {view.ratio[0]:.2f} to {view.ratio[1]:.2f}; "
            + "; ".join(f"{words} ({chance:.0%})" for chance, words in steps if chance))


def _forms(facts: Facts) -> str:
    """How the files that hold the encoder in one are opened."""
    texts = []
    for kind, file in facts.forms.items():
        imports, run = FORMS[kind]
        code = OPEN.format(imports=imports, size=facts.size, run=run.format(file=file))
        texts.append(f"\n\n`{file}` needs neither timm nor ssl_dist. It takes pixels as they are (uint8, tiles x "
                     f"{facts.size} x {facts.size} x 3) and normalises them itself:\n\n```python\n{code}\n```")
    return "".join(texts)


def _results(facts: Facts) -> str:
    if not facts.evaluations:
        return NOTHING
    others = list(dict.fromkeys(name for one in facts.evaluations for *_, scores in one.scores for name in scores))
    rows = [[one.protocol, _asked(one), FIGURES[figure] + (f", {labels}" if labels else ""), _figure(own),
             *(_figure(scores[name]) if name in scores else "" for name in others), _remark(one, own, labels)]
            for one in facts.evaluations for figure, labels, own, scores in one.scores]
    head = ["protocol", "learnt from → asked about", "figure", "this encoder", *map(_baseline, others), "remark"]
    return f"{_table(head, rows)}\n\n{KEY}" + (SEEN if any(one.seen for one in facts.evaluations) else "")


def _asked(one: Evaluation) -> str:
    (bank, query, patients), (known, asked) = one.counts, one.splits
    of, things = ("outlined regions", "regions") if one.regions else (", ".join(one.datasets), "tiles")
    return (f"{of}: {known}, {bank:,} {things} → {asked}, {query:,}" + " regions" * one.regions
            + (f" of {_counted(patients, 'patient')}" if patients else "") + (", by a table" if one.table else ""))


def _figure(score: Score) -> str:
    sign = "" if score.difference is None else "+"
    return "".join([f"{score.value:.3f}", "" if score.deviation is None else f" ± {score.deviation:.3f}",
                    "" if score.difference is None else f", Δ {score.difference:+.3f}",
                    " ({:{sign}.3f} to {:{sign}.3f})".format(*score.interval, sign=sign) if score.interval else "",
                    "; {1:.3f} ± {2:.3f} over {0} seeds".format(*score.seeds) if score.seeds else ""])


def _remark(one: Evaluation, score: Score, labels: str) -> str:
    found = ["not known whether seen in pretraining"] if one.seen is None else []
    found += ["seen in pretraining: " + ", ".join(f"{count:,} {kind}" for kind, count in one.seen.items())] \
        if one.seen else []
    found += ["too few patients for an interval"] if not score.interval and not labels else []
    return "; ".join(found)


def _baseline(name: str) -> str:
    """What a baseline is called; of a folder, the run's name and not where it lies."""
    if name in BASELINES or encoders.is_elsewhere(name):
        return BASELINES.get(name, printable(name))
    path = Path(name)
    return printable((path.parent if path.name == "encoder" else path).name)


def _table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown, whatever its cells hold."""
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in [head, ["---"] * len(head), *rows])


def _cell(text: str) -> str:
    """A text without what Markdown would take for its own."""
    return text.translate({ord(sign): f"&#{ord(sign)};" for sign in "|<`*[\\"})


def _listed(words: Iterable[str]) -> str:
    return _cell(", ".join(dict.fromkeys(words)))


def _mpp(values: Iterable[float]) -> str:
    found = sorted(values)
    return (", ".join(f"{each:g}" for each in found) if len(found) < 5 else f"{found[0]:g} to {found[-1]:g}"
            ) + " µm/px" if found else "unknown µm/px"


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _id(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "unknown"


def _version(facts: Facts) -> str:
    return printable(under(facts.environment, "packages", "ssl_dist") or __version__)
