"""Read rows one at a time from a CSV or TSV file, each with its line.

Python's own `csv` is used and not `datasets`, because pandas, which `datasets` uses, guesses types ("42" becomes a
number, "NA" a missing value), shifts all columns by one if the first row has a field too many, and does not tell the
line of a row.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from mlx_zh.corpus.reader import InvalidRow, read_rows
from mlx_zh.corpus.text_encoding import file_encoding
from mlx_zh.corpus.text_files import (
    LONGEST,
    MARK_BYTES,
    MARKED,
    WEB_PAGE,
    first_character,
    inner_suffix,
    open_text,
    text_lines,
    web_page,
    within_bounds,
    wrong_encoding,
)
from mlx_zh.errors import DataError

_JSON = ("{", "[")  # some files of JSON lines are called .csv
_MARK = "\ufeff"  # a byte-order mark in GB18030 is text to Python


def read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row as {column: text} with its place "file:line", where the line is the first one of the row.

    The first row names the columns. A `.tsv` file is separated by tabs, a `.csv` file by commas, with quotation marks
    as Excel writes them. Text that is called .xls or .xlsx, as many web sites export it, and UTF-16, which Excel
    calls Unicode text, are separated by tabs if their first line has one. The text is UTF-8 (a byte-order mark is
    allowed), UTF-16 with a byte-order mark, or GB18030, which Excel writes in China. Rows without any text are left
    out. A row with more or fewer fields than columns, or with bytes that are no text, is yielded as an InvalidRow.

    Raises DataError for a file that cannot be read, text in another encoding, and an open quotation mark.
    """
    return within_bounds(path, _rows(path))


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        encoding, marked = file_encoding(path)
        with open_text(path, encoding, errors=MARK_BYTES, newline="") as file:
            if first_character(file) in _JSON:
                yield from read_rows(path)
                return
            # The limit is global to the process. The library's default of 131,072 is too small for a long document.
            csv.field_size_limit(LONGEST)
            separator = _separator(path, file, encoding)
            reader = csv.reader(text_lines(path, file), delimiter=separator, strict=True)
            rows = table_rows(path, str(path), _records(path, reader))
            yield from _without_marks(path, rows) if marked else rows
    except UnicodeDecodeError as error:
        raise wrong_encoding(path) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _without_marks(path: Path, rows: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The rows; one with bytes that are no text (`MARK_BYTES` marks them) is an InvalidRow."""
    for place, row in rows:
        if isinstance(row, dict):
            if any(map(MARKED.search, row)):
                raise wrong_encoding(path)  # in the names of the columns
            marked = sum(len(MARKED.findall(text)) for text in row.values())
            if marked:
                row = InvalidRow("not UTF-8", f"{marked} bytes of the row are no text in the file's encoding")
        yield place, row


def _separator(path: Path, file: IO[str], encoding: str) -> str:
    suffix = inner_suffix(path)
    first = file.readline(LONGEST)
    file.seek(0)
    if first.lstrip().lower().startswith(WEB_PAGE):
        if suffix in (".csv", ".tsv"):
            raise web_page(path)
        raise DataError(f"{path}: a web page that is called {suffix}; open it in Excel and save it as .xlsx")
    if suffix == ".tsv" or (suffix == ".csv" and encoding != "utf-16"):
        return "\t" if suffix == ".tsv" else ","
    return "\t" if "\t" in first else ","


def _records(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """The first line and the fields of every row with any text."""
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{path}:{line}: not readable as CSV: {error}. Is a quotation mark left open? Inside a field, "
                'each is written twice: "he said ""hello"""'
            ) from error
        if any(not field.isspace() for field in fields if field):
            yield line, fields


def table_rows(path: Path, place: str, records: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[str, Any]]:
    """The rows of a table as `read_csv` yields them; the first of `records`, (number, fields), names the columns.

    `place` is the start of each row's place: the file, or the file and the sheet. Raises DataError.
    """
    first, header = next(records, (1, []))
    columns = _columns(f"{place}:{first}", path, header)
    line = 0
    for line, fields in records:
        if len(fields) == len(columns):
            yield f"{place}:{line}", {name: field for name, field in zip(columns, fields, strict=True) if name}
        else:
            yield (
                f"{place}:{line}",
                InvalidRow(
                    "wrong number of fields",
                    f"{len(fields)} fields where the first row names {len(columns)} columns; a field with a "
                    "separator in it must be in quotation marks",
                ),
            )
    if not line:
        raise DataError(f"{path}: the file holds no rows below the names of its columns; add rows, or another file")


def _columns(place: str, path: Path, header: Sequence[str]) -> list[str]:
    """The names of the columns; a column without a name, such as pandas' row numbers, has the name ""."""
    columns = [name.strip().lstrip(_MARK) for name in header]
    if not any(columns):
        raise DataError(f"{path}: the file holds no rows")
    twice = sorted(name for name, count in Counter(columns).items() if name and count > 1)
    if twice:
        raise DataError(f"{place}: two columns are called {twice[0]!r}; rename one of them")
    if re.fullmatch(r'"?sep=.?"?', "".join(columns)):
        raise DataError(f"{place}: delete this line, which only Excel understands; the first line names the columns")
    if len(columns) == 1 and (mark := next((mark for mark in ";\t|,，" if mark in columns[0]), None)):
        raise DataError(
            f"{place}: only one column, {columns[0]!r}. It seems to be separated by {mark!r}; separate columns "
            "by commas in a .csv file, by tabs in a .tsv file"
        )
    return columns
