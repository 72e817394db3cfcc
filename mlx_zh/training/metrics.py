"""`metrics.jsonl`: a line a step, in the order of the run, without gaps or doubles."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mlx_zh.system.storage import storage_errors, sync


class MetricsLog:
    """Appends lines to a file; `cut` takes it back to an earlier length, for a run that resumes.

    With `keep` false, for all ranks but the first, it writes nothing.
    """

    def __init__(self, path: Path, *, keep: bool = True) -> None:
        self._path, self._keep = path, keep

    def append(self, figures: dict[str, Any]) -> None:
        """Write one line."""
        if not self._keep:
            return
        line = json.dumps(figures, ensure_ascii=False, allow_nan=True) + "\n"
        with storage_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.write(line.encode())

    def size(self) -> int:
        """Bytes written so far, safely on disk."""
        if not self._path.exists():
            return 0
        with self._path.open("rb") as file:
            sync(file.fileno())
            return file.seek(0, os.SEEK_END)

    def cut(self, size: int) -> None:
        """Forget what was written beyond `size` bytes."""
        if self._path.exists():
            with storage_errors(self._path), self._path.open("rb+") as file:
                file.truncate(min(size, file.seek(0, os.SEEK_END)))  # truncating must not pad a shorter file

    def read(self) -> list[dict[str, Any]]:
        """All lines."""
        if not self._path.exists():
            return []
        return [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]
