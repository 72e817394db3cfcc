"""Dropout and embedding noise as functions of the token: the same however examples are cut into rows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_zh.core.packing import PackedBatch
from mlx_zh.models.adapters.layers import dropout_keys
from mlx_zh.system.splitmix import stream


class StepNoise:
    """The randomness of one row in one training step.

    Each of the row's trees draws from a stream of `seeds` (one 64-bit number an example, see `example_seeds`), and
    each token of it from its position, so neither neighbours nor row order can change a draw. NEFTune
    (arXiv:2310.05914) adds uniform noise of size alpha / sqrt(L D), L being the example's tokens.
    """

    def __init__(
        self, batch: PackedBatch, seeds: Sequence[np.uint64], *, dropout: bool, neftune_alpha: float | None
    ) -> None:
        self._alpha = neftune_alpha
        self._dropout = dropout
        tree, lengths = _trees(batch)
        if len(lengths) != len(seeds):
            raise ValueError(f"{len(seeds)} seeds for {len(lengths)} examples")
        words = np.array(seeds, dtype=np.uint64)[tree]  # (T,)
        offsets = np.arange(len(tree), dtype=np.uint64) - np.searchsorted(tree, tree).astype(np.uint64)
        high = (words >> np.uint64(32)).astype(np.uint32)
        low = (words & np.uint64(0xFFFFFFFF)).astype(np.uint32) ^ offsets.astype(np.uint32)
        self._keys = mx.array(np.stack([high, low], axis=1))  # (T, 2)
        self._lengths = mx.array(lengths[tree].astype(np.float32))[:, None]  # (T, 1)

    def embeddings(self, hidden: mx.array) -> mx.array:
        """`hidden` (T, D) with NEFTune's noise, where it is asked for."""
        if self._alpha is None:
            return hidden
        width = hidden.shape[-1]
        keys = mx.bitwise_xor(self._keys, mx.array([0x4E454654, 0], dtype=mx.uint32))  # apart from dropout's draws
        noise = mx.vmap(lambda key: mx.random.uniform(-1, 1, (width,), key=key))(keys)
        return hidden + (noise * self._alpha / mx.sqrt(self._lengths * width)).astype(hidden.dtype)

    def layer(self) -> AbstractContextManager[None]:
        """Under it the adapter layers draw their dropout."""
        return dropout_keys(self._keys if self._dropout else None)


def example_seeds(seed: int, step: int, examples: Sequence[int] | npt.NDArray[np.int64]) -> list[np.uint64]:
    """A 64-bit stream for each example of a step."""
    return [stream(seed, step, int(example)) for example in examples]


def _trees(batch: PackedBatch) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """For each token the tree (root) that it belongs to (T,), and each tree's tokens; roots are in row order."""
    lengths: list[int] = []
    for segment in batch.segments:
        if segment.parent is None:
            lengths.append(0)
        lengths[-1] += len(segment)
    sizes = np.array(lengths, dtype=np.int64)
    return np.repeat(np.arange(len(sizes)), sizes), sizes
