"""A whole run: `python -m mlx_zh.run RECIPE [--from STEP] [--dry-run] [KEY=VALUE ...]`.

prepare, evaluate the base, SFT, evaluate, DPO, evaluate, fuse, report: each unless its inputs are what they were.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mlx_zh.stages import command

if TYPE_CHECKING:
    from mlx_zh.pipeline.outdated import Planned
    from mlx_zh.pipeline.state import State
    from mlx_zh.pipeline.steps import Step
    from mlx_zh.recipe import Recipe
    from mlx_zh.stages.run_folder import RunFolder


def main(argv: list[str] | None = None) -> int:
    """Bring a run folder up to date with its recipe."""
    arguments = _arguments(argv)
    recipe = command.read_recipe(arguments)
    if recipe is None:
        return 0

    from mlx_zh.pipeline.outdated import plan
    from mlx_zh.pipeline.runner import forced_from
    from mlx_zh.pipeline.state import State
    from mlx_zh.pipeline.steps import steps
    from mlx_zh.stages.run_folder import RunFolder
    from mlx_zh.system import console

    run = RunFolder.of(recipe)
    wanted = steps(recipe, run)
    forced = forced_from(arguments.start, wanted)
    planned = plan(State.of(run), recipe, wanted, forced)
    if arguments.dry_run or all(entry.why is None for entry in planned):
        console.say(_table(planned))
        if arguments.dry_run:
            return 0
        console.say(
            f"\nNothing to do: {run.path} is up to date. `--from STEP` runs a step, and those after it, again."
        )
        return 0
    return _run(recipe, run, [arguments.recipe, *arguments.overrides], wanted, forced)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = command.parser("run", "Do everything that a recipe asks for, and nothing twice.")
    parser.add_argument("--from", dest="start", metavar="STEP", help="run this step, and those after it, again")
    parser.add_argument("--dry-run", action="store_true", help="show what would run and why, and stop")
    return parser.parse_intermixed_args(argv)


def _run(recipe: Recipe, run: RunFolder, asked: list[str], wanted: list[Step], forced: set[str]) -> int:
    from mlx_zh.pipeline.runner import Pipeline
    from mlx_zh.pipeline.state import State
    from mlx_zh.system import console

    with run.at_work("run") as lock:
        state = State.of(run)
        status = Pipeline(recipe, asked, wanted, state, lock, console.say).run(forced)
    if status == 0:
        console.say(f"\n{_times(state, wanted)}")
    else:
        console.say("Not finished; the same command goes on from here.")
    return status


def _table(planned: list[Planned]) -> str:
    from mlx_zh.system import console

    rows = [("step", "", "time", "memory", "why")]
    for entry in planned:
        time = "" if entry.seconds is None else f"about {console.duration(entry.seconds)}"
        memory = "" if entry.peak_memory_gb is None else f"{entry.peak_memory_gb:.2f} GB"
        rows.append((entry.step.name, "run" if entry.why else "done", time, memory, entry.why or "up to date"))
    return console.table(rows)


def _times(state: State, wanted: list[Step]) -> str:
    from mlx_zh.system import console

    rows = [(step.name, console.duration(state.records[step.name].seconds)) for step in wanted]
    total = sum(state.records[step.name].seconds for step in wanted)
    return console.table([*rows, ("total", console.duration(total))])


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
