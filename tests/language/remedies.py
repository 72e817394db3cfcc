"""What the program's messages tell a user to do: the commands, options, settings and variables that they name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files

import yaml
from wordings import sentences

from mlx_zh.language.catalogue import catalogue
from mlx_zh.language.translation import wordings
from mlx_zh.recipe import Recipe

SECTIONS = "|".join(sorted(name for name in Recipe.model_fields))

COMMAND = re.compile(r"(?<!of )\bmlx-zh ([a-z]+)")  # not "this version of mlx-zh computes"
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
KEY = re.compile(rf"(?<![\w./-])(?:{SECTIONS})\.[a-z_]+(?:\.[a-z_]+)*(?![\w(])")
SETTING = re.compile(rf"(?<![\w./-])((?:{SECTIONS})(?:\.[a-z_]+)*)(?:=|: )([\[\w][\w.\]-]*)(?![\w/])")
VARIABLE = re.compile(r"(?<![A-Z0-9_{])[A-Z][A-Z0-9]+(?:_[A-Z0-9]+)+(?![A-Z0-9_])")
SPAN = re.compile(r"`([^`]+)`")


def messages() -> Iterator[tuple[str, str]]:
    """Every message in English and in Chinese, its fields as `{}` names."""
    for english, chinese in wordings().items():
        if english in _said():
            yield english, chinese
    for words in catalogue().values():
        yield words.en, words.zh


@cache
def _said() -> Mapping[str, str]:
    return sentences()


def foreign_notes() -> Iterator[tuple[str, str]]:
    """The notes about settings of other programs, with the setting."""
    table = yaml.safe_load((files("mlx_zh.language") / "other_names.yaml").read_text(encoding="utf-8"))
    yield from ((name, entry["note"]) for name, entry in table.items() if "note" in entry)


def handles(text: str) -> set[str]:
    """The commands, options, keys, variables and spans of code that `text` names."""
    named = {match[0] for pattern in (COMMAND, OPTION, KEY, VARIABLE) for match in pattern.finditer(text)}
    return named | {f"`{span}`" for span in SPAN.findall(text)}
