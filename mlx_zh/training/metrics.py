"""`metrics.jsonl`, a line a step in the order of the run without gaps or doubles; and the steps that were skipped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_zh.errors import TrainingError
from mlx_zh.system.storage import storage_errors, sync, write_text

if TYPE_CHECKING:
    from mlx_zh.training.checkpoints import Progress

_SHOWN = 20  # examples named in a message; the file has them all


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


class Skipped:
    """`skipped.jsonl`: a line for each skipped step of `log`, from which it is made, so that the two always agree."""

    def __init__(self, path: Path, log: MetricsLog, most: int) -> None:
        self._path, self._log, self._most = path, log, most

    def write(self) -> None:
        """Write the file, or remove it where no step of the log was skipped."""
        lines = self._lines()
        if not lines:
            self._path.unlink(missing_ok=True)
            return
        kept = [
            {"step": f["step"], "loss": f["loss"], "grad_norm": f["grad_norm"], "examples": f["skipped_examples"]}
            for f in lines
        ]
        write_text(self._path, "".join(f"{json.dumps(line)}\n" for line in kept))

    def check(self, progress: Progress, total: int) -> None:
        """Raises TrainingError after too many skipped steps in a row, or at the end of a run that took none."""
        if progress.skipped_in_a_row >= self._most:
            told = f"{progress.skipped_in_a_row} steps in a row, up to step {progress.step}, were skipped"
        elif progress.step == total == progress.skipped_steps:
            told = f"every step was skipped, {total} in all"
        else:
            return
        examples = [e for f in self._lines()[-progress.skipped_in_a_row :] for e in f["skipped_examples"]]
        more = f" and {len(examples) - _SHOWN} more" if len(examples) > _SHOWN else ""
        named = ", ".join(map(str, examples[:_SHOWN])) + more
        raise TrainingError(
            f"{told}, because their loss or gradient was not a finite number. Their examples, as numbered from 0 in "
            f"the prepared training data: {named}; {self._path} has them step by step. Usual causes: a learning_rate "
            "that is too high, model.dtype: float16 (take bfloat16), damaged weights of the model or the adapter to "
            "start from, or these examples. Nothing was saved since the last checkpoint."
        )

    def _lines(self) -> list[dict[str, Any]]:
        return [line for line in self._log.read() if "skipped_examples" in line]
