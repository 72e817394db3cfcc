"""The speed of this machine's arithmetic and memory, measured in a few seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from mlx_zh.planning.speed import timed


@dataclass(frozen=True, slots=True)
class Measured:
    """GFLOP/s of matrix products by type of number, and memory bandwidth in bytes per second."""

    float32: float
    bfloat16: float
    four_bit: float
    bandwidth: float


def measure_machine(seconds: float = 10.0) -> Measured:
    """Measure this machine in about `seconds`.

    The products are of square matrices in float32, in bfloat16 and with 4-bit weights; the bandwidth is that of an
    addition over a large array.
    """
    return Measured(
        float32=_products(mx.float32, seconds / 4),
        bfloat16=_products(mx.bfloat16, seconds / 4),
        four_bit=_quantized_products(seconds / 4),
        bandwidth=_bandwidth(seconds / 4),
    )


def _products(dtype: mx.Dtype, seconds: float) -> float:
    def at(size: int) -> Callable[[], object]:
        left, right = (mx.random.normal((size, size)).astype(dtype) for _ in range(2))
        mx.eval(left, right)
        return lambda: mx.eval(left @ right)

    return _rate(at, seconds)


def _quantized_products(seconds: float) -> float:
    def at(size: int) -> Callable[[], object]:
        left = mx.random.normal((size, size))
        packed = mx.quantize(mx.random.normal((size, size)), group_size=64, bits=4)
        mx.eval(left, *packed)
        return lambda: mx.eval(mx.quantized_matmul(left, *packed, transpose=True, group_size=64, bits=4))

    return _rate(at, seconds)


def _rate(at: Callable[[int], Callable[[], object]], seconds: float) -> float:
    """GFLOP/s of the largest product, up to size 4096, that takes less than about a quarter of `seconds`.

    `at(size)` gives a function that computes one product.
    """
    size = 128
    duration = timed(at(size), seconds / 10)
    while size < 4096 and 8 * duration < seconds / 4:
        size *= 2
        duration = timed(at(size), seconds / 10)
    return 2 * size**3 / duration / 1e9


def _bandwidth(seconds: float) -> float:
    """Bytes per second that an addition reads and writes."""
    size = 2**24
    values = mx.random.uniform(shape=(size,))
    mx.eval(values)
    return 8 * size / timed(lambda: mx.eval(values + 1.0), seconds)


ATTENTION_LENGTHS = (25, 100, 400)  # tokens of a segment


def attention_seconds(tokens: int, *, fused: bool, dtype: mx.Dtype = mx.bfloat16) -> float:
    """Seconds for attention over a segment and its gradient, with the heads of Llama-3.1-8B in one layer.

    The fused way has a causal mask; a boolean array as the mask makes Metal take the unfused way.
    """
    query, key, value = (mx.random.normal((1, heads, tokens, 128)).astype(dtype) for heads in (32, 8, 8))
    mask = "causal" if fused else mx.tri(tokens, dtype=mx.bool_)
    mx.eval(query, key, value, mask)

    def total(query: mx.array, key: mx.array, value: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(query, key, value, scale=128**-0.5, mask=mask).sum()

    gradient = mx.grad(total, argnums=(0, 1, 2))
    return timed(lambda: mx.eval(gradient(query, key, value)), 0.2)
