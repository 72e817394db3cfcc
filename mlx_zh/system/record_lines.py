"""Files of JSON lines to which several programs may add: each line is there whole, or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_zh.errors import StorageError
from mlx_zh.system.json_text import parse_json
from mlx_zh.system.storage import json_line, make_folder, require_in_place, storage_errors, sync, sync_folder

_BLOCK = 1 << 16  # bytes in which the last line is looked for
_WAIT, _PAUSE = 10.0, 0.01  # seconds for another writer, and between two looks


def append_record(path: Path, value: Any) -> None:
    """Append a value without secrets as one line; on return it survives a kill and a power cut.

    Another writer is waited for. What a killed writer left of its last line is removed first, and a whole last line
    without its end gets one. Raises StorageError; then the file is as it was.
    """
    line = json_line(value).encode("utf-8", errors="replace")
    with storage_errors(path):
        require_in_place(path)
        make_folder(path.parent)
        is_new = not path.exists()
        with _locked(path) as file:
            size = _end_of_lines(file)
            if size is None:
                size, line = os.fstat(file).st_size, b"\n" + line
            try:
                if os.write(file, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                sync(file)
            except OSError:
                os.ftruncate(file, size)
                raise
        if is_new:
            sync_folder(path.parent)


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The file opened for appending, locked; the system releases the lock when its holder ends."""
    until = time.monotonic() + _WAIT
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            _wait_for_lock(file, path, until)
            if path.exists() and os.path.samestat(os.fstat(file), path.stat()):  # not moved or removed meanwhile
                yield file
                return
        finally:
            os.close(file)


def _wait_for_lock(file: int, path: Path, until: float) -> None:
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise StorageError(
                    f"{path}: another program has held its lock for {_WAIT:.0f} seconds. End that program, then try "
                    "again."
                ) from None
            time.sleep(_PAUSE)
        except OSError:  # a file system without locks; a single write at the end is the best that it offers
            return


def _end_of_lines(file: int) -> int | None:
    """Where the next line begins, after removing a broken last line; None if the last line is whole but not ended."""
    size = os.fstat(file).st_size
    tail, start = b"", size
    while start and b"\n" not in tail:
        block = min(_BLOCK, start)
        start -= block
        tail = os.pread(file, block, start) + tail
    last = tail.rpartition(b"\n")[2]
    if not last:
        return size
    try:
        parse_json(last)
        return None
    except ValueError:
        if not last.startswith(b"{"):  # no line of ours
            return None
    os.ftruncate(file, size - len(last))
    return size - len(last)
