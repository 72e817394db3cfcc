"""Products of rows with frozen quantized weights: by MLX's quantized kernel, or with the weight unpacked for each.

A quantized kernel reads less memory, which counts for a few rows. For many rows a dense product may be faster by more
than unpacking takes, which depends on the device. So rules say from how many rows on a product goes the dense way;
`core.product_speed` measures them. Without rules, every product goes the quantized way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

# The form of a product (`form_of`), and the smallest number of rows from which on it goes the dense way.
Rules = dict[str, int]
Packed = tuple[mx.array, mx.array, mx.array | None]  # a layer's weight, scales and biases
QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding)

_rules: Rules = {}


def use(rules: Mapping[str, int]) -> None:
    """Compute by these rules from now on. Other rules round sums otherwise."""
    global _rules
    _rules = dict(rules)


def current() -> Rules:
    """The rules that products go by; empty if all go the quantized way."""
    return dict(_rules)


def agreed(by_rank: Iterable[Mapping[str, int]]) -> Rules:
    """The rules of several ranks: a product goes the dense way only where it does so on all of them."""
    first, *others = by_rank
    shared = [form for form in first if all(form in rules for rules in others)]
    return {form: max(rules[form] for rules in (first, *others)) for form in shared}


class FrozenLinear(nn.QuantizedLinear):
    """MLX's quantized linear layer, computed by the rules."""

    def __call__(self, x: mx.array) -> mx.array:
        if not _is_dense(self, x):
            quantized: mx.array = super().__call__(x)
            return quantized
        out = dense_product(self, x)
        return out + self.bias if "bias" in self else out


def install(model: nn.Module) -> None:
    """Let the quantized linear layers of a model be computed by the rules. Their arrays stay as they are."""
    for module in model.modules():
        if type(module) is nn.QuantizedLinear:
            module.__class__ = FrozenLinear


def dense_product(layer: Any, x: mx.array) -> mx.array:
    """`x` (..., inputs) times the layer's unpacked weight, without its bias: (..., outputs).

    The weight is unpacked again in the backward pass, and is kept by neither. No gradient goes to it.
    """
    kind = computed_in(layer, x.dtype)
    packed = layer.weight, layer.scales, layer.get("biases")  # not arguments, whose gradients MLX would ask for

    @mx.custom_function
    def product(x: mx.array) -> mx.array:
        return x @ _weight(layer, packed, kind, after=x).T

    @product.vjp
    def vjp(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:
        return cotangent @ _weight(layer, packed, kind, after=cotangent)

    result: Any = product(x if x.dtype == kind else x.astype(kind))
    return result


def unpacked(head: Any, x: mx.array) -> Any:
    """An output head, or, where the rules say so for the rows of `x`, a layer with its unpacked weight."""
    return _Dense(head, x) if isinstance(head, QUANTIZED) and _is_dense(head, x) else head


class _Dense(nn.Module):
    """The unpacked weight (V, D) of a quantized layer, and its bias."""

    def __init__(self, layer: Any, x: mx.array) -> None:
        nn.Module.__init__(self)
        kind = computed_in(layer, x.dtype)
        self.weight = _weight(layer, (layer.weight, layer.scales, layer.get("biases")), kind, after=x)
        if "bias" in layer:
            self.bias = layer.bias

    def __call__(self, x: mx.array) -> mx.array:
        out = x @ self.weight.T
        return out + self.bias if "bias" in self else out


def form_of(layer: Any, dtype: mx.Dtype) -> str:
    """What decides which way of the layer's product is faster, with rows of type `dtype`."""
    outputs, words = layer.weight.shape
    inputs = words * 32 // layer.bits
    return form(computed_in(layer, dtype), layer.bits, layer.group_size, layer.mode, outputs, inputs)


def form(dtype: mx.Dtype, bits: int, group: int, mode: str, outputs: int, inputs: int) -> str:
    """The form of a product, as `form_of`."""
    return f"{str(dtype).rpartition('.')[2]} {mode} {bits} bits {group} {outputs}x{inputs}"


def _is_dense(layer: Any, x: mx.array) -> bool:
    if not _rules:
        return False
    least = _rules.get(form_of(layer, x.dtype))
    return least is not None and x.size // x.shape[-1] >= least


def computed_in(layer: Any, dtype: mx.Dtype) -> mx.Dtype:
    """The type in which MLX's kernel unpacks the weight: that of the rows; in mode affine, scales may be wider."""
    return mx.result_type(dtype, layer.scales.dtype) if layer.mode == "affine" else dtype


def _weight(layer: Any, packed: Packed, dtype: mx.Dtype, *, after: mx.array) -> mx.array:
    """The dense weight (outputs, inputs). It is not unpacked before `after` is computed, so that few are alive."""
    (weight,) = mx.depends([packed[0]], [after])
    scales, biases = packed[1:]
    if layer.mode == "affine" and scales.dtype != dtype:
        scales, biases = scales.astype(dtype), None if biases is None else biases.astype(dtype)
    form = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    return mx.dequantize(weight, scales, biases, **form, dtype=dtype)
