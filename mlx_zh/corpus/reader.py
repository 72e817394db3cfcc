"""Read rows one at a time from a JSON, JSON-lines, Parquet or text file, each with its place in the file."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_zh.corpus.invalid_row import InvalidRow as InvalidRow  # readers of rows take it from here
from mlx_zh.corpus.json_rows import array_rows, line_rows
from mlx_zh.corpus.json_tables import object_rows
from mlx_zh.corpus.text_encoding import file_encoding
from mlx_zh.corpus.text_files import (
    LONGEST,
    MARK_BYTES,
    MARKED,
    PARQUET,
    WEB_PAGE,
    WrongEncoding,
    check_file,
    encoding_of,
    first_character,
    open_text,
    text_lines,
    web_page,
    within_bounds,
    wrong_encoding,
)
from mlx_zh.errors import DataError
from mlx_zh.system.json_text import parse_json

_PARQUET_ROWS = 1024
_START = 1 << 16  # characters of a text in which JSON is looked for
_FEW_ROWS, _SMALL, _RATIO = 10_000, 1 << 26, 50  # what a Parquet file may unpack to: rows, bytes, times its size


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row of a file with its place: "file:line" in JSON lines, "file[index]" in a JSON array or Parquet file.

    The content decides how the file is read, not its name, because many `.json` files are JSON lines. A JSON object
    that holds all rows is read too: see `json_tables`. A broken line, or a row with bytes that are not UTF-8 in a
    file of UTF-8, is yielded as an InvalidRow.

    Raises DataError for a broken array (with line and column), a missing or empty file, a folder, and text that is
    neither UTF-8 nor UTF-16 with a byte-order mark nor Chinese GB18030.
    """
    return within_bounds(path, _rows(path))


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        start = check_file(path)
        if start == PARQUET:
            yield from _parquet_rows(path)
            return
        count = 0
        encoding = encoding_of(start)
        try:
            for row in _json_rows(path, encoding):
                yield row
                count += 1
        except WrongEncoding:
            encoding, _ = file_encoding(path)
            if encoding != "gb18030":
                raise
            # The rows before the first Chinese one are read again: they are ASCII, so they are the same.
            yield from islice(_json_rows(path, encoding), count, None)
    except UnicodeDecodeError as error:
        raise wrong_encoding(path) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _json_rows(path: Path, encoding: str) -> Iterator[tuple[str, Any]]:
    with open_text(path, encoding, errors=MARK_BYTES) as file:
        head = first_character(file)
        if head == "{":
            rows = object_rows(path, file, encoding)
            yield from line_rows(path, file, encoding) if rows is None else rows
        elif head == "[":
            yield from _array_rows(path, encoding)
        elif head:
            if MARKED.match(head):
                raise wrong_encoding(path)
            if head == "<" and file.readline(LONGEST).lstrip().lower().startswith(WEB_PAGE):
                raise web_page(path)
            raise DataError(
                f"{path}: not JSON: it begins with {head!r}. A JSON array of rows or one JSON object per line "
                "is expected"
            )
        else:
            raise DataError(f"{path}: the file holds no rows")


def _array_rows(path: Path, encoding: str) -> Iterator[tuple[str, Any]]:
    """The rows of a JSON array. To look for marks takes time, so only a file with a wrong byte is read with them."""
    count = 0
    if encoding == "gb18030":
        with open_text(path, encoding, errors=MARK_BYTES) as file:
            yield from array_rows(path, file, has_marks=True, encoding=encoding)
        return
    try:
        with open_text(path, encoding) as file:
            for row in array_rows(path, file):
                yield row
                count += 1
    except UnicodeDecodeError:
        if encoding == "utf-16":
            raise
        with open_text(path, encoding, errors=MARK_BYTES) as file:
            yield from islice(array_rows(path, file, has_marks=True), count, None)


def holds_json_rows(path: Path) -> bool:
    """Whether a file of text holds rows as JSON: its first line is an object, or it begins an array of objects.

    Raises the errors of `read_rows` for a file that holds no text.
    """
    try:
        with open_text(path, encoding_of(check_file(path)), errors=MARK_BYTES) as file:
            if first_character(file) not in ("{", "["):
                return False
            start = file.read(_START).lstrip()
    except (OSError, UnicodeDecodeError):
        return False  # who reads the file says what is wrong
    if start[0] == "[":
        return start[1:].lstrip()[:1] == "{"
    line = start.partition("\n")[0]
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return len(line) == len(start) == _START  # a row that is longer


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line that is not blank of a text file, as {"text": line} with its place. Raises as `read_rows` does."""
    return within_bounds(path, _lines(path))


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with open_text(path, encoding_of(check_file(path))) as file:
            for number, line in enumerate(text_lines(path, file), start=1):
                if not line.isspace():
                    yield f"{path}:{number}", {"text": line.strip()}
    except UnicodeDecodeError as error:
        raise wrong_encoding(path) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    index = 0
    try:
        with parquet.ParquetFile(path) as file:
            _check_parquet(path, file.metadata)
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for row in _batch_rows(batch):
                    yield f"{path}[{index}]", row
                    index += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}[{index}]: the Parquet file is damaged ({str(error).splitlines()[0]}); download it again"
        ) from error
    if not index:
        raise DataError(f"{path}: the file holds no rows")


def _batch_rows(batch: Any) -> Iterator[Any]:
    """The rows of a batch; one with bytes that are not UTF-8 is an InvalidRow."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(batch.num_rows):
            try:
                yield batch.slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield InvalidRow("not UTF-8", "a text of the row is not UTF-8")


def _check_parquet(path: Path, metadata: Any) -> None:
    """Refuse a file that unpacks to many times its size, before a row group of it is read. Raises DataError."""
    size = path.stat().st_size
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    unpacked = sum(group.total_byte_size for group in groups)
    if metadata.num_rows > _FEW_ROWS + size // 2 or unpacked > _SMALL + _RATIO * size:
        raise DataError(
            f"{path}: {size:,} bytes unpack to {metadata.num_rows:,} rows of {unpacked:,} bytes, and no data set of "
            "texts does so; leave the file out"
        )
