"""Attention on a CPU against float64 and against MLX's own, with gradients, in pieces and with windows."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from tolerances import LARGEST, UNIT

from mlx_zh.core import attention
from mlx_zh.core.attention import causal_attention, query_pieces
from mlx_zh.system import device

pytestmark = pytest.mark.numeric
HEADS, GROUPS, SIZE = 6, 2, 16
SCALE = SIZE**-0.5


def inputs(count: int, total: int, spread: float = 1.0) -> tuple[mx.array, ...]:
    """Queries, keys, values and the gradient of the output."""
    rng = np.random.default_rng(count + total)
    shapes = [(1, HEADS, count, SIZE), (1, GROUPS, total, SIZE), (1, GROUPS, total, SIZE), (1, HEADS, count, SIZE)]
    return tuple(mx.array((spread * rng.normal(size=shape)).astype(np.float32)) for shape in shapes)


def seen(count: int, total: int, window: int | None) -> np.ndarray:
    last = np.arange(total - count, total)[:, None]
    key = np.arange(total)
    return (key <= last) & (key > (-1 if window is None else last - window))


def ours(queries: mx.array, keys: mx.array, values: mx.array, window: int | None) -> mx.array:
    return causal_attention(queries, keys, values, scale=SCALE, window=window)


def in_float64(
    queries: mx.array, keys: mx.array, values: mx.array, gradient: mx.array, mask: np.ndarray
) -> tuple[np.ndarray, ...]:
    """The output, and the gradients of queries, keys and values, as their definition gives them."""
    q, k, v, g = (np.array(x, dtype=np.float64)[0] for x in (queries, keys, values, gradient))
    k, v = (np.repeat(x, HEADS // GROUPS, axis=0) for x in (k, v))
    scores = np.where(mask, q @ k.swapaxes(1, 2) * SCALE, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    of_weights = g @ v.swapaxes(1, 2)
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True)) * SCALE
    shared = (
        x.reshape(GROUPS, HEADS // GROUPS, *x.shape[1:]).sum(1)
        for x in (of_scores.swapaxes(1, 2) @ q, weights.swapaxes(1, 2) @ g)
    )
    return weights @ v, of_scores @ k, *shared


CASES = [
    (1, 1, None),
    (1, 300, None),
    (7, 7, None),
    (40, 90, None),
    (256, 256, None),
    (257, 300, None),
    (700, 900, None),
]
CASES += [(1, 40, 8), (33, 60, 8), (300, 320, 100)]


@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize(("count", "total", "window"), CASES)
def test_output_and_gradients_against_float64(count: int, total: int, window: int | None, spread: float) -> None:
    """With spread 4 the scores go up to 250, so one key has nearly all the weight."""
    *arrays, gradient = inputs(count, total, spread)
    output, found = mx.vjp(lambda *x: ours(*x, window), arrays, [gradient])
    exact = in_float64(*arrays, gradient, seen(count, total, window))
    # A score is rounded by UNIT of its size a few times, and a weight is off by as much as its score. A sum over the
    # keys or queries is rounded as a product of matrices is.
    scores = float(np.abs(np.array(arrays[0])).max() * np.abs(np.array(arrays[1])).max() * SIZE * SCALE)
    bound = LARGEST * (4 * scores / 3 + total**0.5 + 8) * UNIT
    for measured, expected in zip([output[0], *found], exact, strict=True):
        error = np.abs(np.array(measured, dtype=np.float64)[0] - expected).max()
        assert error < bound * max(np.abs(expected).max(), 1.0)  # the gradient of a lone key's score is 0


@pytest.mark.parametrize("window", [None, 50])
def test_against_mlxs_own(window: int | None) -> None:
    *arrays, gradient = inputs(600, 700)
    mask = mx.array(seen(600, 700, window))

    def own(*x: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(*x, scale=SCALE, mask=mask)

    (expected,), of_own = mx.vjp(own, arrays, [gradient])
    (found,), of_ours = mx.vjp(lambda *x: ours(*x, window), arrays, [gradient])
    for one, other in zip([found, *of_ours], [expected, *of_own], strict=True):
        assert mx.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_pieces_end_with_the_segment() -> None:
    assert [query_pieces(count) for count in (1, 256, 257, 600)] == [[1], [256], [256, 257], [256, 512, 600]]


def test_a_piece_sees_no_later_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, int]] = []
    own = attention._exponentials

    def noted(queries: mx.array, keys: mx.array, window: int | None) -> mx.array:
        shapes.append((queries.shape[2], keys.shape[2]))
        return own(queries, keys, window)

    monkeypatch.setattr(attention, "_exponentials", noted)
    queries, keys, values, _ = inputs(600, 650)
    causal_attention(queries, keys, values, scale=SCALE)
    assert shapes == [(256, 306), (256, 562), (88, 650)]


def test_a_gpu_and_half_precision_take_mlxs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys, values, _ = inputs(5, 9)
    monkeypatch.setattr(attention, "_by_products", lambda *_: pytest.fail("not MLX's own attention"))
    causal_attention(*(x.astype(mx.float16) for x in (queries, keys, values)), scale=SCALE)
    monkeypatch.setattr(device, "is_cpu", lambda: False)
    found = causal_attention(queries, keys, values, scale=SCALE)
    mask = mx.array(seen(5, 9, None))
    expected = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=SCALE, mask=mask)
    assert mx.allclose(found, expected, rtol=1e-5, atol=1e-6)
