"""The plan of the first step against the peak that MLX measures in it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

import mlx.core as mx

from mlx_zh.core.families import Config
from mlx_zh.language.notice import Notice
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.planning.memory import Estimate
from mlx_zh.planning.search import Step
from mlx_zh.planning.shapes import Row, row_of
from mlx_zh.recipe import Recipe
from mlx_zh.stages import memory_check
from mlx_zh.system import device
from mlx_zh.training.objective import Row as TrainingRow

LIMIT = 0.15  # a larger deviation is told
_SMALL = 1e8  # bytes; a smaller deviation is not, as it decides nothing


def deviation(
    recipe: Recipe,
    stage: str,
    config: Config,
    trained: AdapterSpec,
    limit: float,
    rows: Sequence[TrainingRow],
    measured: float,
) -> Notice | None:
    """A warning if the peak of a step of these `rows`, `measured` in bytes, is far from the plan's; else None."""
    step = memory_check.actual_step(recipe, stage, config, trained, limit)
    shapes = [row_of(row.batch) for row in rows]
    estimates = [step.row_memory(row, recipe.memory, rows=len(rows)) for row in shapes]
    if not estimates:
        return None
    planned, row = max(zip(estimates, shapes, strict=True), key=lambda pair: pair[0].peak)
    difference = measured - planned.peak
    if abs(difference) <= max(LIMIT * planned.peak, _SMALL):
        return None
    return Notice(
        "plan-deviates",
        measured=measured / 1e9,
        planned=planned.peak / 1e9,
        difference=difference / planned.peak,
        line=_report(recipe, stage, step, row, len(rows), planned),
    )


def _report(recipe: Recipe, stage: str, step: Step, row: Row, rows: int, planned: Estimate) -> str:
    """Everything that the plan depends on, on one line, without names of files."""
    model, target, trained, memory = step.model, step.target, step.trained, recipe.memory
    packing = f"{target.packing.bits}-bit/{target.packing.group}" if target.packing else "unquantized"
    longest = max(tokens for tokens, _ in row.segments)
    parts = " ".join(f"{name}={size / 1e6:.0f}" for name, size in planned.parts.items())
    return "; ".join(
        (
            f"mlx {version('mlx')} {device.back_end()} {mx.device_info().get('device_name', 'CPU')}",
            f"{model.layers} layers D={model.hidden} F={model.intermediate} A={model.queries} K={model.keys} "
            f"heads={model.heads} V={model.vocabulary} {packing} {8 * target.value_bytes}-bit values",
            f"{stage} {trained.kind} rank={trained.rank} layers={trained.num_layers} dropout={trained.dropout}",
            f"rows: {rows}, the largest {row.tokens} tokens in {len(row.segments)} segments up to {longest}, "
            f"{row.scored} scored",
            f"checkpoint_layers={memory.checkpoint_layers} {step.levels(row, memory)} logit_rows={memory.logit_rows}",
            f"{planned.phase}: {parts} MB",
        )
    )
