"""Running a plan: each step that is out of date, one after another, remembered as it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_zh.errors import RecipeError
from mlx_zh.pipeline.energy import Meter
from mlx_zh.pipeline.outdated import peak_memory, reason
from mlx_zh.pipeline.process import run_stage
from mlx_zh.pipeline.state import Record, State
from mlx_zh.pipeline.steps import NAMES, Step
from mlx_zh.recipe import Recipe
from mlx_zh.system.locks import Lock

Tell = Callable[[str], None]


@dataclass
class Pipeline:
    """The steps of a recipe. `command` is the recipe's path and overrides, which every stage gets."""

    recipe: Recipe
    command: Sequence[str]
    steps: list[Step]
    state: State
    lock: Lock
    tell: Tell

    def run(self, forced: set[str]) -> int:
        """Run what is out of date; returns 0, or the exit status of the stage that did not end well."""
        if forced:
            # Forgotten now: when this run is stopped, the next one still knows what was asked for.
            self.state.records = {name: r for name, r in self.state.records.items() if name not in forced}
            self.state.write()
        for number, step in enumerate(self.steps, start=1):
            # Looked at again: the steps before may have left what they had left before.
            why = reason(self.state, self.recipe, step, forced)
            title = f"[{number}/{len(self.steps)}] {step.name}"
            if why is None:
                self.tell(f"{title}: up to date")
                continue
            self.tell(f"{title}: {why}")
            status = self._run(step, fresh=step.name in forced)
            if status != 0:
                return status
        return 0

    def _run(self, step: Step, *, fresh: bool) -> int:
        inputs = self.state.inputs(step, self.recipe)
        earlier = self.state.records.get(step.name)
        resumed = earlier is not None and earlier.inputs == inputs and not fresh
        # A folder that is trained with other settings is kept beside the new one; one that this pipeline has not
        # begun is left to the stage, which takes it as finished, goes on, or says what differs.
        fresh = step.trains and (fresh or (earlier is not None and not resumed))
        before = earlier.seconds if earlier and resumed and earlier.outputs is None else 0.0
        drawn = earlier.joules if earlier and resumed and earlier.outputs is None else None
        record = self.state.records[step.name] = Record(inputs, None, before, drawn)
        self.state.write()
        start = time.monotonic()
        with Meter() as meter:
            status = run_stage(
                step.stage, [*self.command, *step.arguments, *(["--fresh"] if fresh else [])], self.lock
            )
        record.seconds = round(before + time.monotonic() - start, 1)
        if meter.joules is not None:
            record.joules = round(meter.joules + (drawn or 0.0), 1)
        if status == 0:
            record.outputs = self.state.outputs(step)
            record.peak_memory_gb = peak_memory(self.state.run.stage(step.stage)) if step.trains else None
        self.state.write()
        return status


def forced_from(name: str | None, steps: list[Step]) -> set[str]:
    """The steps from `name` on. Raises RecipeError where the recipe has no such step."""
    if name is None:
        return set()
    present = [step.name for step in steps]
    if name not in present:
        kind = "this recipe has no step" if name in NAMES else "there is no step"
        raise RecipeError(f"--from {name}: {kind} of that name; choose from {', '.join(present)}.")
    return set(present[present.index(name) :])
