"""SHA-256 digests of files, texts and plain values, with a cache for files."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_zh.errors import DataError, StorageError
from mlx_zh.system.json_text import load_json
from mlx_zh.system.links import check_regular
from mlx_zh.system.storage import cache_folder, write_exact_json

_FRESH = 2.0  # seconds; a file that changed this recently may change again without a new time stamp
_SLOW = 1 << 30  # bytes; reading that many may take longer than a second

Reading = Callable[[Path, int], None]  # called with a file and its size in bytes before it is read whole


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_digest(text: str) -> str:
    """SHA-256 of a text in UTF-8, 64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def value_digest(value: Any) -> str:
    """SHA-256 of a plain value, written as JSON with sorted keys, 64 hex digits."""
    return text_digest(json.dumps(value, sort_keys=True, ensure_ascii=False))


def digests_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of files in a folder, by name."""
    return {name: file_digest(folder / name) for name in names}


def damage(folder: Path, digests: Mapping[str, str]) -> str | None:
    """What differs from the `digests` by name that were taken when the files were written; None if nothing does."""
    for name, digest in digests.items():
        try:
            if file_digest(folder / name) != digest:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name}: {error.strerror or error}"
    return None


class FileDigests:
    """File digests remembered in a JSON file. A file is read again when anything that the system notes of it differs.

    That is its size, both time stamps and its inode. No program can set the time stamp of the last change (ctime), so
    an edit that keeps size and modification time is seen too. `reading` is called with the path and the size of a
    large file before it is read.
    """

    def __init__(self, path: Path, reading: Reading | None = None) -> None:
        self._path, self._reading = path, reading
        try:
            stored = load_json(path)
            whole = stored["check"] == value_digest(stored["files"])  # one flipped bit would look like other data
            self._cache: dict[str, list[Any]] = stored["files"] if whole else {}
        except (OSError, ValueError, LookupError, TypeError):
            self._cache = {}

    def digests(self, paths: Iterable[str]) -> dict[str, str]:
        """The digest of each file, by path. Raises DataError for a file that cannot be read."""
        digests, changed = {}, False
        for path in paths:
            try:
                file = Path(path).resolve()
                check_regular(file, DataError)
                digests[path], is_new = self._digest(file)
                changed = changed or is_new
            except IsADirectoryError:
                raise DataError(f"{path} is a folder; give the path of one file in it") from None
            except FileNotFoundError:
                raise DataError(f"{path}: no such file; check the path") from None
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
        if changed:
            files = {name: entry for name, entry in self._cache.items() if Path(name).exists()}
            with suppress(StorageError):  # without a cache that can be written, files are read each time
                write_exact_json(self._path, {"files": files, "check": value_digest(files)})
        return digests

    def _digest(self, file: Path) -> tuple[str, bool]:
        """A file's digest, and whether it was added to the cache."""
        stat = file.stat()
        state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        entry = self._cache.get(str(file))
        if isinstance(entry, list) and entry[:-1] == state:
            return str(entry[-1]), False
        if self._reading is not None and stat.st_size >= _SLOW:
            self._reading(file, stat.st_size)
        digest = file_digest(file)
        if time.time() - max(stat.st_mtime, stat.st_ctime) <= _FRESH:
            return digest, False
        self._cache[str(file)] = [*state, digest]
        return digest, True


def known_digests(reading: Reading | None = None) -> FileDigests:
    """The digests of models, results and other large files, remembered in the cache folder."""
    return FileDigests(cache_folder() / "digests.json", reading)
