"""What only an Apple GPU can show: the self-check, an SFT step and a DPO step, against numbers of the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import hypot, sqrt

import mlx.core as mx
import pytest
import tiny_steps
from tolerances import BOTH, GRADIENT, LOGPROBS, LOSS, WIDEST, rounding

from mlx_zh.models.adapters.layers import trainable
from mlx_zh.system import device
from mlx_zh.training.check_cases import ON_GPU, Case
from mlx_zh.training.self_check import check

STORED = json.loads(tiny_steps.FILE.read_text(encoding="utf-8"))
STAGES: dict[str, Callable[[], tiny_steps.Numbers]] = {"sft": tiny_steps.sft, "dpo": tiny_steps.dpo}
BETA = 0.05  # of the DPO step


def bound(stage: str, name: str, value: float, worse: float = 1.0) -> float:
    """How far rounding moves a number; `worse` is the device's rounding in units of float32 sums on the CPU.

    The first step's bounds are those of tests/tolerances.py; a reward is beta times a difference of log-probs. The
    second step starts from weights that an error in the gradient has moved (as in `tolerances.later_loss`). Its
    numbers move by that times their own gradient: 8 for SFT's loss (`gradient norm`, before clipping), and 40 for a
    sum of log-probs, which has 6 times as many terms as its mean.
    """
    number = name.removeprefix("step 1 ").removeprefix("step 2 ")
    logprobs = LOGPROBS * 45  # the sums of log-probs are about -43
    first, steepness = {
        ("sft", "loss"): (LOSS * value, 8),
        ("sft", "gradient norm"): (GRADIENT * value, 8),
        ("dpo", "loss"): (2 * BETA * logprobs, 2 * BETA * 40),
        ("dpo", "gradient norm"): (2 * GRADIENT * value, 8),
        ("dpo", "rewards/margins"): (2 * BETA * logprobs, 2 * BETA * 40),
        ("dpo", "rewards/chosen"): (BETA * logprobs, BETA * 40),
        ("dpo", "rewards/rejected"): (BETA * logprobs, BETA * 40),
        ("dpo", "logps/chosen"): (logprobs, 40),
        ("dpo", "logps/rejected"): (logprobs, 40),
    }.get((stage, number), (0.0, 0))  # accuracies and counts are exact: no margin is near 0
    weights = sum(array.size for array in trainable(tiny_steps.tiny_model()).values())
    moved = tiny_steps.RATE * sqrt(weights) * GRADIENT if name.startswith("step 2") else 0.0
    return worse * (first + steepness * moved)


def compare(stage: str, worse: float = 1.0) -> None:
    numbers, stored = STAGES[stage](), STORED[stage]
    assert numbers.keys() == stored.keys()
    for name, value in stored.items():
        assert abs(numbers[name] - value) <= bound(stage, name, value, worse), name


@pytest.mark.numeric
@pytest.mark.parametrize("stage", STAGES)
def test_the_stored_numbers_are_the_cpus(stage: str) -> None:
    with mx.stream(mx.cpu):
        compare(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_bounds_are_narrow(stage: str) -> None:
    """A change of a thousandth shows in every number, so the bounds tell a wrong number from a rounded one."""
    for name, value in STORED[stage].items():
        assert bound(stage, name, value) < 1e-3 * abs(value), name


def test_short_branches_are_among_them() -> None:
    """Metal 0.32.4 refuses fused attention with a gradient and up to 8 queries, so these lengths matter."""
    branches = {length for _, _, *both in tiny_steps.PAIRS for length in both}
    assert branches == set(range(1, 9))


@pytest.mark.metal
@pytest.mark.parametrize("stage", STAGES)
def test_two_steps_on_metal(stage: str) -> None:
    """On an M5, products round their factors to 11 bits; older chips' functions are off by up to 2e-6."""
    ours = BOTH * rounding(WIDEST)
    worse = sqrt(2 / 3) * 2.0**-11 / ours if device.shortens_float32() else hypot(1, 2e-6 / ours)
    compare(stage, worse)


@pytest.mark.metal
@pytest.mark.parametrize("case", ON_GPU, ids=str)
def test_the_self_check_on_metal(case: Case) -> None:
    outcome = check(case)
    assert outcome.passed, outcome.problem
