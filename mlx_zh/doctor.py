"""Check this machine: `python -m mlx_zh.doctor [RECIPE] [KEY=VALUE ...]`. Its output belongs in a bug report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_zh.language.translation import in_readers_language
from mlx_zh.system.arguments import Parser

if TYPE_CHECKING:
    from mlx_zh.recipe import Recipe


def main(argv: list[str] | None = None) -> int:
    """Check machine, packages, disk, hub and speed, and print a line for each; returns 1 if a check failed."""
    parser = Parser("mlx-zh doctor", description="Check this machine, and say how to fix what is wrong.")
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="also check whether this recipe can run here")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="set a key of the recipe, for example model.path=my-model"
    )
    parser.add_argument("--quick", action="store_true", help="skip the speed measurement, which takes ten seconds")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_intermixed_args(argv)
    recipe: Recipe | None = None
    if arguments.recipe:
        from mlx_zh.recipe import load_recipe

        recipe = load_recipe(arguments.recipe, arguments.overrides)

    from mlx_zh.stages.checkup import checks, measurements
    from mlx_zh.system import console
    from mlx_zh.system.redaction import hide

    failed = False
    results = checks(recipe)
    for check in results if arguments.quick else [*results, *measurements()]:
        failed |= check.level == "fail"
        console.say(hide(f"{check.level:<5} {check.name:<10} {in_readers_language(check.text)}"))
        if check.remedy:
            console.say(hide(f"{'':<16} -> {in_readers_language(check.remedy)}"))
    return 1 if failed else 0


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
