"""YAML with line numbers, and validation errors as a person would write them."""

from __future__ import annotations

import difflib
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pydantic
import yaml

from mlx_zh.errors import RecipeError, first_line

Key = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """Numbers and booleans as people write them: `1e-5` is a number; `no`, `1:30`, `017` and `0x1f` are text."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would take for a number, as `1e-5`, and what YAML 1.1 would."""


_PLAIN = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?", "-+0123456789."),
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in _PLAIN:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def dump(value: Any) -> str:
    """Plain values as YAML that `parse` reads back the same."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


Problem = tuple[int, str]  # line, and a sentence that begins with the place


@dataclass
class Marked:
    """A parsed file: its value, the line of every key, the keys that an override set, and what is wrong so far."""

    path: Path
    value: dict[str, Any]
    lines: dict[Key, int] = field(default_factory=dict)
    overridden: dict[Key, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def where(self, key: Key) -> tuple[int, str]:
        """The line of `key` or of what holds it (after all lines for an override), and the same as text."""
        holders = [key[:size] for size in range(len(key), 0, -1)]
        for holder in holders:
            if holder in self.overridden:
                return sys.maxsize, f"{self.overridden[holder]!r}"
        for holder in holders:
            if holder in self.lines:
                return self.lines[holder], f"{self.path}:{self.lines[holder]}"
        return 0, str(self.path)


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
    except _YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RecipeError(f"{place}: not valid YAML: {_reason(error)}.") from None
    except RecursionError:
        raise RecipeError(f"{path}: not valid YAML: nested too deep.") from None
    if not isinstance(value, dict):
        raise RecipeError(
            f"{path}: a recipe is a mapping of sections (name, model, data, ...), found {_kind(value)}."
        )
    marked = Marked(path, value)
    _mark(node, (), marked, set())
    return marked


# PyYAML's constructors let KeyError and AttributeError through for some values with a tag of their own.
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError)


def _reason(error: BaseException) -> str:
    return getattr(error, "problem", None) or first_line(error)


def _mark(node: Any, key: Key, marked: Marked, seen: set[int]) -> None:
    """Note the line of every key, and what YAML allows but a recipe does not."""
    if id(node) in seen:  # an alias, perhaps of a node that it stands in
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for name, below in node.value:
            inner, line = (*key, str(name.value)), name.start_mark.line + 1
            if not name.tag.endswith((":str", ":merge")):
                marked.problems.append((line, f"{marked.path}:{line}: keys are text, found {name.value}."))
            if inner in marked.lines:
                twice = f"{_dotted(inner)} is given twice (first on line {marked.lines[inner]})"
                marked.problems.append((line, f"{marked.path}:{line}: {twice}."))
                continue
            marked.lines[inner] = line
            _mark(below, inner, marked, seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, below in enumerate(node.value):
            marked.lines[(*key, index)] = below.start_mark.line + 1
            _mark(below, (*key, index), marked, seen)


def parse_value(text: str, context: str) -> Any:
    """The value of an override, read as YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (*_YAML_ERRORS, RecursionError) as error:
        reason = f"the value is not valid YAML: {_reason(error)}"
        raise RecipeError(f"{context!r}: {reason}. Put text in quotes.") from None


def explain(error: pydantic.ValidationError, marked: Marked, schema: type[pydantic.BaseModel]) -> list[Problem]:
    """Every problem once: where, which key, what was expected and what was found."""
    found: dict[Key, list[Any]] = {}
    for problem in error.errors():
        if problem["type"] != "invalid_key":  # `parse` has said it
            found.setdefault(_visible(problem["loc"], marked.value), []).append(problem)
    # Where either of two kinds will do, pydantic reports both; the one that got further says more.
    further = {key[:size] for key in found for size in range(len(key))}
    lines = []
    for key in found.keys() - further:
        line, place = marked.where(key)
        lines.append((line, f"{place}: {_sentence(found[key], key, schema)}"))
    return lines


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
    "too_short": "a list that is not empty",
    "string_too_short": "text that is not empty",
    "dict_type": "a mapping",
    "model_type": "a section with keys of its own",
    "model_attributes_type": "a section with keys of its own",
}


def _sentence(problems: list[Any], key: Key, schema: type[pydantic.BaseModel]) -> str:
    """What is wrong with a key; several problems are several kinds of which any would do."""
    kinds = {problem["type"] for problem in problems}
    if "extra_forbidden" in kinds:
        return _unknown(key, schema)
    if "missing" in kinds:
        return f"{_dotted(key)} is missing."
    expected = dict.fromkeys(
        _EXPECTED.get(p["type"]) or p["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        for p in problems
    )
    return f"{_dotted(key)} must be {' or '.join(expected)}, found {_kind(problems[0]['input'])}."


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
        name = info.alias or name
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
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if part.isprintable() and len(part) <= 80 else repr(part[:80])
            text += f".{name}" if text else name
    return text


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."
