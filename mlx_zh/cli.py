"""`mlx-zh STAGE RECIPE [key=value ...]`."""

from __future__ import annotations

import importlib
import sys

from mlx_zh.system.entry import entry

STAGES = {
    "run": "do everything that a recipe asks for, and nothing twice",
    "prepare": "read, clean, mix and tokenize the data",
    "sft": "tune the model on conversations",
    "dpo": "tune the model on better and worse answers",
    "eval": "ask models C-Eval, CMMLU or an exam of your own, and compare them",
    "fuse": "merge an adapter into its base, for mlx-lm, transformers, llama.cpp or PEFT",
    "chat": "talk to a model",
    "plan": "tell beforehand how much memory and time a run takes",
    "doctor": "look at this machine: what is there, what is missing, what a bug report needs",
    "report": "write what a run gained: a page, a text and pictures",
}


def main(argv: list[str] | None = None) -> None:
    """The `mlx-zh` command. Exits."""
    entry(_stage, argv)


def _stage(argv: list[str] | None) -> int:
    arguments = argv or []
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: mlx-zh STAGE RECIPE [section.key=value ...]\n\nstages:")
        for name, purpose in STAGES.items():
            print(f"  {name:<10} {purpose}")
        print("\n`mlx-zh STAGE --help` says more. Each stage is also `python -m mlx_zh.STAGE`.")
        return 0
    stage, *rest = arguments
    if stage == "--version":
        from mlx_zh import __version__

        print(f"mlx-zh {__version__}")
        return 0
    if stage not in STAGES:
        print(f"error: there is no stage {stage!r}; choose from {', '.join(STAGES)}.", file=sys.stderr)
        return 2
    return importlib.import_module(f"mlx_zh.{stage}").main(rest) or 0
