"""What a data set's row becomes: a conversation to imitate, or two answers of which one is preferred."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is system, user or assistant; `content` is kept as it was written, whitespace included."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that end with the assistant. `source` is "file:line" (JSON lines) or "file[index]" (JSON array)."""

    messages: tuple[Message, ...]
    source: str


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt that ends with the user, an answer that was preferred and one that was not."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    source: str


def with_system(conversation: Conversation, system: str | None) -> Conversation:
    """The conversation with `system` as its system message, unless it has one of its own."""
    if not system or conversation.messages[0].role == "system":
        return conversation
    return replace(conversation, messages=(Message("system", system), *conversation.messages))


def prompt_with_system(pair: Preference, system: str | None) -> Preference:
    """The pair with `system` as its prompt's system message, unless it has one of its own."""
    if not system or pair.prompt[0].role == "system":
        return pair
    return replace(pair, prompt=(Message("system", system), *pair.prompt))
