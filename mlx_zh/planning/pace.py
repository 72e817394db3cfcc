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

    @property
    def rates(self) -> tuple[str, str]:
        """Tokens per second in training and in the forward pass, as text of at least three digits."""
        training, forward = (_digits(1 / seconds) for seconds in (self.training, self.forward))
        return training, forward


def _digits(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
