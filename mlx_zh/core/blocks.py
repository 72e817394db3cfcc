"""One block of a Llama-shaped mlx-lm model over a packed row.

Linear layers, norms and MLPs run once over all T tokens; attention runs segment by segment, so no (T, T) mask is
needed.
"""

from __future__ import annotations

from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_zh.core.packing import PackedBatch
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
    checkpoint: bool,
    noise: TokenNoise | None,
    past: KeysValues | None,
) -> mx.array:
    """The block's output (T, D); with `checkpoint`, its activations are computed again in the backward pass."""

    def block(hidden: mx.array) -> mx.array:
        if noise is None:
            return block_output(layer, hidden, batch, past)
        with noise.layer():  # inside the block, because checkpointing runs the block again in the backward pass
            return block_output(layer, hidden, batch, past)

    if not checkpoint:
        return block(hidden)
    trained = layer.trainable_parameters()

    def block_of(parameters: dict[str, Any], hidden: mx.array) -> mx.array:
        layer.update(parameters)
        return block(hidden)

    return mx.checkpoint(block_of)(trained, hidden)


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
) -> mx.array:
    """The block's output (T, D) for the row `hidden` (T, D), whose roots continue `past`; `cache` as in attention."""
    hidden = hidden + attention_output(layer.self_attn, layer.input_layernorm(hidden), batch, past, cache)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def attention_output(
    attention: Any,
    x: mx.array,
    batch: PackedBatch,
    past: KeysValues | None = None,
    cache: list[KeysValues] | None = None,
) -> mx.array:
    """The attention layer's output (T, D) for the row `x` (T, D), whose roots continue `past`.

    The keys and values that the last segment sees are appended to `cache`.
    """
    shift = 0 if past is None else past[0].shape[2]
    positions = batch.positions + shift if shift else batch.positions

    def heads(projected: mx.array, count: int, norm: str | None, *, rotate: bool) -> list[mx.array]:
        """One array (1, H, n, d) for each segment of n tokens."""
        split = projected.reshape(x.shape[0], count, 1, -1)  # (T, H * d) -> (T, H, 1, d)
        if norm is not None and norm in attention:
            split = attention[norm](split)
        if rotate:  # each token has its own position, so each is passed as a batch of its own
            split = attention.rope(split, offset=positions)
        split = split.swapaxes(0, 2)  # (T, H, 1, d) -> (1, H, T, d)
        # Split, not sliced: the gradient of every slice would be an array of the whole row.
        return list(mx.split(split, batch.starts[1:], axis=2))

    queries = heads(attention.q_proj(x), attention.n_heads, "q_norm", rotate=True)
    keys = heads(attention.k_proj(x), attention.n_kv_heads, "k_norm", rotate=True)
    values = heads(attention.v_proj(x), attention.n_kv_heads, None, rotate=False)

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
    return attention.o_proj(_joined(outputs)[0].swapaxes(0, 1).reshape(x.shape[0], -1))  # (1, H, T, d) -> (T, D)


def _mask(queries: int, keys: int, *, array: bool) -> mx.array | str | None:
    """The causal mask of a segment: it sees all ancestors, and its own tokens up to each query."""
    if array:
        last = mx.arange(keys - queries, keys)  # the key at each query's own position
        return mx.arange(keys) <= last[:, None]  # (n, K)
    return "causal" if queries > 1 else None  # MLX aligns "causal" to the last key


def _joined(parts: list[mx.array]) -> mx.array:
    """Concatenate arrays (1, H, *, d) along the tokens."""
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)
