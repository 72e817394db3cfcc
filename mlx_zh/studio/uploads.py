"""Files that were dropped on a page: stored in the project's folder `data`, under a safe name, never over another."""

from __future__ import annotations

import os
import re
import secrets
import time
import unicodedata
from collections.abc import AsyncIterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from mlx_zh.corpus.data_files import LOCAL_SUFFIXES, TABLE_SUFFIXES
from mlx_zh.errors import StudioError
from mlx_zh.system.links import is_readable
from mlx_zh.system.storage import storage_errors

SUFFIXES = (*LOCAL_SUFFIXES, *TABLE_SUFFIXES)
LARGEST = 1 << 30  # bytes of a file
_FOLDER = "data"
_PART = ".upload-"  # how the names of unfinished files begin
_ABANDONED = 3600.0  # seconds without a byte after which one was left by a studio that was killed
_LONGEST = 80  # characters of a name before its suffix
_UNSAFE = re.compile(r"[^\w.()（）\-]+")


def safe_name(name: str) -> str:
    """A file name without a path, control characters, or what shells and other systems treat specially.

    Raises StudioError for a kind of file that is no data.
    """
    plain = unicodedata.normalize("NFC", name).replace("\\", "/").rpartition("/")[2]
    stem, dot, suffix = plain.rpartition(".")
    if f"{dot}{suffix}".lower() not in SUFFIXES:
        raise StudioError(f"{_shown(plain)} is no data file. These can be used: {', '.join(SUFFIXES)}.")
    stem = _UNSAFE.sub("-", stem).strip("-._ ")[:_LONGEST].rstrip("-._ ")
    while len(os.fsencode(stem)) > 200:
        stem = stem[:-1]
    return f"{stem or 'data'}.{suffix.lower()}"


def _shown(name: str) -> str:
    return name if len(name) <= 100 else f"{name[:100]}…"


async def store(project: Path, name: str, chunks: AsyncIterator[bytes], size: int) -> Path:
    """Write an uploaded file below the project; the path from there. One with the same content is used again.

    Raises StudioError for a file that is too large or no data, StorageError if it cannot be written.
    """
    target = safe_name(name)
    if size > LARGEST:
        raise StudioError(
            f"{target} has {size / 1e9:.1f} GB; the page takes up to {LARGEST / 1e9:.1f} GB. Copy it into the "
            f"folder {project / _FOLDER} yourself, and name it in the recipe."
        )
    folder = project / _FOLDER
    with storage_errors(folder):
        folder.mkdir(exist_ok=True)
        if not folder.resolve().is_relative_to(project.resolve()):
            raise StudioError(f"{folder} is a link to another place. Files are stored in the project only.")
        _remove_left(folder)
        part = folder / f"{_PART}{secrets.token_hex(8)}"
        digest, written = sha256(), 0
        try:
            with part.open("xb") as file:
                async for chunk in chunks:
                    written += len(chunk)
                    if written > LARGEST:
                        raise StudioError(f"{target} is larger than {LARGEST / 1e9:.1f} GB.")
                    digest.update(chunk)
                    file.write(chunk)
            return _named(part, folder / target, digest.digest()).relative_to(project)
        finally:
            with suppress(FileNotFoundError):
                part.unlink()


def _remove_left(folder: Path) -> None:
    """Remove the unfinished files of studios that were killed: each can hold a gigabyte, and nobody sees them."""
    for path in folder.glob(f"{_PART}*"):
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime > _ABANDONED:
                path.unlink()


def _named(part: Path, target: Path, digest: bytes) -> Path:
    """Give the finished file its name, or the next one that is free. A link to an existing name fails, so nothing
    is ever replaced."""
    for number in range(1, 1000):
        path = target if number == 1 else target.with_name(f"{target.stem}-{number}{target.suffix}")
        try:
            os.link(part, path)
            return path
        except FileExistsError:
            if path.is_file() and not path.is_symlink() and _digest(path) == digest:
                return path
        except OSError:  # a file system without hard links
            if not os.path.lexists(path):
                part.rename(path)
                return path
    raise StudioError(f"there are too many files called {target.name} here.")


def _digest(path: Path) -> bytes:
    digest = sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.digest()


def data_files(project: Path) -> list[str]:
    """The data files that lie in the project's folder `data` or beside its recipes, as paths from the project."""
    paths: list[Path] = []
    for folder in (project / _FOLDER, project):
        with suppress(OSError):
            paths += sorted(folder.iterdir())
    return [str(path.relative_to(project)) for path in paths if _is_data(project, path)][:_LISTED]


def _is_data(project: Path, path: Path) -> bool:
    named = path.name[:1] != "." and path.suffix.lower() in SUFFIXES and path.suffix.lower() != ".md"
    return named and path.is_file() and is_readable(project, path)


_LISTED = 200  # files that are offered
