"""The options that say who decides which answer is better, and by which rules."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_zh.judging.rules import Settings


def add_choosing(parser: argparse.ArgumentParser) -> None:
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
