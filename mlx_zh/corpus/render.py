"""From messages to tokens: the only way there, for training, evaluation and chat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Self

from mlx_zh.corpus.chat_template import (
    NO_TEMPLATE,
    ChatTemplate,
    has_template,
    template_source,
    tool_template_source,
)
from mlx_zh.corpus.conversation import Conversation, Document, Labelled, Message, Preference
from mlx_zh.corpus.document_rendering import DocumentRenderer
from mlx_zh.corpus.encoding import PieceEncoder
from mlx_zh.corpus.flat_rendering import Flat, FlatRenderer
from mlx_zh.corpus.joined_encoding import JoinedEncoder
from mlx_zh.corpus.rendered import PROMPT_OVERFLOW, Rendered, RenderedAnswer, RenderedPair, answer_of, pair_of
from mlx_zh.corpus.reply_writer import ReplyWriter
from mlx_zh.corpus.text_cuts import Cut, encode_cuts, guarded
from mlx_zh.corpus.thinking import APART, CLOSE, INLINE, Thinking, thinking_of, variables_of, with_reasoning_apart
from mlx_zh.corpus.tool_replies import ToolSupport, tool_support
from mlx_zh.corpus.tools import uses_tools
from mlx_zh.corpus.tree_rendering import FIRST_REPLIES, Options, Tree, TreeRenderer, at
from mlx_zh.errors import RefusedByTemplate, RefusedReasoning, RefusedTools, TemplateError
from mlx_zh.system.digests import text_digest

VERSION = 1  # part of the fingerprint; raise it when the same input would give other tokens
TREE_VERSION = 2  # the same, for templates that think or rewrite earlier replies
TRAIN_ON = ("assistant", "last", "all")
ON_OVERFLOW = ("truncate", "drop")
_BATCH = 512  # texts given to the tokenizer at once; this limits the memory of its encodings


class Renderer:
    """Messages to text and tokens through the tokenizer's own chat template.

    The same messages always give the same tokens: the template gets `date_string` as today's date (Llama 3.1 and 3.2
    print it). Only the template writes BOS. A reply goes from the end of the generation prompt to its end-of-turn
    token, and no token crosses either end, so the tokens before a reply are exactly those of `prompt`. Control tokens
    that are spelled inside a message are encoded as ordinary text.

    With `raw_text` a tokenizer without a chat template will do; then only documents can be rendered. Raises
    TemplateError if there is no valid chat template, ModelError if the tokenizer is not a fast one.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        date_string: str = "26 Jul 2024",
        chat_template: str | None = None,
        thinking: str = "auto",
        reasoning: str = "learn",
        raw_text: bool = False,
    ):
        self._tokenizer, self._date_string = tokenizer, date_string
        self.has_template = not raw_text or chat_template is not None or has_template(tokenizer)
        self._source = template_source(tokenizer, chat_template) if self.has_template else ""
        self._variables = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        template = ChatTemplate(self._source, date_string=date_string, variables=self._variables)
        self.thinking = thinking_of(template)
        self._mode, self._reasoning = thinking, reasoning
        self._encoder = PieceEncoder(tokenizer)
        self._trees = TreeRenderer(self._encoder, thinking)
        self._writer = self._writer_with(template, self.thinking)
        self._template = self._writer.template
        self._chosen_source, self._tool_source = chat_template, tool_template_source(tokenizer, chat_template)
        self._backend = tokenizer.backend_tokenizer
        self._texts = FlatRenderer(self._encoder, self._writer)
        self._documents = DocumentRenderer(self._encoder)

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

    def check_template(self) -> None:
        """Raise TemplateError if there is no chat template, so that no conversation can be rendered."""
        if not self.has_template:
            raise TemplateError(NO_TEMPLATE)

    def with_thinking(self, mode: str) -> Self:
        """The same renderer with thinking on, off or auto. Raises TemplateError if the template has no such mode."""
        return type(self)(
            self._tokenizer,
            date_string=self._date_string,
            chat_template=self._chosen_source,
            thinking=mode,
            reasoning=self._reasoning,
            raw_text=not self.has_template,
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

    @property
    def end_of_turn(self) -> str:
        """The token that ends a reply, e.g. <|eot_id|>. Raises TemplateError if there is none."""
        self.check_template()
        return self._texts.end_of_turn

    def text(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The rendered text, with the header of the assistant's next turn if asked for. Raises TemplateError."""
        self.check_template()
        template = self._tools[1].template if uses_tools(messages) else self._template
        return template.render(messages, add_generation_prompt=add_generation_prompt)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens from which a reply is generated. Raises TemplateError or DataError."""
        return [
            int(token) for piece in encode_cuts(self._encoder, [self._prompt(messages, "")])[0] for token in piece
        ]

    def _prompt(self, messages: Sequence[Message], source: str) -> Cut:
        """The text from which a reply is generated, cut where earlier replies begin and end."""
        writer = self._writer_of(messages, source)
        messages = self._apart(messages, writer)
        if self._by_tree(messages, writer):
            standins = self._trees.standins(messages, source)
            return guarded(writer.prompt(standins.into(messages), source=source), standins, source)
        return self._texts.cut(messages, source, writer, add_generation_prompt=True)

    def opening(self) -> list[int]:
        """The tokens from which a reply would be generated without any message: BOS and the assistant's header.

        Empty if the template writes neither, or there is none.
        """
        if not self.has_template:
            return []
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
        options = Options(train_on, max_length, truncate)
        results: list[Rendered | None] = []
        for first in range(0, len(batch), _BATCH):
            rows = [self._prepared(item, options, dropped) for item in batch[first : first + _BATCH]]
            results += self._rendered(rows, options, dropped)
        return results

    def _prepared(
        self, item: Conversation | Sequence[Message], options: Options, dropped: Counter[str]
    ) -> Flat | Tree | None:
        """A conversation before its tokens; None, counted, if there is nothing to learn.

        It is a tree where its text does not have the replies as the model writes them.
        """
        messages, source = _messages_and_source(item)
        writer = self._writer_of(messages, source)
        messages = self._told(messages, source, writer)
        try:
            if self._by_tree(messages, writer, options.train_on):
                return self._trees.tree(messages, source, writer, options, dropped)
            return self._texts.limited(messages, source, writer, options.max_length)
        except RefusedByTemplate as error:
            if writer is self._writer or isinstance(error, RefusedTools | RefusedReasoning):
                raise
            raise RefusedTools(str(error)) from error  # e.g. Llama 3.1's, which writes one call a reply

    def _rendered(
        self, rows: Sequence[Flat | Tree | None], options: Options, dropped: Counter[str]
    ) -> list[Rendered | None]:
        """The tokens of each row."""
        flat = iter(encode_cuts(self._encoder, [row.cut for row in rows if isinstance(row, Flat)]))
        trees = iter(self._trees.encode([row for row in rows if isinstance(row, Tree)]))
        results: list[Rendered | None] = []
        for row in rows:
            if row is None:
                results.append(None)
            elif isinstance(row, Tree):
                results.append(self._trees.fitting(row, next(trees), options, dropped))
            else:
                results.append(self._texts.fitting(row, next(flat), options, dropped))
        return results

    def documents(self, batch: Sequence[Document], *, max_length: int | None = None) -> list[list[Rendered]]:
        """The tokens of each document or passage, cut into pieces of at most `max_length` tokens; no template.

        A piece begins with what the tokenizer writes before every text (BOS, or nothing); the end of a document has
        EOS. Every token but the first of a piece is trained. Raises DataError for a text that cannot be encoded.
        """
        return self._documents.render(batch, max_length)

    def _writer_of(self, messages: Sequence[Message], source: str) -> ReplyWriter:
        """The writer of these messages. Raises RefusedTools if they have tools that the template does not write."""
        self.check_template()
        if not uses_tools(messages):
            return self._writer
        support, writer = self._tools
        support.check(messages, source)
        return writer

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
                f"{at(source)}a message has reasoning apart from its text, and the chat template of this model does "
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
            cuts = [
                None if self._overflows(pair.prompt, pair.source, max_length) else self._cut_pair(pair)
                for pair in part
            ]
            encoded = iter(encode_cuts(self._encoder, [cut for both in cuts if both is not None for cut in both]))
            for pair, both in zip(part, cuts, strict=True):
                if both is None:
                    dropped[PROMPT_OVERFLOW] += 1
                    results.append(None)
                else:
                    results.append(pair_of(pair.source, next(encoded), next(encoded), max_length, dropped))
        return results

    def answers(
        self,
        batch: Sequence[Labelled],
        *,
        max_length: int | None = None,
        dropped: Counter[str] | None = None,
    ) -> list[RenderedAnswer | None]:
        """The tokens of prompts and last replies with their labels; None for one longer than `max_length` tokens.

        Replies are never cut; `dropped` counts the reasons. The tokens are those of `preferences`.
        """
        dropped = Counter() if dropped is None else dropped
        results: list[RenderedAnswer | None] = []
        for first in range(0, len(batch), _BATCH):
            part = batch[first : first + _BATCH]
            cuts = [
                None
                if self._overflows(item.messages[:-1], item.source, max_length)
                else self._answered(item.messages, item.source)
                for item in part
            ]
            encoded = iter(encode_cuts(self._encoder, [cut for cut in cuts if cut is not None]))
            for item, cut in zip(part, cuts, strict=True):
                if cut is None:
                    dropped[PROMPT_OVERFLOW] += 1
                    results.append(None)
                else:
                    results.append(answer_of(next(encoded), item.label, max_length, dropped))
        return results

    def _overflows(self, prompt: Sequence[Message], source: str, max_length: int | None) -> bool:
        """Whether the first turns of a long prompt are longer than max_length already; up to twice as many each time.

        The last question of those does not count: a template may write the last turn differently.
        """
        questions = [k for k, message in enumerate(prompt) if message.role == "user"]
        count = FIRST_REPLIES
        while max_length is not None and count < len(questions):
            cut = self._prompt(prompt[: questions[count] + 1], source)
            if sum(map(len, encode_cuts(self._encoder, [cut])[0][:-1])) > max_length:
                return True
            count *= 2
        return False

    def _cut_pair(self, pair: Preference) -> tuple[Cut, Cut]:
        """Prompt and chosen response, and prompt and rejected response or the latter alone, rendered and cut."""
        chosen, rejected = (self._answered((*pair.prompt, answer), pair.source) for answer in pair.answers)
        if chosen.pieces[:-1] != rejected.pieces[:-1]:
            raise RefusedByTemplate(
                f"{pair.source}: the chat template writes the prompt differently before the chosen and the "
                "rejected response, so the two cannot be compared"
            )
        # If the tokenizer can encode a piece by itself, the prompt is encoded once.
        return chosen, rejected.last() if self._encoder.cuts_anywhere else rejected

    def _answered(self, messages: Sequence[Message], source: str) -> Cut:
        """A prompt and its reply, cut; the last piece is the reply."""
        writer = self._writer_of(messages, source)
        messages = self._told(messages, source, writer)
        if not self._by_tree(messages, writer):
            return self._texts.cut(messages, source, writer)
        self._trees.check_reasoning(messages[-1:], source)
        standins = self._trees.standins(messages, source)
        tree = writer.tree(standins.into(messages), [len(messages) - 1], source=source)
        *prompt, aside, learned = tree.pieces()
        return guarded([*prompt, aside + learned], standins, source)


def _messages_and_source(item: Conversation | Sequence[Message]) -> tuple[Sequence[Message], str]:
    return (item.messages, item.source) if isinstance(item, Conversation) else (item, "")
