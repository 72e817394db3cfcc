"""One CSV file of multiple-choice questions, checked row by row."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_zh.errors import DataError

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
    text = _text(path, problems)
    if text is None:
        return ()
    rows = _rows(path, text, problems)
    header = [name.strip() for name in next(rows, (0, []))[1]]
    columns = {name.casefold(): number for number, name in reversed(list(enumerate(header)))}
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
    for line, row in rows:
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


def _text(path: Path, problems: list[str]) -> str | None:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        other = _other_encoding(data)
        remedy = f"it looks like {other}: convert it, `iconv -f {other} -t UTF-8`" if other else "save it as UTF-8"
        problems.append(f"{path}:{line}: not UTF-8 text; {remedy}.")
        return None


def _other_encoding(data: bytes) -> str | None:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16"
    try:
        data.decode("gb18030")
    except UnicodeDecodeError:
        return None
    return "GBK"


def _rows(path: Path, text: str, problems: list[str]) -> Iterator[tuple[int, list[str]]]:
    """(first line, fields) of every row that is not blank."""
    reader = csv.reader(io.StringIO(text, newline=""))
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problems.append(f"{path}:{line}: not readable as CSV: {error}; is a quotation mark left open?")
            return
        if any(field.strip() for field in row):
            yield line, row
