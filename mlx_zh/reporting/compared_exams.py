"""Exams of several runs: each run against the first, question by question, with the correction for several tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from mlx_zh.exams.statistics import NOISE, Comparison, holm
from mlx_zh.reporting.comparison import ComparedRun
from mlx_zh.reporting.exam_results import (
    Answers,
    Cell,
    Change,
    ExamResult,
    Report,
    paired,
    read_answers,
    read_report,
)
from mlx_zh.reporting.messages import Text, named, say


@dataclass(frozen=True, slots=True)
class Against:
    """A run against the first one in a row of an exam."""

    compared: Comparison
    p: float  # after the correction for several tests

    @property
    def verdict(self) -> str:
        """better, worse or noise."""
        difference = self.compared.difference
        return "noise" if self.p >= NOISE or difference == 0 else "better" if difference > 0 else "worse"


@dataclass(frozen=True)
class ComparedRow:
    """A row of an exam's table."""

    name: str
    questions: int
    base: Cell | None  # where all runs have the same base results
    cells: list[Cell | None]  # by run
    tests: list[Against | None]  # by run; None for the first, and where no test is possible


@dataclass(frozen=True)
class ComparedExam:
    """An exam that at least one of the runs has taken."""

    key: str
    title: str
    split: str
    protocol: str
    questions: int
    first: int  # the run that the others are compared with: the first one with results
    stages: list[str | None]  # by run: the model whose results are shown; None without results
    rows: list[ComparedRow]  # empty where the right answers are not known
    untested: dict[int, Text] = field(default_factory=dict)  # run -> why it is not compared with the first
    chance: tuple[float, float] | None = None

    @property
    def has_base(self) -> bool:
        """Whether all runs have the same base results."""
        return any(row.base for row in self.rows)


def compared_exams(
    runs: Sequence[ComparedRun], *, bootstrap: int, seed: int, stage: str | None = None
) -> list[ComparedExam]:
    """Every exam of the runs, in the order in which they come; `stage` compares that model instead of the newest."""
    keys = dict.fromkeys(exam.key for run in runs for exam in run.findings.exams)
    return [_Exam(runs, key, bootstrap, seed, stage).result() for key in keys]


@dataclass(frozen=True)
class _Entrant:
    """A run's results in an exam."""

    run: ComparedRun
    exam: ExamResult
    stage: str

    @cached_property
    def report(self) -> Report | None:
        return read_report(self.run.exams / f"{self.stage}-{self.exam.key}.json", self.exam.key)

    @cached_property
    def answers(self) -> Answers:
        return read_answers(self.run.exams / f"{self.stage}-{self.exam.key}.jsonl")

    def cell(self, row: str, stage: str | None = None) -> Cell | None:
        cells = next((line.cells for line in self.exam.rows if line.name == row), {})
        return cells.get(stage or self.stage)


class _Exam:
    def __init__(self, runs: Sequence[ComparedRun], key: str, bootstrap: int, seed: int, stage: str | None) -> None:
        self._entrants = [_entrant(run, key, stage) for run in runs]
        self._bootstrap, self._seed = bootstrap, seed
        shown = [(at, entrant) for at, entrant in enumerate(self._entrants) if entrant]
        self._first = shown[0][0] if shown else 0
        self._reference = shown[0][1] if shown else None
        self._key, self._any = key, next(exam for run in runs for exam in run.findings.exams if exam.key == key)

    def result(self) -> ComparedExam:
        untested = self._untested()
        exam = self._reference.exam if self._reference else self._any
        return ComparedExam(
            key=self._key,
            title=exam.title,
            split=exam.split,
            protocol=exam.protocol,
            questions=exam.questions,
            first=self._first,
            stages=[entrant.stage if entrant else None for entrant in self._entrants],
            rows=self._rows(untested),
            untested=untested,
            chance=exam.chance,
        )

    def _untested(self) -> dict[int, Text]:
        reasons = {}
        for at, entrant in enumerate(self._entrants):
            if at == self._first and entrant:
                continue
            if entrant is None:
                reasons[at] = say("compare-no-results")
            elif self._reference and (reason := _unlike(self._reference, entrant)):
                reasons[at] = reason
        return reasons

    def _rows(self, untested: Mapping[int, Text]) -> list[ComparedRow]:
        reference = self._reference
        if reference is None:
            return []
        names = [row.name for row in reference.exam.rows]
        compared = {
            (name, at): self._paired(name, reference, entrant)
            for name in names
            for at, entrant in enumerate(self._entrants)
            if entrant and at != self._first and at not in untested
        }
        tests = _corrected({place: test for place, test in compared.items() if test}, names)
        same_base = self._same_base(reference, names)
        return [
            ComparedRow(
                name=row.name,
                questions=row.questions,
                base=reference.cell(row.name, "base") if same_base else None,
                cells=[entrant.cell(row.name) if entrant else None for entrant in self._entrants],
                tests=[tests.get((row.name, at)) for at in range(len(self._entrants))],
            )
            for row in reference.exam.rows
        ]

    def _paired(self, name: str, reference: _Entrant, entrant: _Entrant) -> Comparison | None:
        subjects = next(row.subjects for row in reference.exam.rows if row.name == name)
        return paired(subjects, reference.answers, entrant.answers, self._bootstrap, self._seed)

    def _same_base(self, reference: _Entrant, names: Sequence[str]) -> bool:
        """Whether every run with results has the base's too, and they are the same."""
        every = [entrant for entrant in self._entrants if entrant]
        if any(entrant.stage == "base" or "base" not in entrant.exam.stages for entrant in every):
            return False
        same = all(_unlike(reference, entrant) is None for entrant in every)
        return same and all(e.cell(name, "base") == reference.cell(name, "base") for e in every for name in names)


def _entrant(run: ComparedRun, key: str, stage: str | None) -> _Entrant | None:
    exam = next((exam for exam in run.findings.exams if exam.key == key), None)
    if exam is None:
        return None
    chosen = run.newest(exam.stages) if stage is None else stage if stage in exam.stages else None
    return None if chosen is None else _Entrant(run, exam, chosen)


def _unlike(first: _Entrant, other: _Entrant) -> Text | None:
    """Why two results must not be compared question by question; None if they may."""
    reports = first.report, other.report
    if reports[0] is None or reports[1] is None:
        return say("compare-no-results")
    asked, other_asked = (report.asked for report in reports if report)
    if asked[0] != other_asked[0] or asked[2] != other_asked[2]:
        return say("compare-other-questions", first=asked[2], other=other_asked[2])
    if asked[1] != other_asked[1]:
        return say("compare-other-protocol", first=first.exam.protocol, other=other.exam.protocol)
    if reports[0].numbers != reports[1].numbers:
        return say("compare-other-numbers")
    if first.exam.rows and (not first.answers or not other.answers):
        return say("compare-no-answers")
    return None


def _corrected(
    compared: Mapping[tuple[str, int], Comparison], names: Sequence[str]
) -> dict[tuple[str, int], Against]:
    """The tests by row and run, corrected in two families: the first row (the average), and all rows below it."""
    tests: dict[tuple[str, int], Against] = {}
    for rows in (names[:1], names[1:]):
        family = [place for place in compared if place[0] in rows]
        adjusted = holm([compared[place].p for place in family])
        tests |= {place: Against(compared[place], p) for place, p in zip(family, adjusted, strict=True)}
    return tests


@dataclass(frozen=True, slots=True)
class OwnChange:
    """What tuning changed in an exam, from a run's own base to its tuned model."""

    stages: tuple[str, str]  # before and after
    before: Cell
    after: Cell
    change: Change


def own_changes(runs: Sequence[ComparedRun]) -> list[tuple[str, list[OwnChange | None]]]:
    """For each exam's average, what every run changed against its own base; exams without any are left out."""
    keys = dict.fromkeys((exam.key, exam.title) for run in runs for exam in run.findings.exams)
    rows = []
    for key, title in keys:
        cells = [_own_change(run, key) for run in runs]
        if any(cells):
            rows.append((title, cells))
    return rows


def _own_change(run: ComparedRun, key: str) -> OwnChange | None:
    exam = next((exam for exam in run.findings.exams if exam.key == key), None)
    if exam is None or exam.compared is None or not exam.rows or exam.rows[0].change is None:
        return None
    before, after = (exam.rows[0].cells[stage] for stage in exam.compared)
    return OwnChange(exam.compared, before, after, exam.rows[0].change)


def model_name(run: ComparedRun, stage: str | None) -> Text:
    """`run · SFT`; the run alone where it has no model."""
    if stage is None:
        return Text.same(run.label)
    model = named(stage)
    return Text(f"{run.label} · {model.zh}", f"{run.label} · {model.en}")
