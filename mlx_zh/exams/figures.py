"""From answers to figures: the rows of the table, letters, calibration, and what looks wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlx_zh.exams import statistics
from mlx_zh.exams.answers import Answer
from mlx_zh.exams.csvfile import LETTERS
from mlx_zh.exams.exam import Exam
from mlx_zh.exams.statistics import Booleans
from mlx_zh.language.notice import Notice

ONE_LETTER = 0.6  # more of one letter than this looks like a habit, not an answer
MASS = 0.5  # less probability than this on the letters: the model does not mean to answer with one
NO_LETTER = 0.1

Figures = dict[str, Any]


def by_subject(answers: Sequence[Answer]) -> dict[str, Booleans]:
    """Right and wrong of every subject, in order."""
    found: dict[str, list[bool]] = {}
    for answer in answers:
        found.setdefault(answer.subject, []).append(answer.correct)
    return {key: np.array(values) for key, values in found.items()}


def exam_figures(exam: Exam, answers: Sequence[Answer], *, samples: int, seed: int) -> Figures:
    """Everything that is reported of one model on one exam. Rates are fractions of 1."""
    predicted = Counter(answer.choice or "none" for answer in answers)
    found: Figures = {
        "questions": len(answers),
        "expected": exam.expected,
        "letters": {"predicted": {letter: predicted[letter] for letter in (*LETTERS, "none")}},
        "mass": _mean([answer.mass for answer in answers if answer.mass is not None]),
        "truncated": sum(answer.truncated for answer in answers),
    }
    if exam.labelled:
        correct = by_subject(answers)
        truth = Counter(answer.truth for answer in answers)
        found["rows"] = _rows(exam, correct, samples, seed)
        found["subjects"] = {key: {"accuracy": float(c.mean()), "questions": len(c)} for key, c in correct.items()}
        found["letters"]["true"] = {letter: truth[letter] for letter in LETTERS}
        found["letters"]["always"] = {letter: _always(answers, letter) for letter in LETTERS}
        found["chance"] = list(statistics.chance_interval(correct, samples, seed))
        found["calibration_error"] = _calibration(answers)
    wires = tripwires(exam, found)
    found["tripwires"] = wires  # JSON keeps the English sentences; the codes are for the other languages
    found["tripwire_codes"] = [wire.as_dict() for wire in wires]
    return found


def tripwires(exam: Exam, found: Figures) -> list[Notice]:
    """What looks wrong, one sentence each."""
    wires = []
    questions, predicted = found["questions"], found["letters"]["predicted"]
    if exam.labelled:
        average = found["rows"][0]["macro"]
        low, high = found["chance"]
        if average <= high:
            chance = {"accuracy": average, "low": low, "high": high}
            wires.append(Notice("exam-at-chance" if average >= low else "exam-below-chance", **chance))
    letter = max(LETTERS, key=lambda name: int(predicted[name]))
    if predicted[letter] > ONE_LETTER * questions:
        wires.append(Notice("exam-one-letter", share=predicted[letter] / questions, letter=letter))
    if found["mass"] is not None and found["mass"] < MASS:
        wires.append(Notice("exam-letters-unlikely", mass=found["mass"]))
    if predicted["none"] > NO_LETTER * questions:
        wires.append(Notice("exam-no-letter", count=predicted["none"], questions=questions))
    if found["truncated"]:
        wires.append(Notice("exam-prompts-cut", count=found["truncated"], questions=questions))
    if exam.expected is not None and questions < exam.expected:
        wires.append(
            Notice(
                "exam-incomplete",
                questions=questions,
                exam=exam.title,
                split=exam.split,
                expected=exam.expected,
            )
        )
    return wires


def _rows(exam: Exam, correct: Mapping[str, Booleans], samples: int, seed: int) -> list[Figures]:
    rows = []
    for row in exam.rows:
        part = {s.key: correct[s.key] for s in exam.subjects if row.holds(s.entry) and s.key in correct}
        rates: Figures = {"macro": None, "interval": None, "micro": None}
        if part:
            interval = statistics.bootstrap_macro(part, samples, seed)
            rates = {"macro": statistics.macro(part), "interval": list(interval), "micro": statistics.micro(part)}
        sizes = {"subjects": len(part), "questions": sum(map(len, part.values())), "members": list(part)}
        rows.append({"name": row.name, **rates, **sizes})
    return rows


def _always(answers: Sequence[Answer], letter: str) -> float:
    """The macro average of someone who always says `letter`."""
    found: dict[str, list[bool]] = {}
    for answer in answers:
        found.setdefault(answer.subject, []).append(answer.truth == letter)
    return float(np.mean([np.mean(values) for values in found.values()]))


def _calibration(answers: Sequence[Answer]) -> float | None:
    logprobs = [answer.logprobs for answer in answers if answer.logprobs is not None]
    if len(logprobs) < len(answers):
        return None
    confidence = statistics.letter_confidence(np.array(logprobs))
    return statistics.calibration_error(confidence, np.array([answer.correct for answer in answers]))


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def submission(answers: Sequence[Answer]) -> dict[str, dict[str, str]]:
    """C-Eval's submission form (submission_example.json): subject -> id -> letter; no letter stays empty."""
    found: dict[str, dict[str, str]] = {}
    for answer in answers:
        found.setdefault(answer.subject, {})[answer.id] = answer.choice or ""
    return found
