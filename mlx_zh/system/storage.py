"""Write files and folders atomically: under a temporary name, then fsync, then rename, then fsync of the folder.

A temporary name is `.NAME.PROCESS.tmp`, and `.NAME.PROCESS.old` for a folder that is being replaced. `sweep` removes
those of processes that were killed.

`write_text`, `write_json` and `append_json` write what a user may pass on, so secrets are taken out first. The exact
writers are for what must come back unchanged: the cache, tokenizers and checkpoints.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import platformdirs
import psutil

from mlx_zh.errors import StorageError
from mlx_zh.system.redaction import redact, redacted

if TYPE_CHECKING:
    import mlx.core as mx

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)\.(?P<kind>tmp|old)")
_CLOCK = 60.0  # seconds by which the time stamps of files and of processes may differ
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cache_folder() -> Path:
    """This program's cache folder: `MLX_ZH_CACHE`, else the usual place of the platform."""
    if chosen := os.environ.get("MLX_ZH_CACHE"):
        return Path(expanduser(chosen))
    if base := os.environ.get("XDG_CACHE_HOME"):  # platformdirs ignores a path that begins with ~
        return Path(expanduser(base)) / "mlx-zh"
    return platformdirs.user_cache_path("mlx-zh")


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Inside this context, turn an OSError while writing `path` into a StorageError."""
    try:
        yield
    except OSError as error:
        path = _lasting(path)
        if error.errno in _FULL:
            raise StorageError(
                f"{path}: no space left on disk. Nothing half-written was kept; free some space, then run the same "
                "command again."
            ) from error
        if error.errno == errno.EIO:
            raise StorageError(
                f"{path} cannot be written: {error.strerror}. Nothing half-written was kept. Check whether the disk "
                "is connected and works, then run the same command again."
            ) from error
        raise StorageError(f"{path} cannot be written: {error.strerror or error}.") from error


def _lasting(path: Path) -> Path:
    """A path with the names that files and folders have once they are written whole."""
    return Path(*(match["name"] if (match := _LEFTOVER.fullmatch(part)) else part for part in path.parts))


Identity = tuple[int, int]  # device and inode

_works: dict[Path, Identity] = {}  # the folders that this process works in, by absolute path


def identity(path: Path) -> Identity | None:
    """What tells a file or folder from another one that has its path later; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Inside this context, writes below `folder` fail once the folder was moved or removed.

    Otherwise it would be made anew, and a run would lie in two halves.
    """
    place = Path(os.path.abspath(folder))
    inner = place in _works
    if not inner and (known := identity(place)) is not None:
        _works[place] = known
    try:
        yield
    finally:
        if not inner:
            _works.pop(place, None)


def require_in_place(path: Path) -> None:
    """Raise StorageError if `path` lies in a folder that this process works in and that was moved or removed."""
    for folder, known in _works.items():
        if Path(os.path.abspath(path)).is_relative_to(folder) and identity(folder) != known:
            raise moved(folder)


def moved(path: Path) -> StorageError:
    """The error for a file or folder that is no longer where this process has begun to write it."""
    return StorageError(
        f"{path} was moved, removed or replaced while this command was writing there, so it stops. What it had saved "
        "is in the moved folder: move that back, then run the same command again."
    )


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, so that they survive a power cut."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync_folder(path.parent)


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes `path` when the block ends; if the block fails, it is removed.

    Raises StorageError if the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        require_in_place(path)
        make_folder(path.parent)
        sweep(path.parent, path.name)
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                sync(file.fileno())
            require_in_place(path)
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def append(path: Path, data: bytes, *, flush: bool = False) -> None:
    """Add bytes at the end of a file; `flush` makes them survive a power cut. Raises StorageError."""
    with storage_errors(path):
        require_in_place(path)
        make_folder(path.parent)
        with path.open("ab") as file:
            file.write(data)
            if flush:
                file.flush()
                sync(file.fileno())


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left half-written in `folder`, or only what was to become `name` in it.

    A folder that was to be replaced is put back if its successor is not there.
    """
    for leftover in sorted(folder.glob(".*")):
        match = _LEFTOVER.fullmatch(leftover.name)
        if match is None or name not in (None, match["name"]) or _is_owned(leftover, int(match["process"])):
            continue
        with suppress(OSError):
            if match["kind"] == "old" and not (target := folder / match["name"]).exists():
                leftover.rename(target)
            else:
                remove(leftover)


def _is_owned(leftover: Path, process: int) -> bool:
    """Whether the process that wrote this still runs: one of this number that is older than the file."""
    try:
        return psutil.Process(process).create_time() <= leftover.lstat().st_ctime + _CLOCK
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False
    except psutil.Error:  # another user's process
        return True


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
    """Write a text file in UTF-8 without secrets, atomically. Raises StorageError."""
    write_exact_text(path, redact(text))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with readable Chinese, without secrets, atomically. Raises StorageError."""
    write_exact_json(path, redacted(value))


def append_json(path: Path, value: Any) -> None:
    """Append a value without secrets to a file of JSON lines. Raises StorageError."""
    append(path, json_line(value).encode("utf-8", errors="replace"))


def json_line(value: Any) -> str:
    """A value without secrets as a line of JSON with readable Chinese; texts stand for what JSON has no form for."""
    return json.dumps(redacted(value), ensure_ascii=False, default=str) + "\n"


def write_exact_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, atomically. Raises StorageError.

    Half of a surrogate pair becomes a question mark.
    """
    with written_whole(path) as file:
        file.write(text.encode("utf-8", errors="replace"))


def write_exact_json(path: Path, value: Any) -> None:
    """Write indented JSON with readable Chinese, atomically. Raises StorageError."""
    write_exact_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


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
        require_in_place(path)
        make_folder(path.parent)
        sweep(path.parent, path.name)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            sync_tree(temporary)
            require_in_place(path)
            if path.exists():
                path.replace(aside)  # rename cannot replace a folder that is not empty
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            if aside.exists() and not path.exists():
                aside.replace(path)
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(aside, ignore_errors=True)


def visible(paths: Iterable[Path]) -> list[Path]:
    """The paths, sorted, without hidden files and what macOS and Windows write into folders by themselves."""
    return sorted(path for path in paths if not is_system_note(path.name))


def visible_tree(folder: Path, pattern: str = "**/*") -> list[Path]:
    """What a pattern finds in a folder, sorted, without what is hidden or in a hidden folder."""
    paths = folder.glob(pattern)
    return sorted(path for path in paths if not any(map(is_system_note, path.relative_to(folder).parts)))


def is_system_note(name: str) -> bool:
    """Whether a file or folder of this name is hidden (`._NAME`, `.DS_Store`), or is a system's own note."""
    return name.startswith(".") or name.lower() in _SYSTEM_NOTES


_SYSTEM_NOTES = ("__macosx", "thumbs.db", "desktop.ini", "icon\r")


def sync_tree(folder: Path) -> None:
    """Make a folder and all that is in it survive a power cut."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                sync(file.fileno())
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def set_damaged_aside(path: Path) -> Path:
    """Rename a damaged file or folder to `damaged-NAME`, in place of an earlier one; returns the new path."""
    aside = path.with_name(f"damaged-{path.name}")
    with storage_errors(path):
        remove(aside)
        path.rename(aside)
        sync_folder(path.parent)
    return aside


def remove(path: Path) -> None:
    """Remove a file or folder, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def empty(folder: Path) -> None:
    """Remove the files and folders in a folder."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


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
