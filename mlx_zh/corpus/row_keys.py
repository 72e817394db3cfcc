"""Keys of a row, and of a message, that change what it means: each is honoured, or the row is refused by name.

`docs/data.md` has the same table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.reader import InvalidRow
from mlx_zh.corpus.tools import CALLS, DESCRIPTIONS, RESULT_ROLES, has_content

_MEDIA = ("images", "image", "videos", "video", "audios", "audio", "rejected_images")
# key -> the reason under which a row with a value in it is refused
REFUSED = {
    **dict.fromkeys(_MEDIA, "not only text"),
    **dict.fromkeys(("mask", "loss_mask", "train_detail"), "mask"),
}
# keys that are honoured in another place only
REFUSED_IN_ROW = {**REFUSED, **dict.fromkeys(CALLS, "tool message")}
REFUSED_IN_MESSAGE = {**REFUSED, **dict.fromkeys(DESCRIPTIONS, "tool message")}
# columns of some formats; in a row of another format that does not read them they are refused
UNREAD = {
    **dict.fromkeys(("system", "history"), "part of the conversation not read"),
    **dict.fromkeys(
        ("rejected", "rejected_response", "rejected_messages", "non_preferred_output"), "preference pair"
    ),
}
# keys of a message, or of a row with one reply: what its author thought before it
REASONING = ("reasoning_content", "reasoning", "thinking")
# key -> the reason under which a row is refused if the value is false or 0
FALSE_REFUSED = {
    **dict.fromkeys(("label", "kto_tag"), "answer not to imitate"),
    **dict.fromkeys(("weight", "loss", "train", "loss_scale", "sample_weight"), "not to be trained"),
}
# key -> the reason under which a row is refused if the value is a number that is not positive, or false
NOT_POSITIVE_REFUSED = {**dict.fromkeys(("score", "rating", "reward"), "answer not to imitate")}
# keys of a row that are refused if the value is another number than 0 or 1
WEIGHTS = ("weight", "loss", "loss_scale", "sample_weight")
# keys of a message; its reply is context only if the value is false or 0
NOT_TRAINED = ("weight", "loss", "train", "loss_scale", "training")
# columns of a preference row with the marks of the better and the other answer
MARKS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
)

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
    "parallel_tool_calls",
)

_ANSWERS = ("output", "response", "completion", "messages", "conversations", "conversation", "data", "chat")
_MESSAGE_KEYS = REFUSED_IN_MESSAGE.keys() | set(NOT_TRAINED)
_READ = ("role", "content", "from", "value", "text", "name", "tool_call_id")
_READ_IN_MESSAGE = frozenset((*_READ, *CALLS, *REASONING, *NOT_TRAINED, *REFUSED_IN_MESSAGE))
# A switch such as "reasoning": "on", and how tables write that there is nothing.
_SWITCHES = ("on", "off", "true", "false")
_TEXT_REFUSED = ("kto_tag", "label", "loss", "train")  # also if a table says "false"
_NOBODY = ("user", "human", "system", "prompt")  # NeMo's `mask`: who is not learned, and is not here either
# What stands for a picture or a sound, and is nothing else.
_PLACEHOLDER = re.compile(
    r"<\|(?:image|image_\d+|image_pad|vision_start|video|video_pad|audio|audio_pad|audio_bos|AUDIO)\|>"
    r"|<image_soft_token>|<start_of_image>|<ImageHere>"
)
# These are names of HTML too, so alone they count only on a line of their own without a tag that closes them.
_TAG = re.compile(r"<(image|video|audio)>")
_TAG_LINE = re.compile(r"^[ \t]*<(image|video|audio)>[ \t]*$", re.MULTILINE)


class RowKeys(NamedTuple):
    """The keys of a row that are looked at in one format."""

    watched: frozenset[str]
    told: bool  # whether the recipe says itself which column has the answer, so that a pair's other one is left out

    def check(self, row: Mapping[str, Any]) -> None:
        """Raise InvalidRow if a key of the row changes its meaning in a way that is not supported."""
        for key in sorted(self.watched.intersection(row)):
            _check_key(key, row, self.told)


@cache
def row_keys(columns: tuple[str, ...], mapped: tuple[str, ...] = ()) -> RowKeys:
    """What is looked at in a format with these columns; the recipe says which columns of the file are `mapped`."""
    every = {*REFUSED_IN_ROW, *REASONING, *FALSE_REFUSED, *WEIGHTS, *DESCRIPTIONS}
    if columns != ("text",):  # the score of a raw text is not that of an answer
        every.update(NOT_POSITIVE_REFUSED)
    marks = {better for better, _ in MARKS} if "rejected" in columns else set()
    watched = every | ((UNREAD.keys() | marks) - set(columns))
    return RowKeys(frozenset(watched), any(name in _ANSWERS for name in mapped))


def check_row(row: Mapping[str, Any]) -> None:
    """Raise InvalidRow if a key changes the meaning of an object that holds a part of a row, such as its messages."""
    row_keys(("system", "history"), ("messages",)).check(row)


def _check_key(key: str, row: Mapping[str, Any], told: bool) -> None:
    value = row[key]
    if key == "mask" and isinstance(value, str) and value.strip().lower() in _NOBODY:
        return
    if key in REFUSED_IN_ROW and _counts(key, value):
        raise InvalidRow(REFUSED_IN_ROW[key], f"'{key}' is not supported; take it out of the rows, or leave them out")
    if key in _MEDIA and (tag := _tag_in(row)):
        raise InvalidRow(REFUSED[key], f"{tag} stands for what is not in '{key}'; leave this row out")
    if key in UNREAD and has_content(value) and not (told and UNREAD[key] == "preference pair"):
        raise InvalidRow(UNREAD[key], _unread(key))
    if key in FALSE_REFUSED and _is_false(key, value):
        raise InvalidRow(FALSE_REFUSED[key], f"'{key}' is {value!r}, so this answer is not to be learned")
    if key in NOT_POSITIVE_REFUSED and (value is False or (_is_number(value) and value <= 0)):
        raise InvalidRow(NOT_POSITIVE_REFUSED[key], f"'{key}' is {value!r}, so this answer is not to be learned")
    if key in WEIGHTS and _is_number(value) and value not in (0, 1):
        raise InvalidRow("weight of a row", f"'{key}' must be 0 or 1, got {value!r}")
    for better, worse in MARKS:
        if key == better and _is_number(value) and _is_number(row.get(worse)) and value < row[worse]:
            raise InvalidRow("pair in reverse", f"'{better}' is {value!r}, less than '{worse}', {row[worse]!r}")


def _unread(key: str) -> str:
    if UNREAD[key] == "preference pair":
        return (
            f"'{key}' says that this row is a pair for DPO; name the file under data.dpo, or say with `columns` "
            "which column has the answer to learn"
        )
    return f"'{key}' is not read in this format; put it into the messages, or take it out of the rows"


def is_trained(message: Mapping[str, Any], label: str) -> bool:
    """Whether the reply in a message is to be learned. Raises InvalidRow, which names `label`."""
    if len(message) == 2 or _MESSAGE_KEYS.isdisjoint(message):
        return True
    trained = True
    for key in _MESSAGE_KEYS.intersection(message):
        value = message[key]
        if key in REFUSED_IN_MESSAGE and _counts(key, value):
            detail = f"{label}: '{key}' is not supported; take it out of the rows, or leave them out"
            raise InvalidRow(REFUSED_IN_MESSAGE[key], detail)
        if key in NOT_TRAINED and value is not None:
            if value not in (0, 1):  # true is 1, and false is 0
                raise InvalidRow("weight of a message", f"{label}: '{key}' must be 0 or 1, got {value!r}")
            trained = trained and bool(value)
    return trained


def reasoning_in(values: Mapping[str, Any], label: str) -> str:
    """The reasoning in a message or a row; "" if there is none. Raises InvalidRow, which names `label`."""
    if values.keys().isdisjoint(REASONING):
        return ""
    given = {key: values[key] for key in REASONING if key in values and _counts(key, values[key])}
    for key, value in given.items():
        if not isinstance(value, str):
            raise InvalidRow("wrong type", f"{label}: '{key}' must be text, got {value!r:.40}")
    texts = set(given.values())
    if len(texts) > 1:
        raise InvalidRow("two reasonings", f"{label}: {' and '.join(given)} are different")
    return texts.pop() if texts else ""


def check_text(message: Message, label: str) -> None:
    """Raise InvalidRow, which names `label`, if a message has a placeholder of a picture, a video or a sound."""
    text = message.content
    place = _PLACEHOLDER.search(text) or (_TAG_LINE.search(text) if message.role == "user" else None)
    if place is None or (place.lastindex and f"</{place[1]}>" in text):
        return
    raise InvalidRow("not only text", f"{label} has {place[0].strip()}, which stands for something that is no text")


def unused_columns(row: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """The columns of a row that nothing reads; the harmless ones are left out."""
    marks = (name for pair in MARKS for name in pair)
    known = {*columns, *HARMLESS, *REFUSED_IN_ROW, *REASONING, *DESCRIPTIONS, *UNREAD, *marks}
    return [name for name in row if name not in known]


def has_more_keys(messages: Sequence[Any]) -> bool:
    """Whether a message has more than a role and a content."""
    for message in messages:  # noqa: SIM110  (in every row, so a plain loop)
        if isinstance(message, dict) and len(message) != 2:
            return True
    return False


def unused_keys(messages: Sequence[Any], column: str) -> list[str]:
    """The keys with content in a column's messages that nothing reads, as column[].key."""
    return [
        f"{column}[].{key}"
        for message in messages
        if isinstance(message, dict) and len(message) > 2 and ("role" in message or "from" in message)
        for key, value in message.items()
        if (key not in _READ_IN_MESSAGE or (key == "name" and message.get("role") not in RESULT_ROLES))
        and key not in HARMLESS
        and has_content(value)
    ]


def _counts(key: str, value: Any) -> bool:
    """Whether a value that is refused says something. A mask of false does: it may say what is not learned."""
    if REFUSED.get(key) == "mask" and isinstance(value, int | float):  # true and false too
        return True
    return has_content(value) and value is not True and not (isinstance(value, str) and value.lower() in _SWITCHES)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_false(key: str, value: Any) -> bool:
    """Whether a value says no. A label of 0 may be a class, so only false counts there."""
    if isinstance(value, str):
        return key in _TEXT_REFUSED and value.strip().lower() == "false"
    if isinstance(value, bool) or key == "label":
        return value is False
    return _is_number(value) and bool(value == 0)


def _tag_in(value: Any) -> str:
    """The first placeholder such as <image> in the texts of a value; "" if there is none."""
    if isinstance(value, str):
        match = _TAG.search(value)
        return match[0] if match else ""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((tag for part in inner if (tag := _tag_in(part))), "")
