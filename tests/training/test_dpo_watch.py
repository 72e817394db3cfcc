"""Known failures of preference tuning, told from figures."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mlx_zh.errors import TrainingError
from mlx_zh.recipe import Dpo
from mlx_zh.training.dpo_watch import DpoWatch


def figures(step: int, **changes: float) -> dict[str, Any]:
    """8 pairs of 100 scored tokens each, 50 a response; at the start nothing is preferred."""
    names = {f"rewards/{name}": 0.0 for name in ("chosen", "rejected", "margins")}
    start = {"step": step, "loss": math.log(2), "pairs": 8, "scored_tokens": 800, "rewards/accuracies": 0.5}
    return start | names | changes


def watch(float32: bool = True, starts_at_reference: bool = True, **section: Any) -> DpoWatch:
    return DpoWatch(Dpo(**section), starts_at_reference=starts_at_reference, float32=float32)


def reward(chosen: float, rejected: float) -> dict[str, float]:
    return {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}


# The first step


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (reward(0.002, 0.0), "rewards/chosen is 0.002, not 0"),
        (reward(0.0, -0.002), "rewards/rejected is -0.002, not 0"),
        ({"loss": 0.71}, "the loss is 0.7100, not ln 2 = 0.6931"),
        ({"loss": float("nan")}, "the loss is nan"),
    ],
)
def test_a_first_step_that_cannot_be_is_an_error(changes: dict[str, float], told: str) -> None:
    """Allowed are 50 tokens times 1e-4 times beta 0.1: rewards of 0.0005."""
    with pytest.raises(TrainingError, match=told):
        watch().step(figures(1, **changes))


def test_rounding_is_allowed_for() -> None:
    """In half precision a token may differ by 0.03: rewards of 0.15."""
    assert watch().step(figures(1, **reward(4e-4, -4e-4))) == []
    assert watch(float32=False).step(figures(1, **reward(0.1, -0.1), loss=0.6)) == []
    with pytest.raises(TrainingError):
        watch(float32=False).step(figures(1, **reward(0.2, 0.0)))


def test_what_does_not_start_at_the_reference_is_not_checked() -> None:
    assert watch(starts_at_reference=False).step(figures(1, **reward(1.0, 0.0))) == []
    assert watch().step(figures(2, **reward(1.0, 0.0))) == []


def test_the_loss_is_ln_2_for_sigmoid_alone() -> None:
    for section in ({"loss": "hinge"}, {"sft_weight": 0.1}):
        assert watch(**section).step(figures(1, loss=1.0)) == []
    with pytest.raises(TrainingError, match="rewards/chosen"):
        watch(loss="hinge").step(figures(1, **reward(1.0, 0.0)))


# Degeneration


def sinking(step: int, fall: float = 0.02) -> dict[str, Any]:
    """Both rewards fall, the rejected one twice as fast."""
    return figures(step, **reward(-fall * (step - 1), -2 * fall * (step - 1)))


def test_chosen_responses_that_sink_with_the_rejected_are_told_once() -> None:
    """Windows of 5 steps average -0.04, -0.14, -0.24, -0.34: after 20 steps three falls, 3 nats at beta 0.1."""
    found = watch()
    told = [found.step(sinking(step)) for step in range(1, 61)]
    assert [bool(texts) for texts in told] == [step == 20 for step in range(1, 61)]
    assert "less likely for 20 steps (reward -0.04 -> -0.34)" in told[19][0] and "dpo.sft_weight" in told[19][0]


@pytest.mark.parametrize(
    "curve",
    [
        lambda step: figures(step, **reward(0.02 * (step - 1), -0.02 * (step - 1))),  # as it should be
        lambda step: sinking(step, 0.005),  # by less than a nat
        lambda step: figures(step, **reward(2 - 0.02 * (step - 1), -1 - 0.05 * step)),  # still above the reference
        lambda step: figures(step, **reward(-0.02 * (step - 1), -0.02 * (step - 1))),  # the margin does not grow
        lambda step: figures(step, **reward(-0.3 * (step % 10 < 5) - 0.001 * step, -1.0 * step)),  # up and down
    ],
)
def test_other_curves_are_no_degeneration(curve: Any) -> None:
    found = watch()
    first = figures(1)
    assert found.step(first) == [] and all(found.step(curve(step)) == [] for step in range(2, 61))


def test_steps_of_an_earlier_session_count_and_are_not_told_again() -> None:
    early = watch()
    for step in range(1, 16):
        early.recall(sinking(step))
    assert [bool(early.step(sinking(step))) for step in range(16, 21)] == [False] * 4 + [True]
    late = watch()
    for step in range(1, 31):
        late.recall(sinking(step))
    assert not any(late.step(sinking(step)) for step in range(31, 61))


# Saturation


def test_accuracy_that_is_perfect_at_once_is_told() -> None:
    found = watch()
    told = [found.step(figures(step, **{"rewards/accuracies": 1.0})) for step in range(1, 6)]
    assert [bool(texts) for texts in told] == [False, False, True, False, False]
    assert "every pair of the first 3 steps was ranked correctly" in told[2][0]
    assert "dpo.reference: start" in told[2][0]


@pytest.mark.parametrize(
    ("section", "accuracies", "pairs"),
    [
        ({}, [0.875, 1.0, 1.0], 8),
        ({}, [1.0, 1.0, 0.5], 8),
        ({}, [1.0, 1.0, 1.0], 3),  # 9 pairs: chance
        ({"loss": "simpo"}, [1.0, 1.0, 1.0], 8),  # compares with no reference
    ],
)
def test_what_is_no_saturation(section: dict[str, Any], accuracies: list[float], pairs: int) -> None:
    found = watch(starts_at_reference=section == {}, **section)
    steps = [figures(n, pairs=pairs, **{"rewards/accuracies": a}) for n, a in enumerate(accuracies, start=1)]
    assert [found.step(step) for step in steps] == [[], [], []]
