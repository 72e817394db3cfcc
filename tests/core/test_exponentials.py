"""Exponentials made of whole-array products: against float64, at the ends, and where they are used."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_zh.core import exponentials
from mlx_zh.system import device

pytestmark = pytest.mark.numeric
ULP = 2.0**-24  # half the distance of two floats above 1, so an exact result that is rounded is off by this at most


@pytest.fixture(autouse=True)
def singly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "computes_exponentials_singly", lambda: True)


def test_exp_is_within_an_ulp_of_float64_over_its_whole_range() -> None:
    x = np.concatenate([np.linspace(-87.3, 88, 1_000_001), np.linspace(-1, 1, 100_001)]).astype(np.float32)
    found = np.array(exponentials.exp(mx.array(x)), dtype=np.float64)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(found / exact - 1).max() <= 2 * ULP


def test_exp_keeps_its_ends_and_nan() -> None:
    x = mx.array([0.0, -0.0, -1e4, -np.inf, 1e4, np.inf, np.nan])
    found = np.array(exponentials.exp(x))
    assert found[:2].tolist() == [1.0, 1.0]
    assert found[2:4].tolist() == [0.0, 0.0]
    assert (found[4:6] > 1.6e38).all() and np.isfinite(found[4:6]).all()
    assert np.isnan(found[6])


@pytest.mark.parametrize("shape", [(100_001,), (3, 400_000), (700, 1_500), (2, 3, 400, 500)])
def test_powers_below_their_largest(shape: tuple[int, ...]) -> None:
    """Small and large arrays, which are computed in pieces: each number relative to the largest of its row."""
    x = -np.abs(30 * np.random.default_rng(0).normal(size=shape)).astype(np.float32)
    top = x.max(axis=-1, keepdims=True)
    exact = x.astype(np.float64) - top
    powers = np.array(exponentials.power_below(mx.array(x), mx.array(top)), dtype=np.float64)
    assert powers.shape == shape
    rounded = (x - top).astype(np.float64)  # the difference is rounded as any float32
    assert np.abs(powers / np.exp2(rounded) - 1)[rounded > -126].max() <= 4 * ULP
    found = np.array(exponentials.exp_below(mx.array(x), mx.array(top)), dtype=np.float64)
    # The product with log2(e) is rounded by a unit of its size x, and x exp(x) is 0.37 at most.
    assert np.abs(found - np.exp(exact)).max() <= 2 * ULP
    assert (found.max(axis=-1) == 1).all()


def test_powers_at_the_end_are_zero_and_nan_stays() -> None:
    """A mask of -inf gives 0, not a denormal number, with which a processor computes slowly."""
    x, top = mx.array([-np.inf, -1e30, -127.5, -126.4, -0.0, np.nan]), mx.array([0.0])
    found = np.array(exponentials.power_below(x, top))
    assert found[:3].tolist() == [0.0] * 3 and found[3] >= 2.0**-126.5 and found[4] == 1.0 and np.isnan(found[5])
    found = np.array(exponentials.exp_below(x, top))
    assert found[:3].tolist() == [0.0] * 3 and found[4] == 1.0 and np.isnan(found[5])


def test_elsewhere_they_are_mlxs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "computes_exponentials_singly", lambda: False)
    x, top = mx.array([[-3.0, -0.5, 2.0]]), mx.array([[2.0]])
    assert mx.array_equal(exponentials.exp_below(x, top), mx.exp(x - top))
    assert mx.allclose(exponentials.power_below(x, top), mx.power(2.0, x - top), rtol=1e-6)


@pytest.mark.parametrize("spread", [0.1, 1.0, 8.0])
def test_the_sigmoid_against_float64(spread: float) -> None:
    x = (spread * np.random.default_rng(0).normal(size=200_000)).astype(np.float32)
    exact = 1 / (1 + np.exp(-x.astype(np.float64)))
    found = np.array(exponentials.sigmoid(mx.array(x)), dtype=np.float64)
    assert np.abs(found / exact - 1).max() <= 4 * ULP  # of the exponential, the sum and the quotient
    assert np.array(exponentials.sigmoid(mx.array([np.inf, 100.0]))).tolist() == [1.0, 1.0]
    assert np.array(exponentials.sigmoid(mx.array([-np.inf, -100.0]))).max() < 1e-37


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_stays_mlxs(dtype: mx.Dtype) -> None:
    x = mx.random.normal((1000,), key=mx.random.key(0)).astype(dtype)
    assert mx.array_equal(exponentials.sigmoid(x), mx.sigmoid(x))
