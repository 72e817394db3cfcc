"""What a block computes again in the backward pass, so that the forward pass need not keep it.

A ladder of three levels. At level 0 a block keeps all that its gradient needs. At level 1 it makes cheap parts again:
normalized inputs, LoRA's low-rank values, dropout masks, SiLU and the product of an MLP. At level 2 it keeps its
input alone and is computed again as a whole, at level 1. The numbers are the same at every level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_zh.core.places import put, trained_places
from mlx_zh.system import device

Compute = Callable[..., tuple[mx.array, ...]]
ALL = 2**31  # more blocks than any model has


@dataclass(frozen=True, slots=True)
class Levels:
    """How many blocks are at which level, counted from the lowest block that a gradient goes through.

    The `blocks` lowest are at level 2, and those above them are at level 1 up to number `pieces`. The lowest come
    first because the backward pass reaches them last, when what the others kept has been freed.
    """

    pieces: int = 0
    blocks: int = 0

    def of(self, index: int) -> int:
        """The level of block number `index`."""
        return 2 if index < self.blocks else 1 if index < self.pieces else 0


def levels(checkpoint: bool | Levels) -> Levels:
    """`checkpoint` as levels: true computes every block again, false none. On a GPU, cheap parts are made again."""
    if isinstance(checkpoint, Levels):
        return checkpoint
    return Levels(ALL if device.remakes_cheaply() else 0, ALL if checkpoint else 0)


def again(
    modules: Sequence[nn.Module], compute: Compute, *inputs: mx.array, first: Compute | None = None
) -> tuple[mx.array, ...]:
    """`compute(*inputs)`, which is computed again in the backward pass. Between the two only `inputs` are kept.

    `compute` may use the trained weights of `modules` and of no other module. MLX computes only what the gradient
    needs, so a frozen linear layer at the end of `compute` costs nothing a second time. `first` computes the same in
    the forward pass, where `compute` has parts that only a gradient needs.
    """
    places = [place for module in modules for place in trained_places(module)]
    own = [holder[key] for holder, key in places]
    context = copy_context()  # the backward pass is built when the context of the noise has been left

    def run(*values: mx.array) -> tuple[mx.array, ...]:
        put(places, values[len(inputs) :])
        try:
            return compute(*values[: len(inputs)])
        finally:  # no array of this trace stays in a module
            put(places, own)

    @mx.custom_function
    def kept(*values: mx.array) -> tuple[mx.array, ...]:
        return (first or compute)(*values[: len(inputs)])  # the weights are those that the modules hold

    @kept.vjp
    def vjp(primals: Any, cotangents: Any, _: Any) -> Any:
        values = list(primals) if isinstance(primals, list | tuple) else [primals]
        gradients = list(cotangents) if isinstance(cotangents, list | tuple) else [cotangents]
        # Without the dependency MLX may compute this ahead, while all other blocks' arrays are still in memory.
        values[: len(inputs)] = mx.depends(values[: len(inputs)], gradients)
        _, result = context.run(mx.vjp, run, values, gradients)
        return result[0] if len(values) == 1 else tuple(result)

    outputs: Any = kept(*inputs, *own)
    return tuple(outputs) if isinstance(outputs, list | tuple) else (outputs,)
