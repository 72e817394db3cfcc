"""A YAML file with the line of every key."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mlx_zh.errors import RecipeError
from mlx_zh.recipe_text.values import YAML_ERRORS, compose, reason_of

Key = tuple[str | int, ...]


WIDE_COLON = "："  # what a Chinese input method writes
PLAIN_COLON = "Write a plain colon and a space in place of ："
WIDE_KEY = re.compile(rf"^[\s-]*[\w.]+{WIDE_COLON}", re.MULTILINE)


Problem = tuple[int, str]  # line, and a sentence that begins with file and line


@dataclass
class Document:
    """A parsed file: its value, the line of every key, the override that set a key, and the problems so far."""

    path: Path
    value: dict[str, Any]
    lines: dict[Key, int] = field(default_factory=dict)
    overridden: dict[Key, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def where(self, key: Key) -> tuple[int, str]:
        """The line of `key` or of the nearest key above it, and file and line as text.

        For an override it is a number beyond all lines, and the override as text.
        """
        paths = [key[:size] for size in range(len(key), 0, -1)]
        for path in paths:
            if path in self.overridden:
                return sys.maxsize, f"{self.overridden[path]!r}"
        for path in paths:
            if path in self.lines:
                return self.lines[path], f"{self.path}:{self.lines[path]}"
        return 0, str(self.path)


_FORM = "a recipe is a mapping of sections (name, model, data, ...)"


def parse(path: Path, form: str = _FORM) -> Document:
    """Read a YAML mapping from `path`; `form` says in errors what the file must be.

    Raises RecipeError when the file cannot be read or is not a YAML mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe at {path}.") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not UTF-8 text; save it as UTF-8.") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}.") from None
    return parse_text(text, path, form)


def parse_text(text: str, path: Path, form: str = _FORM) -> Document:
    """As `parse`, for a text that stands at `path` or will. Raises RecipeError if it is not a YAML mapping."""
    try:
        node, value = compose(text)
    except YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        wrong = f"{where}: not valid YAML: {reason_of(error)}."
        raise RecipeError(wrong + _wide_colon(text)) from None
    except RecursionError:
        raise RecipeError(f"{path}: not valid YAML: nested too deeply.") from None
    if not isinstance(value, dict):
        wrong = f"{path}: {form}, but this file holds {described(value)}."
        raise RecipeError(wrong + _wide_colon(text))
    document = Document(path, value)
    _note_lines(node, (), document, set())
    return document


def _wide_colon(text: str) -> str:
    """A hint at the first key that is followed by the full-width colon of a Chinese input method, or ""."""
    if (match := WIDE_KEY.search(text)) is None:
        return ""
    line = text.count("\n", 0, match.end()) + 1
    where = f"Line {line} has a full-width colon."
    return f" {where} {PLAIN_COLON}"


def _note_lines(node: Any, key: Key, document: Document, seen: set[int]) -> None:
    """Note the line of every key, and the problems that YAML allows but a recipe does not."""
    if id(node) in seen:  # an alias, which may refer to a node that contains it
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for name, below in node.value:
            inner, line = (*key, str(name.value)), name.start_mark.line + 1
            if not name.tag.endswith((":str", ":merge")):
                document.problems.append((line, f"{document.path}:{line}: keys are text, found {name.value}."))
            if inner in document.lines:
                first = document.lines[inner]
                twice = f"{document.path}:{line}: {dotted_key(inner)} is given twice (first on line {first})."
                document.problems.append((line, twice))
                continue
            document.lines[inner] = line
            _note_lines(below, inner, document, seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, below in enumerate(node.value):
            document.lines[(*key, index)] = below.start_mark.line + 1
            _note_lines(below, (*key, index), document, seen)


def dotted_key(key: Key) -> str:
    """A key as it is written: `data.sft.train[0].path`."""
    text = ""
    for part in key:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if part.isprintable() and len(part) <= 80 else repr(part[:80])
            text += f".{name}" if text else name
    return text


def described(value: Any) -> str:
    """What a value is, in a few words of an error."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."
