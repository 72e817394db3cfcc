"""float16: where it is faster than bfloat16, and what to do when it overflows."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_zh.core.families import Config
from mlx_zh.core.logprobs import decoder, residual_stream
from mlx_zh.language.notice import Notice
from mlx_zh.recipe import Recipe
from mlx_zh.stages.memory_check import dtype_of
from mlx_zh.system import device
from mlx_zh.training.objective import Row


def advice(recipe: Recipe | None, config: Config | None) -> Notice | None:
    """The advice to use float16, on a chip that has no bfloat16 arithmetic; None where it would change nothing.

    `config` is the model's config.json, if it is known.
    """
    if not device.emulates_bfloat16():
        return None
    if recipe is not None and dtype_of(recipe, config or {}) != "bfloat16":
        return None
    return Notice("float16-faster", chip=device.chip())


def overflow(model: nn.Module, rows: Sequence[Row]) -> Notice | None:
    """Where a skipped step of a float16 model overflowed, and what to do; None for a model of another type.

    `rows` are those of the step. The forward pass is run again without noise.
    """
    if decoder(model).norm.weight.dtype != mx.float16:
        return None
    layers = len(decoder(model).layers)
    for row in rows:
        for block, hidden in enumerate(residual_stream(model, row.batch)):
            if not mx.isfinite(hidden).all().item():
                return Notice("float16-overflow", place=Notice("float16-in-block", block=block, layers=layers))
    return Notice("float16-overflow", place=Notice("float16-in-gradients"))
