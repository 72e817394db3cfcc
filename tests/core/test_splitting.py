"""Cutting an array into many parts: the parts, and a gradient without an array of zeros for each."""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_zh.core.splitting import split_at


@given(st.lists(st.integers(1, 4), min_size=1, max_size=130), st.sampled_from([0, 1]))
@settings(max_examples=60, deadline=None)
def test_the_parts_and_their_gradient_are_numpys(lengths: list[int], axis: int) -> None:
    """Part i is multiplied by i + 1, so the gradient at each of its entries is i + 1, exactly."""
    total = sum(lengths)
    values = np.arange(2 * total, dtype=np.float32).reshape((total, 2) if axis == 0 else (2, total))
    cuts = np.cumsum(lengths)[:-1].tolist()
    parts = split_at(mx.array(values), cuts, axis=axis)
    for part, expected in zip(parts, np.split(values, cuts, axis=axis), strict=True):
        assert np.array_equal(np.array(part), expected)

    def weighted(array: mx.array) -> mx.array:
        return sum(((i + 1) * part.sum() for i, part in enumerate(split_at(array, cuts, axis=axis))), mx.zeros(()))

    factors = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    expected = np.broadcast_to(factors[:, None] if axis == 0 else factors, values.shape)
    assert np.array_equal(np.array(mx.grad(weighted)(mx.array(values))), expected)


def operations(result: mx.array, folder: Path) -> list[str]:
    """The names of the operations that lead to a result."""
    mx.export_to_dot(str(folder / "graph.dot"), result)
    return re.findall(r'label ="(\w+)", shape=rectangle', (folder / "graph.dot").read_text())


def test_no_part_has_a_gradient_as_large_as_the_whole(tmp_path: Path) -> None:
    """`mx.split` puts each of 11 parts into zeros of its own; here no number of parts does so."""
    row = mx.ones((1, 2, 300, 4))

    def gradient(cuts: list[int], *, own: bool) -> list[str]:
        def squares(array: mx.array) -> mx.array:
            parts = split_at(array, cuts, axis=2) if own else mx.split(array, cuts, axis=2)
            return sum((part.square().sum() for part in parts), mx.zeros(()))

        return operations(mx.grad(squares)(row), tmp_path)

    assert gradient(list(range(1, 11)), own=False).count("SliceUpdate") == 11
    for count in (1, 10, 11, 99, 101, 250):
        assert gradient(list(range(1, count)), own=True).count("SliceUpdate") == 0
