"""Draws tokens with random numbers that depend on nothing but the answer's seed and the token's position.

A token is drawn by the Gumbel-max rule: it is the largest of log-prob / temperature + noise. Other log-probs in the
last bit change it only where the two largest of these sums are that close.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_zh.models.generate import Sampling
from mlx_zh.system import device
from mlx_zh.system.splitmix import mix64

VERSION = 1  # raise it when the same seed would draw other tokens


def answer_seed(seed: int, prompt: str, index: int) -> int:
    """The seed, 48 bits, of answer number `index` to the prompt with this id."""
    return int.from_bytes(hashlib.sha256(f"{seed} {prompt} {index}".encode()).digest()[:6], "big")


def draw(logits: mx.array, sampling: Sampling, seeds: Sequence[int], positions: Sequence[int]) -> mx.array:
    """A token (N,) for each row of logits (N, V). `positions` count the tokens of an answer from 0.

    As in the chat and in mlx-lm, the nucleus (`top_p`) is that of the distribution before the temperature changes it.
    """
    if sampling.temperature == 0:
        return mx.argmax(logits, axis=-1)
    logits = logits.astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    if sampling.top_p < 1:
        logprobs = mx.where(logprobs < _threshold(logprobs, sampling.top_p), -mx.inf, logprobs)
    return mx.argmax(logprobs / sampling.temperature + _noise(seeds, positions, logits.shape[-1]), axis=-1)


def _threshold(logprobs: mx.array, top_p: float) -> mx.array:
    """The log-prob (N, 1) of the nucleus's last token: those above it have less than `top_p` together."""
    ascending = _sorted(logprobs)
    probs = mx.exp(ascending)
    above = mx.cumsum(probs, axis=-1, reverse=True, inclusive=False)
    total = above[:, :1] + probs[:, :1]
    outside = (above >= top_p * total).sum(axis=-1, keepdims=True)
    return mx.take_along_axis(ascending, outside, axis=-1)


def _sorted(values: mx.array) -> mx.array:
    """The values of each row in ascending order."""
    if device.is_cpu():  # NumPy is there more than twenty times as fast, and it reads the same memory
        return mx.array(np.sort(np.array(values), axis=-1))
    return mx.sort(values, axis=-1)


def _noise(seeds: Sequence[int], positions: Sequence[int], size: int) -> mx.array:
    """Gumbel noise (N, size), each row from its own seed and position."""
    words = mix64(mix64(np.array(seeds, dtype=np.uint64)) ^ np.array(positions, dtype=np.uint64))
    keys = mx.array(np.stack([words >> np.uint64(32), words & np.uint64(0xFFFFFFFF)], axis=-1).astype(np.uint32))
    return mx.vmap(lambda key: mx.random.gumbel((size,), key=key))(keys)
