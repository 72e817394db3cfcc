"""Estimate a run before it starts: `python -m mlx_zh.plan RECIPE [--memory 16GB] [--chip M4] [KEY=VALUE ...]`."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from mlx_zh.stages import command

if TYPE_CHECKING:
    from mlx_zh.planning.chips import Chip


def main(argv: list[str] | None = None) -> int:
    """Print memory, time, downloads and disk space; returns 1 if a stage does not fit. Raises MlxZhError."""
    parser = command.parser(
        "plan",
        "Estimate the memory, time, downloads and disk space of a run. Models with a short name need no network.",
    )
    parser.add_argument(
        "--memory", metavar="SIZE", type=_bytes, help="plan for a Mac with this memory instead, for example 16GB"
    )
    parser.add_argument(
        "--chip", metavar="NAME", type=_chip, help="predict the times on this chip instead, for example 'M4 Pro'"
    )
    parser.add_argument(
        "--table", action="store_true", help="print hours by chip, memory, disk and downloads of recipes as Markdown"
    )
    command.add_budget(parser)
    parser.add_argument("--quick", action="store_true", help="no times; do not measure this machine's speed")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.table:
        return _table(arguments)
    recipe = command.read_recipe(arguments)
    if recipe is None:
        return 0

    from mlx_zh.stages import outlook, preflight
    from mlx_zh.system import console

    for problem in (
        *preflight.starts(recipe),
        *preflight.scorers(recipe),
    ):  # only told: another run may make the adapter first
        console.warn(problem.text)
    chip = arguments.chip
    here = arguments.memory is None and chip is None
    fits = outlook.show(recipe, arguments.memory, measured=here and not arguments.quick, chip=chip)
    if arguments.memory is not None and chip is None:
        console.say("Times are measured on this machine; with --chip, for example --chip M4, they are predicted.")
    return 0 if fits else 1


def _table(arguments: argparse.Namespace) -> int:
    from mlx_zh.stages.mac_table import mac_table
    from mlx_zh.system import console

    more = [text for text in arguments.overrides if "=" not in text]
    overrides = [text for text in arguments.overrides if "=" in text]
    if arguments.budget is not None:
        overrides.append(f"budget={arguments.budget}")
    console.say(mac_table([command.find_recipe(name, overrides) for name in (arguments.recipe, *more)]))
    return 0


def _chip(text: str) -> Chip:
    from mlx_zh.planning.chips import chip_named, chips

    if (chip := chip_named(text)) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a known chip; choose from {', '.join(chips())}")
    return chip


def _bytes(text: str) -> float:
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:G|GB|GiB)?", text.strip(), re.IGNORECASE)
    if not size or float(size[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it as 16GB")
    return float(size[1]) * 2**30


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
