"""Exponentials of many numbers where MLX computes them one at a time, as its CPU back end on Linux does.

There an exponential takes as long as fifty sums or products, which are done several at a time. So it is made of
those: x = n ln 2 + r with a whole number n, and exp(x) = 2^n exp(r), where a polynomial gives exp(r). That takes a
fourth to a fifth of the time.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlx_zh.system import device

LOG2_E = 1.4426950408889634

# What lies below the first becomes 0, and what lies above the second is computed as if it were 88.
_LOWEST, _HIGHEST = -88.0, 88.0
# The last bits of x + this number are n + 127, where n is x rounded to a whole number: the exponent of 2^n.
_ROUNDING = 1.5 * 2**23 + 127
# ln 2 in two parts. The first has so few digits that n times it is exact.
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440054690583e-4
# (exp(r) - 1) / r for |r| <= ln(2) / 2, and (2^f - 1) / f for |f| <= 1 / 2, from the highest power down. They are
# fitted so that the largest relative error of exp(r) and 2^f is least: 3e-9 and 2e-9.
_NATURAL = (0.0013814539, 0.0083687454, 0.0416683890, 0.1666652113, 0.4999999404, 1.0)
_BASE_2 = (1.5353362e-4, 1.3398875e-3, 9.6184369e-3, 5.5503324e-2, 2.4022648e-1, 6.9314718e-1)


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + exp(-x)), within two units of the last place of MLX's."""
    if x.dtype != mx.float32 or not device.computes_exponentials_singly():
        return mx.sigmoid(x)
    return 1 / (1 + exp(-x))


def exp(x: mx.array) -> mx.array:
    """exp(x) for float32, within an ulp; 0 below about 8e-39, and at most 1.7e38. NaN stays NaN."""
    x = mx.minimum(mx.maximum(x, _LOWEST), _HIGHEST)
    shifted = x * LOG2_E + _ROUNDING
    whole = shifted - _ROUNDING
    rest = x - whole * _LN2_HIGH - whole * _LN2_LOW
    return _product(rest, shifted, _NATURAL)


def exp_below(x: mx.array, top: mx.array) -> mx.array:
    """exp(x - top) for x (..., n) and top (..., 1), above which no number of x is. It is off by 2^-23 at most.

    So a small result has fewer correct digits than a large one.
    """
    if x.dtype != mx.float32 or not device.computes_exponentials_singly():
        return mx.exp(x - top)
    return in_pieces(lambda x, top: _power((x - top) * LOG2_E), x, top)


def power_below(x: mx.array, top: mx.array) -> mx.array:
    """2^(x - top) for float32 x (..., n) and top (..., 1), above which no number of x is. NaN stays NaN.

    It is within two units of the last place, and 0 where it is below about 8e-39.
    """
    if not device.computes_exponentials_singly():
        return mx.exp((x - top) * (1 / LOG2_E))
    return in_pieces(lambda x, top: _power(x - top), x, top)


def _power(x: mx.array) -> mx.array:
    """2^x of numbers up to 0."""
    x = mx.maximum(x, _LOWEST * LOG2_E)
    shifted = x + _ROUNDING
    return _product(x - (shifted - _ROUNDING), shifted, _BASE_2)


def _product(rest: mx.array, shifted: mx.array, polynomial: tuple[float, ...]) -> mx.array:
    """(1 + rest times the polynomial of it) times 2^n, whose exponent is the last bits of `shifted`."""
    value = rest * polynomial[0]
    for coefficient in polynomial[1:]:
        value = (value + coefficient) * rest
    return (value + 1) * (shifted.view(mx.int32) << 23).view(mx.float32)


def in_pieces(compute: Callable[[mx.array, mx.array], mx.array], x: mx.array, top: mx.array) -> mx.array:
    """`compute` of x (..., n) and top (..., 1), some rows after the others: their values stay in the cache.

    It is called with matrices of some rows, and with a small x whole, in its own shape.
    """
    if x.size <= 2 * _PIECE:
        return compute(x, top)
    rows, tops = x.reshape(-1, x.shape[-1]), top.reshape(-1, 1)
    size = max(1, _PIECE // x.shape[-1])
    results: list[mx.array] = []
    for start in range(0, len(rows), size):
        piece = rows[start : start + size]
        if results:
            piece = mx.depends([piece], [results[-1]])[0]
        results.append(compute(piece, tops[start : start + size]))
    return mx.concatenate(results).reshape(*x.shape[:-1], -1)


_PIECE = 2**18  # numbers
