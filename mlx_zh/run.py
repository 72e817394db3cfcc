"""Run all steps of a recipe: `python -m mlx_zh.run RECIPE [--from STEP] [--dry-run] [KEY=VALUE ...]`.

The steps are prepare, eval of the base, SFT, eval, DPO, eval, fuse and report. A step whose inputs have not changed
is not repeated.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mlx_zh.distributed import launching
from mlx_zh.stages import command

if TYPE_CHECKING:
    from mlx_zh.pipeline.outdated import Planned
    from mlx_zh.pipeline.state import State
    from mlx_zh.pipeline.steps import Step
    from mlx_zh.recipe import Recipe
    from mlx_zh.stages.run_folder import RunFolder


def main(argv: list[str] | None = None) -> int:
    """Bring a run folder up to date with its recipe; returns the exit status. Raises MlxZhError."""
    arguments = _arguments(argv)
    launching.ask_stages(arguments)
    recipe = command.read_recipe(arguments)
    if recipe is None:
        return 0

    from mlx_zh.pipeline.outdated import plan
    from mlx_zh.pipeline.runner import forced_from
    from mlx_zh.pipeline.state import State
    from mlx_zh.pipeline.steps import steps
    from mlx_zh.stages import budgeting
    from mlx_zh.stages.run_folder import RunFolder
    from mlx_zh.system import console

    run = RunFolder.of(recipe)
    recipe = budgeting.decided(recipe)
    undecided = recipe.budget is not None and budgeting.matching(recipe, run) is None
    all_steps = steps(recipe, run)
    forced = forced_from(arguments.start or _first_training(arguments, all_steps), all_steps)
    planned = plan(State.of(run, console.say_reading), recipe, all_steps, forced)
    if arguments.dry_run and undecided:
        console.say(
            f"The budget of {recipe.budget} is decided when the run starts, by this machine's measured speed. "
            "`mlx-zh plan RECIPE` shows what to expect."
        )
    if arguments.dry_run or (not undecided and all(entry.why is None for entry in planned)):
        console.say(_table(planned))
        if arguments.dry_run:
            console.say()
            return command.dry_run(recipe, _checked(recipe))
        console.say(f"\nNothing to do: {run.path} is up to date. `--from STEP` repeats a step and those after it.")
        _conclude(recipe, arguments)
        return 0
    options = ["--force"] if arguments.force else []
    status = _run(recipe, run, [arguments.recipe, *arguments.overrides], all_steps, forced, options)
    if status == 0:
        _conclude(recipe, arguments)
    return status


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = command.parser("run", "Run all steps of a recipe. Steps that are up to date are not repeated.")
    command.add_budget(parser)
    parser.add_argument("--from", dest="start", metavar="STEP", help="repeat this step and those after it")
    parser.add_argument("--fresh", action="store_true", help="train anew: --from with the first training step")
    parser.add_argument(
        "--force", action="store_true", help="start even if memory will not be enough or the self-check fails"
    )
    parser.add_argument("--dry-run", action="store_true", help="show which steps would run and why, and stop")
    launching.add_processes(parser)
    return parser.parse_intermixed_args(argv)


def _first_training(arguments: argparse.Namespace, steps: list[Step]) -> str | None:
    """The step that `--fresh` begins with."""
    return next((step.name for step in steps if step.trains), None) if arguments.fresh else None


def _run(
    recipe: Recipe, run: RunFolder, arguments: list[str], steps: list[Step], forced: set[str], options: list[str]
) -> int:
    """Run the steps; `options` are given to the training stages. Returns the exit status."""
    from mlx_zh.pipeline.process import run_stage
    from mlx_zh.pipeline.runner import Pipeline
    from mlx_zh.pipeline.state import State
    from mlx_zh.stages import budgeting, preflight
    from mlx_zh.system import console

    with run.at_work("run") as lock:
        preflight.check(recipe, _checked(recipe))
        if recipe.budget is not None:
            if (decision := budgeting.matching(recipe, run)) is not None:
                console.say(budgeting.recalled(decision))
            elif (status := run_stage("stages.deciding", [*arguments, *options], lock)) != 0:
                return status
            recipe = budgeting.decided(recipe)
        state = State.of(run, console.say_reading)
        status = Pipeline(recipe, arguments, steps, state, lock, console.say, options).run(forced)
        if status not in (0, 130) and not run.ended.exists():
            run.note_end("run", "failed", f"a step ended with status {status}, and could not say why.")
    if status == 0:
        console.say(f"\n{_times(state, steps)}")
    elif status == 2:  # the stage has said what is wrong
        console.say("Not finished. Once the error above is corrected, the same command goes on from here.")
    else:
        console.say("Not finished; the same command goes on from here.")
    return status


def _checked(recipe: Recipe) -> list[str]:
    """The stages whose needs are checked before the first one starts."""
    stages = [name for name in ("sft", "dpo") if recipe.data.split(name).train]
    return [*stages, *(["eval"] if recipe.evaluate.benchmarks else [])]


def _conclude(recipe: Recipe, arguments: argparse.Namespace) -> None:
    from mlx_zh.language.reader import reader_language
    from mlx_zh.stages.last_screen import last_screen
    from mlx_zh.system import console

    console.say(f"\n{last_screen(recipe, arguments.recipe, arguments.overrides, reader_language())}")


def _table(planned: list[Planned]) -> str:
    from mlx_zh.system import console

    rows = [("step", "", "time", "memory", "why")]
    for entry in planned:
        time = "" if entry.seconds is None else f"about {console.duration(entry.seconds)}"
        memory = "" if entry.peak_memory_gb is None else f"{entry.peak_memory_gb:.2f} GB"
        rows.append((entry.step.name, "run" if entry.why else "done", time, memory, entry.why or "up to date"))
    return console.table(rows)


def _times(state: State, steps: list[Step]) -> str:
    from mlx_zh.system import console

    rows = [(step.name, console.duration(state.records[step.name].seconds)) for step in steps]
    total = sum(state.records[step.name].seconds for step in steps)
    return console.table([*rows, ("total", console.duration(total))])


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
