"""The texts of the pages: English in the code, Chinese in `language/studio.yaml`, which the English text keys.

A field is named as for `str.format`: `studio.say("{count} runs", count=3)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files

import mlx_zh.language
from mlx_zh.language.catalogue import Language


def worded(text: str) -> str:
    """Marks a text that is said later, such as a column's title in a table; returns it as it is."""
    return text


def said(text: str, language: Language, /, **values: object) -> str:
    """A text of the pages in one language with its fields filled in; English where `studio.yaml` has no wording."""
    wording = text if language == "en" else chinese().get(text, text)
    return wording.format(**values) if values else wording


@cache
def chinese() -> Mapping[str, str]:
    """`studio.yaml`: the Chinese wording of each English text."""
    import yaml

    text = files(mlx_zh.language).joinpath("studio.yaml").read_text(encoding="utf-8")
    entries: dict[str, str] = yaml.safe_load(text)
    return entries
