"""A recipe's text, checked by the recipe's own types, with the line and the key of each problem."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pydantic

from mlx_zh.errors import RecipeError
from mlx_zh.recipe import Recipe
from mlx_zh.recipe_text.document import Key, parse_text
from mlx_zh.recipe_text.problems import wrong_keys


class Finding(NamedTuple):
    """What is wrong in a recipe's text: line (0 for the whole text), key, and a sentence without the place."""

    line: int
    key: Key
    text: str

    @property
    def dotted(self) -> str:
        """The key as `sft.epochs`, without positions in lists."""
        return ".".join(part for part in self.key if isinstance(part, str))


def check_recipe(text: str, path: Path) -> tuple[Recipe | None, list[Finding]]:
    """The recipe that a text is, or what is wrong with it; `path` is where it stands or will stand."""
    prefix = re.compile(rf"{re.escape(str(path))}:?(\d+)?:? ")
    try:
        document = parse_text(text, path)
    except RecipeError as error:
        return None, [_finding(str(error), prefix)]
    wrong = [_finding(problem, prefix) for _, problem in document.problems]
    recipe = None
    try:
        recipe = Recipe.model_validate(document.value, context={"beside": path.parent})
    except pydantic.ValidationError as error:
        keys, more = wrong_keys(error, document, Recipe)
        wrong += [Finding(line, key, sentence) for key, line, sentence in keys]
        wrong += [Finding(0, (), f"… and {more} more problems.")] if more else []
    return (None if wrong else recipe), sorted(wrong, key=lambda finding: finding.line)


def _finding(text: str, prefix: re.Pattern[str]) -> Finding:
    """A sentence that begins with file and line, parted."""
    place = prefix.match(text)
    return Finding(int(place[1] or 0), (), text[place.end() :]) if place else Finding(0, (), text)
