"""Embeddings and output heads that are trained themselves, beside adapters: float32 weights over the base's module.

The weights are cast to the model's type where they are used, so a model in half precision stays in half precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Table = nn.Embedding | nn.QuantizedEmbedding | nn.Linear | nn.QuantizedLinear


@dataclass(frozen=True)
class _Kept:
    """Holds the base's module where MLX does not look for parameters."""

    module: Any
    dtype: mx.Dtype


def float_weight(module: Any) -> tuple[mx.array, mx.Dtype]:
    """The weight (V, D) of an embedding or linear layer in float32, and the type that the layer computes in."""
    if isinstance(module, nn.QuantizedEmbedding | nn.QuantizedLinear):
        weight = mx.dequantize(
            module.weight,
            module.scales,
            module.get("biases"),
            group_size=module.group_size,
            bits=module.bits,
            mode=module.mode,
        )
        return weight.astype(mx.float32), weight.dtype
    return module.weight.astype(mx.float32), module.weight.dtype


class _TrainedTable(nn.Module):
    """A trained float32 copy of the weights (V, D) of a module, which it stands in for."""

    def __init__(self, base: Any) -> None:
        nn.Module.__init__(self)
        self.weight, dtype = float_weight(base)
        self._kept = _Kept(base, dtype)

    @property
    def base(self) -> Any:
        """The module that it stands in for, unchanged."""
        return self._kept.module

    def as_linear(self, x: mx.array) -> mx.array:
        """The logits (T, V) of hidden states (T, D)."""
        return x @ self.weight.astype(x.dtype).T


class TrainedEmbedding(_TrainedTable, nn.Embedding):
    """An embedding with trained weights, which is also the output head of a tied model."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.weight[x].astype(self._kept.dtype)  # (T,) -> (T, D)


class TrainedHead(_TrainedTable, nn.Linear):
    """An output head without bias, with trained weights."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.as_linear(x)


TRAINED_TABLES = (TrainedEmbedding, TrainedHead)
