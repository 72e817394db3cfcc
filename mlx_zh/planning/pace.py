"""How fast a machine works on one model: what a time budget is planned with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds, measured or predicted."""

    training: float  # per token of SFT, forward and backward pass
    forward: float  # per token, forward pass only: exams, validation, reference
    update: float  # per optimizer step, beside its tokens
    generation: float  # per generated token
