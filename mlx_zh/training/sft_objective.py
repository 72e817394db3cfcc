"""The objective of SFT: mean cross-entropy of the scored tokens."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_zh.core.logprobs import batch_logprobs
from mlx_zh.core.losses import sft_loss
from mlx_zh.core.packing import pack_conversations
from mlx_zh.corpus.rendered import Rendered
from mlx_zh.distributed.world import ALONE, World
from mlx_zh.training.objective import Row, Settings, Sums, plan_share


class SftObjective:
    """Mean cross-entropy over all scored tokens of a step."""

    sums: tuple[str, ...] = ()
    coupled = False

    def __init__(self, examples: Sequence[Rendered], settings: Settings, world: World = ALONE) -> None:
        self.size = len(examples)
        self._world = world
        self._examples = examples
        self.settings = settings

    def rows(self, examples: npt.NDArray[np.int64], step: int | None) -> list[Row]:
        """This rank's rows, of at most `micro_tokens` tokens or one conversation."""
        chosen = [self._examples[int(i)] for i in examples]
        count = sum(_scored(example) for example in chosen)
        rows = []
        for members in plan_share(self._world, [len(e.tokens) for e in chosen], self.settings.micro_tokens):
            batch = pack_conversations((chosen[m].tokens, chosen[m].trained, chosen[m].segments) for m in members)
            ids = tuple(int(examples[m]) for m in members)
            rows.append(Row(batch, ids, self.settings.noise(batch, step, ids), count, step is not None))
        return rows

    def prepared(self, model: nn.Module, rows: list[Row]) -> list[Row]:
        """The rows unchanged, because they do not depend on each other."""
        return rows

    def share(self, model: nn.Module, row: Row) -> tuple[mx.array, Sums]:
        """Minus the sum of the row's log-probs, divided by the scored tokens of the step; no sums."""
        logprobs = batch_logprobs(
            model,
            row.batch,
            checkpoint=self.settings.levels(row.batch),
            chunk=self.settings.logit_rows,
            grad=row.training,
            noise=row.noise,
        )
        return sft_loss(logprobs, row.count), {}

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """No metrics: SFT has only its loss."""
        return {}


def _scored(example: Rendered) -> int:
    return int(np.count_nonzero(example.trained[1:]))  # nothing predicts a row's first token
