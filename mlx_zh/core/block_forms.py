"""How the blocks of an mlx-lm model differ from Llama's, as data: read from the model's own modules.

`core.logprobs.check_supported` proves a description, by comparing what is computed from it with the model's own
forward pass and gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn


class UndescribedError(Exception):
    """A part of a model that no description fits; the message names it."""


@dataclass(frozen=True, slots=True)
class BlockForm:
    """Which norm of a block stands where, and how its attention is made. Names are those of mlx-lm's modules.

    A `recurrent` block has a gated delta net in place of attention (`core.recurrent`).
    """

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    residual: float = 1.0  # factor of what attention and MLP add
    recurrent: bool = False
    window: int | None = None  # the last keys that a token sees, its own included; None: all
    fused: bool = False  # queries, keys and values are one product, qkv_proj
    gated: bool = False  # q_proj gives queries and a gate of the attention's output, head by head
    norms: tuple[str, str] | None = None  # of queries and of keys
    rotated_first: bool = False  # the norms of queries and keys stand after RoPE
    whole_norms: bool = False  # they are over all heads at once, not over each
    clips: bool = False  # in float16, sums that overflow are clipped


@dataclass(frozen=True, slots=True)
class ModelForm:
    """The blocks of a model, and what stands before and after them."""

    blocks: tuple[BlockForm, ...]
    embedding: float = 1.0  # factor of the embedded tokens
    logits: float = 1.0  # factor of the logits


LLAMA = BlockForm()

# The norms of a block -> those before attention, after it, before the MLP, and after it.
_NORMS: dict[frozenset[str], tuple[str | None, str | None, str | None, str | None]] = {
    frozenset(name for name in names if name): names
    for names in (
        ("input_layernorm", None, "post_attention_layernorm", None),
        ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
        (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
        (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    )
}

# Norms of queries and keys -> whether they stand after RoPE.
_QUERY_KEY_NORMS = {
    ("q_norm", "k_norm"): False,
    ("query_layernorm", "key_layernorm"): True,
}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "rope"}.union(*_QUERY_KEY_NORMS)
_BLOCKS = ({"self_attn", "mlp"}, {"linear_attn", "mlp"})
_DELTA_NET = {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "conv1d", "norm", "out_proj", "A_log", "dt_bias"}
_WINDOWS = ("sliding_window", "window_size")  # where a model keeps the size of its window


def form_of(model: Any) -> ModelForm:
    """The description of a model, read once. Raises UndescribedError if its modules fit none."""
    inner = model.model
    kept: ModelForm | None = getattr(inner, _KEPT, None)
    return kept if kept is not None else _keep(inner, _described(model))


_KEPT = "mlx_zh_form"


def _keep(inner: Any, form: ModelForm) -> ModelForm:
    object.__setattr__(inner, _KEPT, form)
    return form


@contextmanager
def short_windows(model: Any, most: int) -> Iterator[None]:
    """Inside this context, no window of the model is longer than `most`. Raises UndescribedError if one stays so."""
    inner, form = model.model, form_of(model)
    before = {name: getattr(inner, name) for name in _WINDOWS if isinstance(getattr(inner, name, None), int)}
    if any(block.window for block in form.blocks):
        if not before:
            raise UndescribedError("the size of its attention window")
        for name, size in before.items():
            setattr(inner, name, min(size, most))
        blocks = (replace(block, window=block.window and min(block.window, most)) for block in form.blocks)
        _keep(inner, replace(form, blocks=tuple(blocks)))
    try:
        yield
    finally:
        _keep(inner, form)
        for name, size in before.items():
            setattr(inner, name, size)


def _described(model: Any) -> ModelForm:
    inner = model.model
    windows = _windows(model)
    blocks = tuple(_block_form(layer, window) for layer, window in zip(inner.layers, windows, strict=True))
    return ModelForm(blocks, _embedding_factor(inner), 1.0 / float(getattr(model, "logits_scaling", 1.0)))


def _windows(model: Any) -> list[int | None]:
    """The window of each layer, as the caches that the model makes for generation have it."""
    from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

    if not hasattr(model, "make_cache"):
        return [None] * len(model.model.layers)
    windows: list[int | None] = []
    for cache in model.make_cache():
        if type(cache) is RotatingKVCache and not cache.keep and isinstance(cache.max_size, int):
            windows.append(cache.max_size)
        elif type(cache) in (KVCache, ArraysCache):
            windows.append(None)
        else:
            raise UndescribedError(f"a cache of the kind {type(cache).__name__}")
    return windows


def _block_form(layer: Any, window: int | None) -> BlockForm:
    children = {name for name, part in layer.items() if isinstance(part, nn.Module)}
    norms = frozenset(name for name in children if "norm" in name)
    if norms not in _NORMS or children - norms not in _BLOCKS:
        raise UndescribedError(f"a block of {', '.join(sorted(children))}")
    before_attention, after_attention, before_mlp, after_mlp = _NORMS[norms]
    common = BlockForm(
        before_attention=before_attention,
        after_attention=after_attention,
        before_mlp=before_mlp,
        after_mlp=after_mlp,
        residual=float(getattr(layer, "residual_multiplier", 1.0)),
        clips=after_attention is not None,
    )
    if "linear_attn" in children:
        if differing := set(layer.linear_attn.keys()) ^ _DELTA_NET:
            raise UndescribedError(f"a recurrent layer that differs in {', '.join(sorted(differing))}")
        return replace(common, recurrent=True)
    return _attention_form(common, layer.self_attn, window)


def _attention_form(common: BlockForm, attention: Any, window: int | None) -> BlockForm:
    parts = set(attention.keys())
    if unknown := parts - _ATTENTION:
        raise UndescribedError(f"attention with {', '.join(sorted(unknown))}")
    pair = next((pair for pair in _QUERY_KEY_NORMS if pair[0] in attention and pair[1] in attention), None)
    return replace(
        common,
        window=window,
        fused="qkv_proj" in attention,
        gated=_is_gated(attention),
        norms=pair,
        rotated_first=pair is not None and _QUERY_KEY_NORMS[pair],
        whole_norms=pair is not None and _is_whole(attention, pair),
    )


def heads_of(attention: Any) -> tuple[int, int]:
    """The numbers of heads of queries and of keys, under either of the names that mlx-lm has for them."""
    if hasattr(attention, "n_heads"):
        return attention.n_heads, attention.n_kv_heads
    return attention.num_attention_heads, attention.num_key_value_heads


def _rows(linear: Any) -> int:
    return int((linear if "weight" in linear else linear.linear).weight.shape[0])  # under an adapter


def _is_gated(attention: Any) -> bool:
    """Whether the product for the queries is twice as wide as they are."""
    if "q_proj" not in attention or "k_proj" not in attention:
        return False
    queries, keys = heads_of(attention)
    return _rows(attention.q_proj) * keys == 2 * _rows(attention.k_proj) * queries


def _is_whole(attention: Any, pair: tuple[str, str]) -> bool:
    """Whether the norm of the queries has a weight for every dimension of every head."""
    if "q_proj" not in attention or heads_of(attention)[0] == 1:
        return False
    return bool(attention[pair[0]].weight.shape[0] == _rows(attention.q_proj))


class _Listener(nn.Module):
    """Stands in for a block, passes its input on and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "heard", [])
        self.use_sliding = self.is_linear = False

    def __call__(self, x: mx.array, *_: Any, **__: Any) -> mx.array:
        self.heard.append(x)
        return x


def _embedding_factor(inner: Any) -> float:
    """By what the model multiplies its embeddings: measured, at what reaches its first block."""
    layers = inner.layers
    listener = _Listener()
    tokens = mx.arange(8)[None]
    inner.layers = [listener] * len(layers)
    try:
        inner(tokens)
    finally:
        inner.layers = layers
    if not listener.heard:
        raise UndescribedError("an embedding that reaches no block")
    embedded, heard = (x.astype(mx.float32) for x in (inner.embed_tokens(tokens), listener.heard[0]))
    square = (embedded * embedded).sum()
    if embedded.shape != heard.shape or not float(square):
        return 1.0  # what follows is compared anyway
    factor = float((embedded * heard).sum() / square)
    return float(f"{factor:.6g}")  # half precision rounds the measured products, not what they were multiplied by
