"""When a training stage, and the whole run, will be done: from the steps taken in this session."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mlx_zh.system import console
from mlx_zh.system.clock import clock

_SHARE = 0.05  # of the steps, after which the forecast is corrected
_FEWEST = 3  # steps: the first one compiles kernels and is left out
_LATE = 1.05  # a run that takes so much longer than its budget is said to


@dataclass(frozen=True)
class Expected:
    """What a budget expected, in seconds: of a step of this stage, and of the run's later steps by name."""

    step: float
    later: Mapping[str, float]
    end: float  # the moment at which the budget ends, in seconds since 1970
    budget: str


@dataclass
class Forecast:
    """Follows the steps of one stage. `now` is the clock, in seconds since 1970."""

    stage: str
    total: int
    done: int
    eval_steps: int | None
    expected: Expected | None = None
    now: Callable[[], float] = time.time
    steps: list[float] = field(default_factory=list)  # seconds of the steps of this session
    validation: float = 0.0  # seconds of the last validation pass
    said: bool = False

    def __post_init__(self) -> None:
        self._last = self.now()
        self._due = self.done + max(math.ceil(_SHARE * self.total), _FEWEST)

    def stepped(self) -> list[str]:
        """Take in a step that has just ended; returns the corrected forecast once, after 5 % of the steps.

        It has one sentence or, if the budget will not be kept, two.
        """
        self._pass(self.steps.append)
        self.done += 1
        if self.said or self.expected is None or self.done < self._due or self.done >= self.total:
            return []
        self.said = True
        return self._corrected(self.expected)

    def validated(self) -> None:
        """Take in a validation pass that has just ended."""
        self._pass(lambda seconds: setattr(self, "validation", seconds))

    @property
    def step_seconds(self) -> float:
        """Mean seconds of a step, without the first one of this session."""
        steps = self.steps[1:] or self.steps
        return sum(steps) / len(steps) if steps else 0.0

    @property
    def end(self) -> float:
        """The moment at which this stage will be done."""
        left = self.total - self.done
        passes = math.ceil(left / self.eval_steps) if self.eval_steps else min(left, 1)
        return self.now() + left * self.step_seconds + passes * self.validation

    def _corrected(self, expected: Expected) -> list[str]:
        ratio = self.step_seconds / expected.step
        # What follows runs on the same machine, so it is as much slower or faster than expected.
        end = self.end + sum(expected.later.values()) * ratio
        line = (
            f"After {self.done:,} of {self.total:,} steps: {self.step_seconds:.3g} s a step, {expected.step:.3g} s "
            f"were expected. {self.stage.upper()} will be done {clock(self.end, now=self.now())}, the whole run "
            f"{clock(end, now=self.now())}."
        )
        if end - self.now() > 0 and end > expected.end and ratio > _LATE:
            late = (
                f"That is {console.duration(end - expected.end)} after the budget of {expected.budget} ends: this "
                "machine is slower now than when it was measured. Nothing is cut short, because the learning rate is "
                "planned over all steps."
            )
            return [line, late]
        return [line]

    def _pass(self, take: Callable[[float], object]) -> None:
        moment = self.now()
        take(moment - self._last)
        self._last = moment
