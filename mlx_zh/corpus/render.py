"""From messages to tokens: the only way there, for training, evaluation and chat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, Self

import numpy as np

from mlx_zh.corpus.chat_template import ChatTemplate, template_source, tool_template_source
from mlx_zh.corpus.conversation import Conversation, Document, Message, Preference
from mlx_zh.corpus.document_pieces import cut_tokens
from mlx_zh.corpus.encoding import Part, PieceEncoder, Tokens
from mlx_zh.corpus.joined_encoding import JoinedEncoder
from mlx_zh.corpus.layout import Layout, find_layout, find_replies
from mlx_zh.corpus.reply_tree import ReplyTree, ReplyWriter, StandIns
from mlx_zh.corpus.thinking import APART, CLOSE, INLINE, Thinking, thinking_of, variables_of, with_reasoning_apart
from mlx_zh.corpus.tool_replies import ToolReplies, ToolSupport, tool_support
from mlx_zh.corpus.tools import uses_tools
from mlx_zh.errors import DataError, RefusedByTemplate, RefusedReasoning, RefusedTools, TemplateError
from mlx_zh.system.digests import text_digest

VERSION = 1  # part of the fingerprint; raise it when the same input would give other tokens
TREE_VERSION = 2  # the same, for templates that think or rewrite earlier replies
TRAIN_ON = ("assistant", "last", "all")
ON_OVERFLOW = ("truncate", "drop")

# The reasons for dropping an example, as counted in `dropped`.
OVERFLOW = "longer than max_length"
FIRST_EXCHANGE_OVERFLOW = "first exchange longer than max_length"
NO_REPLY = "no assistant message"
NOT_TRAINED = "not to be trained"  # every reply that is left is context only
PROMPT_OVERFLOW = "prompt longer than max_length"
CHOSEN_OVERFLOW = "chosen response does not fit into max_length"
REJECTED_OVERFLOW = "rejected response does not fit into max_length"

_BATCH = 512  # texts given to the tokenizer at once; this limits the memory of its encodings
_FIRST_REPLIES = 64  # a longer conversation is rendered up to here first, to see whether max_length ends it before
_CACHED_MESSAGES = 1 << 17  # of all layouts that are kept


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation's tokens up to the end-of-turn token of the last reply."""

    tokens: np.ndarray  # (T,) int32
    trained: np.ndarray  # (T,) bool: the token is a target, so its loss is scored
    truncated: bool  # whether turns were cut from the end
    segments: np.ndarray | None = None  # (B, 2) int32: first token and parent (-1: none); None: one segment

    def paths(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each learned branch with all that stands before it, as tokens and the mask of what only it learns."""
        if self.segments is None:
            return [(self.tokens, self.trained)]
        starts, parents = self.segments[:, 0].tolist(), self.segments[:, 1].tolist()
        spans = [np.arange(start, stop) for start, stop in pairwise([*starts, len(self.tokens)])]
        paths = []
        for number, span in enumerate(spans):
            if not self.trained[span].any():
                continue
            before, parent = [span], parents[number]
            while parent >= 0:
                before.insert(0, spans[parent])
                parent = parents[parent]
            places = np.concatenate(before)
            paths.append((self.tokens[places], self.trained[places] & (places >= span[0])))
        return paths


@dataclass(frozen=True, slots=True)
class RenderedPair:
    """A prompt and two responses, int32; each response ends with its end-of-turn token."""

    prompt: np.ndarray  # (P,)
    chosen: np.ndarray  # (C,)
    rejected: np.ndarray  # (R,)


@dataclass(frozen=True, slots=True)
class _Cut:
    """A rendered text, cut where replies begin and end: every second piece is a reply."""

    pieces: list[str]
    guarded: list[list[Part]] | None  # the pieces with contents marked, if a message spells a control token
    source: str

    def last(self) -> _Cut:
        """The last piece alone."""
        return _Cut(self.pieces[-1:], self.guarded and self.guarded[-1:], self.source)


@dataclass(frozen=True, slots=True)
class _Options:
    """The options of `Renderer.conversation`; `truncate`: what is too long is cut instead of dropped."""

    train_on: str
    max_length: int | None
    truncate: bool


@dataclass(frozen=True, slots=True)
class _Flat:
    """The text of a conversation; `beyond` is as in `_Tree`."""

    messages: Sequence[Message]
    cut: _Cut
    writer: ReplyWriter
    beyond: bool


@dataclass(frozen=True, slots=True)
class _Tree:
    """The tree of a conversation; `beyond`: others of its replies were left out because max_length ends before."""

    tree: ReplyTree
    standins: StandIns
    source: str
    ends: list[bool]  # of each learned reply: whether the conversation may end with it
    beyond: bool

    def cut(self) -> _Cut:
        """Its pieces, to be encoded."""
        return _guarded(self.tree.pieces(), self.standins, self.source)


class Renderer:
    """Messages to text and tokens through the tokenizer's own chat template.

    The same messages always give the same tokens: the template gets `date_string` as today's date (Llama 3.1 and 3.2
    print it). Only the template writes BOS. A reply goes from the end of the generation prompt to its end-of-turn
    token, and no token crosses either end, so the tokens before a reply are exactly those of `prompt`. Control tokens
    that are spelled inside a message are encoded as ordinary text.

    Raises TemplateError if there is no valid chat template, ModelError if the tokenizer is not a fast one.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        date_string: str = "26 Jul 2024",
        chat_template: str | None = None,
        thinking: str = "auto",
        reasoning: str = "learn",
    ):
        self._tokenizer, self._date_string = tokenizer, date_string
        self._source = template_source(tokenizer, chat_template)
        self._variables = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        template = ChatTemplate(self._source, date_string=date_string, variables=self._variables)
        self.thinking = thinking_of(template)
        self._mode, self._reasoning = thinking, reasoning
        self._encoder = PieceEncoder(tokenizer)
        self._writer = self._writer_with(template, self.thinking)
        self._template = self._writer.template
        self._chosen_source, self._tool_source = chat_template, tool_template_source(tokenizer, chat_template)
        self._backend = tokenizer.backend_tokenizer
        self._layouts: dict[tuple[tuple[str, ...], bool], tuple[Layout, int] | None] = {}
        self._cached_messages = 0

    def _writer_with(self, template: ChatTemplate, thinking: Thinking) -> ReplyWriter:
        """The writer for a template in this mode. Raises TemplateError if the template has no such mode."""
        way = thinking.way or (INLINE if self._reasoning == "context" else None)
        template = template.with_variables(variables_of(thinking, self._mode))
        template = template.with_reasoning(None if way == APART else way)
        return ReplyWriter(template, thinking, self._encoder, reasoning=self._reasoning)

    @cached_property
    def _tools(self) -> tuple[ToolSupport, ReplyWriter]:
        """What the template for conversations with tools writes of them, and its writer."""
        source = self._source if self._tool_source is None else self._tool_source
        template = ChatTemplate(source, date_string=self._date_string, variables=self._variables)
        support = tool_support(template)
        template = template.with_text_arguments(support.text_arguments)
        return support, self._writer_with(template, thinking_of(template))

    def with_thinking(self, mode: str) -> Self:
        """The same renderer with thinking on, off or auto. Raises TemplateError if the template has no such mode."""
        return type(self)(
            self._tokenizer,
            date_string=self._date_string,
            chat_template=self._chosen_source,
            thinking=mode,
            reasoning=self._reasoning,
        )

    @property
    def mode(self) -> str:
        """Whether the model is asked to think: on, off or auto, which is the template's own default."""
        return self._mode

    @cached_property
    def thinks_first(self) -> bool:
        """Whether a reply without reasoning begins with a thought, or its generation prompt is inside of one."""
        try:
            messages = [Message("user", "Probe"), Message("assistant", "Probe")]
            last = self._writer.tree(messages, [1]).last
        except TemplateError:
            return False
        return CLOSE in last.learned

    def encode_with(self, joined: JoinedEncoder | None) -> None:
        """Encode by `joined`, which gives the same tokens faster; None switches it off."""
        self._encoder.joined = joined

    def tokenizer_json(self) -> str:
        """The text of the tokenizer's tokenizer.json."""
        text: str = self._backend.to_str()
        return text

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text, without the template."""
        return [sum(map(len, pieces)) for pieces in self._encoder.encode([[text] for text in texts])]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of these tokens, control tokens included."""
        text: str = self._backend.decode([int(token) for token in tokens], skip_special_tokens=False)
        return text

    @cached_property
    def fingerprint(self) -> str:
        """A digest that changes whenever the same messages could give other tokens."""
        if (self._mode, self._reasoning) == ("auto", "learn"):
            return self.template_fingerprint
        return text_digest(repr((self.template_fingerprint, self._mode, self._reasoning)))

    @cached_property
    def template_fingerprint(self) -> str:
        """A digest of the tokenizer and its chat template, whatever the mode of thinking."""
        plain = self if self._mode == "auto" else self.with_thinking("auto")
        version = TREE_VERSION if plain._writer.rewrites or plain.thinking.way is not None else VERSION
        state = (version, self._backend.to_str(), self._source, self._date_string, sorted(self._variables.items()))
        return text_digest(repr(state if self._tool_source is None else (*state, self._tool_source)))

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

    def text(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The rendered text, with the header of the assistant's next turn if asked for. Raises TemplateError."""
        template = self._tools[1].template if uses_tools(messages) else self._template
        return template.render(messages, add_generation_prompt=add_generation_prompt)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens from which a reply is generated. Raises TemplateError or DataError."""
        writer = self._writer_of(messages, "")
        messages = self._apart(messages, writer)
        if self._by_tree(messages, writer):
            standins = self._standins(messages, "")
            cut = _guarded(writer.prompt(standins.into(messages)), standins, "")
        else:
            cut = self._cut(messages, "", writer, add_generation_prompt=True)
        return [int(token) for piece in self._encode([cut])[0] for token in piece]

    def opening(self) -> list[int]:
        """The tokens from which a reply would be generated without any message: BOS and the assistant's header.

        Empty if the template writes neither.
        """
        question = [Message("user", "?")]
        text, prompt = self.text(question), self.text(question, add_generation_prompt=True)
        bos = self._variables.get("bos_token", "")
        header = prompt[len(text) :] if prompt.startswith(text) else ""
        start = bos if text.startswith(bos) and not header.startswith(bos) else ""
        return [int(token) for piece in self._encoder.encode([[start + header]])[0] for token in piece]

    def conversation(
        self,
        messages: Conversation | Sequence[Message],
        *,
        train_on: str = "assistant",
        max_length: int | None = None,
        on_overflow: str = "truncate",
        dropped: Counter[str] | None = None,
    ) -> Rendered | None:
        """The tokens and the mask of trained tokens, or None if nothing is left to train on.

        `train_on`: "assistant" is every reply with its end-of-turn token, "last" only the last reply, "all" every
        token but the first, which nothing predicts.

        A conversation longer than `max_length` tokens is dropped with on_overflow="drop". With "truncate" it is
        rendered up to the last reply that fits completely; the turns after it are cut. It is dropped if the first
        exchange does not fit, or with train_on="last", because the reply to train on would be cut. `dropped` counts
        the reasons.

        Raises TemplateError or DataError for messages that cannot be rendered.
        """
        options = {"train_on": train_on, "max_length": max_length, "on_overflow": on_overflow}
        return self.conversations([messages], **options, dropped=dropped)[0]  # type: ignore[arg-type]

    def conversations(
        self,
        batch: Sequence[Conversation | Sequence[Message]],
        *,
        train_on: str = "assistant",
        max_length: int | None = None,
        on_overflow: str = "truncate",
        dropped: Counter[str] | None = None,
    ) -> list[Rendered | None]:
        """Like `conversation`, for many at once, which is much faster."""
        if train_on not in TRAIN_ON:
            raise ValueError(f"train_on must be one of {', '.join(TRAIN_ON)}, got {train_on!r}")
        if on_overflow not in ON_OVERFLOW:
            raise ValueError(f"on_overflow must be one of {', '.join(ON_OVERFLOW)}, got {on_overflow!r}")
        dropped = Counter() if dropped is None else dropped
        truncate = on_overflow == "truncate" and train_on != "last"
        options = _Options(train_on, max_length, truncate)
        results: list[Rendered | None] = []
        for first in range(0, len(batch), _BATCH):
            rows = [self._prepared(item, options, dropped) for item in batch[first : first + _BATCH]]
            results += self._rendered(rows, options, dropped)
        return results

    def _prepared(
        self, item: Conversation | Sequence[Message], options: _Options, dropped: Counter[str]
    ) -> _Flat | _Tree | None:
        """A conversation before its tokens; None, counted, if there is nothing to learn.

        It is a tree where its text does not have the replies as the model writes them.
        """
        messages, source = _messages_and_source(item)
        writer = self._writer_of(messages, source)
        messages = self._told(messages, source, writer)
        try:
            if self._by_tree(messages, writer, options.train_on):
                return self._limited_tree(messages, source, writer, options, dropped)
            return self._limited(messages, source, writer, options.max_length)
        except RefusedByTemplate as error:
            if writer is self._writer or isinstance(error, RefusedTools | RefusedReasoning):
                raise
            raise RefusedTools(str(error)) from error  # e.g. Llama 3.1's, which writes one call a reply

    def _rendered(
        self, rows: Sequence[_Flat | _Tree | None], options: _Options, dropped: Counter[str]
    ) -> list[Rendered | None]:
        """The tokens of each row."""
        flat = iter(self._encode([row.cut for row in rows if isinstance(row, _Flat)]))
        trees = iter(self._encode_trees([row for row in rows if isinstance(row, _Tree)]))
        results: list[Rendered | None] = []
        for row in rows:
            if row is None:
                results.append(None)
            elif isinstance(row, _Tree):
                results.append(self._fitting(row, next(trees), options, dropped))
            else:
                results.append(self._flat(row, next(flat), options, dropped))
        return results

    def _flat(self, row: _Flat, pieces: list[Tokens], options: _Options, dropped: Counter[str]) -> Rendered | None:
        """A conversation whose replies stand in its text as the model writes them."""
        train_on, max_length = options.train_on, options.max_length
        if not pieces:
            dropped[NO_REPLY] += 1
            return None
        if not row.beyond and (max_length is None or sum(map(len, pieces)) <= max_length):
            return _learned(row.messages, pieces, train_on, dropped, truncated=False)
        if options.truncate and max_length is not None:
            return self._truncated(row, pieces, train_on, max_length, dropped)
        dropped[OVERFLOW] += 1
        return None

    def documents(self, batch: Sequence[Document], *, max_length: int | None = None) -> list[list[Rendered]]:
        """The tokens of each document or passage, cut into pieces of at most `max_length` tokens; no template.

        A piece begins with what the tokenizer writes before every text (BOS, or nothing); the end of a document has
        EOS. Every token but the first of a piece is trained. Raises DataError for a text that cannot be encoded.
        """
        before, end = self._document_frame
        encoded = self._encoder.encode_documents([d.text for d in batch], [d.source for d in batch])
        results: list[list[Rendered]] = []
        for document, (tokens, spans) in zip(batch, encoded, strict=True):
            after = end if document.ends else []
            room = None if max_length is None else max(max_length - len(before), len(after) + 1)
            pieces = []
            for piece in cut_tokens(document.text, [*tokens, *after], spans, room):
                whole = np.array([*before, *piece], dtype=np.int32)
                trained = np.ones(len(whole), dtype=bool)
                trained[0] = False
                if len(whole) > 1:  # one token alone teaches nothing
                    pieces.append(Rendered(whole, trained, truncated=False))
            results.append(pieces)
        return results

    @cached_property
    def _document_frame(self) -> tuple[list[int], list[int]]:
        return self._encoder.frame()

    def _limited_tree(
        self,
        messages: Sequence[Message],
        source: str,
        writer: ReplyWriter,
        options: _Options,
        dropped: Counter[str],
    ) -> _Tree | None:
        """The tree of the replies that can matter; None, counted, if there is nothing to learn."""
        replies = [k for k, message in enumerate(messages) if message.role == "assistant"]
        learned = [k for k in replies if messages[k].trained]
        if options.train_on != "assistant":
            learned = [k for k in learned if k == replies[-1]]
        if not learned:
            dropped[NOT_TRAINED if replies else NO_REPLY] += 1
            return None
        self._check_reasoning([messages[k] for k in learned], source)
        standins = self._standins(messages, source)
        written = standins.into(messages)
        ends = learned if options.train_on == "assistant" else replies
        count = _FIRST_REPLIES
        while options.max_length is not None and count < len(ends):
            first = ends[:count] if options.train_on == "assistant" else [ends[count - 1]]
            tree = _Tree(writer.tree(written, first, source=source), standins, source, _ends(messages, first), True)
            [encoded] = self._encode_trees([tree])
            lengths = tree.tree.lengths(encoded)
            if lengths[-2 if len(lengths) > 1 else -1] > options.max_length:
                return tree
            count *= 2
        return _Tree(writer.tree(written, learned, source=source), standins, source, _ends(messages, learned), False)

    def _encode_trees(self, trees: Sequence[_Tree]) -> list[list[Tokens]]:
        """The tokens of each tree's pieces."""
        if self._encoder.cuts_anywhere:
            return self._encode([tree.cut() for tree in trees])
        return [self._encode_whole(tree) for tree in trees]

    def _encode_whole(self, tree: _Tree) -> list[Tokens]:
        """The same for tokenizers that encode only whole texts: each reply with all that stands before it."""
        pieces: list[Tokens] = []
        for before, texts in tree.tree.wholes():
            [encoded] = self._encode([_guarded([*before, *texts], tree.standins, tree.source)])
            pieces += encoded[len(before) :]
        return pieces

    def _fitting(
        self, tree: _Tree, encoded: Sequence[Tokens], options: _Options, dropped: Counter[str]
    ) -> Rendered | None:
        """The tree up to the last reply with which it fits into max_length; None, counted, if none fits."""
        lengths = tree.tree.lengths(encoded)
        fits = sum(options.max_length is None or length <= options.max_length for length in lengths)
        complete = fits == len(lengths) and not tree.beyond
        while not complete and fits and not tree.ends[fits - 1]:
            fits -= 1
        if not complete and (fits == 0 or not options.truncate):
            dropped[FIRST_EXCHANGE_OVERFLOW if options.truncate else OVERFLOW] += 1
            return None
        tokens, trained, segments = tree.tree.arrays(encoded, fits)
        if options.train_on == "all":
            trained[1:] = True
        return Rendered(tokens, trained, not complete, segments)

    def _check_reasoning(self, learned: Sequence[Message], source: str) -> None:
        """Raise RefusedReasoning if a learned reply has reasoning, and thinking is off."""
        if self._mode == "off" and any(message.reasoning for message in learned):
            raise RefusedReasoning(
                f"{_at(source)}a reply has reasoning, and model.thinking is off, so the model never writes it; set "
                "data.reasoning: drop to leave the reasoning out, or model.thinking: on to learn it"
            )

    def _writer_of(self, messages: Sequence[Message], source: str) -> ReplyWriter:
        """The writer of these messages. Raises RefusedTools if they have tools that the template does not write."""
        if not uses_tools(messages):
            return self._writer
        support, writer = self._tools
        support.check(messages, source)
        return writer

    def _standins(self, messages: Sequence[Message], source: str) -> StandIns:
        standins = StandIns(self._encoder, messages)
        if standins and uses_tools(messages):
            raise _spelled_with_tools(source)
        return standins

    def _by_tree(self, messages: Sequence[Message], writer: ReplyWriter, train_on: str = "assistant") -> bool:
        if train_on == "all" and not all(message.trained for message in messages):
            return False  # the mask of such a conversation is that of its whole text
        return writer.rewrites or any(message.reasoning for message in messages)

    def _apart(self, messages: Sequence[Message], writer: ReplyWriter) -> Sequence[Message]:
        """The messages with reasoning that stands in their texts apart, if the template or the recipe needs it."""
        if writer.thinking.way is None and self._reasoning == "learn":
            return messages
        return [with_reasoning_apart(message) for message in messages]

    def _told(self, messages: Sequence[Message], source: str, writer: ReplyWriter) -> Sequence[Message]:
        """The messages as they are learned: with their reasoning apart, or without it.

        Raises RefusedReasoning if the template has no place for reasoning that stands apart.
        """
        unwritten = writer.thinking.way is None and any(message.reasoning for message in messages)
        if unwritten and self._reasoning != "drop":
            raise RefusedReasoning(
                f"{_at(source)}a message has reasoning apart from its text, and the chat template of this model does "
                "not know reasoning; set data.reasoning: drop to leave it out, or write it into the text as "
                "<think>…</think>"
            )
        messages = self._apart(messages, writer)
        if self._reasoning == "drop" and any(message.reasoning for message in messages):
            messages = [replace(message, reasoning="") for message in messages]
        return messages

    def preference(
        self, pair: Preference, *, max_length: int | None = None, dropped: Counter[str] | None = None
    ) -> RenderedPair | None:
        """The tokens of prompt and responses, or None if one does not fit into `max_length` tokens.

        Responses are never cut; `dropped` counts the reasons. Prompt + response has the same tokens as `conversation`
        gives for the whole. Raises TemplateError if the template writes the prompt differently before the two
        responses.
        """
        return self.preferences([pair], max_length=max_length, dropped=dropped)[0]

    def preferences(
        self,
        batch: Sequence[Preference],
        *,
        max_length: int | None = None,
        dropped: Counter[str] | None = None,
    ) -> list[RenderedPair | None]:
        """Like `preference`, for many at once, which is much faster."""
        dropped = Counter() if dropped is None else dropped
        results: list[RenderedPair | None] = []
        for first in range(0, len(batch), _BATCH // 2):
            part = batch[first : first + _BATCH // 2]
            encoded = iter(self._encode([cut for pair in part for cut in self._cut_pair(pair)]))
            for pair, chosen_pieces, rejected_pieces in zip(part, encoded, encoded, strict=True):
                results.append(_pair(pair.source, chosen_pieces, rejected_pieces, max_length, dropped))
        return results

    def _cut_pair(self, pair: Preference) -> tuple[_Cut, _Cut]:
        """Prompt and chosen response, and prompt and rejected response or the latter alone, rendered and cut."""
        chosen, rejected = (self._answered((*pair.prompt, answer), pair.source) for answer in pair.answers)
        if chosen.pieces[:-1] != rejected.pieces[:-1]:
            raise RefusedByTemplate(
                f"{pair.source}: the chat template writes the prompt differently before the chosen and the "
                "rejected response, so the two cannot be compared"
            )
        # If the tokenizer can encode a piece by itself, the prompt is encoded once.
        return chosen, rejected.last() if self._encoder.cuts_anywhere else rejected

    def _answered(self, messages: Sequence[Message], source: str) -> _Cut:
        """A prompt and its reply, cut; the last piece is the reply."""
        writer = self._writer_of(messages, source)
        messages = self._told(messages, source, writer)
        if not self._by_tree(messages, writer):
            return self._cut(messages, source, writer)
        self._check_reasoning(messages[-1:], source)
        standins = self._standins(messages, source)
        tree = writer.tree(standins.into(messages), [len(messages) - 1], source=source)
        *prompt, aside, learned = tree.pieces()
        return _guarded([*prompt, aside + learned], standins, source)

    def _limited(
        self, messages: Sequence[Message], source: str, writer: ReplyWriter, max_length: int | None
    ) -> _Flat:
        """The messages that can matter, rendered, and whether others were left out because max_length ends before.

        A long conversation is taken up to twice as many replies each time, until one more than fit are there. The
        last reply taken does not count: a template may write the last turn differently.
        """
        if max_length is not None:
            ends = [k + 1 for k, message in enumerate(messages) if message.role == "assistant"]
            count = _FIRST_REPLIES
            while count < len(ends):
                taken = messages[: ends[count - 1]]
                cut = self._cut(taken, source, writer)
                [pieces] = self._encode([cut])
                if sum(map(len, pieces[:-2])) > max_length:
                    return _Flat(taken, cut, writer, beyond=True)
                count *= 2
        return _Flat(messages, self._cut(messages, source, writer), writer, beyond=False)

    def _truncated(
        self, row: _Flat, pieces: list[Tokens], train_on: str, max_length: int, dropped: Counter[str]
    ) -> Rendered | None:
        """The conversation up to the last reply with which it still fits, or None if even the first does not fit."""
        messages = row.messages
        replies = [k for k, message in enumerate(messages) if message.role == "assistant"]
        length = 0
        fits = 0
        for prompt, reply in zip(pieces[::2], pieces[1::2], strict=True):
            length += len(prompt) + len(reply)
            fits += length <= max_length
        for k, may_end in reversed(list(zip(replies, _ends(messages, replies), strict=True))[:fits]):
            if not may_end:
                continue
            # Rendered again, because a template may write a turn differently when it is the last one.
            shorter = self._encode([self._cut(messages[: k + 1], row.cut.source, row.writer)])[0]
            if sum(map(len, shorter)) <= max_length:
                return _learned(messages[: k + 1], shorter, train_on, dropped, truncated=True)
        dropped[FIRST_EXCHANGE_OVERFLOW] += 1
        return None

    def _cut(
        self, messages: Sequence[Message], source: str, writer: ReplyWriter, *, add_generation_prompt: bool = False
    ) -> _Cut:
        """Render and cut into prompt, reply, prompt, reply …; the last piece is a reply, or a prompt if asked for."""
        if writer is not self._writer:
            return self._cut_with_tools(messages, source, writer.template, add_generation_prompt)
        text = self._template.render(messages, add_generation_prompt=add_generation_prompt, source=source)
        roles = tuple(message.role for message in messages)
        if "assistant" not in roles and not add_generation_prompt:
            return _Cut([], None, source)
        layout_and_controls = self._layout(roles, add_generation_prompt)
        if layout_and_controls is not None:
            layout, controls = layout_and_controls
            contents = layout.fill(messages)
            if layout.join(contents) == text:
                spans = layout.spans(contents)
                spelled = len(self._encoder.control.findall(text)) != controls
                edges = _edges(text, spans, add_generation_prompt)
                return _Cut(_pieces(text, edges), _parts(layout, contents, edges) if spelled else None, source)
        if any(self._encoder.control.search(message.content) for message in messages):
            where = f"{source}: " if source else ""
            raise DataError(
                f"{where}a message spells one of the model's control tokens, and the chat template rewrites "
                "messages, so it cannot be told from the template's own tokens; take it out of the text"
            )
        render = partial(self._template.render, add_generation_prompt=add_generation_prompt)
        spans = find_replies(
            self._template, render, messages, text, self._encoder.added, self.end_of_turn, source=source
        )
        return _Cut(_pieces(text, _edges(text, spans, add_generation_prompt)), None, source)

    def _cut_with_tools(
        self, messages: Sequence[Message], source: str, template: ChatTemplate, add_generation_prompt: bool
    ) -> _Cut:
        """Like `_cut`, for a conversation with tools. Raises RefusedTools if the template cannot write it."""
        control = self._encoder.control
        if any(control.search(text) for message in messages for text in message.texts):
            raise _spelled_with_tools(source)
        text = template.render(messages, add_generation_prompt=add_generation_prompt, source=source)
        spans = ToolReplies(template, messages, text, control, source).spans()
        return _Cut(_pieces(text, _edges(text, spans, add_generation_prompt)), None, source)

    def _layout(self, roles: tuple[str, ...], add_generation_prompt: bool) -> tuple[Layout, int] | None:
        """The layout of these roles and the number of control tokens in its literals; computed once and cached."""
        key = (roles, add_generation_prompt)
        layouts = self._layouts  # another thread may put a new one in its place
        if key in layouts:
            return layouts[key]
        layout = find_layout(self._template, roles, self._encoder.added, add_generation_prompt=add_generation_prompt)
        result = None if layout is None else (layout, self._controls(layout))
        self._cached_messages += len(roles)
        if self._cached_messages > _CACHED_MESSAGES:
            self._layouts, self._cached_messages = {}, len(roles)
        self._layouts[key] = result
        return result

    def _controls(self, layout: Layout) -> int:
        return len(self._encoder.control.findall("\n".join(layout.literals)))

    def _encode(self, cuts: Sequence[_Cut]) -> list[list[Tokens]]:
        """Tokens of each piece of each text."""
        plain = iter(self._encoder.encode([cut.pieces for cut in cuts if cut.guarded is None]))
        return [
            next(plain) if cut.guarded is None else self._encoder.encode_guarded(cut.guarded, source=cut.source)
            for cut in cuts
        ]


def _guarded(pieces: list[str], standins: StandIns, source: str) -> _Cut:
    """The pieces, with the control tokens that messages spell as content."""
    return _Cut(pieces, [standins.parts(piece) for piece in pieces] if standins else None, source)


def _at(source: str) -> str:
    return f"{source}: " if source else ""


def _spelled_with_tools(source: str) -> RefusedTools:
    return RefusedTools(
        f"{_at(source)}a conversation with tools spells one of the model's control tokens; take it out of the text"
    )


def _ends(messages: Sequence[Message], replies: Sequence[int]) -> list[bool]:
    """Whether a conversation may be cut after each of these replies: a call stays with its result."""
    return [not messages[k].calls and (k + 1 == len(messages) or messages[k + 1].role != "tool") for k in replies]


def _messages_and_source(item: Conversation | Sequence[Message]) -> tuple[Sequence[Message], str]:
    return (item.messages, item.source) if isinstance(item, Conversation) else (item, "")


def _edges(text: str, spans: Sequence[tuple[int, int]], to_end: bool) -> list[int]:
    """Where pieces end: at the start and end of each reply, and with `to_end` at the end of the text."""
    edges = [edge for span in spans for edge in span]
    return [*edges, len(text)] if to_end else edges


def _pieces(text: str, edges: Sequence[int]) -> list[str]:
    return [text[start:end] for start, end in pairwise((0, *edges))]


def _parts(layout: Layout, contents: Sequence[str], edges: Sequence[int]) -> list[list[Part]]:
    """The pieces of the text, each as parts that are either content or the template's own text."""
    parts: list[Part] = [(layout.literals[0], False)]
    for content, literal in zip(contents, layout.literals[1:], strict=True):
        parts += [(content, True), (literal, False)]
    pieces: list[list[Part]] = []
    position, rest = 0, iter(parts)
    text, is_content = next(rest)
    for edge in edges:
        piece: list[Part] = []
        while position < edge:
            taken = text[: edge - position]
            piece.append((taken, is_content))
            position += len(taken)
            text = text[len(taken) :]
            if not text:
                text, is_content = next(rest, ("", False))
                while not text and position < edge:
                    text, is_content = next(rest)
        pieces.append(piece)
    return pieces


def _learned(
    messages: Sequence[Message], pieces: Sequence[Tokens], train_on: str, dropped: Counter[str], *, truncated: bool
) -> Rendered | None:
    """The conversation, with replies that are context only left out of the mask; None if nothing else is trained."""
    rendered = _assemble(pieces, train_on, truncated=truncated)
    replies = [message.trained for message in messages if message.role == "assistant"]
    if all(replies):
        return rendered
    ends = np.cumsum([len(piece) for piece in pieces])
    for number, is_trained in enumerate(replies):
        if not is_trained:
            rendered.trained[ends[2 * number] : ends[2 * number + 1]] = False
    if not rendered.trained.any():
        dropped[NOT_TRAINED] += 1
        return None
    return rendered


def _assemble(pieces: Sequence[Tokens], train_on: str, *, truncated: bool) -> Rendered:
    """Join the pieces, of which every second is a reply, and mark the trained tokens."""
    tokens = _joined(pieces)
    trained = np.zeros(len(tokens), dtype=bool)
    if train_on == "all":
        trained[1:] = True
    position = 0
    for i, piece in enumerate(pieces):
        end = position + len(piece)
        if i % 2 == 1 and (train_on == "assistant" or (train_on == "last" and i == len(pieces) - 1)):
            trained[position:end] = True
        position = end
    return Rendered(tokens, trained, truncated)


def _pair(
    source: str,
    chosen: Sequence[Tokens],
    rejected: Sequence[Tokens],
    max_length: int | None,
    dropped: Counter[str],
) -> RenderedPair | None:
    """The pair from the pieces of prompt + chosen, and from those of prompt + rejected or of rejected alone."""
    prompt = _joined(chosen[:-1])
    if len(rejected) > 1 and not np.array_equal(prompt, _joined(rejected[:-1])):
        raise TemplateError(
            f"{source}: the prompt's tokens depend on the response that follows, so the two responses cannot be "
            "compared; use another chat template or model"
        )
    if max_length is not None:
        room = max_length - len(prompt)
        for too_long, reason in (
            (room <= 0, PROMPT_OVERFLOW),
            (len(chosen[-1]) > room, CHOSEN_OVERFLOW),
            (len(rejected[-1]) > room, REJECTED_OVERFLOW),
        ):
            if too_long:
                dropped[reason] += 1
                return None
    return RenderedPair(prompt, _joined(chosen[-1:]), _joined(rejected[-1:]))


def _joined(pieces: Sequence[Tokens]) -> np.ndarray:
    return np.concatenate([np.asarray(piece, dtype=np.int32) for piece in pieces])
