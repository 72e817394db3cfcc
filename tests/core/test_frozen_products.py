"""Products with unpacked weights: the numbers of MLX's quantized kernel and its gradient, with nothing kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
import pytest
from tolerances import UNIT, product

from mlx_zh.core import frozen_products
from mlx_zh.core.frozen_products import FrozenLinear, agreed, dense_product, form_of, install
from mlx_zh.core.logprobs import batch_logprobs, output_head, token_logprobs
from mlx_zh.core.packing import pack_conversations
from mlx_zh.models.adapters.layers import add_adapter, trainable
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.training.step import set_weights

Make = Callable[..., Any]
INPUTS, OUTPUTS, ROWS = 256, 96, 40
# The partial sums of an entry that is some times as large as the others are larger too, about twice at the most.
EXACT = 2 * product(INPUTS)


@pytest.fixture(autouse=True)
def quantized_again() -> Iterator[None]:
    yield
    frozen_products.use({})


def layer_of(bits: int | None = 4, group: int | None = 64, mode: str = "affine", dtype: mx.Dtype = mx.float32) -> Any:
    linear = nn.Linear(INPUTS, OUTPUTS)
    linear.weight = mx.random.normal((OUTPUTS, INPUTS), key=mx.random.key(1)) / 16
    linear.set_dtype(dtype)
    layer = nn.QuantizedLinear.from_linear(linear, group, bits, mode)
    install(nn.Sequential(layer))
    assert type(layer) is FrozenLinear
    return layer


def rows_of(width: int, dtype: mx.Dtype = mx.float32, shape: tuple[int, ...] = (ROWS,)) -> mx.array:
    return mx.random.normal((*shape, width), key=mx.random.key(width)).astype(dtype)


def both(layer: Any, x: mx.array, cotangent: mx.array) -> tuple[list[mx.array], list[mx.array]]:
    """Product and gradient, the quantized way and the dense way."""
    ways = []
    for rules in ({}, {form_of(layer, x.dtype): x.size // x.shape[-1]}):
        frozen_products.use(rules)
        outputs, gradients = mx.vjp(layer, [x], [cotangent])
        ways.append([outputs[0], gradients[0]])
    return ways[0], ways[1]


def exact(layer: Any, x: mx.array, cotangent: mx.array) -> list[npt.NDArray[np.float64]]:
    """The same by NumPy in float64, from the weight as MLX dequantizes it."""
    scales = {"scales": layer.scales, "biases": layer.get("biases")}
    form = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    weight = wide(mx.dequantize(layer.weight, **scales, **form, dtype=x.dtype))
    return [wide(x) @ weight.T + wide(layer.bias), wide(cotangent) @ weight]


def wide(array: mx.array) -> npt.NDArray[np.float64]:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def apart(array: mx.array, expected: npt.NDArray[np.float64]) -> float:
    """The largest difference, as a share of the entries' typical size."""
    return float(np.abs(wide(array) - expected).max() / np.sqrt((expected**2).mean()))


@pytest.mark.numeric
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("shape", [(ROWS,), (2, ROWS)], ids=["row", "batch"])
def test_every_packing(bits: int, group: int, shape: tuple[int, ...]) -> None:
    layer, x, cotangent = layer_of(bits, group), rows_of(INPUTS, shape=shape), rows_of(OUTPUTS, shape=shape)
    quantized, dense = both(layer, x, cotangent)
    for one, other, expected in zip(quantized, dense, exact(layer, x, cotangent), strict=True):
        assert apart(other, expected) < EXACT
        assert apart(one, wide(other)) < EXACT
        assert one.shape == other.shape


@pytest.mark.numeric
@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_the_other_modes(mode: str) -> None:
    layer, x, cotangent = layer_of(None, None, mode), rows_of(INPUTS), rows_of(OUTPUTS)
    _, dense = both(layer, x, cotangent)
    for array, expected in zip(dense, exact(layer, x, cotangent), strict=True):
        assert apart(array, expected) < EXACT


@pytest.mark.numeric
@pytest.mark.parametrize(("dtype", "bits"), [(mx.bfloat16, 8), (mx.float16, 11)], ids=["bfloat16", "float16"])
def test_half_precision(dtype: mx.Dtype, bits: int) -> None:
    """The weight is unpacked in the type of the rows, as GPUs do, and the sum is rounded to it once.

    An entry is at most `largest` times the typical size, and its rounding half a unit in the last of `bits` digits.
    The CPU's quantized kernel adds up in half precision, so it is further off.
    """
    layer, x, cotangent = layer_of(dtype=dtype), rows_of(INPUTS, dtype), rows_of(OUTPUTS, dtype)
    quantized, dense = both(layer, x, cotangent)
    for one, other, expected in zip(quantized, dense, exact(layer, x, cotangent), strict=True):
        assert other.dtype == one.dtype == dtype
        largest = np.abs(expected).max() / np.sqrt((expected**2).mean())
        assert apart(other, expected) < 2 * largest * 2.0**-bits + EXACT
        assert apart(other, expected) < apart(one, expected)


@pytest.mark.numeric
def test_wider_scales_decide_the_type() -> None:
    """Rows in bfloat16 and scales in float32: MLX's product is in float32, and the gradient in bfloat16."""
    layer, x, cotangent = layer_of(), rows_of(INPUTS, mx.bfloat16), rows_of(OUTPUTS)
    quantized, dense = both(layer, x, cotangent)
    assert [array.dtype for array in dense] == [array.dtype for array in quantized] == [mx.float32, mx.bfloat16]
    assert apart(dense[0], wide(quantized[0])) < EXACT


def test_weights_get_no_gradient() -> None:
    layer, x = layer_of(), rows_of(INPUTS)

    def total(scales: mx.array) -> mx.array:
        layer.scales = scales
        return dense_product(layer, x).sum()

    assert not mx.grad(total)(layer.scales).any()


@pytest.mark.parametrize(("rows", "unpacked"), [(1, False), (39, False), (40, True), (41, True)])
def test_the_rules_count_rows(monkeypatch: pytest.MonkeyPatch, rows: int, unpacked: bool) -> None:
    calls = []
    dequantize = mx.dequantize
    monkeypatch.setattr(mx, "dequantize", lambda *args, **more: calls.append(args) or dequantize(*args, **more))
    layer = layer_of()
    frozen_products.use({form_of(layer, mx.float32): 40})
    layer(rows_of(INPUTS, shape=(1, rows)))
    layer(rows_of(INPUTS, mx.float16, shape=(1, rows)))  # its scales are float32, and so is the product
    assert len(calls) == 2 * unpacked
    frozen_products.use({form_of(layer_of(bits=8), mx.float32): 1})  # of another form
    layer(rows_of(INPUTS, shape=(1, rows)))
    assert len(calls) == 2 * unpacked


def test_ranks_agree_on_what_all_of_them_measured() -> None:
    assert agreed([{"a": 128, "b": 256}]) == {"a": 128, "b": 256}
    assert agreed([{"a": 128, "b": 256}, {"b": 128, "a": 512}, {"a": 256}]) == {"a": 512}
    assert agreed([{"a": 128}, {}]) == {}


# In models


def all_dense(model: Any, dtype: mx.Dtype = mx.float32) -> None:
    kinds = (*frozen_products.QUANTIZED,)
    frozen_products.use({form_of(module, dtype): 8 for module in model.modules() if isinstance(module, kinds)})


TOKENS = [3 + (7 * n) % 290 for n in range(50)]
ROW = pack_conversations([(TOKENS, [n > 10 for n in range(50)])])


@pytest.mark.numeric
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_gradient_of_adapters(tiny_model: Make, kind: str, checkpoint: bool) -> None:
    """Both ways round products of up to 96 terms; see `tolerances.gradient`, here as a share of the norm."""
    model = tiny_model("llama", quantized=4)
    install(model)
    add_adapter(model, AdapterSpec(kind, num_layers=3, rank=4, scale=1.5), seed=1)
    key = mx.random.key(5)
    drawn = {n: 0.1 * mx.random.normal(a.shape, key=key) for n, a in trainable(model).items() if "lora_b" in n}
    set_weights(model, drawn)
    results = []
    for use in (lambda: frozen_products.use({}), partial(all_dense, model)):
        use()

        def loss(weights: dict[str, mx.array]) -> mx.array:
            set_weights(model, weights)
            return -batch_logprobs(model, ROW, checkpoint=checkpoint).sum()

        weights = trainable(model)
        results.append(mx.value_and_grad(loss)(weights))
        set_weights(model, weights)
    (value, gradients), (expected_value, expected) = results
    assert value.item() == pytest.approx(expected_value.item(), rel=1e-5)
    for name, gradient in gradients.items():
        norm = mx.linalg.norm(expected[name])
        assert (mx.linalg.norm(gradient - expected[name]) <= 3e-5 * norm + 1e-7).item(), name


@pytest.mark.numeric
@pytest.mark.parametrize("tied", [False, True])
def test_an_unpacked_head(tiny_model: Make, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    """The weight of a chunk is unpacked once, for logits and gradient."""
    model = tiny_model("llama", quantized=4, tied=tied)
    install(model)
    head, hidden = output_head(model), mx.random.normal((40, 64), key=mx.random.key(2))
    targets = mx.arange(40)

    def logprobs(hidden: mx.array) -> mx.array:
        return token_logprobs(hidden, head, targets, chunk=16)

    expected, of_hidden = mx.vjp(logprobs, [hidden], [mx.ones(40)])
    mx.eval(expected, of_hidden)
    calls, dequantize = [], mx.dequantize
    monkeypatch.setattr(mx, "dequantize", lambda *args, **more: calls.append(args) or dequantize(*args, **more))
    all_dense(model)
    found, gradient = mx.vjp(logprobs, [hidden], [mx.ones(40)])
    assert len(calls) == 3  # chunks of 16, 16 and 8
    assert mx.abs(found[0] - expected[0]).max().item() < 300 * UNIT
    assert mx.abs(gradient[0] - of_hidden[0]).max().item() < product(300) * mx.abs(of_hidden[0]).max().item()
    without = token_logprobs(hidden, head, targets, chunk=16, grad=False)
    assert mx.abs(without - expected[0]).max().item() < 300 * UNIT


def test_no_unpacked_weight_is_kept() -> None:
    """24 layers forward and backward: 48 unpacked weights, of which a few are there at a time."""
    count, width = 24, 512
    layers = [nn.QuantizedLinear.from_linear(nn.Linear(width, width, bias=False)) for _ in range(count)]
    install(nn.Sequential(*layers))
    x = mx.random.normal((16, width))
    mx.eval(x, [layer.parameters() for layer in layers])

    def total(x: mx.array) -> mx.array:
        for layer in layers:
            x = x + mx.tanh(layer(x))
        return x.sum()

    def peak() -> float:
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.value_and_grad(total)(x))
        return (mx.get_peak_memory() - before) / (4 * width * width)

    quantized = peak()
    frozen_products.use({form_of(layers[0], mx.float32): 16})
    assert quantized < 3 and peak() < quantized + 5
