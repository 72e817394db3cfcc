"""The messages of a row: its texts, roles and turns, in whatever form a data set has them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlx_zh.corpus.conversation import Document, Message
from mlx_zh.corpus.reader import InvalidRow
from mlx_zh.corpus.row_keys import check_text, is_trained, reasoning_in
from mlx_zh.corpus.thinking import with_reasoning_apart
from mlx_zh.corpus.tools import (
    CALL_ROLES,
    RESULT_ROLES,
    call_message,
    calls_of,
    changed_json,
    check_tool_turns,
    has_content,
    linked,
    result_of,
    result_text,
    uses_tools,
)
from mlx_zh.system.json_text import parse_json

Row = Mapping[str, Any]
Change = Callable[[str], str]
ROLES = {
    **dict.fromkeys(("human", "user", "prompter", "用户", "人类"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("助手", "助理", "机器人", "客服"), "assistant"),
    **dict.fromkeys(("system", "developer", "系统"), "system"),
}
_HEAD = frozenset(("tools", "system"))  # roles that stand before the first turn


def text_of(row: Row, name: str, *, optional: bool = False) -> str:
    """The text in column `name`; "" if the column is optional and missing or null. Raises InvalidRow."""
    value = row.get(name)
    if value is None or (optional and value != value):  # pandas writes NaN for nothing
        if optional:
            return ""
        problem = "is null" if name in row else f"is missing (columns: {', '.join(row) or 'none'})"
        raise InvalidRow("missing field", f"'{name}' {problem}")
    return _as_text(value, f"'{name}'")


def _as_text(value: Any, label: str) -> str:
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        value = "".join(_as_text(_part_text(part, label), label) for part in value)
    if not isinstance(value, str):
        raise InvalidRow("wrong type", f"{label} must be text, got a {kind_of(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRow("broken Unicode", f"{label} holds half of a surrogate pair") from None
    return value


def _part_text(part: Mapping[str, Any], label: str) -> Any:
    """The text of one part of a message's content: `text` in OpenAI's form, `value` in LLaMA-Factory's v1."""
    kind = part.get("type", "text")
    if kind != "text":
        raise InvalidRow("wrong type", f"{label} must be text, got a list with a part of type {kind!r}")
    texts = [part[key] for key in ("text", "value", "content") if part.get(key) is not None]
    if len(texts) != 1:
        raise InvalidRow("wrong type", f"{label} must be text, got a list with a part that has {len(texts)} texts")
    return texts[0]


def message_of(value: Any, label: str) -> Message:
    """A message written as {role, content}, {role, text} or {from, value}. Raises InvalidRow, which names `label`."""
    if not isinstance(value, dict):
        raise InvalidRow("wrong type", f"{label} must be an object with role and content, got a {kind_of(value)}")
    keys = ("from", "value") if "from" in value else ("role", "content")
    if "text" in value and keys[1] not in value:
        keys = (keys[0], "text")
    role = value.get(keys[0])
    if not isinstance(role, str) or role.lower() not in ROLES:
        return _tool_message(value, role, keys[1], label)
    trained = is_trained(value, label)
    calls = calls_of(value, label) if len(value) > 2 else ""
    if calls and ROLES[role.lower()] != "assistant":
        raise InvalidRow("tool message", f"{label}: only the assistant calls tools, got role {role!r}")
    if calls and value.get(keys[1]) is None:
        return Message("assistant", "", trained, reasoning_of(value, label), calls)
    if value.get(keys[1]) is None:
        raise InvalidRow("missing field", f"{label}: '{keys[1]}' is missing or null")
    said = value[keys[1]]
    if isinstance(said, list) and all(isinstance(part, str) for part in said):
        said = "".join(said)
    reasoning = reasoning_of(value, label)
    if reasoning and ROLES[role.lower()] != "assistant":
        raise InvalidRow("separate reasoning", f"{label}: only a reply can have reasoning, got it in {role}")
    message = Message(ROLES[role.lower()], _as_text(said, f"{label}: '{keys[1]}'"), trained, reasoning, calls)
    if reasoning and with_reasoning_apart(replace(message, reasoning="")).reasoning not in ("", reasoning.strip()):
        raise InvalidRow("two reasonings", f"{label}: the text begins with other reasoning than that beside it")
    return message


def reasoning_of(values: Mapping[str, Any], label: str) -> str:
    """The reasoning in a message or a row, as text; "" if there is none. Raises InvalidRow, which names `label`."""
    return _as_text(reasoning_in(values, label), f"{label}: reasoning")


def _tool_message(value: Row, role: Any, key: str, label: str) -> Message:
    """A call or a result that is a turn of its own."""
    if role not in (*CALL_ROLES, *RESULT_ROLES):
        raise InvalidRow("unknown role", f"{label}: unknown role {role!r}; user, assistant or system is expected")
    trained = is_trained(value, label)
    reasoning = reasoning_of(value, label)
    if key not in value:
        raise InvalidRow("missing field", f"{label}: '{key}' is missing or null")
    if role in CALL_ROLES:
        return replace(call_message(value[key], trained, f"{label}: '{key}'"), reasoning=reasoning)
    if reasoning:
        raise InvalidRow("separate reasoning", f"{label}: only a reply can have reasoning, got it in {role}")
    content = _as_text(result_text(value[key]), f"{label}: '{key}'")
    name, call_id = (value[k] if isinstance(value.get(k), str) else "" for k in ("name", "tool_call_id"))
    return Message("tool", content, calls=result_of(name, call_id))


def listed(value: Any) -> Any:
    """A list that was written as JSON text, as in a table, or as an object of lists, as `datasets` writes it."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = parse_json(value)
        except ValueError:
            return value
    if isinstance(value, dict) and value and all(isinstance(part, list) for part in value.values()):
        parts = list(value.values())
        if len({len(part) for part in parts}) == 1:
            return [dict(zip(value, values, strict=True)) for values in zip(*parts, strict=True)]
    return value


def messages_of(value: Any, label: str) -> list[Message]:
    """The messages of a list, without a blank system message. Raises InvalidRow, which names `label`."""
    if not isinstance(value, list):
        value = listed(value)
    if isinstance(value, str) and value.lstrip()[:2] in ("[{", "[ "):
        raise InvalidRow("wrong type", f"{label} is a text that is not JSON; write it with json.dumps, not with str")
    if not isinstance(value, list) or not value:
        raise InvalidRow("wrong type", f"{label} must be a list of messages, got {_kind_or_empty(value)}")
    messages = [message_of(item, f"{label}[{i}]") for i, item in enumerate(value)]
    return without_blank_system(linked(messages) if uses_tools(messages) else messages)


def without_blank_system(messages: list[Message]) -> list[Message]:
    """The messages without a system message that is blank."""
    if messages[0].role not in _HEAD:
        return messages
    first = _turns_from(messages) - 1
    blank = messages[first].role == "system" and is_blank(messages[first].content)
    return [*messages[:first], *messages[first + 1 :]] if blank else messages


def _turns_from(messages: Sequence[Message]) -> int:
    """The index of the first turn: after the descriptions of tools and the system message, where they are."""
    if not messages or messages[0].role not in _HEAD:
        return 0
    first = 1 if messages[0].role == "tools" else 0
    return first + 1 if len(messages) > first and messages[first].role == "system" else first


def changed(messages: Iterable[Message], change: Change) -> list[Message]:
    """The messages with `change` applied to every text, and without a system message that is blank then."""
    return without_blank_system([changed_message(message, change) for message in messages])


def changed_message(message: Message, change: Change) -> Message:
    """The message with `change` applied to every text in it."""
    if not message.calls and not message.reasoning and message.role != "tools":
        return Message(message.role, change(message.content), message.trained)
    content = changed_json(message.content, change) if message.role == "tools" else change(message.content)
    reasoning = change(message.reasoning) if message.reasoning else ""
    return Message(message.role, content, message.trained, reasoning, changed_json(message.calls, change))


# White space, control characters, and characters that Unicode gives no width or ignores by default.
_VISIBLE = re.compile(
    r"[^\s\x00-\x1f\x7f-\xa0\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U000e0000-\U000e0fff]"
)


def is_blank(text: str) -> bool:
    """Whether a text has no character that can be seen."""
    return _VISIBLE.search(text) is None


def history_of(row: Row) -> list[Message]:
    """The earlier turns in Alpaca's `history`: pairs of question and answer, or messages."""
    history = listed(row.get("history"))
    if not has_content(history) or history != history:
        return []
    if not isinstance(history, list):
        raise InvalidRow("wrong type", f"'history' must be a list of pairs, got a {kind_of(history)}")
    if all(isinstance(part, dict) and ("role" in part or "from" in part) for part in history):
        return messages_of(history, "'history'")
    messages = []
    for i, pair in enumerate(history):
        pair = list(pair.values()) if _is_exchange(pair) else pair
        if not isinstance(pair, list) or len(pair) != 2:
            raise InvalidRow("wrong type", f"'history'[{i}] must be a pair of question and answer")
        question, answer = (_as_text(text, f"'history'[{i}]") for text in pair)
        messages += [Message("user", question), Message("assistant", answer)]
    return messages


_EXCHANGES = (("query", "response"), ("question", "answer"), ("prompt", "response"), ("human", "assistant"))


def _is_exchange(pair: Any) -> bool:
    """Whether a value is an object of a question and its answer, in this order."""
    return isinstance(pair, dict) and tuple(pair) in _EXCHANGES


def system_of(row: Row) -> list[Message]:
    """The system message of the row's optional `system` column, as a list of none or one."""
    system = text_of(row, "system", optional=True)
    return [] if is_blank(system) else [Message("system", system)]


def with_system(row: Row, messages: list[Message]) -> list[Message]:
    """The messages, with the row's optional `system` column as system message. Raises InvalidRow for a second one."""
    system = system_of(row)
    if not system or not messages or messages[0].role != "system":
        return system + messages
    if messages[0].content.strip() != system[0].content.strip():
        raise InvalidRow("two system messages", "'system' is not the system message that the messages begin with")
    return messages


def instruction_of(row: Row) -> Message:
    """The user's message of an Alpaca row: the instruction, and below it the input if there is one."""
    instruction, input_text = text_of(row, "instruction"), text_of(row, "input", optional=True)
    return Message("user", "\n".join(text for text in (instruction, input_text) if text))


def check_turns(messages: Sequence[Message], *, last: str) -> tuple[Message, ...]:
    """The messages as a tuple, after checks.

    Raises InvalidRow unless a system message stands only at the start, user and assistant alternate after it, the
    role `last` is at the end, and no message is empty.
    """
    first = _turns_from(messages)
    turns = messages[first:] if first else messages
    if first and "<" in messages[first - 1].content and messages[first - 1].role == "system":
        check_text(messages[first - 1], "the system message")
    for i, message in enumerate(turns):
        expected = "assistant" if i % 2 else "user"
        if message.calls or message.role != expected:
            if uses_tools(turns):
                check_tool_turns(turns, is_blank, check_text, last=last, first=first + 1)
                return _with_a_trained_reply(messages, turns, last)
            number = i + 1 + len(messages) - len(turns)
            raise InvalidRow("roles out of order", f"message {number} must be of {expected}, got {message.role}")
        if is_blank(message.content):
            reason = "empty reply" if expected == "assistant" else "empty user message"
            raise InvalidRow(reason, f"message {i + 1 + len(messages) - len(turns)} ({message.role}) is empty")
        if "<" in message.content:
            check_text(message, f"message {i + 1 + len(messages) - len(turns)} ({message.role})")
    if not turns or turns[-1].role != last:
        got = turns[-1].role if turns else "no turn"
        raise InvalidRow(f"does not end with {last}", f"the last message must be of {last}, got {got}")
    return _with_a_trained_reply(messages, turns[1::2], last)


def _with_a_trained_reply(messages: Sequence[Message], turns: Sequence[Message], last: str) -> tuple[Message, ...]:
    """The messages as a tuple. Raises InvalidRow if no reply among the turns of a conversation is to be learned."""
    if last == "assistant" and not any(message.trained and message.role == "assistant" for message in turns):
        raise InvalidRow("not to be trained", "every reply has weight 0 or loss false, so there is nothing to learn")
    return tuple(messages)


def check_document(document: Document) -> Document:
    """The document. Raises InvalidRow if all of it is here and nothing can be seen."""
    if document.begins and document.ends and is_blank(document.text):
        raise InvalidRow("empty text", "'text' is empty")
    return document


def kind_of(value: Any) -> str:
    """The kind of a JSON value, for an error message."""
    if isinstance(value, float) and value != value:
        return "number that is NaN, which JSON does not have; write null"
    kinds = {dict: "object", list: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    return kinds.get(type(value), "null" if value is None else type(value).__name__)


def _kind_or_empty(value: Any) -> str:
    return "an empty list" if value == [] else f"a {kind_of(value)}"
