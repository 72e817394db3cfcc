"""Local files to conversations and raw text: the formats in which Chinese data is published.

    alpaca           instruction, input?, output, system?, history? = [[question, answer], …]. BELLE's dialogues
                     have one as instruction: Human:…\nAssistant:…\nHuman:…\nAssistant:
    dolly            instruction, context? (or input), response, system?, history?
    sharegpt         conversations = [{from: human|gpt|system, value}, …], system?
    messages         messages = [{role, content}, …], system?            (OpenAI)
    belle-seed       instruction, instances = [{input, output}, …]       one conversation for each instance
    kto              prompt, completion, label: true | false (TRL); only answers with true are learned
    prompt-response  prompt, response (or completion), system?, history?; as texts or as messages (TRL)
    query-response   query, response, system?, history?                  (ms-swift)
    rounds           conversation = [{human, assistant}, …] (Firefly), [{system?, input, output}, …] (XTuner), or
                     [{role, content}, …]
    alternating      data = [question, answer, …]                        (UltraChat)
    xlam             query, answers = calls, tools                            (also as JSON text)
    glaive           system, chat = USER: … ASSISTANT: … FUNCTION RESPONSE: …
    moss             meta_instruction?, chat = {turn_1: {Human, MOSS}, …}
    text             text; also .txt and .md files, each of which is a document        raw text, no conversation
    feedback         what was said of a model's answers in the chat (see `corpus.feedback`); good ones are learned
    mathglm          lines of text, expression=step=…=answer             only when named, never recognised

A format is recognised by its columns; "?" marks an optional one. `columns` maps our column names to the file's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from mlx_zh.corpus import dialogues, feedback, function_calls
from mlx_zh.corpus.conversation import Conversation, Document, Message
from mlx_zh.corpus.documents import documents_of
from mlx_zh.corpus.key_names import number_of, says_no
from mlx_zh.corpus.reader import InvalidRow
from mlx_zh.corpus.row_messages import (
    Change,
    Row,
    changed,
    check_document,
    check_turns,
    history_of,
    instruction_of,
    is_blank,
    listed,
    messages_of,
    system_of,
    text_of,
    with_system,
)
from mlx_zh.corpus.rows import Format, LoadReport, Reading, iter_rows

Messages = tuple[Message, ...]
Parsed = Messages | Document
# Columns beside `text` that make a row something else than raw text: an exercise, a class, an article to ask about.
_NOT_RAW = frozenset(
    (
        *("title", "label", "labels", "answer", "output", "response", "completion", "question", "summary"),
        *("role", "parent_id", "query", "target"),
    )
)


def load_conversations(path: Path, **reading: Unpack[Reading]) -> tuple[list[Conversation | Document], LoadReport]:
    """All conversations and documents of a file, and a report on its rows.

    Raises DataError if the file cannot be read, or once for all rows that cannot be used. With on_invalid="skip" such
    rows are dropped and counted instead, and it is an error only if no row is left.
    """
    report = LoadReport()
    return list(iter_conversations(path, report, **reading)), report


def iter_conversations(
    path: Path, report: LoadReport | None = None, *, change: Change | None = None, **reading: Unpack[Reading]
) -> Iterator[Conversation | Document]:
    """Like `load_conversations`, one at a time. Fills `report`; an error about rows is raised after the last row.

    `change` is applied to every text before the rows are checked.
    """

    def finish(parsed: Parsed) -> Parsed:
        if change is None:
            return parsed
        if isinstance(parsed, Document):
            return check_document(replace(parsed, text=change(parsed.text)))
        return check_turns(changed(parsed, change), last="assistant")

    for place, parsed in iter_rows(path, FORMATS, report=report, finish=finish, **reading):
        yield replace(parsed, source=place) if isinstance(parsed, Document) else Conversation(parsed, place)


def _alpaca(row: Row) -> Iterator[Messages]:
    reply = Message("assistant", text_of(row, "output"))
    question = instruction_of(row)
    asked = dialogues.transcript(question.content) or [question]
    yield check_turns([*system_of(row), *history_of(row), *asked, reply], last="assistant")


def _dolly(row: Row) -> Iterator[Messages]:
    about = [name for name in ("input", "context") if not is_blank(text_of(row, name, optional=True))]
    if len(about) > 1:
        raise InvalidRow("wrong type", "the row has an 'input' and a 'context'; keep one of them")
    question = instruction_of({**row, "input": row[about[0]] if about else None})
    reply = Message("assistant", text_of(row, "response"))
    yield check_turns([*system_of(row), *history_of(row), question, reply], last="assistant")


def _sharegpt(row: Row) -> Iterator[Messages]:
    if dialogues.are_rounds(listed(row.get("conversations"))):
        return dialogues.rounds(row, "conversations")
    messages = messages_of(row.get("conversations"), "'conversations'")
    return iter([check_turns(with_system(row, messages), last="assistant")])


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
    turns = [*history_of(row), *_said(row, "prompt", "user"), *_said(row, name, "assistant")]
    yield check_turns(with_system(row, turns), last="assistant")


def _said(row: Row, name: str, role: str) -> list[Message]:
    """The messages in column `name`, or its text as a message of `role`. Replies in a prompt are context only."""
    value = row.get(name)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not any(isinstance(part, dict) and _ROLE_KEYS & part.keys() for part in value):
        return [Message(role, text_of(row, name))]
    messages = messages_of(value, f"'{name}'")
    return messages if role == "assistant" else [replace(m, trained=m.role != "assistant") for m in messages]


_ROLE_KEYS = {"role", "from"}


def _kto(row: Row) -> Iterator[Messages]:
    label = row.get("label")
    if not _is_label(label):
        raise InvalidRow("wrong type", f"'label' must be true or false, got {label!r}")
    if says_no(label):
        raise InvalidRow("answer not to imitate", f"'label' is {label!r}, so this answer is not to be learned")
    return _prompt_response(row)


def _is_label(value: object) -> bool:
    """Whether a label says if an answer is good; other numbers are classes."""
    return str(value).strip().lower() in ("true", "false") or value is True or number_of(value) in (0, 1)


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


def _is_raw(row: Row) -> bool:
    return isinstance(row.get("text"), str) and _NOT_RAW.isdisjoint(row)


def _text(row: Row) -> Iterator[Document]:
    for document in documents_of(row, text_of(row, "text")):
        yield check_document(document)


# In the order of recognition: the first format that fits a row is used.
FORMATS: dict[str, Format[Parsed]] = {
    "feedback": Format(feedback.COLUMNS, feedback.is_feedback, feedback.conversations, settle=feedback.settled),
    "messages": Format(("messages", "system", "tools"), lambda row: "messages" in row, _messages),
    "sharegpt": Format(
        ("conversations", "system", "kto_tag", "tools"), lambda row: "conversations" in row, _sharegpt
    ),
    "belle-seed": Format(
        ("instruction", "instances"), lambda row: {"instruction", "instances"} <= row.keys(), _belle_seed
    ),
    "dolly": Format(
        ("instruction", "context", "input", "response", "system", "history", "tools"),
        lambda row: {"instruction", "response"} <= row.keys() and "output" not in row,
        _dolly,
    ),
    "alpaca": Format(
        ("instruction", "input", "output", "system", "history", "kto_tag", "tools"),
        lambda row: "instruction" in row,
        _alpaca,
    ),
    "kto": Format(
        ("prompt", "completion", "label", "system", "history", "tools"),
        lambda row: {"prompt", "completion"} <= row.keys() and _is_label(row.get("label")),
        _kto,
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
    "xlam": Format(
        ("query", "answers", "tools", "system"),
        lambda row: {"query", "answers", "tools"} <= row.keys(),
        function_calls.xlam,
    ),
    "glaive": Format(("system", "chat"), function_calls.is_glaive, function_calls.glaive),
    "rounds": Format(
        ("conversation", "system", "tools"), lambda row: isinstance(row.get("conversation"), list), dialogues.rounds
    ),
    "moss": Format(("meta_instruction", "chat"), lambda row: dialogues.is_moss(row.get("chat")), dialogues.moss),
    "alternating": Format(
        ("data", "system", "tools"),
        lambda row: bool(row.get("data")) and dialogues.is_texts(row["data"]),
        dialogues.alternating,
    ),
    "text": Format(("text",), _is_raw, _text),
    "mathglm": Format(("text",), lambda row: False, _mathglm, lines=True),
}
