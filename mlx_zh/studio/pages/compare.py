"""The page Compare: several runs side by side, as `mlx-zh compare` shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nicegui import run, ui

from mlx_zh.errors import MlxZhError
from mlx_zh.reporting.compare_view import MOST, Comparison, correction, interval_and_p, won_and_lost
from mlx_zh.reporting.compared_curves import StageCurves, axis_name, compared_curves
from mlx_zh.reporting.compared_exams import Against, ComparedExam, OwnChange, model_name, own_changes
from mlx_zh.reporting.compared_figures import ComparedAnswers, FigureGroup, compared_answers, compared_figures
from mlx_zh.reporting.exam_results import Cell
from mlx_zh.reporting.exam_view import head_line, interval, percent
from mlx_zh.reporting.findings import STAGES
from mlx_zh.reporting.messages import Text, named, say
from mlx_zh.reporting.words import mark, points, verdict
from mlx_zh.stages.comparing import Chosen, checked, compared, page_name
from mlx_zh.stages.run_list import RunInfo
from mlx_zh.studio import widgets
from mlx_zh.studio.frame import address
from mlx_zh.studio.projects import Studio


async def compare_page(studio: Studio) -> None:
    """Draw the page. `?runs=KEY,KEY` names the runs, `&stage=` the model to compare."""
    keys = [key for key in studio.query.get("runs", "").split(",") if key]
    asked = studio.query.get("stage", "")
    stage = asked if asked in STAGES else None
    with ui.element("div").classes("z-row"):
        widgets.heading(studio.say("Compare"))
    infos = await run.io_bound(studio.runs) or []
    _choose(studio, infos, keys, stage)
    if len(keys) < 2:
        widgets.empty(
            studio.say("Choose two runs or more") if len(infos) > 1 else studio.say("There are no two runs yet"),
            studio.say("Recipes, curves, exams and answers then stand side by side. In a terminal:"),
            "mlx-zh compare RUN RUN",
        )
        return
    chosen = checked([Chosen(studio.run(key).folder) for key in keys])
    place = ui.element("div").classes("z-compare")
    with place:
        ui.spinner(size="lg").classes("q-ma-lg")

    async def fill() -> None:
        try:
            comparison = await run.io_bound(compared, chosen, stage)
        except MlxZhError as error:
            place.clear()
            with place:
                widgets.error_card(studio, error)
            return
        if comparison is not None:  # None if the studio ends meanwhile
            place.clear()
            with place:
                _Page(studio, comparison, page_name(chosen)).draw()

    ui.timer(0, fill, once=True)


def _choose(studio: Studio, infos: Sequence[RunInfo], keys: Sequence[str], stage: str | None) -> None:
    """Which runs, and which model of each."""
    names = [info.name for info in infos]
    labels = {
        info.key: info.name if names.count(info.name) == 1 else f"{info.name} ({info.path.parent})" for info in infos
    }
    stages = {"": studio.say("the newest of each run")} | {
        name: named(name).in_language(studio.language) for name in STAGES
    }
    with ui.element("div").classes("z-card z-row"):
        runs = ui.select(labels, multiple=True, value=[key for key in keys if key in labels])
        runs.props["label"] = studio.say("Runs, two to six; the others are compared with the first")
        runs.props(f"use-chips outlined dense max-values={MOST}").classes("z-compare-runs")
        model = ui.select(stages, value=stage or "").props("outlined dense").classes("z-compare-model")
        model.props["label"] = studio.say("Model in exams and answers")

        def show() -> None:
            ui.navigate.to(address("/compare", runs=",".join(runs.value), stage=model.value))

        ui.button(studio.say("Compare"), on_click=show).props("unelevated no-caps")


class _Page:
    """The parts of a comparison, drawn one below the other."""

    def __init__(self, studio: Studio, comparison: Comparison, file: str) -> None:
        self._studio, self._comparison, self._file = studio, comparison, file

    def draw(self) -> None:
        """Draw all parts for which the runs have something."""
        comparison, runs = self._comparison, self._comparison.runs
        self._summary()
        with self._section(say("compare-fairness")):
            self._checks()
        with self._section(say("compare-recipe"), comparison.recipe_note):
            if comparison.differences:
                self._by_run([(each.key, each.values) for each in comparison.differences], say("compare-key"))
        with self._section(say("compare-exams")):
            self._exams()
        if own := own_changes(runs):
            with self._section(say("compare-own"), say("compare-own-note")):
                rows = [(title, [self._own(cell) for cell in cells]) for title, cells in own]
                self._by_run(rows, say("compare-exam"))
        for stage in compared_curves(runs):
            with self._section(say("compare-curves", stage=named(stage.stage))):
                self._curves(stage)
        with self._section(say("compare-figures"), say("compare-best-note")):
            self._figures(compared_figures(runs))
        if answers := compared_answers(runs, comparison.stage):
            with self._section(say("answers"), say("answers_note")):
                self._answers(answers)
        if alarms := comparison.alarms:
            with self._section(say("compare-warnings")), ui.element("div").classes("z-card z-warning"):
                for alarm in alarms:
                    with ui.element("p").classes("z-compare-warning"):
                        ui.label(self._in(alarm.where)).classes("z-stopped")
                        ui.label(self._in(alarm.what)).classes("z-text")
        with self._section(say("compare-details")):
            self._by_run([(self._in(check.what), check.values) for check in comparison.checks], say("compare-item"))

    def _in(self, text: Text) -> str:
        return text.in_language(self._studio.language)

    def _section(self, title: Text, note: Text | None = None) -> ui.element:
        section = widgets.section(self._in(title))
        if note is not None:
            with section:
                ui.label(self._in(note)).classes("z-note")
        return section

    def _summary(self) -> None:
        """The verdict, the button that saves, and a card for each run."""
        fair, sentence = self._comparison.verdict
        with ui.element("div").classes("z-row"):
            ui.label(f"{'✓' if fair else '!'} {self._in(sentence)}").classes(
                "z-grow z-done" if fair else "z-grow z-stopped"
            )
            ui.button(self._studio.say("Save as one HTML file"), icon="download", on_click=self._save).props(
                "outline no-caps"
            )
        with ui.element("div").classes("z-compare-cards"):
            for number, compared_run in enumerate(self._comparison.runs):
                with ui.element("div").classes("z-card"):
                    self._name(number)
                    ui.label(str(compared_run.model.get("source") or "–")).classes("z-note")
                    ui.label(self._in(compared_run.state)).classes("z-note")
                    for tile in self._comparison.headlines(number):
                        with ui.element("div").classes("z-compare-tile"):
                            ui.label(self._in(tile.name)).classes("z-figure-name z-grow")
                            with ui.element("div").classes("z-compare-value"):
                                ui.label(tile.value)
                                if remark := self._in(tile.remark):
                                    ui.label(remark).classes("z-note")

    async def _save(self) -> None:
        """Download the page that the command writes."""
        page = await run.io_bound(_page, self._comparison)
        if page is not None:  # None if the studio ends meanwhile
            ui.download.content(page.encode(), self._file, "text/html")

    def _name(self, number: int, text: str | None = None) -> None:
        """A run's name after its colour."""
        with ui.element("div").classes("z-compare-name"):
            ui.element("i").classes("z-dot").style(f"background: {widgets.COLOURS[number]}")
            ui.label(self._comparison.runs[number].label if text is None else text)

    def _checks(self) -> None:
        with _table("z-compare-checks"):
            for check in self._comparison.checks:
                with ui.element("tr"):
                    _cell(self._in(check.what), "th")
                    _cell(self._in(check.said), style="z-done" if check.same else "z-stopped")
                    _cell(self._in(check.meaning))

    def _by_run(self, rows: Sequence[tuple[str, Sequence[str | Callable[[], None]]]], corner: Text) -> None:
        """A table with a column for each run; a cell is a text, or a function that draws it."""
        with _table():
            self._heads(corner)
            for name, values in rows:
                with ui.element("tr"):
                    _cell(name, "th")
                    for value in values:
                        _cell(value)

    def _heads(self, corner: Text, names: Sequence[str] | None = None, first: Sequence[str] = ()) -> None:
        with ui.element("tr"):
            _cell(self._in(corner), "th")
            for name in first:
                _cell(name, "th")
            for number in range(len(self._comparison.runs)):
                with ui.element("th"):
                    self._name(number, None if names is None else names[number])

    def _exams(self) -> None:
        comparison = self._comparison
        if not comparison.exams:
            ui.label(self._in(say("compare-exams-none"))).classes("z-note")
        for exam in comparison.exams:
            ui.label(exam.title).classes("z-compare-exam")
            ui.label(self._in(head_line(exam))).classes("z-note")
            if not exam.rows:
                ui.label(self._in(say("unlabelled"))).classes("z-note")
                continue
            self._exam(exam)
            first = comparison.runs[exam.first].label
            for note in (say("compare-exam-note", first=first), correction(exam)):
                if note is not None:
                    ui.label(self._in(note)).classes("z-note")
        if comparison.exams:
            ui.label(self._in(say("compare-seeds-note"))).classes("z-note")

    def _exam(self, exam: ComparedExam) -> None:
        runs = self._comparison.runs
        names = [self._in(model_name(each, stage)) for each, stage in zip(runs, exam.stages, strict=True)]
        with _table():
            self._heads(say("category"), names, [self._in(named("base"))] if exam.has_base else [])
            for at, row in enumerate(exam.rows):
                with ui.element("tr").classes("z-compare-first" if at == 0 else ""):
                    _cell(self._in(named(row.name)), "th")
                    if exam.has_base:
                        self._result(row.base, None, None)
                    for number, cell in enumerate(row.cells):
                        self._result(cell, row.tests[number], exam.untested.get(number) if at == 0 else None)

    def _result(self, cell: Cell | None, test: Against | None, untested: Text | None) -> None:
        with ui.element("td"):
            if cell is None:
                ui.label("–")
                return
            ui.label(percent(cell.macro, 2))
            ui.label(f"{percent(cell.low, 1)} – {percent(cell.high, 1)}").classes("z-note")
            if test:
                change = f"{points(test.compared.difference)} {self._in(say(test.verdict))}"
                ui.label(change).classes(_STYLES[test.verdict])
                ui.label(self._in(interval_and_p(test))).classes("z-note")
                ui.label(self._in(won_and_lost(test))).classes("z-note")
            elif untested:
                ui.label(self._in(untested)).classes("z-note")

    def _own(self, own: OwnChange | None) -> str | Callable[[], None]:
        if own is None:
            return "–"

        def draw() -> None:
            text, kind = verdict(own.change)
            ui.label(f"{percent(own.before.macro, 2)} → {percent(own.after.macro, 2)}")
            ui.label(f"{points(own.change.difference)} {self._in(text)}").classes(_STYLES[kind])
            ui.label(interval(own.change)).classes("z-note")

        return draw

    def _curves(self, stage: StageCurves) -> None:
        place = ui.element("div").classes("z-grid")

        def show(axis: str) -> None:
            place.clear()
            with place:
                for curves in stage.charts[axis]:
                    scale = 100 if curves.percent else 1
                    lines = {self._in(s.name): [(x, scale * y) for x, y in s.points] for s in curves.series}
                    dots = [self._in(series.name) for series in curves.series if series.kind == "marks"]
                    title, along = self._in(curves.title), self._in(curves.along or say("step"))
                    made = widgets.chart(title, lines, x=along, dots=dots)
                    for drawn, series in zip(made.options["series"], curves.series, strict=True):
                        drawn["itemStyle"]["color"] = widgets.COLOURS[series.color]
                    made.update()

        if len(stage.charts) > 1:
            names = {axis: self._in(axis_name(axis)) for axis in stage.charts}
            widgets.toggle(names, stage.axis, lambda event: show(event.value)).move(target_index=1)
        if stage.axis == "scored_tokens":
            ui.label(self._in(say("compare-tokens-note"))).classes("z-note")
        show(stage.axis)

    def _figures(self, groups: Sequence[FigureGroup]) -> None:
        with _table():
            self._heads(say("compare-figure"))
            for group in groups:
                with (
                    ui.element("tr").classes("z-compare-group"),
                    ui.element("th").props(f"colspan={len(self._comparison.runs) + 1}"),
                ):
                    ui.label(self._in(group.title))
                for row in group.rows:
                    with ui.element("tr"):
                        _cell(self._in(row.name), "th")
                        for number, value in enumerate(row.values):
                            _cell(self._in(value), style="z-compare-best" if number in row.best else "")

    def _answers(self, answers: ComparedAnswers) -> None:
        for prompt, replies in answers.prompts:
            with ui.element("div").classes("z-card"):
                ui.label(prompt).classes("z-compare-prompt z-text")
                with ui.element("div").classes("z-compare-cards"):
                    for column, reply in zip(answers.columns, replies, strict=True):
                        with ui.element("div").classes("z-compare-reply"):
                            right = "" if reply.right is None else f" {mark(reply.right)}"
                            ui.label(f"{self._in(column)}{right}").classes("z-figure-name")
                            empty = say("compare-not-asked") if reply.text is None else say("no_answer")
                            ui.label(reply.text or self._in(empty)).classes("z-text")


_STYLES = {"better": "z-done", "worse": "z-failed", "noise": "z-waiting"}


def _page(comparison: Comparison) -> str:
    """The page as a file; imported here because it takes a second, which only those who save it should wait."""
    import time

    from mlx_zh.reporting.compare_page import compare_page as page

    return page(comparison, time.strftime("%Y-%m-%d %H:%M"))


def _table(style: str = "") -> ui.element:
    """A table that scrolls sideways by itself, for `with`."""
    with ui.element("div").classes("z-card z-compare-wide"):
        return ui.element("table").classes(f"z-compare-table {style}")


def _cell(content: str | Callable[[], None], kind: str = "td", style: str = "") -> None:
    with ui.element(kind).classes(style):
        if isinstance(content, str):
            ui.label(content)
        else:
            content()
