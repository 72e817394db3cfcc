"""SHA-256 digests of files and of plain values; those of large files are remembered."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlx_zh.errors import DataError
from mlx_zh.system.storage import write_json

_FRESH = 2.0  # seconds; a file changed this recently may change again within its time stamp


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_digest(text: str) -> str:
    """SHA-256 of a text in UTF-8, 64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def value_digest(value: Any) -> str:
    """SHA-256 of plain values as JSON with sorted keys, 64 hex digits."""
    return text_digest(json.dumps(value, sort_keys=True, ensure_ascii=False))


class FileDigests:
    """Digests of files, remembered in a JSON file: a file is read again when its size, time or inode is another."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._known: dict[str, list[Any]] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}

    def digests(self, paths: Iterable[str]) -> dict[str, str]:
        """The digest of each file. Raises DataError for one that cannot be read."""
        found, learned = {}, False
        for path in paths:
            try:
                place = Path(path).resolve()
                stat = place.stat()
                state = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
                known = self._known.get(str(place))
                if known is None or known[:3] != state:
                    known = [*state, file_digest(place)]
                    if time.time() - stat.st_mtime > _FRESH:
                        self._known[str(place)] = known
                        learned = True
            except IsADirectoryError:
                raise DataError(f"{path}: a folder; name one file in it") from None
            except FileNotFoundError:
                raise DataError(f"{path}: no such file") from None
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
            found[path] = str(known[3])
        if learned:
            write_json(self._path, self._known)
        return found
