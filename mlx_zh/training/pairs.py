"""Preference pairs as packed trees, and the summed log-probs of their responses."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_zh.core.logprobs import sum_by_owner
from mlx_zh.core.packing import PackedBatch, common_prefix_length, pack_pairs
from mlx_zh.corpus.rendered import RenderedPair


def tree_tokens(pair: RenderedPair) -> int:
    """Tokens that a pair takes in a row. The common prefix of both responses counts once."""
    shared = common_prefix_length(pair.chosen, pair.rejected)
    return len(pair.prompt) + len(pair.chosen) + len(pair.rejected) - shared


def pack(pairs: Sequence[RenderedPair]) -> PackedBatch:
    """Pack pairs into one row."""
    return pack_pairs((pair.prompt, pair.chosen, pair.rejected) for pair in pairs)


def response_lengths(pairs: Sequence[RenderedPair]) -> mx.array:
    """Scored tokens of chosen and rejected, (P, 2) float32."""
    return mx.array([[len(pair.chosen), len(pair.rejected)] for pair in pairs], dtype=mx.float32)


def pair_sums(logprobs: mx.array, batch: PackedBatch, pairs: Sequence[RenderedPair]) -> tuple[mx.array, mx.array]:
    """Sums by response of the log-probs (S,) of a row's scored tokens: (totals, shared), each (P, 2).

    `totals` sums all tokens of a response; `shared` sums those within the length of the pair's shorter response. The
    columns are chosen and rejected.
    """
    within = [
        np.arange(len(response)) < min(len(pair.chosen), len(pair.rejected))
        for pair in pairs
        for response in (pair.chosen, pair.rejected)
    ]
    inside = logprobs * mx.array(np.concatenate(within))
    sums = (sum_by_owner(values, batch.owner, batch.num_sequences) for values in (logprobs, inside))
    totals, shared = (values.reshape(-1, 2) for values in sums)  # (2P,) -> (P, 2)
    return totals, shared
