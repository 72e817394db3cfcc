"""What a training step optimizes: how its examples become rows, and what each row adds to the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_zh.corpus.render import Rendered
from mlx_zh.logprobs import batch_logprobs
from mlx_zh.losses import sft_loss
from mlx_zh.packing import PackedBatch, pack_conversations, plan_rows
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


class Objective(Protocol):
    """A loss over examples that may be cut into rows in any way."""

    size: int

    def rows(self, examples: npt.NDArray[np.int64], step: int | None) -> list[Row]:
        """The rows of a training step, or of a validation pass when `step` is None."""

    def share(self, model: nn.Module, row: Row) -> tuple[mx.array, Sums]:
        """What a row adds to the step's loss, and to sums that `metrics` turns into figures."""

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """The figures of a step from its rows' added sums."""


class SftObjective:
    """Mean cross-entropy over all scored tokens of a step."""

    def __init__(self, examples: Sequence[Rendered], settings: Settings) -> None:
        self.size = len(examples)
        self._examples = examples
        self._settings = settings

    def rows(self, examples: npt.NDArray[np.int64], step: int | None) -> list[Row]:
        """Rows of at most `micro_tokens` tokens."""
        chosen = [self._examples[int(i)] for i in examples]
        count = sum(_scored(example) for example in chosen)
        rows = []
        for members in plan_rows([len(e.tokens) for e in chosen], self._settings.micro_tokens):
            batch = pack_conversations((chosen[m].tokens, chosen[m].trained) for m in members)
            ids = tuple(int(examples[m]) for m in members)
            rows.append(Row(batch, ids, self._settings.noise(batch, step, ids), count, step is not None))
        return rows

    def share(self, model: nn.Module, row: Row) -> tuple[mx.array, Sums]:
        """Minus the row's summed log-probs over the step's scored tokens."""
        logprobs = batch_logprobs(
            model,
            row.batch,
            checkpoint=row.training and self._settings.checkpoint,
            chunk=self._settings.logit_rows,
            grad=row.training,
            noise=row.noise,
        )
        return sft_loss(logprobs, row.count), {}

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """SFT has no figures beside its loss."""
        return {}


def _scored(example: Rendered) -> int:
    return int(np.count_nonzero(example.trained[1:]))  # nothing predicts a row's first token
