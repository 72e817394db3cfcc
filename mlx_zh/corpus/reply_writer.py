"""Writes conversations as trees of replies, with one chat template."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import groupby, pairwise

from mlx_zh.corpus.chat_template import ChatTemplate
from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.encoding import PieceEncoder
from mlx_zh.corpus.layout import end_of_turn_in
from mlx_zh.corpus.reply_tree import Reply, ReplyTree, Side
from mlx_zh.corpus.reply_turns import History, Turn, Turns, leading, question_of
from mlx_zh.corpus.thinking import APART, CLOSE, OPEN, Thinking, is_closed, is_open
from mlx_zh.corpus.tool_replies import check_calls
from mlx_zh.errors import RefusedByTemplate, TemplateError

_MARK = "\U0010fffd"  # of the last private plane


class ReplyWriter:
    """Makes the trees of conversations with one template. `reasoning` is learn or context."""

    def __init__(
        self, template: ChatTemplate, thinking: Thinking, encoder: PieceEncoder, *, reasoning: str = "learn"
    ) -> None:
        self.template, self.thinking = template, thinking
        self._added, self._control = encoder.added, encoder.control
        self._context = reasoning == "context"

    def tree(
        self, messages: Sequence[Message], learned: Sequence[int], *, source: str = "", start: int = 0
    ) -> ReplyTree:
        """The tree with the replies `learned`, which are indices of messages in rising order.

        With `start` it is only looked at from that message on, because what is before it will be taken off.
        Raises TemplateError, with `source` in front, if the template does not write these replies.
        """
        prompt, last = self._written(messages, learned[-1], source)
        trunk = prompt + "".join(last)
        finder = self._finder(trunk, messages[: learned[-1]], source)
        turns = dict(finder.find(start))
        sides = _Sides(self, trunk, messages, turns, near=finder.near, source=source)
        replies: list[Reply | Side] = []
        for question, run in groupby(learned[:-1], key=lambda k: question_of(messages, k)):
            exchange = list(run)
            if any(turns[k].asked is None for k in exchange):
                if question == question_of(messages, learned[-1]):
                    raise _rewritten(exchange[-1], source)
                replies.append(sides.side(question, exchange))
            else:
                replies += [_placed(turns[k]) for k in exchange]
        replies.append(Reply(len(prompt), "", *last, inside=True))
        return ReplyTree(trunk, tuple(replies), tuple(cut for turn in turns.values() for cut in turn.cuts()))

    def prompt(self, messages: Sequence[Message], *, source: str = "") -> list[str]:
        """The generation prompt in pieces, cut where `tree` cuts it."""
        text = self.template.render(messages, add_generation_prompt=True, source=source)
        cuts = [cut for _, turn in self._finder(text, messages, source).find() for cut in turn.cuts()]
        return [text[a:b] for a, b in pairwise((0, *cuts, len(text)))]

    def _finder(self, text: str, messages: Sequence[Message], source: str) -> Turns:
        return Turns(self.template, self._reply, self._history, text, messages, source)

    @cached_property
    def _history(self) -> History | None:
        return History.of(self.template)

    @cached_property
    def rewrites(self) -> bool:
        """Whether the template writes a reply otherwise once others follow it."""
        messages = [Message(("user", "assistant")[i % 2], f"Probe{i}") for i in range(4)]
        try:
            replies = self.tree(messages, [1, 3]).replies
            return not all(isinstance(reply, Reply) and reply.inside for reply in replies)
        except TemplateError:
            return False

    def _written(self, messages: Sequence[Message], k: int, source: str) -> tuple[str, tuple[str, str]]:
        """The generation prompt of reply `k`, and the reply: what is not learned of it, and the rest."""
        prompt = self.template.render(messages[:k], add_generation_prompt=True, source=source)
        return prompt, self._reply(prompt, messages[: k + 1], source)

    def _reply(self, prompt: str, messages: Sequence[Message], source: str) -> tuple[str, str]:
        """The last of `messages` as the model writes it after `prompt`: what is not learned of it, and the rest."""
        k = len(messages) - 1
        text = self.template.render(messages, source=source)
        if messages[k].calls:
            return self._calling_reply(prompt, text, messages[k], k, source)
        tail, turn_end = self._tail
        if not text.endswith(tail):
            raise _lost(k, source)
        stop = len(text) - len(tail)
        end = text[stop : stop + turn_end]
        reply = messages[k]
        answer = _answer_start(text[:stop], reply.content)
        if text.startswith(prompt) and not (self.thinking.way == APART and reply.reasoning):
            if not self._context:
                return ("", text[len(prompt) : stop] + end)
            if answer is None or answer < len(prompt):
                raise _lost(k, source)
            return (text[len(prompt) : answer], text[answer:stop] + end)
        unthinking = _without_thought(prompt, text, reply)
        if answer is None or not (unthinking or is_open(prompt) or self.thinking.way == APART):
            raise _lost(k, source)
        thought = "" if unthinking else _thought(prompt, reply)
        rest = text[answer:stop] + end
        return (thought, rest) if self._context else ("", thought + rest)

    def _calling_reply(self, prompt: str, text: str, reply: Message, k: int, source: str) -> tuple[str, str]:
        """The same for a reply with calls: it ends with the last control token that the template writes for it."""
        opened = is_open(prompt) and not text.startswith(prompt)
        unthinking = not text.startswith(prompt) and _without_thought(prompt, text, reply)
        before = prompt.rpartition(OPEN)[0] if opened or unthinking else prompt
        written = text.removeprefix(before)
        controls = list(self._control.finditer(written))
        if not text.startswith(before) or not controls or written[controls[-1].end() :].strip():
            raise _lost(k, source)
        written = written[: controls[-1].end()]
        check_calls(reply, k, written, source)
        thought = ""
        if opened or (self.thinking.way == APART and reply.reasoning):
            thought = _thought(prompt, reply)
        elif self._context and CLOSE in written:
            answer = written.partition(CLOSE)[2].lstrip()
            thought, written = written[: -len(answer)], answer
        return (thought, written) if self._context else ("", thought + written)

    @property
    def turn_end(self) -> str:
        """The text after a reply's content, up to the end of the turn. Raises TemplateError."""
        tail, turn_end = self._tail
        return tail[:turn_end]

    @cached_property
    def _tail(self) -> tuple[str, int]:
        """The text after the last reply's content, and where in it the turn ends. Raises TemplateError."""
        text = self.template.render([Message("user", "Probe"), Message("assistant", _MARK)])
        if text.count(_MARK) != 1:
            raise TemplateError("the chat template does not write a reply once; set a template that does")
        tail = text.partition(_MARK)[2]
        return tail, end_of_turn_in(tail, self._added)


class _Sides:
    """The exchanges of a conversation that its trunk writes otherwise.

    `near` is whether a turn is written alike without the turns before its question. Then an exchange is rendered
    without them. For the first exchange both ways are compared.
    """

    def __init__(
        self,
        writer: ReplyWriter,
        trunk: str,
        messages: Sequence[Message],
        turns: dict[int, Turn],
        *,
        near: bool,
        source: str,
    ) -> None:
        self._writer, self._trunk, self._messages, self._turns = writer, trunk, messages, turns
        self._near, self._source = near, source
        self._compared = False

    def side(self, question: int, exchange: Sequence[int]) -> Side:
        """The tree of the replies `exchange` to one question. Raises TemplateError if the trunk has it otherwise."""
        turn = self._turns.get(question + 1)
        at = None if turn is None else turn.asked
        if not self._near or at is None:
            return self._whole(question, exchange)
        system = leading(self._messages)
        alone = [*system, *self._messages[question : exchange[-1] + 1]]
        shift = question - len(system)
        tree = self._beyond(alone, len(system), [k - shift for k in exchange])
        if not self._compared:
            self._compared = True
            whole = self._whole(question, exchange)
            self._near = whole == Side(at, tree)
            return whole
        return Side(at, tree)

    def _whole(self, question: int, exchange: Sequence[int]) -> Side:
        """The same, from renderings of all that stands before it."""
        asked = self._writer.template.render(self._messages[: question + 1], source=self._source)
        if not self._trunk.startswith(asked):
            raise _rewritten(exchange[-1], self._source)
        return Side(len(asked), self._beyond(self._messages[: exchange[-1] + 1], question, exchange))

    def _beyond(self, messages: Sequence[Message], question: int, exchange: Sequence[int]) -> ReplyTree:
        """The tree of an exchange, which ends with `messages`, beyond its question."""
        asked = self._writer.template.render(messages[: question + 1], source=self._source)
        tree = self._writer.tree(messages, exchange, source=self._source, start=question)
        if not tree.trunk.startswith(asked):
            raise _rewritten(exchange[-1], self._source)
        return tree.beyond(len(asked))


def _placed(turn: Turn) -> Reply:
    """The learned reply of a turn whose question is in the text. Raises TemplateError if it is not written."""
    if turn.asked is None or turn.parts is None:
        assert turn.problem is not None
        raise turn.problem
    at = turn.asked + len(turn.header) if turn.inside else turn.asked
    return Reply(at, "" if turn.inside else turn.header, *turn.parts, inside=turn.inside)


def _without_thought(prompt: str, text: str, reply: Message) -> bool:
    """Whether `text` has a reply as if its prompt did not end with an empty thought."""
    return is_closed(prompt) and not reply.reasoning and text.startswith(prompt.rpartition(OPEN)[0])


def _thought(prompt: str, reply: Message) -> str:
    """The thought before a reply, as the model writes it after `prompt`."""
    return f"{'' if is_open(prompt) else OPEN + chr(10)}{reply.reasoning}\n{CLOSE}\n\n"


def _answer_start(text: str, content: str) -> int | None:
    """Where the content begins at the end of a text; a template may strip it. None if it is not there."""
    forms = (content, content.lstrip("\n"), content.lstrip(), content.rstrip(), content.strip("\n"), content.strip())
    return next((len(text) - len(form) for form in forms if text.endswith(form)), None)


def _rewritten(k: int, source: str) -> RefusedByTemplate:
    return RefusedByTemplate(
        f"{_at(source)}the chat template writes the {k} messages before a reply otherwise once more messages follow, "
        "so this reply cannot be learned together with the later ones; set data.train_on: last"
    )


def _lost(k: int, source: str) -> RefusedByTemplate:
    return RefusedByTemplate(
        f"{_at(source)}cannot tell what the chat template makes of message {k + 1} (assistant); take marks such as "
        f"{CLOSE} out of its text, or use a template that keeps messages as they are"
    )


def _at(source: str) -> str:
    return f"{source}: " if source else ""
