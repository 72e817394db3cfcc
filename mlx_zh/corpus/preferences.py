"""Local files to preferences: a prompt, the preferred (chosen) answer and the other (rejected) one.

    openai    input = {messages}, preferred_output = [{role, content}], non_preferred_output
    sharegpt  conversations, chosen = {from, value}, rejected, system?
    messages  messages, chosen = {role, content}, rejected, system?
    swift     messages that end with the chosen answer, rejected_response or rejected_messages          (ms-swift)
    query     query, response, rejected_response, system?, history?                                     (ms-swift)
    context   context (text or messages), chosen, rejected, system?                 (hh_rlhf_cn)
    alpaca    instruction, input?, system?, history?, and chosen, rejected or output = [best, next, …] (the first two)
    orca      question, chosen, rejected, system?
    prompt    prompt (text or messages), chosen, rejected, system?
    zh-en     question, and the same answer in two languages: answer_zh is chosen, answer_en rejected
    implicit  chosen, rejected: whole conversations that differ only in the last reply (TRL)
    feedback  what was said of a model's answers in the chat (see `corpus.feedback`)
    hh        chosen, rejected: the same as one text each, \n\nHuman: …\n\nAssistant: …   (hh-rlhf)

`chosen` and `rejected` are texts, messages, or whole conversations with the prompt in them.

A format is recognised by its columns; "?" marks an optional one. `columns` maps our column names to the file's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack

from mlx_zh.corpus import feedback
from mlx_zh.corpus.conversation import Message, Preference
from mlx_zh.corpus.reader import InvalidRow
from mlx_zh.corpus.row_keys import check_row, check_text
from mlx_zh.corpus.row_messages import (
    ROLES,
    Change,
    Row,
    changed,
    changed_message,
    check_turns,
    history_of,
    instruction_of,
    is_blank,
    message_of,
    messages_of,
    system_of,
    text_of,
    with_system,
)
from mlx_zh.corpus.rows import REASONING_WAY, Format, LoadReport, Reading, iter_rows
from mlx_zh.corpus.tools import described_tools, with_tools

_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_PROMPTS = ("instruction", "question", "prompt")  # columns that go before a text in `context`
Pair = tuple[tuple[Message, ...], Message, Message]  # prompt, chosen, rejected


def load_preferences(path: Path, **reading: Unpack[Reading]) -> tuple[list[Preference], LoadReport]:
    """All preference pairs of a file, and a report on its rows. Raises the errors of `load_conversations`.

    A row is invalid if a response is empty, or if both responses are the same apart from surrounding white space.
    """
    report = LoadReport()
    return list(iter_preferences(path, report, **reading)), report


def iter_preferences(
    path: Path, report: LoadReport | None = None, *, change: Change | None = None, **reading: Unpack[Reading]
) -> Iterator[Preference]:
    """Like `load_preferences`, one at a time. Fills `report`; an error about rows is raised after the last row.

    `change` is applied to every text before the rows are checked.
    """

    def finish(pair: Pair) -> Pair:
        if change is None:
            return pair
        prompt, chosen, rejected = pair
        return _check_pair(
            changed(prompt, change), changed_message(chosen, change), changed_message(rejected, change)
        )

    for place, pair in iter_rows(path, FORMATS, report=report, finish=finish, **reading):
        yield as_preference(pair, place)


def as_preference(pair: Pair, place: str) -> Preference:
    """What a format reads, as an item of the data."""
    prompt, chosen, rejected = pair
    return Preference(prompt, chosen.content, rejected.content, place, chosen.calls, rejected.calls)


def _check_pair(prompt: Sequence[Message], chosen: Message, rejected: Message) -> Pair:
    turns = check_turns(prompt, last="user")
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if is_blank(response.content) and not response.calls:
            raise InvalidRow("empty response", f"the {name} response is empty")
        if "<" in response.content:
            check_text(response, f"the {name} response")
    if chosen.content.strip() == rejected.content.strip() and chosen.calls == rejected.calls:
        raise InvalidRow("identical responses", "the chosen and the rejected response are the same")
    return turns, chosen, rejected


def _response(row: Row, name: str) -> Message:
    """The assistant's response in column `name`: a text, a message, or a list of one message."""
    value: Any = row.get(name)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, dict):
        return _said({name: value} if name in row else row, name)
    message = _learned(message_of(value, f"'{name}'"), name)
    if message.role != "assistant":
        raise InvalidRow("roles out of order", f"'{name}' must be of assistant, got {message.role}")
    return message


def _said(row: Row, name: str) -> Message:
    return Message("assistant", text_of(row, name))


def _learned(message: Message, name: str) -> Message:
    if message.reasoning:
        raise InvalidRow("separate reasoning", f"'{name}' has reasoning apart from its text; {REASONING_WAY}")
    if not message.trained:
        raise InvalidRow("not to be trained", f"'{name}' has weight 0 or loss false")
    return message


def _openai(row: Row) -> Iterator[Pair]:
    prompt = row.get("input")
    if isinstance(prompt, dict):
        check_row(prompt)
    messages = messages_of(prompt.get("messages") if isinstance(prompt, dict) else prompt, "'input'.messages")
    pair = _check_pair(messages, _response(row, "preferred_output"), _response(row, "non_preferred_output"))
    tools = described_tools(prompt) if isinstance(prompt, dict) else ""
    yield with_tools(pair, tools) if tools else pair


def _beside(row: Row, prompt: list[Message]) -> Pair:
    """The pair of a row with a prompt, which whole conversations in `chosen` and `rejected` may repeat."""
    if not _is_conversation(row.get("chosen")):
        return _check_pair(with_system(row, prompt), _response(row, "chosen"), _response(row, "rejected"))
    return _in_common(row, *(_whole(row, name, prompt) for name in ("chosen", "rejected")))


def _whole(row: Row, name: str, prompt: list[Message]) -> list[Message]:
    """The conversation in column `name`, with what it lacks of the prompt."""
    messages = messages_of(row.get(name), f"'{name}'")
    if messages and messages[0].role == "assistant":
        return [*prompt, *messages]
    has_system = bool(messages) and messages[0].role == "system"
    return messages if has_system else [*(m for m in prompt[:1] if m.role == "system"), *messages]


def _in_common(row: Row, chosen: list[Message], rejected: list[Message]) -> Pair:
    """The pair of two conversations that differ only in the last reply."""
    chosen, rejected = with_system(row, chosen), with_system(row, rejected)
    if chosen[:-1] != rejected[:-1]:
        raise InvalidRow("prompts differ", "'chosen' and 'rejected' differ before the last reply")
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages or messages[-1].role != "assistant":
            raise InvalidRow("does not end with assistant", f"'{name}' must end with the assistant's message")
        _learned(messages[-1], name)
    return _check_pair(chosen[:-1], chosen[-1], rejected[-1])


def _asked(row: Row, name: str) -> list[Message]:
    """The prompt in column `name`: messages, a text, or a transcript that ends where the assistant is to speak.

    Whole conversations repeat it, so beside them it may be missing.
    """
    value = row.get(name)
    if isinstance(value, list):
        return messages_of(value, f"'{name}'")
    if value is None and _is_conversation(row.get("chosen")):
        return []
    text = text_of(row, name)
    said = _transcript(text)
    return said[:-1] if said and said[-1] == Message("assistant", "") else [Message("user", text)]


def _transcript(value: Any) -> list[Message]:
    """The messages of a text like "Human: …\\n\\nAssistant: …"; none for another value."""
    if not isinstance(value, str) or not (first := _SPEAKER.match(value)) or first[1] != "Human":
        return []
    parts = _SPEAKER.split(value)
    return [Message(_SPEAKERS[name], said.strip()) for name, said in zip(parts[1::2], parts[2::2], strict=True)]


def _turns(name: str, row: Row) -> Iterator[Pair]:
    yield _beside(row, messages_of(row.get(name), f"'{name}'"))


def _sharegpt(row: Row) -> Iterator[Pair]:
    return _turns("conversations", row)


def _messages(row: Row) -> Iterator[Pair]:
    return _turns("messages", row)


def _swift(row: Row) -> Iterator[Pair]:
    messages = with_system(row, messages_of(row.get("messages"), "'messages'"))
    if row.get("rejected_messages") is not None:
        yield _in_common(row, messages, messages_of(row["rejected_messages"], "'rejected_messages'"))
        return
    chosen = check_turns(messages, last="assistant")
    yield _check_pair(chosen[:-1], _learned(chosen[-1], "messages"), _response(row, "rejected_response"))


def _query(row: Row) -> Iterator[Pair]:
    prompt = [*system_of(row), *history_of(row), Message("user", text_of(row, "query"))]
    yield _check_pair(prompt, _response(row, "response"), _response(row, "rejected_response"))


def _context(row: Row) -> Iterator[Pair]:
    yield _beside(row, _asked(row, "context"))


def _alpaca(row: Row) -> Iterator[Pair]:
    if "chosen" in row:
        asked = _asked(row, "instruction") if isinstance(row["instruction"], list) else [instruction_of(row)]
        yield _beside(row, [*history_of(row), *asked])
        return
    prompt = [*system_of(row), *history_of(row), instruction_of(row)]
    outputs = row.get("output")
    if not isinstance(outputs, list) or len(outputs) < 2:
        raise InvalidRow("wrong type", "'output' must be a list of at least two responses, the best first")
    best, worse = ({"output": output} for output in outputs[:2])
    yield _check_pair(prompt, _said(best, "output"), _said(worse, "output"))


def _orca(row: Row) -> Iterator[Pair]:
    yield _beside(row, [*history_of(row), *_asked(row, "question")])


def _prompt(row: Row) -> Iterator[Pair]:
    yield _beside(row, [*history_of(row), *_asked(row, "prompt")])


def _languages(row: Row) -> tuple[str, str, str] | None:
    """The names of the columns with the question, its Chinese answer (X_zh) and its English answer (X_en), if any."""
    question = next((name for name in ("question", "prompt", "instruction", "query") if name in row), None)
    names = [name for name in row if name.endswith("_zh") and f"{name[:-3]}_en" in row and name[:-3] != question]
    return (question, names[0], f"{names[0][:-3]}_en") if question and len(names) == 1 else None


def _zh_en(row: Row) -> Iterator[Pair]:
    columns = _languages(row)
    if columns is None:
        raise InvalidRow(
            "missing field", f"no columns like question, answer_zh and answer_en (columns: {', '.join(row)})"
        )
    question, chinese, english = columns
    prompt = [*system_of(row), Message("user", text_of(row, question))]
    yield _check_pair(prompt, _response(row, chinese), _response(row, english))


def _implicit(row: Row) -> Iterator[Pair]:
    yield _in_common(row, *(messages_of(row.get(name), f"'{name}'") for name in ("chosen", "rejected")))


def _hh(row: Row) -> Iterator[Pair]:
    chosen, rejected = _transcript(row.get("chosen")), _transcript(row.get("rejected"))
    yield _in_common(row, chosen, rejected)


def _feedback(row: Row) -> Iterator[Pair]:
    yield _check_pair(*feedback.pair_of(row))


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1


def _is_prompt(messages: Any, chosen: Any) -> bool:
    """Whether `messages` are a prompt. Some sets have the chosen conversation there again, beside `chosen`."""
    if not _is_conversation(chosen):
        return messages is not None
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and ROLES.get(str(last.get("role", last.get("from"))).lower()) == "user"


def _is_context(row: Row) -> bool:
    """Whether `context` holds what was said before. A text beside a question is what the question is about."""
    context = row.get("context")
    return isinstance(context, list) or (isinstance(context, str) and not any(name in row for name in _PROMPTS))


def _has(*names: str) -> Any:
    return lambda row: all(name in row for name in names)


_BOTH = ("chosen", "rejected")
# In the order of recognition: the first format that fits a row is used.
FORMATS: dict[str, Format[Pair]] = {
    "feedback": Format(feedback.COLUMNS, feedback.is_feedback, _feedback, settle=feedback.settled),
    "openai": Format(
        ("input", "preferred_output", "non_preferred_output", "tools"), _has("input", "preferred_output"), _openai
    ),
    "sharegpt": Format(("conversations", *_BOTH, "system", "tools"), _has("conversations", "chosen"), _sharegpt),
    "messages": Format(
        ("messages", *_BOTH, "system", "tools"),
        lambda row: "chosen" in row and _is_prompt(row.get("messages"), row["chosen"]),
        _messages,
    ),
    "swift": Format(
        ("messages", "rejected_response", "rejected_messages", "system", "tools"),
        lambda row: "messages" in row and ("rejected_response" in row or "rejected_messages" in row),
        _swift,
    ),
    "query": Format(
        ("query", "response", "rejected_response", "system", "history", "tools"),
        _has("query", "response", "rejected_response"),
        _query,
    ),
    "context": Format(
        ("context", *_BOTH, "system", "tools"),
        lambda row: "chosen" in row and _is_context(row),
        _context,
    ),
    "alpaca": Format(
        ("instruction", "input", *_BOTH, "output", "system", "history", "tools"),
        lambda row: "instruction" in row and ("chosen" in row or isinstance(row.get("output"), list)),
        _alpaca,
    ),
    "orca": Format(("system", "question", *_BOTH, "history", "tools"), _has("question", "chosen"), _orca),
    "prompt": Format(("prompt", *_BOTH, "system", "history", "tools"), _has("prompt", "chosen"), _prompt),
    "zh-en": Format(
        ("question", "answer_zh", "answer_en", "system", "tools"), lambda row: _languages(row) is not None, _zh_en
    ),
    "implicit": Format((*_BOTH, "system", "tools"), lambda row: _is_conversation(row.get("chosen")), _implicit),
    "hh": Format((*_BOTH, "system", "tools"), lambda row: bool(_transcript(row.get("chosen"))), _hh),
}
