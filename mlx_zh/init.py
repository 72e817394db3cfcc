"""A recipe for your own data: `python -m mlx_zh.init FILE…`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_zh.errors import RecipeError
from mlx_zh.system.arguments import Parser

if TYPE_CHECKING:
    from mlx_zh.corpus.survey import Survey
    from mlx_zh.stages.first_recipe import Choices, Use


def main(argv: list[str] | None = None) -> int:
    """Look at the user's files, ask what is to be done, and write a recipe; returns the exit status.

    Raises MlxZhError, and KeyboardInterrupt at the end of the input; then nothing is written.
    """
    arguments = _parser().parse_args(argv)

    from mlx_zh.language.reader import say
    from mlx_zh.stages import own_files, sample_rows
    from mlx_zh.stages.first_recipe import check_use, default_use, write_recipe
    from mlx_zh.stages.own_models import fitting_memory, suggested_model
    from mlx_zh.system import console

    paths = [Path(expanduser(name)) for name in arguments.files]
    columns = None if arguments.columns is None else columns_of(arguments.columns)
    if arguments.name is not None:
        _target(arguments.name, arguments.force)  # before the files are read, which may take a while
    command = " ".join(["mlx-zh init", *map(own_files.quoted, arguments.files)])
    data = own_files.survey_files(paths, columns, arguments.sheet, command)
    own_files.tell(data)
    sample_rows.show(data.surveys, arguments.model or suggested_model())
    if arguments.use is not None:
        check_use(arguments.use, data.surveys)
    choices = _choices(arguments, data.surveys, default_use(data.surveys))
    target = _target(choices.name, arguments.force)
    write_recipe(target, data.surveys, choices, fitting_memory)
    rows = sum(result.usable for result in data.surveys)
    console.say()
    console.say(say("init-written", recipe=target.name, rows=rows, model=choices.model))
    console.say(say("init-next", recipe=target.name))
    return 0


def _parser() -> argparse.ArgumentParser:
    options = Parser(
        "mlx-zh init",
        description="Write a recipe for your own data: questions and answers in a spreadsheet, or in a data file.",
    )
    options.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help=".xlsx, .xls, .csv, .tsv, .json, .jsonl, .parquet, or a folder of them",
    )
    options.add_argument(
        "--columns",
        metavar="NAME=COLUMN,…",
        help="which columns are which, for example prompt=question,response=answer",
    )
    options.add_argument("--sheet", help="the sheet of an Excel workbook; by default the first one with rows")
    options.add_argument("--model", help="the base model: a short name, a hub id, a folder or a .gguf file")
    options.add_argument(
        "--budget", metavar="TIME", help="how long the run may take, for example 8h (the default) or 90m; 0: no limit"
    )
    options.add_argument(
        "--use",
        choices=("sft", "sft-dpo", "dpo"),
        help="sft: learn the answers; sft-dpo: then also which answers are better, if the data has pairs",
    )
    options.add_argument("--name", help="the name of the run and of the recipe's file")
    options.add_argument("--yes", action="store_true", help="ask nothing; take the defaults")
    options.add_argument("--force", action="store_true", help="overwrite a recipe of this name")
    return options


def columns_of(text: str) -> dict[str, str]:
    """The columns of `prompt=问题,response=答案`, full-width marks included. Raises RecipeError."""
    from mlx_zh.language.reader import say

    columns = {}
    for part in re.split("[,，、;；]", text):
        ours, equals, theirs = (piece.strip() for piece in re.sub("[＝：:]", "=", part, count=1).partition("="))
        if not (ours and equals and theirs):
            raise RecipeError(say("init-columns-form", given=text))
        columns[ours] = theirs
    return columns


def _choices(arguments: argparse.Namespace, surveys: Sequence[Survey], use: Use) -> Choices:
    """What the command line says, and for the rest what the user answers, or the defaults with --yes."""
    from mlx_zh.language.reader import say
    from mlx_zh.stages import interview, own_models
    from mlx_zh.stages.first_recipe import Choices

    asking = sys.stdin.isatty() and not arguments.yes
    model = arguments.model and own_models.checked_model(interview.plain(arguments.model))
    if model is None:
        model = own_models.ask_model() if asking else own_models.suggested_model()
    budget = interview.budget_of(arguments.budget or interview.DEFAULT_BUDGET)
    if arguments.budget is None and asking:
        budget = interview.ask_budget()
    if arguments.use is not None:
        use = arguments.use
    elif asking and use == "sft-dpo":
        use = interview.ask_use()
    name = interview.default_name(surveys[0].path) if arguments.name is None else interview.name_of(arguments.name)
    if arguments.name is None and asking:
        question = say("init-ask-name", default=name)
        name = interview.ask(question, name, lambda answer: _target(answer, arguments.force).stem)
    return Choices(name, model, budget, use)


def _target(name: str, force: bool) -> Path:
    """The recipe's file. Raises RecipeError for a name that is none, and for a file that exists unless `force`."""
    from mlx_zh.language.reader import say
    from mlx_zh.stages.interview import name_of

    path = Path(f"{name_of(name)}.yaml")
    if path.exists() and not force:
        raise RecipeError(say("init-exists", recipe=path.name))
    return path


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
