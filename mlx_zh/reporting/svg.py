"""Charts as inline SVG: colours come from the page's style, values for the pointer lie in data attributes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from mlx_zh.reporting.charts import Curves, Dots, Points, Span
from mlx_zh.reporting.markup import Html, escape, join, spoken, tag
from mlx_zh.reporting.messages import Text, say

WIDTH, HEIGHT = 480.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 12.0, 12.0, 40.0
_MOST_POINTS = 400  # per curve; beyond, a bucket's lowest and highest points stand for it


def curves(chart: Curves) -> Html:
    """A line chart of `chart` with its legend."""
    scale = 100.0 if chart.percent else 1.0
    drawn = [(s, [(x, y * scale) for x, y in thinned(s.points, _MOST_POINTS)]) for s in chart.series]
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    frame = _Frame(min(xs), max(xs), *_padded(min(ys), max(ys)))
    parts = [_grid(frame), _axis_names(chart.axis)]
    for series, points in drawn:
        parts.append(_curve(frame, series.kind, series.color, points))
    if frame.low < 0 < frame.high:
        parts.insert(1, _line(LEFT, frame.y(0), WIDTH - RIGHT, frame.y(0), "zero"))
    parts.append(_line(0, TOP, 0, HEIGHT - BOTTOM, "cursor"))
    title = chart.title.both()
    picture = tag("svg", *parts, viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}", role="img", aria_label=title, class_="curves")
    legend = [_legend(s.name, s.kind, s.color, points) for s, points in drawn]
    keys = tag("div", *legend, class_="legend")
    return tag("figure", tag("figcaption", chart.title), keys, picture, class_="chart")


def dots(chart: Dots) -> Html:
    """A chart of intervals: a row a category, a dot and whisker a model."""
    lane, gap, left = 15.0, 14.0, 128.0
    height = TOP + sum(lane * len(spans) + gap for _, spans in chart.rows) + 26
    known = [span for _, spans in chart.rows for span in spans if span]
    low, high = _percent_range(known, chart.band)
    frame = _Frame(low, high, 0, 1, left)
    bottom = height - 26
    parts: list[Html] = []
    if chart.band:
        x0, x1 = (frame.x(100 * value) for value in chart.band)
        parts.append(_empty("rect", class_="band", x=x0, y=TOP, width=max(1.0, x1 - x0), height=bottom - TOP))
    marks = ticks(low, high, 6)
    for mark in marks:
        parts.append(_line(frame.x(mark), TOP, frame.x(mark), bottom, "grid"))
        parts.append(tag("text", label(mark, marks), x=_n(frame.x(mark)), y=_n(height - 8), class_="middle"))
    y = TOP + gap / 2
    for name, spans in chart.rows:
        middle = y + lane * len(spans) / 2
        parts.append(_both_texts(name, left - 10, middle + 4, "end"))
        for model, span in enumerate(spans):
            if span:
                parts.append(_span(frame, span, y + lane * (model + 0.5), model, chart.models[model]))
        y += lane * len(spans) + gap
    legend = [_legend(name, "marks", number, []) for number, name in enumerate(chart.models)]
    view, title = f"0 0 {WIDTH:g} {height:g}", f"{chart.title.both()} %"
    picture = tag("svg", *parts, viewBox=view, role="img", aria_label=title, class_="dots")
    caption = tag("figcaption", chart.title, " %")
    note = [tag("p", say("guessing"), class_="note")] if chart.band else []
    return tag("figure", caption, tag("div", *legend, class_="legend"), picture, *note, class_="chart")


def bars(title: Text, edges: Sequence[float], counts: Sequence[float]) -> Html:
    """A histogram: `counts` between neighbouring `edges`."""
    height = 130.0
    bottom, most = height - 22, max(counts)
    frame = _Frame(edges[0], edges[-1], 0, most, 8.0)
    parts: list[Html] = []
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        x, top = frame.x(low), bottom - (bottom - TOP) * count / most
        bar = {"x": x + 0.5, "y": top, "width": max(0.5, frame.x(high) - x - 1), "height": bottom - top}
        said = {key: _n(value) for key, value in bar.items()}
        parts.append(tag("rect", tag("title", f"{low:,.0f}–{high:,.0f}: {count:,}"), class_="bar", **said))
    for mark in ticks(frame.first, frame.last, 6):
        parts.append(tag("text", f"{mark:,.0f}", x=_n(frame.x(mark)), y=_n(height - 6), class_="middle"))
    parts.append(_line(8.0, bottom, WIDTH - RIGHT, bottom, "axis"))
    view = f"0 0 {WIDTH:g} {height:g}"
    picture = tag("svg", *parts, viewBox=view, role="img", aria_label=title.both(), class_="bars")
    return tag("figure", tag("figcaption", title), picture, class_="chart")


def thinned(points: Points, most: int) -> Points:
    """At most about `most` points that keep the ends and every bucket's lowest and highest value."""
    if len(points) <= most:
        return points
    buckets = most // 2
    kept = {0, len(points) - 1}
    for bucket in range(buckets):
        inside = range(bucket * len(points) // buckets, (bucket + 1) * len(points) // buckets)
        kept |= {min(inside, key=lambda i: points[i][1]), max(inside, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


class _Frame:
    """From values to places: x within [first, last], y within [low, high]."""

    def __init__(self, first: float, last: float, low: float, high: float, left: float = LEFT) -> None:
        self.first, self.last = (first, last) if last > first else (first - 0.5, first + 0.5)
        self.low, self.high, self.left = low, high, left

    def x(self, value: float) -> float:
        return self.left + (value - self.first) / (self.last - self.first) * (WIDTH - RIGHT - self.left)

    def y(self, value: float) -> float:
        return TOP + (self.high - value) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)


def _padded(low: float, high: float) -> tuple[float, float]:
    flat = high - low <= 1e-9 * abs(high)  # equal but for rounding
    margin = (0.1 * abs(high) or 0.5) if flat else 0.06 * (high - low)
    return low - margin, high + margin


def _percent_range(spans: Sequence[Span], band: tuple[float, float] | None) -> tuple[float, float]:
    lows, highs = [span.low for span in spans], [span.high for span in spans]
    low, high = min([*lows, *(band or ())]), max([*highs, *(band or ())])
    return max(0.0, 100 * low - 2), min(100.0, 100 * high + 2)


def _grid(frame: _Frame) -> Html:
    parts = []
    marks = ticks(frame.low, frame.high, 5)
    for mark in marks:
        y = frame.y(mark)
        parts.append(_line(LEFT, y, WIDTH - RIGHT, y, "grid"))
        parts.append(tag("text", label(mark, marks), x=_n(LEFT - 7), y=_n(y + 4), class_="end"))
    steps = [mark for mark in ticks(frame.first, frame.last, 6) if mark == round(mark)]
    for mark in steps:
        place = {"x": _n(frame.x(mark)), "y": _n(HEIGHT - BOTTOM + 17)}
        parts.append(tag("text", f"{mark:,.0f}", class_="middle", **place))
    parts.append(_line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "axis"))
    return join(parts)


def _axis_names(axis: Text) -> Html:
    place = {"transform": f"translate(11 {(HEIGHT - BOTTOM + TOP) / 2:g}) rotate(-90)"}
    sides = [("zh", axis.zh), ("en", axis.en)]
    vertical = [tag("text", text, class_=f"{side} middle name", **place) for side, text in sides]
    return join([*vertical, _both_texts(say("step"), (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, "middle name")])


def _both_texts(text: Text, x: float, y: float, class_: str) -> Html:
    sides = [("zh", text.zh), ("en", text.en)]
    if text.zh == text.en:
        sides = [("", text.zh)]
    return join(tag("text", words, x=_n(x), y=_n(y), class_=f"{side} {class_}".strip()) for side, words in sides)


def _curve(frame: _Frame, kind: str, color: int, points: Points) -> Html:
    places = [(frame.x(x), frame.y(y)) for x, y in points]
    line = _empty(
        "polyline", class_=f"{kind} c{color}", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in places), fill="none"
    )
    if kind != "marks" and len(points) > 1:
        return line
    return join([line, *(_empty("circle", class_=f"dot c{color}", cx=x, cy=y, r=3.0) for x, y in places)])


def _span(frame: _Frame, span: Span, y: float, model: int, name: Text) -> Html:
    low, value, high = (frame.x(100 * v) for v in (span.low, span.value, span.high))
    said = f"{100 * span.value:.2f} [{100 * span.low:.1f}, {100 * span.high:.1f}]"
    return tag(
        "g",
        tag("title", f"{name.both()}: {said}"),
        _line(low, y, high, y, f"whisker c{model}"),
        _line(low, y - 3, low, y + 3, f"whisker c{model}"),
        _line(high, y - 3, high, y + 3, f"whisker c{model}"),
        _empty("circle", class_=f"dot c{model}", cx=value, cy=y, r=4.0),
    )


def _legend(name: Text, kind: str, color: int, points: Points) -> Html:
    """A legend entry; for curves it carries the values that the page shows under the pointer."""
    values = {}
    if points:
        values = {
            "data_x": " ".join(f"{x:g}" for x, _ in points),
            "data_y": " ".join(f"{y:.5g}" for _, y in points),
        }
    swatch = tag("i", class_=f"{kind} c{color}")
    return tag("span", swatch, Html(spoken(name)), tag("b"), class_="key", **values)


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Html:
    return _empty("line", class_=class_, x1=x1, y1=y1, x2=x2, y2=y2)


def _empty(name: str, **attributes: object) -> Html:
    said = {key: _n(value) if isinstance(value, float) else value for key, value in attributes.items()}
    return tag(name, **said)


def _n(value: float) -> str:
    return str(escape(f"{value:.1f}".removesuffix(".0")))


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` + 1 multiples of 1, 2, 2.5 or 5 times a power of ten within [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def label(value: float, marks: list[float]) -> str:
    """A mark's text, with as many decimals as the distance of the marks needs."""
    step = min((b - a for a, b in pairwise(marks)), default=abs(value) or 1.0)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if decimals and not math.isclose(step * 10**decimals, round(step * 10**decimals), abs_tol=1e-6):
        decimals += 1  # 0.25 and its multiples
    elif not decimals and not math.isclose(step, round(step), abs_tol=1e-9):
        decimals = 1  # 2.5
    text = f"{value:,.{decimals}f}"
    return "0" if float(text.replace(",", "")) == 0 else text
