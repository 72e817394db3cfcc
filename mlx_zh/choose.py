"""Choose among sampled answers: `python -m mlx_zh.choose RECIPE --by rule|judge|hand --to pairs|kto|best`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_zh.stages import command

if TYPE_CHECKING:
    from mlx_zh.judging.rules import Settings

_PURPOSE = "Choose among the answers that `mlx-zh sample` drew, and write them as data for DPO, KTO or SFT."


def main(argv: list[str] | None = None) -> int:
    """Choose among a run's samples and write the data file; returns the exit status. Raises MlxZhError."""
    parser = command.parser("choose", _PURPOSE)
    parser.add_argument("--samples", metavar="LABEL", help="which samples of the run (default: the newest)")
    parser.add_argument("--to", choices=("pairs", "kto", "best"), default="pairs", help="default pairs")
    parser.add_argument("--out", metavar="FILE", help="the data file (default: beside the samples)")
    parser.add_argument(
        "--votes", metavar="FILE", help="feedback of the chat (JSON lines): the judge is compared with these votes"
    )
    add_choosing(parser)
    arguments = parser.parse_intermixed_args(argv)
    recipe = command.read_recipe(arguments)
    if recipe is None:
        return 0

    from mlx_zh.stages.choosing import Choosing
    from mlx_zh.stages.judge_models import judge_of
    from mlx_zh.stages.run_folder import RunFolder, told_when_stopped
    from mlx_zh.system.locks import locked

    choosing = Choosing.of(RunFolder.of(recipe), arguments.samples, recipe.words)
    with told_when_stopped(), locked(choosing.folder.path, "choose"):
        if arguments.by == "hand":
            choosing.by_hand()
        elif arguments.by == "rule":
            choosing.by_rules(settings_of(arguments))
        else:
            choosing.by_judge(judge_of(arguments, recipe), arguments.parallel, _path(arguments.votes))
        return choosing.finish(arguments.to, _path(arguments.out))


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


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text).expanduser()


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
