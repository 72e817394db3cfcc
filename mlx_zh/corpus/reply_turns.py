"""Where the replies of a conversation stand in its text, and what the template writes for each as the last one.

Rendering all that stands before every reply would take time that grows with the square of their number. So most
replies are taken from renderings of the turns next to them: the question, or the call before a result. The place of
these turns in the text is compared with the text. For the first replies, and at distances that grow fourfold, both
ways are compared; a template that writes a turn otherwise because of earlier ones is rendered whole each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mlx_zh.corpus.chat_template import ChatTemplate
from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.layout import is_checked
from mlx_zh.errors import TemplateError

# The last of some messages, a reply, as the model writes it after a prompt: what is not learned of it, and the rest.
Parts = tuple[str, str]
WriteReply = Callable[[str, Sequence[Message], str], Parts]

_MARKS = tuple(chr(0x10FFF0 + number) for number in range(3))  # of the last private plane
_FIRST = 4  # replies whose prompts are compared with the text of what they answer in any case
_STRIPS: tuple[Callable[[str], str], ...] = (str, str.strip, lambda text: text.lstrip("\n"), str.rstrip, str.lstrip)


@dataclass(frozen=True, slots=True)
class Turn:
    """A reply in a text: where the question before it ends (None: the text has it otherwise), and what is written."""

    asked: int | None
    header: str  # from there to the end of the generation prompt
    parts: Parts | None  # of the reply; None if the template does not write it, because of `problem`
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


_ELSEWHERE = Turn(None, "", None, None, False)


@dataclass(frozen=True, slots=True)
class History:
    """The texts between an earlier question, its reply, and the next question, and the text after that."""

    before_reply: str
    before_question: str
    after_question: str

    @classmethod
    def of(cls, template: ChatTemplate) -> History | None:
        """What the template writes; None if it does more than write the contents one after the other."""
        roles = ("user", "assistant", "user")
        try:
            text = template.render([Message(role, mark) for role, mark in zip(roles, _MARKS, strict=True)])
            first = template.render([Message("user", _MARKS[0])])
        except TemplateError:
            return None
        step = text.removeprefix(first)
        if [text.count(mark) for mark in _MARKS] != [1, 1, 1] or len(step) == len(text) or _MARKS[0] in step:
            return None
        before_reply, _, rest = step.partition(_MARKS[1])
        before_question, _, after_question = rest.partition(_MARKS[2])
        return cls(before_reply, before_question, after_question) if _MARKS[2] in rest else None

    def end(self, text: str, start: int, reply: str, question: str) -> int | None:
        """Where the question ends in `text`, in which these turns begin at `start`; None if it has others there."""
        for literal, content in ((self.before_reply, reply), (self.before_question, question)):
            start += len(literal)
            if not text.startswith(literal, start - len(literal)):
                return None
            written = next((form for strip in _STRIPS if text.startswith(form := strip(content), start)), None)
            if written is None:
                return None
            start += len(written)
        return start + len(self.after_question) if text.startswith(self.after_question, start) else None


class Turns:
    """The turns of `messages` in `text`, which is that of all messages and of what follows them.

    `history` is what the template writes between two questions, if known. `near` is whether turns are taken from
    renderings of the turns next to them; it becomes false if such a turn is not what the template writes.
    """

    def __init__(
        self,
        template: ChatTemplate,
        write_reply: WriteReply,
        history: History | None,
        text: str,
        messages: Sequence[Message],
        source: str,
    ) -> None:
        self._template, self._write_reply, self._history = template, write_reply, history
        self._text, self._messages, self._source = text, messages, source
        self._system = leading(messages)
        self._asked: dict[int, int | None] = {}  # of each reply: where the question before it ends
        self._headers: dict[str, str] = {}  # role of the message before a reply -> end of the generation prompt
        self._alone: tuple[int, str] = (-1, "")  # the last question that was rendered by itself, and its text
        self.near = True

    def find(self, start: int = 0) -> Iterator[tuple[int, Turn]]:
        """Each reply from message `start` on, by index."""
        numbers = [k for k, message in enumerate(self._messages) if message.role == "assistant" and k >= start]
        for number, k in enumerate(numbers):
            near = self._near_turn(k) if self.near and number else None
            turn = near
            if near is None or is_checked(number):
                turn = self._whole_turn(k, near.header if near is not None and number >= _FIRST else "")
                self.near &= near is None or near == turn
            assert turn is not None
            self._asked[k] = turn.asked
            yield k, turn

    def _whole_turn(self, k: int, header: str) -> Turn:
        """Reply `k`, from renderings of all that stands before it. `header` ends its prompt, if known."""
        prompt = self._render(self._messages[:k], ask=True)
        known = header and prompt.endswith(header)
        asked = prompt[: -len(header)] if known else self._render(self._messages[:k])
        if self._text.startswith(prompt) and not prompt.startswith(asked):
            asked = prompt
        if not prompt.startswith(asked) or not self._text.startswith(asked):
            return _ELSEWHERE
        header = prompt[len(asked) :]
        self._headers[self._messages[k - 1].role] = header
        return self._turn(len(asked), prompt, header, self._messages[: k + 1])

    def _near_turn(self, k: int) -> Turn | None:
        """Reply `k`, from renderings of the turns next to it; None if not certain."""
        question = question_of(self._messages, k)
        if k == question + 1:
            asked = self._end_of_question(question)
            window = [*self._system, self._messages[question]]
        else:
            call = next(j for j in range(k - 1, -1, -1) if self._messages[j].role == "assistant")
            before = self._asked.get(call)
            if before is None:
                return _ELSEWHERE if call in self._asked else None
            window = [*self._system, self._messages[question], *self._messages[call:k]]
            alone, written = self._question(question), self._render(window)
            if not written.startswith(alone):
                return None
            if not self._text.startswith(written[len(alone) :], before):
                return _ELSEWHERE
            asked = before + len(written) - len(alone)
        if asked is None:
            return None
        prompt = self._render(window, ask=True)
        header = self._headers.get(self._messages[k - 1].role, "")
        if not header or not prompt.endswith(header):
            written = self._render(window)
            if not prompt.startswith(written):
                return None
            header = prompt[len(written) :]
        turn = self._turn(asked, prompt, header, [*window, self._messages[k]])
        return turn if turn.problem is None else None

    def _end_of_question(self, question: int) -> int | None:
        """Where a question ends in the text, from that of the question before it; None if not certain."""
        messages = self._messages
        earlier = question_of(messages, question)
        before = self._asked.get(earlier + 1) if earlier >= 0 else None
        if before is None:
            return None
        reply = messages[earlier + 1]
        if self._history is not None and question == earlier + 2 and not (reply.calls or reply.reasoning):
            end = self._history.end(self._text, before, reply.content, messages[question].content)
            if end is not None:
                return end
        first = self._question(earlier)
        both = self._render([*self._system, *messages[earlier : question + 1]])
        step = both[len(first) :]
        return before + len(step) if both.startswith(first) and self._text.startswith(step, before) else None

    def _question(self, question: int) -> str:
        """The text of a question by itself."""
        if self._alone[0] != question:
            self._alone = (question, self._render([*self._system, self._messages[question]]))
        return self._alone[1]

    def _turn(self, asked: int, prompt: str, header: str, messages: Sequence[Message]) -> Turn:
        """The last of `messages`, a reply to `prompt`, whose question ends at `asked` in the text."""
        try:
            parts = self._write_reply(prompt, messages, self._source)
        except TemplateError as problem:
            return Turn(asked, header, None, problem, False)
        return Turn(asked, header, parts, None, self._text.startswith(header + "".join(parts), asked))

    def _render(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        return self._template.render(messages, add_generation_prompt=ask, source=self._source)


def leading(messages: Sequence[Message]) -> list[Message]:
    """The descriptions of tools and the system message in front of a conversation."""
    return [message for message in messages[:2] if message.role in ("tools", "system")]


def question_of(messages: Sequence[Message], k: int) -> int:
    """The index of the user's message before message `k`; -1 if there is none."""
    return next((i for i in range(k - 1, -1, -1) if messages[i].role == "user"), -1)
