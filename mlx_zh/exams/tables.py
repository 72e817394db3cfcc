"""The result tables as rows of text, stages side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from mlx_zh.exams.csvfile import LETTERS
from mlx_zh.exams.figures import ExamFigures, FigureRow
from mlx_zh.exams.statistics import NOISE, Comparison


def results(stages: Mapping[str, ExamFigures]) -> list[list[str]]:
    """A row for each category, a column for each stage: macro average, its interval, and the micro average."""
    table = [["%", *stages, "questions"]]
    first = next(iter(stages.values()))
    for number, row in enumerate(first["rows"]):
        cells = [_cell(figures["rows"][number]) for figures in stages.values()]
        table.append([row["name"], *cells, str(row["questions"])])
    return table


def _cell(row: FigureRow) -> str:
    macro, interval, micro = row["macro"], row["interval"], row["micro"]
    if macro is None or interval is None or micro is None:
        return "–"
    low, high = interval
    return f"{100 * macro:5.2f} [{100 * low:4.1f}, {100 * high:4.1f}] ({100 * micro:5.2f})"


def letters(stages: Mapping[str, ExamFigures]) -> list[list[str]]:
    """How often each letter was chosen and is right, and what a model that always chose it would score."""
    first = next(iter(stages.values()))
    some_without = any(figures["letters"]["predicted"]["none"] for figures in stages.values())
    names = [*LETTERS, "none"] if some_without else list(LETTERS)
    table = [["letters", *names, "probability on A–D", "calibration error"]]
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
    changed = "better" if comparison.won > comparison.lost else "worse"
    judged = "within noise" if comparison.noise else changed
    return (
        f"{after} against {before}: {100 * comparison.difference:+.2f} points [{low:+.1f}, {high:+.1f}], "
        f"{comparison.won} questions won, {comparison.lost} lost, McNemar {p}: {judged}"
    )


def pairs(stages: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of stages to compare: the first with each other one, then each of those with the one before it."""
    with_first = [(stages[0], stage) for stage in stages[1:]]
    return with_first + list(pairwise(stages[1:]))


LEGEND = (
    "macro average over subjects [95 % bootstrap interval] (micro average over questions); "
    f"a difference is called noise where McNemar's p is {NOISE} or more"
)
