"""The `mlx-zh` command: `mlx-zh STAGE RECIPE [KEY=VALUE ...]`."""

from __future__ import annotations

import importlib
import sys

from mlx_zh.system.entry import entry

STAGES = {
    "run": "run all steps of a recipe; steps that are up to date are not repeated",
    "prepare": "read, clean, mix and tokenize the data",
    "sft": "fine-tune the model on conversations",
    "dpo": "fine-tune the model on pairs of a better and a worse answer",
    "eval": "test models on C-Eval, CMMLU or an exam of your own, and compare them",
    "fuse": "merge the adapter into the base, for mlx-lm, transformers, llama.cpp or PEFT",
    "chat": "chat with a model",
    "plan": "estimate the memory and time of a run before it starts",
    "doctor": "check this machine and say what is missing; its output belongs in a bug report",
    "report": "write the report of a run: a web page, a text and plots",
}


def main(argv: list[str] | None = None) -> None:
    """Run the `mlx-zh` command and exit with its status."""
    entry(_stage, argv)


def _stage(argv: list[str] | None) -> int:
    arguments = argv or []
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: mlx-zh STAGE RECIPE [KEY=VALUE ...]\n\nstages:")
        for name, purpose in STAGES.items():
            print(f"  {name:<10} {purpose}")
        print("\n`mlx-zh STAGE --help` shows a stage's options. Each stage also runs as `python -m mlx_zh.STAGE`.")
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
