"""Where the replies stand in a rendered conversation.

For each sequence of roles the template is rendered once with a placeholder character as each message's content. The
text between the placeholders are the template's literals. A real conversation is then the literals joined by the
contents, which the template may have stripped. Every time this join is compared with the real rendering. Where they
differ, the template rewrites contents; then `find_replies` locates each reply by rendering it with a mark at its end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_zh.corpus.chat_template import ChatTemplate
from mlx_zh.corpus.conversation import Message
from mlx_zh.errors import TemplateError

_PLACEHOLDER = 0xF0000  # the first code point of a private-use plane: one character per message
_SPACE = "\t\v\t"  # white space that no template writes itself
_STRIPS: dict[tuple[bool, bool], Callable[[str], str]] = {
    (False, False): str,
    (True, False): str.lstrip,
    (False, True): str.rstrip,
    (True, True): str.strip,
}


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply in a layout: the gap of its content, and offsets into the literals before and after that gap."""

    slot: int
    opens: int  # where the generation prompt ends, in literals[slot]
    closes: int  # where the end-of-turn token ends, in literals[slot + 1]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a template renders one sequence of roles: G + 1 literals with a content in each of the G gaps."""

    literals: tuple[str, ...]  # G + 1
    order: tuple[int, ...]  # G: index of the message whose content fills the gap
    strips: tuple[tuple[bool, bool], ...]  # G: whether white space is stripped on the left and on the right
    replies: tuple[Reply, ...]  # in the order of the messages

    def fill(self, messages: Sequence[Message]) -> list[str]:
        """The contents, stripped as this template does, in the order of the gaps."""
        return [_STRIPS[strip](messages[i].content) for i, strip in zip(self.order, self.strips, strict=True)]

    def join(self, contents: Sequence[str]) -> str:
        """The rendered text with these contents in the gaps."""
        parts = [self.literals[0]]
        for content, literal in zip(contents, self.literals[1:], strict=True):
            parts += (content, literal)
        return "".join(parts)

    def spans(self, contents: Sequence[str]) -> list[tuple[int, int]]:
        """The start and end of each reply in the text, in characters; the end-of-turn token is included."""
        ends = [0]  # where the content of each gap ends
        for literal, content in zip(self.literals, contents, strict=False):
            ends.append(ends[-1] + len(literal) + len(content))
        return [(ends[r.slot] + r.opens, ends[r.slot + 1] + r.closes) for r in self.replies]


def find_layout(
    template: ChatTemplate, roles: Sequence[str], added: re.Pattern[str], *, add_generation_prompt: bool
) -> Layout | None:
    """The layout of these roles, or None if the template does more than write the contents one after the other.

    Raises TemplateError if the template leaves out a message or ends a reply without a token that `added` matches.
    """
    placeholders = [chr(_PLACEHOLDER + i) for i in range(len(roles))]
    messages = [Message(role, mark) for role, mark in zip(roles, placeholders, strict=True)]
    text = template.render(messages, add_generation_prompt=add_generation_prompt)
    for message in messages:
        if message.content not in text:
            raise TemplateError(
                f"the chat template leaves out the {message.role} message (roles: {', '.join(roles)}); set a "
                "template that shows it, or put its text into another message"
            )
    if any(text.count(mark) != 1 for mark in placeholders):
        return None
    order = tuple(sorted(range(len(roles)), key=lambda i: text.index(placeholders[i])))
    literals = tuple(re.split(f"[{placeholders[0]}-{placeholders[-1]}]", text))
    spaced = template.render(
        [Message(m.role, _SPACE + m.content + _SPACE) for m in messages], add_generation_prompt=add_generation_prompt
    )
    strips = _find_strips(literals, [placeholders[i] for i in order], spaced)
    if strips is None:
        return None
    replies = []
    for k, role in enumerate(roles):
        if role == "assistant":
            reply = _find_reply(template, messages, k, literals, order, added)
            if reply is None:
                return None
            replies.append(reply)
    return Layout(literals, order, strips, tuple(replies))


def _find_strips(literals: Sequence[str], marks: Sequence[str], spaced: str) -> tuple[tuple[bool, bool], ...] | None:
    """For each gap, whether white space is stripped on the left and on the right; None if this cannot be told.

    `spaced` is a rendering of contents with white space on both sides.
    """
    gaps = re.split("|".join(marks), spaced)
    last = len(gaps) - 1
    if last != len(marks):
        return None
    strips_left, strips_right = [False] * last, [False] * last
    for i, (gap, literal) in enumerate(zip(gaps, literals, strict=True)):
        before = {_SPACE: False, "": True} if i > 0 else {"": True}
        after = {_SPACE: False, "": True} if i < last else {"": True}
        fits = [(b, a) for b in before for a in after if b + literal + a == gap]
        if len(fits) != 1:
            return None
        if i > 0:
            strips_right[i - 1] = before[fits[0][0]]
        if i < last:
            strips_left[i] = after[fits[0][1]]
    return tuple(zip(strips_left, strips_right, strict=True))


def _find_reply(
    template: ChatTemplate,
    messages: Sequence[Message],
    k: int,
    literals: Sequence[str],
    order: Sequence[int],
    added: re.Pattern[str],
) -> Reply | None:
    """The reply `k`, from the end of its generation prompt to its end-of-turn token; None if this cannot be told.

    Raises TemplateError if no end-of-turn token follows the reply.
    """
    slot = order.index(k)
    if k == 0 or slot == 0:
        return None
    before, mark = messages[order[slot - 1]].content, messages[k].content
    prompt = template.render(messages[:k], add_generation_prompt=True)
    _, separator, header = prompt.rpartition(before)
    if not separator or _has_placeholder(header, messages) or not literals[slot].startswith(header):
        return None
    answered = template.render(messages[: k + 1])
    tail = answered.rpartition(mark)[2]
    end = added.search(tail)
    if end is None:
        raise TemplateError(
            f"the chat template writes {tail!r} after a reply, and this has no end-of-turn token of this tokenizer; "
            "a model trained on it would never stop. Add the token to the tokenizer, or set a template that ends "
            "replies with the tokenizer's eos_token"
        )
    if not literals[slot + 1].startswith(tail[: end.end()]):
        return None
    return Reply(slot, len(header), end.end())


def _has_placeholder(text: str, messages: Sequence[Message]) -> bool:
    return any(message.content in text for message in messages)


def find_replies(
    template: ChatTemplate,
    render: Callable[[Sequence[Message]], str],
    messages: Sequence[Message],
    text: str,
    added: re.Pattern[str],
    end_of_turn: str,
    *,
    source: str,
) -> list[tuple[int, int]]:
    """Spans of the replies in `text`, in characters, for templates that rewrite contents (e.g. drop old reasoning).

    `render` is the function that made `text` from `messages`. Raises TemplateError, with `source` in front, if the
    position of a reply is not certain.
    """
    spans, cursor = [], 0
    for k, message in enumerate(messages):
        if message.role != "assistant":
            continue
        content_end = _content_end(render, messages, k, text)
        start = None if content_end is None else _reply_start(template, messages[:k], text, cursor, content_end)
        end = None if content_end is None else added.search(text, content_end)
        if start is None or end is None or end.group() != end_of_turn:
            where = f"{source}: " if source else ""
            raise TemplateError(
                f"{where}cannot tell where the chat template puts message {k + 1} (assistant), because the template "
                "rewrites earlier messages. Train on this data with a template that keeps messages as they are"
            )
        cursor = end.end()
        spans.append((start, cursor))
    return spans


def _content_end(
    render: Callable[[Sequence[Message]], str], messages: Sequence[Message], k: int, text: str
) -> int | None:
    """Where message `k` ends in `text`: where a mark that is put at its end appears. None if this is not unique."""
    mark = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)
    content = messages[k].content
    for ending in dict.fromkeys((content, content.rstrip("\n"), content.rstrip())):
        marked = [*messages[:k], Message(messages[k].role, ending + mark), *messages[k + 1 :]]
        parts = render(marked).split(mark)
        if len(parts) == 2 and "".join(parts) == text:
            return len(parts[0])
    return None


def _reply_start(
    template: ChatTemplate, prompt: Sequence[Message], text: str, cursor: int, content_end: int
) -> int | None:
    """Where the generation prompt of a reply ends in `text`; None if this is not certain."""
    with_header = template.render(prompt, add_generation_prompt=True)
    if text.startswith(with_header):
        return len(with_header)
    header = with_header.removeprefix(template.render(prompt))
    if not header or header == with_header or text.count(header, cursor, content_end) != 1:
        return None
    return text.index(header, cursor, content_end) + len(header)
