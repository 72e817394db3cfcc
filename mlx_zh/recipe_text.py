"""YAML with line numbers, and validation errors as a person would write them."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pydantic
import yaml

from mlx_zh.errors import RecipeError

Key = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and booleans: `1e-5` is a number, and `no` is a word."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":float", ":bool", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)


@dataclass
class Marked:
    """A parsed file: its value, the line of every key, and the keys that an override set."""

    path: Path
    value: dict[str, Any]
    lines: dict[Key, int]
    overridden: dict[Key, str] = field(default_factory=dict)

    def where(self, key: Key) -> str:
        """The place to look at for `key`: the override that set it, or file and line of it or what holds it."""
        for size in range(len(key), 0, -1):
            if (override := self.overridden.get(key[:size])) is not None:
                return f"{override!r}"
            if (line := self.lines.get(key[:size])) is not None:
                return f"{self.path}:{line}"
        return str(self.path)


def parse(path: Path) -> Marked:
    """Read a YAML mapping from `path`."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe at {path}.") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not UTF-8 text; save it as UTF-8.") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        node = yaml.compose(text, Loader=_Loader)
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RecipeError(f"{place}: not valid YAML: {getattr(error, 'problem', None) or error}.") from None
    except RecursionError:
        raise RecipeError(f"{path}: not valid YAML: nested too deep.") from None
    if not isinstance(value, dict):
        raise RecipeError(
            f"{path}: a recipe is a mapping of sections (name, model, data, ...), found {_kind(value)}."
        )
    lines: dict[Key, int] = {}
    _mark(node, (), lines, path)
    return Marked(path, value, lines)


def _mark(node: Any, key: Key, lines: dict[Key, int], path: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        for name, below in node.value:
            inner, line = (*key, str(name.value)), name.start_mark.line + 1
            if inner in lines:
                raise RecipeError(f"{path}:{line}: {_dotted(inner)} is given twice (first on line {lines[inner]}).")
            lines[inner] = line
            _mark(below, inner, lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for index, below in enumerate(node.value):
            lines[(*key, index)] = below.start_mark.line + 1
            _mark(below, (*key, index), lines, path)


def parse_value(text: str, context: str) -> Any:
    """The value of an override, read as YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise RecipeError(f"{context!r}: the value is not valid YAML.") from None


def explain(error: pydantic.ValidationError, marked: Marked, schema: type[pydantic.BaseModel]) -> str:
    """Every problem on a line: where, which key, what was expected and what was found."""
    seen: dict[str, None] = {}
    for problem in error.errors():
        key = _visible(problem["loc"], marked.value)
        seen[f"{marked.where(key)}: {_sentence(problem, key, schema)}"] = None
    return "\n".join(seen)


def _visible(location: tuple[str | int, ...], value: Any) -> Key:
    """The part of pydantic's location that the user wrote; it adds names of union members."""
    key: list[str | int] = []
    for index, part in enumerate(location):
        last = index == len(location) - 1
        inside = isinstance(value, list | tuple) if isinstance(part, int) else isinstance(value, dict)
        if not inside:
            continue
        if isinstance(part, str) and part not in value and not last:
            continue
        key.append(part)
        try:
            value = value[part]
        except (KeyError, IndexError):
            value = None
    return tuple(key)


_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a section with keys of its own",
    "model_attributes_type": "a section with keys of its own",
}


def _sentence(problem: Any, key: Key, schema: type[pydantic.BaseModel]) -> str:
    name, kind, found = _dotted(key), problem["type"], problem["input"]
    if kind == "extra_forbidden":
        return _unknown(key, schema)
    if kind == "missing":
        return f"{name} is missing."
    if kind in _EXPECTED:
        return f"{name} must be {_EXPECTED[kind]}, found {_kind(found)}."
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be", 1)
    return f"{name} {message}, found {_kind(found)}."


def _unknown(key: Key, schema: type[pydantic.BaseModel]) -> str:
    """An unknown key, with the nearest valid one wherever in the recipe it stands."""
    keys = dict(_keys(schema))
    section = _dotted(tuple(k for k in key[:-1] if isinstance(k, str)))
    here = [k for k, parent in keys.items() if parent == section]
    last = str(key[-1])
    near = difflib.get_close_matches(last, [k.rsplit(".", 1)[-1] for k in here], n=1, cutoff=0.6)
    if near:
        return f"{_dotted(key)} is not a key; did you mean {'.'.join(filter(None, [section, near[0]]))}?"
    elsewhere = [k for k in keys if k.rsplit(".", 1)[-1] == last]
    if not elsewhere:
        names = {k.rsplit(".", 1)[-1]: k for k in keys}
        elsewhere = [names[n] for n in difflib.get_close_matches(last, list(names), n=1, cutoff=0.75)]
    if elsewhere:
        return f"{_dotted(key)} is not a key; did you mean {elsewhere[0]}?"
    listed = ", ".join(k.rsplit(".", 1)[-1] for k in here) or "none"
    return f"{_dotted(key)} is not a key; {section or 'a recipe'} has: {listed}."


def _keys(schema: type[pydantic.BaseModel], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted key, dotted section) of every key of a schema; keys in lists stand without an index."""
    found: list[tuple[str, str]] = []
    for name, info in schema.model_fields.items():
        dotted = f"{prefix}.{name}" if prefix else name
        found.append((dotted, prefix))
        for inner in _models(info.annotation):
            found.extend(_keys(inner, dotted))
    return found


def _models(annotation: Any) -> list[type[pydantic.BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _dotted(key: Key) -> str:
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return repr(value) if len(repr(value)) < 80 else f"{repr(value)[:77]}..."
