"""One block of a Llama-shaped mlx-lm model over a packed row.

Linear layers, norms and MLPs run once over all T tokens; attention runs segment by segment, so no (T, T) mask is
needed.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_zh.core.feed_forward import feed_forward, product, projected, scaled
from mlx_zh.core.packing import PackedBatch
from mlx_zh.core.recompute import again
from mlx_zh.system import device


class TokenNoise(Protocol):
    """The random noise of a training step. It depends only on the token, so packing cannot change it."""

    def embeddings(self, hidden: mx.array) -> mx.array:
        """The embeddings `hidden` (T, D) with noise added."""

    def layer(self) -> Any:
        """A context manager inside which the layers of one block draw their dropout."""


KeysValues = tuple[mx.array, mx.array]  # rotated keys and values, (1, H, *, d) each


def run_block(
    layer: nn.Module,
    hidden: mx.array,
    batch: PackedBatch,
    level: int,
    noise: TokenNoise | None,
    past: KeysValues | None,
) -> mx.array:
    """The block's output (T, D). `level` says what it computes again in the backward pass, see `core.recompute`."""

    def block(hidden: mx.array) -> mx.array:
        with nullcontext() if noise is None else noise.layer():
            return block_output(layer, hidden, batch, past, pieces=level > 0)

    if level < 2:
        return block(hidden)
    return again((layer,), lambda hidden: (block(hidden),), hidden)[0]


def has_arrays(tree: Any) -> bool:
    """Whether a tree of parameters has any array in it."""
    if isinstance(tree, dict):
        return any(has_arrays(v) for v in tree.values())
    if isinstance(tree, list):
        return any(has_arrays(v) for v in tree)
    return True


def block_output(
    layer: Any,
    hidden: mx.array,
    batch: PackedBatch,
    past: KeysValues | None = None,
    cache: list[KeysValues] | None = None,
    *,
    pieces: bool = False,
) -> mx.array:
    """The block's output (T, D) for the row `hidden` (T, D), whose roots continue `past`; `cache` as in attention.

    With `pieces`, what is cheap to make is made again in the backward pass.
    """
    if pieces:
        hidden = hidden + attention_output(layer.self_attn, hidden, batch, past, cache, norm=layer.input_layernorm)
        return hidden + feed_forward(layer.mlp, layer.post_attention_layernorm, hidden)
    hidden = hidden + attention_output(layer.self_attn, layer.input_layernorm(hidden), batch, past, cache)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def attention_output(
    attention: Any,
    x: mx.array,
    batch: PackedBatch,
    past: KeysValues | None = None,
    cache: list[KeysValues] | None = None,
    *,
    norm: nn.Module | None = None,
) -> mx.array:
    """The attention layer's output (T, D) for the row `x` (T, D), whose roots continue `past`.

    The keys and values that the last segment sees are appended to `cache`. With `norm`, the row is still to be
    normalized by it, and what is cheap to make is made again in the backward pass.
    """
    query, key, value = projected((attention.q_proj, attention.k_proj, attention.v_proj), norm, x)
    shift = 0 if past is None else past[0].shape[2]
    positions = batch.positions + shift if shift else batch.positions

    def heads(values: mx.array, count: int, norm: str | None, *, rotate: bool) -> list[mx.array]:
        """One array (1, H, n, d) for each segment of n tokens."""
        split = values.reshape(x.shape[0], count, 1, -1)  # (T, H * d) -> (T, H, 1, d)
        if norm is not None and norm in attention:
            split = attention[norm](split)
        if rotate:  # each token has its own position, so each is passed as a batch of its own
            split = attention.rope(split, offset=positions)
        split = split.swapaxes(0, 2)  # (T, H, 1, d) -> (1, H, T, d)
        # Split, not sliced: the gradient of every slice would be an array of the whole row.
        return list(mx.split(split, batch.starts[1:], axis=2))

    queries = heads(query, attention.n_heads, "q_norm", rotate=True)
    keys = heads(key, attention.n_kv_heads, "k_norm", rotate=True)
    values = heads(value, attention.n_kv_heads, None, rotate=False)

    prefix = [] if past is None else [past]
    masked = device.max_masked_queries()
    outputs = []
    for index, segment in enumerate(batch.segments):
        visible = prefix + [(keys[i], values[i]) for i in (*batch.ancestors(index), index)]
        key, value = (_joined(list(column)) for column in zip(*visible, strict=True))
        mask = _mask(len(segment), key.shape[2], array=len(segment) <= masked)
        outputs.append(
            mx.fast.scaled_dot_product_attention(queries[index], key, value, scale=attention.scale, mask=mask)
        )
        if cache is not None and index == len(batch.segments) - 1:
            cache.append((key, value))
    return _together(attention.o_proj, outputs, pieces=norm is not None)


def _together(o_proj: Any, outputs: list[mx.array], *, pieces: bool) -> mx.array:
    """`o_proj` of the segments' attention (1, H, n, d), (T, D)."""

    def rows(*outputs: mx.array) -> mx.array:
        return _joined(list(outputs))[0].swapaxes(0, 1).flatten(1)  # (1, H, T, d) -> (T, H * d)

    if not pieces:
        result: mx.array = o_proj(rows(*outputs))
        return result
    return scaled(o_proj, again((o_proj,), lambda *parts: (product(o_proj, rows(*parts)),), *outputs)[0])


def _mask(queries: int, keys: int, *, array: bool) -> mx.array | str | None:
    """The causal mask of a segment: it sees all ancestors, and its own tokens up to each query."""
    if array:
        last = mx.arange(keys - queries, keys)  # the key at each query's own position
        return mx.arange(keys) <= last[:, None]  # (n, K)
    return "causal" if queries > 1 else None  # MLX aligns "causal" to the last key


def _joined(parts: list[mx.array]) -> mx.array:
    """Concatenate arrays (1, H, *, d) along the tokens."""
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)
