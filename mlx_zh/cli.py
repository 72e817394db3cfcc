"""`mlx-zh STAGE RECIPE [key=value ...]`, and the one place that turns errors into exit statuses."""

from __future__ import annotations

import importlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from mlx_zh.errors import MlxZhError
from mlx_zh.system import device
from mlx_zh.system.redaction import printable

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

_LONGEST = 8000  # characters of an error that are shown


def entry(main: Callable[[list[str] | None], int | None], argv: Sequence[str] | None = None) -> None:
    """Run a stage's `main` and exit: 0 when done, 2 for what the user can mend, 130 when interrupted.

    `--debug` anywhere on the command line (or MLX_ZH_DEBUG=1) shows the traceback of an error too.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("MLX_ZH_DEBUG") == "1"
    arguments = [a for a in arguments if a != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal in GBK has no emoji
    status: Any
    try:
        try:
            status = main(arguments) or 0
        except SystemExit as stop:  # argparse, or a stage within `mlx-zh`
            status = stop.code
        sys.stdout.flush()
    except (MlxZhError, KeyboardInterrupt) as error:
        if debug:
            print(printable(traceback.format_exc()), end="", file=sys.stderr)
        status = 130
        if isinstance(error, MlxZhError):
            print(f"error: {_paragraph(error)}", file=sys.stderr)
            status = 2
    except RuntimeError as error:
        if debug or not device.is_out_of_memory(error):
            raise
        print(
            f"error: memory ran out: {error} Close other programs, or set memory.micro_tokens or memory.logit_rows "
            "lower, or memory.checkpoint_layers: true; then run the same command again.",
            file=sys.stderr,
        )
        status = 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads any more: say nothing
        status = 0
    sys.exit(status)


def _paragraph(error: BaseException) -> str:
    """An error's text without blank lines and without what must not be shown, whoever wrote the words in it."""
    lines = [line.rstrip() for line in printable(str(error)).split("\n")]
    text = "\n".join(line for line in lines if line)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"


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
