"""Character n-grams of many texts at once, as 64-bit hashes. They identify near duplicates and exam questions.

Only letters and digits count, in lower case: white space, punctuation and the boundaries of messages make no
difference, nor do full-width, circled and raised forms.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Offsets = npt.NDArray[np.int64]
_BEYOND = 0x10000  # the first code point beyond Unicode's basic plane
_RARE_HAN = (0x20000, 0x32400)  # the Chinese characters beyond it
_SPREAD, _BASE = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)


@dataclass(frozen=True, slots=True)
class Letters:
    """The letters and digits of N texts, C in all, one text after the other."""

    hashes: Hashes  # (C,) a hash of each character
    ends: Offsets  # (N + 1,) zero, then the end of each text

    def ngrams(self, size: int) -> tuple[Hashes, Offsets]:
        """The hashes of all n-grams (G,), and the offsets of each text's n-grams in them (N + 1,).

        A text shorter than `size` is itself its only n-gram; an empty text has none.
        """
        rolled = self.hashes
        for _ in range(size - 1):
            rolled = rolled[:-1] * _BASE
            rolled += self.hashes[len(self.hashes) - len(rolled) :]
        starts, lengths = self.ends[:-1], np.diff(self.ends)
        counts = np.maximum(lengths - size + 1, 0)
        short = np.flatnonzero((counts == 0) & (lengths > 0))
        counts[short] = 1
        offsets = np.concatenate([[0], np.cumsum(counts)])
        positions = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], counts)
        positions[offsets[short]] = 0
        grams = rolled[positions] if len(rolled) else np.zeros(len(positions), dtype=np.uint64)
        for text in short:
            grams[offsets[text]] = _fold(self.hashes[starts[text] : starts[text] + lengths[text]])
        grams ^= grams >> np.uint64(31)
        grams *= _SPREAD
        return grams, offsets


def letters(texts: Sequence[str]) -> Letters:
    """The letters and digits of `texts`, in lower case."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), dtype=np.uint32)
    alphanumeric, lower = _tables()
    keep = alphanumeric[np.minimum(codes, _BEYOND)]
    keep |= (codes >= _RARE_HAN[0]) & (codes < _RARE_HAN[1])
    kept_before = np.concatenate([[0], np.cumsum(keep)])  # number of kept characters before each character
    ends = np.concatenate([[0], np.cumsum([len(text) for text in texts])])
    kept = codes[keep]
    hashes = np.where(kept < _BEYOND, lower[np.minimum(kept, _BEYOND)], kept).astype(np.uint64)
    hashes *= _SPREAD
    hashes ^= hashes >> np.uint64(29)
    return Letters(hashes, kept_before[ends].astype(np.int64))


def _fold(hashes: Hashes) -> np.uint64:
    """The hash of all these characters as one n-gram."""
    folded = np.zeros(1, dtype=np.uint64)
    for value in hashes:
        folded = folded * _BASE + value
    return folded[0]


@cache
def _tables() -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint32]]:
    """Whether each character of the basic plane is a letter or digit, and its plain lower case: (65537,) each.

    The last entry stands for all characters beyond the basic plane.
    """
    characters = [chr(code) for code in range(_BEYOND)]
    alphanumeric = np.fromiter(map(str.isalnum, characters), dtype=bool, count=_BEYOND)
    lower = np.arange(_BEYOND + 1, dtype=np.uint32)
    for code in np.flatnonzero(alphanumeric):
        small = unicodedata.normalize("NFKC", characters[code]).lower()
        if small != characters[code] and len(small) == 1:
            lower[code] = ord(small)
    return np.append(alphanumeric, False), lower
