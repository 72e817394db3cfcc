"""The page Runs: every run folder with its state and main figures."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from nicegui import run, ui

from mlx_zh.stages.run_list import RunInfo
from mlx_zh.studio import widgets
from mlx_zh.studio.frame import address
from mlx_zh.studio.projects import Studio
from mlx_zh.studio.run_choice import no_run
from mlx_zh.studio.texts import worded

STATES: Mapping[str, str] = {
    "running": worded("Running"),
    "done": worded("Done"),
    "stopped": worded("Stopped"),
    "failed": worded("Failed"),
    "waiting": worded("Not trained yet"),
}
_NUMBERS = {"hours": worded("Hours"), "best_loss": worded("Best loss"), "exam_gain": worded("Exam gain")}
_SECONDS = 3.0  # between looks at the folders
_REST = 50  # times as long as the last look took is the pause at least: a training run needs the processor


def runs_page(studio: Studio) -> None:
    """Draw the page, and fill it when the folders are read."""
    _Runs(studio)


class _Runs:
    """The page: a table with search and selection, or what to do where there is no run."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        say = studio.say
        with ui.element("div").classes("z-row"):
            with ui.element("div").classes("z-grow"):
                widgets.heading(say("Runs"))
            self._compare = ui.button(say("Compare"), on_click=self._open_comparison).props("outline no-caps")
            ui.button(say("New run"), on_click=lambda: ui.navigate.to("/new")).props("unelevated no-caps")
        self._hint = ui.label().classes("z-note")
        self._place = ui.element("div")
        self._table: ui.table | None = None
        self._drawn = False
        self._next_look = 0.0  # by the monotonic clock
        self._show_choice()
        widgets.while_visible(_SECONDS, self._refresh)

    async def _refresh(self) -> None:
        started = time.monotonic()
        if started < self._next_look:
            return
        runs = await run.io_bound(self._studio.runs)
        if runs is None:  # the studio is closing
            return
        rows = [_row(self._studio, info) for info in runs]
        self._next_look = time.monotonic() + _REST * (time.monotonic() - started)
        if self._table is not None:
            if rows != self._table.rows:
                self._table.rows = rows
        elif rows:
            self._place.clear()
            with self._place:
                self._table = self._draw(rows)
        elif not self._drawn:
            with self._place:
                no_run(self._studio)
        self._drawn = True
        if outside := len(self._studio.projects.outside()):
            self._hint.text = self._studio.say(
                "{count} run folders here are links that lead elsewhere. To see them, start the studio with their "
                "own folder.",
                count=outside,
            )

    def _draw(self, rows: list[dict[str, Any]]) -> ui.table:
        say = self._studio.say
        columns = [
            _column("name", say("Run")),
            _column("state", say("State")),
            _column("model", say("Model")),
            _column("data", say("Data")),
            *(_column(name, say(title), align="right") for name, title in _NUMBERS.items()),
            _column("changed", say("Last written"), align="right"),
        ]
        search = ui.input(placeholder=say("Search")).props("dense outlined clearable").classes("z-search")
        search.props["aria-label"] = say("Search")
        table = widgets.table(
            columns, rows, selection="multiple", pagination={"rowsPerPage": 25}, on_select=self._show_choice
        )
        table.props(':grid="Quasar.Screen.lt.sm" :rows-per-page-options="[25, 50, 100, 0]"')
        table.props["no-data-label"] = table.props["no-results-label"] = say("No run matches the search.")
        table.bind_filter_from(search, "value", backward=lambda text: text or "")
        table.add_slot("body-cell-name", _NAME)
        table.add_slot("body-cell-state", _STATE)
        for name in ("model", "data"):
            table.add_slot(f"body-cell-{name}", _CUT.replace("FIELD", name))
        for name in (*_NUMBERS, "changed"):
            table.add_slot(f"body-cell-{name}", _TEXT.replace("FIELD", name))
        table.add_slot("item", _CARD)
        return table

    def _chosen(self) -> list[str]:
        return [] if self._table is None else [str(row["key"]) for row in self._table.selected]

    def _show_choice(self) -> None:
        count = len(self._chosen())
        self._compare.set_enabled(count >= 2)
        text = self._studio.say("Compare {count}", count=count) if count else self._studio.say("Compare")
        self._compare.text = text
        self._compare.props["title"] = (
            "" if count >= 2 else self._studio.say("Choose two runs or more to compare them.")
        )

    def _open_comparison(self) -> None:
        ui.navigate.to(address("/compare", runs=",".join(self._chosen())))


# Templates of cells. `{{ … }}` is text to Vue: nothing in a name becomes markup.
_NAME = '<q-td :props="props"><a class="z-link" :href="props.row.link">{{ props.row.name }}</a></q-td>'
_STATE = (
    '<q-td :props="props"><span :class="\'z-state z-\' + props.row.state" :title="props.row.why">'
    "{{ props.row.state_text }}</span></q-td>"
)
_CUT = '<q-td :props="props"><div class="z-cut" :title="props.row.FIELD">{{ props.row.FIELD }}</div></q-td>'
_TEXT = '<q-td :props="props">{{ props.row.FIELD_text }}</q-td>'
_CARD = (
    '<div class="z-run"><div class="z-row"><q-checkbox dense v-model="props.selected" :aria-label="props.row.name" />'
    '<a class="z-link z-grow" :href="props.row.link">{{ props.row.name }}</a>'
    "<span :class=\"'z-state z-' + props.row.state\">{{ props.row.state_text }}</span></div>"
    '<div class="z-note" v-if="props.row.why">{{ props.row.why }}</div>'
    '<div class="z-note">{{ props.row.facts }}</div></div>'
)


def _column(name: str, label: str, align: str = "left") -> dict[str, Any]:
    return {"name": name, "label": label, "field": name, "align": align, "sortable": True}


def _row(studio: Studio, info: RunInfo) -> dict[str, Any]:
    """A row of the table: each figure as a number to sort by, and as text."""
    moment = time.localtime(info.changed)
    changed = time.strftime("%m-%d %H:%M" if moment[0] == time.localtime()[0] else "%Y-%m-%d", moment)
    separator = "、" if studio.language == "zh" else ", "
    texts = {
        "hours": hours_text(info.hours),
        "best_loss": "—" if info.best_loss is None else f"{info.best_loss:.3f}",
        "exam_gain": gain_text(info.exam_gain),
        "changed": changed,
    }
    facts = [studio.say("{name} {value}", name=studio.say(_NUMBERS[name]), value=texts[name]) for name in _NUMBERS]
    return {
        "key": info.key,
        "link": address("/run", run=info.key),
        "name": info.name,
        "state": info.state,
        "state_text": studio.say(STATES[info.state]),
        "why": studio.error(info.why) if info.why else "",
        "model": model_name(info) or "—",
        "data": separator.join(map(short, info.data)),
        "hours": info.hours,
        "best_loss": info.best_loss,
        "exam_gain": info.exam_gain,
        "changed": info.changed,
        "facts": " · ".join([model_name(info) or "—", *facts, changed]),
        **{f"{name}_text": text for name, text in texts.items()},
    }


def model_name(info: RunInfo) -> str:
    """The model's id, or the name of its folder."""
    model = info.model or ""
    return short(model) if model.startswith(("/", ".", "~")) else model


def short(name: str) -> str:
    """A data set's name, or the name of its file without the folders."""
    return name.rstrip("/").rpartition("/")[2] or name


def hours_text(hours: float | None) -> str:
    """Hours and minutes, `1:05`; a dash where nothing is known."""
    if hours is None:
        return "—"
    minutes = round(hours * 60)
    return f"{minutes // 60}:{minutes % 60:02}"


def gain_text(gain: float | None) -> str:
    """A difference of shares in points of a hundred, with its sign."""
    return "—" if gain is None else f"{100 * gain:+.1f}"
