"""The catalogue of texts for people: every code once, worded in English and in Chinese.

The YAML files of this folder hold it: `warnings.yaml` what a run is warned of, `report.yaml` the report's own words.
A wording is a format string with named fields, for example `{count} of {questions} prompts`; both languages use the
same fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Literal, NamedTuple

Language = Literal["en", "zh"]

FILES = ("warnings", "report")
SEPARATORS: dict[Language, str] = {"en": ", ", "zh": "、"}  # between the parts of a list


class Wording(NamedTuple):
    """The format strings of one code."""

    en: str
    zh: str


@cache
def catalogue() -> Mapping[str, Wording]:
    """The wording of every code."""
    wordings: dict[str, Wording] = {}
    for name in FILES:
        wordings |= read(name)
    return wordings


def read(name: str) -> dict[str, Wording]:
    """The codes of one file of the catalogue."""
    import yaml  # not at the top: every command imports this module, few need a wording

    text = files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    entries: dict[str, dict[Language, str]] = yaml.safe_load(text)
    return {code: Wording(**sides) for code, sides in entries.items()}


def fill(code: str, values: Mapping[str, Any], language: Language) -> str:
    """A code's wording in one language with its values. Raises KeyError for an unknown code or a missing value."""
    wording = catalogue()[code]
    return (wording.en if language == "en" else wording.zh).format(**values)
