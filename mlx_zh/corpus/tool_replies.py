"""Conversations with tools in a chat template: what the template knows of them, and where the replies stand.

A template that does not know tools often leaves them out without a word. So it is asked first: a description, a call
and a result with names that no template has are rendered, and their text is looked for.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mlx_zh.corpus.chat_template import ChatTemplate
from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.layout import is_checked
from mlx_zh.errors import RefusedTools, TemplateError
from mlx_zh.system.json_text import parse_json

_NAME, _KEY, _VALUE, _RESULT = "qzx_tool", "qzx_key", "qzx_value", "qzx_result"


@dataclass(frozen=True)
class ToolSupport:
    """What a chat template writes of tools."""

    descriptions: bool
    calls: bool
    results: bool
    text_arguments: bool  # whether it wants the arguments of calls as JSON text, and not as an object

    def check(self, messages: Sequence[Message], source: str) -> None:
        """Raise RefusedTools, with `source` in front, if the messages have what the template does not write."""
        for known, used, what in (
            (self.descriptions, messages[0].role == "tools", "the descriptions of tools"),
            (
                self.calls,
                any(message.calls and message.role == "assistant" for message in messages),
                "calls of tools",
            ),
            (self.results, any(message.role == "tool" for message in messages), "the results of tools"),
        ):
            if used and not known:
                raise _refused(source, f"the chat template does not write {what}, so this model cannot learn them")


def tool_support(template: ChatTemplate) -> ToolSupport:
    """What a template writes of tools."""
    user = Message("user", "?")
    schema = {"type": "object", "properties": {_KEY: {"type": "string", "description": _KEY}}, "required": [_KEY]}
    function = {"name": _NAME, "description": _NAME, "parameters": schema}
    tools = Message("tools", json.dumps([{"type": "function", "function": function}]))
    call = {"name": _NAME, "arguments": {_KEY: _VALUE}, "id": "qzxcall00"}
    asked = (tools, user, Message("assistant", "", calls=json.dumps([call])))
    result = Message("tool", _RESULT, calls=json.dumps({"name": _NAME, "id": call["id"]}))
    described = _NAME in _rendered(template, (tools, user), True)
    called = False
    for as_text in (False, True):
        text = _rendered(template.with_text_arguments(as_text), asked, False)
        written_by_python, quoted_twice = f"{{'{_KEY}'" in text, f'\\"{_VALUE}\\"' in text
        if _VALUE in text and not written_by_python and not quoted_twice:
            called = True
            break
    text_arguments = called and as_text
    answered = _RESULT in _rendered(template.with_text_arguments(text_arguments), (*asked, result), True)
    return ToolSupport(described, called, answered, text_arguments)


def _rendered(template: ChatTemplate, messages: Sequence[Message], ask: bool) -> str:
    try:
        return template.render(messages, add_generation_prompt=ask)
    except TemplateError:
        return ""


class _Kind(NamedTuple):
    """How a template writes a kind of reply."""

    header: str  # the generation prompt
    controls: tuple[str, ...]  # the control tokens of the reply, its end-of-turn token last


class ToolReplies:
    """Finds the replies in one rendered conversation with tools.

    A reply reaches from the end of its generation prompt to its end-of-turn token, which is the last control token
    that the template writes for it. No message spells a control token, so these can be counted.
    """

    def __init__(
        self, template: ChatTemplate, messages: Sequence[Message], text: str, control: re.Pattern[str], source: str
    ) -> None:
        self._template, self._messages, self._text = template, messages, text
        self._control, self._source = control, source
        self._kinds: dict[tuple[int, bool, str], _Kind] = {}

    def spans(self) -> list[tuple[int, int]]:
        """The start and end of each reply in the text, in characters. Raises RefusedTools."""
        spans, cursor = [], 0
        replies = [k for k, message in enumerate(self._messages) if message.role == "assistant"]
        for number, k in enumerate(replies):
            kind = None if is_checked(number, len(replies)) else self._kinds.get(self._kind_of(k))
            span = None if kind is None else self._written(cursor, kind)
            if span is not None and self._messages[k].content.strip() not in self._text[slice(*span)]:
                span = None
            start, cursor = span or self._rendered(k, cursor)
            spans.append((start, cursor))
        return spans

    def _kind_of(self, k: int) -> tuple[int, bool, str]:
        message = self._messages[k]
        calls = len(parse_json(message.calls)) if message.calls else 0
        return calls, bool(message.content.strip()), self._messages[k - 1].role

    def _written(self, cursor: int, kind: _Kind) -> tuple[int, int] | None:
        """A reply after `cursor` that is written as an earlier one of its kind; None if it is not."""
        if not self._control.search(kind.header):
            return None
        start = self._text.find(kind.header, cursor)
        return None if start < 0 else self._until(start + len(kind.header), kind)

    def _until(self, start: int, kind: _Kind) -> tuple[int, int] | None:
        """The span from `start` to the end-of-turn token; None if other control tokens stand there."""
        end = start
        for token in kind.controls:
            match = self._control.search(self._text, end)
            if match is None or match.group() != token:
                return None
            end = match.end()
        return start, end

    def _rendered(self, k: int, cursor: int) -> tuple[int, int]:
        """The reply `k`, found by rendering the messages before it, and those up to it."""
        prompt = self._render(self._messages[:k], True)
        answered = self._render(self._messages[: k + 1], False)
        reply = answered.removeprefix(prompt)
        controls = list(self._control.finditer(reply))
        if len(reply) == len(answered) or not controls or reply[controls[-1].end() :].strip():
            raise self._uncertain(k)
        check_calls(self._messages[k], k, reply, self._source)
        header = prompt.removeprefix(self._render(self._messages[:k], False))
        kind = _Kind(header, tuple(match.group() for match in controls))
        if self._text.startswith(prompt):
            span = self._until(len(prompt), kind)
        else:
            span = self._written(cursor, kind) if len(header) < len(prompt) else None
        # A template may leave a thought out of an earlier reply; anything else would be another reply's text.
        if span is None or not reply[: controls[-1].end()].endswith(self._text[slice(*span)]):
            raise self._uncertain(k)
        self._kinds[self._kind_of(k)] = kind
        return span

    def _render(self, messages: Sequence[Message], ask: bool) -> str:
        return self._template.render(messages, add_generation_prompt=ask, source=self._source)

    def _uncertain(self, k: int) -> RefusedTools:
        return _refused(
            self._source,
            f"cannot tell where the chat template begins or ends message {k + 1} (assistant) of a conversation with "
            "tools",
        )


def check_calls(message: Message, k: int, written: str, source: str) -> None:
    """Raise RefusedTools if the template has left out one of the calls of message `k`."""
    calls = parse_json(message.calls) if message.calls else []
    for name, count in Counter(call["name"] for call in calls).items():
        if max(written.count(name), written.count(json.dumps(name)[1:-1])) < count:
            raise _refused(source, f"the chat template leaves out a call of {name!r} in message {k + 1}")


def _refused(source: str, why: str) -> RefusedTools:
    return RefusedTools(f"{source}: {why}" if source else why)
