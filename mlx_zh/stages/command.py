"""The command line that all stages share, and the whole of it for those that train."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mlx_zh.distributed import launching
from mlx_zh.errors import DataError
from mlx_zh.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from mlx_zh.stages.tuning import Method


def parser(stage: str, purpose: str) -> argparse.ArgumentParser:
    """A stage's command line: RECIPE, `section.key=value` overrides, and what every stage understands."""
    line = argparse.ArgumentParser(prog=f"mlx-zh {stage}", description=purpose, allow_abbrev=False)
    line.add_argument("recipe", metavar="RECIPE", help="a recipe, for example recipes/quickstart.yaml")
    line.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for example sft.learning_rate=2e-4")
    line.add_argument("--print", action="store_true", help="show the resolved recipe and stop")
    line.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return line


def read_recipe(arguments: argparse.Namespace) -> Recipe | None:
    """The recipe of a command line, or None when it was only to be printed."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.print:
        print(recipe.to_yaml(), end="")
        return None
    return recipe


def train(method: Method, purpose: str, argv: list[str] | None) -> int:
    """The `main` of a training stage, on this machine or on several."""
    line = parser(method.stage, purpose)
    line.add_argument("--fresh", action="store_true", help="start over; an earlier run is kept beside the new one")
    line.add_argument("--force", action="store_true", help="start even if memory will not be enough")
    launching.add_machines(line)
    arguments = line.parse_intermixed_args(argv)
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
            raise DataError(f"{arguments.recipe}: data.{method.stage}.train names no file to learn from.")
        fresh = arguments.fresh or recipe.resume == "never"
        return tune(recipe, method, world, fresh=fresh, force=arguments.force)
