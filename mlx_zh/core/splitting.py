"""Cutting an array into many parts, so that the gradient of a part is no larger than the part."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

_MOST = 10  # parts of an `mx.split`


def split_at(array: mx.array, cuts: Sequence[int], *, axis: int) -> list[mx.array]:
    """`array` cut along `axis` before each of `cuts`, which ascend.

    The gradient of up to ten parts is their concatenation. MLX slices more parts than that out of the array one by
    one, and then the gradient of each is an array of zeros as large as the whole. So many parts are cut in rounds.
    """
    count = len(cuts) + 1
    if count == 1:
        return [array]
    size = 1  # parts of a piece of this round
    while count > size * _MOST:
        size *= _MOST
    outer = list(cuts[size - 1 :: size])
    pieces: list[mx.array] = list(mx.split(array, outer, axis=axis))
    if size == 1:
        return pieces
    parts: list[mx.array] = []
    for index, (start, piece) in enumerate(zip([0, *outer], pieces, strict=True)):
        own = cuts[index * size : (index + 1) * size - 1]
        parts += split_at(piece, [position - start for position in own], axis=axis)
    return parts
