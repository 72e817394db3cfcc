"""Shell scripts: the commands in them, and their options. Nothing is run."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from typing import Any

import yaml

from mlx_zh.errors import RecipeError
from mlx_zh.recipe_text.values import parse_value

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}|\$(\w+)")
_ASSIGNED = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)", re.DOTALL)
_ENDS = (";", "&&", "||", "|", "&")
_DEEPEST = 5  # variables within variables


@dataclass
class Command:
    """A command of a script: its words, and the variables that are set before it."""

    words: list[str]
    variables: dict[str, str] = field(default_factory=dict)


def commands(text: str) -> list[Command]:
    """The commands of a script, variables filled in. A line whose quotes do not close is parted at its blanks."""
    joined = re.sub(r"[\\^`]\n", " ", text)  # lines that go on, in sh, cmd.exe and PowerShell
    variables: dict[str, str] = {}
    every: list[Command] = []
    for line in joined.split("\n"):
        line = re.sub(r"^\s*(?:set|\$env:)\s*(\w+)\s*=\s*", r"\1=", line)
        reader = shlex.shlex(line.strip().removeprefix("!").removeprefix("%%"), posix=True, punctuation_chars=";&|")
        reader.whitespace_split = True
        words: list[str] = []
        try:
            parts = list(reader)
        except ValueError:
            parts = line.split()
        for word in [*parts, ";"]:
            if word in _ENDS:
                _add(every, words, variables)
                words = []
            else:
                words.append(word)
    return every


def _add(every: list[Command], words: list[str], variables: dict[str, str]) -> None:
    own: dict[str, str] = {}
    while words and (words[0] == "export" or _ASSIGNED.fullmatch(words[0])):
        match = _ASSIGNED.fullmatch(words.pop(0))
        if match:
            own[match[1]] = _filled(match[2], variables)
    if words:
        every.append(Command([_filled(word, {**variables, **own}) for word in words], {**variables, **own}))
    else:
        variables.update(own)


def _filled(text: str, variables: dict[str, str], depth: int = _DEEPEST) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[3]
        return variables.get(name, match[2] or "")

    if depth == 0 or "$" not in text or len(text) > 10_000:
        return text
    filled = _VARIABLE.sub(value, text)
    return filled if filled == text else _filled(filled, variables, depth - 1)


def options(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """`--name value`, `--name=value`, `--name` and `name=value` as settings, and the words that are none.

    A name with several values is a list.
    """
    values: dict[str, Any] = {}
    others: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        name, equals, text = word.partition("=")
        if not word.startswith("-") or word in ("-", "--"):
            if equals and re.fullmatch(r"[A-Za-z_][\w.]*", name):
                values[normal(name)] = value_of(text)
            else:
                others.append(word)
            continue
        if equals:
            values[normal(name)] = value_of(text)
            continue
        taken = []
        while position < len(words) and not _is_option(words[position]):
            taken.append(value_of(words[position]))
            position += 1
        values[normal(name)] = True if not taken else taken[0] if len(taken) == 1 else taken
    return values, others


def _is_option(word: str) -> bool:
    return word.startswith("-") and not re.fullmatch(r"-\.?\d.*", word) and len(word) > 1


def normal(name: str) -> str:
    """A setting's name as the tables have it: without dashes at its beginning, and with underscores."""
    return name.lstrip("-").replace("-", "_").lower()


def value_of(text: str) -> Any:
    """A value of a command line, read as YAML; text that is none stays text."""
    try:
        value = parse_value(text, text)
    except (RecipeError, yaml.YAMLError):
        return text
    return text if value is None and text else value
