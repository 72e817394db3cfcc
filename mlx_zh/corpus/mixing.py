"""Which rows of each source are used, and which belong to the validation set: functions of contents and seed alone.

The rows with the smallest seeded hashes of their texts are picked, so a larger `max_samples` keeps the rows of a
smaller one. The hash of its prompt decides whether a row is for validation, so a growing data set moves no row from
one split to the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mlx_zh.system.splitmix import mix64

Indices = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


def pick(rows: Indices, hashes: Hashes, count: int | None, seed: int) -> Indices:
    """`count` random rows out of `rows`, in their own order. `hashes` (N,) are those of all rows' texts."""
    if count is None or count >= len(rows):
        return rows
    keys = mix64(hashes[rows] ^ mix64(np.array([seed], dtype=np.uint64)))
    return np.sort(rows[np.argsort(keys, kind="stable")[:count]])


def is_validation(prompts: Hashes, fraction: float) -> npt.NDArray[np.bool_]:
    """Whether each row belongs to the validation set (N,). `prompts` (N,) are the hashes of the rows' prompts."""
    return mix64(prompts) < np.uint64(min(int(fraction * 2**64), 2**64 - 1))


def mix(sources: Sequence[Indices], weights: Sequence[float], mixing: str, hashes: Hashes, seed: int) -> Indices:
    """The training rows of all sources in training order, with weights applied.

    "concat": one source follows the other, and a source of weight w gives w times its rows. "interleave": sources
    alternate and the weights are their shares; the total is as large as it can be without a repeated row.
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
    positions = np.concatenate([(np.arange(len(rows)) + 0.5) / max(len(rows), 1) for rows in taken] or [np.empty(0)])
    return joined[np.argsort(positions, kind="stable")]


def _times(rows: Indices, count: int, hashes: Hashes, seed: int) -> Indices:
    """`count` rows: as many whole copies of `rows` as fit, and random rows for the rest."""
    if not len(rows):
        return rows
    copies, rest = divmod(count, len(rows))
    return np.concatenate([*[rows] * copies, pick(rows, hashes, rest, seed)])
