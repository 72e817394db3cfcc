"""The figures of a benchmark as text, the same on the page and in Markdown."""

from __future__ import annotations

from mlx_zh.reporting.compared_exams import ComparedExam
from mlx_zh.reporting.exam_results import Change, ExamResult
from mlx_zh.reporting.messages import Text, named, say
from mlx_zh.reporting.words import points


def head_line(exam: ExamResult | ComparedExam) -> Text:
    """What was asked and under which protocol."""
    return say("exam_head", split=exam.split, questions=f"{exam.questions:,}", protocol=exam.protocol)


def columns(exam: ExamResult) -> list[Text]:
    """The column heads of a table: category, models, and, where two of them are compared, change and verdict."""
    names = [say("category"), *map(named, exam.stages)]
    if exam.compared:
        before, after = map(named, exam.compared)
        names += [say("change", before=before, after=after), say("verdict")]
    return names


def percent(fraction: float, decimals: int) -> str:
    """A fraction of 1 in percent, without the sign."""
    return f"{100 * fraction:.{decimals}f}"


def interval(change: Change) -> str:
    """The 95 % interval of a change in percentage points."""
    return f"[{points(change.low, 1)}, {points(change.high, 1)}]"
