"""The process that holds a lock file, found without trying the lock.

The lock file names its holder by process id, but ids are used again. A process that has the file open is the holder:
no other process opens it for longer than a moment.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from mlx_zh.system.json_text import parse_json

_NAME = re.compile("mlx[_-]zh")
_GONE = (psutil.Error, OSError, ValueError)


def holder(path: Path, *, left_behind: bool = True) -> psutil.Process | None:
    """The process that holds the lock file at `path`; None if it is free, or its holder belongs to another user.

    The process that the file names is looked at first. With `left_behind`, if it has ended, a child that inherited
    the lock from it is looked for.
    """
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):  # a pipe would block its reader
            return None
        with path.open("rb") as file:
            text = file.read(1000)
    except OSError:
        return None
    named = _named(text)
    if named is not None and _has_open(named, about):
        return named
    if not left_behind:
        return None
    return next((process for process in _own_programs() if _has_open(process, about)), None)


def _named(text: bytes) -> psutil.Process | None:
    with suppress(*_GONE, TypeError, KeyError, OverflowError):
        return psutil.Process(int(parse_json(text)["process"]))
    return None


def _own_programs() -> Iterator[psutil.Process]:
    """The processes of this user that run this program."""
    user = os.getuid()
    for process in psutil.process_iter():
        with suppress(*_GONE):
            if process.uids().real == user and any(_NAME.search(word) for word in process.cmdline()):
                yield process


def _has_open(process: psutil.Process, about: os.stat_result) -> bool:
    with suppress(*_GONE):
        for file in process.open_files():
            with suppress(OSError):
                if os.path.samestat(os.stat(file.path), about):
                    return True
    return False
