"""Results in the run folder: a file a finished subject, so that a killed run goes on, and the whole at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlx_zh.exams.answers import Answer
from mlx_zh.exams.figures import ExamReport, submission
from mlx_zh.system.storage import write_json, write_text


class Records:
    """The answers of one model (`stage`) to one exam, in `folder` (`runs/NAME/eval`)."""

    def __init__(self, folder: Path, stage: str, exam: str) -> None:
        self._folder, self._name = folder, f"{stage}-{exam}"

    def known(self, subject: str, key: str) -> list[Answer] | None:
        """A finished subject's answers, if they were given under the same `key`."""
        path = self._subject(subject)
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            return [Answer.of(fields) for fields in kept["answers"]] if kept["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError):  # not there, or not ours: ask again
            return None

    def keep(self, subject: str, key: str, answers: Sequence[Answer]) -> None:
        """Remember a finished subject."""
        write_json(self._subject(subject), {"key": key, "answers": [answer.as_dict() for answer in answers]})

    def finished(self) -> tuple[Mapping[str, object], list[Answer]] | None:
        """The report and the answers of a finished exam; another version may have written the report's values."""
        lines, whole = (self._folder / f"{self._name}.{kind}" for kind in ("jsonl", "json"))
        try:
            text = lines.read_text(encoding="utf-8")
            report: dict[str, object] = dict(json.loads(whole.read_text(encoding="utf-8")))
            return report, [Answer.of(json.loads(line)) for line in text.splitlines()]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def finish(self, answers: Sequence[Answer], report: ExamReport, *, labelled: bool) -> list[Path]:
        """Write the line-a-question file and the report; for a split without answers, C-Eval's submission too."""
        lines = [json.dumps(answer.as_dict(), ensure_ascii=False) + "\n" for answer in answers]
        paths = [self._folder / f"{self._name}.jsonl", self._folder / f"{self._name}.json"]
        write_text(paths[0], "".join(lines))
        write_json(paths[1], report)
        if not labelled:
            paths.append(self._folder / f"{self._name}-submission.json")
            write_json(paths[2], submission(answers))
        return paths

    def _subject(self, subject: str) -> Path:
        return self._folder / "subjects" / self._name / f"{subject}.json"
