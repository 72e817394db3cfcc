"""The self-check's tiny model, computed in two ways: as training does on MLX's device, and as the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from mlx_zh.core.logprobs import decoder, hidden_states, output_head, token_logprobs
from mlx_zh.core.packing import PackedBatch, RowBuilder
from mlx_zh.models.adapters.layers import add_adapter, trainable
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.models.build import Form, dequantize
from mlx_zh.training.check_cases import VOCABULARY, Case, Scored
from mlx_zh.training.optimizer import Arrays
from mlx_zh.training.step import set_weights

LAYERS = 2
_PROMPT = 11  # tokens of the segment that all branches continue
_RANK, _SCALE = 8, 2.0  # of the adapter

Values = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Computed:
    """What one side computes of a row of segments."""

    hidden: list[Values]  # of each segment, (n, D)
    logprobs: Values  # of all scored tokens, (S,), forward only
    trained_logprobs: Values  # the same with a gradient, for which MLX takes other kernels
    gradient: dict[str, Values]


class Pair:
    """The model of a case, and the same model in float32."""

    def __init__(self, case: Case) -> None:
        self.case = case
        with mx.stream(mx.cpu):  # so that both sides have the same weights
            self.model = _model(case)
            self.in_float32 = _in_float32(self.model, case)

    def on_device(self, segments: Sequence[Scored]) -> Computed:
        """What training computes on the default device. Raises what MLX raises."""
        model, batch = self.model, _row(segments)
        weight = _weights(segments)
        head = output_head(model)

        def loss(weights: Arrays) -> tuple[mx.array, list[mx.array]]:
            set_weights(model, weights)
            states = hidden_states(model, batch, checkpoint=self.case.checkpoint, only_scored=True)
            logprobs = token_logprobs(states, head, batch.targets)
            return -(weight * logprobs).sum(), [logprobs]

        states = hidden_states(model, batch)  # (T, D)
        logprobs = token_logprobs(states[batch.scored], head, batch.targets, grad=False)
        (trained,), gradient = _gradient(model, loss)
        scored = batch.segments[-len(segments) :]  # without the prompt
        hidden = [_numpy(states[s.start : s.stop]) for s in scored]
        return Computed(hidden, _numpy(logprobs), trained, gradient)

    def reference(self, segments: Sequence[Scored]) -> Computed:
        """The same by mlx-lm's own forward pass, in float32 on the CPU."""
        model = self.in_float32

        def loss(weights: Arrays) -> tuple[mx.array, list[mx.array]]:
            set_weights(model, weights)
            states, logprobs = _own_forward(model, segments)
            joined = mx.concatenate(logprobs)
            return -(_weights(segments) * joined).sum(), [joined, *states]

        with mx.stream(mx.cpu):
            (logprobs, *states), gradient = _gradient(model, loss)
        return Computed(states, logprobs, logprobs, gradient)


def _prompt() -> list[int]:
    return [int(token) for token in np.random.default_rng(0).integers(0, VOCABULARY, _PROMPT)]


def _row(segments: Sequence[Scored]) -> PackedBatch:
    """The segments packed, after the prompt that branches continue."""
    builder = RowBuilder()
    prompt = builder.add(_prompt()) if any(segment.branch for segment in segments) else None
    for owner, segment in enumerate(segments):
        *tokens, following = segment.tokens()
        index = builder.add(tokens, prompt if segment.branch else None)
        builder.score(index, [True] * len(tokens), owner)
        builder.score_token(index, following, owner)
    return builder.build(len(segments))


def _weights(segments: Sequence[Scored]) -> mx.array:
    """The weight of each scored token in the loss, (S,).

    A sum of n log-probs has a gradient of about sqrt(n), so these weights give every segment an equal part in it.
    """
    return mx.concatenate([mx.full((segment.count,), 1 / math.sqrt(segment.count)) for segment in segments])


def _own_forward(model: Any, segments: Sequence[Scored]) -> tuple[list[mx.array], list[mx.array]]:
    """By mlx-lm's own forward pass, for each segment: its hidden states (n, D), and its log-probs (count,).

    Each segment is a sequence of its own, after the prompt if it is a branch. Sequences are padded on the right,
    which causal attention does not see.
    """
    sequences = [[*(_prompt() if segment.branch else []), *segment.tokens()] for segment in segments]
    states: dict[int, mx.array] = {}
    logprobs: dict[int, mx.array] = {}
    for length in {_padded(sequence) for sequence in sequences}:
        members = [index for index, sequence in enumerate(sequences) if _padded(sequence) == length]
        tokens = mx.array([sequences[index] + [0] * (length - len(sequences[index])) for index in members])  # (N, L)
        hidden = decoder(model)(tokens)  # (N, L) -> (N, L, D)
        logits = output_head(model)(hidden[:, :-1])  # (N, L - 1, D) -> (N, L - 1, V)
        following = mx.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0] - mx.logsumexp(logits, axis=-1)
        for row, index in enumerate(members):
            stop, segment = len(sequences[index]) - 1, segments[index]
            states[index] = hidden[row, stop - segment.length : stop]
            logprobs[index] = following[row, stop - segment.count : stop]
    order = range(len(segments))
    return [states[index] for index in order], [logprobs[index] for index in order]


def _padded(sequence: Sequence[int]) -> int:
    return -(-len(sequence) // 32) * 32


def _gradient(model: nn.Module, loss: Any) -> tuple[list[Values], dict[str, Values]]:
    """The arrays that `loss` returns beside its value, and the gradient of its value, by name."""
    weights = trainable(model)
    try:
        (_, arrays), gradient = mx.value_and_grad(loss)(weights)
        mx.eval(arrays, gradient)
    finally:
        set_weights(model, weights)  # until here the model may hold traced arrays
    return [_numpy(array) for array in arrays], {name: _numpy(array) for name, array in gradient.items()}


def _model(case: Case) -> nn.Module:
    """A small Llama with random weights and an adapter whose B is not 0, so that A has a gradient."""
    width = case.width
    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=width,
        num_hidden_layers=LAYERS,
        intermediate_size=2 * width,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=case.head,
        rms_norm_eps=1e-5,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )
    model = llama.Model(arguments)
    rng = np.random.default_rng(0)
    weights = []
    for name, array in _parameters(model).items():
        values = rng.standard_normal(array.shape, dtype=np.float32)
        values = 1 + 0.2 * values if "norm" in name else values * (1.5 / math.sqrt(array.shape[-1]))
        weights.append((name, mx.array(values)))
    model.load_weights(weights)
    model.set_dtype(getattr(mx, case.dtype))
    if case.bits:

        def divides(_: str, module: nn.Module) -> bool:  # as in real models, whose other matrices are not quantized
            return hasattr(module, "to_quantized") and module["weight"].shape[-1] % case.group == 0

        nn.quantize(model, case.group, case.bits, mode=case.mode, class_predicate=divides)
    model.eval()
    add_adapter(model, AdapterSpec(case.adapter, LAYERS, _RANK, _SCALE), seed=0)
    if case.adapter != "full":
        drawn = {
            name: mx.array(0.15 * rng.standard_normal(array.shape, dtype=np.float32))
            for name, array in trainable(model).items()
            if name.endswith("lora_b")
        }
        set_weights(model, drawn)
    mx.eval(model.parameters())
    return model


def _in_float32(model: Any, case: Case) -> nn.Module:
    """The same model with the same weights, dequantized, in float32."""
    copy = llama.Model(model.args)
    weights = {name.replace(".linear.", "."): array for name, array in _parameters(model).items()}
    base = {name: array for name, array in weights.items() if not name.endswith((".lora_a", ".lora_b", ".m"))}
    if case.bits:
        form: Form = {"bits": case.bits, "group_size": case.group, "mode": case.mode}
        paths = [name.removesuffix(".scales") for name in base if name.endswith(".scales")]
        dequantize(base, dict.fromkeys(paths, form), mx.float32)
    copy.load_weights([(name, array.astype(mx.float32)) for name, array in base.items()])
    copy.eval()
    add_adapter(copy, AdapterSpec(case.adapter, LAYERS, _RANK, _SCALE), seed=0)
    set_weights(copy, trainable(model))
    mx.eval(copy.parameters())
    return copy


def _parameters(model: nn.Module) -> Arrays:
    return dict(tree_flatten(model.parameters()))


def _numpy(array: mx.array) -> Values:
    return np.array(array.astype(mx.float32))
