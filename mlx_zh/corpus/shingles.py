"""Character n-grams of many texts at once, as 64-bit hashes: what near-duplicates and exam questions are found by.

Texts are compared by their letters and digits alone, in lower case: white space, punctuation and the boundaries of
messages make no difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Offsets = npt.NDArray[np.int64]
_BEYOND = 0x10000  # the basic plane ends here
_RARE_HAN = (0x20000, 0x32400)  # the ideographs beyond it
_SPREAD, _BASE = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)


@dataclass(frozen=True, slots=True)
class Letters:
    """The letters and digits of some texts, one after the other."""

    hashes: Hashes  # (C,) a hash of each character
    ends: Offsets  # (N + 1,) where each text ends, with a zero before

    def ngrams(self, size: int) -> tuple[Hashes, Offsets]:
        """All n-grams (G,) and where those of each text begin and end (N + 1,).

        A text shorter than `size` has one n-gram, itself; an empty one has none.
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
        places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], counts)
        places[offsets[short]] = 0
        found = rolled[places] if len(rolled) else np.zeros(len(places), dtype=np.uint64)
        for text in short:
            found[offsets[text]] = _fold(self.hashes[starts[text] : starts[text] + lengths[text]])
        found ^= found >> np.uint64(31)
        found *= _SPREAD
        return found, offsets


def letters(texts: Sequence[str]) -> Letters:
    """The letters and digits of `texts`, in lower case."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), dtype=np.uint32)
    kept, lower = _tables()
    keep = kept[np.minimum(codes, _BEYOND)]
    keep |= (codes >= _RARE_HAN[0]) & (codes < _RARE_HAN[1])
    passed = np.concatenate([[0], np.cumsum(keep)])
    ends = np.concatenate([[0], np.cumsum([len(text) for text in texts])])
    left = codes[keep]
    hashes = np.where(left < _BEYOND, lower[np.minimum(left, _BEYOND)], left).astype(np.uint64)
    hashes *= _SPREAD
    hashes ^= hashes >> np.uint64(29)
    return Letters(hashes, passed[ends].astype(np.int64))


def _fold(hashes: Hashes) -> np.uint64:
    folded = np.zeros(1, dtype=np.uint64)
    for value in hashes:
        folded = folded * _BASE + value
    return folded[0]


@cache
def _tables() -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint32]]:
    """For every character of the basic plane, and one for all others: whether it counts, and what it counts as."""
    characters = [chr(code) for code in range(_BEYOND)]
    kept = np.fromiter(map(str.isalnum, characters), dtype=bool, count=_BEYOND)
    lower = np.arange(_BEYOND + 1, dtype=np.uint32)
    for code in np.flatnonzero(kept):
        small = characters[code].lower()
        if small != characters[code] and len(small) == 1:
            lower[code] = ord(small)
    kept = np.append(kept, False)
    return kept, lower
