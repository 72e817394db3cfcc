"""Reading a recipe's file and the overrides of the command line."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pydantic

from mlx_zh.errors import RecipeError
from mlx_zh.recipe.recipe import Recipe
from mlx_zh.recipe_text.document import Document, parse
from mlx_zh.recipe_text.problems import explain
from mlx_zh.recipe_text.values import parse_value


def load_recipe(
    path: Path | str, overrides: Sequence[str] = (), *, beside: Path | Literal["recipe"] | None = "recipe"
) -> Recipe:
    """Read a recipe and apply overrides of the form `section.key=value`.

    Paths of data files and local models are relative to the folder `beside` (the recipe's own) if they exist there,
    otherwise to the current folder. Raises RecipeError with every problem: file, line, key, what was got and what was
    expected.
    """
    path = Path(path)
    folder = path.parent if beside == "recipe" else beside
    document = parse(path)
    for override in overrides:
        _apply(document, override)
    problems = document.problems
    try:
        recipe = Recipe.model_validate(document.value, context={"beside": folder})
    except pydantic.ValidationError as error:
        problems = problems + explain(error, document, Recipe)
    if problems:
        raise RecipeError("\n".join(text for _, text in sorted(problems)))
    return recipe


_WIDE_NUMBER = re.compile(r"[０-９．－＋ｅＥ]+")


def _parted(override: str) -> tuple[str, str]:
    """Key and value of an override. Raises RecipeError if it has none.

    What a Chinese input method writes is read as what was meant: ＝ and ： for the equals sign, wide letters and 。
    in the key, and a value that is a number in wide digits.
    """
    key, equals, text = override.partition("=")
    if not equals and (sign := re.search("[＝：:]", override)):
        key, equals, text = override[: sign.start()], sign[0], override[sign.end() :]
    key = unicodedata.normalize("NFKC", key.replace("。", ".")).strip()
    if not equals or not key:
        raise RecipeError(f"{override!r} is not an override: write KEY=VALUE, for example sft.learning_rate=2e-4.")
    if _WIDE_NUMBER.fullmatch(text.strip()):
        text = unicodedata.normalize("NFKC", text)
    return key, text


def _apply(document: Document, override: str) -> None:
    """Set the value of one override. Raises RecipeError when its key or value is not valid."""
    key, text = _parted(override)
    parts = key.split(".")
    if not all(parts):
        raise RecipeError(f"{override!r}: {key!r} is not a key; write it as in sft.learning_rate=2e-4.")
    target = document.value
    for depth, part in enumerate(parts[:-1], start=1):
        below = target.get(part)
        if below is None:
            document.overridden[tuple(parts[:depth])] = override
        elif not isinstance(below, dict):
            kind = "a list: override the whole list" if isinstance(below, list) else "a value, not a section"
            raise RecipeError(f"{override!r}: {'.'.join(parts[:depth])} is {kind}.")
        target[part] = target = dict(below or {})  # a copy, because a YAML alias makes two sections one object
    target[parts[-1]] = parse_value(text, override)
    document.overridden[tuple(parts)] = override
