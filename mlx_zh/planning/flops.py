"""Floating-point operations of training, counted from sizes alone."""

from __future__ import annotations

from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.planning.memory import backward_blocks, saved_values, trained_values, trains_head
from mlx_zh.planning.shapes import ModelShape


def training_flops(model: ModelShape, trained: AdapterSpec, *, scored: float, again: float) -> float:
    """Floating-point operations per token in training. `scored` is the share of tokens that are scored, and
    `again` the share of the blocks' forward passes that the backward pass repeats.

    A product with a weight of N values takes 2 N forward and 2 N for the gradient of its input; the gradient of a
    weight takes 2 N more, which only trained values need. Blocks below the lowest trained one have no backward pass.
    Attention itself is left out: at lengths of some hundred tokens it is a few percent.
    """
    block = 2.0 * model.active_values
    values = trained_values(model, trained) - saved_values(model, trained)
    forward = model.layers * block
    backward = backward_blocks(model, trained) * block
    adapters = 0.0 if trained.kind == "full" else 4.0 * values  # forward and the gradient of the input
    head = 4.0 * model.hidden * model.vocabulary * scored
    if trains_head(model, trained):
        head += 2.0 * model.hidden * model.vocabulary * scored
    return forward * (1 + again) + backward + adapters + 2.0 * values + head
