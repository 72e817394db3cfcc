"""The forecast of a training stage, with a clock of its own."""

from __future__ import annotations

from datetime import datetime

import pytest

from mlx_zh.stages.forecast import Expected, Forecast
from mlx_zh.system.clock import clock

NOON = datetime(2026, 3, 2, 12, 0).timestamp()


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.seconds = NOON

    def __call__(self) -> float:
        return self.seconds


def forecast(watch: Clock, *, step: float, eval_steps: int | None = None, budget_end: float = NOON + 9e9) -> Forecast:
    expected = Expected(step, {"eval-sft": 600.0, "report": 0.0}, budget_end, "8h")
    return Forecast("sft", 100, 0, eval_steps, expected, watch)


def take(watch: Clock, follower: Forecast, seconds: float, steps: int) -> list[str]:
    lines = []
    for _ in range(steps):
        watch.seconds += seconds
        lines += follower.stepped()
    return lines


def test_it_is_corrected_once_after_five_percent() -> None:
    watch = Clock()
    follower = forecast(watch, step=30.0)
    watch.seconds += 100  # the first step compiles
    assert follower.stepped() == []
    assert take(watch, follower, 60, 3) == []
    (line,) = take(watch, follower, 60, 1)
    # 5 steps in 340 s; 95 of 60 s follow: 95 min. The exam takes twice as long as well: 20 min.
    assert line == (
        "After 5 of 100 steps: 60 s a step, 30 s were expected. SFT will be done about 13:40, the whole run "
        "about 14:00."
    )
    assert take(watch, follower, 60, 95) == [] and follower.end == watch()


def test_a_machine_that_is_slower_is_said_to_miss_the_budget_and_nothing_is_cut() -> None:
    watch = Clock()
    _, line = take(watch, forecast(watch, step=30.0, budget_end=NOON + 7000), 60, 5)
    # At 12:05, 95 min and twice the exam's 10 min follow: 7,200 s after noon.
    assert "3 min 20 s after the budget of 8h ends" in line
    assert "Nothing is cut short" in line
    watch = Clock()
    (line,) = take(watch, forecast(watch, step=60.0, budget_end=NOON + 7000), 60, 5)
    assert "budget" not in line


def test_validation_counts_apart() -> None:
    watch = Clock()
    follower = forecast(watch, step=10.0, eval_steps=20)
    watch.seconds += 300
    follower.validated()
    take(watch, follower, 10, 10)
    # 90 steps of 10 s, and validation after 20, 40, 60, 80 and 100 steps.
    assert follower.end == watch() + 900 + 5 * 300


def test_a_stage_without_a_budget_says_nothing() -> None:
    watch = Clock()
    assert take(watch, Forecast("sft", 100, 0, None, None, watch), 60, 100) == []


def test_a_resumed_stage_waits_for_its_own_steps() -> None:
    watch = Clock()
    follower = Forecast("sft", 100, 50, None, Expected(10.0, {}, NOON + 9e9, "8h"), watch)
    assert len(take(watch, follower, 10, 4)) == 0 and len(take(watch, follower, 10, 1)) == 1


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(11.5 * 3600, "about 23:30"), (19 * 3600, "about 07:00 tomorrow"), (72 * 3600, "about 2026-03-05 12:00")],
)
def test_the_time_of_day(seconds: float, words: str) -> None:
    assert clock(NOON + seconds, now=NOON) == words
