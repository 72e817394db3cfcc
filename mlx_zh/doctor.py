"""Is this machine ready: `python -m mlx_zh.doctor [RECIPE] [KEY=VALUE ...]`; its output belongs in a bug report."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_zh.recipe import Recipe


def main(argv: list[str] | None = None) -> int:
    """Look at machine, packages, disk, hub and speed, a line each; exit 1 where something must be mended."""
    parser = argparse.ArgumentParser(
        prog="mlx-zh doctor", description="Look at this machine, and say what to do.", allow_abbrev=False
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="also look whether this recipe can run here")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for example model.path=my-model")
    parser.add_argument("--quick", action="store_true", help="leave out the measurement of ten seconds")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_intermixed_args(argv)
    recipe: Recipe | None = None
    if arguments.recipe:
        from mlx_zh.recipe import load_recipe

        recipe = load_recipe(arguments.recipe, arguments.overrides)

    from mlx_zh.stages.checkup import checks, measured
    from mlx_zh.system import console
    from mlx_zh.system.redaction import hide

    failed = False
    found = checks(recipe)
    for check in found if arguments.quick else [*found, *measured()]:
        failed |= check.level == "fail"
        console.say(hide(f"{check.level:<5} {check.name:<10} {check.text}"))
        if check.remedy:
            console.say(hide(f"{'':<16} -> {check.remedy}"))
    return 1 if failed else 0


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
