"""The steps of a run that are out of date, with the reason and the expected time and memory."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from mlx_zh.pipeline.state import Record, State
from mlx_zh.pipeline.steps import StageFiles, Step
from mlx_zh.recipe import Recipe
from mlx_zh.system.escaping import text_lines
from mlx_zh.system.json_text import parse_json


@dataclass(frozen=True)
class Planned:
    """A step and why it must run (None: it is up to date), with time and memory of an earlier run."""

    step: Step
    why: str | None
    seconds: float | None = None
    peak_memory_gb: float | None = None


def plan(state: State, recipe: Recipe, steps: list[Step], forced: Collection[str]) -> list[Planned]:
    """What a run would do now.

    A step that depends on one that runs is listed as running, although it may turn out to be up to date.
    """
    planned: list[Planned] = []
    running: set[str] = set()
    for step in steps:
        why = reason(state, recipe, step, forced)
        if why is None and (before := [name for name in step.after if name in running]):
            why = f"if {' or '.join(before)} {'gives' if len(before) == 1 else 'give'} another result"
        if why is None:
            planned.append(Planned(step, None))
            continue
        running.add(step.name)
        earlier = _earlier(state, recipe, step)
        estimates = (earlier.seconds, earlier.peak_memory_gb) if earlier else (None, None)
        planned.append(Planned(step, why, *estimates))
    return planned


def reason(state: State, recipe: Recipe, step: Step, forced: Collection[str]) -> str | None:
    """Why a step must run now; None when it is up to date."""
    return "requested by --from" if step.name in forced else state.outdated(step, state.inputs(step, recipe))


def _earlier(state: State, recipe: Recipe, step: Step) -> Record | None:
    """The record of the same step in this run, or else in the newest other run of the same model."""
    own = state.records.get(step.name)
    if own is not None and own.outputs:
        return own
    folders = [other for path in state.run.path.parent.glob("*") if (other := state.run.at(path)).pipeline.exists()]
    for other in sorted(folders, key=lambda run: run.pipeline.stat().st_mtime, reverse=True):
        record = State.of(other).records.get(step.name)
        if record and record.outputs and record.inputs.get("model.path") == recipe.model.path:
            return record
    return None


def peak_memory(folder: StageFiles) -> float | None:
    """The highest `peak_memory_gb` in a training stage's metrics, or None without readable metrics."""
    try:
        lines = list(text_lines(folder.metrics.read_text(encoding="utf-8")))
        return max((float(parse_json(line).get("peak_memory_gb") or 0) for line in lines), default=None)
    except (OSError, ValueError, TypeError):
        return None
