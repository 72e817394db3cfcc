"""The packed forward pass and the fused log-probs of an mlx-lm model.

`hidden_states` runs the model's blocks (`core.blocks`) over a packed row. `token_logprobs` projects only the scored
positions on the vocabulary, chunk by chunk, and keeps no logits of an earlier chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_zh.core import expert_loads
from mlx_zh.core.block_forms import ModelForm, form_of
from mlx_zh.core.blocks import KeysValues, TokenNoise, Wanted, block_output, has_arrays, run_block
from mlx_zh.core.frozen_products import unpacked
from mlx_zh.core.pacing import in_chunks, one_by_one, pause
from mlx_zh.core.packing import PackedBatch, RowBuilder, Tokens
from mlx_zh.core.recompute import Levels, levels
from mlx_zh.core.sums import exponentials, log_sum_exp, softmax
from mlx_zh.core.trained_tables import TRAINED_TABLES
from mlx_zh.system import device


@dataclass(frozen=True, slots=True)
class Prefix:
    """The keys and values of `length` tokens in every layer, computed once, for rows whose roots continue them."""

    length: int
    layers: tuple[KeysValues, ...]


def decoder(model: nn.Module) -> Any:
    """The part of an mlx-lm model with `embed_tokens`, `layers` and `norm`."""
    return model.model


def output_head(model: nn.Module) -> nn.Module:
    """The module that projects hidden states on the vocabulary; of a tied model, its embedding."""
    if "lm_head" in model:
        return model.lm_head
    return decoder(model).embed_tokens


def hidden_states(
    model: nn.Module,
    batch: PackedBatch,
    *,
    checkpoint: bool | Levels = False,
    noise: TokenNoise | None = None,
    prefix: Prefix | None = None,
    grad: bool = True,
    only_scored: bool = False,
) -> mx.array:
    """Last hidden states (T, D) of a packed row, after the final norm, from which the head makes the logits.

    With `checkpoint`, blocks that a gradient goes through keep only their input and are computed again in the
    backward pass; `Levels` say how much of which. `noise` adds dropout and embedding noise. With `prefix`, every root
    of the row continues the prefix. `grad=False` says that no gradient will be taken, so a block's activations are
    freed before those of the next but one are allocated.

    With `only_scored`, they are those of the scored positions alone, (S, D). Then the last block computes attention's
    output projection and the MLP only for these; experts for all, because their load is told for all tokens.
    """
    wanted = Wanted(batch.scored, noise) if only_scored and _narrows(model, batch) else None
    last = None
    levels_of_row = checkpoint if grad else Levels()
    for hidden in residual_stream(model, batch, checkpoint=levels_of_row, noise=noise, prefix=prefix, wanted=wanted):
        if not grad:
            mx.async_eval(hidden)
            if last is not None:
                mx.eval(last)
        last = hidden
    states: mx.array = decoder(model).norm(last)
    if only_scored and wanted is None:
        states = states[batch.scored]
    factor = form_of(model).logits
    return states if factor == 1 else states * factor


def _narrows(model: nn.Module, batch: PackedBatch) -> bool:
    """Whether the last block can leave tokens out."""
    has_experts = expert_loads.has_experts(decoder(model).layers[-1].mlp)
    return 0 < batch.scored.size < batch.tokens.size and not has_experts


def residual_stream(
    model: nn.Module,
    batch: PackedBatch,
    *,
    checkpoint: bool | Levels = False,
    noise: TokenNoise | None = None,
    prefix: Prefix | None = None,
    wanted: Wanted | None = None,
) -> Iterator[mx.array]:
    """The embedded tokens (T, D), and then the output (T, D) of each block; for the options see `hidden_states`.

    The output of the last block is that of the `wanted` tokens alone.
    """
    inner, form = decoder(model), form_of(model)
    hidden = _embedded(inner, form, batch, noise)
    yield hidden
    flows = has_arrays(inner.embed_tokens.trainable_parameters())  # whether the gradient goes through the block
    again, number = levels(checkpoint), 0
    for index, layer in enumerate(inner.layers):
        past = None if prefix is None else prefix.layers[index]
        flows = flows or has_arrays(layer.trainable_parameters())
        level = again.of(number) if flows else 0
        own = wanted if index == len(inner.layers) - 1 else None
        hidden = run_block(layer, hidden, batch, level, noise, past, form.blocks[index], own)
        number += flows
        yield hidden


def _embedded(inner: Any, form: ModelForm, batch: PackedBatch, noise: TokenNoise | None) -> mx.array:
    hidden: mx.array = inner.embed_tokens(batch.tokens)  # (T,) -> (T, D)
    if noise is not None:
        hidden = noise.embeddings(hidden)
    return hidden if form.embedding == 1 else hidden * form.embedding


def prefill(model: nn.Module, tokens: Tokens, *, chunk: int, prefix: Prefix | None = None) -> Prefix:
    """The keys and values of `tokens`, appended to those of `prefix` where there is one. Forward only.

    `chunk` tokens are computed at a time. Raises ValueError without any token.
    """
    for start in range(0, len(tokens), chunk):
        row = RowBuilder()
        row.add(tokens[start : start + chunk])
        batch = row.build(0)
        inner, form = decoder(model), form_of(model)
        hidden = _embedded(inner, form, batch, None)
        cache: list[KeysValues] = []
        for index, layer in enumerate(inner.layers):
            past = None if prefix is None else prefix.layers[index]
            hidden = block_output(layer, hidden, batch, past, cache, form=form.blocks[index])
        prefix = Prefix(len(batch.tokens) + (0 if prefix is None else prefix.length), tuple(cache))
        mx.eval(prefix.layers)  # only one chunk's activations are in memory
    if prefix is None:
        raise ValueError("a prefix needs at least one token")
    return prefix


def chunk_rows(vocabulary: int, memory: float | None = None) -> int:
    """Default number of rows of logits in a chunk: whole tiles of a matrix product where there is room for one.

    `memory` is how many bytes a training step may take, if that is known.
    """
    rows = device.logit_bytes(memory) // (4 * vocabulary)
    return max(16, rows // _TILE * _TILE if rows >= _TILE else rows)


# Rows of a tile in which GPUs compute quantized products; 65 rows take as long as 128 on an H200.
_TILE = 32


def token_logprobs(
    hidden: mx.array, head: nn.Module, targets: mx.array, *, chunk: int | None = None, grad: bool = True
) -> mx.array:
    """Log-probs (S,) float32 of `targets` (S,) given `hidden` (S, D) and the output `head`.

    A chunk has at most `chunk` rows of logits (default: `chunk_rows`). The gradient with respect to `hidden` is
    computed in the forward pass, chunk by chunk, so the backward pass needs no logits. `grad=False` skips it. A head
    that is trained, or wrapped in an adapter, recomputes each chunk in the backward pass instead: the numbers are the
    same, but it takes longer. The gradient of a `TRAINED_TABLES` head is added up chunk by chunk.
    """
    if targets.size == 0:  # no scored tokens: MLX cannot reduce an empty array
        return mx.zeros(0)
    rows = chunk or chunk_rows(vocabulary_of(head))
    if isinstance(head, TRAINED_TABLES):
        return _table_logprobs(hidden, head.weight, targets, rows)
    if has_arrays(head.trainable_parameters()) or not isinstance(head, _PLAIN_HEADS):
        return _trained_logprobs(hidden, head, targets, rows)
    if not grad:
        hidden = mx.stop_gradient(hidden)  # of one chunk too: no gradient flows through several
        return one_by_one(lambda h, t: (_logprobs(project(head, h), t),), hidden, targets, rows)[0]

    @mx.custom_function
    def fused(hidden: mx.array) -> tuple[mx.array, ...]:
        return in_chunks(lambda h, t: _logprobs_and_gradient(head, h, t), hidden, targets, rows)

    @fused.vjp
    def fused_vjp(_: Any, cotangents: Any, outputs: Any) -> mx.array:
        gradient = outputs[1]  # (S, D)
        return (cotangents[0][:, None] * gradient.astype(mx.float32)).astype(gradient.dtype)  # (S, D)

    outputs: Any = fused(hidden)
    return outputs[0]


_PLAIN_HEADS = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)


def vocabulary_of(head: Any) -> int:
    """The rows of an output head, which adapters may wrap."""
    while "weight" not in head:
        head = head["linear"] if "linear" in head else head["embedding"]
    return int(head["weight"].shape[0])


def project(head: Any, hidden: mx.array) -> mx.array:
    """Logits (C, V) float32 of hidden states (C, D)."""
    head = unpacked(head, hidden)
    as_linear: Callable[[mx.array], mx.array] = getattr(head, "as_linear", head)
    return as_linear(hidden).astype(mx.float32)  # (C, D) -> (C, V); log-sum-exp needs float32


def _logprobs(logits: mx.array, targets: mx.array) -> mx.array:
    """Log-probs (C,) of `targets` (C,) in `logits` (C, V), whose gradient is onehot - softmax."""
    column = targets[:, None]

    @mx.custom_function
    def logprobs(logits: mx.array) -> mx.array:
        return mx.take_along_axis(logits, column, axis=-1)[:, 0] - log_sum_exp(logits)

    @logprobs.vjp
    def vjp(logits: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        values, divisor, _ = exponentials(logits)  # softmax = values / divisor
        factor = cotangent[:, None]
        weighted = values * (-factor / divisor)  # (C, V)
        at_target = mx.take_along_axis(weighted, column, axis=-1) + factor
        return mx.put_along_axis(weighted, column, at_target, axis=-1)

    result: Any = logprobs(logits)
    return result


def _logprobs_and_gradient(head: Any, hidden: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Log-probs (C,), and their gradient with respect to `hidden`: (onehot - softmax) @ W, (C, D)."""
    head = unpacked(head, hidden)  # once for both products
    logits = project(head, hidden)  # (C, D) -> (C, V)
    column = targets[:, None]
    if hidden.dtype == mx.float32:
        values, divisor, normalizer = exponentials(logits)  # softmax = values / divisor
    else:  # a divisor may be as large as the vocabulary, and float16 ends at 65504
        values, normalizer = softmax(logits)
        divisor = mx.ones_like(normalizer)
    logprobs = (mx.take_along_axis(logits, column, axis=-1) - normalizer)[:, 0]
    at_target = mx.take_along_axis(values, column, axis=-1)
    error = mx.put_along_axis(values, column, at_target - divisor, axis=-1)  # (softmax - onehot) * divisor
    gradient = _project_back(head, error.astype(hidden.dtype)) / divisor  # (C, V) -> (C, D)
    return logprobs, -gradient.astype(hidden.dtype)


def _project_back(head: Any, rows: mx.array) -> mx.array:
    """`rows` (C, V) times the head's weight (V, D), (C, D)."""
    if isinstance(head, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return mx.quantized_matmul(
            rows,
            head.weight,
            head.scales,
            head.get("biases"),
            transpose=False,
            group_size=head.group_size,
            bits=head.bits,
            mode=head.mode,
        )
    return rows @ head.weight


def _trained_logprobs(hidden: mx.array, head: nn.Module, targets: mx.array, rows: int) -> mx.array:
    parameters = head.trainable_parameters()

    def compute(hidden: mx.array, targets: mx.array) -> tuple[mx.array]:
        def recomputed(parameters: dict[str, Any], hidden: mx.array) -> mx.array:
            head.update(parameters)
            return _logprobs(project(head, hidden), targets)

        return (mx.checkpoint(recomputed)(parameters, hidden),)

    return in_chunks(compute, hidden, targets, rows)[0]


def _table_logprobs(hidden: mx.array, weight: mx.array, targets: mx.array, rows: int) -> mx.array:
    """Log-probs (S,) with a trained head of `weight` (V, D), whose logits are computed again in the backward pass."""

    def chunk(hidden: mx.array, weight: mx.array, targets: mx.array) -> mx.array:
        return _logprobs((hidden @ weight.astype(hidden.dtype).T).astype(mx.float32), targets)  # (C, D) -> (C, V)

    @mx.custom_function
    def logprobs(hidden: mx.array, weight: mx.array) -> mx.array:
        return in_chunks(lambda h, t: (chunk(h, weight, t),), hidden, targets, rows)[0]

    @logprobs.vjp
    def vjp(primals: Any, cotangent: mx.array, _: Any) -> tuple[mx.array, mx.array]:
        hidden, weight = primals
        gradients: list[mx.array] = []
        total = mx.zeros_like(weight)  # (V, D)
        for start in range(0, hidden.shape[0], rows):
            piece, stop = hidden[start : start + rows], start + rows
            if gradients:
                piece = mx.depends([piece], [total, pause(gradients[-1])])[0]
            compute = partial(chunk, targets=targets[start:stop])
            _, (of_hidden, of_weight) = mx.vjp(compute, [piece, weight], [cotangent[start:stop]])
            gradients.append(of_hidden)
            total = total + of_weight
        return mx.concatenate(gradients), total

    result: Any = logprobs(hidden, weight)
    return result


def batch_logprobs(
    model: nn.Module,
    batch: PackedBatch,
    *,
    checkpoint: bool | Levels = False,
    chunk: int | None = None,
    grad: bool = True,
    noise: TokenNoise | None = None,
) -> mx.array:
    """Log-probs (S,) float32 of a batch's scored tokens."""
    hidden = hidden_states(model, batch, checkpoint=checkpoint, noise=noise, grad=grad, only_scored=True)
    return token_logprobs(hidden, output_head(model), batch.targets, chunk=chunk, grad=grad)


def sum_by_owner(values: mx.array, owner: mx.array, count: int) -> mx.array:
    """Sum `values` (S,) over the scored tokens of each of `count` sequences, (count,).

    The order of addition is fixed, so the result is the same in every run.
    """
    member = owner[None] == mx.arange(count)[:, None]  # (N, S)
    return (member * values[None]).sum(axis=1)


def sequence_logprobs(model: nn.Module, batch: PackedBatch, *, chunk: int | None = None) -> mx.array:
    """Summed log-probs (num_sequences,) float32 of each sequence's scored tokens. Forward only."""
    logprobs = batch_logprobs(model, batch, chunk=chunk, grad=False)
    return sum_by_owner(logprobs, batch.owner, batch.num_sequences)


def computes_in_float32(model: nn.Module) -> bool:
    """Whether hidden states are float32; otherwise they are in half precision."""
    return decoder(model).norm.weight.dtype == mx.float32
