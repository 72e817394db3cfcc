"""JSON documents that are one object with all rows in it, as pandas and other libraries write them.

{"data": [row, …]}, also train, rows, examples, records     the first of them, beside other keys
{"prompt": [value, …], "response": [value, …]}              columns as lists of one length
{"prompt": {"0": value, …}, "response": {"0": value, …}}    pandas, orient="columns"
{"0": row, "1": row, …}                                     pandas, orient="index"
{"columns": [name, …], "data": [[value, …], …]}             pandas, orient="split"
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from mlx_zh.corpus.json_rows import JsonWindow
from mlx_zh.corpus.text_files import LONGEST, beyond_ascii, wrong_encoding
from mlx_zh.errors import DataError
from mlx_zh.system.json_text import NestedTooDeeply, parse_json

_HOLDERS = ("train", "data", "rows", "examples", "records", "RECORDS")  # keys of a list with all rows
_SPLITS = ("test", "validation", "valid", "val", "dev")  # keys of lists with other rows
_LONGEST_COLUMN = 1 << 28  # characters; all columns of a document are in memory
_OPEN_ENDS = ("{", "[", ",", ":")  # of a line on which a value goes on
_SPLIT_KEYS = {"columns", "index", "data", "index_names", "column_names"}


def object_rows(path: Path, file: IO[str], encoding: str = "utf-8") -> Iterator[tuple[str, Any]] | None:
    """The rows of a document that is one object; None if `file` holds JSON lines. The file is at its start then.

    Only the first line is read to tell: in JSON lines it is a whole object, and others follow. The iterator raises
    DataError for broken JSON, and for an object over several lines that holds no rows.
    """
    first = file.readline(LONGEST)
    while first.isspace():
        first = file.readline(LONGEST)
    try:
        document = parse_json(first)
        goes_on = False
    except NestedTooDeeply:
        goes_on = False
    except ValueError:
        goes_on = len(first) == LONGEST or (first.rstrip().endswith(_OPEN_ENDS) and not _is_row(first))
    else:
        while (line := file.readline(LONGEST)) and line.isspace():
            pass
        rows = None if line else table_rows(document)
        if rows is not None:
            marked, right = beyond_ascii(first)
            if marked > right and encoding != "gb18030":
                raise wrong_encoding(path)
            return ((f"{path}[{index}]", row) for index, row in enumerate(rows))
    file.seek(0)
    return _walk(path, file, encoding) if goes_on else None


def _is_row(line: str) -> bool:
    """Whether a line is a whole object with a comma after it."""
    try:
        return isinstance(parse_json(line.rstrip().removesuffix(",")), dict)
    except ValueError:
        return False


def _walk(path: Path, file: IO[str], encoding: str) -> Iterator[tuple[str, Any]]:
    """The rows of an object, read key by key; a list with all rows is never wholly in memory."""
    text = JsonWindow(path, file, has_marks=True, encoding=encoding)
    others: dict[str, Any] = {}
    index = 0
    for key in text.object_keys():
        if key not in (*_HOLDERS, *_SPLITS) or text.peek_inside() != "{":
            others[key] = text.value(_LONGEST_COLUMN)
            continue
        is_wanted = key in _HOLDERS and not index
        text.expect("[")
        for row in text.elements():
            if is_wanted:
                yield f"{path}[{index}]", row
                index += 1
    rest = text.peek()
    if index and rest:
        raise text.error("text after the end of the object")
    if index:
        return
    rows = None if rest else table_rows(others)
    if rows is None:
        raise DataError(
            f"{path}:1: an object over several lines. A JSON array of rows or one JSON object per line is expected"
        )
    for index, row in enumerate(rows):
        yield f"{path}[{index}]", row


def table_rows(document: Any) -> Iterator[Any] | None:
    """The rows of a document that is a table, in one of the forms above; None if it is something else."""
    if not isinstance(document, dict) or not document:
        return None
    return next((rows for form in _FORMS if (rows := form(document)) is not None), None)


def _held(document: Mapping[str, Any]) -> Iterator[Any] | None:
    lists = [key for key, value in document.items() if _all(value, dict)]
    holders = [key for key in lists if key in _HOLDERS]
    if not holders or any(key not in (*_HOLDERS, *_SPLITS) for key in lists):
        return None
    return iter(document[holders[0]])


def _split(document: Mapping[str, Any]) -> Iterator[Any] | None:
    names, values = document.get("columns"), document.get("data")
    if not _all(names, str) or not _all(values, list) or not document.keys() <= _SPLIT_KEYS:
        return None
    assert isinstance(names, list) and isinstance(values, list)
    if any(len(row) != len(names) for row in values):
        return None
    return (dict(zip(names, row, strict=True)) for row in values)


def _lists(document: Mapping[str, Any]) -> Iterator[Any] | None:
    """Columns as lists. Lists of objects are the messages of one row."""
    columns = list(document.values())
    if len(columns) < 2 or not all(isinstance(column, list) and column for column in columns):
        return None
    if len({len(column) for column in columns}) > 1 or any(isinstance(v, dict) for c in columns for v in c):
        return None
    return (dict(zip(document, values, strict=True)) for values in zip(*columns, strict=True))


def _columns(document: Mapping[str, Any]) -> Iterator[Any] | None:
    columns = list(document.values())
    if not all(isinstance(column, dict) and column and _numbered(column) for column in columns):
        return None
    labels = columns[0].keys()
    if any(column.keys() != labels for column in columns):
        return None
    return ({name: column[label] for name, column in document.items()} for label in labels)


def _index(document: Mapping[str, Any]) -> Iterator[Any] | None:
    rows = list(document.values())
    return iter(rows) if _numbered(document) and all(isinstance(row, dict) for row in rows) else None


def _numbered(values: Mapping[str, Any]) -> bool:
    return all(key.isdecimal() for key in values)


def _all(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, kind) for item in value)


_FORMS = (_held, _split, _index, _columns, _lists)
