"""Raw text for continued pre-training: a file of text, or the `text` of a row, in passages of limited length.

A passage is what the passes over the data hold in memory at once. It ends at a blank line where there is one, else at
the end of a line, else of a sentence; the passages of a document, joined, are the document.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from mlx_zh.corpus.conversation import Document
from mlx_zh.corpus.text_encoding import file_encoding
from mlx_zh.corpus.text_files import open_text
from mlx_zh.errors import DataError

TEXT_SUFFIXES = (".txt", ".md")
PASSAGE = 1 << 16  # characters of a passage at most
_SENTENCE = re.compile(r"[。！？!?…．.；;]+[”’」』）)\]】》\"']*\s*")
_MARK = "\ufeff"  # a byte-order mark in GB18030 is text to Python


class PassageRow(dict[str, Any]):
    """A row {"text": …} from a file of text: whether the document begins, and ends, with it."""

    def __init__(self, text: str, *, begins: bool, ends: bool) -> None:
        super().__init__(text=text)
        self.begins, self.ends = begins, ends


def read_document(path: Path) -> Iterator[tuple[str, Any]]:
    """The passages of a text file as `PassageRow`s with their places "file:line", read one at a time.

    The text is UTF-8, UTF-16 with a byte-order mark, or GB18030. Raises DataError for a file that cannot be read,
    text in another encoding, and a file without any text.
    """
    try:
        with open_text(path, file_encoding(path)[0], newline="") as file:
            line = 1
            for text, begins, ends in _passages(file):
                if begins and ends and not text.strip(f"{_MARK} \t\r\n"):
                    raise DataError(f"{path}: the file holds no text; write some into it, or leave it out")
                yield (
                    f"{path}:{line}",
                    PassageRow(text.removeprefix(_MARK) if begins else text, begins=begins, ends=ends),
                )
                line += text.count("\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def documents_of(row: Mapping[str, Any], text: str) -> Iterator[Document]:
    """The passages of a row's text. Raises InvalidRow for a row without text that can be seen."""
    if isinstance(row, PassageRow):
        yield Document(text, begins=row.begins, ends=row.ends)
        return
    for passage, begins, ends in _passages(io.StringIO(text, newline="")):
        yield Document(passage, begins=begins, ends=ends)


def _passages(file: IO[str]) -> Iterator[tuple[str, bool, bool]]:
    """(text, whether it is the first, whether it is the last) of each passage; one even if there is no text."""
    held, begins = "", True
    while True:
        new = file.read(PASSAGE + 1 - len(held))
        held += new
        if len(held) <= PASSAGE:
            yield held, begins, True
            return
        end = end_of_passage(held, PASSAGE)
        yield held[:end], begins, False
        held, begins = held[end:], False


def end_of_passage(text: str, limit: int) -> int:
    """Where a text that is longer than `limit` characters is cut, at `limit` at most and beyond its half."""
    half = limit // 2
    for mark in ("\n\n", "\r\n\r\n", "\n"):
        at = text.rfind(mark, half, limit)
        if at >= 0:
            return at + len(mark)
    ends = [match.end() for match in _SENTENCE.finditer(text, half, limit) if match.end() < limit]
    if ends:
        return ends[-1]
    blank = max(text.rfind(mark, half, limit) for mark in " \t　")
    return blank if blank > 0 else limit
