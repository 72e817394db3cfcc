"""One optimizer step. Its result does not depend on how the examples are cut into rows.

Losses and gradients are summed over the rows and divided once by the count of the whole step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_zh.core import expert_loads
from mlx_zh.core.logprobs import decoder
from mlx_zh.core.pacing import compute_in_turn, paced
from mlx_zh.core.places import place_of, put
from mlx_zh.distributed.world import ALONE, World
from mlx_zh.system.accelerator import accelerator_errors, repeated
from mlx_zh.training.objective import Objective, Row, Sums
from mlx_zh.training.optimizer import Arrays, GroupedAdamW, global_norm


@dataclass(frozen=True, slots=True)
class StepResult:
    """The numbers of one step, over all ranks.

    `applied` is false when the loss or the gradient was NaN or infinite; then the weights did not change. `sums` are
    the objective's sums.
    """

    loss: float
    grad_norm: float
    applied: bool
    scored_tokens: int
    tokens: int
    sums: dict[str, float]


def set_weights(model: nn.Module, weights: Arrays) -> None:
    """Put named arrays into a model. Raises KeyError or IndexError for a name that the model does not have."""
    put([place_of(model, name) for name in weights], list(weights.values()))


def loss_scale(model: nn.Module, rows: list[Row]) -> float:
    """The factor of the loss in the backward pass of a float16 model; 1 for any other.

    The gradient of a position is divided by the step's count, so in float16, whose smallest number is 6e-8, it would
    lose digits or become 0. The factor is a power of two, so taking it out again changes no digit. It is an eighth of
    the count, because a row's gradients are summed, and they must stay below 65,504.
    """
    if not rows or decoder(model).norm.weight.dtype != mx.float16:
        return 1.0
    return 2.0 ** max(math.floor(math.log2(rows[0].count)) - 3, 0)


def loss_and_gradients(
    model: nn.Module, objective: Objective, rows: list[Row], weights: Arrays
) -> tuple[mx.array, Sums, Arrays]:
    """The summed loss, sums and gradients of `rows`, computed.

    The rows are computed one after another, so that the activations of only one row are in memory. The graph of a row
    is built while the device computes the row before it. The gradients are those of `weights`, by name.
    """

    scale = loss_scale(model, rows)
    places = [place_of(model, name) for name in weights]

    def share(weights: Arrays, row: Row) -> tuple[mx.array, Sums]:
        put(places, list(weights.values()))
        with expert_loads.recording() as loads:
            loss, sums = objective.share(model, row)
        sums = sums | expert_loads.sums(loads, row.batch.tokens.size)
        return (loss if scale == 1 else loss * scale), sums

    value_and_grad: Any = mx.value_and_grad(share)
    total: tuple[mx.array, Sums, Arrays] | None = None
    for row in objective.prepared(model, rows):
        with paced() as chunks:
            (loss, sums), gradients = value_and_grad(weights, row)
        if total is not None:
            mx.eval(total)
        compute_in_turn(chunks)
        if scale != 1:
            loss, gradients = loss / scale, {name: value / scale for name, value in gradients.items()}
        if total is not None:
            loss = total[0] + loss
            sums = {name: total[1][name] + value for name, value in sums.items()}
            gradients = {name: total[2][name] + value for name, value in gradients.items()}
        total = (loss, sums, gradients)
        mx.async_eval(total)
    put(places, list(weights.values()))  # until here the model holds the traced arrays
    if total is None:  # this rank has no rows: there are fewer examples than ranks
        zeros = {name: mx.array(0.0) for name in objective.sums} | expert_loads.no_sums(model)
        total = mx.array(0.0), zeros, {name: mx.zeros_like(array) for name, array in weights.items()}
    mx.eval(total)
    return total


def train_step(
    model: nn.Module,
    objective: Objective,
    rows: list[Row],
    weights: Arrays,
    optimizer: GroupedAdamW,
    *,
    learning_rate: float,
    max_grad_norm: float | None,
    world: World = ALONE,
) -> tuple[StepResult, Arrays]:
    """Run one step over the rows of all ranks; returns its numbers and the new weights.

    `rows` are those of this rank. The new weights are the same on every rank, and are also set in the model. Raises
    AcceleratorError before any weight or moment has changed, and DeviceError if the update itself cannot be finished.
    """
    with accelerator_errors():
        loss, sums, gradients = loss_and_gradients(model, objective, rows, weights)
    figures = sums | {
        "loss": loss,
        "scored_tokens": mx.array(float(sum(row.batch.targets.size for row in rows))),
        "tokens": mx.array(float(sum(row.batch.tokens.size for row in rows))),
    }
    total = world.sum(figures | gradients)
    gradients = {name: total.pop(name) for name in weights}  # popped, so that the update can reuse their memory
    measured = {name: float(total[name]) for name in figures}
    norm = repeated(lambda: float(global_norm(gradients)))
    applied = math.isfinite(measured["loss"]) and math.isfinite(norm)
    if applied:
        scale = None
        if max_grad_norm is not None and norm > max_grad_norm:
            scale = mx.array(float(np.float32(max_grad_norm) / np.float32(norm)))
        weights = optimizer.update(weights, gradients, learning_rate, scale)
        set_weights(model, weights)
    result = StepResult(
        loss=measured["loss"],
        grad_norm=norm,
        applied=applied,
        scored_tokens=int(measured["scored_tokens"]),
        tokens=int(measured["tokens"]),
        sums={name: measured[name] for name in sums},
    )
    return result, weights


def evaluate(model: nn.Module, objective: Objective, rows: list[Row]) -> Iterator[tuple[float, dict[str, float]]]:
    """Score this rank's validation rows, forward only. Yields each row's share of the loss and its sums.

    Raises AcceleratorError.
    """
    with accelerator_errors():
        ready = objective.prepared(model, rows)
    for row in ready:
        with accelerator_errors():
            share, sums = objective.share(model, row)
            mx.eval(share, sums)
        yield float(share), {name: float(value) for name, value in sums.items()}
