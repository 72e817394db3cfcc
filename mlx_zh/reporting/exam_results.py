"""Benchmark results of a run side by side: the rows of each benchmark's table, and what changed beyond noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from mlx_zh.exams import statistics
from mlx_zh.exams.current import is_current
from mlx_zh.language.notice import notices_of
from mlx_zh.system.escaping import text_lines
from mlx_zh.system.json_text import load_json, parse_json

Answers = dict[str, dict[str, bool]]  # subject -> question's id -> whether it was answered right
_ORDER = {"ceval": 0, "cmmlu": 1}
_DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError)  # what reading a damaged file raises


@dataclass(frozen=True, slots=True)
class Cell:
    """A macro average and its 95 % interval, fractions of 1."""

    macro: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Change:
    """A difference of macro averages and its 95 % interval, fractions of 1."""

    difference: float
    low: float
    high: float
    noise: bool  # whether the interval contains 0
    paired: bool  # whether it was computed question by question
    p: float | None = None  # two-sided, where it is paired


@dataclass(frozen=True)
class ExamRow:
    """A row of a benchmark's table."""

    name: str
    questions: int
    subjects: tuple[str, ...]
    cells: dict[str, Cell]  # by stage
    change: Change | None  # of the last tuned stage against the first


@dataclass(frozen=True)
class ExamResult:
    """The results of all models on one benchmark."""

    key: str
    title: str
    split: str
    protocol: str  # name and version
    questions: int
    stages: list[str]  # models, in the order of a run
    rows: list[ExamRow]  # empty where the right answers are not known
    compared: tuple[str, str] | None  # (before, after) of every row's change
    chance: tuple[float, float] | None  # 95 % interval of the macro average of someone who guesses
    tripwires: dict[str, list[str]]  # stage -> what looks wrong
    unlike: list[tuple[str, str]] = field(default_factory=list)  # stages that were not asked the same
    rescored: list[tuple[str, str]] = field(default_factory=list)  # stages with other versions of the numbers


Current = Mapping[str, Mapping[str, str]]  # stage -> digests of the model as it is now, see `exams.figures.About`


def gather(
    folder: Path, stages: Sequence[str], *, bootstrap: int, seed: int, current: Current = MappingProxyType({})
) -> tuple[list[ExamResult], list[tuple[str, str]]]:
    """Every exam in `runs/NAME/eval`, C-Eval and CMMLU first; `bootstrap` samples and `seed` are of the intervals.

    Figures of models that are not `current` are left out; the second result is the exam and stage of each.
    """
    exams: dict[str, dict[str, Report]] = {}
    outdated: list[tuple[str, str]] = []
    for stage in stages:
        for path in sorted(folder.glob(f"{stage}-*.json")):
            key = path.stem.removeprefix(f"{stage}-")
            if path.stem.endswith("-submission") or (report := read_report(path, key)) is None:
                continue
            if is_current(report.about, current.get(stage, {})):
                exams.setdefault(key, {})[stage] = report
            else:
                outdated.append((report.title, stage))
    keys = sorted(exams, key=lambda key: (_ORDER.get(key, 2), key))
    return [_Exam(folder, key, exams[key], bootstrap, seed).result() for key in keys], outdated


@dataclass(frozen=True)
class _Row:
    """A row of one model's table; `cell` is None where no subject of it was asked."""

    name: str
    questions: int
    members: tuple[str, ...]
    cell: Cell | None


@dataclass(frozen=True)
class Report:
    """The part of a result file (`exams.figures.ExamReport`) that the report uses, checked."""

    title: str
    split: str
    protocol: str
    questions: int
    rows: list[_Row]
    chance: tuple[float, float] | None
    tripwires: list[str]
    asked: tuple[object, object, object]  # equal for models that were asked the same questions in the same way
    about: object  # what was asked of which model
    numbers: object  # equal where the same version of log-probs decided


def read_report(path: Path, key: str) -> Report | None:
    """The result file of the exam `key`; None where it is damaged. Files of older versions have fewer keys."""
    try:
        report = load_json(path)
        return _checked(report, key) if report["letters"]["predicted"] else None
    except _DAMAGED:
        return None


def _checked(report: Any, key: str) -> Report:
    """Raises one of `_DAMAGED` where a value is missing or has another type."""
    about = report.get("about", {})
    protocol = about.get("protocol", {})
    chance = [float(end) for end in report.get("chance") or ()]
    if chance and not 0 <= chance[0] <= chance[1] <= 1:
        raise ValueError("accuracies are shares of 1")
    return Report(
        title=str(report.get("benchmark", key)),
        split=str(report.get("split", "")),
        protocol=f"{protocol.get('name', '?')} v{protocol.get('version', '?')}",
        questions=int(report.get("questions", 0)),
        rows=[_checked_row(row) for row in report.get("rows") or ()],
        chance=(chance[0], chance[1]) if chance else None,
        tripwires=_tripwires(report),
        asked=(about.get("asked"), about.get("protocol"), report.get("questions")),
        about=about,
        numbers=about.get("numbers"),
    )


def _checked_row(row: Any) -> _Row:
    cell = None if row["macro"] is None else Cell(float(row["macro"]), *map(float, row["interval"]))
    if cell is not None and not 0 <= cell.low <= cell.macro <= cell.high <= 1:
        raise ValueError("accuracies are shares of 1")
    return _Row(str(row["name"]), int(row["questions"]), tuple(map(str, row.get("members") or ())), cell)


def _tripwires(report: Any) -> list[str]:
    """Sentences of the result, notices where it has their codes."""
    texts, codes = (report.get(key) for key in ("tripwires", "tripwire_codes"))
    return notices_of(texts if isinstance(texts, list) else [], codes if isinstance(codes, list) else [])


class _Exam:
    def __init__(self, folder: Path, key: str, reports: Mapping[str, Report], bootstrap: int, seed: int) -> None:
        self._folder, self._key, self._reports = folder, key, reports
        self._bootstrap, self._seed = bootstrap, seed

    def result(self) -> ExamResult:
        first = next(iter(self._reports.values()))
        stages = list(self._reports)
        tuned = [stage for stage in stages[1:] if stage != "fused"] or stages[1:]
        compared = (stages[0], tuned[-1]) if tuned else None
        unlike = [(stages[0], stage) for stage in stages[1:] if self._reports[stage].asked != first.asked]
        rescored = [(stages[0], stage) for stage in stages[1:] if self._reports[stage].numbers != first.numbers]
        if compared in [*unlike, *rescored]:
            compared = None
        return ExamResult(
            key=self._key,
            title=first.title,
            split=first.split,
            protocol=first.protocol,
            questions=first.questions,
            stages=stages,
            rows=self._rows(compared),
            compared=compared,
            chance=first.chance,
            tripwires={stage: report.tripwires for stage, report in self._reports.items()},
            unlike=unlike,
            rescored=[stages for stages in rescored if stages not in unlike],
        )

    def _rows(self, compared: tuple[str, str] | None) -> list[ExamRow]:
        answers = [read_answers(self._folder / f"{stage}-{self._key}.jsonl") for stage in compared or ()]
        rows: dict[str, ExamRow] = {}
        for stage, report in self._reports.items():
            for row in report.rows:
                shown = rows.setdefault(row.name, ExamRow(row.name, row.questions, row.members, {}, None))
                if row.cell is not None:
                    shown.cells[stage] = row.cell
        if compared is None:
            return list(rows.values())
        return [self._with_change(row, compared, answers) for row in rows.values()]

    def _with_change(self, row: ExamRow, compared: tuple[str, str], answers: list[Answers]) -> ExamRow:
        before, after = (row.cells.get(stage) for stage in compared)
        change = None
        if before and after:
            change = self._paired(row.subjects, *answers) or _unpaired(before, after)
        return replace(row, change=change)

    def _paired(self, subjects: tuple[str, ...], before: Answers, after: Answers) -> Change | None:
        compared = paired(subjects, before, after, self._bootstrap, self._seed)
        if compared is None:
            return None
        return Change(compared.difference, *compared.interval, compared.noise, True, compared.p)


def paired(
    subjects: Sequence[str], before: Answers, after: Answers, bootstrap: int, seed: int
) -> statistics.Comparison | None:
    """The change question by question; None where answers are missing, or are not to the same questions."""
    if not subjects or any(s not in before or before[s].keys() != after.get(s, {}).keys() for s in subjects):
        return None
    first, second = (
        {s: np.array([side[s][question] for question in before[s]]) for s in subjects} for side in (before, after)
    )
    return statistics.compare(first, second, bootstrap, seed)


def read_answers(path: Path) -> Answers:
    """Whether each question was answered right, from STAGE-EXAM.jsonl; empty where it is missing or damaged."""
    answers: Answers = {}
    try:
        for text in text_lines(path.read_text(encoding="utf-8")):
            line = parse_json(text)
            right = line["choice"] is not None and line["choice"] == line["truth"]
            answers.setdefault(line["subject"], {})[line["id"]] = right
    except _DAMAGED:
        return {}
    return answers


def _unpaired(before: Cell, after: Cell) -> Change:
    """The change from the two intervals alone, as if the questions were different: wider than a paired interval."""
    half = math.hypot(before.high - before.low, after.high - after.low) / 2
    difference = after.macro - before.macro
    low, high = difference - half, difference + half
    return Change(difference, low, high, low <= 0 <= high, False)
