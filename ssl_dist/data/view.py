"""How a method asks for its views: of tiles, and of slides. Imports no torch."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

Interval = tuple[float, float]


@dataclass(frozen=True)
class View:
    """How one view of a tile is drawn, step by step in this order. A strength or a chance of 0 switches a step off.

    The colour defaults are the weak ones used with stain augmentation on histology, and a vertical flip is as likely as
    a horizontal one, for tissue has no up. Contrast pivots on mid grey, not on the picture's own mean: so the whole
    colour step is one matrix that depends on numbers alone.
    """

    name: str = field(default="view", metadata={"pattern": "[a-z][a-z0-9_]*", "help": "by which a recipe changes it"})
    count: int = field(default=1, metadata={"range": (1, 64), "help": "so many views of a tile are drawn like this"})
    size: int = field(default=224, metadata={"range": (8, 2048), "help": "pixels, square"})
    scale: Interval = field(default=(0.2, 1.0), metadata={"range": (0.001, 1), "help": "area of the tile that is cut"})
    ratio: Interval = field(default=(0.75, 4 / 3), metadata={"range": (0.1, 10), "help": "width over height"})
    randstain: float = field(default=0.0, metadata={"range": (0, 1), "help": "chance of RandStainNA: the tile's colour "
                                                    "statistics in LAB become others of the kind in data.stain"})
    randstain_spread: float = field(default=1.0, metadata={"range": (0, 10), "help": "of those others, about the mean"})
    randstain_mixture: bool = field(default=False, metadata={"help": "draw them from the Gaussian mixture"})
    stain: float = field(default=0.0, metadata={"range": (0, 1), "help": "haematoxylin, eosin and residual are each "
                                                "scaled by 1 ± this and shifted by ± this"})
    stained: float = field(default=1.0, metadata={"range": (0, 1), "help": "chance of the stain step"})
    basis: str = field(default="fixed", metadata={
        "choices": ("fixed", "slide", "reference"), "help": "whose stains: Ruifrok and Johnston's, the slide's own "
        "(Macenko), or the slide's brought to the reference of data.stain (normalised)"})
    jitter: float = field(default=0.8, metadata={"range": (0, 1), "help": "chance of colour jitter"})
    brightness: float = field(default=0.2, metadata={"range": (0, 1)})
    contrast: float = field(default=0.2, metadata={"range": (0, 1)})
    saturation: float = field(default=0.2, metadata={"range": (0, 1)})
    hue: float = field(default=0.05, metadata={"range": (0, 0.5), "help": "turns of the colour circle"})
    grey: float = field(default=0.2, metadata={"range": (0, 1), "help": "chance of losing colour"})
    blur: float = field(default=0.5, metadata={"range": (0, 1), "help": "chance of Gaussian blur"})
    sigma: Interval = field(default=(0.1, 2.0), metadata={"range": (0.01, 20), "help": "of the blur, pixels"})
    solarise: float = field(default=0.0, metadata={"range": (0, 1), "help": "chance of inverting what is bright"})
    turn: float = field(default=0.0, metadata={"range": (0, 1), "help": "chance of a turn by 0, 1, 2 or 3 quarters"})
    horizontal: float = field(default=0.5, metadata={"range": (0, 1), "help": "chance of a left-right flip"})
    vertical: float = field(default=0.5, metadata={"range": (0, 1), "help": "chance of an up-down flip"})

    @property
    def stains(self) -> bool:
        """Whether the stain step may do anything."""
        return self.stained > 0 and (self.stain > 0 or self.basis == "reference")

    @property
    def fitted(self) -> str:
        """The setting that needs what `ssl-dist stain-fit` finds; "" where none does."""
        if self.randstain:
            return "randstain"
        return "basis" if self.stains and self.basis != "fixed" else ""

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        return [f"{name}={list(interval)} runs from high to low" for name, interval in
                (("scale", self.scale), ("ratio", self.ratio), ("sigma", self.sigma)) if interval[0] > interval[1]]


@dataclass(frozen=True)
class SlideView:
    """How one view of a slide is drawn: a few tiles of one of its draws, and where they lie, moved about.

    Tiles are taken with replacement, as in Giga-SSL; so every view has as many, however few a slide has.
    """

    tiles: int = field(default=5, metadata={"range": (1, 4096), "help": "of one draw, with replacement"})
    turn: float = field(default=180.0, metadata={"range": (0, 180), "help": "degrees, either way, about their middle"})
    flip: float = field(default=0.5, metadata={"range": (0, 1), "help": "chance of each flip"})
    stretch: Interval = field(default=(0.7, 1.3), metadata={"range": (0.1, 10), "help": "of columns, and of rows"})
    shift: float = field(default=10.0, metadata={"range": (0, 1000), "help": "columns and rows, either way"})

    def rules(self) -> list[str]:
        """What cannot be said of one value alone."""
        low, high = self.stretch
        return [f"stretch={list(self.stretch)} runs from high to low"] if low > high else []


def each(views: Iterable[View]) -> tuple[View, ...]:
    """The views one by one: what was to be drawn several times, several times."""
    return tuple(replace(view, count=1) for view in views for _ in range(view.count))
