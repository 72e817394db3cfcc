"""The gated delta net: the recurrent layer of Qwen3.5 over a packed row (arXiv:2412.06464, section 3).

It is computed with the modules and parameters of mlx-lm's `GatedDeltaNet`. What a token leaves behind is not keys
and values but a matrix for each head, and the last inputs of the convolution.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.gated_delta import normalize_qk

from mlx_zh.core.gated_delta import convolved, gated_delta
from mlx_zh.core.packing import PackedBatch

State = tuple[mx.array, mx.array]  # matrices (V, d, c) float32, and the last inputs of the convolution (W - 1, E)

_EPSILON = 1e-6  # in the norms of queries and keys, as mlx-lm's layer has it


def recurrent_output(
    mixer: Any, x: mx.array, batch: PackedBatch, past: State | None = None, cache: list[State] | None = None
) -> mx.array:
    """The layer's output (T, D) for the row `x` (T, D), whose roots continue `past`.

    The state at the end of the last segment is appended to `cache`.
    """
    before, tail = (None, None) if past is None else past
    convolution, tail = convolved(mixer.in_proj_qkv(x), mixer.conv1d.weight, batch.segments, tail)  # (T, E)
    queries, keys, values = _heads(mixer, nn.silu(convolution))
    log_gates = -mx.exp(mixer.A_log.astype(mx.float32)) * nn.softplus(mixer.in_proj_a(x) + mixer.dt_bias)  # (T, V)
    betas = mx.sigmoid(mixer.in_proj_b(x))  # (T, V)
    outputs, ends = gated_delta(queries, keys, values, log_gates, betas, batch.segments, before=before)
    if cache is not None:
        cache.append((ends[-1], tail))
    gates = mixer.in_proj_z(x).reshape(outputs.shape)
    normed = mixer.norm(outputs.astype(x.dtype), gates)  # (T, V, d)
    return mixer.out_proj(normed.reshape(x.shape[0], -1))


def _heads(mixer: Any, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Normalized queries and keys (T, K, c), and values (T, V, d), of the convolution's output (T, E)."""
    queries, keys, values = mx.split(x, [mixer.key_dim, 2 * mixer.key_dim], axis=-1)
    queries, keys = (part.reshape(x.shape[0], mixer.num_k_heads, -1) for part in (queries, keys))
    queries, keys = normalize_qk(queries, keys, inv_scale=mixer.head_k_dim**-0.5, eps=_EPSILON)
    return queries, keys, values.reshape(x.shape[0], mixer.num_v_heads, -1)
