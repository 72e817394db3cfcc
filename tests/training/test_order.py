"""The order of examples against SplitMix64 written out in plain integers."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_zh.system.splitmix import mix64, stream
from mlx_zh.training.order import Order

MASK = 2**64 - 1


def splitmix64(value: int) -> int:
    """The finalizer as Vigna's reference C code has it, in Python's own integers."""
    z = (value + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def plain_stream(*words: int) -> int:
    state = 0
    for word in words:
        state = splitmix64(state ^ (word & MASK))
    return state


def plain_epoch(size: int, seed: int, number: int) -> list[int]:
    base = plain_stream(seed, number)
    return sorted(range(size), key=lambda i: splitmix64(i ^ base))


def test_mix_is_splitmix64() -> None:
    """0xE220A8397B1DCDAF is the first output of the reference generator seeded with 0, 0x910A2DEC89025CC1 with 1."""
    assert [hex(splitmix64(v)) for v in (0, 1)] == ["0xe220a8397b1dcdaf", "0x910a2dec89025cc1"]
    values = [0, 1, 2, 2**32, 2**63, MASK]
    assert mix64(np.array(values, dtype=np.uint64)).tolist() == [splitmix64(v) for v in values]


def test_stream_tells_sequences_apart() -> None:
    assert int(stream(42, 7, 3)) == plain_stream(42, 7, 3)
    assert int(stream(-1)) == plain_stream(MASK)
    sequences = [(), (0,), (0, 0), (1, 2), (2, 1), (1, 2, 0), (12,)]
    assert len({int(stream(*words)) for words in sequences}) == len(sequences)


@pytest.mark.parametrize(("size", "seed"), [(1, 0), (7, 42), (1000, 2**31 - 1)])
def test_epochs_equal_the_plain_ones(size: int, seed: int) -> None:
    """Every epoch visits every example once, in the order of the plain implementation."""
    order = Order(size, batch_size=3, seed=seed)
    for number in range(4):
        assert order.epoch(number).tolist() == plain_epoch(size, seed, number)
        assert sorted(order.epoch(number).tolist()) == list(range(size))


def test_pinned_order() -> None:
    """Ten examples with seed 42: what every machine and every version must give, or resumed runs would change."""
    order = Order(10, batch_size=4, seed=42)
    assert order.epoch(0).tolist() == plain_epoch(10, 42, 0) == PINNED[0]
    assert order.epoch(1).tolist() == plain_epoch(10, 42, 1) == PINNED[1]


PINNED = [[4, 3, 5, 8, 0, 9, 7, 6, 1, 2], [8, 7, 1, 9, 0, 3, 4, 6, 5, 2]]


def test_steps_cut_epochs_and_keep_the_ragged_tail() -> None:
    """10 examples by 4: steps of 4, 4 and 2, then the next epoch begins."""
    order = Order(10, batch_size=4, seed=42)
    assert order.steps_per_epoch == 3
    steps = [order.step(n).tolist() for n in range(6)]
    assert [len(s) for s in steps] == [4, 4, 2, 4, 4, 2]
    assert steps[0] + steps[1] + steps[2] == plain_epoch(10, 42, 0)
    assert steps[3] + steps[4] + steps[5] == plain_epoch(10, 42, 1)


def test_a_step_is_a_pure_function() -> None:
    """Asked for alone, in another object, after other steps: the same examples. Other seeds give other orders."""
    assert Order(50, 8, 3).step(11).tolist() == [Order(50, 8, 3).step(n) for n in (2, 30, 11)][2].tolist()
    assert len({tuple(Order(50, 8, seed).epoch(0).tolist()) for seed in range(20)}) == 20


def test_a_batch_larger_than_the_data() -> None:
    order = Order(3, batch_size=8, seed=0)
    assert order.steps_per_epoch == 1
    assert order.step(5).tolist() == plain_epoch(3, 0, 5)


def test_orders_are_uniform() -> None:
    """Each of 8 examples leads each epoch equally often: 2000 epochs, 250 +- 5 standard deviations of 14.8."""
    first = [int(Order(8, 1, 1).epoch(n)[0]) for n in range(2000)]
    assert all(250 - 74 < first.count(example) < 250 + 74 for example in range(8))
