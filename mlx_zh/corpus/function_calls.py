"""Sets of tool calls that have a form of their own: xLAM's and Glaive's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.reader import InvalidRow
from mlx_zh.corpus.row_messages import Row, check_turns, messages_of, system_of, text_of
from mlx_zh.corpus.tools import described_tools, with_tools
from mlx_zh.system.json_text import parse_json

Messages = tuple[Message, ...]
_SPEAKER = re.compile(r"(?:\A|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):")
_ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
_END = "<|endoftext|>"
_CALL = "<functioncall>"
_QUOTED = re.compile(r'("arguments"\s*:\s*)\'(.*)\'\s*}\s*\Z', re.DOTALL)  # Glaive quotes arguments so: '{"a": 1}'
_DECODER = json.JSONDecoder()


def xlam(row: Row) -> Iterator[Messages]:
    """xLAM: query, answers = [{name, arguments}, …], tools = [{name, description, parameters}, …]."""
    calls = {"role": "assistant", "content": None, "tool_calls": row.get("answers")}
    yield check_turns(
        [*system_of(row), *messages_of([{"role": "user", "content": text_of(row, "query")}, calls], "'answers'")],
        last="assistant",
    )


def is_glaive(row: Row) -> bool:
    """Whether a row is one of Glaive's."""
    chat = row.get("chat")
    return isinstance(chat, str) and _SPEAKER.match(chat) is not None


def glaive(row: Row) -> Iterator[Messages]:
    """Glaive: chat = USER: … ASSISTANT: … FUNCTION RESPONSE: …, and the tools at the end of `system`."""
    system = text_of(row, "system", optional=True).strip().removeprefix("SYSTEM:").strip()
    head, tools = _tools_in(system)
    _, *parts = _SPEAKER.split(text_of(row, "chat"))
    turns = [_turn(_ROLES[name], said.strip()) for name, said in zip(parts[::2], parts[1::2], strict=True)]
    messages = messages_of(turns, "'chat'")
    checked = check_turns([*([Message("system", head)] if head else []), *messages], last="assistant")
    yield with_tools(checked, described_tools({"tools": tools})) if tools else checked


def _turn(role: str, said: str) -> dict[str, Any]:
    said = said.replace(_END, "").strip()
    if role != "assistant" or _CALL not in said:
        return {"role": role, "content": said}
    before, _, call = said.partition(_CALL)
    return {"role": role, "content": before.strip(), "function_call": _call(call.strip())}


def _call(text: str) -> Any:
    if match := _QUOTED.search(text):
        text = f"{text[: match.start()]}{match[1]}{json.dumps(match[2])}}}"
    try:
        return parse_json(text)
    except ValueError:
        raise InvalidRow("tool message", f"the call in 'chat' is not JSON: {text[:40]!r}") from None


def _tools_in(system: str) -> tuple[str, list[Any]]:
    """The text before the descriptions of tools, and these; all of the text if none are at its end."""
    start = system.find("{")
    head, rest, tools = system[:start].rstrip(" -\n"), system[start:].strip(), []
    while start >= 0 and rest:
        try:
            tool, end = _DECODER.raw_decode(rest)
        except (ValueError, RecursionError):
            return system, []
        tools.append(tool)
        rest = rest[end:].strip()
    return (head, tools) if tools else (system, [])
