"""Rows of data at the console: what is learned in green, everything else dim, control characters made visible."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_zh.corpus.conversation import Message
    from mlx_zh.corpus.render import Renderer
    from mlx_zh.corpus.rendered import Rendered
    from mlx_zh.corpus.sources import Item

Segment = tuple[str, bool]  # text, and whether it is learned
_LEARNED, _DIM, _PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"
_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")  # controls, private use, separators of lines
_PICTURES = 0x2400  # Unicode's pictures of the control characters 0 to 31


def in_colour() -> bool:
    """Whether stdout shows colours: a terminal, and NO_COLOR is not set (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def painted(segments: Iterable[Segment]) -> str:
    """Text with learned parts in green and the others dim; without colours, learned parts stand in ⟦ ⟧."""
    if not in_colour():
        return "".join(f"⟦{visible(text)}⟧" if learned else visible(text) for text, learned in segments)
    return "".join(f"{_LEARNED if learned else _DIM}{visible(text)}{_PLAIN}" for text, learned in segments if text)


def visible(text: str) -> str:
    """The text with control and invisible characters shown: ␀ for NUL, <U+202E> for a mark of direction."""
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or (code >= 32 and unicodedata.category(character) not in _INVISIBLE):
        return character
    if code < 32 or code == 127:
        return chr(_PICTURES + (code if code < 32 else 33))
    # Joiners hold emoji together, and some scripts need them.
    return character if character in "\u200c\u200d" else f"<U+{code:04X}>"


def rendered_segments(example: Rendered, renderer: Renderer) -> list[Segment]:
    """The parts of a rendered conversation, with the template's own tokens.

    Of a tree, each learned branch with all that stands before it.
    """
    segments: list[Segment] = []
    for tokens, trained in example.paths():
        segments += [("\n\n", False)] if segments else []
        edges = [i for i in range(1, len(tokens)) if trained[i] != trained[i - 1]]
        segments += [
            (renderer.decode(tokens[start:stop].tolist()), bool(trained[start]))
            for start, stop in zip([0, *edges], [*edges, len(tokens)], strict=True)
            if stop > start
        ]
    return segments


def plain_segments(item: Item, roles: dict[str, str]) -> list[Segment]:
    """The parts of a row with the names of the roles in front: `roles` names system, user, assistant and so on."""
    from mlx_zh.corpus.conversation import Conversation, Document

    if isinstance(item, Document):
        return [(item.text, True)]
    if isinstance(item, Conversation):
        return _turns(item.messages, roles)
    chosen, rejected = map(_said, item.answers)
    answers: list[Segment] = [(roles["chosen"] + " ", False), (chosen, True), (f"\n{roles['rejected']} ", False)]
    return [*_turns(item.prompt, roles), ("\n", False), *answers, (rejected, False)]


def _turns(messages: Sequence[Message], roles: dict[str, str]) -> list[Segment]:
    segments: list[Segment] = []
    for message in messages:
        segments += [("\n" if segments else "", False), (f"{roles[message.role]} ", False)]
        segments += [(_said(message), message.role == "assistant")]
    return segments


def _said(message: Message) -> str:
    return "\n".join(text for text in (message.content, message.calls) if text)
