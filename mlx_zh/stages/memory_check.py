"""Whether a training stage of a recipe fits a machine, asked before anything heavy starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_zh.core.families import Config
from mlx_zh.errors import ModelError, PlanError
from mlx_zh.language.notice import Notice
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.planning.largest_row import Examples, uniform_examples
from mlx_zh.planning.memory import Estimate
from mlx_zh.planning.search import Candidate, Step, cheapest, smallest_peak
from mlx_zh.planning.shapes import LINEAR, Packing, Target, model_shape
from mlx_zh.recipe import Memory, Recipe
from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.system import console, device

if TYPE_CHECKING:
    from mlx_zh.corpus.examples import Conversations, Pairs

_SHORT = 64  # tokens; before the data is read, examples are taken to be this short
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Place:
    """A machine: what it recommends to take at most, in bytes, and how it computes."""

    name: str  # of the budget; a notice, for Chinese too
    budget: float
    cpu: bool


def this_machine() -> Place:
    """Where this runs."""
    import mlx.core as mx

    cpu = device.is_cpu()
    budget = device.free_bytes() + mx.get_active_memory()
    return Place(Notice("memory-free" if cpu else "memory-recommended"), budget, cpu)


def mac(memory: float) -> Place:
    """A Mac with `memory` bytes: macOS recommends two thirds of up to 32 GB, and three quarters of more."""
    share = 2 / 3 if memory <= 32.5 * 2**30 else 3 / 4
    return Place(Notice("memory-recommended-mac", gigabytes=memory / 2**30), memory * share, cpu=False)


def training_step(recipe: Recipe, stage: str, config: Config, place: Place, examples: Examples | None = None) -> Step:
    """The step of `stage` (sft or dpo); without `examples`, ones of `data.max_length`."""
    try:
        model = model_shape(config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(
            f"the config of {recipe.model.path} lacks a usable {error}. Download the model again."
        ) from error
    lora = recipe.lora
    trained = AdapterSpec(
        kind=lora.type,
        num_layers=model.layers if lora.num_layers == "all" else min(lora.num_layers, model.layers),
        rank=lora.rank,
        dropout=lora.dropout if stage == "sft" else 0.0,
        targets=None if lora.targets == "all" else tuple(name for name in lora.targets if name in LINEAR),
    )
    if examples is None:
        batch = recipe.training(stage).batch_size
        length = recipe.data.max_length
        examples = uniform_examples(stage, length if stage == "sft" else 3 * length // 2, batch)
    return Step(model, trained, target_of(recipe, config, place), examples)


def target_of(recipe: Recipe, config: Config, place: Place) -> Target:
    """In what precision the model is there; the same rules as in `models.load`."""
    if place.cpu and recipe.model.dtype == "auto":
        return Target(4, None, fused_attention=False)
    stored = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    size = _BYTES.get(stored if recipe.model.dtype == "auto" else recipe.model.dtype, 2)
    asked = recipe.model.quantization
    packing = Packing(*asked) if asked else _packing(config.get("quantization"))
    return Target(size, packing, fused_attention=not place.cpu)


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
    corpus: Conversations | Pairs | None = None,
) -> None:
    """Refuse what cannot fit: PlanError, or with `force` a warning.

    Without `corpus`, before the model is there, examples are taken to be short, so that what is refused surely is
    too much; with it, its longest examples count. A run that is finished already is not asked, save with `fresh`.
    """
    if corpus is None and not fresh and RunFolder.of(recipe).stage(stage).summary.exists():
        return
    if config is None:
        from mlx_zh.models.load import find_config

        config = find_config(recipe.model.path, hub=recipe.model.hub, revision=recipe.model.revision)
    batch = recipe.training(stage).batch_size
    if corpus is None:
        examples = uniform_examples(stage, min(_SHORT, recipe.data.max_length), batch)
    else:
        examples = Examples(stage, np.asarray(corpus.lengths), np.asarray(corpus.scored), batch)
    if not len(examples.tokens):
        return
    place = this_machine()
    step, settings = training_step(recipe, stage, config, place, examples), recipe.memory
    estimate = step.memory(settings)
    if estimate.peak <= place.budget:
        return
    warning = Notice("memory-short", need=too_much(stage, estimate, place), way=way_out(step, settings, place))
    if not force:
        raise PlanError(f"{warning} To start all the same, add --force.")
    console.warn(warning)


def too_much(stage: str, estimate: Estimate, place: Place) -> Notice:
    """What is needed and what is there."""
    peak, budget = estimate.peak / 1e9, place.budget / 1e9
    parts = sorted(((n, b) for n, b in estimate.parts.items() if b >= 0.05e9), key=lambda part: -part[1])
    if not parts:
        return Notice("memory-need", stage=stage, peak=peak, budget=budget, place=place.name)
    listed = [Notice("memory-part", name=Notice(f"memory-part-{name}"), size=size / 1e9) for name, size in parts]
    return Notice("memory-need-by-part", stage=stage, peak=peak, parts=listed, budget=budget, place=place.name)


def way_out(step: Step, settings: Memory, place: Place) -> Notice:
    """The cheapest settings that fit, or that none do."""
    found = cheapest(step, settings, place.budget)
    if found is None:
        return Notice("memory-no-way", least=smallest_peak(step, settings).estimate.peak / 1e9)
    changes, peak = overrides(found.settings, settings), found.estimate.peak / 1e9
    return Notice("memory-way", settings=changes, peak=peak, cost=told_cost(found))


def overrides(found: Memory, asked: Memory) -> str:
    """Settings as they are written on a command line; only what differs."""
    changes = []
    if found.checkpoint_layers != asked.checkpoint_layers:
        changes.append("memory.checkpoint_layers=true")
    if found.micro_tokens != asked.micro_tokens:
        changes.append(f"memory.micro_tokens={found.micro_tokens}")
    if found.logit_rows != asked.logit_rows:
        changes.append(f"memory.logit_rows={found.logit_rows}")
    return " ".join(changes)


def told_cost(found: Candidate) -> Notice:
    """Its time, in words."""
    return Notice("no-more-time") if found.cost < 0.005 else Notice("more-time", share=found.cost)
