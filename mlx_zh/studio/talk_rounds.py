"""The Talk page side by side: each question with the answers of all columns below it, and what is said of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from nicegui import run, ui

from mlx_zh.errors import MlxZhError
from mlx_zh.studio.conversation import Answer, Column, Judge, comparable, diverged
from mlx_zh.studio.talk_card import AnswerCard, bring_into_view, icon_button
from mlx_zh.studio.talk_settings import SettingsView
from mlx_zh.studio.talk_status import StatusView

if TYPE_CHECKING:
    from mlx_zh.studio.pages.talk import Talk

Best = int | Literal["both", "neither"]


@dataclass
class Round:
    """A question, its columns, and the cards of their answers."""

    text: str
    columns: list[Column]
    cards: list[AnswerCard] = field(default_factory=list)
    best: Best | None = None
    vote: Any = None  # the element with the vote
    place: Any = None


class RoundsView:
    """The conversation of all columns."""

    def __init__(
        self, talk: Talk, settings: SettingsView, status: StatusView, composer: Callable[..., Any], most: int
    ) -> None:
        self._talk, self._settings, self._status, self._most = talk, settings, status, most
        self._studio, self._composer_of = talk.studio, composer
        self._columns: dict[str, Column] = {}
        self._rounds: list[Round] = []
        self._judge = Judge(talk.info.folder.feedback)
        self._one_by_one = asyncio.Lock()  # what is said of answers is written one after the other

    def draw(self, chooser: Any, line: Any) -> None:
        """Draw the chooser, the place of the conversation, and the field for a question."""
        studio, choices = self._studio, self._talk.choices
        own = [id for id, choice in choices.items() if choice.run == self._talk.info.path]
        names = {id: choice.label for id, choice in choices.items()}
        with chooser:
            pick = ui.select(
                names,
                value=own,
                multiple=True,
                label=studio.say("Who answers"),
                on_change=lambda e: self._choose(e.value),
            )
            pick.props(f"use-chips outlined dense options-dense max-values={self._most}").classes("z-talk-columns")
        with line:
            new = ui.button(studio.say("New conversation"), icon="restart_alt", on_click=self._clear)
            new.props("flat no-caps dense size=sm color=grey")
        self._choose(own)
        if own == [f"{self._talk.info.key}-base"]:
            ui.label(studio.say("This run has no tuned model yet, so only its base answers.")).classes("z-note")
        self._place = ui.element("div").classes("z-rounds")
        examples = [sample.prompt for sample in self._talk.recipe.sample_prompts()][:8]
        self._composer = self._composer_of(self._talk, self._ask, examples)

    def _choose(self, ids: list[str]) -> None:
        kept = {id: self._columns.get(id) or self._talk.choices[id].column for id in ids if id in self._talk.choices}
        self._columns = dict(list(kept.items())[: self._most])

    def _clear(self) -> None:
        self._composer.cancel()
        self._columns = {id: self._talk.choices[id].column for id in self._columns}
        self._rounds = []
        self._place.clear()

    async def _ask(self, text: str) -> None:
        await self._talk.look()
        columns = list(self._columns.values())
        if not columns:
            ui.notify(self._studio.say("Choose first who answers."))
            return
        if not await self._status.admits():
            return
        await self._answer(text, columns)

    async def _answer(self, text: str, columns: list[Column]) -> None:
        for older in self._rounds[-1:]:
            self._finish(older)
        one = Round(text, columns)
        self._rounds.append(one)
        with self._place, ui.element("section").classes("z-round") as one.place:
            ui.label(text).classes("z-asked z-text")
            grid = ui.element("div").classes("z-answers").style(f"--columns: {len(columns)}")
            one.vote = ui.element("div").classes("z-vote")
        with grid:
            for column in columns:
                card = AnswerCard(self._studio, Answer(), column.label, stop=self._talk.stop)
                card.actions = partial(self._actions, one, column, card)
                one.cards.append(card)
        bring_into_view(one.place)
        try:
            await self._talk.answers(columns, text, self._settings.now, partial(_show, one))
        finally:
            self._draw_vote(one)

    def _finish(self, one: Round) -> None:
        """An older round can be read and copied; only the last one is judged."""
        for card in one.cards:
            card.actions = partial(self._copy_button, card)
            card.draw()
        one.vote.clear()
        if one.best is not None:
            with one.vote:
                ui.label(self._recorded(one)).classes("z-note")

    def _copy_button(self, card: AnswerCard) -> None:
        icon_button("content_copy", self._studio.say("Copy"), lambda: self._copy(card.answer.parts[1]))

    def _copy(self, text: str) -> None:
        ui.clipboard.write(text)
        ui.notify(self._studio.say("Copied"), timeout=1200)

    def _actions(self, one: Round, column: Column, card: AnswerCard) -> None:
        studio, answer = self._studio, card.answer
        self._copy_button(card)
        if answer.complete and answer.said != "edited":
            judgements: tuple[tuple[Literal["good", "bad"], str, str], ...] = (
                ("good", "thumb_up", studio.say("Good")),
                ("bad", "thumb_down", studio.say("Bad")),
            )
            for said, icon, name in judgements:
                pressed = answer.said == said
                icon_button(icon, name, partial(self._say, card, said), on=pressed)
            icon_button("edit", studio.say("Edit: what it should have been"), lambda: self._edit(one, column, card))
        if len(one.columns) > 1 and answer.text.strip() and not column.transcript.pending:
            icon_button(
                "call_split", studio.say("Go on from this answer in all columns"), lambda: self._go_on(one, column)
            )
        icon_button("refresh", studio.say("Ask all again"), lambda: self._again(one))

    async def _say(self, card: AnswerCard, said: Literal["good", "bad"]) -> None:
        async with self._one_by_one:
            await self._write(self._judge.say, card.answer, said)
            card.draw()

    async def _write(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Write a judgement, which waits for the disk."""
        await run.io_bound(work, *arguments)

    async def _say_better(self, one: Round, best: Best) -> None:
        """Write which answer is better, once: of two clicks, the second comes while the first is written."""
        async with self._one_by_one:
            if one.best is None:
                await self._write(self._judge.better, one.columns, best)
                one.best = best
                self._draw_vote(one)

    def _edit(self, one: Round, column: Column, card: AnswerCard) -> None:
        studio = self._studio
        with ui.dialog() as dialog, ui.element("div").classes("z-card z-edit"):
            ui.label(studio.say("What the answer should have been")).classes("z-section-title")
            ui.label(
                studio.say("It is recorded as the better answer, and this conversation goes on from it.")
            ).classes("z-note")
            text = ui.textarea(value=card.answer.text).props("outlined autogrow autofocus").classes("z-edit-text")
            with ui.element("div").classes("z-row z-end"):
                ui.button(studio.say("Cancel"), on_click=dialog.close).props("flat no-caps color=grey")

                async def save() -> None:
                    try:
                        async with self._one_by_one:
                            if card.answer.said != "edited":
                                await self._write(self._judge.edit, column, text.value)
                    except MlxZhError as error:
                        ui.notify(self._studio.error(error), type="warning")
                        return
                    dialog.close()
                    card.draw()
                    self._draw_vote(one)

                ui.button(studio.say("Record"), on_click=save).props("unelevated no-caps")
        dialog.open()

    def _go_on(self, one: Round, column: Column) -> None:
        for other in one.columns:
            if other is not column:
                other.go_on_from(column)
        ui.notify(self._studio.say("All columns go on from the answer of {name}.", name=column.label))

    def _again(self, one: Round) -> None:
        if self._composer.busy or one is not self._rounds[-1]:
            return
        for column in one.columns:
            column.retract()
        self._rounds.pop()
        one.place.delete()
        self._composer.work(self._answer(one.text, one.columns))

    def _draw_vote(self, one: Round) -> None:
        """The buttons to say which answer is better; after that, what was said, and the way back."""
        one.vote.clear()
        studio = self._studio
        with one.vote:
            if one.best is not None:
                ui.label(self._recorded(one)).classes("z-note")
                undo = ui.button(studio.say("Take back"), icon="undo", on_click=lambda: self._take_back(one))
                undo.props("flat no-caps dense size=sm color=grey")
            elif comparable(one.columns) and not any(card.answer.said == "edited" for card in one.cards):
                ui.label(studio.say("Which is better?")).classes("z-note")
                for index, column in enumerate(one.columns):
                    self._vote_button(one, column.label, index)
                both = studio.say("Both good") if len(one.columns) == 2 else studio.say("All good")
                neither = studio.say("Neither good") if len(one.columns) == 2 else studio.say("None good")
                self._vote_button(one, both, "both")
                self._vote_button(one, neither, "neither")
            elif diverged(one.columns):
                text = studio.say(
                    "The conversations differ by now. To compare again, go on from one answer in all columns, or "
                    "begin a new conversation."
                )
                ui.label(text).classes("z-note")

    def _vote_button(self, one: Round, text: str, best: Best) -> None:
        ui.button(text, on_click=lambda: self._say_better(one, best)).props("outline no-caps dense").classes(
            "z-vote-button"
        )

    async def _take_back(self, one: Round) -> None:
        async with self._one_by_one:
            if one.best is not None:
                await self._write(self._judge.take_back, one.columns, one.best)
                one.best = None
                self._draw_vote(one)

    def _recorded(self, one: Round) -> str:
        studio = self._studio
        if isinstance(one.best, int):
            return studio.say("Recorded: {name} is better", name=one.columns[one.best].label)
        return studio.say("Recorded: all good") if one.best == "both" else studio.say("Recorded: none good")


def _show(one: Round, number: int) -> None:
    card = one.cards[number]
    card.answer = one.columns[number].answers[-1]
    card.show()
