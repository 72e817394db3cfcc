"""Data sets by name: those that come with the program, and those that the user registers."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import pydantic

from mlx_zh.errors import DataError, RecipeError
from mlx_zh.recipe import DataSet
from mlx_zh.recipe_text.document import parse_text
from mlx_zh.recipe_text.problems import explain

Registry = dict[str, DataSet]


def load_registry(own: Mapping[str, DataSet] | None = None, file: Path | None = None) -> Registry:
    """All registered data sets. Entries of the recipe (`own`) override those of `file`, and these the program's.

    Raises DataError for a file that cannot be read and for wrong entries, all in one error.
    """
    packaged = resources.files("mlx_zh.corpus").joinpath("registry.yaml")
    entries = _entries(packaged.read_text(encoding="utf-8"), "registry.yaml")
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"data.registry_file: {file} cannot be read: {error}") from error
        entries |= _entries(text, str(file))
    return entries | dict(own or {})


class _Table(pydantic.RootModel[dict[str, DataSet]]):
    """Data sets by name."""


def _entries(text: str, place: str) -> Registry:
    if all(line.lstrip().startswith("#") for line in text.splitlines() if line.strip()):
        return {}
    try:
        document = parse_text(text, Path(place), "a registry is a mapping from names to data sets")
    except RecipeError as error:
        raise DataError(str(error)) from error
    entries, problems = {}, document.problems
    try:
        entries = _Table.model_validate(document.value).root
    except pydantic.ValidationError as error:
        problems = problems + explain(error, document, DataSet, depth=1)
    if problems:
        raise DataError("\n".join(text for _, text in sorted(problems)))
    return entries


def find_data_set(name: str, registry: Registry) -> DataSet:
    """The data set of this name. Raises DataError, with the nearest name, if there is none."""
    if name in registry:
        return registry[name]
    close = difflib.get_close_matches(name, registry, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise DataError(
        f"{name}: there is no such file, and no data set of that name; {hint}Known data sets: {', '.join(registry)}"
    )
