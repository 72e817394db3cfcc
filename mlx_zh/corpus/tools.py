"""Tools in a row: their descriptions, the calls in replies, and the results, in the forms that data sets have.

    descriptions  tools or functions = [{type, function: {name, description, parameters}}, …], also without the outer
                  object, as JSON text (LLaMA-Factory), or as a list of JSON texts
    calls         tool_calls = [{id?, function: {name, arguments}}, …] (OpenAI), function_call = {name, arguments},
                  or a turn of function_call or tool_call whose text is one call or a list of them
    results       a turn of tool, function, observation or tool_response

Arguments may be an object or its JSON text. A value of null in them, and in descriptions, is left out: tables such as
Parquet give every row the names of all others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.reader import InvalidRow
from mlx_zh.system.json_text import parse_json

DESCRIPTIONS = ("tools", "functions")  # columns
CALLS = ("tool_calls", "function_call")  # keys of a reply
CALL_ROLES = ("function_call", "tool_call")
RESULT_ROLES = ("tool", "function", "observation", "ipython", "tool_response")
_ROLES = frozenset(("tools", "tool"))
_SPELLED_TOOLS = "<tools>"  # how Hermes' system messages begin the list of tools
_SPELLED_CALL = "<tool_call>"
_THOUGHT = re.compile(r"\s*(<think>.*</think>)\s*", re.DOTALL)  # LLaMA-Factory: before a call


def described_tools(row: Mapping[str, Any]) -> str:
    """The descriptions of the tools of a row, as JSON text; "" if there are none. Raises InvalidRow."""
    given = {key: value for key in DESCRIPTIONS if has_content(value := row.get(key))}
    if not given:
        return ""
    if len(given) > 1:
        raise _invalid("'tools' and 'functions' describe tools both; keep one of them")
    [(key, value)] = given.items()
    listed = _parsed(value, f"'{key}'")
    listed = listed if isinstance(listed, list) else [listed]
    return _text([_description(_parsed(tool, f"'{key}'"), f"'{key}'[{i}]") for i, tool in enumerate(listed)], key)


def _description(tool: Any, label: str) -> dict[str, Any]:
    """One description, in OpenAI's form."""
    if isinstance(tool, dict) and "function" not in tool:
        tool = {"type": "function", "function": tool}
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not has_content(function.get("name")):
        raise _invalid(f"{label} must be an object with the name of a tool")
    described: dict[str, Any] = _without_nulls(tool)
    return described


def with_tools(parsed: Any, tools: str) -> Any:
    """A parsed row, messages or a pair, with these descriptions in front.

    A system message that spells them itself, as Hermes' do, stays the only one to do so.
    """
    pair = not isinstance(parsed[0], Message)
    prompt = parsed[0] if pair else parsed
    if prompt[0].role == "system" and _SPELLED_TOOLS in prompt[0].content:
        return parsed
    prompt = (Message("tools", tools), *prompt)
    return (prompt, *parsed[1:]) if pair else prompt


def call_message(content: Any, trained: bool, label: str) -> Message:
    """The reply in a turn of function_call or tool_call: its text is a call or a list of them. Raises InvalidRow."""
    thought = ""
    if isinstance(content, str) and (match := _THOUGHT.match(content)):
        thought, content = match[1], content[match.end() :]
    return Message("assistant", thought, trained, calls=_calls_text(content, label))


def calls_of(message: Mapping[str, Any], label: str) -> str:
    """The calls in a message as JSON text, "" if it has none. Raises InvalidRow, which names `label`."""
    given = {key: value for key in CALLS if has_content(value := message.get(key))}
    if len(given) > 1:
        raise _invalid(f"{label} has 'tool_calls' and 'function_call'; keep one of them")
    return next((_calls_text(value, f"{label}: '{key}'") for key, value in given.items()), "")


def _calls_text(value: Any, label: str) -> str:
    calls = _parsed(value, label)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls:
        raise _invalid(f"{label} has no call")
    return _text([_call(_parsed(call, label), label) for call in calls], label)


def _call(value: Any, label: str) -> dict[str, Any]:
    """One call as {name, arguments, id?}."""
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(name := function.get("name"), str) or not name.strip():
        raise _invalid(f"{label} must have a name and arguments for each call")
    key = "arguments" if "arguments" in function else "parameters"
    arguments = function.get(key)
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{label}: '{key}'") if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise _invalid(f"{label}: '{key}' of {name!r} must be an object or its JSON text")
    call = {"name": name, "arguments": _without_nulls(arguments)}
    return call | {"id": value["id"]} if isinstance(value.get("id"), str) and value["id"] else call


def result_text(content: Any) -> Any:
    """What a tool said: text as it is, other values as JSON text; lists of text parts are left to the caller."""
    if content is None:
        return ""
    parts = isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content)
    return content if isinstance(content, str) or (parts and content) else _text(content, "the result of a tool")


def result_of(name: str, call_id: str) -> str:
    """What a result says of its call, as JSON text; "" if it says nothing."""
    about = {key: value for key, value in (("name", name), ("id", call_id)) if value}
    return json.dumps(about, ensure_ascii=False) if about else ""


def linked(messages: Sequence[Message]) -> list[Message]:
    """The messages, with calls put into the reply before them, and each result with the name of its tool."""
    joined: list[Message] = []
    for message in messages:
        before = joined[-1] if joined else None
        speaker = before and (before.role, before.trained)
        if (
            before is not None
            and message.calls
            and speaker == ("assistant", message.trained)
            and message.role != "tool"
        ):
            calls = [*_loaded(before.calls), *_loaded(message.calls)]
            content = "\n".join(text for text in (before.content, message.content) if text)
            reasoning = "\n".join(text for text in (before.reasoning, message.reasoning) if text)
            joined[-1] = replace(message, content=content, reasoning=reasoning, calls=_text(calls, "the calls"))
        else:
            joined.append(message)
    return list(_named(joined))


def _named(messages: Iterable[Message]) -> Iterator[Message]:
    waiting: list[dict[str, Any]] = []  # calls whose results have not come
    for message in messages:
        if message.role == "tool":
            said = parse_json(message.calls) if message.calls else {}
            call = next((c for c in waiting if "id" in said and c.get("id") == said["id"]), None)
            call = call or next((c for c in waiting if "id" not in said or "id" not in c), None)
            if call is not None:
                waiting.remove(call)
                named = result_of(said.get("name") or call["name"], said.get("id") or call.get("id", ""))
                message = replace(message, calls=named)
        else:
            waiting = _loaded(message.calls)
        yield message


def uses_tools(messages: Iterable[Message]) -> bool:
    """Whether a conversation has descriptions, calls or results of tools."""
    for message in messages:  # noqa: SIM110  (in every row, so a plain loop)
        if message.calls or message.role in _ROLES:
            return True
    return False


def check_tool_turns(
    turns: Sequence[Message],
    is_blank: Callable[[str], bool],
    check_text: Callable[[Message, str], None],
    *,
    last: str,
    first: int,
) -> None:
    """Raise InvalidRow unless calls are followed by their results, and these by a reply. `first`: the first's number.

    At the end may stand a reply, calls included; with last="user" a question or a result.
    """
    follows = {"user": ("assistant",), "tool": ("tool", "assistant"), "": ("user",)}
    before = ""
    for number, message in enumerate(turns, start=first):
        if message.role not in follows[before]:
            expected = " or ".join(follows[before])
            raise InvalidRow("roles out of order", f"message {number} must be of {expected}, got {message.role}")
        if message.role != "tool" and not message.calls and is_blank(message.content):
            reason = "empty reply" if message.role == "assistant" else "empty user message"
            raise InvalidRow(reason, f"message {number} ({message.role}) is empty")
        check_text(message, f"message {number} ({message.role})")
        before = message.role
        if before == "assistant":
            spelled = _SPELLED_CALL in message.content
            follows["assistant"] = ("tool",) if message.calls else ("tool", "user") if spelled else ("user",)
    ends = ("assistant",) if last == "assistant" else ("user", "tool")
    if before not in ends:
        raise InvalidRow(
            f"does not end with {last}", f"the last message must be of {last}, got {before or 'no turn'}"
        )


def changed_json(text: str, change: Callable[[str], str]) -> str:
    """A JSON text with `change` applied to every text in it, names included."""
    return json.dumps(_changed(parse_json(text), change), ensure_ascii=False) if text else ""


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_changed(item, change) for item in value]
    if isinstance(value, dict):
        return {change(key): _changed(item, change) for key, item in value.items()}
    return value


def has_content(value: Any) -> bool:
    """Whether a value says something; tables write nothing as a text such as "[]"."""
    if isinstance(value, str):
        return value.strip().lower() not in ("", "[]", "{}", "null", "none")
    return value is not None and value is not False and value != [] and value != {}


def _parsed(value: Any, label: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError:
        raise _invalid(f"{label} must be JSON, got {value[:40]!r}") from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _text(value: Any, label: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRow("broken Unicode", f"{label} holds half of a surrogate pair") from None
    except (TypeError, ValueError, RecursionError):
        raise _invalid(f"{label} must hold values of JSON only") from None
    return text


def _loaded(calls: str) -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = parse_json(calls) if calls else []
    return loaded


def _invalid(detail: str) -> InvalidRow:
    return InvalidRow("tool message", detail)
