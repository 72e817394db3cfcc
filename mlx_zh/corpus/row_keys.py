"""Keys of a row, and of a message, that change what it means: each is honoured, or the row is refused by name.

`docs/data.md` has the same table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_zh.corpus.reader import InvalidRow

# key -> the reason under which a row with a value in it is refused
REFUSED = {
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), "tool message"),
    **dict.fromkeys(("images", "image", "videos", "audios", "audio"), "not only text"),
}
# keys of a message, or of a row with one reply: what its author thought before it
REASONING = ("reasoning_content", "reasoning", "thinking")
# key -> the reason under which a row is refused if the value is false or 0
FALSE_REFUSED = {
    **dict.fromkeys(("label", "kto_tag"), "answer not to imitate"),
    **dict.fromkeys(("weight", "loss", "train"), "not to be trained"),
}
# keys of a message; its reply is context only if the value is false or 0
NOT_TRAINED = ("weight", "loss", "train", "loss_scale")

# columns that are not read, and whose names say so
HARMLESS = (
    "id",
    "idx",
    "index",
    "uuid",
    "conversation_id",
    "source",
    "dataset",
    "category",
    "lang",
    "language",
    "url",
)

_KNOWN = {*HARMLESS, *REFUSED, *REASONING}
_ROW_KEYS = REFUSED.keys() | FALSE_REFUSED.keys()
_MESSAGE_KEYS = REFUSED.keys() | set(NOT_TRAINED)
# A switch such as "reasoning": "on", and how tables write that there is nothing.
_NOTHING = ("", "[]", "{}", "null", "none", "on", "off", "true", "false")
_TEXT_REFUSED = ("kto_tag", "label", "loss", "train")  # also if a table says "false"


def unused_columns(row: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """The columns of a row that nothing reads, in a format with these columns; the harmless ones are left out."""
    return [name for name in row if name not in columns and name not in _KNOWN]


def check_row(row: Mapping[str, Any]) -> None:
    """Raise InvalidRow if a key of the row changes its meaning in a way that is not supported."""
    if _ROW_KEYS.isdisjoint(row):
        return
    for key in _ROW_KEYS.intersection(row):
        value = row[key]
        if key in REFUSED and _has_content(value):
            raise InvalidRow(REFUSED[key], f"'{key}' is not supported; take it out of the rows, or leave them out")
        if key in FALSE_REFUSED and _is_false(key, value):
            raise InvalidRow(FALSE_REFUSED[key], f"'{key}' is {value!r}, so this answer is not to be learned")


def is_trained(message: Mapping[str, Any], label: str) -> bool:
    """Whether the reply in a message is to be learned. Raises InvalidRow, which names `label`."""
    if len(message) == 2 or _MESSAGE_KEYS.isdisjoint(message):
        return True
    trained = True
    for key in _MESSAGE_KEYS.intersection(message):
        value = message[key]
        if key in REFUSED and _has_content(value):
            detail = f"{label}: '{key}' is not supported; take it out of the rows, or leave them out"
            raise InvalidRow(REFUSED[key], detail)
        if key in NOT_TRAINED and value is not None:
            if value not in (0, 1):  # true is 1, and false is 0
                raise InvalidRow("weight of a message", f"{label}: '{key}' must be 0 or 1, got {value!r}")
            trained = trained and bool(value)
    return trained


def reasoning_in(values: Mapping[str, Any], label: str) -> str:
    """The reasoning in a message or a row; "" if there is none. Raises InvalidRow, which names `label`."""
    if values.keys().isdisjoint(REASONING):
        return ""
    given = {key: values[key] for key in REASONING if _has_content(values.get(key))}
    for key, value in given.items():
        if not isinstance(value, str):
            raise InvalidRow("wrong type", f"{label}: '{key}' must be text, got {value!r:.40}")
    texts = set(given.values())
    if len(texts) > 1:
        raise InvalidRow("two reasonings", f"{label}: {' and '.join(given)} are different")
    return texts.pop() if texts else ""


def _has_content(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() not in _NOTHING
    return value is not None and value is not False and value is not True and value != [] and value != {}


def _is_false(key: str, value: Any) -> bool:
    """Whether a value says no. A label of 0 may be a class, so only false counts there."""
    if isinstance(value, str):
        return key in _TEXT_REFUSED and value.strip().lower() == "false"
    if isinstance(value, bool) or key == "label":
        return value is False
    return isinstance(value, int | float) and value == 0
