"""Whether a JSON value that was read from a file has the form that a type annotation states."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin


def fits(value: Any, form: Any) -> bool:
    """Whether a value fits a plain type, a Literal, union, list, tuple or dict of such, a TypedDict or a dataclass.

    A whole number is a float too, and true is no number. A TypedDict may have more keys than are stated; a dataclass
    may not, because it is made with all keys.
    """
    origin, inner = get_origin(form), get_args(form)
    if form in (Any, object):
        return True
    if form is None:
        return value is None
    if form in (int, float):
        return isinstance(value, (int, float) if form is float else int) and not isinstance(value, bool)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(fits(item, inner[0]) for item in value)
    if is_dataclass(form) or typing.is_typeddict(form):
        return isinstance(value, dict) and _fits_keys(value, form)
    return isinstance(value, form)


def _fits_keys(values: Mapping[str, Any], form: Any) -> bool:
    hints, required, more = _keys(form)
    if required - values.keys() or (not more and values.keys() - hints.keys()):
        return False
    return all(fits(values[name], hint) for name, hint in hints.items() if name in values)


@cache
def _keys(form: Any) -> tuple[dict[str, Any], frozenset[str], bool]:
    """The types of a form's keys, those that must be there, and whether there may be others."""
    hints = typing.get_type_hints(form)
    if not is_dataclass(form):
        return hints, form.__required_keys__, True
    required = {f.name for f in fields(form) if f.default is MISSING and f.default_factory is MISSING}
    return hints, frozenset(required), False
