"""The memory limit that decides what rows compute again, lowered where memory ran out all the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from mlx_zh.core.packing import PackedBatch
from mlx_zh.core.recompute import Levels
from mlx_zh.distributed.world import World
from mlx_zh.system.device import Fault
from mlx_zh.training.objective import Objective, Row

# Keys of `checkpoints.Progress.row_limits`: bytes, and how often they were lowered.
LIMIT, LOWERED = "memory", "memory_lowered"


class Within(Protocol):
    """What rows compute again to stay within a number of bytes."""

    def levels(self, limit: int) -> Callable[[PackedBatch], Levels]:
        """The levels of each row."""

    def below(self, limit: int, rows: Sequence[Row]) -> int | None:
        """A lower limit, at which a row of a step's `rows` computes more again; None where all compute all."""


@dataclass(frozen=True, slots=True)
class Lowered:
    """The accelerator had no memory for `work`, which is done again within `limit` bytes, as all work after it."""

    work: str
    limit: int
    fault: Fault


def keep_within(objective: Objective, within: Within, limit: int) -> None:
    """Let the rows of `objective` compute again what they must to stay within `limit` bytes."""
    objective.settings = replace(objective.settings, checkpoint=within.levels(limit))


def lower(objective: Objective, within: Within | None, limits: dict[str, int], rows: Sequence[Row]) -> int | None:
    """Lower the limit so that one of `rows` computes more again; returns it, None where that is not possible."""
    limit = None if within is None or LIMIT not in limits else within.below(limits[LIMIT], rows)
    if within is None or limit is None:
        return None
    limits |= {LIMIT: limit, LOWERED: limits.get(LOWERED, 0) + 1}
    keep_within(objective, within, limit)
    return limit


def agree(
    objective: Objective, within: Within | None, limits: dict[str, int], world: World, *, changed: bool
) -> None:
    """Give all ranks the smallest limit of any; `changed` says whether this rank's has changed."""
    if within is None or world.size == 1 or not world.any(changed):
        return
    limits |= {LIMIT: world.min(limits[LIMIT]), LOWERED: -world.min(-limits.get(LOWERED, 0))}
    keep_within(objective, within, limits[LIMIT])


def figures(objective: Objective, rows: Sequence[Row], limits: dict[str, int]) -> dict[str, Any]:
    """What a step's line says: a row's mean number of blocks computed again whole, and a limit that was lowered.

    Nothing where the recipe says what is computed again.
    """
    settings = objective.settings
    if not callable(settings.checkpoint) or not rows:
        return {}
    blocks = sum(settings.levels(row.batch).blocks for row in rows)
    again = {"recomputed_layers": round(blocks / len(rows), 2)} if blocks else {}
    return again | ({"memory_limit_gb": round(limits[LIMIT] / 1e9, 3)} if limits.get(LOWERED) else {})
