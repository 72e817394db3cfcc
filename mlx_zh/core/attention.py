"""Attention of a segment to its own tokens and to those of its ancestors."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_zh.core.exponentials import LOG2_E, power_below
from mlx_zh.core.splitting import split_at
from mlx_zh.system import device


def causal_attention(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, window: int | None = None
) -> mx.array:
    """Attention (1, H, n, d) of the last n tokens of a sequence: (1, H, n, d), (1, G, K, d), (1, G, K, d).

    Each query sees the keys up to its own position; with a `window` only the last so many of them, its own included.
    """
    count, total = queries.shape[2], keys.shape[2]
    window = None if window is None or total <= window else window
    if _in_pieces(queries):
        return _by_products(queries, keys, values, scale, window)
    mask = _mask(count, total, array=count <= device.max_masked_queries(), window=window)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def _in_pieces(queries: mx.array) -> bool:
    """Whether attention is computed here, and not by MLX's own."""
    return device.is_cpu() and queries.dtype == mx.float32


def query_pieces(count: int) -> list[int]:
    """The ends of the pieces in which a CPU computes the attention of `count` queries.

    Scores of later keys are wasted, and cutting the queries avoids most of them.
    """
    return [*range(_PIECE, count, _PIECE), count]


_PIECE = 256  # queries


def _mask(queries: int, keys: int, *, array: bool, window: int | None = None) -> mx.array | str | None:
    """The mask of a segment for MLX's own attention."""
    if array or window is not None:
        return _seen(queries, keys, window)
    return "causal" if queries > 1 else None  # MLX aligns "causal" to the last key


def _seen(queries: int, keys: int, window: int | None) -> mx.array:
    """Which of the keys each of the last queries sees, (n, K): all ancestors, and its own tokens up to it.

    With a `window`, each query sees the last so many of them, its own included.
    """
    last = mx.arange(keys - queries, keys)[:, None]  # the key at each query's own position
    seen = mx.arange(keys) <= last
    return seen if window is None else seen & (mx.arange(keys) > last - window)


def _by_products(queries: mx.array, keys: mx.array, values: mx.array, scale: float, window: int | None) -> mx.array:
    """Attention (1, H, n, d) on a CPU, piece by piece, with the exponentials of `core.exponentials`."""
    count, total = queries.shape[2], keys.shape[2]
    ends = query_pieces(count) if window is None else [count]
    outputs: list[mx.array] = []
    for piece, end in zip(split_at(queries, ends[:-1], axis=2), ends, strict=True):
        output, keys, values = _attended(piece, keys, values, total - count + end, scale, window)
        outputs.append(output)
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def _attended(
    queries: mx.array, keys: mx.array, values: mx.array, seen: int, scale: float, window: int | None
) -> tuple[mx.array, mx.array, mx.array]:
    """Attention (1, H, n, d) of a piece to the `seen` first keys; and keys and values for the next piece.

    The next piece takes them from here, so it is computed after this one, and their gradients are added up one after
    another. For its own gradient a piece keeps the exponentials undivided, and their sums.
    """

    @mx.custom_function
    def attend(queries: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, ...]:
        weights = _exponentials(queries * (scale * LOG2_E), keys[:, :, :seen], window)
        sums = weights.sum(axis=-1, keepdims=True)
        output = (weights @ values[:, :, :seen] / sums).reshape(*queries.shape[:3], -1)
        return output, keys, values, weights, sums

    @attend.vjp
    def vjp(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        queries, keys, values = primals
        output, _, _, weights, sums = outputs
        of_output = mx.depends([cotangents[0]], [cotangents[1], cotangents[2]])[0]  # after the pieces behind this one
        cotangent = _heads_together(of_output, keys) / sums
        mean = (cotangent * _heads_together(output, keys)).sum(axis=-1, keepdims=True)
        of_scores = weights * (cotangent @ values[:, :, :seen].swapaxes(-1, -2) - mean)  # (1, G, H / G * n, K)
        of_queries = (of_scores @ keys[:, :, :seen] * scale).reshape(queries.shape)
        of_keys = of_scores.swapaxes(-1, -2) @ (_heads_together(queries, keys) * scale)
        of_values = weights.swapaxes(-1, -2) @ cotangent
        unseen = [(0, 0), (0, 0), (0, keys.shape[2] - seen), (0, 0)]
        return of_queries, cotangents[1] + mx.pad(of_keys, unseen), cotangents[2] + mx.pad(of_values, unseen)

    results: Any = attend(queries, keys, values)
    return results[0], results[1], results[2]


def _exponentials(queries: mx.array, keys: mx.array, window: int | None) -> mx.array:
    """2^(score - largest score of the query) of scaled queries (1, H, n, d), (1, G, H / G * n, K)."""
    count, total = queries.shape[2], keys.shape[2]
    scores = _heads_together(queries, keys) @ keys.swapaxes(-1, -2)
    if count > 1 or window is not None:
        of_heads = scores.reshape(1, -1, count, total)
        scores = mx.where(_seen(count, total, window), of_heads, -mx.inf).reshape(scores.shape)
    return power_below(scores, scores.max(axis=-1, keepdims=True))


def _heads_together(x: mx.array, keys: mx.array) -> mx.array:
    """One matrix of the heads that share keys: (1, H, n, d) -> (1, G, H / G * n, d)."""
    return x.reshape(1, keys.shape[1], -1, x.shape[3])
