"""What recipes take on each Mac: hours by chip, memory, disk and downloads, as Markdown. Nothing here is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlx_zh.core.families import Config
from mlx_zh.models.load import find_config
from mlx_zh.planning.budget import Decision
from mlx_zh.planning.chips import Chip, chips, predicted_pace
from mlx_zh.planning.workload import SCORED, stages_of
from mlx_zh.recipe import Recipe
from mlx_zh.stages import memory_check
from mlx_zh.stages.budgeting import decision_for
from mlx_zh.stages.data import registry_of
from mlx_zh.stages.needs import disk_bytes, downloads_of

_GIB = 2**30


@dataclass(frozen=True)
class Needs:
    """A recipe, its model's config, and the highest memory of its stages in bytes."""

    recipe: Recipe
    config: Config
    peak: float


def mac_table(recipes: Sequence[Recipe]) -> str:
    """Two Markdown tables: what each recipe needs, and its predicted hours by chip. Raises MlxZhError."""
    needs = [_needs(recipe) for recipe in recipes]
    rows = [_row(chip, needs) for chip in chips().values()]
    hours = _markdown(["Chip", *(need.recipe.name for need in needs)], [row for row in rows if any(row[1:])])
    sizes = _markdown(["Recipe", "Memory", "Mac from", "Disk", "Downloads"], [_size_row(need) for need in needs])
    return f"{sizes}\n\n{hours}"


def predicted(recipe: Recipe, config: Config, chip: Chip) -> Decision:
    """How a run is spent on `chip`, by its published figures. Raises PlanError for a budget that is too small."""
    machine = memory_check.mac(max(chip.memory) * _GIB)
    step = memory_check.training_step(recipe, "sft", config, machine)
    again = step.again(recipe.memory).share
    pace = predicted_pace(chip, step.model, step.trained, step.target, again=again, scored=SCORED["sft"])
    return decision_for(recipe, config, machine, pace)[1]


def smallest_mac(peak: float) -> int | None:
    """The smallest memory in GB, of those sold, of which macOS lets a program use `peak` bytes; None if none does."""
    sold = sorted({size for chip in chips().values() for size in chip.memory})
    return next((size for size in sold if memory_check.mac(size * _GIB).budget >= peak), None)


def _needs(recipe: Recipe) -> Needs:
    config = find_config(recipe.model.path, hub=recipe.model.hub, revision=recipe.model.revision)
    machine = memory_check.mac(16 * _GIB)  # of any size: what is needed if no layer has to be computed again
    steps = [
        replace(memory_check.training_step(recipe, name, config, machine), limit=None)
        for name in stages_of(recipe) or ("sft",)
    ]
    return Needs(recipe, config, max(step.memory(recipe.memory).peak for step in steps))


def _row(chip: Chip, needs: Sequence[Needs]) -> list[str]:
    return [chip.name, *(_hours(chip, need) for need in needs)]


def _hours(chip: Chip, need: Needs) -> str:
    """Hours or days on a Mac with this chip; empty if none has the memory."""
    smallest = smallest_mac(need.peak)
    if smallest is None or max(chip.memory) < smallest:
        return ""
    decision = predicted(need.recipe, need.config, chip)
    hours = decision.total / 3600
    time = f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.0f} days"
    learned = [
        f"{decision.steps[name] * need.recipe.training(name).batch_size:,} {unit}"
        for name, unit in (("sft", "conversations"), ("dpo", "answers" if need.recipe.dpo.unpaired else "pairs"))
        if name in decision.steps
    ]
    return ", ".join([time, *learned])


def _size_row(need: Needs) -> list[str]:
    recipe = need.recipe
    stages = (*stages_of(recipe), *(("eval",) if recipe.evaluate.benchmarks else ()))
    wanted = downloads_of(recipe, registry_of(recipe), stages)
    unknown = any(item.gigabytes is None for item in wanted)
    downloads = sum(item.gigabytes or 0.0 for item in wanted)
    smallest = smallest_mac(need.peak)
    return [
        f"`{recipe.name}`",
        f"{need.peak / 1e9:.1f} GB",
        "—" if smallest is None else f"{smallest} GB",
        f"{disk_bytes(recipe, need.config) / 1e9:.1f} GB",
        f"{downloads:.1f} GB{' and more' if unknown else ''}",
    ]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell or '—' for cell in line)} |" for line in lines)
