"""Clusters of rows that use the same words: the nearest of some rows that are far from each other, without a model.

A row is the sum of two unit vectors, one of what is asked and one of what is answered. Each letter bigram adds 1 to
one of `_SIZE` values, with a sign: both come from a hash (Weinberger et al., 2009). In the order of the rows' hashes,
a row becomes a centre if it is far enough from the centres before it. So a thousand rows of one template have few
centres, and a set that grows keeps most of its centres.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_zh.corpus.shingles import Hashes, Offsets, letters

Sides = tuple[str, str]  # what is asked, and what is answered

_SIZE = 256  # of a row's vector
_NGRAM = 2
_LETTERS = 1000  # of a side that count
_SAMPLE = 10_000  # rows among which centres are sought: those with the smallest hashes of their texts
_LADDER = 64  # steps of the similarity from which a row is no centre of its own
_BLOCK = 8192  # rows compared with all centres at once


def cluster_count(rows: int) -> int:
    """The most clusters of so many rows: about twice the square root, a power of two."""
    return 1 << int(np.log2(max(2 * rows**0.5, 1)))


def clusters(hashes: Hashes, sides: Iterable[Sequence[Sides]]) -> npt.NDArray[np.int64]:
    """The cluster of each row (N,). `sides` gives the rows in batches, in the order of `hashes` (N,)."""
    if not len(hashes):
        return np.empty(0, dtype=np.int64)
    vectors = np.concatenate([_vectors(batch) for batch in sides])
    sample = np.argsort(hashes, kind="stable")[:_SAMPLE]
    return _nearest(vectors, _centres(vectors[sample].astype(np.float32), cluster_count(len(hashes))))


def _grams(texts: Sequence[str]) -> tuple[Hashes, Offsets]:
    return letters([text[:_LETTERS] for text in texts]).ngrams(_NGRAM)


def _vectors(batch: Sequence[Sides]) -> npt.NDArray[np.float16]:
    """The vectors of a batch of rows, (B, _SIZE)."""
    total = np.zeros((len(batch), _SIZE))
    for side in range(2):
        grams, offsets = _grams([sides[side] for sides in batch])
        rows = np.repeat(np.arange(len(batch)), np.diff(offsets))
        place = (grams >> np.uint64(32)) % np.uint64(_SIZE)
        sign = np.where(grams >> np.uint64(63), 1.0, -1.0)
        flat = np.bincount(rows * _SIZE + place.astype(np.int64), sign, minlength=len(batch) * _SIZE)
        total += _unit(flat.reshape(-1, _SIZE))
    return _unit(total).astype(np.float16)


def _unit(vectors: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Each vector at length 1; a vector of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


def _centres(vectors: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.float32]:
    """At most `count` of the `vectors` (M, _SIZE), as different from each other as the ladder's steps allow."""
    low, high = 0, _LADDER  # with steps of `low` there are few enough
    centres = vectors[:1]
    while high - low > 1:
        middle = (low + high) // 2
        leaders = _leaders(vectors, middle / _LADDER, count)
        if leaders is None:
            high = middle
        else:
            low, centres = middle, leaders
    return centres


def _leaders(vectors: npt.NDArray[np.float32], similar: float, limit: int) -> npt.NDArray[np.float32] | None:
    """The vectors that are less than `similar` to all leaders before them; None if they are more than `limit`."""
    leaders = np.zeros((limit, vectors.shape[1]), dtype=np.float32)
    count = 0
    for vector in vectors:
        if count == 0 or float((leaders[:count] @ vector).max()) < similar:
            if count == limit:
                return None
            leaders[count] = vector
            count += 1
    return leaders[:count]


def _nearest(vectors: npt.NDArray[Any], centres: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """The centre (R,) with the largest scalar product with each vector (R, _SIZE)."""
    transposed = np.ascontiguousarray(centres.T)
    blocks = [
        (vectors[start : start + _BLOCK].astype(np.float32) @ transposed).argmax(axis=1)
        for start in range(0, len(vectors), _BLOCK)
    ]
    return np.concatenate(blocks)
