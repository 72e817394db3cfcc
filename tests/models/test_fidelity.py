"""KL, agreement and perplexity against NumPy in float64, and the limits from which a fused model is warned of."""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_zh.models.export.fidelity import (
    KL_LIMIT,
    Distance,
    Fidelity,
    Predictions,
    distance,
    held_out,
    shortcomings,
)
from mlx_zh.models.export.merge import SurvivalSummary


def log_softmax(logits):
    wide = np.array(logits, dtype=np.float64)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def predictions(hidden, weight):
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    head.weight = weight
    return Predictions(hidden, head)


@pytest.mark.parametrize("rows", [1, 700])
def test_against_float64(rows):
    rng = np.random.default_rng(0)
    hidden, other = (mx.array(rng.normal(size=(rows, 16)).astype(np.float32)) for _ in range(2))
    weight = mx.array(rng.normal(size=(50, 16)).astype(np.float32))
    targets = mx.array(rng.integers(0, 50, rows).astype(np.int32))
    found = distance(predictions(hidden, weight), predictions(other, weight), targets)
    p, q = log_softmax(hidden @ weight.T), log_softmax(other @ weight.T)
    assert found.kl == pytest.approx((np.exp(p) * (p - q)).sum(axis=-1).mean(), rel=1e-4)
    assert found.top1 == pytest.approx((p.argmax(axis=-1) == q.argmax(axis=-1)).mean())
    assert found.perplexity == pytest.approx(np.exp(-q[np.arange(rows), np.array(targets)].mean()), rel=1e-4)


def test_a_model_against_itself_is_at_no_distance(tiny_model):
    """And predictions made in rows are those of the model's own forward."""
    model = tiny_model("qwen3", tied=True)
    rng = np.random.default_rng(1)
    examples = [(rng.integers(0, 300, n).astype(np.int32), np.arange(n) > 3) for n in (9, 14, 30, 5)]
    text = held_out(examples, max_tokens=53, row_tokens=24)
    assert sum(row.num_sequences for row in text.rows) == 3  # 9 + 14 + 30 = 53, and the fourth is too much
    own = text.predictions(model)
    found = distance(own, own, text.targets)
    likelihoods = []
    for tokens, scored in examples[:3]:
        logits = log_softmax(model(mx.array(tokens)[None])[0])
        likelihoods += [logits[i - 1, tokens[i]] for i in np.flatnonzero(scored)]
    assert found == Distance(0.0, 1.0, pytest.approx(np.exp(-np.mean(likelihoods)), rel=1e-4))


def test_a_copied_head_survives_new_weights_in_the_old_one(tiny_model):
    """As with full fine-tuning, where the base is compared after its weights were replaced."""
    model = tiny_model()
    head = copy.copy(model.lm_head)
    before = head.weight
    model.load_weights([("lm_head.weight", mx.zeros_like(before))], strict=False)
    assert head.weight is before and not model.lm_head.weight.any()


def fidelity(kl, moved=10.0):
    return Fidelity(100, kl, 0.99, 10.0, 10.0, moved)


@pytest.mark.parametrize(
    ("kl", "moved", "words"),
    [
        (KL_LIMIT * 0.99, 10.0, []),
        (KL_LIMIT * 1.01, 10.0, ["nats a token away from base + adapter"]),
        (0.004, 0.02, []),  # a fifth of the way that tuning went
        (0.006, 0.02, ["tuning by 0.0200"]),  # three tenths
        (0.001, 0.0001, []),  # numerical noise
    ],
)
def test_limits(kl, moved, words):
    found = shortcomings(fidelity(kl, moved), SurvivalSummary(1, 0.5, 0.5, 1, 1))
    assert len(found) == len(words) and all(word in text for word, text in zip(words, found, strict=True))


def test_what_is_left_counts_where_nothing_was_measured():
    assert shortcomings(None, SurvivalSummary(3, 0.91, 0.2, 1, 1)) == []
    assert shortcomings(None, SurvivalSummary(3, 0.4, 0.2, 1, 1)) == [
        "40% of the adapter's change is left in it (limit 90%)"
    ]
    assert shortcomings(None, None) == []
