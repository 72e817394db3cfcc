"""The form of a recipe on the page, and its YAML beside it: each follows the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from nicegui import ui

from mlx_zh.errors import MlxZhError
from mlx_zh.recipe_text.values import inline
from mlx_zh.studio.draft import Draft
from mlx_zh.studio.projects import Studio
from mlx_zh.studio.recipe_check import Finding
from mlx_zh.studio.recipe_form import ASKED, FIRST, Field, fields
from mlx_zh.studio.texts import worded

_SECTIONS = {
    "model": worded("The base model"),
    "lora": worded("Adapters"),
    "data": worded("Data and how it is cleaned"),
    "sft": worded("SFT"),
    "dpo": worded("DPO"),
    "memory": worded("Memory"),
    "distributed": worded("Several machines"),
    "checkpoint": worded("Saving"),
    "evaluate": worded("Questions and exams"),
    "rounds": worded("Rounds"),
    "export": worded("Written models"),
    "": worded("The rest"),
}


class FormView:
    """Fields of the recipe's keys; `changed` is awaited after each change."""

    def __init__(self, studio: Studio, draft: Draft, changed: Callable[[], Awaitable[None]]) -> None:
        self._studio, self._draft, self._changed = studio, draft, changed
        self._views: dict[str, FieldView] = {}
        self._findings: Sequence[Finding] = ()

    def draw_first(self) -> None:
        """Draw the fields that people change first."""
        for key in FIRST:
            self._draw(fields()[key])

    def draw_rest(self) -> None:
        """Draw a fold for each section; its fields are drawn when it is opened."""
        by_section: dict[str, list[Field]] = defaultdict(list)
        for key, field in fields().items():
            if key not in FIRST and key not in ASKED:
                by_section[field.section].append(field)
        for section, title in _SECTIONS.items():
            self._draw_section(self._studio.say(title), by_section[section])

    def _draw_section(self, title: str, members: Sequence[Field]) -> None:
        with ui.expansion(title).classes("z-fold").props("dense") as fold:
            place = ui.element("div").classes("q-px-sm")

        def draw() -> None:
            if not place.default_slot.children and fold.value:
                with place:
                    for field in members:
                        self._draw(field)
                self.show(self._findings)

        fold.on_value_change(draw)

    def _draw(self, field: Field) -> None:
        self._views[field.key] = FieldView(self._studio, field, self._enter)

    def show(self, findings: Sequence[Finding]) -> None:
        """Show the draft's values, and each finding at its field."""
        self._findings = findings
        wrong = {finding.dotted: finding.text for finding in findings}
        for key, view in self._views.items():
            given = self._draft.has(key)
            value = self._draft.value(key) if given else view.field.default
            view.show(value, given, self._studio.error(wrong[key]) if key in wrong else "")

    async def _enter(self, field: Field, entered: Any) -> None:
        view = self._views[field.key]
        try:
            self._draft.set(field.key, field.read(entered), default=_plain(field.default))
        except MlxZhError as error:
            view.show_error(self._studio.error(error))
            return
        await self._changed()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class FieldView:
    """A field: its key, what it does, and an input for its value."""

    def __init__(self, studio: Studio, field: Field, enter: Callable[[Field, Any], Awaitable[None]]) -> None:
        self.field = field
        self._enter = enter
        self._filling = False
        with ui.element("div").classes("z-field") as self._place:
            with ui.element("div").classes("z-row"):
                ui.label(field.key).classes("z-field-key z-grow")
                self._input = self._made()
            ui.label(self._about(studio)).classes("z-field-about")
            self._error = ui.label("").classes("z-field-error")
            self._error.set_visibility(False)

    def _about(self, studio: Studio) -> str:
        field = self.field
        parts = [field.about(studio.language)]
        if field.limits and field.kind in ("number", "whole"):
            parts.append(studio.say("Range: {limits}.", limits=field.limits))
        if field.kind != "switch" and field.default not in (None, [], {}, ""):
            parts.append(studio.say("Default: {value}.", value=_short(field.shown(field.default))))
        return " ".join(parts) if studio.language == "en" else "".join(parts)

    def _made(self) -> Any:
        field = self.field
        label = f'aria-label="{field.key}"'  # a key has letters, digits, dots and underscores only
        if field.kind == "switch":
            return ui.switch(on_change=self._change).props(label)
        if field.kind in ("choice", "choices"):
            options = {value: "—" if value is None else str(value) for value in field.choices}
            several = field.kind == "choices"
            made = ui.select(options, multiple=several, on_change=self._change, value=[] if several else None)
            return made.props(f"dense outlined options-dense {label}").style("min-width: 136px; max-width: 100%")
        if field.kind == "long":
            area = ui.textarea(on_change=self._change)
            return area.props(f"dense outlined autogrow debounce=600 {label}").style("width: 100%")
        line = ui.input(on_change=self._change)
        return line.props(f"dense outlined debounce=600 {label}").style("width: 136px")

    async def _change(self, event: Any) -> None:
        if not self._filling:
            await self._enter(self.field, event.value)

    def show(self, value: Any, given: bool, error: str) -> None:
        """Show the value; `given` tells that the recipe sets it."""
        self._filling = True
        try:
            self._input.set_value(self._fitting(value))
        finally:
            self._filling = False
        self._place.classes(add="z-field-set" if given else "", remove="" if given else "z-field-set")
        self.show_error(error)

    def _fitting(self, value: Any) -> Any:
        """The value as the input takes it; nothing for one that it cannot show, which has an error then."""
        field = self.field
        if field.kind == "switch":
            return value is True
        if field.kind == "choice":
            return value if value in field.choices else None
        if field.kind == "choices":
            listed = [value] if isinstance(value, str) else value if isinstance(value, list) else []
            return [item for item in listed if item in field.choices]
        return field.shown(value)

    def show_error(self, text: str) -> None:
        """Say what is wrong with the field; "" for nothing."""
        self._error.text = text
        self._error.set_visibility(bool(text))


def _short(value: Any) -> str:
    return value if isinstance(value, str) else inline(value)


class YamlView:
    """The recipe's text in an editor, with what is wrong in it."""

    def __init__(self, studio: Studio, draft: Draft, changed: Callable[[], Awaitable[None]]) -> None:
        self._studio, self._draft, self._changed = studio, draft, changed
        self._editor: ui.codemirror | None = None
        with ui.element("div").classes("z-yaml-side"):
            self._place = ui.element("div").classes("z-yaml")
            self._findings = ui.element("div")

    async def open(self) -> None:
        """Make the editor once it can be seen: one that is made hidden measures its lines wrongly."""
        if self._editor is None:
            # The page may be dark because the system is, which only the browser knows.
            dark = await ui.run_javascript("document.body.classList.contains('body--dark')", timeout=10)
            with self._place:
                self._editor = ui.codemirror(
                    self._draft.text,
                    language="YAML",
                    theme="vscodeDark" if dark else "vscodeLight",
                    indent="  ",
                    on_change=self._change,
                )

    async def _change(self, event: Any) -> None:
        if event.value != self._draft.text:
            self._draft.edited(event.value)
            await self._changed()

    def show(self, findings: Sequence[Finding]) -> None:
        """Show the draft's text, and what is wrong in which line."""
        if self._editor is not None and self._editor.value != self._draft.text:
            self._editor.set_value(self._draft.text)
        self._findings.clear()
        with self._findings:
            for finding in findings[:20]:
                text = self._studio.error(finding.text)
                if finding.line and finding.line < 10**6:
                    text = self._studio.say("Line {line}: {text}", line=finding.line, text=text)
                ui.label(text).classes("z-finding")
