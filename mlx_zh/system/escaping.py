"""Texts of strangers inside files and terminals: one function for each language that they are written into.

Data rows, file names, answers and settings may hold anything. Modelfiles have their own rules
(`models/export/ollama.py`), HTML is escaped by Jinja, and JSON and YAML by their writers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

# Control characters except tab and line feed; the controls and marks of direction, which can turn a text around; the
# separators of lines and paragraphs; and halves of surrogate pairs, which UTF-8 cannot hold.
CONTROLS = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_CONTROL = re.compile(f"[{CONTROLS}]")

_MARKDOWN = re.compile(r"[\\`*_\[\]|~$]")
# What begins a heading, a quotation, a list, a rule or the underline of a heading.
_FIRST = re.compile(r"^(?=[#>]|[+-](?: |$)|[=-]+$)")
_NUMBER = re.compile(r"^(\d+)(?=[.)](?: |$))")  # begins a numbered list
_LAST = re.compile(r"(?<= )(?=#+$)")  # would end a heading
_LINK = re.compile(r"(?i)\b(https?:|ftp:|www\.)")  # some viewers turn addresses into links


def without_controls(text: str, instead: str = "\ufffd") -> str:
    """The text with `instead` for each character that a terminal or a viewer would obey rather than show."""
    return _CONTROL.sub(instead, text)


def one_line(text: object) -> str:
    """The text on one line, with single spaces and without control characters."""
    return without_controls(" ".join(str(text).split()))


def markdown(text: object) -> str:
    """The text on one line, escaped so that it is neither Markdown nor HTML nor a link (CommonMark 0.31)."""
    line = one_line(text).replace("&", "&amp;").replace("<", "&lt;")
    # A backslash is an escape before punctuation alone (section 2.4), so never before a digit.
    line = _LAST.sub(r"\\", _NUMBER.sub(r"\1\\", _FIRST.sub(r"\\", _MARKDOWN.sub(r"\\\g<0>", line))))
    return _LINK.sub("\\g<1>\u200b", line)


def markdown_code(text: object) -> str:
    """The text on one line as a code span, in which nothing is Markdown (CommonMark 0.31, section 6.1)."""
    line = one_line(text)
    if not line:
        return ""
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if line[0] == "`" or line[-1] == "`" else ""
    return f"{fence}{space}{line}{space}{fence}"


def markdown_block(text: str, language: str = "") -> str:
    """The text as a fenced code block, whose fence is longer than any in it (section 4.5)."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: bool = False) -> str:
    """A table with the Markdown `head`; the cells of `rows` are escaped. With `right`, figures stand at the right."""
    rule = ["---", *["---:" if right else "---"] * (len(head) - 1)]
    lines = [head, *([markdown(cell) for cell in row] for row in rows)]
    first, *others = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([first, "|" + "|".join(rule) + "|", *others])


def text_lines(text: str) -> Iterator[str]:
    """The lines of JSON lines or plain text that are not blank.

    `str.splitlines` would also cut at U+2028, U+0085 and others, which JSON writes as they are.
    """
    return (line for line in text.split("\n") if line.strip())
