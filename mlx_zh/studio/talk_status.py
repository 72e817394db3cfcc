"""The line of the Talk page that says what the model takes in memory, and offers to load it beside a training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nicegui import ui

from mlx_zh.errors import MlxZhError
from mlx_zh.studio import widgets
from mlx_zh.studio.projects import Studio

if TYPE_CHECKING:
    from mlx_zh.studio.pages.talk import Talk


class StatusView:
    """Whether the model is loaded, what it takes, and what is in the way."""

    def __init__(self, studio: Studio, talk: Talk) -> None:
        self._studio, self._talk = studio, talk
        self._agreed = False
        self._place = ui.element("div").classes("z-talk-status").props('role="status"')
        with self._place:
            ui.label(studio.say("Looking how much memory is free …")).classes("z-note")
        ui.timer(1.0, self._follow)
        self._shown: object = None

    @property
    def may_ask(self) -> bool:
        """Whether a question may load the model: beside a training run only after the user agreed."""
        return self._talk.talker.state in ("loading", "ready") or not self._talk.at_work or self._agreed

    async def admits(self) -> bool:
        """Whether a question may be asked now; if not, the page says why."""
        if not self.may_ask:
            ui.notify(self._studio.say("A training run is at work. Read the note above, and agree first."))
            await self.check()
            return False
        return True

    async def check(self) -> None:
        """See what runs, and how much memory talking takes beside it."""
        talk = self._talk
        await talk.look()
        try:
            await talk.talker.check(talk.at_work)
        except MlxZhError as error:
            self._refused(error)
            return
        self._shown = None
        self._follow()

    def _follow(self) -> None:
        """Show the talker's state where it changed."""
        talker, studio = self._talk.talker, self._studio
        state = (talker.state, str(talker.progress), tuple(self._talk.at_work), self._agreed)
        if state == self._shown or (talker.state == "off" and self._shown is None):
            return
        self._shown = state
        room = talker.room
        need, free = (room.need / 1e9, room.free / 1e9) if room else (0.0, 0.0)
        self._place.clear()
        with self._place:
            if talker.state == "checked" and not self.may_ask:
                self._offer(need, free)
            elif talker.state == "checked":
                text = studio.say(
                    "Takes about {need} GB of {free} GB free; loaded with the first question.", **_gb(need, free)
                )
                ui.label(text).classes("z-note")
            elif talker.state == "loading":
                ui.label(_progress(self._studio, talker.progress)).classes("z-note")
            elif talker.state == "ready":
                about = talker.about
                text = studio.say("{model} is loaded · {context} tokens of context", **_about(about))
                ui.label(text).classes("z-note")
            elif talker.state == "off":
                ui.label(studio.say("The model is not loaded; the next question loads it.")).classes("z-note")

    def _offer(self, need: float, free: float) -> None:
        studio = self._studio
        names = ", ".join(self._talk.names_at_work)
        text = studio.say(
            "A training run is at work: {names}. Talking takes about {need} GB beside it, and {free} GB are free. "
            "Both become slower.",
            names=names,
            **_gb(need, free),
        )
        with widgets.note_card(text):
            ui.button(studio.say("Talk all the same"), on_click=self._agree).props("outline no-caps dense").classes(
                "q-mt-sm"
            )

    def _agree(self) -> None:
        self._agreed = True
        self._follow()

    def _refused(self, error: MlxZhError) -> None:
        self._shown = "refused"
        self._place.clear()
        with self._place, widgets.error_card(self._studio, error):
            again = ui.button(self._studio.say("Look again"), on_click=self.check)
            again.props("outline no-caps dense").classes("q-mt-sm")


def _gb(need: float, free: float) -> dict[str, str]:
    return {"need": f"{need:.1f}", "free": f"{free:.1f}"}


def _about(about: dict[str, object]) -> dict[str, object]:
    model = str(about.get("model", ""))
    return {"model": Path(model).name if model.startswith("/") else model, "context": f"{about.get('context', 0):,}"}


def _progress(studio: Studio, progress: dict[str, object]) -> str:
    total, here = progress.get("total"), progress.get("here")
    if isinstance(total, int) and isinstance(here, int) and total and here < total:
        return studio.say(
            "Downloading {name}: {here} of {total} MB",
            name=progress.get("name"),
            here=f"{here / 1e6:,.0f}",
            total=f"{total / 1e6:,.0f}",
        )
    return studio.say("Loading the model …")
