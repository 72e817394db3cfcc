"""One CSV file of multiple-choice questions, checked row by row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlx_zh.corpus.exam_table import read_table

LETTERS = ("A", "B", "C", "D")


@dataclass(frozen=True, slots=True)
class Question:
    """A question as it is written in the file, white space included."""

    id: str
    text: str
    options: tuple[str, str, str, str]
    answer: str | None  # a letter; None where it is not known


def read_questions(path: Path, problems: list[str], *, need_answer: bool) -> tuple[Question, ...]:
    """The questions of a file. Every problem is added to `problems` with file and line, and its row is left out.

    Column names may have any case. The id is the column `id`, or the first column without a name. Without
    `need_answer` the whole column answer may be missing.
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
        present = ", ".join(name for name in header if name) or "none"
        problems.append(f"{path}:1: column {shown} is missing; the columns are: {present}.")
        return ()
    if "e" in columns and any(row[columns["e"]].strip() for _, row in table.rows if columns["e"] < len(row)):
        problems.append(f"{path}:1: column E: a question has the four choices A, B, C and D.")
        return ()
    for name in dict.fromkeys(name.casefold() for name in header if name.casefold() in (*wanted, "answer")):
        if sum(other.casefold() == name for other in header) > 1:
            problems.append(f"{path}:1: column {name} is there twice.")
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
        faults = _faults(row[columns["question"]], options, answer)
        problems += [f"{path}:{line}: {fault}" for fault in faults]
        if not faults:
            questions.append(Question(key, row[columns["question"]], options, answer))  # type: ignore[arg-type]
    if not seen:
        problems.append(f"{path}: holds no questions.")
    return tuple(questions)


def _faults(question: str, options: tuple[str, ...], answer: str | None) -> list[str]:
    """What is wrong with a row, a sentence each."""
    faults = [] if question.strip() else ["the question is empty."]
    empty = [letter for letter, option in zip(LETTERS, options, strict=True) if not option.strip()]
    if empty:
        faults.append(f"choice {', '.join(empty)} is empty.")
    if answer is not None and answer not in LETTERS:
        faults.append(f"the answer must be A, B, C or D, found {answer!r}.")
    return faults
