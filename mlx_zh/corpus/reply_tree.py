"""Replies as the model writes them, for templates that write a reply otherwise once others follow it.

Qwen3's template drops the reasoning of earlier turns, and with thinking off its generation prompt holds an empty
`<think></think>` that no earlier turn has. So a reply in the text of the whole conversation does not stand after what
the model sees when it writes that reply. Here each learned reply stands after exactly its own generation prompt:

    trunk      [ question 1 ]──[ reply 1 as history, question 2 ]──[ header 2, reply 2 ]
                     └─[ header 1, reply 1 ]

The trunk is the text up to the last learned reply. A reply that stands in it as the model writes it is learned there;
each other one is a branch, which leaves the trunk at the end of the question before it.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from mlx_zh.corpus.chat_template import ChatTemplate
from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.encoding import Part, PieceEncoder, Tokens
from mlx_zh.corpus.layout import end_of_turn_in, is_checked
from mlx_zh.corpus.thinking import APART, CLOSE, OPEN, Thinking, is_open
from mlx_zh.errors import TemplateError

_MARK = "\U0010fffd"  # of the last private plane
_FIRST_STANDIN, _STANDINS = 0x100000, 0xF000  # characters of that plane that stand in for control tokens


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
class ReplyTree:
    """A trunk and the learned replies in it or beside it; `cuts` are other places where its tokens are cut."""

    trunk: str
    replies: tuple[Reply, ...]
    cuts: tuple[int, ...]

    def pieces(self) -> list[str]:
        """All texts that are encoded each by itself."""
        return [text for texts, _ in self._steps() for text in texts]

    def wholes(self) -> Iterator[tuple[list[str], list[str]]]:
        """Each run of texts of `pieces`, with the texts that stand before it."""
        before: list[str] = []
        for texts, reply in self._steps():
            yield list(before), list(texts)
            if reply is None or reply.inside:
                before += texts

    def lengths(self, encoded: Sequence[Tokens]) -> list[int]:
        """How many tokens the tree has if it ends with its first, second … reply; `encoded` are those of `pieces`."""
        lengths, total = [], 0
        tokens = iter(encoded)
        for texts, reply in self._steps():
            total += sum(len(next(tokens)) for _ in texts)
            if reply is not None:
                lengths.append(total)
        return lengths

    def arrays(self, encoded: Sequence[Tokens], count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """The tree up to its reply number `count`: tokens (T,), which are learned (T,), and its segments (B, 2).

        A segment is its first token and its parent, -1 for the root. None instead if there is only one segment.
        """
        runs: list[Tokens] = []
        learned: list[bool] = []
        segments: list[tuple[int, int]] = []  # first run, parent
        tokens = iter(encoded)
        trunk, on_trunk, left = -1, False, count
        for texts, reply in self._steps():
            left -= reply is not None
            beside = reply is not None and not reply.inside and left > 0
            if beside or not on_trunk:
                segments.append((len(runs), trunk))
                trunk = trunk if beside else len(segments) - 1
            on_trunk = not beside
            runs += [next(tokens) for _ in texts]
            learned += [False] * (len(texts) - 1) + [reply is not None]
            if left == 0:
                break
        sizes = np.array([len(run) for run in runs])
        edges = np.concatenate([[0], np.cumsum(sizes)])
        joined = np.concatenate([np.asarray(run, dtype=np.int32) for run in runs])
        places = np.array([(edges[run], parent) for run, parent in segments], dtype=np.int32)
        return joined, np.repeat(np.array(learned, dtype=bool), sizes), places if len(places) > 1 else None

    def _steps(self) -> Iterator[tuple[tuple[str, ...], Reply | None]]:
        """Runs of the trunk (None) and the replies, each as texts."""
        cursor = 0
        for reply in self.replies:
            inner = self.cuts[bisect_right(self.cuts, cursor) : bisect_left(self.cuts, reply.at)]
            bounds = [cursor, *inner, reply.at]
            if reply.at > cursor:
                yield tuple(self.trunk[a:b] for a, b in pairwise(bounds)), None
            yield reply.texts, reply
            cursor = reply.at + (sum(map(len, reply.texts)) if reply.inside else 0)


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
        self, template: ChatTemplate, thinking: Thinking, added: re.Pattern[str], *, reasoning: str = "learn"
    ) -> None:
        self._template, self._thinking, self._added = template, thinking, added
        self._context = reasoning == "context"

    def tree(self, messages: Sequence[Message], learned: Sequence[int], *, source: str = "") -> ReplyTree:
        """The tree with the replies `learned`, which are indices of messages in rising order.

        Raises TemplateError, with `source` in front, if the template does not write these replies.
        """
        prompt, last = self._written(messages, learned[-1], source)
        trunk = prompt + "".join(last)
        wanted = set(learned)
        replies: list[Reply] = []
        cuts: list[int] = []
        for k, turn in self._turns(trunk, messages[: learned[-1]], source):
            cuts += turn.cuts()
            if k not in wanted:
                continue
            if turn.asked is None or turn.parts is None:
                raise turn.problem or _rewritten(k, source)
            at = turn.asked + len(turn.header) if turn.inside else turn.asked
            replies.append(Reply(at, "" if turn.inside else turn.header, *turn.parts, inside=turn.inside))
        replies.append(Reply(len(prompt), "", *last, inside=True))
        return ReplyTree(trunk, tuple(replies), tuple(cuts))

    def prompt(self, messages: Sequence[Message], *, source: str = "") -> list[str]:
        """The generation prompt in pieces, cut where `tree` cuts it."""
        text = self._template.render(messages, add_generation_prompt=True, source=source)
        cuts = [cut for _, turn in self._turns(text, messages, source) for cut in turn.cuts()]
        return [text[a:b] for a, b in pairwise((0, *cuts, len(text)))]

    def _turns(self, text: str, messages: Sequence[Message], source: str) -> Iterator[tuple[int, _Turn]]:
        """Each reply in `messages`, by index; `text` is that of the messages and of what follows them.

        Rendering all that stands before every reply would take time that grows with the square of their number. So
        after the first replies most are taken from renderings of the turns next to them, whose place in the text is
        compared with the text.
        """
        numbers = [k for k, message in enumerate(messages) if message.role == "assistant"]
        before: _Turn | None = None
        for number, k in enumerate(numbers):
            turn = None
            if before is not None and before.asked is not None and not is_checked(number, len(numbers)):
                turn = self._near_turn(text, messages, k, before.asked, source)
            before = self._turn(text, messages, k, source) if turn is None else turn
            yield k, before

    def _turn(self, text: str, messages: Sequence[Message], k: int, source: str) -> _Turn:
        """Reply `k`, from renderings of all that stands before it."""
        prompt = self._template.render(messages[:k], add_generation_prompt=True, source=source)
        asked = self._template.render(messages[:k], source=source)
        if text.startswith(prompt) and not prompt.startswith(asked):
            asked = prompt
        if not prompt.startswith(asked) or not text.startswith(asked):
            return _Turn(None, "", None, None, False)
        return self._placed(text, len(asked), prompt, prompt[len(asked) :], messages[: k + 1], source)

    def _near_turn(self, text: str, messages: Sequence[Message], k: int, before: int, source: str) -> _Turn | None:
        """Reply `k`, from renderings of the turns next to it; None if not certain.

        `before` is where the question before the last reply ends in `text`.
        """
        if [message.role for message in messages[max(k - 3, 0) : k]] != ["user", "assistant", "user"]:
            return None
        system = messages[:1] if messages[0].role == "system" else []
        first = self._template.render([*system, messages[k - 3]], source=source)
        both = self._template.render([*system, *messages[k - 3 : k]], source=source)
        step = both[len(first) :]
        alone = [*system, messages[k - 1]]
        asked = self._template.render(alone, source=source)
        prompt = self._template.render(alone, add_generation_prompt=True, source=source)
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

    def rewrites(self) -> bool:
        """Whether the template writes a reply otherwise once others follow it. Raises TemplateError."""
        messages = [Message(("user", "assistant")[i % 2], f"Probe{i}") for i in range(4)]
        return not all(reply.inside for reply in self.tree(messages, [1, 3]).replies)

    def _written(self, messages: Sequence[Message], k: int, source: str) -> tuple[str, tuple[str, str]]:
        """The generation prompt of reply `k`, and the reply: what is not learned of it, and the rest."""
        prompt = self._template.render(messages[:k], add_generation_prompt=True, source=source)
        return prompt, self._reply(prompt, messages[: k + 1], source)

    def _reply(self, prompt: str, messages: Sequence[Message], source: str) -> tuple[str, str]:
        """The last of `messages` as the model writes it after `prompt`: what is not learned of it, and the rest."""
        k = len(messages) - 1
        text = self._template.render(messages, source=source)
        tail, turn_end = self._tail
        if not text.endswith(tail):
            raise _lost(k, source)
        stop = len(text) - len(tail)
        end = text[stop : stop + turn_end]
        reply = messages[k]
        answer = _answer_start(text[:stop], reply.content)
        if text.startswith(prompt) and not (self._thinking.way == APART and reply.reasoning):
            if not self._context:
                return ("", text[len(prompt) : stop] + end)
            if answer is None or answer < len(prompt):
                raise _lost(k, source)
            return (text[len(prompt) : answer], text[answer:stop] + end)
        if answer is None or not (is_open(prompt) or self._thinking.way == APART):
            raise _lost(k, source)
        thought = f"{'' if is_open(prompt) else OPEN + chr(10)}{reply.reasoning}\n{CLOSE}\n\n"
        rest = text[answer:stop] + end
        return (thought, rest) if self._context else ("", thought + rest)

    @property
    def turn_end(self) -> str:
        """The text after a reply's content, up to the end of the turn. Raises TemplateError."""
        tail, turn_end = self._tail
        return tail[:turn_end]

    @cached_property
    def _tail(self) -> tuple[str, int]:
        """The text after the last reply's content, and where in it the turn ends. Raises TemplateError."""
        text = self._template.render([Message("user", "Probe"), Message("assistant", _MARK)])
        if text.count(_MARK) != 1:
            raise TemplateError("the chat template does not write a reply once; set a template that does")
        tail = text.partition(_MARK)[2]
        return tail, end_of_turn_in(tail, self._added)


def _answer_start(text: str, content: str) -> int | None:
    """Where the content begins at the end of a text; a template may strip it. None if it is not there."""
    forms = (content, content.lstrip("\n"), content.lstrip(), content.rstrip(), content.strip("\n"), content.strip())
    return next((len(text) - len(form) for form in forms if text.endswith(form)), None)


def _rewritten(k: int, source: str) -> TemplateError:
    return TemplateError(
        f"{_at(source)}the chat template writes the {k} messages before a reply otherwise once more messages follow, "
        "so this reply cannot be learned together with the later ones; set data.train_on: last"
    )


def _lost(k: int, source: str) -> TemplateError:
    return TemplateError(
        f"{_at(source)}cannot tell what the chat template makes of message {k + 1} (assistant); take marks such as "
        f"{CLOSE} out of its text, or use a template that keeps messages as they are"
    )


def _at(source: str) -> str:
    return f"{source}: " if source else ""


class StandIns:
    """Characters in the place of control tokens that messages spell, to tell them from the template's own."""

    def __init__(self, encoder: PieceEncoder, messages: Sequence[Message]) -> None:
        texts = "".join(message.content + message.reasoning for message in messages)
        spelled = [token for token in dict.fromkeys(encoder.control.findall(texts)) if token not in (OPEN, CLOSE)]
        free = (c for c in map(chr, range(_FIRST_STANDIN, _FIRST_STANDIN + _STANDINS)) if c not in texts)
        self._by_token = dict(zip(spelled, free, strict=False))
        self._by_character = {character: token for token, character in self._by_token.items()}
        self._control = encoder.control

    def __bool__(self) -> bool:
        return bool(self._by_token)

    def into(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages with the characters in them."""
        if not self:
            return messages
        return [
            replace(message, content=self._replaced(message.content), reasoning=self._replaced(message.reasoning))
            for message in messages
        ]

    def parts(self, text: str) -> list[Part]:
        """A rendered text, with the control tokens back as content."""
        pattern = "[" + "".join(map(re.escape, self._by_character)) + "]"
        parts: list[Part] = []
        start = 0
        for match in re.finditer(pattern, text):
            parts += [(text[start : match.start()], False), (self._by_character[match[0]], True)]
            start = match.end()
        return [*parts, (text[start:], False)]

    def _replaced(self, text: str) -> str:
        return self._control.sub(lambda match: self._by_token.get(match[0], match[0]), text)
