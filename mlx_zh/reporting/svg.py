"""Charts as inline SVG. The page's style gives the colours; the legend holds the values to show at the pointer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, pairwise

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from mlx_zh.reporting.charts import Curves, Dots, Histogram, Points, Span
from mlx_zh.reporting.messages import Text, say

WIDTH, HEIGHT = 480.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 12.0, 12.0, 40.0
_MOST_POINTS = 400  # of a curve; a longer one is cut into buckets, of which the lowest and highest points are drawn


@dataclass(frozen=True, slots=True)
class Key:
    """A legend entry. For curves it holds the points, which the page's script shows at the pointer."""

    name: Text
    kind: str  # of its `Series`
    color: int  # index into the palette
    steps: str = ""  # numbers with spaces between them
    values: str = ""  # as many


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture, and the texts that the page writes around it."""

    kind: str  # its style: curves, dots or bars
    title: Text
    height: float
    shapes: Markup  # the content of <svg>
    legend: Sequence[Key] = ()
    note: Text | None = None
    width: float = WIDTH


def curves(chart: Curves) -> Drawing:
    """A line chart with its legend."""
    scale = 100.0 if chart.percent else 1.0
    drawn = [(s, [(x, y * scale) for x, y in thinned(s.points, _MOST_POINTS)]) for s in chart.series]
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    frame = _Frame(min(xs), max(xs), *_padded(min(ys), max(ys)))
    parts = _grid(frame, whole=chart.whole)
    if frame.low < 0 < frame.high:
        parts.append(_line("zero", LEFT, frame.y(0), WIDTH - RIGHT, frame.y(0)))
    parts += _axis_names(chart.axis, chart.along or say("step"))
    legend = []
    for series, points in drawn:
        parts += _curve(frame, series.kind, series.color, points)
        steps, values = (" ".join(f"{x:.9g}" for x, _ in points), " ".join(f"{y:.5g}" for _, y in points))
        legend.append(Key(series.name, series.kind, series.color, steps, values))
    parts.append(_line("cursor", 0, TOP, 0, HEIGHT - BOTTOM))
    return Drawing("curves", chart.title, HEIGHT, Markup().join(parts), legend)


def dots(chart: Dots) -> Drawing:
    """A chart of intervals: a row for each category, a dot with a whisker for each model."""
    lane, gap, left = 15.0, 14.0, 128.0
    height = TOP + sum(lane * len(spans) + gap for _, spans in chart.rows) + 26
    present = [span for _, spans in chart.rows for span in spans if span]
    low, high = _percent_range(present, chart.band)
    frame = _Frame(low, high, 0, 1, left)
    bottom = height - 26
    parts: list[Markup] = []
    if chart.band:
        x0, x1 = (frame.x(100 * value) for value in chart.band)
        parts.append(_rectangle("band", x0, TOP, max(1.0, x1 - x0), bottom - TOP))
    marks = ticks(low, high, 6)
    for mark in marks:
        parts.append(_line("grid", frame.x(mark), TOP, frame.x(mark), bottom))
        parts.append(_text("middle", _at(frame.x(mark), height - 8), label(mark, marks)))
    y = TOP + gap / 2
    for name, spans in chart.rows:
        parts += _both_texts("end", _at(left - 10, y + lane * len(spans) / 2 + 4), name)
        for model, span in enumerate(spans):
            if span:
                parts.append(_span(frame, span, y + lane * (model + 0.5), model, chart.models[model]))
        y += lane * len(spans) + gap
    title = Text(f"{chart.title.zh} %", f"{chart.title.en} %")
    legend = [Key(name, "marks", number) for number, name in enumerate(chart.models)]
    return Drawing("dots", title, height, Markup().join(parts), legend, say("guessing") if chart.band else None)


_WHOLE = 8  # a histogram over a smaller range than this has decimals


def bars(chart: Histogram) -> Drawing:
    """A histogram."""
    height = 130.0
    bottom, highest = height - 22, max(chart.counts)
    frame = _Frame(chart.edges[0], chart.edges[-1], 0, highest, 8.0)
    digits = 0 if chart.edges[-1] - chart.edges[0] >= _WHOLE else 2
    parts: list[Markup] = []
    for (low, high), number in zip(pairwise(chart.edges), chart.counts, strict=True):
        x, top = frame.x(low), bottom - (bottom - TOP) * number / highest
        text = f"{low:,.{digits}f}–{high:,.{digits}f}: {number:,}"
        parts.append(_rectangle("bar", x + 0.5, top, max(0.5, frame.x(high) - x - 1), bottom - top, text))
    for mark in ticks(frame.first, frame.last, 6, whole=digits == 0):
        parts.append(_text("middle", _at(frame.x(mark), height - 6), f"{mark:,.{digits}f}"))
    parts.append(_line("axis", 8.0, bottom, WIDTH - RIGHT, bottom))
    return Drawing("bars", chart.title, height, Markup().join(parts))


def thinned(points: Points, limit: int) -> Points:
    """About `limit` points at most: both ends, and the lowest and the highest value of every bucket."""
    if len(points) <= limit:
        return points
    buckets = limit // 2
    kept = {0, len(points) - 1}
    for bucket in range(buckets):
        inside = range(bucket * len(points) // buckets, (bucket + 1) * len(points) // buckets)
        kept |= {min(inside, key=lambda i: points[i][1]), max(inside, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


class _Frame:
    """Maps values to positions in the picture: x from [first, last], y from [low, high]."""

    def __init__(self, first: float, last: float, low: float, high: float, left: float = LEFT) -> None:
        self.first, self.last = (first, last) if last > first else (first - 0.5, first + 0.5)
        self.low, self.high, self.left = low, high, left

    def x(self, value: float) -> float:
        return self.left + (value - self.first) / (self.last - self.first) * (WIDTH - RIGHT - self.left)

    def y(self, value: float) -> float:
        return TOP + (self.high - value) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)


def _padded(low: float, high: float) -> tuple[float, float]:
    flat = high - low <= 1e-9 * abs(high)  # equal up to rounding
    margin = (0.1 * abs(high) or 0.5) if flat else 0.06 * (high - low)
    return low - margin, high + margin


def _percent_range(spans: Sequence[Span], band: tuple[float, float] | None) -> tuple[float, float]:
    lows, highs = [span.low for span in spans], [span.high for span in spans]
    low, high = min([*lows, *(band or ())]), max([*highs, *(band or ())])
    return max(0.0, 100 * low - 2), min(100.0, 100 * high + 2)


def _grid(frame: _Frame, *, whole: bool) -> list[Markup]:
    parts = []
    marks = ticks(frame.low, frame.high, 5)
    for mark in marks:
        y = frame.y(mark)
        parts.append(_line("grid", LEFT, y, WIDTH - RIGHT, y))
        parts.append(_text("end", _at(LEFT - 7, y + 4), label(mark, marks)))
    marks = ticks(frame.first, frame.last, 6, whole=whole)
    for mark in marks:
        text = f"{mark:,.0f}" if whole else label(mark, marks)
        parts.append(_text("middle", _at(frame.x(mark), HEIGHT - BOTTOM + 17), text))
    return [*parts, _line("axis", LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM)]


def _axis_names(axis: Text, along: Text) -> list[Markup]:
    upwards = Markup('transform="translate(11 {:g}) rotate(-90)"').format((HEIGHT - BOTTOM + TOP) / 2)
    below = _at((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5)
    return _both_texts("middle name", upwards, axis) + _both_texts("middle name", below, along)


def _curve(frame: _Frame, kind: str, color: int, points: Points) -> list[Markup]:
    positions = [(frame.x(x), frame.y(y)) for x, y in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in positions)
    line = Markup('<polyline class="{} c{}" points="{}" fill="none"/>\n').format(kind, color, path)
    dotted = kind == "marks" or len(points) == 1
    return [line, *(_dot(color, x, y, 3.0) for x, y in positions if dotted)]


def _span(frame: _Frame, span: Span, y: float, model: int, name: Text) -> Markup:
    low, value, high = (frame.x(100 * v) for v in (span.low, span.value, span.high))
    text = f"{name.both()}: {100 * span.value:.2f} [{100 * span.low:.1f}, {100 * span.high:.1f}]"
    style = f"whisker c{model}"
    shapes = [_line(style, low, y, high, y), *(_line(style, x, y - 3, x, y + 3) for x in (low, high))]
    return Markup("<g><title>{}</title>{}</g>\n").format(text, Markup().join([*shapes, _dot(model, value, y, 4.0)]))


def _both_texts(style: str, place: Markup, text: Text) -> list[Markup]:
    """Both languages at one position; the page's style hides one of them."""
    if text.zh == text.en:
        return [_text(style, place, text.zh)]
    return [_text(f"zh {style}", place, text.zh), _text(f"en {style}", place, text.en)]


def _text(style: str, place: Markup, text: str) -> Markup:
    return Markup('<text class="{}" {}>{}</text>\n').format(style, place, text)


def _at(x: float, y: float) -> Markup:
    return Markup('x="{}" y="{}"').format(_n(x), _n(y))


def _line(style: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    ends = map(_n, (x1, y1, x2, y2))
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>\n').format(style, *ends)


def _dot(color: int, x: float, y: float, radius: float) -> Markup:
    return Markup('<circle class="dot c{}" cx="{}" cy="{}" r="{}"/>\n').format(color, *map(_n, (x, y, radius)))


def _rectangle(style: str, x: float, y: float, width: float, height: float, text: str = "") -> Markup:
    title = Markup("<title>{}</title>").format(text) if text else ""
    rectangle = Markup('<rect class="{}" {} width="{}" height="{}">{}</rect>\n')
    return rectangle.format(style, _at(x, y), _n(width), _n(height), title)


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def ticks(low: float, high: float, limit: int, *, whole: bool = False) -> list[float]:
    """At most `limit` + 1 multiples of 1, 2, 2.5 or 5 times a power of ten within [low, high].

    With `whole` they are integers, if the range holds one.
    """
    if not high > low:
        return [low]
    locator = MaxNLocator(limit, steps=[1, 2, 2.5, 5, 10], integer=whole, min_n_ticks=1)
    rounding = 1e-9 * (high - low)
    inner = 0.0 if whole else rounding  # 0.55 - 0.45 is more than 0.1 by an ulp, but must count as five times 0.02
    marks = locator.tick_values(low + inner, high - inner)
    return [float(mark) for mark in marks if low - rounding <= mark <= high + rounding]


def label(value: float, marks: list[float]) -> str:
    """The text of a mark, with as many decimals as the distance between marks needs."""
    step = min((b - a for a, b in pairwise(marks)), default=abs(value) or 1.0)
    decimals = next(digits for digits in count() if math.isclose(round(step, digits), step, rel_tol=1e-6))
    text = f"{value:,.{decimals}f}"
    return "0" if float(text.replace(",", "")) == 0 else text
