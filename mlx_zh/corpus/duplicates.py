"""Exact and near duplicates among all rows of all sources.

Near duplicates are found by MinHash (Broder, 1997) and banded locality-sensitive hashing: rows that agree in all
hashes of a band are compared by their whole signatures. Signatures stay on disk and one band is sorted at a time, so
memory grows by only a few bytes a row.
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

Kept = npt.NDArray[np.bool_]


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

    Only the rows where `kept` (N,) is true are compared, and the earlier row is never a near duplicate itself.
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
    similar: set[tuple[int, int]] = set()
    with _SignatureFiles([rows.signatures for rows in sources], starts, SIGNATURE_BYTES) as signatures:
        for band in range(BANDS):
            for later, earlier in _bucket_pairs(_band(sources, starts, members, band), members):
                alike = numbers[later] == numbers[earlier]
                pairs = np.stack([later[alike], earlier[alike]], axis=1)
                for first in range(0, len(pairs), _BLOCK):
                    block = pairs[first : first + _BLOCK]
                    equal = signatures.read(block[:, 0]) == signatures.read(block[:, 1])
                    close = equal.mean(axis=1) >= threshold
                    similar.update(map(tuple, block[close].tolist()))
    repeats = np.full(len(kept), -1, dtype=np.int64)
    for row, before in sorted(similar):
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
