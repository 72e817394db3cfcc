"""Dropout and embedding noise that depend only on the token, not on how examples are cut into rows."""

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
    """The noise of one row in one training step.

    Each example (a tree of the row) has its own seed in `seeds`, see `example_seeds`, and each of its tokens a key
    made of that seed and the token's offset in the example. So the noise of a token does not depend on the other
    examples of the row. NEFTune (arXiv:2310.05914) adds uniform noise from [-1, 1] times alpha / sqrt(L D) to the
    embeddings, where L is the number of the example's tokens. Raises ValueError when the number of seeds is wrong.
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
        """`hidden` (T, D) with NEFTune's noise, or unchanged without `neftune_alpha`."""
        if self._alpha is None:
            return hidden
        width = hidden.shape[-1]
        keys = mx.bitwise_xor(self._keys, mx.array([0x4E454654, 0], dtype=mx.uint32))  # other keys than dropout's
        noise = mx.vmap(lambda key: mx.random.uniform(-1, 1, (width,), key=key))(keys)
        return hidden + (noise * self._alpha / mx.sqrt(self._lengths * width)).astype(hidden.dtype)

    def layer(self, positions: mx.array | None = None) -> AbstractContextManager[None]:
        """A context in which adapter layers draw their dropout, for the tokens at `positions` or for all."""
        if not self._dropout:
            return dropout_keys(None)
        return dropout_keys(self._keys if positions is None else self._keys[positions])


def example_seeds(seed: int, step: int, examples: Sequence[int] | npt.NDArray[np.int64]) -> list[np.uint64]:
    """A 64-bit seed for each example of a step."""
    return [stream(seed, step, int(example)) for example in examples]


def _trees(batch: PackedBatch) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The index of each token's tree (T,), and the number of tokens of each tree, in row order."""
    lengths: list[int] = []
    for segment in batch.segments:
        if segment.parent is None:
            lengths.append(0)
        lengths[-1] += len(segment)
    sizes = np.array(lengths, dtype=np.int64)
    return np.repeat(np.arange(len(sizes)), sizes), sizes
