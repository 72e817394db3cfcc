"""Local files to conversations: the formats in which Chinese instruction data is published.

    alpaca           instruction, input?, output, system?, history? = [[question, answer], …]
    sharegpt         conversations = [{from: human|gpt|system, value}, …], system?
    messages         messages = [{role, content}, …], system?            (OpenAI)
    belle-seed       instruction, instances = [{input, output}, …]       one conversation for each instance
    prompt-response  prompt, response (or completion), system?, history?
    query-response   query, response, system?, history?                  (ms-swift)
    rounds           conversation = [{human, assistant}, …]              (Firefly), or [{system?, input, output}, …]
    alternating      data = [question, answer, …]                        (UltraChat)
    moss             meta_instruction, chat = {turn_1: {Human, MOSS}, …}
    mathglm          lines of text, expression=step=…=answer             only when named, never recognised

A format is recognised by its columns; "?" marks an optional one. `columns` maps our column names to the file's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Unpack

from mlx_zh.corpus import dialogues
from mlx_zh.corpus.conversation import Conversation, Message
from mlx_zh.corpus.reader import InvalidRow
from mlx_zh.corpus.rows import (
    Change,
    Format,
    LoadReport,
    Reading,
    Row,
    changed,
    check_turns,
    history_of,
    instruction_of,
    iter_rows,
    messages_of,
    system_of,
    text_of,
    with_system,
)

Messages = tuple[Message, ...]


def load_conversations(path: Path, **reading: Unpack[Reading]) -> tuple[list[Conversation], LoadReport]:
    """All conversations of a file, and a report on its rows.

    Raises DataError if the file cannot be read, or once for all rows that cannot be used. With on_invalid="skip" such
    rows are dropped and counted instead, and it is an error only if no row is left.
    """
    report = LoadReport()
    return list(iter_conversations(path, report, **reading)), report


def iter_conversations(
    path: Path, report: LoadReport | None = None, *, change: Change | None = None, **reading: Unpack[Reading]
) -> Iterator[Conversation]:
    """Like `load_conversations`, one at a time. Fills `report`; an error about rows is raised after the last row.

    `change` is applied to every text before the rows are checked.
    """

    def finish(messages: Messages) -> Messages:
        return messages if change is None else check_turns(changed(messages, change), last="assistant")

    for place, messages in iter_rows(path, FORMATS, report=report, finish=finish, **reading):
        yield Conversation(messages, place)


def _alpaca(row: Row) -> Iterator[Messages]:
    reply = Message("assistant", text_of(row, "output"))
    yield check_turns([*system_of(row), *history_of(row), instruction_of(row), reply], last="assistant")


def _sharegpt(row: Row) -> Iterator[Messages]:
    messages = messages_of(row.get("conversations"), "'conversations'")
    yield check_turns(with_system(row, messages), last="assistant")


def _messages(row: Row) -> Iterator[Messages]:
    messages = messages_of(row.get("messages"), "'messages'")
    yield check_turns(with_system(row, messages), last="assistant")


def _belle_seed(row: Row) -> Iterator[Messages]:
    instances = row.get("instances")
    if not isinstance(instances, list) or not instances or not all(isinstance(i, dict) for i in instances):
        raise InvalidRow("wrong type", "'instances' must be a list of objects with input and output")
    for instance in instances:
        question = instruction_of({"instruction": row.get("instruction"), "input": instance.get("input")})
        yield check_turns([question, Message("assistant", text_of(instance, "output"))], last="assistant")


def _prompt_response(row: Row) -> Iterator[Messages]:
    name = "completion" if "completion" in row and "response" not in row else "response"
    turns = [Message("user", text_of(row, "prompt")), Message("assistant", text_of(row, name))]
    yield check_turns([*system_of(row), *history_of(row), *turns], last="assistant")


def arithmetic(line: str) -> Messages:
    """A line of MathGLM data as messages: the user asks for the expression, the assistant writes the whole line.

    Raises InvalidRow if the line is not of the form expression=…=answer.
    """
    expression, equals, rest = line.partition("=")
    if not equals or not expression.strip() or not rest.strip(" ="):
        raise InvalidRow("not expression=answer", f"{line[:40]!r} is not of the form expression=steps…=answer")
    return Message("user", f"请一步一步计算：{expression.strip()}"), Message(
        "assistant", f"{expression.strip()}={rest}"
    )


def _mathglm(row: Row) -> Iterator[Messages]:
    yield arithmetic(text_of(row, "text"))


# In the order of recognition: the first format that fits a row is used.
FORMATS: dict[str, Format[Messages]] = {
    "messages": Format(("messages", "system", "tools"), lambda row: "messages" in row, _messages),
    "sharegpt": Format(("conversations", "system", "tools"), lambda row: "conversations" in row, _sharegpt),
    "belle-seed": Format(
        ("instruction", "instances"), lambda row: {"instruction", "instances"} <= row.keys(), _belle_seed
    ),
    "alpaca": Format(
        ("instruction", "input", "output", "system", "history", "tools"), lambda row: "instruction" in row, _alpaca
    ),
    "prompt-response": Format(
        ("prompt", "response", "completion", "system", "history", "tools"),
        lambda row: "prompt" in row and ("response" in row or "completion" in row),
        _prompt_response,
    ),
    "query-response": Format(
        ("query", "response", "system", "history", "tools"),
        lambda row: "query" in row and "response" in row,
        dialogues.query_response,
    ),
    "rounds": Format(
        ("conversation", "system", "tools"), lambda row: isinstance(row.get("conversation"), list), dialogues.rounds
    ),
    "moss": Format(
        ("meta_instruction", "chat"), lambda row: {"meta_instruction", "chat"} <= row.keys(), dialogues.moss
    ),
    "alternating": Format(
        ("data", "system", "tools"),
        lambda row: bool(row.get("data")) and dialogues.is_texts(row["data"]),
        dialogues.alternating,
    ),
    "mathglm": Format(("text",), lambda row: False, _mathglm, lines=True),
}
