"""Check that a training stage fits into memory, before anything heavy starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_zh.core import product_speed
from mlx_zh.core.families import Config
from mlx_zh.core.packing import PackedBatch
from mlx_zh.core.recompute import Levels
from mlx_zh.distributed.local import ranks_here
from mlx_zh.errors import ModelError, PlanError, RecipeError
from mlx_zh.language.notice import Notice
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.planning.ladder import asked_for, rungs
from mlx_zh.planning.largest_row import Examples, uniform_examples
from mlx_zh.planning.memory import Estimate, backward_blocks
from mlx_zh.planning.search import Again, Candidate, Step, cheapest, smallest_peak
from mlx_zh.planning.shapes import Packing, Row, Target, model_shape, planned_targets, row_of
from mlx_zh.planning.unpacked import unpacked_bytes
from mlx_zh.recipe import Memory, Recipe
from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.system import console, device

if TYPE_CHECKING:
    from mlx_zh.corpus.examples import AnySplit
    from mlx_zh.training.objective import Row as TrainingRow

_SHORT = 64  # tokens; the length assumed for every example before the data is read
_LOWER = 0.8  # of what a row that ran out of memory was planned to take
RESERVE = 0.15  # share of a machine's memory that `checkpoint_layers: auto` leaves
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Machine:
    """A machine's memory budget, and whether it computes on the CPU."""

    name: str  # what the budget is; a Notice, which has a Chinese wording too
    budget: float  # bytes that a run may take
    cpu: bool
    attention_tile: int = 0  # see `Target`
    unpacks: bool = False  # whether products from unpacked weights were measured to be faster


def this_machine() -> Machine:
    """The machine that this process runs on; of its memory, the part of this process if a run has several here."""
    import mlx.core as mx

    cpu = device.is_cpu()
    budget = device.free_bytes() / ranks_here() + mx.get_active_memory()
    name = Notice("memory-free" if cpu else "memory-recommended")
    unpacks = not cpu and any(product_speed.remembered().values())
    return Machine(name, budget, cpu, device.attention_tile(), unpacks)


def mac(memory: float) -> Machine:
    """A Mac with `memory` bytes. macOS recommends to use two thirds of up to 32 GB, and three quarters of more."""
    share = 2 / 3 if memory <= 32.5 * 2**30 else 3 / 4
    return Machine(
        Notice("memory-recommended-mac", gigabytes=memory / 2**30),
        memory * share,
        False,
        device.attention_tile("metal"),
    )


def within_limit(machine: Machine, settings: Memory) -> Machine:
    """The machine with no more memory than `memory.limit` gives a run."""
    limit = _limit_asked(settings)
    if limit is None or limit >= machine.budget:
        return machine
    return replace(machine, budget=limit, name=Notice("memory-limit-asked"))


def _limit_asked(settings: Memory) -> float | None:
    """The bytes of `memory.limit` for this process; several processes of a run on one machine share them."""
    return None if settings.limit_bytes is None else settings.limit_bytes / ranks_here()


def limits_nothing(machine: Machine, settings: Memory) -> bool:
    """Whether `memory.limit` is more than the machine has."""
    limit = _limit_asked(settings)
    return limit is not None and limit > machine.budget


def training_step(
    recipe: Recipe, stage: str, config: Config, machine: Machine, examples: Examples | None = None
) -> Step:
    """A training step of `stage` (sft or dpo) on `machine`; without `examples`, all are as long as `data.max_length`.

    Raises ModelError if `config` (the model's config.json) lacks a value that the estimate needs.
    """
    try:
        model = model_shape(config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(
            f"the config of {recipe.model.path} lacks a usable {error}. Download the model again."
        ) from error
    lora = recipe.lora
    targets = planned_targets(model, None if lora.targets == "all" else lora.targets)
    if lora.type != "full" and targets == ():
        raise RecipeError(
            f"lora.targets names {', '.join(lora.targets)}; the linear layers are {', '.join(model.linear)}"
        )
    trained = AdapterSpec(
        kind=lora.type,
        num_layers=model.layers if lora.num_layers == "all" else min(lora.num_layers, model.layers),
        rank=lora.rank,
        dropout=lora.dropout if stage == "sft" else 0.0,
        targets=targets,
        saved=lora.modules_to_save,
    )
    if examples is None:
        batch = recipe.training(stage).batch_size
        length, kind = recipe.data.max_length, recipe.kind(stage)
        examples = uniform_examples(kind, 3 * length // 2 if kind == "dpo" else length, batch)
    limit = memory_limit(recipe.memory, machine)
    target = target_of(recipe, config, machine)
    unpacked = unpacked_bytes(recipe.memory, model, target, limit, faster=machine.unpacks)
    return Step(model, trained, replace(target, unpacked=unpacked), examples, limit)


def memory_limit(settings: Memory, machine: Machine) -> float:
    """Bytes that `memory.checkpoint_layers: auto` stays within.

    They are `memory.limit`, or what the machine has less a reserve of 15 % for MLX's cache of freed buffers and
    for what the planner does not know. A limit of more than the machine has is none.
    """
    limit = None if limits_nothing(machine, settings) else _limit_asked(settings)
    return (1 - RESERVE) * machine.budget if limit is None else limit


@dataclass(frozen=True)
class RowsWithin:
    """What the rows of a stage compute again to stay within a number of bytes. The same row, the same levels."""

    step: Step
    settings: Memory

    def levels(self, limit: int) -> Callable[[PackedBatch], Levels]:
        """The levels of each row within `limit` bytes."""
        step = replace(self.step, limit=float(limit))

        @cache
        def levels(row: Row) -> Levels:
            return step.levels(row, self.settings)

        return lambda batch: levels(row_of(batch))

    def below(self, limit: int, rows: Sequence[TrainingRow]) -> int | None:
        """Four fifths of what the largest of a step's `rows` was planned to take within `limit`.

        Rows that compute everything again do not count; None where all do.
        """
        step = replace(self.step, limit=float(limit))
        last = rungs(backward_blocks(step.model, step.trained), step.target)[-1]
        shapes = [row for row in {row_of(row.batch) for row in rows} if step.levels(row, self.settings) != last]
        peaks = [step.row_memory(row, self.settings, rows=2).peak for row in shapes]
        return int(_LOWER * max(peaks)) if peaks else None


def levels_by_row(
    recipe: Recipe, stage: str, config: Config, trained: AdapterSpec, limit: int
) -> Levels | Callable[[PackedBatch], Levels]:
    """What each row of `stage` computes again: what the recipe names, or what it takes to stay within `limit`."""
    step = actual_step(recipe, stage, config, trained, float(limit))
    asked = asked_levels(recipe, step)
    return RowsWithin(step, recipe.memory).levels(limit) if asked is None else asked


def asked_levels(recipe: Recipe, step: Step) -> Levels | None:
    """The levels that the recipe names for all rows; None for `auto`."""
    return asked_for(recipe.memory, step.target, backward_blocks(step.model, step.trained))


def actual_step(recipe: Recipe, stage: str, config: Config, trained: AdapterSpec, limit: float) -> Step:
    """A step of a run that goes on here: with what it really trains, and the limit that was decided for it."""
    step = training_step(recipe, stage, config, this_machine())
    trained = replace(trained, targets=planned_targets(step.model, trained.targets))
    return replace(step, trained=trained, limit=limit)


def target_of(recipe: Recipe, config: Config, machine: Machine) -> Target:
    """The precision of the loaded model, by the same rules as `models.load`."""
    if machine.cpu and recipe.model.dtype == "auto":
        return Target(4, None, fused_attention=False)
    size = _BYTES.get(dtype_of(recipe, config), 2)
    requested = recipe.model.quantization
    packing = Packing(*requested) if requested else _packing(config.get("quantization"))
    return Target(size, packing, not machine.cpu, machine.attention_tile)


def dtype_of(recipe: Recipe, config: Config) -> str:
    """The type that the model computes in on a GPU: the recipe's, or the one that its weights are stored in."""
    stored = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return stored if recipe.model.dtype == "auto" else recipe.model.dtype


def _packing(described: Any) -> Packing | None:
    if not isinstance(described, dict) or "bits" not in described:
        return None
    modules = [
        (name, (int(form["bits"]), int(form["group_size"])) if isinstance(form, dict) else None)
        for name, form in described.items()
        if isinstance(form, dict) or form is False
    ]
    return Packing(int(described["bits"]), int(described["group_size"]), tuple(modules))


def require(
    recipe: Recipe,
    stage: str,
    *,
    force: bool,
    fresh: bool = False,
    config: Config | None = None,
    corpus: AnySplit | None = None,
) -> None:
    """Raise PlanError if a stage cannot fit into memory; with `force`, only warn.

    Without `corpus`, examples are assumed to be short, so that only what certainly cannot fit is refused before the
    model is loaded. With `corpus`, its longest examples count. A finished run is not checked, except with `fresh`.
    """
    if corpus is None and not fresh and RunFolder.of(recipe).stage(stage).summary.exists():
        return
    if config is None:
        from mlx_zh.models.load import find_config

        config = find_config(recipe.model.path, hub=recipe.model.hub, revision=recipe.model.revision)
    batch = recipe.training(stage).batch_size
    if corpus is None:
        examples = uniform_examples(recipe.kind(stage), min(_SHORT, recipe.data.max_length), batch)
    else:
        examples = Examples(recipe.kind(stage), np.asarray(corpus.lengths), np.asarray(corpus.scored), batch)
    if not len(examples.tokens):
        return
    machine = within_limit(this_machine(), recipe.memory)
    step, settings = training_step(recipe, stage, config, machine, examples), recipe.memory
    estimate = step.memory(settings)
    if estimate.peak <= machine.budget:
        if corpus is not None and settings.checkpoint_layers == "auto" and (again := step.again(settings)).largest:
            console.say(computed_again(again, step))
        return
    way = suggestion(step, settings, machine)
    warning = Notice("memory-short", need=shortage(stage, estimate, machine), way=way)
    if not force:
        raise PlanError(f"{warning} To start anyway, add --force.")
    # Recorded only with the real examples: the estimate with short ones is lower.
    console.warn(warning, keep=corpus is not None)


def shortage(stage: str, estimate: Estimate, machine: Machine) -> Notice:
    """The memory that a stage needs, by part, and the memory that there is."""
    peak, budget = estimate.peak / 1e9, machine.budget / 1e9
    parts = sorted(((n, b) for n, b in estimate.parts.items() if b >= 0.05e9), key=lambda part: -part[1])
    if not parts:
        return Notice("memory-need", stage=stage, peak=peak, budget=budget, place=machine.name)
    listed = [Notice("memory-part", name=Notice(f"memory-part-{name}"), size=size / 1e9) for name, size in parts]
    return Notice("memory-need-by-part", stage=stage, peak=peak, parts=listed, budget=budget, place=machine.name)


def suggestion(step: Step, settings: Memory, machine: Machine) -> Notice:
    """The fastest memory settings that fit, or that none do."""
    fitting = cheapest(step, settings, machine.budget)
    if fitting is None:
        return Notice("memory-no-way", least=smallest_peak(step, settings).estimate.peak / 1e9)
    changes, peak = overrides(fitting.settings, settings), fitting.estimate.peak / 1e9
    return Notice("memory-way", settings=changes, peak=peak, cost=extra_time(fitting))


def computed_again(again: Again, step: Step) -> Notice:
    """How many layers rows compute again, and the time that this saves against computing all again."""
    counts = {"median": again.median, "largest": again.largest, "layers": again.blocks}
    return Notice("memory-again", **counts, limit=(step.limit or 0) / 1e9, saved=again.saved)


def overrides(suggested: Memory, current: Memory) -> str:
    """The settings that differ, as command-line overrides."""
    changes = []
    if suggested.checkpoint_layers != current.checkpoint_layers:
        changes.append(f"memory.checkpoint_layers={str(suggested.checkpoint_layers).lower()}")
    if suggested.micro_tokens != current.micro_tokens:
        changes.append(f"memory.micro_tokens={suggested.micro_tokens}")
    if suggested.logit_rows != current.logit_rows:
        changes.append(f"memory.logit_rows={suggested.logit_rows}")
    return " ".join(changes)


def extra_time(candidate: Candidate) -> Notice:
    """How much longer a step takes with these settings, in words."""
    return Notice("no-more-time") if candidate.cost < 0.005 else Notice("more-time", share=candidate.cost)
