"""Conversations as some Chinese projects publish them, each in a form of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.reader import InvalidRow
from mlx_zh.corpus.row_keys import is_trained
from mlx_zh.corpus.row_messages import (
    Row,
    check_turns,
    history_of,
    listed,
    messages_of,
    system_of,
    text_of,
    with_system,
)

Messages = tuple[Message, ...]
_MOSS_MARKS = re.compile(r"^\s*<\|[\w ]{1,20}\|>:\s?|<eo[a-z]>\s*$")


def query_response(row: Row) -> Iterator[Messages]:
    """ms-swift: query, response, system?, history? = [[question, answer], …]."""
    turns = [Message("user", text_of(row, "query")), Message("assistant", text_of(row, "response"))]
    yield check_turns([*system_of(row), *history_of(row), *turns], last="assistant")


def rounds(row: Row, name: str = "conversation") -> Iterator[Messages]:
    """Firefly and XTuner: conversation = [{human, assistant}, …] or [{system?, input, output}, …].

    Some others have messages there: [{role, content}, …].
    """
    turns = listed(row.get(name))
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise InvalidRow("wrong type", f"'{name}' must be a list of objects with human and assistant")
    if not are_rounds(turns) and ("role" in turns[0] or "from" in turns[0]):
        yield check_turns(with_system(row, messages_of(turns, f"'{name}'")), last="assistant")
        return
    messages = system_of(row) or system_of(turns[0])
    for turn in turns:
        question, answer = ("human", "assistant") if turn.get("human") is not None else ("input", "output")
        trained = turn.get("output_with_loss") is not False and is_trained(turn, f"'{name}'")
        messages += [
            Message("user", text_of(turn, question)),
            Message("assistant", text_of(turn, answer), trained),
        ]
    yield check_turns(messages, last="assistant")


def are_rounds(value: Any) -> bool:
    """Whether a value is a list of questions with their answers, as Firefly and XTuner write it."""
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and ({"human", "assistant"} <= value[0].keys() or {"input", "output"} <= value[0].keys())
    )


_SPEAKER = re.compile(r"(?:\A\s*|\n\s*)(Human|Assistant)[:：]")  # BELLE's set of dialogues


def transcript(text: str) -> list[Message]:
    """The messages of a text like "Human:…\\nAssistant:…\\nHuman:…\\nAssistant:"; none for any other text."""
    if not text.lstrip().startswith("Human") or not text.rstrip().endswith(("Assistant:", "Assistant：")):
        return []
    before, *parts = _SPEAKER.split(text)
    speakers, said = parts[::2], parts[1::2]
    if before.strip() or speakers != ["Human", "Assistant"] * (len(speakers) // 2) or said[-1].strip():
        return []
    names = {"Human": "user", "Assistant": "assistant"}
    return [Message(names[name], part.strip()) for name, part in zip(speakers[:-1], said[:-1], strict=True)]


def alternating(row: Row) -> Iterator[Messages]:
    """UltraChat: data = [question, answer, question, answer, …]."""
    texts = row.get("data")
    if not is_texts(texts):
        raise InvalidRow("wrong type", "'data' must be a list of texts, question and answer in turn")
    turns = [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts or ())]
    yield check_turns([*system_of(row), *turns], last="assistant")


def is_texts(value: Any) -> bool:
    """Whether a value is a list of texts."""
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def moss(row: Row) -> Iterator[Messages]:
    """MOSS: meta_instruction?, chat = {turn_1: {Human, MOSS}, …}; marks such as <|Human|>: and <eoh> are taken off.

    Inner thoughts are the reasoning before a reply. A turn with a command is refused, because the row describes the
    tools in prose only. Tables have a column for each turn, null after the last.
    """
    chat = row.get("chat")
    if isinstance(chat, Mapping):
        chat = {name: chat[name] for name in sorted(chat, key=_turn_number) if chat[name] is not None}
    if not is_moss(chat):
        raise InvalidRow("wrong type", "'chat' must be an object of turns with Human and MOSS")
    assert isinstance(chat, Mapping)
    messages = system_of({"system": row.get("meta_instruction")})
    for turn in chat.values():
        command = _without_marks(turn, "Commands", optional=True).strip()
        if command not in ("", "None"):
            raise InvalidRow(
                "tool message",
                f"'Commands' calls a tool, {command[:40]!r}, and the row does not describe tools as JSON; write it "
                "as messages with `tools` and `tool_calls`, or leave it out with data.on_invalid=skip",
            )
        thought = _without_marks(turn, "Inner Thoughts", optional=True).strip()
        messages += [
            Message("user", _without_marks(turn, "Human")),
            Message("assistant", _without_marks(turn, "MOSS"), reasoning="" if thought == "None" else thought),
        ]
    yield check_turns(messages, last="assistant")


def _without_marks(turn: Row, name: str, *, optional: bool = False) -> str:
    return _MOSS_MARKS.sub("", text_of(turn, name, optional=optional))


def is_moss(chat: Any) -> bool:
    """Whether a value is an object of turns."""
    turns = [turn for turn in chat.values() if turn is not None] if isinstance(chat, Mapping) else []
    return bool(turns) and all(isinstance(turn, Mapping) for turn in turns)


def _turn_number(name: str) -> int:
    """12 of turn_12; names without a number keep their order."""
    digits = name.rpartition("_")[2]
    return int(digits) if digits.isdecimal() and len(digits) < 10 else 0
