"""The page of one run: its curves as they are written, its warnings and its log."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nicegui import run, ui

from mlx_zh.language.notice import Notice, notices_of
from mlx_zh.stages.run_folder import TUNED
from mlx_zh.stages.run_list import RunInfo
from mlx_zh.studio import widgets
from mlx_zh.studio.curves import MOST_POINTS, Point, smoothed
from mlx_zh.studio.frame import address
from mlx_zh.studio.live_metrics import LiveMetrics, age, end_of
from mlx_zh.studio.pages.runs import STATES, gain_text, hours_text, model_name, short
from mlx_zh.studio.processes import end_of_log
from mlx_zh.studio.projects import Studio
from mlx_zh.studio.run_controls import RunControls
from mlx_zh.studio.texts import worded
from mlx_zh.system.escaping import text_lines
from mlx_zh.system.json_text import parse_json
from mlx_zh.system.links import is_readable

_SECONDS = 1.0  # between looks at the run folder
_PAUSE = 2.0  # seconds between two drawings of a short curve
_POINTS_A_SECOND = 200  # by which that grows: a curve with 1,600 points is drawn anew every 10 seconds
_SLOWEST = 15.0
_LIVE_POINTS = 500
_LOG_LINES = 40
_MOST_WARNINGS = 100  # that are shown

# Chart -> its curves: label, metric, whether it is also drawn smoothed.
_Curves = Sequence[tuple[str, str, bool]]
CHARTS: Mapping[str, _Curves] = {
    worded("Loss"): ((worded("training"), "loss", True), (worded("validation"), "eval_loss", False)),
    worded("Reward margins"): (
        (worded("training"), "rewards/margins", True),
        (worded("validation"), "eval_rewards/margins", False),
    ),
    worded("Reward accuracies"): (
        (worded("training"), "rewards/accuracies", True),
        (worded("validation"), "eval_rewards/accuracies", False),
    ),
    worded("Rewards"): ((worded("chosen"), "rewards/chosen", True), (worded("rejected"), "rewards/rejected", True)),
    worded("Learning rate"): ((worded("learning rate"), "learning_rate", False),),
    worded("Tokens per second"): ((worded("tokens per second"), "tokens_per_second", True),),
    worded("Peak memory, GB"): ((worded("peak memory"), "peak_memory_gb", False),),
    worded("Gradient norm"): ((worded("gradient norm"), "grad_norm", True),),
}


def live_page(studio: Studio) -> None:
    """Draw the page. Raises StudioError for a run that is not here."""
    _Live(studio, studio.run(studio.query.get("run", "")))


class _Live:
    """The page: figures that change each second, and the charts of one stage."""

    def __init__(self, studio: Studio, info: RunInfo) -> None:
        self._studio, self._info = studio, info
        self._stage = ""
        self._metrics: LiveMetrics | None = None
        self._charts: dict[str, ui.echart] = {}
        self._charts_drawn = 0.0  # by the monotonic clock
        self._charts_stale = False
        self._shown: object = None  # the figures that are drawn
        self._warned: list[str] = []
        self._logged = ""
        with ui.element("div").classes("z-row"):
            with ui.element("div").classes("z-grow"):
                widgets.heading(info.name, self._about())
            self._controls = RunControls(studio, info)
        self._trouble = ui.element("div")
        self._figures = ui.element("div").classes("z-card z-figures")
        self._draw_links()
        self._stages = ui.element("div")
        self._curves = ui.element("div").classes("z-grid")
        self._warnings = ui.element("div").classes("z-section")
        self._log = ui.element("div").classes("z-section")
        self._draw_figures()
        widgets.while_visible(_SECONDS, self._refresh)

    def _about(self) -> str:
        separator = "、" if self._studio.language == "zh" else ", "
        return " · ".join(
            part for part in (model_name(self._info), separator.join(map(short, self._info.data))) if part
        )

    def _draw_links(self) -> None:
        """Where to go on from here."""
        say, key = self._studio.say, self._info.key
        with ui.element("div").classes("z-row"):
            ui.link(say("Compare"), address("/compare", runs=key)).classes("z-link")
            for title, path in ((say("Talk"), "/talk"), (say("Exams"), "/exams"), (say("Data"), "/data")):
                ui.link(title, address(path, run=key)).classes("z-link")
            ui.link(say("Export"), address("/export", run=key)).classes("z-link")

    async def _refresh(self) -> None:
        info = await run.io_bound(self._studio.run, self._info.key)
        if info is None:  # the studio is closing
            return
        self._info = info
        if self._stage not in info.stages or (info.state == "running" and len(info.stages) > self._seen_stages):
            self._choose(info.stages[-1] if info.stages else "")
        if self._metrics is not None and await run.io_bound(self._metrics.read):
            self._charts_stale = True
        self._draw_figures()
        self._draw_charts()
        await self._draw_texts()
        self._controls.show(info)

    @property
    def _seen_stages(self) -> int:
        return TUNED.index(self._stage) + 1 if self._stage else 0

    def _choose(self, stage: str) -> None:
        """Show another stage's curves."""
        self._stage = stage
        self._metrics = LiveMetrics(self._info.folder.stage(stage)) if stage else None
        self._charts.clear()
        self._curves.clear()
        self._charts_stale, self._charts_drawn = True, 0.0
        self._stages.clear()
        if len(self._info.stages) > 1:
            with self._stages:
                names = {name: name.upper() for name in self._info.stages}
                widgets.toggle(names, stage, lambda event: self._choose(event.value))

    def _draw_figures(self) -> None:
        figures = self._figure_texts()
        if figures == self._shown:
            return
        self._shown = figures
        self._figures.clear()
        with self._figures:
            for name, text in figures:
                with ui.element("div"):
                    ui.label(name).classes("z-figure-name")
                    label = ui.label(text).classes("z-figure")
                    if text == self._studio.say(STATES[self._info.state]):
                        label.classes(f"z-{self._info.state}")
        self._trouble.clear()
        if self._info.why:
            with self._trouble:
                if self._info.state == "failed":
                    widgets.error_card(self._studio, self._info.why)
                else:
                    widgets.note_card(self._studio.error(self._info.why))

    def _figure_texts(self) -> list[tuple[str, str]]:
        say, info = self._studio.say, self._info
        figures = [(say("State"), say(STATES[info.state]))]
        if (metrics := self._metrics) is not None and metrics.last:
            last, total = metrics.last, metrics.total_steps()
            step = f"{last['step']:,}" if total is None else f"{last['step']:,} / {total:,}"
            figures.append((f"{self._stage.upper()} {say('step')}", step))
            figures += [(say(name), text(last)) for name, key, text in _FIGURES if key in last]
            left = metrics.seconds_left() if info.state == "running" else None
            if left is not None and (written := age(metrics.folder.metrics)) is not None:
                figures.append((say("Stage done at"), _clock(end_of(left, written))))
        if info.hours is not None:
            figures.append((say("Time so far, h:min"), hours_text(info.hours)))
        if info.best_loss is not None:
            figures.append((say("Best validation loss"), f"{info.best_loss:.4g}"))
        if info.exam_gain is not None:
            figures.append((say("Exam gain, points"), gain_text(info.exam_gain)))
        return figures

    def _draw_charts(self) -> None:
        """Draw the curves anew, the more points they have the more seldom."""
        metrics = self._metrics
        if metrics is None or not self._charts_stale:
            return
        pause = min(_PAUSE + len(metrics.points.get("loss", ())) / _POINTS_A_SECOND, _SLOWEST)
        if self._info.state == "running" and time.monotonic() < self._charts_drawn + pause:
            return
        self._charts_drawn, self._charts_stale = time.monotonic(), False
        for title, curves in CHARTS.items():
            data, faint, dots = self._chart_data(metrics, curves)
            if not data:
                continue
            made = self._charts.get(title)
            if made is not None and [each["name"] for each in made.options["series"]] == list(data):
                widgets.draw(made, data, self._points())
                continue
            if made is not None:
                widgets.remove_chart(made)
            with self._curves:
                name = self._studio.say(title)
                self._charts[title] = widgets.chart(
                    name, data, x=self._studio.say("step"), faint=faint, dots=dots, most=self._points()
                )

    def _points(self) -> int:
        """How many points of a curve are drawn: fewer while they change, because NiceGUI copies each of them."""
        return _LIVE_POINTS if self._info.state == "running" else MOST_POINTS

    def _chart_data(
        self, metrics: LiveMetrics, curves: _Curves
    ) -> tuple[dict[str, Sequence[Point]], list[str], list[str]]:
        """The curves by name, those to draw pale, and those to draw with dots."""
        say = self._studio.say
        data: dict[str, Sequence[Point]] = {}
        faint, dots = [], []
        for label, metric, smooth in curves:
            points = metrics.points.get(metric, [])
            if not points:
                continue
            name = say(label)
            if not smooth:
                data[name] = points
                if metric.startswith("eval_"):
                    dots.append(name)
                continue
            if (smooth_points := smoothed(points)) == points:
                data[name] = points
                continue
            raw = say("{name}, each step", name=name)
            data[raw] = points
            data[say("{name}, smoothed", name=name)] = smooth_points
            faint.append(raw)
        return data, faint, dots

    async def _draw_texts(self) -> None:
        """Warnings, and the end of the log."""
        say = self._studio.say
        warnings = await run.io_bound(_warnings, self._info, self._studio) or []
        if warnings != self._warned:
            self._warned = warnings
            self._warnings.clear()
            with self._warnings, widgets.section(say("Warnings")):
                for text in warnings:
                    widgets.note_card(text)
        log = await run.io_bound(end_of_log, self._info.folder) or ""
        log = "\n".join(log.splitlines()[-_LOG_LINES:]).strip("\n")
        if log == self._logged:
            return
        self._logged = log
        self._log.clear()
        if log:
            with self._log, widgets.section(say("End of the log")):
                widgets.code(log).classes("z-log")


def _warnings(info: RunInfo, studio: Studio) -> list[str]:
    """The warnings of all stages in the page's language, the newest first; one that was given again only once."""
    texts: dict[str, None] = {}
    for name in info.stages:
        path = info.folder.stage(name).warnings
        if not is_readable(info.path, path):
            continue
        lines = [line for text in text_lines(path.read_text("utf-8", "replace")) if (line := _line(text)) is not None]
        for notice in notices_of([line.get("text") for line in lines], lines):
            text = notice.text(studio.language) if isinstance(notice, Notice) else studio.error(notice)
            texts[f"{name.upper()}: {text}"] = None
    return list(reversed(texts))[:_MOST_WARNINGS]


def _line(text: str) -> Any:
    try:
        values = parse_json(text)
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def _clock(moment: float) -> str:
    """A moment of today as `23:40`, of another day with its date."""
    today = time.strftime("%Y-%m-%d") == time.strftime("%Y-%m-%d", time.localtime(moment))
    return time.strftime("%H:%M" if today else "%Y-%m-%d %H:%M", time.localtime(moment))


# Name, metric, and how the last step's value is written.
_FIGURES: Sequence[tuple[str, str, Callable[[Mapping[str, Any]], str]]] = (
    (worded("Loss"), "loss", lambda last: f"{last['loss']:.4g}"),
    (worded("Tokens per second"), "tokens_per_second", lambda last: f"{last['tokens_per_second']:,.0f}"),
    (worded("Peak memory"), "peak_memory_gb", lambda last: f"{last['peak_memory_gb']:.2f} GB"),
    (worded("Reward accuracies"), "rewards/accuracies", lambda last: f"{last['rewards/accuracies']:.0%}"),
)
