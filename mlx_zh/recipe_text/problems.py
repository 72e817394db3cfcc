"""What is wrong with a recipe: pydantic's errors as plain sentences with file and line."""

from __future__ import annotations

import difflib
import sys
from typing import Any, get_args

import pydantic

from mlx_zh.language.other_names import other_names
from mlx_zh.recipe_text.document import (
    PLAIN_COLON,
    WIDE_COLON,
    WIDE_KEY,
    Document,
    Key,
    Problem,
    described,
    dotted_key,
)


def explain(
    error: pydantic.ValidationError, document: Document, schema: type[pydantic.BaseModel], *, depth: int = 0
) -> list[Problem]:
    """One sentence for each key with a problem: file and line, key, what was expected and what was got.

    Of more than 100 problems, the first are told and the others counted: each looks for similar keys.
    In a file that maps names to sections, `depth` is 1 and `schema` that of a section.
    """
    wrong, more = wrong_keys(error, document, schema, depth=depth)
    problems = [(line, f"{document.where(key)[1]}: {sentence}") for key, line, sentence in wrong]
    return problems + ([(sys.maxsize, f"… and {more} more problems.")] if more else [])


def wrong_keys(
    error: pydantic.ValidationError, document: Document, schema: type[pydantic.BaseModel], *, depth: int = 0
) -> tuple[list[tuple[Key, int, str]], int]:
    """Each key with a problem, its line and a sentence, and how many more there are. See `explain`."""
    by_key: dict[Key, list[Any]] = {}
    for problem in error.errors():
        if problem["type"] != "invalid_key":  # `parse` has reported it
            key = _written_key(problem["loc"], document.value, absent=problem["type"] == "missing")
            by_key.setdefault(key, []).append(problem)
    # When a value may have one of two types, pydantic reports a problem for each. The one with the longer key says
    # more, so problems with keys above it are left out.
    parents = {key[:size] for key in by_key for size in range(len(key))}
    placed = sorted((*document.where(key), number, key) for number, key in enumerate(by_key) if key not in parents)
    wrong = [(key, line, _sentence(by_key[key], key, schema, depth)) for line, _, _, key in placed[:_TOLD]]
    return wrong, max(len(placed) - _TOLD, 0)


def _written_key(location: tuple[str | int, ...], value: Any, *, absent: bool) -> Key:
    """The part of pydantic's location that the user wrote, or with `absent` should have written at its end.

    Pydantic adds the names of union members.
    """
    key: list[str | int] = []
    for index, part in enumerate(location):
        last = index == len(location) - 1
        inside = isinstance(value, list | tuple) if isinstance(part, int) else isinstance(value, dict)
        if not inside:
            continue
        if isinstance(part, str) and part not in value and not (last and absent):
            continue
        key.append(part)
        try:
            value = value[part]
        except (KeyError, IndexError):
            value = None
    return tuple(key)


_TOLD = 100  # problems
_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number that is not so large",
    "finite_number": "a finite number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "string_sub_type": "text",
    "string_unicode": "text",
    "list_type": "a list",
    "mapping_type": "a mapping",
    "tuple_type": "a list",
    "too_short": "a list that is not empty",
    "string_too_short": "text that is not empty",
    "dict_type": "a mapping",
    "model_type": "a section with keys of its own",
    "model_attributes_type": "a section with keys of its own",
}


def _sentence(problems: list[Any], key: Key, schema: type[pydantic.BaseModel], depth: int) -> str:
    """What is wrong with a key. Several problems mean that one of several types was expected."""
    kinds = {problem["type"] for problem in problems}
    if "extra_forbidden" in kinds:
        return _unknown(key, schema, depth)
    if "missing" in kinds:
        return f"{dotted_key(key)} is missing."
    expected = _alternatives(list(dict.fromkeys(map(_expected, problems))))
    got = problems[0]["input"]
    sentence = f"{dotted_key(key)} must be {expected}, found {described(got)}."
    hinted = "model_type" in kinds and isinstance(got, str) and WIDE_KEY.match(got)
    return f"{sentence} {PLAIN_COLON}" if hinted else sentence


def _alternatives(expected: list[str]) -> str:
    """One of several descriptions, in words that have a Chinese wording; a bare `text` may be a format's name."""
    if len(expected) == 1:
        return expected[0]
    expected = ["some text" if words == "text" else words for words in expected]
    if len(expected) == 3:
        return f"either {expected[0]}; or {expected[1]}; or {expected[2]}"
    return f"either {expected[0]} or {_alternatives(expected[1:])}"


def _expected(problem: Any) -> str:
    """What pydantic expected, in words that have a Chinese wording, too."""
    limits = {name: _plain(value) for name, value in problem.get("ctx", {}).items()}
    match problem["type"]:
        case "value_error":
            return str(problem["msg"]).removeprefix("Value error, ")
        case "greater_than":
            return f"greater than {limits['gt']}"
        case "greater_than_equal":
            return f"greater than or equal to {limits['ge']}"
        case "less_than":
            return f"less than {limits['lt']}"
        case "less_than_equal":
            return f"less than or equal to {limits['le']}"
        case "literal_error":
            names = limits["expected"].replace(" or ", ", ")
            return f"one of {names}" if ", " in names else str(names)
        case kind:
            return _EXPECTED.get(kind, "a valid value")


def _plain(value: Any) -> Any:
    """A number without a fraction of zero."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def other_name(name: str, stage: str = "sft") -> str | None:
    """What a setting of another program is called here, in a sentence; None for a name that none has.

    `stage` is the section (sft or dpo) to name for a setting that both have.
    """
    entry = other_names().get(name.lstrip("-").replace("-", "_").lower())
    return None if entry is None else entry.told(stage)[0]


def _unknown(key: Key, schema: type[pydantic.BaseModel], depth: int) -> str:
    """The sentence about an unknown key.

    It names the key that other programs call so, else the most similar key of its section or of the whole recipe.
    """
    if WIDE_COLON in str(key[-1]):
        return f"{dotted_key(key)} is not a key. {PLAIN_COLON}"
    if (here_named := other_name(str(key[-1]), "dpo" if "dpo" in key else "sft")) is not None:
        return f"{dotted_key(key)} is not a key. {here_named}"
    keys = dict(keys_of(schema))
    section = dotted_key(tuple(k for k in key[depth:-1] if isinstance(k, str)))
    here = [k for k, parent in keys.items() if parent == section]
    last = str(key[-1])
    near = difflib.get_close_matches(last, [k.rsplit(".", 1)[-1] for k in here], n=1, cutoff=0.6)
    if near:
        return f"{dotted_key(key)} is not a key; did you mean {'.'.join(filter(None, [section, near[0]]))}?"
    elsewhere = [k for k in keys if k.rsplit(".", 1)[-1] == last]
    if not elsewhere:
        names = {k.rsplit(".", 1)[-1]: k for k in keys}
        elsewhere = [names[n] for n in difflib.get_close_matches(last, list(names), n=1, cutoff=0.75)]
    if elsewhere:
        return f"{dotted_key(key)} is not a key; did you mean {elsewhere[0]}?"
    listed = ", ".join(k.rsplit(".", 1)[-1] for k in here) or "none"
    return f"{dotted_key(key)} is not a key; {section or 'a recipe'} has: {listed}."


def keys_of(schema: type[pydantic.BaseModel], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted key, dotted section) of every key of a schema. Keys in lists have no index."""
    keys: list[tuple[str, str]] = []
    for name, info in schema.model_fields.items():
        name = info.alias or name
        dotted = f"{prefix}.{name}" if prefix else name
        keys.append((dotted, prefix))
        for inner in _models(info.annotation):
            keys.extend(keys_of(inner, dotted))
    return keys


def _models(annotation: Any) -> list[type[pydantic.BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]
