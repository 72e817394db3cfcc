"""The `mlx-zh` command: `mlx-zh STAGE RECIPE [KEY=VALUE ...]`."""

from __future__ import annotations

import importlib

from mlx_zh.errors import RecipeError
from mlx_zh.language.translation import in_readers_language
from mlx_zh.system.entry import entry

STAGES = {
    "init": "write a recipe for your own data: a spreadsheet, or a data file of any usual kind",
    "run": "run all steps of a recipe; steps that are up to date are not repeated",
    "prepare": "read, clean, mix and tokenize the data",
    "sft": "fine-tune the model on conversations",
    "dpo": "fine-tune the model on pairs of a better and a worse answer, or on good and bad ones (KTO)",
    "sample": "draw several answers to each of many prompts, for preference data from the model itself",
    "eval": "test models on C-Eval, CMMLU or an exam of your own, and compare them",
    "fuse": "merge the adapter into the base, for mlx-lm, transformers, llama.cpp or PEFT",
    "chat": "chat with a model",
    "serve": "serve the models of a run at an OpenAI-compatible address, for other programs on this machine",
    "choose": "choose among sampled answers by rule, judge or hand, and write data",
    "arena": "compare two models on the same prompts, by rule, judge or hand",
    "plan": "estimate the memory and time of a run before it starts",
    "doctor": "check this machine and say what is missing; its output belongs in a bug report",
    "report": "write the report of a run: a web page, a text and plots",
    "compare": "compare runs: what differs, curves, exams and answers on one page",
    "studio": "watch, compare, start and try runs on a page in the browser",
}

_MORE = "`mlx-zh STAGE --help` shows a stage's options. Each stage also runs as `python -m mlx_zh.STAGE`."


def main(argv: list[str] | None = None) -> None:
    """Run the `mlx-zh` command and exit with its status."""
    entry(_stage, argv)


def _stage(argv: list[str] | None) -> int:
    arguments = argv or []
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            f"{in_readers_language('usage: ')}mlx-zh STAGE RECIPE [KEY=VALUE ...]\n\n{in_readers_language('stages:')}"
        )
        for name, purpose in STAGES.items():
            print(f"  {name:<10} {in_readers_language(purpose)}")
        print(f"\n{in_readers_language(_MORE)}")
        return 0
    stage, *rest = arguments
    if stage == "--version":
        from mlx_zh import __version__

        print(f"mlx-zh {__version__}")
        return 0
    if stage == "kto":
        raise RecipeError(
            "KTO is a loss of the stage dpo: run `mlx-zh dpo RECIPE dpo.loss=kto`. Its rows, with a label or as "
            "pairs, stand in data.dpo."
        )
    if stage not in STAGES:
        raise RecipeError(f"there is no stage {stage!r}; choose from {', '.join(STAGES)}.")
    return importlib.import_module(f"mlx_zh.{stage}").main(rest) or 0
