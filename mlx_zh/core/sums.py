"""Sums of many float32 numbers, added up in groups where MLX's kernel adds them up one after another.

After n terms an accumulator is n times as large as a term, so a term loses log2(n) of its 24 bits. Over a vocabulary
of 128,000 that makes log-probs wrong by 3e-4 nats, and over the gradient of an embedding of 28 million weights it
makes a norm 3 % too small. In groups no accumulator gets more terms than `device.summed_at_once()`.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlx_zh.core.exponentials import exp_below, in_pieces
from mlx_zh.system import device


def sum_last(values: mx.array) -> mx.array:
    """The sum over the last axis: (..., n) -> (...)."""
    return _in_groups(lambda part: part.sum(axis=-1), values)


def total(values: mx.array) -> mx.array:
    """The sum of all entries: (...) -> ()."""
    return sum_last(values.reshape(-1))


def norm(values: mx.array) -> mx.array:
    """The Euclidean norm of all entries in float32: (...) -> ()."""
    return mx.sqrt(total(mx.square(values.astype(mx.float32))))


def log_sum_exp(logits: mx.array) -> mx.array:
    """log sum exp of finite numbers over the last axis: (..., V) -> (...). On a Linux CPU it has no gradient."""
    if logits.dtype == mx.float32 and device.computes_exponentials_singly():
        largest = logits.max(axis=-1, keepdims=True)
        sums = in_pieces(lambda part, top: sum_last(exp_below(part, top))[..., None], logits, largest)
        return (largest + mx.log(sums))[..., 0]
    return _in_groups(lambda part: mx.logsumexp(part, axis=-1), logits)


def exponentials(logits: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """The softmax over the last axis as a quotient, and log sum exp: (..., V) -> (..., V), (..., 1), (..., 1).

    The softmax is the first array divided by the second. Undivided it saves an array as large as the logits.
    """
    largest = logits.max(axis=-1, keepdims=True)
    if device.summed_at_once():
        values = exp_below(logits, largest)
        divisor = sum_last(values)[..., None]
        return values, divisor, largest + mx.log(divisor)
    # The largest probability is 1 / sum(exp(logits - max)). So log-sum-exp needs no second exponential, and the
    # logarithm is accurate, since that probability is at least 1 / V.
    values = mx.softmax(logits, axis=-1)
    return values, mx.ones_like(largest), largest - mx.log(values.max(axis=-1, keepdims=True))


def softmax(logits: mx.array) -> tuple[mx.array, mx.array]:
    """The softmax over the last axis, and log sum exp: (..., V) -> (..., V), (..., 1)."""
    values, divisor, normalizer = exponentials(logits)
    return (values / divisor if device.summed_at_once() else values), normalizer


def _in_groups(reduced: Callable[[mx.array], mx.array], values: mx.array) -> mx.array:
    """`reduced` over the last axis: of groups, then of the groups' results."""
    group = device.summed_at_once()
    while 0 < group < values.shape[-1]:
        whole = values.shape[-1] // group * group
        parts = reduced(values[..., :whole].reshape(*values.shape[:-1], -1, group))  # (..., whole) -> (..., groups)
        if whole < values.shape[-1]:
            parts = mx.concatenate([parts, reduced(values[..., whole:])[..., None]], axis=-1)
        values = parts
    return reduced(values)
