"""Losses as pure functions of log-probs."""

from __future__ import annotations

import mlx.core as mx


def sft_loss(logprobs: mx.array, total_scored: int) -> mx.array:
    """This micro-batch's share of a step's loss: minus the sum of its log-probs (S,) over the step's scored tokens.

    Summed over the micro-batches of a step this is the mean cross-entropy of all its scored tokens.
    """
    return -logprobs.sum() / total_scored
