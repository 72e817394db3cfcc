"""What a block computes again: the same numbers at every level, and less that is kept."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from families import FAMILIES, family_config, family_model
from hypothesis import given, settings
from hypothesis import strategies as st
from objectives import conversations, sft
from oracles import distance, gradients, own_loss
from tolerances import GRADIENT, LOSS

from mlx_zh.core.feed_forward import feed_forward, is_swiglu, swiglu
from mlx_zh.core.logprobs import batch_logprobs
from mlx_zh.core.packing import pack_conversations, pack_pairs
from mlx_zh.core.recompute import ALL, Levels, again
from mlx_zh.corpus.render import Rendered
from mlx_zh.models.adapters.layers import add_adapter, dropout_keys, trainable
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.planning.shapes import model_shape
from mlx_zh.system import device
from mlx_zh.training.objective import Settings
from mlx_zh.training.sft_objective import SftObjective
from mlx_zh.training.step import loss_and_gradients, set_weights

pytestmark = pytest.mark.numeric
Make = Callable[..., Any]
LENGTHS = [9, 33, 4, 21]


def adapted(model: Any, kind: str, dropout: float = 0.0, layers: int = 3) -> Any:
    add_adapter(model, AdapterSpec(kind, num_layers=layers, rank=4, scale=1.5, dropout=dropout), seed=1)
    if kind != "full":
        weights = trainable(model)
        set_weights(model, {n: w + 0.1 * mx.random.normal(w.shape, key=mx.random.key(1)) for n, w in weights.items()})
    return model


KINDS: list[dict[str, Any]] = [
    {"family": "llama"},
    {"family": "qwen2", "kind": "dora"},
    {"family": "qwen3", "kind": "full"},
    {"family": "llama", "dropout": 0.3, "neftune_alpha": 5.0},
    {"family": "qwen2", "kind": "dora", "dropout": 0.2, "quantized": 4},
    {"family": "qwen3", "quantized": 4, "layers": 2},
    {"family": "llama", "tied": True, "layers": 1},
    {"family": "qwen3", "kind": "dora", "quantized": 4, "tied": True, "dropout": 0.2, "neftune_alpha": 5.0},
]


@pytest.mark.parametrize("about", KINDS, ids=lambda about: " ".join(map(str, about.values())))
def test_no_level_changes_the_result(tiny_model: Make, about: dict[str, Any]) -> None:
    """Any number of blocks at any level: loss and gradient are those of keeping everything."""
    noise = {name: about[name] for name in ("dropout", "neftune_alpha") if name in about}
    form: dict[str, Any] = {"quantized": about["quantized"]} if "quantized" in about else {}
    if "tied" in about:
        form["tied"] = True
    model = adapted(
        tiny_model(about["family"], **form),
        about.get("kind", "lora"),
        about.get("dropout", 0.0),
        about.get("layers", 3),
    )
    examples = conversations(LENGTHS)

    def step(levels: Levels) -> tuple[float, dict[str, mx.array]]:
        objective = sft(examples, micro_tokens=40, checkpoint=levels, **noise)
        rows = objective.rows(np.arange(len(LENGTHS)), 0)
        loss, _, found = loss_and_gradients(model, objective, rows, trainable(model))
        return float(loss), found

    expected = step(Levels())

    @settings(max_examples=8, deadline=None)
    @given(st.integers(0, 4), st.integers(0, 4))
    def check(pieces: int, blocks: int) -> None:
        loss, found = step(Levels(pieces, blocks))
        assert loss == expected[0]
        assert distance(found, expected[1]) < GRADIENT

    check()


@pytest.mark.parametrize("levels", [Levels(ALL), Levels(ALL, ALL)], ids=["pieces", "blocks"])
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_the_gradient_is_that_of_the_models_own_modules(tiny_model: Make, kind: str, levels: Levels) -> None:
    model, examples = adapted(tiny_model("qwen3"), kind), conversations(LENGTHS)
    objective = sft(examples, micro_tokens=10_000, checkpoint=levels)
    loss, _, found = loss_and_gradients(model, objective, objective.rows(np.arange(4), 0), trainable(model))
    value, expected = gradients(model, partial(own_loss, model, examples))
    assert float(loss) == pytest.approx(value, rel=LOSS)
    assert distance(found, expected) < GRADIENT


def test_the_branches_of_a_pair(tiny_model: Make) -> None:
    model = adapted(tiny_model("llama"), "lora")
    batch = pack_pairs(
        [(list(range(1, 9)), list(range(20, 26)), [30, 31]), (list(range(40, 43)), [50], [60, 61, 62])]
    )

    def found(levels: Levels) -> Any:
        return gradients(model, lambda: batch_logprobs(model, batch, checkpoint=levels).sum())

    value, expected = found(Levels())
    for levels in (Levels(ALL), Levels(ALL, 1), Levels(1, ALL)):
        loss, other = found(levels)
        assert loss == value and distance(other, expected) < GRADIENT


def test_no_array_of_a_gradient_stays_in_the_model(tiny_model: Make) -> None:
    model = adapted(tiny_model("llama"), "lora")
    before = {name: np.array(weight) for name, weight in trainable(model).items()}
    batch = pack_conversations([([1, 2, 3, 4, 5], [True] * 5)])
    kept = {name: id(weight) for name, weight in trainable(model).items()}
    value = batch_logprobs(model, batch, checkpoint=Levels(ALL, 2)).sum()  # without a gradient too
    mx.eval(value)
    assert {name: id(weight) for name, weight in trainable(model).items()} == kept
    for name, weight in trainable(model).items():
        assert np.array_equal(np.array(weight), before[name])


def test_dropout_is_drawn_as_in_the_forward_pass_though_its_context_has_been_left() -> None:
    layer = nn.Linear(8, 8)
    from mlx_zh.models.adapters.layers import LoRALinear

    low = LoRALinear(layer, AdapterSpec("lora", 1, rank=2, dropout=0.5), 0, "layers.0.x")
    low.freeze()
    low.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
    low.lora_b = mx.random.normal(low.lora_b.shape, key=mx.random.key(3))
    keys = mx.arange(10, dtype=mx.uint32).reshape(5, 2)
    x = mx.random.normal((5, 8), key=mx.random.key(4))

    def loss(x: mx.array, *, remade: bool) -> mx.array:
        with dropout_keys(keys):
            return (again((low,), lambda x: (low(x),), x)[0] if remade else low(x)).square().sum()

    plain, remade = (mx.value_and_grad(partial(loss, remade=flag))(x) for flag in (False, True))
    assert plain[0].item() == remade[0].item()
    assert mx.array_equal(plain[1], remade[1])
    assert not mx.array_equal(plain[1], mx.grad(lambda x: low(x).square().sum())(x))  # dropout did something


# SwiGLU


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_swiglu_is_no_less_accurate_than_an_automatic_gradient(dtype: Any) -> None:
    """Against float64 by hand."""
    gate, up, weight = (3 * mx.random.normal((64, 96), key=mx.random.key(seed)).astype(dtype) for seed in range(3))
    g, u, w = (np.array(a.astype(mx.float32), dtype=np.float64) for a in (gate, up, weight))
    sigmoid = 1 / (1 + np.exp(-g))
    exact = (w * u * (sigmoid + g * sigmoid * (1 - sigmoid)), w * g * sigmoid)

    def errors(function: Callable[[mx.array, mx.array], mx.array]) -> list[float]:
        _, found = mx.vjp(lambda g, u: function(g, u), [gate, up], [weight])
        values = [np.array(array.astype(mx.float32), dtype=np.float64) for array in found]
        return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(values, exact, strict=True)]

    automatic = errors(lambda g, u: nn.silu(g) * u)
    rounding = 2.0**-23 if dtype == mx.float32 else 0.0  # the sigmoid is within two units of the last place
    assert all(own <= max(1.01 * other, rounding) for own, other in zip(errors(swiglu), automatic, strict=True))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_swiglu_has_the_bits_of_mlxs_own_in_every_type(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its sigmoid is MLX's."""
    monkeypatch.setattr(device, "computes_exponentials_singly", lambda: False)
    gate, up, weight = (3 * mx.random.normal((64, 96), key=mx.random.key(seed)).astype(dtype) for seed in range(3))
    _, found = mx.vjp(swiglu, [gate, up], [weight])
    _, expected = mx.vjp(lambda g, u: g * mx.sigmoid(g) * u, [gate, up], [weight])
    assert all(mx.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert mx.array_equal(swiglu(gate, up), nn.silu(gate) * up)


@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles for a CPU with g++")
def test_mlx_compiles_nothing_that_a_gradient_traces(tmp_path: Path) -> None:
    """Should this fail with a later MLX, SwiGLU's gradient is worth compiling for GPUs."""
    compiled = mx.compile(lambda x: mx.exp(x) * x + 1, shapeless=True)

    @mx.custom_function
    def function(x: mx.array) -> mx.array:
        return compiled(x)

    @function.vjp
    def vjp(primal: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return compiled(primal) * cotangent

    def kernels(result: Any) -> bool:
        mx.export_to_dot(str(tmp_path / "graph.dot"), result)
        return "Compiled" in (tmp_path / "graph.dot").read_text()

    x = mx.ones(4)
    assert kernels(compiled(x))
    assert not kernels(mx.value_and_grad(lambda x: function(x).sum())(x))


class Gelu(nn.Module):
    """Gemma's MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.gelu(self.gate_proj(x)) * self.up_proj(x))


class Swapped(Gelu):
    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.up_proj(x)) * self.gate_proj(x))


class Limited(Gelu):
    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(mx.minimum(self.gate_proj(x), 7.0)) * self.up_proj(x))


class Doubled(Gelu):
    def __call__(self, x: mx.array) -> mx.array:
        return 2 * self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Weighted(Gelu):
    def __init__(self) -> None:
        super().__init__()
        self.factor = mx.ones(8)

    def __call__(self, x: mx.array) -> mx.array:
        return self.factor * self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(12, 8)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.relu(self.up_proj(x)))


class Own(Gelu):
    """SwiGLU, written in another way."""

    def __call__(self, x: mx.array) -> mx.array:
        gate = self.gate_proj(x)
        return self.down_proj(self.up_proj(x) * (gate * mx.sigmoid(gate)))


@pytest.mark.parametrize("kind", [Gelu, Swapped, Limited, Doubled, Weighted, Plain, Own])
def test_only_swiglu_is_taken_for_it(kind: type[Any]) -> None:
    mlp, norm = kind(), nn.RMSNorm(8)
    assert is_swiglu(mlp) == (kind is Own)
    x = mx.random.normal((5, 8), key=mx.random.key(0))
    if kind is not Own:
        return
    value = mx.value_and_grad(lambda x: feed_forward(mlp, norm, x, pieces=True).square().sum())(x)
    expected = mx.value_and_grad(lambda x: mlp(norm(x)).square().sum())(x)
    for one, other in zip(value, expected, strict=True):
        assert mx.allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_the_mlps_of_the_supported_families_are_swiglu(tiny_model: Make, family: str) -> None:
    assert all(is_swiglu(layer.mlp) for layer in tiny_model(family).layers)


# Memory


def test_a_block_keeps_less_at_each_level(tiny_model: Make) -> None:
    """Peaks of models with more and with fewer blocks: what a token and block keeps on the CPU, with LoRA.

    MLX allocates up to 60 kernels ahead of the CPU, so a peak varies with the machine's load: here by about 1 MB,
    where 28 blocks keep 33 MB at level 0 and 0.70 of that at level 1.
    """
    row = pack_conversations([(list(range(1, 65)), [True] * 64)] * 4)

    def peak(layers: int, levels: Levels) -> int:
        model = adapted(tiny_model("llama", layers=layers), "lora", layers=layers)
        weights = trainable(model)

        def loss(weights: Any) -> mx.array:
            set_weights(model, weights)
            return batch_logprobs(model, row, checkpoint=levels).sum()

        def step() -> None:
            mx.eval(mx.value_and_grad(loss)(weights))
            set_weights(model, weights)

        mx.eval(weights)
        step()  # arrays that are made once
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        step()
        return int(mx.get_peak_memory() - before)

    kept = [peak(36, levels) - peak(8, levels) for levels in (Levels(), Levels(ALL), Levels(ALL, ALL))]
    assert kept[1] < 0.8 * kept[0]
    assert kept[2] < 0.25 * kept[0]


# Families


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_no_level_changes_the_result_of_a_family(name: str) -> None:
    """Norms before and after, fused projections, experts, biases, windows. The planner knows which MLPs keep less."""
    model = family_model(name)
    experts = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj") if name == "qwen3_moe" else None
    add_adapter(model, AdapterSpec("lora", 3, rank=4, targets=experts), seed=1)
    weights = trainable(model)
    set_weights(model, {n: w + 0.1 * mx.random.normal(w.shape, key=mx.random.key(1)) for n, w in weights.items()})
    shape = model_shape(family_config(name))
    assert shape.swiglu == all(is_swiglu(layer.mlp) for layer in model.layers)
    examples = conversations([30, 14, 5])

    def step(levels: Levels) -> tuple[float, dict[str, mx.array]]:
        objective = sft(examples, micro_tokens=10_000, checkpoint=levels)
        loss, _, found = loss_and_gradients(model, objective, objective.rows(np.arange(3), 0), trainable(model))
        return float(loss), found

    loss, expected = step(Levels())
    for levels in (Levels(ALL), Levels(2, 1), Levels(ALL, ALL)):
        other, found = step(levels)
        assert other == loss
        assert distance(found, expected) < 4 * GRADIENT, levels


def test_chunks_of_a_head_do_not_keep_what_is_computed_again(tiny_model: Callable[..., Any]) -> None:
    """Computing a chunk of logits under a gradient would keep every array that leads to it."""
    model = tiny_model(layers=8, vocabulary=4000)
    add_adapter(model, AdapterSpec("lora", num_layers=8, rank=4), seed=0)
    weights = trainable(model)
    rng = np.random.default_rng(0)
    examples = [Rendered(rng.integers(0, 4000, 400).astype(np.int32), np.arange(400) >= 200, False) for _ in range(2)]

    def peak(checkpoint: bool, logit_rows: int) -> int:
        settings = Settings(seed=0, micro_tokens=2048, checkpoint=checkpoint, logit_rows=logit_rows)
        objective = SftObjective(examples, settings)
        rows = objective.rows(np.arange(2), 0)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(loss_and_gradients(model, objective, rows, weights))
        return mx.get_peak_memory() - before

    peak(True, 16)  # arrays that are made once
    whole, again = peak(False, 16), peak(True, 16)
    assert whole <= 1.1 * peak(False, 400)  # in one chunk, without the logits of several
    assert again <= 1.1 * peak(True, 400)
    assert again < 0.5 * whole
