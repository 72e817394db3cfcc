"""The page Talk: the stages of a run answer the same question side by side, or blind against each other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nicegui import background_tasks, context, run, ui

from mlx_zh.errors import MlxZhError
from mlx_zh.recipe import Recipe
from mlx_zh.stages.command import find_recipe
from mlx_zh.stages.run_folder import TUNED, RunFolder
from mlx_zh.stages.run_list import RunInfo
from mlx_zh.stages.talking import base_of
from mlx_zh.studio import widgets
from mlx_zh.studio.conversation import Column
from mlx_zh.studio.frame import address
from mlx_zh.studio.projects import Studio
from mlx_zh.studio.run_choice import no_run
from mlx_zh.studio.talk_blind import BlindView
from mlx_zh.studio.talk_rounds import RoundsView
from mlx_zh.studio.talk_settings import SettingsView
from mlx_zh.studio.talk_status import StatusView
from mlx_zh.studio.talker import LONGEST, Question, Settings, Talker, Talkers
from mlx_zh.studio.texts import worded
from mlx_zh.system.crashes import record_crash

TALKERS = Talkers()  # of all tabs
_NAMES = {"base": worded("Base"), "sft": "SFT", "dpo": "DPO"}
_MOST_COLUMNS = 4

Shown = Callable[[int], None]

# A Chinese input method takes Enter to finish a word; only an Enter of its own sends.
_ENTER = """(event) => { if (event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    emit(event.target.value);
}"""


@dataclass(frozen=True)
class Choice:
    """A stage that can answer."""

    run: Path
    stage: str
    label: str

    @property
    def column(self) -> Column:
        """An empty conversation with it."""
        return Column(self.run, self.stage, self.label)


@dataclass
class Talk:
    """What one visit of the page works with."""

    studio: Studio
    info: RunInfo
    recipe: Recipe
    choices: dict[str, Choice]  # by an id for the page
    talker: Talker
    at_work: list[Path] = field(default_factory=list)
    _answering: int | None = None  # the id of the answer that is written
    _stopped: bool = False

    @property
    def names_at_work(self) -> list[str]:
        """The runs at work."""
        return [path.name for path in self.at_work]

    async def look(self) -> None:
        """See which runs are at work now."""
        runs = await run.io_bound(self.studio.runs) or []
        self.at_work = [info.path for info in runs if info.state == "running"]

    async def answers(self, columns: Sequence[Column], text: str, settings: Settings, show: Shown) -> None:
        """Ask columns one after the other: `show` is called with a column's number when its answer changed.

        An error becomes the answer's, and `stop` makes what is written the answer.
        """
        seed = settings.drawn_seed()
        questions = [column.ask(text, settings, seed) for column in columns]
        self._stopped = False
        try:
            for number, (column, question) in enumerate(zip(columns, questions, strict=True)):
                if self._stopped:
                    return
                await self._take(column, question, lambda number=number: show(number))  # type: ignore[misc]
        finally:
            for number, column in enumerate(columns):
                if column.answers[-1].state in ("waiting", "writing"):
                    column.stopped()
                show(number)

    async def _take(self, column: Column, question: Question, show: Callable[[], None]) -> None:
        show()
        try:
            await TALKERS.make_room(self.talker)
            async for event in self.talker.ask(question, self.at_work):
                if event["is"] == "begin":
                    self._answering = event["id"]
                column.heard(event)
                show()
        except MlxZhError as error:
            column.failed(self.studio.error(error))
        finally:
            self._answering = None

    async def stop(self, *, all: bool) -> bool:
        """Stop the answer that is written, and with `all` those that wait; false if none has begun."""
        self._stopped = self._stopped or all
        if self._answering is None:
            return False
        await self.talker.stop(self._answering)
        return True


async def talk_page(studio: Studio) -> None:
    """Draw the page."""
    widgets.heading(studio.say("Talk"), studio.say("The same question to the model before and after tuning"))
    runs = await run.io_bound(studio.runs) or []
    infos = {info.key: info for info in runs if info.folder.recipe.is_file()}
    if not infos:
        no_run(
            studio,
            studio.say("There is no run to talk with yet"),
            studio.say("As soon as a run has begun, its base model answers here, and later its tuned models too."),
        )
        return
    chosen = studio.query.get("run") or next(iter(infos))
    info = studio.run(chosen)
    blind = studio.query.get("mode") == "blind"
    with ui.element("div").classes("z-row"):
        options = {key: one.name for key, one in infos.items()}
        ui.select(
            options,
            value=chosen if chosen in options else None,
            label=studio.say("Run"),
            on_change=lambda event: ui.navigate.to(_address(event.value, blind)),
        ).props("outlined dense options-dense").classes("z-talk-run")
        chooser = ui.element("div").classes("z-row z-talk-chooser")
        modes = {False: studio.say("Side by side"), True: studio.say("Blind arena")}
        widgets.toggle(modes, blind, lambda event: ui.navigate.to(_address(info.key, event.value)))
    talk = await run.io_bound(_opened, studio, info, list(infos.values()))
    assert talk is not None
    settings = SettingsView(studio, talk.recipe, talk.talker)
    with ui.element("div").classes("z-row z-talk-line") as line:
        status = StatusView(studio, talk)
    if blind:
        BlindView(talk, settings, status, Composer).draw(chooser)
    else:
        RoundsView(talk, settings, status, Composer, _MOST_COLUMNS).draw(chooser, line)
    ui.timer(0, status.check, once=True)


def _address(key: str, blind: bool) -> str:
    return address("/talk", run=key, mode="blind") if blind else address("/talk", run=key)


def _opened(studio: Studio, info: RunInfo, infos: Sequence[RunInfo]) -> Talk:
    """The run's recipe, and the stages that can answer: its own, and those of other runs over the same base."""
    recipe = find_recipe(str(info.path))
    folder = _started_in(info.path, studio.folders)
    choices: dict[str, Choice] = {}
    for one in (info, *(other for other in infos if other.key != info.key)):
        try:
            other = recipe if one is info else find_recipe(str(one.path))
        except MlxZhError:
            continue
        if base_of(other) != base_of(recipe) or _started_in(one.path, studio.folders) != folder:
            continue
        for stage in ("base", *TUNED):
            if stage == "base" and one is not info:
                continue
            if stage == "base" or RunFolder(one.path).stage(stage).has_adapter:
                label = studio.say(_NAMES[stage])
                named = label if one is info else f"{one.name} {label}"
                choices[f"{one.key}-{stage}"] = Choice(one.path, stage, named)
    talker = TALKERS.of((folder, *base_of(recipe)), info.path, folder)
    return Talk(studio, info, recipe, choices, talker)


def _started_in(path: Path, folders: Sequence[Path]) -> Path:
    """The folder that the paths in a run's recipe are relative to: the one that holds `runs`."""
    if path.parent.name == "runs":
        return path.parent.parent
    return next((folder for folder in folders if path.is_relative_to(folder) and path != folder), path.parent)


class Composer:
    """The field for a question, with the buttons to send it and to stop; `send` answers the text."""

    def __init__(self, talk: Talk, send: Callable[[str], Awaitable[None]], examples: Sequence[str]) -> None:
        self._talk, self._studio, self._send = talk, talk.studio, send
        self._task: asyncio.Task[None] | None = None
        self._client = context.client
        with ui.element("div").classes("z-composer"):
            if examples:
                with ui.element("div").classes("z-examples"):
                    for text in examples:
                        self._example(text)
            with ui.element("div").classes("z-composer-row"):
                self.field = ui.textarea(placeholder=self._studio.say("Ask something"))
                self.field.props(f"outlined autogrow dense rows=1 maxlength={LONGEST}").classes("z-grow")
                self.field.on("keydown.enter", lambda event: self.send(str(event.args)), js_handler=_ENTER)
                self._go = ui.button(icon="arrow_upward", on_click=lambda: self.send(self.field.value or ""))
                self._go.props("unelevated round").props["aria-label"] = self._studio.say("Send")
                self._stop = ui.button(icon="stop", on_click=self.stop)
                self._stop.props("unelevated round color=negative").props["aria-label"] = self._studio.say("Stop")
                self._stop.set_visibility(False)
        self._client.on_delete(self.cancel)

    def _example(self, text: str) -> None:
        button = ui.button(on_click=lambda: self.send(text)).props("outline rounded no-caps dense color=grey")
        with button.classes("z-example"):
            ui.label(text)

    @property
    def busy(self) -> bool:
        """Whether an answer is written."""
        return self._task is not None and not self._task.done()

    def send(self, text: str) -> None:
        """Send a question, unless one is being answered."""
        if not self.busy and text.strip():
            self.field.set_value("")
            self.work(self._send(text.strip()))

    def work(self, answering: Awaitable[None]) -> None:
        """Let something be answered; the button stops it."""

        async def work() -> None:
            self._show(True)
            with self._client:
                try:
                    await answering
                except MlxZhError as error:
                    ui.notify(self._studio.error(error), type="negative", multi_line=True)
                except Exception as error:
                    ui.notify(self._studio.error(record_crash(error)), type="negative", multi_line=True, timeout=0)
                finally:
                    self._show(False)

        self._task = background_tasks.create(work())

    async def stop(self) -> None:
        """Stop what is answered; what there is of the answer stays."""
        if self.busy and not await self._talk.stop(all=True):
            self.cancel()

    def cancel(self) -> None:
        """Stop at once: nobody looks any more, or nothing has begun."""
        if self._task is not None:
            self._task.cancel()

    def _show(self, busy: bool) -> None:
        self._go.set_visibility(not busy)
        self._stop.set_visibility(busy)
