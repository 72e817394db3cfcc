"""How much of a row is computed again: the cheapest levels with which it stays within its memory.

The decision depends on sizes and the limit alone, so the same recipe and limit always give the same levels.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlx_zh.core.logprobs import chunk_rows
from mlx_zh.core.recompute import ALL, Levels
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.planning.memory import backward_blocks, step_memory
from mlx_zh.planning.shapes import ModelShape, Row, Target
from mlx_zh.recipe import Memory

# What making cheap parts again costs of a block's forward pass, and of its forward and backward pass with three times
# that. Measured on a CPU: a sigmoid takes 3.3 ns there, as long as 85 multiplications of a matrix product.
_SIGMOID = 85


def rungs(blocks: int, target: Target) -> list[Levels]:
    """All levels of a row, from the fastest to the smallest; `blocks` is how many a gradient goes through.

    First the cheap parts of one block after another are made again; on a GPU always those of all. Then one block
    after another is computed again whole. Making cheap parts again saves ten times as many bytes for its time, so no
    other order is faster.
    """
    if target.fused_attention:
        return [Levels(ALL, whole) for whole in range(blocks + 1)]
    return [Levels(pieces) for pieces in range(blocks + 1)] + [Levels(blocks, n) for n in range(1, blocks + 1)]


def asked_for(settings: Memory, target: Target, blocks: int) -> Levels | None:
    """The levels of `blocks` blocks that `memory.checkpoint_layers` names; None for `auto`."""
    asked = settings.checkpoint_layers
    if asked == "auto":
        return None
    return Levels(ALL if target.fused_attention else 0, blocks if asked is True else min(int(asked), blocks))


def levels_of(
    model: ModelShape, trained: AdapterSpec, target: Target, row: Row, settings: Memory, limit: float | None
) -> Levels:
    """The levels of `row`. With `auto`, the fastest whose peak is within `limit` bytes, or the smallest if none is.

    The row is taken to be one of several of a step, which need the sum of the gradients so far.
    """
    blocks = backward_blocks(model, trained)
    asked = asked_for(settings, target, blocks)
    if asked is not None:
        return asked
    ladder = rungs(blocks, target)
    if limit is None:
        return ladder[0]
    return _first_within(ladder, model, trained, target, row, settings, limit)


def _first_within(
    ladder: Sequence[Levels],
    model: ModelShape,
    trained: AdapterSpec,
    target: Target,
    row: Row,
    settings: Memory,
    limit: float,
) -> Levels:
    logit_rows = settings.logit_rows or chunk_rows(model.vocabulary, limit)
    for levels in ladder:
        if step_memory(model, trained, target, row, levels, logit_rows=logit_rows).peak <= limit:
            return levels
    return ladder[-1]


def recomputed(levels: Levels, blocks: int) -> int:
    """How many of `blocks` blocks are computed again whole."""
    return min(levels.blocks, blocks)


def extra_share(levels: Levels, model: ModelShape, trained: AdapterSpec, target: Target) -> float:
    """How many more blocks' forward passes the levels cost, as a share of those of all blocks."""
    blocks = backward_blocks(model, trained)
    whole = recomputed(levels, blocks)
    pieces = 0 if target.fused_attention else max(min(levels.pieces, blocks) - whole, 0)
    sigmoid = _SIGMOID * model.intermediate / model.block_values
    return (whole + pieces * sigmoid) / max(model.layers, 1)
