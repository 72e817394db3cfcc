"""Which memory settings fit: the quickest of those that change no result."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_zh.core.logprobs import chunk_rows
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.planning.fullest import Examples
from mlx_zh.planning.memory import Estimate, step_memory
from mlx_zh.planning.shapes import ModelShape, Target
from mlx_zh.recipe import Memory

# What settings cost in time, as shares: the forward pass is a third of a step, a row has the overhead of so many
# tokens, and a chunk of logits that of so many positions. Rough; they only put candidates in order.
_FORWARD = 1 / 3
_ROW_OVERHEAD, _CHUNK_OVERHEAD = 48, 8
_SMALLEST_ROW = 64
_CHUNKS = (None, 256, 128, 64, 32, 16)


@dataclass(frozen=True, slots=True)
class Step:
    """A training step on a machine: all that its memory depends on, save the settings."""

    model: ModelShape
    trained: AdapterSpec
    target: Target
    examples: Examples

    def memory(self, settings: Memory) -> Estimate:
        """The peak with these settings."""
        row, rows = self.examples.fullest(settings.micro_tokens)
        return step_memory(self.model, self.trained, self.target, row, settings, rows=rows)


@dataclass(frozen=True, slots=True)
class Candidate:
    """Settings that fit, their peak, and how much longer a step takes than with those asked for (0.3: 30 %)."""

    settings: Memory
    estimate: Estimate
    cost: float


def relative_time(settings: Memory, vocabulary_rows: int) -> float:
    """Time of a step in arbitrary units, for comparing settings."""
    time = 1 + (_FORWARD if settings.checkpoint_layers else 0.0)
    time *= 1 + _ROW_OVERHEAD / settings.micro_tokens
    return time * (1 + 0.2 * _CHUNK_OVERHEAD / (settings.logit_rows or vocabulary_rows))


def cheapest(step: Step, settings: Memory, budget: float) -> Candidate | None:
    """The quickest settings whose peak is within `budget` bytes; those asked for where they fit; None if none do."""
    default_rows = chunk_rows(step.model.vocabulary)
    asked = relative_time(settings, default_rows)
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
    candidates.sort(key=lambda found: relative_time(found, default_rows))
    for found in [settings, *candidates]:
        estimate = step.memory(found)
        if estimate.peak <= budget:
            return Candidate(found, estimate, relative_time(found, default_rows) / asked - 1)
    return None


def least(step: Step, settings: Memory) -> Candidate:
    """The settings with the smallest peak."""
    lowest = Memory(micro_tokens=min(_SMALLEST_ROW, settings.micro_tokens), checkpoint_layers=True, logit_rows=16)
    rows = chunk_rows(step.model.vocabulary)
    cost = relative_time(lowest, rows) / relative_time(settings, rows) - 1
    return Candidate(lowest, step.memory(lowest), cost)
