"""The page Exams: the tables of a run's exams, and every question with its four probabilities in each stage."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nicegui import ui

from mlx_zh.errors import MlxZhError
from mlx_zh.exams.catalog import Entry
from mlx_zh.exams.csvfile import LETTERS, Question
from mlx_zh.language.notice import Notice
from mlx_zh.reporting import exam_results
from mlx_zh.reporting.exam_questions import (
    AskedExam,
    AskedQuestion,
    Unfinished,
    Wanted,
    counts,
    fits,
    read_questions,
    select,
    unfinished,
)
from mlx_zh.reporting.exam_results import ExamResult, ExamRow
from mlx_zh.reporting.exam_view import columns, head_line, interval, percent
from mlx_zh.reporting.findings import STAGES
from mlx_zh.reporting.messages import named
from mlx_zh.reporting.words import points, verdict
from mlx_zh.stages.current_models import current_models
from mlx_zh.stages.exam_texts import exam_at_hand, texts_of
from mlx_zh.stages.run_list import RunInfo
from mlx_zh.studio import widgets
from mlx_zh.studio.kept import Kept
from mlx_zh.studio.paging import page_numbers
from mlx_zh.studio.projects import Studio
from mlx_zh.studio.run_choice import chosen_run, named_from, project_of, recipe_of, stage_name
from mlx_zh.studio.texts import worded
from mlx_zh.studio.threads import in_thread

_PAGE = 20  # questions drawn at once
_KINDS = {
    "all": worded("All"),
    "won": worded("Won"),
    "lost": worded("Lost"),
    "unsure": worded("Unsure"),
    "wrong": worded("Wrong in all"),
}


@dataclass(frozen=True)
class _Results:
    """The exams of a run."""

    exams: Sequence[ExamResult]
    outdated: Sequence[tuple[str, str]]  # exam and stage of figures that are of an earlier model
    begun: Sequence[Unfinished]


@dataclass(frozen=True)
class _Asked:
    """The questions of one exam, with their texts where they are at hand."""

    asked: AskedExam
    texts: Mapping[tuple[str, str], Question]
    subjects: Mapping[str, Entry]  # names and categories; empty without texts
    problem: str | None  # why there are no texts: an error, or None if they are just not here
    fits: bool  # whether the texts are of these questions


_results: Kept[_Results] = Kept(4)
_asked: Kept[_Asked] = Kept(3)


async def exams_page(studio: Studio) -> None:
    """Draw the page."""
    info = await chosen_run(studio, "/exams", studio.say("Exams"), lambda one: one.exam is not None)
    if info is None:
        return
    place = ui.element("div").classes("z-column")
    with place:
        ui.label(studio.say("Reading the answers …")).classes("z-note")

    async def fill() -> None:
        results = await in_thread(_read_results, info)
        place.clear()
        with place:
            _draw(studio, info, results)

    ui.timer(0, fill, once=True)


def _read_results(info: RunInfo) -> _Results:
    folder, found = info.folder, sorted(info.folder.exams.glob("*.json*"))
    files = [*found, folder.manifest, folder.fused_summary, *(folder.stage(s).adapter for s in ("sft", "dpo"))]

    def read() -> _Results:
        recipe = recipe_of(info)
        options: dict[str, Any] = {"bootstrap": 1000, "seed": 42}
        if recipe is not None:
            options = {"bootstrap": recipe.evaluate.bootstrap, "seed": recipe.seed}
        try:
            current = current_models(folder)
        except MlxZhError:  # an adapter that cannot be read: nothing says that the figures are of another
            current = {}
        exams, outdated = exam_results.gather(folder.exams, STAGES, **options, current=current)
        return _Results(exams, outdated, unfinished(folder.exams, STAGES))

    return _results.get((info.key, tuple(found)), files, read)


def _draw(studio: Studio, info: RunInfo, results: _Results) -> None:
    for begun in results.begun:
        stage, exam = stage_name(studio, begun.stage), begun.exam
        text = studio.say(
            "{stage} has answered {count} subjects of {exam} so far. Its figures come when all are answered.",
            stage=stage,
            count=begun.subjects,
            exam=exam,
        )
        widgets.note_card(text)
    for title, stage in results.outdated:
        code = "exam-of-an-earlier-fused-model" if stage == "fused" else "exam-of-an-earlier-model"
        widgets.note_card(studio.error(Notice(code, stage=stage, exam=title)))
    if not results.exams:
        _draw_empty(studio, info)
        return
    by_key = {exam.key: exam for exam in results.exams}
    asked_for = studio.query.get("exam", "")
    place = ui.element("div").classes("z-column")

    def show(key: str) -> None:
        place.clear()
        with place:
            _draw_exam(studio, info, by_key[key])

    first = asked_for if asked_for in by_key else next(iter(by_key))
    if len(by_key) > 1:
        titles = {key: exam.title for key, exam in by_key.items()}
        widgets.toggle(titles, first, lambda event: show(event.value)).move(target_index=0)
    show(first)


def _draw_empty(studio: Studio, info: RunInfo) -> None:
    hint = worded("An exam asks the same questions before and after training. Add one to the recipe, or run:")
    command = shlex.join(["mlx-zh", "eval", named_from(project_of(studio, info), info.path), "--benchmark", "ceval"])
    widgets.empty(studio.say("This run has no exam results yet"), studio.say(hint), command)


def _draw_exam(studio: Studio, info: RunInfo, exam: ExamResult) -> None:
    ui.label(head_line(exam).in_language(studio.language)).classes("z-note")
    for stage, wires in exam.tripwires.items():
        for wire in wires:
            widgets.note_card(f"{stage_name(studio, stage)}: {studio.error(wire)}")
    for _, stage in (*exam.unlike, *exam.rescored):
        text = worded("{stage} was asked in another way than the first model, so the two are not compared.")
        widgets.note_card(studio.say(text, stage=stage_name(studio, stage)))
    if exam.rows:
        _draw_table(studio, exam)
        ui.label(studio.say(_LEGEND)).classes("z-note")
    else:
        ui.label(studio.say("The right answers of this split are not known, so there are no scores.")).classes(
            "z-note"
        )
    _Questions(studio, info, exam).draw()


_LEGEND = worded(
    "Macro average over subjects in percent, with its 95 % bootstrap interval. A difference is within noise where "
    "its interval contains 0."
)


def _draw_table(studio: Studio, exam: ExamResult) -> None:
    heads = [text.in_language(studio.language) for text in columns(exam)]
    names = [f"c{number}" for number in range(len(heads))]
    shape = [
        {"name": name, "label": head, "field": name, "align": "left" if number == 0 else "right"}
        for number, (name, head) in enumerate(zip(names, heads, strict=True))
    ]
    rows = [dict(zip(names, _cells(studio, exam, row), strict=True)) | {"key": row.name} for row in exam.rows]
    widgets.table(shape, rows).classes("z-nowrap")


def _cells(studio: Studio, exam: ExamResult, row: ExamRow) -> list[str]:
    cells = [f"{named(row.name).in_language(studio.language)} ({row.questions:,})"]
    for stage in exam.stages:
        cell = row.cells.get(stage)
        spread = "" if cell is None else f"{percent(cell.macro, 2)} [{percent(cell.low, 1)}, {percent(cell.high, 1)}]"
        cells.append(spread or "–")
    if exam.compared:
        change = row.change
        cells += ["–", "–"] if change is None else [
            f"{points(change.difference)} {interval(change)}",
            verdict(change)[0].in_language(studio.language),
        ]  # fmt: skip
    return cells


class _Questions:
    """The questions of an exam: filters, and one page of them at a time."""

    def __init__(self, studio: Studio, info: RunInfo, exam: ExamResult) -> None:
        self._studio, self._info, self._exam = studio, info, exam
        before, after = exam.compared or (exam.stages[0], exam.stages[-1])
        self._wanted = Wanted("all", before, after)
        self._chosen: list[int] = []
        self._page = 1
        self._data: _Asked | None = None

    def draw(self) -> None:
        """Draw the section; it is filled when the answers are read."""
        with widgets.section(self._studio.say("Questions")) as self._place:
            ui.label(self._studio.say("Reading the answers …")).classes("z-note")
        ui.timer(0, self._fill, once=True)

    async def _fill(self) -> None:
        self._data = await in_thread(_read_asked, self._studio, self._info, self._exam)
        data = self._data
        if self._place.is_deleted:
            return
        with self._place:
            self._place.default_slot.children[-1].delete()
            for stage, lines in data.asked.unreadable.items():
                text = worded("The answers of {stage} cannot be read.")
                if lines > 0:
                    text = worded("{count} answers of {stage} are damaged and left out.")
                name = stage_name(self._studio, stage)
                widgets.note_card(self._studio.say(text, stage=name, count=f"{lines:,}"))
            if not data.asked.questions:
                ui.label(self._studio.say("There are no answers to single questions here.")).classes("z-note")
                return
            self._draw_filters(data)
            self._list = ui.element("div").classes("z-column")
        await self._select()

    def _draw_filters(self, data: _Asked) -> None:
        say = self._studio.say
        if not data.texts:
            text = say(
                "The texts of the questions are not on this disk, so only subjects and numbers can be searched."
            )
            widgets.note_card(text if data.problem is None else f"{text} {data.problem}")
        elif not data.fits:
            widgets.note_card(
                say("The exam's files have changed since, so a text may not be the one that was asked.")
            )
        self._kinds = widgets.toggle(self._labels(data), "all", self._changed("kind"))
        with ui.element("div").classes("z-row"):
            stages = {stage: stage_name(self._studio, stage) for stage in data.asked.stages}
            if len(stages) > 1:
                for name, label in (("before", say("Before")), ("after", say("After"))):
                    value = getattr(self._wanted, name)
                    picker = ui.select(
                        stages, value=value if value in stages else None, label=label, on_change=self._changed(name)
                    )
                    picker.props("dense outlined options-dense").classes("z-short")
            subjects = {key: _subject(key, data) for key in data.asked.subjects}
            chosen = ui.select(
                subjects,
                multiple=True,
                with_input=True,
                clearable=True,
                label=say("Subjects"),
                on_change=self._changed("subjects"),
            )
            chosen.props("dense outlined options-dense").classes("z-pick")
            search = ui.input(label=say("Search"), on_change=self._changed("text"))
            search.props("dense outlined clearable debounce=300 type=search").classes("z-pick z-grow")

    def _labels(self, data: _Asked) -> dict[str, str]:
        numbers = counts(data.asked, self._wanted)
        return {kind: f"{self._studio.say(label)} {numbers[kind]:,}" for kind, label in _KINDS.items()}

    def _changed(self, name: str) -> Any:
        async def change(event: Any) -> None:
            empty: Any = () if name == "subjects" else ""
            self._wanted = replace(self._wanted, **{name: event.value or empty})
            if name != "kind" and self._data is not None:
                self._kinds.set_options(self._labels(self._data), value=self._wanted.kind)
            await self._select()

        return change

    async def _select(self) -> None:
        assert self._data is not None
        self._chosen = await in_thread(select, self._data.asked, self._wanted, self._data.texts)
        self._page = 1
        self._draw_page()

    def _draw_page(self) -> None:
        data, say = self._data, self._studio.say
        if data is None or self._list.is_deleted:
            return
        first = (self._page - 1) * _PAGE
        shown = self._chosen[first : first + _PAGE]
        self._list.clear()
        with self._list:
            if not shown:
                ui.label(say("No question is like this.")).classes("z-note")
                return
            span = {"first": f"{first + 1:,}", "last": f"{first + len(shown):,}", "count": f"{len(self._chosen):,}"}
            note = say("{first} to {last} of {count} questions", **span)
            if not data.asked.are_probabilities:
                note += " · " + say("shares of the four options' likelihoods, not probabilities")
            ui.label(note).classes("z-note")
            with ui.element("div").classes("z-grid z-questions"):
                for number in shown:
                    self._draw_question(data.asked.questions[number], data)
            page_numbers(self._page, len(self._chosen), _PAGE, self._turn)

    def _turn(self, page: int) -> None:
        self._page = page
        self._draw_page()

    def _draw_question(self, question: AskedQuestion, data: _Asked) -> None:
        text, stages = data.texts.get(question.key), data.asked.stages
        with ui.element("article").classes("z-card z-question"):
            with ui.element("div").classes("z-row"):
                ui.label(f"{_subject(question.subject, data)} · {question.id}").classes("z-note z-grow")
                for mark, style in self._marks(question):
                    ui.label(mark).classes(f"z-state {style}")
            if text is not None:
                ui.label(text.text).classes("z-text")
            with ui.element("div").classes("z-options").style(f"--stages: {len(stages)}"):
                for head in ("", "", *(stage_name(self._studio, stage) for stage in stages)):
                    ui.label(head).classes("z-option-head")
                for place, letter in enumerate(LETTERS):
                    self._draw_option(question, letter, place, "" if text is None else text.options[place], stages)
            for stage in stages:
                given = question.given.get(stage)
                if given is not None and given.text is not None:
                    ui.label(f"{stage_name(self._studio, stage)}: {given.text[:500]}").classes("z-note z-text")

    def _draw_option(
        self, question: AskedQuestion, letter: str, place: int, option: str, stages: Sequence[str]
    ) -> None:
        right = " z-right" if letter == question.truth else ""
        ui.label(f"{letter} ✓" if right else letter).classes(f"z-letter{right}")
        ui.label(option).classes(f"z-text{right}")
        for stage in stages:
            given = question.given.get(stage)
            share = None if given is None or given.shares is None else given.shares[place]
            chosen = given is not None and given.choice == letter
            cell = ui.label(("●" if chosen else "") if share is None else f"{100 * share:.0f}%")
            cell.classes("z-share" + (" z-chosen" if chosen else "") + right)
            if share is not None:
                cell.style(f"--share: {100 * share:.1f}%")

    def _marks(self, question: AskedQuestion) -> list[tuple[str, str]]:
        before, after = question.is_right(self._wanted.before), question.is_right(self._wanted.after)
        if before is False and after is True:
            return [(self._studio.say("Won"), "z-done")]
        if before is True and after is False:
            return [(self._studio.say("Lost"), "z-failed")]
        if question.truth is not None and all(question.is_right(stage) is False for stage in question.given):
            return [(self._studio.say("Wrong in all"), "z-stopped")]
        return []


def _subject(key: str, data: _Asked) -> str:
    entry = data.subjects.get(key)
    return key if entry is None or entry.name == key else f"{entry.name} ({key})"


def _read_asked(studio: Studio, info: RunInfo, exam: ExamResult) -> _Asked:
    folder = info.folder.exams
    files = [folder / f"{stage}-{exam.key}.jsonl" for stage in exam.stages]

    def read() -> _Asked:
        asked = read_questions(folder, exam.key, exam.stages)
        problem, found = None, None
        recipe = recipe_of(info)
        try:
            if recipe is not None:
                found = exam_at_hand(recipe, exam.key, exam.split, project_of(studio, info))
        except MlxZhError as error:
            problem = studio.error(error)
        if found is None:
            return _Asked(asked, {}, {}, problem, True)
        texts = texts_of(found)
        return _Asked(asked, texts, {s.key: s.entry for s in found.subjects}, None, fits(asked, texts))

    return _asked.get((info.key, exam.key, studio.language), [*files, info.folder.recipe], read)
