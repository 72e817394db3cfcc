"""The other side of every comparison: mlx-lm's own forward one sequence at a time, and sums by hand in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def random_tokens(count: int, seed: int, vocabulary: int = 300) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, count).astype(np.int32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64, over the last axis."""
    wide = logits.astype(np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def own_logprobs(model: Any, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """What the model's own forward gives each token after those before it: (T,), 0 for the first, float64."""
    logits = np.array(model(mx.array(np.asarray(tokens))[None])[0].astype(mx.float32))
    following = log_softmax(logits)[np.arange(len(tokens) - 1), np.asarray(tokens)[1:]]
    return np.concatenate([[0.0], following])


def following_logprobs(model: Any, tokens: np.ndarray) -> mx.array:
    """The same without the first token, (T - 1,) float32, and differentiable."""
    if len(tokens) == 1:
        return mx.zeros(0)
    logits = model(mx.array(tokens)[None])[0, :-1].astype(mx.float32)
    targets = mx.array(tokens[1:])[:, None]
    return mx.take_along_axis(logits, targets, axis=-1)[:, 0] - mx.logsumexp(logits, axis=-1)


def own_loss(model: Any, examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> mx.array:
    """Mean cross-entropy over all scored tokens of all examples, through the model's own forward; differentiable."""
    total = mx.zeros(())
    for tokens, trained in examples:
        total = total - (following_logprobs(model, tokens) * mx.array(trained[1:].astype(np.float32))).sum()
    return total / sum(int(trained[1:].sum()) for _, trained in examples)


def gradients(model: Any, loss: Callable[[], mx.array]) -> tuple[float, dict[str, np.ndarray]]:
    """A loss and its gradient with respect to what is trainable in the model, which is left as it was."""
    weights = dict(tree_flatten(model.trainable_parameters()))

    def of(weights: dict[str, mx.array]) -> mx.array:
        model.update(tree_unflatten(list(weights.items())))
        return loss()

    value, found = mx.value_and_grad(of)(weights)
    mx.eval(value, found)
    model.update(tree_unflatten(list(weights.items())))
    return float(value), {name: np.array(array.astype(mx.float32)) for name, array in found.items()}


def distance(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest difference of any array, relative to that array's largest entry; the names must be the same."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for name in expected:
        a, b = np.array(found[name], dtype=np.float64), np.array(expected[name], dtype=np.float64)
        assert a.shape == b.shape
        scale = np.abs(b).max()
        worst = max(worst, float(np.abs(a - b).max() / scale) if scale else float(np.abs(a).max()))
    return worst


def moved_apart(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The norm of two trained adapters' difference, relative to the norm of what B moved, which starts at 0."""
    assert found.keys() == expected.keys()
    a, b = ({n: np.array(array, dtype=np.float64) for n, array in arrays.items()} for arrays in (found, expected))
    apart = sum(np.square(a[name] - b[name]).sum() for name in b)
    moved = sum(np.square(array).sum() for name, array in b.items() if name.endswith("lora_b"))
    return float(np.sqrt(apart / moved))
