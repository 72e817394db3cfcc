"""Learning-rate schedules."""

from __future__ import annotations

import math


def learning_rate(step: int, total: int, *, peak: float, kind: str, warmup: int) -> float:
    """The learning rate of step `step` (from 0) of `total`.

    Over the `warmup` steps the rate rises linearly to `peak`; no step has rate 0. After that, `cosine` and `linear`
    fall towards 0 over the remaining steps, like the schedules of the same names in Transformers.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if kind == "constant":
        return peak
    progress = (step - warmup) / max(total - warmup, 1)
    if kind == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (1 - progress)
