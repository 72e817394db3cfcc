"""What a training step optimizes: how its examples become rows, and what each row adds to the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_zh.core.packing import PackedBatch, plan_rows
from mlx_zh.distributed.world import World
from mlx_zh.errors import PlanError
from mlx_zh.training.noise import StepNoise, example_seeds

Sums = dict[str, mx.array]


@dataclass(frozen=True, slots=True)
class Settings:
    """How rows are computed. `seed` drives dropout and NEFTune; the other settings change no result."""

    seed: int
    micro_tokens: int
    checkpoint: bool = False
    logit_rows: int | None = None
    dropout: float = 0.0
    neftune_alpha: float | None = None

    def noise(self, batch: PackedBatch, step: int | None, examples: Sequence[int]) -> StepNoise | None:
        """A row's randomness in training step `step`; None where there is none, as in validation."""
        if step is None or (self.dropout == 0 and self.neftune_alpha is None):
            return None
        seeds = example_seeds(self.seed, step, examples)
        return StepNoise(batch, seeds, dropout=self.dropout > 0, neftune_alpha=self.neftune_alpha)


@dataclass(frozen=True, slots=True)
class Row:
    """A micro-batch: a packed row, the examples in it, and the count that the whole step's loss is divided by."""

    batch: PackedBatch
    examples: tuple[int, ...]
    noise: StepNoise | None
    count: int
    training: bool


def plan_share(world: World, lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """The rows of this rank's share of a step's examples, as indices of them."""
    mine = world.share(lengths)
    return [[mine[m] for m in row] for row in plan_rows([lengths[m] for m in mine], max_tokens)]


class Objective(Protocol):
    """A loss over examples that may be cut into rows, and dealt to ranks, in any way."""

    size: int
    settings: Settings
    sums: tuple[str, ...]  # names of what `share` adds up
    coupled: bool  # whether `prepared` needs the rows of all ranks

    def rows(self, examples: npt.NDArray[np.int64], step: int | None) -> list[Row]:
        """This rank's rows of a training step, or of a validation pass when `step` is None."""

    def prepared(self, model: nn.Module, rows: list[Row]) -> list[Row]:
        """The rows of a step with whatever a row needs to know of the others, so that `share` can take any one."""

    def share(self, model: nn.Module, row: Row) -> tuple[mx.array, Sums]:
        """What a row adds to the step's loss, and to sums that `metrics` turns into figures."""

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """The figures of a step from its rows' added sums."""


def shorten(objective: Objective, rows: Sequence[Row], what: str) -> int:
    """Halve the objective's `micro_tokens` so that rows like these become shorter; returns the new value.

    Raises PlanError where each of them holds one example already, which nothing can cut.
    """
    longest = max(int(row.batch.tokens.size) for row in rows)
    if all(len(row.examples) == 1 for row in rows):
        raise PlanError(
            f"{what} does not fit into memory, not even one example at a time (the longest has {longest} tokens). "
            "Set memory.checkpoint_layers: true, or a smaller memory.logit_rows or data.max_length, or close other "
            "programs; then run the same command again."
        )
    micro_tokens = min(objective.settings.micro_tokens, longest) // 2
    objective.settings = replace(objective.settings, micro_tokens=micro_tokens)
    mx.clear_cache()
    return micro_tokens
