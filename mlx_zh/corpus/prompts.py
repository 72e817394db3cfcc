"""Prompts to answer, from a file in any form of training data, from rows without an answer, or from lines of text.

Of a row with an answer, that answer is the reference: the reply at the end, the chosen one of a pair, or a column
such as `answer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mlx_zh.corpus import formats, preferences
from mlx_zh.corpus.conversation import Conversation, Document, Message, Preference
from mlx_zh.corpus.reader import InvalidRow, holds_json_rows
from mlx_zh.corpus.row_messages import (
    Row,
    check_turns,
    history_of,
    instruction_of,
    is_blank,
    messages_of,
    system_of,
    text_of,
    with_system,
)
from mlx_zh.corpus.rows import Format, LoadReport, iter_rows
from mlx_zh.corpus.sources import Item
from mlx_zh.corpus.survey import guess_of, read_head
from mlx_zh.corpus.text_files import inner_suffix
from mlx_zh.corpus.tools import described_tools

_ASKED = ("prompt", "instruction", "query", "question")  # columns with a question
_REFERENCES = ("reference", "answer", "solution", "expect", "expected", "output", "response", "completion")
_LISTS = {"messages": "messages", "conversations": "sharegpt"}  # columns of messages, and the formats that have them
_NOT_ASKED = ("text", "mathglm")


@dataclass(frozen=True, slots=True)
class Prompt:
    """Messages, the last one the user's, and the known answer if there is one. `source`: "file:line"."""

    messages: tuple[Message, ...]
    reference: str | None = None
    source: str = ""

    @property
    def uses_tools(self) -> bool:
        """Whether a message describes, calls or answers as a tool, which a line of samples has no form for."""
        return any(message.calls or message.role in ("tool", "tools") for message in self.messages)


def read_prompts(path: Path, on_invalid: str = "error", report: LoadReport | None = None) -> Iterator[Prompt]:
    """The prompt of each row of a file. Fills `report`. Raises DataError as `iter_rows` does."""
    if inner_suffix(path) == ".txt" and not holds_json_rows(path):
        rows = iter_rows(path, FORMATS, format="line", on_invalid=on_invalid, report=report)
    else:
        head = read_head(path)
        known = any(form.fits(row) for row in head.rows for form in FORMATS.values())
        guess = None if known else guess_of(head, None)
        columns = None if guess is None else guess.columns
        options: dict[str, Any] = {"on_invalid": on_invalid, "report": report, "columns": columns}
        rows = iter_rows(path, FORMATS, sheet=head.sheet, **options)
    for place, prompt in rows:
        yield Prompt(prompt.messages, prompt.reference, place)


def prompt_of(item: Item) -> Prompt | None:
    """The prompt of a row of training data; None for raw text, which asks nothing."""
    if isinstance(item, Preference):
        return Prompt(item.prompt, item.chosen, item.source)
    if isinstance(item, Conversation):
        return Prompt(item.messages[:-1], item.messages[-1].content, item.source)
    return None


def _of_pair(form: Format[preferences.Pair], row: Row) -> Iterator[Prompt]:
    for messages, chosen, _ in form.parse(row):
        yield Prompt(messages, chosen.content)


def _of_conversation(form: Format[formats.Parsed], row: Row) -> Iterator[Prompt]:
    """The prompt of a row with an answer; one whose answer is missing or blank is a prompt alone."""
    try:
        parsed = list(form.parse(row))
    except InvalidRow:
        if not _is_question(row) or any(not _is_absent(row, name) for name in _REFERENCES):
            raise
        yield from _question(row)
        return
    for messages in parsed:
        if isinstance(messages, Document):
            raise InvalidRow("wrong type", "the row is raw text, which asks nothing")
        yield Prompt(messages[:-1], messages[-1].content)


def _is_absent(row: Row, name: str) -> bool:
    value = row.get(name)
    return value is None or (isinstance(value, str) and is_blank(value))


def _is_question(row: Row) -> bool:
    return any(name in row for name in _ASKED) or (len(row) == 1 and isinstance(next(iter(row.values())), str))


def _question(row: Row) -> Iterator[Prompt]:
    """The prompt of a row with a question in a column, as a text or as messages."""
    name = next((name for name in _ASKED if name in row), None) or next(iter(row))
    value = row[name]
    if isinstance(value, list):
        asked = messages_of(value, f"'{name}'")
    else:
        asked = [instruction_of({**row, "instruction": text_of(row, name)})]
    turns = [*history_of(row), *asked] if asked[0].role == "system" else [*system_of(row), *history_of(row), *asked]
    yield Prompt(check_turns(turns, last="user"), _reference(row))


def _turns(name: str, row: Row) -> Iterator[Prompt]:
    """The prompt of a row of messages, which end with a question or with its answer."""
    messages = with_system(row, messages_of(row.get(name), f"'{name}'"))
    if messages[-1].role == "assistant":
        turns = check_turns(messages, last="assistant")
        yield Prompt(turns[:-1], turns[-1].content)
    else:
        yield Prompt(check_turns(messages, last="user"), _reference(row))


def _reference(row: Row) -> str | None:
    """The known answer in a column beside the question."""
    for name in _REFERENCES:
        value = row.get(name)
        if isinstance(value, str | int | float) and not isinstance(value, bool) and not is_blank(str(value)):
            return str(value)
    return None


def _line(row: Row) -> Iterator[Prompt]:
    yield Prompt((Message("user", text_of(row, "text")),))


def _with_tools(parse: Callable[[Row], Iterable[Prompt]], row: Row) -> Iterator[Prompt]:
    tools = described_tools(row)
    for prompt in parse(row):
        yield replace(prompt, messages=(Message("tools", tools), *prompt.messages)) if tools else prompt


def _has(name: str) -> Callable[[Row], bool]:
    return lambda row: name in row


def _formats() -> dict[str, Format[Prompt]]:
    """In the order of recognition: pairs, messages, conversations of every kind, questions, lines of text."""
    known: dict[str, Format[Prompt]] = {
        f"pair-{name}": Format(form.columns, form.fits, partial(_of_pair, form))
        for name, form in preferences.FORMATS.items()
    }
    for name in _LISTS:
        known[name] = Format((name, "system", "tools", *_REFERENCES), _has(name), partial(_turns, name))
    for name, form in formats.FORMATS.items():
        if name not in (*_LISTS.values(), *_NOT_ASKED):
            known[name] = Format(form.columns, form.fits, partial(_of_conversation, form))
    asked = (*_ASKED, "input", "system", "history", *_REFERENCES)
    known["question"] = Format(asked, _is_question, _question)
    known["line"] = Format(("text",), lambda row: False, _line, lines=True)
    return {name: replace(form, parse=partial(_with_tools, form.parse), whole=True) for name, form in known.items()}


FORMATS = _formats()
