"""SHA-256 of files, remembered: a large file is read again only when its size or time of change is another."""

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


class Fingerprints:
    """Digests of files, kept in a JSON file of the cache folder."""

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
                    with place.open("rb") as file:
                        known = [*state, hashlib.file_digest(file, "sha256").hexdigest()]
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


def digest(value: Any) -> str:
    """32 hex digits of plain values."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
