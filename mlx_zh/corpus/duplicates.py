"""Exact and near duplicates among all rows of all sources.

Near duplicates are found by MinHash (Broder, 1997) and banded locality-sensitive hashing: rows that agree in all
hashes of a band are compared by their whole signatures, and then by the letters of prompts and of answers: many
questions with one answer, or many about one long text, are no repeats. Signatures and letters stay on disk and one
band is sorted at a time, so memory grows by only a few bytes a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from rensa import RMinHash

from mlx_zh.corpus.shingles import Letters

# The probability that two rows of Jaccard similarity s agree in a band is 1 - (1 - s^8)^16: 0.95 at 0.8, 0.61 at 0.7.
BANDS, ROWS = 16, 8
HASHES = BANDS * ROWS
SIGNATURE_BYTES = HASHES * 2
_SEED = 20240726
_BLOCK = 2048  # pairs compared, or rows read, at once
_MIX = np.uint32(0x9E3779B1)
SIDES = 2  # of a row: what the user says, and everything else
SIDE_LETTERS = 1000  # of each side that are kept to compare it
SIDE_BYTES = 2  # of a letter
_SIDE_NGRAM = 3
# A side may differ more than the whole row, because one changed letter changes three n-grams of a short question.
_SIDE_SHARE = 0.6  # of the threshold

Kept = npt.NDArray[np.bool_]
Pairs = npt.NDArray[np.int64]  # (P, 2) numbers of rows: a later one, an earlier one


def sketch(texts: Letters, ngram: int) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint32]]:
    """MinHash signatures (N, HASHES), the low 16 bits of each hash, and the hash of each band (N, BANDS)."""
    grams, offsets = texts.ngrams(ngram)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(grams, offsets.astype(np.uint64), HASHES, _SEED)
    full = np.array(matrix.to_rows(), dtype=np.uint32).reshape(len(offsets) - 1, HASHES)
    bands = np.zeros((len(full), BANDS), dtype=np.uint32)
    for i in range(ROWS):
        bands = bands * _MIX + full[:, i::ROWS]
        bands ^= bands >> np.uint32(15)
    return full.astype(np.uint16), bands


@dataclass(frozen=True)
class Rows:
    """The hashes of the N rows of one source, in the order of the source."""

    exact: npt.NDArray[np.uint64]  # (N, 2) 128-bit hash of the text
    numbers: npt.NDArray[np.uint64]  # (N,) hash of the numbers in the prompt; exercises with other numbers differ
    signatures: Path | None  # N x HASHES uint16; None if near duplicates are not searched for
    bands: Path | None  # N x BANDS uint32
    letters: Path | None = None  # uint16 hashes of the first letters of each side, row after row
    sizes: npt.NDArray[np.uint16] | None = None  # (N, SIDES) how many letters of each side `letters` has


def find_exact(sources: Sequence[Rows], kept: Kept) -> npt.NDArray[np.int64]:
    """For each row (N,), numbered through all sources, the first row that it repeats, or -1.

    Only the rows where `kept` (N,) is true are compared.
    """
    members = np.flatnonzero(kept)
    hashes = np.concatenate([rows.exact for rows in sources])[members]
    order = np.lexsort((members, hashes[:, 1], hashes[:, 0]))
    same = np.zeros(len(order), dtype=bool)
    same[1:] = (hashes[order[1:]] == hashes[order[:-1]]).all(axis=1)
    firsts = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
    earlier = np.full(len(kept), -1, dtype=np.int64)
    earlier[members[order]] = np.where(same, members[order[firsts]], -1)
    return earlier


def find_near(sources: Sequence[Rows], kept: Kept, threshold: float) -> npt.NDArray[np.int64]:
    """For each row (N,) an earlier row with an estimated Jaccard similarity of at least `threshold`, or -1.

    Where the letters of both rows are known, their prompts and their answers must be alike too. Only the rows where
    `kept` (N,) is true are compared, and the earlier row is never a near duplicate itself.
    """
    starts = np.concatenate([[0], np.cumsum([len(rows.exact) for rows in sources])])
    numbers = np.concatenate([rows.numbers for rows in sources])
    members = np.concatenate(
        [
            starts[i] + np.flatnonzero(kept[starts[i] : starts[i + 1]])
            for i, rows in enumerate(sources)
            if rows.bands is not None
        ]
        or [np.empty(0, dtype=np.int64)]
    )
    similar = np.empty((0, 2), dtype=np.int64)
    with _SignatureFiles([rows.signatures for rows in sources], starts, SIGNATURE_BYTES) as signatures:
        for band in range(BANDS):
            close = [similar]
            for later, earlier in _bucket_pairs(_band(sources, starts, members, band), members):
                alike = numbers[later] == numbers[earlier]
                pairs = np.stack([later[alike], earlier[alike]], axis=1)
                for first in range(0, len(pairs), _BLOCK):
                    block = pairs[first : first + _BLOCK]
                    equal = signatures.read(block[:, 0]) == signatures.read(block[:, 1])
                    close.append(block[equal.mean(axis=1) >= threshold])
            similar = np.unique(np.concatenate(close), axis=0)
    return _first_alike(similar, _Sides(sources, starts), _SIDE_SHARE * threshold, len(kept))


def _first_alike(pairs: Pairs, sides: _Sides, threshold: float, count: int) -> npt.NDArray[np.int64]:
    """For each of `count` rows the first row of its `pairs` (P, 2), sorted, whose sides are alike, or -1."""
    repeats = np.full(count, -1, dtype=np.int64)
    for first in range(0, len(pairs), _BLOCK):
        block = pairs[first : first + _BLOCK]
        block = block[(repeats[block] < 0).all(axis=1)]
        for row, before in block[sides.alike(block, threshold)].tolist():
            if repeats[before] < 0 and repeats[row] < 0:
                repeats[row] = before
    return repeats


def _bucket_pairs(
    keys: npt.NDArray[np.uint32], members: npt.NDArray[np.int64]
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Pairs (later rows, earlier rows) with the same key: each row with the one before it and with the first.

    A bucket of n rows has n² pairs, too many to compare; a duplicate nearly always resembles the first row too.
    """
    order = np.argsort(keys, kind="stable")  # stable: rows stay in order inside a bucket
    same = np.zeros(len(order), dtype=bool)
    same[1:] = keys[order[1:]] == keys[order[:-1]]
    firsts = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
    at = np.flatnonzero(same)
    rows = members[order]
    beyond = at[firsts[at] < at - 1]
    return [(rows[at], rows[at - 1]), (rows[beyond], rows[firsts[beyond]])]


def _band(
    sources: Sequence[Rows], starts: npt.NDArray[np.int64], members: npt.NDArray[np.int64], band: int
) -> npt.NDArray[np.uint32]:
    """The hashes of one band for the given rows (M,), read in blocks."""
    column = np.zeros(starts[-1], dtype=np.uint32)
    for rows, start in zip(sources, starts, strict=False):
        if rows.bands is None:
            continue
        with rows.bands.open("rb") as file:
            while len(block := np.fromfile(file, dtype=np.uint32, count=_BLOCK * BANDS)):
                hashes = block.reshape(-1, BANDS)[:, band]
                column[start : start + len(hashes)] = hashes
                start += len(hashes)
    return column[members]


class _SignatureFiles:
    """The signature files of all sources, read by row number."""

    def __init__(self, paths: Sequence[Path | None], starts: npt.NDArray[np.int64], size: int) -> None:
        self._paths, self._starts, self._size = paths, starts, size
        self._open: dict[int, BinaryIO] = {}

    def __enter__(self) -> _SignatureFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()

    def read(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint16]:
        """Signatures (R, HASHES) of the given rows."""
        signatures = np.empty((len(rows), self._size // 2), dtype=np.uint16)
        source_of = np.searchsorted(self._starts, rows, side="right") - 1
        for i, (row, source) in enumerate(zip(rows.tolist(), source_of.tolist(), strict=True)):
            file = self._open.get(source)
            if file is None:
                path = self._paths[source]
                assert path is not None
                file = self._open[source] = path.open("rb")
            file.seek((row - int(self._starts[source])) * self._size)
            signatures[i] = np.frombuffer(file.read(self._size), dtype=np.uint16)
        return signatures


class _Sides:
    """The letters of the rows' sides, read by row number."""

    def __init__(self, sources: Sequence[Rows], starts: npt.NDArray[np.int64]) -> None:
        self._sources, self._starts = sources, starts
        self._ends = [
            None if rows.sizes is None else np.cumsum(rows.sizes.sum(axis=1, dtype=np.int64)) for rows in sources
        ]

    def alike(self, pairs: Pairs, threshold: float) -> npt.NDArray[np.bool_]:
        """Whether both sides of each pair (P, 2) have a Jaccard similarity of at least `threshold`, (P,).

        A pair whose letters are not known is alike.
        """
        alike = np.ones(len(pairs), dtype=bool)
        grams = {row: self._grams(row) for row in np.unique(pairs).tolist()}
        for number, (row, before) in enumerate(pairs.tolist()):
            both = zip(grams[row], grams[before], strict=False)
            alike[number] = all(_jaccard(one, other) >= threshold for one, other in both)
        return alike

    def _grams(self, row: int) -> list[frozenset[bytes]]:
        """The n-grams of each side; empty where the letters are not known."""
        source = int(np.searchsorted(self._starts, row, side="right")) - 1
        rows, ends, number = self._sources[source], self._ends[source], row - int(self._starts[source])
        if rows.letters is None or rows.sizes is None or ends is None:
            return []
        sizes = rows.sizes[number].tolist()
        with rows.letters.open("rb") as file:
            file.seek((int(ends[number]) - sum(sizes)) * SIDE_BYTES)
            letters = file.read(sum(sizes) * SIDE_BYTES)
        border = sizes[0] * SIDE_BYTES
        return [_ngrams(letters[:border]), _ngrams(letters[border:])]


def _ngrams(letters: bytes) -> frozenset[bytes]:
    """The n-grams of a side; a side shorter than an n-gram is its only one."""
    size = _SIDE_NGRAM * SIDE_BYTES
    return frozenset(letters[i : i + size] for i in range(0, max(len(letters) - size, 0) + 1, SIDE_BYTES))


def _jaccard(one: frozenset[bytes], other: frozenset[bytes]) -> float:
    return len(one & other) / len(one | other)
