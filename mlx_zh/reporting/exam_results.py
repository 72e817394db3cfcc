"""Benchmark results of a run side by side: the rows of the mission's tables, and what changed beyond noise."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_zh.exams import statistics
from mlx_zh.language.notice import notices_of

Answers = dict[str, dict[str, bool]]  # subject -> question's id -> whether it was answered right
_ORDER = {"ceval": 0, "cmmlu": 1}
_TOLD = (OSError, ValueError, KeyError, TypeError, AttributeError)  # what a damaged file raises


@dataclass(frozen=True, slots=True)
class Cell:
    """A macro average and its 95 % interval, fractions of 1."""

    macro: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Change:
    """A difference of macro averages and its 95 % interval; `paired` when taken question by question."""

    difference: float
    low: float
    high: float
    noise: bool
    paired: bool


@dataclass(frozen=True)
class ExamRow:
    """A row of a table. Cells by stage; `change` is the last tuned stage against the first."""

    name: str
    questions: int
    subjects: tuple[str, ...]
    cells: dict[str, Cell]
    change: Change | None


@dataclass(frozen=True)
class ExamResult:
    """One benchmark, all the models that took it."""

    key: str
    title: str
    split: str
    protocol: str
    questions: int
    stages: list[str]
    rows: list[ExamRow]
    compared: tuple[str, str] | None  # (before, after) of every row's change
    chance: tuple[float, float] | None
    tripwires: dict[str, list[str]]
    unlike: list[tuple[str, str]] = field(default_factory=list)  # stages that cannot be compared


def gather(folder: Path, stages: Sequence[str], *, bootstrap: int, seed: int) -> list[ExamResult]:
    """Every exam in `runs/NAME/eval`, C-Eval and CMMLU first."""
    found: dict[str, dict[str, Any]] = {}
    for stage in stages:
        for path in sorted(folder.glob(f"{stage}-*.json")):
            if not path.stem.endswith("-submission") and (figures := _figures(path)):
                found.setdefault(path.stem.removeprefix(f"{stage}-"), {})[stage] = figures
    keys = sorted(found, key=lambda key: (_ORDER.get(key, 2), key))
    return [_Exam(folder, key, found[key], bootstrap, seed).result() for key in keys]


def _figures(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) and found["letters"]["predicted"] else None
    except _TOLD:
        return None


class _Exam:
    def __init__(self, folder: Path, key: str, figures: dict[str, Any], bootstrap: int, seed: int) -> None:
        self._folder, self._key, self._figures = folder, key, figures
        self._bootstrap, self._seed = bootstrap, seed

    def result(self) -> ExamResult:
        first = next(iter(self._figures.values()))
        about = first.get("about", {})
        protocol = about.get("protocol", {})
        stages = list(self._figures)
        tuned = [stage for stage in stages[1:] if stage != "fused"] or stages[1:]
        compared = (stages[0], tuned[-1]) if tuned else None
        unlike = [(stages[0], stage) for stage in stages[1:] if self._asked(stage) != self._asked(stages[0])]
        if compared in unlike:
            compared = None
        return ExamResult(
            key=self._key,
            title=str(first.get("benchmark", self._key)),
            split=str(first.get("split", "")),
            protocol=f"{protocol.get('name', '?')} v{protocol.get('version', '?')}",
            questions=int(first.get("questions", 0)),
            stages=stages,
            rows=self._rows(compared),
            compared=compared,
            chance=tuple(first["chance"]) if first.get("chance") else None,
            tripwires={stage: _tripwires(figures) for stage, figures in self._figures.items()},
            unlike=unlike,
        )

    def _asked(self, stage: str) -> Any:
        """What was asked and how: one digest where the result has it."""
        about = self._figures[stage].get("about", {})
        return about.get("asked"), about.get("protocol"), self._figures[stage].get("questions")

    def _rows(self, compared: tuple[str, str] | None) -> list[ExamRow]:
        answers = [_answers(self._folder / f"{stage}-{self._key}.jsonl") for stage in compared or ()]
        rows: dict[str, ExamRow] = {}
        for stage, figures in self._figures.items():
            for row in figures.get("rows") or ():
                known = rows.setdefault(row["name"], ExamRow(row["name"], row["questions"], _members(row), {}, None))
                if row["macro"] is not None:
                    known.cells[stage] = Cell(row["macro"], *row["interval"])
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
        """None where the answers to the row's subjects are not there, or are not to the same questions."""
        if not subjects or any(s not in before or before[s].keys() != after.get(s, {}).keys() for s in subjects):
            return None
        ones, others = (
            {s: np.array([side[s][question] for question in before[s]]) for s in subjects} for side in (before, after)
        )
        found = statistics.compare(ones, others, self._bootstrap, self._seed)
        return Change(found.difference, *found.interval, found.noise, True)


def _members(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(map(str, row.get("members") or ()))


def _tripwires(figures: dict[str, Any]) -> list[str]:
    """Sentences of the result, notices where it has their codes."""
    texts, codes = (figures.get(key) for key in ("tripwires", "tripwire_codes"))
    return notices_of(texts if isinstance(texts, list) else [], codes if isinstance(codes, list) else [])


def _answers(path: Path) -> Answers:
    found: Answers = {}
    try:
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            right = line["choice"] is not None and line["choice"] == line["truth"]
            found.setdefault(line["subject"], {})[line["id"]] = right
    except _TOLD:
        return {}
    return found


def _unpaired(before: Cell, after: Cell) -> Change:
    """From the two intervals alone, as if the questions were different ones: wider than a paired interval."""
    half = math.hypot(before.high - before.low, after.high - after.low) / 2
    difference = after.macro - before.macro
    return Change(difference, difference - half, difference + half, abs(difference) <= half, False)
