"""The proof that a model can be trained: what the packed tree computes is what the model itself computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_zh.core.block_forms import UndescribedError, form_of, short_windows
from mlx_zh.core.families import FAMILIES, Config
from mlx_zh.core.logprobs import computes_in_float32, hidden_states, output_head, project, vocabulary_of
from mlx_zh.core.packing import PackedBatch, RowBuilder
from mlx_zh.errors import ModelError
from mlx_zh.system import device

SUPPORTED = tuple(FAMILIES)

# Segments of the text that is compared: its root, and two branches. The longer ones are more than 8 tokens, which
# attention computes in another way on Metal, and longer than the window, which is shortened for the comparison.
_ROOT, _BRANCHES = 12, (10, 3)
_WINDOW = 5
# The largest differences by norm, of logits and gradient. In half precision both are rounded in each of the layers.
_MOST = (1e-3, 1e-3)
_MOST_IN_HALF = (0.1, 0.25)


def check_supported(model: nn.Module, config: Config, *, gradient: bool = True) -> None:
    """Compare the packed forward pass and its gradient with the model's own, on a short text that branches.

    `config` is the model's `config.json`. The gradient is that of the weights of all norms: it goes through every
    other part of the model, and is small; without `gradient` it is not computed. Raises ModelError when no
    description fits the blocks, when logits or gradient differ, and when the model's own logits are not finite.
    """
    family = config.get("model_type", "?")
    if _rope_kind(config) == "dynamic":
        raise ModelError(
            "rope_scaling 'dynamic' in config.json cannot be trained here: it turns every token by an angle that "
            "depends on the length of the whole text. Up to max_position_embeddings "
            f"({config.get('max_position_embeddings', '?')} tokens) it changes nothing: train a copy of the model "
            "without rope_scaling in its config.json."
        )
    refusal = (
        f"models of type {family!r} cannot be trained here: what this program computes must be what the model itself "
        f"does. These work: {', '.join(SUPPORTED)}."
    )
    inner = getattr(model, "model", None)
    if inner is None or any(name not in inner for name in ("embed_tokens", "layers", "norm")):
        raise ModelError(refusal)
    try:
        with short_windows(model, _WINDOW):
            difference = differences(model, gradient=gradient)
    except UndescribedError as error:
        raise ModelError(f"{refusal} (It has {error}, which is not known here.)") from error
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ModelError(refusal) from error
    if difference is None:
        raise ModelError(
            "the model's logits contain NaN or infinity before any training: its weights are damaged "
            "(download them again), or too large for float16 (set model.dtype: bfloat16)."
        )
    most_logits, most_gradient = _MOST if computes_in_float32(model) else _MOST_IN_HALF
    # A family that works elsewhere fails here where the device computes wrongly, which its self-check would tell.
    device_too = " `mlx-zh doctor` tells whether this device computes rightly." if family in SUPPORTED else ""
    if not difference[0] < most_logits:
        raise ModelError(
            f"{refusal} (The packed logits differ from its own by {difference[0]:.2g} of their norm.{device_too})"
        )
    if not difference[1] < most_gradient:
        raise ModelError(
            f"{refusal} (The gradient differs from its own by {difference[1]:.2g} of its norm.{device_too})"
        )


def differences(model: nn.Module, *, gradient: bool = True) -> tuple[float, float] | None:
    """By how much logits and gradient of the packed tree differ from the model's own, as a share of their norms.

    None if the model's own logits are not finite. Attention goes the unfused way on both sides: whether a device's
    fused attention has the right gradient is for its self-check to find.
    """
    vocabulary = vocabulary_of(output_head(model))
    tokens = [(7 * i + 3) % vocabulary for i in range(_ROOT + sum(_BRANCHES))]
    row, lines, start = RowBuilder(), [], _ROOT
    root = row.add(tokens[:_ROOT])
    row.score(root, [True] * _ROOT, owner=0)
    for owner, length in enumerate(_BRANCHES):
        part = tokens[start : start + length]
        row.score(row.add(part, parent=root), [True] * length, owner=owner)
        lines.append((tokens[:_ROOT] + part, list(range(_ROOT)) + list(range(start, start + length))))
        start += length
    batch = row.build(len(_BRANCHES))
    weights = _norm_weights(model) if gradient else {}
    own_logits, own = _gradient(model, weights, lambda: _own(model, lines))
    if not mx.isfinite(own_logits).all():
        return None
    with device.unfused_attention():
        packed_logits, packed = _gradient(model, weights, lambda: _packed(model, batch, lines))
    # Centred logits are compared, not probabilities: with a large vocabulary every probability is small.
    centred = (logits - logits.mean(axis=-1, keepdims=True) for logits in (packed_logits, own_logits))
    return _apart(*centred), _apart(packed, own) if gradient else 0.0


def _norm_weights(model: nn.Module) -> dict[str, mx.array]:
    """The weights of all norms by name."""
    return {
        name: array
        for name, array in dict(tree_flatten(model.parameters())).items()
        if name.rpartition(".")[0].endswith("norm") and array.ndim == 1
    }


def _own(model: Any, lines: list[tuple[list[int], list[int]]]) -> tuple[mx.array, mx.array]:
    """The sum of the log-probs of all tokens but the first, and all logits (N, V), sequence by sequence."""
    forms = form_of(model).blocks
    caches = [None if form.recurrent else _NoCache() for form in forms]
    recurrent = [layer for layer, form in zip(model.layers, forms, strict=True) if form.recurrent]
    for layer in recurrent:
        layer.linear_attn = _Recomputed(layer.linear_attn)
    try:
        logits = [model(mx.array([tokens]), cache=caches)[0].astype(mx.float32) for tokens, _ in lines]
    finally:
        for layer in recurrent:
            layer.linear_attn = layer.linear_attn.mixer
    return _scores(logits, lines)


class _Recomputed(nn.Module):
    """Stands in for a recurrent layer of mlx-lm's, which keeps a matrix a token and head for its backward pass.

    It is computed again there instead, and as in training: otherwise it takes a kernel of Metal's without a gradient.
    """

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def __call__(self, x: mx.array, *_: Any) -> mx.array:
        mixer: Any = self.mixer

        def output(weight: mx.array, x: mx.array) -> mx.array:
            mixer.norm.weight = weight
            mixer.train()
            try:
                return mixer(x)
            finally:
                mixer.eval()

        return mx.checkpoint(output)(mixer.norm.weight, x)


class _NoCache:
    """Stands in for the cache of a layer that has seen nothing, and gives an array as the mask."""

    offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values

    def make_mask(self, count: int, *, window_size: int | None = None, **_: Any) -> mx.array:
        last = mx.arange(count)[:, None]
        seen = mx.arange(count) <= last
        return seen if window_size is None else seen & (mx.arange(count) > last - window_size)


def _packed(
    model: nn.Module, batch: PackedBatch, lines: list[tuple[list[int], list[int]]]
) -> tuple[mx.array, mx.array]:
    """The same from the packed row, of which each sequence has the positions of its line."""
    logits = project(output_head(model), hidden_states(model, batch))
    return _scores([logits[mx.array(positions)] for _, positions in lines], lines)


def _scores(logits: list[mx.array], lines: list[tuple[list[int], list[int]]]) -> tuple[mx.array, mx.array]:
    total = mx.zeros(())
    for values, (tokens, _) in zip(logits, lines, strict=True):
        picked = mx.take_along_axis(values[:-1], mx.array(tokens[1:])[:, None], axis=-1)[:, 0]
        total = total + (picked - mx.logsumexp(values[:-1], axis=-1)).sum()
    return total, mx.concatenate(logits)


def _gradient(
    model: nn.Module, weights: dict[str, mx.array], scores: Callable[[], tuple[mx.array, mx.array]]
) -> tuple[mx.array, mx.array]:
    """Logits, and the log-probs' gradient with respect to `weights` in one vector. The model stays as it was."""
    if not weights:
        _, logits = scores()
        mx.eval(logits)
        return logits, mx.zeros(0)

    def of(weights: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
        model.update(tree_unflatten(list(weights.items())))
        return scores()

    value_and_grad: Any = mx.value_and_grad(of)
    try:
        (_, logits), gradient = value_and_grad(weights)
        vector = mx.concatenate([array.astype(mx.float32) for array in gradient.values()])
        mx.eval(logits, vector)
    finally:
        model.update(tree_unflatten(list(weights.items())))
    return logits, vector


def _apart(found: mx.array, expected: mx.array) -> float:
    return float(mx.linalg.norm(found - expected) / mx.linalg.norm(expected))


def _rope_kind(config: Config) -> object:
    """The kind of RoPE scaling that `config.json` names."""
    scaling = config.get("rope_scaling")
    return scaling.get("rope_type") or scaling.get("type") if isinstance(scaling, dict) else None
