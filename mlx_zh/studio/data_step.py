"""The part of the page New run that is about data: files dropped or chosen, their columns, samples of their rows."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nicegui import events, ui

from mlx_zh.errors import MlxZhError
from mlx_zh.studio import widgets
from mlx_zh.studio.draft import Draft
from mlx_zh.studio.projects import Studio
from mlx_zh.studio.texts import worded
from mlx_zh.studio.uploads import LARGEST, SUFFIXES, data_files, store

# Sends for each file that is refused in the browser by which check: accept, max-file-size, duplicate.
_REASONS = "(files) => emit(files.map((each) => each.failedPropValidation))"

# What a column can be, in the order of the form.
_ROLES = {
    "prompt": worded("Question"),
    "instruction": worded("Question"),
    "input": worded("Input"),
    "response": worded("Answer"),
    "output": worded("Answer"),
    "chosen": worded("Better answer"),
    "rejected": worded("Worse answer"),
    "system": worded("System prompt"),
    "label": worded("Good or bad"),
    "text": worded("Text"),
}


class DataStep:
    """Draws the files of a draft; `changed` is awaited when they change."""

    def __init__(self, studio: Studio, draft: Draft, changed: Callable[[], Awaitable[None]]) -> None:
        self._studio, self._draft, self._changed = studio, draft, changed
        self._errors = ui.element("div")
        self._draw_upload()
        with ui.element("div").classes("z-columns"):
            self._draw_choices()
        self._files = ui.element("div").classes("z-step")
        self._samples = ui.element("div").classes("z-step")

    def offer_sets(self, sets: Sequence[Mapping[str, Any]]) -> None:
        """Offer the public data sets."""
        self._sets.set_options({each["name"]: self._described(each) for each in sets})
        self._sets.set_value(list(self._draft.sets))

    def show(self, reports: Sequence[Mapping[str, Any]]) -> None:
        """Show what is in the files."""
        self._files.clear()
        with self._files:
            for number, report in enumerate(reports):
                self._draw_file(number, report)

    def show_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Show rows as the model will see them."""
        self._samples.clear()
        if not samples:
            return
        with self._samples:
            with ui.element("div").classes("z-row"):
                ui.label(self._studio.say("What the model sees. It learns to say the green parts.")).classes("z-note")
            for sample in samples:
                ui.label(sample["place"] + (f" · {sample['label']}" if sample["label"] else "")).classes("z-note")
                with ui.element("div").classes("z-sample"):
                    for text, learned in sample["parts"]:
                        ui.label(text).classes("z-span z-learned" if learned else "z-span")

    def _draw_upload(self) -> None:
        studio = self._studio
        upload = ui.upload(multiple=True, auto_upload=True, max_file_size=LARGEST, on_upload=self._store)
        upload.on("rejected", self._refuse, js_handler=_REASONS)
        upload.on("failed", self._failed, args=[])
        upload.on("finish", upload.reset, args=[])  # else the same file is refused when it is dropped again
        upload.classes("z-upload").props(f'accept="{",".join(SUFFIXES)}" flat')
        title = escape(studio.say("Drop a spreadsheet or a data file here, or click to choose one"))
        kinds = escape(
            studio.say("Excel, CSV, JSON, JSONL, Parquet, text; up to {size:g} GB", size=round(LARGEST / 1e9, 1))
        )
        # The wordings are this program's own, and escaped; no text of a file comes here.
        upload.add_slot(
            "header",
            '<div class="z-drop" role="button" tabindex="0" @keydown.enter="props.pickFiles">'
            '<q-uploader-add-trigger></q-uploader-add-trigger><q-icon name="upload_file"></q-icon>'
            f'<div class="z-drop-title">{title}</div><div class="z-drop-note">{kinds}</div></div>',
        )

    def _draw_choices(self) -> None:
        studio = self._studio
        here = data_files(self._draft.project)
        if here:
            self._here = ui.select(here, label=studio.say("Or a file of this folder"), on_change=self._choose_file)
            self._here.props("dense outlined options-dense")
        self._sets = ui.select(
            {}, label=studio.say("Or public data sets"), multiple=True, on_change=self._choose_sets
        )
        self._sets.props("dense outlined options-dense use-chips")

    def _described(self, entry: Mapping[str, Any]) -> str:
        rows = self._studio.say("{rows:,} rows", rows=entry["rows"]) if entry["rows"] else ""
        return " · ".join(part for part in (entry["name"], entry["kind"].upper(), rows, entry["note"]) if part)

    async def _store(self, event: events.UploadEventArguments) -> None:
        try:
            path = await store(self._draft.project, event.file.name, event.file.iterate(), event.file.size())
        except MlxZhError as error:
            self._say_error(error)
            return
        await self._add(str(path))

    def _refuse(self, event: events.GenericEventArguments) -> None:
        if set(event.args) == {"duplicate"}:  # it is on its way already
            return
        kinds = ", ".join(SUFFIXES)
        studio = self._studio
        self._say_error(
            studio.say(
                "This file was not taken: it is too large, or no data file. These can be used: {kinds}.", kinds=kinds
            )
        )

    def _failed(self) -> None:
        self._say_error(
            self._studio.say(
                "The file did not arrive. Drop it again; if it fails again, see whether the studio still runs and "
                "the disk has space."
            )
        )

    def _say_error(self, error: MlxZhError | str) -> None:
        self._errors.clear()
        with self._errors:
            widgets.error_card(self._studio, error)

    async def _add(self, path: str) -> None:
        self._errors.clear()
        if path not in [file["path"] for file in self._draft.files]:
            self._draft.files.append({"path": path})
            await self._changed()

    async def _choose_file(self, event: Any) -> None:
        if event.value and event.value in data_files(self._draft.project):
            self._here.set_value(None)
            await self._add(event.value)

    async def _choose_sets(self, event: Any) -> None:
        chosen = list(event.value or [])
        if chosen != self._draft.sets:
            self._draft.sets[:] = chosen
            await self._changed()

    def _draw_file(self, number: int, report: Mapping[str, Any]) -> None:
        studio = self._studio
        asks = bool(report["error"] and len(report["columns"]) > 1)
        with ui.element("div").classes("z-file" + (" z-file-bad" if report["error"] and not asks else "")):
            with ui.element("div").classes("z-row"):
                ui.icon("description").props("aria-hidden=true").style("font-size: 19px; color: var(--z-soft)")
                ui.label(Path(report["path"]).name).classes("z-file-name z-grow")
                if not report["error"]:
                    ui.label(self._counted(report)).classes("z-note")
                remove = ui.button(icon="close", on_click=lambda: self._remove(number))
                remove.props("flat dense round size=sm color=grey").props["aria-label"] = studio.say("Remove")
            if asks:
                ui.label(studio.say("Which column is the question, and which the answer?")).classes("z-too-large")
            elif report["error"]:
                ui.label(report["error"]).classes("z-text")
            self._draw_columns(number, report, asks)
            for line in report.get("remarks", ())[:_REMARKS]:
                ui.label(line).classes("z-note").style("white-space: pre-wrap")

    def _counted(self, report: Mapping[str, Any]) -> str:
        if report["usable"] == report["rows"]:
            return self._studio.say("{rows:,} rows", rows=report["rows"])
        return self._studio.say("{usable:,} of {rows:,} rows", usable=report["usable"], rows=report["rows"])

    def _draw_columns(self, number: int, report: Mapping[str, Any], asks: bool) -> None:
        mapping = report.get("mapping") or {}
        columns = report["columns"]
        if not columns or not (mapping or asks):
            return
        if report.get("basis") == "content":
            ui.label(self._studio.say("These columns are a guess. Look at the samples below.")).classes("z-note")
        roles = list(mapping) if mapping else ["prompt", "response"]
        roles += [role for role in ("rejected",) if not mapping and len(columns) > 2]
        options = {"": "—", **{name: f"{name}: {example}"[:70] for name, example in columns}}
        with ui.element("div").classes("z-columns"):
            for role in roles:
                title = self._studio.say(_ROLES[role]) if role in _ROLES else role
                value = mapping.get(role, "")
                made = ui.select(options, label=title, value=value if value in options else "")
                made.props("dense outlined options-dense")
                made.on_value_change(lambda event, role=role: self._map(number, mapping, role, event.value))

    async def _map(self, number: int, mapping: Mapping[str, str], role: str, column: str) -> None:
        """Take another column for a role; nothing is read before a question and an answer are named."""
        file = self._draft.files[number]
        wish = dict(file.get("wish") or mapping)
        wish.pop(role, None)
        if column:
            wish[role] = column
        file["wish"] = wish
        if "rejected" in wish and "response" in wish:
            wish = {"prompt": wish.get("prompt", ""), "chosen": wish["response"], "rejected": wish["rejected"]}
        if len([name for name in wish.values() if name]) >= min(2, max(len(mapping), 2)):
            file["columns"] = wish
            await self._changed()

    async def _remove(self, number: int) -> None:
        del self._draft.files[number]
        await self._changed()


_REMARKS = 12  # lines about a file
