"""What a row of a data set becomes: a conversation or a document for SFT, or a pair of answers for DPO."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is system, user or assistant; `content` is the text as written, white space included.

    A reply that is not `trained` is context for the next ones only. `reasoning` is what its author thought before it.
    """

    role: str
    content: str
    trained: bool = True
    reasoning: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        """Everything that the message says; "" in the place of what it lacks."""
        return self.reasoning, self.content


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, the last one the assistant's. `source` is "file:line" (JSON lines) or "file[index]" (JSON array)."""

    messages: tuple[Message, ...]
    source: str


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt whose last message is the user's, the preferred answer, and the other one. `source`: "file:line"."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    source: str


@dataclass(frozen=True, slots=True)
class Document:
    """Raw text, or a passage of it; `begins` and `ends` say whether the document does so here."""

    text: str
    source: str = ""
    begins: bool = True
    ends: bool = True


def with_system(conversation: Conversation, system: str | None) -> Conversation:
    """The conversation with `system` as its system message, unless it already has one."""
    if not system or conversation.messages[0].role == "system":
        return conversation
    return replace(conversation, messages=(Message("system", system), *conversation.messages))


def prompt_with_system(pair: Preference, system: str | None) -> Preference:
    """The pair with `system` as the system message of its prompt, unless it already has one."""
    if not system or pair.prompt[0].role == "system":
        return pair
    return replace(pair, prompt=(Message("system", system), *pair.prompt))
