"""One command at a time in a run folder: a lock that the system drops when its holder ends, however that ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mlx_zh.errors import StorageError
from mlx_zh.system.storage import storage_errors

_NAME = ".lock"
_INHERITED = "MLX_ZH_LOCK"  # in the environment of a stage: the descriptor that it shares with its pipeline
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@dataclass(frozen=True, slots=True)
class Lock:
    """A run folder held by this process, and by those that get `descriptor` with `environment`.

    `left_by` is who held it last and was killed; `works` is false on a file system without locks.
    """

    descriptor: int
    left_by: str | None = None
    works: bool = True

    @property
    def environment(self) -> Mapping[str, str]:
        """Lets a child that inherits the descriptor work in the folder too."""
        return {_INHERITED: str(self.descriptor)}


@contextmanager
def locked(folder: Path, what: str) -> Iterator[Lock]:
    """Hold the folder's lock while `what` is done. Nothing is left of it, nor of a folder made for it and not used.

    Raises StorageError where another process holds it. What counts is the kernel's lock, never that the file is
    there: one that a killed process or a power cut left behind is taken over.
    """
    path = folder / _NAME
    if (shared := _shared(path)) is not None:
        yield Lock(shared)
        return
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    with storage_errors(folder):
        descriptor, works = _acquire(path)
    try:
        left_by = _told(descriptor)
        about = {"what": what, "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M")}
        with suppress(OSError):  # only a courtesy: a full disk must not keep a run from saying so in its own way
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(about).encode(), 0)
        yield Lock(descriptor, left_by, works)
    finally:
        with suppress(OSError):
            path.unlink()  # still held: whoever waits for this very file looks again, see `_acquire`
            for place in made:
                place.rmdir()
        os.close(descriptor)


def _shared(path: Path) -> int | None:
    """The descriptor that this process got from its pipeline, if it is this folder's."""
    try:
        descriptor = int(os.environ.get(_INHERITED, ""))
        return descriptor if os.path.samestat(os.fstat(descriptor), path.stat()) else None
    except (ValueError, OSError):
        return None


def _acquire(path: Path) -> tuple[int, bool]:
    """The lock's descriptor, and whether the file system knows locks."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # another process has just removed the folder that it had made
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = f": {told}" if (told := _told(descriptor)) else ""
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise StorageError(
                    f"another run is at work in {path.parent}{holder}. Wait until it is done, or end it, "
                    "then run the same command again."
                ) from None
            if error.errno in _NO_LOCKS:
                return os.open(path, os.O_RDWR | os.O_CREAT, 0o644), False
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor, True
        os.close(descriptor)  # its holder removed the file between our two calls


def _told(descriptor: int) -> str | None:
    """Who wrote into the lock, as a person says it."""
    try:
        about = json.loads(os.pread(descriptor, 1000, 0))
        return f"{about['what']}, process {about['process']}, since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return None
