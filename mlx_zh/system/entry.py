"""Run a command and turn its errors into exit statuses."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from mlx_zh.errors import MlxZhError, first_line
from mlx_zh.language.translation import in_readers_language
from mlx_zh.system import crashes, device, hub_choice
from mlx_zh.system.accelerator import AcceleratorError, advice, cause
from mlx_zh.system.interrupts import ended_by_signals
from mlx_zh.system.redaction import cut, printable

_LONGEST = 8000  # characters of an error that are shown


def entry(main: Callable[[list[str] | None], int | None], argv: Sequence[str] | None = None) -> None:
    """Run a command's `main` and exit.

    The status is 0 when done or when nobody reads the output, 2 for an error that the user can fix, 70 for a fault of
    the program, 130 when interrupted. `--debug` anywhere on the command line (or MLX_ZH_DEBUG=1) also shows the
    traceback of an error.
    """
    _open_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("MLX_ZH_DEBUG") == "1"
    arguments = [a for a in arguments if a != "--debug"]
    hub_choice.announce_with(lambda line: print(in_readers_language(line), file=sys.stderr, flush=True))
    try:
        status = _status(main, arguments)
    except BaseException as error:  # also what libraries derive from BaseException, such as a panic in Rust
        status = _reported(error, debug)
    try:
        sys.stderr.flush()
    except (OSError, ValueError):
        _discard(sys.stderr)
    sys.exit(status)


def _status(main: Callable[[list[str] | None], int | None], arguments: list[str]) -> Any:
    """The exit status of a `main` that returns or exits."""
    status: Any
    try:
        with ended_by_signals():
            status = main(arguments) or 0
    except SystemExit as stop:  # from argparse, or from a command within `mlx-zh`
        status = stop.code
    sys.stdout.flush()
    return status


def _reported(error: BaseException, debug: bool) -> int:
    """Say on stderr what went wrong; returns the exit status. Nothing is said to a reader that has gone."""
    if isinstance(error, OSError) and error.errno in (*_GONE, *_FULL):
        _discard(sys.stdout)
        if error.errno in _GONE:
            return 0
    if debug:
        _print(crashes.traceback_text(error))
    if isinstance(error, KeyboardInterrupt):
        return 130
    fault = error.fault if isinstance(error, AcceleratorError) else None
    if fault is None and isinstance(error, RuntimeError):
        fault = device.fault_of(error)
    if isinstance(error, MlxZhError):
        _say(str(error))
    elif fault is not None:
        parts = (cause(fault), f": {error} ", advice(fault), " Then run the same command again.")
        _say("".join(map(in_readers_language, parts)))
    elif isinstance(error, OSError) and error.errno in _FULL:
        _say("no space is left where this command writes. Free some space, then run the same command again.")
    elif isinstance(error, FileNotFoundError) and _current_folder_is_gone():
        _say("the current folder has been removed. Change to a folder that exists, then run the same command again.")
    elif isinstance(error, OSError) and error.filename is not None and error.strerror:
        path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
        _say(f"{path} cannot be used: {error.strerror}. Check the path, and who may read and write it.")
    elif type(error).__name__ == "PanicException":  # each library in Rust has its own class of this name
        _say(
            f"a library gave up on a file that it could not work with ({first_line(error)}). Most likely it is the "
            "model's tokenizer.json: download the model again, or take another one."
        )
    elif isinstance(error, MemoryError):
        _say("the memory of this machine is exhausted. Close other programs, or give less data or a smaller model.")
    else:
        _say(crashes.record_crash(error))
        return crashes.STATUS
    return 2


def _open_streams() -> None:
    """Give a command that was started without standard streams others, and make these stand any character.

    Without them, a file that is opened later would become the standard output of libraries.
    """
    with suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
            pass
        os.close(descriptor)
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115 (open until the process ends)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a GBK terminal cannot show emoji


def _current_folder_is_gone() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


_GONE = (errno.EPIPE, errno.ESHUTDOWN)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _discard(stream: Any) -> None:
    """Send to nowhere what a stream still holds; otherwise Python prints an error when it exits."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say(text: str) -> None:
    """Print an error to stderr as one paragraph."""
    _print(f"{in_readers_language('error: ')}{_paragraph(text)}\n")


def _print(text: str) -> None:
    with suppress(OSError, ValueError):  # nobody can be told
        sys.stderr.write(text)
        sys.stderr.flush()


def _paragraph(text: str) -> str:
    """A text in the reader's language, without blank lines, secrets and control characters, cut at `_LONGEST`."""
    text = printable(in_readers_language(cut(text, _LONGEST)))
    text = "\n".join(stripped for line in text.split("\n") if (stripped := line.rstrip()))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
