"""Which rows of which sources are learned from, and which validate: pure functions of the rows' contents and a seed.

Rows are picked by the smallest of seeded hashes of their text, so a larger `max_samples` keeps the rows of a smaller
one; a row validates if the hash of its prompt says so, so growing a set moves no row from one side to the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mlx_zh.system.splitmix import mix64

Indices = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


def pick(rows: Indices, hashes: Hashes, count: int | None, seed: int) -> Indices:
    """`count` of `rows` at random, in their own order; `hashes` (N,) are of all rows' texts."""
    if count is None or count >= len(rows):
        return rows
    keys = mix64(hashes[rows] ^ mix64(np.array([seed], dtype=np.uint64)))
    return np.sort(rows[np.argsort(keys, kind="stable")[:count]])


def validates(prompts: Hashes, fraction: float) -> npt.NDArray[np.bool_]:
    """Whether each row (N,) belongs to the validation set, by the hash of its prompt."""
    return mix64(prompts) < np.uint64(min(int(fraction * 2**64), 2**64 - 1))


def mix(sources: Sequence[Indices], weights: Sequence[float], mixing: str, hashes: Hashes, seed: int) -> Indices:
    """The rows of all sources as they are trained on, weights applied.

    "concat": a source of weight w gives w times its rows, one source after the other. "interleave": weights are
    shares of the whole, which is as large as it can be without a row twice; sources alternate by their shares.
    """
    if mixing == "concat":
        wanted = [round(weight * len(rows)) for rows, weight in zip(sources, weights, strict=True)]
    else:
        total = min((len(rows) / weight for rows, weight in zip(sources, weights, strict=True)), default=0.0)
        wanted = [min(round(total * weight), len(rows)) for rows, weight in zip(sources, weights, strict=True)]
    taken = [_times(rows, count, hashes, seed) for rows, count in zip(sources, wanted, strict=True)]
    joined = np.concatenate([*taken, np.empty(0, dtype=np.int64)])
    if mixing == "concat":
        return joined
    places = np.concatenate([(np.arange(len(rows)) + 0.5) / max(len(rows), 1) for rows in taken] or [np.empty(0)])
    return joined[np.argsort(places, kind="stable")]


def _times(rows: Indices, count: int, hashes: Hashes, seed: int) -> Indices:
    """`count` rows: whole copies, and a random part for the rest."""
    if not len(rows):
        return rows
    copies, rest = divmod(count, len(rows))
    return np.concatenate([*[rows] * copies, pick(rows, hashes, rest, seed)])
