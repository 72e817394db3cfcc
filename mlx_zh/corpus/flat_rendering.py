"""Conversations whose text has the replies as the model writes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from mlx_zh.corpus.chat_template import ChatTemplate
from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.encoding import PieceEncoder, Tokens
from mlx_zh.corpus.layout import Layout, find_layout, find_replies
from mlx_zh.corpus.rendered import FIRST_EXCHANGE_OVERFLOW, NO_REPLY, OVERFLOW, Rendered, learned_of
from mlx_zh.corpus.reply_writer import ReplyWriter
from mlx_zh.corpus.text_cuts import Cut, edges_of, encode_cuts, parts_of, pieces_of
from mlx_zh.corpus.tool_replies import ToolReplies
from mlx_zh.corpus.tree_rendering import FIRST_REPLIES, Options, may_end_after, spelled_with_tools
from mlx_zh.errors import DataError, TemplateError

_CACHED_MESSAGES = 1 << 17  # of all layouts that are kept


@dataclass(frozen=True, slots=True)
class Flat:
    """The text of a conversation; `beyond` is as in `Tree`."""

    messages: Sequence[Message]
    cut: Cut
    writer: ReplyWriter
    beyond: bool


class FlatRenderer:
    """The texts of a renderer's conversations, and their tokens. `writer` is that of conversations without tools."""

    def __init__(self, encoder: PieceEncoder, writer: ReplyWriter) -> None:
        self._encoder, self._writer = encoder, writer
        self._layouts: dict[tuple[tuple[str, ...], bool], tuple[Layout, int] | None] = {}
        self._cached_messages = 0

    def limited(self, messages: Sequence[Message], source: str, writer: ReplyWriter, max_length: int | None) -> Flat:
        """The messages that can matter, rendered, and whether others were left out because max_length ends before.

        A long conversation is taken up to twice as many replies each time, until one more than fit are there. The
        last reply taken does not count: a template may write the last turn differently.
        """
        if max_length is not None:
            ends = [k + 1 for k, message in enumerate(messages) if message.role == "assistant"]
            count = FIRST_REPLIES
            while count < len(ends):
                taken = messages[: ends[count - 1]]
                cut = self.cut(taken, source, writer)
                [pieces] = encode_cuts(self._encoder, [cut])
                if sum(map(len, pieces[:-2])) > max_length:
                    return Flat(taken, cut, writer, beyond=True)
                count *= 2
        return Flat(messages, self.cut(messages, source, writer), writer, beyond=False)

    def fitting(self, row: Flat, pieces: list[Tokens], options: Options, dropped: Counter[str]) -> Rendered | None:
        """A conversation whose replies stand in its text as the model writes them."""
        train_on, max_length = options.train_on, options.max_length
        if not pieces:
            dropped[NO_REPLY] += 1
            return None
        if not row.beyond and (max_length is None or sum(map(len, pieces)) <= max_length):
            return learned_of(row.messages, pieces, train_on, dropped, truncated=False)
        if options.truncate and max_length is not None:
            return self._truncated(row, pieces, train_on, max_length, dropped)
        dropped[OVERFLOW] += 1
        return None

    def _truncated(
        self, row: Flat, pieces: list[Tokens], train_on: str, max_length: int, dropped: Counter[str]
    ) -> Rendered | None:
        """The conversation up to the last reply with which it still fits, or None if even the first does not fit."""
        messages = row.messages
        replies = [k for k, message in enumerate(messages) if message.role == "assistant"]
        length = 0
        fits = 0
        for prompt, reply in zip(pieces[::2], pieces[1::2], strict=True):
            length += len(prompt) + len(reply)
            fits += length <= max_length
        for k, may_end in reversed(list(zip(replies, may_end_after(messages, replies), strict=True))[:fits]):
            if not may_end:
                continue
            # Rendered again, because a template may write a turn differently when it is the last one.
            shorter = encode_cuts(self._encoder, [self.cut(messages[: k + 1], row.cut.source, row.writer)])[0]
            if sum(map(len, shorter)) <= max_length:
                return learned_of(messages[: k + 1], shorter, train_on, dropped, truncated=True)
        dropped[FIRST_EXCHANGE_OVERFLOW] += 1
        return None

    def cut(
        self, messages: Sequence[Message], source: str, writer: ReplyWriter, *, add_generation_prompt: bool = False
    ) -> Cut:
        """Render and cut into prompt, reply, prompt, reply …; the last piece is a reply, or a prompt if asked for."""
        if writer is not self._writer:
            return self._cut_with_tools(messages, source, writer.template, add_generation_prompt)
        text = self._writer.template.render(messages, add_generation_prompt=add_generation_prompt, source=source)
        roles = tuple(message.role for message in messages)
        if "assistant" not in roles and not add_generation_prompt:
            return Cut([], None, source)
        layout_and_controls = self._layout(roles, add_generation_prompt)
        if layout_and_controls is not None:
            layout, controls = layout_and_controls
            contents = layout.fill(messages)
            if layout.join(contents) == text:
                spans = layout.spans(contents)
                spelled = len(self._encoder.control.findall(text)) != controls
                edges = edges_of(text, spans, add_generation_prompt)
                return Cut(pieces_of(text, edges), parts_of(layout, contents, edges) if spelled else None, source)
        if any(self._encoder.control.search(message.content) for message in messages):
            where = f"{source}: " if source else ""
            raise DataError(
                f"{where}a message spells one of the model's control tokens, and the chat template rewrites "
                "messages, so it cannot be told from the template's own tokens; take it out of the text"
            )
        render = partial(self._writer.template.render, add_generation_prompt=add_generation_prompt)
        spans = find_replies(
            self._writer.template, render, messages, text, self._encoder.added, self.end_of_turn, source=source
        )
        return Cut(pieces_of(text, edges_of(text, spans, add_generation_prompt)), None, source)

    def _cut_with_tools(
        self, messages: Sequence[Message], source: str, template: ChatTemplate, add_generation_prompt: bool
    ) -> Cut:
        """Like `_cut`, for a conversation with tools. Raises RefusedTools if the template cannot write it."""
        control = self._encoder.control
        if any(control.search(text) for message in messages for text in message.texts):
            raise spelled_with_tools(source)
        text = template.render(messages, add_generation_prompt=add_generation_prompt, source=source)
        spans = ToolReplies(template, messages, text, control, source).spans()
        return Cut(pieces_of(text, edges_of(text, spans, add_generation_prompt)), None, source)

    @cached_property
    def end_of_turn(self) -> str:
        """The token that ends a reply, e.g. <|eot_id|>. Raises TemplateError if there is none."""
        if self._writer.rewrites:
            return self._encoder.added.findall(self._writer.turn_end)[-1]
        layout_and_controls = self._layout(("user", "assistant"), False)
        if layout_and_controls is None:
            raise TemplateError(
                "the chat template does not write a user's and an assistant's message one after the other; set a "
                "template that does"
            )
        layout = layout_and_controls[0]
        tail = layout.literals[-1][: layout.replies[0].closes]
        return self._encoder.added.findall(tail)[-1]

    def _layout(self, roles: tuple[str, ...], add_generation_prompt: bool) -> tuple[Layout, int] | None:
        """The layout of these roles and the number of control tokens in its literals; computed once and cached."""
        key = (roles, add_generation_prompt)
        layouts = self._layouts  # another thread may put a new one in its place
        if key in layouts:
            return layouts[key]
        layout = find_layout(
            self._writer.template, roles, self._encoder.added, add_generation_prompt=add_generation_prompt
        )
        result = None if layout is None else (layout, self._controls(layout))
        self._cached_messages += len(roles)
        if self._cached_messages > _CACHED_MESSAGES:
            self._layouts, self._cached_messages = {}, len(roles)
        self._layouts[key] = result
        return result

    def _controls(self, layout: Layout) -> int:
        return len(self._encoder.control.findall("\n".join(layout.literals)))
