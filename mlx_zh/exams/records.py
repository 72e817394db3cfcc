"""Results in the run folder: a file for each finished subject, so that a killed run goes on, then the whole exam."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mlx_zh.exams.answers import Answer
from mlx_zh.exams.exam import Subject
from mlx_zh.exams.figures import ExamReport, submission
from mlx_zh.system.escaping import text_lines
from mlx_zh.system.json_text import load_json, parse_json
from mlx_zh.system.storage import json_line, write_json, write_text

_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError)  # what reading a damaged file raises


def are_to(answers: Sequence[Answer], subjects: Sequence[Subject]) -> bool:
    """Whether these are the answers to all questions of the subjects, in order."""
    asked = [(subject.key, question.id, question.answer) for subject in subjects for question in subject.questions]
    return [(answer.subject, answer.id, answer.truth) for answer in answers] == asked


class Records:
    """The answers of one model (`stage`) to one exam, in `folder` (`runs/NAME/eval`)."""

    def __init__(self, folder: Path, stage: str, exam: str) -> None:
        self._folder, self._name = folder, f"{stage}-{exam}"

    def load_subject(self, subject: Subject, key: str) -> list[Answer] | None:
        """The answers to a finished subject; None where there are none, or they were given under another `key`."""
        try:
            record = load_json(self._subject(subject.key))
            answers = [Answer.of(fields) for fields in record["answers"]]
            return answers if record["key"] == key and are_to(answers, [subject]) else None
        except _DAMAGED:  # or missing, or of another version: ask again
            return None

    def save_subject(self, subject: str, key: str, answers: Sequence[Answer]) -> None:
        """Write the answers of a finished subject; `key` stands for everything that can change them."""
        write_json(self._subject(subject), {"key": key, "answers": [answer.as_dict() for answer in answers]})

    def load_exam(self) -> tuple[Mapping[str, object], list[Answer]] | None:
        """The report and the answers of a finished exam, or None; another version may have written the report."""
        answers, report = (self._folder / f"{self._name}.{kind}" for kind in ("jsonl", "json"))
        try:
            lines = list(text_lines(answers.read_text(encoding="utf-8")))
            values: dict[str, object] = dict(load_json(report))
            return values, [Answer.of(parse_json(line)) for line in lines]
        except _DAMAGED:
            return None

    def save_exam(self, answers: Sequence[Answer], report: ExamReport, *, labelled: bool) -> list[Path]:
        """Write a line for each question, and the report; for a split without answers also C-Eval's submission."""
        lines = [json_line(answer.as_dict()) for answer in answers]
        paths = [self._folder / f"{self._name}.jsonl", self._folder / f"{self._name}.json"]
        write_text(paths[0], "".join(lines))
        write_json(paths[1], report)
        if not labelled:
            paths.append(self._folder / f"{self._name}-submission.json")
            write_json(paths[2], submission(answers))
        return paths

    def _subject(self, subject: str) -> Path:
        return self._folder / "subjects" / self._name / f"{subject}.json"
