"""What is left of an error that nobody foresaw: a file with its traceback, without secrets."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path

from mlx_zh import __version__
from mlx_zh.errors import first_line
from mlx_zh.system.redaction import cut, printable
from mlx_zh.system.storage import cache_folder, write_text

STATUS = 70  # EX_SOFTWARE of sysexits.h: a fault of the program
_KEPT = 20  # files; older ones are removed
_LONGEST = 100_000  # characters of a traceback that are kept
_LONGEST_REASON = 300  # characters of the error's own text that are shown


def traceback_text(error: BaseException) -> str:
    """The traceback of an error without secrets and control characters; it is cut in the middle where it is long."""
    text = "".join(traceback.format_exception(error))
    if len(text) <= _LONGEST:
        return printable(text)
    return f"{printable(text[: _LONGEST // 2])}\n…\n{printable(text[-_LONGEST // 2 :])}"


def record_crash(error: BaseException) -> str:
    """Write the traceback of an unforeseen error to a file; returns a paragraph for the user that names it."""
    text = printable(cut(first_line(error), _LONGEST_REASON))[:_LONGEST_REASON]
    name = type(error).__name__
    reason = name if text == name else f"{name}: {text}"
    if (path := _write(error)) is None:
        return f"something failed that was not foreseen ({reason}), and no file could be written about it. {_ADVICE}"
    return f"something failed that was not foreseen ({reason}). The details are in {path}, without secrets. {_ADVICE}"


_ADVICE = "This is a fault of mlx-zh: please report it with that file and the output of `mlx-zh doctor`."


def _write(error: BaseException) -> Path | None:
    name = f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    text = "\n".join(
        [
            f"mlx-zh {__version__}, Python {platform.python_version()}, {platform.platform()}",
            f"command: {' '.join(sys.argv)}",
            "",
            traceback_text(error),
        ]
    )
    for folder in (cache_folder() / "crashes", Path(tempfile.gettempdir()) / "mlx-zh-crashes"):
        with suppress(Exception):
            write_text(folder / name, text)
            _sweep(folder)
            return folder / name
    return None


def _sweep(folder: Path) -> None:
    for path in sorted(folder.glob("crash-*.txt"))[:-_KEPT]:
        path.unlink(missing_ok=True)
