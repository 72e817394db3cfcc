"""One CSV file of multiple-choice questions, checked row by row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlx_zh.corpus.exam_table import read_table

LETTERS = ("A", "B", "C", "D")


@dataclass(frozen=True, slots=True)
class Question:
    """A question as it is written in the file, white space included. `answer` is a letter, or None where unknown."""

    id: str
    text: str
    options: tuple[str, str, str, str]
    answer: str | None


def read_questions(path: Path, problems: list[str], *, need_answer: bool) -> tuple[Question, ...]:
    """The questions of a file. Every problem is added to `problems` with file and line; such rows are left out.

    Column names are compared without regard to case; the id is the column `id`, or the unnamed first one. Without
    `need_answer` the column answer may be missing as a whole.
    """
    table = read_table(path, problems)
    if table is None:
        return ()
    header, columns = table.header, table.columns
    identity = columns.get("id", columns.get(""))
    wanted = ["question", *(letter.casefold() for letter in LETTERS)]
    has_answer = "answer" in columns
    missing = [name for name in wanted if name not in columns]
    if need_answer and not has_answer:
        missing.append("answer")
    if missing:
        shown = ", ".join(name.upper() if len(name) == 1 else name for name in missing)
        found = ", ".join(name for name in header if name) or "none"
        problems.append(f"{path}:1: column {shown} is missing; the columns are: {found}.")
        return ()
    questions: list[Question] = []
    seen: dict[str, int] = {}
    for line, row in table.rows:
        if len(row) != len(header):
            problems.append(f"{path}:{line}: {len(row)} fields where the header has {len(header)}.")
            continue
        key = str(len(questions)) if identity is None else row[identity].strip()
        if key in seen:
            problems.append(f"{path}:{line}: id {key!r} is there twice (first on line {seen[key]}).")
        seen[key] = line
        options = tuple(row[columns[letter.casefold()]] for letter in LETTERS)
        answer = row[columns["answer"]].strip() if has_answer else None
        wrong = _wrong(row[columns["question"]], options, answer)
        problems += [f"{path}:{line}: {what}" for what in wrong]
        if not wrong:
            questions.append(Question(key, row[columns["question"]], options, answer))  # type: ignore[arg-type]
    if not seen:
        problems.append(f"{path}: holds no questions.")
    return tuple(questions)


def _wrong(question: str, options: tuple[str, ...], answer: str | None) -> list[str]:
    wrong = [] if question.strip() else ["the question is empty."]
    empty = [letter for letter, option in zip(LETTERS, options, strict=True) if not option.strip()]
    if empty:
        wrong.append(f"choice {', '.join(empty)} is empty.")
    if answer is not None and answer not in LETTERS:
        wrong.append(f"the answer must be A, B, C or D, found {answer!r}.")
    return wrong
