"""Rows of a CSV or TSV file, one at a time, each with its line.

Read with Python's own `csv`, not with `datasets`: pandas, which reads CSV there, guesses types ("42" becomes a
number, "NA" nothing), moves all columns by one where the first row has a field too many, and does not say on which
line a row is.
"""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx_zh.corpus.reader import InvalidRow, check_file, text_lines, wrong_encoding
from mlx_zh.errors import DataError

_CHUNK = 1 << 20  # bytes decoded at once
_LONGEST = 1 << 24  # characters of one field
_COMMON = 0.75  # of the characters of a Chinese text in GB18030, at least this share is in GB2312


def read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row as {column: text} with its place "file:line", the line on which it begins.

    The first row names the columns; `.tsv` is separated by tabs, any other name by commas, with quotation marks as
    Excel writes them. The text is UTF-8 (a byte-order mark is allowed) or, if it is not, GB18030, as Excel writes it
    in China. Rows without any text are left out. A row with more or fewer fields than columns is an InvalidRow.

    Raises DataError for a file that cannot be read, text of another encoding, and an open quotation mark.
    """
    try:
        check_file(path)
        encoding = _encoding(path)
        with path.open(encoding=encoding, newline="") as file:
            # The limit holds for the whole process; the library's own, 131,072, is less than a long document has.
            csv.field_size_limit(_LONGEST)
            tabs = path.suffix.lower() == ".tsv"
            reader = csv.reader(text_lines(path, file), delimiter="\t" if tabs else ",", strict=True)
            yield from _rows(path, _records(path, reader))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _encoding(path: Path) -> str:
    """UTF-8, else GB18030 where the text is Chinese in it. Reads the file once. Raises DataError."""
    if _decodes(path, "utf-8"):
        return "utf-8-sig"
    if _decodes(path, "gb18030"):
        return "gb18030"
    raise wrong_encoding(path)


def _decodes(path: Path, encoding: str) -> bool:
    """Whether a whole file is text of an encoding. Many bytes pass for GB18030: most characters must be common."""
    decoder = codecs.getincrementaldecoder(encoding)()
    other = common = 0  # characters beyond ASCII; of them, those in GB2312
    with path.open("rb") as file:
        while True:
            chunk = file.read(_CHUNK)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError:
                return False
            if encoding == "gb18030":
                ascii_only = len(text.encode("ascii", "ignore"))
                other += len(text) - ascii_only
                common += (len(text.encode("gb2312", "ignore")) - ascii_only) // 2
            if not chunk:
                return common >= _COMMON * other


def _records(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """(first line, fields) of every row that holds any text."""
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


def _rows(path: Path, records: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[str, Any]]:
    first, header = next(records, (1, []))
    columns = _columns(f"{path}:{first}", path, header)
    line = 0
    for line, fields in records:
        if len(fields) == len(columns):
            yield f"{path}:{line}", {name: field for name, field in zip(columns, fields, strict=True) if name}
        else:
            yield (
                f"{path}:{line}",
                InvalidRow(
                    "wrong number of fields",
                    f"{len(fields)} fields where the first row names {len(columns)} columns; a field that holds the "
                    "separator stands between quotation marks",
                ),
            )
    if not line:
        raise DataError(f"{path}: the file holds no rows below the names of its columns")


def _columns(place: str, path: Path, header: Sequence[str]) -> list[str]:
    """The names of the columns; one without a name, such as pandas' row numbers, is not read."""
    columns = [name.strip() for name in header]
    if not any(columns):
        raise DataError(f"{path}: the file holds no rows")
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        raise DataError(f"{place}: two columns are called {twice[0]!r}; rename one of them")
    if len(columns) == 1 and (mark := next((mark for mark in ";\t|," if mark in columns[0]), None)):
        raise DataError(
            f"{place}: only one column, {columns[0]!r}. It seems to be separated by {mark!r}; separate columns by "
            "commas in a .csv file, by tabs in a .tsv file"
        )
    return columns
