"""The views of the papers, by name, each value with what we know of where it comes from.

Where the originals shuffle brightness, contrast, saturation and hue, and shrink with other filters, ours is one order
and one filter (batch.py, opencv.py); their strengths and chances are theirs.
"""

import difflib
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ssl_dist.data.batch import View

MARKS = {
    "C": "read in the authors' code, or in the configuration that their work was built on",
    "S": "read in somebody else's public file that names the paper",
    "R": "remembered, not verified",
    "?": "not found: what stands there is a fall-back",
    "O": "ours",
}

FULL = View(scale=(0.08, 1.0), vertical=0.0, jitter=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
HALF = replace(FULL, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
# Kang et al. flip up and down, jitter colour weakly and move stains instead (R); how weakly is not known to us: two
# public files that cite the paper have 0.2, 0.2, 0.2, 0.1 and 0.1, 0.1, 0.1, 0.05 (S). HED-light of 0.05 is Tellez et
# al.'s (R).
WEAK: dict[str, Any] = {"vertical": 0.5, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.1,
                        "stain": 0.05}
WEAK_MARKS = {"R": "vertical stain stained basis randstain randstain_spread randstain_mixture",
              "S": "brightness contrast saturation hue"}


@dataclass(frozen=True)
class Preset:
    """The views of one paper."""

    source: str
    views: tuple[View, ...]
    marks: dict[str, str]           # mark -> names of the values that it stands for, but for C

    def mark(self, name: str) -> str:
        """What is known of one value; what no mark names was read in the code, if only as absent from it."""
        return next((mark for mark, names in self.marks.items() if name in names.split()), "C")


def _kang(base: Preset, deviation: str) -> Preset:
    marks = {mark: " ".join(name for name in names.split() if name not in WEAK) for mark, names in base.marks.items()}
    for mark, names in WEAK_MARKS.items():
        marks[mark] = f"{marks.get(mark, '')} {names}".strip()
    return Preset(f"{deviation}, changed as Kang et al. (2023) describe: benchmark-ssl-pathology",
                  tuple(replace(view, **WEAK) for view in base.views), marks)


SIMCLR = Preset("Chen et al. 2020; google-research/simclr, data_util.py, strength 1",
                (replace(FULL, count=2),), {})
MOCO_V2 = Preset("Chen et al. 2020; facebookresearch/moco, main_moco.py --aug-plus",
                 (replace(HALF, count=2, scale=(0.2, 1.0), saturation=0.4),), {})
SWAV = Preset("Caron et al. 2020; facebookresearch/swav, multicropdataset.py; VISSL",
              (replace(FULL, name="large", count=2, scale=(0.14, 1.0)),
               replace(FULL, name="small", count=6, size=96, scale=(0.05, 0.14))), {})
BARLOW = Preset("Zbontar et al. 2021; facebookresearch/barlowtwins; VISSL",
                (replace(HALF, name="first", blur=1.0), replace(HALF, name="second", blur=0.1, solarise=0.2)), {})
DINO = Preset("Caron et al. 2021; facebookresearch/dino, main_dino.py; VISSL",
              (replace(HALF, name="first", scale=(0.4, 1.0), blur=1.0),
               replace(HALF, name="second", scale=(0.4, 1.0), blur=0.1, solarise=0.2),
               replace(HALF, name="small", count=8, size=96, scale=(0.05, 0.4))), {})

PRESETS = {
    "histology": Preset("ours: weak colour, flips both ways, no stain step", (View(count=2),),
                        {"O": " ".join(each.name for each in fields(View))}),
    "simclr": SIMCLR,
    "moco_v2": MOCO_V2,
    "swav": SWAV,
    "barlow": BARLOW,
    "dino": DINO,
    # VISSL, on which their work was built, crops as torchvision does by default.
    "moco_v2_kang": _kang(replace(MOCO_V2, views=(replace(MOCO_V2.views[0], scale=(0.08, 1.0)),)), "MoCo v2"),
    "swav_kang": _kang(SWAV, "SwAV"),
    "barlow_kang": _kang(BARLOW, "Barlow Twins"),
    "dino_kang": _kang(DINO, "DINO"),
    # No stain step, colour augmentation only, 224 pixels (C, the author in issues 3 and 6 of ozanciga/
    # self-supervised-histopathology). Their strengths are not known to us; SimCLR's stand there.
    "ciga": Preset("Ciga et al. 2022; what the authors said in public, and SimCLR's values where they said none",
                   SIMCLR.views, {"?": "scale ratio jitter brightness contrast saturation hue grey blur sigma "
                                       "solarise turn horizontal vertical"}),
    # One crop as it is, of a region of 1000 pixels; whether the authors turn it is not known to us.
    "patchseg": Preset("Boserup and Selvan 2022; nickeopti/bach-contrastive-segmentation: one crop of 250 pixels",
                       (View(size=250, scale=(0.0625, 0.0625), ratio=(1.0, 1.0), turn=1.0, jitter=0.0, grey=0.0,
                             blur=0.0),), {"?": "turn horizontal vertical"}),
    # Quarter turns and vertical flips added to MoCo v2 (R).
    "dehaene": Preset("Dehaene et al. 2020: MoCo v2 with quarter turns and vertical flips",
                      tuple(replace(view, turn=1.0, vertical=0.5) for view in MOCO_V2.views),
                      {"R": "size turn vertical", "?": "scale ratio jitter brightness contrast saturation hue grey "
                                                       "blur sigma solarise horizontal"}),
}


def expand(given: Any) -> Any:
    """The views that a config asks for, in full: a preset and changes of all its views, or of one by its name.

    `{preset: swav, stain: 0.1, small: {size: 48}}` changes the stain of all views and the size of the small ones. A
    list of views stands for itself: so a run's resolved config means the same under presets of other values. What has
    no preset's name changes `histology`. Raises ValueError where no such preset is.
    """
    if not isinstance(given, dict):
        return given
    name = given.get("preset", "histology")
    if not isinstance(name, str) or name not in PRESETS:
        close = difflib.get_close_matches(str(name), PRESETS, n=1)
        raise ValueError(f"preset={name!r} is not one of {', '.join(PRESETS)}"
                         + (f"; did you mean {close[0]!r}?" if close else ""))
    views = [asdict(view) for view in PRESETS[name].views]
    names = [view["name"] for view in views]
    for_all = {key: value for key, value in given.items() if key != "preset" and key not in names}
    known = {key: value for key, value in for_all.items() if key in views[0]}
    changed = [{**view, **(known if number else for_all)} for number, view in enumerate(views)]    # a mistake, once
    for number, view in enumerate(names):
        own = given.get(view) or {}
        if not isinstance(own, dict):
            raise ValueError(f"{view}={own!r} is a view of {name}, and takes keys such as size")
        changed[number] |= own
    return changed


def asked(name: str) -> Any:
    """The field `views` of a method's settings: a preset where nothing is said."""
    return field(default=PRESETS[name].views, metadata={
        "expand": expand, "help": f"a preset and changes, {{preset: {name}, stain: 0.05}}, or a list of views"})


def told(name: str) -> list[str]:
    """What a preset is, for somebody who chooses one: its source, and a line a view with the mark of each value."""
    preset, plain = PRESETS[name], View()
    off = {"randstain", "randstain_spread", "randstain_mixture", "stain", "stained", "basis", "turn", "solarise"}
    lines = [f"{name}: {preset.source}"]
    for view in preset.views:
        values = [f"{key}={_short(value)}[{preset.mark(key)}]" for key, value in asdict(view).items()
                  if key not in ("name", "count") and not (key in off and value == getattr(plain, key))]
        lines.append(f"    {view.count} x {view.name}: {' '.join(values)}")
    return lines


def _short(value: Any) -> str:
    return "-".join(f"{each:.3g}" for each in value) if isinstance(value, tuple) else f"{value:.3g}"
