"""From how many rows on a product with frozen quantized weights is faster dense: measured once for each device.

The results are remembered in the cache folder by device, MLX version and form of the product, for all models.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_zh.core.frozen_products import FrozenLinear, computed_in, dense_product, form_of
from mlx_zh.errors import StorageError
from mlx_zh.system import device
from mlx_zh.system.digests import value_digest
from mlx_zh.system.json_text import read_object
from mlx_zh.system.storage import cache_folder, write_exact_json

ROWS = (1024, 512, 256, 128)  # what is tried, longest first; fewer rows always go the quantized way
_GAIN = 1.1  # the dense way is taken if it is so many times as fast
_ROUNDS = 5
_SAMPLE = 0.01  # seconds
_FORMAT = 1  # of the remembered results; raised when the measurement itself changes
_SETTINGS = ("MLX_ENABLE_TF32",)  # variables that choose other kernels

# How far the two ways may lie apart, as a share of the norm: each rounds the result, and CUDA both factors, once.
_UNITS = {mx.float32: 2.0**-11, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
_MARGIN = 4

# Seconds of a product and its gradient with so many rows, the quantized way and the dense way.
Timed = Callable[[int], tuple[float, float]]


def smallest_rows(timed: Timed, most: int = ROWS[0]) -> int:
    """The smallest of `ROWS`, up to `most`, from which on the dense way is clearly faster; 0 if it never is."""
    smallest = 0
    for rows in (rows for rows in ROWS if rows <= most):
        quantized, dense = timed(rows)
        if not dense * _GAIN <= quantized:
            break
        smallest = rows
    return smallest


def remembered() -> dict[str, int]:
    """What was measured on this device, by form: the smallest number of rows, 0 for never."""
    return _read(_file())


def measured(layers: Iterable[Any], dtype: mx.Dtype, *, most: int = ROWS[0]) -> dict[str, int]:
    """The same for the products of `layers` with up to `most` rows of type `dtype`, measured if not remembered.

    What cannot be computed the dense way is 0, and is not remembered.
    """
    file, results = _file(), remembered()
    by_form = {form_of(layer, dtype): layer for layer in layers}
    missing = [form for form in by_form if form not in results]
    failed: dict[str, int] = {}
    for form in missing:
        try:
            results[form] = _smallest_of(by_form[form], dtype, most)
        except RuntimeError:  # such as for lack of memory; the quantized way needs less
            failed[form] = 0
    if missing:
        with suppress(OSError, StorageError):  # then it is measured again
            file.parent.mkdir(parents=True, exist_ok=True)
            write_exact_json(file, {"about": _about(), "rows": results})
    return {form: (results | failed)[form] for form in by_form}


def layer_of(outputs: int, inputs: int, dtype: mx.Dtype, *, bits: int = 4, group: int = 64) -> FrozenLinear:
    """A random quantized layer of this size, without a bias."""
    layer = FrozenLinear(inputs, outputs, False, group, bits)
    layer.set_dtype(dtype)
    return layer


def seconds_of(layer: Any, rows: int, dtype: mx.Dtype) -> tuple[float, float]:
    """Seconds of the layer's product with `rows` rows and its gradient, quantized and dense: medians, in turns."""
    ways = _ways(layer, rows, dtype)
    for way in ways:  # kernels are compiled
        way()
    rounds = [[_sampled(way) for way in ways] for _ in range(_ROUNDS)]
    quantized, dense = (statistics.median(seconds) for seconds in zip(*rounds, strict=True))
    return quantized, dense


def _smallest_of(layer: Any, dtype: mx.Dtype, most: int) -> int:
    return smallest_rows(lambda rows: seconds_of(layer, rows, dtype), most) if _same(layer, dtype) else 0


def _ways(layer: Any, rows: int, dtype: mx.Dtype) -> list[Callable[[], list[mx.array]]]:
    """The product and its gradient, quantized and dense; each is computed when it is called."""
    outputs, words = layer.weight.shape
    x = mx.random.normal((rows, words * 32 // layer.bits), key=mx.random.key(0)).astype(dtype)
    cotangent = mx.random.normal((rows, outputs), key=mx.random.key(1)).astype(computed_in(layer, dtype))
    mx.eval(x, cotangent, layer.parameters())

    def quantized(x: mx.array) -> mx.array:
        product: mx.array = nn.QuantizedLinear.__call__(layer, x)
        return product

    def dense(x: mx.array) -> mx.array:
        out = dense_product(layer, x)
        return out + layer.bias if "bias" in layer else out

    def computed(way: Callable[[mx.array], mx.array]) -> list[mx.array]:
        outputs, gradients = mx.vjp(way, [x], [cotangent])
        arrays = [*outputs, *gradients]
        mx.eval(arrays)
        return arrays

    return [lambda: computed(quantized), lambda: computed(dense)]


def _same(layer: Any, dtype: mx.Dtype) -> bool:
    """Whether both ways give the same product and gradient, but for rounding."""
    quantized, dense = (way() for way in _ways(layer, ROWS[-1], dtype))
    bound = _MARGIN * _UNITS.get(dtype, 0.0)
    pairs = [[array.astype(mx.float32) for array in pair] for pair in zip(quantized, dense, strict=True)]
    return all(bool((mx.linalg.norm(q - d) <= bound * mx.linalg.norm(q)).item()) for q, d in pairs)


def _sampled(way: Callable[[], object]) -> float:
    """Seconds of one call, the mean of as many as fill the sample."""
    count, began = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - began < _SAMPLE:
        way()
        count += 1
    return (time.perf_counter() - began) / count


def _about() -> dict[str, Any]:
    settings = {name: os.environ.get(name) for name in _SETTINGS}
    return {"format": _FORMAT, **device.identity(), "settings": settings}


def _file() -> Path:
    return cache_folder() / "products" / f"{value_digest(_about())[:24]}.json"


def _read(file: Path) -> dict[str, int]:
    """The remembered results; empty without any, or if the file is damaged."""
    last = read_object(file) or {}
    rows = last.get("rows")
    if last.get("about") != _about() or not isinstance(rows, dict):
        return {}
    return {form: least for form, least in rows.items() if isinstance(least, int) and least in (0, *ROWS)}
