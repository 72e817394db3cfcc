"""How products with frozen quantized weights are computed: what was measured to be faster, and what a run began with.

The two ways round otherwise, so a run keeps its own in its checkpoints (`Progress.products`): what the recipe asked
for ("asked"), and the rules (`core.frozen_products`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_zh.core import frozen_products, product_speed
from mlx_zh.core.logprobs import chunk_rows, decoder, output_head, vocabulary_of
from mlx_zh.distributed.world import World
from mlx_zh.planning import unpacked
from mlx_zh.planning.shapes import model_shape
from mlx_zh.stages import memory_check
from mlx_zh.system import console, device
from mlx_zh.training import checkpoints

if TYPE_CHECKING:
    from mlx_zh.models.load import LoadedModel
    from mlx_zh.recipe import Memory, Recipe


def settle(recipe: Recipe, loaded: LoadedModel, *, tell: bool) -> None:
    """Compute by the rules that the recipe asks for; with `auto`, by what is measured once for each kind of product.

    On the CPU nothing is measured: quantized weights are dequantized there on loading. With `tell`, say what was
    chosen.
    """
    rules = _rules(recipe, loaded)
    frozen_products.use(rules)
    if rules and tell:
        console.say(f"Quantized weights are unpacked for rows of {min(rules.values())} tokens and more.")


def _rules(recipe: Recipe, loaded: LoadedModel) -> frozen_products.Rules:
    settings = recipe.memory
    if loaded.config.get("quantization") is None or (settings.dense_products == "auto" and device.is_cpu()):
        return {}
    dtype = decoder(loaded.model).norm.weight.dtype
    groups = _layers(recipe, loaded)
    forms = {frozen_products.form_of(layer, dtype) for layers, _ in groups for layer in layers}
    if settings.dense_products is True:
        return dict.fromkeys(forms, product_speed.ROWS[-1])
    if forms - product_speed.remembered().keys():
        console.say("Measuring which way products with quantized weights are faster here; this is done once.")
    rules: frozen_products.Rules = {}
    for layers, most in groups:
        rules |= product_speed.measured(layers, dtype, most=most)
    return {form: rows for form, rows in rules.items() if rows}


def _layers(recipe: Recipe, loaded: LoadedModel) -> list[tuple[list[Any], int]]:
    """The layers whose weights there is room to unpack, each group with the most rows that its products have."""
    settings, config = recipe.memory, loaded.config
    machine = memory_check.within_limit(memory_check.this_machine(), settings)
    limit = memory_check.memory_limit(settings, machine)
    model, target = model_shape(config), memory_check.target_of(recipe, config, machine)
    of_blocks, of_head = unpacked.room(settings, model, target, limit)
    head = output_head(loaded.model)
    blocks = [m for m in loaded.model.modules() if isinstance(m, frozen_products.FrozenLinear) and m is not head]
    chunk = settings.logit_rows or chunk_rows(vocabulary_of(head), limit)
    groups: list[tuple[list[Any], int]] = [(blocks, product_speed.ROWS[0])] if of_blocks else []
    if of_head and isinstance(head, frozen_products.QUANTIZED) and chunk >= product_speed.ROWS[-1]:
        groups.append(([head], chunk))
    return groups


def keep(folder: Path, settings: Memory, world: World) -> None:
    """Let all ranks compute alike: as the run did whose checkpoints are in `folder`, or else as all measured.

    A recipe that now asks for another way gets it.
    """
    rules = world.broadcast_result(lambda: _of_run(folder, settings))
    if rules is None:
        rules = frozen_products.agreed(world.collect(frozen_products.current()))
    frozen_products.use(rules)


def record(settings: Memory) -> dict[str, Any]:
    """The way of a run, for `Progress.products`."""
    return {"asked": settings.dense_products, "rules": frozen_products.current()}


def _of_run(folder: Path, settings: Memory) -> frozen_products.Rules | None:
    progress = checkpoints.newest_progress(folder)
    if progress is None:
        return None
    # Earlier versions knew the quantized way only.
    products = progress.get("products") or {"asked": settings.dense_products, "rules": {}}
    if products.get("asked") != settings.dense_products:
        return None
    return {form: rows for form, rows in products.get("rules", {}).items() if isinstance(rows, int)}
