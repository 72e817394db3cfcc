"""The catalogue of texts for people: every code once, worded in English and in Chinese.

The YAML files of this folder hold it: `warnings.yaml` has the warnings, `report.yaml` the texts of the report,
`compare.yaml` those of comparisons, `init.yaml` what `mlx-zh init` says, and `chat.yaml` what a saved chat says. A
wording is a format string with named fields, for example `{count} of {questions} prompts`. Both languages have the
same fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Literal, NamedTuple

Language = Literal["en", "zh"]

FILES = ("warnings", "report", "compare", "init", "chat")
SEPARATORS: dict[Language, str] = {"en": ", ", "zh": "、"}  # between the parts of a list


class Wording(NamedTuple):
    """The format strings of a code, one for each language."""

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
    """The wordings in one file of the catalogue, by code."""
    import yaml  # not at the top: every command imports this module, but few need a wording

    text = files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    entries: dict[str, dict[Language, str]] = yaml.safe_load(text)
    return {code: Wording(**sides) for code, sides in entries.items()}


def fill(code: str, values: Mapping[str, Any], language: Language) -> str:
    """The wording of a code in one language, with its values filled in.

    Raises KeyError for an unknown code or a missing value, and ValueError or TypeError for a value that does not fit.
    """
    wording = catalogue()[code]
    return (wording.en if language == "en" else wording.zh).format(**values)
