"""What this machine's memory and arithmetic give, measured in a few seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from mlx_zh.planning.speed import timed


@dataclass(frozen=True, slots=True)
class Measured:
    """Matrix products in GFLOP/s by kind of number, and bytes a second of plain copying."""

    float32: float
    bfloat16: float
    four_bit: float
    bandwidth: float


def measure_machine(seconds: float = 10.0) -> Measured:
    """Square matrix products in float32, bfloat16 and with 4-bit weights, and an addition over large arrays."""
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
    """GFLOP/s of the largest size whose product takes a fair part of `seconds`."""
    size = 128
    taken = timed(at(size), seconds / 10)
    while size < 4096 and 8 * taken < seconds / 4:
        size *= 2
        taken = timed(at(size), seconds / 10)
    return 2 * size**3 / taken / 1e9


def _bandwidth(seconds: float) -> float:
    """Bytes a second read and written by an addition."""
    size = 2**24
    values = mx.random.uniform(shape=(size,))
    mx.eval(values)
    return 8 * size / timed(lambda: mx.eval(values + 1.0), seconds)
