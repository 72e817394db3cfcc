"""The result tables as rows of text, stages side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from wcwidth import wcswidth

from mlx_zh.exams.csvfile import LETTERS
from mlx_zh.exams.figures import ExamFigures, FigureRow
from mlx_zh.exams.statistics import Comparison

Rows = list[list[str]]


@dataclass(frozen=True)
class Form:
    """How much a table of results shows. The answers' JSON files hold everything in any case."""

    micro: bool  # the micro average, in brackets
    stacked: bool  # the interval stands below its average, not beside it
    short: bool  # short column heads

    @property
    def legend(self) -> str:
        """What the figures are."""
        if self.micro:
            return (
                "macro average over subjects [95 % bootstrap interval] (micro average over questions); a difference "
                "is called noise where its interval contains 0"
            )
        return (
            "macro average over subjects [95 % bootstrap interval]; a difference is called noise where its interval "
            "contains 0"
        )


FORMS = (Form(True, False, False), Form(False, False, False), Form(False, False, True), Form(False, True, True))


def fitting(stages: Mapping[str, ExamFigures], width: int | None, layout: Callable[[Rows], str]) -> Form:
    """The first of `FORMS` in which the tables, laid out by `layout`, fit into `width` columns; None: no limit."""
    labelled = all("rows" in figures for figures in stages.values())
    for form in FORMS[:-1]:
        tables = [letters(stages, form), *([results(stages, form)] if labelled else [])]
        lines = "\n".join(map(layout, tables)).split("\n")
        if width is None or all(wcswidth(line) <= width for line in lines):
            return form
    return FORMS[-1]


def results(stages: Mapping[str, ExamFigures], form: Form = FORMS[0]) -> Rows:
    """A row for each category, a column for each stage: macro average, its interval, and the micro average.

    In a stacked form, a second row has the intervals.
    """
    table = [["%", *stages, "n" if form.short else "questions"]]
    first = next(iter(stages.values()))
    for number, row in enumerate(first["rows"]):
        cells = [_cell(figures["rows"][number], form) for figures in stages.values()]
        table.append([row["name"], *(average for average, _ in cells), str(row["questions"])])
        if form.stacked:
            table.append(["", *(interval for _, interval in cells), ""])
    return table


def _cell(row: FigureRow, form: Form) -> tuple[str, str]:
    """What stands in a cell, and what stands below it in a stacked form."""
    macro, interval, micro = row["macro"], row["interval"], row["micro"]
    if macro is None or interval is None or micro is None:
        return "–", ""
    low, high = interval
    average, between = f"{100 * macro:5.2f}", f"[{100 * low:4.1f}, {100 * high:4.1f}]"
    if form.stacked:
        return average, f"[{100 * low:.0f}–{100 * high:.0f}]"
    return f"{average} {between}" + (f" ({100 * micro:5.2f})" if form.micro else ""), ""


def letters(stages: Mapping[str, ExamFigures], form: Form = FORMS[0]) -> Rows:
    """How often each letter was chosen and is right, and what a model that always chose it would score."""
    first = next(iter(stages.values()))
    some_without = any(figures["letters"]["predicted"]["none"] for figures in stages.values())
    names = [*LETTERS, "none"] if some_without else list(LETTERS)
    heads = ("on A–D", "calibration") if form.short else ("probability on A–D", "calibration error")
    table = [["letters", *names, *heads]]
    for stage, figures in stages.items():
        predicted = figures["letters"]["predicted"]
        mass = "–" if figures["mass"] is None else f"{figures['mass']:.1%}"
        error = figures.get("calibration_error")
        table.append([stage, *(str(predicted[n]) for n in names), mass, "–" if error is None else f"{error:.3f}"])
    if "true" in first["letters"]:
        blank = [""] * (len(names) - len(LETTERS) + 2)
        table.append(["truth", *(str(first["letters"]["true"][n]) for n in LETTERS), *blank])
        always = [f"{first['letters']['always'][n]:.1%}" for n in LETTERS]
        table.append(["always it", *always, *blank])
    return table


def verdict(before: str, after: str, comparison: Comparison) -> str:
    """One sentence on whether a stage changed anything."""
    low, high = (100 * value for value in comparison.interval)
    p = f"p = {comparison.p:.3f}" if comparison.p >= 0.001 else "p < 0.001"
    changed = "better" if comparison.difference > 0 else "worse"
    judged = "within noise" if comparison.noise else changed
    return (
        f"{after} against {before}: {100 * comparison.difference:+.2f} points [{low:+.1f}, {high:+.1f}], "
        f"{comparison.won} questions won, {comparison.lost} lost, {p}: {judged}"
    )


def pairs(stages: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of stages to compare: the first with each other one, then each of those with the one before it."""
    with_first = [(stages[0], stage) for stage in stages[1:]]
    return with_first + list(pairwise(stages[1:]))
