"""Estimate a run before it starts: `python -m mlx_zh.plan RECIPE [--memory 16GB] [KEY=VALUE ...]`."""

from __future__ import annotations

import argparse
import re

from mlx_zh.stages import command


def main(argv: list[str] | None = None) -> int:
    """Print memory, time, downloads and disk space; returns 1 if a stage does not fit. Raises MlxZhError."""
    parser = command.parser(
        "plan",
        "Estimate the memory, time, downloads and disk space of a run. Models with a short name need no network.",
    )
    parser.add_argument(
        "--memory", metavar="SIZE", type=_bytes, help="plan for a Mac with this memory instead, for example 16GB"
    )
    parser.add_argument("--quick", action="store_true", help="no times; do not measure this machine's speed")
    arguments = parser.parse_intermixed_args(argv)
    recipe = command.read_recipe(arguments)
    if recipe is None:
        return 0

    from mlx_zh.stages import outlook
    from mlx_zh.system import console

    fits = outlook.show(recipe, arguments.memory, measured=not arguments.quick and arguments.memory is None)
    if arguments.memory is not None:
        console.say("Times are measured on this machine only; leave out --memory to see them.")
    return 0 if fits else 1


def _bytes(text: str) -> float:
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:G|GB|GiB)?", text.strip(), re.IGNORECASE)
    if not size or float(size[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it as 16GB")
    return float(size[1]) * 2**30


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
