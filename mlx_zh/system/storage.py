"""Write files and folders atomically: under a temporary name, then fsync, then rename."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import platformdirs
import psutil

from mlx_zh.errors import StorageError

if TYPE_CHECKING:
    import mlx.core as mx

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cache_folder() -> Path:
    """This program's cache folder: `MLX_ZH_CACHE`, else the usual place of the platform."""
    if chosen := os.environ.get("MLX_ZH_CACHE"):
        return Path(chosen).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):  # platformdirs ignores a path that begins with ~
        return Path(base).expanduser() / "mlx-zh"
    return platformdirs.user_cache_path("mlx-zh")


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Inside this context, turn an OSError while writing `path` into a StorageError."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageError(
                f"{path}: no space left on disk. Nothing half-written was kept; free some space, then run the same "
                "command again."
            ) from error
        raise StorageError(f"{path} cannot be written: {error.strerror or error}.") from error


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes `path` when the block ends; if the block fails, it is removed.

    Raises StorageError if the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                sync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove temporary files of `path` that killed processes left; those of living processes stay."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        process = temporary.name.split(".")[-2]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            temporary.unlink(missing_ok=True)


def sync(descriptor: int) -> None:
    """Make the data of a file survive a power cut."""
    with suppress(OSError):  # a file system that supports only fsync
        if sync_to_disk(descriptor):
            return
    os.fsync(descriptor)


def sync_to_disk(descriptor: int) -> bool:
    """On macOS, flush the drive's own cache too, which fsync does not; False on other systems, where fsync does."""
    if sys.platform != "darwin":
        return False
    fcntl.fcntl(descriptor, _F_FULLFSYNC)
    return True


_F_FULLFSYNC = 51  # <sys/fcntl.h>


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, atomically. Raises StorageError."""
    with written_whole(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with readable Chinese, atomically. Raises StorageError."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_arrays(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str] | None = None) -> None:
    """Write arrays as safetensors, atomically. Raises StorageError."""
    import mlx.core as mx

    with written_whole(path) as file:
        mx.save_safetensors(file, arrays, metadata or {})


@contextmanager
def folder_whole(path: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `path` when the block ends; if the block fails, it is removed.

    Raises StorageError if the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside = path.with_name(f".{path.name}.{os.getpid()}.old")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            if path.exists():
                path.replace(aside)  # rename cannot replace a folder that is not empty
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(aside, ignore_errors=True)


def empty(folder: Path) -> None:
    """Remove the files in a folder."""
    for file in folder.iterdir():
        file.unlink()


def need_space(folder: Path, size: int, purpose: str) -> None:
    """Raise StorageError if fewer than `size` bytes are free for `folder`; `purpose` names what needs them."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    with storage_errors(folder):
        free = shutil.disk_usage(existing).free
    if free < size:
        raise StorageError(
            f"{folder}: {purpose} needs {size / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free. Nothing was written. "
            "Free some space, or write fewer formats."
        )
