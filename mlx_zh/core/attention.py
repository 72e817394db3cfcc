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

    The scores of a query and the keys after it are computed in vain; in pieces there are few of them.
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
    """Attention (1, H, n, d) on a CPU, piece by piece; `core.exponentials` tells how its exponentials are computed.

    For the gradient, the exponentials of a piece are kept undivided, and their sums.
    """
    count, total = queries.shape[2], keys.shape[2]
    ends = query_pieces(count) if window is None else [count]
    seen = [total - count + end for end in ends]  # the keys of a piece

    @mx.custom_function
    def attend(queries: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, ...]:
        outputs: list[mx.array] = []
        weights: list[mx.array] = []
        sums: list[mx.array] = []
        for piece, end in zip(split_at(queries, ends[:-1], axis=2), seen, strict=True):
            if outputs:  # one after another, so that the scores of one are in memory
                piece = mx.depends([piece], [outputs[-1]])[0]
            weights.append(_exponentials(piece * (scale * LOG2_E), keys[:, :, :end], window))
            sums.append(weights[-1].sum(axis=-1, keepdims=True))
            outputs.append((weights[-1] @ values[:, :, :end] / sums[-1]).reshape(*piece.shape[:3], -1))
        return _joined(outputs), *weights, *sums

    @attend.vjp
    def vjp(primals: Any, cotangents: Any, outputs: Any) -> tuple[Any, ...]:
        queries, keys, values = primals
        pieces = [split_at(x, ends[:-1], axis=2) for x in (queries, cotangents[0], outputs[0])]
        weights, sums = outputs[1 : 1 + len(ends)], outputs[1 + len(ends) :]
        of_queries: list[mx.array] = []
        of_keys: mx.array | None = None
        of_values: mx.array | None = None
        for query, cotangent, output, weight, divisor, end in zip(*pieces, weights, sums, seen, strict=True):
            query, cotangent, output = (_heads_together(x, keys) for x in (query, cotangent, output))
            cotangent = cotangent / divisor
            if of_keys is not None and of_values is not None:
                cotangent = mx.depends([cotangent], [of_keys, of_values])[0]
            mean = (cotangent * output).sum(axis=-1, keepdims=True)
            of_scores = weight * (cotangent @ values[:, :, :end].swapaxes(-1, -2) - mean)  # (1, G, H / G * n, K)
            of_queries.append((of_scores @ keys[:, :, :end] * scale).reshape(1, queries.shape[1], -1, keys.shape[3]))
            of_keys = _added(of_keys, of_scores.swapaxes(-1, -2) @ (query * scale))
            of_values = _added(of_values, weight.swapaxes(-1, -2) @ cotangent)
        return _joined(of_queries), of_keys, of_values

    results: Any = attend(queries, keys, values)
    return results[0]


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


def _joined(pieces: list[mx.array]) -> mx.array:
    return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=2)


def _added(before: mx.array | None, more: mx.array) -> mx.array:
    """The sum of gradients, of which those `before` are of fewer keys."""
    if before is None:
        return more
    return more + mx.pad(before, [(0, 0), (0, 0), (0, more.shape[2] - before.shape[2]), (0, 0)])
