"""The search for the fastest memory settings that fit. No setting changes the result of training."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_zh.core.logprobs import chunk_rows
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.planning.largest_row import Examples
from mlx_zh.planning.memory import Estimate, step_memory
from mlx_zh.planning.shapes import ModelShape, Target
from mlx_zh.recipe import Memory

# The cost of settings in time. The forward pass takes a third as long as a step; a row has the overhead of 48 tokens,
# and a chunk of logits that of 8 positions. These are rough, because they only put candidates in order.
_FORWARD = 1 / 3
_ROW_OVERHEAD, _CHUNK_OVERHEAD = 48, 8
_SMALLEST_ROW = 64
_CHUNKS = (None, 256, 128, 64, 32, 16)


@dataclass(frozen=True, slots=True)
class Step:
    """A training step on a machine: everything that its memory depends on, except the settings."""

    model: ModelShape
    trained: AdapterSpec
    target: Target
    examples: Examples

    def memory(self, settings: Memory) -> Estimate:
        """The peak memory of a step with these settings."""
        row, rows = self.examples.largest_row(settings.micro_tokens)
        return step_memory(self.model, self.trained, self.target, row, settings, rows=rows)


@dataclass(frozen=True, slots=True)
class Candidate:
    """Settings, their peak memory, and how much longer a step takes than with the requested ones (0.3: 30 %)."""

    settings: Memory
    estimate: Estimate
    cost: float


def relative_time(settings: Memory, vocabulary_rows: int) -> float:
    """Time of a step in arbitrary units, for comparing settings.

    `vocabulary_rows` is the default number of rows of logits in a chunk.
    """
    time = 1 + (_FORWARD if settings.checkpoint_layers else 0.0)
    time *= 1 + _ROW_OVERHEAD / settings.micro_tokens
    return time * (1 + 0.2 * _CHUNK_OVERHEAD / (settings.logit_rows or vocabulary_rows))


def cheapest(step: Step, settings: Memory, budget: float) -> Candidate | None:
    """The fastest settings whose peak is within `budget` bytes, or None when no settings fit.

    The requested `settings` are returned when they fit.
    """
    default_rows = chunk_rows(step.model.vocabulary)
    requested_time = relative_time(settings, default_rows)
    micro = [settings.micro_tokens]
    while micro[-1] // 2 >= _SMALLEST_ROW:
        micro.append(micro[-1] // 2)
    chunks = [settings.logit_rows, *(c for c in _CHUNKS if c and c < (settings.logit_rows or default_rows))]
    candidates = [
        Memory(micro_tokens=tokens, checkpoint_layers=checkpoint, logit_rows=rows)
        for checkpoint in sorted({settings.checkpoint_layers, True})
        for tokens in micro
        for rows in chunks
    ]
    candidates.sort(key=lambda candidate: relative_time(candidate, default_rows))
    for candidate in [settings, *candidates]:
        estimate = step.memory(candidate)
        if estimate.peak <= budget:
            return Candidate(candidate, estimate, relative_time(candidate, default_rows) / requested_time - 1)
    return None


def smallest_peak(step: Step, settings: Memory) -> Candidate:
    """The settings with the smallest peak memory."""
    smallest = Memory(micro_tokens=min(_SMALLEST_ROW, settings.micro_tokens), checkpoint_layers=True, logit_rows=16)
    rows = chunk_rows(step.model.vocabulary)
    cost = relative_time(smallest, rows) / relative_time(settings, rows) - 1
    return Candidate(smallest, step.memory(smallest), cost)
