"""The options that say who decides which answer is better, and by which rules."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_zh.judging.rules import Settings


# Which of the ways to choose reads an option; the others would leave it unread.
_READ_BY = {
    **dict.fromkeys(("shortest", "longest", "format"), "rule"),
    **dict.fromkeys(("judge", "judge_url", "judge_model", "judge_tokens", "parallel", "votes"), "judge"),
}


def parsed_choosing(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The command line of `parser` with the options that say who chooses. Exits if one of them would not be read."""
    _add_choosing(parser)
    arguments = parser.parse_intermixed_args(argv)
    for name, way in _READ_BY.items():
        if arguments.by != way and getattr(arguments, name, None) != parser.get_default(name):
            option = "--" + name.replace("_", "-")
            parser.error(f"{option} is for --by {way}")
    return arguments


def _add_choosing(parser: argparse.ArgumentParser) -> None:
    """Add the options that say who chooses, and by which rules."""
    parser.add_argument("--by", choices=("rule", "judge", "hand"), default="rule", help="who chooses (default rule)")
    parser.add_argument("--shortest", metavar="N", type=int, default=1, help="characters that an answer needs")
    parser.add_argument("--longest", metavar="N", type=int, help="characters that an answer may have")
    parser.add_argument("--format", metavar="json|REGEX", help="the format that an answer must have")
    parser.add_argument("--judge", metavar="MODEL", help="with --by judge: a local model, by path or name")
    parser.add_argument(
        "--judge-url",
        metavar="URL",
        help="with --by judge: an OpenAI-compatible address; its key is read from MLX_ZH_JUDGE_KEY",
    )
    parser.add_argument("--judge-model", metavar="NAME", help="the model at that address")
    parser.add_argument(
        "--judge-tokens", metavar="N", type=int, default=1024, help="longest reply of the judge, in tokens"
    )
    parser.add_argument(
        "--parallel", metavar="N", type=int, default=4, help="questions to an address at the same time (default 4)"
    )


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The settings of the rules on a command line. Raises RecipeError."""
    from mlx_zh.judging.rules import Settings

    return Settings(arguments.shortest, arguments.longest, arguments.format)
