"""The figures of an exam, from its answers: table rows, letters, calibration, and what looks wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NotRequired, TypedDict

import numpy as np

from mlx_zh.exams import statistics
from mlx_zh.exams.answers import Answer
from mlx_zh.exams.csvfile import LETTERS
from mlx_zh.exams.exam import Exam
from mlx_zh.exams.statistics import Booleans, ComparisonFigures
from mlx_zh.language.notice import Notice, NoticeRecord

# Above or below these a tripwire fires.
ONE_LETTER = 0.6  # a larger share of one letter looks like a habit, not like answers
MASS = 0.5  # with less probability on the four letters, the model does not mean to answer with a letter
NO_LETTER = 0.1  # a larger share of free answers without a letter


class FigureRow(TypedDict):
    """One row of a result table. The three rates are None where no subject of the row was asked."""

    name: str  # Average, STEM ...
    macro: float | None  # mean over subjects of their accuracies, a fraction of 1
    interval: list[float] | None  # of macro: low and high end, 95 %
    micro: float | None  # share of all questions answered right
    subjects: int  # how many subjects were asked
    questions: int
    members: list[str]  # the subjects' keys


class SubjectFigures(TypedDict):
    """One subject's result."""

    accuracy: float
    questions: int


class LetterFigures(TypedDict):
    """How often each letter was answered, and how often it is right. The last two keys need known answers."""

    predicted: dict[str, int]  # A, B, C, D and "none" -> answers
    true: NotRequired[dict[str, int]]  # letter -> questions whose right answer it is
    always: NotRequired[dict[str, float]]  # letter -> macro average of someone who always says it


class Measured(TypedDict):
    """What was counted of one model's answers to one exam. Rates are fractions of 1."""

    questions: int
    expected: int | None  # questions of the whole split; None for an exam of one's own
    letters: LetterFigures
    mass: float | None  # mean probability of the four letters together; None where no letters are scored
    truncated: int  # prompts that were cut
    # Only where the answers are known:
    rows: NotRequired[list[FigureRow]]
    subjects: NotRequired[dict[str, SubjectFigures]]
    chance: NotRequired[list[float]]  # 95 % interval of the macro average of someone who guesses
    calibration_error: NotRequired[float | None]  # None where no letters are scored


class ExamFigures(Measured):
    """Everything that is reported of one model on one exam."""

    tripwires: list[Notice]  # what looks wrong; JSON keeps the English sentences
    tripwire_codes: list[NoticeRecord]  # the same, for other languages


class ExamReport(ExamFigures):
    """The result file `runs/NAME/eval/STAGE-EXAM.json`."""

    benchmark: str  # title of the exam
    split: str
    stage: str  # base, sft, dpo or fused
    about: Mapping[str, object]  # what the answers depend on, see `stages.examination.About`


class ComparedReport(ExamReport):
    """The result file once all stages of a run have answered."""

    against: dict[str, ComparisonFigures]  # other stage -> this stage compared with it


def by_subject(answers: Sequence[Answer]) -> dict[str, Booleans]:
    """For every subject, whether each answer is right, in order."""
    correct: dict[str, list[bool]] = {}
    for answer in answers:
        correct.setdefault(answer.subject, []).append(answer.correct)
    return {key: np.array(values) for key, values in correct.items()}


def exam_figures(exam: Exam, answers: Sequence[Answer], *, samples: int, seed: int) -> ExamFigures:
    """The figures of one model on one exam; `samples` and `seed` are of the bootstrap intervals."""
    predicted = Counter(answer.choice or "none" for answer in answers)
    measured: Measured = {
        "questions": len(answers),
        "expected": exam.expected,
        "letters": {"predicted": {letter: predicted[letter] for letter in (*LETTERS, "none")}},
        "mass": _mean([answer.mass for answer in answers if answer.mass is not None]),
        "truncated": sum(answer.truncated for answer in answers),
    }
    if exam.labelled:
        correct = by_subject(answers)
        truth = Counter(answer.truth for answer in answers)
        measured["rows"] = _rows(exam, correct, samples, seed)
        measured["subjects"] = {key: {"accuracy": float(c.mean()), "questions": len(c)} for key, c in correct.items()}
        measured["letters"]["true"] = {letter: truth[letter] for letter in LETTERS}
        measured["letters"]["always"] = {letter: _always(answers, letter) for letter in LETTERS}
        measured["chance"] = list(statistics.chance_interval(correct, samples, seed))
        measured["calibration_error"] = _calibration(answers)
    wires = tripwires(exam, measured)
    return {**measured, "tripwires": wires, "tripwire_codes": [wire.as_dict() for wire in wires]}


def tripwires(exam: Exam, measured: Measured) -> list[Notice]:
    """What looks wrong about a model's answers, one sentence each."""
    wires = []
    questions, predicted = measured["questions"], measured["letters"]["predicted"]
    if exam.labelled:
        average = measured["rows"][0]["macro"]
        low, high = measured["chance"]
        if average is not None and average <= high:
            chance = {"accuracy": average, "low": low, "high": high}
            wires.append(Notice("exam-at-chance" if average >= low else "exam-below-chance", **chance))
    letter = max(LETTERS, key=lambda name: predicted[name])
    if predicted[letter] > ONE_LETTER * questions:
        wires.append(Notice("exam-one-letter", share=predicted[letter] / questions, letter=letter))
    if measured["mass"] is not None and measured["mass"] < MASS:
        wires.append(Notice("exam-letters-unlikely", mass=measured["mass"]))
    if predicted["none"] > NO_LETTER * questions:
        wires.append(Notice("exam-no-letter", count=predicted["none"], questions=questions))
    if measured["truncated"]:
        wires.append(Notice("exam-prompts-cut", count=measured["truncated"], questions=questions))
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


def _rows(exam: Exam, correct: Mapping[str, Booleans], samples: int, seed: int) -> list[FigureRow]:
    rows: list[FigureRow] = []
    for row in exam.rows:
        part = {s.key: correct[s.key] for s in exam.subjects if row.holds(s.entry) and s.key in correct}
        rows.append(
            {
                "name": row.name,
                "macro": statistics.macro(part) if part else None,
                "interval": list(statistics.bootstrap_macro(part, samples, seed)) if part else None,
                "micro": statistics.micro(part) if part else None,
                "subjects": len(part),
                "questions": sum(map(len, part.values())),
                "members": list(part),
            }
        )
    return rows


def _always(answers: Sequence[Answer], letter: str) -> float:
    """The macro average of someone who always says `letter`."""
    right: dict[str, list[bool]] = {}
    for answer in answers:
        right.setdefault(answer.subject, []).append(answer.truth == letter)
    return float(np.mean([np.mean(values) for values in right.values()]))


def _calibration(answers: Sequence[Answer]) -> float | None:
    logprobs = [answer.logprobs for answer in answers if answer.logprobs is not None and answer.mass is not None]
    if len(logprobs) < len(answers):
        return None
    confidence = statistics.letter_confidence(np.array(logprobs))
    return statistics.calibration_error(confidence, np.array([answer.correct for answer in answers]))


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def submission(answers: Sequence[Answer]) -> dict[str, dict[str, str]]:
    """C-Eval's submission form (submission_example.json): subject -> id -> letter; no letter stays empty."""
    letters: dict[str, dict[str, str]] = {}
    for answer in answers:
        letters.setdefault(answer.subject, {})[answer.id] = answer.choice or ""
    return letters
