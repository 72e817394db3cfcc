"""The rows that a block with a window computes."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from mlx_zh.core.blocks import LEAST_PIECE
from mlx_zh.planning.shapes import Row, Target


def in_block(row: Row, target: Target, window: int) -> tuple[Row, Target]:
    """What a block with a `window` (0: none) computes of `row`, and how: in pieces, which have a mask of their own.

    Metal's fused attention has no backward pass for such a mask, so the scores of the pieces are kept there too. On
    a CPU, attention in float32 is cut in pieces of 256 queries where no window applies.
    """
    if not window or all(keys <= window for _, keys in row.segments):
        return (replace(row, cut=True) if target.attention_of_products else row), target
    if target.attention_tile:
        target = replace(target, fused_attention=False, attention_tile=0, masked=True)
    return _pieces(row, window), target


@lru_cache(maxsize=64)
def _pieces(row: Row, window: int) -> Row:
    """The row with each segment cut as `core.blocks` cuts it: a piece sees the piece before it and itself."""
    size, segments = max(window, LEAST_PIECE), []
    for tokens, keys in row.segments:
        before = min(keys - tokens, window - 1)
        for start in range(0, tokens, size):
            count = min(size, tokens - start)
            segments.append((count, before + count))
            before = count
    return Row(tuple(segments), row.scored)
