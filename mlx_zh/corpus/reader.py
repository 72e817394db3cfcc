"""Read rows one at a time from a JSON, JSON-lines, Parquet or text file, each with its place in the file."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mlx_zh.errors import DataError
from mlx_zh.system.json_text import NestedTooDeeply, parse_json
from mlx_zh.system.links import check_regular

_CHUNK = 1 << 20  # characters of a JSON array read at once
_LONGEST = 1 << 24  # characters that a line or a value of an array may have; a longer one is a mistake
_WORD = 16  # characters; longer than any word or escape of JSON
_BLANK = " \t\r\n"
_MARK_BYTES, _MARKED = "surrogateescape", re.compile("[\udc80-\udcff]")  # a byte that is no text becomes a surrogate
_PARQUET, _PARQUET_ROWS = b"PAR1", 1024
_FEW_ROWS, _SMALL, _RATIO = 10_000, 1 << 26, 50  # what a Parquet file may unpack to: rows, bytes, times its size
ZIP = b"PK\3\4"
_DECODER = json.JSONDecoder()


class InvalidRow(Exception):
    """A row that cannot be used: a short `reason`, under which it is counted, and the details as its message.

    It is no MlxZhError, because the reader of the rows decides whether to skip it.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row of a file with its place: "file:line" in JSON lines, "file[index]" in a JSON array or Parquet file.

    The content decides how the file is read, not its name, because many `.json` files are JSON lines. A broken line,
    or one with bytes that are not UTF-8 in a file of UTF-8, is yielded as an InvalidRow.

    Raises DataError for a broken array (with line and column), a missing or empty file, a folder, and text that is
    not UTF-8 (a byte-order mark is allowed).
    """
    try:
        if check_file(path) == _PARQUET:
            yield from _parquet_rows(path)
            return
        with path.open(encoding="utf-8-sig", errors=_MARK_BYTES, newline="\n") as file:
            head = first_character(file)
            if head == "{":
                yield from _line_rows(path, file)
                return
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            if head == "[":
                yield from _array_rows(path, file)
            elif head := first_character(file):
                raise DataError(
                    f"{path}: not JSON: it begins with {head!r}. A JSON array of rows or one JSON object per line "
                    "is expected"
                )
            else:
                raise DataError(f"{path}: the file holds no rows")
    except UnicodeDecodeError as error:
        raise wrong_encoding(path) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line that is not blank of a text file, as {"text": line} with its place. Raises as `read_rows` does."""
    try:
        check_file(path)
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(text_lines(path, file), start=1):
                if not line.isspace():
                    yield f"{path}:{number}", {"text": line.strip()}
    except UnicodeDecodeError as error:
        raise wrong_encoding(path) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def check_file(path: Path) -> bytes:
    """The first four bytes of a file. Raises DataError for a missing or damaged file, UTF-16 and a zip archive."""
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir() if entry.suffix in (".json", ".jsonl"))[:5]
        hint = f"; it has {', '.join(names)}" if names else ""
        raise DataError(f"{path}: a folder; name one file in it{hint}")
    if not path.exists():
        raise DataError(f"{path}: no such file")
    check_regular(path, DataError)
    with path.open("rb") as file:
        head = file.read(4)
    if head == bytes(4):
        raise DataError(f"{path}: the file begins with zero bytes, so it is damaged; copy or download it again")
    # UTF-16 begins with a byte-order mark, or has a zero byte next to the first ASCII character.
    if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or 0 in head[:2]:
        raise DataError(f"{path}: the text is UTF-16; convert it: {_convert(path, 'UTF-16')}")
    if head == ZIP:
        raise DataError(
            f"{path}: a zip archive; unpack it, and name the data file in it. If it is an Excel workbook, it is "
            "damaged: open it in Excel and save it again"
        )
    return head


def first_character(file: IO[str]) -> str:
    """The first character that is not blank; the file's position is set back to the start."""
    while (character := file.read(1)) and character in _BLANK:
        pass
    file.seek(0)
    return character


def text_lines(path: Path, file: IO[str]) -> Iterator[str]:
    """The lines of a file. Raises DataError for a line that is too long for a row, before reading all of it."""
    number = 0
    while line := file.readline(_LONGEST):
        number += 1
        if len(line) == _LONGEST:
            raise _too_long(f"{path}:{number}", "line")
        yield line


def _too_long(place: str, kind: str) -> DataError:
    return DataError(
        f"{place}: a {kind} of more than {_LONGEST >> 20} million characters is no row. If line breaks were lost, "
        "write one JSON object per line; else take this row out"
    )


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    index = 0
    try:
        with parquet.ParquetFile(path) as file:
            _check_parquet(path, file.metadata)
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for row in batch.to_pylist():
                    yield f"{path}[{index}]", row
                    index += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}[{index}]: the Parquet file is damaged ({str(error).splitlines()[0]}); download it again"
        ) from error
    if not index:
        raise DataError(f"{path}: the file holds no rows")


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


def _line_rows(path: Path, file: IO[str]) -> Iterator[tuple[str, Any]]:
    """The lines of `file`, which was opened with errors=_MARK_BYTES. Raises DataError if the file is not UTF-8."""
    has_utf8 = False  # whether an earlier line has characters beyond ASCII, all of them UTF-8
    for number, line in enumerate(text_lines(path, file), start=1):
        if line.isspace():
            continue
        place = f"{path}:{number}"
        marked, right = _beyond_ascii(line)
        if marked:
            if not has_utf8 and marked > right:
                raise wrong_encoding(path)
            yield place, InvalidRow("not UTF-8", _not_utf8(line, marked, right))
            continue
        has_utf8 = has_utf8 or right > 0
        try:
            row = parse_json(line.rstrip("\r\n"))
        except NestedTooDeeply:
            row = InvalidRow("nested too deeply", "the JSON is nested too deeply")
        except ValueError as error:
            if line.strip() == "{":
                raise DataError(
                    f"{place}: an object over several lines. A JSON array of rows or one JSON object per line is "
                    "expected"
                ) from error
            row = InvalidRow("broken JSON", f"broken JSON{_column(error)}")
        yield place, row


def _beyond_ascii(line: str) -> tuple[int, int]:
    """The bytes of a line beyond ASCII: those that are not UTF-8 (`_MARK_BYTES` marks them), and those that are."""
    if line.isascii():
        return 0, 0
    try:
        return 0, len(line.encode())
    except UnicodeEncodeError:
        right = _MARKED.sub("", line)
        return len(line) - len(right), len(right.encode()) - len(right.encode("ascii", "ignore"))


def _not_utf8(line: str, marked: int, right: int) -> str:
    """What is wrong with a line that has `marked` bytes which are not UTF-8, and `right` beyond ASCII which are."""
    try:
        line.encode(errors=_MARK_BYTES).decode("gb18030")
    except UnicodeDecodeError:
        right = marked
    if marked > right:
        return f"the line is not UTF-8, it looks like GBK ({marked} bytes)"
    return f"{marked} bytes of the line are not UTF-8"


def _column(error: ValueError) -> str:
    """The column and the reason. json raises a plain ValueError only for numbers with thousands of digits."""
    return f" at column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else f": {error}"


def _array_rows(path: Path, file: IO[str]) -> Iterator[tuple[str, Any]]:
    """The elements of a JSON array; memory holds only the part of the file that is being read."""
    text = _Window(path, file)
    text.expect("[")
    if text.peek() == "]":
        raise DataError(f"{path}: the array is empty")
    index = 0
    while True:
        yield f"{path}[{index}]", text.value()
        index += 1
        if text.expect(",]") == "]":
            break
    if text.peek():
        raise text.error("text after the end of the array")


class _Window:
    """A parser with a moving window over a JSON text. Its methods raise DataError with line and column."""

    def __init__(self, path: Path, file: IO[str]):
        self._path, self._file = path, file
        self._text, self._position = "", 0
        self._line, self._column = 1, 1  # of the window's first character
        self._ended = False

    def peek(self) -> str:
        """The next character that is not blank, or "" at the end of the file; it is not consumed."""
        while True:
            while self._position < len(self._text) and self._text[self._position] in _BLANK:
                self._position += 1
            if self._position < len(self._text) or self._ended:
                return self._text[self._position : self._position + 1]
            self._more()

    def expect(self, characters: str) -> str:
        """Consume and return the next character, which must be one of `characters`."""
        character = self.peek()
        if not character or character not in characters:
            raise self.error(f"expected {' or '.join(characters)}" + ("" if character else ", the file ends"))
        self._position += 1
        return character

    def value(self) -> Any:
        """Consume and return the next JSON value."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                # The window may have cut off a string, or a word like `true` at its end.
                cut_off = error.msg.startswith("Unterminated") or error.pos > len(self._text) - _WORD
                if self._ended or not cut_off:
                    self._position = error.pos
                    raise self.error(error.msg) from error
            except (RecursionError, ValueError) as error:
                raise self.error(str(error) or "nested too deeply") from error
            else:
                if end < len(self._text) or self._ended:  # else the value may be a number that continues
                    self._position = end
                    return value
            self._more()

    def error(self, message: str) -> DataError:
        """An error at the current position."""
        passed = self._text[: self._position]
        line = self._line + passed.count("\n")
        column = len(passed) - passed.rfind("\n") if "\n" in passed else self._column + len(passed)
        return DataError(f"{self._path}:{line}: broken JSON at column {column}: {message}")

    def _more(self) -> None:
        """Read the next chunk and forget the consumed part of the window."""
        passed = self._text[: self._position]
        if "\n" in passed:
            self._line += passed.count("\n")
            self._column = len(passed) - passed.rfind("\n")
        else:
            self._column += len(passed)
        rest = self._text[self._position :]
        if len(rest) > _LONGEST:
            raise _too_long(f"{self._path}:{self._line}", "value")
        # The window doubles each time, so a long value is parsed only a few times.
        chunk = self._file.read(max(_CHUNK, len(rest)))
        self._text, self._position, self._ended = rest + chunk, 0, not chunk


def wrong_encoding(path: Path) -> DataError:
    """An error with the first line that is not UTF-8, and the encoding that it seems to have."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    number, line = 1, b""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                start = error.object.rfind(b"\n", 0, error.start) + 1
                end = error.object.find(b"\n", error.start)
                number += error.object.count(b"\n", 0, error.start)
                line = error.object[start : end if end >= 0 else None]
                break
            number += chunk.count(b"\n")
    try:
        codecs.getincrementaldecoder("gb18030")().decode(line)
    except UnicodeDecodeError:
        return DataError(f"{path}:{number}: the text is not UTF-8; convert the file to UTF-8 or correct this line")
    return DataError(
        f"{path}:{number}: the text is not UTF-8, it looks like GBK; convert it: {_convert(path, 'GB18030')}"
    )


def _convert(path: Path, encoding: str) -> str:
    return f"iconv -f {encoding} -t UTF-8 {path.name} > {path.stem}-utf8{path.suffix}"
