"""Rows of JSON lines and of a JSON array, one at a time; a long array is parsed in a moving window."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mlx_zh.corpus.invalid_row import InvalidRow
from mlx_zh.corpus.text_files import (
    LONGEST,
    MARKED,
    beyond_ascii,
    is_utf8_in_gb18030,
    not_utf8,
    text_lines,
    too_long,
    wrong_encoding,
)
from mlx_zh.errors import DataError
from mlx_zh.system.json_text import NestedTooDeeply, parse_json

_CHUNK = 1 << 20  # characters of a JSON array read at once
_WORD = 16  # characters; longer than any word or escape of JSON
_BLANK = " \t\r\n"
_MIXED = "the row is UTF-8 in a file that is GB18030 (GBK) elsewhere"
_AROUND = "\r\n\ufeff"  # around a line: files that were joined have a byte-order mark in the middle
_DECODER = json.JSONDecoder()
_TRAILING_COMMA = re.compile(r",\s*([}\]])")


def line_rows(path: Path, file: IO[str], encoding: str = "utf-8") -> Iterator[tuple[str, Any]]:
    """The lines of `file`, which was opened with errors=MARK_BYTES. Raises WrongEncoding if the file is not UTF-8."""
    has_utf8 = encoding == "gb18030"  # whether an earlier line has characters beyond ASCII, all of them UTF-8
    for number, line in enumerate(text_lines(path, file), start=1):
        if line.isspace():
            continue
        place = f"{path}:{number}"
        marked, right = beyond_ascii(line)
        if marked:
            if not has_utf8 and marked > right:
                raise wrong_encoding(path)
            yield place, not_utf8(line, marked, right, encoding)
            continue
        has_utf8 = has_utf8 or right > 0
        if right and encoding == "gb18030" and is_utf8_in_gb18030(line):
            yield place, InvalidRow("not UTF-8", _MIXED)
            continue
        try:
            row = parse_json(line.strip(_AROUND))
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


def _column(error: ValueError) -> str:
    """The column and the reason. json raises a plain ValueError only for numbers with thousands of digits."""
    return (
        f" at column {error.colno}: {reason_of(error)}" if isinstance(error, json.JSONDecodeError) else f": {error}"
    )


def reason_of(error: json.JSONDecodeError) -> str:
    """What is wrong with a JSON text. Python's versions differ in what they say of a comma too many."""
    if error.msg == "Extra data" and error.doc[error.pos :].strip() == ",":
        return "there is a comma after the row; take it out"
    comma = error.doc.rfind(",", 0, error.pos + 1)
    match = _TRAILING_COMMA.match(error.doc, comma) if comma >= 0 else None
    return f"there is a comma before {match[1]}; take it out" if match and match.end() > error.pos else error.msg


def array_rows(
    path: Path, file: IO[str], *, has_marks: bool = False, encoding: str = "utf-8"
) -> Iterator[tuple[str, Any]]:
    """The elements of a JSON array; memory holds only the part of the file that is being read."""
    text = JsonWindow(path, file, has_marks=has_marks, encoding=encoding)
    if text.expect("[") and text.peek() == "]":
        raise DataError(f"{path}: the array is empty")
    for index, row in enumerate(text.elements()):
        yield f"{path}[{index}]", row
    if text.peek():
        raise text.error("text after the end of the array")


class JsonWindow:
    """A parser with a moving window over a JSON text. Its methods raise DataError with line and column.

    With `has_marks`, the file was opened with errors=MARK_BYTES, and each row is looked at for marks.
    """

    def __init__(self, path: Path, file: IO[str], *, has_marks: bool = False, encoding: str = "utf-8"):
        self._path, self._file = path, file
        self._text, self._position = "", 0
        self._line, self._column = 1, 1  # of the window's first character
        self._ended = False
        self._start = 0  # of the last value, in the window
        self._has_marks = has_marks
        self._encoding = encoding
        # whether an earlier row has characters beyond ASCII, all of them UTF-8; GB18030 is known before
        self._has_utf8 = encoding == "gb18030"

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

    def object_keys(self) -> Iterator[str]:
        """The keys of an object, from its `{` to its `}`; the caller consumes the value of each."""
        self.expect("{")
        if self.peek() == "}":
            self.expect("}")
            return
        while True:
            if self.peek() != '"':
                is_end = self.peek() == "}"
                raise self.error("there is a comma before }; take it out" if is_end else "expected a key in quotes")
            key: str = self.value()
            self.expect(":")
            yield key
            if self.expect(",}") == "}":
                return

    def peek_inside(self) -> str:
        """The first character that is not blank in the array that comes next; "" if something else comes."""
        if self.peek() != "[":
            return ""
        end = self._position + 1
        while True:
            while end < len(self._text) and self._text[end] in _BLANK:
                end += 1
            if end < len(self._text) or self._ended:
                return self._text[end : end + 1]
            end -= self._position  # `_more` moves the window to the array
            self._more()

    def elements(self) -> Iterator[Any]:
        """The elements of an array whose `[` is consumed, and which has at least one."""
        next_row = self.row if self._has_marks else self.value
        while True:
            try:
                yield next_row()
            except DataError:
                if self._position == self._start and self.peek() == "]":
                    raise self.error("there is a comma before ]; take it out") from None
                raise
            if self.expect(",]") == "]":
                return

    def row(self) -> Any:
        """Consume and return the next value; one with bytes that are not UTF-8 is an InvalidRow.

        Raises DataError if the file is not UTF-8.
        """
        value = self.value()
        text = self._text[self._start : self._position]
        marked, right = beyond_ascii(text)
        if marked and not self._has_utf8 and marked > right:
            raise wrong_encoding(self._path)
        self._has_utf8 = self._has_utf8 or right > marked
        if right and self._encoding == "gb18030" and is_utf8_in_gb18030(text):
            return InvalidRow("not UTF-8", _MIXED)
        return not_utf8(text, marked, right, self._encoding) if marked else value

    def value(self, longest: int | None = None) -> Any:
        """Consume and return the next JSON value, which may have `longest` characters (None: as many as a row)."""
        self.peek()
        while True:
            self._start = self._position
            try:
                value, end = _DECODER.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                # The window may have cut off a string, or a word like `true` at its end.
                cut_off = error.msg.startswith("Unterminated") or error.pos > len(self._text) - _WORD
                if self._ended or not cut_off:
                    self._position = error.pos
                    raise self.error(reason_of(error)) from error
            except (RecursionError, ValueError) as error:
                raise self.error(str(error) or "nested too deeply") from error
            else:
                if end < len(self._text) or self._ended:  # else the value may be a number that continues
                    self._position = end
                    return value
            self._more(longest)

    def error(self, message: str) -> DataError:
        """An error at the current position."""
        if (
            self._has_marks and not self._has_utf8 and MARKED.search(self._text)
        ):  # in GBK a byte of a character can be a backslash
            return wrong_encoding(self._path)
        passed = self._text[: self._position]
        line = self._line + passed.count("\n")
        column = len(passed) - passed.rfind("\n") if "\n" in passed else self._column + len(passed)
        return DataError(f"{self._path}:{line}: broken JSON at column {column}: {message}")

    def _more(self, longest: int | None = None) -> None:
        """Read the next chunk and forget the consumed part of the window."""
        passed = self._text[: self._position]
        if "\n" in passed:
            self._line += passed.count("\n")
            self._column = len(passed) - passed.rfind("\n")
        else:
            self._column += len(passed)
        rest = self._text[self._position :]
        if len(rest) > (longest or LONGEST):
            raise too_long(f"{self._path}:{self._line}", "value")
        # The window doubles each time, so a long value is parsed only a few times.
        chunk = self._file.read(max(_CHUNK, len(rest)))
        self._text, self._position, self._ended = rest + chunk, 0, not chunk
