"""The objective of a training step: how examples become rows, and what each row adds to the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_zh.core.packing import PackedBatch, plan_rows
from mlx_zh.core.recompute import Levels, levels
from mlx_zh.distributed.world import World
from mlx_zh.errors import PlanError
from mlx_zh.training.noise import StepNoise, example_seeds

Sums = dict[str, mx.array]


@dataclass(frozen=True, slots=True)
class Settings:
    """How rows are computed. `micro_tokens`, `checkpoint` and `logit_rows` do not change the result.

    `checkpoint` says which blocks are computed again: all or none, `Levels`, or the levels of each row.
    `micro_tokens` is the largest number of tokens in a row, `logit_rows` that of rows in a chunk of logits. `seed` is
    for dropout and NEFTune.
    """

    seed: int
    micro_tokens: int
    checkpoint: bool | Levels | Callable[[PackedBatch], Levels] = False
    logit_rows: int | None = None
    dropout: float = 0.0
    neftune_alpha: float | None = None

    def levels(self, batch: PackedBatch) -> Levels:
        """What a training row computes again."""
        return self.checkpoint(batch) if callable(self.checkpoint) else levels(self.checkpoint)

    def noise(self, batch: PackedBatch, step: int | None, examples: Sequence[int]) -> StepNoise | None:
        """The noise of a row in training step `step`; None without noise, and in validation (`step` None)."""
        if step is None or (self.dropout == 0 and self.neftune_alpha is None):
            return None
        seeds = example_seeds(self.seed, step, examples)
        return StepNoise(batch, seeds, dropout=self.dropout > 0, neftune_alpha=self.neftune_alpha)


@dataclass(frozen=True, slots=True)
class Row:
    """A micro-batch: a packed row and the indices of its examples.

    `count` is what the loss of the whole step is divided by: its scored tokens (SFT) or pairs (DPO).
    """

    batch: PackedBatch
    examples: tuple[int, ...]
    noise: StepNoise | None
    count: int
    training: bool


def plan_share(world: World, lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """The rows of this rank's share of a step's examples, each as indices into `lengths`, which are in tokens."""
    share = world.share(lengths)
    return [[share[m] for m in row] for row in plan_rows([lengths[m] for m in share], max_tokens)]


class Objective(Protocol):
    """A loss over `size` examples. It does not depend on how they are cut into rows and shared between ranks."""

    size: int
    settings: Settings
    sums: tuple[str, ...]  # names of the sums that `share` returns
    coupled: bool  # `prepared` needs the rows of all ranks

    def rows(self, examples: npt.NDArray[np.int64], step: int | None) -> list[Row]:
        """This rank's rows of a training step, or of a validation pass when `step` is None."""

    def prepared(self, model: nn.Module, rows: list[Row]) -> list[Row]:
        """The rows of a step, each with what it needs from the others, so that `share` can take it alone."""

    def share(self, model: nn.Module, row: Row) -> tuple[mx.array, Sums]:
        """What a row adds to the step's loss (a scalar), and to the sums that `metrics` reads."""

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """The metrics of a step, by name, from the sums over all its rows."""


def can_shorten(rows: Sequence[Row]) -> bool:
    """Whether some row has more than one example, so that rows can be cut."""
    return any(len(row.examples) > 1 for row in rows)


def shorten(objective: Objective, rows: Sequence[Row], work: str) -> int:
    """Halve the objective's `micro_tokens`, so that the longest of `rows` becomes shorter; returns the new value.

    `work` names what ran out of memory. Raises PlanError when every row has only one example, which cannot be cut.
    """
    longest = max(int(row.batch.tokens.size) for row in rows)
    if not can_shorten(rows):
        raise PlanError(
            f"{work} does not fit into memory, not even one example at a time (the longest has {longest} tokens). "
            "Set memory.checkpoint_layers: true, or a smaller memory.logit_rows or data.max_length, or close other "
            "programs; then run the same command again."
        )
    micro_tokens = min(objective.settings.micro_tokens, longest) // 2
    limit_rows(objective, micro_tokens)
    return micro_tokens


def limit_rows(objective: Objective, micro_tokens: int) -> None:
    """Let the objective's rows have at most `micro_tokens` tokens from now on."""
    objective.settings = replace(objective.settings, micro_tokens=micro_tokens)
