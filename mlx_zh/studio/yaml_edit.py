"""Changing one value in the YAML text of a recipe; the other lines stay as they are, comments included.

Each change is checked: the new text must have the old values and the new one. Where the text is written in a way that
this module does not change (aliases, keys that are no text), the whole text is written anew, without its comments.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from mlx_zh.recipe_text.values import compose, dump, inline

_STEP = 2  # columns of an indentation
_COMMENT = re.compile(r"[ \t]+#[^\n]*")
_LONGEST_FLOW = 60  # characters of a list that is written on one line
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)


def value_at(text: str, key: Sequence[str]) -> Any:
    """The value of a key in the text; None if it is not there. Raises YAMLError and others for what is not YAML."""
    value = compose(text)[1]
    for part in key:
        value = value.get(part) if isinstance(value, dict) else None
    return value


def with_value(text: str, key: Sequence[str], value: Any) -> str:
    """The text with `key` set to a plain value. Raises ValueError for a text that is not a YAML mapping."""
    old = _mapping(text)
    return _checked(lambda: _set(text, list(key), value), _changed(old, key, value))


def without_key(text: str, key: Sequence[str]) -> str:
    """The text without `key`, and without sections that have no other. Raises ValueError as `with_value`."""
    old = _mapping(text)
    return _checked(lambda: _removed(text, list(key)), _cut(old, key))


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = compose(text)[1]
    except _YAML_ERRORS as error:
        raise ValueError("not valid YAML") from error
    if value is not None and not isinstance(value, dict):
        raise ValueError("not a mapping")
    return value or {}


def _checked(edit: Any, wanted: dict[str, Any]) -> str:
    """What `edit` makes if it holds the wanted values, else these values as new text."""
    try:
        text: str = edit()
        if _same(_mapping(text), wanted):
            return text
    except _YAML_ERRORS:
        pass
    return dump(wanted)


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal, and of equal types: 1, 1.0 and true differ."""
    return inline(one) == inline(other)


def _copied(value: Any) -> Any:
    """A copy in which nothing is shared: an alias in the text makes one object of two values."""
    if isinstance(value, dict):
        return {name: _copied(below) for name, below in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _changed(values: dict[str, Any], key: Sequence[str], value: Any) -> dict[str, Any]:
    values = _copied(values)
    place = values
    for part in key[:-1]:
        below = place.get(part)
        place[part] = place = below if isinstance(below, dict) else {}
    place[key[-1]] = value
    return values


def _cut(values: dict[str, Any], key: Sequence[str]) -> dict[str, Any]:
    values = _copied(values)
    places: list[Any] = [values]
    for part in key[:-1]:
        places.append(places[-1].get(part) if isinstance(places[-1], dict) else None)
    for place, part in zip(reversed(places), reversed(key), strict=True):
        if not isinstance(place, dict) or part not in place:
            return values
        del place[part]
        if place:
            break
    return values


def _set(text: str, key: list[str], value: Any) -> str:
    node = compose(text)[0]
    if node is None:
        return _ended(text) + _lines(key, value, 0)
    for depth, part in enumerate(key):
        pair = _pair(node, part)
        if pair is None:
            return _inserted(text, node, key[depth:], value)
        name, below = pair
        if depth == len(key) - 1:
            return _replaced(text, name, below, value)
        if not isinstance(below, yaml.MappingNode):
            return _replaced(text, name, below, _nested(key[depth + 1 :], value))
        node = below
    return text


def _pair(node: Any, name: str) -> tuple[Any, Any] | None:
    return next((pair for pair in node.value if pair[0].value == name), None)


def _nested(key: Sequence[str], value: Any) -> Any:
    for part in reversed(key):
        value = {part: value}
    return value


def _replaced(text: str, name: Any, node: Any, value: Any) -> str:
    """The text with another value of the key `name`."""
    if (longer := _appended(text, node, value)) is not None:
        return longer
    begin = text.index(":", name.end_mark.index) + 1
    end = max(_end(text, node), begin)
    comment = _first_comment(text, begin, end)
    indent = name.start_mark.column
    if not comment and (after := _COMMENT.match(text, end)) and text.find("\n", begin, end) < 0:
        written = " " + _short(value)
        width = after.end() - begin - len(after[0].lstrip())  # columns up to the comment, which stay
        return text[:begin] + written.ljust(max(width, len(written) + 2)) + after[0].lstrip() + text[after.end() :]
    if _fits_line(value) or _in_flow(text, node):
        written = f" {_short(value)}"
        if comment:
            width = len(comment) - len(comment.lstrip())
            written = written.ljust(max(width, len(written) + 2)) + comment.lstrip()
    else:
        written = comment + "\n" + _block(value, indent + _STEP).removesuffix("\n")
    return text[:begin] + written + text[end:]


def _appended(text: str, node: Any, value: Any) -> str | None:
    """The text with more items at the end of a list of lines; None where the change is another one."""
    if not isinstance(node, yaml.SequenceNode) or node.flow_style or not isinstance(value, list):
        return None
    indented = " " * node.start_mark.column  # the first line is read as the others are
    old = compose(indented + text[node.start_mark.index : _end(text, node)])[1]
    if len(value) <= len(old) or not _same(value[: len(old)], old):
        return None
    place = text.find("\n", _end(text, node))
    head, tail = (text, "") if place < 0 else (text[: place + 1], text[place + 1 :])
    return _ended(head) + _block(value[len(old) :], node.start_mark.column) + tail


def _first_comment(text: str, begin: int, end: int) -> str:
    """The comment between a key and a value that begins on the next line."""
    match = _COMMENT.match(text, begin, end)
    return match[0] if match else ""


def _inserted(text: str, node: Any, key: list[str], value: Any) -> str:
    """The text with a new key at the end of a mapping."""
    if not isinstance(node, yaml.MappingNode):
        raise ValueError("no mapping")
    if node.flow_style:
        before = text[: node.end_mark.index - 1].rstrip().rstrip(",")
        joint = ", " if node.value else ""
        return f"{before}{joint}{inline(_nested(key, value))[1:-1]}" + text[node.end_mark.index - 1 :]
    indent = node.start_mark.column
    place = text.find("\n", _end(text, node))
    head, tail = (text, "") if place < 0 else (text[: place + 1], text[place + 1 :])
    gap = "\n" if indent == 0 and len(key) > 1 and not head.endswith("\n\n") else ""
    return _ended(head) + gap + _lines(key, value, indent) + tail


def _removed(text: str, key: list[str]) -> str:
    node = compose(text)[0]
    pairs: list[tuple[Any, Any, Any]] = []
    for part in key:
        pair = _pair(node, part) if isinstance(node, yaml.MappingNode) else None
        if pair is None:
            return text
        pairs.append((node, *pair))
        node = pair[1]
    while len(pairs) > 1 and len(pairs[-1][0].value) == 1:
        pairs.pop()  # the section's only key: the section goes
    parent, name, below = pairs[-1]
    if parent.flow_style:
        raise ValueError("between braces")
    begin = text.rfind("\n", 0, name.start_mark.index) + 1
    end = text.find("\n", max(_end(text, below), name.end_mark.index))
    return text[:begin] + ("" if end < 0 else text[end + 1 :])


def _end(text: str, node: Any) -> int:
    """Where the text of a node ends, without the comments and empty lines after it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        name, below = last if isinstance(last, tuple) else (None, last)
        return max(_end(text, below), 0 if name is None else text.index(":", name.end_mark.index) + 1)
    end: int = node.end_mark.index
    begin: int = node.start_mark.index
    return begin + len(text[begin:end].rstrip()) if end > begin else end


def _in_flow(text: str, node: Any) -> bool:
    """Whether the rest of the line belongs to braces around it, so that no new line can begin."""
    line = text[text.rfind("\n", 0, node.start_mark.index) + 1 : node.start_mark.index]
    return "{" in line or "[" in line


def _lines(key: Sequence[str], value: Any, indent: int) -> str:
    """Lines of a new key, its sections above it."""
    lines = ""
    for part in key[:-1]:
        lines += f"{' ' * indent}{inline(part)}:\n"
        indent += _STEP
    name = f"{' ' * indent}{inline(key[-1])}:"
    if _fits_line(value):
        return f"{lines}{name} {_short(value)}\n"
    return f"{lines}{name}\n{_block(value, indent + _STEP)}"


def _fits_line(value: Any) -> bool:
    if isinstance(value, str):
        return "\n" not in value
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return False
    return not isinstance(value, dict | list) or len(inline(value)) <= _LONGEST_FLOW


def _short(value: Any) -> str:
    """A value on one line; 1e-05 as people write it."""
    if isinstance(value, float):
        short = re.sub(r"e([-+])0*(\d)", r"e\1\2", repr(value)).replace("e+", "e")
        return short
    return inline(value)


def _block(value: Any, indent: int) -> str:
    """Lists and mappings over several lines."""
    if isinstance(value, list):
        return "".join(f"{' ' * indent}- {_item(item, indent)}\n" for item in value)
    if isinstance(value, dict):
        return "".join(_lines([str(name)], below, indent) for name, below in value.items())
    return f"{' ' * indent}{inline(value)}\n"


def _item(item: Any, indent: int) -> str:
    if isinstance(item, dict) and item:
        return _block(item, indent + _STEP).strip()
    return _short(item)


def _ended(text: str) -> str:
    return text if not text or text.endswith("\n") else f"{text}\n"
