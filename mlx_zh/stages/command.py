"""The command line that all stages share, and the `main` of the training stages."""

from __future__ import annotations

import argparse
import difflib
import shlex
import sys
from collections.abc import Callable, Sequence
from os.path import exists, expanduser, isdir, isfile, join
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_zh.distributed import launching, local
from mlx_zh.errors import DataError, RecipeError
from mlx_zh.recipe import Recipe, load_recipe
from mlx_zh.system.arguments import Parser, missing_recipe
from mlx_zh.system.escaping import without_controls
from mlx_zh.system.redaction import redacted

if TYPE_CHECKING:
    from mlx_zh.distributed.world import World
    from mlx_zh.stages.run_folder import RunFolder
    from mlx_zh.stages.tuning import Method


def parser(stage: str, purpose: str) -> Parser:
    """An argument parser with RECIPE, `section.key=value` overrides and the options that every stage has."""
    options = Parser(f"mlx-zh {stage}", description=purpose)
    options.add_argument(
        "recipe",
        metavar="RECIPE",
        help="a recipe file, for example recipes/quickstart.yaml, or the name or folder of an earlier run",
    )
    options.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="set a key of the recipe, for example sft.learning_rate=2e-4",
    )
    options.add_argument("--print", action="store_true", help="print the recipe with all defaults, and stop")
    options.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return options


def add_budget(options: argparse.ArgumentParser) -> None:
    """Add `--budget`, short for the override `budget=TIME`."""
    options.add_argument(
        "--budget", metavar="TIME", help="the time that the whole run may take, for example 8h, 90m or 1h30m"
    )


def read_recipe(arguments: argparse.Namespace) -> Recipe | None:
    """The recipe that a command line names; with `--print`, print it and return None. Raises RecipeError."""
    if getattr(arguments, "budget", None) is not None:
        arguments.overrides.append(f"budget={arguments.budget}")
    recipe = find_recipe(arguments.recipe, arguments.overrides)
    if arguments.print:
        text = recipe.to_yaml(redacted)
        print(without_controls(text) if sys.stdout.isatty() else text, end="")
        return None
    return recipe


def find_recipe(target: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at a path, or that of an earlier run, which is named or whose folder is given.

    Raises RecipeError if there is none, or if it is not valid.
    """
    return _find_recipe(target, overrides).called(shlex.join([target, *overrides]))


def recipe_or_model(target: str, overrides: Sequence[str]) -> Recipe | None:
    """The recipe of a file or of an earlier run; None if `target` is neither, so it names a model.

    Raises RecipeError, also for overrides beside a model.
    """
    if target.endswith((".yaml", ".yml")) or run_of(target, overrides):
        return find_recipe(target, overrides)
    if overrides:
        raise RecipeError(
            f"{overrides[0]} sets a key of a recipe, but {target} is a model; give a recipe (.yaml) instead"
        )
    return None


def _find_recipe(target: str, overrides: Sequence[str]) -> Recipe:
    run = run_of(target, overrides)
    if run is None:
        if not isfile(target):
            raise RecipeError(_nothing_at(target, overrides))
        return load_recipe(target, overrides)
    # Its paths were written from the folder in which the run was started.
    recipe = load_recipe(run.recipe, overrides, beside=None)
    if recipe.run_folder().resolve() == run.path.resolve():
        return recipe
    place = {"runs": str(run.path.parent), "name": run.path.resolve().name}
    given = {text.partition("=")[0] for text in overrides}
    return recipe.model_copy(update={key: value for key, value in place.items() if key not in given})


def run_of(target: str, overrides: Sequence[str] = ()) -> RunFolder | None:
    """The run that `target` names or is the folder of; None where it is neither, or is a file."""
    from mlx_zh.stages.run_folder import RunFolder

    folders = [] if isfile(target) else [expanduser(target), join(_runs(overrides), target)]
    runs = (RunFolder(Path(folder)) for folder in folders if isdir(folder))
    return next((run for run in runs if isfile(run.recipe)), None)


def _runs(overrides: Sequence[str]) -> str:
    given = [text.partition("=")[2] for text in overrides if text.startswith("runs=")]
    return expanduser(given[-1] if given else str(Recipe.model_fields["runs"].default))


def _nothing_at(target: str, overrides: Sequence[str]) -> str:
    from mlx_zh.stages.run_folder import RunFolder

    if exists(target) and not isdir(target):
        return f"{target} is a pipe, a socket or a device. Give a recipe file that is stored on a disk."
    if isdir(target):
        return f"{target} is a folder without a recipe, so it is no run. Give a recipe file or the name of a run."
    if "=" in target:
        return f"{missing_recipe('mlx-zh sft')}; {target!r} came first."
    if target.endswith((".yaml", ".yml")):
        return f"there is no recipe at {target}."
    for ending in (".yaml", ".yml"):
        if isfile(target + ending):
            return f"there is no recipe at {target}. Did you mean {target}{ending}?"
    runs = _runs(overrides)
    names = sorted(path.name for path in Path(runs).glob("*") if isfile(RunFolder(path).recipe))
    near = difflib.get_close_matches(target, names, n=1)
    hint = (
        f"did you mean {near[0]}?" if near else f"its runs are {', '.join(names[:8])}." if names else "it has none."
    )
    return f"there is no recipe at {target}, and no run of this name in {runs}: {hint}"


def add_dry_run(options: argparse.ArgumentParser) -> None:
    """Add `--dry-run`."""
    options.add_argument("--dry-run", action="store_true", help="check everything and show the plan, and stop")


def dry_run(recipe: Recipe, stages: Sequence[str]) -> int:
    """Print what stands in the way of `stages`, then the plan without times; returns 2 if something does.

    Raises MlxZhError.
    """
    from mlx_zh.stages import outlook, preflight

    clear = preflight.show(recipe, stages)
    if clear:
        outlook.show(recipe)
    return 0 if clear else 2


def train(method: Method, purpose: str, argv: list[str] | None) -> int:
    """The `main` of a training stage, on one machine or several; returns the exit status. Raises MlxZhError."""
    options = parser(method.stage, purpose)
    options.add_argument("--fresh", action="store_true", help="start over; the earlier run is moved aside and kept")
    options.add_argument(
        "--force", action="store_true", help="start even if memory will not be enough or the self-check fails"
    )
    options.add_argument("--renew", action="store_true", help=argparse.SUPPRESS)  # given by `mlx-zh run`
    add_dry_run(options)
    add_budget(options)
    launching.add_machines(options)
    arguments = options.parse_intermixed_args(argv)

    return on_ranks(method.stage, arguments, argv, lambda recipe, world: _train(method, recipe, arguments, world))


def on_ranks(
    stage: str, arguments: argparse.Namespace, argv: list[str] | None, work: Callable[[Recipe, World], int]
) -> int:
    """Do a stage's work on as many ranks as are asked for, or are fastest; returns the exit status.

    Before that, `--print` and `--dry-run` are answered. Raises MlxZhError.
    """
    from mlx_zh.distributed.world import joined
    from mlx_zh.system import console

    with joined(console.warn) as world:
        recipe = world.each(lambda: read_recipe(arguments))
        if recipe is None:
            return 0
        if getattr(arguments, "dry_run", False):
            return dry_run(recipe, [stage])
        if local.is_rank():
            return work(recipe, world)
    if arguments.hosts:
        return launching.launch(stage, arguments, argv)

    from mlx_zh.stages import processes

    return processes.compute(stage, recipe, arguments, argv, work)


def _train(method: Method, recipe: Recipe, arguments: argparse.Namespace, world: World) -> int:
    from mlx_zh.stages import preflight, same_everywhere
    from mlx_zh.stages.budgeting import settle
    from mlx_zh.stages.run_folder import RunFolder
    from mlx_zh.stages.tuning import tune

    chosen = {"--fresh": arguments.fresh, "--force": arguments.force, "resume": recipe.resume}
    same_everywhere.require(world, recipe, method.stage, chosen)
    with world.each(lambda: RunFolder.of(recipe)).all_at_work(method.stage, world):
        world.each(lambda: _require_data(recipe, method.stage, arguments.recipe))
        world.broadcast_result(lambda: preflight.check(recipe, [method.stage]))
        fresh = arguments.fresh or recipe.resume == "never"
        budgeted = settle(recipe, world, force=arguments.force)
        return tune(budgeted, method, world, fresh=fresh, renew=arguments.renew, force=arguments.force)


def _require_data(recipe: Recipe, stage: str, file: str) -> None:
    if not recipe.data.split(stage).train:
        raise DataError(f"{file}: data.{stage}.train names no file to learn from. Add one to the recipe.")
