"""Keys of a row, and of a message, that change what it means: each is honoured, or the row is refused by name.

`docs/data.md` has the same table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.key_names import is_list_of_switches, kind_of_name, number_of, says_no, says_yes
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
# columns with a text that a question may be about; refused beside a question that does not repeat it
ABOUT = ("context", "input")
_QUESTIONS = ("instruction", "prompt", "query", "question")
# keys of a message, or of a row with one reply: what its author thought before it
REASONING = ("reasoning_content", "reasoning", "thinking")
# columns that say whether an answer is good; KTO learns from both kinds
LABELS = ("label", "kto_tag")
# key -> the reason under which a row is refused if the value is false or 0
FALSE_REFUSED = {
    **dict.fromkeys(LABELS, "answer not to imitate"),
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

ANSWERS = ("output", "response", "completion", "messages", "conversations", "conversation", "data", "chat")
_MESSAGE_KEYS = REFUSED_IN_MESSAGE.keys() | set(NOT_TRAINED)
_READ = ("role", "content", "from", "value", "text", "name", "tool_call_id")
_READ_IN_MESSAGE = frozenset((*_READ, *CALLS, *REASONING, *NOT_TRAINED, *REFUSED_IN_MESSAGE))
# A switch such as "reasoning": "on", and how tables write that there is nothing.
_SWITCHES = ("on", "off", "true", "false")
_NOBODY = ("user", "human", "system", "prompt")  # NeMo's `mask`: who is not learned, and is not here either
# What stands for a picture or a sound, and is nothing else: control tokens, numbered places, and names of files
# between tags.
_PLACEHOLDER = re.compile(
    r"<\|\w*(?:image|vision|video|audio)\w*\|>"
    r"|<(?:image_soft_token|start_of_image|ImageHere|(?:image|video|audio)(?:[_ ]?\d{1,3}|_placeholder))>"
    r"|<(img|image|video|audio)>\s*[^<>\s]+\.\w{2,5}\s*</\1>",
    re.IGNORECASE,
)
# These are names of HTML too, so alone they count only on a line of their own without a tag that closes them.
_TAG = re.compile(r"<(image|video|audio)>", re.IGNORECASE)
_TAG_LINE = re.compile(r"^[ \t]*<(image|video|audio)>[ \t]*$", re.MULTILINE | re.IGNORECASE)


class RowKeys(NamedTuple):
    """The keys of a row that are looked at in one format."""

    columns: frozenset[str]
    watched: frozenset[str]
    told: bool  # whether the recipe says itself which column has the answer, so that a pair's other one is left out
    labelled: bool = False  # whether the format itself reads if an answer is good

    def read(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row, with a column such as `system_prompt` under the name `system`.

        Raises InvalidRow if a key of the row changes its meaning in a way that is not supported.
        """
        for key, kind in _telling(tuple(row), self):
            if kind == "system" and "system" in self.columns:
                row = _with_system(row, key)
            elif not (self.labelled and kind in ("good", "bad")):
                _check_named(key, kind, row, self.told)
        for key in sorted(self.watched.intersection(row)):
            _check_key(key, row, self.told)
        return row


@lru_cache(maxsize=1024)
def _telling(names: tuple[str, ...], keys: RowKeys) -> tuple[tuple[str, str], ...]:
    """Those of a row's keys whose names tell what they mean though no format has them, each with its kind."""
    known = {*keys.columns, *keys.watched, *HARMLESS, *UNREAD}
    telling = [(name, kind) for name in names if name not in known and (kind := kind_of_name(name))]
    if keys.columns == {"text"}:  # pictures beside a raw text are not what it is about
        telling = [(name, kind) for name, kind in telling if kind in ("learned", "unlearned")]
    is_pair = any(kind_of_name(name) == "rejected" for name in keys.columns)
    return tuple(
        (name, kind)
        for name, kind in telling
        if (kind != "rejected" if is_pair else kind not in ("mark", "margin"))
        and not (kind == "mark" and name.replace("chosen", "rejected") not in names)
    )


def _with_system(row: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    own, value = row.get("system"), row[key]
    if has_content(own) and has_content(value) and own != value:
        raise InvalidRow("two system messages", f"'system' and '{key}' are different")
    return {**row, "system": value} if has_content(value) else row


def _check_named(key: str, kind: str, row: Mapping[str, Any], told: bool) -> None:
    """Raise InvalidRow if a key that is known by its name alone changes the meaning of its row."""
    value = row[key]
    is_text = isinstance(value, str | list | dict) and has_content(value)
    if kind == "media" and is_text:
        raise _refused("not only text", key)
    if kind in ("system", "history") and is_text:
        raise InvalidRow("part of the conversation not read", _unread(key))
    if kind == "rejected" and is_text and not told:
        raise InvalidRow("preference pair", _other_answer(key))
    if kind == "learned":
        _check_weight(key, value)
    if (kind == "learned" and is_list_of_switches(value)) or (kind == "unlearned" and _says_mask(value)):
        raise _refused("mask", key)
    if (kind == "good" and says_no(value)) or (kind == "bad" and says_yes(value)):
        raise InvalidRow("answer not to imitate", f"'{key}' is {value!r}, so this answer is not to be learned")
    if kind == "mark":
        _check_marks(row, key, key.replace("chosen", "rejected"))
    if kind == "margin" and (number_of(value) or 0) < 0:
        raise InvalidRow("pair in reverse", f"'{key}' is {value!r}, less than 0")


def _check_weight(key: str, value: Any) -> None:
    if says_no(value):
        raise InvalidRow("not to be trained", f"'{key}' is {value!r}, so this answer is not to be learned")
    if number_of(value) not in (None, 1):
        raise InvalidRow("weight of a row", f"'{key}' must be 0 or 1, got {value!r}")


def _says_mask(value: Any) -> bool:
    return says_yes(value) or is_list_of_switches(value)


def _refused(reason: str, key: str) -> InvalidRow:
    return InvalidRow(reason, f"'{key}' is not supported; take it out of the rows, or leave them out")


def _check_marks(row: Mapping[str, Any], better: str, worse: str) -> None:
    marks = number_of(row[better]), number_of(row.get(worse))
    if marks[0] is not None and marks[1] is not None and marks[0] < marks[1]:
        raise InvalidRow("pair in reverse", f"'{better}' is {row[better]!r}, less than '{worse}', {row[worse]!r}")


@cache
def row_keys(columns: tuple[str, ...], mapped: tuple[str, ...] = (), labelled: bool = False) -> RowKeys:
    """What is looked at in a format with these columns; the recipe says which columns of the file are `mapped`.

    A format that is `labelled` reads itself whether an answer is good.
    """
    every = {*REFUSED_IN_ROW, *REASONING, *FALSE_REFUSED, *WEIGHTS, *DESCRIPTIONS}
    if columns != ("text",):  # the score of a raw text is not that of an answer
        every.update(NOT_POSITIVE_REFUSED)
    if labelled:
        every.difference_update(LABELS, NOT_POSITIVE_REFUSED)
    about = ABOUT if any(name in columns for name in _QUESTIONS) else ()
    watched = every | ({*UNREAD, *about} - set(columns))
    return RowKeys(frozenset(columns), frozenset(watched), any(name in ANSWERS for name in mapped), labelled)


def check_row(row: Mapping[str, Any]) -> None:
    """Raise InvalidRow if a key changes the meaning of an object that holds a part of a row, such as its messages."""
    row_keys(("system", "history"), ("messages",)).read(row)


def _check_key(key: str, row: Mapping[str, Any], told: bool) -> None:
    value = row[key]
    if key == "mask" and isinstance(value, str) and value.strip().lower() in _NOBODY:
        return
    if key in REFUSED_IN_ROW and _counts(key, value):
        raise _refused(REFUSED_IN_ROW[key], key)
    if key in _MEDIA and (tag := _tag_in(row)):
        raise InvalidRow(REFUSED[key], f"{tag} stands for what is not in '{key}'; leave this row out")
    if key in UNREAD and has_content(value) and not (told and UNREAD[key] == "preference pair"):
        raise InvalidRow(UNREAD[key], _other_answer(key) if UNREAD[key] == "preference pair" else _unread(key))
    if key in ABOUT and isinstance(value, str) and has_content(value) and not _is_repeated(value, row):
        raise InvalidRow("part of the conversation not read", _beside(key))
    if key in FALSE_REFUSED and _is_false(key, value):
        raise InvalidRow(FALSE_REFUSED[key], f"'{key}' is {value!r}, so this answer is not to be learned")
    if key in NOT_POSITIVE_REFUSED and (value is False or _is_not_positive(value)):
        raise InvalidRow(NOT_POSITIVE_REFUSED[key], f"'{key}' is {value!r}, so this answer is not to be learned")
    if key in WEIGHTS:
        _check_weight(key, value)


def _is_not_positive(value: Any) -> bool:
    number = number_of(value)
    return number is not None and number <= 0


def _is_repeated(text: str, row: Mapping[str, Any]) -> bool:
    """Whether a question of the row has this text in it already."""
    return any(isinstance(question := row.get(name), str) and text.strip() in question for name in _QUESTIONS)


def _other_answer(key: str) -> str:
    return (
        f"'{key}' says that this row is a pair for DPO; name the file under data.dpo, or say with `columns` "
        "which column has the answer to learn"
    )


def _unread(key: str) -> str:
    return f"'{key}' is not read in this format; put it into the messages, or take it out of the rows"


def _beside(key: str) -> str:
    return (
        f"'{key}' is not read beside this question; if the question is about it, map both with `columns` "
        f"(instruction: the column of the question, input: {key}), else take it out of the rows"
    )


def is_trained(message: Mapping[str, Any], label: str) -> bool:
    """Whether the reply in a message is to be learned. Raises InvalidRow, which names `label`."""
    if len(message) == 2:
        return True
    trained = True
    for key, kind in _telling_in_message(tuple(message)):
        value = message[key]
        if kind == "learned" and (says_no(value) or number_of(value) not in (None, 1)):
            trained = trained and _weight_of_message(key, value, label)
        elif kind == "media" and isinstance(value, str | list | dict) and has_content(value):
            raise _refused_in(label, "not only text", key)
        elif kind in ("learned", "unlearned") and (
            is_list_of_switches(value) or (kind == "unlearned" and says_yes(value))
        ):
            raise _refused_in(label, "mask", key)
        elif _is_bad(key, kind, value):
            raise InvalidRow("answer not to imitate", f"{label}: '{key}' is {value!r}, so it is not to be learned")
    for key in _MESSAGE_KEYS.intersection(message):
        value = message[key]
        if key in REFUSED_IN_MESSAGE and _counts(key, value):
            raise _refused_in(label, REFUSED_IN_MESSAGE[key], key)
        if key in NOT_TRAINED and value is not None:
            trained = trained and _weight_of_message(key, value, label)
    return trained


def _weight_of_message(key: str, value: Any, label: str) -> bool:
    """Whether a message with this weight is learned. Raises InvalidRow for what is neither 0 nor 1."""
    if says_no(value):
        return False
    if value is True or number_of(value) == 1 or (isinstance(value, str) and says_yes(value)):
        return True
    raise InvalidRow("weight of a message", f"{label}: '{key}' must be 0 or 1, got {value!r}")


@lru_cache(maxsize=1024)
def _telling_in_message(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Those of a message's keys whose names tell what they mean, each with its kind."""
    marks = (*FALSE_REFUSED, *NOT_POSITIVE_REFUSED)
    return tuple(
        (name, kind_of_name(name))
        for name in names
        if name not in _READ_IN_MESSAGE and (kind_of_name(name) or name in marks)
    )


def _is_bad(key: str, kind: str, value: Any) -> bool:
    """Whether a mark of a message says that it is not to be imitated."""
    if key in NOT_POSITIVE_REFUSED:
        return value is False or _is_not_positive(value)
    if key in FALSE_REFUSED:
        return _is_false(key, value)
    return (kind == "good" and says_no(value)) or (kind == "bad" and says_yes(value))


def _refused_in(label: str, reason: str, key: str) -> InvalidRow:
    return InvalidRow(reason, f"{label}: '{key}' is not supported; take it out of the rows, or leave them out")


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
    place = _PLACEHOLDER.search(text)
    if place is None and message.role == "user":
        place = next((line for line in _TAG_LINE.finditer(text) if f"</{line[1]}>" not in text), None)
    if place is None:
        return
    raise InvalidRow("not only text", f"{label} has {place[0].strip()}, which stands for something that is no text")


def unused_columns(row: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """The columns of a row that nothing reads; the harmless ones are left out."""
    marks = (name for pair in MARKS for name in pair)
    known = {*columns, *HARMLESS, *REFUSED_IN_ROW, *REASONING, *DESCRIPTIONS, *UNREAD, *marks}
    # columns that are read by the words of their names
    kinds = {"system"} if "system" in columns else set()
    if set(LABELS) <= set(columns):
        kinds |= {"good", "bad"}
    return [name for name in row if name not in known and kind_of_name(name) not in kinds]


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
        and kind_of_name(key) != "learned"
        and has_content(value)
    ]


def _counts(key: str, value: Any) -> bool:
    """Whether a value that is refused says something. A mask of false does: it may say what is not learned."""
    if REFUSED.get(key) == "mask" and isinstance(value, int | float):  # true and false too
        return True
    return has_content(value) and value is not True and not (isinstance(value, str) and value.lower() in _SWITCHES)


def _is_false(key: str, value: Any) -> bool:
    """Whether a value says no. A label of 0 may be a class, so only false counts there."""
    if key == "label":
        return value is False or (isinstance(value, str) and value.strip().lower() == "false")
    return says_no(value)


def _tag_in(value: Any) -> str:
    """The first placeholder such as <image> in the texts of a value; "" if there is none."""
    if isinstance(value, str):
        match = _TAG.search(value)
        return match[0] if match else ""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((tag for part in inner if (tag := _tag_in(part))), "")
