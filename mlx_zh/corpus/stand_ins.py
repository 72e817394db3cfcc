"""Characters that stand in for control tokens which messages spell, while a chat template writes the messages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.encoding import Part, PieceEncoder
from mlx_zh.corpus.thinking import CLOSE, OPEN

_FIRST_STANDIN, _STANDINS = 0x100000, 0xF000  # characters of the last private plane that stand in for control tokens


class StandIns:
    """Characters in the place of control tokens that messages spell, to tell them from the template's own."""

    def __init__(self, encoder: PieceEncoder, messages: Sequence[Message]) -> None:
        texts = "".join(text for message in messages for text in message.texts)
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
