"""What is computed before what. MLX computes lazily, so the order is decided when values are asked for.

Under a gradient nothing may be computed early: MLX then keeps every array that leads to a computed value, also those
that the gradient does not need or makes again. So the chunks of a head are only noted in the forward pass, and
computed one after another when the graph is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx

from mlx_zh.system import device

Chunk = Callable[[mx.array, mx.array], tuple[mx.array, ...]]
_noted: ContextVar[list[tuple[mx.array, ...]] | None] = ContextVar("noted", default=None)


@contextmanager
def paced() -> Iterator[list[tuple[mx.array, ...]]]:
    """Inside this context, `in_chunks` notes each chunk's arrays in the list that this gives.

    After the context, `compute_in_turn` computes them.
    """
    noted: list[tuple[mx.array, ...]] = []
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)


def compute_in_turn(noted: list[tuple[mx.array, ...]]) -> None:
    """Compute the noted arrays, each chunk after the one before it, and forget them."""
    while noted:
        mx.eval(noted.pop(0))


def in_chunks(compute: Chunk, hidden: mx.array, targets: mx.array, rows: int) -> tuple[mx.array, ...]:
    """`compute` over chunks of `rows` rows, concatenated. Lazy: a chunk depends on the one before it.

    Without that, MLX schedules the chunks together and the logits of all are in memory at once. A GPU runs ahead of
    the dependency too: on an H200, 2.7 GB for 1,024 positions of a vocabulary of 128,000. So see `paced`.
    """
    noted = _noted.get()
    parts: list[tuple[mx.array, ...]] = []
    for start in range(0, hidden.shape[0], rows):
        piece = hidden[start : start + rows]
        if parts:
            after = parts[-1] if noted is not None else (*parts[-1], pause(parts[-1][0]))
            piece = mx.depends([piece], list(after))[0]
        parts.append(compute(piece, targets[start : start + rows]))
    if len(parts) == 1:
        return parts[0]
    if noted is not None:
        noted += parts
    return _concatenated(parts)


def one_by_one(compute: Chunk, hidden: mx.array, targets: mx.array, rows: int) -> tuple[mx.array, ...]:
    """`compute` over chunks of `rows` rows, concatenated; each is computed now. Not for use under a gradient."""
    if hidden.shape[0] <= rows:
        return compute(hidden, targets)
    parts: list[tuple[mx.array, ...]] = []
    for start in range(0, hidden.shape[0], rows):
        parts.append(compute(hidden[start : start + rows], targets[start : start + rows]))
        mx.eval(parts[-1])
    return _concatenated(parts)


def pause(after: mx.array) -> mx.array:
    """A chain of tiny kernels that starts after `after` and is as long as MLX's queue of scheduled kernels.

    When the last of them is scheduled, everything before the chain has been computed and its arrays are freed.
    """
    link = after[:1]
    for _ in range(device.kernels_ahead()):
        link = -link
    return link


def _concatenated(parts: list[tuple[mx.array, ...]]) -> tuple[Any, ...]:
    return tuple(mx.concatenate(list(column)) for column in zip(*parts, strict=True))
