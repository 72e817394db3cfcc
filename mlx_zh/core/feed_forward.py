"""The MLP of a block: SwiGLU, of which only gate and up are kept for the backward pass."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu as forward_swiglu

from mlx_zh.core.exponentials import sigmoid
from mlx_zh.core.recompute import again

_PARTS = ("gate_proj", "up_proj", "down_proj")


def feed_forward(mlp: Any, norm: nn.Module | None, hidden: mx.array, *, pieces: bool) -> mx.array:
    """`mlp(norm(hidden))` of a SwiGLU, (T, D). With `pieces`, `hidden`, gate and up alone are kept for the gradient.

    The normalized input, LoRA's low-rank values, SiLU and its product with up are then made again. The products with
    the weights are not, as no gradient needs them.
    """
    gate, up = projected((mlp.gate_proj, mlp.up_proj), norm, hidden, pieces=pieces)
    if not pieces:
        whole: mx.array = mlp.down_proj(swiglu(gate, up))
        return whole
    (out,) = again((mlp.down_proj,), lambda gate, up: (product(mlp.down_proj, swiglu(gate, up)),), gate, up)
    return scaled(mlp.down_proj, out)


def projected(layers: Sequence[Any], norm: nn.Module | None, x: mx.array, *, pieces: bool) -> tuple[mx.array, ...]:
    """What each of `layers` computes of `x` (T, D), normalized by `norm`. With `pieces`, `x` alone is kept."""

    def normed(x: mx.array) -> mx.array:
        return x if norm is None else norm(x)

    def products(x: mx.array) -> tuple[mx.array, ...]:
        x = normed(x)
        return tuple(product(layer, x) for layer in layers)

    if not pieces:
        x = normed(x)
        return tuple(layer(x) for layer in layers)
    outputs = again([*([] if norm is None else [norm]), *layers], products, x)
    return tuple(scaled(layer, out) for layer, out in zip(layers, outputs, strict=True))


def product(layer: Any, x: mx.array) -> mx.array:
    """What a layer computes of `x`, up to the last factor if it has one (`product` and `scaled`, as DoRA's)."""
    compute: Any = layer.product if hasattr(type(layer), "product") else layer
    result: mx.array = compute(x)
    return result


def scaled(layer: Any, out: mx.array) -> mx.array:
    """A layer's output, from what `product` returned."""
    if not hasattr(type(layer), "scaled"):  # asked of the class: a module looks up what it lacks slowly
        return out
    result: mx.array = layer.scaled(out)
    return result


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """SiLU(gate) * up: (T, F), (T, F) -> (T, F). The sigmoid is computed once for it and for its gradient."""
    outputs: Any = _swiglu(gate, up)
    return outputs[0]


# Not compiled: what a gradient traces, MLX 0.32.4 never compiles (`compile` in its compile.cpp passes tracers on).
@mx.custom_function
def _swiglu(gate: mx.array, up: mx.array) -> tuple[mx.array, mx.array]:
    """SwiGLU with the roundings of the model's own, and the sigmoid of gate."""
    values = sigmoid(gate)
    return gate * values * up, values


@_swiglu.vjp
def _swiglu_vjp(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array]:
    """The gradients with respect to gate and up, in the order of MLX's own, so that no bit differs."""
    gate, up = primals
    cotangent, values = cotangents[0], outputs[1]
    of_silu = cotangent * up
    of_gate = of_silu * values + of_silu * gate * (values * (1 - values))
    return of_gate, cotangent * (gate * values)


_KNOWN: dict[tuple[Any, ...], bool] = {}  # kinds of MLP -> whether they are SwiGLU


def is_swiglu(mlp: Any) -> bool:
    """Whether an MLP is down_proj(SiLU(gate_proj(x)) * up_proj(x)): tried on numbers in place of layers."""
    if any(not isinstance(getattr(mlp, name, None), nn.Module) for name in _PARTS):
        return False
    others = [(name, value) for name, value in mlp.items() if name not in _PARTS]
    if any(not isinstance(value, nn.Module) or value.parameters() for _, value in others):
        return False  # it has weights of its own, which `again` would not see
    settings = sorted((name, repr(value)) for name, value in vars(mlp).items() if name not in _NOT_SETTINGS)
    kind = (type(mlp), *settings, *sorted((name, repr(value)) for name, value in others))
    if kind not in _KNOWN:
        _KNOWN[kind] = _behaves_as_swiglu(mlp)
    return _KNOWN[kind]


_NOT_SETTINGS = ("_no_grad", "_training")


def _behaves_as_swiglu(mlp: Any) -> bool:
    gate, up = mx.linspace(-20, 20, 41)[None], mx.linspace(30, -10, 41)[None]
    probe = copy.copy(mlp)
    for name, result in zip(_PARTS, (gate, up, None), strict=True):
        probe.pop(name)
        object.__setattr__(probe, name, lambda x, result=result: x if result is None else result)
    try:
        found = probe(mx.zeros_like(gate))
        return isinstance(found, mx.array) and bool(mx.array_equal(found, forward_swiglu(gate, up)))
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
