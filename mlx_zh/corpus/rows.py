"""What conversation and preference formats share: the fields, roles and turns of a row, and the loading of a file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar

import yaml

from mlx_zh.corpus.conversation import Document, Message
from mlx_zh.corpus.csv_rows import read_csv
from mlx_zh.corpus.documents import TEXT_SUFFIXES, read_document
from mlx_zh.corpus.excel_rows import EXCEL_SUFFIXES, is_workbook, read_excel
from mlx_zh.corpus.reader import InvalidRow, read_lines, read_rows
from mlx_zh.corpus.row_keys import (
    RowKeys,
    check_text,
    has_more_keys,
    is_trained,
    reasoning_in,
    row_keys,
    unused_columns,
    unused_keys,
)
from mlx_zh.corpus.tables import read_arrow
from mlx_zh.corpus.text_files import inner_suffix
from mlx_zh.corpus.tools import (
    CALL_ROLES,
    RESULT_ROLES,
    call_message,
    calls_of,
    changed_json,
    check_tool_turns,
    described_tools,
    linked,
    result_of,
    result_text,
    uses_tools,
    with_tools,
)
from mlx_zh.errors import DataError

Row = Mapping[str, Any]
Parsed = TypeVar("Parsed")
Change = Callable[[str], str]

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model"), "assistant"),
    "system": "system",
}
# columns that a row may lack
_OPTIONAL = ("input", "system", "history", "tools", "kto_tag", "label", "meta_instruction")
_OF_MESSAGES = (  # columns that may hold messages
    *("messages", "conversations", "conversation", "context", "prompt", "response", "completion"),
    *("chosen", "rejected", "rejected_messages"),
)
REASONING_WAY = "write it into each answer as <think>…</think>, or leave it out"
_HEAD = frozenset(("tools", "system"))  # roles that stand before the first turn
_EXAMPLES = 3  # places listed for each reason
_SHOWN = 10  # errors listed for a file
_WATCHED, _UNUSED = 1000, 100  # different lists of columns that are looked at, and unused columns that are kept
_LOOK_AHEAD = 100  # the format is recognised from the first row that fits one, among this many
# Readers chosen by the ending of a file's name; the kind of every other file is told from its content. A workbook is
# known by its content too, so what has its ending and comes here is text.
_READERS = {
    ".arrow": read_arrow,
    **dict.fromkeys(TEXT_SUFFIXES, read_document),
    **dict.fromkeys((".csv", ".tsv", *EXCEL_SUFFIXES), read_csv),
}


@dataclass
class LoadReport:
    """How many rows of a file were used, and how many were dropped for which reason."""

    rows: int = 0
    kept: int = 0
    format: str = ""
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows
    examples: dict[str, list[str]] = field(default_factory=dict)  # reason -> the first few places, as "file:line"
    unused: list[str] = field(default_factory=list)  # columns that nothing reads
    placeholders: list[str] = field(default_factory=list)  # names said as {{name}}, looked for if there are variables

    def drop(self, reason: str, place: str) -> None:
        """Count a row that cannot be used."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        places = self.examples.setdefault(reason, [])
        if len(places) < _EXAMPLES:
            places.append(place)

    def add(self, other: LoadReport) -> None:
        """Add the counts of another file."""
        self.rows += other.rows
        self.kept += other.kept
        self.format = self.format or other.format
        for reason, count in other.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + count
            places = self.examples.setdefault(reason, [])
            places += other.examples[reason][: _EXAMPLES - len(places)]
        self.unused = list(dict.fromkeys(self.unused + other.unused))[:_UNUSED]
        self.placeholders = list(dict.fromkeys(self.placeholders + other.placeholders))


class Reading(TypedDict, total=False):
    """How a file is read."""

    format: str  # a format's name, or auto: it is recognised
    on_invalid: str  # what to do with unusable rows: error lists them in one error, skip drops and counts them
    columns: Mapping[str, str] | None  # our column names -> the file's
    sheet: str | None  # of an Excel workbook; None: the first one with rows


@dataclass(frozen=True)
class Format(Generic[Parsed]):
    """A format of rows: its columns, how to recognise it, and how to read a row."""

    columns: tuple[str, ...]
    fits: Callable[[Row], bool]  # whether a row has this format
    parse: Callable[[Row], Iterable[Parsed]]  # the items of a row; raises InvalidRow
    lines: bool = False  # whether rows are lines of text, read as {"text": line}


def iter_rows(
    path: Path,
    formats: Mapping[str, Format[Parsed]],
    *,
    format: str = "auto",
    on_invalid: str = "error",
    columns: Mapping[str, str] | None = None,
    sheet: str | None = None,
    report: LoadReport | None = None,
    finish: Callable[[Parsed], Parsed] | None = None,
) -> Iterator[tuple[str, Parsed]]:
    """The items of each usable row, each with the row's place ("file:line"). Fills `report`.

    `finish` changes an item; it raises InvalidRow if the row cannot be used then.

    Raises DataError if the file cannot be read, has no known format, or, after the last row, has rows that cannot be
    used.
    """
    report = LoadReport() if report is None else report
    if on_invalid not in ("error", "skip"):
        raise ValueError(f"on_invalid must be error or skip, got {on_invalid!r}")
    _check_names(path, formats, format, columns or {})
    lines = format in formats and formats[format].lines
    rows = read_lines(path) if lines else open_rows(path, columns, sheet)
    if format == "auto":
        format, rows = _detect(path, rows, formats)
    report.format = format
    errors: list[str] = []
    watched = _watched(rows, formats[format], report)
    for place, parsed in parse_rows(watched, formats[format], finish, columns=columns):
        report.rows += 1
        if isinstance(parsed, InvalidRow):
            report.drop(parsed.reason, place)
            if len(errors) < _SHOWN:
                errors.append(f"{place}: {parsed}")
            continue
        report.kept += 1
        for item in parsed:
            yield place, item
    invalid_rows = report.rows - report.kept
    if invalid_rows and (on_invalid == "error" or not report.kept):
        raise _invalid_rows(path, report, errors, on_invalid)


def _watched(rows: Iterable[tuple[str, Any]], form: Format[Parsed], report: LoadReport) -> Iterator[tuple[str, Any]]:
    """The rows; `report` gets the names of the columns, and of the keys of messages, that nothing reads."""
    seen: set[tuple[str, ...]] = set()
    lists = [name for name in form.columns if name in _OF_MESSAGES]
    for place, row in rows:
        if isinstance(row, dict):
            if (names := tuple(row)) not in seen and len(seen) < _WATCHED:
                seen.add(names)
                report.unused = list(dict.fromkeys(report.unused + unused_columns(row, form.columns)))[:_UNUSED]
            for name in lists:
                value = row.get(name)
                if isinstance(value, list) and has_more_keys(value) and (keys := unused_keys(value, name)):
                    report.unused = list(dict.fromkeys(report.unused + keys))[:_UNUSED]
        yield place, row


def open_rows(
    path: Path, columns: Mapping[str, str] | None = None, sheet: str | None = None
) -> Iterator[tuple[str, Any]]:
    """The rows of a file of any kind, with their places; `columns` renames columns. Raises DataError."""
    if is_workbook(path):
        rows = read_excel(path, sheet)
    elif sheet is not None:
        raise DataError(f"{path} is no Excel workbook, so it has no sheet {sheet!r}; leave out `sheet`")
    else:
        rows = _READERS.get(inner_suffix(path), read_rows)(path)
    return _renamed_rows(path, rows, columns) if columns else rows


def parse_rows(
    rows: Iterable[tuple[str, Any]],
    form: Format[Parsed],
    finish: Callable[[Parsed], Parsed] | None = None,
    *,
    columns: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, list[Parsed] | InvalidRow]]:
    """The place and the items of each row, or why it cannot be used. `columns` are those that `open_rows` renamed."""
    keys = row_keys(form.columns, tuple(columns or ()))
    for place, row in rows:
        try:
            items = list(form.parse(_as_row(row, keys)))
            if not keys.watched.isdisjoint(row):
                items = [_completed(item, row) for item in items]
            yield place, items if finish is None else [finish(item) for item in items]
        except InvalidRow as invalid:
            yield place, invalid


def _invalid_rows(path: Path, report: LoadReport, errors: Sequence[str], on_invalid: str) -> DataError:
    count = report.rows - report.kept
    more = [f"… and {count - len(errors)} more"] if count > len(errors) else []
    remedy = "no row is left" if on_invalid == "skip" else "correct them, or drop them with data.on_invalid=skip"
    lines = "\n  ".join([*errors, *more])
    return DataError(f"{path}: {count} of {report.rows} rows cannot be used ({remedy}):\n  {lines}")


def _check_names(path: Path, formats: Mapping[str, Format[Parsed]], format: str, columns: Mapping[str, str]) -> None:
    if format != "auto" and format not in formats:
        raise DataError(
            f"unknown data format {format!r}{_nearest(format, formats)}; choose auto or one of {', '.join(formats)}"
        )
    our_names = {name for form in formats.values() for name in form.columns}
    for name in columns:
        if name not in our_names:
            raise DataError(
                f"columns of {path}: no format has a column {name!r}{_nearest(name, our_names)}; write the name in "
                "this program first, then the name in the file, e.g. instruction: question. The names in this "
                f"program are {', '.join(sorted(our_names))}"
            )


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _renamed_rows(
    path: Path, rows: Iterator[tuple[str, Any]], columns: Mapping[str, str]
) -> Iterator[tuple[str, Any]]:
    """The rows with renamed columns. Raises DataError after the last row if none has an optional column."""
    absent = {theirs for ours, theirs in columns.items() if ours in _OPTIONAL}
    names: list[str] = []
    for place, row in rows:
        if isinstance(row, dict):
            absent.difference_update(row)
            names = list(row)
        yield place, _rename(row, columns)
    if absent:
        raise DataError(
            f"{path}: no row has a column {min(absent)!r} (columns: {', '.join(names)}); correct `columns`"
        )


def _rename(row: Any, columns: Mapping[str, str]) -> Any:
    if not isinstance(row, dict):
        return row
    missing = [theirs for ours, theirs in columns.items() if theirs not in row and ours not in _OPTIONAL]
    if missing:
        return InvalidRow("missing field", f"no column {missing[0]!r} (columns: {', '.join(row)})")
    renamed = {name: value for name, value in row.items() if name not in columns.values()}
    return {**renamed, **{ours: row[theirs] for ours, theirs in columns.items() if theirs in row}}


def _detect(
    path: Path, rows: Iterator[tuple[str, Any]], formats: Mapping[str, Format[Parsed]]
) -> tuple[str, Iterator[tuple[str, Any]]]:
    """The format of the first row that fits one, and all rows, also those that were read to recognise it."""
    seen: list[tuple[str, Any]] = []
    for place, row in rows:
        seen.append((place, row))
        if isinstance(row, dict):
            for name, form in formats.items():
                if form.fits(row):
                    return name, chain(seen, rows)
        if len(seen) == _LOOK_AHEAD:
            break
    first = next((row for _, row in seen if isinstance(row, dict)), None)
    if first is None:
        got = str(seen[0][1]) if isinstance(seen[0][1], InvalidRow) else f"a {_kind(seen[0][1])}"
        raise DataError(f"{seen[0][0]}: a row must be an object with named columns, got {got}")
    expected = "; ".join(f"{name}: {', '.join(form.columns)}" for name, form in formats.items())
    raise DataError(
        f"{path}: no known format has the columns {', '.join(first) or '(none)'}. Known formats and their columns: "
        f"{expected}. Write in the recipe which columns these are, the name in this program first: "
        f"{_entry(path, list(first), formats)}"
    )


def _entry(path: Path, theirs: Sequence[str], formats: Mapping[str, Format[Parsed]]) -> str:
    """A recipe's entry of a file, with the file's first columns as an example of `columns`."""
    pairs = any("chosen" in form.columns for form in formats.values())
    ours = ("prompt", "chosen", "rejected") if pairs else ("instruction", "output")
    columns = dict(zip_longest(ours, theirs[: len(ours)], fillvalue="..."))
    entry = {"path": str(path), "columns": columns}
    return yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1 << 16).strip()


def _completed(item: Parsed, row: Row) -> Parsed:
    """What a format has read, with the tools of the row, and its reasoning before the last reply."""
    tools, reasoning = described_tools(row), _reasoning_of(row, "the row")
    if isinstance(item, Document):
        if tools or reasoning:
            reason = "tool message" if tools else "separate reasoning"
            raise InvalidRow(reason, "the row has tools or reasoning beside a raw text")
        return item
    completed: Any = with_tools(item, tools) if tools else item
    return _with_reasoning(completed, reasoning) if reasoning else completed


def _with_reasoning(parsed: Any, reasoning: str) -> Any:
    """Messages with this reasoning before the last reply. Raises InvalidRow for a pair, or for another one there."""
    last = parsed[-1]
    if not isinstance(parsed[0], Message):
        raise InvalidRow("separate reasoning", f"the row has reasoning apart from its answers; {REASONING_WAY}")
    if last.reasoning not in ("", reasoning):
        raise InvalidRow("two reasonings", "the row's reasoning is not that of its last reply")
    return (*parsed[:-1], replace(last, reasoning=reasoning))


def _as_row(row: Any, keys: RowKeys) -> Row:
    if isinstance(row, InvalidRow):
        raise row
    if not isinstance(row, dict):
        raise InvalidRow("wrong type", f"a row must be an object, got a {_kind(row)}")
    if not keys.watched.isdisjoint(row):
        keys.check(row)
    return row


def text_of(row: Row, name: str, *, optional: bool = False) -> str:
    """The text in column `name`; "" if the column is optional and missing or null. Raises InvalidRow."""
    value = row.get(name)
    if value is None:
        if optional:
            return ""
        problem = "is null" if name in row else f"is missing (columns: {', '.join(row) or 'none'})"
        raise InvalidRow("missing field", f"'{name}' {problem}")
    return _as_text(value, f"'{name}'")


def _as_text(value: Any, label: str) -> str:
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        value = "".join(_as_text(_part_text(part, label), label) for part in value)
    if not isinstance(value, str):
        raise InvalidRow("wrong type", f"{label} must be text, got a {_kind(value)}")
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
        raise InvalidRow("wrong type", f"{label} must be an object with role and content, got a {_kind(value)}")
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
        return Message("assistant", "", trained, _reasoning_of(value, label), calls)
    if value.get(keys[1]) is None:
        raise InvalidRow("missing field", f"{label}: '{keys[1]}' is missing or null")
    said = value[keys[1]]
    if isinstance(said, list) and all(isinstance(part, str) for part in said):
        said = "".join(said)
    reasoning = _reasoning_of(value, label)
    if reasoning and ROLES[role.lower()] != "assistant":
        raise InvalidRow("separate reasoning", f"{label}: only a reply can have reasoning, got it in {role}")
    return Message(ROLES[role.lower()], _as_text(said, f"{label}: '{keys[1]}'"), trained, reasoning, calls)


def _reasoning_of(values: Mapping[str, Any], label: str) -> str:
    return _as_text(reasoning_in(values, label), f"{label}: reasoning")


def _tool_message(value: Row, role: Any, key: str, label: str) -> Message:
    """A call or a result that is a turn of its own."""
    if role not in (*CALL_ROLES, *RESULT_ROLES):
        raise InvalidRow("unknown role", f"{label}: unknown role {role!r}; user, assistant or system is expected")
    trained = is_trained(value, label)
    reasoning = _reasoning_of(value, label)
    if key not in value:
        raise InvalidRow("missing field", f"{label}: '{key}' is missing or null")
    if role in CALL_ROLES:
        return replace(call_message(value[key], trained, f"{label}: '{key}'"), reasoning=reasoning)
    if reasoning:
        raise InvalidRow("separate reasoning", f"{label}: only a reply can have reasoning, got it in {role}")
    content = _as_text(result_text(value[key]), f"{label}: '{key}'")
    name, call_id = (value[k] if isinstance(value.get(k), str) else "" for k in ("name", "tool_call_id"))
    return Message("tool", content, calls=result_of(name, call_id))


def messages_of(value: Any, label: str) -> list[Message]:
    """The messages of a list, without a blank system message. Raises InvalidRow, which names `label`."""
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
    """The messages of Alpaca's `history`: earlier turns as pairs of question and answer."""
    history = row.get("history") or []
    if not isinstance(history, list):
        raise InvalidRow("wrong type", f"'history' must be a list of pairs, got a {_kind(history)}")
    messages = []
    for i, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise InvalidRow("wrong type", f"'history'[{i}] must be a pair of question and answer")
        question, answer = (_as_text(text, f"'history'[{i}]") for text in pair)
        messages += [Message("user", question), Message("assistant", answer)]
    return messages


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


def _kind(value: Any) -> str:
    if isinstance(value, float) and value != value:
        return "number that is NaN, which JSON does not have; write null"
    kinds = {dict: "object", list: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    return kinds.get(type(value), "null" if value is None else type(value).__name__)


def _kind_or_empty(value: Any) -> str:
    return "an empty list" if value == [] else f"a {_kind(value)}"
