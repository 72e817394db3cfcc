"""Local files to preferences: a prompt, the answer that was preferred and the one that was not.

    openai    input = {messages}, preferred_output = [{role, content}], non_preferred_output
    sharegpt  conversations, chosen = {from, value}, rejected, system?
    messages  messages, chosen = {role, content}, rejected
    alpaca    instruction, input?, system?, history?, and chosen, rejected or output = [best, next, …] (the first two)
    orca      question, chosen, rejected, system?
    prompt    prompt (text or messages), chosen, rejected (text or messages), system?
    zh-en     question, and the same answer in two languages: answer_zh is chosen, answer_en rejected
    implicit  chosen, rejected: whole conversations that differ only in the last reply (TRL)

A format is recognised by its columns. `columns` renames: our name → the file's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack

from mlx_zh.corpus.conversation import Message, Preference
from mlx_zh.corpus.reader import InvalidRow
from mlx_zh.corpus.rows import (
    Format,
    LoadReport,
    Reading,
    Row,
    check_turns,
    history_of,
    instruction_of,
    iter_rows,
    message_of,
    messages_of,
    system_of,
    text_of,
)

Pair = tuple[tuple[Message, ...], str, str]  # prompt, chosen, rejected


def load_preferences(path: Path, **reading: Unpack[Reading]) -> tuple[list[Preference], LoadReport]:
    """All preference pairs of a file and what became of its rows; errors as in `load_conversations`.

    Empty responses, and pairs of responses that are the same but for surrounding white space, are invalid rows.
    """
    report = LoadReport()
    return list(iter_preferences(path, report, **reading)), report


def iter_preferences(
    path: Path, report: LoadReport | None = None, **reading: Unpack[Reading]
) -> Iterator[Preference]:
    """`load_preferences` one at a time; an error about rows is raised after the last one. Fills `report`."""
    for place, (prompt, chosen, rejected) in iter_rows(path, FORMATS, report=report, **reading):
        yield Preference(prompt, chosen, rejected, place)


def _check_pair(prompt: Sequence[Message], chosen: str, rejected: str) -> Pair:
    turns = check_turns(prompt, last="user")
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if not response.strip():
            raise InvalidRow("empty response", f"the {name} response is empty")
    if chosen.strip() == rejected.strip():
        raise InvalidRow("identical responses", "the chosen and the rejected response are the same")
    return turns, chosen, rejected


def _response(row: Row, name: str) -> str:
    """A response written as text, as one message, or as a list of one message; always the assistant's."""
    value: Any = row.get(name)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, dict):
        return text_of({name: value} if name in row else row, name)
    message = message_of(value, f"'{name}'")
    if message.role != "assistant":
        raise InvalidRow("roles out of order", f"'{name}' must be of assistant, got {message.role}")
    return message.content


def _openai(row: Row) -> Iterator[Pair]:
    given = row.get("input")
    messages = messages_of(given.get("messages") if isinstance(given, dict) else given, "'input'.messages")
    yield _check_pair(messages, _response(row, "preferred_output"), _response(row, "non_preferred_output"))


def _turns(name: str, row: Row) -> Iterator[Pair]:
    prompt = [*system_of(row), *messages_of(row.get(name), f"'{name}'")]
    yield _check_pair(prompt, _response(row, "chosen"), _response(row, "rejected"))


def _sharegpt(row: Row) -> Iterator[Pair]:
    return _turns("conversations", row)


def _messages(row: Row) -> Iterator[Pair]:
    return _turns("messages", row)


def _alpaca(row: Row) -> Iterator[Pair]:
    prompt = [*system_of(row), *history_of(row), instruction_of(row)]
    if "chosen" in row:
        yield _check_pair(prompt, _response(row, "chosen"), _response(row, "rejected"))
        return
    outputs = row.get("output")
    if not isinstance(outputs, list) or len(outputs) < 2:
        raise InvalidRow("wrong type", "'output' must be a list of at least two responses, the best first")
    best, worse = ({"output": output} for output in outputs[:2])
    yield _check_pair(prompt, text_of(best, "output"), text_of(worse, "output"))


def _orca(row: Row) -> Iterator[Pair]:
    prompt = [*system_of(row), Message("user", text_of(row, "question"))]
    yield _check_pair(prompt, _response(row, "chosen"), _response(row, "rejected"))


def _prompt(row: Row) -> Iterator[Pair]:
    if _is_conversation(row.get("chosen")):
        # Some sets repeat the prompt as text beside whole conversations; the conversations hold all of it.
        return _implicit(row)
    given = row.get("prompt")
    messages = (
        messages_of(given, "'prompt'") if isinstance(given, list) else [Message("user", text_of(row, "prompt"))]
    )
    pair = _check_pair([*system_of(row), *messages], _response(row, "chosen"), _response(row, "rejected"))
    return iter([pair])


def _languages(row: Row) -> tuple[str, str, str] | None:
    """The columns of a question, of its Chinese and of its English answer, by whatever names: X_zh and X_en."""
    question = next((name for name in ("question", "prompt", "instruction", "query") if name in row), None)
    names = [name for name in row if name.endswith("_zh") and f"{name[:-3]}_en" in row and name[:-3] != question]
    return (question, names[0], f"{names[0][:-3]}_en") if question and len(names) == 1 else None


def _zh_en(row: Row) -> Iterator[Pair]:
    found = _languages(row)
    if found is None:
        raise InvalidRow(
            "missing field", f"no columns like question, answer_zh and answer_en (columns: {', '.join(row)})"
        )
    question, chinese, english = found
    prompt = [*system_of(row), Message("user", text_of(row, question))]
    yield _check_pair(prompt, _response(row, chinese), _response(row, english))


def _implicit(row: Row) -> Iterator[Pair]:
    chosen, rejected = (messages_of(row.get(name), f"'{name}'") for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise InvalidRow("prompts differ", "'chosen' and 'rejected' differ before the last reply")
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages or messages[-1].role != "assistant":
            raise InvalidRow("does not end with assistant", f"'{name}' must end with the assistant's message")
    yield _check_pair(chosen[:-1], chosen[-1].content, rejected[-1].content)


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1


def _has(*names: str) -> Any:
    return lambda row: all(name in row for name in names)


_BOTH = ("chosen", "rejected")
# In the order of recognition: the first that fits a row is taken.
FORMATS: dict[str, Format[Pair]] = {
    "openai": Format(
        ("input", "preferred_output", "non_preferred_output"), _has("input", "preferred_output"), _openai
    ),
    "sharegpt": Format(("conversations", *_BOTH, "system"), _has("conversations", "chosen"), _sharegpt),
    "messages": Format(
        ("messages", *_BOTH),
        lambda row: "messages" in row and not _is_conversation(row.get("chosen")) and "chosen" in row,
        _messages,
    ),
    "alpaca": Format(
        ("instruction", "input", *_BOTH, "output", "system", "history"),
        lambda row: "instruction" in row and ("chosen" in row or isinstance(row.get("output"), list)),
        _alpaca,
    ),
    "orca": Format(("system", "question", *_BOTH), _has("question", "chosen"), _orca),
    "prompt": Format(("prompt", *_BOTH, "system"), _has("prompt", "chosen"), _prompt),
    "zh-en": Format(
        ("question", "answer_zh", "answer_en", "system"), lambda row: _languages(row) is not None, _zh_en
    ),
    "implicit": Format(_BOTH, lambda row: _is_conversation(row.get("chosen")), _implicit),
}
