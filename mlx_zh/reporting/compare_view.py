"""The figures of a comparison as text, the same on the page, in the studio and on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from mlx_zh.reporting.compared_exams import Against, ComparedExam, compared_exams
from mlx_zh.reporting.comparison import ComparedRun, Difference, recipe_differences
from mlx_zh.reporting.fairness import Check, checks, verdict
from mlx_zh.reporting.findings import Alarm
from mlx_zh.reporting.messages import Text, named, say
from mlx_zh.reporting.words import Tile, points, tiles

MOST = 6  # runs, as many as there are colours


@dataclass(frozen=True)
class Comparison:
    """Several runs and everything that is derived from them.

    `bootstrap` samples and `seed` give the intervals and p of the exams. `stage` is the model to compare, None for
    the newest of each run.
    """

    runs: Sequence[ComparedRun]
    bootstrap: int
    seed: int
    stage: str | None = None

    @cached_property
    def exams(self) -> list[ComparedExam]:
        """The exams of the runs."""
        return compared_exams(self.runs, bootstrap=self.bootstrap, seed=self.seed, stage=self.stage)

    @cached_property
    def checks(self) -> list[Check]:
        """What the runs have in common."""
        return checks(self.runs, self.exams)

    @cached_property
    def differences(self) -> list[Difference]:
        """What their recipes set differently."""
        return recipe_differences(self.runs)

    @property
    def verdict(self) -> tuple[bool, Text]:
        """Whether the comparison is fair, in a sentence."""
        return verdict(self.checks)

    @property
    def recipe_note(self) -> Text:
        """What the table of differences shows, or why there is none."""
        if sum(bool(run.recipe) for run in self.runs) < 2:
            return say("compare-recipe-one")
        return say("compare-recipe-note" if self.differences else "compare-recipe-same")

    @property
    def alarms(self) -> list[Alarm]:
        """The warnings of every run; what all of them warn of is said once."""
        every: dict[tuple[Text, Text], list[str]] = {}
        for run in self.runs:
            for alarm in run.findings.alarms:
                labels = every.setdefault((alarm.where, alarm.what), [])
                labels += [run.label] if run.label not in labels else []
        return [Alarm(_after(", ".join(labels), where), what) for (where, what), labels in every.items()]

    def headlines(self, number: int) -> list[Tile]:
        """The main figures of a run, and in the exams how it does against the first."""
        shown = [tile for tile in tiles(self.runs[number].findings) if tile.name not in self._titles]
        return [*filter(None, (exam_tile(exam, number) for exam in self.exams)), *shown]

    @cached_property
    def _titles(self) -> set[Text]:
        return {Text.same(exam.title) for run in self.runs for exam in run.findings.exams}


def _after(labels: str, where: Text) -> Text:
    return Text(f"{labels} · {where.zh}", f"{labels} · {where.en}")


def exam_tile(exam: ComparedExam, number: int) -> Tile | None:
    """A run's average in an exam; of which model it is, and its change against the first run."""
    row = exam.rows[0] if exam.rows else None
    cell = row.cells[number] if row else None
    if row is None or cell is None:
        return None
    test = row.tests[number]
    model = named(exam.stages[number] or "base")
    remark = model
    if test:
        change = points(test.compared.difference)
        remark = say("compare-staged", stage=model, points=change, verdict=say(test.verdict))
    return Tile(Text.same(exam.title), f"{100 * cell.macro:.2f}", remark)


def p_value(p: float) -> str:
    """`= 0.031`, or `< 0.001`."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def interval_and_p(test: Against) -> Text:
    """The interval of a change in percentage points, and its p before the correction."""
    low, high = test.compared.interval
    return say("compare-test", interval=f"[{points(low, 1)}, {points(high, 1)}]", p=p_value(test.compared.p))


def won_and_lost(test: Against) -> Text:
    """The questions that only one of the two models answers right."""
    return say("compare-won", won=f"{test.compared.won:,}", lost=f"{test.compared.lost:,}")


def correction(exam: ComparedExam) -> Text | None:
    """How p was corrected; None where there was one comparison at most."""
    first, rest = (
        sum(test is not None for row in rows for test in row.tests) for rows in (exam.rows[:1], exam.rows[1:])
    )
    if rest:
        return say("compare-holm-note", count=first, rest=rest)
    return say("compare-holm-first", count=first) if first > 1 else None


def exam_lines(comparison: Comparison) -> list[Text]:
    """A sentence on each run against the first in each exam."""
    lines = []
    for exam in comparison.exams:
        first = comparison.runs[exam.first].label
        for at, run in enumerate(comparison.runs):
            values = {"title": exam.title, "run": run.label, "first": first}
            row = exam.rows[0] if exam.rows else None
            test, before, after = (row.tests[at], row.cells[exam.first], row.cells[at]) if row else (None, None, None)
            if test and before and after:
                figures = {"before": 100 * before.macro, "after": 100 * after.macro, "p": p_value(test.p)}
                code = "same" if test.verdict == "noise" else test.verdict
                lines.append(say(f"compare-line-{code}", **values, **figures))
            elif at in exam.untested:
                lines.append(say("compare-untested", **values, reason=exam.untested[at]))
    return lines
