"""Replies as the model writes them, for templates that write a reply otherwise once others follow it.

Qwen3's template drops the reasoning of earlier turns, and with thinking off its generation prompt holds an empty
`<think></think>` that no earlier turn has. So a reply in the text of the whole conversation does not stand after what
the model sees when it writes that reply. Here each learned reply stands after exactly its own generation prompt:

    trunk      [ question 1 ]──[ reply 1 as history, question 2 ]──[ header 2, reply 2 ]
                     └─[ header 1, reply 1 ]

The trunk is the text up to the last learned reply. A reply that stands in it as the model writes it is learned there;
each other one is a branch, which leaves the trunk at the end of the question before it. Where a template keeps the
reasoning before a call until the exchange with tools is over, the exchange is a smaller tree beside the trunk.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, pairwise

import numpy as np

from mlx_zh.corpus.chat_template import ChatTemplate
from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.encoding import PieceEncoder, Tokens
from mlx_zh.corpus.layout import end_of_turn_in, is_checked
from mlx_zh.corpus.thinking import APART, CLOSE, OPEN, Thinking, is_open
from mlx_zh.corpus.tool_replies import check_calls
from mlx_zh.errors import RefusedByTemplate, TemplateError

_MARK = "\U0010fffd"  # of the last private plane


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply as the model writes it.

    `head` ends its generation prompt, `aside` is what is not learned of it, `learned` ends with its end of turn.
    """

    at: int  # where it leaves the trunk, or stands in it
    head: str
    aside: str
    learned: str
    inside: bool  # whether it stands in the trunk

    @property
    def texts(self) -> tuple[str, str, str]:
        """All of the reply, in three parts."""
        return self.head, self.aside, self.learned


@dataclass(frozen=True, slots=True)
class Side:
    """The tree of an exchange with tools that the trunk writes otherwise: without the reasoning before its calls."""

    at: int  # where it leaves the trunk, at the end of the question
    tree: ReplyTree


@dataclass(frozen=True, slots=True)
class _Step:
    """Texts of a trunk, or of a reply, that follow each other."""

    texts: tuple[str, ...]
    reply: Reply | None
    level: int  # 0: of the trunk, 1: of what leaves it, 2: of what leaves that
    leaves: bool  # whether it leaves the level below here

    def deeper(self, leaves: bool) -> _Step:
        """The same step, one level up."""
        return replace(self, level=self.level + 1, leaves=self.leaves or leaves)


@dataclass(frozen=True, slots=True)
class ReplyTree:
    """A trunk and the learned replies in it or beside it; `cuts` are other places where its tokens are cut."""

    trunk: str
    replies: tuple[Reply | Side, ...]
    cuts: tuple[int, ...]

    @property
    def last(self) -> Reply:
        """The last reply, with which the trunk ends."""
        reply = self.replies[-1]
        assert isinstance(reply, Reply)
        return reply

    def pieces(self) -> list[str]:
        """All texts that are encoded each by itself."""
        return [text for step in self._steps() for text in step.texts]

    def wholes(self) -> Iterator[tuple[list[str], list[str]]]:
        """Each run of texts of `pieces`, with the texts that stand before it."""
        before: list[list[str]] = [[]]  # of each level
        for step in self._steps():
            if step.leaves:
                before[step.level :] = [list(before[step.level - 1])]
            yield list(before[step.level]), list(step.texts)
            before[step.level] += step.texts

    def lengths(self, encoded: Sequence[Tokens]) -> list[int]:
        """How many tokens the tree has if it ends with its first, second … reply; `encoded` are those of `pieces`."""
        lengths, total = [], 0
        tokens = iter(encoded)
        for step in self._steps():
            total += sum(len(next(tokens)) for _ in step.texts)
            if step.reply is not None:
                lengths.append(total)
        return lengths

    def arrays(self, encoded: Sequence[Tokens], count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """The tree up to its reply number `count`: tokens (T,), which are learned (T,), and its segments (B, 2).

        A segment is its first token and its parent, -1 for the root. None instead if there is only one segment.
        """
        runs: list[Tokens] = []
        learned: list[bool] = []
        segments = [(0, -1)]  # first run, parent
        last = [0]  # segment of each level
        tokens = iter(encoded)
        left = count
        for step in self._steps():
            left -= step.reply is not None
            if step.leaves:
                follows = left == 0 and last[step.level - 1] == len(segments) - 1  # nothing else does
                parent = None if follows or not runs else last[step.level - 1]
            else:
                parent = last[step.level] if last[step.level] != len(segments) - 1 else None
            if parent is not None:
                segments.append((len(runs), parent))
            last[step.level :] = [len(segments) - 1]
            runs += [next(tokens) for _ in step.texts]
            learned += [False] * (len(step.texts) - 1) + [step.reply is not None]
            if left == 0:
                break
        sizes = np.array([len(run) for run in runs])
        edges = np.concatenate([[0], np.cumsum(sizes)])
        joined = np.concatenate([np.asarray(run, dtype=np.int32) for run in runs])
        places = np.array([(edges[run], parent) for run, parent in segments], dtype=np.int32)
        return joined, np.repeat(np.array(learned, dtype=bool), sizes), places if len(places) > 1 else None

    def beyond(self, start: int) -> ReplyTree:
        """The tree without the text before `start`, where no reply stands."""
        replies = tuple(replace(reply, at=reply.at - start) for reply in self.replies)
        return ReplyTree(self.trunk[start:], replies, tuple(cut - start for cut in self.cuts if cut > start))

    def _steps(self) -> Iterator[_Step]:
        """Runs of the trunk and the replies, each as texts."""
        cursor = 0
        for reply in self.replies:
            inner = self.cuts[bisect_right(self.cuts, cursor) : bisect_left(self.cuts, reply.at)]
            bounds = [cursor, *inner, reply.at]
            if reply.at > cursor:
                yield _Step(tuple(self.trunk[a:b] for a, b in pairwise(bounds)), None, 0, False)
            cursor = reply.at
            if isinstance(reply, Side):
                for number, step in enumerate(reply.tree._steps()):
                    yield step.deeper(leaves=number == 0)
            elif reply.inside:
                yield _Step(reply.texts, reply, 0, False)
                cursor += sum(map(len, reply.texts))
            else:
                yield _Step(reply.texts, reply, 1, True)


@dataclass(frozen=True, slots=True)
class _Turn:
    """A reply in a text: where the question before it ends (None: the text has it otherwise), and what is written."""

    asked: int | None
    header: str  # from there to the end of the generation prompt
    parts: tuple[str, str] | None  # of the reply; None if the template does not write it, because of `problem`
    problem: TemplateError | None
    inside: bool  # whether the reply stands in the text

    def cuts(self) -> list[int]:
        """Where tokens end: at both ends of the reply, or before it."""
        if self.asked is None:
            return []
        if not self.inside or self.parts is None:
            return [self.asked]
        start = self.asked + len(self.header)
        return [start, start + sum(map(len, self.parts))]


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
        turns = dict(self._turns(trunk, messages[: learned[-1]], source, start))
        replies: list[Reply | Side] = []
        for question, run in groupby(learned[:-1], key=lambda k: _question_of(messages, k)):
            exchange = list(run)
            if any(turns[k].asked is None for k in exchange):
                replies.append(self._side(trunk, messages, question, exchange, learned[-1], source))
            else:
                replies += [_placed(turns[k]) for k in exchange]
        replies.append(Reply(len(prompt), "", *last, inside=True))
        return ReplyTree(trunk, tuple(replies), tuple(cut for turn in turns.values() for cut in turn.cuts()))

    def _side(
        self, trunk: str, messages: Sequence[Message], question: int, exchange: Sequence[int], last: int, source: str
    ) -> Side:
        """The tree of the replies of one exchange, whose later prompts the trunk does not have."""
        asked = self.template.render(messages[: question + 1], source=source)
        if not trunk.startswith(asked) or question == _question_of(messages, last):
            raise _rewritten(exchange[-1], source)
        tree = self.tree(messages[: exchange[-1] + 1], exchange, source=source, start=question)
        if not tree.trunk.startswith(asked):
            raise _rewritten(exchange[-1], source)
        return Side(len(asked), tree.beyond(len(asked)))

    def prompt(self, messages: Sequence[Message], *, source: str = "") -> list[str]:
        """The generation prompt in pieces, cut where `tree` cuts it."""
        text = self.template.render(messages, add_generation_prompt=True, source=source)
        cuts = [cut for _, turn in self._turns(text, messages, source) for cut in turn.cuts()]
        return [text[a:b] for a, b in pairwise((0, *cuts, len(text)))]

    def _turns(
        self, text: str, messages: Sequence[Message], source: str, start: int = 0
    ) -> Iterator[tuple[int, _Turn]]:
        """Each reply in `messages` from `start` on, by index; `text` is that of all messages and of what follows.

        Rendering all that stands before every reply would take time that grows with the square of their number. So
        after the first replies most are taken from renderings of the turns next to them, whose place in the text is
        compared with the text.
        """
        numbers = [k for k, message in enumerate(messages) if message.role == "assistant" and k >= start]
        before: _Turn | None = None
        for number, k in enumerate(numbers):
            turn = None
            if before is not None and before.asked is not None and not is_checked(number, len(numbers)):
                turn = self._near_turn(text, messages, k, before.asked, source)
            before = self._turn(text, messages, k, source) if turn is None else turn
            yield k, before

    def _turn(self, text: str, messages: Sequence[Message], k: int, source: str) -> _Turn:
        """Reply `k`, from renderings of all that stands before it."""
        prompt = self.template.render(messages[:k], add_generation_prompt=True, source=source)
        asked = self.template.render(messages[:k], source=source)
        if text.startswith(prompt) and not prompt.startswith(asked):
            asked = prompt
        if not prompt.startswith(asked) or not text.startswith(asked):
            return _Turn(None, "", None, None, False)
        return self._placed(text, len(asked), prompt, prompt[len(asked) :], messages[: k + 1], source)

    def _near_turn(self, text: str, messages: Sequence[Message], k: int, before: int, source: str) -> _Turn | None:
        """Reply `k`, from renderings of the turns next to it; None if not certain.

        `before` is where the question before the last reply ends in `text`.
        """
        turns = messages[max(k - 3, 0) : k]
        if [message.role for message in turns] != ["user", "assistant", "user"] or turns[1].calls:
            return None
        system = [message for message in messages[:2] if message.role in ("tools", "system")]
        first = self.template.render([*system, messages[k - 3]], source=source)
        both = self.template.render([*system, *messages[k - 3 : k]], source=source)
        step = both[len(first) :]
        alone = [*system, messages[k - 1]]
        asked = self.template.render(alone, source=source)
        prompt = self.template.render(alone, add_generation_prompt=True, source=source)
        if not both.startswith(first) or not text.startswith(step, before) or not prompt.startswith(asked):
            return None
        header = prompt[len(asked) :]
        turn = self._placed(text, before + len(step), prompt, header, [*alone, messages[k]], source)
        return turn if turn.problem is None else None

    def _placed(
        self, text: str, asked: int, prompt: str, header: str, messages: Sequence[Message], source: str
    ) -> _Turn:
        """The last of `messages`, a reply to `prompt`, whose question ends at `asked` in `text`."""
        try:
            parts = self._reply(prompt, messages, source)
        except TemplateError as problem:
            return _Turn(asked, header, None, problem, False)
        return _Turn(asked, header, parts, None, text.startswith(header + "".join(parts), asked))

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
        if answer is None or not (is_open(prompt) or self.thinking.way == APART):
            raise _lost(k, source)
        thought = _thought(prompt, reply)
        rest = text[answer:stop] + end
        return (thought, rest) if self._context else ("", thought + rest)

    def _calling_reply(self, prompt: str, text: str, reply: Message, k: int, source: str) -> tuple[str, str]:
        """The same for a reply with calls: it ends with the last control token that the template writes for it."""
        opened = is_open(prompt) and not text.startswith(prompt)
        before = prompt.rstrip().removesuffix(OPEN) if opened else prompt
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


def _question_of(messages: Sequence[Message], k: int) -> int:
    """The index of the user's message before reply `k`."""
    return next(i for i in range(k - 1, -1, -1) if messages[i].role == "user")


def _placed(turn: _Turn) -> Reply:
    """The learned reply of a turn whose question is in the text. Raises TemplateError if it is not written."""
    if turn.asked is None or turn.parts is None:
        assert turn.problem is not None
        raise turn.problem
    at = turn.asked + len(turn.header) if turn.inside else turn.asked
    return Reply(at, "" if turn.inside else turn.header, *turn.parts, inside=turn.inside)


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
