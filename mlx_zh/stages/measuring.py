"""The pace of this machine: a few real micro-steps of the loaded model, on rows like those of the recipe's data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_zh.core.logprobs import batch_logprobs
from mlx_zh.core.packing import PackedBatch
from mlx_zh.core.recompute import Levels
from mlx_zh.corpus.rendered import Rendered
from mlx_zh.models.adapters.layers import trainable
from mlx_zh.planning.pace import Pace
from mlx_zh.planning.speed import timed
from mlx_zh.planning.workload import SCORED
from mlx_zh.stages import device_check, memory_check
from mlx_zh.stages.first_adapter import Start
from mlx_zh.stages.setbacks import persistent
from mlx_zh.stages.tuning import row_settings
from mlx_zh.system import device
from mlx_zh.training.optimizer import Arrays, GroupedAdamW
from mlx_zh.training.sft_objective import SftObjective
from mlx_zh.training.step import loss_and_gradients

if TYPE_CHECKING:
    from mlx_zh.models.load import LoadedModel
    from mlx_zh.recipe import Recipe
    from mlx_zh.training.objective import Row

_FIRST_TOKENS = 256  # of the row that shows how long a call takes


Checkpoint = bool | Levels | Callable[[PackedBatch], Levels]


def measure_pace(recipe: Recipe, loaded: LoadedModel, tokens: float, *, seconds: float) -> Pace:
    """Time training, the forward pass, the optimizer and the generation of `loaded`, in about `seconds`.

    `tokens` is the mean length of the examples. Rows compute again what they would in training. The model gets the
    recipe's adapter, so it is of no other use afterwards. Work that the accelerator gives up is repeated in shorter
    rows, as in training. Raises DeviceError.
    """
    start = Start(recipe, None)
    spec = start.spec(loaded)
    unfused = device_check.needs_unfused(recipe, loaded, spec, force=True)  # training may refuse it
    start.attach(loaded, spec)
    weights = trainable(loaded.model)
    mx.eval(weights)
    limit = int(memory_check.memory_limit(recipe.memory, memory_check.this_machine()))
    checkpoint = memory_check.levels_by_row(recipe, "sft", loaded.config, spec, limit)

    def pace(micro_tokens: int) -> Pace:
        memory = recipe.memory.model_copy(update={"micro_tokens": micro_tokens})
        return _pace(recipe.model_copy(update={"memory": memory}), loaded, weights, tokens, seconds, checkpoint)

    with device.unfused_attention(unfused):
        measured, _ = persistent(pace, "measuring the speed", recipe.memory.micro_tokens)
    return measured


def _pace(
    recipe: Recipe, loaded: LoadedModel, weights: Arrays, tokens: float, seconds: float, checkpoint: Checkpoint
) -> Pace:
    row, step = _timed_row(recipe, loaded, weights, tokens, seconds / 2, checkpoint)
    size = int(row.batch.tokens.size)
    forward = timed(lambda: _forward(recipe, loaded, row), seconds / 5) / size
    update = timed(lambda: _update(recipe, weights), seconds / 10)
    one = timed(lambda: _one_token(loaded), seconds / 10)
    return Pace(training=step / size, forward=forward, update=update, generation=one)


def _timed_row(
    recipe: Recipe, loaded: LoadedModel, weights: Arrays, tokens: float, seconds: float, checkpoint: Checkpoint
) -> tuple[Row, float]:
    """A row and the seconds of a step over it: a row of `micro_tokens` if three calls fit, else a short one."""
    size = min(recipe.memory.micro_tokens, _FIRST_TOKENS)
    while True:
        objective, row = _row(recipe, loaded, tokens, size)
        objective.settings = replace(objective.settings, checkpoint=checkpoint)
        step = partial(_step, loaded, objective, row, weights)
        took = timed(step, seconds / 4)
        if size == recipe.memory.micro_tokens or took * recipe.memory.micro_tokens / size > seconds / 4:
            return row, took
        size = recipe.memory.micro_tokens


def _step(loaded: LoadedModel, objective: SftObjective, row: Row, weights: Arrays) -> None:
    mx.eval(loss_and_gradients(loaded.model, objective, [row], weights))


def _row(recipe: Recipe, loaded: LoadedModel, tokens: float, size: int) -> tuple[SftObjective, Row]:
    """A row of about `size` tokens: examples whose lengths vary around `tokens` as those of real data do."""
    count = max(round(size / tokens), 1)
    # Quantiles of an exponential distribution: many short examples and a few long ones.
    lengths = [-tokens * math.log1p(-(index + 0.5) / count) for index in range(count)]
    longest = min(recipe.data.max_length, size)
    examples = [_example(loaded, min(max(round(length), 8), longest)) for length in lengths]
    settings = row_settings(recipe, recipe.sft, dropout=recipe.lora.dropout)
    objective = SftObjective(examples, settings)
    rows = objective.rows(np.arange(count), 0)
    return objective, max(rows, key=lambda row: int(row.batch.tokens.size))


def _example(loaded: LoadedModel, length: int) -> Rendered:
    vocabulary = int(loaded.config["vocab_size"])
    tokens = (np.arange(length) * 7919 + length) % vocabulary
    trained = np.arange(length) >= length * (1 - SCORED["sft"])
    return Rendered(tokens.astype(np.int32), trained, truncated=False)


def _forward(recipe: Recipe, loaded: LoadedModel, row: Row) -> None:
    logprobs = batch_logprobs(loaded.model, row.batch, chunk=recipe.memory.logit_rows, grad=False)
    mx.eval(logprobs)


def _update(recipe: Recipe, weights: Arrays) -> None:
    """An optimizer step whose result is thrown away."""
    section = recipe.sft
    betas = section.adam_beta1, section.adam_beta2
    optimizer = GroupedAdamW(weights, weight_decay=section.weight_decay, betas=betas)
    updated = optimizer.update(weights, dict(weights), 0.0)  # which empties its gradients
    mx.eval(updated, optimizer.arrays())


def _one_token(loaded: LoadedModel) -> None:
    model: Any = loaded.model
    mx.eval(model(mx.array([[1]])))
