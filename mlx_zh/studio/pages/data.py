"""The page Data: the prepared rows as the model is trained on them, and those that were left out."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from nicegui import ui

from mlx_zh.errors import MlxZhError
from mlx_zh.reporting import data_view
from mlx_zh.reporting.charts import Histogram
from mlx_zh.reporting.findings import Findings, listed, mapped
from mlx_zh.stages.prepared_rows import (
    PreparedData,
    open_prepared,
    reports,
)
from mlx_zh.stages.run_list import RunInfo
from mlx_zh.studio import widgets
from mlx_zh.studio.kept import Kept
from mlx_zh.studio.left_out_view import LeftOutView
from mlx_zh.studio.projects import Studio
from mlx_zh.studio.rows_view import RowsView
from mlx_zh.studio.run_choice import chosen_run, named_from, project_of, recipe_of, stage_name
from mlx_zh.studio.texts import worded
from mlx_zh.studio.threads import in_thread
from mlx_zh.system.redaction import hide_all

_opened: Kept[PreparedData] = Kept(2)


async def data_page(studio: Studio) -> None:
    """Draw the page."""
    info = await chosen_run(studio, "/data", studio.say("Data"), lambda one: one.folder.prepared.exists())
    if info is None:
        return
    found = reports(info.folder)
    if not found:
        _draw_empty(studio, info)
        return
    place = ui.element("div").classes("z-column")

    def show(stage: str) -> None:
        place.clear()
        with place:
            _draw_stage(studio, info, stage, found[stage])

    asked = studio.query.get("stage", "")
    first = asked if asked in found else next(iter(found))
    if len(found) > 1:
        names = {stage: stage_name(studio, stage) for stage in found}
        widgets.toggle(names, first, lambda event: show(event.value))
        place.move(target_index=-1)
    show(first)


def _draw_empty(studio: Studio, info: RunInfo) -> None:
    if info.folder.prepared.exists():
        widgets.note_card(
            studio.say("The report of the prepared data is damaged; the next `mlx-zh prepare` writes it.")
        )
    hint = worded("Data is prepared when a run begins, or with this command:")
    if info.state == "running":
        hint = worded("The run has just begun. Its data appears here as soon as it is prepared. The command alone:")
    target = named_from(project_of(studio, info), info.path)
    widgets.empty(studio.say("This run has no prepared data yet"), studio.say(hint), f"mlx-zh prepare {target}")


def _draw_stage(studio: Studio, info: RunInfo, stage: str, report: Mapping[str, Any]) -> None:
    shown = data_view.stages(Findings(info.name, data=hide_all({stage: report})))
    if shown:
        _draw_report(studio, shown[0], report)
    place = ui.element("div").classes("z-column")
    with place:
        ui.label(studio.say("Opening the rows …")).classes("z-note")

    async def fill() -> None:
        try:
            data = await in_thread(_open, studio, info, stage)
        except MlxZhError as error:
            place.clear()
            with place:
                widgets.error_card(studio, error)
            return
        if place.is_deleted:
            return
        place.clear()
        with place:
            RowsView(studio, data).draw()
            LeftOutView(studio, data, report).draw()

    ui.timer(0, fill, once=True)


def _open(studio: Studio, info: RunInfo, stage: str) -> PreparedData:
    folder = info.folder

    def make() -> PreparedData:
        return open_prepared(folder, stage, recipe_of(info), project_of(studio, info))

    return _opened.get((info.key, stage), [folder.prepared, folder.recipe], make)


def _draw_report(studio: Studio, shown: data_view.StageData, report: Mapping[str, Any]) -> None:
    with ui.element("div").classes("z-card z-facts"):
        for name, value in shown.facts:
            with ui.element("div"):
                ui.label(name.in_language(studio.language)).classes("z-figure-name")
                ui.label(value.in_language(studio.language)).classes("z-text")
    if shown.sources:
        heads = [text.in_language(studio.language) for text in data_view.source_columns()]
        names = [f"c{number}" for number in range(len(heads))]
        columns = [
            {"name": name, "label": head, "field": name, "align": "right" if 0 < number < 4 else "left"}
            for number, (name, head) in enumerate(zip(names, heads, strict=True))
        ]
        rows = [
            dict(zip(names, (cell.in_language(studio.language) for cell in row), strict=True)) | {"key": number}
            for number, row in enumerate(shown.sources)
        ]
        widgets.table(columns, rows)
    _draw_quality(studio, report)
    if shown.lengths is not None:
        _draw_lengths(studio, shown.lengths)


def _draw_quality(studio: Studio, report: Mapping[str, Any]) -> None:
    """Rows with a fault, by source and rule."""
    for source in map(mapped, listed(report.get("sources"))):
        faults = [
            f"{rule} {facts.get('rows'):,}/{facts.get('checked'):,}"
            for rule, facts in ((rule, mapped(facts)) for rule, facts in mapped(source.get("quality")).items())
            if isinstance(facts.get("rows"), int) and isinstance(facts.get("checked"), int) and facts.get("rows")
        ]
        if faults:
            text = studio.say(
                "Rows with faults in {source}: {faults}", source=source.get("name"), faults=", ".join(faults)
            )
            ui.label(text).classes("z-note")


def _draw_lengths(studio: Studio, lengths: Histogram) -> None:
    edges = [f"{edge:,.0f}" for edge in lengths.edges]
    bars = {
        "title": {
            "text": lengths.title.in_language(studio.language),
            "textStyle": {"fontSize": 13, "color": "#8b919a"},
        },
        "grid": {"left": 52, "right": 14, "top": 34, "bottom": 26},
        "animation": False,
        "tooltip": {"trigger": "axis", "confine": True},
        "xAxis": {"type": "category", "data": [f"{a}–{b}" for a, b in pairwise(edges)]},
        "yAxis": {"type": "value", "splitNumber": 3, "splitLine": {"lineStyle": {"color": "rgba(128,128,128,.15)"}}},
        "series": [{"type": "bar", "data": list(lengths.counts), "itemStyle": {"color": widgets.COLOURS[0]}}],
    }
    ui.echart(bars).classes("z-chart").style("height: 170px")
