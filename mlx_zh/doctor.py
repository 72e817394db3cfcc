"""Check this machine: `python -m mlx_zh.doctor [RECIPE] [KEY=VALUE ...]`. Its output belongs in a bug report."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_zh.language.translation import in_readers_language, label
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
    parser.add_argument("--quick", action="store_true", help="skip the self-check and the measurements (15 seconds)")
    parser.add_argument(
        "--report",
        metavar="PATH",
        nargs="?",
        const="mlx-zh-report.md",
        help="also write a file for a bug report, without secrets (default: mlx-zh-report.md)",
    )
    parser.add_argument("--run", metavar="NAME", help="with --report: add the state and the last warnings of a run")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.run and arguments.report is None:
        parser.error("--run adds a run to the report; give --report too")
    recipe: Recipe | None = None
    if arguments.recipe:
        from mlx_zh.recipe import load_recipe

        recipe = load_recipe(arguments.recipe, arguments.overrides)

    from mlx_zh.stages import bug_report
    from mlx_zh.stages.checkup import Check, checks, measurements, self_checks
    from mlx_zh.system import console
    from mlx_zh.system.redaction import hide

    runs = Path("runs" if recipe is None else recipe.runs)
    file = None if arguments.report is None else bug_report.destination(arguments.report)
    if arguments.run:
        bug_report.run_folder(runs, arguments.run)  # raises before the checks, which take a while
    done: list[Check] = []
    for check in checks(recipe) if arguments.quick else chain(checks(recipe), self_checks(), measurements()):
        done.append(check)
        level, name = (console.padded(label(text), width) for text, width in ((check.level, 5), (check.name, 10)))
        console.say(hide(f"{level} {name} {in_readers_language(check.text)}"))
        if check.remedy:
            console.say(hide(f"{'':<16} -> {in_readers_language(check.remedy)}"))
    if file is not None:
        bug_report.write_report(file, done, runs, arguments.run)
        console.say()
        console.say(f"The report is in {file}. Read it, then attach it to an issue of the project.")
        console.say("Add the command that failed and what it printed.")
    return 1 if any(check.level == "fail" for check in done) else 0


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
