"""The command line that all stages share, and the `main` of the training stages."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mlx_zh.distributed import launching
from mlx_zh.errors import DataError
from mlx_zh.recipe import Recipe, load_recipe
from mlx_zh.system.arguments import Parser

if TYPE_CHECKING:
    from mlx_zh.stages.tuning import Method


def parser(stage: str, purpose: str) -> Parser:
    """An argument parser with RECIPE, `section.key=value` overrides and the options that every stage has."""
    options = Parser(f"mlx-zh {stage}", description=purpose)
    options.add_argument("recipe", metavar="RECIPE", help="a recipe file, for example recipes/quickstart.yaml")
    options.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="set a key of the recipe, for example sft.learning_rate=2e-4",
    )
    options.add_argument("--print", action="store_true", help="print the recipe with all defaults, and stop")
    options.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return options


def read_recipe(arguments: argparse.Namespace) -> Recipe | None:
    """The recipe that a command line names; with `--print`, print it and return None. Raises RecipeError."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.print:
        print(recipe.to_yaml(), end="")
        return None
    return recipe


def train(method: Method, purpose: str, argv: list[str] | None) -> int:
    """The `main` of a training stage, on one machine or several; returns the exit status. Raises MlxZhError."""
    options = parser(method.stage, purpose)
    options.add_argument("--fresh", action="store_true", help="start over; the earlier run is moved aside and kept")
    options.add_argument(
        "--force", action="store_true", help="start even if memory will not be enough or the self-check fails"
    )
    launching.add_machines(options)
    arguments = options.parse_intermixed_args(argv)
    recipe = read_recipe(arguments)
    if recipe is None:
        return 0
    if arguments.hosts or arguments.processes:
        return launching.launch(method.stage, arguments, argv)

    from mlx_zh.distributed.world import joined
    from mlx_zh.stages.run_folder import RunFolder
    from mlx_zh.stages.tuning import tune
    from mlx_zh.system import console

    with joined(console.warn) as world, RunFolder.of(recipe).all_at_work(method.stage, world):
        if not recipe.data.split(method.stage).train:
            raise DataError(
                f"{arguments.recipe}: data.{method.stage}.train names no file to learn from. Add one to the recipe."
            )
        fresh = arguments.fresh or recipe.resume == "never"
        return tune(recipe, method, world, fresh=fresh, force=arguments.force)
