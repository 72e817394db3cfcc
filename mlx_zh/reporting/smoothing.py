"""The smoothing of LLaMA-Factory's loss plots."""

from __future__ import annotations

import math
from collections.abc import Sequence


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average of N values, begun at the first, whose weight grows with N.

    As `smooth` in LLaMA-Factory's extras/ploting.py, which follows TensorBoard: s[i] = w s[i-1] + (1 - w) v[i] with
    w = 1.8 (sigmoid(N / 20) - 1/2), so that short runs are hardly smoothed and long ones at most by w = 0.9.
    """
    weight = 1.8 * (1 / (1 + math.exp(-len(values) / 20)) - 0.5)
    smoothed: list[float] = []
    for value in values:
        last = smoothed[-1] if smoothed else value
        smoothed.append(weight * last + (1 - weight) * value)
    return smoothed
