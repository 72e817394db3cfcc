"""Exponentials of many numbers where MLX computes them one at a time, as its CPU back end on Linux does.

There an exponential takes as long as sixty multiplications, which are done several at a time. So it is made of
those: x = n ln 2 + r with a whole number n, and exp(x) = 2^n exp(r), where a polynomial gives exp(r). That takes a
quarter of the time, as long as the arrays fit into the processor's cache.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_zh.system import device

# Between these, 2^n is a normal number; what lies beyond is taken to be at the end.
_LOWEST, _HIGHEST = -87.3, 88.0
_LOG2_E = 1.4426950408889634
# Adding and subtracting this number rounds to a whole number, which the last bits of the sum hold (1.5 * 2^23).
_ROUNDING = 12582912.0
# ln 2 in two parts. The first has so few digits that n times it is exact.
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440054690583e-4
# (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2, fitted so that the largest relative error of exp(r) is least: 3e-9.
_POLYNOMIAL = (0.0013814539, 0.0083687454, 0.0416683890, 0.1666652113, 0.4999999404)


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + exp(-x)), within two units of the last place of MLX's."""
    if x.dtype != mx.float32 or not device.computes_exponentials_singly():
        return mx.sigmoid(x)
    return 1 / (1 + exp(-x))


def exp(x: mx.array) -> mx.array:
    """exp(x) for float32, within an ulp; what is below 1e-38 or above 1.6e38 becomes one of these. NaN stays NaN."""
    x = mx.minimum(mx.maximum(x, _LOWEST), _HIGHEST)
    shifted = x * _LOG2_E + _ROUNDING
    whole = shifted - _ROUNDING
    rest = x - whole * _LN2_HIGH - whole * _LN2_LOW
    value = rest * _POLYNOMIAL[0]
    for coefficient in _POLYNOMIAL[1:]:
        value = (value + coefficient) * rest
    value = value * rest + rest + 1
    power = ((shifted.view(mx.int32) << 23) + 0x3F800000).view(mx.float32)  # 2^n
    return value * power
