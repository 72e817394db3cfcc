"""A time budget: from what each stage costs to the number of steps, examples and exam questions that fit.

Nothing here measures or reads a clock: costs go in, a decision comes out. The same costs give the same decision; a
larger budget never gives fewer steps or fewer questions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mlx_zh.errors import PlanError
from mlx_zh.recipe_text.units import time_text

RESERVE = 0.05  # share of a budget that nothing is planned for: heat, other programs, examples longer than expected
EXAMS = 0.25  # share of the time for training and exams that exams get when both have to be cut
_MEASURED_SHARE, _MEASURED_SECONDS = 0.05, 30.0  # of the budget, and at most, that measuring takes
_LEAST = {"sft": 20, "dpo": 10}  # steps below which a stage learns too little to be worth its time
_ROUNDING = 1 + 1e-9  # so that a sum in another order still fits
_BEYOND = 1 << 40  # more steps than anyone takes


@dataclass(frozen=True, slots=True)
class Training:
    """What a training stage costs, in seconds, and its full length by the recipe."""

    name: str  # sft or dpo
    full_steps: int
    batch_size: int
    examples: float  # that the recipe's data holds, as far as known
    counted: bool  # whether that number is known and not assumed
    step: float  # an optimizer step
    example: float = 0.0  # of each example that the run visits: prepared, scored by the reference
    validation: float = 0.0  # a pass over validation files
    validation_share: float = 0.0  # a pass over the examples held out, per training example
    eval_steps: int | None = None
    checkpoint: float = 0.0
    every_steps: int | None = None

    @property
    def least_steps(self) -> int:
        """The fewest steps that are useful."""
        return min(self.full_steps, _LEAST[self.name])

    def seconds(self, steps: int) -> float:
        """The cost of `steps` steps, with validation at the beginning, at the end and every `eval_steps` steps."""
        visited = min(float(steps * self.batch_size), self.examples)
        passes = 1 + math.ceil(steps / (self.eval_steps or steps or 1))
        saved = 1 + (steps // self.every_steps if self.every_steps else 0)
        one_pass = self.validation + self.validation_share * visited
        return steps * self.step + visited * self.example + passes * one_pass + saved * self.checkpoint

    def steps_within(self, seconds: float) -> int:
        """The largest number of steps that costs at most `seconds`."""
        return _largest(lambda steps: self.seconds(steps) <= seconds * _ROUNDING, _BEYOND)


@dataclass(frozen=True, slots=True)
class ExamCost:
    """What one model's answers to an exam cost, in seconds."""

    subjects: int
    questions: int
    prefix: float  # the worked examples of a subject
    question: float

    def seconds(self, limit: int | None) -> float:
        """The cost with at most `limit` questions a subject."""
        asked = self.questions if limit is None else min(self.questions, limit * self.subjects)
        return self.subjects * self.prefix + asked * self.question


@dataclass(frozen=True, slots=True)
class Costs:
    """Everything that a run spends time on. `fixed` has seconds by step that nothing can shorten."""

    trainings: tuple[Training, ...]
    exams: tuple[ExamCost, ...] = ()
    examined: tuple[str, ...] = ()  # the steps that ask the exams: eval-base, eval-sft, eval-dpo
    limit: int | None = None  # the recipe's own evaluate.limit
    fixed: Mapping[str, float] = field(default_factory=dict)

    def exam_seconds(self, limit: int | None) -> float:
        """The cost of all exams of all models with at most `limit` questions a subject."""
        return len(self.examined) * sum(exam.seconds(limit) for exam in self.exams)


@dataclass(frozen=True, slots=True)
class Decision:
    """How a budget is spent. A stage without an entry in `steps`, and exams with `limit` None, are not cut."""

    steps: dict[str, int]
    limit: int | None
    seconds: dict[str, float]  # by step of the run

    @property
    def total(self) -> float:
        """Seconds of the whole run."""
        return sum(self.seconds.values())


def decide(costs: Costs, budget: float | None) -> Decision:
    """Spend `budget` seconds: what is fixed first, then training and exams. None is a budget without an end.

    Where everything fits, nothing is cut. Otherwise exams get at most a quarter of what is not fixed unless training
    leaves them more, and SFT and DPO share the rest in proportion to their full lengths, but neither falls below its
    fewest useful steps. Raises PlanError for a budget that is too small, with the smallest that is not.
    """
    full = {stage.name: stage.seconds(stage.full_steps) for stage in costs.trainings}
    whole_exams, training = costs.exam_seconds(costs.limit), sum(full.values())
    if budget is None:
        return _decision(costs, {}, costs.limit, 0.0)
    measuring = measuring_seconds(budget)
    free = budget * (1 - RESERVE) - measuring - sum(costs.fixed.values())
    least = sum(stage.seconds(stage.least_steps) for stage in costs.trainings)
    least_exams = whole_exams if costs.limit else costs.exam_seconds(1)
    if free < least + least_exams:
        raise PlanError(_too_small(costs, budget, least + least_exams))
    for_training = min(max((1 - EXAMS) * free, free - whole_exams, least), free - least_exams)
    room = free - whole_exams - training
    if room >= 0:
        shares = {name: seconds + room * seconds / training for name, seconds in full.items()}
        # The steps of data that nobody has counted are bounded all the same.
        steps = {s.name: s.steps_within(shares[s.name]) for s in costs.trainings if not s.counted}
        return _decision(costs, steps, costs.limit, measuring)
    steps = {stage.name: stage.full_steps for stage in costs.trainings if not stage.counted}
    if training > for_training:
        shares = _shares(costs.trainings, for_training)
        # At least the fewest useful steps, which rounding could miss by one.
        steps = {
            s.name: max(min(s.steps_within(shares[s.name]), s.full_steps), s.least_steps) for s in costs.trainings
        }
    return _decision(costs, steps, _limit(costs, free - min(training, for_training)), measuring)


def _shares(stages: tuple[Training, ...], seconds: float) -> dict[str, float]:
    """`seconds` shared in proportion to the stages' full lengths; each gets enough for its fewest useful steps."""
    full = {stage.name: stage.seconds(stage.full_steps) for stage in stages}
    least = {stage.name: stage.seconds(stage.least_steps) for stage in stages}
    shares, left = {}, seconds
    for number, stage in enumerate(stages):
        later = [other.name for other in stages[number + 1 :]]
        part = seconds * full[stage.name] / sum(full.values()) if later else left
        part = min(max(part, least[stage.name]), left - sum(least[name] for name in later))
        shares[stage.name], left = part, left - part
    return shares


def _limit(costs: Costs, seconds: float) -> int | None:
    """The largest number of questions a subject that costs at most `seconds`; the recipe's own if it has one."""
    if costs.limit or not costs.exams or costs.exam_seconds(None) <= seconds * _ROUNDING:
        return costs.limit
    most = max(exam.questions for exam in costs.exams)
    return max(_largest(lambda limit: costs.exam_seconds(limit) <= seconds * _ROUNDING, most), 1)


def _decision(costs: Costs, steps: dict[str, int], limit: int | None, measuring: float) -> Decision:
    seconds = dict(costs.fixed)
    if measuring:
        seconds["measure"] = seconds.get("measure", 0.0) + measuring
    for stage in costs.trainings:
        taken = min(steps.get(stage.name, stage.full_steps), stage.full_steps)
        seconds[stage.name] = seconds.get(stage.name, 0.0) + stage.seconds(taken)
    for name in costs.examined:
        seconds[name] = seconds.get(name, 0.0) + sum(exam.seconds(limit) for exam in costs.exams)
    return Decision(steps, limit, seconds)


def measuring_seconds(budget: float) -> float:
    """The seconds of a budget that measuring the machine may take."""
    return min(_MEASURED_SECONDS, _MEASURED_SHARE * budget)


def smallest_budget(costs: Costs) -> int:
    """The smallest useful budget in seconds, rounded up to a minute, or below two minutes to a second."""
    least = sum(stage.seconds(stage.least_steps) for stage in costs.trainings)
    least += costs.exam_seconds(costs.limit or 1) + sum(costs.fixed.values())
    long = (least + _MEASURED_SECONDS) / (1 - RESERVE)
    short = least / (1 - RESERVE - _MEASURED_SHARE)
    seconds = math.ceil(min(long, short) + 1e-6)
    return seconds if seconds < 120 else 60 * math.ceil(seconds / 60)


def _too_small(costs: Costs, budget: float, least: float) -> str:
    least_steps = {stage.name: stage.least_steps for stage in costs.trainings}
    steps = "its stages"
    if len(least_steps) == 2:
        steps = f"{least_steps['sft']} steps of SFT and {least_steps['dpo']} steps of DPO"
    elif "sft" in least_steps:
        steps = f"{least_steps['sft']} steps of SFT"
    elif "dpo" in least_steps:
        steps = f"{least_steps['dpo']} steps of DPO"
    questions = f"{costs.limit or 1} questions a subject" if costs.limit else "one question a subject"
    exams = f"with exams of {questions}"
    work = f"{steps}, {exams}" if costs.exams and costs.examined else steps
    fixed = sum(costs.fixed.values())
    return (
        f"budget: {time_text(round(budget))} is too little time for this recipe on this machine. Preparing, loading "
        f"and writing take about {time_text(math.ceil(fixed))}, and {work} take "
        f"{time_text(math.ceil(least))}. The smallest useful budget is {time_text(smallest_budget(costs))}."
    )


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that `fits`; 0 if 1 does not. Fitting ends once and for all."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
