"""The row of a training step that needs the most memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlx_zh.planning.shapes import Row, conversations, pairs

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Examples:
    """Tokens (N,) and scored tokens (N,) of a stage's examples. The prompt of a pair counts once."""

    stage: str  # sft, dpo or kto, as `Recipe.kind` says
    tokens: Ints
    scored: Ints
    batch_size: int

    def largest_row(self, micro_tokens: int) -> tuple[Row, int]:
        """The largest row that can occur, and the number of rows of the largest step.

        The row holds the longest examples that fit into `micro_tokens` together, and at least one.
        """
        order = np.argsort(-self.tokens, kind="stable")[: 64 * self.batch_size]
        chosen: list[int] = []
        room = micro_tokens
        for index in order.tolist():
            if len(chosen) < self.batch_size and (self.tokens[index] <= room or not chosen):
                chosen.append(index)
                room -= int(self.tokens[index])
        tokens = [int(self.tokens[index]) for index in chosen]
        scored = [int(self.scored[index]) for index in chosen]
        longest = self.tokens[order[: self.batch_size]]
        rows = math.ceil(int(longest.sum()) / max(micro_tokens, int(longest[0])))
        if self.stage != "dpo":
            return conversations(tokens, sum(scored)), rows
        halves = [(max(n - s, 1), max(s // 2, 1), max(s - s // 2, 1)) for n, s in zip(tokens, scored, strict=True)]
        return pairs(halves), rows

    def typical_row(self, micro_tokens: int, tokens: float | None = None) -> Row:
        """A row of examples of `tokens` tokens, by default of the median length, as many as fit.

        Its size is that of the rows that a step's examples are shared between.
        """
        length = max(round(float(np.median(self.tokens)) if tokens is None else tokens), 2)
        in_step = self.batch_size * length
        rows = math.ceil(in_step / max(micro_tokens, length))
        count = max(round(self.batch_size / rows), 1)
        share = float(self.scored.sum()) / max(float(self.tokens.sum()), 1.0)
        scored = min(max(round(share * length), 1), length - 1)
        if self.stage != "dpo":
            return conversations([length] * count, scored * count)
        return pairs([(max(length - scored, 1), max(scored // 2, 1), max(scored - scored // 2, 1))] * count)


def uniform_examples(stage: str, length: int, batch_size: int) -> Examples:
    """One step's examples of `length` tokens each, where the real lengths are not known.

    A pair is taken to have a prompt of a third of its length.
    """
    scored = length - length // 3 if stage == "dpo" else length - 1
    return Examples(stage, np.full(batch_size, length), np.full(batch_size, scored), batch_size)
