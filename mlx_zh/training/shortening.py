"""Going on where memory ran out: the same step in shorter rows, which give the same result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from mlx_zh.errors import PlanError
from mlx_zh.training.objective import Objective, Row


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
