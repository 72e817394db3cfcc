"""What the pages are made of. Texts that come from a model or a file are shown as text, never as HTML."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from nicegui import background_tasks, context, ui

from mlx_zh.errors import MlxZhError
from mlx_zh.studio.curves import MOST_POINTS, Point, thinned
from mlx_zh.studio.projects import Studio

COLOURS = ("#2f6fde", "#d97706", "#0f9d75", "#b5478f", "#64748b", "#c2410c", "#5b5bd6", "#8a8d1b")
_GREY = "#8b919a"  # readable on white and on black


def heading(text: str, note: str = "") -> None:
    """The title of a page or, below it, of a section; `note` is said in grey beside it."""
    with ui.element("div").classes("z-heading"):
        ui.label(text).classes("z-title").props('role="heading" aria-level="1"')
        if note:
            ui.label(note).classes("z-note")


def section(text: str) -> ui.element:
    """A titled part of a page, to be used with `with`."""
    with ui.element("section").classes("z-section") as part:
        ui.label(text).classes("z-section-title").props('role="heading" aria-level="2"')
    return part


def empty(title: str, hint: str, command: str | None = None) -> ui.element:
    """What a page shows while there is nothing: what is missing, and what to do, with the command for a terminal.

    Buttons can be added to it with `with`.
    """
    with ui.element("div").classes("z-empty") as place:
        ui.label(title).classes("z-empty-title")
        ui.label(hint).classes("z-note")
        if command:
            code(command)
    return place


def error_card(studio: Studio, error: MlxZhError | str) -> ui.element:
    """An error in a frame: what is wrong, and what to do."""
    with ui.element("div").classes("z-card z-error").props('role="alert"') as card:
        ui.label(studio.error(error)).classes("z-text")
    return card


def note_card(text: str) -> ui.element:
    """A warning or a hint in a frame."""
    with ui.element("div").classes("z-card z-warning") as card:
        ui.label(text).classes("z-text")
    return card


def code(text: str) -> ui.element:
    """A command or a file's content in fixed-width type, as it is; long lines scroll."""
    with ui.element("pre").classes("z-code") as block:
        ui.label(text).classes("z-code-text")
    return block


def toggle(options: Mapping[Any, str], value: Any, change: Callable[[Any], object]) -> ui.toggle:
    """A row of choices of which one is taken; `change` gets the event with the new value."""
    made = ui.toggle(dict(options), value=value, on_change=change)
    return made.props("no-caps unelevated dense").classes("z-toggle")


def table(
    columns: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], *, row_key: str = "key", **options: Any
) -> ui.table:
    """A dense `ui.table`; on a narrow screen it scrolls sideways by itself, and the page does not."""
    made = ui.table(
        columns=[dict(each) for each in columns], rows=[dict(row) for row in rows], row_key=row_key, **options
    )
    return made.classes("z-table").props("flat dense")


def chart(
    title: str,
    curves: Mapping[str, Sequence[Point]],
    *,
    x: str,
    faint: Sequence[str] = (),
    dots: Sequence[str] = (),
    zoom: bool = True,
    most: int = MOST_POINTS,
) -> ui.echart:
    """A line chart of curves by name, thinned to what can be seen. `faint` ones are drawn pale, `dots` have marks.

    Later data: `draw(the_chart, curves)`.
    """
    with ui.element("div").classes("z-card"):
        ui.label(title).classes("z-section-title")
        made = ui.echart(_options(curves, x, faint, dots, zoom)).classes("z-chart")
    draw(made, curves, most)
    return made


def remove_chart(made: ui.echart) -> None:
    """Remove a chart that `chart` made, with its frame."""
    frame = made.parent_slot
    assert frame is not None
    frame.parent.delete()


def _options(
    curves: Mapping[str, Sequence[Point]], x: str, faint: Sequence[str], dots: Sequence[str], zoom: bool
) -> dict[str, Any]:
    clear = [name for name in curves if name not in faint]  # a pale curve explains itself beside its smoothed one
    return {
        "grid": {"left": 4, "right": 52, "top": 30, "bottom": 4, "containLabel": True},
        "animation": False,
        "tooltip": {
            "trigger": "axis",
            "confine": True,
            "backgroundColor": "rgba(28,30,34,.94)",
            "borderWidth": 0,
            "textStyle": {"color": "#fff", "fontSize": 12},
        },
        "legend": {
            "left": 0,
            "top": 0,
            "type": "scroll",
            "textStyle": {"color": _GREY},
            "itemHeight": 8,
            "itemWidth": 14,
            "data": clear,
            "show": len(clear) > 1,
        },
        "xAxis": {"type": "value", "name": x, "min": "dataMin", "max": "dataMax", "minInterval": 1, **_axis()},
        "yAxis": {"type": "value", "scale": True, **_axis()},
        "dataZoom": [{"type": "inside", "filterMode": "none"}] if zoom else [],
        "series": _all_series(list(curves), faint, dots),
    }


def draw(made: ui.echart, curves: Mapping[str, Sequence[Point]], most: int = MOST_POINTS) -> None:
    """Put new data into a chart that `chart` made, by the names of its curves."""
    for series in made.options["series"]:
        points = thinned(curves.get(series["name"], ()), most)
        series["data"] = [[x, float(f"{y:.6g}")] for x, y in points]
    made.update()


def _all_series(names: Sequence[str], faint: Sequence[str], dots: Sequence[str]) -> list[dict[str, Any]]:
    """A pale curve has the colour of the one after it, of which it shows the details."""
    series, index = [], 0
    for name in names:
        series.append(_series(name, index, faint, dots))
        index += name not in faint
    return series


def _series(name: str, index: int, faint: Sequence[str], dots: Sequence[str]) -> dict[str, Any]:
    pale = name in faint
    return {
        "name": name,
        "type": "line",
        "showSymbol": name in dots,
        "symbolSize": 6,
        "lineStyle": {"width": 1 if pale else 1.8, "opacity": 0.35 if pale else 1},
        "itemStyle": {"color": COLOURS[index % len(COLOURS)]},
        "emphasis": {"disabled": True},
        "data": [],
    }


def _axis() -> dict[str, Any]:
    return {
        "nameLocation": "end",
        "nameTextStyle": {"color": _GREY, "fontSize": 11},
        "nameGap": 16,
        "axisLabel": {"color": _GREY, "fontSize": 11, "hideOverlap": True},
        "axisLine": {"onZero": False, "lineStyle": {"color": "rgba(128,128,128,.4)"}},
        "splitLine": {"lineStyle": {"color": "rgba(128,128,128,.15)"}},
    }


def while_visible(seconds: float, work: Callable[[], Awaitable[None]]) -> ui.timer:
    """Call `work` every so many seconds while the page is open, connected and not in a hidden tab; once at first.

    A call that is still at work is waited for. An error that comes up each time is raised once.
    """
    hidden, failed = False, ""

    def note(event: Any) -> None:
        nonlocal hidden
        hidden = bool(event.args)
        if not hidden:
            background_tasks.create(tick())

    async def tick() -> None:
        nonlocal failed
        with client:
            if hidden or client.is_deleted:
                return
            try:
                await work()
            except Exception as error:
                before, failed = failed, repr(error)
                if failed != before:
                    raise
            else:
                failed = ""

    client = context.client
    ui.on("z-hidden", note)
    ui.run_javascript(
        "document.addEventListener('visibilitychange', () => emitEvent('z-hidden', document.hidden));"
        "if (document.hidden) emitEvent('z-hidden', true);"
    )
    return ui.timer(seconds, tick)
