"""What Metal refuses of attention with a gradient is not asked of it, and the numbers are the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from oracles import distance, following_logprobs, gradients, random_tokens
from tolerances import GRADIENT, HIDDEN

from mlx_zh.core.logprobs import batch_logprobs, hidden_states
from mlx_zh.core.packing import PackedBatch, RowBuilder
from mlx_zh.models.adapters.layers import add_adapter
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.system import device

pytestmark = pytest.mark.numeric

LENGTHS = range(1, 10)


def row(length: int, ancestors: bool) -> PackedBatch:
    """One scored segment of `length` tokens, a root or a branch, beside a longer one."""
    builder = RowBuilder()
    parent = builder.add(random_tokens(11, seed=1)) if ancestors else None
    index = builder.add(random_tokens(length, seed=2), parent)
    builder.score(index, [True] * length, owner=0)
    other = builder.add(random_tokens(20, seed=3), parent)
    builder.score(other, [True] * 20, owner=1)
    return builder.build(2)


@pytest.mark.parametrize("ancestors", [False, True], ids=["root", "branch"])
@pytest.mark.parametrize("length", LENGTHS)
def test_masked_attention_has_the_same_states_and_gradients(
    tiny_model: Callable[..., Any], request: pytest.FixtureRequest, length: int, ancestors: bool
) -> None:
    model = tiny_model("qwen2")
    add_adapter(model, AdapterSpec("lora", num_layers=3, rank=4), seed=1)
    batch = row(length, ancestors)

    def loss() -> mx.array:
        return -batch_logprobs(model, batch).sum()

    states = np.array(hidden_states(model, batch))
    value, expected = gradients(model, loss)
    metal = request.getfixturevalue("metal")
    masked = np.array(hidden_states(model, batch))
    assert np.abs(masked - states).max() <= HIDDEN * np.abs(states).max()
    again, actual = gradients(model, loss)
    assert again == pytest.approx(value, rel=1e-5)
    assert distance(actual, expected) < GRADIENT
    masks = {call.shapes[0][2]: call["mask"] for call in metal.of("attention", gradient=True)}
    assert masks == {20: "causal", length: "bool" if length <= 8 else "causal"} | (
        {11: "causal"} if ancestors else {}
    )


def test_masked_attention_equals_the_models_own_gradient(
    tiny_model: Callable[..., Any], request: pytest.FixtureRequest
) -> None:
    model = tiny_model("llama")
    add_adapter(model, AdapterSpec("lora", num_layers=3, rank=4), seed=1)
    tokens = random_tokens(5, seed=2)
    builder = RowBuilder()
    builder.score(builder.add(tokens), [False, *[True] * 4], owner=0)
    batch = builder.build(1)
    _, expected = gradients(model, lambda: -following_logprobs(model, tokens).sum())  # with the mask "causal"
    metal = request.getfixturevalue("metal")
    _, actual = gradients(model, lambda: -batch_logprobs(model, batch).sum())
    assert distance(actual, expected) < GRADIENT
    assert metal.fewest_queries() == {"bool": 5}


@pytest.mark.parametrize("length", LENGTHS)
def test_half_precision_differs_by_its_own_rounding(length: int) -> None:
    """bfloat16 has 8 bits: outputs of the two ways differ by some units of 2^-8 of the largest value."""
    rng = np.random.default_rng(length)
    q, k, v = (mx.array(rng.normal(size=(1, 4, n, 16)), dtype=mx.bfloat16) for n in (length, length + 7, length + 7))
    from mlx_zh.core.attention import _mask

    def out(mask: Any, q: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.25, mask=mask).astype(mx.float32).sum()

    masks = [_mask(length, length + 7, array=array) for array in (False, True)]
    for value in (
        lambda mask: mx.fast.scaled_dot_product_attention(q, k, v, scale=0.25, mask=mask),
        lambda mask: mx.grad(partial(out, mask))(q),
    ):
        one, other = (np.array(value(mask).astype(mx.float32)) for mask in masks)
        assert np.abs(one - other).max() <= 4 * 2.0**-8 * np.abs(one).max()


@pytest.mark.parametrize(
    ("cpu", "on_metal", "version", "queries"),
    [
        (False, True, (0, 32, 4), 8),
        (False, True, (0, 33, 0), 8),
        (False, True, (0, 32, 3), 0),
        (True, True, (0, 32, 4), 0),  # MLX_DEFAULT_DEVICE=cpu on a Mac
        (False, False, (0, 32, 4), 0),
    ],
)
def test_the_rule_is_of_metal_and_of_the_versions_that_refuse(
    monkeypatch: pytest.MonkeyPatch, cpu: bool, on_metal: bool, version: tuple[int, ...], queries: int
) -> None:
    monkeypatch.setattr(device, "is_cpu", lambda: cpu)
    monkeypatch.setattr(mx.metal, "is_available", lambda: on_metal)
    monkeypatch.setattr(device, "mlx_version", lambda: version)
    assert device.max_masked_queries() == queries
