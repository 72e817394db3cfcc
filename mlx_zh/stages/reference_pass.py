"""The reference pass of preference tuning: read stored reference log-probs, compute and store the missing ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mlx_zh.corpus.rendered import RenderedPair
from mlx_zh.distributed.world import ALONE, World
from mlx_zh.errors import DeviceError, PlanError
from mlx_zh.language.notice import Notice
from mlx_zh.models.adapters.layers import trainable
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.models.load import LoadedModel
from mlx_zh.recipe import Recipe
from mlx_zh.stages import setbacks
from mlx_zh.stages.first_adapter import Start
from mlx_zh.system import console, device, storage
from mlx_zh.system.accelerator import REPEATS, AcceleratorError, advice, cause, pause, settle
from mlx_zh.system.device import Fault
from mlx_zh.training.optimizer import Arrays
from mlx_zh.training.order import Order
from mlx_zh.training.reference import Reference, ReferenceStore, forward_tokens, model_key


@dataclass(frozen=True, slots=True)
class ReferenceLogprobs:
    """Reference log-probs, float32, as `training.reference` defines their columns; None for a loss without them."""

    training: npt.NDArray[np.float32] | None = None  # (pairs, 4); NaN for pairs that the run does not visit
    validation: npt.NDArray[np.float32] | None = None  # (pairs, 4)
    is_start: bool = False  # whether the reference has exactly the weights that training starts from


def attach_with_reference(
    recipe: Recipe,
    loaded: LoadedModel,
    start: Start,
    spec: AdapterSpec,
    pairs: Sequence[RenderedPair],
    validation: Sequence[RenderedPair],
    world: World,
) -> ReferenceLogprobs:
    """Add the adapter to the model, and read or compute the reference: of the base, or of the starting adapter.

    This comes before the weights of a checkpoint are loaded. Raises PlanError if one pair does not fit into memory.
    """
    console.say(f"Starting from {start.described}.")
    choice = recipe.dpo.reference
    # A quantized table becomes float32 where it is trained, which rounds its products otherwise.
    same_tables = not spec.saved or loaded.config.get("quantization") is None
    base_is_start = start.folder is None and spec.kind != "full" and same_tables
    is_start = choice == "start" or (choice == "base" and base_is_start)
    if choice == "base" or base_is_start:
        reference = find_reference(recipe, loaded, None, pairs, validation, world)
        start.attach(loaded, spec)
    else:
        start.attach(loaded, spec)
        reference = find_reference(recipe, loaded, (spec, trainable(loaded.model)), pairs, validation, world)
    return replace(reference, is_start=is_start)


def find_reference(
    recipe: Recipe,
    loaded: LoadedModel,
    adapter: tuple[AdapterSpec, Arrays] | None,
    pairs: Sequence[RenderedPair],
    validation: Sequence[RenderedPair],
    world: World = ALONE,
) -> ReferenceLogprobs:
    """The current model's log-probs of the pairs that this run visits; none for a loss without a reference.

    `adapter` is the adapter on the model, if any: the name of the stored file depends on it.
    """
    section = recipe.dpo
    if section.reference == "none":
        return ReferenceLogprobs()
    order = Order(len(pairs), section.batch_size, recipe.seed)
    visited = order.visited(order.steps(section.epochs, section.max_steps))
    needed = [*(pairs[i] for i in visited), *validation]
    name = f"{model_key(loaded.fingerprint, loaded.model, adapter)}.txt"
    store = ReferenceStore(storage.cache_folder() / "reference" / name)
    reference = Reference(store, needed, world)
    missing = len(reference.missing)
    if section.unpaired:
        console.say(f"Reference log-probs: {reference.cached} answers found in {store.path}, {missing} to compute.")
    else:
        console.say(f"Reference log-probs: {reference.cached} pairs found in {store.path}, {missing} to compute.")
    if missing:
        _compute(reference, recipe, loaded, world)
    return ReferenceLogprobs(reference.logprobs(pairs), reference.logprobs(validation) if validation else None)


def _compute(reference: Reference, recipe: Recipe, loaded: LoadedModel, world: World) -> None:
    memory = recipe.memory
    row_tokens = world.min(forward_tokens(loaded.model, memory.micro_tokens, device.free_bytes()))
    repeats = 0
    bar = console.CountBar("REFERENCE", reference.missing_tokens, "tok")
    try:
        while reference.missing:
            try:
                for tokens in reference.compute(loaded.model, row_tokens=row_tokens, chunk=memory.logit_rows):
                    bar.update(tokens)
                continue
            except AcceleratorError as error:
                fault = error.fault  # the handler ends before the next try, so that arrays of the error are freed
            settle()
            shorter = _shorter(reference, row_tokens, fault)
            if shorter == row_tokens:
                repeats += 1
                _repeat(fault, repeats)
            row_tokens = shorter
    except KeyboardInterrupt:
        console.say("Stopped; the reference log-probs computed so far are kept.")
        raise
    finally:
        bar.close()


def _shorter(reference: Reference, row_tokens: int, fault: Fault) -> int:
    """Half of `row_tokens` if that may help, with a warning; else `row_tokens`.

    Raises PlanError if not even the longest pair alone fits into memory.
    """
    longest = reference.longest_missing
    if not fault.shortens or (row_tokens <= longest and fault.kind != "memory"):
        return row_tokens
    if row_tokens <= longest:
        raise PlanError(
            f"the reference pass does not fit into memory, not even one pair at a time (the longest has {longest} "
            "tokens). Set a smaller memory.logit_rows or data.max_length, or close other programs, then run the same "
            "command again; what was computed is kept."
        )
    if fault.kind == "memory":
        console.warn(Notice("reference-rows-shortened", row_tokens=row_tokens // 2))
    else:
        setbacks.warn_shortened(Notice("during-reference"), row_tokens // 2, fault)
    return row_tokens // 2


def _repeat(fault: Fault, repeats: int) -> None:
    """Warn that the pass is repeated, and wait a moment. Raises DeviceError after too many `repeats`."""
    if repeats > REPEATS:
        raise DeviceError(
            f"the reference pass failed {repeats} times: {cause(fault)}. {advice(fault)} Then run the same command "
            "again; what was computed is kept."
        )
    setbacks.warn_repeated(Notice("during-reference"), fault)
    pause()
