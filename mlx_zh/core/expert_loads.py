"""How evenly a model with experts spreads its tokens over them, recorded while a step is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx

_LOADS: ContextVar[list[mx.array] | None] = ContextVar("expert_loads", default=None)

# Sums of a row: its tokens times what `figures` returns, both as means over its layers.
_BUSIEST, _IDLE = "experts/busiest", "experts/idle"


def has_experts(mlp: Any) -> bool:
    """Whether the MLP of a block is a choice of experts, in the form that mlx-lm's Qwen3 has."""
    return "switch_mlp" in mlp and "gate" in mlp


@contextmanager
def recording() -> Iterator[list[mx.array]]:
    """Inside this context, `record` adds each layer's share of tokens by expert to the list."""
    loads: list[mx.array] = []
    token = _LOADS.set(loads)
    try:
        yield loads
    finally:
        _LOADS.reset(token)


def record(mlp: Any, x: mx.array) -> None:
    """Record the load of an MLP's experts for its input `x` (T, D), if that is asked for."""
    loads = _LOADS.get()
    if loads is None or not has_experts(mlp):
        return
    logits = mx.stop_gradient(mlp.gate(x))  # (T, E)
    chosen = mx.argpartition(logits, kth=-mlp.top_k, axis=-1)[:, -mlp.top_k :]
    of_expert = chosen.reshape(-1)[:, None] == mx.arange(logits.shape[-1])  # (T k, E)
    loads.append(of_expert.astype(mx.float32).mean(axis=0))


def sums(loads: list[mx.array], tokens: int) -> dict[str, mx.array]:
    """What a row of so many tokens adds to the sums of its step; nothing without experts."""
    if not loads:
        return {}
    shares = mx.stack(loads)  # (layers, E)
    busiest = shares.max(axis=1).mean() * shares.shape[1]
    return {_BUSIEST: tokens * busiest, _IDLE: tokens * (shares == 0).mean()}


def no_sums(model: Any) -> dict[str, mx.array]:
    """The sums of a step without any row."""
    names = (_BUSIEST, _IDLE) if any(has_experts(layer.mlp) for layer in model.layers) else ()
    return {name: mx.array(0.0) for name in names}


def figures(sums: dict[str, float], tokens: int) -> dict[str, float]:
    """From a step's sums: the busiest expert's load as a multiple of the mean, and the share of experts without any.

    Both are means over layers and rows. Of a perfectly even choice they are 1 and 0.
    """
    return {name: sums[name] / tokens for name in (_BUSIEST, _IDLE) if name in sums and tokens}
