"""An answer on the Talk page: its text as safe Markdown, its reasoning folded, and what can be done with it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from nicegui import background_tasks, ui

from mlx_zh.studio.conversation import Answer
from mlx_zh.studio.projects import Studio
from mlx_zh.studio.safe_markdown import safe_html
from mlx_zh.studio.texts import worded


class Stop(Protocol):
    """Stops the answer that is written."""

    def __call__(self, *, all: bool) -> Awaitable[bool]: ...


_PAUSE = 0.12  # seconds between two drawings of an answer that is written
_ENDS = {"length": worded("cut off at the longest length"), "stopped": worded("stopped")}


class AnswerCard:
    """Draws an answer, and again when it changed. `title` is the stage's name, or A and B."""

    def __init__(self, studio: Studio, answer: Answer, title: str, *, stop: Stop, figures: bool = True) -> None:
        self._studio, self.answer, self._figures = studio, answer, figures
        self._drawn, self._pending = 0.0, False
        self.actions: Callable[[], None] = lambda: None  # draws the buttons of a complete answer
        with ui.element("article").classes("z-card z-answer") as self.card:
            with ui.element("div").classes("z-answer-head"):
                self._title = ui.label(title).classes("z-answer-title")
                self._state = ui.label().classes("z-note z-grow")
                self._stop = icon_button("stop_circle", studio.say("Stop this answer"), lambda: stop(all=False))
            self._thought = ui.expansion(studio.say("Reasoning")).props("dense dense-toggle").classes("z-thought")
            with self._thought:
                self._thought_text = ui.label().classes("z-text z-note")
            # The only HTML that holds a model's words: `safe_html` escapes them, and writes the tags itself.
            self._text = ui.html("", sanitize=False).classes("z-answer-text")
            self._error = ui.label().classes("z-text z-answer-error").props('role="alert"')
            self._foot = ui.element("div").classes("z-answer-foot")
        self.draw()

    def rename(self, title: str) -> None:
        """Give the card another title."""
        self._title.set_text(title)

    def show(self) -> None:
        """Draw soon: an answer changes with each token, and a page needs not."""
        if self.answer.state != "writing":
            self.draw()
        elif not self._pending:
            self._pending = True
            background_tasks.create(self._later())

    async def _later(self) -> None:
        await asyncio.sleep(max(0.0, self._drawn + _PAUSE - time.monotonic()))
        self._pending = False
        if not self.card.is_deleted:
            self.draw()

    def draw(self) -> None:
        """Draw it as it is now."""
        self._drawn = time.monotonic()
        answer, studio = self.answer, self._studio
        thought, text, thinking = answer.parts
        self._thought.set_visibility(bool(thought) or thinking)
        self._thought.set_text(
            studio.say("Reasoning …") if thinking and answer.state == "writing" else studio.say("Reasoning")
        )
        self._thought_text.set_text(thought)
        self._text.set_content(safe_html(text) if text.strip() else "")
        self._error.set_text(answer.error)
        self._error.set_visibility(bool(answer.error))
        self._state.set_text(self._said())
        self._stop.set_visibility(answer.state == "writing")
        self._foot.clear()
        if answer.state in ("done", "stopped", "failed"):
            with self._foot:
                if self._figures and answer.statistics:
                    ui.label(self._costs()).classes("z-note z-grow")
                else:
                    ui.element("div").classes("z-grow")
                self.actions()

    def _said(self) -> str:
        answer, studio = self.answer, self._studio
        if answer.state == "waiting":
            return studio.say("waiting …")
        if answer.state == "writing":
            return "" if answer.text else studio.say("reading …")
        if answer.said == "edited":
            return studio.say("edited by you")
        if answer.state == "done" and not answer.text.strip():
            return studio.say("no answer")
        if answer.state == "stopped" and not answer.statistics:
            return studio.say("stopped")
        return ""

    def _costs(self) -> str:
        values, studio = self.answer.statistics, self._studio
        seed = self.answer.origin.seed if self.answer.origin else None
        parts = [
            studio.say("{count} tokens", count=values["generated"]),
            studio.say("{speed} tokens/s", speed=f"{values['tokens_per_second']:.1f}"),
        ]
        if seed is not None:
            parts.append(studio.say("seed {seed}", seed=seed))
        if values["reason"] in _ENDS:
            parts.append(studio.say(_ENDS[values["reason"]]))
        if self.answer.dropped:
            parts.append(studio.say("the oldest {count} rounds left the context", count=self.answer.dropped))
        return " · ".join(parts)


def icon_button(icon: str, name: str, work: Callable[[], object], *, on: bool = False) -> ui.button:
    """A small button with an icon, a name for screen readers, and a tooltip; `on`: it is pressed."""
    button = ui.button(icon=icon, on_click=work).props(
        f"flat round dense size=sm color={'primary' if on else 'grey'}"
    )
    button.props["aria-label"] = name
    button.props["aria-pressed"] = "true" if on else "false"
    return button.tooltip(name)


def bring_into_view(element: Any) -> None:
    """Scroll to an element."""
    ui.run_javascript(f"getElement({element.id}).$el?.scrollIntoView({{behavior: 'smooth', block: 'start'}})")
