"""Run a command and turn its errors into exit statuses."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from mlx_zh.errors import MlxZhError
from mlx_zh.language.translation import in_readers_language
from mlx_zh.system import device, hub_choice
from mlx_zh.system.accelerator import AcceleratorError, advice, cause
from mlx_zh.system.redaction import printable

_LONGEST = 8000  # characters of an error that are shown


def entry(main: Callable[[list[str] | None], int | None], argv: Sequence[str] | None = None) -> None:
    """Run a command's `main` and exit: 0 when done, 2 for an error that the user can fix, 130 when interrupted.

    `--debug` anywhere on the command line (or MLX_ZH_DEBUG=1) also shows the traceback of an error.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("MLX_ZH_DEBUG") == "1"
    arguments = [a for a in arguments if a != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a GBK terminal cannot show emoji
    hub_choice.announce_with(lambda line: print(in_readers_language(line), file=sys.stderr, flush=True))
    status: Any
    try:
        try:
            status = main(arguments) or 0
        except SystemExit as stop:  # from argparse, or from a command within `mlx-zh`
            status = stop.code
        sys.stdout.flush()
    except (MlxZhError, KeyboardInterrupt) as error:
        if debug:
            print(printable(traceback.format_exc()), end="", file=sys.stderr)
        status = 130
        if isinstance(error, MlxZhError):
            print(f"{in_readers_language('error: ')}{_paragraph(error)}", file=sys.stderr)
            status = 2
    except (RuntimeError, AcceleratorError) as error:
        fault = error.fault if isinstance(error, AcceleratorError) else device.fault_of(error)
        if debug or fault is None:
            raise
        parts = (cause(fault), f": {error} ", advice(fault), " Then run the same command again.")
        text = "".join(map(in_readers_language, ("error: ", *parts)))
        print(printable(text), file=sys.stderr)
        status = 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone: print nothing
        status = 0
    sys.exit(status)


def _paragraph(error: BaseException) -> str:
    """An error's text in the reader's language, without blank lines, secrets and control characters.

    It is cut at `_LONGEST`.
    """
    lines = [line.rstrip() for line in printable(in_readers_language(str(error))).split("\n")]
    text = "\n".join(line for line in lines if line)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
