"""Adapters against mlx-lm's layers and PyTorch's arithmetic, and adapter folders in both directions."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRALinear as TheirDoRALinear
from mlx_lm.tuner.lora import LoRALinear as TheirLoRALinear
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from oracles import distance, gradients, own_loss, random_tokens
from tolerances import GRADIENT, LOGITS, LOSS, product

from mlx_zh.errors import AdapterError
from mlx_zh.models.adapters.files import load_adapter, read_adapter, save_adapter
from mlx_zh.models.adapters.layers import add_adapter, remove_adapter, trainable
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.training.step import set_weights

Make = Callable[..., Any]
TEXT = mx.array(random_tokens(13, seed=1))[None]
SEVEN = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
QUANTIZED = pytest.mark.parametrize("quantized", [None, 4])


def logits(model: Any) -> np.ndarray:
    return np.array(model(TEXT))[0]


def trained(model: Any, seed: int = 5) -> dict[str, mx.array]:
    """Give every trained array values that training could have given it, and return them."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, array in trainable(model).items():
        noise = rng.normal(size=array.shape) * 0.1
        weights[name] = mx.array((np.array(array) * (1 + noise) + noise).astype(np.float32))
    set_weights(model, weights)
    return weights


@pytest.mark.numeric
@QUANTIZED
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_fresh_adapter_changes_nothing(tiny_model: Make, kind: str, quantized: int | None) -> None:
    """B is 0, and DoRA's magnitude is the norm it divides by, so only rounding is left of it."""
    model = tiny_model("qwen2", quantized=quantized)
    before = logits(model)
    add_adapter(model, AdapterSpec(kind, num_layers=3, rank=4, dropout=0.3), seed=1)
    np.testing.assert_allclose(logits(model), before, atol=0 if kind == "lora" else LOGITS, rtol=0)
    remove_adapter(model)
    np.testing.assert_array_equal(logits(model), before)
    assert not any(isinstance(m, TheirLoRALinear | TheirDoRALinear) for m in model.modules())


def test_fresh_values_by_hand(tiny_model: Make) -> None:
    """A uniform in +-1/sqrt(64) = +-0.125, so of deviation 0.125/sqrt(3); B 0; m the norm of each weight row."""
    model = tiny_model()
    weight = np.array(model.layers[0].self_attn.q_proj.weight, dtype=np.float64)
    add_adapter(model, AdapterSpec("dora", num_layers=3, rank=32), seed=1)
    layer = model.layers[0].self_attn.q_proj
    a = np.array(layer.lora_a)
    assert a.shape == (64, 32)
    assert 0.12 < np.abs(a).max() <= 0.125
    assert a.std() == pytest.approx(0.125 / np.sqrt(3), rel=0.03)
    assert abs(a.mean()) < 4 * 0.072 / np.sqrt(a.size)
    assert not np.array(layer.lora_b).any() and layer.lora_b.shape == (32, 64)
    np.testing.assert_allclose(np.array(layer.m), np.linalg.norm(weight, axis=1), rtol=1e-6)
    assert layer.lora_a.dtype == layer.lora_b.dtype == layer.m.dtype == mx.float32


def test_fresh_values_depend_on_seed_and_name_alone(tiny_model: Make) -> None:
    """The same seed gives the same A whatever else is wrapped; other layers and other seeds give others."""

    def fresh(seed: int, **spec: Any) -> dict[str, np.ndarray]:
        model = tiny_model()
        add_adapter(model, AdapterSpec("lora", **({"num_layers": 3, "rank": 4} | spec)), seed=seed)
        return {name: np.array(array) for name, array in trainable(model).items() if name.endswith("lora_a")}

    everything = fresh(1)
    for name, array in fresh(1, num_layers=1, targets=("q_proj",)).items():
        np.testing.assert_array_equal(array, everything[name])
    values = [array.ravel()[:8].tobytes() for array in (*everything.values(), *fresh(2).values())]
    assert len(set(values)) == 2 * 3 * 7


def test_scale_by_hand() -> None:
    """alpha 32, rank 16: 32/16 = 2; rsLoRA 32/sqrt(16) = 8."""
    assert AdapterSpec.scale_of(32, 16, rslora=False) == 2.0
    assert AdapterSpec.scale_of(32, 16, rslora=True) == 8.0


@pytest.mark.numeric
@pytest.mark.parametrize("scale", [2.0, 8.0])
def test_lora_by_hand(tiny_model: Make, scale: float) -> None:
    """y = x W^T + b + scale (x A) B, in float64."""
    model = tiny_model("qwen2")
    linear = model.layers[0].self_attn.q_proj
    weight, bias = (np.array(a, dtype=np.float64) for a in (linear.weight, linear.bias))
    add_adapter(model, AdapterSpec("lora", num_layers=3, rank=4, scale=scale), seed=1)
    values = {n.rsplit(".", 1)[1]: np.array(a) for n, a in trained(model).items() if ".0.self_attn.q_proj" in n}
    x = np.random.default_rng(0).normal(size=(5, 64))
    expected = x @ weight.T + bias + scale * (x @ values["lora_a"]) @ values["lora_b"]
    found = model.layers[0].self_attn.q_proj(mx.array(x.astype(np.float32)))
    np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=product(64) * np.abs(expected).max())


@pytest.mark.numeric
@pytest.mark.oracle
@pytest.mark.parametrize("bias", [True, False])
def test_dora_equals_pytorch(tiny_model: Make, bias: bool) -> None:
    """Forward and gradient of m (W + s BA) / ||W + s BA|| with a detached norm (arXiv:2402.09353, section 4.3)."""
    torch = pytest.importorskip("torch")
    model = tiny_model("qwen2" if bias else "llama")
    linear = model.layers[0].self_attn.q_proj
    weight = torch.tensor(np.array(linear.weight, dtype=np.float64))
    offset = torch.tensor(np.array(linear.bias, dtype=np.float64)) if bias else 0.0
    add_adapter(model, AdapterSpec("dora", num_layers=3, rank=4, scale=3.0), seed=1)
    layer = model.layers[0].self_attn.q_proj
    trained(model)
    theirs = {
        name: torch.tensor(np.array(layer[name], dtype=np.float64), requires_grad=True)
        for name in ("lora_a", "lora_b", "m")
    }
    rng = np.random.default_rng(0)
    x, factors = rng.normal(size=(5, 64)), rng.normal(size=(5, 64))
    adapted = weight + 3.0 * (theirs["lora_a"] @ theirs["lora_b"]).T
    direction = adapted / adapted.norm(dim=1, keepdim=True).detach()
    out = torch.tensor(x) @ (theirs["m"][:, None] * direction).T + offset
    (out * torch.tensor(factors)).sum().backward()

    ours = mx.array(x.astype(np.float32))
    expected = out.detach().numpy()
    np.testing.assert_allclose(np.array(layer(ours)), expected, rtol=0, atol=product(64) * np.abs(expected).max())
    _, found = gradients(layer, lambda: (layer(ours) * mx.array(factors.astype(np.float32))).sum())
    expected_gradient = {name: tensor.grad.numpy() for name, tensor in theirs.items()}
    assert distance(found, expected_gradient) < 3**0.5 * product(64)  # three products in a row: x A B and back


@pytest.mark.numeric
@QUANTIZED
@pytest.mark.parametrize(("kind", "theirs"), [("lora", TheirLoRALinear), ("dora", TheirDoRALinear)])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_layers_equal_mlx_lms(tiny_model: Make, family: str, kind: str, theirs: Any, quantized: int | None) -> None:
    """Forward and gradient of a whole model, against the same model wrapped in mlx-lm's layers."""
    ours, other = (tiny_model(family, quantized=quantized) for _ in range(2))
    add_adapter(ours, AdapterSpec(kind, num_layers=2, rank=4, scale=1.5), seed=1)
    other.freeze()
    config = {"rank": 4, "scale": 1.5, "dropout": 0.0}
    linear_to_lora_layers(other, 2, config, use_dora=kind == "dora")
    assert sum(isinstance(m, theirs) for m in other.modules()) == 2 * 7
    set_weights(other, trained(ours))
    example = [(np.array(TEXT[0]), np.ones(13, dtype=bool))]
    value, found = gradients(ours, partial(own_loss, ours, example))
    expected_value, expected = gradients(other, partial(own_loss, other, example))
    assert value == pytest.approx(expected_value, rel=LOSS)
    assert distance(found, expected) < GRADIENT


@pytest.mark.numeric
def test_the_quantized_path_has_the_gradient_of_the_dequantized_model(tiny_model: Make) -> None:
    """QuantizedLinear and the same numbers unpacked into Linear: the same loss, the same adapter gradients."""
    packed, plain = tiny_model("llama", quantized=4), tiny_model("llama")
    full = []
    for name, module in packed.named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            weight = mx.dequantize(module.weight, module.scales, module.biases, group_size=32, bits=4)
            full.append((f"{name}.weight", weight))
    plain.load_weights(full, strict=False)
    for model in (packed, plain):
        add_adapter(model, AdapterSpec("lora", num_layers=3, rank=4, scale=1.5), seed=1)
        trained(model)
    example = [(np.array(TEXT[0]), np.ones(13, dtype=bool))]
    value, found = gradients(packed, partial(own_loss, packed, example))
    expected_value, expected = gradients(plain, partial(own_loss, plain, example))
    assert value == pytest.approx(expected_value, rel=LOSS)
    assert distance(found, expected) < GRADIENT


@pytest.mark.parametrize(("kind", "leaves"), [("lora", 2), ("dora", 3)])
def test_what_is_trained(tiny_model: Make, kind: str, leaves: int) -> None:
    """The named layers of the last two blocks, and nothing else; None stands for all seven of a block."""
    model = tiny_model()
    add_adapter(model, AdapterSpec(kind, num_layers=2, rank=4, targets=("q_proj", "up_proj")), seed=1)
    layers = {name.rsplit(".", 1)[0] for name in trainable(model)}
    assert layers == {f"model.layers.{n}.{part}" for n in (1, 2) for part in ("self_attn.q_proj", "mlp.up_proj")}
    assert len(trainable(model)) == 2 * 2 * leaves

    model = tiny_model(tied=False)
    add_adapter(model, AdapterSpec(kind, num_layers=99, rank=4), seed=1)
    layers = {name.rsplit(".", 1)[0] for name in trainable(model)}
    assert {name.rsplit(".", 1)[1] for name in layers} == set(SEVEN)
    assert len(layers) == 3 * 7  # never the head: lm_head is outside the blocks


def test_an_unknown_target_is_named_with_the_choices(tiny_model: Make) -> None:
    model = tiny_model()
    before = logits(model)
    with pytest.raises(AdapterError) as error:
        add_adapter(model, AdapterSpec("lora", num_layers=3, targets=("q_proj", "query", "gate")), seed=1)
    assert "gate, query" in str(error.value)
    assert ", ".join(SEVEN) in str(error.value)
    np.testing.assert_array_equal(logits(model), before)


def test_full_fine_tuning_of_the_last_layers(tiny_model: Make) -> None:
    """Blocks 1 and 2 with their norms; with every block the embedding, the final norm and the head too."""
    model = tiny_model()
    every = {name for name, _ in tree_flatten(model.parameters())}
    add_adapter(model, AdapterSpec("full", num_layers=2), seed=1)
    assert set(trainable(model)) == {n for n in every if n.startswith(("model.layers.1.", "model.layers.2."))}
    add_adapter(model, AdapterSpec("full", num_layers=3), seed=1)
    assert set(trainable(model)) == every


def test_full_fine_tuning_refuses_a_quantized_model(tiny_model: Make) -> None:
    with pytest.raises(AdapterError, match=r"not quantized: use lora\.type: lora"):
        add_adapter(tiny_model(quantized=4), AdapterSpec("full", num_layers=3), seed=1)


def saved(model: Any, folder: Path, spec: AdapterSpec) -> None:
    save_adapter(folder, trainable(model), spec, {"base": "tiny"})


SPECS = [
    AdapterSpec("lora", num_layers=3, rank=4, scale=1.5),
    AdapterSpec("lora", num_layers=2, rank=8, scale=3.0, dropout=0.1, targets=("q_proj", "down_proj")),
    AdapterSpec("dora", num_layers=1, rank=4, scale=0.5),
]


@QUANTIZED
@pytest.mark.parametrize("spec", SPECS, ids=["lora", "some", "dora"])
def test_round_trip_and_mlx_lm_loads_it(tiny_model: Make, tmp_path: Path, spec: AdapterSpec, quantized: int) -> None:
    """Invariant 7, there: our loader gives the same logits bit for bit; mlx-lm's gives the same model."""
    model = tiny_model("qwen3", quantized=quantized)
    add_adapter(model, spec, seed=1)
    weights = trained(model)
    expected = logits(model)
    saved(model, tmp_path, spec)

    again = tiny_model("qwen3", quantized=quantized)
    found = load_adapter(again, tmp_path)
    np.testing.assert_array_equal(logits(again), expected)
    assert (found.kind, found.num_layers, found.rank, found.scale, found.dropout) == (
        spec.kind,
        spec.num_layers,
        spec.rank,
        spec.scale,
        spec.dropout,
    )
    assert distance(trainable(again), weights) == 0

    theirs = load_adapters(tiny_model("qwen3", quantized=quantized), str(tmp_path))
    theirs.eval()
    np.testing.assert_allclose(logits(theirs), expected, atol=LOGITS, rtol=0)


@pytest.mark.parametrize("num_layers", [2, 3])
def test_full_weights_round_trip_and_mlx_lm_loads_them(tiny_model: Make, tmp_path: Path, num_layers: int) -> None:
    spec = AdapterSpec("full", num_layers=num_layers)
    model = tiny_model()
    add_adapter(model, spec, seed=1)
    trained(model)
    saved(model, tmp_path, spec)
    again = tiny_model()
    load_adapter(again, tmp_path)
    np.testing.assert_array_equal(logits(again), logits(model))
    assert set(trainable(again)) == set(trainable(model))
    theirs = load_adapters(tiny_model(), str(tmp_path))
    np.testing.assert_array_equal(logits(theirs), logits(model))


def made_by_mlx_lm(model: Any, folder: Path, num_layers: int, parameters: dict[str, Any], kind: str) -> None:
    """What `mlx_lm.lora` does: freeze, wrap, train, save; then its whole configuration beside the weights."""
    mx.random.seed(0)  # their low-rank matrices begin with it
    model.freeze()
    if kind == "full":
        for layer in model.layers[-max(num_layers, 0) :]:
            layer.unfreeze()
    else:
        linear_to_lora_layers(model, num_layers, parameters, use_dora=kind == "dora")
    weights = trained(model)
    folder.mkdir(exist_ok=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {
        "model": "tiny",
        "train": True,
        "fine_tune_type": kind,
        "optimizer": "adam",
        "num_layers": num_layers,
        "batch_size": 4,
        "iters": 1000,
        "learning_rate": 1e-5,
        "adapter_path": "adapters",
        "lora_parameters": parameters,
        "mask_prompt": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=4))


PARAMETERS = {"rank": 8, "dropout": 0.0, "scale": 20.0}
THEIRS = [
    ("lora", 16, PARAMETERS | {"keys": None}),
    ("lora", 2, PARAMETERS),
    ("lora", -1, PARAMETERS),
    ("lora", 0, PARAMETERS | {"keys": ["self_attn.q_proj", "self_attn.v_proj"]}),
    ("lora", 1, PARAMETERS | {"keys": ["mlp.up_proj", "lm_head"]}),
    ("dora", 2, PARAMETERS | {"keys": None}),
    ("dora", -1, PARAMETERS),
    ("full", -1, PARAMETERS),
    ("full", 1, PARAMETERS),
]


@pytest.mark.parametrize(("kind", "num_layers", "parameters"), THEIRS)
def test_an_adapter_made_by_mlx_lm_loads(
    tiny_model: Make, tmp_path: Path, kind: str, num_layers: int, parameters: dict[str, Any]
) -> None:
    """Invariant 7, back: the same logits, everything in it trainable, and still mlx-lm's after saving it here."""
    theirs = tiny_model(tied=False)
    made_by_mlx_lm(theirs, tmp_path / "theirs", num_layers, parameters, kind)
    ours = tiny_model(tied=False)
    spec = load_adapter(ours, tmp_path / "theirs")
    np.testing.assert_allclose(logits(ours), logits(theirs), atol=1e-3, rtol=0)
    assert set(trainable(theirs)) <= set(trainable(ours))
    if kind != "full":
        assert set(trainable(theirs)) == set(trainable(ours))
    trained(ours, seed=6)
    save_adapter(tmp_path / "ours", trainable(ours), spec, {})
    back = load_adapters(tiny_model(tied=False), str(tmp_path / "ours"))
    np.testing.assert_allclose(logits(back), logits(ours), atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_an_adapter_for_another_shape_is_named(tiny_model: Make, tmp_path: Path, kind: str) -> None:
    """Every tensor that differs is named with both shapes; the model is as it was, and takes the right adapter."""
    spec = AdapterSpec(kind, num_layers=3, rank=4, scale=1.5)
    wide = tiny_model(intermediate_size=160)
    add_adapter(wide, spec, seed=1)
    saved(wide, tmp_path / "wide", spec)
    right = tiny_model()
    add_adapter(right, spec, seed=1)
    trained(right)
    saved(right, tmp_path / "right", spec)

    model = tiny_model()
    names, before = [n for n, _ in model.named_modules()], logits(model)
    with pytest.raises(AdapterError) as error:
        load_adapter(model, tmp_path / "wide")
    message = str(error.value)
    if kind == "full":
        assert "model.layers.0.mlp.up_proj.weight is [160, 64], the model needs [96, 64]" in message
    else:
        assert "model.layers.0.mlp.up_proj.lora_b is [4, 160], the model needs [4, 96]" in message
        assert "model.layers.0.mlp.down_proj.lora_a is [160, 4], the model needs [96, 4]" in message
        # in each of three blocks down's A, up's and gate's B, and for DoRA their m: 9 or 15, of which 8 are named
        assert f"and {1 if kind == 'lora' else 7} more" in message
    assert "base model that it was trained on" in message
    assert [n for n, _ in model.named_modules()] == names
    np.testing.assert_array_equal(logits(model), before)
    load_adapter(model, tmp_path / "right")
    np.testing.assert_array_equal(logits(model), logits(right))


def test_a_full_model_with_another_vocabulary_is_named(tiny_model: Make, tmp_path: Path) -> None:
    spec = AdapterSpec("full", num_layers=3)
    other = tiny_model(vocabulary=320)
    add_adapter(other, spec, seed=1)
    saved(other, tmp_path, spec)
    model = tiny_model()
    before = logits(model)
    with pytest.raises(AdapterError) as error:
        load_adapter(model, tmp_path)
    assert "lm_head.weight is [320, 64], the model needs [300, 64]" in str(error.value)
    assert "model.embed_tokens.weight is [320, 64], the model needs [300, 64]" in str(error.value)
    np.testing.assert_array_equal(logits(model), before)


def test_an_adapter_with_more_layers_is_named(tiny_model: Make, tmp_path: Path) -> None:
    """Block 3 of a deeper model does not exist here."""
    spec = AdapterSpec("lora", num_layers=1, rank=4, targets=("q_proj",))
    deep = tiny_model(layers=4)
    add_adapter(deep, spec, seed=1)
    saved(deep, tmp_path, spec)
    model = tiny_model()
    before = logits(model)
    with pytest.raises(AdapterError, match=r"model\.layers\.3\.self_attn\.q_proj \(no such linear layer\)"):
        load_adapter(model, tmp_path)
    np.testing.assert_array_equal(logits(model), before)


def test_an_adapter_that_lacks_tensors_is_refused(tiny_model: Make, tmp_path: Path) -> None:
    """A without its B would load as an adapter that does nothing."""
    spec = AdapterSpec("lora", num_layers=1, rank=4, targets=("q_proj",))
    model = tiny_model()
    add_adapter(model, spec, seed=1)
    weights = trainable(model)
    del weights["model.layers.2.self_attn.q_proj.lora_b"]
    save_adapter(tmp_path, weights, spec, {})
    with pytest.raises(AdapterError, match=r"model\.layers\.2\.self_attn\.q_proj\.lora_b is missing"):
        load_adapter(tiny_model(), tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_a_truncated_adapter_is_refused(tiny_model: Make, tmp_path: Path, keep: int) -> None:
    """Cut in the length field, in the header, and one byte before the end of the data."""
    model = tiny_model()
    add_adapter(model, SPECS[0], seed=1)
    saved(model, tmp_path, SPECS[0])
    path = tmp_path / "adapters.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    fresh = tiny_model()
    before = logits(fresh)
    with pytest.raises(AdapterError, match="is damaged"):
        load_adapter(fresh, tmp_path)
    np.testing.assert_array_equal(logits(fresh), before)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapters.safetensors"])
def test_a_missing_file_is_named(tiny_model: Make, tmp_path: Path, name: str) -> None:
    model = tiny_model()
    add_adapter(model, SPECS[0], seed=1)
    saved(model, tmp_path, SPECS[0])
    (tmp_path / name).unlink()
    with pytest.raises(AdapterError, match=f"it has no {name}"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"fine_tune_type": "prefix"}', '{"lora_parameters": {"rank": "x"}}']
)
def test_a_damaged_config_is_refused(tiny_model: Make, tmp_path: Path, text: str) -> None:
    model = tiny_model()
    add_adapter(model, SPECS[0], seed=1)
    saved(model, tmp_path, SPECS[0])
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match=r"damaged|no usable adapter"):
        load_adapter(tiny_model(), tmp_path)


def test_a_second_adapter_takes_the_first_ones_place(tiny_model: Make, tmp_path: Path) -> None:
    """As DPO after SFT in one process: the adapter that is loaded is the only one on the model."""
    spec = AdapterSpec("lora", num_layers=2, rank=4, targets=("q_proj",))
    model = tiny_model()
    add_adapter(model, spec, seed=1)
    trained(model)
    saved(model, tmp_path, spec)
    other = tiny_model()
    add_adapter(other, SPECS[0], seed=2)
    trained(other)
    load_adapter(other, tmp_path)
    np.testing.assert_array_equal(logits(other), logits(model))
