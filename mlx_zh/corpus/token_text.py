"""The text of tokens, and a search among many of them, from a table of the bytes of each token.

A byte-level tokenizer (Llama 3, Qwen, SmolLM2) writes each byte of a token as a printable character. One made by
SentencePiece (Llama 2, Gemma) writes a blank as ▁, and a byte that is no token as <0xE4>.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_zh.corpus.joined_encoding import byte_of_character
from mlx_zh.system.json_text import parse_json

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BLANK = "▁"


@dataclass(frozen=True, slots=True)
class Piece:
    """The fewest tokens whose bytes are whole characters: one, or several that share a character."""

    text: str
    ids: tuple[int, ...]
    learned: bool


class TokenText:
    """The bytes of each of V tokens, from a `tokenizers` tokenizer."""

    def __init__(self, backend: Any) -> None:
        vocabulary = backend.get_vocab(with_added_tokens=True)
        added = {number: token.content for number, token in backend.get_added_tokens_decoder().items()}
        decoder = (parse_json(backend.to_str()).get("decoder") or {}) if vocabulary else {}
        bytes_of = _byte_level if "ByteLevel" in str(decoder) else _plain
        words = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for token, number in vocabulary.items():
            words[number] = added[number].encode() if number in added else bytes_of(token)
        self._words = words
        self.added = frozenset(added)  # the ids of the tokens that structure a chat, and of others that were added

    def bytes_of(self, tokens: npt.NDArray[np.int32]) -> bytes:
        """The bytes of tokens (T,); nothing for one that the tokenizer does not have."""
        count = len(self._words)
        return b"".join(self._words[token] for token in tokens.tolist() if 0 <= token < count)

    def text(self, tokens: npt.NDArray[np.int32]) -> str:
        """The text of tokens (T,); � for half a character."""
        return self.bytes_of(tokens).decode("utf-8", "replace")

    def pieces(self, tokens: npt.NDArray[np.int32], learned: npt.NDArray[np.bool_]) -> Iterator[Piece]:
        """The pieces of tokens (T,), of which `learned` (T,) are learned; no piece is learned in part."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text, ids = "", []
        for place, (number, is_learned) in enumerate(zip(tokens.tolist(), learned.tolist(), strict=True)):
            last = place + 1 == len(tokens) or bool(learned[place + 1]) != is_learned
            word = self.bytes_of(tokens[place : place + 1])
            text += decoder.decode(word, final=last)
            ids.append(number)
            if last or not decoder.getstate()[0]:
                yield Piece(text, tuple(ids), is_learned)
                text, ids = "", []

    def finder(self, text: str) -> Finder:
        """What finds a text among tokens, small and capital ASCII letters alike."""
        return Finder([word.lower() for word in self._words], text.encode("utf-8", "replace").lower())


class Finder:
    """Finds a text of B bytes among tokens, without making text of them.

    An occurrence begins in a token that holds all of it, or whose end is the first k bytes of it; then each next
    token goes on from byte k. The tokens in which one can begin are known: most are passed with one look at a table.
    """

    def __init__(self, words: Sequence[bytes], sought: bytes) -> None:
        self._words, self._sought = words, sought
        self._whole = np.array([sought in word for word in words] + [False], dtype=bool)
        self._begins: dict[int, npt.NDArray[np.bool_]] = {}  # k -> whether each token ends with the first k bytes
        for number, word in enumerate(words):
            for k in range(1, min(len(word), len(sought) - 1) + 1):
                if word.endswith(sought[:k]):
                    table = self._begins.setdefault(k, np.zeros(len(words) + 1, dtype=bool))
                    table[number] = True
        self._any = self._whole.copy()
        for table in self._begins.values():
            self._any |= table
        self._steps: dict[tuple[int, int], int] = {}

    def rows(self, values: npt.NDArray[np.int32], offsets: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        """Which rows (R,) hold the text; `offsets` (R + 1,) is where each begins among the tokens `values` (T,)."""
        held = np.zeros(len(offsets) - 1, dtype=bool)
        known = np.minimum(values.astype(np.uint32), len(self._words))  # an unknown token is in no occurrence
        first = np.flatnonzero(self._any[known])
        whole = first[self._whole[known[first]]]
        held[_row_of(whole, offsets)] = True
        for k, table in self._begins.items():
            begun = first[table[known[first]]]
            self._follow(known, offsets, begun, k, held)
        return held

    def _follow(
        self,
        known: npt.NDArray[np.uint32],
        offsets: npt.NDArray[np.int32],
        begun: npt.NDArray[np.int64],
        k: int,
        held: npt.NDArray[np.bool_],
    ) -> None:
        """Mark the rows of the occurrences whose first k bytes end with the tokens at `begun` (M,)."""
        row = _row_of(begun, offsets)
        at, matched = begun + 1, np.full(len(begun), k)
        while len(at):
            inside = at < offsets[row + 1]
            at, row, matched = at[inside], row[inside], matched[inside]
            matched = self._matched(known[at], matched)
            held[row[matched == len(self._sought)]] = True
            going = (matched > 0) & (matched < len(self._sought))
            at, row, matched = at[going] + 1, row[going], matched[going]

    def _matched(self, tokens: npt.NDArray[np.uint32], matched: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many bytes are matched after each of the tokens (M,) that goes on from byte `matched` (M,); 0: none."""
        pairs, of = np.unique(tokens.astype(np.int64) * (len(self._sought) + 1) + matched, return_inverse=True)
        after = [self._step(*divmod(pair, len(self._sought) + 1)) for pair in pairs.tolist()]
        return np.array(after, dtype=np.int64)[of] if len(after) else matched

    def _step(self, token: int, k: int) -> int:
        if (step := self._steps.get((token, k))) is None:
            word = self._words[token] if token < len(self._words) else b""
            rest = self._sought[k:]
            step = k + len(word) if word and rest.startswith(word) else 0
            if word.startswith(rest):
                step = len(self._sought)
            self._steps[token, k] = step
        return step


def _row_of(places: npt.NDArray[np.int64], offsets: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    return np.searchsorted(offsets, places, side="right") - 1


def _byte_level(token: str) -> bytes:
    table = byte_of_character()
    try:
        return bytes(table[character] for character in token)
    except KeyError:  # not written by this tokenizer's own rules
        return token.encode()


def _plain(token: str) -> bytes:
    if (byte := _BYTE.fullmatch(token)) is not None:
        return bytes([int(byte[1], 16)])
    return token.replace(_BLANK, " ").encode("utf-8", "replace")
