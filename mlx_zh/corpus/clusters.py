"""Clusters of rows that use the same words: spherical k-means on hashed bigrams of letters, without a model.

A row is the sum of two unit vectors, one of what is asked and one of what is answered. Each letter bigram adds its
inverse document frequency to one of `SIZE` values, with a sign: both come from a hash (Weinberger et al., 2009). The
centres are computed on the rows with the smallest hashes, so a set that grows a little keeps most of its clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_zh.corpus.shingles import Hashes, Offsets, letters

Vectors = npt.NDArray[np.float16]
Sides = tuple[str, str]  # what is asked, and what is answered

SIZE = 256  # of a row's vector
_NGRAM = 2
_BUCKETS = 1 << 18  # of the table of document frequencies
_LETTERS = 1000  # of a side that count
_SAMPLE = 20_000  # rows on which document frequencies and centres are computed
_ROUNDS = 10
_BLOCK = 8192  # rows compared with all centres at once


def cluster_count(rows: int) -> int:
    """The number of clusters of so many rows: about twice the square root, a power of two."""
    return 1 << int(np.log2(max(2 * rows**0.5, 1)))


def sampled(hashes: Hashes) -> npt.NDArray[np.bool_]:
    """Which rows (N,) are in the sample: those with the smallest hashes of their texts."""
    if len(hashes) <= _SAMPLE:
        return np.ones(len(hashes), dtype=bool)
    return hashes <= np.partition(hashes, _SAMPLE - 1)[_SAMPLE - 1]


def clusters(hashes: Hashes, sides: Callable[[], Iterable[Sequence[Sides]]]) -> npt.NDArray[np.int64]:
    """The cluster of each row (N,).

    `sides` gives the rows in batches, in the order of `hashes` (N,); it is called twice.
    """
    if not len(hashes):
        return np.empty(0, dtype=np.int64)
    sample = sampled(hashes)
    weights = _inverse_frequencies(_chosen(sides(), sample))
    vectors = np.concatenate([_vectors(batch, weights) for batch in sides()])
    members = np.flatnonzero(sample)
    members = members[np.argsort(hashes[members], kind="stable")]
    centres = _centres(vectors[members].astype(np.float32), cluster_count(len(hashes)))
    return _nearest(vectors, centres)


def _chosen(batches: Iterable[Sequence[Sides]], sample: npt.NDArray[np.bool_]) -> Iterator[list[Sides]]:
    start = 0
    for batch in batches:
        yield [row for row, wanted in zip(batch, sample[start : start + len(batch)], strict=True) if wanted]
        start += len(batch)


def _grams(texts: Sequence[str]) -> tuple[Hashes, Offsets]:
    return letters([text[:_LETTERS] for text in texts]).ngrams(_NGRAM)


def _inverse_frequencies(batches: Iterable[Sequence[Sides]]) -> npt.NDArray[np.float32]:
    """log((1 + rows) / (1 + rows with the bigram)) of each bucket of bigrams, (_BUCKETS,)."""
    seen, count = np.zeros(_BUCKETS), 0
    for batch in batches:
        if batch:
            grams, offsets = _grams(["".join(sides) for sides in batch])
            rows = np.repeat(np.arange(len(batch), dtype=np.uint64), np.diff(offsets))
            each = np.unique(rows << np.uint64(32) | grams % np.uint64(_BUCKETS))
            seen += np.bincount((each & np.uint64(0xFFFFFFFF)).astype(np.int64), minlength=_BUCKETS)
            count += len(batch)
    return np.log((1 + count) / (1 + seen)).astype(np.float32)


def _vectors(batch: Sequence[Sides], weights: npt.NDArray[np.float32]) -> Vectors:
    """The vectors of a batch of rows, (B, SIZE)."""
    total = np.zeros((len(batch), SIZE))
    for side in range(2):
        grams, offsets = _grams([sides[side] for sides in batch])
        rows = np.repeat(np.arange(len(batch)), np.diff(offsets))
        place = (grams >> np.uint64(32)) % np.uint64(SIZE)
        sign = np.where(grams >> np.uint64(63), 1.0, -1.0)
        values = sign * weights[(grams % np.uint64(_BUCKETS)).astype(np.int64)]
        flat = np.bincount(rows * SIZE + place.astype(np.int64), values, minlength=len(batch) * SIZE)
        total += _unit(flat.reshape(-1, SIZE))
    return _unit(total).astype(np.float16)


def _unit(vectors: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Each vector at length 1; a vector of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


def _centres(vectors: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.float32]:
    """Centres (count, SIZE) of spherical k-means on `vectors` (M, SIZE), which begins with the first rows."""
    centres = vectors[:count]
    for _ in range(_ROUNDS):
        nearest = _nearest(vectors, centres)
        order = np.argsort(nearest, kind="stable")
        present, starts = np.unique(nearest[order], return_index=True)
        moved = centres.copy()  # a centre without rows stays
        moved[present] = _unit(np.add.reduceat(vectors[order], starts, axis=0))
        centres = moved
    return centres


def _nearest(vectors: npt.NDArray[Any], centres: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """The centre (R,) with the largest scalar product with each vector (R, SIZE)."""
    transposed = np.ascontiguousarray(centres.T)
    blocks = [
        (vectors[start : start + _BLOCK].astype(np.float32) @ transposed).argmax(axis=1)
        for start in range(0, len(vectors), _BLOCK)
    ]
    return np.concatenate(blocks)
