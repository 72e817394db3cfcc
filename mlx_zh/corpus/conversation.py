"""What a row of a data set becomes: a conversation or a document for SFT, a pair of answers or a labelled one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is system, user, assistant or tool; `content` is the text as written, white space included.

    A first message of role `tools` is no turn: its content is the JSON text of the descriptions of the tools that the
    conversation has. A reply that is not `trained` is context for the next ones only. `reasoning` is what its author
    thought before it. `calls` is JSON text: of a reply its calls of tools, [{name, arguments, id?}, …]; of a tool's
    result {name?, id?}.
    """

    role: str
    content: str
    trained: bool = True
    reasoning: str = ""
    calls: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        """Everything that the message says; "" in the place of what it lacks."""
        return self.reasoning, self.content, self.calls


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, the last one the assistant's. `source` is "file:line" (JSON lines) or "file[index]" (JSON array)."""

    messages: tuple[Message, ...]
    source: str


class Answer(NamedTuple):
    """What a format for KTO reads: messages that end with a reply, and whether it is good."""

    messages: tuple[Message, ...]
    label: bool


@dataclass(frozen=True, slots=True)
class Labelled(Conversation):
    """A conversation whose last reply is good (`label` true; "desirable" in KTO's words) or bad."""

    label: bool


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt whose last message is the user's, the preferred answer, and the other one. `source`: "file:line"."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    source: str
    chosen_calls: str = ""  # JSON text, as in a message
    rejected_calls: str = ""

    @property
    def answers(self) -> tuple[Message, Message]:
        """The preferred answer and the other one, as messages."""
        chosen = Message("assistant", self.chosen, calls=self.chosen_calls)
        return chosen, Message("assistant", self.rejected, calls=self.rejected_calls)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The prompt and both answers."""
        return (*self.prompt, *self.answers)


@dataclass(frozen=True, slots=True)
class Document:
    """Raw text, or a passage of it; `begins` and `ends` say whether the document does so here."""

    text: str
    source: str = ""
    begins: bool = True
    ends: bool = True


def with_system(conversation: Conversation, system: str | None) -> Conversation:
    """The conversation with `system` as its system message, unless it already has one."""
    messages = _with_system(conversation.messages, system)
    return conversation if messages is conversation.messages else replace(conversation, messages=messages)


def prompt_with_system(pair: Preference, system: str | None) -> Preference:
    """The pair with `system` as the system message of its prompt, unless it already has one."""
    prompt = _with_system(pair.prompt, system)
    return pair if prompt is pair.prompt else replace(pair, prompt=prompt)


def _with_system(messages: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    first = 1 if messages[0].role == "tools" else 0
    if not system or messages[first].role == "system":
        return messages
    return (*messages[:first], Message("system", system), *messages[first:])
