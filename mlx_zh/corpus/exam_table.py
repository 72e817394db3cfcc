"""An exam's CSV file as a table. Exams ask its questions, and the corpus removes them from the training data."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_zh.errors import DataError
from mlx_zh.system.links import check_file, check_regular
from mlx_zh.system.storage import visible_tree


@dataclass(frozen=True, slots=True)
class Table:
    """The header of a CSV file, and its rows that are not blank, each with its first line in the file."""

    header: list[str]
    rows: list[tuple[int, list[str]]]

    @property
    def columns(self) -> dict[str, int]:
        """The index of each column by its name in lower case; of equal names the first one counts."""
        return {name.casefold(): number for number, name in reversed(list(enumerate(self.header)))}


def exam_files(folder: Path, pattern: str = "**/*.csv") -> list[Path]:
    """The CSV files of an exam's folder, sorted, without hidden ones.

    Raises DataError for a link that leads out of it.
    """
    paths = visible_tree(folder, pattern)
    for path in paths:
        check_file(folder, path, DataError)
    return paths


def read_table(path: Path, problems: list[str]) -> Table | None:
    """The table of a UTF-8 file up to the first unreadable row; None if the file is not UTF-8.

    Errors in the content are appended to `problems`, with file and line. Raises DataError if the file cannot be
    opened.
    """
    text = _text(path, problems)
    if text is None:
        return None
    rows = list(_rows(path, text, problems))
    return Table([name.strip() for name in rows[0][1]] if rows else [], rows[1:])


def _text(path: Path, problems: list[str]) -> str | None:
    check_regular(path, DataError)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        other = _other_encoding(data)
        remedy = f"it looks like {other}: convert it, {_conversion(path, other)}" if other else "save it as UTF-8"
        problems.append(f"{path}:{line}: not UTF-8 text; {remedy}.")
        return None


def _conversion(path: Path, encoding: str) -> str:
    """The command that makes a UTF-8 file of it and keeps the old one."""
    old = path.with_name(path.name + ".old")
    file, kept = shlex.quote(str(path)), shlex.quote(str(old))
    return f"`mv {file} {kept} && iconv -f {_ICONV[encoding]} -t UTF-8 {kept} > {file}`"


_ICONV = {"GBK": "GB18030", "UTF-16": "UTF-16"}  # GB18030 holds all of GBK


def _other_encoding(data: bytes) -> str | None:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16"
    try:
        data.decode("gb18030")
    except UnicodeDecodeError:
        return None
    return "GBK"


def _rows(path: Path, text: str, problems: list[str]) -> Iterator[tuple[int, list[str]]]:
    """The first line and the fields of every row that is not blank."""
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
