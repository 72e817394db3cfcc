"""What a training step shows that the user should know."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from mlx_zh.core.families import Config
from mlx_zh.language.notice import Notice
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.recipe import Recipe
from mlx_zh.stages import half_precision, plan_check, setbacks
from mlx_zh.system.accelerator import AcceleratorError, repeated, settle
from mlx_zh.training.loop import Loop, Repeated, Shortened, Stepped
from mlx_zh.training.memory_limit import Lowered
from mlx_zh.training.optimizer import Arrays


class StepWarnings:
    """Warnings about the steps of one session of a run."""

    def __init__(self, recipe: Recipe, stage: str, config: Config, trained: AdapterSpec, loop: Loop) -> None:
        limit = float(loop.progress.row_limits.get("memory", 0))
        self._plan = recipe, stage, config, trained, limit
        self._loop = loop
        self._before = dict(loop.weights)
        self._comparable = loop.progress.step == 0  # the next step is the first, and nothing was given up before it
        self._searched = False  # whether the place of an overflow was looked for

    def of(self, event: Stepped) -> Iterator[Notice]:
        """The warnings about the step just taken."""
        if self._comparable:
            rows = self._loop.objective.rows(np.array(event.examples), 0)
            deviation = plan_check.deviation(*self._plan, rows, event.figures["peak_memory_gb"] * 1e9)
            yield from [deviation] if deviation is not None else []
        self._comparable = False
        if not event.result.applied:
            yield _skipped(event)
            yield from self._overflow(event)
        elif event.figures["step"] == 1 and _same(self._before, self._loop.weights):
            yield Notice("first-step-changed-nothing", grad_norm=event.result.grad_norm)

    def given_up(self, event: Lowered | Shortened | Repeated) -> None:
        """Warn of work that the accelerator gave up. The peak of the step includes it, so no plan is compared."""
        self._comparable = False
        if isinstance(event, Lowered):
            setbacks.warn_lowered(event.work, event.limit)
        elif isinstance(event, Shortened):
            setbacks.warn_shortened(event.work, event.micro_tokens, event.fault)
        else:
            setbacks.warn_repeated(event.work, event.fault)

    def _overflow(self, event: Stepped) -> Iterator[Notice]:
        """Once, where a float16 model overflowed."""
        if self._searched:
            return
        self._searched = True
        rows = self._loop.objective.rows(np.array(event.examples), None)
        try:
            place = repeated(lambda: half_precision.overflow(self._loop.model, rows))
        except AcceleratorError:  # the place is only advice, and the run can go on without it
            settle()
            return
        if place is not None:
            yield place


def _skipped(event: Stepped) -> Notice:
    loss, norm = str(event.result.loss), str(event.result.grad_norm)  # as text, because JSON has no NaN or infinity
    return Notice("step-skipped", step=event.figures["step"], loss=loss, grad_norm=norm, examples=event.examples)


def _same(left: Arrays, right: Arrays) -> bool:
    return all(bool(mx.array_equal(left[name], right[name])) for name in left)
