"""Choose among sampled answers: `python -m mlx_zh.choose RECIPE --by rule|judge|hand --to pairs|kto|best`."""

from __future__ import annotations

from pathlib import Path

from mlx_zh.stages import command
from mlx_zh.stages.judge_options import parsed_choosing, settings_of

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
    arguments = parsed_choosing(parser, argv)
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
            choosing.decided.by_hand()
        elif arguments.by == "rule":
            choosing.decided.by_rules(settings_of(arguments))
        else:
            choosing.decided.by_judge(judge_of(arguments, recipe), arguments.parallel, _path(arguments.votes))
        return choosing.finish(arguments.to, _path(arguments.out))


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text).expanduser()


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
