"""The page Export: the formats of a run with what was measured of them, and the command that writes more."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nicegui import ui

from mlx_zh.errors import MlxZhError
from mlx_zh.recipe import Recipe
from mlx_zh.reporting.messages import named
from mlx_zh.reporting.words import points
from mlx_zh.stages.exporting import FORMATS, Exported, Room, Wish, exported, is_damaged, places, room
from mlx_zh.stages.placing import Place
from mlx_zh.stages.run_list import RunInfo
from mlx_zh.studio import processes, widgets
from mlx_zh.studio.kept import Kept, stamp
from mlx_zh.studio.projects import Studio
from mlx_zh.studio.run_choice import chosen_run, named_from, project_of, recipe_of, stage_name
from mlx_zh.studio.texts import worded
from mlx_zh.studio.threads import in_thread
from mlx_zh.system.json_text import read_object
from mlx_zh.system.redaction import hide

_USES = {
    "mlx": worded("For Macs: mlx-lm, LM Studio, and chat with mlx-zh."),
    "gguf": worded("For Ollama, LM Studio and llama.cpp, on any computer."),
    "hf": worded("In 16 bits, for transformers, vLLM and further training. The largest."),
    "mlx-adapter": worded("The adapter alone, for mlx-lm with the same base model."),
    "peft": worded("The adapter alone, for transformers with PEFT, and for vLLM."),
    "gguf-lora": worded("The adapter alone, for llama.cpp with a GGUF file of the base model."),
}
_GGUF_TYPES = (
    *("q8_0", "q4_1", "q4_0", "q5_0", "q5_1", "f16", "bf16"),
    *("q4_k_m", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs"),
)
_RECOVERABLE = ("", "q4_1")  # the types of GGUF files whose rounding can keep the tuning
_PROGRAMS = {"ollama": "Ollama", "lmstudio": "LM Studio"}
_LINES = 10  # of the log
_SAID = 4000  # bytes of the log that are read for them

_rooms: Kept[Room] = Kept(16)


async def export_page(studio: Studio) -> None:
    """Draw the page."""
    info = await chosen_run(
        studio, "/export", studio.say("Export"), lambda one: one.folder.newest_adapter() is not None
    )
    if info is None:
        return
    recipe = await in_thread(lambda: (recipe_of(info),))
    _Export(studio, info, recipe[0]).draw()


class _Export:
    """What a run has exported, and the form for more."""

    def __init__(self, studio: Studio, info: RunInfo, recipe: Recipe | None) -> None:
        self._studio, self._info, self._recipe = studio, info, recipe
        self._project = project_of(studio, info)
        self._target = named_from(self._project, info.path)
        formats: tuple[str, ...] = ("mlx",) if recipe is None else recipe.export.formats
        recover = recipe is not None and recipe.export.recover
        self._wish = Wish(formats, recover=recover)
        self._started: tuple[object, bool] | None = None  # the summary before the export, and whether we began it
        self._asked = 0  # how often the space was asked for

    def draw(self) -> None:
        """Draw the page's parts."""
        self._results = ui.element("div").classes("z-column")
        self._draw_results()
        if self._recipe is None or self._info.folder.newest_adapter() is None:
            return
        self._draw_form(self._recipe)
        self._draw_programs(self._recipe)
        widgets.while_visible(1.0, self._watch)
        ui.timer(0, self._measure, once=True)

    # What is there ---------------------------------------------------------------------------------------------

    def _draw_results(self) -> None:
        say, found = self._studio.say, exported(self._info.folder)
        self._results.clear()
        with self._results:
            if is_damaged(self._info.folder):
                widgets.note_card(say("The summary of the exports is damaged; the next export writes it again."))
            elif not found:
                widgets.empty(say("Nothing is exported yet"), self._what_to_do())
            if found:
                with ui.element("div").classes("z-grid"):
                    for one in found:
                        self._draw_result(one)
                text = worded(
                    "KL divergence in nats per token and agreement in the likeliest token are measured on held-out "
                    "text, against base model and adapter side by side."
                )
                ui.label(say(text)).classes("z-note")

    def _what_to_do(self) -> str:
        say = self._studio.say
        if self._info.folder.newest_adapter() is None:
            return say("This run has no trained adapter yet. It can be exported when a training stage is finished.")
        if self._recipe is None:
            return say("The recipe in this run cannot be read, so it cannot be exported here.")
        return say("Choose formats below. The run itself does not change.")

    def _draw_result(self, one: Exported) -> None:
        say = self._studio.say
        with ui.element("div").classes("z-card z-column"):
            with ui.element("div").classes("z-row"):
                ui.label(one.kind).classes("z-section-title")
                ui.label(hide(one.detail)).classes("z-note z-grow")
                ui.label(_size(one.size)).classes("z-section-title")
            ui.label(say(_USES[one.kind])).classes("z-note")
            figures = self._figures(one)
            with ui.element("div").classes("z-figures") as place:
                place.set_visibility(bool(figures))
                for name, value in figures:
                    with ui.element("div"):
                        ui.label(name).classes("z-figure-name")
                        ui.label(value).classes("z-figure")
            for delta in one.exams:
                text = worded("{exam}: {points} points [{low}, {high}] against {stage}; {won} won, {lost} lost")
                ends = {
                    "low": points(delta.low, 1),
                    "high": points(delta.high, 1),
                    "points": points(delta.difference),
                }
                stage = stage_name(self._studio, delta.against)
                ui.label(
                    say(text, exam=hide(delta.exam), stage=stage, won=delta.won, lost=delta.lost, **ends)
                ).classes("z-text")
            if not one.is_here:
                ui.label(say("Its folder is no longer in the run.")).classes("z-state z-stopped")
            elif not one.is_current:
                ui.label(say("It was made of an earlier adapter; export again.")).classes("z-state z-stopped")
            else:
                widgets.code(named_from(self._project, self._info.folder.fused / one.kind))
            for sentence in (*one.warnings, *([one.unmeasured] if one.unmeasured else [])):
                ui.label(hide(self._studio.error(sentence))).classes("z-note z-text")

    def _figures(self, one: Exported) -> list[tuple[str, str]]:
        """The figures that were measured, with their names."""
        say = self._studio.say
        llama = one.in_llama_cpp
        figures = [
            ("KL", None if one.kl is None else f"{one.kl:.4f}"),
            (say("Top-1 agreement"), None if one.top1 is None else f"{one.top1:.1%}"),
            (
                named("perplexity").in_language(self._studio.language),
                None if one.perplexity is None else f"{one.perplexity:.3f}",
            ),
            (say("Change kept"), None if one.kept is None else f"{one.kept:.0%}"),
            (say("In llama.cpp"), None if llama is None else f"{llama[0]:.4f} / {llama[1]:.1%}"),
        ]
        return [(name, value) for name, value in figures if value is not None]

    # What is wanted --------------------------------------------------------------------------------------------

    def _draw_form(self, recipe: Recipe) -> None:
        say = self._studio.say
        with widgets.section(say("New export")), ui.element("div").classes("z-card z-column"):
            with ui.element("div").classes("z-formats"):
                for kind in FORMATS:
                    with ui.element("div"):
                        chosen = kind in self._wish.formats
                        ui.checkbox(kind, value=chosen, on_change=partial(self._choose_format, kind)).props("dense")
                        ui.label(say(_USES[kind])).classes("z-note z-indent")
            with ui.element("div").classes("z-row"):
                types = {"": say("As recommended"), **{kind: kind for kind in _GGUF_TYPES}}
                self._type = ui.select(types, value="", label=say("GGUF type"), on_change=self._changed("gguf_type"))
                self._type.props("dense outlined options-dense").classes("z-pick")
                name = ui.input(
                    label=say("Name"), placeholder=recipe.export.name or recipe.name, on_change=self._changed("name")
                )
                name.props("dense outlined debounce=400 stack-label").classes("z-pick")
                self._recover = ui.switch(
                    say("Round so that few bits keep the tuning (takes minutes)"),
                    value=self._wish.recover,
                    on_change=self._changed("recover"),
                )
            self._command = ui.element("div")
            self._space = ui.label("").classes("z-note")
            with ui.element("div").classes("z-row"):
                self._button = ui.button(say("Export"), icon="ios_share", on_click=partial(self._start, ""))
                self._button.props("unelevated no-caps")
                self._stop = ui.button(say("Stop"), icon="stop", on_click=self._ask_to_stop).props("outline no-caps")
                self._stop.set_visibility(False)
            self._progress = ui.element("div").classes("z-column")
        self._show_command()

    def _choose_format(self, kind: str, event: Any) -> None:
        chosen = set(self._wish.formats) ^ {kind} if event.value != (kind in self._wish.formats) else None
        if chosen is not None:
            self._change(formats=tuple(one for one in FORMATS if one in chosen))

    def _changed(self, field: str) -> Any:
        return lambda event: self._change(**{field: event.value or type(getattr(self._wish, field))()})

    def _change(self, **fields: Any) -> None:
        self._wish = replace(self._wish, **fields)
        self._show_command()
        ui.timer(0, self._measure, once=True)

    @property
    def _final(self) -> Wish:
        """The wish without what does not apply to its formats."""
        wish = self._wish
        recovers = "mlx" in wish.formats or ("gguf" in wish.formats and wish.gguf_type in _RECOVERABLE)
        return replace(wish, recover=wish.recover and recovers, name=wish.name.strip())

    def _command_of(self, wish: Wish) -> processes.Command:
        return processes.Command(("-m", "mlx_zh.fuse", self._target, *wish.words()), self._project)

    def _show_command(self) -> None:
        wish = self._final
        self._type.set_enabled("gguf" in wish.formats)
        self._command.clear()
        with self._command:
            if wish.formats:
                widgets.code(self._command_of(wish).text)
            else:
                ui.label(self._studio.say("Choose a format.")).classes("z-note")

    async def _measure(self) -> None:
        """Ask how much space the export needs; only the newest answer is shown."""
        wish, say = self._final, self._studio.say
        self._asked += 1
        asked = self._asked
        if not wish.formats:
            self._button.set_enabled(False)
            self._space.set_text("")
            return
        self._space.set_text(say("Computing the disk space …"))
        found = await in_thread(self._room, wish)
        if asked != self._asked or self._space.is_deleted:
            return
        free = f"{found.free / 1e9:,.1f} GB"
        if found.needed is None:
            text = say("{free} are free. How much is needed shows when the export begins.", free=free)
            text += f" {hide(self._studio.error(found.reason))}" if found.reason else ""
        elif found.is_enough:
            text = say("Needs at most {needed}; {free} are free.", needed=_size(found.needed), free=free)
        else:
            text = say("Needs {needed}, and only {free} are free.", needed=_size(found.needed), free=free)
        self._space.set_text(text)
        self._button.set_enabled(found.is_enough)

    def _room(self, wish: Wish) -> Room:
        """The space for an export; what it needs is remembered, what is free is not."""
        run = self._info.folder
        key = (self._info.key, wish.formats, wish.gguf_type, wish.recover)
        kept = _rooms.get(key, [run.recipe], lambda: room(run, self._target, wish, self._project))
        return replace(kept, free=_free(run.path))

    # Programs --------------------------------------------------------------------------------------------------

    def _draw_programs(self, recipe: Recipe) -> None:
        say = self._studio.say
        with widgets.section(say("Use it in a program")), ui.element("div").classes("z-grid"):
            for place in places(self._info.folder, recipe):
                with ui.element("div").classes("z-card z-column"):
                    ui.label(_PROGRAMS[place.program]).classes("z-section-title")
                    self._draw_program(place)

    def _draw_program(self, place: Place) -> None:
        say, program = self._studio.say, _PROGRAMS[place.program]
        folder = self._info.folder.fused / place.readable[0]
        wish = Wish((place.readable[0],), to=place.program)
        if place.installed:
            text = worded("Writes {format}, and puts it into {program} as {name}.")
            ui.label(say(text, format=place.readable[0], program=program, name=place.name)).classes("z-note")
            widgets.code(self._command_of(wish).text)
            with ui.element("div").classes("z-row"):
                again = ui.switch(say("Replace a model of this name"))
                put = ui.button(
                    say("Put into {program}", program=program),
                    on_click=lambda: self._start(place.program, replacing=bool(again.value)),
                )
                put.props("unelevated no-caps")
            return
        text = worded("{program} is not installed here. Install it and start it once; then this page has a button.")
        ui.label(say(text, program=program)).classes("z-note")
        if not folder.is_dir():
            text = worded("Or export {format} first, and then run these commands where {program} is:")
        else:
            text = worded("Or run these commands where {program} is:")
        ui.label(say(text, format=place.readable[0], program=program)).classes("z-note")
        shown = folder.relative_to(self._project) if folder.is_relative_to(self._project) else folder
        widgets.code("\n".join(place.steps(Path(shown))))

    # At work ---------------------------------------------------------------------------------------------------

    async def _start(self, program: str, *, replacing: bool = False) -> None:
        wish = self._final
        if program:
            readable = next(
                place.readable for place in places(self._info.folder, self._checked()) if place.program == program
            )
            kind = next((kind for kind in readable if kind in wish.formats), readable[0])
            wish = replace(wish, formats=(kind,), to=program, replace=replacing)
        if processes.running(self._info.folder) is not None:
            ui.notify(self._studio.say("A command is at work in this run already."))
            return
        if not (await in_thread(self._room, wish)).is_enough:
            ui.notify(self._studio.say("There is not enough disk space."))
            return
        before = stamp(self._info.folder.fused_summary)
        try:
            language = {"MLX_ZH_LANG": self._studio.language}
            await in_thread(processes.start, self._info.folder, self._command_of(wish), language)
        except MlxZhError as error:
            with self._progress:
                widgets.error_card(self._studio, error)
            return
        self._started = before, True
        await self._watch()

    def _checked(self) -> Recipe:
        assert self._recipe is not None
        return self._recipe

    async def _ask_to_stop(self) -> None:
        await in_thread(processes.stop, self._info.folder)

    async def _watch(self) -> None:
        """Show how far the command in the run folder is, and what came out when it has ended."""
        run = self._info.folder
        now, said = await in_thread(lambda: (processes.running(run), processes.end_of_log(run, _SAID)))
        if self._progress.is_deleted:
            return
        exporting = now is not None and "mlx_zh.fuse" in now.command
        self._stop.set_visibility(exporting)
        self._button.set_visibility(now is None)
        if now is not None:
            self._started = self._started or (stamp(run.fused_summary), exporting)
            text = (
                worded("Exporting …")
                if exporting
                else worded("A command is at work in this run; export when it is done.")
            )
            self._show_progress(self._studio.say(text), said if exporting else "")
        elif self._started is not None:
            before, exporting = self._started
            self._started = None
            if not exporting:
                self._progress.clear()
                return
            done = stamp(run.fused_summary) != before and not run.ended.exists()
            why = (read_object(run.ended) or {}).get("why")
            text = worded("The export is done.") if done else worded("The export ended without a result.")
            head = self._studio.say(text) + (
                f" {self._studio.error(why)}" if isinstance(why, str) and not done else ""
            )
            self._show_progress(head, said)
            self._draw_results()

    def _show_progress(self, head: str, said: str) -> None:
        lines = [line for line in said.splitlines() if line.strip()]
        self._progress.clear()
        with self._progress:
            ui.label(hide(head)).classes("z-text")
            if lines:
                widgets.code(hide("\n".join(lines[-_LINES:])))


def _free(path: Path) -> int:
    import shutil

    return shutil.disk_usage(path).free


def _size(size: float | None) -> str:
    if size is None:
        return "–"
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
