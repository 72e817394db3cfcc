"""How long a step takes: one block of the model, run as training runs it, on this machine, in about ten seconds.

Weights are random and only one block and a slice of the head exist, so nothing but the config is needed. Everything
else is proportion: blocks times layers, positions times the head's width, rows times what is left over.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_zh.core.logprobs import hidden_states, token_logprobs
from mlx_zh.core.packing import pack_conversations
from mlx_zh.models.adapters.layers import add_adapter, trainable
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.planning.memory import trained_values
from mlx_zh.planning.shapes import ModelShape, Target
from mlx_zh.training.step import set_weights

_DTYPES = {2: mx.bfloat16, 4: mx.float32}
_HEAD_ROWS = 8192  # of the vocabulary; the rest is proportion
_TOKENS = 512  # at most, in the row that is timed


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds a token of one block (forward; forward and backward), a scored position, and a trained number."""

    forward: float
    step: float
    position: float
    update: float

    def step_seconds(
        self, model: ModelShape, trained: AdapterSpec, *, tokens: float, scored: float, checkpoint: bool
    ) -> float:
        """An optimizer step over so many tokens and scored positions."""
        below = model.layers - trained.num_layers
        block = self.step + (self.forward if checkpoint else 0.0)
        blocks = tokens * (below * self.forward + trained.num_layers * block)
        return blocks + scored * self.position + trained_values(model, trained) * self.update

    def forward_seconds(self, model: ModelShape, *, tokens: float, scored: float) -> float:
        """Scoring without learning, as the reference pass and validation do."""
        return tokens * model.layers * self.forward + scored * self.position / 2


def measure(model: ModelShape, trained: AdapterSpec, target: Target, *, length: int, seconds: float = 10.0) -> Speed:
    """Time one block, a slice of the head and a piece of the optimizer, in about `seconds`, on rows of segments of
    `length` tokens."""
    block = _block(model, trained, target)
    weights = trainable(block)
    mx.eval(weights)
    tokens = _fitting_tokens(block, weights, min(length, 128), seconds / 10)
    length = min(length, tokens)
    forward = timed(lambda: mx.eval(_hidden(block, length, tokens)), seconds / 5) / tokens
    step = timed(lambda: mx.eval(_gradients(block, weights, length, tokens)), seconds / 2.5) / tokens
    return Speed(forward, step, _head_seconds(model, target, seconds / 5), _update_seconds(seconds / 10))


def timed(run: Callable[[], object], seconds: float) -> float:
    """Median seconds of a call, the first one left out, over as many calls as fit in `seconds` (at least two)."""
    run()
    taken: list[float] = []
    while len(taken) < 2 or (sum(taken) < seconds and len(taken) < 50):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _block(model: ModelShape, trained: AdapterSpec, target: Target) -> Any:
    """An mlx-lm model of one block and a tiny vocabulary, in the target's precision, with its adapter."""
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
    made: Any = llama.Model(arguments)
    made.set_dtype(_DTYPES[target.value_bytes])
    packing = target.packing
    if packing is not None and model.hidden % packing.group == 0:
        nn.quantize(made, group_size=packing.group, bits=packing.bits)
    made.freeze()
    mx.eval(made.parameters())
    kind = "lora" if trained.kind == "full" and packing is not None else trained.kind
    add_adapter(made, AdapterSpec(kind, 1, trained.rank, targets=trained.targets or None), seed=0)
    return made


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

    # The gradient goes on to what is below the block, as in every block but the lowest.
    value_and_grad: Any = mx.value_and_grad(loss, argnums=(0, 1))
    found = value_and_grad(weights, mx.zeros_like(embedded))
    set_weights(block, weights)
    return found


@dataclass(frozen=True)
class _Shift:
    """Takes the place of training noise, to have a gradient by the block's input."""

    embedded: mx.array
    shift: mx.array

    def embeddings(self, hidden: mx.array) -> mx.array:
        return self.embedded + self.shift

    def layer(self) -> Any:
        from contextlib import nullcontext

        return nullcontext()


def _fitting_tokens(block: Any, weights: dict[str, mx.array], length: int, seconds: float) -> int:
    """Tokens whose step takes no longer than about `seconds`."""
    few = 32
    mx.eval(_gradients(block, weights, min(length, few), few))
    start = time.perf_counter()
    mx.eval(_gradients(block, weights, min(length, few), few))
    each = (time.perf_counter() - start) / few
    return max(few, min(_TOKENS, int(seconds / each)))


def _head_seconds(model: ModelShape, target: Target, seconds: float) -> float:
    """Seconds a scored position, with its gradient."""
    rows = min(model.vocabulary, _HEAD_ROWS)
    head: Any = nn.Linear(model.hidden, rows, bias=False)
    head.set_dtype(_DTYPES[target.value_bytes])
    packing = target.packing
    if packing is not None and model.hidden % packing.group == 0:
        head = nn.QuantizedLinear.from_linear(head, packing.group, packing.bits)
    head.freeze()
    positions = 64
    hidden = mx.random.normal((positions, model.hidden)).astype(_DTYPES[target.value_bytes])
    wanted = mx.zeros(positions, dtype=mx.int32)

    def loss(hidden: mx.array) -> mx.array:
        return token_logprobs(hidden, head, wanted).sum()

    value_and_grad: Any = mx.value_and_grad(loss)
    mx.eval(head.parameters(), hidden, wanted)
    return timed(lambda: mx.eval(value_and_grad(hidden)), seconds) / positions * model.vocabulary / rows


def _update_seconds(seconds: float) -> float:
    """Seconds a trained number, for AdamW's arithmetic."""
    size = 2**20
    weight, gradient, mean, square = (mx.random.uniform(0.1, 1.0, (size,)) for _ in range(4))
    mx.eval(weight, gradient, mean, square)

    def update() -> None:
        m = 0.9 * mean + 0.1 * gradient
        v = 0.999 * square + 0.001 * mx.square(gradient)
        mx.eval(weight - 1e-4 * m / (mx.sqrt(v) + 1e-8), m, v)

    return timed(update, seconds) / size
