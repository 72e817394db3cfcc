"""The Talk page's blind arena: two answers under A and B, a vote, then the names; and the tally with its interval."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from nicegui import run, ui

from mlx_zh.judging.contest import Contest
from mlx_zh.studio.blind import BlindArena, Choice
from mlx_zh.studio.conversation import Answer
from mlx_zh.studio.talk_card import AnswerCard, bring_into_view, icon_button
from mlx_zh.studio.talk_settings import SettingsView
from mlx_zh.studio.talk_status import StatusView

if TYPE_CHECKING:
    from mlx_zh.studio.pages.talk import Talk


class BlindView:
    """A prompt at a time."""

    def __init__(self, talk: Talk, settings: SettingsView, status: StatusView, composer: Callable[..., Any]) -> None:
        self._talk, self._settings, self._status = talk, settings, status
        self._studio, self._composer_of = talk.studio, composer
        self._cards: list[AnswerCard] = []
        self._one_by_one = asyncio.Lock()  # votes are written one after the other

    def draw(self, chooser: Any) -> None:
        """Draw the chooser, the tally, and the field for a question."""
        studio, choices = self._studio, self._talk.choices
        if len(choices) < 2:
            ui.label(studio.say("The arena needs two models, and this run has no tuned model yet.")).classes("z-note")
            return
        names = {id: choice.label for id, choice in choices.items()}
        own = [id for id, choice in choices.items() if choice.run == self._talk.info.path]
        self._ids = [own[0], own[-1] if len(own) > 1 else next(id for id in names if id != own[0])]
        with chooser:
            for number in (0, 1):
                label = studio.say("First model") if number == 0 else studio.say("Second model")
                pick = ui.select(names, value=self._ids[number], label=label)
                pick.props("outlined dense options-dense").classes("z-talk-side")
                pick.on_value_change(partial(self._choose, number))
        ui.label(
            studio.say("Which answer stands at A is random for each prompt. The names appear after the vote.")
        ).classes("z-note")
        self._tally = ui.element("div").classes("z-card z-tally").props('role="status"')
        self._place = ui.element("div").classes("z-rounds")
        examples = [sample.prompt for sample in self._talk.recipe.sample_prompts()][:8]
        self._composer = self._composer_of(self._talk, self._ask, examples)
        self._begin()

    def _choose(self, number: int, event: Any) -> None:
        self._ids[number] = event.value
        self._begin()

    def _begin(self) -> None:
        """Begin with two models."""
        self._composer.cancel()
        first, second = (self._talk.choices[id].column for id in self._ids)
        self._arena = BlindArena(self._talk.info.folder, (first, second))
        self._place.clear()
        ui.timer(0, self._count, once=True)

    async def _ask(self, text: str) -> None:
        await self._talk.look()
        if self._ids[0] == self._ids[1]:
            ui.notify(self._studio.say("Choose two different models."))
            return
        if not await self._status.admits():
            return
        arena = self._arena
        arena.next()
        self._place.clear()
        self._cards = []
        with self._place, ui.element("section").classes("z-round") as place:
            ui.label(text).classes("z-asked z-text")
            with ui.element("div").classes("z-answers").style("--columns: 2"):
                for name in "AB":
                    card = AnswerCard(self._studio, Answer(), name, figures=False, stop=self._talk.stop)
                    card.actions = partial(self._copy_button, card)
                    self._cards.append(card)
            self._vote = ui.element("div").classes("z-vote")
        bring_into_view(place)
        try:
            await self._talk.answers(arena.shown, text, self._settings.now, self._show)
        finally:
            self._draw_vote()

    def _show(self, number: int) -> None:
        card = self._cards[number]
        card.answer = self._arena.shown[number].answers[-1]
        card.show()

    def _copy_button(self, card: AnswerCard) -> None:
        def copy() -> None:
            ui.clipboard.write(card.answer.parts[1])
            ui.notify(self._studio.say("Copied"), timeout=1200)

        icon_button("content_copy", self._studio.say("Copy"), copy)

    def _draw_vote(self) -> None:
        studio, arena = self._studio, self._arena
        self._vote.clear()
        answers = [card.answer for card in self._cards]
        with self._vote:
            if arena.voted is not None:
                undo = ui.button(studio.say("Take back"), icon="undo", on_click=self._undo)
                undo.props("flat no-caps dense size=sm color=grey")
            elif not all(answer.complete for answer in answers):
                ui.label(studio.say("Both answers must be complete for a vote. Ask again.")).classes("z-note")
            elif answers[0].text.strip() == answers[1].text.strip():
                ui.label(studio.say("Both answers are the same, so there is nothing to choose.")).classes("z-note")
            else:
                choices: tuple[tuple[str, Choice], ...] = (
                    (studio.say("A is better"), "A"),
                    (studio.say("B is better"), "B"),
                    (studio.say("Both good"), "both"),
                    (studio.say("Neither good"), "neither"),
                )
                for text, choice in choices:
                    button = ui.button(text, on_click=partial(self._choose_answer, choice))
                    button.props("outline no-caps dense").classes("z-vote-button")

    async def _choose_answer(self, choice: Choice) -> None:
        async with self._one_by_one:
            if self._arena.voted is not None:  # the second of two clicks
                return
            await run.io_bound(self._arena.vote, choice)
        await self._shown(named=True)

    async def _undo(self) -> None:
        async with self._one_by_one:
            if self._arena.voted is None:
                return
            await run.io_bound(self._arena.undo)
        await self._shown(named=False)

    async def _shown(self, *, named: bool) -> None:
        for name, column, card in zip("AB", self._arena.shown, self._cards, strict=True):
            card.rename(f"{name} · {column.label}" if named else name)
        self._draw_vote()
        await self._count()

    async def _count(self) -> None:
        contest = await run.io_bound(self._arena.tally)
        self._tally.clear()
        with self._tally:
            if contest is not None:
                self._draw_tally(contest)

    def _draw_tally(self, contest: Contest) -> None:
        studio = self._studio
        first, second = (column.label for column in self._arena.columns)
        if contest.win_rate is None and not contest.tied:
            ui.label(studio.say("No votes yet. Ask something, and choose the better answer.")).classes("z-note")
            return
        with ui.element("div").classes("z-figures"):
            for name, count in ((first, contest.lost), (second, contest.won), (studio.say("Ties"), contest.tied)):
                with ui.element("div"):
                    ui.label(name).classes("z-figure-name")
                    ui.label(str(count)).classes("z-figure")
        if contest.win_rate is None:
            return
        low, high = contest.interval
        figures = {"rate": f"{contest.win_rate:.0%}", "low": f"{low:.0%}", "high": f"{high:.0%}"}
        rate = studio.say(
            "{name} wins {rate} of the votes that were no tie, 95 % interval {low} to {high}.", name=second, **figures
        )
        winner = second if contest.won > contest.lost else first
        verdict = (
            studio.say("That is within noise: either may be the better one.")
            if contest.noise
            else studio.say("{name} is better, by more than chance.", name=winner)
        )
        ui.label(f"{rate} {verdict}").classes("z-note")
