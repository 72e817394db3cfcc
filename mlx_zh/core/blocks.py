"""One block of an mlx-lm model over a packed row, from its description (`core.block_forms`).

Linear layers, norms and MLPs run once over all T tokens; attention runs segment by segment, so no (T, T) mask is
needed. In a layer with a window, the segment is cut into pieces, so that no mask is larger than two pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_zh.core import expert_loads
from mlx_zh.core.attention import causal_attention
from mlx_zh.core.block_forms import LLAMA, BlockForm, heads_of
from mlx_zh.core.feed_forward import feed_forward, is_swiglu, product, projected, scaled
from mlx_zh.core.packing import PackedBatch
from mlx_zh.core.recompute import again
from mlx_zh.core.recurrent import recurrent_output
from mlx_zh.core.splitting import split_at
from mlx_zh.system import device


class TokenNoise(Protocol):
    """The random noise of a training step. It depends only on the token, so packing cannot change it."""

    def embeddings(self, hidden: mx.array) -> mx.array:
        """The embeddings `hidden` (T, D) with noise added."""

    def layer(self, positions: mx.array | None = None) -> AbstractContextManager[None]:
        """A context in which the layers of one block draw their dropout, for the tokens at `positions` or for all."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The tokens whose output a block computes, by their positions (S,) in the row, and the noise of the step.

    The other tokens only give keys and values. In the last block, that is all that the scored tokens need of them.
    """

    positions: mx.array
    noise: TokenNoise | None

    def of(self, x: mx.array) -> mx.array:
        """`x` (T, D) of the wanted tokens, (S, D)."""
        return x[self.positions]

    def layer(self) -> AbstractContextManager[None]:
        """A context in which layers draw the dropout of these tokens."""
        return nullcontext() if self.noise is None else self.noise.layer(self.positions)


# Rotated keys and values, (1, H, *, d) each; of a recurrent layer its state (`recurrent.State`).
KeysValues = tuple[mx.array, mx.array]


def run_block(
    layer: nn.Module,
    hidden: mx.array,
    batch: PackedBatch,
    level: int,
    noise: TokenNoise | None,
    past: KeysValues | None,
    form: BlockForm,
    wanted: Wanted | None = None,
) -> mx.array:
    """The block's output (T, D), or that of the `wanted` tokens alone (S, D).

    `level` says what it computes again in the backward pass, see `core.recompute`.
    """

    def block(hidden: mx.array, pieces: bool) -> tuple[mx.array]:
        with nullcontext() if noise is None else noise.layer():
            return (block_output(layer, hidden, batch, past, form=form, pieces=pieces, wanted=wanted),)

    if level < 2:
        return block(hidden, level > 0)[0]
    return again((layer,), partial(block, pieces=True), hidden, first=partial(block, pieces=False))[0]


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
    form: BlockForm = LLAMA,
    pieces: bool = False,
    wanted: Wanted | None = None,
) -> mx.array:
    """The block's output (T, D) for the row `hidden` (T, D), whose roots continue `past`; `cache` as in attention.

    With `pieces`, what is cheap to make is made again in the backward pass. With `wanted`, only the output of those
    tokens is computed, (S, D).
    """
    norm = None if form.before_attention is None else layer[form.before_attention]
    if form.recurrent:
        x = recurrent_output(layer.linear_attn, hidden if norm is None else norm(hidden), batch, past, cache)
        x = x if wanted is None else wanted.of(x)
    else:
        x = attention_output(
            layer.self_attn, hidden, batch, past, cache, form=form, norm=norm, pieces=pieces, wanted=wanted
        )
    with nullcontext() if wanted is None else wanted.layer():
        return _after_attention(layer, hidden if wanted is None else wanted.of(hidden), x, form, pieces=pieces)


def _after_attention(layer: Any, hidden: mx.array, x: mx.array, form: BlockForm, *, pieces: bool) -> mx.array:
    """The output of a block whose input is `hidden` and whose attention gave `x`, (T, D) each."""
    hidden = _added(hidden, _normed(layer, form.after_attention, x), form)
    if (pieces or device.computes_exponentials_singly()) and is_swiglu(layer.mlp):
        norm = None if form.before_mlp is None else layer[form.before_mlp]
        x = feed_forward(layer.mlp, norm, hidden, pieces=pieces)
    else:
        x = _normed(layer, form.before_mlp, hidden)
        expert_loads.record(layer.mlp, x)
        x = layer.mlp(x)
    return _added(hidden, _normed(layer, form.after_mlp, x), form)


def _normed(layer: Any, norm: str | None, x: mx.array) -> mx.array:
    return x if norm is None else layer[norm](x)


def _added(hidden: mx.array, change: mx.array, form: BlockForm) -> mx.array:
    """The residual sum."""
    if form.residual != 1.0:
        change = change * form.residual
    if not form.clips or hidden.dtype != mx.float16:
        return hidden + change
    most = float(np.finfo(np.float16).max)
    return mx.clip(hidden.astype(mx.float32) + change.astype(mx.float32), -most, most).astype(mx.float16)


def attention_output(
    attention: Any,
    x: mx.array,
    batch: PackedBatch,
    past: KeysValues | None = None,
    cache: list[KeysValues] | None = None,
    *,
    form: BlockForm = LLAMA,
    norm: nn.Module | None = None,
    pieces: bool = False,
    wanted: Wanted | None = None,
) -> mx.array:
    """The attention layer's output (T, D) for the row `x` (T, D), normalized by `norm`; its roots continue `past`.

    The keys and values that the last segment sees are appended to `cache`. For `pieces` and `wanted` see
    `block_output`.
    """
    layers = [attention[name] for name in (["qkv_proj"] if form.fused else ["q_proj", "k_proj", "v_proj"])]
    products = projected(layers, norm, x, pieces=pieces)
    shift = 0 if past is None else past[0].shape[2]
    (queries, keys, values), gate = _segments_of(attention, products, batch, form, shift)
    prefix = [] if past is None else [past]
    outputs: list[mx.array] = []
    for index in range(len(batch.segments)):
        before = prefix + [(keys[i], values[i]) for i in batch.ancestors(index)]
        own = keys[index], values[index]
        outputs += _attended(queries[index], before, own, attention.scale, form.window)
        if cache is not None and index == len(batch.segments) - 1:
            cache.append(_columns([*before, own]))
    if wanted is None:
        return _together(attention.o_proj, outputs, gate, pieces=pieces)
    with wanted.layer():
        return _together(attention.o_proj, outputs, gate, pieces=pieces, wanted=wanted)


def _together(
    o_proj: Any, outputs: list[mx.array], gate: mx.array | None, *, pieces: bool, wanted: Wanted | None = None
) -> mx.array:
    """`o_proj` of the segments' attention (1, H, n, d), times its gate (T, H * d) if there is one, (T, D)."""

    def rows(*parts: mx.array) -> mx.array:
        joined = _joined(list(parts[: len(outputs)]))[0].swapaxes(0, 1).flatten(1)  # (1, H, T, d) -> (T, H * d)
        gated = joined if gate is None else joined * mx.sigmoid(parts[-1])
        return gated if wanted is None else wanted.of(gated)

    inputs = outputs if gate is None else [*outputs, gate]
    if not pieces:
        result: mx.array = o_proj(rows(*inputs))
        return result
    return scaled(o_proj, again((o_proj,), lambda *parts: (product(o_proj, rows(*parts)),), *inputs)[0])


def _segments_of(
    attention: Any, products: tuple[mx.array, ...], batch: PackedBatch, form: BlockForm, shift: int
) -> tuple[tuple[list[mx.array], list[mx.array], list[mx.array]], mx.array | None]:
    """Rotated queries and keys, and values: one array (1, H, n, d) for each segment of n tokens.

    `products` are those of the projections of the row. The positions begin at `shift`. Of a form with a gate, the
    last result is the gate (T, H * d).
    """
    positions = batch.positions + shift if shift else batch.positions

    def heads(values: mx.array, count: int, norm: str | None, *, rotate: bool) -> list[mx.array]:
        if norm is not None and form.whole_norms:
            values, norm = attention[norm](values), None
        split = values.reshape(values.shape[0], count, 1, -1)  # (T, H * d) -> (T, H, 1, d)
        if norm is not None and not form.rotated_first:
            split = attention[norm](split)
        if rotate:  # each token has its own position, so each is passed as a batch of its own
            split = attention.rope(split, offset=positions)
        if norm is not None and form.rotated_first:
            split = attention[norm](split)
        split = split.swapaxes(0, 2)  # (T, H, 1, d) -> (1, H, T, d)
        return split_at(split, batch.starts[1:], axis=2)

    queries, keys, values = _projections(attention, products)
    of_queries, of_keys = form.norms or (None, None)
    count, keys_count = heads_of(attention)
    gate: mx.array | None = None
    if form.gated:  # (T, H * 2 d): the queries of a head, then its gate
        halves = mx.split(queries.reshape(len(queries), count, -1), 2, axis=-1)
        queries, gate = (half.reshape(len(half), -1) for half in halves)
    segments = (
        heads(queries, count, of_queries, rotate=True),
        heads(keys, keys_count, of_keys, rotate=True),
        heads(values, keys_count, None, rotate=False),
    )
    return segments, gate


def _projections(attention: Any, products: tuple[mx.array, ...]) -> tuple[mx.array, ...]:
    """Queries, keys and values, (T, H * d) each."""
    if len(products) == 3:
        return products
    (product,) = products
    count, keys_count = heads_of(attention)
    size = product.shape[-1] // (count + 2 * keys_count)
    end = count * size
    parts: Any = mx.split(product, [end, end + keys_count * size], axis=-1)
    return tuple(parts)


def _attended(
    queries: mx.array, before: list[KeysValues], own: KeysValues, scale: float, window: int | None
) -> Iterator[mx.array]:
    """Attention (1, H, n, d) of a segment to what comes `before` it and to its `own` keys, in pieces of it.

    With a `window`, a piece sees its own keys and those of the piece before it; a piece is at least as long as the
    window.
    """
    if window is None:
        yield causal_attention(queries, *_columns([*before, own]), scale=scale)
        return
    tail = _last(before, window - 1)
    size = max(window, LEAST_PIECE)
    cuts = list(range(size, queries.shape[2], size))
    pieces = zip(*(split_at(array, cuts, axis=2) for array in (queries, *own)), strict=True)
    for piece, key, value in pieces:
        yield causal_attention(piece, *_columns([*tail, (key, value)]), scale=scale, window=window)
        tail = [(key, value)]


LEAST_PIECE = 256  # queries; shorter pieces than these would only make more kernels


def _last(parts: list[KeysValues], count: int) -> list[KeysValues]:
    """The last `count` keys and values of `parts`, which follow each other."""
    kept: list[KeysValues] = []
    for key, value in reversed(parts):
        if count <= 0:
            break
        surplus = key.shape[2] - count
        if surplus > 0:
            key, value = (mx.split(array, [surplus], axis=2)[1] for array in (key, value))
        kept.insert(0, (key, value))
        count -= key.shape[2]
    return kept


def _columns(parts: list[KeysValues]) -> KeysValues:
    """Keys and values that follow each other, in one array each."""
    if len(parts) == 1:
        return parts[0]
    key, value = (_joined(list(column)) for column in zip(*parts, strict=True))
    return key, value


def _joined(parts: list[mx.array]) -> mx.array:
    """Concatenate arrays (1, H, *, d) along the tokens."""
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)
