"""Curves -> the geometry of a line chart: plain numbers and path strings that the page draws as inline SVG."""

import math
from dataclasses import dataclass, field
from statistics import fmean, median

WIDTH, HEIGHT = 400.0, 200.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 8.0, 10.0, 24.0
BUCKETS = 360  # about one a unit of width: more points than that only blur
HUES = 8  # the page's palette

Points = list[tuple[float, float]]


@dataclass
class Line:
    """One run's curve: a path through the means, a band from the least to the greatest value of every bucket."""

    name: str
    hue: int
    dashed: bool
    path: str
    band: str
    dots: Points


@dataclass
class Chart:
    """What the page draws; x and y in units of a WIDTH x HEIGHT box."""

    metric: str
    title: str
    note: str
    summary: str
    x_label: str
    bucket: int = 1  # rows that a point is the mean of
    x_ticks: list[tuple[float, str]] = field(default_factory=list)
    y_ticks: list[tuple[float, str]] = field(default_factory=list)
    marks: list[tuple[float, str]] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)


def draw(
    curves: dict[str, Points],
    metric: str,
    title: str,
    x_label: str,
    marks: list[tuple[float, str]],
    percent: bool = False,
    from_zero: bool = False,
) -> Chart | None:
    """A chart of one metric for one or several runs, or None where nothing finite is to be drawn."""
    curves = {n: [(x, y if abs(y) < 1e150 else math.nan) for x, y in points] for n, points in curves.items()}
    finite = {name: [p for p in points if math.isfinite(p[1])] for name, points in curves.items()}
    values = [y for points in finite.values() for _, y in points]
    if not values:
        return None
    positions = [x for points in finite.values() for x, _ in points]
    logarithmic = min(values) > 0 and max(values) > 50 * median(values)
    left, right = min(positions), max(positions)
    left = 0.0 if 0 < left < 0.1 * right else left
    if left == right:
        left, right = left - 0.5, right + 0.5
    low, high = (0.0 if from_zero and min(values) >= 0 else min(values)), max(values)
    if logarithmic:
        low, high = min(values), max(values)
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        y_ticks = [10.0**decade for decade in decades][:: max(1, len(decades) // 5)]
        low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])
    else:
        if low == high:
            low, high = low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
        y_ticks = ticks(low, high, 5)
        low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])

    def x_of(x: float) -> float:
        return round(LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT), 2)

    def y_of(y: float) -> float:
        share = math.log(y / low) / math.log(high / low) if logarithmic else (y - low) / (high - low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 2)

    chart = Chart(metric=metric, title=title, note="", summary="", x_label=x_label)
    bucket = 1
    said = []
    for index, (name, points) in enumerate(curves.items()):
        if not finite[name]:
            continue
        size = math.ceil(len(points) / BUCKETS)
        bucket = max(bucket, size)
        path, upper, lower, dots = [], [], [], []
        pen = "M"
        for start in range(0, len(points), size):
            here = [p for p in points[start : start + size] if math.isfinite(p[1])]
            if not here:
                pen = "M"  # a gap, not a bridge, where the numbers were not finite
                continue
            x, ys = fmean(p[0] for p in here), [p[1] for p in here]
            x, y = x_of(x), y_of(min(max(fmean(ys), min(ys)), max(ys)))  # a mean may round past its ends
            path.append(f"{pen}{x:g} {y:g}")
            dots.append((x, y))
            upper.append(f"{x:g} {y_of(max(ys)):g}")
            lower.append(f"{x:g} {y_of(min(ys)):g}")
            pen = "L"
        chart.lines.append(
            Line(
                name=name,
                hue=index % HUES,
                dashed=index >= HUES,
                path="".join(path),
                band="M" + "L".join(upper + lower[::-1]) + "Z" if size > 1 else "",
                dots=dots if len(dots) <= 12 else [],  # a lone point has no line to be seen by
            )
        )
        first, last = finite[name][0], finite[name][-1]
        said.append(f"{name}: {label(first[1])} at {label(first[0])}, {label(last[1])} at {label(last[0])}")
    shown = (lambda y: f"{label(100 * y)} %") if percent else label
    whole = all(x == round(x) for x in positions)  # between two steps, or two passes, there is nothing
    chart.x_ticks = [
        (x_of(x), label(x)) for x in ticks(left, right, 5) if left <= x <= right and (x == round(x) or not whole)
    ]
    chart.y_ticks = [(y_of(y), shown(y)) for y in y_ticks]
    chart.marks = [(x_of(x), name) for x, name in marks if left < x < right]
    chart.summary = f"{title} by {x_label}. " + "; ".join(said)
    chart.note, chart.bucket = "logarithmic" if logarithmic else "", bucket
    return chart


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers, about so many, that cover low..high."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    digits = 12 - math.floor(math.log10(step))  # 3 * 0.1 is to be 0.3
    return [round(i * step, digits) for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def label(value: float) -> str:
    """A short number: 4 significant digits, k and M from ten thousand on, powers of ten where it is tiny."""
    if value == 0:
        return "0"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:.4g}{letter}"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"
