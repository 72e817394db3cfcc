"""A lock that lets one command at a time work in a run folder.

The operating system releases it when its holder ends, even if the holder is killed.
"""

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
from mlx_zh.system.json_text import parse_json
from mlx_zh.system.storage import storage_errors, working_in

NAME = ".lock"
_INHERITED = (
    "MLX_ZH_LOCK"  # environment variable: the file descriptor of the lock that a stage shares with its pipeline
)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@dataclass(frozen=True, slots=True)
class Lock:
    """A held lock. A child process that inherits `descriptor` and gets `environment` may work in the folder too.

    `left_by` describes an earlier holder that was killed, if any. `works` is false on a file system without locks.
    """

    descriptor: int
    left_by: str | None = None
    works: bool = True

    @property
    def environment(self) -> Mapping[str, str]:
        """The environment variable for a child that inherits the descriptor."""
        return {_INHERITED: str(self.descriptor)}


@contextmanager
def locked(folder: Path, work: str) -> Iterator[Lock]:
    """Hold the folder's lock inside this context; `work` is what is done meanwhile, for messages.

    At the end the lock file is removed, and so is a folder that was created for it and is still empty. The kernel's
    lock decides, not whether the file exists: a file that a killed process left behind is taken over.

    Raises StorageError if another process holds the lock. Writes below the folder fail once it was moved or removed.
    """
    path = folder / NAME
    if (shared := _shared(path)) is not None:
        with working_in(folder):
            yield Lock(shared)
        return
    created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    with storage_errors(folder):
        descriptor, works = _acquire(path)
    try:
        left_by = _holder(descriptor)
        about = {"what": work, "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M")}
        with suppress(OSError):  # only information: the run itself reports a full disk better
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(about).encode(), 0)
        with working_in(folder):
            yield Lock(descriptor, left_by, works)
    finally:
        with suppress(OSError):
            path.unlink()  # still held: `_acquire` of another process checks that its file still exists
            for parent in created:
                parent.rmdir()
        os.close(descriptor)


def in_pipeline() -> bool:
    """Whether this process is a stage that `run` started."""
    return _INHERITED in os.environ


def _shared(path: Path) -> int | None:
    """The descriptor that this process inherited from its pipeline, if it belongs to this folder's lock."""
    try:
        descriptor = int(os.environ.get(_INHERITED, ""))
        return descriptor if os.path.samestat(os.fstat(descriptor), path.stat()) else None
    except (ValueError, OSError):
        return None


def _acquire(path: Path) -> tuple[int, bool]:
    """The lock's descriptor, and whether the file system supports locks. Raises StorageError if it is held."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # another process has just removed a folder that it had created
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = f": {name}" if (name := _holder(descriptor)) else ""
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


def _holder(descriptor: int) -> str | None:
    """The holder that the lock file names, as text for people."""
    try:
        about = parse_json(os.pread(descriptor, 1000, 0))
        return f"{about['what']}, process {about['process']}, since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return None
