"""A benchmark's figures as words, the same for page and Markdown."""

from __future__ import annotations

from mlx_zh.reporting.exam_results import Change, ExamResult
from mlx_zh.reporting.messages import Text, named, say
from mlx_zh.reporting.words import points


def head_line(exam: ExamResult) -> Text:
    """What was asked, and how."""
    return say("exam_head", split=exam.split, questions=f"{exam.questions:,}", protocol=exam.protocol)


def columns(exam: ExamResult) -> list[Text]:
    """The heads of a table: category, models, and where two of them are compared the change and the verdict."""
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
