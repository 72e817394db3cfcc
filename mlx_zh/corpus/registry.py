"""Data sets by name: those that come with the program, and those that the user registers."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import pydantic
import yaml

from mlx_zh.errors import DataError
from mlx_zh.recipe import DataSet
from mlx_zh.recipe_text.values import load

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


# PyYAML raises the others for values with explicit tags, and for dates that do not exist.
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError)


def _entries(text: str, place: str) -> Registry:
    try:
        document = load(text)[1] or {}
    except _YAML_ERRORS as error:
        raise DataError(f"{place}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise DataError(f"{place}: not valid YAML: nested too deeply") from error
    if not isinstance(document, dict):
        raise DataError(
            f"{place}: a registry must be a mapping from names to data sets, got a {type(document).__name__}"
        )
    entries, problems = {}, []
    for name, value in document.items():
        try:
            entries[str(name)] = DataSet.model_validate(value)
        except pydantic.ValidationError as error:
            for problem in error.errors():
                key = ".".join(str(part)[:80] for part in (name, *problem["loc"]))
                problems.append(f"{place}: {key}: {problem['msg']}{_near(str((*problem['loc'], '')[0]))}")
    if problems:
        raise DataError("\n".join(problems))
    return entries


def _near(key: str) -> str:
    names = list(DataSet.model_fields)
    close = [] if key in names else difflib.get_close_matches(key, names, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def find_data_set(name: str, registry: Registry) -> DataSet:
    """The data set of this name. Raises DataError, with the nearest name, if there is none."""
    if name in registry:
        return registry[name]
    close = difflib.get_close_matches(name, registry, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise DataError(
        f"{name}: there is no such file, and no data set of that name; {hint}Known data sets: {', '.join(registry)}"
    )
