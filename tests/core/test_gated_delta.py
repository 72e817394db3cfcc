"""The gated delta rule in chunks over a tree, against mlx-lm's own loop over the tokens of each path."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.gated_delta import gated_delta_ops, normalize_qk

from mlx_zh.core.gated_delta import chunk_for, convolved, gated_delta, unit_triangular_inverse
from mlx_zh.core.packing import Segment

pytestmark = pytest.mark.numeric
K, V, C, D = 2, 4, 32, 16  # heads of keys and of values, and their sizes
TREE = (Segment(0, 70, None, 0), Segment(70, 75, 0, 70), Segment(75, 210, 0, 70), Segment(210, 240, 2, 205))
ROW = (*TREE, Segment(240, 241, None, 0), Segment(241, 260, 4, 1))


def inputs(tokens: int, seed: int = 0, *, alike: bool = False) -> list[mx.array]:
    """Queries, keys, values, logs of gates and betas; `alike`: equal keys and no decay, where errors grow most."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> mx.array:
        return mx.array(rng.normal(size=shape).astype(np.float32))

    queries, keys = normalize_qk(normal(tokens, K, C), normal(tokens, K, C), inv_scale=C**-0.5, eps=1e-6)
    log_gates = mx.array(-rng.uniform(0, 0.4, size=(tokens, V)).astype(np.float32))
    betas = mx.sigmoid(normal(tokens, V))
    if alike:
        keys, log_gates, betas = mx.broadcast_to(keys[:1], keys.shape), log_gates * 0, mx.ones_like(betas)
    return [queries, keys, normal(tokens, V, D), log_gates, betas]


def path(segments: tuple[Segment, ...], index: int | None) -> list[int]:
    """Row positions from the root to the end of a segment."""
    if index is None:
        return []
    segment = segments[index]
    return [*path(segments, segment.parent), *range(segment.start, segment.stop)]


def one_by_one(arrays: list[mx.array], segments: tuple[Segment, ...]) -> mx.array:
    """mlx-lm's loop over the tokens of each path, of which each segment's own outputs are kept."""
    outputs = []
    for index, segment in enumerate(segments):
        q, k, v, log_gates, betas = (array[mx.array(path(segments, index))][None] for array in arrays)
        y, _ = gated_delta_ops(q, k, v, mx.exp(log_gates), betas)
        outputs.append(y[0, -len(segment) :])
    return mx.concatenate(outputs)


def relative(got: mx.array, expected: mx.array) -> float:
    return float(mx.linalg.norm(got - expected) / mx.linalg.norm(expected))


# Both sum the same products of numbers of order 1 in another order: some hundred roundings of 2^-24 each.
CLOSE = 5e-6


@pytest.mark.parametrize("chunk", [4, 16, 64])
@pytest.mark.parametrize("alike", [False, True])
def test_values_and_gradients_are_those_of_the_loop(chunk: int, alike: bool) -> None:
    arrays = inputs(260, alike=alike)
    weights = inputs(260, seed=1)[2]

    def chunked(*arrays: mx.array) -> mx.array:
        return (gated_delta(*arrays, ROW, chunk=chunk)[0] * weights).sum()

    def loop(*arrays: mx.array) -> mx.array:
        return (one_by_one(list(arrays), ROW) * weights).sum()

    assert relative(gated_delta(*arrays, ROW, chunk=chunk)[0], one_by_one(arrays, ROW)) < CLOSE
    everything = tuple(range(5))
    got, expected = (mx.grad(f, argnums=everything)(*arrays) for f in (chunked, loop))
    scale = max(float(mx.linalg.norm(b)) for b in expected)  # equal keys without decay leave the gates no gradient
    for name, a, b in zip(("queries", "keys", "values", "gates", "betas"), got, expected, strict=True):
        assert float(mx.linalg.norm(a - b)) < CLOSE * (scale if alike else float(mx.linalg.norm(b))), name


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(-1, 5)), min_size=1, max_size=6), st.sampled_from([4, 16]))
def test_any_tree_gives_what_each_path_gives_alone(tree: list[tuple[int, int]], chunk: int) -> None:
    segments: list[Segment] = []
    start = 0
    for index, (length, parent) in enumerate(tree):
        segments.append(Segment(start, start + length, parent if 0 <= parent < index else None, 0))
        start += length
    arrays = inputs(start)
    got, ends = gated_delta(*arrays, segments, chunk=chunk)
    assert relative(got, one_by_one(arrays, tuple(segments))) < CLOSE
    assert len(ends) == len(segments)


def test_a_row_goes_on_from_the_matrices_of_another() -> None:
    arrays = inputs(90)
    whole, ends = gated_delta(*arrays, (Segment(0, 90, None, 0),))
    first, before = gated_delta(*(array[:37] for array in arrays), (Segment(0, 37, None, 0),))
    second, after = gated_delta(*(array[37:] for array in arrays), (Segment(0, 53, None, 37),), before=before[0])
    assert relative(mx.concatenate([first, second]), whole) < CLOSE
    assert relative(after[0], ends[0]) < CLOSE


def test_the_inverse_of_a_triangle_stays_exact_where_powers_would_not() -> None:
    ones = mx.tril(mx.ones((64, 64)), -1)  # its 32nd power has entries of 1e18; its inverse those of a difference
    expected = np.eye(64) - np.eye(64, k=-1)
    np.testing.assert_array_equal(np.array(unit_triangular_inverse(ones)), expected)
    rng = np.random.default_rng(0)
    lower = np.tril(rng.normal(size=(3, 2, 16, 16)), -1) * 0.3
    got = np.array(unit_triangular_inverse(mx.array(lower.astype(np.float32))))
    np.testing.assert_allclose(got, np.linalg.inv(np.eye(16) + lower), atol=1e-5)


def test_the_convolution_sees_the_path_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    x = mx.array(rng.normal(size=(260, 6)).astype(np.float32))
    weight = mx.array(rng.normal(size=(6, 4, 1)).astype(np.float32))

    def alone(x: mx.array, weight: mx.array = weight) -> mx.array:
        rows: list[Any] = []
        for index, segment in enumerate(ROW):
            line = x[mx.array(path(ROW, index))]
            padded = mx.concatenate([mx.zeros((3, 6)), line])
            rows.append(mx.conv1d(padded[None], weight, groups=6)[0, -len(segment) :])
        return mx.concatenate(rows)

    assert relative(convolved(x, weight, ROW)[0], alone(x)) < CLOSE
    for which in (0, 1):
        got, expected = (
            mx.grad(lambda x, w, f=f: (f(x, w) ** 2).sum(), argnums=which)(x, weight)
            for f in (lambda x, w: convolved(x, w, ROW)[0], alone)
        )
        assert relative(got, expected) < CLOSE
    first, tail = convolved(x[:5], weight, (Segment(0, 5, None, 0),))
    later, end = convolved(x[5:], weight, (Segment(0, 255, None, 5),), tail)
    whole, _ = convolved(x, weight, (Segment(0, 260, None, 0),))
    assert relative(mx.concatenate([first, later]), whole) < CLOSE
    assert mx.array_equal(end, x[-3:])
    _, short = convolved(x[5:7], weight, (Segment(0, 2, None, 5),), tail)
    assert mx.array_equal(short, x[4:7])


def test_the_size_of_a_chunk_follows_the_segments() -> None:
    """Counted by hand as chunks times (their tokens + 8): 512 tokens at once are 8 x 72 = 576, and 32 x 24 = 768."""
    assert chunk_for([512]) == 64
    assert chunk_for([16] * 32) == 16  # 32 x 24 against 32 x 40 and 32 x 72
    assert chunk_for([32] * 16) == 32  # 32 x 24, 16 x 40, 16 x 72
    assert chunk_for([1]) == 16
