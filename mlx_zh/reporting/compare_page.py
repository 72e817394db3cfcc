"""The page of `mlx-zh compare`: one file that works offline, built as the report is."""

from __future__ import annotations

from collections.abc import Iterator

from mlx_zh.reporting import svg
from mlx_zh.reporting.compare_view import Comparison, correction, interval_and_p, won_and_lost
from mlx_zh.reporting.compared_curves import axis_name, compared_curves
from mlx_zh.reporting.compared_exams import model_name, own_changes
from mlx_zh.reporting.compared_figures import compared_answers, compared_figures
from mlx_zh.reporting.messages import named, say
from mlx_zh.reporting.page import Section, document, render
from mlx_zh.reporting.words import mark


def compare_page(comparison: Comparison, created: str) -> str:
    """The whole page as HTML; `created` is its date."""
    names = ", ".join(run.label for run in comparison.runs)
    fair, sentence = comparison.verdict
    return document(
        "compare",
        title=say("compare-title", names=names),
        name=names,
        created=created,
        runs=comparison.runs,
        headlines=[comparison.headlines(number) for number in range(len(comparison.runs))],
        fair=fair,
        sentence=sentence,
        alarms=[],  # each run has its own, below
        sections=list(_sections(comparison)),
    )


def _sections(comparison: Comparison) -> Iterator[Section]:
    runs = comparison.runs
    content = render("compare_checks", checks=comparison.checks)
    yield Section("fairness", say("compare-fairness"), content)
    content = render("compare_recipe", runs=runs, note=comparison.recipe_note, differences=comparison.differences)
    yield Section("recipe", say("compare-recipe"), content)
    shown = {"runs": runs, "exams": comparison.exams, "model_name": model_name, "correction": correction}
    content = render("compare_exams", **shown, interval_and_p=interval_and_p, won_and_lost=won_and_lost)
    yield Section("exams", say("compare-exams"), content)
    if own := own_changes(runs):
        yield Section("own", say("compare-own"), render("compare_own", runs=runs, rows=own))
    for stage in compared_curves(runs):
        charts = {axis: [svg.curves(chart) for chart in drawn] for axis, drawn in stage.charts.items()}
        content = render("compare_curves", stage=stage.stage, chosen=stage.axis, charts=charts, axis_name=axis_name)
        yield Section(f"curves-{stage.stage}", say("compare-curves", stage=named(stage.stage)), content)
    content = render("compare_figures", runs=runs, groups=compared_figures(runs))
    yield Section("figures", say("compare-figures"), content)
    if answers := compared_answers(runs, comparison.stage):
        yield Section("answers", say("answers"), render("compare_answers", answers=answers, mark=mark))
    if alarms := comparison.alarms:
        yield Section("warnings", say("compare-warnings"), render("compare_warnings", alarms=alarms))
    content = render("compare_details", runs=runs, checks=comparison.checks)
    yield Section("details", say("compare-details"), content)
