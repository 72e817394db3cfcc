"""SHA-256 digests of files, texts and plain values, with a cache for files."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlx_zh.errors import DataError
from mlx_zh.system.storage import write_json

_FRESH = 2.0  # seconds; a file that changed this recently may change again without a new time stamp


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


class FileDigests:
    """File digests cached in a JSON file. A file is read again when its size, time stamp or inode has changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._cache: dict[str, list[Any]] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._cache = {}

    def digests(self, paths: Iterable[str]) -> dict[str, str]:
        """The digest of each file, by path. Raises DataError for a file that cannot be read."""
        digests, changed = {}, False
        for path in paths:
            try:
                file = Path(path).resolve()
                stat = file.stat()
                state = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
                entry = self._cache.get(str(file))
                if entry is None or entry[:3] != state:
                    entry = [*state, file_digest(file)]
                    if time.time() - stat.st_mtime > _FRESH:
                        self._cache[str(file)] = entry
                        changed = True
            except IsADirectoryError:
                raise DataError(f"{path} is a folder; give the path of one file in it") from None
            except FileNotFoundError:
                raise DataError(f"{path}: no such file; check the path") from None
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
            digests[path] = str(entry[3])
        if changed:
            write_json(self._path, self._cache)
        return digests
