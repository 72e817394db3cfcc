"""Every family: a packed tree is what the model's own forward and gradient give, sequence by sequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from families import FAMILIES, WINDOWED, family_model
from oracles import distance, following_logprobs, gradients, random_tokens
from tolerances import GRADIENT, HIDDEN

from mlx_zh.core import attention, block_forms, blocks
from mlx_zh.core.block_forms import form_of
from mlx_zh.core.logprobs import batch_logprobs, hidden_states, output_head, prefill, project
from mlx_zh.core.packing import PackedBatch, RowBuilder
from mlx_zh.core.proof import SUPPORTED, check_supported, differences
from mlx_zh.errors import ModelError
from mlx_zh.models.adapters.layers import add_adapter
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.models.family_configs import completed
from mlx_zh.system import device

pytestmark = pytest.mark.numeric

MODELS: dict[str, dict[str, Any]] = {family: {} for family in FAMILIES} | {"llama windows": WINDOWED}
WITH_WINDOWS = ("gemma3_text", "llama windows")
# Segments of 1 to 45 tokens: shorter and longer than the window of 6 tokens, and than a piece of it.
TREE = [(45, None), (3, 0), (1, 0), (20, 0), (5, 3), (9, None), (2, 5), (30, 6)]
# Products over 96 terms in three blocks, as `tolerances` derives them for Llama's. Experts and four norms add as many
# operations in a row again, and Granite's and Gemma's embeddings are larger.
WIDER = 4.0


def model_of(name: str, **changes: Any) -> Any:
    return family_model(name.split()[0], **(MODELS[name] | changes))


# Segments of a layer with a window in pieces of so many tokens, or whole. Without a window all are whole.
PIECES = [(name, pieces) for name in MODELS for pieces in ([8, 256] if name in WITH_WINDOWS else [256])]


def tree() -> tuple[PackedBatch, list[list[int]]]:
    """The row of TREE with random tokens, all scored; and each segment's line of row positions."""
    row, lines, start = RowBuilder(), list[list[int]](), 0
    for index, (length, parent) in enumerate(TREE):
        row.add(random_tokens(length, seed=index), parent)
        row.score(index, [True] * length, owner=index)
        lines.append(([] if parent is None else lines[parent]) + list(range(start, start + length)))
        start += length
    return row.build(len(TREE)), lines


def own_logprobs(model: Any, batch: PackedBatch, lines: list[list[int]]) -> mx.array:
    """The log-probs of each segment's tokens, through the model's own forward over its whole line."""
    tokens, parts = np.array(batch.tokens), []
    for line, (length, parent) in zip(lines, TREE, strict=True):
        values = following_logprobs(model, tokens[line])
        parts.append(values[-length:] if parent is not None else values)
    return mx.concatenate(parts)


def trained(model: Any) -> None:
    """Adapters as training leaves them."""
    add_adapter(model, AdapterSpec("lora", 3, rank=2), seed=0)
    rng = np.random.default_rng(1)
    for _, module in model.named_modules():
        if "lora_b" in module:
            module.lora_b = mx.array(rng.normal(size=module.lora_b.shape).astype(np.float32) * 0.1)


def test_the_families_of_the_table_are_tested() -> None:
    assert set(SUPPORTED) == set(FAMILIES)


@pytest.mark.parametrize(("name", "pieces"), PIECES)
def test_a_packed_tree_is_the_models_own_forward(name: str, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "LEAST_PIECE", pieces)
    model = model_of(name)
    windows = any(block.window is not None for block in form_of(model).blocks)
    assert windows == (name in WITH_WINDOWS)
    batch, lines = tree()
    packed = np.array(hidden_states(model, batch)) / form_of(model).logits
    tokens = np.array(batch.tokens)
    for line in lines:
        own = np.array(model.model(mx.array(tokens[line])[None])[0])
        np.testing.assert_allclose(packed[line], own, atol=WIDER * HIDDEN, rtol=0)
    own_logits = np.array(model(mx.array(tokens[lines[3]])[None])[0])
    logits = np.array(project(output_head(model), hidden_states(model, batch)))[lines[3]]
    np.testing.assert_allclose(logits, own_logits, atol=WIDER * HIDDEN * np.abs(own_logits).max(), rtol=0)


@pytest.mark.parametrize("quantized", [None, 4])
@pytest.mark.parametrize(("name", "pieces"), PIECES)
def test_its_gradient_too(name: str, pieces: int, quantized: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of adapters on every linear layer; with checkpointing too."""
    monkeypatch.setattr(blocks, "LEAST_PIECE", pieces)
    model = model_of(name, quantized=quantized)
    trained(model)
    batch, lines = tree()
    factors = mx.array(np.random.default_rng(2).normal(size=batch.targets.size).astype(np.float32))
    value, packed = gradients(model, lambda: (batch_logprobs(model, batch) * factors).sum())
    own_value, own = gradients(model, lambda: (own_logprobs(model, batch, lines) * factors).sum())
    assert distance(packed, own) < WIDER * GRADIENT
    assert value == pytest.approx(own_value, rel=1e-4)
    again, recomputed = gradients(model, lambda: (batch_logprobs(model, batch, checkpoint=True) * factors).sum())
    assert again == pytest.approx(value, rel=1e-5)
    assert distance(recomputed, packed) < WIDER * GRADIENT


@pytest.mark.parametrize("name", MODELS)
def test_the_last_mlp_sees_scored_tokens_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven positions of 115 are scored, one of them for two branches. Experts see all, as their load is told."""
    model = model_of(name)
    row = RowBuilder()
    for index, (length, parent) in enumerate(TREE):
        row.add(random_tokens(length, seed=index), parent)
        if index in (1, 3, 5):
            row.score(index, [True, *[False] * (length - 2), True], owner=index)
    row.score_token(7, 5, owner=0)
    batch = row.build(len(TREE))
    expected = np.array(hidden_states(model, batch)[batch.scored])
    mlp = model.layers[-1].mlp
    monkeypatch.setattr(device, "computes_exponentials_singly", lambda: False)  # the module itself is called
    counts: list[int] = []
    call = type(mlp).__call__
    monkeypatch.setattr(type(mlp), "__call__", lambda self, x: [counts.append(x.shape[-2]), call(self, x)][1])
    np.testing.assert_allclose(
        np.array(hidden_states(model, batch, only_scored=True)), expected, atol=WIDER * HIDDEN, rtol=0
    )
    experts = "moe" in name
    assert counts == [115] * (len(counts) - 1) + [115 if experts else batch.scored.size]
    assert batch.scored.size < 8


@pytest.mark.parametrize("name", ["gemma3_text", "llama windows", "granite", "qwen3_5"])
def test_a_prefix_is_continued(name: str) -> None:
    """Rows whose roots continue 20 tokens that were computed 7 at a time: longer and shorter than the window."""
    model = model_of(name)
    head, rest = random_tokens(20, seed=3), random_tokens(15, seed=4)
    prefix = prefill(model, head, chunk=7)
    row = RowBuilder()
    row.add(rest[:4])
    row.add(rest[4:])
    packed = np.array(hidden_states(model, row.build(0), prefix=prefix)) / form_of(model).logits
    for part, found in ((rest[:4], packed[:4]), (rest[4:], packed[4:])):
        own = np.array(model.model(mx.array(np.concatenate([head, part]))[None])[0])[20:]
        np.testing.assert_allclose(found, own, atol=WIDER * HIDDEN, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_the_check_accepts(name: str, dtype: str) -> None:
    if name.endswith("_moe") and dtype != "float32":
        pytest.skip("MLX's CPU back end multiplies experts in float32 only")
    model = model_of(name)
    model.set_dtype(getattr(mx, dtype))
    check_supported(model, {"model_type": name.split()[0]})
    assert form_of(model).blocks[-1].window in (None, 6)  # as before the check
    if dtype == "float32":
        check_supported(model_of(name, quantized=4), {"model_type": name.split()[0]})


CHANGES: dict[str, dict[str, Any]] = {
    "gemma3_text": {"norms": None, "after_attention": None, "after_mlp": None, "window": None},
    "hunyuan_v1_dense": {"rotated_first": False},
    "glm4": {"after_mlp": None},
    "granite": {"residual": 1.0},
    "llama windows": {"window": 3},
    "qwen3": {"rotated_first": True},
    "qwen3_5": {"norms": None},
}


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in CHANGES.items() for field in fields])
def test_a_wrong_description_is_refused(name: str, field: str) -> None:
    """Each part of a description counts: without it, logits and gradient are others."""
    model = model_of(name)
    form = form_of(model)
    assert any(getattr(block, field) != CHANGES[name][field] for block in form.blocks)
    changed = tuple(
        replace(block, **{field: CHANGES[name][field]}) if getattr(block, field) is not None else block
        for block in form.blocks
    )
    block_forms._keep(model.model, replace(form, blocks=changed))
    with pytest.raises(ModelError, match="cannot be trained here"):
        check_supported(model, {"model_type": name})
    found = differences(model)
    assert found is not None and min(found) > 0.01


def test_a_wrong_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same logits, and values through which no gradient flows."""
    model = model_of("llama")
    own = blocks._projections

    def stopped(attention: Any, products: tuple[mx.array, ...]) -> Any:
        queries, keys, values = own(attention, products)
        return queries, keys, mx.stop_gradient(values)

    monkeypatch.setattr(blocks, "_projections", stopped)
    with pytest.raises(ModelError, match="The gradient differs from its own by"):
        check_supported(model, {"model_type": "llama"})


def test_attention_sinks_are_refused() -> None:
    model = model_of("llama")
    for layer in model.layers:
        layer.self_attn.sinks = mx.zeros(4)
    with pytest.raises(ModelError, match="attention with sinks, which is not known here"):
        check_supported(model, {"model_type": "sinking"})


def test_a_mask_is_never_larger_than_two_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a window, a segment of 2,000 tokens has masks of 256 x 512, and not of 2,000 x 2,000."""
    model = model_of("gemma3_text")
    shapes: list[tuple[int, int]] = []
    own = attention._seen

    def seen(queries: int, keys: int, window: int | None) -> Any:
        if window is not None:
            shapes.append((queries, keys))
        return own(queries, keys, window)

    monkeypatch.setattr(attention, "_seen", seen)
    row = RowBuilder()
    row.add(random_tokens(2000, seed=1))
    hidden_states(model, row.build(0))
    assert len(shapes) == 2 * 8 and max(shapes) == (256, 512)


# ---- config.json


def test_windows_that_mlx_lm_does_not_heed_are_refused() -> None:
    for config in (
        {"model_type": "qwen2", "use_sliding_window": True},
        {"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]},
        {"model_type": "llama", "layer_types": ["full_attention", "linear_attention"]},
    ):
        with pytest.raises(ModelError, match="would let them see the whole text"):
            completed(dict(config), "config.json")
    llama = {"model_type": "llama", "layer_types": ["full_attention", "sliding_attention"]}
    assert completed(dict(llama), "config.json") == llama


def test_gemmas_windows_repeat() -> None:
    """Gemma 3 names each layer's kind; mlx-lm knows only how often a layer sees the whole text."""
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    config = completed({"model_type": "gemma3_text", "layer_types": kinds * 2 + kinds[:1]}, "config.json")
    assert config["sliding_window_pattern"] == 4
    assert completed({"model_type": "gemma3_text"}, "config.json")["sliding_window_pattern"] == 6
    with pytest.raises(ModelError, match="its layer_types do not repeat"):
        completed({"model_type": "gemma3_text", "layer_types": [*kinds, "full_attention"]}, "config.json")


def test_a_model_with_images_is_its_language_part() -> None:
    """transformers 5 keeps RoPE by kind of layer; the sizes that Gemma's config leaves out have its defaults."""
    rope = {
        "sliding_attention": {"rope_theta": 1e4},
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
    }
    config = completed(
        {
            "model_type": "gemma3",
            "eos_token_id": [1, 106],
            "text_config": {"hidden_size": 2560, "rope_parameters": rope, "sliding_window": 1024},
            "vision_config": {"hidden_size": 1152},
            "quantization": {"bits": 4, "group_size": 64},
        },
        "config.json",
    )
    assert config["model_type"] == "gemma3_text" and "vision_config" not in config
    assert (config["hidden_size"], config["num_key_value_heads"], config["vocab_size"]) == (2560, 4, 262208)
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 1e4)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert config["quantization"]["bits"] == 4 and config["eos_token_id"] == [1, 106]


# ---- Metal


@pytest.mark.parametrize("name", ["gemma3_text", "llama windows", "phi3", "glm4", "hunyuan_v1_dense", "qwen3_moe"])
def test_metal_takes_every_call(metal: Any, name: str) -> None:
    """Heads of 64, for which Metal has fused kernels, with and without a gradient, and the check itself."""
    model = model_of(name, hidden_size=256, head_dim=64)
    check_supported(model, {"model_type": name})
    trained(model)
    batch, _ = tree()
    gradients(model, lambda: batch_logprobs(model, batch, checkpoint=True).sum())
    mx.eval(hidden_states(model, batch, grad=False))
    masked = {call["mask"] for call in metal.of("attention", gradient=True)}
    assert masked == {"bool", "causal"}


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_long_segments_of_a_recurrent_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of several chunks, and branches that begin within one; forward and gradient, as above."""
    lengths = [(150, None), (70, 0), (3, 0), (130, 1)]
    monkeypatch.setitem(globals(), "TREE", lengths)
    model = model_of(name)
    trained(model)
    batch, lines = tree()
    packed = np.array(hidden_states(model, batch))
    own = np.array(model.model(mx.array(np.array(batch.tokens)[lines[3]])[None])[0])
    np.testing.assert_allclose(packed[lines[3]], own, atol=WIDER * HIDDEN, rtol=0)
    value, gradient = gradients(model, lambda: batch_logprobs(model, batch).sum())
    own_value, own_gradient = gradients(model, lambda: own_logprobs(model, batch, lines).sum())
    assert distance(gradient, own_gradient) < WIDER * GRADIENT
    assert value == pytest.approx(own_value, rel=1e-4)


def test_a_recurrent_layer_of_another_kind_is_refused() -> None:
    """Qwen3-Next's projections are put together in another way."""
    model = model_of("qwen3_5")
    model.layers[0].linear_attn.in_proj_qkvz = model.layers[0].linear_attn.in_proj_z
    with pytest.raises(ModelError, match="a recurrent layer that differs in in_proj_qkvz"):
        check_supported(model, {"model_type": "qwen3_5"})
