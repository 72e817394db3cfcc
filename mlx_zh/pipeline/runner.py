"""Runs the steps that are out of date, one after another, and records the result of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_zh.errors import RecipeError
from mlx_zh.pipeline.energy import Meter
from mlx_zh.pipeline.outdated import peak_memory, reason
from mlx_zh.pipeline.process import run_stage
from mlx_zh.pipeline.state import VERSION, Record, State, keys_of
from mlx_zh.pipeline.steps import NAMES, Step
from mlx_zh.recipe import Recipe
from mlx_zh.system.locks import Lock

Say = Callable[[str], None]


@dataclass
class Pipeline:
    """The steps of a recipe. `command` is the recipe's path and overrides, which are passed to every stage.

    `say` shows a line of progress; `options` are passed to the stages that train.
    """

    recipe: Recipe
    command: Sequence[str]
    steps: list[Step]
    state: State
    lock: Lock
    say: Say
    options: Sequence[str] = ()

    def run(self, forced: set[str]) -> int:
        """Run the steps that are out of date or `forced`; returns 0, or the exit status of a stage that failed."""
        if forced:
            # Their records are removed first, so that the steps still run next time if this run is stopped.
            self.state.records = {name: r for name, r in self.state.records.items() if name not in forced}
            self.state.write()
        for number, step in enumerate(self.steps, start=1):
            # Checked again for each step: the outputs of earlier steps may be the same as before.
            why = reason(self.state, self.recipe, step, forced)
            title = f"[{number}/{len(self.steps)}] {step.name}"
            if why is None:
                self.say(f"{title}: up to date")
                continue
            self.say(f"{title}: {why}")
            status = self._run(step, fresh=step.name in forced)
            if status != 0:
                return status
        return 0

    def _run(self, step: Step, *, fresh: bool) -> int:
        inputs = self.state.inputs(step, self.recipe)
        earlier = self.state.records.get(step.name)
        if earlier is not None and earlier.version != VERSION:
            earlier = None  # its inputs cannot be compared; a training stage compares its own folder
        resumed = earlier is not None and step.learned(earlier.keys) == step.learned(keys_of(inputs)) and not fresh
        # With --fresh, a stage renames its folder and starts anew. A folder that this pipeline did not begin may hold
        # a run with the same settings, which goes on, or one with others, which --renew renames.
        fresh = step.trains and (fresh or (earlier is not None and not resumed))
        seconds_before = earlier.seconds if earlier and resumed and earlier.outputs is None else 0.0
        joules_before = earlier.joules if earlier and resumed and earlier.outputs is None else None
        record = self.state.records[step.name] = Record(inputs, None, seconds_before, joules_before, version=VERSION)
        self.state.write()
        start = time.monotonic()
        with Meter() as meter:
            options = [*self.options, "--fresh" if fresh else "--renew"] if step.trains else []
            status = run_stage(step.stage, [*self.command, *step.arguments, *options], self.lock)
        record.seconds = round(seconds_before + time.monotonic() - start, 1)
        if meter.joules is not None:
            record.joules = round(meter.joules + (joules_before or 0.0), 1)
        if status == 0:
            record.outputs = self.state.outputs(step)
            record.peak_memory_gb = peak_memory(self.state.run.stage(step.stage)) if step.trains else None
        self.state.write()
        return status


def forced_from(name: str | None, steps: list[Step]) -> set[str]:
    """Names of the steps from `name` on; none without `name`. Raises RecipeError when the recipe has no such step."""
    if name is None:
        return set()
    present = [step.name for step in steps]
    if name not in present:
        kind = "this recipe has no step" if name in NAMES else "there is no step"
        raise RecipeError(f"--from {name}: {kind} of that name; choose from {', '.join(present)}.")
    return set(present[present.index(name) :])
