"""The search for the fastest memory settings that fit. No setting changes the result of training."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mlx_zh.core.logprobs import chunk_rows
from mlx_zh.core.recompute import Levels
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.planning.ladder import extra_share, levels_of, recomputed
from mlx_zh.planning.largest_row import Examples
from mlx_zh.planning.memory import Estimate, backward_blocks, step_memory
from mlx_zh.planning.shapes import ModelShape, Row, Target
from mlx_zh.recipe import Memory

# The cost of settings in time. The forward pass takes a third as long as a step; a row has the overhead of 48 tokens,
# and a chunk of logits that of 8 positions. These are rough, because they only put candidates in order.
_FORWARD = 1 / 3
_ROW_OVERHEAD, _CHUNK_OVERHEAD = 48, 8
_SMALLEST_ROW = 64
_CHUNKS = (None, 256, 128, 64, 32, 16)


@dataclass(frozen=True, slots=True)
class Again:
    """Blocks that are computed again whole, of a median row and of the largest, out of `blocks`.

    `share` is how many forward passes of all blocks a median row computes again.
    """

    median: int
    largest: int
    blocks: int
    share: float

    @property
    def saved(self) -> float:
        """The share of a step's time that is saved against computing every block again."""
        return _FORWARD * (1 - self.share) / (1 + _FORWARD)


@dataclass(frozen=True, slots=True)
class Step:
    """A training step on a machine: everything that its memory depends on, except the settings.

    `limit` is how many bytes `memory.checkpoint_layers: auto` may use; None: any.
    """

    model: ModelShape
    trained: AdapterSpec
    target: Target
    examples: Examples
    limit: float | None = None

    def memory(self, settings: Memory) -> Estimate:
        """The peak memory of a step with these settings."""
        row, rows = self.examples.largest_row(settings.micro_tokens)
        return self.row_memory(row, settings, rows=rows)

    def row_memory(self, row: Row, settings: Memory, *, rows: int) -> Estimate:
        """The peak memory of a step of `rows` rows, of which `row` is the largest."""
        levels, logit_rows = self.levels(row, settings), self.logit_rows(settings)
        return step_memory(self.model, self.trained, self.target, row, levels, logit_rows=logit_rows, rows=rows)

    def logit_rows(self, settings: Memory) -> int:
        """The rows of logits in a chunk."""
        return settings.logit_rows or chunk_rows(self.model.vocabulary, self.limit)

    def levels(self, row: Row, settings: Memory) -> Levels:
        """What `row` computes again."""
        return levels_of(self.model, self.trained, self.target, row, settings, self.limit)

    def again(self, settings: Memory, tokens: float | None = None) -> Again:
        """What rows compute again, if examples have `tokens` tokens; by default, the median of the examples."""
        blocks = backward_blocks(self.model, self.trained)
        typical = self.levels(self.examples.typical_row(settings.micro_tokens, tokens), settings)
        largest = self.levels(self.examples.largest_row(settings.micro_tokens)[0], settings)
        share = extra_share(typical, self.model, self.trained, self.target)
        return Again(recomputed(typical, blocks), recomputed(largest, blocks), blocks, share)


@dataclass(frozen=True, slots=True)
class Candidate:
    """Settings, their peak memory, and how much longer a step takes than with the requested ones (0.3: 30 %)."""

    settings: Memory
    estimate: Estimate
    cost: float


def relative_time(step: Step, settings: Memory) -> float:
    """Time of a step in arbitrary units, for comparing settings."""
    examples, rows = step.examples, step.logit_rows(settings)
    typical = examples.typical_row(settings.micro_tokens)
    share = extra_share(step.levels(typical, settings), step.model, step.trained, step.target)
    time = (1 + _FORWARD * share) * (1 + _ROW_OVERHEAD / typical.tokens)
    return time * (1 + 0.2 * _CHUNK_OVERHEAD / rows)


def cheapest(step: Step, settings: Memory, budget: float) -> Candidate | None:
    """The fastest settings whose peak is within `budget` bytes, or None when no settings fit.

    Row length, blocks that are computed again and chunks of logits are chosen together. The requested `settings` are
    returned when they fit and nothing is faster by more than `_WORTH`.
    """
    step = replace(step, limit=budget if step.limit is None else min(step.limit, budget))
    default_rows = chunk_rows(step.model.vocabulary, step.limit)
    requested = relative_time(step, settings)
    micro = [settings.micro_tokens]
    while micro[-1] // 2 >= _SMALLEST_ROW:
        micro.append(micro[-1] // 2)
    chunks = [settings.logit_rows, *(c for c in _CHUNKS if c and c < (settings.logit_rows or default_rows))]
    ways = dict.fromkeys((settings.checkpoint_layers, "auto"))
    candidates = [
        settings.model_copy(update={"micro_tokens": tokens, "checkpoint_layers": way, "logit_rows": rows})
        for way in ways
        for tokens in micro
        for rows in chunks
    ]
    timed = sorted(
        ((relative_time(step, candidate), candidate) for candidate in candidates), key=lambda pair: pair[0]
    )
    best: Candidate | None = None
    for time, candidate in timed:
        estimate = step.memory(candidate)
        if estimate.peak <= budget:
            best = Candidate(candidate, estimate, time / requested - 1)
            break
    if best is None or best.cost > -_WORTH:
        estimate = step.memory(settings)
        if estimate.peak <= budget:
            return Candidate(settings, estimate, 0.0)
    return best


_WORTH = 0.03  # other settings are proposed only if they are faster by more


def smallest_peak(step: Step, settings: Memory) -> Candidate:
    """The settings with the smallest peak memory."""
    change = {"micro_tokens": min(_SMALLEST_ROW, settings.micro_tokens), "checkpoint_layers": True, "logit_rows": 16}
    smallest = settings.model_copy(update=change)
    cost = relative_time(step, smallest) / relative_time(step, settings) - 1
    return Candidate(smallest, step.memory(smallest), cost)
