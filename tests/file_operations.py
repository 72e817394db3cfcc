"""File operations of a process, counted, and a kill, a power cut, a signal or an error before one of them.

An operation opens a file to write, renames, removes or makes something, or flushes. A power cut also takes what was
not flushed: the end of files written since, and the last renames in folders that were not flushed.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")
_NEEDS_SPACE = ("open", "os.mkdir", "os.rename", "fsync")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC


class FileOperations:
    """Counts this process's operations in the folders `places`, and kills it before number `kill`.

    With a seed, `power` makes the kill a power cut. `instead` of it, a signal is sent ("SIGTERM"), or the operation
    and all later ones fail with an error ("ENOSPC"). `log` is a file descriptor for the operation's name.
    """

    def __init__(
        self, places: Sequence[Path], kill: int | None, power: int | None, log: int = 2, instead: str | None = None
    ) -> None:
        self._instead = instead
        self.count = 0
        self._places = [os.path.abspath(place) for place in places]
        self._kill, self._power, self._log = kill, power, log
        self._busy = False
        self._flushed = {_inode(status): _state(status) for _, status in self._files()}
        self._renamed: list[tuple[str, str, str | None]] = []  # from, to, a copy of what was there
        self._copies = f"{self._places[0]}-replaced"
        shutil.rmtree(self._copies, ignore_errors=True)

    def install(self) -> None:
        """Begin to count; there is no way back."""
        original = os.fsync

        def fsync(descriptor: int) -> None:
            self._before("fsync", os.fspath(os.readlink(f"/proc/self/fd/{descriptor}")))
            original(descriptor)
            self._note_flushed(descriptor)

        os.fsync = fsync  # type: ignore[assignment]
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._busy:
            return
        if event == "open" and not isinstance(arguments[0], int) and arguments[2] & _WRITES:
            self._before("open", os.fsdecode(arguments[0]))
        elif event in _CHANGES:
            folder = arguments[-1] if event in ("os.remove", "os.rmdir") else -1
            self._before(event, *(_path(name, folder) for name in arguments[: 2 if event == "os.rename" else 1]))

    def _before(self, event: str, *paths: str) -> None:
        places = [os.path.abspath(path) for path in paths]
        if not any(place.startswith(inside) for place in places for inside in self._places):
            return
        self._busy = True
        try:
            self.count += 1
            if self._kill is not None and self.count >= self._kill and self._instead is not None:
                self._disturb(self.count == self._kill, event, paths)
            elif self.count == self._kill:
                if self._power is not None:
                    self._lose(random.Random(self._power))
                os.write(self._log, f"\nkilled before {event} {' '.join(paths)}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)
            if event == "os.rename":
                self._renamed.append((places[0], places[1], self._copy_of(places[1])))
        finally:
            self._busy = False

    def _disturb(self, first: bool, event: str, paths: Sequence[str]) -> None:
        """Send the signal once, or raise the error for every operation that a full or failing disk refuses."""
        assert self._instead is not None
        if self._instead.startswith("SIG"):
            if first:
                os.write(self._log, f"\n{self._instead} before {event} {' '.join(paths)}\n".encode())
                os.kill(os.getpid(), getattr(signal, self._instead))
        elif self._instead == "EFBIG":  # not before opening a file, but in every write to one
            if first:
                os.write(self._log, f"\n{self._instead} from {event} {' '.join(paths)}\n".encode())
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        elif event in _NEEDS_SPACE:
            if first:
                os.write(self._log, f"\n{self._instead} at {event} {' '.join(paths)}\n".encode())
            number = getattr(errno, self._instead)
            raise OSError(number, os.strerror(number), paths[0])

    def _copy_of(self, path: str) -> str | None:
        """A second name of the file that a rename is about to replace."""
        if self._power is None or not os.path.isfile(path):
            return None
        os.makedirs(self._copies, exist_ok=True)
        copy = os.path.join(self._copies, str(self.count))
        os.link(path, copy)
        return copy

    def _note_flushed(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            folder = os.readlink(f"/proc/self/fd/{descriptor}")
            self._renamed = [entry for entry in self._renamed if os.path.dirname(entry[1]) != folder]
        else:
            self._flushed[_inode(status)] = _state(status)

    def _lose(self, chance: random.Random) -> None:
        """Take away what a power cut may take: the end of files, and the last renames."""
        for path, status in self._files():
            size, flushed = status.st_size, self._flushed.get(_inode(status))
            if flushed != _state(status):
                kept = min(flushed[0], size) if flushed else 0
                os.truncate(path, chance.choice([kept, chance.randint(kept, size)]))
        lost = chance.randint(0, len(self._renamed))
        for source, target, copy in reversed(self._renamed[len(self._renamed) - lost :]):
            with suppress(OSError):
                os.rename(target, source)
                if copy is not None:
                    os.rename(copy, target)

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        for place in self._places:
            for folder, _, names in os.walk(place):
                for name in names:
                    path = os.path.join(folder, name)
                    with suppress(OSError):
                        status = os.lstat(path)
                        if stat.S_ISREG(status.st_mode):
                            yield path, status


def _path(name: Any, folder: int) -> str:
    """The path of what an operation names by a path, by a path in an open folder, or by a descriptor."""
    if isinstance(name, int):
        return os.readlink(f"/proc/self/fd/{name}")
    return os.path.join(os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else "", os.fsdecode(name))


def _inode(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _state(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
