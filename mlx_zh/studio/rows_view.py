"""The prepared rows of a stage: filters, search, and the tokens of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from nicegui import run, ui

from mlx_zh.errors import MlxZhError
from mlx_zh.stages.prepared_rows import (
    ONLY,
    ORDERS,
    Part,
    PreparedData,
    Row,
    Search,
    View,
    pieces,
    preview,
)
from mlx_zh.stages.showing import visible
from mlx_zh.studio import widgets
from mlx_zh.studio.paging import page_numbers
from mlx_zh.studio.projects import Studio
from mlx_zh.studio.texts import worded
from mlx_zh.studio.threads import in_thread
from mlx_zh.system.redaction import hide

_PAGE = 20  # rows drawn at once
_TOKENS = 400  # tokens of a part that are drawn at once
_SPLITS = {"train": worded("Training"), "validation": worded("Validation")}
_ORDERS = dict(zip(ORDERS, (worded("As trained"), worded("Longest first"), worded("Shortest first")), strict=True))
_ONLY = dict(zip(ONLY, (worded("All"), worded("Cut short"), worded("Good"), worded("Bad")), strict=True))
ROLES = {
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


class RowsView:
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
                        ui.label(("\n" if place else "") + say(ROLES[part.role]) + " ").classes("z-span z-role")
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
        ui.label(say("{role}, {count} tokens", role=say(ROLES[self._part.role]), count=count)).classes("z-role")
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
