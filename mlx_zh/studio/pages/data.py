"""The page Data: the prepared rows as the model is trained on them, and those that were left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from nicegui import run, ui

from mlx_zh.corpus.left_out import LeftOutRow
from mlx_zh.errors import MlxZhError
from mlx_zh.reporting import data_view
from mlx_zh.reporting.charts import Histogram
from mlx_zh.reporting.differences import marked
from mlx_zh.reporting.findings import Findings, listed, mapped
from mlx_zh.reporting.messages import named
from mlx_zh.stages.prepared_rows import (
    ONLY,
    ORDERS,
    Part,
    PreparedData,
    Row,
    Search,
    View,
    open_prepared,
    pieces,
    preview,
    reports,
)
from mlx_zh.stages.run_list import RunInfo
from mlx_zh.stages.showing import visible
from mlx_zh.studio import widgets
from mlx_zh.studio.kept import Kept
from mlx_zh.studio.paging import page_numbers
from mlx_zh.studio.projects import Studio
from mlx_zh.studio.run_choice import chosen_run, named_from, project_of, recipe_of, stage_name
from mlx_zh.studio.texts import worded
from mlx_zh.studio.threads import in_thread
from mlx_zh.system.redaction import hide, hide_all

_PAGE = 20  # rows drawn at once
_TOKENS = 400  # tokens of a part that are drawn at once
_LEFT_OUT = 6  # rows that were left out, drawn at once
_SPLITS = {"train": worded("Training"), "validation": worded("Validation")}
_ORDERS = dict(zip(ORDERS, (worded("As trained"), worded("Longest first"), worded("Shortest first")), strict=True))
_ONLY = dict(zip(ONLY, (worded("All"), worded("Cut short"), worded("Good"), worded("Bad")), strict=True))
_ROLES = {
    "conversation": worded("Conversation"),
    "branch": worded("Branch"),
    "prompt": worded("Prompt"),
    "chosen": worded("Chosen"),
    "rejected": worded("Rejected"),
    "answer": worded("Answer"),
    "system": worded("System"),
    "user": worded("User"),
    "assistant": worded("Assistant"),
    "tool": worded("Tool"),
    "tools": worded("Tools"),
    "text": worded("Text"),
    "question": worded("Exam question"),
}

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
            _Rows(studio, data).draw()
            _LeftOut(studio, data, report).draw()

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


class _Rows:
    """The rows of a stage: filters, search, and one page of them at a time."""

    def __init__(self, studio: Studio, data: PreparedData) -> None:
        self._studio, self._data = studio, data
        sizes = data.sizes()
        self._view = View(split=next(iter(sizes), "train"))
        self._numbers = np.empty(0, dtype=np.int64)
        self._words, self._page = "", 1
        self._search: Search | None = None

    def draw(self) -> None:
        """Draw the section."""
        say, data = self._studio.say, self._data
        with widgets.section(say("Rows")):
            if data.text is None:
                text = say("The model's tokenizer is not on this disk, so the tokens cannot be shown as text.")
                widgets.note_card(text)
            elif not data.same_tokenizer:
                text = say("The tokenizer or its settings have changed since; texts may not be what was trained.")
                widgets.note_card(text)
            with ui.element("div").classes("z-row"):
                self._draw_filters()
            self._note = ui.label("").classes("z-note")
            self._list = ui.element("div").classes("z-column")
        ui.timer(0, self._select, once=True)

    def _draw_filters(self) -> None:
        say, data = self._studio.say, self._data
        sizes = data.sizes()
        splits = {name: f"{say(_SPLITS[name])} ({count:,})" for name, count in sizes.items()}
        choices: list[tuple[str, str, Mapping[Any, str]]] = [
            ("split", say("Set"), splits),
            ("order", say("Order"), {order: say(label) for order, label in _ORDERS.items()}),
        ]
        only = {"sft": ("all", "cut short"), "kto": ("all", "good", "bad")}.get(data.kind, ())
        if only:
            choices.append(("only", say("Only"), {one: say(_ONLY[one]) for one in only}))
        if len(data.sources) > 1:
            names = {number: hide(name) for number, name in enumerate(data.sources)}
            choices.append(("source", say("Source"), {None: say("All"), **names}))
        for name, label, options in choices:
            value = getattr(self._view, name)
            picker = ui.select(dict(options), value=value, label=label, on_change=self._changed(name))
            picker.props("dense outlined options-dense").classes("z-short")
        search = ui.input(label=say("Search"), on_change=self._searched)
        search.props("dense outlined clearable debounce=400 type=search").classes("z-pick z-grow")
        search.set_enabled(data.text is not None)
        for label, words in ((say("Reasoning"), "<think>"), (say("Tools"), "tool_call")):
            ui.button(label, on_click=partial(search.set_value, words)).props("flat dense no-caps")

    def _changed(self, name: str) -> Any:
        async def change(event: Any) -> None:
            self._view = replace(self._view, **{name: event.value})
            await self._select()

        return change

    async def _searched(self, event: Any) -> None:
        self._words = (event.value or "").strip()
        await self._select()

    async def _select(self) -> None:
        self._page = 1
        if not self._words:
            self._search = None
            self._numbers = await in_thread(self._data.numbers, self._view)
            self._draw_page()
            return
        search = await in_thread(Search, self._data, self._view, self._words)
        self._search = search
        while search is self._search and not self._list.is_deleted:
            try:
                await run.io_bound(search.step)
            except MlxZhError as error:
                self._list.clear()
                with self._list:
                    widgets.error_card(self._studio, error)
                return
            if search is not self._search:  # another search was begun meanwhile
                return
            self._numbers = await in_thread(search.get_hits)
            self._draw_page()
            if search.done:
                return

    def _draw_page(self) -> None:
        if self._list.is_deleted:
            return
        say, first = self._studio.say, (self._page - 1) * _PAGE
        shown = [int(number) for number in self._numbers[first : first + _PAGE]]
        span = {"first": f"{first + 1:,}", "last": f"{first + len(shown):,}", "count": f"{len(self._numbers):,}"}
        note = say("{first} to {last} of {count} rows", **span) if shown else say("No row is like this.")
        if self._search is not None and not self._search.done:
            done = f"{self._search.looked_at / max(self._search.total, 1):.0%}"
            note = say("Searching, {done} …", done=done) + " " + note
        self._note.set_text(note)
        self._list.clear()
        with self._list:
            if shown:
                with ui.element("div").classes("z-card z-rows"):
                    for number in shown:
                        self._draw_row(number)
            page_numbers(self._page, len(self._numbers), _PAGE, self._turn)

    def _turn(self, page: int) -> None:
        self._page = page
        self._draw_page()

    def _draw_row(self, number: int) -> None:
        say = self._studio.say
        try:
            row = self._data.row(self._view.split, number)
        except MlxZhError as error:
            widgets.error_card(self._studio, error)
            return
        with ui.element("button").classes("z-shown-row").on("click", partial(self._open_row, row)):
            ui.label(f"{number + 1:,}").classes("z-note")
            with ui.element("div").classes("z-clamp"):
                for place, part in enumerate(row.parts[:3]):
                    if len(row.parts) > 1:
                        ui.label(("\n" if place else "") + say(_ROLES[part.role]) + " ").classes("z-span z-role")
                    _draw_runs(preview(self._data, part))
            facts = say("{tokens} tokens, {learned} learned", tokens=f"{row.tokens:,}", learned=f"{row.learned:,}")
            ui.label(facts + (" · " + say("Cut short") if row.cut_short else "")).classes("z-note")

    def _open_row(self, row: Row) -> None:
        say = self._studio.say
        with ui.dialog() as dialog, ui.element("div").classes("z-card z-dialog"):
            with ui.element("div").classes("z-row"):
                ui.label(
                    say("Row {number} of {source}", number=f"{row.number + 1:,}", source=hide(row.source))
                ).classes("z-section-title z-grow")
                close = ui.button(icon="close", on_click=dialog.close).props("flat dense round color=grey")
                close.props["aria-label"] = say("Close")
            facts = say("{tokens} tokens, {learned} learned", tokens=f"{row.tokens:,}", learned=f"{row.learned:,}")
            if row.label is not None:
                facts += " · " + say("Good" if row.label else "Bad")
            ui.label(facts).classes("z-note")
            with ui.element("div").classes("z-row"):
                ui.label(say("learned")).classes("z-span z-learned")
                ui.label(say("read only, without loss")).classes("z-span")
            for part in row.parts:
                _Tokens(self._studio, self._data, part).draw()
        dialog.on("hide", dialog.delete)
        dialog.open()


def _draw_runs(runs: Sequence[tuple[str, bool]]) -> None:
    for text, learned in runs:
        ui.label(visible(hide(text))).classes("z-span" + (" z-learned" if learned else ""))


class _Tokens:
    """A part of a row, token by token; a long one is drawn piece by piece."""

    def __init__(self, studio: Studio, data: PreparedData, part: Part) -> None:
        self._studio, self._data, self._part, self._drawn = studio, data, part, 0

    def draw(self) -> None:
        """Draw the part's name and its first tokens."""
        say = self._studio.say
        count = f"{len(self._part.tokens):,}"
        ui.label(say("{role}, {count} tokens", role=say(_ROLES[self._part.role]), count=count)).classes("z-role")
        self._place = ui.element("div").classes("z-tokens")
        self._more = ui.button(say("More"), on_click=self._draw_more).props("flat dense no-caps")
        self._draw_more()

    def _draw_more(self) -> None:
        with self._place:
            if self._data.text is None:
                ids = self._part.tokens[self._drawn : self._drawn + _TOKENS].tolist()
                ui.label(" ".join(map(str, ids)) + " ").classes("z-span")
            for piece in pieces(self._data, self._part, self._drawn, _TOKENS):
                token = ui.label(visible(piece.text)).classes("z-token" + (" z-learned" if piece.learned else ""))
                token.props["title"] = " ".join(map(str, piece.ids))
        self._drawn += _TOKENS
        self._more.set_visibility(self._drawn < len(self._part.tokens))


class _LeftOut:
    """The rows that were left out for what they resemble, by reason."""

    def __init__(self, studio: Studio, data: PreparedData, report: Mapping[str, Any]) -> None:
        self._studio, self._rows = studio, data.left_out()
        self._counts: Counter[str] = Counter()
        for source in map(mapped, listed(report.get("sources"))):
            for reason, count in mapped(source.get("dropped")).items():
                self._counts[reason] += count if isinstance(count, int) else 0

    def draw(self) -> None:
        """Draw the section; nothing where no row was left out."""
        say = self._studio.say
        if not self._counts:
            return
        with widgets.section(say("Left out")):
            if self._rows is None:
                text = worded("The texts of these rows were not kept, because an earlier version prepared this data.")
                ui.label(say(text)).classes("z-note")
            reasons = {row["reason"]: None for row in self._rows or ()}
            names = {reason: self._label(reason) for reason in [*reasons, *(self._counts.keys() - reasons.keys())]}
            self._place = ui.element("div").classes("z-column")
            first = next(iter(names))
            widgets.toggle(names, first, lambda event: self._show(event.value)).move(target_index=1)
            self._show(first)

    def _label(self, reason: str) -> str:
        return f"{named(reason).in_language(self._studio.language)} {self._counts[reason]:,}"

    def _show(self, reason: str, page: int = 1) -> None:
        rows = [row for row in self._rows or () if row["reason"] == reason]
        self._place.clear()
        with self._place:
            if not rows:
                text = worded("These rows resemble no other row; their places are in the report of `mlx-zh prepare`.")
                ui.label(self._studio.say(text)).classes("z-note")
                return
            if len(rows) < self._counts[reason]:
                shown, count = f"{len(rows):,}", f"{self._counts[reason]:,}"
                text = self._studio.say(
                    "The first {shown} of {count} are kept to be looked at.", shown=shown, count=count
                )
                ui.label(text).classes("z-note")
            for row in rows[(page - 1) * _LEFT_OUT : page * _LEFT_OUT]:
                self._draw_row(row)
            page_numbers(page, len(rows), _LEFT_OUT, partial(self._show, reason))

    def _draw_row(self, row: LeftOutRow) -> None:
        say = self._studio.say
        is_exam = row["overlap"] is not None
        heads = (say("Left out"), say("Exam question") if is_exam else say("Kept"))
        sides = ((row["row"], row["said"]), (row["like"], row["like_said"]))
        others = ["\n".join(turn["text"] for turn in said) for _, said in reversed(sides)]
        with ui.element("div").classes("z-card z-beside"):
            for head, (place, said), other in zip(heads, sides, others, strict=True):
                with ui.element("div"):
                    ui.label(f"{head}: {hide(place)}").classes("z-note")
                    for turn in said:
                        role = say(_ROLES[turn["role"]]) if turn["role"] in _ROLES else turn["role"]
                        with ui.element("div").classes("z-text"):
                            ui.label(role + (" " if len(role) == 1 else "\n")).classes("z-span z-role")
                            for text, same in marked(turn["text"], other):
                                is_marked = same if is_exam else not same
                                style = "z-span z-marked" if is_marked else "z-span"
                                ui.label(visible(hide(text))).classes(style)
            if row["overlap"] is not None:
                text = say("{share} of the question's letter groups are in the row.", share=f"{row['overlap']:.0%}")
                ui.label(text).classes("z-note z-across")
