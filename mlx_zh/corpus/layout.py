"""Where the replies stand in a rendered conversation.

For each sequence of roles the template is rendered once with a placeholder character as each message's content. The
text between the placeholders are the template's literals. A real conversation is then the literals joined by the
contents, which the template may have stripped. Every time this join is compared with the real rendering. Where they
differ, the template rewrites contents; then `find_replies` locates the replies by rendering them with a mark at their
ends.

Where a reply begins is known from rendering the messages before it. Doing this for every reply would take time that
grows with the square of their number. So it is done for the first replies, for the last one, at distances that grow
fourfold, and wherever the text around a reply is not that of a reply known already.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from mlx_zh.corpus.chat_template import ChatTemplate, listed
from mlx_zh.corpus.conversation import Message
from mlx_zh.errors import RefusedByTemplate, TemplateError

# Placeholders: a character of private-use plane 15 for each message, after one of plane 16 from message 65,534 on.
_PLANE = 0xFFFE
_LOW, _HIGH = 0xF0000, 0x100000
_MARK = re.compile(f"[{chr(_HIGH)}-{chr(_HIGH + _PLANE - 1)}]?[{chr(_LOW)}-{chr(_LOW + _PLANE - 1)}]")
_DIGITS = re.compile(r"\d+")
_CHECKED = 16  # first replies whose beginning is found by rendering the messages before them
_REPEATED = 64  # replies up to which each is looked for by itself if they cannot be found together
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


def _placeholder(number: int) -> str:
    high, low = divmod(number, _PLANE)
    return (chr(_HIGH + high) if high else "") + chr(_LOW + low)


def _numbers(text: str) -> list[int]:
    """The numbers of the placeholders in a text, in their order."""
    return [
        ord(mark[-1]) - _LOW + (_PLANE * (ord(mark[0]) - _HIGH) if len(mark) > 1 else 0)
        for mark in _MARK.findall(text)
    ]


def is_checked(number: int, count: int | None = None) -> bool:
    """Whether the messages before reply `number`, of `count` if known, are rendered in any case."""
    power_of_four = number & (number - 1) == 0 and number.bit_length() % 2 == 1
    return number < _CHECKED or power_of_four or number + 1 == count


def find_layout(
    template: ChatTemplate, roles: Sequence[str], added: re.Pattern[str], *, add_generation_prompt: bool
) -> Layout | None:
    """The layout of these roles, or None if the template does more than write the contents one after the other.

    Raises TemplateError if the template leaves out a message or ends a reply without a token that `added` matches.
    """
    messages = [Message(role, _placeholder(i)) for i, role in enumerate(roles)]
    text = template.render(messages, add_generation_prompt=add_generation_prompt)
    order = tuple(_numbers(text))
    shown = set(order)
    for i, role in enumerate(roles):
        if i not in shown:
            raise RefusedByTemplate(
                f"the chat template leaves out the {role} message (roles: {listed(roles)}); set a "
                "template that shows it, or put its text into another message"
            )
    if len(order) != len(roles):
        return None
    literals = tuple(_MARK.split(text))
    spaced = template.render(
        [Message(m.role, _SPACE + m.content + _SPACE) for m in messages], add_generation_prompt=add_generation_prompt
    )
    strips = _find_strips(literals, order, spaced)
    if strips is None:
        return None

    def prefix(count: int, ask: bool) -> str:
        if count == len(messages) and ask == add_generation_prompt:
            return text
        return template.render(messages[:count], add_generation_prompt=ask)

    replies = _find_layout_replies(prefix, messages, literals, order, added)
    return None if replies is None else Layout(literals, order, strips, tuple(replies))


def _find_layout_replies(
    prefix: Callable[[int, bool], str],
    messages: Sequence[Message],
    literals: Sequence[str],
    order: Sequence[int],
    added: re.Pattern[str],
) -> list[Reply] | None:
    """Where each reply begins and ends; None if this cannot be told, or not in time that is linear in the messages.

    `prefix` renders the first so many messages, with a generation prompt if asked for.
    Raises TemplateError if no end-of-turn token follows a reply.
    """
    slots = {message: slot for slot, message in enumerate(order)}
    numbers = [k for k, message in enumerate(messages) if message.role == "assistant"]
    known: dict[tuple[str, str, str], tuple[str, str]] = {}  # surroundings -> literal after `opens`, before `closes`
    allowance = 16 * len(messages) + 4 * _CHECKED**2
    replies = []
    for number, k in enumerate(numbers):
        slot = slots[k]
        before, after = literals[slot], literals[slot + 1]
        role = messages[order[slot - 1]].role if slot else ""
        surroundings = (role, _DIGITS.sub("0", before), _DIGITS.sub("0", after))
        rest, head = known.get(surroundings, ("", ""))
        if head and before.endswith(rest) and after.startswith(head) and not is_checked(number, len(numbers)):
            replies.append(Reply(slot, len(before) - len(rest), len(head)))
            continue
        allowance -= k
        reply = _find_reply(prefix, messages, k, slot, literals, order, added) if allowance > 0 else None
        if reply is None:
            return None
        known[surroundings] = (before[reply.opens :], after[: reply.closes])
        replies.append(reply)
    return replies


def _find_strips(literals: Sequence[str], order: Sequence[int], spaced: str) -> tuple[tuple[bool, bool], ...] | None:
    """For each gap, whether white space is stripped on the left and on the right; None if this cannot be told.

    `spaced` is a rendering of contents with white space on both sides.
    """
    if _numbers(spaced) != list(order):
        return None
    gaps = _MARK.split(spaced)
    last = len(order)
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
    prefix: Callable[[int, bool], str],
    messages: Sequence[Message],
    k: int,
    slot: int,
    literals: Sequence[str],
    order: Sequence[int],
    added: re.Pattern[str],
) -> Reply | None:
    """The reply `k`, from the end of its generation prompt to its end-of-turn token; None if this cannot be told.

    Raises TemplateError if no end-of-turn token follows the reply.
    """
    if k == 0 or slot == 0:
        return None
    before, mark = messages[order[slot - 1]].content, messages[k].content
    prompt = prefix(k, True)
    _, separator, header = prompt.rpartition(before)
    if not separator or _MARK.search(header) or not literals[slot].startswith(header):
        return None
    answered = prefix(k + 1, False)
    tail = answered.rpartition(mark)[2]
    end = end_of_turn_in(tail, added)
    if not literals[slot + 1].startswith(tail[:end]):
        return None
    return Reply(slot, len(header), end)


def end_of_turn_in(tail: str, added: re.Pattern[str]) -> int:
    """Where the end-of-turn token ends in the text after a reply. Raises TemplateError if there is none."""
    end = added.search(tail)
    if end is None:
        raise TemplateError(
            f"the chat template writes {tail!r} after a reply, and this has no end-of-turn token of this tokenizer; "
            "a model trained on it would never stop. Add the token to the tokenizer, or set a template that ends "
            "replies with the tokenizer's eos_token"
        )
    return end.end()


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
    replies = [k for k, message in enumerate(messages) if message.role == "assistant"]
    allowance = 16 * len(messages) + 4 * _REPEATED**2  # messages that may be rendered to find beginnings
    spans, cursor, header = [], 0, ""
    ends = _content_ends(render, messages, replies, text)
    for number, (k, content_end) in enumerate(zip(replies, ends, strict=True)):
        start = None
        if content_end is not None and header and not is_checked(number, len(replies)):
            start = _after_header(text, header, cursor, content_end)
        if content_end is not None and start is None and allowance > 0:
            allowance -= k
            start, header = _reply_start(template, messages[:k], text, cursor, content_end, header)
        end = None if start is None or content_end is None else added.search(text, content_end)
        if start is None or end is None or end.group() != end_of_turn:
            where = f"{source}: " if source else ""
            raise RefusedByTemplate(
                f"{where}cannot tell where the chat template puts message {k + 1} (assistant), because the template "
                "rewrites earlier messages. Train on this data with a template that keeps messages as they are"
            )
        cursor = end.end()
        spans.append((start, cursor))
    return spans


Render = Callable[[Sequence[Message]], str]


def _content_ends(
    render: Render, messages: Sequence[Message], replies: Sequence[int], text: str
) -> Sequence[int | None]:
    """Where each reply's content ends in `text`; None where this is not certain."""
    ends = _ends_together(render, messages, replies, text)
    if ends is not None:
        return ends
    if len(replies) > _REPEATED:
        return [None] * len(replies)
    return [_content_end(render, messages, k, text) for k in replies]


def _ends_together(
    render: Render, messages: Sequence[Message], replies: Sequence[int], text: str
) -> list[int] | None:
    """Where the replies end in `text`: where the marks that are put at their ends appear. None if not all do so.

    White space before a mark is not stripped, so where the template strips it, the mark is put before it.
    """
    if _MARK.search(text):
        return None
    contents = [messages[k].content for k in replies]
    parts = _marked(render, messages, replies, contents)
    if parts is None:
        return None
    cursor = 0
    for number, part in enumerate(parts[:-1]):
        strip = next((s for s in _ENDINGS if text.startswith(s(part), cursor)), None)
        if strip is None:
            return None
        contents[number] = strip(contents[number])
        cursor += len(strip(part))
    parts = _marked(render, messages, replies, contents)
    if parts is None or "".join(parts) != text:
        return None
    return list(accumulate(map(len, parts[:-1])))


_ENDINGS: tuple[Callable[[str], str], ...] = (str, lambda text: text.rstrip("\n"), str.rstrip)


def _marked(
    render: Render, messages: Sequence[Message], replies: Sequence[int], contents: Sequence[str]
) -> list[str] | None:
    """The text around the marks if each of these contents of the replies gets one at its end; None if one is lost."""
    marked = list(messages)
    for number, (k, content) in enumerate(zip(replies, contents, strict=True)):
        marked[k] = replace(messages[k], content=content + _placeholder(number))
    rendered = render(marked)
    return _MARK.split(rendered) if _numbers(rendered) == list(range(len(replies))) else None


def _content_end(render: Render, messages: Sequence[Message], k: int, text: str) -> int | None:
    """Where message `k` ends in `text`: where a mark that is put at its end appears. None if this is not unique."""
    mark = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)
    content = messages[k].content
    for ending in dict.fromkeys(strip(content) for strip in _ENDINGS):
        marked = [*messages[:k], replace(messages[k], content=ending + mark), *messages[k + 1 :]]
        parts = render(marked).split(mark)
        if len(parts) == 2 and "".join(parts) == text:
            return len(parts[0])
    return None


def _reply_start(
    template: ChatTemplate, prompt: Sequence[Message], text: str, cursor: int, content_end: int, known: str
) -> tuple[int | None, str]:
    """Where the generation prompt of a reply ends in `text`, None if this is not certain; and its last line's header.

    The header is what a generation prompt adds to the prompt's text; "" if it changes the text. `known` is that of
    an earlier reply.
    """
    with_header = template.render(prompt, add_generation_prompt=True)
    if known and with_header.endswith(known) and text.startswith(with_header):
        return len(with_header), known
    header = with_header.removeprefix(template.render(prompt))
    header = "" if header == with_header else header
    if text.startswith(with_header):
        return len(with_header), header
    return (_after_header(text, header, cursor, content_end) if header else None), header


def _after_header(text: str, header: str, cursor: int, content_end: int) -> int | None:
    """Where a header ends that stands once in this part of the text; None if it is not there once."""
    if text.count(header, cursor, content_end) != 1:
        return None
    return text.index(header, cursor, content_end) + len(header)
