"""Picking, splitting and mixing: numbers derived by hand, and that growing a set moves nothing."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_zh.corpus.mixing import is_validation, mix, pick

HASHES = np.random.default_rng(0).integers(0, 2**63, 1000).astype(np.uint64)
ROWS = np.arange(1000)


def test_a_larger_pick_keeps_the_smaller_one():
    small, large = pick(ROWS, HASHES, 100, 1), pick(ROWS, HASHES, 300, 1)
    assert len(small) == 100 and len(large) == 300 and set(small) < set(large)
    assert (np.diff(small) > 0).all()  # in their own order
    assert set(pick(ROWS, HASHES, 100, 2)) != set(small)
    assert pick(ROWS, HASHES, None, 1) is ROWS and pick(ROWS, HASHES, 2000, 1) is ROWS


def test_rows_stay_on_their_side_when_a_set_grows():
    few, many = is_validation(HASHES[:400], 0.1), is_validation(HASHES, 0.1)
    np.testing.assert_array_equal(few, many[:400])
    assert 60 <= many.sum() <= 140  # 100 expected, a standard deviation of 9.5
    assert (is_validation(HASHES, 0.2) | ~many).all()  # a larger share keeps the smaller one
    assert not is_validation(HASHES, 0.0).any()


def test_concat_takes_weights_as_factors():
    mixed = mix([np.arange(10), np.arange(10, 14)], [0.5, 2.5], "concat", HASHES, 1)
    first, second = mixed[mixed < 10], mixed[mixed >= 10]
    assert len(first) == len(set(first)) == 5
    assert len(second) == 10 and (np.bincount(second - 10) >= 2).all()  # twice each, and half of them once more
    assert (mixed[:5] < 10).all()


def test_interleave_takes_weights_as_shares():
    """10 and 30 rows at 1 : 1 make 10 + 10; at 1 : 3 all of both, three of the second to one of the first."""
    mixed = mix([np.arange(10), np.arange(10, 40)], [1.0, 1.0], "interleave", HASHES, 1)
    assert len(mixed) == len(set(mixed)) == 20 and (mixed < 10).sum() == 10
    assert ((mixed < 10).reshape(10, 2).sum(axis=1) == 1).all()  # one of each in every two
    mixed = mix([np.arange(10), np.arange(10, 40)], [1.0, 3.0], "interleave", HASHES, 1)
    assert sorted(mixed) == list(range(40))
    assert ((mixed < 10).reshape(10, 4).sum(axis=1) == 1).all()


@pytest.mark.parametrize("mixing", ["concat", "interleave"])
def test_nothing_to_mix(mixing: str):
    assert len(mix([], [], mixing, HASHES, 1)) == 0
    assert list(mix([np.arange(0), np.arange(3)], [1.0, 1.0], "concat", HASHES, 1)) == [0, 1, 2]
