"""The time of a step, estimated from one block of the model that runs on this machine for about ten seconds.

Only one block and a slice of the head are built, with random weights, so only the config is needed. The time of a
whole step is in proportion to the number of blocks, the size of the head and the number of trained values.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_zh.core.logprobs import chunk_rows, hidden_states, token_logprobs
from mlx_zh.core.pacing import compute_in_turn, paced
from mlx_zh.core.packing import pack_conversations
from mlx_zh.models.adapters.layers import add_adapter, trainable
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.planning.delta_shapes import DeltaShape
from mlx_zh.planning.memory import trained_values
from mlx_zh.planning.shapes import ModelShape, Target
from mlx_zh.training.step import set_weights

_DTYPES = {2: mx.bfloat16, 4: mx.float32}
_HEAD_ROWS = 8192  # size of the slice of the vocabulary that is timed
_CHUNK_POSITIONS = 128  # in a chunk that is timed, at most
_MAX_TOKENS = 512  # in the row that is timed


@dataclass(frozen=True, slots=True)
class Speed:
    """Measured times in seconds."""

    forward: float  # per token and block, forward pass
    step: float  # per token and block, forward and backward pass
    position: float  # per scored position, with its gradient
    update: float  # per trained value, optimizer

    def step_seconds(
        self, model: ModelShape, trained: AdapterSpec, *, tokens: float, scored: float, again: float
    ) -> float:
        """Seconds of an optimizer step over `tokens` tokens with `scored` scored positions.

        `again` is how many forward passes of all blocks the backward pass repeats.
        """
        below = model.layers - trained.num_layers
        blocks = tokens * ((below + again * model.layers) * self.forward + trained.num_layers * self.step)
        return blocks + scored * self.position + trained_values(model, trained) * self.update

    def forward_seconds(self, model: ModelShape, *, tokens: float, scored: float) -> float:
        """Seconds of a forward pass with scoring, as in the reference pass and in validation."""
        return tokens * model.layers * self.forward + scored * self.position / 2


def measure(model: ModelShape, trained: AdapterSpec, target: Target, *, length: int, seconds: float = 10.0) -> Speed:
    """Time one block, a slice of the head and the optimizer's arithmetic, in about `seconds` in all.

    The timed row consists of segments of `length` tokens.
    """
    block = _blocks(model, trained, target)
    weights = trainable(block)
    mx.eval(weights)
    tokens = _fitting_tokens(block, weights, min(length, 128), seconds / 10)
    length = min(length, tokens)
    each = tokens * len(block.layers)
    forward = timed(lambda: mx.eval(_hidden(block, length, tokens)), seconds / 5) / each
    step = timed(lambda: mx.eval(_gradients(block, weights, length, tokens)), seconds / 2.5) / each
    return Speed(forward, step, _head_seconds(model, target, seconds / 5), _update_seconds(seconds / 10))


def timed(run: Callable[[], object], seconds: float) -> float:
    """Median seconds of a call of `run`, over as many calls as fit in `seconds` (2 to 50), after a first one."""
    run()
    durations: list[float] = []
    while len(durations) < 2 or (sum(durations) < seconds and len(durations) < 50):
        start = time.perf_counter()
        run()
        durations.append(time.perf_counter() - start)
    return statistics.median(durations)


def _blocks(model: ModelShape, trained: AdapterSpec, target: Target) -> Any:
    """An mlx-lm model with a vocabulary of 64, in the target's precision, with the adapter.

    It has one block, or as many as it takes to have each kind in its share.
    """
    blocks: Any = _llama(model) if model.delta is None else _qwen3_5(model, model.delta)
    blocks.set_dtype(_DTYPES[target.value_bytes])
    packing = target.packing
    if packing is not None and model.hidden % packing.group == 0:
        nn.quantize(blocks, group_size=packing.group, bits=packing.bits)
    blocks.freeze()
    mx.eval(blocks.parameters())
    kind = "lora" if trained.kind == "full" and packing is not None else trained.kind
    count = len(blocks.layers)
    add_adapter(blocks, AdapterSpec(kind, count, trained.rank, targets=trained.targets or None), seed=0)
    return blocks


def _llama(model: ModelShape) -> Any:
    from mlx_lm.models import llama

    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=model.hidden,
        num_hidden_layers=1,
        intermediate_size=model.intermediate,
        num_attention_heads=model.heads,
        num_key_value_heads=model.keys * model.heads // model.queries,
        head_dim=model.queries // model.heads,
        rms_norm_eps=1e-5,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    return llama.Model(arguments)


def _qwen3_5(model: ModelShape, delta: DeltaShape) -> Any:
    from mlx_lm.models import qwen3_5

    arguments = qwen3_5.TextModelArgs(
        model_type="qwen3_5",
        hidden_size=model.hidden,
        num_hidden_layers=delta.interval,
        intermediate_size=model.intermediate,
        num_attention_heads=model.heads,
        num_key_value_heads=model.keys * model.heads // model.queries,
        head_dim=model.queries // model.heads,
        linear_num_value_heads=delta.value_heads,
        linear_num_key_heads=delta.key_heads,
        linear_key_head_dim=delta.key_size,
        linear_value_head_dim=delta.value_size,
        linear_conv_kernel_dim=delta.kernel,
        full_attention_interval=delta.interval,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    return qwen3_5.TextModel(arguments)


def _row(length: int, tokens: int) -> Any:
    count = max(tokens // length, 1)
    return pack_conversations(([i % 64 for i in range(length)], [True] * length) for _ in range(count))


def _hidden(block: Any, length: int, tokens: int) -> mx.array:
    return hidden_states(block, _row(length, tokens))


def _gradients(block: Any, weights: dict[str, mx.array], length: int, tokens: int) -> Any:
    row = _row(length, tokens)
    embedded = block.model.embed_tokens(row.tokens)

    def loss(weights: dict[str, mx.array], shift: mx.array) -> mx.array:
        set_weights(block, weights)
        hidden = hidden_states(block, row, noise=_Shift(embedded, shift))
        return hidden.astype(mx.float32).sum()

    # The gradient with respect to the block's input is computed too, as in every block above the lowest.
    value_and_grad: Any = mx.value_and_grad(loss, argnums=(0, 1))
    loss_and_gradients = value_and_grad(weights, mx.zeros_like(embedded))
    set_weights(block, weights)
    return loss_and_gradients


@dataclass(frozen=True)
class _Shift:
    """Stands in for training noise, to get the gradient with respect to the block's input."""

    embedded: mx.array
    shift: mx.array

    def embeddings(self, hidden: mx.array) -> mx.array:
        return self.embedded + self.shift

    def layer(self, positions: mx.array | None = None) -> AbstractContextManager[None]:
        return nullcontext()


def _fitting_tokens(block: Any, weights: dict[str, mx.array], length: int, seconds: float) -> int:
    """The number of tokens, 32 to `_MAX_TOKENS`, whose step takes about `seconds`."""
    tokens = 32
    mx.eval(_gradients(block, weights, min(length, tokens), tokens))
    start = time.perf_counter()
    mx.eval(_gradients(block, weights, min(length, tokens), tokens))
    per_token = (time.perf_counter() - start) / tokens
    return max(tokens, min(_MAX_TOKENS, int(seconds / per_token)))


def _head_seconds(model: ModelShape, target: Target, seconds: float) -> float:
    """Seconds per scored position, with its gradient."""
    rows = min(model.vocabulary, _HEAD_ROWS)
    head: Any = nn.Linear(model.hidden, rows, bias=False)
    head.set_dtype(_DTYPES[target.value_bytes])
    packing = target.packing
    if packing is not None and model.hidden % packing.group == 0:
        head = nn.QuantizedLinear.from_linear(head, packing.group, packing.bits)
    head.freeze()
    chunk = min(chunk_rows(model.vocabulary), _CHUNK_POSITIONS)
    positions = 2 * chunk  # what is waited for between chunks is part of the time
    hidden = mx.random.normal((positions, model.hidden)).astype(_DTYPES[target.value_bytes])
    targets = mx.zeros(positions, dtype=mx.int32)

    def loss(hidden: mx.array) -> mx.array:
        return token_logprobs(hidden, head, targets, chunk=chunk).sum()

    value_and_grad: Any = mx.value_and_grad(loss)

    def step() -> None:
        with paced() as chunks:  # as in `training.step`
            result = value_and_grad(hidden)
        compute_in_turn(chunks)
        mx.eval(result)

    mx.eval(head.parameters(), hidden, targets)
    return timed(step, seconds) / positions * model.vocabulary / rows


def _update_seconds(seconds: float) -> float:
    """Seconds per trained value of AdamW's arithmetic."""
    size = 2**20
    weight, gradient, mean, square = (mx.random.uniform(0.1, 1.0, (size,)) for _ in range(4))
    mx.eval(weight, gradient, mean, square)

    def update() -> None:
        m = 0.9 * mean + 0.1 * gradient
        v = 0.999 * square + 0.001 * mx.square(gradient)
        mx.eval(weight - 1e-4 * m / (mx.sqrt(v) + 1e-8), m, v)

    return timed(update, seconds) / size
